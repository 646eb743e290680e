"""Reward models that know how sure they are of each attribute: URM, and its ensemble URME (arXiv 2410.00847).

From the last token's state a URM makes the mean and the log standard deviation of what people rate of each
attribute; the reward is a weighted sum of the means. Shapes: H models side by side (seeds, members, or one),
N responses, K attributes, features of width d. AdamW works weight by weight and no gradient norm is clipped,
so every model is trained as if it were alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards.backbones import EVALUATION_ROWS, last_states, template_of
from vaalign_lib.rewards.base import Array, Judgement, Members, PolicyIndex, Truth
from vaalign_lib.rewards.classifier import padded, read
from vaalign_lib.rewards.heads import INITIAL_DEVIATION, batches, steps_of

Loss = Literal["mle", "regression", "deterministic"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
VarianceSum = Literal["plain", "weighted"]
GATING_LAYERS = ("0", "2", "4")  # linear ones of the gating layer, with SELU between them


@dataclass(frozen=True)
class Ratings:
    """Normal distributions of what people rate, independent over attributes: two tensors (H, N, K)."""

    means: Tensor
    log_deviations: Tensor

    @property
    def variances(self) -> Tensor:
        return (2 * self.log_deviations).exp()


@dataclass(frozen=True)
class AttributeHeads:
    """The value heads of H URMs on one backbone, each one linear layer.

    Attributes:
        weight: (H, K, 2, d), for the mean and the log standard deviation of every attribute; those of one
            head as (2 K, d) are `score.weight` of the published URM.
        bias: (H, K, 2).
    """

    weight: Tensor
    bias: Tensor

    def ratings(self, features: Tensor) -> Ratings:
        """Return the distributions for features, (N, d) for all heads or (H, N, d)."""
        flat = self.weight.flatten(1, 2)  # (H, 2 K, d)
        outputs = features @ flat.mT + self.bias.flatten(1)[:, None]  # (H, N, 2 K)
        means, log_deviations = outputs.unflatten(-1, (-1, 2)).unbind(-1)  # (H, N, K)
        return Ratings(means, log_deviations)

    def __getitem__(self, chosen: slice | Tensor) -> "AttributeHeads":
        """Return some of the heads."""
        return AttributeHeads(self.weight[chosen], self.bias[chosen])


def merged(heads: AttributeHeads, members: int) -> AttributeHeads:
    """Return one head for every so many in a row: the mean of their weights (Appendix C.1).

    On one frozen backbone its mean is the members' mean, and its deviation their geometric mean.
    """
    return AttributeHeads(*(one.unflatten(0, (-1, members)).mean(1) for one in (heads.weight, heads.bias)))


# --- losses of the value head ---------------------------------------------------------------------------


def likelihood_loss(ratings: Ratings, scores: Tensor) -> Tensor:
    """Equation 4: -ln N(score; mean, variance), summed over attributes, a mean over responses (H,)."""
    z = (scores - ratings.means) * (-ratings.log_deviations).exp()  # (H, N, K)
    return (0.5 * z**2 + ratings.log_deviations + 0.5 * math.log(2 * math.pi)).sum(-1).mean(-1)


def regression_loss(ratings: Ratings, scores: Tensor, noise: Tensor) -> Tensor:
    """Equation 5: squared error of the sampled scores, mean + noise * deviation, with standard normal noise
    (H, N, K); summed over attributes, a mean over responses (H,). Without noise: the deterministic twin's.
    """
    sampled = ratings.means + noise * ratings.log_deviations.exp()
    return ((sampled - scores) ** 2).sum(-1).mean(-1)


def train_attributes(
    features: Tensor,
    scores: Tensor,
    rows: Tensor,
    *,
    loss: Loss,
    settings: HeadTraining,
    seed: int,
    description: str = "",
) -> AttributeHeads:
    """Train value heads on the features (texts, d) of a frozen backbone and what people rated of each text
    (texts, raters, K).

    Head h learns from the ratings `rows[h]` (H, ratings each), where rater r of text t is number
    t * raters + r. Heads with the same rows differ in their fresh weights and in their batches, as the
    members of a URME do. Features are standardized for training, which the weights undo. The deterministic
    twin's deviations are 0.
    """
    _check(features, scores, rows, loss)
    raters, attributes = scores.shape[1:]
    location, scale = features.mean(0), features.std(0).clamp_min(1e-6)  # (d,)
    standard, labels = (features - location) / scale, scores.flatten(0, 1)  # (texts, d), (texts * raters, K)
    random = torch.Generator().manual_seed(seed)
    weight = INITIAL_DEVIATION * torch.randn(
        len(rows), attributes, 2, features.shape[1], generator=random, dtype=features.dtype
    )
    bias = torch.stack((labels.mean(0), labels.std(0).log()), -1).repeat(len(rows), 1, 1)  # (H, K, 2)
    heads = AttributeHeads(weight.requires_grad_(), bias.requires_grad_())
    optimizer, schedule = _optimizer([heads.weight, heads.bias], settings, rows.shape[1])
    for _, batch in batches(rows, settings, random, description or f"attribute heads, {loss}"):
        told = heads.ratings(standard[batch // raters])
        _step(_losses(told, labels[batch], loss, random).sum(), optimizer, schedule)
    weight = heads.weight.detach() / scale
    return _finished(AttributeHeads(weight, heads.bias.detach() - weight @ location), loss)


def _check(features: Tensor, scores: Tensor, rows: Tensor, loss: Loss) -> None:
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
    if features.ndim != 2 or scores.ndim != 3 or len(features) != len(scores):
        raise ValueError(
            "features, scores: expected (texts, width) and (texts, raters, attributes), got "
            f"{tuple(features.shape)} and {tuple(scores.shape)}"
        )
    for name, values in (("features", features), ("scores", scores)):
        if not (values.is_floating_point() and values.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers of a floating type")
    known = scores.shape[0] * scores.shape[1]
    if rows.ndim != 2 or not rows.numel() or not 0 <= rows.min() <= rows.max() < known:
        raise ValueError(f"rows: expected (heads, ratings), numbers from 0 to {known - 1}")


def _optimizer(weights: list[Tensor], settings: HeadTraining, examples: int) -> tuple[Optimizer, LRScheduler]:
    steps = steps_of(settings, examples)
    optimizer = AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    half_turn = math.pi if settings.scheduler == "cosine" else 0.0  # or constant
    return optimizer, LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(half_turn * step / steps)))


def _step(loss: Tensor, optimizer: Optimizer, schedule: LRScheduler) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()


# --- trained backbones ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttributeBackbones:
    """H whole URMs of one architecture: stacked weights of their backbones, each (H, ...), and heads."""

    template: PreTrainedModel
    weights: dict[str, Tensor]
    heads: AttributeHeads

    @torch.no_grad()
    def ratings(self, ids: Sequence[Sequence[int]]) -> Ratings:
        """Return the distributions for tokenized conversations."""
        states = vmap(last_states(self.template), in_dims=(0, None, None))
        parts = zip(*(one.split(EVALUATION_ROWS) for one in padded(ids)), strict=True)
        return self.heads.ratings(torch.cat([states(self.weights, *part) for part in parts], dim=1))

    def merged(self) -> "AttributeBackbones":
        """Return the one model whose weights, of backbone and head, are the means of all (Appendix C.1)."""
        means = {name: one.mean(0, keepdim=True) for name, one in self.weights.items()}
        return AttributeBackbones(self.template, means, merged(self.heads, len(self.heads.weight)))


def train_attribute_backbones(
    model: PreTrainedModel,
    heads: AttributeHeads,
    ids: Sequence[Sequence[int]],
    scores: Tensor,
    rows: Tensor,
    *,
    loss: Loss,
    settings: HeadTraining,
    seed: int,
) -> AttributeBackbones:
    """Train whole URMs, which begin with one reward model's backbone and with heads that were trained on it
    frozen, on tokenized conversations and ratings as for `train_attributes`.
    """
    template, (table, lengths) = template_of(model), padded(ids)
    start = {name: one.detach() for name, one in template.named_parameters() if "model." in name}
    weights = {
        name: one.expand(len(rows), *one.shape).clone().requires_grad_() for name, one in start.items()
    }
    bias = heads.bias.masked_fill(heads.bias.isinf(), 0)
    own = AttributeHeads(heads.weight.clone().requires_grad_(), bias.clone().requires_grad_())
    optimizer, schedule = _optimizer([*weights.values(), own.weight, own.bias], settings, rows.shape[1])
    random, labels, raters = torch.Generator().manual_seed(seed), scores.flatten(0, 1), scores.shape[1]
    states = vmap(last_states(template))
    for _, batch in batches(rows, settings, random, f"backbones of URMs, {loss}"):
        texts = batch // raters  # (H, batch)
        longest = int(lengths[texts].max())
        told = own.ratings(states(weights, table[texts][..., :longest], lengths[texts]))
        _step(_losses(told, labels[batch], loss, random).sum(), optimizer, schedule)
    trained = {name: one.detach() for name, one in weights.items()}
    return AttributeBackbones(template, trained, _finished(own, loss))


def _losses(told: Ratings, wanted: Tensor, loss: Loss, random: torch.Generator) -> Tensor:
    if loss == "mle":
        return likelihood_loss(told, wanted)
    noise = torch.randn(wanted.shape, generator=random, dtype=wanted.dtype) * (loss == "regression")
    return regression_loss(told, wanted, noise)


@torch.no_grad()
def _finished(heads: AttributeHeads, loss: Loss) -> AttributeHeads:
    """Return trained heads; the deterministic twin's deviations are 0."""
    weight, bias = heads.weight.detach().clone(), heads.bias.detach().clone()
    if loss == "deterministic":
        weight[:, :, 1], bias[:, :, 1] = 0, -torch.inf
    return AttributeHeads(weight, bias)


