"""What follows by arithmetic from the numbers printed in "Reward-Robust RLHF in LLMs" (arXiv 2409.15360).

A statement holds if it does for some numbers that round to the printed ones.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.optimize import linprog
from scipy.stats import binomtest

from vaalign_lib.papers.printed import printed_range, printed_value, published
from vaalign_lib.statistics.tests import Estimate, proportion

LAMBDAS = ("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")
STEPS = {"200": 1, "800": 2}  # of training, and the table that has them
CATEGORIES = ("general-qa", "writing", "comprehension", "math")
SCORE = "eq-bench"  # of the 16 benchmarks the one that is no accuracy
RATES = ("consistent", "opposite", "consistent_gb", "opposite_gb")  # of Appendix A


def benchmarks() -> list[str]:
    """Return the names of the 16 benchmarks, as in keys."""
    keys = [key for key in published().index if key.startswith("brme.table1.")]
    return list(dict.fromkeys(key.split(".")[2] for key in keys))


def results(steps: str) -> pd.DataFrame:
    """Return Table 1 or 2: a row for each benchmark, columns `baseline` and the lambdas."""
    names = {"baseline": "baseline"} | {one: f"lambda-{one}" for one in LAMBDAS}
    key = f"brme.table{STEPS[steps]}"
    rows = {one: {c: printed_value(f"{key}.{one}.{k}") for c, k in names.items()} for one in benchmarks()}
    return pd.DataFrame(rows).T


def differing_baselines() -> list[str]:
    """Return the benchmarks whose baseline, the same model, is printed with two numbers."""
    first, second = (results(one)["baseline"] for one in STEPS)
    return first.index[first != second].tolist()


def best_of(steps: str) -> pd.DataFrame:
    """Return, by lambda, on how many benchmarks it is the best (`best`, ties counting for all), and on how
    many it is above both the baseline and lambda 1 (`above`).
    """
    table = results(steps)
    own = table[list(LAMBDAS)]
    above = own.gt(table["baseline"], axis=0) & own.gt(table["1.0"], axis=0)
    return pd.DataFrame({"best": own.eq(own.max(axis=1), axis=0).sum(), "above": above.sum()})


def mean_improvements() -> pd.DataFrame:
    """Return Table 3 recomputed: the mean over the 15 accuracies of the relative change from the baseline.

    A row for each number of steps and lambda: `printed`, the recomputed `value`, `low` and `high` over what
    rounds to the printed numbers, and whether these reach what rounds to the printed mean (`consistent`).
    """
    names, rows = [one for one in benchmarks() if one != SCORE], []
    for steps, number in STEPS.items():
        base = np.array([printed_range(f"brme.table{number}.{one}.baseline") for one in names])  # (15, 2)
        for value in LAMBDAS:
            mine = np.array([printed_range(f"brme.table{number}.{one}.lambda-{value}") for one in names])
            low, high = (mine[:, 0] / base[:, 1] - 1).mean(), (mine[:, 1] / base[:, 0] - 1).mean()
            key = f"brme.table3.{steps}.lambda-{value}"
            least, most = printed_range(key)
            rows.append(
                {
                    "steps": int(steps),
                    "lambda": float(value),
                    "printed": printed_value(key),
                    "value": (mine.mean(1) / base.mean(1) - 1).mean(),
                    "low": low,
                    "high": high,
                    "consistent": low <= most and least <= high,
                }
            )
    return pd.DataFrame(rows)


def long_run_advantage() -> tuple[float, float]:
    """Return by how much the best lambda is above lambda 1 at 800 steps by Table 3, over its rounding."""
    best = max(LAMBDAS[:-1], key=lambda one: printed_value(f"brme.table3.800.lambda-{one}"))
    first, last = (printed_range(f"brme.table3.800.lambda-{one}") for one in (best, "1.0"))
    return first[0] - last[1], first[1] - last[0]


def sign_test(steps: str = "800", first: str = "0.6", second: str = "1.0") -> tuple[int, int, float]:
    """Return on how many benchmarks one lambda is above, and below, another, and the sign test's p."""
    gap = results(steps)[first] - results(steps)[second]
    above, below = int((gap > 0).sum()), int((gap < 0).sum())
    return above, below, float(binomtest(above, above + below).pvalue)


