"""The simulations of notebook 02: what the theorems say against what their policies do.

Of plain numbers and a seed they make tidy tables; estimates are R-hat ~ N(r*, Sigma) (Assumption 2.1).
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize
from statsmodels.stats.proportion import proportion_confint

from vaalign_lib.jobs import progress
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, paired_variance_ratio
from vaalign_lib.theory import bounds, tabular
from vaalign_lib.theory.tabular import PolicyOf, QuadraticForm

SPREAD = 0.7  # standard deviation of the logarithm of the variances in random problems
POLICIES = ("vanilla", "variance-aware")
RISKS = (bounds.vanilla_risk, bounds.variance_aware_risk)


def draw_estimates(true_rewards: Array, variances: Array, draws: int, rng: np.random.Generator) -> Array:
    """Return R-hat ~ N(r*, Sigma): (draws, ..., arms) for (..., arms)."""
    noise = rng.standard_normal((draws, *np.broadcast_shapes(true_rewards.shape, variances.shape)))
    return true_rewards + np.sqrt(variances) * noise


def trust_region_pair(
    estimates: Array, variances: Array, reference: Array, epsilon: float, form: QuadraticForm
) -> tuple[Array, Array]:
    """Return the policies of Equations (2) and (3) at the radii of Theorem 2.4."""
    radius = tabular.matched_epsilon(variances, epsilon)
    vanilla = tabular.trust_region_policy(estimates, reference, epsilon, form=form)
    return vanilla, tabular.trust_region_policy(estimates, reference, radius, variances=variances, form=form)


def lower_bound_probabilities(
    arms: Sequence[int], betas: Sequence[float], signals: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Simulate the probability of Theorem 2.2's inequality at r* = signal * sigma on every arm.

    Return a row per (arms, signal, beta): the probability, an interval so wide that all of them and
    those of `lower_bound_instances` hold together with 95% (Bonferroni), and the four bounds.
    """
    cells, events = [], []
    for count in arms:
        noise = np.random.default_rng([seed, count]).standard_normal((draws, count))
        for signal, beta in product(signals, betas):
            truth = np.full(count, float(signal))
            cells.append({"arms": count, "beta": beta, "signal": signal})
            events.append(bounds.lower_bound_event(truth + noise, truth, np.ones(count), beta).sum())
    return _with_bounds(cells, np.array(events), draws)


