"""The three-armed bandit of Figures 2 and 3, under every form that its policies may have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import yaml
from numpy.typing import ArrayLike

from vaalign_lib.statistics.arrays import Array, count, number, numbers
from vaalign_lib.store import DATA
from vaalign_lib.theory import tabular

FORMS = {
    "free": "Eq. (2), (3): closed form",  # of Appendix A, no distribution
    "sum_to_one": "Eq. (2), (3): sum to one",
    "simplex": "Eq. (2), (3): distributions",
    "printed": "Theorem 2.7: as printed",
    "exact": "Theorem 2.7: true optimum",
    "ppo": "fixed point of PPO, RLOO",
    "grpo": "fixed point of GRPO",
}
QUADRATIC = get_args(tabular.QuadraticForm)
KL_POLICIES: Mapping[str, tabular.PolicyOf] = {
    "printed": tabular.printed_policy,
    "exact": tabular.exact_policy,
    "ppo": tabular.ppo_fixed_point,
    "grpo": tabular.grpo_fixed_point,
}
CHUNK = 100_000  # draws that are solved at once, so that they stay in the processor's cache


@dataclass(frozen=True)
class Bandit:
    """Arms with Gaussian reward estimates (Assumption 2.1) and a uniform reference policy.

    The strengths are, of a form in `QUADRATIC`, epsilon of Equation (2) and of Equation (3) before it is
    scaled by lambda_min(Sigma); of the others beta.
    """

    true_rewards: tuple[float, ...]  # r* (arms,)
    deviations: tuple[float, ...]  # sigma (arms,), of the estimates, above 0
    form: str  # of the two policies, a key of `FORMS`
    vanilla_strength: float
    variance_aware_strength: float

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form: must be one of {', '.join(FORMS)}, got {self.form!r}")
        rewards = numbers("true_rewards", self.true_rewards, axes=1)
        deviations = numbers("deviations", self.deviations, above=0, axes=1)
        if rewards.size != deviations.size:
            wanted = f"as many as true_rewards, {rewards.size}"
            raise ValueError(f"deviations: expected {wanted}, got {deviations.size}")
        for name in ("vanilla_strength", "variance_aware_strength"):
            if number(name, getattr(self, name), at_least=0) == 0 and self.form not in QUADRATIC:
                raise ValueError(f"{name}: expected a number above 0, for it is a beta")

    @property
    def rewards(self) -> Array:
        return np.asarray(self.true_rewards, dtype=float)

    @property
    def variances(self) -> Array:
        return np.asarray(self.deviations, dtype=float) ** 2

    @property
    def reference(self) -> Array:
        return np.full(len(self.true_rewards), 1 / len(self.true_rewards))

    @property
    def base_return(self) -> float:
        """Return pi_0' r* of the uniform policy."""
        return float(self.rewards.mean())

    def draw(self, rng: np.random.Generator, draws: int) -> Array:
        """Return estimates R-hat ~ N(r*, sigma^2), (draws, arms)."""
        noise = rng.standard_normal((count("draws", draws), self.rewards.size))
        return self.rewards + np.asarray(self.deviations) * noise

    def estimates(self, estimates: Array) -> Array:
        """Check and return estimates (draws, arms)."""
        checked = numbers("estimates", estimates, axes=2)
        if checked.shape[1] != self.rewards.size:
            raise ValueError(f"estimates: expected {self.rewards.size} arms, got shape {checked.shape}")
        return checked

    def vanilla(self, estimates: Array) -> Array:
        """Return the policy that ignores the variances, (..., arms)."""
        if self.form in QUADRATIC:
            return self._trust_region(estimates, self.vanilla_strength, 1.0)
        return tabular.softmax_policy(estimates, self.reference, self.vanilla_strength)

    def variance_aware(self, estimates: Array) -> Array:
        """Return the policy that knows the variances, (..., arms)."""
        variances, strength = self.variances, self.variance_aware_strength
        if self.form in QUADRATIC:
            return self._trust_region(estimates, tabular.matched_epsilon(variances, strength), variances)
        return KL_POLICIES[self.form](estimates, variances, self.reference, strength)

    def _trust_region(self, estimates: Array, epsilon: ArrayLike, variances: ArrayLike) -> Array:
        form: Any = self.form
        return tabular.trust_region_policy(estimates, self.reference, epsilon, variances=variances, form=form)

    def tells_figure_2(self, estimates: Array) -> bool:
        """Whether Figure 2's caption holds on the typical reversed draw of the estimates (draws, arms).

        The variance-aware policy gives arm 1, the poorest, less than vanilla does, and returns more.
        """
        poorest = self.rewards.argmin()
        shown = typical_reversed_estimates(self, estimates)
        vanilla, aware = self.vanilla(shown), self.variance_aware(shown)
        return bool(aware[poorest] < vanilla[poorest] and aware @ self.rewards > vanilla @ self.rewards)

    def returns(self, estimates: Array) -> tuple[Array, Array]:
        """Return pi' r* of the vanilla and of the variance-aware policy of every draw, each (draws,)."""
        estimates = self.estimates(estimates)
        parts = [estimates[start : start + CHUNK] for start in range(0, len(estimates), CHUNK)]
        vanilla, aware = (
            np.concatenate([policy(part) @ self.rewards for part in parts])
            for policy in (self.vanilla, self.variance_aware)
        )
        return vanilla, aware


def fully_reversed(estimates: Array) -> Any:
    """Return which draws (draws, arms) fall from arm to arm, (draws,): the reverse of the true order.

    The arms are to be in the order of their true rewards, as in Figure 2.
    """
    return np.all(np.diff(numbers("estimates", estimates), axis=-1) < 0, axis=-1)


def typical_reversed_estimates(bandit: Bandit, estimates: Array) -> Array:
    """Return the mean of the draws in fully reversed order, (arms,): the estimates of Figure 2.

    If the draws (draws, arms) hold none, the true rewards stand in for it, in reversed order.
    """
    estimates, order = bandit.estimates(estimates), np.argsort(bandit.rewards)
    chosen = estimates[fully_reversed(estimates[:, order])]
    if len(chosen):
        return chosen.mean(0)
    reversed_rewards = np.empty_like(bandit.rewards)
    reversed_rewards[order] = bandit.rewards[order[::-1]]
    return reversed_rewards


def published_bandits() -> dict[str, Bandit]:
    """Return one set of parameters for every form, from data/bandit_arms.yaml."""
    content = yaml.safe_load((DATA / "bandit_arms.yaml").read_text(encoding="utf-8"))
    arms = ("true_rewards", "deviations")
    return {
        form: Bandit(**entry | {name: tuple(entry[name]) for name in arms}, form=form)
        for form, entry in content.items()
    }
