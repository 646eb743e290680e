"""Preference pairs, prompts and ratings by several people from files and the hub, in one schema.

A record that is not built as its columns promise is refused with its place (`DataError`); one that is well
built but says nothing is left out, and counted by reason in `attrs["left out"]` and a warning.
"""

import csv
import io
import json
import logging
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from huggingface_hub import is_offline_mode

from vaalign_lib.data.hub import ask_hub
from vaalign_lib.data.messages import dialogue_text, prompt_text
from vaalign_lib.data.world.attributes import ATTRIBUTES
from vaalign_lib.data.world.language import CATEGORIES
from vaalign_lib.data.world.world import World
from vaalign_lib.store import DATA, is_hub_name

EMBEDDED = "embedded"
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
MOST_BYTES, MOST_TIMES = 2**26, 100  # unpacked: texts shrink tenfold, bombs a thousandfold
_PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # by the first bytes
PAIR_FIELDS = ("prompt", "chosen", "rejected")
PARTS = ("train", "held_out", "evaluation")  # what pairs are for
_log = logging.getLogger(__name__)


class DataError(ValueError):
    """Data that is not there or not as expected; says where and what would be right."""


class _LeftOutError(Exception):
    """A record that says nothing; the reason."""


class _Record(dict[str, Any]):
    """A record of a source, with the place where it stands."""

    def __init__(self, place: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.place = place

    def field(self, name: str, expected: tuple[str, ...] = PAIR_FIELDS) -> Any:
        if name not in self:
            found = _one_line(", ".join(map(str, self)))
            raise DataError(f"{self.place}: no field {name!r}; expected {', '.join(expected)}, got {found}")
        return "" if self[name] is None else self[name]

    def text(self, name: str, expected: tuple[str, ...] = PAIR_FIELDS) -> str:
        value = self.field(name, expected)
        return value if isinstance(value, str) else prompt_text(_messages(value, f"{self.place}: {name}"))

    def number(self, name: str) -> float:
        value = self.field(name, (name,))
        if not _is_number(value):
            raise DataError(f"{self.place}: {name}: expected a number, got {value!r:.80}")
        return float(value)


Records = Iterator[_Record]

# --- RewardBench ------------------------------------------------------------------------------------


@cache
def reward_bench_weights() -> dict[str, dict[str, int]]:
    """Return the weight of every subset of RewardBench, by category."""
    return dict(yaml.safe_load((DATA / "reward_bench.yaml").read_text(encoding="utf-8")))


def _subsets() -> dict[str, tuple[str, int]]:
    """Return the category and weight of every subset of RewardBench."""
    weights = reward_bench_weights().items()
    return {subset: (category, weight) for category, inside in weights for subset, weight in inside.items()}


def accuracy_by_category(pairs: pd.DataFrame, correct: np.ndarray) -> pd.DataFrame:
    """Return the share of pairs ranked rightly by category, RewardBench's subsets at their weights: a row
    per category with `category`, `accuracy`, `low`, `high` (95%, normal, by strata), `count`.
    """
    known = _subsets()
    table = pairs[["category", "subset"]].assign(share=np.asarray(correct, dtype=float))
    strata = table.groupby(["category", "subset"], sort=False)["share"].agg(["mean", "size"]).reset_index()
    sizes = zip(strata["subset"], strata["size"], strict=True)
    weight = pd.Series([known.get(subset, ("", size))[1] for subset, size in sizes], dtype=float)
    weight /= weight.groupby(strata["category"]).transform("sum")
    strata["accuracy"] = weight * strata["mean"]
    strata["variance"] = weight**2 * strata["mean"] * (1 - strata["mean"]) / strata["size"]
    sums = strata.groupby("category", sort=False, as_index=False)[["accuracy", "variance", "size"]].sum()
    half = 1.96 * np.sqrt(sums["variance"])
    ends = {"low": (sums["accuracy"] - half).clip(lower=0), "high": (sums["accuracy"] + half).clip(upper=1)}
    return sums.assign(**ends, count=sums["size"])[["category", "accuracy", "low", "high", "count"]]


# --- sources ----------------------------------------------------------------------------------------


def read_pairs(source: str | Path) -> pd.DataFrame:
    """Read preference pairs: `subset`, `category`, `prompt`, `chosen`, `rejected`.

    A source is a file of JSON (a record a line, or one list of them), CSV or Parquet, packed or not, or a
    data set of the hub as `owner/name` or `owner/name@split`. A text may be a list of messages.
    """
    return _by_category(_table(source, _joined(_records(source)), _pair))


def read_prompts(source: str | Path) -> pd.DataFrame:
    """Read prompts: `subset`, `category`, `prompt`; of RewardBench on the hub, of the five chat subsets."""
    prompts = _by_category(_table(source, _records(source), _prompt))
    chat = prompts["subset"].isin(reward_bench_weights()["chat"])
    return prompts[chat].reset_index(drop=True) if _is_hub_name(source) and chat.any() else prompts


def spread_prompts(data: str | Path, count: int) -> pd.DataFrame:
    """Return prompts of a data set, each once, at most `count`: each subset's first, so many that its share
    is what it is of all.
    """
    prompts = read_prompts(data).drop_duplicates("prompt")
    groups = prompts.groupby("subset", sort=False)["subset"]
    place = (groups.cumcount() + 0.5) / groups.transform("size")
    return prompts.iloc[np.argsort(place, kind="stable")[:count]].reset_index(drop=True)


def prompts_of(data: str | Path, count: int) -> list[str]:
    """Return the texts of `spread_prompts`."""
    return spread_prompts(data, count)["prompt"].tolist()


def read_ratings(source: str | Path) -> pd.DataFrame:
    """Read responses that people have rated: `prompt`, `response`, `ratings`, a list of a number each."""
    return _table(source, _gathered(_records(source)), _rating)[["prompt", "response", "ratings"]]


def read_attribute_ratings(source: str | Path) -> pd.DataFrame:
    """Read responses whose attributes several people have rated, as in HelpSteer2's disagreements: `prompt`,
    `response`, `ratings`, an array (people, attributes) in the order of `ATTRIBUTES`.

    Each attribute is a list with a number of each person, of the same people in the same order.
    """
    return _table(source, _records(source), _attribute_ratings)[["prompt", "response", "ratings"]]


def attribute_scores(ratings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return ratings (people, attributes) of each text as URMs learn from them: scores (texts, most people,
    attributes), filled up with the text's mean, and which are people's: the numbers text * most + person.
    """
    people = np.array([len(one) for one in ratings])
    asked = np.arange(people.max()) < people[:, None]
    scores = np.stack([one.mean(0) for one in ratings])[:, None].repeat(people.max(), axis=1)
    scores[asked] = np.concatenate(list(ratings))
    return scores, np.flatnonzero(asked)


def embedded_pairs(
    world: World, prompts: list[str], first: list[str], second: list[str], random: np.random.Generator
) -> pd.DataFrame:
    """Let the world's annotators label pairs of responses; `gold_chosen` and `gold_rejected` are the true
    rewards. Identical responses are left out; how many is in `attrs["identical"]`.
    """
    table = pd.DataFrame({"prompt": prompts, "first": first, "second": second})
    kept = table[table["first"] != table["second"]]
    asked, left, right = (kept[name].tolist() for name in kept)
    wins = world.preferences(asked, left, right, random)
    assessed = world.assess(asked, left)
    pairs = pd.DataFrame({"subset": assessed["category"], "category": assessed["category"], "prompt": asked})
    gold = assessed["gold"].to_numpy(), world.gold(asked, right)
    for start, (one, other) in (("", (left, right)), ("gold_", gold)):
        pairs[f"{start}chosen"] = np.where(wins, one, other)
        pairs[f"{start}rejected"] = np.where(wins, other, one)
    pairs.attrs["identical"] = len(prompts) - len(kept)
    return pairs


def write_pairs(folder: Path, pairs: pd.DataFrame, left_out: Mapping[str, int]) -> None:
    """Write pairs with their `part`, and how many were left out, by reason, into a folder."""
    pairs.attrs.clear()
    pairs.to_parquet(folder / "pairs.parquet")
    (folder / "left_out.json").write_text(json.dumps(left_out) + "\n")


def read_part(folder: Path, part: str) -> pd.DataFrame:
    """Read the pairs of one part that were written into a folder."""
    return pd.read_parquet(folder / "pairs.parquet", filters=[("part", "==", part)])


def _is_hub_name(source: str | Path) -> bool:
    return isinstance(source, str) and "/" in source and is_hub_name(source) and not Path(source).is_file()


def _records(source: str | Path) -> Records:
    return _hub_records(str(source)) if _is_hub_name(source) else _file_records(source)


def _table(source: str | Path, records: Records, read: Callable[[_Record], dict[str, Any]]) -> pd.DataFrame:
    """Return what `read` makes of the records; what says nothing is left out and counted."""
    hub = _is_hub_name(source)
    subset = Path(str(source).partition("@")[0]).name if hub else Path(source).name.split(".")[0]
    rows, left_out = [], dict[str, list[str]]()  # the reason, and the places
    for record in records:
        try:
            own = _visible(record.text("subset")) if record.get("subset") else subset
            rows.append({"subset": own, **read(record)})
        except _LeftOutError as reason:
            left_out.setdefault(str(reason), []).append(record.place)
    reasons = "; ".join(f"{len(places)} x {why} (first: {places[0]})" for why, places in left_out.items())
    if not rows:
        found = f"none that says anything: {reasons}" if reasons else "none"
        raise DataError(f"{source}: expected at least one record, found {found}")
    if left_out:
        _log.warning("%s: left out %s; %d records remain", source, reasons, len(rows))
    table = pd.DataFrame(rows)
    table.attrs["left out"] = {why: len(places) for why, places in left_out.items()}
    return table


def _by_category(table: pd.DataFrame) -> pd.DataFrame:
    """Add RewardBench's category of each subset, any other subset's own, and sort: its categories first."""
    known = _subsets()
    table.insert(1, "category", [known.get(one, (one, 0))[0] for one in table["subset"]])
    rank = {name: k for k, name in enumerate(dict.fromkeys([*CATEGORIES, *table["category"]]))}
    return table.sort_values("category", key=lambda names: names.map(rank), kind="stable", ignore_index=True)


# --- files: `datasets` would read a text NA as missing, 01 as 1, and name no line -------------------


def _file_records(source: str | Path) -> Records:
    path = Path(source).expanduser()
    name = re.sub(r"\.(gz|zst|bz2)$", "", path.name.casefold())
    if str(source) == EMBEDDED:
        raise DataError(f"{EMBEDDED}: the embedded world's texts are drawn, they are in no file")
    if not name.endswith(ENDINGS):
        expected = f"expected a file ending in {', '.join(ENDINGS)} (or packed: .gz, .zst, .bz2)"
        raise DataError(f"{source}: {expected}, or a hub data set written as owner/name")
    if not path.is_file():
        raise DataError(f"{source}: there is no such file")
    content = _content(path)
    if name.endswith(".parquet") or content.startswith(b"PAR1"):
        return _parquet_records(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8: {error}") from None
    return _csv_records(path, text) if name.endswith(".csv") else _json_records(path, text)


def _content(path: Path) -> bytes:
    """Return a file's bytes, unpacked if they begin as packed ones do."""
    unpacked = bytearray()
    try:
        content = path.read_bytes()
        packing = next((how for begin, how in _PACKED.items() if content.startswith(begin)), None)
        if packing is None:
            return content
        with pa.CompressedInputStream(pa.BufferReader(content), packing) as stream:
            while part := stream.read(2**20):
                unpacked += part
                _check_size(path, len(content), len(unpacked))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {_one_line(error)}") from None
    return bytes(unpacked)


def _check_size(path: Path, packed: int, unpacked: int) -> None:
    if unpacked > (most := MOST_BYTES + MOST_TIMES * packed):
        raise DataError(f"{path}: {packed} bytes hold more than {most}; texts do not shrink so far")


def _check_columns(names: list[str], place: str) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{place}: a column stands twice: {_one_line(', '.join(names))}")


def _parquet_records(path: Path, content: bytes) -> Records:
    row, size = count(1), 0
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        _check_columns(file.schema_arrow.names, str(path))
        for batch in file.iter_batches(32):
            size += batch.nbytes
            _check_size(path, len(content), size)
            yield from (_Record(f"{path}, row {next(row)}", record) for record in batch.to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {_one_line(error)}") from None


def _csv_records(path: Path, text: str) -> Records:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = list(reader.fieldnames or [])
        _check_columns(names, f"{path}:1")
        for record in reader:
            place = f"{path}:{reader.line_num}"
            if None in record or None in record.values():
                raise DataError(f"{place}: expected a cell for each of the {len(names)} columns")
            yield _Record(place, {name: _cell(name, cell, place) for name, cell in record.items()})
    except csv.Error as error:
        raise DataError(f"{path}, after line {reader.line_num}: cannot be read as CSV: {error}") from None


def _cell(column: str, cell: str, place: str) -> Any:
    """Return a cell's text, or what it says in JSON where it holds messages or is of no text column."""
    messages = re.match(r"\[\{\s*['\"](role|content)['\"]", cell)
    try:
        return cell if column in _TEXTS and not messages else _DECODER.decode(cell)
    except (ValueError, RecursionError):
        if messages:
            raise DataError(f"{place}: {column}: expected messages written as JSON") from None
        return cell


def _json_records(path: Path, text: str) -> Records:
    if text.lstrip()[:1] == "[":
        listed = _decoded(text, str(path))
        records = ((f"{path}, record {k}", record) for k, record in enumerate(listed, start=1))
    else:
        lines = ((f"{path}:{k}", line) for k, line in enumerate(text.split("\n"), start=1))
        records = ((place, _decoded(line, place)) for place, line in lines if line.strip())
    for place, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{place}: expected a JSON object, got {type(record).__name__}")
        yield _Record(place, record)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"a key stands twice: {', '.join(key for key, _ in pairs)}")
    return content


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _decoded(text: str, place: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        expected = "expected one JSON object a line, or one list of them"
        raise DataError(f"{place}: {expected}: {_one_line(error)}") from None


# --- records ----------------------------------------------------------------------------------------

# The column that says which response is preferred; those of the prompt and two responses; its values
# for the first, the second, neither. Without values it is a number, below 0 for the first.
_CHOICES: dict[str, tuple[tuple[str, str, str], tuple[int, ...]]] = {
    "preference_strength": (("prompt", "response_1", "response_2"), ()),  # HelpSteer2
    "overall_preference": (("context", "response1", "response2"), ()),  # HelpSteer3
    "labels": (("history", "human_ref_A", "human_ref_B"), (1, 0)),  # SHP
    "ratings": (("prompt", "response_1", "response_2"), (1, 2, 0)),  # votes of several people, as PandaLM's
}
_SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
_TEXTS = {"subset", "response", *PAIR_FIELDS, *(name for names, _ in _CHOICES.values() for name in names)}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _pair(record: _Record) -> dict[str, Any]:
    prompt, chosen, rejected = _chosen_first(record)
    if _folded(_visible(chosen)) == _folded(_visible(rejected)):
        raise _LeftOutError("chosen and rejected are the same text")
    return {"prompt": _visible(prompt), "chosen": chosen, "rejected": rejected}


def _chosen_first(record: _Record) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected response, by the columns that a record has."""
    for choice, (names, values) in _CHOICES.items():
        if "chosen" not in record and {choice, *names} <= record.keys():
            prompt, first, second = map(record.text, names)
            lead = _majority(record, choice, values) if values else record.number(choice)
            if lead == 0:
                raise _LeftOutError("no response is preferred")
            return (prompt, first, second) if lead < 0 else (prompt, second, first)
    if any(record.get(one) == record.get(other) is not None for one, other in _SCORES):
        raise _LeftOutError("no response is preferred")
    return _labelled(record)


def _majority(record: _Record, choice: str, values: tuple[int, ...]) -> int:
    """Return -1 where most prefer the first response, 1 for the second, 0 where neither has most votes."""
    votes = record[choice] if choice == "ratings" else [record[choice]]
    if not isinstance(votes, list) or any(vote not in values for vote in votes):
        expected = ", ".join(map(str, values))
        raise DataError(f"{record.place}: {choice}: expected {expected}, got {record[choice]!r:.80}")
    first, second = (2 * votes.count(value) > len(votes) for value in values[:2])
    return int(second) - int(first)


def _labelled(record: _Record) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected; of whole dialogues, what they share is the prompt."""
    chosen, rejected = _answer(record, "chosen"), _answer(record, "rejected")
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        raise _LeftOutError("chosen and rejected part before their last turn")
    given = record.text("prompt") if "prompt" in record or not shared else ""
    prompt = prompt_text(shared) if shared else given
    if given and _folded(given) not in map(_folded, [prompt, *(turn["content"] for turn in shared)]):
        raise DataError(f"{record.place}: prompt: is no turn that chosen and rejected share")
    return prompt, chosen[-1]["content"], rejected[-1]["content"]


def _answer(record: _Record, name: str) -> list[dict[str, str]]:
    """Return a response as the last of the turns of its dialogue, or alone."""
    value, place = record.field(name), f"{record.place}: {name}"
    if isinstance(value, str) and "prompt" in record:
        return [{"role": "assistant", "content": value}]
    turns = _dialogue(value, place) if isinstance(value, str) else _messages(value, place)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{place}: expected the assistant to speak last, got {turns[-1]['role']}")
    return turns


def _messages(value: object, place: str) -> list[dict[str, str]]:
    listed = value if isinstance(value, list) else []
    if not listed or any(not isinstance(m, dict) or not isinstance(m.get("role"), str) for m in listed):
        raise DataError(f"{place}: expected text or messages with role and content, got {value!r:.80}")
    try:
        return [{"role": m["role"], "content": dialogue_text([m])} for m in listed]
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None


def _dialogue(text: str, place: str) -> list[dict[str, str]]:
    """Return the turns of a dialogue in the manner of HH-RLHF."""
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise DataError(f"{place}: no field 'prompt', nor a dialogue that begins with Human:")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[name], "content": said.strip()} for name, said in turns]


def _joined(records: Records) -> Records:
    """Join HelpSteer2's two responses to a prompt, which follow each other: the more helpful wins."""
    for record in records:
        if "chosen" in record or not {"response", "helpfulness"} <= record.keys():
            yield record
            continue
        other = _Record(record.place, next(records, _Record("", {})))
        if other.get("prompt") != record.get("prompt"):
            raise DataError(f"{record.place}: expected the next record to have a response to this prompt")
        first, second = record.number("helpfulness"), other.number("helpfulness")
        responses = {"response_1": record["response"], "response_2": other.get("response")}
        yield _Record(record.place, {**record, **responses, "preference_strength": second - first})


def _prompt(record: _Record) -> dict[str, Any]:
    name = next((one for one in ("prompt", "context", "history") if one in record), "")
    return {"prompt": _visible(record.text(name) if name else _labelled(record)[0])}


def _gathered(records: Records) -> Records:
    """Gather the ratings of a response where every person's has a record of its own."""
    found: dict[tuple[str, str], _Record] = {}
    for record in records:
        if "rating" not in record or "ratings" in record:
            yield record
            continue
        prompt, response = record.text("prompt"), record.text("response")
        empty = _Record(record.place, {"prompt": prompt, "response": response, "ratings": []})
        found.setdefault((prompt, response), empty)["ratings"].append(record.number("rating"))
    yield from found.values()


def _rating(record: _Record) -> dict[str, Any]:
    fields = ("prompt", "response", "ratings")
    texts = {name: _visible(record.text(name, fields)) for name in fields[:2]}
    columns = [name for name in record if re.fullmatch(r"rating_?\d+", name)]
    people = [record[name] for name in columns if record[name] not in (None, "")] if columns else None
    name = "helpfulness" if "ratings" not in record and "helpfulness" in record else "ratings"  # HelpSteer2's
    return {**texts, "ratings": _several(record, name, record.get(name, people))}


def _attribute_ratings(record: _Record) -> dict[str, Any]:
    fields = ("prompt", "response", *ATTRIBUTES)
    texts = {name: _visible(record.text(name, fields)) for name in fields[:2]}
    rated = [_several(record, name, record.field(name, fields)) for name in ATTRIBUTES]
    if len({len(one) for one in rated}) > 1:
        raise _LeftOutError("attributes rated by different numbers of people")
    return {**texts, "ratings": np.array(rated, dtype=float).T}


def _several(record: _Record, name: str, ratings: Any) -> list[Any]:
    """Return several people's ratings if they are."""
    if not isinstance(ratings, list) or not all(map(_is_number, ratings)):
        text = f"{name}: expected a list of at least two numbers, got {ratings!r:.80}"
        raise DataError(f"{record.place}: {text}")
    if len(ratings) < 2:
        raise _LeftOutError("rated by fewer than two people")
    return ratings


# --- texts and numbers ------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Me"}  # Unicode's categories
_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs by category, blank by look
_ZERO_WIDTH = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def _is_number(value: object) -> bool:
    with suppress(OverflowError):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return False


def _visible(text: str) -> str:
    """Return a text that can be written and shows something."""
    if "\0" in text or (not text.isascii() and _SURROGATE.search(text)):
        raise _LeftOutError("a text with NUL or half a surrogate pair")
    if all(unicodedata.category(one) in _INVISIBLE or one in _FILLERS for one in text):
        raise _LeftOutError("a text without a visible character")
    return text


def _folded(text: str) -> str:
    """Return what is left of a text for tokenizers that fold white space and compatible forms."""
    if not text.isascii():
        text = _ZERO_WIDTH.sub("", unicodedata.normalize("NFKC", text))
    return " ".join(text.split())


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:300]}..."


# --- the hub ----------------------------------------------------------------------------------------

_SPLITS = {"reward-bench": "filtered", "ultrafeedback_binarized": "train_prefs"}


def _hub_records(name: str) -> Records:
    path, _, split = name.partition("@")
    split = split or _SPLITS.get(path.rpartition("/")[2], "train")
    ask_hub(path)
    from datasets import load_dataset  # here, for it takes a second

    try:
        data = load_dataset(path, split=split)
    except Exception as error:
        if is_offline_mode() and not Path(path).is_dir():
            raise DataError(f"{name}: no such file, nor at hand from the hub (offline)") from error
        text = f"{path}, split {split}: cannot be loaded ({type(error).__name__}: {_one_line(error)})"
        raise DataError(f"{text}; name another split as {path}@split, or give the path of a file") from error
    return (_Record(f"{name}, row {k}", row) for k, row in enumerate(data))
