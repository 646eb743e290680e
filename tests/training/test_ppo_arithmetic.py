"""The arithmetic against trl 0.11.4's own functions, whose outputs `tests/trl/make_fixtures.py` stored.

trl sees four responses as one batch; here the same four are one policy of a stack whose other policy is
something else, so that nothing can leak from one to the other.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vaalign_lib.policies.sampling import token_log_probabilities
from vaalign_lib.training.losses import (
    adapted_coefficient,
    advantages_and_returns,
    kl_penalty,
    losses,
    masked_mean,
    masked_whiten,
    token_rewards,
)

TRL = load_file(Path(__file__).parent.parent / "trl" / "arithmetic.safetensors")
MASK = TRL["mask"]


def beside(values, seed=0):
    """Put other numbers beside trl's (2, responses, tokens or nothing)."""
    random = torch.Generator().manual_seed(seed)
    return torch.stack((torch.randn(values.shape, generator=random).to(values), values))


def near(ours, theirs, mask=None):
    """Compare the second policy with trl, where the mask is True."""
    chosen = ... if mask is None else mask
    torch.testing.assert_close(ours[1][chosen], theirs[chosen], atol=1e-5, rtol=1e-5)


MASKS = torch.stack((torch.ones_like(MASK), MASK))


def divergence():
    policy, reference = TRL["logits"].log_softmax(-1), TRL["reference_logits"].log_softmax(-1)
    return (policy.exp() * (policy - reference)).sum(-1)


def test_log_probabilities_of_tokens_are_trls():
    ours = token_log_probabilities(TRL["logits"], TRL["chosen"], 1.0)
    torch.testing.assert_close(ours, TRL["old"], atol=1e-5, rtol=1e-5)


def test_the_temperature_divides_the_logits():
    ours = token_log_probabilities(TRL["logits"], TRL["chosen"], 1.7)
    theirs = (TRL["logits"] / 1.7).log_softmax(-1).gather(2, TRL["chosen"][..., None])[..., 0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "abs", "mse"])
def test_penalties_and_rewards_are_trls(kind):
    ratio = (TRL["old"] - TRL["reference"]) * MASK
    penalty = kl_penalty(beside(ratio), kind)
    near(penalty, TRL[f"penalties.{kind}"], MASK)
    coefficient = torch.full((2, 4), 0.3)
    rewards = token_rewards(beside(TRL["scores"]), penalty * MASKS, coefficient, MASKS)
    near(rewards, TRL[f"rewards.{kind}"], MASK)
    assert not rewards[1][~MASK].any()


def test_the_penalty_over_the_whole_vocabulary_is_trls():
    penalty = kl_penalty(torch.zeros(1), "full", divergence())
    torch.testing.assert_close(penalty, TRL["penalties.full"], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="needs the divergence"):
        kl_penalty(torch.zeros(1), "full")


def test_advantages_and_returns_are_trls():
    advantages, returns = advantages_and_returns(
        beside(TRL["values"]), beside(TRL["rewards.kl"], 1), MASKS, gamma=0.97, lam=0.9
    )
    near(advantages, TRL["advantages"], MASK)
    near(returns, TRL["returns"])


def test_advantages_are_the_sum_that_defines_them():
    """By hand: sum over k of (gamma lam)^k times the error of temporal differences k tokens later."""
    random = np.random.default_rng(0)
    values, rewards = random.normal(size=(2, 1, 1, 5))
    td_errors = rewards[0, 0] + 0.9 * np.append(values[0, 0, 1:], 0) - values[0, 0]
    expected = [sum((0.9 * 0.8) ** k * d for k, d in enumerate(td_errors[t:])) for t in range(5)]
    ours, returns = advantages_and_returns(
        torch.tensor(values), torch.tensor(rewards), torch.ones(1, 1, 5, dtype=torch.bool), 0.9, 0.8
    )
    expected = np.array(expected)
    np.testing.assert_allclose(returns[0, 0], expected + values[0, 0], atol=1e-9)
    whitened = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(ours[0, 0], whitened, atol=1e-6)


SETTINGS = {"cliprange": 0.1, "cliprange_value": 0.3, "vf_coef": 0.4}


def losses_like_trl(threshold):
    names = ("new", "old", "new_values", "masked_values", "advantages", "returns")
    arguments = [beside(TRL[name], k) for k, name in enumerate(names)]
    return losses(*arguments, MASKS, **SETTINGS, ratio_threshold=threshold)


