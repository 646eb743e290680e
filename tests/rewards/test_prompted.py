"""Prompted judges: strict parsing, faults of every kind, nothing paid for twice, no key anywhere."""

import json
import logging
import sqlite3
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from tests.rewards.judge_server import BAD_REPLIES, judge_server
from vaalign_lib.rewards.prompted import (
    RANGES,
    JudgementError,
    PromptedJudge,
    ReplyError,
    judge_prompt,
    parse_interval,
)
from vaalign_lib.rewards.records import JudgementStore, RecordError

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
        settings = {"base_url": server.url, "key_variable": "JUDGE_KEY", "longest_wait": 0.05}
        return PromptedJudge(store, "judge-1", **(settings | options))

    return judge


# --- the prompt and the reply ---


@pytest.mark.parametrize("highest", RANGES)
def test_prompt_is_appendix_c_with_its_range(highest):
    prompt = judge_prompt("A <b>text</b> & more", highest)
    assert prompt.startswith("You represent a *diverse* population of human beings across:")
    assert f"1 ≤ a < b ≤ {highest}\n" in prompt
    assert 'Text: "A <b>text</b> & more"' in prompt and prompt.endswith("a:\nb:")


@pytest.mark.parametrize(
    "reply", ["20\n60", "a: 20\nb: 60", " 20.0 \n\n 60 ", "A = 20\nB = 60", "**a**: 20\n**b**: 60"]
)
def test_two_numbers_on_two_lines_are_read(reply):
    assert parse_interval(reply) == (20, 60)


@pytest.mark.parametrize(
    "reply",
    [
        *BAD_REPLIES.values(),
        "20 60",
        "20\n60\n80",
        "b: 20\na: 60",
        "nan\n60",
        "-5\n60",
        "1e1\n60",
        "20%\n60%",
    ],
)
def test_anything_else_is_refused(reply):
    with pytest.raises(ReplyError, match="expected"):
        parse_interval(reply)


def test_the_range_is_respected():
    assert parse_interval("2\n10", highest=10) == (2, 10)
    with pytest.raises(ReplyError, match="1 <= a < b <= 10, got a=2, b=11"):
        parse_interval("2\n11", highest=10)


# --- faults ---


def test_a_thousand_judgements_with_faults_each_text_once_nothing_lost(
    server, make, tmp_path, caplog
):
    caplog.set_level(logging.DEBUG)
    random = np.random.default_rng(0)
    texts = [f"text number {k}" for k in range(1000)]
    broken = ["half a body", "truncated json", "no choices", "odd choices", "odd content"]
    faults = ["late", "429", "500", "close", *broken, *BAD_REPLIES]
    for text in texts:
        if random.random() < 0.4:
            server.plan[text] = list(random.choice(faults, random.integers(1, 4)))
    judge = make(workers=16, replies=9)
    started = [
        judge.records(texts[:600]),
        judge.records(texts),
    ]  # the second asks for the rest only
    assert len(started[1]) == 1000 and all((r.a, r.b) == (20, 60) for r in started[1].values())
    assert set(server.answered) == set(texts) and set(server.answered.values()) == {1}
    assert server.most_active <= 16 and server.retried_early == []
    assert len(judge.store) == 1000
    assert {record.model_served for record in judge.store} == {"served-1"}
    asked = sum(server.asked.values())
    judge.records(texts)
    assert sum(server.asked.values()) == asked
    assert server.keys == {f"Bearer {SECRET}"}
    judge.store.close()
    everything = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET.encode() not in everything and SECRET not in caplog.text


def test_a_reply_that_never_fits_is_recorded_as_failed_and_excluded_with_a_count(
    server, make, caplog
):
    server.plan = {"bad": ["swapped"] * 99, "down": ["500"] * 99, "odd": ["400"] * 99}
    judge = make(attempts=5)
    found = judge.records(["good", "bad", "down", "odd", "good"])
    assert server.asked == {"good": 1, "bad": 3, "down": 5, "odd": 1}
    assert [bool(found[text].failure) for text in ("good", "bad", "down")] == [False, True, True]
    assert found["down"].failure == "status 500, in attempt 5"
    assert found["odd"].failure == "refused: status 400, in attempt 1"
    assert found["bad"].reply == BAD_REPLIES["swapped"] and "1 <= a < b" in found["bad"].failure
    assert found["bad"].a is None and "3 of 4 texts got no interval" in caplog.text
    server.plan = {"p\nq": ["garbage"] * 9}
    with pytest.raises(JudgementError, match="1 of 2 texts got no interval"):
        judge.judge(["x", "p"], ["y", "q"], np.zeros(2, dtype=int))
    server.plan = {"p\nq": ["garbage"] * 9}
    bounds = make(allow_failures=True).judge(["x", "p"], ["y", "q"], np.zeros(2, dtype=int)).bounds
    assert bounds[0].tolist() == [20, 60] and np.isnan(bounds[1]).all()
    server.plan = {}
    assert not judge.records(["bad"])["bad"].failure  # a failure is asked for again


def test_where_refusals_say_nothing_the_interval_is_the_whole_scale(server, make):
    server.plan = {"p\nq": ["garbage"] * 3, "r\ns": ["400"], "t\nu": ["500"] * 99}
    judge = make(refusals_say_nothing=True, highest=100)
    for _ in range(2):  # nor are they asked for again
        bounds = judge.judge(["x", "p", "r"], ["y", "q", "s"], np.zeros(3, dtype=int)).bounds
        assert bounds.tolist() == [[20, 60], [1, 100], [1, 100]]
        assert (server.asked["p\nq"], server.asked["r\ns"]) == (3, 1)
    with pytest.raises(JudgementError, match="status 500"):  # this one may come back
        judge.judge(["t"], ["u"], np.zeros(1, dtype=int))
    server.plan = {}
    assert judge.judge(["t"], ["u"], np.zeros(1, dtype=int)).bounds.tolist() == [[20, 60]]