def lower_bound_instances(instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Simulate Theorem 2.2's probability on random r* (dense and sparse), Sigma and beta, a row each."""
    rng, cells, events = np.random.default_rng(seed), [], []
    for _ in range(instances):
        arms = int(rng.integers(1, 21))
        variances = rng.lognormal(0, 1, arms)
        sparse = rng.random(arms) < rng.choice([0.3, 1.0])
        truth = rng.normal(0, 10 ** rng.uniform(-1, 1), arms) * np.sqrt(variances) * sparse
        cells.append({"arms": arms, "beta": rng.uniform(0.2, 1.6 * np.sqrt(arms))})
        estimates = draw_estimates(truth, variances, draws, rng)
        events.append(bounds.lower_bound_event(estimates, truth, variances, cells[-1]["beta"]).sum())
    return _with_bounds(cells, np.array(events), draws)


def _with_bounds(cells: list[dict[str, Any]], events: Array, draws: int) -> pd.DataFrame:
    """Add to arms and beta the probability, its interval at 2.5% over all cells, and the bounds."""
    low, high = proportion_confint(events, draws, alpha=0.025 / len(cells), method="beta")
    table = pd.DataFrame(cells).assign(probability=events / draws, low=low, high=high)
    arms, beta = table["arms"], table["beta"]
    table = table.assign(printed=bounds.printed_bound(arms, beta), proof=bounds.proof_bound(arms, beta))
    return table.assign(sharp_lower=bounds.lower_bound(arms, beta), sharp_upper=bounds.upper_bound(beta))


def risk_formulas(instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Compare the risk formulas of Theorem 2.4 with simulated policies on random problems.

    Return a row per instance, form and policy: the formula, the simulated risk, and its z-score.
    """
    rng, rows = np.random.default_rng(seed), []
    for instance in range(instances):
        arms = int(rng.integers(2, 9))
        truth, variances = rng.normal(0, 1, arms), rng.lognormal(0, 1, arms)
        reference, epsilon = rng.dirichlet(np.ones(arms)), 10 ** rng.uniform(-2, 1)
        estimates = draw_estimates(truth, variances, draws, rng)
        for form in bounds.RISK_FORMS:
            pair = trust_region_pair(estimates, variances, reference, epsilon, form)
            for name, risk, policy in zip(POLICIES, RISKS, pair, strict=True):
                simulated = (policy @ truth <= reference @ truth).mean()
                rows.append((instance, form, name, float(risk(truth, variances, form)), simulated))
    table = pd.DataFrame(rows, columns=["instance", "form", "policy", "formula", "simulated"])
    formula = table["formula"]
    error = np.sqrt(np.maximum(formula * (1 - formula), 1 / draws) / draws)
    return table.assign(z=(table["simulated"] - formula) / error)


def simplex_search(arms: int, instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Search random problems over distributions for violations of Theorem 2.4's inequality.

    Half of the references are uniform. Epsilon runs from where no probability can reach zero, over
    `bounds.interior_epsilon`, to where the whole simplex is within reach. Return a row per instance: the
    problem, both risks, their paired difference (variance-aware less vanilla) in standard errors, and
    whether epsilon is interior.
    """
    rng, rows = np.random.default_rng(seed), []
    for _ in progress(range(instances), f"Theorem 2.4 with {arms} arms", instances):
        uniform = rng.random() < 0.5
        reference = np.full(arms, 1 / arms) if uniform else rng.dirichlet(np.ones(arms))
        truth = rng.normal(0, 1, arms)
        variances = rng.lognormal(rng.normal(), rng.uniform(0.2, 1.5), arms)
        interior = float(bounds.interior_epsilon(reference))
        epsilon = interior * 10 ** rng.uniform(-0.5, np.log10(2 / interior))
        estimates = draw_estimates(truth, variances, draws, rng)
        policies = trust_region_pair(estimates, variances, reference, epsilon, "simplex")
        worse = [(policy @ truth <= reference @ truth).astype(float) for policy in policies]
        paired = worse[1] - worse[0]
        error = max(paired.std(ddof=1), 1 / np.sqrt(draws)) / np.sqrt(draws)
        arrays = {"true_rewards": truth, "variances": variances, "reference": reference}
        rows.append(
            {name: array.tolist() for name, array in arrays.items()}
            | {"epsilon": epsilon, "interior": epsilon <= interior, "uniform_reference": uniform}
            | {"vanilla_risk": worse[0].mean(), "variance_aware_risk": worse[1].mean()}
            | {"difference": paired.mean(), "z": paired.mean() / error}
        )
    return pd.DataFrame(rows)


def tail_counterexample(noises: Sequence[float], level: float, draws: int, seed: int) -> pd.DataFrame:
    """Simulate what Theorem 2.4 does not hold for: CVaR and expected loss, of two arms with r* = (1, 0).

    The first arm's variance is 1, the second's each of `noises`. Both policies lose when the first
    estimate is negative, so their risks are equal; vanilla's step, of the same length, then goes into the
    second arm, where nothing is lost. Return a row per noise and policy: risk, CVaR, expected loss, the
    worst loss that was seen.
    """
    rng, rows = np.random.default_rng(seed), []
    truth, reference = np.array([1.0, 0.0]), np.full(2, 0.5)
    for noise in noises:
        variances = np.array([1.0, noise])
        estimates = draw_estimates(truth, variances, draws, rng)
        pair = trust_region_pair(estimates, variances, reference, 1.0, "free")
        for name, policy in zip(POLICIES, pair, strict=True):
            rows.append({"noise": noise, "policy": name} | _tails((policy - reference) @ truth, level))
    return pd.DataFrame(rows)


def tail_search(instances: int, level: float, draws: int, seed: int) -> pd.DataFrame:
    """Compare CVaR, expected and worst loss of both policies on random problems (form free).

    At the `radii` of Theorem 2.4, and of linear steps at `equal gain` (`bounds.normal_tails`). Return a row
    per instance and steps, `value` variance-aware less vanilla, for the two losses vanilla less
    variance-aware: above 0 where the theorem extends; `_z`: in standard errors, from ten batches of draws.
    """
    rng, rows = np.random.default_rng(seed), []
    for instance in progress(range(instances), "Theorem 2.4, tails", instances):
        arms = int(rng.integers(2, 9))
        truth, variances = rng.normal(0, 1, arms), rng.lognormal(0, 1, arms)
        estimates, reference = draw_estimates(truth, variances, draws, rng), np.full(arms, 1 / arms)
        pair = trust_region_pair(estimates, variances, reference, 1.0, "free")
        steps = {
            "radii": [(policy - reference) @ truth for policy in pair],
            "equal gain": [
                estimates @ truth / (truth**2).sum(),
                estimates @ (truth / variances) / (truth**2 / variances).sum(),
            ],
        }
        for name, gains in steps.items():
            parts = [[_tails(one, level) for one in np.split(gain, 10)] for gain in gains]
            row: dict[str, Any] = {"instance": instance, "steps": name}
            for column, sign in (("cvar", 1), ("loss", -1), ("worst_loss", -1)):
                first, second = (np.array([one[column] for one in part]) for part in parts)
                apart = sign * (second - first)
                row[column] = apart.mean()
                row[f"{column}_z"] = apart.mean() / max(apart.std(ddof=1) / np.sqrt(10), 1e-12)
            rows.append(row)
    return pd.DataFrame(rows)


def _tails(gains: Array, level: float) -> dict[str, float]:
    """Return risk, CVaR at a level, expected and worst loss of gains (draws,)."""
    worst = np.sort(gains)[: max(1, round(level * gains.size))]
    loss = np.maximum(-gains, 0)
    names = "risk", "cvar", "loss", "worst_loss"
    found = (gains <= 0).mean(), worst.mean(), loss.mean(), loss.max()
    return {name: float(one) for name, one in zip(names, found, strict=True)}


def noise_levels(
    arms: int, instances: int, epsilons: Sequence[float], levels: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Trade mean gain against risk over distributions: Remark 2.5.

    Problems: r* ~ N(0, 1), variances lognormal with mean 1 times level^2, uniform reference. Both
    policies are followed over the same radii, from hardly a step to greedy, so that any pair of points
    can be compared: at the same radius, step length, gain or risk. Return a row per (level, epsilon,
    policy, instance): mean gain over the reference, risk, and the step, the mean squared distance
    ||pi - pi_0||^2 over all instances.
    """
    return _sweep((arms, instances, draws, seed), levels, lambda *problem: epsilons)


def equal_step(
    arms: int, instances: int, step: float, levels: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Compare both policies on the problems of `noise_levels` at the same mean ||pi - pi_0||^2.

    The radius of either policy is solved for, once per level for all problems and draws. Return a row
    per level and instance: gain and risk of both policies, and vanilla's less the other's.
    """
    table = _sweep((arms, instances, draws, seed), levels, lambda *problem: [radius_of_step(step, *problem)])
    wide = table.pivot(index=["level", "instance"], columns="policy", values=["gain", "risk"])
    wide.columns = [f"{policy} {column}" for column, policy in wide.columns]
    for column in ("gain", "risk"):
        wide[f"{column}_difference"] = wide[f"vanilla {column}"] - wide[f"variance-aware {column}"]
    return wide.reset_index()


def _sweep(
    problems: tuple[int, int, int, int], levels: Sequence[float], radii: Callable[..., Sequence[float]]
) -> pd.DataFrame:
    """Follow both policies over noise levels and the radii of (estimates, reference, variances)."""
    arms, instances, *_ = problems
    truth, variances, noise = _problems(*problems)
    reference, parts = np.full(arms, 1 / arms), []
    cells = list(product(levels, zip(POLICIES, (np.ones(arms), variances), strict=True)))
    for level, (name, shape) in progress(cells, "Remark 2.5", len(cells)):
        estimates = truth + level * noise  # (draws, instances, arms)
        for epsilon in radii(estimates, reference, shape):
            policy = tabular.trust_region_policy(estimates, reference, epsilon, variances=shape)
            gain = tabular.expected_reward(policy - reference, truth)  # (draws, instances)
            cell = {"level": level, "epsilon": epsilon, "policy": name, "instance": np.arange(instances)}
            cell |= {"step": _step(policy, reference), "gain": gain.mean(0), "risk": (gain <= 0).mean(0)}
            parts.append(pd.DataFrame(cell))
    return pd.concat(parts, ignore_index=True)


def _problems(arms: int, instances: int, draws: int, seed: int) -> tuple[Array, Array, Array]:
    """Return r* and Sigma of random problems, (instances, arms), and noise (draws, instances, arms)."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 1, (instances, arms))
    variances = rng.lognormal(-0.5 * SPREAD**2, SPREAD, (instances, arms))
    return truth, variances, np.sqrt(variances) * rng.standard_normal((draws, instances, arms))


def radius_of_step(step: float, estimates: Array, reference: Array, variances: Array) -> float:
    """Return the epsilon at which the trust-region policies' mean ||pi - pi_0||^2 is the step."""

    def excess(log_epsilon: float) -> float:
        epsilon = np.exp(log_epsilon)
        policy = tabular.trust_region_policy(estimates, reference, epsilon, variances=variances)
        return _step(policy, reference) - step

    return float(np.exp(brentq(excess, np.log(1e-4 * step), np.log(1e4 * step), xtol=1e-5)))


def _step(policy: Array, reference: Array) -> float:
    return float(((policy - reference) ** 2).sum(-1).mean())


def crossing_level(paired: pd.DataFrame, seed: int) -> Estimate:
    """Estimate the noise level up to which vanilla gains more, from the table of `equal_step`.

    The interval is the bootstrap's over the problems; NaN ends where a resample has no crossing.
    """
    table = paired.pivot(index="level", columns="instance", values="gain_difference")
    levels, differences = table.index.to_numpy(dtype=float), table.to_numpy()
    count = differences.shape[1]
    chosen = np.random.default_rng(seed).integers(0, count, (1000, count))
    resampled = zero_crossing(levels, np.take(differences, chosen, axis=1).mean(-1))
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    return Estimate(float(zero_crossing(levels, differences.mean(1))), low, high, count)


def zero_crossing(levels: Array, differences: Array) -> Array:
    """Return where differences (levels, ...) first fall through zero, interpolated; NaN if never."""
    before, after = differences[:-1], differences[1:]
    falls = (before > 0) & (after <= 0)
    share = np.divide(before, before - after, out=np.zeros_like(before), where=falls)  # (levels - 1, ...)
    x = levels.reshape(-1, *[1] * (differences.ndim - 1))
    places = np.take_along_axis(x[:-1] + (x[1:] - x[:-1]) * share, falls.argmax(0)[None], 0)[0]
    return np.where(falls.any(0), places, np.nan)


def best_on_printed_path(estimates: Array, variances: Array, reference: Array, epsilon: float) -> Array:
    """Return the printed policy with the highest E[R-hat] that meets E[sigma^2 ln(pi / pi_0)] <= epsilon.

    All of its path is searched, beta from 1e-3 to 1e4 times the problem's scale. Shapes: (arms,).
    """
    scale = max(np.ptp(estimates), np.abs(estimates).max(), 1e-12) / variances.mean()
    path = tabular.printed_policy(estimates, variances, reference, scale * np.geomspace(1e-3, 1e4, 4001))
    path = np.vstack([path, reference])  # the limit of large beta
    feasible = tabular.weighted_kl(path, reference, variances) <= epsilon  # (betas,)
    return path[np.where(feasible, path @ estimates, -np.inf).argmax()]


def at_constraint(
    policy_of: PolicyOf, estimates: Array, variances: Array, reference: Array, epsilon: float
) -> Array:
    """Return a policy of one problem, (arms,), at the beta where E[sigma^2 ln(pi / pi_0)] is epsilon."""
    problem = estimates[None, None], variances, reference
    return tabular.constrained_policy(*problem, epsilon, policy_of=policy_of)[0][0, 0]


def optimum_by_slsqp(estimates: Array, variances: Array, reference: Array, epsilon: float) -> Array:
    """Solve the problem of Theorem 2.7 by scipy's general solver, which knows no closed form. (arms,)."""

    def slack(policy: Array) -> Array:
        return epsilon - tabular.weighted_kl(policy, reference, variances)

    return minimize(
        lambda policy: -policy @ estimates,
        reference,
        jac=lambda policy: -estimates,
        bounds=[(1e-12, 1)] * estimates.size,
        constraints=[{"type": "eq", "fun": lambda policy: policy.sum() - 1}, {"type": "ineq", "fun": slack}],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x


def printed_policy_gap(instances: int, shifts: Sequence[float], epsilon: float, seed: int) -> pd.DataFrame:
    """Measure what the printed policy of Theorem 2.7 loses at the same constraint value.

    Random problems of 3 to 6 arms with uniform reference; every one is seen at every shift of its
    rewards by a constant, which changes neither the problem nor its optimum. Return a row per instance and
    shift: gains of the optimum and of the printed path, and the share lost.
    """
    rng, rows = np.random.default_rng(seed), []
    for instance in progress(range(instances), "Theorem 2.7, gap", instances):
        arms = int(rng.integers(3, 7))
        estimates, variances = rng.normal(0, 1, arms), rng.lognormal(0, 0.8, arms)
        reference = np.full(arms, 1 / arms)
        optimum = at_constraint(tabular.exact_policy, estimates, variances, reference, epsilon)
        best = optimum @ estimates - reference @ estimates
        for shift in shifts:
            path = best_on_printed_path(estimates + shift, variances, reference, epsilon)
            rows.append((instance, shift, best, path @ estimates - reference @ estimates))
    table = pd.DataFrame(rows, columns=["instance", "shift", "optimal_gain", "printed_gain"])
    return table.assign(share_lost=1 - table["printed_gain"] / table["optimal_gain"])


def trust_region_gains(
    true_rewards: Array, variances: Array, draws: int, rng: np.random.Generator, form: QuadraticForm
) -> tuple[Array, Array]:
    """Return the gains (pi - pi_0)' r* of Equations (2) and (3) at epsilon 1, each (draws,).

    Both scale with sqrt(epsilon), so ratios of variances do not depend on it.
    """
    estimates = draw_estimates(true_rewards, variances, draws, rng)
    reference = np.full(true_rewards.size, 1 / true_rewards.size)
    vanilla, aware = trust_region_pair(estimates, variances, reference, 1.0, form)
    return (vanilla - reference) @ true_rewards, (aware - reference) @ true_rewards


def variance_ratios(
    arms: Sequence[int],
    signals: Sequence[float],
    ranges: Sequence[Sequence[float]],
    settings: int,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Draw random settings of Figure 4 and measure the ratio of the two policies' return variances.

    Variances are uniform on the range, true rewards N(0, signal^2), probabilities sum to one. Return a row
    per setting: the ratio Var(vanilla) / Var(variance-aware) with its interval, and the same after the
    variance-aware step was scaled to the vanilla policy's mean gain.
    """
    rows, cells = [], list(product(arms, signals, range(settings)))
    for count, signal, setting in progress(cells, "Figure 4, settings", len(cells)):
        rng = np.random.default_rng([seed, count, int(1000 * signal), setting])
        truth, uniform = rng.normal(0, signal, count), rng.random(count)
        for low, high in ranges:
            gains = trust_region_gains(truth, low + (high - low) * uniform, draws, rng, "sum_to_one")
            ratio = paired_variance_ratio(*gains)
            rows.append(
                {"arms": count, "signal": signal, "setting": setting, "range": f"({low:g}, {high:g})"}
                | ratio.columns("ratio")
                | {"equal_gain_ratio": ratio.value * (gains[1].mean() / gains[0].mean()) ** 2}
            )
    return pd.DataFrame(rows)


def families(aversion: float) -> dict[str, PolicyOf]:
    """Return the policies that are compared at matched KL, each with its free beta."""
    return {
        "vanilla": lambda estimates, variances, reference, beta: tabular.softmax_policy(
            estimates, reference, beta
        ),
        "PPO fixed point": tabular.ppo_fixed_point,
        "GRPO fixed point": tabular.grpo_fixed_point,
        "true optimum": tabular.exact_policy,
        "as printed": tabular.printed_policy,
        "mean minus variance": partial(tabular.mean_minus_variance_policy, aversion=aversion),
    }


def beta_at_mean_kl(
    policy_of: PolicyOf, estimates: Array, variances: Array, reference: Array, target: float
) -> float:
    """Return the largest beta at which the mean KL(pi || pi_0) over the batch is the target; NaN if none.

    From strong to weak penalties the KL need not start at 0: the optimum of the weighted penalty does
    not tend to the reference, and a pessimistic reward moves the policy by itself. So a coarse grid on
    a few draws finds where to look. Shapes: estimates (draws, instances, arms).
    """

    def excess(log_beta: float, draws: Array) -> float:
        policy = policy_of(draws, variances, reference, np.exp(log_beta))
        return float(tabular.weighted_kl(policy, reference).mean()) - target

    pilot, width = estimates[:10], 0.5
    for log_beta in np.arange(np.log(1e3), np.log(1e-3), -width):
        if excess(log_beta - width, pilot) > 0:
            ends = log_beta + width, log_beta - 2 * width
            if excess(ends[0], estimates) > 0 or excess(ends[1], estimates) < 0:
                return float("nan")
            return float(np.exp(brentq(excess, *ends, args=(estimates,), xtol=1e-4)))
    return float("nan")


def matched_kl(
    arms: int, instances: int, levels: Sequence[float], target: float, aversion: float, draws: int, seed: int
) -> pd.DataFrame:
    """Compare policies at the same mean KL to the reference, over noise levels.

    Problems are those of `noise_levels`. The beta of every policy is set once per level, for all problems
    and draws together, as a trainer would. Return a row per (level, policy, instance), without policies that
    cannot reach that KL: beta, KL, mean gain, its standard deviation and risk over draws.
    """
    truth, variances, noise = _problems(arms, instances, draws, seed)
    reference, parts = np.full(arms, 1 / arms), []
    for level in progress(levels, "matched KL", len(levels)):
        problem = truth + level * noise, level**2 * variances, reference
        for name, policy_of in families(aversion).items():
            beta = beta_at_mean_kl(policy_of, *problem, target)
            if np.isnan(beta):
                continue
            policy = policy_of(*problem, beta)  # (draws, instances, arms)
            gain = tabular.expected_reward(policy, truth) - truth.mean(-1)  # (draws, instances)
            cell: dict[str, Any] = {"level": level, "policy": name, "instance": np.arange(instances)}
            cell |= {"beta": beta, "kl": tabular.weighted_kl(policy, reference).mean(0), "gain": gain.mean(0)}
            cell |= {"deviation": gain.std(0, ddof=1), "risk": (gain <= 0).mean(0)}
            parts.append(pd.DataFrame(cell))
    return pd.concat(parts, ignore_index=True)


def relative_to_vanilla(comparison: pd.DataFrame) -> pd.DataFrame:
    """Compare every policy of `matched_kl` with vanilla on the same problem.

    Return a row per level, policy (but vanilla) and instance: differences of gain and risk, and
    log_variance, the logarithm of the ratio of the variances of the return.
    """
    table = comparison.assign(log_variance=2 * np.log(comparison["deviation"]))
    table = table.set_index(["level", "policy", "instance"])[["gain", "log_variance", "risk"]]
    vanilla = table.xs("vanilla", level="policy")
    return (table.drop("vanilla", level="policy") - vanilla).reset_index()


def summarize(table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return the mean of every column per group, with its interval over the rows of the group."""
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True))
        for column in columns:
            row |= mean(group[column]).columns(column)
        rows.append(row)
    return pd.DataFrame(rows)
