"""Tables 1 to 4 of the paper from results of policies, with the tests that they need.

`table` makes numbers, a row for every variance-aware run beside its vanilla one, from what `variances`,
`means` or `risks` say of a run; `layout` the same as text, in the paper's columns with intervals added.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.comparisons import Comparisons, interval_deviations
from vaalign_lib.experiments.conditions import METHODS, PLACEBO, ROWS, Condition
from vaalign_lib.papers import recomputed
from vaalign_lib.papers.printed import RANGES, printed_value
from vaalign_lib.statistics.returns import (
    RISK_MEASURES,
    Ratio,
    decomposition,
    risk_measures,
    risk_table,
    training_variance_test,
)
from vaalign_lib.statistics.tests import (
    Estimate,
    bca,
    boschloo,
    brown_forsythe,
    equivalence,
    f_test,
    holm,
    mean_difference,
    mean_of,
    permuted_variance_ratio,
    proportion_difference,
    smallest_margin,
    two_proportions,
    variance_ratio,
    welch,
)

NOTHING = Estimate(np.nan, np.nan, np.nan, 0)  # where the paper prints nothing
MARGIN = 0.1  # of what vanilla gains over the reference: means closer than that count as equivalent
ADJUSTED = ("p_f", "p_brown_forsythe", "p_training", "p", "p_equivalence", "p_boschloo")
_PRINTED_NAMES = {
    "gpt2": "gpt2",
    "mistral": "mistral",
    "qwen2": "qwen",
    "ensemble": "ensemble",
    "judge-a": "gemini-1.5-flash",
    "judge-b": "gemini-2.0-flash",
    "judge-c": "deepseek-v3",
}
PRINTED_ROWS = {"-".join(row): "-".join(_PRINTED_NAMES[part] for part in row) for row in ROWS}


def conditions_of(run: Condition) -> str:
    """Return in words under which protocol and penalty regime a run was made."""
    further = {
        f"1 to {run.highest}": run.highest != RANGES[0],
        "Table 4's widths": run.widths != "rescaled",
        f"disagreement on {run.disagreement}": run.disagreement != "none",
        f"stack {run.repeat + 1}": run.repeat > 0,
        f"world {run.world}": run.world > 0,
        "placebo": run.objective == PLACEBO,
    }
    regime = run.regime.replace("_", " ").replace("kl", "KL")
    return ", ".join([f"{run.protocol} source", regime, *(text for text, said in further.items() if said)])


def table(
    comparisons: Comparisons,
    runs: Sequence[Condition],
    measured: Callable[[Comparisons, Condition], dict[str, Any]],
) -> pd.DataFrame:
    """Return a row for each run; `..._holm` are p-values adjusted over the seven main rows.

    Args:
        comparisons: of the results.
        runs: variance-aware ones.
        measured: `variances`, `means` or `risks`: columns of a run beside its vanilla one.
    """
    found = pd.DataFrame([_named(comparisons, run) | measured(comparisons, run) for run in runs])
    for name in (one for one in ADJUSTED if one in found):
        main = found.loc[found["main"], name]
        found[f"{name}_holm"] = pd.Series(holm(main), main.index) if len(main) else np.nan
    return found


def _named(comparisons: Comparisons, run: Condition) -> dict[str, Any]:
    policy, source = comparisons.labels.get(run.row, (run.architecture, run.source))
    return {
        "policy": policy,
        "reward_model": source,
        "row": run.row,
        "condition": conditions_of(run),
        "main": run in comparisons.main_rows,
    }


def variances(comparisons: Comparisons, run: Condition) -> dict[str, Any]:
    """Return Table 1's variances over policies and their ratios.

    `f` is the paper's ratio of total variances with the exact interval of normal returns, `p_f` of the F
    test, `p_brown_forsythe` and `p_permutation` of tests that need no normality. `training_...` is what
    is left without the noise of the evaluation (`returns.decomposition`), `ratio` its ratio with a
    bootstrap interval, `floored` the share of resamples where it did not stand out from the noise,
    `p_training` of the likelihood ratio test, for normal returns.
    """
    pair = vanilla, aware = [comparisons.returns(one) for one in (run.vanilla, run)]
    found: dict[str, Any] = {}
    for name, one in zip(("vanilla", "aware"), pair, strict=True):
        parts = decomposition(one)
        found |= parts["total"].columns(f"variance_{name}") | {f"noise_{name}": one.noise}
        found |= parts["training"].columns(f"training_{name}")
    totals = (vanilla.total, vanilla.values.size, aware.total, aware.values.size)
    ratio, tested = comparisons.ratio(run), f_test(*totals)
    permuted = permuted_variance_ratio(vanilla.values, aware.values, comparisons.resamples, comparisons.seed)
    return (
        found
        | variance_ratio(*totals).columns("f")
        | {"f_critical": tested.critical, "p_f": tested.p}
        | {"p_brown_forsythe": brown_forsythe([vanilla.values], [aware.values]), "p_permutation": permuted.p}
        | ratio.columns("ratio")
        | {"floored": ratio.floored, "p_training": training_variance_test(vanilla, aware).p}
        | _printed_ratio(comparisons, run).columns("f_printed")
    )


def _printed_ratio(comparisons: Comparisons, run: Condition) -> Estimate:
    """Return the paper's ratio for a row of Table 1 or 4 with the interval of 80 normal returns each."""
    if run in comparisons.main_rows:
        key = f"table1.{PRINTED_ROWS[run.row]}.variance_ratio_f"
    elif run.regime == "as_printed" and run.widths == "rescaled":
        key = f"table4.range-{run.highest}.variance_ratio_f"
    else:
        return NOTHING
    return variance_ratio(printed_value(key), recomputed.POLICIES, 1.0, recomputed.POLICIES)


