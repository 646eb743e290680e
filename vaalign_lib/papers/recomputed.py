"""The statistics of Tables 1 to 4 recomputed from what is printed beside them, over all that rounds to it.

A printed result is consistent if its own rounding range overlaps that of the recomputed values.
"""

from collections.abc import Callable, Iterable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from itertools import product
from operator import truediv
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from scipy.stats import f, norm

from vaalign_lib.papers.printed import RANGES, printed_range, printed_value, published
from vaalign_lib.statistics import tests
from vaalign_lib.statistics.power import policies_for_p, policies_for_risks, risk_power

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
    lines = published()
    return list(lines.loc[(lines["item"] == "Table 1") & (lines["row"] != ""), "row"].unique())


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


def _keys(row: str) -> tuple[list[str], list[str], list[str]]:
    """Return the keys of a row's variances, of both methods' mean and variance, and of the risks."""
    variances, means = _both(1, row, "variance"), _both(2, row, "mean")
    return variances, [means[0], variances[0], means[1], variances[1]], _both(3, row, "risk")


def _values(keys: Iterable[str]) -> list[float]:
    return [printed_value(key) for key in keys]


def _counted(*moments: float) -> tuple[float, ...]:
    """Return both methods' moments (mean and variance, or one of them, or events), each with its count."""
    half = len(moments) // 2
    return *moments[:half], POLICIES, *moments[half:], POLICIES


def _margin_in_sds(*moments: float) -> float:
    return tests.smallest_margin(*_counted(*moments)) / float(np.sqrt(moments[1]))


def _variance_p(first: float, second: float) -> float:
    return tests.f_test(first, POLICIES, second, POLICIES).p


def _risk_p(first: float, second: float) -> float:
    return tests.two_proportions(first * POLICIES, POLICIES, second * POLICIES, POLICIES).p


def audit() -> pd.DataFrame:
    """Return the check of Tables 1 to 4, a row for every printed statistic.

    Columns: `item`, `row`, `quantity`, `printed`, `low` and `high` (the recomputed range), `consistent`,
    and `off_by`, the printed number over the nearest end of the range.
    """
    table = pd.DataFrame(_statistics(), columns=["item", "row", "quantity", "key", "low", "high"])
    table = table.sort_values("item", kind="stable", ignore_index=True)
    keys = table.pop("key")
    table.insert(3, "printed", keys.map(printed_value))
    low, high = np.array([printed_range(key) for key in keys]).T
    consistent = (table["low"] <= high + 1e-12) & (low <= table["high"] + 1e-12)
    nearest = table["low"].where(table["printed"] < table["low"], table["high"])
    return table.assign(consistent=consistent, off_by=(table["printed"] / nearest).where(~consistent, 1.0))


def _statistics() -> Iterator[tuple[str, str, str, str, float, float]]:
    """Yield item, row, quantity, key and recomputed range: of F, |t|, p, ratios, and their critical values.

    The variances of Table 4's intervals are rescaled from the first one with R or R - 1.
    """
    for row in rows():
        variances, moments, risks = _keys(row)
        yield "Table 1", row, "F", f"table1.{row}.variance_ratio_f", *over_rounding(truediv, variances)
        low, high = over_rounding(lambda *numbers: tests.welch(*_counted(*numbers)).statistic, moments)
        crosses = low < 1e-9 and high > -1e-9  # printed means may round to the same number
        smaller, larger = sorted((abs(low), abs(high)))
        yield "Table 2", row, "|t|", f"table2.{row}.t_score", 0.0 if crosses else smaller, larger
        ends = over_rounding(lambda a, b: tests.welch(*_counted(0, a, 0, b)).critical, variances)
        yield "Table 2", row, "critical t", f"table2.{row}.t_critical", *ends
        yield "Table 3", row, "p", f"table3.{row}.p_value", *over_rounding(_risk_p, risks)
    critical = tests.f_test(1, POLICIES, 1, POLICIES).critical
    yield "Table 1", "", "critical F", "table1.f_critical", critical, critical
    for top in RANGES:
        ends = over_rounding(truediv, _both(4, f"range-{top}", "variance"))
        yield "Table 4", f"range-{top}", "ratio", f"table4.range-{top}.variance_ratio_f", *ends
    low, high = printed_range(_width(RANGES[0]))
    for top in RANGES[1:]:
        shares = (top / RANGES[0]) ** 2, ((top - 1) / (RANGES[0] - 1)) ** 2
        yield "Table 4", f"range-{top}", WIDTHS, _width(top), min(shares) * low, max(shares) * high