def min_wins() -> int:
    """Return on how many benchmarks Table 4 has the minimum above the maximum."""
    return sum(published().loc[f"brme.table4.{one}", "printed"] == "Min" for one in benchmarks())


def totals_follow() -> bool:
    """Whether one set of weights of the categories gives both totals of Table 5, within all rounding.

    A total lies between the weighted means of its categories' lower and upper ends.
    """
    rows, limits = [], []
    for model in ("bayesian-rme", "tradition-rm"):
        cells = np.array([printed_range(f"brme.table5.{model}.{one}") for one in CATEGORIES])
        low, high = printed_range(f"brme.table5.{model}.total")
        rows += [cells[:, 0], -cells[:, 1]]
        limits += [high, -low]
    one = np.ones((1, len(CATEGORIES)))
    return bool(linprog(np.zeros(len(CATEGORIES)), np.array(rows), limits, one, [1.0]).success)


def pairs_needed() -> int:
    """Return how many test pairs make Table 5's difference in total accuracy as large as 1.96 standard
    errors, were both models judged on other pairs of the same number.
    """
    first, second = (printed_value(f"brme.table5.{one}.total") for one in ("bayesian-rme", "tradition-rm"))
    spread = first * (1 - first) + second * (1 - second)
    return int(np.ceil(1.959964**2 * spread / (first - second) ** 2))


def sources() -> pd.DataFrame:
    """Return Table 8, with the largest deviation that its ends and mean allow (Bhatia and Davis, 2000)."""
    keys = [key for key in published().index if key.startswith("brme.table8.")]
    names = list(dict.fromkeys(key.split(".")[2] for key in keys))
    columns = ("max", "min", "mean", "std", "acc")
    rows = {one: {c: printed_value(f"brme.table8.{one}.{c}") for c in columns} for one in names}
    table = pd.DataFrame(rows).T
    return table.assign(allowed=np.sqrt((table["max"] - table["mean"]) * (table["mean"] - table["min"])))


# --- Appendix A -----------------------------------------------------------------------------------------


def whole_counts(key: str, size: int) -> list[int]:
    """Return the whole numbers whose share of `size` rounds to a printed one."""
    low, high = printed_range(key)
    return [count for count in range(size + 1) if low <= count / size <= high]


def agreement_rates() -> pd.DataFrame:
    """Return the four rates of the two groups with intervals: `printed`, `counts` of `size` that round to it,
    and of the nearest count Clopper-Pearson's `value`, `low`, `high`.

    How many G/B samples there are is not printed. Opposite judgments are all among them, so it is the largest
    size at which both rates are whole numbers and the opposite ones those nearest to the rate of all.
    """
    points = int(printed_value("brme.appendixA.points"))
    consistent, opposite = (f"brme.appendixA.{one}" for one in RATES[2:])
    nearest = round(printed_value("brme.appendixA.opposite") * points)
    sizes = [
        n for n in range(1, points) if nearest in whole_counts(opposite, n) and whole_counts(consistent, n)
    ]
    rows = []
    for name in RATES:
        key, size = f"brme.appendixA.{name}", points if name in RATES[:2] else sizes[-1]
        share = proportion(np.arange(size) < round(printed_value(key) * size))
        row = {"rate": name, "printed": printed_value(key), "size": size, "counts": whole_counts(key, size)}
        rows.append(row | share.columns("value"))
    return pd.DataFrame(rows)


def selected(sizes: Sequence[str] = ("expert", "external", "expert_alone")) -> Estimate:
    """Return the share of the 85 examples on which expert and external group can differ: most, and over
    all counts that round to the printed rates, the least and most.

    With c examples on which all three agree, e and f on which the AI group stands alone with the two groups
    at one and at odds: the AI group agrees with experts on c + a, with externals on c + b, and the experts
    stand alone on b + f; all add up, c + e + a + b + f = 85. The groups differ on a + b + f.
    """
    size = int(printed_value("brme.appendixA.ai.points"))
    expert, external, alone = (whole_counts(f"brme.appendixA.ai.{one}", size) for one in sizes)
    found = [
        a + b + f
        for first in expert
        for second in external
        for third in alone
        for f in range(third + 1)
        for b in [third - f]
        for c in [second - b]
        for a in [first - c]
        if min(a, c) >= 0 and size - (a + b + c + f) >= 0
    ]
    return Estimate(max(found) / size, min(found) / size, max(found) / size, size)
