"""A local judge that speaks the OpenAI protocol and misbehaves on demand."""

import json
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = "a: 20\nb: 60"
BAD_REPLIES = {
    "garbage": "I would rate this text between twenty and sixty.",
    "out of range": "0\n101",
    "swapped": "60\n20",
    "equal": "50\n50",
    "half": "a: 20",
    "commentary": "20\n60\nBecause it is lovely.",
    "empty": "",
}


class JudgeServer:
    """Answers by a plan: text -> faults to commit before the good answer, `reply(prompt)`."""

    def __init__(self):
        self.plan = {}
        self.reply = lambda prompt: GOOD
        self.asked, self.answered = Counter(), Counter()
        self.keys, self.bodies = set(), []
        self.active, self.most_active = 0, 0
        self.retried_early = []
        self._not_before = {}
        self._lock = threading.Lock()

    def next_fault(self, text):
        with self._lock:
            self.asked[text] += 1
            now = time.monotonic()
            if now < self._not_before.get(text, 0):
                self.retried_early.append(text)
            waiting = self.plan.get(text, [])
            fault = waiting.pop(0) if waiting else "good"
            if fault == "429":
                self._not_before[text] = now + 0.2
            return fault

    @contextmanager
    def working(self):
        with self._lock:
            self.active += 1
            self.most_active = max(self.most_active, self.active)
        try:
            yield
        finally:
            with self._lock:
                self.active -= 1


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.keys.add(self.headers["Authorization"])
            prompt = body["messages"][0]["content"]
            text = prompt.split('Text: "')[1].split('"\n\na:')[0]
            with server.working():
                self.answer(server.next_fault(text), text, prompt)

        def answer(self, fault, text, prompt):
            if fault == "close":
                self.close_connection = True
                self.connection.close()
                return
            if fault == "late":
                time.sleep(0.05)
            if fault in ("429", "500", "401", "402", "400"):
                told = {"error": {"message": f"no, {self.headers['Authorization']}"}}
                return self.send(int(fault), told, {"Retry-After": "0.2"} if fault == "429" else {})
            if fault == "no choices":
                return self.send(
                    200, {"id": "x", "object": "chat.completion", "model": "m", "choices": []}
                )
            if fault == "half a body":
                return self.send(200, {"id": "x"}, cut=True)
            if fault == "truncated json":
                return self.send_bytes(200, b'{"id": "x", "choices": [{"ind')
            if fault == "odd choices":
                nothing = {"id": "x", "object": "chat.completion", "model": "m", "choices": ["a"]}
                return self.send(200, nothing)
            reply = BAD_REPLIES[fault] if fault in BAD_REPLIES else server.reply(prompt)
            if fault in ("good", "late"):
                server.answered[text] += 1
            if fault == "odd content":
                reply = ["20", "60"]
            message = {"role": "assistant", "content": reply}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            content = {"id": "x", "object": "chat.completion", "created": 0, "model": "served-1"}
            return self.send(200, content | {"choices": [choice]})

        def send(self, status, content, headers=None, cut=False):
            self.send_bytes(status, json.dumps(content).encode(), headers, cut)

        def send_bytes(self, status, data, headers=None, cut=False):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data) + (50 if cut else 0)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            if cut:
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()

    return Handler


@contextmanager
def judge_server():
    server = JudgeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    http.handle_error = lambda *arguments: None
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
