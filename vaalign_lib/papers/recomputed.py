"""The statistics of Tables 1 to 4 recomputed from what is printed beside them.

Printed numbers are rounded, so what follows from them is a range: a recomputed value is taken over
everything that rounds to the printed inputs. A printed result is consistent if its own rounding range
overlaps that.
"""

from collections.abc import Callable, Iterable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from scipy.stats import f, norm

from vaalign_lib.papers.printed import RANGES, printed_range, printed_value, published
from vaalign_lib.statistics.power import policies_for_p, policies_for_risks, risk_power
from vaalign_lib.statistics.tests import (
    CONFIDENCE,
    Estimate,
    Tested,
    boschloo,
    f_test,
    holm,
    mean_difference,
    proportion_difference,
    smallest_margin,
    two_proportions,
    variance_ratio,
    welch,
)

POLICIES = 80  # of each method in every row
WIDTHS = "variance of the SDs, rescaled"  # of Table 4's intervals
TYPICAL_WEIGHT = 0.02  # initializer_range of the GPT-2, Qwen2 and Mistral configurations
PPO_EPOCHS = 4  # of trl 0.11, which the paper's settings are named after
ROUNDINGS = {
    "half up": ROUND_HALF_UP,
    "half even": ROUND_HALF_EVEN,
    "half down": ROUND_HALF_DOWN,
    "down": ROUND_FLOOR,
    "up": ROUND_CEILING,
}


def rows() -> list[str]:
    """Return the names of the rows of Tables 1 to 3, in their order."""
    names = published().loc[lambda lines: (lines["item"] == "Table 1") & (lines["row"] != ""), "row"]
    return list(names.unique())


def over_rounding(function: Callable[..., float], keys: Iterable[str]) -> tuple[float, float]:
    """Return the range of a function over all numbers that round to the printed ones.

    The function must be monotone in every number, so that its extremes are at the ends of the ranges.
    What depends on the ratio of two variances alone (degrees of freedom, p of F) is, for vanilla's is
    larger in every row however they are rounded.
    """
    ranges = {key: printed_range(key) for key in keys}
    variances = [ends for key, ends in ranges.items() if ".variance_v" in key]
    if len(variances) == 2 and variances[0][0] <= variances[1][1]:
        raise ValueError(f"{list(ranges)}: either variance may be the larger one, the ends are not enough")
    values = [function(*numbers) for numbers in product(*ranges.values())]
    return min(values), max(values)


def _both(table: int, row: str, quantity: str) -> list[str]:
    """Return the keys of vanilla's and the variance-aware number."""
    return [f"table{table}.{row}.{quantity}_{method}" for method in ("vanilla", "variance_aware")]


def _moments(row: str) -> list[str]:
    """Return the keys of a row's means and variances, vanilla before variance-aware."""
    return [
        key for pair in zip(_both(2, row, "mean"), _both(1, row, "variance"), strict=True) for key in pair
    ]


def _values(keys: Iterable[str]) -> list[float]:
    return [printed_value(key) for key in keys]


def _width(top: int) -> str:
    return f"table4.range-{top}.variance_of_standard_deviation"


# --- printed, recomputed range, verdict ---------------------------------------------------------------


def audit() -> pd.DataFrame:
    """Return the check of Tables 1 to 4, a row for every printed statistic.

    Columns: `item`, `row`, `quantity`, `printed`, `low` and `high` (the recomputed range), `consistent`,
    and `off_by`, the printed number over the nearest end of the range.
    """
    lines = [*_ratios(), *_means(), *_risks(), *_ranges()]
    table = pd.DataFrame(lines, columns=["item", "row", "quantity", "key", "low", "high"])
    keys = table.pop("key")
    table.insert(3, "printed", keys.map(printed_value))
    low, high = np.array([printed_range(key) for key in keys]).T
    consistent = (table["low"] <= high + 1e-12) & (low <= table["high"] + 1e-12)
    nearest = table["low"].where(table["printed"] < table["low"], table["high"])
    return table.assign(consistent=consistent, off_by=(table["printed"] / nearest).where(~consistent, 1.0))


Line = tuple[str, str, str, str, float, float]


