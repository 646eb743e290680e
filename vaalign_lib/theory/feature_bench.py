"""Policies on stored responses: pi(s | p) ~ exp(theta' phi(p, s)) over the S responses kept for each of P
prompts, the reference policy uniform over them; N policies, each with a judge of its own, trained at once.
Without features a policy has a logit for each response: then it is free to avoid whatever it knows of, and
its objective has one maximum, in closed form up to the multiplier nu of each prompt.

Every expectation is an exact sum, so a policy's gradient has no noise of sampling: what varies over policies
is made by their judges alone. Objectives maximize, with r = mu - cost + trust * error,

    stated      E_pi[r] - beta E_pi[w ln(pi / pi_0)]                            (Theorem 2.7)
    programmed  the same with the penalty held constant, as PPO has it: its fixed point maximizes
                E_pi[r] - beta E_{pi_0}[w (pi/pi_0 ln(pi / pi_0) - pi/pi_0 + 1)]

by Newton's method in theta, or nu, and, at equal KL, in 1 / beta along with it. With features there may be
several maxima, of which that is taken to which steps from the reference lead. Shapes: N policies, P prompts,
S responses, d features; means over prompts are even.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from vaalign_lib.statistics.arrays import Array, number, numbers

AT_A_TIME = 40_000  # probabilities that are worked on at once, so that they stay in the processor's cache
STEPS = 60  # of Newton's method, which takes about six
LONGEST = 0.3  # step, in nats by which it moves a policy
CLOSE = 1e-10  # step at the end, where each is about the square of the one before
SAME_KL = 1e-3  # relative difference of the mean KL from the target
UNIT_MASS = 1e-9  # logarithm of a policy's mass at the end


@dataclass(frozen=True)
class Bench:
    """What is stored of the responses, and what the policies' judges get wrong.

    Attributes:
        features: (P, S, d), phi; what is the same for all responses of a prompt moves no policy. None: a
            logit for each response.
        gold: (P, S), the return.
        consensus: (P, S), mu, the reward without error.
        variance: (P, S), of the judges' errors.
        errors: (N, P, S), of each policy's judge.
    """

    features: Array | None
    gold: Array
    consensus: Array
    variance: Array
    errors: Array

    def __post_init__(self) -> None:
        errors = numbers("errors", self.errors, axes=3)
        shape = errors.shape[1:]
        stored = {name: numbers(name, getattr(self, name), axes=2) for name in ("gold", "consensus")}
        stored["variance"] = numbers("variance", self.variance, axes=2, above=0)
        if self.features is not None:
            stored["features"] = numbers("features", self.features, axes=3)
        for name, array in stored.items():
            if array.shape[:2] != shape:
                raise ValueError(
                    f"{name}: expected {shape} prompts and responses as errors, got {array.shape}"
                )
        vars(self).update(errors=errors, **stored)

    @property
    def policies(self) -> int:
        """N."""
        return len(self.errors)


@dataclass(frozen=True)
class Objective:
    """What is maximized, see the module.

    Attributes:
        weights: w of the log ratio, above 0; a number, (P, S), or, without features, (N, P, S).
        cost: subtracted from the reward; a number or (P, S).
        trust: how much of its judge's error a policy's reward contains; 0 where it is a bound of the
            judge's interval, which is the same for all.
        stated: the objective as stated, or as programmed.
    """

    weights: ArrayLike = 1.0
    cost: ArrayLike = 0.0
    trust: float = 1.0
    stated: bool = False


@dataclass(frozen=True)
class Policies:
    """N trained policies.

    Attributes:
        theta: (N, d); without features nu / beta (N, P).
        beta: (N,).
        kl: (N,), KL(pi || pi_0) in nats, exact, mean over prompts.
        gains: (N,), the expected gold reward above the reference's.
    """

    theta: Array
    beta: Array
    kl: Array
    gains: Array

    @property
    def gain(self) -> float:
        return float(self.gains.mean())

    @property
    def deviation(self) -> float:
        """The standard deviation of the return over policies."""
        return float(self.gains.std(ddof=1))

    @property
    def risk(self) -> float:
        """The share of policies whose return is lower than the reference's."""
        return float((self.gains < 0).mean())

    @property
    def signal(self) -> float:
        """(gain / deviation)^2: what a variance says at whatever scale the gain has."""
        return (self.gain / self.deviation) ** 2

    def log_ratio(self, other: "Policies") -> float:
        """Return ln of the other's Var / gain^2 over this one's: above 0 if this is the more robust."""
        return float(np.log(self.signal / other.signal))

    def row(self) -> dict[str, float]:
        """Return the outcome as columns of a table."""
        return {
            "beta": float(self.beta.mean()),
            "kl": float(self.kl.mean()),
            "gain": self.gain,
            "deviation": self.deviation,
            "risk": self.risk,
            "signal": self.signal,
        }