# --- from attributes to one reward ----------------------------------------------------------------------


@dataclass(frozen=True)
class Gating:
    """The gating layers of H URMs: two hidden layers with SELU, then weights without bounds.

    `weights` are named as in the published URM, below its `weights.fc.`: `0.weight` (H, hidden, d), `0.bias`
    (H, hidden), and so on for 2 and 4.
    """

    weights: dict[str, Tensor]

    def __call__(self, features: Tensor) -> Tensor:
        """Return the weights of attributes (H, N, K) for features, (N, d) for all models or (H, N, d)."""
        hidden = features
        for layer in GATING_LAYERS:
            hidden = functional.selu(hidden) if layer != "0" else hidden
            hidden = hidden @ self.weights[f"{layer}.weight"].mT + self.weights[f"{layer}.bias"][:, None]
        return hidden


def reward(ratings: Ratings, weights: Tensor) -> Tensor:
    """Return the sum over attributes of mean times weight (H, N); weights (K,), or of a gating (H, N, K)."""
    return (ratings.means * weights).sum(-1)


def reward_variance(ratings: Ratings, weights: Tensor, how: VarianceSum = "weighted") -> Tensor:
    """Return the variance of the reward (H, N): `weighted`, sum of w^2 sigma^2, that of a sum of independent
    scores; `plain`, sum of sigma^2, as the paper filters by.
    """
    factors = weights**2 if how == "weighted" else torch.ones_like(weights)
    return (ratings.variances * factors).sum(-1)


