"""Whether a finished run found what is published: every number of its tables beside the published one.

Numbers are equal if they differ by a millionth at most, or by a billionth of the largest of their column. Any
other estimate lies inside or outside of the published 95% interval; an independent repetition lies inside
with probability P(|Z| < 1.96 / sqrt 2) = 83.4%. Where nothing was trained anew and seed and profile are the
published ones (01, 02, what is drawn from results), all should be equal: there nothing may lie outside, nor
differ where there is no interval. What a computation costs is not compared, nor are figures.

A table fails if more lies outside than the 99.9% quantile of the binomial distribution. Its trials are the
rows with an estimate that is not equal, for the estimates of a row are of the same policies: outside counts
as the sum over rows of the share that is, rounded down. The run fails if a table does, if a verdict is not
the published one, or if a row or a number is on one side only.

Tables and rows that share policies remain correlated, and intervals over policies do not hold what a whole
stack shares. So a table that just fails is a reason to look at it, not a proof; one of fewer than four rows
cannot fail this way, only by its verdicts.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.api.types import is_numeric_dtype
from scipy.stats import binom, norm

from vaalign_lib.profiles import PUBLISHED_PROFILE
from vaalign_lib.reproduce.execute import FINDINGS
from vaalign_lib.reproduce.report import CHECK, published_rows, scoreboard
from vaalign_lib.reproduce.run import FROM_RESULTS, State
from vaalign_lib.reproduce.run_folder import UsageError
from vaalign_lib.statistics.tests import Z
from vaalign_lib.store import RESULTS, write_atomically

CONTAINED = float(1 - 2 * norm.sf(Z / math.sqrt(2)))  # of independent repetitions, in a 95% interval
QUANTILE = 0.999
UNTRAINED = ("01_bandit", "02_theorems")
COSTS = {"seconds", "megabytes_of_memory"}  # columns that a machine decides


# --- two tables ---------------------------------------------------------------------------------------


def keys_of(table: pd.DataFrame) -> list[str]:
    """Return the columns that tell rows apart: all texts, then the first numbers that are needed for it."""
    texts = [name for name in table if not is_numeric_dtype(table[name])]
    numbers = [name for name in table if is_numeric_dtype(table[name])]

    def unique(names: list[str]) -> bool:
        return not table.duplicated(names).any() if names else len(table) < 2

    fits = [count for count in range(len(numbers) + 1) if unique(texts + numbers[:count])]
    needed = numbers[: fits[0]] if fits else []
    for name in list(needed):
        rest = [one for one in needed if one != name]
        needed = rest if unique(texts + rest) else needed
    return texts + needed


def paired(run: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """Return a row for every number of two tables, with what it is called, the interval, and its state.

    Columns: `row`, `column`, `run`, `published`, `low` and `high` (published), `state`, `contains`.
    Rows are matched by the keys of the published table, those of equal keys in their order. States are
    `equal`, `inside`, `outside`, `no interval`, and `missing` where one side has none; `contains` says
    whether the run's interval holds the published number (1, 0; NaN: there is none, or it is equal).
    """
    keys = [name for name in keys_of(published) if name in run]
    ours, theirs = _labelled(run, keys), _labelled(published, keys)
    rows = theirs.index.union(ours.index, sort=False)
    parts = []
    for name in theirs.columns.union(ours.columns, sort=False).difference([*keys, *COSTS], sort=False):
        sides = {"run": ours, "published": theirs}
        values = {side: _numbers(table.get(name), table).reindex(rows) for side, table in sides.items()}
        part = pd.DataFrame({"row": rows, "column": name} | {one: part.array for one, part in values.items()})
        for table, ends in ((theirs, ("low", "high")), (ours, ("run_low", "run_high"))):
            for end, column in zip(ends, _interval(table, name), strict=True):
                part[end] = column.reindex(rows).array
        both = rows.isin(ours.index) & rows.isin(theirs.index)
        part["state"] = _states(part, both)
        parts.append(part[part["state"] != ""])
    found = pd.concat(parts, ignore_index=True)
    holds = found["published"].between(found["run_low"], found["run_high"]).astype(float)
    known = found["state"].isin(["inside", "outside", "no interval"]) & found["run_low"].notna()
    return found.assign(contains=holds.where(known)).drop(columns=["run_low", "run_high"])


def _labelled(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Return a table whose index says in words which row it is; the second of equal ones has a #2."""
    words = [
        [f"{value:.9g}" if is_numeric_dtype(table[name]) else str(value) for value in table[name]]
        for name in keys
    ]
    labels = pd.Series([", ".join(row) for row in zip(*words, strict=True)] if keys else [""] * len(table))
    count = labels.groupby(labels).cumcount() + 1
    return table.set_index(pd.Index(labels.where(count == 1, labels + " #" + count.astype(str))))


