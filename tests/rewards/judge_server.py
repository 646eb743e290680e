"""A local judge that speaks the OpenAI protocol and misbehaves on demand."""

import gzip
import json
import select
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = "a: 20\nb: 60"
BAD_REPLIES = {
    "garbage": "I would rate this text between twenty and sixty.",
    "out of range": "0\n101",
    "swapped": "60\n20",
    "half": "a: 20",
    "two answers": "a: 20\nb: 60\na: 30\nb: 70",
    "negative": "-20\n60",
}
NAMED = {  # as in endpoint_behaviours.yaml
    **{name: {"content": reply} for name, reply in BAD_REPLIES.items()},
    "empty": {"content": ""},
    "close": {"close": True},
    "429": {"status": 429, "headers": {"Retry-After": "0.2"}, "error": {"message": "slower"}},
    "500": {"status": 500, "error": {"message": "no, {key}"}},
    "400": {"status": 400, "error": {"message": "no, {key}"}},
    "401": {"status": 401, "error": {"message": "no, {key}"}},
    "402": {"status": 402, "error": {"message": "no, {key}"}},
    "no choices": {"json": {"id": "x", "object": "chat.completion", "model": "m", "choices": []}},
    "odd choices": {"json": {"id": "x", "model": "m", "choices": ["a"]}},
    "odd content": {"content": ["20", "60"]},
    "half a body": {"json": {"id": "x"}, "cut": True},
    "truncated json": {"body": '{"id": "x", "choices": [{"ind'},
}


class JudgeServer:
    """Answers by a plan: text -> faults to commit before the good answer, `reply(prompt)`.

    A fault is a name or, as in endpoint_behaviours.yaml, a dictionary. `late` seconds pass before each
    good answer; `answered` counts those that somebody was still there to take.
    """

    def __init__(self):
        self.plan = {}
        self.always = None  # a fault for every text
        self.reply = lambda prompt: GOOD
        self.late = 0.0
        self.asked, self.answered = Counter(), Counter()
        self.keys, self.bodies = set(), []
        self.active, self.most_active = 0, 0
        self.retried_early, self.strayed = [], []
        self._not_before = {}
        self._lock = threading.Lock()

    def next_fault(self, text):
        with self._lock:
            self.asked[text] += 1
            now = time.monotonic()
            if now < self._not_before.get(text, 0):
                self.retried_early.append(text)
            waiting = self.plan.get(text, [])
            fault = waiting.pop(0) if waiting else self.always or "good"
            if fault == "429":
                self._not_before[text] = now + 0.2
            return NAMED.get(fault, fault) if isinstance(fault, str) else fault

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


def completion(content, model="served-1", finish="stop", **message):
    choice = {"index": 0, "message": {"role": "assistant", "content": content} | message}
    choice["finish_reason"] = finish
    return {"id": "x", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]}


def _handler(server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            server.strayed.append(self.path)
            self.send(completion(GOOD))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("/v1/chat/completions"):
                server.strayed.append(self.path)
                return self.send(completion(GOOD))
            server.keys.add(self.headers["Authorization"])
            server.bodies.append(body)
            prompt = body["messages"][0]["content"]
            text = prompt.split('Text: "')[1].split('"\n\na:')[0]
            with server.working(), suppress(ConnectionError):
                fault = server.next_fault(text)
                if isinstance(fault, dict):
                    return self.misbehave(fault)
                time.sleep(0.05 if fault == "late" else server.late)
                if self.is_gone():
                    return None
                server.answered[text] += 1
                return self.send(completion(server.reply(prompt)))

        def is_gone(self):
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

        def misbehave(self, fault):
            time.sleep(fault.get("late", 0))
            if fault.get("close"):
                self.close_connection = True
                return self.connection.close()
            if drip := fault.get("drip"):
                return self.drip(drip)
            if "body" in fault:
                content = fault["body"]
            elif "error" in fault:
                content = {"error": fault["error"]}
            else:
                message = fault.get("message", {})
                content = completion(fault.get("content", GOOD), **message)
                content["choices"][0]["finish_reason"] = fault.get("finish", "stop")
                content = fault.get("json", content)
            status, headers = fault.get("status", 200), fault.get("headers", {})
            return self.send(content, status, headers, fault.get("cut"), fault.get("gzip"))

        def send(self, content, status=200, headers=None, cut=False, zipped=False):
            data = content if isinstance(content, str) else json.dumps(content)
            here = f"http://127.0.0.1:{self.server.server_address[1]}"
            date = formatdate(time.time() + 86400, usegmt=True)
            stands = {"{key}": self.headers["Authorization"], "{here}": here, "{tomorrow}": date}
            for mark, value in stands.items():
                data = data.replace(mark, value)
            data = gzip.compress(data.encode()) if zipped else data.encode()
            sent = {"Content-Type": "application/json", **(headers or {})}
            if zipped:
                sent["Content-Encoding"] = "gzip"
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + (50 if cut else 0)))
            for name, value in sent.items():
                self.send_header(name, str(value).replace("{here}", here).replace("{tomorrow}", date))
            self.end_headers()
            self.wfile.write(data)
            if cut:
                self.close_connection = True
                self.wfile.flush()
                self.connection.close()

        def drip(self, what):
            start = b"HTTP/1.1 200 OK\r\n"
            if what == "body":
                start += b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
            self.wfile.write(start)
            while True:
                self.wfile.write(b" " if what == "body" else b"X-Y: 1\r\n")
                self.wfile.flush()
                time.sleep(0.02)

    return Handler


@contextmanager
def judge_server():
    server = JudgeServer()
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    http.handle_error = lambda *arguments: None
    thread = threading.Thread(target=http.serve_forever, daemon=True, args=(0.05,))
    thread.start()
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()


def ask_as_process(path, url, count, lease):
    """Ask for `count` texts, as one of several processes that share a file."""
    from vaalign_lib.rewards import judgements, prompted_judge

    judgements.LEASE = prompted_judge.LEASE = lease
    store = judgements.JudgementStore(path)
    judge = prompted_judge.PromptedJudge(store, "judge-1", url, "JUDGE_KEY", workers=2)
    judge.records([f"text {k}" for k in range(count)])
