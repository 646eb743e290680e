"""Prompted judges: what replies say, faults of every kind, nothing paid for twice, no key anywhere."""

import asyncio
import logging
import multiprocessing
import os
import re
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rewards.judge_server import BAD_REPLIES, NAMED, ask_as_process, judge_server
from vaalign_lib.papers.printed import RANGES
from vaalign_lib.rewards import judgements
from vaalign_lib.rewards.endpoint import LONGEST, PATIENCE, Reply, seconds_asked
from vaalign_lib.rewards.judgements import JudgementStore, RecordError
from vaalign_lib.rewards.prompted_judge import KEPT, REFUSED, JudgementError, PromptedJudge, judge_prompt
from vaalign_lib.rewards.replies import ReplyError, parse_interval

HERE = Path(__file__).parent
REPLIES = yaml.safe_load((HERE / "judge_replies.yaml").read_text(encoding="utf-8"))
BEHAVIOURS = yaml.safe_load((HERE / "endpoint_behaviours.yaml").read_text(encoding="utf-8"))
LARGE = {"long": "x" * 2 * LONGEST, "deep": "[" * 100_000, "bomb": "0" * 20_000_000}
SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def server():
    with judge_server() as running:
        yield running


@pytest.fixture
def make(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)

    def judge(**options):
        store = options.pop("store", None) or JudgementStore(tmp_path / "judgements.sqlite")
        store._connection.execute("PRAGMA synchronous=OFF")  # no power will be cut here
        settings = {"base_url": server.url, "key_variable": "JUDGE_KEY", "longest_wait": 0.05}
        return PromptedJudge(store, "judge-1", **(settings | options))

    return judge


def recorded(store):
    """Return all that a store holds."""
    keys = store._connection.execute("SELECT key FROM judgements ORDER BY date, key").fetchall()
    return [store.get(key) for (key,) in keys]


# --- the prompt and the reply ---


@pytest.mark.parametrize("highest", RANGES)
def test_prompt_is_appendix_c_with_its_range(highest):
    prompt = judge_prompt("A <b>text</b> & more", highest)
    assert prompt.startswith("You represent a *diverse* population of human beings across:")
    assert f"1 ≤ a < b ≤ {highest}\n" in prompt
    assert 'Text: "A <b>text</b> & more"' in prompt and prompt.endswith("a:\nb:")


def said_by(reply, highest=100):
    try:
        return list(parse_interval(reply, highest))
    except ReplyError as error:
        return "equal" if error.interval else "nothing"


@pytest.mark.parametrize("row", REPLIES, ids=lambda row: ascii(row["reply"]))
def test_a_reply_is_read_as_it_says(row):
    assert said_by(row["reply"], row.get("highest", 100)) == row["says"]


def test_the_range_is_respected():
    assert parse_interval("2\n10", highest=10) == (2, 10)
    with pytest.raises(ReplyError, match="1 <= a < b <= 10, got a=2, b=11"):
        parse_interval("2\n11", highest=10)


READABLE = [
    row["reply"]
    for row in REPLIES
    if isinstance(row["says"], list) and "reason" not in row["reply"]  # other numbers in quotes
]


def visible(reply):
    """Return what a reader sees as the answer: no reasoning, no tags, digits and signs of one kind."""
    reply = re.split("</think>|</thinking>", reply, flags=re.IGNORECASE)[-1]
    kinds = {"−": "-", "–": "-", "：": ":", "。": ".", "\u2028": "\n", "\r": "\n"}
    kinds |= {"\u200b": " ", "\ufeff": " "}
    reply = "".join(str(int(c)) if c.isdecimal() else kinds.get(c, c) for c in reply)
    reply = re.sub(r"\[[^\[\]]*\]", lambda found: found[0].replace(",", " "), reply)  # a list
    return reply.replace("\\boxed", " ")


def words_with_digits(line):
    """Return (start, word) of whatever holds digits and would be read as one number."""
    found = re.finditer(r"[^\s\[\](){}:;=|<>*`\"#$\\/]*\d[^\s\[\](){}:;=|<>*`\"#$\\/]*", line)
    return [(match.start(), match[0]) for match in found]


