"""The arithmetic of PPO as trl 0.11's PPOTrainer has it, for N policies at once.

Arrays are (N, responses, tokens); `mask` is True for tokens of a response with its end. What trl computes
as one number over a batch is one number for each policy here, (N,) or (N, 1, 1).

What differs from trl 0.11.4, all of it by intent:
- trl's updates run in eval mode and never drop anything out, whatever `lora_dropout` says; here
  inputs of adapters are.
- trl clips the gradient of its first update only (`max_grad_norm` meets an iterator that is spent after
  it); here that of every update is clipped.
- of a pass whose mean ratio is above `ratio_threshold` trl logs losses of 0; here the log has the losses,
  and the pass has no gradient in either.
- the adaptive coefficient stays positive, see `adapted_coefficient`.
"""

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
    count = mask.sum((1, 2))
    centred = values - masked_mean(values, mask)[:, None, None]
    variance = masked_mean(centred**2, mask) * count / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)[:, None, None]


def kl_penalty(
    log_ratio: Tensor, kind: Literal["kl", "abs", "mse", "full"], full: Tensor | None = None
) -> Tensor:
    """Return the penalty of each token.

    Args:
        log_ratio: ln pi - ln pi_0 of the sampled tokens.
        kind: `kl` the log ratio itself, `abs` its size, `mse` half its square, `full` the divergence over
            the whole vocabulary.
        full: that divergence at each token, for `full` only.
    """
    if kind == "kl":
        return log_ratio
    if kind == "abs":
        return log_ratio.abs()
    if kind == "mse":
        return 0.5 * log_ratio**2
    if full is None:
        raise ValueError("full: the penalty over the whole vocabulary needs the divergence itself")
    return full


def token_rewards(score: Tensor, penalty: Tensor, coefficient: Tensor, mask: Tensor) -> Tensor:
    """Return each token's reward: minus the penalty, and on the last the score.

    Args:
        score: of the responses (N, responses).
        penalty: of the tokens.
        coefficient: of the penalty (N, responses).
        mask: of the tokens.
    """
    rewards = -coefficient[:, :, None] * penalty
    last = mask.sum(2, keepdim=True) - 1
    return rewards.scatter_add(2, last, score[:, :, None])


def advantages_and_returns(
    values: Tensor, rewards: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al., 2016); the advantages are whitened."""
    values, rewards = values * mask, rewards * mask
    following = torch.cat((values[:, :, 1:], torch.zeros_like(values[:, :, :1])), dim=2)
    surprise = rewards + gamma * following - values
    advantages = torch.empty_like(values)
    ahead = torch.zeros_like(values[:, :, 0])
    for token in reversed(range(values.shape[2])):
        ahead = surprise[:, :, token] + gamma * lam * ahead
        advantages[:, :, token] = ahead
    return masked_whiten(advantages, mask), advantages + values


@dataclass(frozen=True)
class Losses:
    """What one pass gives for each policy (N,); `total` is what it descends.

    Attributes:
        total: policy loss plus coefficient times value loss; 0 where the mean ratio is too large.
        policy: clipped surrogate.
        value: clipped, halved squared error.
        ratio: mean probability ratio.
        clipped: share of tokens whose ratio is beyond the clip range and which clipping changes.
        value_clipped: the same for the values.
        approximate_kl: half the mean squared log ratio to the policy that wrote the responses.
    """

    total: Tensor
    policy: Tensor
    value: Tensor
    ratio: Tensor
    clipped: Tensor
    value_clipped: Tensor
    approximate_kl: Tensor


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
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    errors, near_errors = (values - returns) ** 2, (near - returns) ** 2
    value = 0.5 * masked_mean(torch.maximum(errors, near_errors), mask)
    change = (log_probabilities - old_log_probabilities) * mask
    ratio = change.clamp(max=60.0).exp()  # so that even a skipped pass has a finite gradient
    plain = -advantages * ratio
    held = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    policy = masked_mean(torch.maximum(plain, held), mask)
    mean_ratio = masked_mean(ratio, mask).detach()
    total = torch.where(mean_ratio > ratio_threshold, 0.0, policy + vf_coef * value)
    with torch.no_grad():
        clipped = masked_mean((held > plain).float(), mask)
        value_clipped = masked_mean((near_errors > errors).float(), mask)
        approximate_kl = 0.5 * masked_mean(change**2, mask)
    return Losses(total, policy.detach(), value.detach(), mean_ratio, clipped, value_clipped, approximate_kl)


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
