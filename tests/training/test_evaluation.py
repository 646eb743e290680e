"""Evaluation: returns, their standard errors, the KL, against exact enumeration and repetition."""

import numpy as np
import pytest
import torch

from tests.small_problem import END, TableReward, policy, tokenizer
from vaalign_lib.models import pad_id
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import Prompts, rollout, sequences
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling
from vaalign_lib.training import evaluation
from vaalign_lib.training.evaluation import Evaluator, divergences, standard_error
from vaalign_lib.training.objectives import Task

WORDS = 9
SAMPLING = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=0, max_new_tokens=1,
                    log_probability_temperature=1.0)  # fmt: skip


def worth(prompt, response):
    return float(prompt) + (2.0 * int(response) if response else 0.0)


def evaluator(samples, prompts=("3", "4", "5"), gold=None, seed=0, **sampling):
    source = TableReward(worth, lambda p, r: 1.0)
    model = policy(WORDS, seed=1)
    return Evaluator(
        ReferencePolicy(model),
        tokenizer(WORDS),
        Task(prompts, source, gold),
        SAMPLING.model_copy(update=sampling),
        samples,
        seed,
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
        assert found["kl"][place] == pytest.approx(kl, rel=1e-4)  # of one token it is exact
        assert abs(found["log_ratio"][place] - kl) < 0.06
        assert kl > 0.05
    references = evaluator(3, many).references(range(4))
    assert (references["kl"] == 0).all() and (references["log_ratio"].abs() < 1e-5).all()
    assert references["true_reward"].nunique() == 4


# --- the KL ---------------------------------------------------------------------------------------------


def answered(stack, count, tokens, temperature, **settings):
    """Return untruncated answers to one prompt, `count` by each policy, and the log ratio of each (R,)."""
    sampling = SAMPLING.model_copy(
        update={
            "temperature": temperature,
            "log_probability_temperature": temperature,
            "max_new_tokens": tokens,
        }
        | settings
    )
    words, reference = tokenizer(WORDS), ReferencePolicy(policy(WORDS, seed=1))
    prompts = Prompts.of(words, ["3"] * (count * stack.size))
    uniforms = torch.rand(len(prompts.ids), tokens, generator=torch.Generator().manual_seed(5))
    written = rollout(stack, prompts, uniforms, sampling, END, pad_id(words))
    joined = sequences(prompts, written.responses, torch.float32)
    there = reference.log_probabilities(joined, temperature)
    return reference, written, ((written.log_probabilities - there) * written.mask).sum(1)


@torch.no_grad()
def of_two_tokens(stack, temperature):
    """Return the KL of answers of one or two tokens to one prompt, by enumeration of all of them."""

    def log_shares(model, ids):
        places = torch.arange(len(ids))[None]
        logits = model(torch.tensor([ids]), position_ids=places).logits.reshape(len(ids), -1)[-1]
        return (logits / temperature).log_softmax(-1).double()

    total, start = 0.0, policy(WORDS, seed=1)
    first, same = (log_shares(model, [3]) for model in (stack.model, start))
    for word in range(WORDS):
        ratio, share = first[word] - same[word], first[word].exp()
        if word == END:
            total += float(share * ratio)
            continue
        then, there = (log_shares(model, [3, word]) for model in (stack.model, start))
        total += float((share * then.exp() * (ratio + then - there)).sum())
    return total


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_the_kl_of_two_tokens_is_that_of_enumeration(temperature):
    stack = drifted(1)
    reference, written, _ = answered(stack, 4000, 2, temperature)
    assert 0 < int((written.responses[:, 0] == END).sum()) < 4000  # after which nothing counts
    found = divergences(stack, reference, written, temperature)
    error = float(found.std()) / 4000**0.5
    kl = of_two_tokens(stack, temperature)
    assert abs(float(found.mean()) - kl) < 4 * error and error < 0.02 * kl


def test_the_kl_is_the_mean_log_ratio_of_untruncated_answers_and_never_negative():
    stack, count = drifted(2), 4000
    reference, written, ratios = answered(stack, count, 6, 1.5)
    found = divergences(stack, reference, written, 1.5)
    gaps = (found - ratios).view(2, count)
    assert (gaps.mean(1).abs() < 4 * gaps.std(1) / count**0.5).all()
    assert (found > -1e-5).all() and (ratios < -0.1).any()
    assert (found.view(2, count).std(1) < 0.7 * ratios.view(2, count).std(1)).all()


def test_the_reference_itself_is_at_a_kl_of_zero():
    stack = PolicyStack(policy(WORDS, seed=1), 2)
    reference, written, _ = answered(stack, 50, 6, 1.5)
    assert divergences(stack, reference, written, 1.5).abs().max() < 1e-5
    assert divergences(reference, reference, written, 1.5).abs().max() < 1e-5


def test_the_kl_is_the_same_in_pieces(monkeypatch):
    stack = drifted(2)
    reference, written, _ = answered(stack, 20, 6, 1.5)
    whole = divergences(stack, reference, written, 1.5)
    monkeypatch.setattr(evaluation, "NUMBERS", 1)
    assert torch.allclose(divergences(stack, reference, written, 1.5), whole, atol=1e-6)


def test_truncation_changes_the_log_ratio_and_not_the_kl():
    """With the likeliest word alone the log ratio is that of this word."""
    stack = drifted(3)
    plain, greedy = (evaluator(2, **one).policies(stack, [4, 5, 9]) for one in ({}, {"top_k": 1}))
    assert plain["kl"].equals(greedy["kl"])
    for place in range(3):
        ratios = []
        for prompt in (3, 4, 5):
            ids = torch.tensor([[prompt]]).expand(3, -1)
            with torch.no_grad():
                share = stack.model(ids, position_ids=torch.zeros_like(ids)).logits[place, 0].log_softmax(-1)
                start = policy(WORDS, seed=1)(ids[:1]).logits[0, 0].log_softmax(-1)
            ratios.append(float((share - start)[share.argmax()]))
        assert greedy["log_ratio"][place] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert (greedy["log_ratio"] - greedy["kl"]).abs().min() > 0.01


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