def numbers_on(line):
    """Return the plain numbers of a line; None among them for anything else that holds digits."""
    line = re.sub(r"\bscale of 1 to 100\b|1 ?≤ ?a ?< ?b ?≤ ?100", "", line)
    line = re.sub(r"(/|\bout of)\s*100(?![\w.,]\d)", "", line)
    line = re.sub(r"^[\s>]*[12][.)]+(?=\D)", "", line)
    numbers = []
    for _, word in words_with_digits(line):
        splits = r"(?<=\d)-(?=\d)|,(?=\D)|(?<=\d)\.{2,}(?=\d)|(?<=\d)[~…→&](?=\d)"
        parts = re.split(splits + r"|(?<=\d)[-.+'|]+(?=[a-zA-Z])|(?<=\D)[`'_](?=\d)|(?<=\d)[`'](?=\D)", word)
        for part in parts:
            plain = part.strip("_'’.,!~+-|&→≈…“”„«»")
            dashed = re.search(r"-\s*" + re.escape(plain), part) is not None
            if re.search(r"\d", part):
                fine = re.fullmatch(r"\d+(\.\d+)?", plain) and not dashed
                numbers.append(float(plain) if fine else None)
    return numbers


@settings(max_examples=10_000, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from(READABLE),
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "drop", "swap", "replace", "repeat"]),
            st.integers(0, 10_000),
            st.sampled_from([*"0123456789.,-+:;=/%ab AB\n\t*`'\"()[]{}<>ek#|²−", "or ", "not "]),
        ),
        min_size=1,
        max_size=4,
    ),
)
def test_no_mutation_of_a_reply_is_misread(reply, changes):
    """Whatever comes out stands there: both numbers, whole, in their lines nothing else, names kept."""
    for kind, where, what in changes:
        place = where % (len(reply) + 1)
        before, after = reply[:place], reply[place:]
        reply = {
            "insert": before + what + after,
            "drop": before + after[1:],
            "swap": before + after[1:2] + after[:1] + after[2:],
            "replace": before + what + after[1:],
            "repeat": before + after[:3] + after,
        }[kind]
    if not isinstance(pair := said_by(reply), list):
        return
    check_said(pair, visible(reply))


def check_said(pair, text):
    a, b = pair
    text = re.sub(r"\A\s*a\W*\n\s*b\W*\n", "", text)  # the prompt's end, repeated
    lines = [numbers_on(line) for line in text.splitlines() if re.search(r"\d", line)]
    prose = [line for line in text.splitlines() if re.search(r"\d", line)]
    prose = [bool(re.search(r"[^\W\d_]{2}", line)) for line in prose]
    there = [line for line, words in zip(lines, prose, strict=True) if not words or {a, b} & {*line}]
    assert there, f"{pair} from {text!r}"
    flat = [number for line in there for number in line]
    assert a in flat and b in flat, f"{pair} from {text!r}"
    assert set(flat) == {a, b}, f"{pair} beside other numbers in {text!r}"
    marks = r"[\s*_`'\"]*"
    for name, other in (("a", b), ("b", a)):
        said = rf"(?<!\w){name}{marks}[:=]{marks}(\d+(?:\.\d+)?)"
        for match in re.finditer(said, text, re.IGNORECASE):
            if not re.search(r"(?<!\w)a\W{1,3}\Z", text[: match.start()]):  # "a, b: 30, 70"
                assert float(match[1]) != other or a == b, f"{pair}, but {match[0]} in {text!r}"


# --- faults ---


@pytest.mark.parametrize("row", BEHAVIOURS, ids=lambda row: row["case"])
def test_what_comes_of_an_endpoints_behaviour(row, server, make, tmp_path, caplog):
    does = dict(row["does"])
    if isinstance(does.get("json"), str):
        does["body"] = LARGE[does["json"]]
    server.plan = {"p\nq": [does] * (1 if row.get("once") else 99)}
    slow = {"late", "drip"} & set(does)
    judge = make(attempts=3, refusals_say_nothing=True, request_seconds=0.2 if slow else 20.0)
    comes, said = "stop", ""
    try:
        (record,) = judge.records(["p\nq"]).values()
        said = record.failure
        comes = "refusal" if said.startswith(REFUSED) else "failure" if said else "interval"
        assert comes != "interval" or (record.a, record.b) == (20, 60)
    except JudgementError as error:
        said = str(error)
        assert len(recorded(judge.store)) == 0
    assert (comes, server.asked["p\nq"]) == (row["comes"], row["asked"]), said
    assert all(str(word) in said for word in row.get("says", [])), said
    server.plan = {}  # mended: whatever the endpoint did is asked again, what the text did is not
    judge = make(store=judge.store, refusals_say_nothing=True)
    ends = [1, 100] if comes == "refusal" else [20, 60]
    assert judge.judge(["p"], ["q"], np.zeros(1, dtype=int)).bounds.tolist() == [ends]
    assert SECRET not in said + caplog.text and server.strayed == []
    judge.store.close()
    kept = (tmp_path / "judgements.sqlite").read_bytes()
    assert SECRET.encode() not in kept and len(kept) < 100_000


