"""Tables of notebook 04: each variance-aware stack beside the vanilla one that it is compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
import pandas as pd

from vaalign_lib.policy_study import JUDGES, PRIMARY, RANGES, Run, stretch_of
from vaalign_lib.ppo import Unit
from vaalign_lib.rewards.base import Interval
from vaalign_lib.rewards.simulated import stand_ins
from vaalign_lib.statistics import (
    Estimate,
    Returns,
    brown_forsythe,
    holm,
    mean,
    risk,
    training_variance_ratio,
)
from vaalign_lib.synthetic.world import World

MEASURE = "true_reward"  # what the paper's tables are about


class MissingRunError(KeyError):
    """A comparison needs a run that is not among the results."""

    def __str__(self) -> str:
        return str(self.args[0])


def policies_of(results: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Return the policies of one run, by their index.

    Raises:
        MissingRunError: the results hold none.
    """
    chosen = results[results["run"] == run.name]
    if chosen.empty:
        raise MissingRunError(f"no results of the run {run.name}")
    return chosen.sort_values("policy").reset_index(drop=True)


def returns_of(results: pd.DataFrame, run: Run, measure: str = MEASURE) -> Returns:
    """Return the policies' returns with their standard errors."""
    table = policies_of(results, run)
    return Returns(table[measure].to_numpy(), table[f"{measure}_error"].to_numpy())


def compared(results: pd.DataFrame) -> list[Run]:
    """Return the variance-aware runs among the results, in their order."""
    fields = list(asdict(Run("", "")))
    rows = results.loc[results["objective"] == "variance_aware", fields].drop_duplicates()
    return [Run(**row) for row in rows.to_dict("records")]


def ratio_of(
    results: pd.DataFrame, runs: Sequence[Run], random: np.random.Generator, measure: str = MEASURE
) -> Estimate:
    """Estimate the ratio of the training variances, vanilla over variance-aware, pooled over runs."""
    return training_variance_ratio(
        [returns_of(results, run.vanilla, measure) for run in runs],
        [returns_of(results, run, measure) for run in runs],
        random,
    )


def comparison_table(
    results: pd.DataFrame, runs: Sequence[Run], random: np.random.Generator
) -> pd.DataFrame:
    """Return a row for each variance-aware run beside its vanilla one.

    Means, risks and variances are of the true reward in its own unit; `gap` is by how much the
    variance-aware mean is higher, with its 95% interval; `noise` is the evaluation's part of a variance,
    `training` the rest; `ratio` is that of the training variances with its 95% interval, `f` that of the
    totals as in the paper; `p` is by Brown and Forsythe, `p_holm` adjusted over the rows. `kl` is in
    nats, `step` the root mean square movement of a weight, `length` in tokens.
    """
    rows = [_comparison(results, run, random) for run in runs]
    table = pd.DataFrame(rows)
    table["p_holm"] = holm(table["p"])
    return table


def _comparison(results: pd.DataFrame, run: Run, random: np.random.Generator) -> dict[str, object]:
    bar = policies_of(results, run.start)[MEASURE].to_numpy()
    ratio = ratio_of(results, [run], random)
    row: dict[str, object] = {
        "row": run.row,
        "protocol": run.protocol,
        "regime": run.regime,
        "repeat": run.repeat,
        "range": run.highest if run.source != "ensemble" else 0,
        "widths": run.widths,
        "disagreement": run.disagreement,
        "reference": float(bar.mean()),
    }
    for name, one in (("vanilla", run.vanilla), ("aware", run)):
        table, returns = policies_of(results, one), returns_of(results, one)
        below = risk(returns.values, bar)
        row |= {
            f"mean_{name}": float(returns.values.mean()),
            f"variance_{name}": returns.total,
            f"noise_{name}": returns.noise,
            f"training_{name}": returns.training,
            f"risk_{name}": below.value,
            f"risk_{name}_low": below.low,
            f"risk_{name}_high": below.high,
            f"kl_{name}": float(table["kl"].mean()),
            f"step_{name}": float(table["step_length"].mean()),
            f"length_{name}": float(table["length"].mean()),
            f"gold_{name}": float(table["gold"].mean()),
        }
    values = [returns_of(results, one).values for one in (run.vanilla, run)]
    gap = mean(values[1] - values[0])  # the same policy index draws the same numbers in both
    return row | {
        "gap": gap.value,
        "gap_low": gap.low,
        "gap_high": gap.high,
        "f": float(values[0].var(ddof=1) / values[1].var(ddof=1)),
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "p": brown_forsythe(values[:1], values[1:]),
    }


def primary_endpoint(
    results: pd.DataFrame, random: np.random.Generator
) -> tuple[Estimate, float, int]:
    """Return the logarithm of the pooled ratio with its interval, Brown and Forsythe's p, and how many
    whole stacks of each method that rests on.
    """
    known = set(results["run"])
    runs = [run for run in PRIMARY if {run.name, run.vanilla.name} <= known]
    ratio = ratio_of(results, runs, random)
    ends = np.log([ratio.value, ratio.low, ratio.high])
    sides = [
        [returns_of(results, one).values for one in side]
        for side in ([run.vanilla for run in runs], runs)
    ]
    found = Estimate(float(ends[0]), float(ends[1]), float(ends[2]), ratio.count)
    return found, brown_forsythe(*sides), len(runs)


