"""Whether a run is as published: equal, repeated independently, off, incomplete, judged otherwise."""

import json
import math
import shutil
from html import unescape

import numpy as np
import pandas as pd
import pytest
from pandas.api.types import is_numeric_dtype

from vaalign_lib.reproduce.check import CONTAINED, QUANTILE, judged, keys_of, paired
from vaalign_lib.reproduce.cli import main
from vaalign_lib.reproduce.run_folder import RECORD
from vaalign_lib.store import RESULTS, write_record

ROWS = 40


def table(random, shift=0.0, rows=ROWS):
    """Return four estimates a row, of 0 to 3, with intervals; those of a row share half of their noise."""
    shared = random.normal(size=(rows, 1))
    values = np.arange(4) + math.sqrt(0.5) * (shared + random.normal(size=(rows, 4))) + shift
    columns = {"name": [f"row {k}" for k in range(rows)]}
    for k in range(4):
        columns |= {f"x{k}": values[:, k], f"x{k}_low": values[:, k] - 1.959964}
        columns |= {f"x{k}_high": values[:, k] + 1.959964}
    return pd.DataFrame(columns)


def test_an_interval_contains_a_repetition_as_often_as_the_rule_says():
    first, second = np.random.default_rng(0).normal(size=(2, 10**6))
    inside = (np.abs(first - second) < 1.959964).mean()
    assert abs(inside - CONTAINED) < 4 * math.sqrt(CONTAINED * (1 - CONTAINED) / 10**6)
    assert round(CONTAINED, 3) == 0.834


def test_the_same_is_equal_in_every_number():
    published = table(np.random.default_rng(0))
    shuffled = published.sample(frac=1, random_state=1).reset_index(drop=True)
    for trained in (True, False):
        found = judged(shuffled, published, trained)
        assert found["equal"] == found["numbers"] == ROWS * 12
        assert not found["fails"] and found["p"] == 1 and found["expected"] == 0


def test_independent_repetitions_hold_though_the_estimates_of_a_row_are_correlated():
    random, outside, fails = np.random.default_rng(1), 0, 0
    for _ in range(60):
        found = judged(table(random), table(random))
        assert found["inside"] + found["outside"] == ROWS * 4 and found["no_interval"] == ROWS * 8
        assert found["expected"] == pytest.approx((1 - CONTAINED) * ROWS * 4)
        outside, fails = outside + found["outside"], fails + found["fails"]
    assert fails == 0 and abs(outside / (60 * ROWS * 4) - (1 - CONTAINED)) < 0.02


def test_a_run_that_is_off_fails_by_the_binomial_tail():
    random = np.random.default_rng(2)
    found = judged(table(random, shift=1.5), table(random))
    assert found["fails"] and found["outside"] > 2 * found["expected"]
    one = table(random)[["name", "x0", "x0_low", "x0_high"]]
    for off in range(ROWS + 1):  # so many rows outside, the others inside
        run = one.assign(x0=one["x0"] + np.where(np.arange(ROWS) < off, 9.0, 0.1))
        found, miss = judged(run, one), 1 - CONTAINED
        tail = sum(math.comb(ROWS, k) * miss**k * (1 - miss) ** (ROWS - k) for k in range(off, ROWS + 1))
        assert found["p"] == pytest.approx(tail) and found["fails"] == (tail <= 1 - QUANTILE)
        assert len(found["outside_ones"]) == found["outside"] == off


def test_what_one_side_lacks_fails_and_is_named():
    published = table(np.random.default_rng(3))
    for ours, theirs in ((published.drop(index=7), published), (published, published.drop(index=7))):
        found = judged(ours, theirs)
        assert found["fails"] and found["missing"] == 1 and found["rows_missing"] == ["row 7"]
    assert judged(published.drop(columns="x2"), published)["missing"] == ROWS
    found = judged(published.assign(x2=published["x2"].mask(published.index == 7)), published)
    assert found["fails"] and found["missing"] == 1 and found["outside_ones"][0]["column"] == "x2"
    empty = judged(published.iloc[:0], published)
    assert empty["fails"] and empty["missing"] == ROWS


def test_rounding_is_a_millionth():
    published = pd.DataFrame(
        {"name": ["a", "b"], "x": [1.0, 1000.0], "low": [0.9, 990.0], "high": [1.1, 1010.0]}
    )
    for factor, state in ((1 + 5e-7, "equal"), (1 + 5e-6, "inside"), (2, "outside")):
        found = paired(published.assign(x=published["x"] * factor), published)
        assert set(found.loc[found["column"] == "x", "state"]) == {state}
    tiny = pd.DataFrame({"name": ["a", "b"], "x": [1e-17, 1.0]})
    assert judged(tiny.assign(x=[3e-16, 1.0]), tiny)["equal"] == 2


def test_where_nothing_was_trained_all_should_be_equal():
    published = table(np.random.default_rng(4))
    for column, change, fails in (("x1", 0.1, False), ("x1", 9.0, True), ("x1_low", 0.1, True)):
        run = published.assign(**{column: published[column] + change * (published.index == 3)})
        assert judged(run, published, trained=False)["fails"] == fails
        assert not judged(run, published)["fails"]


