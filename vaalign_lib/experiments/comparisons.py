"""Tables of notebook 04: each variance-aware stack beside the vanilla one that it is compared with."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.stats import ttest_1samp

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import JUDGES, METHODS, ROWS, Condition, Regime, stretch_of
from vaalign_lib.papers.printed import RANGES
from vaalign_lib.rewards.base import Interval, Unit
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.statistics.returns import Ratio, Returns, risk, training_variance_ratio
from vaalign_lib.statistics.tests import (
    CONFIDENCE,
    Estimate,
    brown_forsythe,
    paired_brown_forsythe,
    percentiles,
)

Outcome = Literal["gold", "true_reward"]
OF_A_RUN = [field.name for field in fields(Condition)]


class MissingRunError(KeyError):
    """A comparison needs a run that is not among the results."""

    def __str__(self) -> str:
        return str(self.args[0])


def policies_of(results: pd.DataFrame, run: Condition) -> pd.DataFrame:
    """Return the policies of one run, by their index.

    Raises:
        MissingRunError: the results hold none.
    """
    chosen = results[results["run"] == run.name]
    if chosen.empty:
        raise MissingRunError(f"no results of the run {run.name}")
    return chosen.sort_values("policy").reset_index(drop=True)


def outcome_of(results: pd.DataFrame) -> Outcome:
    """Return what policies are compared by: gold where it is known of all, else the source's true reward."""
    return "gold" if "gold" in results and results["gold"].notna().all() else "true_reward"


def compared(results: pd.DataFrame) -> list[Condition]:
    """Return the variance-aware runs among the results whose vanilla one and reference are known as well."""
    rows = results.loc[results["objective"] == "variance_aware", OF_A_RUN].drop_duplicates()
    known, found = set(results["run"]), [Condition(**row) for row in rows.to_dict("records")]
    return [one for one in found if {one.vanilla.name, one.start.name} <= known]


def without_farthest(policies: pd.DataFrame, runs: Sequence[Condition], outcome: Outcome) -> pd.DataFrame:
    """Leave out the policy of each comparison, and its twin, that is farthest from its stack's median."""
    distances = (policies[outcome] - policies.groupby("run")[outcome].transform("median")).abs()
    left_out = pd.Series(False, policies.index)
    for run in runs:
        mine = policies["run"].isin([run.name, run.vanilla.name])
        left_out |= mine & (policies["policy"] == policies.loc[distances[mine].idxmax(), "policy"])
    return policies[~left_out]