@pytest.mark.parametrize("status", ["401", "402"])
def test_a_refused_key_stops_at_once_and_is_not_repeated_to_anyone(server, make, status):
    server.plan = {f"t{k}": [status] * 9 for k in range(50)}
    with pytest.raises(JudgementError, match=f"refused with status {status}; check") as error:
        make(workers=1).records(list(server.plan))
    assert SECRET not in str(error.value) and sum(server.asked.values()) <= 3


def test_a_missing_key_is_told_by_its_name(make, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(JudgementError, match="set the environment variable JUDGE_KEY"):
        make().records(["text"])


def test_an_endpoint_that_is_not_there_is_a_failure(make):
    found = make(base_url="http://127.0.0.1:9/v1", attempts=2).records(["text"])
    assert found["text"].failure == "APIConnectionError, in attempt 2"


# --- the source's contract ---


def test_a_judgement_gives_reward_variance_and_truth(server, make):
    judge = make()
    interval = judge.judge(["p", "q"], ["r", "s"], np.zeros(2, dtype=int))
    assert interval.bounds.tolist() == [[20, 60], [20, 60]]
    assert interval.variance() == pytest.approx([40**2 / 12] * 2)
    assert judge.true_reward(interval, ["p", "q"], ["r", "s"]).tolist() == [40, 40]
    assert set(server.asked) == {"p\nr", "q\ns"}


# --- records ---


def test_replay_never_calls_out(server, make):
    make().records(["one", "two"])
    asked = dict(server.asked)
    replay = make(replay_only=True)
    assert replay.records(["two"])["two"].b == 60
    with pytest.raises(JudgementError, match="1 of 2 texts have no judgement by judge-1"):
        replay.records(["one", "three"])
    with pytest.raises(JudgementError, match="R = 50"):
        make(replay_only=True, highest=50).records(["one"])
    assert dict(server.asked) == asked


def test_replay_needs_no_key(make, monkeypatch):
    make().records(["one"])
    monkeypatch.delenv("JUDGE_KEY")
    assert make(replay_only=True).records(["one"])["one"].a == 20


def test_records_travel_as_json_lines(server, make, tmp_path):
    judge = make()
    judge.records([f"t{k}" for k in range(20)])
    assert judge.store.export(tmp_path / "out.jsonl") == 20
    other = JudgementStore(tmp_path / "other.sqlite")
    assert other.load(tmp_path / "out.jsonl") == 20
    assert list(other) == list(judge.store)
    assert make(store=other, replay_only=True).records(["t3"])["t3"].a == 20


@pytest.mark.parametrize(
    "line", ["{", "{}", '{"key": 1}', "[]"], ids=["cut", "empty", "fields", "list"]
)
def test_a_bad_line_is_told_and_nothing_is_imported(make, tmp_path, line):
    judge = make()
    judge.records(["t"])
    judge.store.export(tmp_path / "x.jsonl")
    good = (tmp_path / "x.jsonl").read_text()
    (tmp_path / "x.jsonl").write_text(good + line + "\n")
    other = JudgementStore(tmp_path / "other.sqlite")
    with pytest.raises(RecordError, match=r"x.jsonl:2: not a judgement"):
        other.load(tmp_path / "x.jsonl")
    assert len(other) == 0


def test_an_imported_interval_is_checked(make, tmp_path):
    judge = make()
    judge.records(["t"])
    judge.store.export(tmp_path / "x.jsonl")
    record = json.loads((tmp_path / "x.jsonl").read_text())
    (tmp_path / "x.jsonl").write_text(json.dumps(record | {"a": 70}) + "\n")
    with pytest.raises(RecordError, match="expected 1 <= a < b, got a=70"):
        judge.store.load(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps(record | {"a": 30}) + "\n")
    with pytest.raises(RecordError, match=r"x.jsonl:1: .*recorded is a=20.0, b=60.0, got a=30"):
        judge.store.load(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps(record | {"model_asked": None}) + "\n")
    with pytest.raises(RecordError, match="expected text in all fields"):
        judge.store.load(tmp_path / "x.jsonl")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.sqlite").write_text("hello " * 100)
    with pytest.raises(RecordError, match="not a file of judgements"):
        JudgementStore(tmp_path / "x.sqlite")


def test_killed_and_restarted_no_call_is_made_twice(server, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    texts = [f"text {k}" for k in range(200)]
    server.plan = {text: ["late"] for text in texts}
    script = textwrap.dedent(f"""
        from vaalign_lib.rewards.prompted import PromptedJudge
        from vaalign_lib.rewards.records import JudgementStore
        store = JudgementStore({str(tmp_path / "j.sqlite")!r})
        judge = PromptedJudge(store, "judge-1", {server.url!r}, "JUDGE_KEY", workers=2)
        judge.records([f"text {{k}}" for k in range(200)])
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    while len(server.answered) < 30 and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.3)
    with sqlite3.connect(tmp_path / "j.sqlite") as connection:
        recorded = connection.execute("SELECT count(*) FROM judgements").fetchone()[0]
    assert 25 <= recorded < 200
    subprocess.run([sys.executable, "-c", script], check=True)
    twice = [text for text, times in server.answered.items() if times > 1]
    assert (
        set(server.answered) == set(texts) and len(twice) <= 2
    )  # those on their way when it was killed
