"""One schema from the embedded world, files and hub data sets; what is malformed is told by line."""

import gzip
import json
import logging
import os
import socket
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from vaalign_lib.data import hub as hub_library
from vaalign_lib.data import pairs as data
from vaalign_lib.data.pairs import (
    DataError,
    accuracy_by_category,
    attribute_scores,
    embedded_pairs,
    prompts_of,
    read_attribute_ratings,
    read_pairs,
    read_prompts,
    read_ratings,
    reward_bench_weights,
    spread_prompts,
)
from vaalign_lib.data.world.world import World
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.attributes import train_attributes
from vaalign_lib.store import PlanError
from vaalign_lib.training.memory import configuration

GOOD = {"subset": "llmbar-natural", "prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}


def write(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def columns(table, *names):
    return table[list(names or ("prompt", "chosen", "rejected"))].to_numpy().tolist()


# --- files ---


def zstd(content):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as packed:
        packed.write(content)
    return stream.getvalue().to_pybytes()


def as_lines(rows):
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def as_csv(rows):
    return pd.DataFrame(rows).to_csv(index=False).encode()


LAYOUTS = {
    "pairs.jsonl": as_lines,
    "pairs.JSONL": lambda rows: b"\xef\xbb\xbf" + as_lines(rows).replace(b"\n", b"\r\n"),
    "pairs.ndjson": as_lines,
    "pairs.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "pairs.Json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
    "pairs.jsonl.gz": lambda rows: (
        gzip.compress(as_lines(rows[:1]) + b"\n") + gzip.compress(as_lines(rows[1:]))
    ),  # two members
    "pairs.jsonl.ZST": lambda rows: zstd(as_lines(rows)),
    "pairs.gz.jsonl": lambda rows: gzip.compress(as_lines(rows)),  # told by content, not by name
    "pairs.json.gz": as_lines,  # not packed at all
    "pairs.csv": as_csv,
    "pairs.CSV.zst": lambda rows: zstd(b"\xef\xbb\xbf" + as_csv(rows)),
    "pairs.parquet": lambda rows: pd.DataFrame(rows).to_parquet(),
    "pairs.PARQUET.gz": lambda rows: gzip.compress(pd.DataFrame(rows).to_parquet()),
}
TEXTS = [
    {"subset": "llmbar-natural", "prompt": "p é", "chosen": "NA", "rejected": "null", "id": 1},
    {"subset": "mine", "prompt": "q\nr", "chosen": "007", "rejected": 'a, "b"\u2028c', "id": 2},
    {"subset": "mine", "prompt": "2020-01-01", "chosen": "x" * 200_000, "rejected": "[1]", "id": 3},
]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name):
    """Texts that readers like to take for missing values, numbers, dates, line ends stay texts."""
    (tmp_path / name).write_bytes(LAYOUTS[name](TEXTS))
    table = read_pairs(tmp_path / name)
    assert table.columns.tolist() == ["subset", "category", "prompt", "chosen", "rejected"]
    names = ("subset", "prompt", "chosen", "rejected")
    assert columns(table, *names) == [[row[one] for one in names] for row in TEXTS]
    assert table["category"].tolist() == ["chat-hard", "mine", "mine"]
    assert columns(read_prompts(tmp_path / name), "prompt") == [[row["prompt"]] for row in TEXTS]


def test_a_file_without_subsets_is_one_itself(tmp_path):
    others = {"prompt": "q", "chosen": "c", "rejected": "r"}, GOOD | {"subset": None}
    assert set(read_pairs(write(tmp_path / "own.jsonl.gz", *others))["subset"]) == {"own"}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "expected one JSON object a line"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "p", "chosen": "c"}, "no field 'rejected'; expected prompt, chosen, rejected"),
        (GOOD | {"chosen": 3}, "chosen: expected text or messages with role and content, got 3"),
        ('{"prompt": "p", "prompt": "q", "chosen": "c", "rejected": "r"}', "a key stands twice"),
    ],
)
def test_a_malformed_line_is_told_with_file_and_line(tmp_path, record, words):
    path = write(tmp_path / "pairs.jsonl", GOOD, GOOD | {"prompt": "q"}, record)
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert str(error.value).startswith(f"{path}:3: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.jsonl", "there is no such file"),
        ("pairs.txt", r"expected a file ending in \.jsonl"),
        ("empty.jsonl", "at least one record"),
        ("broken.jsonl.gz", "cannot be read"),
        ("bits.jsonl.gz", "cannot be read"),
        ("latin.jsonl", "cannot be read as text"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, words):
    (tmp_path / "pairs.txt").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    (tmp_path / "bits.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:12] + b"\xff" * 30)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=words):
        read_pairs(tmp_path / name)


# --- layouts of well-known data sets, as their cards show them; the texts are made up ---

ASK = {"role": "user", "content": "hi"}
YES, NO = ({"role": "assistant", "content": text} for text in ("yes", "no"))
AGAIN = {"role": "user", "content": [{"type": "text", "text": "ag"}, {"type": "text", "text": "ain"}]}
LONG = "Human: hi\n\nAssistant: no\n\nHuman: again\n\nAssistant:"
PAIRS = {
    "messages": ({"prompt": [ASK], "chosen": [YES], "rejected": [NO]}, "hi"),
    "messages and texts": ({"prompt": [ASK], "chosen": "yes", "rejected": [NO]}, "hi"),
    "a prompt of several turns": (
        {"prompt": [ASK, NO, AGAIN], "chosen": [YES], "rejected": [NO]},
        LONG,
    ),
    "whole dialogues": ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, "hi"),
    "whole dialogues of several turns": (
        {"chosen": [ASK, NO, AGAIN, YES], "rejected": [ASK, NO, AGAIN, NO]},
        LONG,
    ),
    "HH-RLHF": (
        {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        "hi",
    ),
    "HH-RLHF, several turns": (
        {
            "chosen": f"\n\n{LONG} yes",
            "rejected": f"\n\n{LONG} no",
        },
        LONG,
    ),
    "UltraFeedback binarized": (
        {"prompt": "hi", "prompt_id": "ab", "chosen": [ASK, YES], "rejected": [ASK, NO],
         "messages": [ASK, YES], "score_chosen": 8.5, "score_rejected": 7.0},
        "hi",
    ),
    "RewardBench": (
        {"prompt": "hi", "chosen": "yes", "chosen_model": "m", "rejected": "no",
         "rejected_model": "n", "subset": "hep-go", "id": 1},
        "hi",
    ),
    "HelpSteer2, preferences": (
        {"split": "train", "prompt": "hi", "response_1": "yes", "response_2": "no",
         "preference_strength": -1, "preference_statement": "s", "preference_elaboration": "e"},
        "hi",
    ),
    "HelpSteer3": (
        {"domain": "code", "language": "go", "context": [ASK, NO, AGAIN], "response1": "no",
         "response2": "yes", "overall_preference": 2,
         "individual_preference": [{"score": 2, "reasoning": "r"}]},
        LONG,
    ),
    "SHP, the first": (
        {"post_id": "q", "domain": "askx_train", "history": "hi", "human_ref_A": "yes",
         "human_ref_B": "no", "labels": 1, "score_A": 9, "score_B": 2, "score_ratio": 4.5},
        "hi",
    ),
    "SHP, the second": (
        {"history": "hi", "human_ref_A": "no", "human_ref_B": "yes", "labels": 0},
        "hi",
    ),
    "votes": (
        {"prompt": "hi", "response_1": "no", "response_2": "yes", "ratings": [2, 0, 2]},
        "hi",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_in_the_layouts_that_people_have(tmp_path, layout, kind):
    record, prompt = PAIRS[layout]
    path = tmp_path / f"mine.{kind}"
    if kind == "csv":
        cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items()}
        pd.DataFrame([cells]).to_csv(path, index=False)
    elif kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist([uniform(record)]), path)
    else:
        write(path, record)
    assert columns(read_pairs(path)) == [[prompt, "yes", "no"]]
    assert columns(read_prompts(path), "prompt") == [[prompt]]


def uniform(value):
    """Give all messages a content of the same type, as columns of Parquet must have."""
    if isinstance(value, dict):
        value = {k: uniform(v) for k, v in value.items()}
        if isinstance(value.get("content"), str):
            value["content"] = [{"type": "text", "text": value["content"]}]
    return [uniform(one) for one in value] if isinstance(value, list) else value


def test_helpsteer2_s_two_responses_to_a_prompt_are_a_pair(tmp_path):
    """Layout of its rows: two after each other to every prompt; the more helpful one is preferred."""
    scores = {"correctness": 1, "coherence": 4, "complexity": 2, "verbosity": 1}
    rows = [
        {"prompt": p, "response": r, "helpfulness": h, **scores}
        for p, r, h in [("p", "no", 1), ("p", "yes", 3), ("q", "yes", 4), ("q", "no", 0),
                        ("t", "a", 2), ("t", "b", 2)]
    ]  # fmt: skip
    table = read_pairs(write(tmp_path / "train.jsonl", *rows))
    assert columns(table) == [["p", "yes", "no"], ["q", "yes", "no"]]
    assert table.attrs["left out"] == {"no response is preferred": 1}
    with pytest.raises(DataError, match=r"jsonl:5: expected the next record to have a response"):
        read_pairs(write(tmp_path / "odd.jsonl", *rows[:5]))


# --- what says nothing ---

SAME = "chosen and rejected are the same text"
EMPTY = "a text without a visible character"
BROKEN = "a text with NUL or half a surrogate pair"
NOTHING = [
    (GOOD | {"chosen": "r"}, SAME),
    (GOOD | {"chosen": " r\n"}, SAME),
    (GOOD | {"chosen": "one  two", "rejected": "one\u00a0two"}, SAME),
    (GOOD | {"chosen": "caf\u00e9", "rejected": "cafe\u0301"}, SAME),
    (GOOD | {"chosen": "\ufb01t", "rejected": "fit"}, SAME),
    (GOOD | {"chosen": "r\u200b"}, SAME),
    (GOOD | {"chosen": " "}, EMPTY),
    (GOOD | {"prompt": None}, EMPTY),
    (GOOD | {"rejected": "\u200b\ufeff\u2060"}, EMPTY),
    (GOOD | {"chosen": "\u3164"}, EMPTY),
    (GOOD | {"chosen": "a\0b"}, BROKEN),
    (GOOD | {"prompt": "\ud83d"}, BROKEN),
    (GOOD | {"score_chosen": 4.0, "score_rejected": 4.0}, "no response is preferred"),
    (
        {"chosen": [ASK, YES], "rejected": [ASK, NO, ASK, YES]},
        "chosen and rejected part before their last turn",
    ),
    ({"prompt": "p", "response_1": "a", "response_2": "b", "ratings": [1, 2, 0]}, "no response is preferred"),
]


@pytest.mark.parametrize(("record", "reason"), NOTHING)
def test_what_says_nothing_is_left_out_counted_and_told(tmp_path, caplog, record, reason):
    path = write(tmp_path / "pairs.jsonl", GOOD, record, GOOD, record)
    with caplog.at_level(logging.WARNING):
        table = read_pairs(path)
    assert len(table) == 2 and table.attrs["left out"] == {reason: 2}
    assert f"left out 2 x {reason} (first: {path}:2); 2 records remain" in caplog.text


def test_texts_that_differ_are_kept(tmp_path, caplog):
    texts = ["x", "X", "x.", "xx", "\N{WAVING HAND SIGN}", "\u00e9", "e", "a b", "ab", "-", "\u65e5"]
    rows = [GOOD | {"chosen": a, "rejected": b} for a in texts for b in texts if a != b]
    assert len(read_pairs(write(tmp_path / "p.jsonl", *rows))) == len(rows) and not caplog.text


def test_packed_files_grow_to_a_limit_only(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_BYTES", 2**20)
    bomb = as_lines([GOOD | {"chosen": "x" * 2**23}])
    for name, content in {
        "b.jsonl.gz": gzip.compress(bomb),
        "b.jsonl.zst": zstd(bomb),
        "b.parquet": pd.DataFrame([GOOD | {"chosen": "x" * 1000}] * 9000).to_parquet(),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"bytes hold more than \d+; texts do not shrink so far"):
            read_pairs(tmp_path / name)


# --- ratings ---


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"ratings": [1, 0.5, -2], "helpfulness": 3}],
        [{"helpfulness": [1, 0.5, -2], "correctness": [4, 4, 4]}],  # HelpSteer2's disagreements
        [{"rating_1": 1, "rating_2": None, "rating_3": 0.5, "rating_4": -2}],
        [{"rater": name, "rating": value} for name, value in (("a", 1), ("b", 0.5), ("c", -2))],
    ],
)
def test_ratings_in_the_layouts_that_people_have(tmp_path, rows, kind):
    rows = [{"prompt": "p", "response": "r", **row} for row in rows]
    path = tmp_path / f"r.{kind}"
    table = pd.DataFrame(rows)
    {"jsonl": lambda: write(path, *rows), "json": lambda: path.write_text(json.dumps(rows)),
     "csv": lambda: table.to_csv(path, index=False), "parquet": lambda: table.to_parquet(path)}[
        kind
    ]()  # fmt: skip
    assert columns(read_ratings(path), "prompt", "response", "ratings") == [["p", "r", [1, 0.5, -2]]]