def test_faults_of_an_endpoint_settle_no_text(server, make):
    """A thousand texts meet thirty kinds of fault, then the endpoint is mended."""
    kinds = [row["does"] for row in BEHAVIOURS if row["comes"] in ("failure", "stop")]
    slow = {"late", "drip", "gzip", "headers"}
    kinds = [one for one in kinds if not slow & set(one) and not isinstance(one.get("json"), str)]
    assert len(kinds) >= 30
    texts = [f"text {k}" for k in range(1000)]
    options = {"refusals_say_nothing": True, "longest_wait": 0, "workers": 16, "attempts": 1}
    judge = make(**options, replies=1)
    for k, kind in enumerate(kinds):
        server.always = kind
        try:
            judge.records(texts[k :: len(kinds)])
        except JudgementError:
            assert all(one.failure for one in recorded(judge.store))
    settled = sum(judge._is_answered(record) for record in recorded(judge.store))
    assert settled == 0 and len(recorded(judge.store)) > 400
    server.always = None
    assert not any(one.failure for one in judge.records(texts).values())


def test_a_thousand_judgements_with_faults_each_text_once_nothing_lost(server, make, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    random = np.random.default_rng(0)
    texts = [f"text number {k}" for k in range(1000)]
    faults = ["late", *(set(NAMED) - {"400", "401", "402", "empty"})]
    for text in texts:
        if random.random() < 0.3:
            server.plan[text] = list(random.choice(sorted(faults), random.integers(1, 4)))
    judge = make(workers=16, replies=9, attempts=9)
    started = [judge.records(texts[:600]), judge.records(texts)]  # the second asks for the rest only
    assert len(started[1]) == 1000 and all((r.a, r.b) == (20, 60) for r in started[1].values())
    assert set(server.answered) == set(texts) and set(server.answered.values()) == {1}
    assert server.most_active <= 16 and server.retried_early == []
    assert len(recorded(judge.store)) == 1000
    assert {record.model_served for record in recorded(judge.store)} == {"served-1"}
    asked = sum(server.asked.values())
    judge.records(texts)
    assert sum(server.asked.values()) == asked
    assert server.keys == {f"Bearer {SECRET}"}
    judge.store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything and SECRET not in caplog.text


def test_a_reply_that_never_fits_is_recorded_as_failed_and_excluded_with_a_count(server, make, caplog):
    server.plan = {"bad": ["swapped"] * 99, "down": ["500"] * 99}
    judge = make(attempts=5)
    found = judge.records(["good", "bad", "down", "good"])
    assert server.asked == {"good": 1, "bad": 2, "down": 5}
    assert [bool(found[text].failure) for text in ("good", "bad", "down")] == [False, True, True]
    assert found["down"].failure == "status 500: no, Bearer ***, in attempt 5"
    assert found["bad"].reply == BAD_REPLIES["swapped"] and "1 <= a < b" in found["bad"].failure
    assert found["bad"].a is None and "2 of 3 texts got no interval; the first: " in caplog.text
    server.plan = {"p\nq": ["garbage"] * 9}
    with pytest.raises(JudgementError, match="1 of 2 texts got no interval"):
        judge.judge(["x", "p"], ["y", "q"], np.zeros(2, dtype=int))
    server.plan = {"p\nq": ["garbage"] * 9}
    bounds = make(allow_failures=True).judge(["x", "p"], ["y", "q"], np.zeros(2, dtype=int)).bounds
    assert bounds[0].tolist() == [20, 60] and np.isnan(bounds[1]).all()
    server.plan = {}
    assert not judge.records(["bad"])["bad"].failure  # a failure is asked for again


def test_what_says_nothing_is_the_whole_scale_and_nothing_else_is(server, make):
    server.plan = {"p\nq": ["empty"], "r\ns": ["garbage"] * 3, "t\nu": ["500"] * 99}
    judge = make(refusals_say_nothing=True, attempts=3)
    for _ in range(2):  # nor is it asked for again
        bounds = judge.judge(["x", "p"], ["y", "q"], np.zeros(2, dtype=int)).bounds
        assert bounds.tolist() == [[20, 60], [1, 100]] and server.asked["p\nq"] == 1
    with pytest.raises(JudgementError, match="expected two numbers"):
        judge.judge(["r"], ["s"], np.zeros(1, dtype=int))
    with pytest.raises(JudgementError, match="status 500"):  # this one may come back
        judge.judge(["t"], ["u"], np.zeros(1, dtype=int))
    server.plan = {"p\nq": ["empty"]}
    with pytest.raises(JudgementError, match="refusal: a completion without content"):
        make().judge(["p"], ["q"], np.zeros(1, dtype=int))


def test_refusals_of_older_files_are_asked_for_again(server, make):
    """Before, a reply in another form or a wrong setting was written down as a refusal."""
    judge = make(refusals_say_nothing=True)
    record = judge.record_of("text", Reply("served-1", "x"), None, "refused: status 400, in attempt 1")
    judge.store.put(replace(record, date="2025-11-25T12:00:00.000+00:00"))
    assert judge.records(["text"])["text"].a == 20 and server.asked["text"] == 1


def test_a_equal_to_b_said_twice_is_the_surest_answer(server, make):
    server.plan = {"p\nq": [{"content": "50\n50"}] * 2, "r\ns": [{"content": "50\n50"}]}
    judge = make(refusals_say_nothing=True)
    interval = judge.judge(["p", "r"], ["q", "s"], np.zeros(2, dtype=int))
    assert interval.bounds.tolist() == [[50, 50], [20, 60]] and interval.variance()[0] == 0
    judge.judge(["p", "r"], ["q", "s"], np.zeros(2, dtype=int))
    assert server.asked == {"p\nq": 2, "r\ns": 2}


def test_half_an_emoji_is_paid_for_once(server, make):
    """In a reply it is kept as its escape; in a text, which nobody could send, it is a question mark."""
    server.plan = {"one": [{"content": "20\n60\n\ud83d"}], "two ?": [{"content": "\ud83d"}] * 9}
    judge = make()
    for _ in range(2):
        found = judge.records(["one", "three \ud83d"])
        assert found["one"].reply == "20\n60\n\\ud83d" and found["three \ud83d"].a == 20
    assert server.asked == {"one": 1, "three ?": 1}
    assert judge.records(["two \ud83d"])["two \ud83d"].failure and server.asked["two ?"] == 2


def test_a_long_reply_is_not_kept_whole(server, make):
    server.plan = {"t": [{"content": "a: 20\nb: 60\n" + "so " * 10_000}]}
    found = make().records(["t"])["t"]
    assert (found.a, found.b, len(found.reply)) == (20, 60, KEPT)


@pytest.mark.parametrize("status", ["400", "401", "402"])
def test_a_setting_that_is_refused_stops_at_once_and_the_key_is_not_repeated(server, make, status):
    server.plan = {f"t{k}": [status] * 9 for k in range(50)}
    with pytest.raises(JudgementError, match=rf"status {status}: no, Bearer \*\*\*") as error:
        make(workers=1).records(list(server.plan))
    assert SECRET not in str(error.value) and sum(server.asked.values()) == 1


def test_what_is_on_its_way_is_recorded_when_another_text_stops(server, make):
    server.plan = {"t0": ["401"]}
    server.late = 0.2
    judge = make(workers=4)
    with pytest.raises(JudgementError, match="401"):
        judge.records([f"t{k}" for k in range(30)])
    assert len(recorded(judge.store)) == sum(server.answered.values()) == 3


@pytest.mark.parametrize("key", ["", "  ", f"{SECRET}\n", "sk secret", "sk-schlüssel"])
def test_a_key_that_is_none_is_told_by_its_name(make, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(JudgementError, match="the environment variable JUDGE_KEY") as error:
        make().records(["text"])
    assert SECRET not in str(error.value)


def test_a_proxy_that_cannot_be_used_is_told(make, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "foo://127.0.0.1:1")
    with pytest.raises(JudgementError, match=r"no connection can be made.*foo"):
        make().records(["text"])


def test_an_endpoint_that_is_not_there_is_a_failure(make):
    found = make(base_url="http://127.0.0.1:9/v1", attempts=2).records(["text"])
    assert found["text"].failure.startswith("APIConnectionError")
    assert found["text"].failure.endswith("in attempt 2")


def test_another_model_that_answers_is_told(server, make, caplog):
    judge = make(workers=1)
    judge.records(["one", "two"])
    assert caplog.text.count("the endpoint answers as 'served-1'") == 1
    caplog.clear()
    for k, served in enumerate(("judge-1-2025", "models/judge-1-2025", "judge-1-2026")):
        message = {"choices": [{"message": {"content": "20\n60"}}], "model": served}
        server.plan[f"t{k}"] = [{"json": message}]
    judge.records(["t0"])
    assert "answer" not in caplog.text
    judge.records(["t1", "t2"])
    assert "answered by judge-1-2026, models/judge-1-2025" in caplog.text


def test_ctrl_c_ends_a_long_wait_and_keeps_what_came(server, tmp_path):
    script = textwrap.dedent(f"""
        import signal
        from vaalign_lib.rewards.prompted_judge import PromptedJudge
        from vaalign_lib.rewards.judgements import JudgementStore
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
        store = JudgementStore({str(tmp_path / "j.sqlite")!r})
        judge = PromptedJudge(store, "judge-1", {server.url!r}, "JUDGE_KEY", workers=2)
        judge.records(["one", "two"])
    """)
    wait = {"status": 429, "headers": {"Retry-After": str(int(PATIENCE))}}
    server.plan = {"two": [wait] * 9}
    environment = os.environ | {"JUDGE_KEY": SECRET}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, env=environment
    )
    while not (server.asked["two"] and server.answered["one"]) and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=10)
    assert "KeyboardInterrupt" in told and "asked again in 600 seconds" in told
    kept = {record.failure == "" for record in recorded(JudgementStore(tmp_path / "j.sqlite"))}
    assert True in kept and process.returncode != 0


