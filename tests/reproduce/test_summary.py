"""The half page: every line from a finding, under its verdict, the same in report and README."""

import math

import pytest
from pydantic import ValidationError

from vaalign_lib.papers.printed import rules
from vaalign_lib.reproduce.report import (
    BEGIN,
    END,
    README,
    VERDICTS,
    Line,
    markdown,
    published_rows,
    scoreboard,
    settings,
    summary,
    write_into_readme,
)
from vaalign_lib.store import FIGURES


def findings(**values):
    return [{"findings": [{"reproduced": "in words", **values}]}]


def test_a_line_stands_under_its_verdict_and_moves_with_it():
    for low, high, heading in (
        (0.2, 2.0, "Reproduced in kind"),
        (-2.0, -0.2, "Contradicted"),
        (-0.2, 2.0, "Not determinable"),
    ):
        record = findings(rule="table4.ranges", value=1.5, low=low, high=high)
        found = summary(scoreboard(record))
        assert list(found) == [heading]
        (line,) = found[heading]
        assert line["found"] == f"1.50 [{low:.2f}, {high:.2f}]"
        assert line["command"] == "vaalign reproduce --only 05" and line["item"] == "Table 4"


def test_logarithms_are_written_as_ratios():
    record = findings(rule="primary.variance_ratio", value=math.log(2), low=0.0, high=math.log(3))
    (lines,) = summary(scoreboard(record)).values()
    assert lines[0]["found"] == "2.00 [1.00, 3.00]"


def test_nothing_found_nothing_said():
    assert summary(scoreboard([])) == {}


def test_lines_are_about_rules_that_exist_once_each_and_figures_that_are_made():
    names = [line.rule for line in settings().lines]
    assert len(set(names)) == len(names) and set(names) <= set(rules())
    assert set(VERDICTS) >= {"reproduced", "contradicted", "corrected"}
    for name in settings().figures:
        assert (FIGURES / f"{name}.png").is_file()
    with pytest.raises((ValidationError, KeyError)):
        Line(rule="figure9", text="")


def test_the_readme_holds_the_published_summary():
    """Rewrite it with `vaalign reproduce`."""
    text = README.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == markdown(published_rows()).strip()
    assert text.count("| `vaalign reproduce --only") >= len(settings().lines)


def test_writing_changes_only_what_is_between_the_marks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nOUTDATED\n{END}\nafter\n")
    assert write_into_readme(published_rows(), readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "OUTDATED" not in text
    assert not write_into_readme(published_rows(), readme)
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        write_into_readme(published_rows(), readme)
