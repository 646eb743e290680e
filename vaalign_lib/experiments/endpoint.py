"""What notebook 04's protocol asks (data/protocols/04.md): the primary endpoint over worlds, what makes
policies vary, what they write, and risk on the way.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd
from scipy.stats import pearsonr, rankdata

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.comparisons import Comparisons, policies_of
from vaalign_lib.experiments.conditions import JUDGE_ROW, JUDGES, METHODS, PLACEBO, WORLDS, Condition, group
from vaalign_lib.papers import printed
from vaalign_lib.rewards.placebo import Placebo
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.statistics.returns import Returns, training_resampled
from vaalign_lib.statistics.tests import Estimate, mean, percentiles, proportion


def stacks(comparisons: Comparisons) -> dict[int, dict[str, Condition]]:
    """Return the stacks of the primary endpoint by world and method, of worlds where all three are known."""
    known = set(comparisons.policies["run"])
    found: dict[int, dict[str, Condition]] = {}
    for one in group("primary"):
        of_world = found.setdefault(one.world, {"vanilla": one.vanilla})
        of_world[one.objective] = one
    wanted = {
        world: {one.name for one in runs.values()} | {runs["vanilla"].start.name}
        for world, runs in found.items()
    }
    return {world: runs for world, runs in found.items() if wanted[world] <= known}


def by_world(comparisons: Comparisons, rival: str = PLACEBO) -> pd.DataFrame:
    """Return a row for each world: of both methods the training variance V, the mean gain G over the
    reference and its standard error; `log_ratio`, ln[(V / G^2 of the rival) / (V / G^2 of variance-aware)],
    with the interval over this world's policies alone; `log_variances` without the gains; `difference` of
    the gains.
    """
    return pd.DataFrame(
        [
            {"world": world} | in_world(comparisons, runs[rival], runs["variance_aware"])
            for world, runs in stacks(comparisons).items()
        ]
    )


def in_world(comparisons: Comparisons, rival: Condition, aware: Condition) -> dict[str, float]:
    """Compare in one world; policy j of both methods hears judge j, so policies are drawn again together.

    Resamples in which one policy is all that was drawn have no variance; they are left out.
    """
    start = policies_of(comparisons.policies, aware.start)[comparisons.outcome]
    pair, rows = [comparisons.returns(one) for one in (rival, aware)], comparisons.rows(aware)
    found: dict[str, float] = {}
    values, logs = [], []
    for name, one in zip(("rival", "aware"), pair, strict=True):
        gain = one.values - start.mean()
        error = np.hypot(gain.std(ddof=1) / np.sqrt(gain.size), start.sem())
        found |= {
            f"variance_{name}": _training(one),
            f"gain_{name}": gain.mean(),
            f"gain_{name}_error": error,
        }
        values.append(np.log(_training(one) / gain.mean() ** 2))
        drawn = training_resampled(one, rows)
        logs.append(np.log(np.where(drawn > 0, drawn, np.nan) / gain[rows].mean(axis=1) ** 2))
    within = percentiles(values[0] - values[1], logs[0] - logs[1], rows.shape[1])
    variances = np.log(found["variance_rival"] / found["variance_aware"])
    difference = mean(pair[1].values - pair[0].values)
    return (
        found | within.columns("log_ratio") | {"log_variances": variances} | difference.columns("difference")
    )


def _training(returns: Returns) -> float:
    """Return the training variance, at least a hundredth of the total."""
    return max(returns.training, returns.total / 100)


@dataclass(frozen=True)
class OverWorlds(Estimate):
    """A mean over worlds; a ratio to gains is `measurable` if all are above 0 by two standard errors."""

    measurable: bool = True


def over_worlds(table: pd.DataFrame, column: str = "log_ratio") -> OverWorlds:
    """Return the mean over worlds with Student's interval over them, policies being nested in worlds."""
    if len(table) < 2:
        raise ValueError(f"table: expected two worlds or more for an interval over worlds, got {len(table)}")
    sure = all((table[f"gain_{name}"] > 2 * table[f"gain_{name}_error"]).all() for name in ("rival", "aware"))
    return OverWorlds(**vars(mean(table[column])), measurable=sure or column != "log_ratio")


def verdict(table: pd.DataFrame) -> str:
    """Return `met`, `not met` or `unclear` by the protocol's rule."""
    rule, found = printed.rule_of("primary.reliability"), over_worlds(table)
    finding = printed.Finding(
        rule=rule.id, reproduced="", low=found.low, high=found.high, clear=found.measurable
    )
    return {rule.met: "met", rule.not_met: "not met"}.get(printed.verdict(rule, finding), "unclear")