def means(comparisons: Comparisons, run: Condition) -> dict[str, Any]:
    """Return Table 2's mean returns and Welch's test of their difference, variance-aware minus vanilla.

    `margin` is a tenth of what vanilla gains over the reference, as estimated, `p_equivalence` of two
    one-sided tests that the difference is smaller; `smallest_margin` from which on they would say so at
    5%. `gap` is the difference by pairs of policies that drew the same random numbers.
    """
    vanilla, aware, start = (comparisons.returns(one).values for one in (run.vanilla, run, run.start))
    first, second = _moments(aware), _moments(vanilla)
    tested, gain = welch(*first, *second), float(vanilla.mean() - start.mean())
    margin = MARGIN * gain
    return (
        {"mean_vanilla": float(vanilla.mean()), "mean_aware": float(aware.mean()), "t": abs(tested.statistic)}
        | {"t_critical": tested.critical, "degrees": tested.degrees, "p": tested.p}
        | mean_difference(*first, *second).columns("difference")
        | comparisons.gap(run).columns("gap")
        | {"gain_vanilla": gain, "margin": margin}
        | {"p_equivalence": equivalence(*first, *second, margin=margin).p if margin > 0 else 1.0}
        | {"smallest_margin": smallest_margin(*first, *second)}
    )


def _moments(values: np.ndarray) -> tuple[float, float, int]:
    return float(values.mean()), float(values.var(ddof=1)), values.size


def risks(comparisons: Comparisons, run: Condition) -> dict[str, Any]:
    """Return Table 3's shares of policies at or below the reference's mean return, taken as known.

    `count_...` are policies, `p` of the paper's one-sided z test, `p_boschloo` exact, `risk_difference`
    vanilla's risk minus the variance-aware one's with Newcombe's interval.
    """
    panel = comparisons.panel(run)
    bar = float(panel["reference"][comparisons.outcome].mean())
    vanilla, aware = (
        (int((panel[name][comparisons.outcome] <= bar).sum()), len(panel[name])) for name in METHODS
    )
    return (
        {"risk_aware": aware[0] / aware[1], "risk_vanilla": vanilla[0] / vanilla[1]}
        | {"count_aware": aware[0], "count_vanilla": vanilla[0], "policies": vanilla[1]}
        | {"p": two_proportions(*vanilla, *aware).p, "p_boschloo": boschloo(*vanilla, *aware)}
        | proportion_difference(*vanilla, *aware).columns("risk_difference")
        | {"reference": bar}
        | _printed_difference(comparisons, run).columns("risk_difference_printed")
    )


