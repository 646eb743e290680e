"""The printed numbers, the rules and the verdicts."""

import re
from typing import get_args

import nbformat
import pytest
from pydantic import ValidationError

from vaalign_lib.papers.printed import (
    FURTHER_ITEMS,
    ITEMS,
    KINDS,
    MEANINGS,
    Criterion,
    Finding,
    Rule,
    UnknownRuleError,
    Verdict,
    meanings,
    printed_range,
    printed_value,
    published,
    rule_of,
    rules,
    verdict,
)
from vaalign_lib.store import NOTEBOOKS


def test_every_table_of_the_paper_is_typed():
    items = set(published()["item"])
    assert {f"Table {number}" for number in range(1, 19)} <= items
    assert {f"Figure {number}" for number in range(1, 9)} <= items
    assert published().index.is_unique
    assert (published()[["printed", "place"]] != "").all().all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("figure3.vanilla.underperformance", 0.39),
        ("figure3.variance_aware.underperformance", 0.0015),
        ("figure4.high_variability.variance_ratio", 16.12),
        ("table1.mistral-gemini-2.0-flash.variance_ratio_f", 9.0),
        ("table3.gpt2-ensemble.p_value", 3e-5),
        ("table12.learning_rate", 3.14e-9),
    ],
)
def test_printed_values(key, value):
    assert printed_value(key) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "low", "high"),
    [
        ("figure3.vanilla.underperformance", 0.385, 0.395),
        ("figure4.low_variability.variance_ratio", 1.535, 1.545),
        ("table3.gpt2-ensemble.p_value", 2.5e-5, 3.5e-5),
        ("table4.range-100.variance_of_standard_deviation", 16.5, 17.5),
    ],
)
def test_printed_ranges_follow_the_last_digit(key, low, high):
    assert printed_range(key) == pytest.approx((low, high))


def test_table_1_ratios_are_quotients_of_its_variances():
    """An arithmetic check of the typing: F is the quotient of the two columns, up to its rounding."""
    for row in ("gpt2-ensemble", "mistral-gemini-1.5-flash", "qwen-deepseek-v3"):
        quotient = printed_value(f"table1.{row}.variance_vanilla") / printed_value(
            f"table1.{row}.variance_variance_aware"
        )
        assert printed_value(f"table1.{row}.variance_ratio_f") == pytest.approx(quotient, abs=0.005)


def test_unknown_and_textual_values_are_refused():
    with pytest.raises(KeyError, match="no key 'table99'"):
        printed_value("table99")
    with pytest.raises(ValueError, match="is not a number"):
        printed_value("figure3.base_policy")


def test_every_item_of_the_paper_has_a_rule():
    assert {rule.item for rule in rules().values()} == {*ITEMS, *FURTHER_ITEMS}


def test_notebooks_use_rules_that_exist_and_use_all_of_theirs():
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        used = {name for name in re.findall(r'"([\w.-]+)"', source) if name in rules()}
        named = set(re.findall(r'finding\(\s*"([^"]+)"', source))
        made = re.findall(r'finding\(\s*f"([^"]+)"', source)  # by numbers, as in f"algorithm{k}.implemented"
        forms = [re.sub(r"\\{\w+\\}", r"\\w+", re.escape(one)) for one in made]
        used |= {one for one in rules() if any(re.fullmatch(form, one) for form in forms)}
        own = {rule.id for rule in rules().values() if rule.notebook == path.stem}
        assert named <= set(rules())
        assert own <= used | named, f"{path.stem} never judges {sorted(own - used - named)}"


def rule(**changes):
    fields = {
        "id": "r",
        "item": "Figure 3",
        "claim": "c",
        "kind": "theorem",
        "notebook": "01_bandit",
        "criterion": Criterion(kind="above", threshold=1.0),
    }
    return Rule.model_validate(fields | changes)


def found(**values):
    return Finding(rule="r", reproduced="", **values)


@pytest.mark.parametrize(
    ("kind", "low", "high", "expected"),
    [
        ("above", 1.1, 2.0, "reproduced"),
        ("above", 0.1, 0.9, "contradicted"),
        ("above", 0.9, 1.1, "not determinable"),
        ("below", 0.1, 0.9, "reproduced"),
        ("below", 1.1, 2.0, "contradicted"),
        ("below", 0.9, 1.1, "not determinable"),
    ],
)
def test_threshold_verdicts(kind, low, high, expected):
    judged = verdict(rule(criterion=Criterion(kind=kind, threshold=1.0)), found(low=low, high=high))
    assert judged == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.01, 0.9, "reproduced"),
        (0.01, 0.2, "reproduced"),  # above the threshold comes first
        (-0.1, 0.2, "contradicted"),  # an effect of 0.2231 would have been seen
        (-0.9, -0.1, "contradicted"),
        (0.0, 0.2, "contradicted"),
        (-0.1, 0.23, "not determinable"),
        (-0.1, 0.2231, "not determinable"),
    ],
)
def test_an_effect_that_would_have_been_seen(low, high, expected):
    criterion = Criterion(kind="above", threshold=0, seen=0.2231)
    assert verdict(rule(criterion=criterion), found(low=low, high=high)) == expected