def _width(top: int) -> str:
    return f"table4.range-{top}.variance_of_standard_deviation"


def variance_tests() -> pd.DataFrame:
    """Return the F tests of the printed variances, 80 normal returns each, a row for each of Table 1.

    `ratio` with its exact interval, `p` two-sided, `p_worst` at the rounding least in favour of a
    difference, `p_holm` that one adjusted over the rows. `kurtosis` is the excess kurtosis of the returns
    from which on such a ratio would not be significant at 5% (delta method: the logarithm of a sample
    variance has the variance (kurtosis + 2) / n).
    """
    found = []
    for row in rows():
        keys, *_ = _keys(row)
        first, second = _values(keys)
        ratio = tests.variance_ratio(first, POLICIES, second, POLICIES)
        p, (_, worst) = _variance_p(first, second), over_rounding(_variance_p, keys)
        found.append((row, ratio.value, ratio.low, ratio.high, p, worst))
    table = pd.DataFrame(found, columns=["row", "ratio", "low", "high", "p", "p_worst"])
    kurtosis = POLICIES * np.log(table["ratio"]) ** 2 / (2 * tests.Z**2) - 2
    return table.assign(kurtosis=kurtosis, p_holm=tests.holm(table["p_worst"]))


def mean_tests() -> pd.DataFrame:
    """Return Welch's tests of the printed means, a row for each of Table 2.

    `difference` of variance-aware minus vanilla with its interval, `margin` from which on an equivalence
    test at 5% would call the means equivalent, `margin_in_sds` the same in standard deviations of
    vanilla's returns, at most, over the rounding of means and variances, and `margin_in_gains` in what
    vanilla gains over the reference, by `implied_references`.
    """
    found = []
    for row in rows():
        _, keys, _ = _keys(row)
        mean, variance, other, others = _values(keys)
        numbers = _counted(other, others, mean, variance)
        tested, gap = tests.welch(*numbers), tests.mean_difference(*numbers)
        margins = tests.smallest_margin(*numbers), over_rounding(_margin_in_sds, keys)[1]
        found.append((row, gap.value, gap.low, gap.high, tested.degrees, tested.p, *margins))
    names = ["row", "difference", "low", "high", "degrees", "p", "margin", "margin_in_sds"]
    table = pd.DataFrame(found, columns=names)
    return table.assign(margin_in_gains=table["margin"] / implied_references()["gain_vanilla"])


def risk_tests() -> pd.DataFrame:
    """Return the tests of the printed risks, a row for each of Table 3.

    `vanilla` and `variance_aware` are counts of 80 that round to the printed risks, nearest first. `p` is
    that of the printed risks, `p_worst` at the rounding least in favour of a difference, `boschloo` exact
    from the counts; `..._holm` are adjusted over the rows, so is the printed p. `risk_difference` is
    vanilla's risk minus the other's with its interval (from counts). `power` is that of 80 policies for risks
    like these, `needed` how many would have 80% power, `needed_for_p` how many with such risks would give the
    printed p.
    """
    table = pd.DataFrame([_risk_test(row) for row in rows()])
    adjusted = {f"{name}_holm": tests.holm(table[name]) for name in ("p", "p_worst", "p_printed", "boschloo")}
    return table.assign(**adjusted)


def _risk_test(row: str) -> dict[str, Any]:
    *_, keys = _keys(row)
    difference, printed = risk_difference(row), printed_value(f"table3.{row}.p_value")
    (first, second), (vanilla, aware) = _values(keys), (_nearest(key) for key in keys)
    return (
        {"row": row, "vanilla": vanilla, "variance_aware": aware}
        | {"risk_difference": difference.value, "low": difference.low, "high": difference.high}
        | {"p": _risk_p(first, second), "p_worst": over_rounding(_risk_p, keys)[1]}
        | {"boschloo": tests.boschloo(vanilla, POLICIES, aware, POLICIES), "p_printed": printed}
        | {"power": risk_power(first, second, POLICIES), "needed": policies_for_risks(first, second)}
        | {"needed_for_p": policies_for_p(first, second, printed)}
    )