def at_beta(bench: Bench, objective: Objective, beta: ArrayLike, start: Policies | None = None) -> Policies:
    """Train policies at a coefficient above 0, one for all or one for each (N,); `start` spares steps.

    Raises:
        ValueError: the policies were not found, for beta is too small.
    """
    strength = 1 / np.broadcast_to(numbers("beta", beta, above=0), (bench.policies,))
    problem = _problem(bench, objective)
    theta = problem.reference() if start is None else start.theta
    return problem.solved(theta, strength, None, f"beta: {1 / strength.max():g} is too small for a policy")


def at_kl(bench: Bench, objective: Objective, target: float, start: Policies | None = None) -> Policies:
    """Train policies at the one coefficient with which their KL is the target on average, in nats.

    `start` spares steps: policies of a like objective at a like KL.

    Raises:
        ValueError: no such coefficient was found. There is none for a small KL under an objective as
            stated, whose penalty is least elsewhere than at the reference; with features single policies
            may run off from one maximum to another, so that the KL jumps.
    """
    number("target", target, above=0)
    problem = _problem(bench, objective)
    theta, strength = problem.nearby(target) if start is None else (start.theta, 1 / start.beta)
    failed = f"target: no coefficient was found at which the KL is {target:g} nats"
    return problem.solved(theta, strength, target, failed)


def path(bench: Bench, objective: Objective, betas: Sequence[float]) -> pd.DataFrame:
    """Train at every coefficient, each time from the policies of the next larger one; a row for each."""
    rows, trained = [], None
    for beta in sorted(numbers("betas", betas, axes=1, above=0), reverse=True):
        trained = at_beta(bench, objective, float(beta), trained)
        rows.append(trained.row())
    return pd.DataFrame(rows)


def probabilities(policies: Policies, rewards: Array, weights: Array | float) -> Array:
    """Return how probable each response is by policies with a logit for each (N, P, S), the maximum of the
    `programmed` objective: softmax((rewards - nu) / (beta weights)).
    """
    logits = (rewards / policies.beta[:, None, None] - policies.theta[..., None]) / weights
    return np.asarray(softmax(logits, axis=-1))


def _problem(bench: Bench, objective: Objective) -> "_Linear | _Free":
    shape = bench.gold.shape
    weights = np.asarray(objective.weights)
    if weights.ndim == 3 and bench.features is None:
        weights = numbers("weights", weights, above=0).swapaxes(0, 1)  # (P, N, S)
        if weights.shape != (shape[0], bench.policies, shape[1]):
            raise ValueError(f"weights: expected {bench.errors.shape}, got {np.shape(objective.weights)}")
    else:
        weights = _of_responses("weights", objective.weights, shape, above=0)[:, None]
    rewards = (bench.consensus - _of_responses("cost", objective.cost, shape))[:, None]  # (P, 1, S)
    rewards = rewards + number("trust", objective.trust) * bench.errors.swapaxes(0, 1)  # (P, N, S)
    gold = (bench.gold - bench.gold.mean(1, keepdims=True))[..., None]  # (P, S, 1)
    shared = np.ascontiguousarray(rewards), np.ascontiguousarray(weights), gold, objective.stated
    if bench.features is None:
        return _Free(*shared)
    features = bench.features - bench.features.mean(1, keepdims=True)  # (P, S, d)
    first, second = np.triu_indices(features.shape[-1])  # (d (d + 1) / 2,)
    return _Linear(*shared, features, features[..., first] * features[..., second])