def test_where_a_loop_runs_already_as_in_notebooks_a_judge_can_be_asked(server, make):
    async def cell():
        return make().records(["one", "two"])

    assert {one.a for one in asyncio.run(cell()).values()} == {20}


def test_how_long_an_endpoint_asks_to_wait():
    def asked(**headers):
        return seconds_asked(httpx2.Headers({k.replace("_", "-"): v for k, v in headers.items()}))

    assert asked(retry_after="7") == 7 and asked(retry_after_ms="250", retry_after="9") == 0.25
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    assert 97 < asked(retry_after=date) <= 100
    for nonsense in ("nan", "inf", "-1", "soon", "", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert asked(retry_after=nonsense) == 0


# --- the source's contract ---


def test_a_judgement_gives_reward_variance_and_truth(server, make):
    judge = make()
    interval = judge.judge(["p", "q"], ["r", "s"], np.zeros(2, dtype=int))
    assert interval.bounds.tolist() == [[20, 60], [20, 60]]
    assert interval.variance() == pytest.approx([40**2 / 12] * 2)
    assert judge.true_reward(interval, ["p", "q"], ["r", "s"]).tolist() == [40, 40]
    assert set(server.asked) == {"p\nr", "q\ns"}


# --- records ---


def test_what_is_recorded_needs_neither_key_nor_endpoint(server, make, monkeypatch):
    make().records(["one", "two"])
    asked = dict(server.asked)
    monkeypatch.delenv("JUDGE_KEY")
    assert make().records(["one"])["one"].a == 20
    assert dict(server.asked) == asked
    with pytest.raises(JudgementError, match="JUDGE_KEY"):
        make(highest=50).records(["one"])


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.sqlite").write_text("hello " * 100)
    with pytest.raises(RecordError, match="not a file of judgements"):
        JudgementStore(tmp_path / "x.sqlite")


@pytest.mark.parametrize(
    "change", ["b = 9e999", "a = NULL", "a = 'x'", "failure = 'none'", "a = 0.5", "a = 70", "reply = x'00'"]
)
def test_a_record_that_is_none_is_not_believed(make, tmp_path, change):
    make().records(["t"])
    with sqlite3.connect(tmp_path / "judgements.sqlite") as connection:
        connection.execute(f"UPDATE judgements SET {change}")
        connection.execute("DELETE FROM checksums")  # as in an older file
    with pytest.raises(RecordError, match=r"judgements.sqlite: the judgement \w+ is damaged: restore"):
        make().records(["t"])


def test_what_was_changed_on_disk_is_not_believed(make, tmp_path):
    path = tmp_path / "judgements.sqlite"
    make().records(["t"])
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE judgements SET b = 61")
    with pytest.raises(RecordError, match=r"judgements.sqlite: the judgement \w+ is damaged: restore"):
        make().records(["t"])
    with sqlite3.connect(path) as connection:  # an older file has no checksums, but bounds
        connection.execute("DELETE FROM checksums")
    assert make().records(["t"])["t"].b == 61
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE judgements SET b = 1000")
    with pytest.raises(JudgementError, match="recorded is b=1000 on a scale to 100"):
        make().records(["t"])


def test_a_damaged_file_is_refused_when_it_is_opened(make, tmp_path):
    path = tmp_path / "judgements.sqlite"
    judge = make()
    judge.records([f"text {k}" for k in range(50)])
    judge.store.close()
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)  # its second page
    path.write_bytes(bytes(content))
    with pytest.raises(RecordError, match="not a file of judgements: "):
        JudgementStore(path)