def risk_difference(row: str) -> tests.Estimate:
    """Return vanilla's printed risk minus the other's, from the nearest counts, with Newcombe's interval."""
    vanilla, aware = (_nearest(key) for key in _both(3, row, "risk"))
    return tests.proportion_difference(vanilla, POLICIES, aware, POLICIES)


def counts_of(key: str) -> dict[str, list[int]]:
    """Return which counts out of 80 print as a risk does, by rule of rounding."""
    printed = Decimal(published().loc[key, "printed"])
    shares = [Decimal(count) / POLICIES for count in range(POLICIES + 1)]
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
        _, moments, risks = _keys(row)
        mean, variance, other, others, risk, other_risk = numbers = _values(moments + risks)
        first, second = _reference(mean, variance, risk), _reference(other, others, other_risk)
        ends = over_rounding(_reference_gap, moments + risks)
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


def implied_error(variance: float, risk: float) -> float:
    """Return the standard error of mean + SD z(share) of 80 normal returns.

    By the delta method its square is variance (p (1 - p) / phi(z)^2 - 1 - z^2 / 2) / n; mean, SD and
    share are those of one sample and move together.
    """
    z = norm.ppf(risk)
    parts = risk * (1 - risk) / norm.pdf(z) ** 2 - 1 - z**2 / 2
    return float(np.sqrt(variance * parts / POLICIES))


def range_trend() -> tests.Estimate:
    """Estimate the slope of the logarithm of Table 4's ratios on that of R; 80 normal returns each."""
    logs = np.log(_values(f"table4.range-{top}.variance_ratio_f" for top in RANGES))
    x = np.log(np.array(RANGES, dtype=float))
    x -= x.mean()
    lever = x / (x**2).sum()
    error = np.sqrt(4 / (POLICIES - 1) * (lever**2).sum())  # 2 / (n - 1) for each of two variances
    return tests.around(lever @ logs, tests.Z * error, len(RANGES))


def widths_fit() -> bool:
    """Whether one set of intervals, rescaled with R or with R - 1, has all of Table 4's variances."""
    ends = np.array([printed_range(_width(top)) for top in RANGES])
    relative = [ends / lengths[:, None] ** 2 for lengths in (np.array(RANGES), np.array(RANGES) - 1)]
    return any(one[:, 0].max() <= one[:, 1].min() for one in relative)


def equal_degrees(critical: float) -> float:
    """Return the degrees of freedom, the same for both variances, whose 0.975 quantile of F is given."""
    if critical <= 1:
        raise ValueError(f"critical: expected a quantile above 1, got {critical}")
    return float(brentq(lambda degrees: f.ppf(tests.TAILS[1], degrees, degrees) - critical, 2, 1e4))


def qwen_updates() -> int:
    """Return how many updates of Table 12's PPO are one pass through the chat prompts."""
    batch, part = _values(f"table12.{name}batch_size" for name in ("", "mini_"))
    return int(printed_value("text.chat.pairs") // batch * (batch // part) * PPO_EPOCHS)


def adam_bound(learning_rate: float, updates: int) -> float:
    """Return how far Adam (b1 0.9, b2 0.999) moves a weight at most.

    A step is the learning rate times m / sqrt(v), two sums over the same past gradients. By Cauchy and
    Schwarz |m| / sqrt(v) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)), also after the correction of the
    start, which divides m by 1 - b1^t and v by less; typical steps are a seventh of that.
    """
    first, second = 0.9, 0.999
    return learning_rate * updates * (1 - first) / np.sqrt((1 - second) * (1 - first**2 / second))


def half_spacing(weight: float) -> float:
    """Return half the distance from a weight to the next number that bfloat16 holds."""
    if not weight:
        raise ValueError("weight: expected a number other than 0")
    return float(2.0 ** np.floor(np.log2(abs(weight))) * torch.finfo(torch.bfloat16).eps / 2)
