"""One schema from the embedded world, files and hub data sets; what is malformed is told by line."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from vaalign_lib.data import (
    DataError,
    accuracy_by_category,
    embedded_pairs,
    read_pairs,
    read_prompts,
    read_ratings,
    reward_bench_weights,
)
from vaalign_lib.synthetic.world import World

GOOD = {"subset": "llmbar-natural", "prompt": "p", "chosen": "c", "rejected": "r", "source": "s"}


def write(path, *records):
    text = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


# --- files ---


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_pairs_from_a_file(tmp_path, name):
    other = {"prompt": "q", "chosen": "c", "rejected": "r"}
    table = read_pairs(write(tmp_path / name, GOOD, "", other))
    assert table.columns.tolist() == ["subset", "category", "prompt", "chosen", "rejected"]
    assert table["category"].tolist() == [
        "chat-hard",
        "pairs",
    ]  # a file without subsets is one itself
    assert table["prompt"].tolist() == ["p", "q"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{", "expected one JSON object a line"),
        ("[1]", "expected a JSON object, got list"),
        ({"prompt": "p", "chosen": "c"}, "no field 'rejected'; expected prompt, chosen, rejected"),
        (GOOD | {"chosen": " "}, "chosen: expected text, got an empty one"),
        (GOOD | {"chosen": 3}, "chosen: expected text, got int"),
        (GOOD | {"chosen": "r"}, "chosen and rejected are the same text"),
        (GOOD | {"subset": ""}, "subset: expected text, got an empty one"),
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
        ("pairs.csv", "expected a file ending in .jsonl or .jsonl.gz"),
        ("empty.jsonl", "at least one record"),
        ("broken.jsonl.gz", "cannot be read as text"),
        ("bits.jsonl.gz", "cannot be read as text"),
        ("latin.jsonl", "cannot be read as text"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, words):
    (tmp_path / "pairs.csv").write_text("a,b")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    (tmp_path / "bits.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:12] + b"\xff" * 30)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DataError, match=words):
        read_pairs(tmp_path / name)


def test_ratings_and_prompts_from_files(tmp_path):
    rated = {"prompt": "p", "response": "r", "ratings": [1, 0.5, -2]}
    assert read_ratings(write(tmp_path / "r.jsonl", rated))["ratings"].tolist() == [[1, 0.5, -2]]
    prompts = read_prompts(
        write(tmp_path / "p.jsonl", {"prompt": "p"}, {"prompt": "q", "subset": "hep-go"})
    )
    assert prompts["category"].tolist() == ["reasoning", "p"]
    for wrong in ([1], "12", None, [1, "x"], [1, True], [1, float("nan")]):
        with pytest.raises(
            DataError, match=r"bad.jsonl:1: ratings: expected a list of at least two numbers"
        ):
            read_ratings(write(tmp_path / "bad.jsonl", rated | {"ratings": wrong}))


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
    assert table["prompt"].tolist() == [
        "hi",
        "Human: hi\n\nAssistant: no\n\nHuman: again\n\nAssistant:",
    ]
    assert table[["chosen", "rejected"]].to_numpy().tolist() == [["yes", "no"]] * 2
    assert set(table["subset"]) == {"preference_dataset_mix2"}


@pytest.mark.parametrize(
    ("rejected", "words"),
    [
        (
            [{"role": "user", "content": "other"}, {"role": "assistant", "content": "n"}],
            "last turn only",
        ),
        ([{"role": "user", "content": "hi"}], "expected the assistant to speak last"),
        (
            [{"role": "user"}, {"role": "assistant", "content": "n"}],
            "messages with role and content",
        ),
    ],
)
def test_conversations_that_are_no_pair(hub, rejected, words):
    chosen = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "y"}]
    name = hub("some/set", pd.DataFrame([{"chosen": chosen, "rejected": rejected}]), "train")
    with pytest.raises(DataError, match=f"some/set, row 0.*{words}"):
        read_pairs(name)


def test_other_columns_and_absent_sets_are_told(hub):
    name = hub("some/other", pd.DataFrame([{"text": "x", "label": 1}]), "train")
    with pytest.raises(DataError, match=r"got label, text"):
        read_pairs(name)
    with pytest.raises(DataError, match=r"split nope: cannot be loaded"):
        read_pairs(f"{name}@nope")


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
    np.testing.assert_array_equal(
        pairs["gold_rejected"], world.gold(asked, pairs["rejected"].tolist())
    )
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
    assert accuracy_by_category(pairs, correct)["accuracy"].item() == pytest.approx(
        984 / (984 + 164)
    )
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
