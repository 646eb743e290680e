"""The simulations of notebook 02: what the theorems say against what their policies do.

Every function takes plain numbers and a seed and returns a tidy table, so that the run store can keep
it. Throughout, estimates are R-hat ~ N(r*, Sigma) as in Assumption 2.1.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from scipy.optimize import brentq, minimize

from vaalign_lib.jobs import progress
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, paired_variance_ratio, proportion
from vaalign_lib.theory import bounds, tabular
from vaalign_lib.theory.tabular import QuadraticForm

SPREAD = 0.7  # standard deviation of the logarithm of the variances in random problems


def draw_estimates(true_rewards: Array, variances: Array, draws: int, rng: np.random.Generator) -> Array:
    """Return R-hat ~ N(r*, Sigma): (draws, ..., arms) for (..., arms)."""
    noise = rng.standard_normal((draws, *np.broadcast_shapes(true_rewards.shape, variances.shape)))
    return true_rewards + np.sqrt(variances) * noise


def trust_region_pair(
    estimates: Array, variances: Array, reference: Array, epsilon: float, form: QuadraticForm
) -> tuple[Array, Array]:
    """Return the policies of Equations (2) and (3) at the radii of Theorem 2.4."""
    radius = tabular.matched_epsilon(variances, epsilon)
    return (
        tabular.trust_region_policy(estimates, reference, epsilon, form=form),
        tabular.trust_region_policy(estimates, reference, radius, variances=variances, form=form),
    )


# --- Theorem 2.2 ----------------------------------------------------------------------------------


def lower_bound_probabilities(
    arms: Sequence[int], betas: Sequence[float], signals: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Simulate the probability of Theorem 2.2's inequality at r* = signal * sigma on every arm.

    Returns:
        A row per (arms, beta, signal): the probability, an interval so wide that all of them and
        those of `lower_bound_instances` hold together with 95% (Bonferroni), and the four bounds.
    """
    confidence = 1 - 0.025 / (len(arms) * len(betas) * len(signals))
    rows = []
    for count in arms:
        noise = np.random.default_rng([seed, count]).standard_normal((draws, count))
        for signal in signals:
            for beta in betas:
                truth = np.full(count, float(signal))
                event = bounds.lower_bound_event(truth + noise, truth, np.ones(count), beta)
                estimate = proportion(event, confidence)
                rows.append(
                    {
                        "arms": count,
                        "beta": beta,
                        "signal": signal,
                        "probability": estimate.value,
                        "low": estimate.low,
                        "high": estimate.high,
                        "printed": float(bounds.printed_bound(count, beta)),
                        "proof": float(bounds.proof_bound(count, beta)),
                        "sharp_lower": float(bounds.lower_bound(count, beta)),
                        "sharp_upper": float(bounds.upper_bound(beta)),
                    }
                )
    return pd.DataFrame(rows)