def _printed_difference(comparisons: Comparisons, run: Condition) -> Estimate:
    """Return the paper's difference in risk for a row of Table 3, from the nearest counts of 80."""
    if run not in comparisons.main_rows:
        return NOTHING
    return recomputed.risk_difference(PRINTED_ROWS[run.row])


def mean_risk_difference(table: pd.DataFrame) -> Estimate:
    """Return the mean over Table 3's main rows of vanilla's risk minus the variance-aware one's."""
    columns = table.loc[
        table["main"], ["risk_difference", "risk_difference_low", "risk_difference_high", "policies"]
    ]
    return mean_of(
        [Estimate(value, low, high, 2 * count) for value, low, high, count in columns.itertuples(index=False)]
    )


def ranges(
    comparisons: Comparisons, runs: Sequence[Condition], world: World | None, seed: int
) -> pd.DataFrame:
    """Return Table 4: `variances` by range of reward, with that of the intervals' standard deviations.

    Args:
        comparisons: of the results.
        runs: variance-aware ones of one judge in several ranges.
        world: that a simulated judge knows; None for another judge, whose intervals are not asked for.
        seed: of the texts that the intervals are asked for.
    """
    found = table(comparisons, runs, variances).assign(range=[run.highest for run in runs])
    if world is None:
        return found.assign(variance_of_deviations=np.nan)
    spreads = {
        widths: interval_deviations(world, runs[0].source, widths, seed)
        for widths in dict.fromkeys(run.widths for run in runs)
    }
    deviations = [float((spreads[run.widths][run.highest] * (run.highest - 1)).var(ddof=1)) for run in runs]
    return found.assign(variance_of_deviations=deviations)


# --- further measures of risk ---------------------------------------------------------------------------


def further_risks(comparisons: Comparisons, runs: Sequence[Condition]) -> pd.DataFrame:
    """Return `returns.risk_table` of every comparison: a row for each run, method and measure."""
    found = {}
    for run in runs:
        vanilla, aware, bar = _returns(comparisons, run)
        stacks = {"vanilla": (vanilla, bar), "variance_aware": (aware, bar)}
        found[run.row, conditions_of(run)] = risk_table(stacks, comparisons.resamples, comparisons.seed)
    joined = pd.concat(found, names=["row", "condition", None]).droplevel(-1).reset_index()
    return joined.rename(columns={"stack": "method"})


def pooled_difference(
    comparisons: Comparisons, runs: Sequence[Condition], measure: str = "cvar_10"
) -> Estimate:
    """Estimate the mean over stacks of a measure of risk, variance-aware minus vanilla (BCa).

    Policies are drawn again in each stack on its own, together for both methods; the reference's mean is
    taken as known.
    """
    stacks, place = [_returns(comparisons, run) for run in runs], RISK_MEASURES.index(measure)

    def difference(*drawn: np.ndarray) -> np.ndarray:
        found = [
            risk_measures(aware[rows.astype(int)], bar)[place]
            - risk_measures(vanilla[rows.astype(int)], bar)[place]
            for rows, (vanilla, aware, bar) in zip(drawn, stacks, strict=True)
        ]
        return np.mean(found, axis=0)

    policies = [np.arange(vanilla.size) for vanilla, *_ in stacks]
    ends = bca(policies, difference, resamples=comparisons.resamples, seed=comparisons.seed)
    value, low, high = (float(end) for end in ends)
    return Estimate(value, low, high, sum(one.size for one in policies))


