"""The report: every item with a verdict, offline, from what the notebooks recorded."""

import html
import json
import re

import pytest

from vaalign_lib.papers.printed import FURTHER_ITEMS, ITEMS, MEANINGS, UnknownRuleError, rules
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce.notebook import start
from vaalign_lib.reproduce.report import scoreboard, write_report
from vaalign_lib.reproduce.run import _record, banner, notebook_key, notebooks
from vaalign_lib.statistics.tests import Estimate


def record(**finding):
    return [{"notebook": "01_bandit", "figures": [], "findings": [finding]}]


def test_an_empty_run_lists_every_item_as_not_yet(tmp_path):
    page = write_report(load_profile("smoke"), tmp_path).read_text()
    rows = json.loads((tmp_path / "scoreboard.json").read_text())
    assert {row["item"] for row in rows} == {*ITEMS, *FURTHER_ITEMS}
    assert {row["verdict"] for row in rows} == {"not yet", "needs the paper profile", "not determinable"}
    assert len(rows) == len(rules())
    for item in ITEMS:
        assert f">{item}</a>" in page
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page) and "<script" not in page


def finished(tmp_path, key=None):
    profile, book = load_profile("smoke"), notebooks()[0]
    _record(tmp_path / "01_bandit", key or notebook_key(book, profile, 0), 1.0, {})


def begin(tmp_path):
    place = tmp_path / "01_bandit" / "figures"
    return start("01_bandit", profile="smoke", run_dir=tmp_path, figures_dir=place)


def test_findings_become_verdicts(tmp_path):
    run = begin(tmp_path)
    run.finding("figure3.vanilla", "0.39", estimate=Estimate(0.39, 0.38, 0.40, 1000))
    run.finding("figure3.frequency", "no", holds=False)
    finished(tmp_path)
    page = write_report(load_profile("smoke"), tmp_path).read_text()
    rows = {row["id"]: row for row in json.loads((tmp_path / "scoreboard.json").read_text())}
    assert rows["figure3.vanilla"]["verdict"] == "attainable"
    assert rows["figure3.vanilla"]["published"] == "39 percent"
    assert (rows["figure3.vanilla"]["low"], rows["figure3.vanilla"]["high"]) == (0.38, 0.40)
    assert rows["figure3.frequency"]["verdict"] == "not consistent"
    for word in ("attainable", "not consistent", "not yet"):
        assert (
            f'">{word}: ' in page
            and f"<td>{html.escape(MEANINGS[word], quote=False)}</td>" in html.unescape(page)
        )
    assert "<td>" + MEANINGS["contradicted"] not in html.unescape(page)
    link = 'href="01_bandit/page.html"'
    assert link not in page  # as published, a notebook has none
    (tmp_path / "01_bandit" / "page.html").write_text("executed")
    assert link in write_report(load_profile("smoke"), tmp_path).read_text()


def test_unfinished_and_outdated_notebooks_do_not_count(tmp_path):
    begin(tmp_path).finding("figure3.frequency", "no", holds=False)
    for outdated in (False, True):
        if outdated:
            finished(tmp_path, key="of another library")
        page = write_report(load_profile("smoke"), tmp_path).read_text()
        rows = {row["id"]: row for row in json.loads((tmp_path / "scoreboard.json").read_text())}
        assert rows["figure3.frequency"]["verdict"] == "not yet"
        assert ("Outdated, so left out: 01_bandit" in page) == outdated


def test_only_the_shipped_profile_has_no_banner(tmp_path):
    told = "numbers here are not the study's"
    shipped, smoke = load_profile("embedded"), load_profile("smoke")
    for profile in (smoke, smoke.model_copy(update={"name": "embedded"}), load_profile("extended")):
        page = write_report(profile, tmp_path).read_text()
        assert f"Profile {profile.name}: {profile.description}." in page and told in html.unescape(page)
        assert page.index("not the study") < page.index("<h1>")
    assert banner(shipped) == "" and told not in html.unescape(write_report(shipped, tmp_path).read_text())


def test_a_finding_without_a_rule_is_refused():
    with pytest.raises(UnknownRuleError, match="no rule 'figure9'"):
        scoreboard(record(rule="figure9", reproduced="1", holds=True))


def test_text_is_escaped(tmp_path):
    begin(tmp_path).finding("figure3.frequency", "<b>1</b>", holds=True)
    finished(tmp_path)
    page = write_report(load_profile("smoke"), tmp_path).read_text()
    assert "&lt;b&gt;1&lt;/b&gt;" in page and "<b>1</b>" not in page
