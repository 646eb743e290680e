"""Evaluation: returns, their standard errors, the KL, against exact enumeration and repetition."""

import numpy as np
import pytest
import torch

from tests.small_problem import TableReward, policy, tokenizer
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling
from vaalign_lib.training.evaluation import Evaluator, standard_error
from vaalign_lib.training.objectives import Task

WORDS = 9
SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=0, max_new_tokens=1,
                    log_probability_temperature=1.0)  # fmt: skip


def worth(prompt, response):
    return float(prompt) + (2.0 * int(response) if response else 0.0)


def evaluator(samples, prompts=("3", "4", "5"), gold=None, seed=0):
    source = TableReward(worth, lambda p, r: 1.0)
    model = policy(WORDS, seed=1)
    return Evaluator(
        ReferencePolicy(model), tokenizer(WORDS), Task(prompts, source, gold), SAMPLING, samples, seed
    )


@torch.no_grad()
def exact(stack, place, prompts=("3", "4", "5")):
    """Return a policy's true return and KL to the reference, by enumeration of all one-token answers."""
    returns, kls = [], []
    for prompt in prompts:
        ids = torch.tensor([[int(prompt)]]).expand(stack.size, -1)
        share = stack.model(ids, position_ids=torch.zeros_like(ids)).logits[place, 0].log_softmax(-1)
        start = policy(WORDS, seed=1)(ids[:1]).logits[0, 0].log_softmax(-1)
        words = np.arange(WORDS) * (np.arange(WORDS) != 1)  # the end reads as nothing
        returns.append(float(prompt) + 2 * (share.exp().numpy() * words).sum())
        kls.append(float((share.exp() * (share - start)).sum()))
    return np.mean(returns), np.mean(kls)


def drifted(size):
    stack = PolicyStack(policy(WORDS, seed=1), size)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in stack.parameters().values():
            weight.add_(0.2 * torch.randn(weight.shape, generator=random))
    return stack


def test_returns_and_kl_are_those_of_enumeration():
    stack = drifted(3)
    many = ("3", "4", "5") * 200
    known = evaluator(3, many, gold=lambda p, r: np.zeros(len(p)))
    found = known.policies(stack, [4, 5, 9])
    assert found["policy"].tolist() == [4, 5, 9] and (found["gold"] == 0).all()
    for place in range(3):
        value, kl = exact(stack, place)
        error = found["true_reward_error"][place]
        assert abs(found["true_reward"][place] - value) < 4 * error
        assert abs(found["kl"][place] - kl) < 0.06
        assert kl > 0.05
    references = evaluator(3, many).references(range(4))
    assert (references["kl"].abs() < 1e-5).all()
    assert references["true_reward"].nunique() == 4


def test_the_standard_error_is_the_spread_over_repetitions():
    stack = PolicyStack(policy(WORDS, seed=2), 150)  # one policy, with random numbers of 150
    each = evaluator(8).policies(stack, range(150))
    spread = each["true_reward"].std(ddof=1)
    told = np.sqrt((each["true_reward_error"] ** 2).mean())
    assert 0.82 < spread / told < 1.2


def test_prompts_are_fixed_and_do_not_count_as_noise():
    values = np.array([[[1.0, 1.0], [9.0, 9.0]], [[1.0, 3.0], [5.0, 9.0]]])
    np.testing.assert_allclose(standard_error(values), [0, np.sqrt((2 + 8) / 2 / 4)])


def test_a_policy_is_evaluated_alike_in_any_company():
    stack = drifted(3)
    whole = evaluator(3).policies(stack, [4, 5, 9])
    again = evaluator(3).policies(stack, [4, 7, 9])
    assert whole.iloc[[0, 2]].equals(again.iloc[[0, 2]])
    assert whole["true_reward"][1] != again["true_reward"][1]


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="at least two prompts and two samples"):
        evaluator(1)