def train_gating(
    chosen: Tensor, rejected: Tensor, heads: AttributeHeads, *, settings: HeadTraining, hidden: int, seed: int
) -> Gating:
    """Train a gating layer for each head on the features of preferred and other responses (pairs, d) by the
    Bradley-Terry loss, with all else frozen (Equation 6). Fresh weights are LeCun normal, as SELU wants them.
    """
    count, attributes, random = len(heads.weight), heads.weight.shape[1], torch.Generator().manual_seed(seed)
    location, scale = chosen.mean(0), chosen.std(0).clamp_min(1e-6)  # (d,)
    sides = [(one - location) / scale for one in (chosen, rejected)]
    weights: dict[str, Tensor] = {}
    sizes = (chosen.shape[1], hidden, hidden, attributes)
    for layer, fan_in, fan_out in zip(GATING_LAYERS, sizes, sizes[1:], strict=False):
        drawn = torch.randn(count, fan_out, fan_in, generator=random) / math.sqrt(fan_in)
        weights[f"{layer}.weight"] = drawn.requires_grad_()
        weights[f"{layer}.bias"] = torch.zeros(count, fan_out).requires_grad_()
    gating, means = Gating(weights), [heads.ratings(one).means.detach() for one in (chosen, rejected)]
    optimizer, schedule = _optimizer(list(weights.values()), settings, len(chosen))
    rows, models = torch.arange(len(chosen)).repeat(count, 1), torch.arange(count)[:, None]
    for _, batch in batches(rows, settings, random, "gating layers"):
        scores = [
            (gating(x[batch]) * mean[models, batch]).sum(-1) for x, mean in zip(sides, means, strict=True)
        ]
        _step(-functional.logsigmoid(scores[0] - scores[1]).mean(-1).sum(), optimizer, schedule)
    fitted = {name: one.detach() for name, one in weights.items()}
    first = fitted["0.weight"] / scale  # (H, hidden, d)
    return Gating(fitted | {"0.weight": first, "0.bias": fitted["0.bias"] - first @ location})


