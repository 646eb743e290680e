"""Tables 1 to 4 of the paper from results of policies, with the tests that they need.

Each `table_n` returns numbers, a row for every variance-aware run beside its vanilla one; `layout_n` the
same as text, in the paper's columns with intervals added; `sentence_n` what it shows, in words.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.comparisons import (
    MEASURE,
    Comparisons,
    in_words,
    interval_deviations,
    returns_of,
)
from vaalign_lib.experiments.conditions import METHODS, ROWS, Condition
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

LEVEL = 0.05
NOTHING = Estimate(np.nan, np.nan, np.nan, 0)  # where the paper prints nothing
MARGIN = 0.1  # of what vanilla gains over the reference: means closer than that count as equivalent
_PRINTED_POLICIES = {"gpt2": "gpt2", "mistral": "mistral", "qwen2": "qwen"}
_PRINTED_SOURCES = {
    "ensemble": "ensemble",
    "judge-a": "gemini-1.5-flash",
    "judge-b": "gemini-2.0-flash",
    "judge-c": "deepseek-v3",
}
PRINTED_ROWS = {
    f"{policy}-{source}": f"{_PRINTED_POLICIES[policy]}-{_PRINTED_SOURCES[source]}" for policy, source in ROWS
}


def condition(run: Condition) -> str:
    """Return in words under which protocol and penalty regime a run was made."""
    parts = [f"{run.protocol} source", run.regime.replace("_", " ").replace("kl", "KL")]
    if run.highest != RANGES[0]:
        parts.append(f"1 to {run.highest}")
    if run.widths != "rescaled":
        parts.append("Table 4's widths")
    if run.disagreement != "none":
        parts.append(f"disagreement on {run.disagreement}")
    if run.repeat:
        parts.append(f"stack {run.repeat + 1}")
    return ", ".join(parts)


def _named(comparisons: Comparisons, run: Condition) -> dict[str, object]:
    policy, source = comparisons.labels.get(run.row, (run.architecture, run.source))
    return {
        "policy": policy,
        "reward_model": source,
        "row": run.row,
        "condition": condition(run),
        "main": run in comparisons.main_rows,
    }


def _table(
    comparisons: Comparisons,
    runs: Sequence[Condition],
    line: Callable[[Condition], Mapping[str, object]],
    p_values: Sequence[str],
) -> pd.DataFrame:
    """Return a row for each run; p-values are adjusted over the seven main ones."""
    table = pd.DataFrame([_named(comparisons, run) | dict(line(run)) for run in runs])
    for name in p_values:
        table[f"{name}_holm"] = np.nan
        if table["main"].any():
            table.loc[table["main"], f"{name}_holm"] = holm(table.loc[table["main"], name])
    return table


def _interval(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


# --- Table 1: variances -------------------------------------------------------------------------------


def table_1(comparisons: Comparisons, runs: Sequence[Condition]) -> pd.DataFrame:
    """Return the variances over policies and their ratios.

    `f` is the paper's ratio of total variances with the exact interval of normal returns, `p_f` of the F
    test, `p_brown_forsythe` and `p_permutation` of tests that need no normality. `training_...` is what
    is left without the noise of the evaluation (`returns.decomposition`), `ratio` its ratio with a
    bootstrap interval, `floored` the share of resamples where it did not stand out from the noise,
    `p_training` of the likelihood ratio test, for normal returns. `..._holm` is adjusted over the seven
    main rows.
    """
    p_values = ["p_f", "p_brown_forsythe", "p_training"]
    return _table(comparisons, runs, lambda run: _variances(comparisons, run), p_values)


def _variances(comparisons: Comparisons, run: Condition) -> Mapping[str, object]:
    pair = [returns_of(comparisons.policies, one) for one in (run.vanilla, run)]
    totals = [(one.total, one.values.size) for one in pair]
    ratio, tested = comparisons.ratio(run), f_test(*totals[0], *totals[1])
    values = [one.values for one in pair]
    line: dict[str, object] = {}
    for name, one in zip(("vanilla", "aware"), pair, strict=True):
        parts = decomposition(one)
        line |= _interval(f"variance_{name}", parts["total"]) | {f"noise_{name}": one.noise}
        line |= _interval(f"training_{name}", parts["training"])
    permuted = permuted_variance_ratio(values[0], values[1], comparisons.resamples, comparisons.seed)
    return (
        line
        | _interval("f", variance_ratio(*totals[0], *totals[1]))
        | {"f_critical": tested.critical, "p_f": tested.p}
        | {"p_brown_forsythe": brown_forsythe(values[:1], values[1:]), "p_permutation": permuted.p}
        | _interval("ratio", ratio)
        | {"floored": ratio.floored, "p_training": training_variance_test(*pair).p}
        | _interval("f_printed", _printed_ratio(comparisons, run))
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


def layout_1(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 1 as text, with what was added to the paper's columns after them."""
    return pd.DataFrame(
        _heads(table)
        | {
            "vanilla σ₁²": _numbers(table["variance_vanilla"]),
            "variance-aware σ₂²": _numbers(table["variance_aware"]),
            "F = σ₁²/σ₂²": _intervals(table, "f"),
            "F critical": _numbers(table["f_critical"]),
            "p (F, Holm)": _adjusted(table, "p_f"),
            "training variance ratio": _intervals(table, "ratio", table["floored"]),
            "p (training, Holm)": _adjusted(table, "p_training"),
            "paper's F": _numbers(table["f_printed"]),
        }
    )