def _ratios() -> Iterator[Line]:
    """Yield every F of Table 1, and its critical value."""
    for row in rows():
        ends = over_rounding(lambda a, b: a / b, _both(1, row, "variance"))
        yield "Table 1", row, "F", f"table1.{row}.variance_ratio_f", *ends
    critical = f_test(1, POLICIES, 1, POLICIES).critical
    yield "Table 1", "", "critical F", "table1.f_critical", critical, critical


def _means() -> Iterator[Line]:
    """Yield every t of Table 2 and its critical value, by Welch."""
    for row in rows():
        low, high = over_rounding(lambda *numbers: _welch(*numbers).statistic, _moments(row))
        crosses = low < 1e-9 and high > -1e-9  # printed means may round to the same number
        absolute = sorted((abs(low), abs(high)))
        ends = (0.0 if crosses else absolute[0], absolute[1])
        yield "Table 2", row, "|t|", f"table2.{row}.t_score", *ends
        ends = over_rounding(lambda a, b: _welch(0, a, 0, b).critical, _both(1, row, "variance"))
        yield "Table 2", row, "critical t", f"table2.{row}.t_critical", *ends


def _risks() -> Iterator[Line]:
    """Yield every p of Table 3, of the one-sided two-proportion z test."""
    for row in rows():
        yield "Table 3", row, "p", f"table3.{row}.p_value", *over_rounding(_risk_p, _both(3, row, "risk"))


def _ranges() -> Iterator[Line]:
    """Yield every ratio of Table 4, and its first column rescaled with R or R - 1."""
    for top in RANGES:
        row = f"range-{top}"
        ends = over_rounding(lambda a, b: a / b, _both(4, row, "variance"))
        yield "Table 4", row, "ratio", f"table4.{row}.variance_ratio_f", *ends
    widest = printed_range(_width(RANGES[0]))
    for top in RANGES[1:]:
        shares = (top / RANGES[0]) ** 2, ((top - 1) / (RANGES[0] - 1)) ** 2
        ends = min(shares) * widest[0], max(shares) * widest[1]
        yield "Table 4", f"range-{top}", WIDTHS, _width(top), *ends


def _welch(mean: float, variance: float, other: float, others: float) -> Tested:
    return welch(mean, variance, POLICIES, other, others, POLICIES)


def _risk_p(first: float, second: float) -> float:
    return two_proportions(first * POLICIES, POLICIES, second * POLICIES, POLICIES).p


# --- what the printed numbers say -----------------------------------------------------------------------


def variance_tests() -> pd.DataFrame:
    """Return the F tests of the printed variances, 80 normal returns each, a row for each of Table 1.

    `ratio` with its exact interval, `p` two-sided, `p_worst` at the rounding least in favour of a
    difference, `p_holm` that one adjusted over the rows. `kurtosis` is the excess kurtosis of the returns
    from which on such a ratio would not be significant at 5% (delta method: the logarithm of a sample
    variance has the variance (kurtosis + 2) / n).
    """
    found = []
    for row in rows():
        keys = _both(1, row, "variance")
        first, second = _values(keys)
        ratio = variance_ratio(first, POLICIES, second, POLICIES)
        worst = over_rounding(lambda a, b: f_test(a, POLICIES, b, POLICIES).p, keys)[1]
        p = f_test(first, POLICIES, second, POLICIES).p
        found.append((row, ratio.value, ratio.low, ratio.high, p, worst))
    table = pd.DataFrame(found, columns=["row", "ratio", "low", "high", "p", "p_worst"])
    kurtosis = POLICIES * np.log(table["ratio"]) ** 2 / (2 * norm.ppf(0.5 + CONFIDENCE / 2) ** 2) - 2
    return table.assign(kurtosis=kurtosis, p_holm=holm(table["p_worst"]))


def mean_tests() -> pd.DataFrame:
    """Return Welch's tests of the printed means, a row for each of Table 2.

    `difference` of variance-aware minus vanilla with its interval, `margin` from which on an equivalence
    test at 5% would call the means equivalent, `margin_in_sds` the same in standard deviations of
    vanilla's returns, at most, over the rounding of means and variances, and `margin_in_gains` in what
    vanilla gains over the reference, by `implied_references`.
    """
    found = []
    for row in rows():
        mean, variance, other, others = _values(_moments(row))
        numbers = (other, others, POLICIES, mean, variance, POLICIES)
        tested, gap, margin = welch(*numbers), mean_difference(*numbers), smallest_margin(*numbers)
        in_sds = over_rounding(_margin_in_sds, _moments(row))[1]
        found.append((row, gap.value, gap.low, gap.high, tested.degrees, tested.p, margin, in_sds))
    names = ["row", "difference", "low", "high", "degrees", "p", "margin", "margin_in_sds"]
    table = pd.DataFrame(found, columns=names)
    return table.assign(margin_in_gains=table["margin"] / implied_references()["gain_vanilla"])


