"""Preference pairs, prompts and ratings by several people: one schema, whatever they come from.

A source is the path of a JSON Lines file (`.jsonl`, `.jsonl.gz`), or a data set of the Hugging Face hub
as `owner/name` or `owner/name@split`; the pairs of the embedded world are drawn (`embedded_pairs`).
Every reader returns a table with the columns named here, or says in which file and line something else
was found; nothing is dropped.

    pairs     subset, category, prompt, chosen, rejected
    prompts   subset, category, prompt
    ratings   prompt, response, ratings   (a list of at least two numbers, one per person)
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset, load_dataset

from vaalign_lib.conversation import prompt_text
from vaalign_lib.paths import DATA
from vaalign_lib.synthetic.language import CATEGORIES
from vaalign_lib.synthetic.world import World

EMBEDDED = "embedded"
_HUB_NAME = re.compile(r"^[\w.-]+/[\w.-]+(@[\w.-]+)?$")
PAIR_FIELDS = ("prompt", "chosen", "rejected")
RATING_FIELDS = ("prompt", "response", "ratings")


class DataError(ValueError):
    """Data that is not there or not as expected; says where and what would be right."""


# --- RewardBench ------------------------------------------------------------------------------------


@cache
def reward_bench_weights() -> dict[str, dict[str, int]]:
    """Return the weight of every subset of RewardBench, by category."""
    content: dict[str, dict[str, int]] = yaml.safe_load(
        (DATA / "reward_bench.yaml").read_text(encoding="utf-8")
    )
    return content


def category_of(subset: str) -> str:
    """Return the category of a RewardBench subset; any other subset is its own category."""
    for category, subsets in reward_bench_weights().items():
        if subset in subsets:
            return category
    return subset


def accuracy_by_category(pairs: pd.DataFrame, correct: np.ndarray) -> pd.DataFrame:
    """Return the share of pairs ranked rightly by category, RewardBench's subsets at their weights.

    Args:
        pairs: a table of pairs.
        correct: whether each was ranked rightly (pairs,).

    Returns:
        A row per category: `category`, `accuracy`, `low`, `high` (95%, normal, by strata), `count`.
    """
    weights = {s: w for subsets in reward_bench_weights().values() for s, w in subsets.items()}
    table = pd.DataFrame({"category": pairs["category"], "subset": pairs["subset"]})
    groups = table.assign(share=np.asarray(correct, dtype=float)).groupby(
        ["category", "subset"], sort=False
    )["share"]
    strata = groups.agg(["mean", "size"]).reset_index()
    strata["weight"] = strata["subset"].map(weights).fillna(strata["size"]).astype(float)
    rows = []
    for category, stratum in strata.groupby("category", sort=False):
        weight = stratum["weight"] / stratum["weight"].sum()
        share = float((weight * stratum["mean"]).sum())
        variance = weight**2 * stratum["mean"] * (1 - stratum["mean"]) / stratum["size"]
        half = 1.96 * float(np.sqrt(variance.sum()))
        ends = {"low": max(0.0, share - half), "high": min(1.0, share + half)}
        count = int(stratum["size"].sum())
        rows.append({"category": category, "accuracy": share, **ends, "count": count})
    return pd.DataFrame(rows)


# --- sources ----------------------------------------------------------------------------------------


def read_pairs(source: str | Path) -> pd.DataFrame:
    """Read preference pairs from a file or the hub.

    Raises:
        DataError: the source does not exist or holds something else.
    """
    if _is_hub_name(source):
        return _finished(_hub_pairs(str(source)), source)
    return _finished(_read_lines(source, _check_pair), source)


def read_prompts(source: str | Path) -> pd.DataFrame:
    """Read prompts from a file or the hub; of RewardBench, those of the five chat subsets.

    Raises:
        DataError: the source does not exist or holds something else.
    """
    if _is_hub_name(source):
        pairs = _finished(_hub_pairs(str(source)), source)
        chat = pairs["subset"].isin(reward_bench_weights()["chat"])
        pairs = pairs[chat] if chat.any() else pairs
        return pairs[["subset", "category", "prompt"]].reset_index(drop=True)
    return _finished(_read_lines(source, _check_prompt), source)


def prompts_of(data: str, count: int) -> list[str]:
    """Return the first prompts of a data set, each once, at most `count`."""
    return list(dict.fromkeys(read_prompts(data)["prompt"]))[:count]


def read_ratings(source: str | Path) -> pd.DataFrame:
    """Read responses that several people have rated, from a file.

    Raises:
        DataError: the file does not exist or holds something else.
    """
    return pd.DataFrame(_read_lines(source, _check_rating))


def embedded_pairs(
    world: World,
    prompts: list[str],
    first: list[str],
    second: list[str],
    random: np.random.Generator,
) -> pd.DataFrame:
    """Let the world's annotators label pairs of responses; identical responses are left out, counted.

    Returns:
        A table of pairs with further columns: `gold_chosen`, `gold_rejected` (the true rewards), and in
        `attrs` under `identical` the number of pairs left out.
    """
    table = pd.DataFrame({"prompt": prompts, "first": first, "second": second})
    identical = table["first"] == table["second"]
    table = table[~identical].reset_index(drop=True)
    asked, left, right = (table[name].tolist() for name in ("prompt", "first", "second"))
    wins = world.preferences(asked, left, right, random)
    assessed = world.assess(asked, left)
    gold_left, gold_right = assessed["gold"].to_numpy(), world.gold(asked, right)
    pairs = pd.DataFrame(
        {
            "subset": assessed["category"],
            "category": assessed["category"],
            "prompt": asked,
            "chosen": np.where(wins, left, right),
            "rejected": np.where(wins, right, left),
            "gold_chosen": np.where(wins, gold_left, gold_right),
            "gold_rejected": np.where(wins, gold_right, gold_left),
        }
    )
    pairs.attrs["identical"] = int(identical.sum())
    return pairs


def _is_hub_name(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, str)
        and not text.endswith((".jsonl", ".jsonl.gz"))
        and not Path(text).is_file()
        and bool(_HUB_NAME.match(text))
    )


def _finished(rows: list[dict[str, Any]], source: str | Path) -> pd.DataFrame:
    if not rows:
        raise DataError(f"{source}: expected at least one record, found none")
    table = pd.DataFrame(rows)
    table.insert(1, "category", table["subset"].map(category_of))
    order = [name for name in CATEGORIES if name in set(table["category"])]
    order += [name for name in table["category"].unique() if name not in order]
    place = table["category"].map({name: k for k, name in enumerate(order)})
    return table.iloc[np.argsort(place.to_numpy(), kind="stable")].reset_index(drop=True)


# --- files ------------------------------------------------------------------------------------------


def _read_lines(
    source: str | Path, check: Callable[[Mapping[str, Any], str, Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    path = Path(source)
    if str(source) == EMBEDDED:
        raise DataError(f"{EMBEDDED}: the embedded world's texts are drawn, they are in no file")
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(
            f"{source}: expected a file ending in .jsonl or .jsonl.gz, or a hub data set "
            "written as owner/name"
        )
    if not path.is_file():
        raise DataError(f"{source}: there is no such file")
    rows = []
    for number, line in _lines(path):
        place = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: expected one JSON object a line: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(record).__name__}")
        rows.append(check(record, place, path))
    if not rows:
        raise DataError(f"{path}: expected at least one record, found none")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8: {error}") from None


def _text(record: Mapping[str, Any], field: str, place: str, fields: tuple[str, ...]) -> str:
    if field not in record:
        raise DataError(
            f"{place}: no field {field!r}; expected {', '.join(fields)}, got {', '.join(record)}"
        )
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{place}: {field}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{place}: {field}: expected text, got an empty one")
    return value


def _subset(record: Mapping[str, Any], place: str, path: Path) -> str:
    if "subset" not in record:
        return path.name.split(".")[0]
    return _text(record, "subset", place, ("subset",))


def _check_pair(record: Mapping[str, Any], place: str, path: Path) -> dict[str, Any]:
    texts = {field: _text(record, field, place, PAIR_FIELDS) for field in PAIR_FIELDS}
    if texts["chosen"] == texts["rejected"]:
        raise DataError(f"{place}: chosen and rejected are the same text")
    return {"subset": _subset(record, place, path), **texts}


def _check_prompt(record: Mapping[str, Any], place: str, path: Path) -> dict[str, Any]:
    prompt = _text(record, "prompt", place, ("prompt",))
    return {"subset": _subset(record, place, path), "prompt": prompt}


def _check_rating(record: Mapping[str, Any], place: str, path: Path) -> dict[str, Any]:
    texts = {name: _text(record, name, place, RATING_FIELDS) for name in ("prompt", "response")}
    ratings = record.get("ratings")
    numbers = isinstance(ratings, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
        for value in ratings
    )
    if not numbers or len(ratings or []) < 2:
        raise DataError(
            f"{place}: ratings: expected a list of at least two numbers, got {ratings!r}"
        )
    return {**texts, "ratings": ratings}


# --- the hub ----------------------------------------------------------------------------------------


def _hub_pairs(name: str) -> list[dict[str, Any]]:
    """Load a data set by name and bring it into the schema, by the columns that it has."""
    path, _, split = name.partition("@")
    data = _load(path, split or ("filtered" if path.endswith("reward-bench") else "train"))
    columns = set(data.column_names)
    if {"prompt", "chosen", "rejected"} <= columns and isinstance(data[0]["chosen"], str):
        # texts, as allenai/reward-bench has them
        check: Callable[[Mapping[str, Any], str, Path], dict[str, Any]] = _check_pair
    elif {"chosen", "rejected"} <= columns:  # conversations: weqweasdas/preference_dataset_mix2
        check = _check_conversations
    else:
        raise DataError(
            f"{name}: expected the columns prompt, chosen, rejected (texts) or chosen, rejected "
            f"(conversations), got {', '.join(sorted(columns))}"
        )
    return [check(row, f"{name}, row {k}", Path(path)) for k, row in enumerate(data)]


def _load(path: str, split: str) -> Dataset:
    try:
        return load_dataset(path, split=split)
    except Exception as error:
        raise DataError(
            f"{path}, split {split}: cannot be loaded ({type(error).__name__}: {error}); "
            "name another split as owner/name@split, or give the path of a .jsonl file"
        ) from error


def _check_conversations(record: Mapping[str, Any], place: str, path: Path) -> dict[str, Any]:
    """Split two conversations that share all turns but the last into prompt, chosen and rejected."""
    turns = {}
    for field in ("chosen", "rejected"):
        messages = record[field]
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{place}: {field}: expected a list of messages, got {messages!r}")
        last = messages[-1]
        if any(not isinstance(one, dict) or not one.get("content") for one in messages):
            raise DataError(f"{place}: {field}: expected messages with role and content")
        if last.get("role") != "assistant":
            raise DataError(f"{place}: {field}: expected the assistant to speak last, got {last!r}")
        turns[field] = messages
    shared = turns["chosen"][:-1]
    if shared != turns["rejected"][:-1] or not shared:
        raise DataError(f"{place}: expected chosen and rejected to differ in their last turn only")
    texts = {
        "prompt": prompt_text(shared),
        "chosen": turns["chosen"][-1]["content"],
        "rejected": turns["rejected"][-1]["content"],
    }
    return _check_pair({"subset": path.name, **texts}, place, path)