class Comparisons:
    """Variance-aware stacks beside vanilla ones; an estimate is the same wherever it is shown.

    Intervals come from one bootstrap over policies. Policy j of a repeat draws the same random numbers in
    every stack, whatever its method or source, so policies are drawn again together in all of them.
    """

    def __init__(
        self,
        policies: pd.DataFrame,
        curves: pd.DataFrame | None = None,
        seed: int = 0,
        resamples: int = 10_000,
        regime: Regime = "equal_mean_penalty",
        outcome: Outcome | None = None,
        labels: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        """Take `policies` and `curves` of `results.Results`; curves give the last coefficients.

        The bootstrap has a seed and resamples; `regime` is that of the rows of Tables 1 to 3; policies are
        compared by an `outcome`, by default `outcome_of`; `labels` say by row what its policies and its
        source of rewards are.
        """
        self.outcome = outcome or outcome_of(policies)
        self.policies, self.seed, self.resamples = policies, seed, resamples
        self.labels = labels or {}
        self.main_rows = [Condition(*row, "variance_aware", regime=regime) for row in ROWS]
        last = pd.DataFrame() if curves is None else curves.groupby("run").last()
        self._coefficients = last["coefficient"].to_dict() if "coefficient" in last else {}

    def by(self, outcome: Outcome) -> "Comparisons":
        """Return the same comparisons by another outcome."""
        other = copy(self)
        other.outcome = outcome
        return other

    def returns(self, run: Condition) -> Returns:
        """Return the policies' mean outcomes with their standard errors."""
        table = policies_of(self.policies, run)
        return Returns(table[self.outcome].to_numpy(), table[f"{self.outcome}_error"].to_numpy())

    def rows(self, run: Condition) -> np.ndarray:
        """Return which policies are drawn again (resamples, policies), in every world and repeat its own."""
        size = len(policies_of(self.policies, run))
        random = np.random.default_rng([self.seed, run.repeat, run.world])
        return random.integers(size, size=(self.resamples, size))

    def panel(self, run: Condition) -> dict[str, pd.DataFrame]:
        """Return the policies of a comparison by method, and the reference's evaluations."""
        stacks = {"vanilla": run.vanilla, "variance_aware": run, "reference": run.start}
        return {name: policies_of(self.policies, one) for name, one in stacks.items()}

    def ratio(self, *runs: Condition) -> Ratio:
        """Estimate the ratio of training variances, vanilla over variance-aware, pooled over runs."""
        return training_variance_ratio(
            [self.returns(run.vanilla) for run in runs],
            [self.returns(run) for run in runs],
            [self.rows(run) for run in runs],
        )

    def mean_ratio(self, runs: Sequence[Condition]) -> Ratio:
        """Estimate the geometric mean over rows of the ratios of training variances; `floored` is the
        largest of the rows'.
        """
        ratios = [self.ratio(run) for run in runs]
        value = np.exp(np.mean([np.log(one.value) for one in ratios]))
        resampled = np.exp(np.mean([np.log(one.resampled) for one in ratios], axis=0))
        found = percentiles(value, resampled, sum(one.count for one in ratios))
        floored = max(one.floored for one in ratios)
        return Ratio(found.value, found.low, found.high, found.count, resampled, floored)

    def range_slope(self, runs: Sequence[Condition]) -> Estimate:
        """Estimate the slope of the ratio's logarithm on that of the range, by least squares weighted
        with the ratios' precisions.
        """
        ratios = [self.ratio(run) for run in runs]
        logs = np.log([one.resampled for one in ratios])
        weights = 1 / np.maximum(np.nanvar(logs, axis=1), 1e-12)  # twins that never parted: no variance
        x = np.log([run.highest for run in runs])
        centred = weights * (x - np.average(x, weights=weights))
        lever = centred / (centred * x).sum()
        value = lever @ np.log([one.value for one in ratios])
        return percentiles(value, lever @ logs, len(runs))

    def gap(self, run: Condition) -> Estimate:
        """Estimate the variance-aware mean minus vanilla's, by pairs of policies that drew the same
        random numbers.
        """
        pair = self.panel(run)
        vanilla, aware = (pair[name][self.outcome].to_numpy() for name in METHODS)
        low, high = ttest_1samp(aware - vanilla, 0).confidence_interval(CONFIDENCE)
        return Estimate(float((aware - vanilla).mean()), float(low), float(high), aware.size)

    def risk_difference(self, runs: Sequence[Condition]) -> Estimate:
        """Estimate the mean over runs of vanilla's risk minus the variance-aware one's.

        The reference's evaluations are drawn again as well.
        """
        differences, values, count = [], [], 0
        for run in runs:
            panel, rows = self.panel(run), self.rows(run)
            vanilla, aware, bar = (panel[name][self.outcome].to_numpy() for name in (*METHODS, "reference"))
            random = np.random.default_rng([self.seed, 10**6])
            bars = bar[random.integers(bar.size, size=(self.resamples, bar.size))].mean(axis=1)[:, None]
            differences.append((vanilla[rows] <= bars).mean(axis=1) - (aware[rows] <= bars).mean(axis=1))
            values.append((vanilla <= bar.mean()).mean() - (aware <= bar.mean()).mean())
            count += vanilla.size
        return percentiles(float(np.mean(values)), np.mean(differences, axis=0), count)

    def table(self, runs: Sequence[Condition]) -> pd.DataFrame:
        """Return a row for each variance-aware run beside its vanilla one.

        Means, risks and variances are of the outcome in its own unit; `..._midpoint` is by the source's true
        reward, for judges the middle of their interval. `noise` is the evaluation's part of a variance,
        `training` the rest; the reference's evaluations have only the first. `gap` is
        by how much the variance-aware mean is higher, with its 95% interval. `ratio` is that of the
        training variances with its 95% interval, `floored` the share of resamples in which one of them
        did not stand out from the noise, `f` the ratio of the totals as in the paper. `p` is by Brown and
        Forsythe, `p_paired` its paired version, both of totals. `kl` is in nats, `step` the root mean
        square movement of a weight, `length` in tokens, `coefficient` the last one of the penalty.
        """
        return pd.DataFrame([self._comparison(run) for run in runs])

    def _comparison(self, run: Condition) -> dict[str, Any]:
        start, ratio = self.returns(run.start), self.ratio(run)
        vanilla, aware = (self.returns(one).values for one in (run.vanilla, run))
        return (
            {
                "row": run.row,
                "protocol": run.protocol,
                "regime": run.regime,
                "repeat": run.repeat,
                "world": run.world,
                "method": run.objective,
                "range": run.highest if run.source != "ensemble" else 0,
                "widths": run.widths,
                "disagreement": run.disagreement,
                "reference": float(start.values.mean()),
                "variance_reference": start.total,
                "noise_reference": start.noise,
            }
            | self._stack(run.vanilla, "vanilla", start)
            | self._stack(run, "aware", start)
            | self.gap(run).columns("gap")
            | {"f": float(vanilla.var(ddof=1) / aware.var(ddof=1))}
            | ratio.columns("ratio")
            | self.by("true_reward").ratio(run).columns("ratio_midpoint")
            | {"floored": ratio.floored, "p": brown_forsythe([vanilla], [aware])}
            | {"p_paired": paired_brown_forsythe(vanilla, aware)}
        )

    def _stack(self, run: Condition, name: str, start: Returns) -> dict[str, float]:
        """Return what is known of one stack, in the columns of `table`."""
        table, returns = policies_of(self.policies, run), self.returns(run)
        below = risk(returns.values, start.values)
        found = {
            "mean": float(returns.values.mean()),
            "variance": returns.total,
            "noise": returns.noise,
            "training": returns.training,
            **below.columns("risk"),
            **dict(zip(("kl", "step", "length", "midpoint", "log_ratio"), _means(table), strict=True)),
            "coefficient": self._coefficients.get(run.name, np.nan),
        }
        return {f"{key}_{name}": value for key, value in found.items()}


def _means(table: pd.DataFrame) -> list[float]:
    return [float(table[one].mean()) for one in ("kl", "step_length", "length", "true_reward", "log_ratio")]


def brief(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns of `Comparisons.table` as text to read: one that both methods have becomes
    `vanilla → variance-aware`, one with an interval `value [low, high]`. Ratios in brackets, and their
    logarithms, are not determinable: a training variance does not stand out from the noise.
    """
    found = {}
    for name in columns:
        if f"{name}_vanilla" in table:
            pairs = zip(table[f"{name}_vanilla"], table[f"{name}_aware"], strict=True)
            found[name] = [f"{one:.3g} → {other:.3g}" for one, other in pairs]
        elif f"{name}_low" in table:
            ends = table[[name, f"{name}_low", f"{name}_high"]].astype(float).to_numpy()
            found[name] = [str(Estimate(value, low, high, 1)) for value, low, high in ends]
            if name in ("ratio", "log_ratio") and "floored" in table:
                unclear = table["floored"] >= Ratio.FLOORED
                found[name] = [
                    f"({text})" if one else text for text, one in zip(found[name], unclear, strict=True)
                ]
        elif table[name].dtype == float:
            found[name] = ["" if np.isnan(value) else f"{value:.2g}" for value in table[name]]
        else:
            found[name] = [str(value).replace("_", " ") for value in table[name]]
    return pd.DataFrame(found)


def in_words(ratio: Estimate) -> str:
    """Return what a ratio of training variances, vanilla over variance-aware, says."""
    value, low, high = ratio.texts()
    interval = f"(ratio {value}, 95% interval {low} to {high})"
    if isinstance(ratio, Ratio) and not ratio.measurable:
        return (
            f"not determinable {interval}: in {ratio.floored:.0%} of resamples a training "
            "variance does not stand out from the noise of the evaluation"
        )
    if ratio.low > 1:
        return f"lower with the variance-aware method {interval}"
    if ratio.high < 1:
        return f"higher with the variance-aware method {interval}"
    return f"not shown to differ {interval}"


Widths = Literal["rescaled", "printed"]  # see `conditions.Condition`


def judged_in_ranges(
    world: World, source: str, widths: Widths, seed: int, texts: int = 2000
) -> dict[int, Interval]:
    """Return what one of `conditions.JUDGES` says of the same texts in each range (texts,)."""
    asked, answers = world.corpus(texts, np.random.default_rng(seed))
    found = {}
    for top in RANGES:
        stretch = stretch_of(Condition("", source, highest=top, widths=widths))
        judge = stand_ins(world, float(top), stretch)[JUDGES[source]]
        found[top] = judge.judge(asked, answers, np.zeros(texts, dtype=int))
    return found


def interval_deviations(
    world: World, source: str, widths: Widths, seed: int, texts: int = 2000
) -> dict[int, np.ndarray]:
    """Return the standard deviations of a judge's intervals in each range, as shares of R - 1 (texts,)."""
    judged = judged_in_ranges(world, source, widths, seed, texts)
    return {top: np.sqrt(judgement.variance()) / (top - 1) for top, judgement in judged.items()}


def standardized_gap(judgements: Mapping[int, Interval]) -> float:
    """Return by how much standardized rewards or variances differ between ranges, at most.

    Equal ones train the same policies at equal mean penalty.
    """
    units = []
    for judgement in judgements.values():
        rewards, variances = judgement.midpoint(), judgement.variance()
        unit = Unit.of(rewards, variances)
        units.append([(rewards - unit.location) / unit.scale, variances / unit.variance])
    return float(np.abs(np.array(units) - units[0]).max())


def with_widest_range(table: pd.DataFrame) -> pd.DataFrame:
    """Begin the lines of Table 4's widths, in `Comparisons.table` of one judge in several ranges, at the
    widest range, which they are relative to.
    """
    regimes = table.loc[table["widths"] == "printed", "regime"]
    widest = (table["range"] == RANGES[0]) & (table["widths"] == "rescaled") & table["regime"].isin(regimes)
    return pd.concat([table, table[widest].assign(widths="printed")], ignore_index=True)