def test_what_is_not_clear_of_the_noise_decides_nothing():
    for kind, words in KINDS.items():
        judged = rule(kind=kind)
        assert verdict(judged, found(low=1.1, high=2.0)) == words[0]
        assert verdict(judged, found(low=1.1, high=2.0, clear=False)) == "not determinable"
        holds = rule(kind=kind, criterion=Criterion(kind="holds"))
        assert verdict(holds, found(holds=False, clear=False)) == "not determinable"


def test_other_verdicts():
    covers = rule(published="figure3.vanilla.underperformance", criterion=Criterion(kind="covers_printed"))
    assert verdict(covers, found(low=0.38, high=0.40)) == "reproduced"
    assert verdict(covers, found(low=0.394, high=0.40)) == "reproduced"  # 39% as rounded
    assert verdict(covers, found(low=0.396, high=0.40)) == "contradicted"
    holds = rule(criterion=Criterion(kind="holds"))
    assert verdict(holds, found(holds=True)) == "reproduced"
    assert verdict(holds, found(holds=False)) == "contradicted"
    assert verdict(rule(), None) == "not yet"
    assert verdict(rule(without_finding="needs the paper profile"), None) == "needs the paper profile"
    assert verdict(rule(without_finding="not determinable"), None) == "not determinable"


def test_the_vocabulary_is_closed_and_every_word_has_one_meaning():
    assert tuple(MEANINGS) == get_args(Verdict)
    assert len(set(MEANINGS.values())) == len(MEANINGS)
    said = {word for words in KINDS.values() for word in words}
    assert said == set(MEANINGS) - {"not determinable", "not yet"}
    assert meanings(["not yet", "attainable", "not yet"]).splitlines() == [
        f"- *attainable*: {MEANINGS['attainable']}",
        f"- *not yet*: {MEANINGS['not yet']}",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rule_says_only_what_its_kind_may(kind):
    met, not_met, *others = KINDS[kind]
    judged = rule(kind=kind)
    assert (judged.met, judged.not_met) == (met, not_met)
    assert judged.unclear == ("measured here" if kind == "ours" else "not determinable")
    for word in MEANINGS:
        if word in (met, not_met, *others, "not determinable"):
            assert rule(kind=kind, not_met=word).not_met == word
        else:
            with pytest.raises(ValidationError, match=f"of kind {kind}, it may say .*, not '{word}'"):
                rule(kind=kind, not_met=word)


def test_only_mathematics_contradicts():
    assert {one.kind for one in rules().values() if "contradicted" in (one.met, one.not_met)} == {"theorem"}
    stand_ins = [one for one in rules().values() if one.notebook == "04_ppo_runs" and one.source != "ours"]
    assert {one.kind for one in stand_ins} == {"stand_in", "implementation", "ours"}


def test_a_verdict_without_a_rule_or_with_too_little_is_refused():
    with pytest.raises(UnknownRuleError, match="no rule 'figure9'"):
        rule_of("figure9")
    with pytest.raises(ValueError, match="expected a finding with `holds`"):
        verdict(rule(criterion=Criterion(kind="holds")), found(value=1.0))
    with pytest.raises(ValueError, match="with an interval"):
        verdict(rule(), found(value=1.0))
    unjudged = rule(criterion=None)
    with pytest.raises(ValueError, match="no criterion yet"):
        verdict(unjudged, found(holds=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"item": "Figure 9"},
        {"met": None},
        {"met": "nearly"},
        {"colour": "red"},
        {"source": "ours"},
        {"kind": "opinion"},
        {"kind": None},
        {"kind": "stand_in", "not_met": "contradicted"},
        {"criterion": {"kind": "above"}},
        {"criterion": {"kind": "holds", "threshold": 1.0}},
        {"criterion": {"kind": "below", "threshold": 1.0, "seen": 2.0}},
        {"criterion": {"kind": "above", "threshold": 1.0, "seen": 1.0}},
        {"criterion": {"kind": "holds", "seen": 1.0}},
    ],
)
def test_malformed_rules_are_refused(changes):
    with pytest.raises(ValidationError):
        rule(**changes)