def test_judgements_are_nobody_elses_business(make, tmp_path):
    make().records(["t"])
    assert (tmp_path / "judgements.sqlite").stat().st_mode & 0o777 == 0o600


def test_a_locked_file_is_told(make, tmp_path):
    judge = make()
    judge.store._connection.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "judgements.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RecordError, match=r"judgements.sqlite: cannot be .*locked"):
        judge.records(["t"])
    other.close()


# --- several processes ---


def test_a_claim_outlives_a_kill_by_little(tmp_path, monkeypatch):
    first, second = (JudgementStore(tmp_path / "j.sqlite") for _ in range(2))
    assert first.claim(["x", "y"], "one") == {"x", "y"} == first.claim(["x", "y"], "one")
    assert second.claim(["x", "z"], "two") == {"z"}
    now = time.time()
    monkeypatch.setattr(judgements.time, "time", lambda: now + 0.9 * judgements.LEASE)
    assert second.claim(["x"], "two") == set()
    first.renew("one")
    monkeypatch.setattr(judgements.time, "time", lambda: now + 1.1 * judgements.LEASE)
    assert second.claim(["x"], "two") == set()  # renewed
    first.release("one")
    assert second.claim(["x"], "two") == {"x"}
    monkeypatch.setattr(judgements.time, "time", lambda: now + 3 * judgements.LEASE)
    assert first.claim(["x"], "one") == {"x"} and judgements.LEASE <= 15