def _margin_in_sds(mean: float, variance: float, other: float, others: float) -> float:
    margin = smallest_margin(mean, variance, POLICIES, other, others, POLICIES)
    return margin / float(np.sqrt(variance))


def risk_tests() -> pd.DataFrame:
    """Return the tests of the printed risks, a row for each of Table 3.

    `vanilla` and `variance_aware` are counts of 80 that round to the printed risks, nearest first. `p` is
    that of the printed risks, `p_worst` at the rounding least in favour of a difference, `boschloo` exact
    from the counts; `..._holm` are adjusted over the rows, so is the printed p. `fall` is vanilla's risk
    minus the other's with its interval (from counts). `power` is that of 80 policies for risks like
    these, `needed` how many would have 80% power, `needed_for_p` how many with such risks would give the
    printed p.
    """
    table = pd.DataFrame([_risk_test(row) for row in rows()])
    adjusted = {f"{name}_holm": holm(table[name]) for name in ("p", "p_worst", "p_printed", "boschloo")}
    return table.assign(**adjusted)


def risk_fall(row: str) -> Estimate:
    """Return vanilla's printed risk minus the other's, from the nearest counts, with Newcombe's interval."""
    vanilla, aware = (_nearest(key) for key in _both(3, row, "risk"))
    return proportion_difference(vanilla, POLICIES, aware, POLICIES)


def _risk_test(row: str) -> dict[str, Any]:
    keys, fall = _both(3, row, "risk"), risk_fall(row)
    (first, second), (vanilla, aware) = _values(keys), (_nearest(key) for key in keys)
    printed = printed_value(f"table3.{row}.p_value")
    return {
        "row": row,
        "vanilla": vanilla,
        "variance_aware": aware,
        "fall": fall.value,
        "low": fall.low,
        "high": fall.high,
        "p": _risk_p(first, second),
        "p_worst": over_rounding(_risk_p, keys)[1],
        "boschloo": boschloo(vanilla, POLICIES, aware, POLICIES),
        "p_printed": printed,
        "power": risk_power(first, second, POLICIES),
        "needed": policies_for_risks(first, second),
        "needed_for_p": policies_for_p(first, second, printed),
    }


def counts_of(key: str, total: int = POLICIES) -> dict[str, list[int]]:
    """Return which counts out of a total print as a risk does, by rule of rounding."""
    printed = Decimal(published().loc[key, "printed"])
    shares = [Decimal(count) / total for count in range(total + 1)]
    return {
        name: [count for count, share in enumerate(shares) if share.quantize(printed, rounding) == printed]
        for name, rounding in ROUNDINGS.items()
    }


def _nearest(key: str) -> int:
    """Return the count out of 80 that is nearest to a printed risk, of those that round to it."""
    wanted = printed_value(key) * POLICIES
    known = {count for counts in counts_of(key).values() for count in counts}
    return min(known or range(POLICIES + 1), key=lambda count: abs(count - wanted))


def risks_as_counts() -> pd.DataFrame:
    """Return which printed risks are counts of 80: a row for each, counts by rule of rounding."""
    keys = {printed_value(key): key for row in rows() for key in _both(3, row, "risk")}
    found = {risk: counts_of(keys[risk]) for risk in sorted(keys)}
    table = pd.DataFrame.from_dict(found, orient="index").rename_axis("risk")
    return table.map(lambda counts: " or ".join(map(str, counts)) or "none").reset_index()