def made_by(comparisons: Comparisons) -> pd.DataFrame:
    """Return by world and method what the judge and what training makes of the variance.

    With one judge for all, whose answers are drawn anew, policies differ by their training and these draws;
    with a judge each also by the judge. Both methods have equal KL within a protocol, `kl_independent` and
    `kl_shared`. Intervals are over the policies of one world.
    """
    rows = []
    for world, name in product(range(WORLDS), METHODS):
        aware = Condition(*JUDGE_ROW, "variance_aware", regime="matched_kl", world=world)
        shared = aware if name == "variance_aware" else aware.vanilla
        pair = [replace(shared, protocol="independent"), shared]
        if not {one.name for one in pair} <= set(comparisons.policies["run"]):
            continue
        own, common = (comparisons.returns(one) for one in pair)
        kls = {
            f"kl_{one.protocol}": float(policies_of(comparisons.policies, one)["kl"].mean()) for one in pair
        }
        drawn = [training_resampled(one, comparisons.rows(shared)) for one in (own, common)]
        judge = percentiles(_training(own) - _training(common), drawn[0] - drawn[1], own.values.size)
        parts = {"judge": judge, "training": percentiles(_training(common), drawn[1], common.values.size)}
        rows += [
            {"world": world, "method": name, "made_by": part, **kls, **found.columns("variance")}
            for part, found in parts.items()
        ]
    return pd.DataFrame(rows)


def written(comparisons: Comparisons) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return policies of the primary endpoint with gold and the mean variance of what they write, and by
    world and method the correlation of the two.
    """
    found = []
    for world, runs in stacks(comparisons).items():
        for name, one in runs.items():
            policies = policies_of(comparisons.policies, one)[["policy", "gold", "variance"]]
            found.append(policies.assign(world=world, method=name))
    table = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["world", "method"])
    rows = []
    for (world, name), part in table.groupby(["world", "method"], sort=False):
        tested = pearsonr(part["variance"], part["gold"])
        ends = tested.confidence_interval(0.95)
        rows.append(
            {
                "world": world,
                "method": name,
                "correlation": tested.statistic,
                "low": ends.low,
                "high": ends.high,
            }
        )
    return table, pd.DataFrame(rows)


def known_by_weights(world: World, seed: int, prompts: int = 300, each: int = 10) -> dict[str, float]:
    """Return correlations within prompts, of ranks, of the placebo's weights and of the variance with
    gold and with the judges' shared bias, and of the two, over texts drawn for this.
    """
    judge = stand_ins(world)[JUDGES[JUDGE_ROW[1]]]
    random = world.rng("placebo's facts")
    asked = [prompt for prompt in world.prompts(prompts, random) for _ in range(each)]
    answers = world.responses(asked, random.beta(2, 2, len(asked)), random)
    judgement = Placebo(judge, world, seed).judge(asked, answers, np.zeros(len(asked), dtype=np.int64))
    gold = world.gold(asked, answers)
    values = [judgement.weight(), judgement.variance(), gold, world.consensus(asked, answers) - gold]
    scores = np.stack([rankdata(one) for one in values]).reshape(4, prompts, each)
    within = (scores - scores.mean(2, keepdims=True)).reshape(4, -1)
    found = np.corrcoef(within)
    return {
        "world": seed,
        "placebo and variance": found[0, 1],
        "placebo and gold": found[0, 2],
        "variance and gold": found[1, 2],
        "placebo and bias": found[0, 3],
        "variance and bias": found[1, 3],
    }


def on_the_way(looks: pd.DataFrame, comparisons: Comparisons) -> pd.DataFrame:
    """Return by method and step: the mean `kl`, `gain` in gold over the reference, the same in deviations
    over policies, and `risk`, the share of policies at or below the reference's mean, with Clopper and
    Pearson's interval.

    `looks` has the policies' evaluations by run and step; the last step is the end of training.
    """
    rows = []
    for name, one in stacks(comparisons).get(0, {}).items():
        bar = policies_of(comparisons.policies, one.start)[comparisons.outcome].mean()
        for step, part in looks[looks["run"] == one.name].groupby("step"):
            values = part[comparisons.outcome]
            below = proportion(values <= bar)
            gain = float(values.mean() - bar)
            found = {"method": name, "step": step, "kl": part["kl"].mean(), "gain": gain}
            rows.append(found | {"gain_in_sds": gain / values.std(ddof=1)} | below.columns("risk"))
    return pd.DataFrame(rows)
