"""Bayesian reward model ensembles and reward-robust rewards (arXiv 2409.15360, Sections 5, 6, Appendix B).

A head says mean and standard deviation of a reward; heads share a frozen backbone and learn from disjoint
parts of the pairs. Shapes: E ensembles, H heads, F features, R responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards.base import Array, Interval, Judgement, PolicyIndex, Truth
from vaalign_lib.rewards.classifier import read
from vaalign_lib.rewards.heads import batches
from vaalign_lib.theory.robust import Rule

HEADS = 5
ALPHA = 10.0  # of Equation 8: targets lie between -5 and 5
PARTS = ("nominal", "lowest", "mean", "max")  # rewards that an ensemble's members make
Loss = Callable[
    [Tensor, Tensor, Tensor], Tensor
]  # rewards of chosen, of rejected, targets, all (groups, pairs)
Scores = tuple[Array, Array]  # the nominal reward (R,) and the members' (R, M)


def printed_loss(chosen: Tensor, rejected: Tensor, target: Tensor) -> Tensor:
    """Equation 8 as printed: both rewards have the target alpha (p - 1/2)."""
    return (chosen - target) ** 2 + (rejected - target) ** 2


def mse_loss(chosen: Tensor, rejected: Tensor, target: Tensor) -> Tensor:
    """Equation 8 with alpha (1/2 - p) as the rejected response's target."""
    return (chosen - target) ** 2 + (rejected + target) ** 2


@dataclass(frozen=True)
class GaussianHeads:
    """A grid of heads: weight (E, H, 2, F) and bias (E, H, 2) for mean and deviation, of features measured
    from `centre` in `unit` (F,).
    """

    weight: Tensor
    bias: Tensor
    centre: Tensor
    unit: Tensor

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of features (R, F), both (E, H, R)."""
        scaled = (features - self.centre) / self.unit  # (R, F)
        return _moments(torch.einsum("ehkf,rf->ehkr", self.weight, scaled) + self.bias[..., None])

    def of(self, features: Tensor, ensemble: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return means and deviations of features (R, F) by one ensemble each (R, H)."""
        scaled, own = (features - self.centre) / self.unit, torch.from_numpy(ensemble)
        out = torch.einsum("rhkf,rf->hkr", self.weight[own], scaled) + self.bias[own].permute(1, 2, 0)
        mean, deviation = _moments(out)  # (H, R)
        return mean.T.double().numpy(), deviation.T.double().numpy()


