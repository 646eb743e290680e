"""What the paper prints (data/published.csv), and the rules by which a reproduction is judged.

A rule (data/verdict_rules.yaml) is fixed before its result is seen; a finding without one is refused.
"""

from collections.abc import Iterable
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal, Self

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from vaalign_lib.store import DATA

Verdict = Literal[
    "measured here",
    "found here",
    "not found here",
    "reproduced",
    "corrected",
    "contradicted",
    "attainable",
    "not attained",
    "consistent",
    "not consistent",
    "implemented",
    "not implemented",
    "not determinable",
    "needs the paper profile",
    "not yet",
]
MEANINGS: dict[Verdict, str] = {  # in the order in which they are shown
    "measured here": "a question of ours that the paper does not answer: the number is told, nothing judged",
    "found here": "what the claim says is seen with stand-ins for the paper's models, judges or settings",
    "not found here": "what the claim says is not seen with stand-ins; the paper's models may still show it",
    "reproduced": "what the paper states holds, by mathematics: a proof, exact computation or simulation",
    "corrected": "what holds in place of a statement that does not hold as it is printed",
    "contradicted": "what the paper states does not hold, by mathematics, whatever the models are",
    "attainable": "settings can be found that give the numbers of the paper, which does not print its own",
    "not attained": "the settings that were found do not give the numbers of the paper; others might",
    "consistent": "numbers that the paper prints agree with one another, within their rounding",
    "not consistent": "numbers that the paper prints do not agree with one another or with what it says",
    "implemented": "an algorithm of the paper is here and passes a check whose answer is known",
    "not implemented": "an algorithm of the paper is not here, or fails that check",
    "not determinable": "what was measured or printed does not decide it: too noisy, or something is missing",
    "needs the paper profile": "the settings are here; the models, data and machines that they need are not",
    "not yet": "no notebook of this run has looked at it",
}
Kind = Literal["ours", "stand_in", "theorem", "fitted", "arithmetic", "implementation"]
KINDS: dict[Kind, tuple[Verdict, ...]] = {  # what a rule may say: if it is met, if it is not, other words
    "ours": ("measured here", "measured here"),
    "stand_in": ("found here", "not found here"),
    "theorem": ("reproduced", "contradicted", "corrected"),
    "fitted": ("attainable", "not attained"),
    "arithmetic": ("consistent", "not consistent"),
    "implementation": ("implemented", "not implemented", "needs the paper profile"),
}