def test_a_single_opinion_says_nothing_of_disagreement(tmp_path):
    rows = [{"prompt": "p", "response": "r", "ratings": ratings} for ratings in ([1, 2], [1], [])]
    table = read_ratings(write(tmp_path / "r.jsonl", *rows))
    assert len(table) == 1 and table.attrs["left out"] == {"rated by fewer than two people": 2}


@pytest.mark.parametrize("wrong", ["12", None, [1, "x"], [1, True], [1, float("nan")], [1, 10**400]])
def test_ratings_that_are_no_numbers(tmp_path, wrong):
    rated = {"prompt": "p", "response": "r", "ratings": wrong}
    with pytest.raises(DataError, match=r"bad.jsonl:1: ratings: expected a list of at least two"):
        read_ratings(write(tmp_path / "bad.jsonl", rated))


RATED = {"prompt": "c#", "response": "r", "helpfulness": [3, 3, 4], "correctness": [3, 4, 4],
         "coherence": [4, 3, 4], "complexity": [2, 2, 2], "verbosity": [2, 1, 1]}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl", "csv", "parquet"])
def test_every_attribute_of_helpsteer2_s_disagreements(tmp_path, kind):
    """Layout of its disagreements.jsonl.gz, as on its card: for each a list of 2 to 5 people's scores."""
    two = {name: one if isinstance(one, str) else one[:2] for name, one in RATED.items()}
    path = tmp_path / f"disagreements.{kind}"
    if kind.startswith("jsonl"):
        write(path, two | {"response": "s"}, RATED)
    else:
        table = pd.DataFrame([two | {"response": "s"}, RATED])
        table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path)
    table = read_attribute_ratings(path)
    assert table["response"].tolist() == ["s", "r"]
    assert table["ratings"][0].tolist() == [[3, 3, 4, 2, 2], [3, 4, 3, 2, 1]]  # people, attributes
    assert table["ratings"][1].tolist() == [[3, 3, 4, 2, 2], [3, 4, 3, 2, 1], [4, 4, 4, 2, 1]]
    assert columns(read_ratings(path), "ratings") == [[[3, 3]], [[3, 3, 4]]]  # of helpfulness alone