def sentence_1(table: pd.DataFrame, pooled: Ratio) -> str:
    """Return what Table 1's seven rows show."""
    rows = table[table["main"]]
    lower, higher = (
        int(((rows["p_training_holm"] < LEVEL) & (side > 0)).sum())
        for side in (rows["ratio"] - 1, 1 - rows["ratio"])
    )
    above = int((rows["f"] > rows["f_critical"]).sum())
    unclear = int((rows["floored"] >= Ratio.FLOORED).sum())
    return (
        f"Over the {len(rows)} rows the training variance is {_pooled_in_words(pooled)}. F exceeds "
        f"its critical value {rows['f_critical'].iloc[0]:.2f} in {above} of {len(rows)} rows "
        f"(paper: all seven); the test of the training variances, adjusted over the rows, finds it "
        f"lower in {lower} and higher in {higher}. In {unclear} rows the noise of the evaluation "
        "is too large to tell."
    )


def _pooled_in_words(pooled: Ratio) -> str:
    """Return what a mean over rows says; its `floored` is that of the noisiest row."""
    return in_words(pooled).replace("resamples a", "resamples of the noisiest row a")


# --- Table 2: means -----------------------------------------------------------------------------------


def table_2(comparisons: Comparisons, runs: Sequence[Condition]) -> pd.DataFrame:
    """Return the mean returns and Welch's test of their difference, variance-aware minus vanilla.

    `margin` is a tenth of what vanilla gains over the reference, as estimated, `p_equivalence` of two
    one-sided tests that the difference is smaller; `smallest_margin` from which on they would say so at
    5%. `gap` is the difference by pairs of policies that drew the same random numbers.
    """
    return _table(comparisons, runs, lambda run: _means(comparisons, run), ["p", "p_equivalence"])


def _means(comparisons: Comparisons, run: Condition) -> Mapping[str, object]:
    pair = [returns_of(comparisons.policies, one).values for one in (run.vanilla, run)]
    start = returns_of(comparisons.policies, run.start).values.mean()
    aware, vanilla = ((float(one.mean()), float(one.var(ddof=1)), one.size) for one in reversed(pair))
    tested = welch(*aware, *vanilla)
    gain = float(vanilla[0] - start)
    margin = MARGIN * gain
    by_pairs = comparisons.gap(run)
    return (
        {"mean_vanilla": vanilla[0], "mean_aware": aware[0], "t": abs(tested.statistic)}
        | {"t_critical": tested.critical, "degrees": tested.degrees, "p": tested.p}
        | _interval("difference", mean_difference(*aware, *vanilla))
        | _interval("gap", by_pairs)
        | {"gain_vanilla": gain, "margin": margin}
        | {"p_equivalence": equivalence(*aware, *vanilla, margin=margin).p if margin > 0 else 1.0}
        | {"smallest_margin": smallest_margin(*aware, *vanilla)}
    )