def lower_bound_instances(instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Simulate Theorem 2.2's probability on random r* (dense and sparse), Sigma and beta.

    Returns:
        A row per instance: the probability, its interval (Bonferroni, as above), the sharp bounds.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(instances):
        arms = int(rng.integers(1, 21))
        variances = rng.lognormal(0, 1, arms)
        sparse = rng.random(arms) < rng.choice([0.3, 1.0])
        truth = rng.normal(0, 10 ** rng.uniform(-1, 1), arms) * np.sqrt(variances) * sparse
        beta = rng.uniform(0.2, 1.6 * np.sqrt(arms))
        estimates = draw_estimates(truth, variances, draws, rng)
        event = bounds.lower_bound_event(estimates, truth, variances, beta)
        estimate = proportion(event, 1 - 0.025 / instances)
        rows.append(
            {
                "arms": arms,
                "beta": beta,
                "probability": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "sharp_lower": float(bounds.lower_bound(arms, beta)),
                "sharp_upper": float(bounds.upper_bound(beta)),
            }
        )
    return pd.DataFrame(rows)


# --- Theorem 2.4 ----------------------------------------------------------------------------------


def risk_formulas(instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Compare the risk formulas of Theorem 2.4 with simulated policies on random problems.

    Returns:
        A row per instance, form and policy: the formula, the simulated risk, and its z-score.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for instance in range(instances):
        arms = int(rng.integers(2, 9))
        truth, variances = rng.normal(0, 1, arms), rng.lognormal(0, 1, arms)
        reference, epsilon = rng.dirichlet(np.ones(arms)), 10 ** rng.uniform(-2, 1)
        estimates = draw_estimates(truth, variances, draws, rng)
        for form in ("free", "sum_to_one"):
            policies = trust_region_pair(estimates, variances, reference, epsilon, form)
            formulas = (
                bounds.vanilla_risk(truth, variances, form),
                bounds.variance_aware_risk(truth, variances, form),
            )
            names = ("vanilla", "variance-aware")
            for name, policy, formula in zip(names, policies, formulas, strict=True):
                risk = float((policy @ truth <= reference @ truth).mean())
                error = np.sqrt(max(float(formula * (1 - formula)), 1 / draws) / draws)
                rows.append(
                    {
                        "instance": instance,
                        "form": form,
                        "policy": name,
                        "formula": float(formula),
                        "simulated": risk,
                        "z": (risk - float(formula)) / error,
                    }
                )
    return pd.DataFrame(rows)


def simplex_search(arms: int, instances: int, draws: int, seed: int) -> pd.DataFrame:
    """Search random problems over distributions for violations of Theorem 2.4's inequality.

    Half of the references are uniform. Epsilon runs from where no probability can reach zero, over
    `bounds.interior_epsilon`, to where the whole simplex is within reach.

    Returns:
        A row per instance: the problem, both risks, their paired difference (variance-aware less
        vanilla) in standard errors, and whether epsilon is interior.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in progress(range(instances), f"Theorem 2.4 with {arms} arms", instances):
        uniform = rng.random() < 0.5
        reference = np.full(arms, 1 / arms) if uniform else rng.dirichlet(np.ones(arms))
        truth = rng.normal(0, 1, arms)
        variances = rng.lognormal(rng.normal(), rng.uniform(0.2, 1.5), arms)
        interior = float(bounds.interior_epsilon(reference))
        epsilon = interior * 10 ** rng.uniform(-0.5, np.log10(2 / interior))
        estimates = draw_estimates(truth, variances, draws, rng)
        policies = trust_region_pair(estimates, variances, reference, epsilon, "simplex")
        worse = [policy @ truth <= reference @ truth for policy in policies]
        paired = worse[1].astype(float) - worse[0].astype(float)
        error = max(paired.std(ddof=1), 1 / np.sqrt(draws)) / np.sqrt(draws)
        rows.append(
            {
                "true_rewards": truth.tolist(),
                "variances": variances.tolist(),
                "reference": reference.tolist(),
                "epsilon": epsilon,
                "interior": epsilon <= interior,
                "uniform_reference": uniform,
                "vanilla_risk": float(worse[0].mean()),
                "variance_aware_risk": float(worse[1].mean()),
                "difference": float(paired.mean()),
                "z": float(paired.mean() / error),
            }
        )
    return pd.DataFrame(rows)


def noise_levels(
    arms: int, instances: int, epsilons: Sequence[float], levels: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Trade mean gain against risk over distributions: Remark 2.5.

    Problems: r* ~ N(0, 1), variances lognormal with mean 1 times level^2, uniform reference. Both
    policies are followed over the same radii, from hardly a step to greedy, so that any pair of points
    can be compared: at the same radius, step length, gain or risk.

    Returns:
        A row per (level, epsilon, policy, instance): mean gain over the reference, risk, and the step,
        the mean squared distance ||pi - pi_0||^2 over all instances.
    """
    rng = np.random.default_rng(seed)
    truth, variances, noise = _problems(arms, instances, draws, rng)
    reference = np.full(arms, 1 / arms)
    shapes = {"vanilla": np.ones(arms), "variance-aware": variances}
    parts = []
    cases = [(level, epsilon) for level in levels for epsilon in epsilons]
    for level, epsilon in progress(cases, "Remark 2.5", len(cases)):
        for name, shape in shapes.items():
            policy = tabular.trust_region_policy(truth + level * noise, reference, epsilon, variances=shape)
            gain = tabular.expected_reward(policy - reference, truth)
            part = {
                "level": level,
                "epsilon": epsilon,
                "policy": name,
                "instance": np.arange(instances),
                "step": float(((policy - reference) ** 2).sum(-1).mean()),
                "gain": gain.mean(0),
                "risk": (gain <= 0).mean(0),
            }
            parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _problems(arms: int, instances: int, draws: int, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Return r* and Sigma of random problems, (instances, arms), and noise (draws, instances, arms)."""
    truth = rng.normal(0, 1, (instances, arms))
    variances = rng.lognormal(-0.5 * SPREAD**2, SPREAD, (instances, arms))
    return (truth, variances, np.sqrt(variances) * rng.standard_normal((draws, instances, arms)))


def equal_step(
    arms: int, instances: int, step: float, levels: Sequence[float], draws: int, seed: int
) -> pd.DataFrame:
    """Compare both policies on the problems of `noise_levels` at the same mean ||pi - pi_0||^2.

    The radius of either policy is solved for, once per level for all problems and draws.

    Returns:
        A row per level and instance: gain and risk of both policies, and vanilla's less the other's.
    """
    rng = np.random.default_rng(seed)
    truth, variances, noise = _problems(arms, instances, draws, rng)
    reference = np.full(arms, 1 / arms)
    shapes = {"vanilla": np.ones(arms), "variance-aware": variances}
    parts = []
    for level in progress(levels, "equal step", len(levels)):
        columns: dict[str, Array] = {}
        for name, shape in shapes.items():
            policy = _policy_of_step(truth + level * noise, reference, shape, step)
            gain = tabular.expected_reward(policy - reference, truth)
            columns |= {f"{name} gain": gain.mean(0), f"{name} risk": (gain <= 0).mean(0)}
        for column in ("gain", "risk"):
            difference = columns[f"vanilla {column}"] - columns[f"variance-aware {column}"]
            columns[f"{column}_difference"] = difference
        parts.append(pd.DataFrame({"level": level, "instance": np.arange(instances)} | columns))
    return pd.concat(parts, ignore_index=True)


def _policy_of_step(estimates: Array, reference: Array, shape: Array, step: float) -> Array:
    """Return the trust-region policies at the radius where the mean of ||pi - pi_0||^2 is the step."""

    def policy_of(log_epsilon: float) -> Array:
        epsilon = np.exp(log_epsilon)
        return tabular.trust_region_policy(estimates, reference, epsilon, variances=shape)

    def excess(log_epsilon: float) -> float:
        return float(((policy_of(log_epsilon) - reference) ** 2).sum(-1).mean()) - step

    return policy_of(float(brentq(excess, np.log(1e-4 * step), np.log(1e4 * step), xtol=1e-5)))


def crossing_level(paired: pd.DataFrame, seed: int, resamples: int = 1000) -> Estimate:
    """Estimate the noise level up to which vanilla gains more, from the table of `equal_step`.

    The interval is the bootstrap's over the problems; NaN ends where a resample has no crossing.
    """
    table = paired.pivot(index="level", columns="instance", values="gain_difference")
    levels, differences = table.index.to_series(), table.to_numpy()
    count = differences.shape[1]
    chosen = np.random.default_rng(seed).integers(0, count, (resamples, count))
    means = [pd.Series(differences[:, rows].mean(1)) for rows in chosen]
    low, high = np.quantile([zero_crossing(levels, one) for one in means], [0.025, 0.975])
    value = zero_crossing(levels, pd.Series(differences.mean(1)))
    return Estimate(value, float(low), float(high), count)


def zero_crossing(levels: pd.Series, differences: pd.Series) -> float:
    """Return the level at which a difference first falls through zero, interpolated; NaN if never."""
    x, y = levels.to_numpy(dtype=float), differences.to_numpy(dtype=float)
    falls = np.flatnonzero((y[:-1] > 0) & (y[1:] <= 0))
    if not falls.size:
        return float("nan")
    k = falls[0]
    return float(x[k] + (x[k + 1] - x[k]) * y[k] / (y[k] - y[k + 1]))


def relative_to_vanilla(comparison: pd.DataFrame) -> pd.DataFrame:
    """Compare every policy of `matched_kl` with vanilla on the same problem.

    Returns:
        A row per level, policy (but vanilla) and instance: differences of gain and risk, and
        log_variance, the logarithm of the ratio of the variances of the return.
    """
    vanilla = comparison[comparison["policy"] == "vanilla"]
    others = comparison[comparison["policy"] != "vanilla"]
    both = others.merge(vanilla, on=["level", "instance"], suffixes=("", "_v"))
    columns = {
        "gain": both["gain"] - both["gain_v"],
        "log_variance": 2 * np.log(both["deviation"] / both["deviation_v"]),
        "risk": both["risk"] - both["risk_v"],
    }
    return both[["level", "policy", "instance"]].assign(**columns)


def summarize(table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return the mean of every column per group, with its interval over the rows of the group."""
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        row = dict(zip(by, key, strict=True))
        for column in columns:
            row |= _columns(column, mean(group[column]))
        rows.append(row)
    return pd.DataFrame(rows)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


# --- Theorem 2.7 ----------------------------------------------------------------------------------


def best_on_printed_path(estimates: Array, variances: Array, reference: Array, epsilon: float) -> Array:
    """Return the printed policy with the highest E[R-hat] that meets E[sigma^2 ln(pi / pi_0)] <= epsilon.

    All of its path is searched, beta from 1e-3 to 1e4 times the problem's scale. Shapes: (arms,).
    """
    scale = max(np.ptp(estimates), np.abs(estimates).max(), 1e-12) / variances.mean()
    betas = scale * np.geomspace(1e-3, 1e4, 4001)
    path = tabular.printed_policy(
        np.broadcast_to(estimates, (betas.size, estimates.size)), variances, reference, betas
    )
    path = np.vstack([path, reference])  # the limit of large beta
    feasible = tabular.weighted_kl(path, reference, variances) <= epsilon
    values = np.where(feasible, path @ estimates, -np.inf)
    return path[values.argmax()]


def at_constraint(
    family: Callable[..., Array], estimates: Array, variances: Array, reference: Array, epsilon: float
) -> Array:
    """Return the policy of a family, (arms,), whose beta makes E[sigma^2 ln(pi / pi_0)] equal epsilon."""
    scale = np.ptp(estimates) / variances.mean()

    def measure(beta: Array) -> Array:
        many = np.broadcast_to(estimates, (beta.size, estimates.size))
        return tabular.weighted_kl(family(many, variances, reference, beta), reference, variances)

    beta = scale * tabular.solve_beta(lambda b, _: measure(scale * b), epsilon, 1, name="epsilon")
    return family(estimates, variances, reference, beta[0])


def optimum_by_slsqp(estimates: Array, variances: Array, reference: Array, epsilon: float) -> Array:
    """Solve the problem of Theorem 2.7 by scipy's general solver, which knows no closed form. (arms,)."""
    result = minimize(
        lambda policy: -policy @ estimates,
        reference,
        jac=lambda policy: -estimates,
        bounds=[(1e-12, 1)] * estimates.size,
        constraints=[
            {"type": "eq", "fun": lambda policy: policy.sum() - 1},
            {
                "type": "ineq",
                "fun": lambda policy: epsilon - tabular.weighted_kl(policy, reference, variances),
            },
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return result.x


def printed_policy_gap(instances: int, shifts: Sequence[float], epsilon: float, seed: int) -> pd.DataFrame:
    """Measure what the printed policy of Theorem 2.7 loses at the same constraint value.

    Random problems of 3 to 6 arms with uniform reference; every one is seen at every shift of its
    rewards by a constant, which changes neither the problem nor its optimum.

    Returns:
        A row per instance and shift: gains of the optimum and of the printed path, and the share lost.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for instance in progress(range(instances), "Theorem 2.7, gap", instances):
        arms = int(rng.integers(3, 7))
        estimates, variances = rng.normal(0, 1, arms), rng.lognormal(0, 0.8, arms)
        reference = np.full(arms, 1 / arms)
        optimum, _ = tabular.constrained_policy(estimates[None, None], variances, reference, epsilon)
        best = float(optimum[0, 0] @ estimates - reference @ estimates)
        for shift in shifts:
            path = best_on_printed_path(estimates + shift, variances, reference, epsilon)
            gain = float(path @ estimates - reference @ estimates)
            rows.append(
                {
                    "instance": instance,
                    "shift": shift,
                    "optimal_gain": best,
                    "printed_gain": gain,
                    "share_lost": 1 - gain / best,
                }
            )
    return pd.DataFrame(rows)


# --- Figure 4 -------------------------------------------------------------------------------------


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

    Variances are uniform on the range, true rewards N(0, signal^2), probabilities sum to one.

    Returns:
        A row per setting: the ratio Var(vanilla) / Var(variance-aware) with its interval, and the
        same after the variance-aware step was scaled to the vanilla policy's mean gain.
    """
    rows = []
    total = len(arms) * len(signals) * settings
    cases = ((n, s, k) for n in arms for s in signals for k in range(settings))
    for count, signal, setting in progress(cases, "Figure 4, settings", total):
        rng = np.random.default_rng([seed, count, int(1000 * signal), setting])
        truth, uniform = rng.normal(0, signal, count), rng.random(count)
        for low, high in ranges:
            variances = low + (high - low) * uniform
            gains = trust_region_gains(truth, variances, draws, rng, "sum_to_one")
            ratio = paired_variance_ratio(*gains)
            rows.append(
                {
                    "arms": count,
                    "signal": signal,
                    "setting": setting,
                    "range": f"({low:g}, {high:g})",
                    **_columns("ratio", ratio),
                    "equal_gain_ratio": ratio.value * (gains[1].mean() / gains[0].mean()) ** 2,
                }
            )
    return pd.DataFrame(rows)


# --- at matched KL ----------------------------------------------------------------------------------

PolicyFamily = Callable[[Array, Array, Array, Array], Array]


def families(aversion: float) -> dict[str, PolicyFamily]:
    """Return the policies that are compared at matched KL, each with its free beta."""
    return {
        "vanilla": lambda estimates, variances, reference, beta: tabular.softmax_policy(
            estimates, reference, beta
        ),
        "PPO fixed point": tabular.ppo_fixed_point,
        "GRPO fixed point": tabular.grpo_fixed_point,
        "true optimum": tabular.exact_policy,
        "as printed": tabular.printed_policy,
        "mean minus variance": lambda estimates, variances, reference, beta: (
            tabular.mean_minus_variance_policy(
                estimates, variances, reference, beta, np.full(estimates.shape[:-1], aversion)
            )
        ),
    }


def beta_at_mean_kl(
    family: PolicyFamily, estimates: Array, variances: Array, reference: Array, target: float
) -> float:
    """Return the largest beta at which the mean KL(pi || pi_0) over the batch is the target; NaN if none.

    From strong to weak penalties the KL need not start at 0: the optimum of the weighted penalty does
    not tend to the reference, and a pessimistic reward moves the policy by itself. So a coarse grid on
    a few draws finds where to look. Shapes: estimates (draws, instances, arms).
    """

    def excess(log_beta: float, draws: Array) -> float:
        policy = family(draws, variances, reference, np.full(draws.shape[:-1], np.exp(log_beta)))
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

    Problems: r* ~ N(0, 1), variances lognormal with mean 1 times level^2, uniform reference. The beta of
    every policy is set once per level, for all problems and draws together, as a trainer would.

    Returns:
        A row per (level, policy, instance), without policies that cannot reach that KL: beta, KL,
        mean gain, its standard deviation and risk over draws.
    """
    rng = np.random.default_rng(seed)
    truth, variances, noise = _problems(arms, instances, draws, rng)
    reference = np.full(arms, 1 / arms)
    rows = []
    for level in progress(levels, "matched KL", len(levels)):
        estimates, scaled = truth + level * noise, level**2 * variances
        for name, family in families(aversion).items():
            beta = beta_at_mean_kl(family, estimates, scaled, reference, target)
            if np.isnan(beta):
                continue
            policy = family(estimates, scaled, reference, np.full(estimates.shape[:-1], beta))
            gain = tabular.expected_reward(policy, truth) - truth.mean(-1)
            divergence = tabular.weighted_kl(policy, reference).mean(0)
            rows += [
                {
                    "level": level,
                    "policy": name,
                    "instance": instance,
                    "beta": beta,
                    "kl": divergence[instance],
                    "gain": gain[:, instance].mean(),
                    "deviation": gain[:, instance].std(ddof=1),
                    "risk": (gain[:, instance] <= 0).mean(),
                }
                for instance in range(instances)
            ]
    return pd.DataFrame(rows)