def _moments(out: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of a head's two outputs (..., 2, rows)."""
    return out[..., 0, :], functional.softplus(out[..., 1, :])


def train_gaussian_heads(
    chosen: Tensor,
    rejected: Tensor,
    preferred: Tensor,
    *,
    settings: HeadTraining,
    seed: int,
    ensembles: int = 1,
    heads: int = HEADS,
    loss: Loss = mse_loss,
) -> GaussianHeads:
    """Train ensembles on features (pairs, F) by stage 2, each with a division of the pairs of its own.

    `preferred` (pairs,) is p(chosen > rejected) by the reward model of stage 1. A sample, not the mean, is
    compared with its target: r = mean + a * deviation with one a from N(0, 1) for both responses of a pair.
    """
    if chosen.shape != rejected.shape or preferred.shape != chosen.shape[:1] or len(chosen) < heads:
        shapes = tuple(chosen.shape), tuple(rejected.shape), tuple(preferred.shape)
        raise ValueError(f"chosen, rejected, preferred: expected {heads} pairs or more, got {shapes}")
    random = torch.Generator().manual_seed(seed)
    both = torch.cat([chosen, rejected])  # (2 pairs, F)
    centre, unit = both.mean(0), both.std(0).clamp(min=1e-6)  # (F,)
    sides = [(one - centre) / unit for one in (chosen, rejected)]
    target = ALPHA * (preferred - 0.5)
    order = torch.rand(ensembles, len(chosen), generator=random).argsort(1)  # (E, pairs)
    rows = order[:, : len(chosen) // heads * heads].reshape(ensembles * heads, -1)  # (E * H, pairs of a head)
    weight = 0.02 * torch.randn(ensembles * heads, 2, chosen.shape[1], generator=random)
    bias = torch.zeros(ensembles * heads, 2)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    for _, batch in batches(rows, settings, random, "Gaussian heads"):
        noise = torch.randn(batch.shape, generator=random)  # (E * H, batch)
        moments = [_moments((weight @ one[batch].mT) + bias[..., None]) for one in sides]
        first, second = (mean + noise * deviation for mean, deviation in moments)  # (E * H, batch)
        optimizer.zero_grad(set_to_none=True)
        loss(first, second, target[batch]).mean(1).sum().backward()
        optimizer.step()
    grid = [one.detach().unflatten(0, (ensembles, heads)) for one in parameters]
    return GaussianHeads(grid[0], grid[1], centre, unit)


def nominal(means: Array, deviations: Array, axis: int = -1) -> Array:
    """Return the mean of the head with the smallest deviation, over the axis of the heads."""
    surest = np.expand_dims(deviations.argmin(axis), axis)
    return np.asarray(np.take_along_axis(means, surest, axis).squeeze(axis))


def sigma_paths(
    noise: Sequence[float],
    share: Sequence[float],
    steps: int,
    seeds: int,
    seed: int,
    likelihood: bool = False,
) -> Array:
    """Train a mean and a deviation for texts with labels of these noises (deviations), each seen in a share
    of the steps; return the deviations (steps, seeds, texts).

    The loss is that of Equation 8, or, as it would have to be, minus the Gaussian log-likelihood.
    """
    random, spread = torch.Generator().manual_seed(seed), torch.tensor(noise)
    values = torch.zeros(seeds, 2, len(noise), requires_grad=True)
    optimizer, path = torch.optim.SGD([values], lr=0.02), []
    for _ in range(steps):
        label, draw = (torch.randn(seeds, len(noise), generator=random) for _ in range(2))
        seen = torch.rand(seeds, len(noise), generator=random) < torch.tensor(share)
        mean, deviation = _moments(values)  # (seeds, texts)
        error = (mean - spread * label) ** 2
        loss = (mean + draw * deviation - spread * label) ** 2
        if likelihood:
            loss = error / (2 * deviation**2) + deviation.log()
        optimizer.zero_grad()
        (loss * seen).sum().backward()
        optimizer.step()
        path.append(deviation.detach().double().numpy())
    return np.stack(path)


# --- rewards of policies --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brme:
    """Scores by ensembles of Gaussian heads on one frozen backbone; each head is standardized over responses
    of the reference policy by `units` (E, H, 2), location and scale.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: GaussianHeads
    max_length: int
    units: Array

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], ensemble: NDArray[np.int64]
    ) -> Scores:
        """Score responses by one ensemble each: the surest head's mean is nominal (R,), with all (R, H)."""
        features, _ = read(self.model, self.tokenizer, prompts, responses, self.max_length)
        means, deviations = self.heads.of(features, ensemble)
        units = self.units[ensemble]  # (R, H, 2)
        means = (means - units[..., 0]) / units[..., 1]
        return nominal(means, deviations), means


def parts_of(scores: Scores) -> Array:
    """Return the rewards of `PARTS` (4, R)."""
    first, members = scores
    return np.stack([first, members.min(1), members.mean(1), members.max(1)])


def units_of(values: Array) -> Array:
    """Return location and scale (..., 2) of values (..., R); equal values are refused."""
    scale = values.std(-1)
    if not (scale > 0).all():
        raise ValueError("values: expected rewards that differ, over the reference policy's responses")
    return np.stack([values.mean(-1), scale], -1)


def weights_of(rule: Rule) -> list[float]:
    """Return what a rule weighs the parts by: lambda, of nominal and lowest, or `mean` or `max`."""
    return [float(name == rule) for name in PARTS] if isinstance(rule, str) else [rule, 1 - rule, 0, 0]


@dataclass(frozen=True)
class Mixture:
    """A source by policy: policy j's reward is a weighted sum of parts, each in its unit.

    Attributes:
        parts: of prompts, responses and ensembles (R,), the parts (K, R).
        units: (E, K, 2), location and scale of each ensemble's parts.
        weights: (rules, K); policy j has rule j % rules and ensemble (j // rules) % E.
        truth: the true reward.
    """

    parts: Callable[[Sequence[str], Sequence[str], NDArray[np.int64]], Array]
    units: Array
    weights: Array
    truth: Truth

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Return each response's one reward, as an interval without width."""
        rules = len(self.weights)
        ensemble = policy // rules % len(self.units)
        location, scale = np.moveaxis(self.units[ensemble], 0, 1).transpose(2, 0, 1)  # (K, R) each
        scaled = (self.parts(prompts, responses, ensemble) - location) / scale  # (K, R)
        reward = (self.weights[policy % rules].T * scaled).sum(0)  # (R,)
        return Interval(np.stack([reward, reward], 1))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (R,)."""
        return self.truth(prompts, responses)


@dataclass(frozen=True)
class LowestNormal(Interval):
    """Rewards that say nothing: the lowest of so many draws from N(0, 1) (R,), of none the lower bound."""

    draws: NDArray[np.int64] | None = None

    def sample(self, uniforms: Array) -> Array:
        """Return the reward (R,) at the quantile of a uniform number."""
        assert self.draws is not None
        least = norm.ppf(-np.expm1(np.log1p(-uniforms) / np.maximum(self.draws, 1)))
        return np.where(self.draws > 0, least, self.bounds[:, 0])


def order_mean(draws: int) -> float:
    """Return the mean of the lowest of so many draws from N(0, 1)."""
    return float(quad(lambda x: x * draws * norm.pdf(x) * norm.sf(x) ** (draws - 1), -12, 12)[0])


@dataclass(frozen=True)
class Stochastic:
    """The stochastic case (Section 6.2), a source by policy: policy j's rewards are `constants[j % kinds]`,
    or, where `draws[j % kinds]` is not 0, the lowest of so many draws from N(0, 1), anew for every response.
    """

    constants: Sequence[float]
    draws: Sequence[int]
    truth: Truth

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> LowestNormal:
        """Return rewards, whatever the responses."""
        kind = policy % len(self.draws)
        constant = np.asarray(self.constants, dtype=float)[kind]
        return LowestNormal(np.stack([constant, constant], 1), draws=np.asarray(self.draws)[kind])

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (R,)."""
        return self.truth(prompts, responses)