def test_urms_learn_from_people_of_different_numbers():
    random = np.random.default_rng(0)
    ratings = [random.integers(0, 5, (people, 5)).astype(float) for people in (2, 5, 3, 2)]
    scores, people = attribute_scores(ratings)
    assert scores.shape == (4, 5, 5)
    np.testing.assert_array_equal(scores.reshape(-1, 5)[people], np.concatenate(ratings))
    np.testing.assert_array_equal(people // 5, np.repeat(range(4), (2, 5, 3, 2)))
    np.testing.assert_allclose(
        scores.reshape(-1, 5)[np.setdiff1d(np.arange(20), people)][0], ratings[0].mean(0)
    )
    settings = load_profile("smoke").ensembles.trained.model_copy(update={"epochs": 2})
    given = torch.randn(4, 3), torch.from_numpy(scores).float(), torch.from_numpy(people)[None]
    heads = train_attributes(*given, loss="mle", settings=settings, seed=0)
    assert heads.weight.shape == (1, 5, 2, 3) and heads.weight.isfinite().all()


def test_attributes_that_nobody_or_not_everybody_rated(tmp_path):
    rows = (
        RATED,
        RATED | {"verbosity": [1, 2]},
        {k: v if isinstance(v, str) else [1] for k, v in RATED.items()},
    )
    table = read_attribute_ratings(write(tmp_path / "r.jsonl", *rows))
    reasons = {"attributes rated by different numbers of people": 1, "rated by fewer than two people": 1}
    assert len(table) == 1 and table.attrs["left out"] == reasons
    for wrong, told in (
        ({name: one for name, one in RATED.items() if name != "coherence"}, "no field 'coherence'"),
        (RATED | {"complexity": 3}, "complexity: expected a list of at least two numbers, got 3"),
        (RATED | {"complexity": [3, "4"]}, "complexity: expected a list of at least two numbers"),
    ):
        with pytest.raises(DataError, match=rf"bad.jsonl:1: {told}"):
            read_attribute_ratings(write(tmp_path / "bad.jsonl", wrong))


def test_prompts_from_a_file(tmp_path):
    rows = {"prompt": "p"}, {"prompt": "q", "subset": "hep-go"}, {"prompt": [ASK]}, {"prompt": "\0"}
    prompts = read_prompts(write(tmp_path / "p.jsonl", *rows))
    assert columns(prompts, "category", "prompt") == [["reasoning", "q"], ["p", "p"], ["p", "hi"]]
    assert sum(prompts.attrs["left out"].values()) == 1


def test_few_prompts_are_of_all_subsets_as_often_as_all_are(tmp_path):
    rows = [
        {"prompt": f"{subset}{k}", "subset": subset}
        for subset in "ab"
        for k in range(6 if subset == "a" else 2)
    ]
    path = write(tmp_path / "p.jsonl", *rows, {"prompt": "a0", "subset": "a"})
    assert prompts_of(path, 4) == ["a0", "a1", "b0", "a2"]
    assert sorted(prompts_of(path, 100)) == sorted(row["prompt"] for row in rows)
    assert spread_prompts(path, 5)["subset"].tolist() == ["a", "a", "b", "a", "a"]


# --- the hub ---


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put folders laid out like hub data sets where `load_dataset` finds them by name."""
    monkeypatch.chdir(tmp_path)

    def put(name, table, split):
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        if split == "filtered":
            files = "  data_files:\n  - split: filtered\n    path: data/filtered-*"
            card = f"configs:\n- config_name: default\n{files}"
            (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n")
        return name

    return put


def test_reward_bench_by_name(hub):
    """Layout: the card of huggingface.co/datasets/allenai/reward-bench:
    split `filtered`; prompt, chosen, chosen_model, rejected, rejected_model, subset as strings, id."""
    subsets = [s for group in reward_bench_weights().values() for s in group]
    rows = [
        {"prompt": f"p{k}", "chosen": "good", "chosen_model": "m", "rejected": "bad",
         "rejected_model": "n", "subset": subset, "id": k}
        for k, subset in enumerate(subsets)
    ]  # fmt: skip
    name = hub("allenai/reward-bench", pd.DataFrame(rows), "filtered")
    table = read_pairs(name)
    assert len(table) == 23
    assert table["category"].value_counts().to_dict() == {
        "reasoning": 7, "chat-hard": 6, "chat": 5, "safety": 5,
    }  # fmt: skip
    assert len(read_prompts(name)) == 5 and set(read_prompts(name)["category"]) == {"chat"}


def test_preference_mix_by_name(hub):
    """Layout: the data card of weqweasdas/preference_dataset_mix2: split `train`; chosen and rejected
    are lists of {content, role} that share all turns but the last; scores beside them; no prompt."""
    user, more = {"role": "user", "content": "hi"}, {"role": "user", "content": "again"}
    yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no"))
    rows = [
        {"chosen": [user, yes], "rejected": [user, no], "chosen_score": 2.0, "rejected_score": 1.0},
        {"chosen": [user, no, more, yes], "rejected": [user, no, more, no], "chosen_score": 1.0,
         "rejected_score": 0.0},
    ]  # fmt: skip
    table = read_pairs(hub("weqweasdas/preference_dataset_mix2", pd.DataFrame(rows), "train"))
    assert table["prompt"].tolist() == ["hi", "Human: hi\n\nAssistant: no\n\nHuman: again\n\nAssistant:"]
    assert table[["chosen", "rejected"]].to_numpy().tolist() == [["yes", "no"]] * 2
    assert set(table["subset"]) == {"preference_dataset_mix2"}


@pytest.mark.parametrize(
    ("rejected", "words"),
    [
        ([{"role": "user", "content": "hi"}], "expected the assistant to speak last"),
        ([{"role": "user"}, {"role": "assistant", "content": "n"}], "expected text"),
        ([{"content": "n"}], "messages with role and content"),
    ],
)
def test_conversations_that_are_no_pair(hub, rejected, words):
    chosen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "y"}]
    name = hub("some/set", pd.DataFrame([{"chosen": chosen, "rejected": rejected}]), "train")
    with pytest.raises(DataError, match=f"some/set, row 0.*{words}"):
        read_pairs(name)


def test_other_columns_and_absent_sets_are_told(hub):
    name = hub("some/other", pd.DataFrame([{"text": "x", "label": 1}]), "train")
    with pytest.raises(DataError, match=r"some/other, row 0: .* got text, label"):
        read_pairs(name)
    with pytest.raises(DataError, match=r"split nope: cannot be loaded"):
        read_pairs(f"{name}@nope")


@pytest.mark.parametrize("name", ["data/pairs.jsonl", "data/pairs.CSV", "no/pairs.parquet.zst"])
def test_what_looks_like_a_path_is_never_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(data, "_hub_records", lambda name: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match="there is no such file"):
        read_pairs(name)


@pytest.fixture
def online(monkeypatch):
    """Let the libraries believe that they are online, and what they learn be forgotten."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    hub_library._failure.cache_clear()
    yield
    hub_library._failure.cache_clear()


@pytest.mark.parametrize("listening", [True, False])
def test_a_hub_that_does_not_answer_is_asked_once(online, monkeypatch, capfd, caplog, listening):
    """A server that takes the connection and says nothing, or none at all; then what is kept is taken."""
    assert hub_library.SECONDS < 10
    monkeypatch.setattr(hub_library, "SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if listening else 9
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        for read in (lambda: read_pairs("owner/name"), lambda: configuration("here", "owner/model")):
            with pytest.raises((DataError, PlanError)) as error:
                read()
            assert "\n" not in str(error.value)
    assert huggingface_hub.is_offline_mode() and os.environ["HF_HUB_OFFLINE"] == "1"
    assert capfd.readouterr().err == "" and not caplog.records


def test_a_hub_that_answers_is_left_as_it_is(online, monkeypatch):
    session = SimpleNamespace(head=lambda *_, **__: None)
    monkeypatch.setattr(hub_library, "get_session", lambda: session)
    hub_library.ask_hub("owner/name")
    assert not huggingface_hub.is_offline_mode()


# --- the embedded world ---


def test_embedded_pairs_follow_the_annotators_and_know_the_gold():
    world, random = World(0), np.random.default_rng(0)
    prompts = world.prompts(2000, random)
    first = world.responses(prompts, np.full(2000, 0.9), random)
    second = world.responses(prompts, np.full(2000, 0.1), random)
    second[:7] = first[:7]
    pairs = embedded_pairs(world, prompts, first, second, random)
    assert pairs.attrs["identical"] >= 7 and len(pairs) == 2000 - pairs.attrs["identical"]
    asked = pairs["prompt"].tolist()
    np.testing.assert_array_equal(pairs["gold_chosen"], world.gold(asked, pairs["chosen"].tolist()))
    np.testing.assert_array_equal(pairs["gold_rejected"], world.gold(asked, pairs["rejected"].tolist()))
    agrees = (pairs["gold_chosen"] > pairs["gold_rejected"]).groupby(pairs["category"]).mean()
    assert agrees.min() > 0.7 and agrees.max() < 0.99


# --- weights ---


def test_weights_are_those_of_reward_bench():
    weights = reward_bench_weights()
    assert sum(weights["chat"].values()) == 358  # the paper's number of prompts
    totals = {name: sum(subsets.values()) for name, subsets in weights.items()}
    assert totals == {"chat": 358, "chat-hard": 456, "safety": 740, "reasoning": 1968}
    assert weights["reasoning"]["math-prm"] == totals["reasoning"] / 2


def test_accuracy_weighs_subsets_not_pairs():
    pairs = pd.DataFrame({"subset": ["math-prm"] + ["hep-go"] * 9, "category": "reasoning"})
    correct = np.array([1.0] + [0.0] * 9)
    assert accuracy_by_category(pairs, correct)["accuracy"].item() == pytest.approx(984 / (984 + 164))
    own = pd.DataFrame({"subset": ["mine"] * 4, "category": ["mine"] * 4})
    assert accuracy_by_category(own, np.array([1, 0, 0, 1.0]))["accuracy"].item() == 0.5


def test_its_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    chances = {"math-prm": (60, 0.9), "hep-go": (200, 0.6), "hep-js": (90, 0.3)}
    table = pd.DataFrame({"subset": [s for s, (n, _) in chances.items() for _ in range(n)]})
    table["category"] = "reasoning"
    chance = np.concatenate([np.full(n, p) for n, p in chances.values()])
    truth = (984 * 0.9 + 164 * 0.6 + 164 * 0.3) / (984 + 2 * 164)
    found = [accuracy_by_category(table, random.random(350) < chance).iloc[0] for _ in range(400)]
    assert np.mean([row["low"] <= truth <= row["high"] for row in found]) > 0.91
