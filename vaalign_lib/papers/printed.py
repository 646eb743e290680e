"""What the paper prints (data/published.csv), and the rules by which a reproduction is judged.

A rule (data/verdict_rules.yaml) is fixed before its result is seen; a finding without one is refused.
"""

from decimal import Decimal
from functools import cache
from typing import Annotated, Literal, Self

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from vaalign_lib.store import DATA

Verdict = Literal[
    "reproduced",
    "reproduced in kind",
    "contradicted",
    "corrected",
    "not determinable",
    "measured here instead",
    "not yet",
    "needs the paper profile",
]

ITEMS = (
    *(f"Figure {number}" for number in range(1, 9)),
    *(f"Table {number}" for number in range(1, 19)),
    *(f"Theorem 2.{number}" for number in (2, 4, 7)),
    *(f"Algorithm {number}" for number in range(1, 10)),
)
FURTHER_ITEMS = ("Equation 1", "Remark 2.3", "Remark 2.5", "TRL trainers")
RANGES = (100, 50, 20, 10)  # R of Table 4
PRINTED_WIDTHS = dict(zip(RANGES, (17, 5.6, 0.92, 0.11), strict=True))  # its second column


class UnknownRuleError(KeyError):
    """A finding names a rule that is not in the data."""

    def __str__(self) -> str:
        return str(self.args[0])


@cache
def published() -> pd.DataFrame:
    """Return the printed numbers by key, all as strings: item, row, quantity, printed, unit, place."""
    return pd.read_csv(DATA / "published.csv", dtype=str, keep_default_na=False).set_index("key")


def printed_value(key: str) -> float:
    """Return a printed number; percentages as fractions.

    Raises:
        KeyError: nothing is printed under that key.
        ValueError: what is printed there is no number.
    """
    if key not in published().index:
        raise KeyError(f"data/published.csv has no key {key!r}")
    text = published().loc[key, "printed"]
    try:
        return _scale(key) * float(text.replace(",", ""))
    except ValueError:
        raise ValueError(f"{key}: {text!r} is not a number") from None


def printed_range(key: str) -> tuple[float, float]:
    """Return the numbers that round to a printed one: half a unit of its last digit to either side."""
    value = printed_value(key)
    exponent = Decimal(published().loc[key, "printed"].replace(",", "")).as_tuple().exponent
    half = 0.5 * 10.0 ** int(exponent) * _scale(key)
    return value - half, value + half


def _scale(key: str) -> float:
    return 0.01 if published().loc[key, "unit"] == "percent" else 1.0


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(_Strict):
    """When a rule is met.

    `covers_printed`  the interval of the finding holds a number that rounds to the printed one
    `above`           the whole interval lies above the threshold (below it: not met; else unclear)
    `below`           the same the other way round
    `holds`           the finding is a statement that was checked, true or false
    """

    kind: Literal["covers_printed", "above", "below", "holds"]
    threshold: float | None = None

    @model_validator(mode="after")
    def _threshold_where_needed(self) -> Self:
        if (self.kind in ("above", "below")) != (self.threshold is not None):
            raise ValueError("a threshold belongs to the kinds 'above' and 'below', and only to them")
        return self


class Rule(_Strict):
    """A claim that the paper prints or implies, or a question of ours, and how its reproduction is judged."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9_.-]+$")]
    item: str
    claim: str
    source: Literal["printed", "implied", "ours"] = "printed"
    notebook: str
    published: str | None = None
    criterion: Criterion | None = None
    met: Verdict | None = None
    not_met: Verdict | None = None
    unclear: Verdict = "not determinable"
    without_finding: Literal["not yet", "needs the paper profile"] = "not yet"

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.item not in ITEMS + FURTHER_ITEMS:
            raise ValueError(f"{self.id}: {self.item!r} is no item of the paper or of ours")
        if self.criterion is not None and (self.met is None or self.not_met is None):
            raise ValueError(f"{self.id}: a criterion needs the verdicts `met` and `not_met`")
        if self.source == "ours" and "contradicted" in (self.met, self.not_met, self.unclear):
            raise ValueError(f"{self.id}: the paper cannot be contradicted on a question of ours")
        if self.criterion is not None and self.criterion.kind == "covers_printed":
            printed_value(self.published or "")
        return self


class Finding(_Strict):
    """What a notebook found about one rule: a statement or a number with its interval, and in words."""

    rule: str
    reproduced: str
    holds: bool | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int | None = None


@cache
def rules() -> dict[str, Rule]:
    """Return all rules by id, in the order of the scoreboard."""
    content = yaml.safe_load((DATA / "verdict_rules.yaml").read_text(encoding="utf-8"))
    listed = TypeAdapter(list[Rule]).validate_python(content)
    by_id = {rule.id: rule for rule in listed}
    if len(by_id) != len(listed):
        raise ValueError("data/verdict_rules.yaml: an id occurs twice")
    return by_id


def rule_of(name: str) -> Rule:
    """Return a rule by its id, or raise UnknownRuleError."""
    if name not in rules():
        raise UnknownRuleError(
            f"data/verdict_rules.yaml has no rule {name!r}; a rule is fixed there before its result"
        )
    return rules()[name]


def printed_text(rule: Rule) -> str:
    """Return the number that a rule is about as printed, with its unit; empty if it is about none."""
    return " ".join(published().loc[rule.published, ["printed", "unit"]]).strip() if rule.published else ""


def verdict(rule: Rule, finding: Finding | None) -> Verdict:
    """Judge a finding by its rule.

    Raises:
        ValueError: the finding lacks what the criterion needs, or the rule has no criterion.
    """
    if finding is None:
        return rule.without_finding
    if rule.criterion is None or rule.met is None or rule.not_met is None:
        raise ValueError(f"{rule.id}: the rule has no criterion yet, so nothing can be judged by it")
    met = _met(rule, rule.criterion, finding)
    return rule.unclear if met is None else rule.met if met else rule.not_met


def _met(rule: Rule, criterion: Criterion, finding: Finding) -> bool | None:
    """Return whether a criterion is met; None where an interval does not tell."""
    if criterion.kind == "holds":
        if finding.holds is None:
            raise ValueError(f"{rule.id}: expected a finding with `holds`")
        return finding.holds
    if finding.low is None or finding.high is None or not finding.low <= finding.high:
        raise ValueError(f"{rule.id}: expected a finding with an interval, low <= high")
    if criterion.threshold is None:
        low, high = printed_range(rule.published or "")
        return finding.low <= high and low <= finding.high
    if finding.low <= criterion.threshold <= finding.high:
        return None
    return (finding.low > criterion.threshold) == (criterion.kind == "above")