def implied_references() -> pd.DataFrame:
    """Return the reference return that each method's mean, variance and risk imply, for normal returns.

    It is mean + SD z(risk); `gain` is the mean over it. `z` is the difference between the methods over
    its standard error, `z_low` and `z_high` its range over the rounding of all six numbers.
    """
    found = []
    for row in rows():
        keys = [*_moments(row), *_both(3, row, "risk")]
        mean, variance, other, others, risk, other_risk = numbers = _values(keys)
        first, second = _reference(mean, variance, risk), _reference(other, others, other_risk)
        ends = over_rounding(_reference_gap, keys)
        found.append((row, first, mean - first, second, other - second, _reference_gap(*numbers), *ends))
    methods = ("vanilla", "variance_aware")
    names = [f"{name}_{method}" for method in methods for name in ("reference", "gain")]
    return pd.DataFrame(found, columns=["row", *names, "z", "z_low", "z_high"])


def _reference(mean: float, variance: float, risk: float) -> float:
    return mean + float(np.sqrt(variance) * norm.ppf(risk))


def _reference_gap(
    mean: float, variance: float, other: float, others: float, risk: float, other_risk: float
) -> float:
    """Return by how many standard errors two implied references differ."""
    gap = _reference(other, others, other_risk) - _reference(mean, variance, risk)
    return gap / float(np.hypot(implied_error(variance, risk), implied_error(others, other_risk)))


def implied_error(variance: float, risk: float, policies: int = POLICIES) -> float:
    """Return the standard error of mean + SD z(share) of n normal returns.

    By the delta method its square is variance (p (1 - p) / phi(z)^2 - 1 - z^2 / 2) / n; mean, SD and
    share are those of one sample and move together.
    """
    z = norm.ppf(risk)
    parts = risk * (1 - risk) / norm.pdf(z) ** 2 - 1 - z**2 / 2
    return float(np.sqrt(variance * parts / policies))


def range_trend() -> Estimate:
    """Estimate the slope of the logarithm of Table 4's ratios on that of R; 80 normal returns each."""
    logs = np.log([printed_value(f"table4.range-{top}.variance_ratio_f") for top in RANGES])
    x = np.log(np.array(RANGES, dtype=float))
    x -= x.mean()
    lever = x / (x**2).sum()
    error = np.sqrt(4 / (POLICIES - 1) * (lever**2).sum())  # 2 / (n - 1) for each of two variances
    half = float(norm.ppf(0.5 + CONFIDENCE / 2) * error)
    slope = float(lever @ logs)
    return Estimate(slope, slope - half, slope + half, len(RANGES))


def widths_fit() -> bool:
    """Whether one set of intervals, rescaled with R or with R - 1, has all of Table 4's variances."""
    ends = np.array([printed_range(_width(top)) for top in RANGES])
    relative = [ends / lengths[:, None] ** 2 for lengths in (np.array(RANGES), np.array(RANGES) - 1)]
    return any(one[:, 0].max() <= one[:, 1].min() for one in relative)


def equal_degrees(critical: float) -> float:
    """Return the degrees of freedom, the same for both variances, whose 0.975 quantile of F is given."""
    if critical <= 1:
        raise ValueError(f"critical: expected a quantile above 1, got {critical}")
    found = brentq(lambda degrees: f.ppf(0.5 + CONFIDENCE / 2, degrees, degrees) - critical, 2, 1e4)
    return float(found)


# --- settings -------------------------------------------------------------------------------------------


def qwen_updates() -> int:
    """Return how many updates of Table 12's PPO are one pass through the chat prompts."""
    batch, part = _values(f"table12.{name}batch_size" for name in ("", "mini_"))
    return int(printed_value("text.chat.pairs") // batch * (batch // part) * PPO_EPOCHS)


def adam_bound(learning_rate: float, updates: int, betas: tuple[float, float] = (0.9, 0.999)) -> float:
    """Return how far Adam moves a weight at most.

    A step is the learning rate times m / sqrt(v), two sums over the same past gradients. By Cauchy and
    Schwarz |m| / sqrt(v) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), also after the correction of the
    start, which divides m by 1 - b1^t and v by less; typical steps are a seventh of that.
    """
    first, second = betas
    return learning_rate * updates * (1 - first) / np.sqrt((1 - second) * (1 - first**2 / second))


def half_spacing(weight: float, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return half the distance from a weight to the next number that a type holds."""
    if not weight:
        raise ValueError("weight: expected a number other than 0")
    spacing = 2.0 ** np.floor(np.log2(abs(weight))) * torch.finfo(dtype).eps
    return float(spacing / 2)