ITEMS = (
    *(f"Figure {number}" for number in range(1, 9)),
    *(f"Table {number}" for number in range(1, 19)),
    *(f"Theorem 2.{number}" for number in (2, 4, 7)),
    *(f"Algorithm {number}" for number in range(1, 10)),
)
FURTHER_ITEMS = (
    "Assumption 2.1",
    "Equation 1",
    *(f"Remark 2.{number}" for number in (3, 5, 6)),
    "Appendix D.2",
    "TRL trainers",
    # of arXiv 2409.15360, reward-robust RLHF
    *(f"BRME Figure {number}" for number in (1, 3, 4, 5, 6, 7, 8, 9, 10)),
    *(f"BRME Table {number}" for number in (1, 2, 3, 4, 5, 8)),
    *(f"BRME Equation {number}" for number in (6, 7, 8)),
    "BRME Lemma 1",
    "BRME Remark 1",
    *(f"BRME Appendix {letter}" for letter in "ABF"),
    "Real people",
    # of arXiv 2410.00847, uncertainty-aware reward models
    "URM Section 4.1",
    *(f"URM Equation {number}" for number in range(4, 10)),
    *(f"URM Figure {number}" for number in range(4, 8)),
    *(f"URM Table {number}" for number in range(1, 4)),
    "URM rewards",
    "Frontier",
)
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
    `above`           the whole interval lies above the threshold (below it: not met; else unclear); with
                      `seen`, an effect that would not have been missed, not met is what lies below that
    `below`           the same as without `seen`, the other way round
    `holds`           the finding is a statement that was checked, true or false
    """

    kind: Literal["covers_printed", "above", "below", "holds"]
    threshold: float | None = None
    seen: float | None = None

    @model_validator(mode="after")
    def _numbers_where_needed(self) -> Self:
        if (self.kind in ("above", "below")) != (self.threshold is not None):
            raise ValueError("a threshold belongs to the kinds 'above' and 'below', and only to them")
        if self.seen is not None and (self.kind != "above" or self.seen <= (self.threshold or 0.0)):
            raise ValueError("`seen` belongs to the kind 'above', and lies above its threshold")
        return self


class Rule(_Strict):
    """A claim that the paper prints or implies, or a question of ours, and how its reproduction is judged.

    `kind` says what decides it, and with that which verdicts it may have (`KINDS`): those for a criterion
    that is met and not met are the kind's first two unless the rule has others.
    """

    id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]+$")]
    item: str
    claim: str
    kind: Kind
    source: Literal["printed", "implied", "ours"] = "printed"
    notebook: str
    published: str | None = None
    criterion: Criterion | None = None
    met: Verdict
    not_met: Verdict
    unclear: Verdict
    without_finding: Literal["not yet", "needs the paper profile", "not determinable"] = "not yet"

    @model_validator(mode="before")
    @classmethod
    def _words_of_its_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("kind") not in KINDS:
            return given  # which pydantic refuses
        met, not_met, *_ = KINDS[given["kind"]]
        unclear = met if met == not_met else "not determinable"
        return {"met": met, "not_met": not_met, "unclear": unclear} | given

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.item not in ITEMS + FURTHER_ITEMS:
            raise ValueError(f"{self.id}: {self.item!r} is no item of the paper or of ours")
        allowed = (*dict.fromkeys(KINDS[self.kind]), "not determinable")
        for word in (self.met, self.not_met, self.unclear):
            if word not in allowed:
                raise ValueError(f"{self.id}: of kind {self.kind}, it may say {allowed}, not {word!r}")
        if self.source == "ours" and "contradicted" in (self.met, self.not_met, self.unclear):
            raise ValueError(f"{self.id}: the paper cannot be contradicted on a question of ours")
        if self.criterion is not None and self.criterion.kind == "covers_printed":
            printed_value(self.published or "")
        return self


class Finding(_Strict):
    """What a notebook found about one rule: a statement or a number with its interval, and in words.

    A number that is not `clear` of the noise decides nothing.
    """

    rule: str
    reproduced: str
    holds: bool | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    clear: bool = True


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


def meanings(verdicts: Iterable[str]) -> str:
    """Return what verdicts mean as a list in Markdown, in the order of `MEANINGS`."""
    told = set(verdicts)
    return "\n".join(f"- *{word}*: {meaning}" for word, meaning in MEANINGS.items() if word in told)


def verdict(rule: Rule, finding: Finding | None) -> Verdict:
    """Judge a finding by its rule.

    Raises:
        ValueError: the finding lacks what the criterion needs, or the rule has no criterion.
    """
    if finding is None:
        return rule.without_finding
    if rule.criterion is None:
        raise ValueError(f"{rule.id}: the rule has no criterion yet, so nothing can be judged by it")
    met = is_met(rule.criterion, finding, rule.published or "")
    if not finding.clear:
        return "not determinable"
    return rule.unclear if met is None else rule.met if met else rule.not_met


def is_met(criterion: Criterion, finding: Finding, published: str = "") -> bool | None:
    """Return whether a criterion is met; None where an interval does not tell. `published` is the key of the
    printed number, where it is about one.
    """
    if criterion.kind == "holds":
        if finding.holds is None:
            raise ValueError(f"{finding.rule}: expected a finding with `holds`")
        return finding.holds
    if finding.low is None or finding.high is None or not finding.low <= finding.high:
        raise ValueError(f"{finding.rule}: expected a finding with an interval, low <= high")
    if criterion.threshold is None:
        low, high = printed_range(published)
        return finding.low <= high and low <= finding.high
    met, not_met = finding.low > criterion.threshold, finding.high < criterion.threshold
    if criterion.kind == "below":
        met, not_met = not_met, met
    elif criterion.seen is not None:
        not_met = finding.high < criterion.seen
    return True if met else False if not_met else None
