"""The arithmetic of PPO as trl 0.11's PPOTrainer has it, for N policies at once: arrays are (N, B, T),
policies by responses by tokens; `mask` is True for tokens of a response with its end; trl's means are (N,).
"""

# What differs from trl 0.11.4, all of it by intent:
# - trl's updates never drop anything out, whatever `lora_dropout` says; here inputs of adapters are.
# - trl clips the gradient of its first update only (`max_grad_norm` meets an iterator that is spent after
#   it); here that of every update is clipped.
# - of a pass whose mean ratio is above `ratio_threshold` trl logs losses of 0; here the log has the losses,
#   and the pass has no gradient in either.
# - the adaptive coefficient stays positive, see `adapted_coefficient`.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SMALLEST_FACTOR = 0.1  # of the adaptive coefficient in one step, where trl's rule would go below


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over responses and tokens where the mask is True (N,)."""
    return (values * mask).sum((1, 2)) / mask.sum((1, 2))


def masked_whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Give values mean 0 and variance 1 (ddof=1) over each policy's masked tokens."""
    count = mask.sum((1, 2))  # (N,)
    centred = values - masked_mean(values, mask)[:, None, None]  # (N, B, T)
    variance = masked_mean(centred**2, mask) * count / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)[:, None, None]


def kl_penalty(
    log_ratio: Tensor, kind: Literal["kl", "abs", "mse", "full"], full: Tensor | None = None
) -> Tensor:
    """Return the penalty of each token (N, B, T) from its log ratio, ln pi - ln pi_0: that itself, its size,
    half its square, or the divergence over the whole vocabulary, which has to be given as `full`.
    """
    if kind == "full":
        if full is None:
            raise ValueError("full: the penalty over the whole vocabulary needs the divergence itself")
        return full
    return {"kl": log_ratio, "abs": log_ratio.abs(), "mse": 0.5 * log_ratio**2}[kind]


def token_rewards(score: Tensor, penalty: Tensor, coefficient: Tensor, mask: Tensor) -> Tensor:
    """Return each token's reward (N, B, T): minus coefficient (N, B) times penalty, and on the last the score
    (N, B).
    """
    rewards = -coefficient[:, :, None] * penalty  # (N, B, T)
    last = mask.sum(2, keepdim=True) - 1  # (N, B, 1)
    return rewards.scatter_add(2, last, score[:, :, None])


def advantages_and_returns(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016); the advantages are whitened."""
    values, rewards = values * mask, rewards * mask  # (N, B, T)
    following = torch.cat((values[:, :, 1:], torch.zeros_like(values[:, :, :1])), dim=2)  # (N, B, T)
    td_errors = rewards + gamma * following - values
    advantages, ahead = torch.empty_like(values), torch.zeros_like(values[:, :, 0])  # (N, B, T), (N, B)
    for token in reversed(range(values.shape[2])):
        ahead = td_errors[:, :, token] + gamma * lam * ahead
        advantages[:, :, token] = ahead
    return masked_whiten(advantages, mask), advantages + values


@dataclass(frozen=True)
class Losses:
    """What one pass gives for each policy (N,)."""

    loss: Tensor  # is descended: policy loss plus vf_coef times value loss; 0 if the ratio is too large
    policy_loss: Tensor  # clipped surrogate
    value_loss: Tensor  # clipped, halved squared error
    ratio: Tensor  # mean probability ratio
    clip_fraction: Tensor  # share of tokens whose ratio is beyond the clip range and which clipping changes
    value_clip_fraction: Tensor  # the same for the values
    approximate_kl: Tensor  # half the mean squared log ratio to the policy that wrote the responses


def losses(
    log_probabilities: Tensor,
    old_log_probabilities: Tensor,
    values: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    cliprange_value: float,
    vf_coef: float,
    ratio_threshold: float,
) -> Losses:
    """Return the clipped losses of a pass; everything but the first and third argument is constant."""
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)  # (N, B, T)
    errors, near_errors = (values - returns) ** 2, (near - returns) ** 2
    value_loss = 0.5 * masked_mean(torch.maximum(errors, near_errors), mask)  # (N,)
    change = (log_probabilities - old_log_probabilities) * mask  # (N, B, T)
    ratio = change.clamp(max=60.0).exp()  # (N, B, T), so that even a skipped pass has a finite gradient
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy_loss = masked_mean(torch.maximum(plain, held), mask)  # (N,)
    mean_ratio = masked_mean(ratio, mask).detach()
    loss = torch.where(mean_ratio > ratio_threshold, 0.0, policy_loss + vf_coef * value_loss)
    with torch.no_grad():
        clipped = masked_mean((held > plain).float(), mask)
        value_clipped = masked_mean((near_errors > errors).float(), mask)
        approximate_kl = 0.5 * masked_mean(change**2, mask)
    constant = policy_loss.detach(), value_loss.detach(), mean_ratio, clipped, value_clipped, approximate_kl
    return Losses(loss, *constant)


def adapted_coefficient(
    coefficient: Tensor, kl: Tensor, *, target: float, horizon: float, batch: int
) -> Tensor:
    """Return the KL coefficient for the next batch (Ziegler et al., 2019), per policy (N,).

    trl multiplies by 1 + clip(kl / target - 1, -0.2, 0.2) * batch / horizon. With the batch 5 or more
    times the horizon that factor can be 0 or negative, a reward for leaving the reference; here it is at
    least 0.1, and the same as trl's wherever trl's is not lower.
    """
    error = (kl / target - 1).clamp(-0.2, 0.2)
    return coefficient * (1 + error * batch / horizon).clamp(min=SMALLEST_FACTOR)