def test_losses_and_clip_fractions_are_trls():
    ours = losses_like_trl(10.0)
    near(ours.policy_loss, TRL["loss.policy"])
    near(ours.loss, TRL["loss.total"])
    near(0.4 * ours.value_loss, TRL["loss.value"])
    near(ours.clip_fraction, TRL["stats.policy.clipfrac"])
    near(ours.value_clip_fraction, TRL["stats.val.clipfrac"])
    near(ours.approximate_kl, TRL["stats.policy.approxkl"])
    assert ours.clip_fraction[1] > 0 and ours.value_clip_fraction[1] > 0


def test_a_pass_with_too_large_a_ratio_is_skipped_as_trl_does():
    ours = losses_like_trl(0.5)
    assert TRL["loss.total.skipped"] == 0
    assert ours.loss[1] == 0
    near(ours.loss, TRL["loss.total.skipped"])


def test_a_skipped_policy_has_no_gradient_and_others_keep_theirs():
    old = torch.zeros(2, 3, 4)
    new = torch.stack((torch.full((3, 4), 5.0), torch.full((3, 4), 0.1))).requires_grad_()
    same = torch.ones(2, 3, 4)
    found = losses(new, old, old, old, same, same, same.bool(), **SETTINGS, ratio_threshold=10.0)
    found.loss.sum().backward()
    assert not new.grad[0].any()
    plain = torch.full((3, 4), 0.1, requires_grad=True)
    (-(plain.exp().clamp(max=1.1)).mean()).backward()
    torch.testing.assert_close(new.grad[1], plain.grad)


def test_padding_cannot_overflow_into_the_losses():
    mask = MASKS.clone()
    new = beside(TRL["new"]) + 1e4 * ~mask  # e.g. a barred word after the end
    names = ("old", "new_values", "masked_values", "advantages", "returns")
    arguments = [beside(TRL[name], k) for k, name in enumerate(names, 1)]
    found = losses(new.requires_grad_(), *arguments, mask, **SETTINGS, ratio_threshold=10.0)
    near(found.loss, TRL["loss.total"])
    found.loss.sum().backward()
    assert new.grad.isfinite().all() and not new.grad[~mask].any()


@pytest.mark.parametrize("kl", [0.1, 0.65, 0.75, 5.0])
@pytest.mark.parametrize(("batch", "horizon"), [(16, 19), (64, 19), (128, 10000)])
def test_the_adaptive_coefficient_is_trls(kl, batch, horizon):
    ours = adapted_coefficient(
        torch.tensor([0.3]), torch.tensor([kl]), target=0.7, horizon=horizon, batch=batch
    )
    torch.testing.assert_close(ours[0], TRL[f"adaptive.{kl}.{batch}.{horizon}"].float())


def test_the_adaptive_coefficient_stays_positive_where_trls_turns_negative():
    """Table 13's 64 responses on four GPUs, if trl counts all of them, over a horizon of 19."""
    assert TRL["adaptive.0.1.256.19"] < 0
    ours = adapted_coefficient(torch.tensor([0.3]), torch.tensor([0.1]), target=0.7, horizon=19, batch=256)
    torch.testing.assert_close(ours, torch.tensor([0.03]))


def test_each_policy_has_its_own_coefficient():
    ours = adapted_coefficient(
        torch.tensor([0.3, 0.3, 0.6]), torch.tensor([0.7, 7.0, 0.0]), target=0.7, horizon=100, batch=10
    )
    torch.testing.assert_close(ours, torch.tensor([0.3, 0.3 * 1.02, 0.6 * 0.98]))


def test_means_and_whitening_are_over_the_masked_tokens_of_one_policy():
    random = torch.Generator().manual_seed(3)
    values = torch.randn(3, 4, 5, generator=random) * 7 + 2
    mask = torch.rand(3, 4, 5, generator=random) < 0.6
    white = masked_whiten(values, mask)
    for j in range(3):
        own = values[j][mask[j]]
        torch.testing.assert_close(masked_mean(values, mask)[j], own.mean())
        torch.testing.assert_close(white[j][mask[j]], (own - own.mean()) / own.std(), atol=1e-5, rtol=0)


def test_one_token_is_whitened_to_nothing():
    one = torch.zeros(1, 1, 3, dtype=torch.bool)
    one[0, 0, 0] = True
    assert masked_whiten(torch.full((1, 1, 3), 4.0), one)[0, 0, 0] == 0
