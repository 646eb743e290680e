"""Objectives: each by hand, and how they are related."""

import pytest
import torch

from vaalign_lib.training.objectives import OBJECTIVES, Outcome

RANDOM = torch.Generator().manual_seed(0)
REWARD, VARIANCE, WORST, SOFT = (torch.randn(3, 4, generator=RANDOM) for _ in range(4))
OUTCOME = Outcome(REWARD, VARIANCE.abs(), WORST, SOFT)
BETA, STRENGTH = torch.tensor([[0.1], [0.2], [0.5]]), torch.tensor([[0.3], [0.0], [1.0]])
EXPECTED = {  # score and weight
    "vanilla": (REWARD, 1.0),
    "variance_aware": (REWARD, OUTCOME.variance),
    "variance_aware_exact": (REWARD - BETA * OUTCOME.variance, OUTCOME.variance),
    "uwo": (REWARD - STRENGTH * OUTCOME.variance, 1.0),
    "worst_case": (WORST, 1.0),
    "reward_robust": (STRENGTH * REWARD + (1 - STRENGTH) * WORST, 1.0),
    "effective": (SOFT, 1.0),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_score_and_weight(name):
    score, weight = EXPECTED[name]
    shaped = OBJECTIVES[name](OUTCOME, BETA, STRENGTH)
    torch.testing.assert_close(shaped.score, score)
    torch.testing.assert_close(shaped.weight, torch.as_tensor(weight).expand(3, 4))


def test_exact_is_variance_aware_and_uwo_together():
    exact = OBJECTIVES["variance_aware_exact"](OUTCOME, BETA, STRENGTH)
    torch.testing.assert_close(exact.score, OBJECTIVES["uwo"](OUTCOME, BETA, BETA).score)
    torch.testing.assert_close(exact.weight, OBJECTIVES["variance_aware"](OUTCOME, BETA, BETA).weight)


def test_reward_robust_lies_between_its_two_ends():
    ends = [OBJECTIVES["reward_robust"](OUTCOME, BETA, torch.tensor(x)).score for x in (1.0, 0.0)]
    torch.testing.assert_close(ends[0], OBJECTIVES["vanilla"](OUTCOME, BETA, STRENGTH).score)
    torch.testing.assert_close(ends[1], OBJECTIVES["worst_case"](OUTCOME, BETA, STRENGTH).score)