def test_intervals_are_found_by_their_names():
    ends = {"risk_low_vanilla": [0.1], "risk_high_vanilla": [0.3], "gain": [1.0], "low": [0.0], "high": [2.0]}
    published = pd.DataFrame(
        {"risk_vanilla": [0.2]} | ends | {"gold": [5.0], "gold_error": [1.0], "lower": [1.0]}
    )
    found = paired(published + 0.05, published).set_index("column")
    named = {name: (found.loc[name, "low"], found.loc[name, "high"]) for name in found.index}
    assert named["risk_vanilla"] == (0.1, 0.3) and named["gain"] == (0.0, 2.0)
    assert named["gold"] == pytest.approx((5 - 1.959964, 5 + 1.959964))
    assert found.loc[["risk_vanilla", "gain", "gold"], "state"].eq("inside").all()
    assert found.loc[["lower", "low", "gold_error"], "state"].eq("no interval").all()
    assert found.loc["gain", "contains"] == 1 and np.isnan(found.loc["lower", "contains"])


def test_rows_of_the_published_tables_are_told_apart_by_what_was_chosen():
    """By texts, and by these numbers, which are sizes, steps and levels; never by an estimate."""
    chosen = {
        "arms",
        "beta",
        "dose",
        "dropped",
        "instance",
        "lambda",
        "level",
        "n",
        "nats",
        "people",
        "policy",
    }
    chosen |= {
        "range",
        "repeat",
        "setting",
        "shift",
        "signal",
        "smaller risk",
        "step",
        "steps",
        "texts",
        "width",
    }
    chosen |= {"between", "rho", "world"}
    paths = sorted(RESULTS.glob("*.parquet"))
    assert len(paths) > 30
    for path in paths:
        published = pd.read_parquet(path)
        keys = keys_of(published)
        assert not published.duplicated(keys).any()
        assert {name for name in keys if is_numeric_dtype(published[name])} <= chosen, path.stem
        found = judged(published, published)
        assert found["equal"] == found["numbers"] and not found["fails"], path.stem


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """Return a run folder whose first notebook made exactly what is published."""
    folder = tmp_path / "run" / "01_bandit"
    (folder / "tables").mkdir(parents=True)
    (tmp_path / "run" / ".vaalign").touch()
    shutil.copyfile(RESULTS / "findings" / "01_bandit.json", folder / "findings.json")
    for entry in json.loads((folder / "findings.json").read_text())["tables"]:
        shutil.copyfile(RESULTS / f"{entry['name']}.parquet", folder / "tables" / f"{entry['name']}.parquet")
    return finished(folder)


def finished(folder, at="2026-01-01", **settings):
    (folder / RECORD).unlink(missing_ok=True)
    write_record(folder, {"key": "k", "settings": settings, "finished": at, "seconds": 1.0}, RECORD)
    return folder.parent


def test_a_run_as_published(copied, capsys):
    assert main(["check", str(copied)]) == 0
    told = capsys.readouterr().out
    assert "by the rule: as published" in told and "3 tables are equal in all of their" in told
    assert "not compared: 02_theorems: not run" in told and "P(|Z| < 1.96 / sqrt 2) = 83.4%" in told
    outcome = json.loads((copied / "check.json").read_text())
    assert outcome["compared"] == ["01_bandit"] and outcome["verdicts_changed"] == []
    assert {one["table"] for one in outcome["tables"]} == {"findings of 01", "bandit_forms", "bandit_shift"}
    report = unescape((copied / "report.html").read_text())
    assert "Is this run as published?" in report and "<strong>as published</strong>" in report
    finished(copied / "01_bandit", at="2026-01-02")  # it ran again: the outcome is of another run
    assert main(["report", "--run-dir", str(copied)]) == 0
    assert "Is this run as published?" not in (copied / "report.html").read_text()


def test_a_run_with_another_verdict_and_a_table_that_is_not_there(copied, capsys):
    path = copied / "01_bandit" / "findings.json"
    record = json.loads(path.read_text())
    (one,) = (one for one in record["findings"] if one["rule"] == "figure3.frequency")
    one["holds"] = not one["holds"]
    path.write_text(json.dumps(record))
    (copied / "01_bandit" / "tables" / "bandit_shift.parquet").unlink()
    finished(copied / "01_bandit")
    assert main(["check", str(copied)]) == 1
    outcome = json.loads((copied / "check.json").read_text())
    (changed,) = outcome["verdicts_changed"]
    assert changed["rule"] == "figure3.frequency" and changed["run"] != changed["published"]
    fails = {one["table"]: one["missing"] for one in outcome["tables"] if one["fails"]}
    assert fails == {"findings of 01": 0, "bandit_shift": 75}  # the statement is not the same, either
    assert "NOT as published" in capsys.readouterr().out
    assert "<strong>not as published</strong>" in unescape((copied / "report.html").read_text())


def test_what_cannot_be_compared_is_told(copied, capsys):
    finished(copied / "01_bandit", pairs="mine.jsonl")
    assert main(["check", str(copied)]) == 2
    assert "01_bandit: run with parameters of its own; 02_theorems: not run" in capsys.readouterr().err
    assert not (copied / "check.json").exists()
    assert main(["check", str(copied / "none")]) == 2
    assert "there is no" in capsys.readouterr().err