@dataclass(frozen=True)
class AttributeReward:
    """URMEs on one frozen backbone as a source of rewards, one for every policy: the members' mean reward,
    with fixed `weights` (K,) of the attributes. The penalty is weighed by one part of its total variance.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: AttributeHeads  # members of a policy's URME side by side
    weights: Tensor
    members: int
    weighed_by: str  # aleatoric, epistemic
    max_length: int
    truth: Truth

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Members:
        """Judge responses, each by the URME of the policy that wrote it."""
        features, _ = read(self.model, self.tokenizer, prompts, responses, self.max_length)
        own = torch.from_numpy(np.asarray(policy, dtype=np.int64))
        stacked = self.heads.weight, self.heads.bias
        weight, bias = (one.unflatten(0, (-1, self.members))[own] for one in stacked)  # (N, M, ...)
        outputs = torch.einsum("nmkpd,nd->mnkp", weight, features) + bias.swapaxes(0, 1)  # (M, N, K, 2)
        told = Ratings(*outputs.unbind(-1))  # (members, N, K)
        rewards = reward(told, self.weights)  # (M, N)
        parts = total_variance(rewards, reward_variance(told, self.weights))
        variance = dict(zip(("aleatoric", "epistemic"), parts, strict=True))[self.weighed_by]
        return Members(rewards.T.double().numpy(), weights=variance.double().numpy())

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,)."""
        return self.truth(prompts, responses)


# --- URME: what members disagree about ------------------------------------------------------------------


def largest_gap(rewards: Tensor) -> Tensor:
    """Equation 7: the largest difference between two members' rewards, from (members, N): (N,)."""
    return rewards.amax(0) - rewards.amin(0)


def largest_covariance(variances: Tensor) -> Tensor:
    """Equation 8: the largest Frobenius norm of a member's covariance, which is diagonal, from its variances
    (members, N, K): (N,).
    """
    return variances.norm(dim=-1).amax(0)


def total_variance(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return the parts of the variance of a mixture of members, from (members, N) each: aleatoric, the
    members' mean variance, and epistemic, the variance (ddof=0) of their means; the sum is the total (N,).
    """
    return variances.mean(0), means.var(0, correction=0)