def _of_responses(name: str, values: ArrayLike, shape: tuple[int, ...], above: float | None = None) -> Array:
    """Return numbers (P, S), which one number may stand for."""
    array = numbers(name, values, above=above)
    if array.shape not in ((), shape):
        raise ValueError(f"{name}: expected a number or an array of shape {shape}, got shape {array.shape}")
    return np.broadcast_to(array, shape)


# --- Newton's method -----------------------------------------------------------------------------------


def _correction(target: float, kl: float, rise: float, strength: Array) -> float:
    """Return the change of u = 1 / beta to the target KL, if that rises so much with it.

    Newton's rule is applied to the root of the KL, which is almost linear in u.
    """
    if rise <= 0:
        return float(strength[0]) / 2
    change = 2 * (np.sqrt(target * max(kl, 1e-3 * target)) - kl) / rise
    return float(np.clip(change, -strength[0] / 3, strength[0]))


def _blocks(policies: int, prompts: int, responses: int) -> list[slice]:
    """Return slices of prompts that are worked on at once."""
    size = max(1, AT_A_TIME // (policies * responses))
    return [slice(k, k + size) for k in range(0, prompts, size)]


@dataclass(frozen=True)
class _Stored:
    """What is stored of a bench under an objective; prompts first."""

    rewards: Array  # (P, N, S)
    weights: Array  # (P, 1, S), or of each policy (P, N, S)
    gold: Array  # (P, S, 1), from the reference's
    stated: bool


@dataclass(frozen=True)
class _Free(_Stored):
    """Policies with a logit for each response."""

    def reference(self) -> Array:
        """Return where nu starts from (N, P); the reference itself has none."""
        return np.zeros(self.rewards.shape[1::-1])

    def nearby(self, target: float) -> tuple[Array, Array]:
        """Return nu / beta (N, P) and 1 / beta (N,) at which the KL would be the target, were all linear."""
        precision = 1 / self.weights
        centre = (self.rewards * precision).mean(-1, keepdims=True) / precision.mean(-1, keepdims=True)
        slope = (((self.rewards - centre) * precision) ** 2).mean()
        strength = np.sqrt(2 * target / slope)
        return strength * centre[..., 0].T, np.full(self.rewards.shape[1], strength)

    def solved(self, nu: Array, strength: Array, target: float | None, failed: str) -> Policies:
        """Find nu at strengths 1 / beta (N,), or with it the one strength that has the target KL."""
        prompts, policies, responses = self.rewards.shape
        blocks = _blocks(policies, prompts, responses)
        for _ in range(STEPS):
            parts = [self._block(block, nu.T[block, :, None], strength[:, None]) for block in blocks]
            multiplier, along, excess, kl, rise, gold = map(np.concatenate, zip(*parts, strict=True))
            missed = 0.0 if target is None else abs(kl.mean() / target - 1)
            if missed < SAME_KL and np.abs(excess).max() < UNIT_MASS:
                return Policies(multiplier.T, 1 / strength, kl.mean(0), gold.mean(0))
            change = 0.0
            if target is not None:
                change = _correction(target, float(kl.mean()), float(rise.mean()), strength)
            nu, strength = (multiplier + change * along).T, strength + change
        raise ValueError(failed)

    def _block(self, prompts: slice, nu: Array, strength: Array) -> tuple[Array, ...]:
        """Return of some prompts nu, dnu/du, the mass' logarithm, KL, dKL/du and gold, each (p, N).

        The mass of exp((u r - nu) / w - [stated]) must be 1: its logarithm is convex in nu, and Newton's
        method is monotone from its second step on.
        """
        rewards, precision = self.rewards[prompts], 1 / self.weights[prompts]
        for _ in range(STEPS):
            ratio = (strength * rewards - nu) * precision - self.stated  # (p, N, S)
            top = ratio.max(-1, keepdims=True)  # (p, N, 1)
            policy = np.exp(ratio - top)
            total = policy.sum(-1, keepdims=True)
            policy /= total
            excess = np.log(total / ratio.shape[-1]) + top  # (p, N, 1)
            slope = _summed(policy, precision)
            nu = nu + excess / slope
            if np.abs(excess).max() < UNIT_MASS:
                break
        along = _summed(policy * rewards, precision) / slope
        divergence = policy * ratio  # (p, N, S)
        rise = (divergence * ((rewards - along) * precision)).sum(-1)  # (p, N)
        gold = (policy @ self.gold[prompts])[..., 0]  # (p, N)
        return nu[..., 0], along[..., 0], excess[..., 0], divergence.sum(-1), rise, gold


def _summed(mass: Array, factor: Array) -> Array:
    """Return sums over responses of a mass (p, N, S) times factors, (p, 1, S) or (p, N, S): (p, N, 1)."""
    if factor.shape[1] == 1:
        return mass @ factor.swapaxes(1, 2)
    return np.einsum("pns,pns->pn", mass, factor)[..., None]


@dataclass(frozen=True)
class _Moments:
    """What a pass over all responses finds at theta and u = 1 / beta; means over prompts.

    Maximized is u reward - penalty; its gradient is u reward_gradient - penalty_gradient.
    """

    theta: Array  # (N, d)
    reward_gradient: Array  # (N, d), Cov_pi(phi, r)
    penalty_gradient: Array  # (N, d), Cov_pi(phi, w (ln(pi / pi_0) + [stated]))
    kl_gradient: Array  # (N, d), Cov_pi(phi, ln(pi / pi_0))
    curvature: Array  # (N, d, d), minus the second derivatives
    kl: Array  # (N,)
    gold: Array  # (N,), above the reference's
    reward: Array  # (N,)
    penalty: Array  # (N,)

    def where(self, chosen: NDArray[np.bool_], other: "_Moments") -> "_Moments":
        """Return these moments for the chosen policies (N,), others for the rest."""
        pairs = ((getattr(self, one.name), getattr(other, one.name)) for one in fields(self))
        return _Moments(*(np.where(chosen.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))

    def value(self, strength: Array) -> Array:
        """Return what is maximized (N,)."""
        return strength * self.reward - self.penalty

    def uphill(self, gradient: Array) -> Array:
        """Return Newton's step (N, d); where the objective is convex it has the sign of the gradient."""
        values, vectors = self._axes
        return ((vectors / values[:, None]) @ (vectors.swapaxes(1, 2) @ gradient[..., None]))[..., 0]

    def size(self, step: Array) -> Array:
        """Return half of step' |curvature| step (N,)."""
        values, vectors = self._axes
        return 0.5 * (values * (vectors.swapaxes(1, 2) @ step[..., None])[..., 0] ** 2).sum(-1)

    @cached_property
    def _axes(self) -> tuple[Array, Array]:
        values, vectors = np.linalg.eigh(self.curvature)  # (N, d), (N, d, d)
        values = np.abs(values)
        return np.maximum(values, 1e-6 * values.max(-1, keepdims=True)), vectors


@dataclass(frozen=True)
class _Linear(_Stored):
    """Policies that are linear in features."""

    features: Array  # (P, S, d), from their means within prompts
    products: Array  # (P, S, d (d + 1) / 2), of two features

    def reference(self) -> Array:
        """Return the reference's theta (N, d)."""
        return np.zeros((self.rewards.shape[1], self.features.shape[-1]))

    def nearby(self, target: float) -> tuple[Array, Array]:
        """Return theta (N, d) and 1 / beta (N,) at which the KL would be the target, were all linear."""
        at = self.moments(self.reference(), np.zeros(self.rewards.shape[1]))
        reward, penalty = at.uphill(at.reward_gradient), at.uphill(at.penalty_gradient)  # (N, d)
        metric = np.einsum("psi,psj->ij", self.features, self.features) / self.gold.size  # (d, d)
        square, cross, rest = (
            float(np.einsum("ni,ij,nj->n", one, metric, other).mean())
            for one, other in ((reward, reward), (reward, penalty), (penalty, penalty))
        )
        strength = (cross + np.sqrt(max(cross**2 - square * (rest - 2 * target), 0))) / square
        return strength * reward - penalty, np.full(len(reward), strength)

    def solved(self, theta: Array, strength: Array, target: float | None, failed: str) -> Policies:
        """Find the maxima at strengths 1 / beta (N,), or at the one strength with the target KL too.

        Each policy has a trust region of its own: a step that leads down is taken back and shortened.
        """
        at, weight = self.moments(theta, strength), self.weights.mean()
        reach = np.full(len(theta), LONGEST)
        for _ in range(STEPS):
            gradient = strength[:, None] * at.reward_gradient - at.penalty_gradient  # (N, d)
            step, change = at.uphill(gradient), 0.0
            kl = float(at.kl.mean())
            if target is not None:
                along, nats = at.uphill(at.reward_gradient), at.size(step) / weight  # (N, d), (N,)
                expected = kl + float((at.kl_gradient * _shortened(step, nats, reach)).sum(1).mean())
                rise = float((at.kl_gradient * along).sum(1).mean())
                change = _correction(target, expected, rise, strength)
                step = step + change * along
            nats = at.size(step) / weight
            if nats.max() < CLOSE and (target is None or abs(kl / target - 1) < SAME_KL):
                return Policies(at.theta, 1 / strength, at.kl, at.gold)
            strength = strength + change
            there = self.moments(at.theta + _shortened(step, nats, reach), strength)
            up = there.value(strength) >= at.value(strength) - 1e-12  # (N,)
            reach = np.where(up, np.where(nats > reach, 2 * reach, reach), np.minimum(nats, reach) / 8)
            at = there.where(up, at)
        raise ValueError(failed)

    def moments(self, theta: Array, strength: Array) -> _Moments:
        """Pass over all responses, a few prompts at a time."""
        prompts, responses, width = self.features.shape
        blocks = _blocks(len(theta), prompts, responses)
        parts = [self._block(block, theta, strength[:, None]) for block in blocks]
        reward, penalty, kl, products, scalars = (sum(part) / prompts for part in zip(*parts, strict=True))
        curvature = np.empty((len(theta), width, width))
        rows, columns = np.triu_indices(width)
        curvature[:, rows, columns] = curvature[:, columns, rows] = -products
        return _Moments(theta, reward, penalty, kl, curvature, *scalars)

    def _block(self, prompts: slice, theta: Array, strength: Array) -> tuple[Array, ...]:
        """Return sums over some prompts: the fields, minus the curvature's upper triangle, four numbers."""
        features, weights = self.features[prompts], self.weights[prompts]
        ratio = theta @ features.swapaxes(1, 2)  # (p, N, S)
        ratio -= ratio.max(-1, keepdims=True)
        policy = np.exp(ratio)
        total = policy.sum(-1, keepdims=True)  # (p, N, 1)
        policy /= total
        ratio -= np.log(total / ratio.shape[-1])  # ln(pi / pi_0)
        divergence, weighted = policy * ratio, policy * weights  # (p, N, S)
        reward, cost = policy * self.rewards[prompts], weighted * (ratio + self.stated)
        penalty = cost.sum(-1) - weighted.sum(-1) + weights.mean(-1)  # (p, N)
        scalars = [divergence.sum(-1), (policy @ self.gold[prompts])[..., 0], reward.sum(-1), penalty]
        reward, cost = _centred(reward, policy), _centred(cost, policy)
        excess = strength * reward - cost - weighted  # its sum times centred phi phi' is the Jacobian
        mean, first = policy @ features, excess @ features  # (p, N, d)
        first -= excess.sum(-1, keepdims=True) * mean / 2
        rows, columns = np.triu_indices(features.shape[-1])
        products = excess @ self.products[prompts]  # (p, N, d (d + 1) / 2)
        products -= first[..., rows] * mean[..., columns] + first[..., columns] * mean[..., rows]
        moved = [one @ features for one in (reward, cost, _centred(divergence, policy))]  # (p, N, d)
        return *(one.sum(0) for one in (*moved, products)), np.stack(scalars).sum(1)


def _centred(mass: Array, policy: Array) -> Array:
    """Return pi (x - E_pi[x]) of a mass pi x (p, N, S)."""
    return mass - policy * mass.sum(-1, keepdims=True)


def _shortened(step: Array, nats: Array, reach: Array) -> Array:
    """Return steps (N, d) that move no policy by more nats than its reach (N,)."""
    return step / np.maximum(1, np.sqrt(nats / reach))[:, None]