def _numbers(column: pd.Series | None, table: pd.DataFrame) -> pd.Series:
    missing = pd.Series(np.nan, index=table.index)
    return missing if column is None else pd.to_numeric(column, errors="coerce").astype(float)


def _interval(table: pd.DataFrame, name: str) -> tuple[pd.Series, pd.Series]:
    """Return the ends of the 95% intervals of a column, NaN if it has none.

    They are in `NAME_low`, `NAME_high` (`low` anywhere in the name), in plain `low`, `high` of the column
    before them, or follow from the standard errors `NAME_error`.
    """
    before = dict(zip(table.columns[1:], table.columns, strict=False))
    for one in table.columns:
        parts = str(one).split("_")
        about = "_".join(part for part in parts if part != "low") or before.get(one)
        high = "_".join("high" if part == "low" else part for part in parts)
        if "low" in parts and about == name and high in table:
            return _numbers(table[one], table), _numbers(table[high], table)
    value, half = _numbers(table.get(name), table), Z * _numbers(table.get(f"{name}_error"), table)
    return value - half, value + half


def _states(part: pd.DataFrame, both: NDArray[np.bool_]) -> NDArray[np.str_]:
    """Return the state of each pair; of none for what is no number on both sides, or in no common row."""
    ours, theirs = part["run"], part["published"]
    tolerance = 1e-9 * theirs[np.isfinite(theirs)].abs().max() if np.isfinite(theirs).any() else 0.0
    cases = {
        "": (ours.isna() & theirs.isna()) | ~both,
        "missing": ours.isna() | theirs.isna(),
        "equal": np.isclose(ours, theirs, rtol=1e-6, atol=tolerance),
        "no interval": part["low"].isna() | part["high"].isna(),
        "inside": ours.between(part["low"], part["high"]),
    }
    return np.select([np.asarray(one) for one in cases.values()], list(cases), "outside")


def judged(run: pd.DataFrame, published: pd.DataFrame, trained: bool = True) -> dict[str, Any]:
    """Return what comes of two tables, by the rule above: counts of numbers by state, and whether it fails.

    `expected` are the numbers outside that are expected; `p` the probability of so many rows or more;
    `contain`, of so many `intervals` of the run, those that hold the published number; `rows_missing` and
    `outside_ones` say which.
    """
    found, keys = paired(run, published), keys_of(published)
    states = {name: int((found["state"] == name).sum()) for name in found["state"].unique()}
    if not trained:  # what has no interval should be equal, too
        found["state"] = found["state"].replace("no interval", "outside")
    outside = found["state"] == "outside"
    differ = outside | (found["state"] == "inside")
    by_row = outside[differ].groupby(found["row"][differ]).mean()
    trials, many = len(by_row), math.floor(by_row.sum() + 1e-9)
    miss = 1 - CONTAINED if trained else 0.0
    p = float(binom.sf(many - 1, trials, miss)) if trained else float(not outside.any())
    rows = set(_labelled(run, [one for one in keys if one in run]).index) ^ set(
        _labelled(published, keys).index
    )
    missing = states.get("missing", 0)
    shown = found.loc[
        outside | (found["state"] == "missing"), ["row", "column", "run", "published", "low", "high"]
    ]
    return {
        "numbers": len(found),
        **{
            name.replace(" ", "_"): states.get(name, 0)
            for name in ("equal", "inside", "outside", "no interval")
        },
        "expected": miss * int(differ.sum()),
        "p": p,
        "contain": int(found["contains"].sum()),
        "intervals": int(found["contains"].count()),
        "missing": missing + len(rows),
        "fails": bool(p <= 1 - QUANTILE or missing or rows),
        "rows_missing": sorted(rows),
        "outside_ones": json.loads(shown.to_json(orient="records")),
    }


# --- a run --------------------------------------------------------------------------------------------


