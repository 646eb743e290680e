"""The statistics of Tables 1 to 4 recomputed from what is printed beside them.

Printed numbers are rounded, so what follows from them is a range: a recomputed value is taken over
everything that rounds to the printed inputs. A printed result is consistent if its own rounding range
overlaps that.
"""

from collections.abc import Callable, Iterable
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_DOWN, ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from itertools import product

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
    return list(dict.fromkeys(lines.loc[lines["item"] == "Table 1", "row"].loc[lambda r: r != ""]))


def over_rounding(function: Callable[..., float], keys: Iterable[str]) -> tuple[float, float]:
    """Return the range of a function over all numbers that round to the printed ones.

    The function must be monotone in every number, so that its extremes are at the ends of the ranges.
    What depends on the ratio of two variances alone (degrees of freedom, p of F) is, for vanilla's is
    larger in every row however they are rounded.
    """
    keys = list(keys)
    ranges = [printed_range(key) for key in keys]
    variances = [ends for key, ends in zip(keys, ranges, strict=True) if ".variance_v" in key]
    if len(variances) == 2 and variances[0][0] <= variances[1][1]:
        raise ValueError(f"{keys}: either variance may be the larger one, the ends are not enough")
    values = [function(*numbers) for numbers in product(*ranges)]
    return min(values), max(values)


def _judged(item: str, row: str, quantity: str, key: str, low: float, high: float) -> dict[str, object]:
    """Return a row of the audit."""
    printed, ends = printed_value(key), printed_range(key)
    consistent = bool(low <= ends[1] + 1e-12 and ends[0] <= high + 1e-12)
    nearest = low if printed < low else high
    return {
        "item": item,
        "row": row,
        "quantity": quantity,
        "printed": printed,
        "low": low,
        "high": high,
        "consistent": consistent,
        "off_by": 1.0 if consistent else printed / nearest,
    }


def _keys(table: int, row: str, *quantities: str) -> list[str]:
    return [f"table{table}.{row}.{quantity}" for quantity in quantities]


def _moments(row: str) -> list[str]:
    """Return the keys of a row's means and variances, vanilla before variance-aware."""
    means, variances = (
        _keys(table, row, f"{name}_vanilla", f"{name}_variance_aware")
        for table, name in ((2, "mean"), (1, "variance"))
    )
    return [means[0], variances[0], means[1], variances[1]]


def _risks(row: str) -> list[str]:
    return _keys(3, row, "risk_vanilla", "risk_variance_aware")


# --- printed, recomputed range, verdict ---------------------------------------------------------------


def check_table_1() -> pd.DataFrame:
    """Return the check of Table 1: every F, and the critical value.

    Each table of this kind has the columns `item`, `row`, `quantity`, `printed`, `low` and `high` (the
    recomputed range), `consistent`, and `off_by`, the printed number over the nearest end of the range.
    """
    found = []
    for row in rows():
        ends = over_rounding(lambda a, b: a / b, _keys(1, row, "variance_vanilla", "variance_variance_aware"))
        found.append(_judged("Table 1", row, "F", f"table1.{row}.variance_ratio_f", *ends))
    critical = f_test(1, POLICIES, 1, POLICIES).critical
    found.append(_judged("Table 1", "", "critical F", "table1.f_critical", critical, critical))
    return pd.DataFrame(found)


def check_table_2() -> pd.DataFrame:
    """Return the check of Table 2: every t and its critical value, by Welch; see `table_1`."""
    found = []
    for row in rows():

        def test(mean: float, variance: float, other: float, others: float) -> tuple[float, float]:
            tested = welch(mean, variance, POLICIES, other, others, POLICIES)
            return tested.statistic, tested.critical

        low, high = over_rounding(lambda *numbers: test(*numbers)[0], _moments(row))
        absolute = sorted((abs(low), abs(high)))
        crosses = low < 1e-9 and high > -1e-9  # printed means may round to the same number
        ends = (0.0 if crosses else absolute[0], absolute[1])
        found.append(_judged("Table 2", row, "|t|", f"table2.{row}.t_score", *ends))
        keys = [key for key in _moments(row) if key.startswith("table1")]
        critical = over_rounding(lambda a, b: test(0, a, 0, b)[1], keys)
        found.append(_judged("Table 2", row, "critical t", f"table2.{row}.t_critical", *critical))
    return pd.DataFrame(found)


def check_table_3() -> pd.DataFrame:
    """Return the check of Table 3: every p of the one-sided two-proportion z test; see `table_1`."""
    return pd.DataFrame(
        [
            _judged("Table 3", row, "p", f"table3.{row}.p_value", *over_rounding(_risk_p, _risks(row)))
            for row in rows()
        ]
    )