def layout_2(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 2 as text, with what was added to the paper's columns after them."""
    return pd.DataFrame(
        _heads(table)
        | {
            "vanilla μ₁": _numbers(table["mean_vanilla"], 4),
            "variance-aware μ₂": _numbers(table["mean_aware"], 4),
            "t": _numbers(table["t"]),
            "t critical": _numbers(table["t_critical"], 4),
            "μ₂ - μ₁": _intervals(table, "difference"),
            "by pairs": _intervals(table, "gap"),
            "p (Holm)": _adjusted(table, "p"),
            "margin": _numbers(table["margin"]),
            "p (equivalent, Holm)": _adjusted(table, "p_equivalence"),
        }
    )


def sentence_2(table: pd.DataFrame) -> str:
    """Return what Table 2's seven rows show."""
    rows = table[table["main"]]
    apart = rows[rows["t"] > rows["t_critical"]]
    lower = int((apart["difference"] < 0).sum())
    alike, adjusted = (int((rows[name] < LEVEL).sum()) for name in ("p_equivalence", "p_equivalence_holm"))
    return (
        f"Welch's t exceeds its critical value in {len(apart)} of {len(rows)} rows (paper: none); in "
        f"{lower} of these the variance-aware mean is the lower one. In {alike} rows "
        f"({adjusted} adjusted by Holm) the two means are shown to be equivalent, to within "
        f"{MARGIN:.0%} of what vanilla gains over the reference."
    )


# --- Table 3: risks -----------------------------------------------------------------------------------


def table_3(comparisons: Comparisons, runs: Sequence[Condition]) -> pd.DataFrame:
    """Return the shares of policies at or below the reference's mean return.

    `count_...` are policies, `p` of the paper's one-sided z test, `p_boschloo` exact, `fall` vanilla's
    risk minus the variance-aware one's with Newcombe's interval. The reference's mean is taken as known.
    """
    printed = recomputed.risk_tests().set_index("row")
    p_values = ["p", "p_boschloo"]
    return _table(comparisons, runs, lambda run: _risks(comparisons, run, printed), p_values)


def _risks(comparisons: Comparisons, run: Condition, printed: pd.DataFrame) -> Mapping[str, object]:
    pair = comparisons.panel(run)
    bar = pair["reference"][MEASURE].mean()
    vanilla, aware = ((int((pair[name][MEASURE] <= bar).sum()), len(pair[name])) for name in METHODS)
    return (
        {"risk_aware": aware[0] / aware[1], "risk_vanilla": vanilla[0] / vanilla[1]}
        | {"count_aware": aware[0], "count_vanilla": vanilla[0], "policies": vanilla[1]}
        | {"p": two_proportions(*vanilla, *aware).p, "p_boschloo": boschloo(*vanilla, *aware)}
        | _interval("fall", proportion_difference(*vanilla, *aware))
        | {"reference": float(bar)}
        | _interval("fall_printed", _printed_fall(comparisons, run, printed))
    )


def _printed_fall(comparisons: Comparisons, run: Condition, printed: pd.DataFrame) -> Estimate:
    """Return the paper's difference in risk for a row of Table 3, from the nearest counts of 80."""
    if run not in comparisons.main_rows:
        return NOTHING
    line = printed.loc[PRINTED_ROWS[run.row]]
    return Estimate(float(line["fall"]), float(line["low"]), float(line["high"]), 2 * recomputed.POLICIES)


def mean_fall(table: pd.DataFrame) -> Estimate:
    """Return the mean over Table 3's main rows of vanilla's risk minus the variance-aware one's."""
    rows = table[table["main"]]
    falls = [
        Estimate(line["fall"], line["fall_low"], line["fall_high"], 2 * line["policies"])
        for line in rows.to_dict("records")
    ]
    return mean_of(falls)


def layout_3(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 3 as text, with what was added to the paper's columns after them."""
    return pd.DataFrame(
        _heads(table)
        | {
            "variance-aware risk p̂₂": _numbers(table["risk_aware"], 2),
            "vanilla risk p̂₁": _numbers(table["risk_vanilla"], 2),
            "p (z test)": _numbers(table["p"], 2),
            "p (Boschloo)": _numbers(table["p_boschloo"], 2),
            "p̂₁ - p̂₂": _intervals(table, "fall"),
            "paper's p̂₁ - p̂₂": _numbers(table["fall_printed"], 2),
        }
    )


def sentence_3(table: pd.DataFrame) -> str:
    """Return what Table 3 shows, in its seven rows and elsewhere."""
    rows, fall = table[table["main"]], mean_fall(table)
    seen = int((rows["p_boschloo_holm"] < LEVEL).sum())
    nothing = int(((rows["count_aware"] == 0) & (rows["count_vanilla"] == 0)).sum())
    text = (
        f"Boschloo's test, adjusted over the rows, finds a lower risk in {seen} of {len(rows)} rows "
        f"(paper: all seven); the mean difference is {fall.value:.3f} ({fall.low:.3f} to "
        f"{fall.high:.3f}). In {nothing} rows no policy of either method is at or below the reference, "
        "so there is no risk to lower."
    )
    sides = {"lower": table["fall_low"] > 0, "higher": table["fall_high"] < 0}
    for side, chosen in sides.items():
        named = [
            f"{line['row']}, {line['condition']} ({line['risk_vanilla']:.2g} to {line['risk_aware']:.2g})"
            for line in table[chosen].to_dict("records")
        ]
        if named:
            text += f" By unadjusted intervals it is {side} in {'; '.join(named)}."
    return text


# --- further measures of risk ---------------------------------------------------------------------------


def further_risks(comparisons: Comparisons, runs: Sequence[Condition]) -> pd.DataFrame:
    """Return `returns.risk_table` of every comparison: a row for each run, method and measure."""
    tables = []
    for run in runs:
        pair = comparisons.panel(run)
        bar = pair["reference"][MEASURE].to_numpy()
        stacks = {name: (pair[name][MEASURE].to_numpy(), bar) for name in METHODS}
        found = risk_table(stacks, comparisons.resamples, comparisons.seed)
        named = {name: value for name, value in _named(comparisons, run).items() if name != "main"}
        tables.append(found.rename(columns={"stack": "method"}).assign(**named))
    table = pd.concat(tables, ignore_index=True)
    return table[["row", "condition", "method", "measure", "value", "low", "high"]]


def pooled_difference(
    comparisons: Comparisons, runs: Sequence[Condition], measure: str = "cvar_10"
) -> Estimate:
    """Estimate the mean over stacks of a measure of risk, variance-aware minus vanilla (BCa).

    Policies are drawn again in each stack on its own, together for both methods; the reference's mean is
    taken as known.
    """
    stacks = []
    for run in runs:
        pair = comparisons.panel(run)
        parts = (pair[name][MEASURE].to_numpy() for name in (*METHODS, "reference"))
        stacks.append(tuple(parts))
    place = RISK_MEASURES.index(measure)

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


# --- Table 4: ranges ----------------------------------------------------------------------------------


def table_4(
    comparisons: Comparisons, runs: Sequence[Condition], world: World | None, seed: int
) -> pd.DataFrame:
    """Return `table_1` by range of reward, with the variance of the intervals' standard deviations.

    Args:
        comparisons: of the results.
        runs: variance-aware ones of one judge in several ranges.
        world: that a simulated judge knows; None for another judge, whose intervals are not asked for.
        seed: of the texts that the intervals are asked for.
    """
    found = table_1(comparisons, runs).assign(range=[run.highest for run in runs])
    if world is None:
        return found.assign(variance_of_deviations=np.nan)
    spreads = {
        widths: interval_deviations(world, runs[0].source, widths, seed)
        for widths in dict.fromkeys(run.widths for run in runs)
    }
    deviations = [float((spreads[run.widths][run.highest] * (run.highest - 1)).var(ddof=1)) for run in runs]
    return found.assign(variance_of_deviations=deviations)


def layout_4(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 4 as text, with what was added to the paper's columns after them."""
    return pd.DataFrame(
        {
            "reward range": [f"[1, {top}]" for top in table["range"]],
            "condition": table["condition"].to_list(),
            "variance of the SDs": _numbers(table["variance_of_deviations"]),
            "vanilla σ₁²": _numbers(table["variance_vanilla"]),
            "variance-aware σ₂²": _numbers(table["variance_aware"]),
            "σ₁²/σ₂²": _intervals(table, "f"),
            "training variance ratio": _intervals(table, "ratio", table["floored"]),
            "paper's ratio": _numbers(table["f_printed"]),
        }
    )


def sentence_4(table: pd.DataFrame, slope: Estimate) -> str:
    """Return what Table 4 shows."""
    rows = table.drop_duplicates("range")
    ratios = ", ".join(f"{line['ratio']:.2f} (R = {line['range']})" for line in rows.to_dict("records"))
    trend = "a falling benefit" if slope.low > 0 else "a rising one"
    if slope.low <= 0 <= slope.high:
        trend = "no trend that stands out from the noise"
    return (
        f"Ratios of the training variances with the printed coefficients: {ratios}. As the range "
        f"narrows they show {trend} (slope on the logarithm of R {slope.value:.2f}, {slope.low:.2f} to "
        f"{slope.high:.2f}; the paper's printed ratios fall)."
    )


# --- as text ------------------------------------------------------------------------------------------


def _heads(table: pd.DataFrame) -> dict[str, list[str]]:
    return {name.replace("_", " "): table[name].to_list() for name in ("policy", "reward_model", "condition")}


def _numbers(column: pd.Series, digits: int = 3) -> list[str]:
    return ["" if np.isnan(value) else f"{value:.{digits}g}" for value in column]


def _intervals(table: pd.DataFrame, name: str, floored: pd.Series | None = None) -> list[str]:
    """Return values with intervals; those that the noise does not let measure are marked."""
    ends = zip(table[name], table[f"{name}_low"], table[f"{name}_high"], strict=True)
    texts = [f"{value:.3g} [{low:.2g}, {high:.2g}]" for value, low, high in ends]
    if floored is None:
        return texts
    marked = zip(texts, floored >= Ratio.FLOORED, strict=True)
    return [f"({text})" if unclear else text for text, unclear in marked]


def _adjusted(table: pd.DataFrame, name: str) -> list[str]:
    """Return p-values, with the adjusted ones of the main rows in brackets."""
    pairs = zip(table[name], table[f"{name}_holm"], strict=True)
    return [f"{p:.2g}" if np.isnan(holm_p) else f"{p:.2g} ({holm_p:.2g})" for p, holm_p in pairs]