def compared(states: list[State], run_dir: Path, results: Path = RESULTS) -> dict[str, Any]:
    """Compare a run with what is published; return and write the outcome, check.json in the run folder.

    Raises:
        UsageError: no notebook of the run can be compared.
    """
    tables, records, left = [], [], {}
    for state in states:
        name = state.notebook.name
        if (reason := _not_compared(state, run_dir, results)) or state.record is None:
            left[name] = reason
            continue
        record, published = (_findings(one) for one in (run_dir / name / FINDINGS, _published(results, name)))
        as_published = record["profile"] == PUBLISHED_PROFILE and record["seed"] == 0
        trained = not as_published or not (name in UNTRAINED or FROM_RESULTS in state.settings)
        pairs = {f"findings of {name[:2]}": (_table_of(record), _table_of(published))}
        for entry in published["tables"]:
            path = run_dir / name / "tables" / f"{entry['name']}.parquet"
            theirs = pd.read_parquet(results / path.name)
            pairs[entry["name"]] = (pd.read_parquet(path) if path.is_file() else theirs.iloc[:0], theirs)
        tables += [
            {"table": table, "notebook": name} | judged(ours, theirs, trained)
            for table, (ours, theirs) in pairs.items()
        ]
        records.append(record)
    if not records:
        why = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise UsageError(f"{run_dir}: nothing to compare with {results} ({why})")
    found = {row.id: row.verdict for row in scoreboard(records)}
    rows = [row for row in published_rows(results) if row.notebook in {one["notebook"] for one in records}]
    changed = [
        {"rule": row.id, "item": row.item, "published": row.verdict, "run": found[row.id]}
        for row in rows
        if row.verdict != found[row.id]
    ]
    outcome = {
        "profile": records[0]["profile"],
        "seed": records[0]["seed"],
        "finished": {one.notebook.name: one.record["finished"] for one in states if one.record},
        "compared": [one["notebook"] for one in records],
        "not_compared": left,
        "as_published": not changed and not any(one["fails"] for one in tables),
        "verdicts": len(rows),
        "verdicts_changed": changed,
        "tables": tables,
        "rule": str(__doc__).partition("\n\n")[2].strip(),
    }
    write_atomically(run_dir / CHECK, json.dumps(outcome, indent=1) + "\n")
    return outcome


def _not_compared(state: State, run_dir: Path, results: Path) -> str:
    """Return why a notebook's run cannot be compared; nothing if it can."""
    name = state.notebook.name
    if state.record is None:
        return "not run"
    if not _published(results, name).is_file():
        return "not published"
    if _findings(run_dir / name / FINDINGS).get("taken"):
        return "taken as published"
    return "run with parameters of its own" if set(state.settings) - {FROM_RESULTS} else ""


def _published(results: Path, name: str) -> Path:
    return results / "findings" / f"{name}.json"


def _findings(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _table_of(record: Mapping[str, Any]) -> pd.DataFrame:
    """Return the numbers of a notebook's findings as a table."""
    columns = ["rule", "value", "low", "high", "count", "holds"]
    table = pd.DataFrame(record["findings"], columns=columns)
    return table.astype(dict.fromkeys(columns[1:], float))


def in_words(outcome: Mapping[str, Any]) -> str:
    """Return the outcome for a terminal: a line for every table with a number that is not equal."""
    tables = pd.DataFrame(outcome["tables"])
    same = tables["equal"].eq(tables["numbers"]) & ~tables["fails"]
    lines = [f"compared with {RESULTS.name}: {', '.join(outcome['compared'])}"]
    lines += [f"not compared: {name}: {reason}" for name, reason in outcome["not_compared"].items()]
    if (~same).any():
        columns = [
            "table",
            "numbers",
            "equal",
            "inside",
            "outside",
            "expected",
            "p",
            "no_interval",
            "missing",
        ]
        shown = tables.loc[~same, [*columns, "fails"]].assign(
            fails=tables["fails"].map({True: "FAILS", False: ""})
        )
        formats = {"expected": "{:.1f}".format, "p": "{:.2g}".format}
        lines.append(shown.rename(columns={"fails": ""}).to_string(index=False, formatters=formats))
    lines.append(
        f"{same.sum()} tables are equal in all of their {tables.loc[same, 'numbers'].sum():,} numbers"
    )
    contain, intervals = tables[["contain", "intervals"]].sum()
    lines.append(
        f"of the run's intervals around other numbers {contain} of {intervals} hold the published one"
    )
    lines.append(
        f"{len(outcome['verdicts_changed'])} of {outcome['verdicts']} verdicts are not the published ones"
    )
    lines += [
        f"  {one['rule']} ({one['item']}): {one['run']}, published {one['published']}"
        for one in outcome["verdicts_changed"]
    ]
    told = "as published" if outcome["as_published"] else "NOT as published"
    return "\n".join([*lines, f"by the rule: {told}", "", outcome["rule"]])