def _risk_p(first: float, second: float) -> float:
    return two_proportions(first * POLICIES, POLICIES, second * POLICIES, POLICIES).p


def check_table_4() -> pd.DataFrame:
    """Return the check of Table 4: every ratio, and the first column rescaled with R; see `table_1`."""
    found = []
    for top in RANGES:
        keys = _keys(4, f"range-{top}", "variance_vanilla", "variance_variance_aware")
        ends = over_rounding(lambda a, b: a / b, keys)
        key = f"table4.range-{top}.variance_ratio_f"
        found.append(_judged("Table 4", f"range-{top}", "ratio", key, *ends))
    widest = printed_range(_width(RANGES[0]))
    for top in RANGES[1:]:
        shares = (top / RANGES[0]) ** 2, ((top - 1) / (RANGES[0] - 1)) ** 2  # of R, of R - 1
        low, high = min(shares) * widest[0], max(shares) * widest[1]
        name = "variance of the SDs, rescaled"
        found.append(_judged("Table 4", f"range-{top}", name, _width(top), low, high))
    return pd.DataFrame(found)


def _width(top: int) -> str:
    return f"table4.range-{top}.variance_of_standard_deviation"


def audit() -> pd.DataFrame:
    """Return the check of Tables 1 to 4, a row for every printed statistic; see `table_1`."""
    return pd.concat([check_table_1(), check_table_2(), check_table_3(), check_table_4()], ignore_index=True)


# --- what the printed numbers say -----------------------------------------------------------------------


def variance_tests() -> pd.DataFrame:
    """Return the F tests of the printed variances, 80 normal returns each, a row for each of Table 1.

    `ratio` with its exact interval, `p` two-sided, `p_worst` at the rounding least in favour of a
    difference, `p_holm` that one adjusted over the rows. `kurtosis` is the excess kurtosis of the returns
    from which on such a ratio would not be significant at 5% (delta method: the logarithm of a sample
    variance has the variance (kurtosis + 2) / n).
    """
    z = norm.ppf(0.5 + CONFIDENCE / 2)
    found = []
    for row in rows():
        keys = _keys(1, row, "variance_vanilla", "variance_variance_aware")
        first, second = (printed_value(key) for key in keys)
        ratio = variance_ratio(first, POLICIES, second, POLICIES)
        worst = over_rounding(lambda a, b: f_test(a, POLICIES, b, POLICIES).p, keys)[1]
        found.append(
            {"row": row, "ratio": ratio.value, "low": ratio.low, "high": ratio.high}
            | {"p": f_test(first, POLICIES, second, POLICIES).p, "p_worst": worst}
            | {"kurtosis": POLICIES * np.log(ratio.value) ** 2 / (2 * z**2) - 2}
        )
    table = pd.DataFrame(found)
    return table.assign(p_holm=holm(table["p_worst"]))


def mean_tests() -> pd.DataFrame:
    """Return Welch's tests of the printed means, a row for each of Table 2.

    `difference` of variance-aware minus vanilla with its interval, `margin` from which on an equivalence
    test at 5% would call the means equivalent, `margin_in_sds` the same in standard deviations of
    vanilla's returns, at most, over the rounding of means and variances, and `margin_in_gains` in what
    vanilla gains over the reference, by `implied_references`.
    """
    found = []
    gains = implied_references().set_index("row")["gain_vanilla"]
    for row in rows():
        mean, variance, other, others = (printed_value(key) for key in _moments(row))
        numbers = (other, others, POLICIES, mean, variance, POLICIES)
        tested, gap = welch(*numbers), mean_difference(*numbers)
        margin = smallest_margin(*numbers)
        found.append(
            {"row": row, "difference": gap.value, "low": gap.low, "high": gap.high}
            | {"degrees": tested.degrees, "p": tested.p}
            | {"margin": margin, "margin_in_sds": over_rounding(_margin_in_sds, _moments(row))[1]}
            | {"margin_in_gains": margin / gains[row]}
        )
    return pd.DataFrame(found)


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
    found = []
    for row in rows():
        first, second = (printed_value(key) for key in _risks(row))
        counts = [_nearest(key) for key in _risks(row)]
        worst = over_rounding(_risk_p, _risks(row))[1]
        fall = proportion_difference(counts[0], POLICIES, counts[1], POLICIES)
        printed = printed_value(f"table3.{row}.p_value")
        found.append(
            {"row": row, "vanilla": counts[0], "variance_aware": counts[1]}
            | {"fall": fall.value, "low": fall.low, "high": fall.high}
            | {"p": _risk_p(first, second), "p_worst": worst}
            | {"boschloo": boschloo(counts[0], POLICIES, counts[1], POLICIES)}
            | {"p_printed": printed, "power": risk_power(first, second, POLICIES)}
            | {"needed": policies_for_risks(first, second)}
            | {"needed_for_p": policies_for_p(first, second, printed)}
        )
    table = pd.DataFrame(found)
    adjusted = {f"{name}_holm": holm(table[name]) for name in ("p", "p_worst", "p_printed", "boschloo")}
    return table.assign(**adjusted)