def mean_ratio(results: pd.DataFrame, runs: Sequence[Run], random: np.random.Generator) -> Estimate:
    """Estimate the geometric mean over rows of the ratios of training variances.

    The rows' errors are independent; that of each logarithm is taken from its interval.
    """
    ratios = [ratio_of(results, [run], random) for run in runs]
    logs = np.log([one.value for one in ratios])
    errors = np.array([np.log(one.high / one.low) / 2 for one in ratios])
    half = np.sqrt((errors**2).sum()) / len(runs)
    value, low, high = (float(np.exp(logs.mean() + shift)) for shift in (0, -half, half))
    return Estimate(value, low, high, sum(one.count for one in ratios))


def range_slope(
    results: pd.DataFrame, runs: Sequence[Run], random: np.random.Generator
) -> Estimate:
    """Estimate the slope of the ratio's logarithm on that of the range, by weighted least squares."""
    ratios = [ratio_of(results, [run], random) for run in runs]
    x = np.log([run.highest for run in runs])
    y = np.log([one.value for one in ratios])
    errors = np.array([np.log(one.high / one.low) / 2 for one in ratios])
    weights = errors**-2.0
    centred = x - np.average(x, weights=weights)
    slope = float((weights * centred * y).sum() / (weights * centred**2).sum())
    half = float((weights * centred**2).sum() ** -0.5)
    return Estimate(slope, slope - half, slope + half, len(runs))


def risk_difference(
    results: pd.DataFrame, runs: Sequence[Run], random: np.random.Generator, resamples: int = 4000
) -> Estimate:
    """Estimate the mean over runs of the risk's fall, vanilla minus variance-aware.

    Policies and the reference's evaluations are drawn again, those of a pair of methods together.
    """
    falls, count = [], 0
    for run in runs:
        bar = policies_of(results, run.start)[MEASURE].to_numpy()
        pair = [returns_of(results, one).values for one in (run.vanilla, run)]
        rows = random.integers(pair[0].size, size=(resamples + 1, pair[0].size))
        bars = bar[random.integers(bar.size, size=(resamples + 1, bar.size))].mean(axis=1)
        rows[0], bars[0] = np.arange(pair[0].size), bar.mean()
        risks = [(one[rows] <= bars[:, None]).mean(axis=1) for one in pair]
        falls.append(risks[0] - risks[1])
        count += pair[0].size
    average = np.mean(falls, axis=0)
    low, high = np.quantile(average[1:], (0.025, 0.975))
    return Estimate(float(average[0]), float(low), float(high), count)


def interval_deviations(
    world: World, source: str, widths: Literal["rescaled", "printed"], seed: int, texts: int = 2000
) -> dict[int, np.ndarray]:
    """Return the standard deviations of a judge's intervals in each range, as shares of R - 1 (texts,).

    Args:
        world: that the judge knows.
        source: one of `policy_study.JUDGES`.
        widths: see `policy_study.Run`.
        seed: of the texts.
        texts: prompts with responses.
    """
    found = {}
    for top, judgement in judged_in_ranges(world, source, widths, seed, texts).items():
        found[top] = np.sqrt(judgement.variance()) / (top - 1)
    return found


def judged_in_ranges(
    world: World, source: str, widths: Literal["rescaled", "printed"], seed: int, texts: int = 2000
) -> dict[int, Interval]:
    """Return what a judge says of the same texts in each range; see `interval_deviations`."""
    asked, answers = world.corpus(texts, np.random.default_rng(seed))
    found = {}
    for top in RANGES:
        stretch = stretch_of(Run("", source, highest=top, widths=widths))
        judge = stand_ins(world, float(top), stretch)[JUDGES[source]]
        found[top] = judge.judge(asked, answers, np.zeros(texts, dtype=int))
    return found


def standardized_gap(judgements: Mapping[int, Interval]) -> float:
    """Return by how much standardized rewards or variances differ between ranges, at most.

    Equal ones train the same policies at equal mean penalty.
    """
    units = []
    for judgement in judgements.values():
        rewards, variances = judgement.midpoint(), judgement.variance()
        unit = Unit.of(rewards, variances)
        units.append([(rewards - unit.location) / unit.scale, variances / unit.variance])
    return float(max(np.abs(np.subtract(one, units[0])).max() for one in units))


def over_ranges(table: pd.DataFrame, ranges: Sequence[int]) -> pd.DataFrame:
    """Complete the comparisons of one judge's ranges by those that are the same policies.

    At equal mean penalty rescaled intervals train the same policies in every range, and the widths of
    Table 4 are relative to those of the widest range.

    Args:
        table: of `comparison_table`.
        ranges: upper ends, the widest first.
    """
    even = (table["regime"] == "equal_mean_penalty") & (table["widths"] == "rescaled")
    widest = table["range"] == ranges[0]
    copies = [table[even & widest].assign(range=top) for top in ranges[1:]]
    for regime in table.loc[table["widths"] == "printed", "regime"].unique():
        copies.append(table[(table["regime"] == regime) & widest].assign(widths="printed"))
    return pd.concat([table, *copies], ignore_index=True)


def in_words(ratio: Estimate) -> str:
    """Return what a ratio of training variances, vanilla over variance-aware, says."""
    if ratio.low > 1:
        found = "lower by the variance-aware method"
    elif ratio.high < 1:
        found = "higher by the variance-aware method"
    else:
        found = "not shown to differ"
    return f"{found} (ratio {ratio.value:.2f}, 95% interval {ratio.low:.2f} to {ratio.high:.2f})"