def test_what_another_process_asks_for_is_waited_for(server, make, tmp_path):
    judge = make()
    judge.store.claim([judge.key("t0")], "another")
    other = JudgementStore(tmp_path / "judgements.sqlite")

    def answer():
        time.sleep(0.5)
        failed = judge.record_of("t0", Reply(), None, "status 500, in attempt 8")
        other.put(failed)  # its failure is this call's too: nobody pays for it again at once

    thread = threading.Thread(target=answer)
    thread.start()
    found = judge.records(["t0", "t1"])
    thread.join()
    assert found["t0"].failure == "status 500, in attempt 8" and found["t1"].a == 20
    assert server.asked == {"t1": 1}
    assert judge.records(["t0"])["t0"].a == 20  # later it is asked for


def test_four_processes_and_kills_pay_once_for_a_text(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    count, kills, lease = 400, 2, 2.0
    server.late = 0.02
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vaalign_lib.rewards.prompted_judge"])

    def started():
        arguments = (tmp_path / "j.sqlite", server.url, count, lease)
        process = context.Process(target=ask_as_process, args=arguments)
        process.start()
        return process

    running = [started() for _ in range(4)]
    for kill in range(kills):
        while sum(server.answered.values()) < 60 * (kill + 1):
            time.sleep(0.01)
        running[kill].kill()
        running.append(started())
    for process in running:
        process.join(60)
    assert [process.exitcode for process in running] == [-9] * kills + [0] * 4
    store = JudgementStore(tmp_path / "j.sqlite")
    assert len(recorded(store)) == len(server.answered) == count
    assert all(one.a == 20 for one in recorded(store))
    paid = sum(server.answered.values())
    assert paid - count <= 2 * kills  # answered, and killed before it was written down
    assert round(paid / count, 2) <= 1.01


def test_texts_that_are_sent_alike_are_asked_once(server, make):
    found = make().judge(["p"] * 3, ["a\ud800", "a?", "a\udc00"], np.zeros(3, dtype=int))
    assert found.bounds.shape == (3, 2) and len({tuple(row) for row in found.bounds}) == 1
    assert sum(server.asked.values()) == 1
