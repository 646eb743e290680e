"""The half page: every line from a finding, under its verdict, the same in report and docs/findings.md."""

import math

import pytest
from pydantic import ValidationError

from vaalign_lib.papers.printed import MEANINGS, rules
from vaalign_lib.reproduce.report import (
    FINDINGS_PAGE,
    VERDICTS,
    Line,
    markdown,
    marks,
    page_list,
    published_parts,
    scoreboard,
    settings,
    summary,
    write_into_page,
)
from vaalign_lib.store import FIGURES


def findings(**values):
    return [{"findings": [{"reproduced": "in words", **values}]}]


def test_a_line_stands_under_its_verdict_and_moves_with_it():
    for low, high, heading in (
        (0.2, 2.0, "Found here"),
        (-2.0, -0.2, "Not found here"),
        (-0.2, 2.0, "Not determinable"),
    ):
        record = findings(rule="table4.ranges", value=1.5, low=low, high=high)
        found = summary(scoreboard(record))
        assert list(found) == [heading]
        (line,) = found[heading]
        assert line["found"] == f"1.50 [{low:.2f}, {high:.2f}]"
        assert line["command"] == "vaalign reproduce --only 05" and line["item"] == "Table 4"


def test_the_table_ends_with_what_its_verdicts_mean():
    record = findings(rule="table4.ranges", value=1.5, low=0.2, high=2.0)
    assert markdown(scoreboard(record)).endswith(f"|\n\n- *found here*: {MEANINGS['found here']}\n")


def test_logarithms_are_written_as_ratios():
    record = findings(rule="primary.reliability", value=math.log(2), low=0.0, high=math.log(3))
    (lines,) = summary(scoreboard(record)).values()
    assert lines[0]["found"] == "2.00 [1.00, 3.00]"


def test_nothing_found_nothing_said():
    assert summary(scoreboard([])) == {}


def test_lines_are_about_rules_that_exist_once_each_and_figures_that_are_made():
    names = [line.rule for line in settings().lines]
    assert len(set(names)) == len(names) and set(names) <= set(rules())
    assert set(MEANINGS) - set(VERDICTS) == {"needs the paper profile", "not yet"}
    for name in settings().figures:
        assert (FIGURES / f"{name}.png").is_file()
    with pytest.raises((ValidationError, KeyError)):
        Line(rule="figure9", text="")


def test_the_page_holds_what_is_published():
    """Rewrite it with `vaalign publish`."""
    text = FINDINGS_PAGE.read_text(encoding="utf-8")
    for name, part in published_parts().items():
        begin, end = marks(name)
        assert text.split(begin)[1].split(end)[0].strip() == part.strip()
    assert text.count("| `vaalign reproduce --only") >= len(settings().lines)


def test_writing_changes_only_what_is_between_the_marks(tmp_path):
    page, parts = tmp_path / "findings.md", published_parts() | {"pages": "- a page\n"}
    blocks = ["\nOUTDATED\n".join(marks(name)) for name in parts]
    page.write_text("\n".join(["before", blocks[0], "between", blocks[1], "after\n"]))
    assert write_into_page(parts, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "OUTDATED" not in text
    assert "- a page" in text.partition("\nbetween\n")[2]
    assert not write_into_page(parts, page)
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        write_into_page(parts, page)


def test_pages_are_listed_by_their_headings(tmp_path):
    assert page_list(tmp_path) == ""
    (tmp_path / "02_b.md").write_text("# 02 · The second\n\ntext\n")
    (tmp_path / "01_a.md").write_text("# 01 · The first\n")
    lines = page_list(tmp_path).splitlines()
    assert lines[-2:] == ["- [01 · The first](../pages/01_a.md)", "- [02 · The second](../pages/02_b.md)"]