def counts_of(key: str, total: int = POLICIES) -> dict[str, list[int]]:
    """Return which counts out of a total print as a risk does, by rule of rounding."""
    printed = Decimal(published().loc[key, "printed"])
    return {
        name: [
            count
            for count in range(total + 1)
            if (Decimal(count) / total).quantize(printed, rounding) == printed
        ]
        for name, rounding in ROUNDINGS.items()
    }


def _nearest(key: str) -> int:
    """Return the count out of 80 that is nearest to a printed risk, of those that round to it."""
    wanted = printed_value(key) * POLICIES
    known = {count for counts in counts_of(key).values() for count in counts}
    return min(known or range(POLICIES + 1), key=lambda count: abs(count - wanted))


def risks_as_counts() -> pd.DataFrame:
    """Return which printed risks are counts of 80: a row for each, counts by rule of rounding."""
    keys = sorted({printed_value(key): key for row in rows() for key in _risks(row)}.items())
    return pd.DataFrame(
        [
            {"risk": risk}
            | {name: " or ".join(map(str, counts)) or "none" for name, counts in counts_of(key).items()}
            for risk, key in keys
        ]
    )


def implied_references() -> pd.DataFrame:
    """Return the reference return that each method's mean, variance and risk imply, for normal returns.

    It is mean + SD z(risk); `gain` is the mean over it. `z` is the difference between the methods over
    its standard error, `z_low` and `z_high` its range over the rounding of all six numbers.
    """
    found = []
    for row in rows():
        keys = [*_moments(row), *_risks(row)]
        mean, variance, other, others, *risks = (printed_value(key) for key in keys)
        line: dict[str, object] = {"row": row}
        for name, centre, spread, risk in (
            ("vanilla", mean, variance, risks[0]),
            ("variance_aware", other, others, risks[1]),
        ):
            reference = centre + float(np.sqrt(spread) * norm.ppf(risk))
            line |= {f"reference_{name}": reference, f"gain_{name}": centre - reference}
        low, high = over_rounding(_reference_gap, keys)
        gap = _reference_gap(mean, variance, other, others, *risks)
        found.append(line | {"z": gap, "z_low": low, "z_high": high})
    return pd.DataFrame(found)


def _reference_gap(
    mean: float, variance: float, other: float, others: float, risk: float, other_risk: float
) -> float:
    """Return by how many standard errors two implied references differ."""
    first, second = (
        mean + np.sqrt(variance) * norm.ppf(risk),
        other + np.sqrt(others) * norm.ppf(other_risk),
    )
    error = np.hypot(implied_error(variance, risk), implied_error(others, other_risk))
    return float((second - first) / error)


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
    half = norm.ppf(0.5 + CONFIDENCE / 2) * error
    slope = float(lever @ logs)
    return Estimate(slope, slope - float(half), slope + float(half), len(RANGES))


def widths_fit() -> bool:
    """Whether one set of intervals, rescaled with R or with R - 1, has all of Table 4's variances."""
    for lengths in (np.array(RANGES), np.array(RANGES) - 1):
        ends = np.array([printed_range(_width(top)) for top in RANGES]) / lengths[:, None] ** 2
        if ends[:, 0].max() <= ends[:, 1].min():
            return True
    return False


def equal_degrees(critical: float) -> float:
    """Return the degrees of freedom, the same for both variances, whose 0.975 quantile of F is given."""
    if critical <= 1:
        raise ValueError(f"critical: expected a quantile above 1, got {critical}")
    found = brentq(lambda degrees: f.ppf(0.5 + CONFIDENCE / 2, degrees, degrees) - critical, 2, 1e4)
    return float(found)


# --- settings -------------------------------------------------------------------------------------------

TYPICAL_WEIGHT = 0.02  # initializer_range of the GPT-2, Qwen2 and Mistral configurations
PPO_EPOCHS = 4  # of trl 0.11, which the paper's settings are named after


def qwen_updates() -> int:
    """Return how many updates of Table 12's PPO are one pass through the chat prompts."""
    batch, part = (printed_value(f"table12.{name}batch_size") for name in ("", "mini_"))
    batches = printed_value("text.chat.pairs") // batch
    return int(batches * (batch // part) * PPO_EPOCHS)


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