def _returns(comparisons: Comparisons, run: Condition) -> list[np.ndarray]:
    """Return the returns of both methods and the reference's evaluations."""
    panel = comparisons.panel(run)
    return [panel[name][comparisons.outcome].to_numpy() for name in (*METHODS, "reference")]


# --- as text ------------------------------------------------------------------------------------------


def _text(table: pd.DataFrame, name: str) -> list[str]:
    return table[name].to_list()


def _number(table: pd.DataFrame, name: str, digits: int = 3) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.{digits}g}" for value in table[name]]


def _interval(table: pd.DataFrame, name: str) -> list[str]:
    ends = table[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
    return [f"{value:.3g} [{low:.2g}, {high:.2g}]" for value, low, high in ends]


def _marked(table: pd.DataFrame, name: str) -> list[str]:
    """Return ratios with intervals, in brackets where the noise does not let them be measured."""
    unclear = table["floored"] >= Ratio.FLOORED
    return [f"({text})" if one else text for text, one in zip(_interval(table, name), unclear, strict=True)]


def _adjusted(table: pd.DataFrame, name: str) -> list[str]:
    """Return p-values, with the adjusted ones of the main rows in brackets."""
    pairs = table[[name, f"{name}_holm"]].itertuples(index=False)
    return [f"{p:.2g}" if np.isnan(holm_p) else f"{p:.2g} ({holm_p:.2g})" for p, holm_p in pairs]


def _range(table: pd.DataFrame, name: str) -> list[str]:
    return [f"[1, {top}]" for top in table[name]]


_short, _long = partial(_number, digits=2), partial(_number, digits=4)
_HEADS = (
    ("policy", "policy", _text),
    ("reward model", "reward_model", _text),
    ("condition", "condition", _text),
)
COLUMNS: dict[int, tuple[tuple[str, str, Callable[[pd.DataFrame, str], list[str]]], ...]] = {
    1: (
        *_HEADS,
        ("vanilla σ₁²", "variance_vanilla", _number),
        ("variance-aware σ₂²", "variance_aware", _number),
        ("F = σ₁²/σ₂²", "f", _interval),
        ("F critical", "f_critical", _number),
        ("p (F, Holm)", "p_f", _adjusted),
        ("training variance ratio", "ratio", _marked),
        ("p (training, Holm)", "p_training", _adjusted),
        ("paper's F", "f_printed", _number),
    ),
    2: (
        *_HEADS,
        ("vanilla μ₁", "mean_vanilla", _long),
        ("variance-aware μ₂", "mean_aware", _long),
        ("t", "t", _number),
        ("t critical", "t_critical", _long),
        ("μ₂ - μ₁", "difference", _interval),
        ("by pairs", "gap", _interval),
        ("p (Holm)", "p", _adjusted),
        ("margin", "margin", _number),
        ("p (equivalent, Holm)", "p_equivalence", _adjusted),
    ),
    3: (
        *_HEADS,
        ("variance-aware risk p̂₂", "risk_aware", _short),
        ("vanilla risk p̂₁", "risk_vanilla", _short),
        ("p (z test)", "p", _short),
        ("p (Boschloo)", "p_boschloo", _short),
        ("p̂₁ - p̂₂", "risk_difference", _interval),
        ("paper's p̂₁ - p̂₂", "risk_difference_printed", _short),
    ),
    4: (
        ("reward range", "range", _range),
        ("condition", "condition", _text),
        ("variance of the SDs", "variance_of_deviations", _number),
        ("vanilla σ₁²", "variance_vanilla", _number),
        ("variance-aware σ₂²", "variance_aware", _number),
        ("σ₁²/σ₂²", "f", _interval),
        ("training variance ratio", "ratio", _marked),
        ("paper's ratio", "f_printed", _number),
    ),
}


def layout(number: int, table: pd.DataFrame) -> pd.DataFrame:
    """Return one of Tables 1 to 4 as text, with what was added to the paper's columns after them."""
    return pd.DataFrame({heading: text(table, name) for heading, name, text in COLUMNS[number]})
