"""PPO for stacks: what it converges to, that it is trl's, and that policies do not disturb each other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.small_problem import TableReward, policy, trainer
from vaalign_lib.models import response_texts
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import (
    Prompts,
    Rollout,
    response_states,
    sequences,
    token_log_probabilities,
)
from vaalign_lib.rewards.base import Interval, Members, Unit
from vaalign_lib.theory.tabular import exact_policy, ppo_fixed_point, softmax_policy
from vaalign_lib.training.objectives import Method
from vaalign_lib.training.ppo import LengthCollapseWarning, Written

TRL = Path(__file__).parent.parent / "trl"

# --- what it converges to ---------------------------------------------------------------------------

BETA = 0.5
ARMS = 6  # words; "1" ends a response, and reads as nothing


def responses(tokens):
    """Return all responses of at most so many tokens, as ids without the end."""
    one = [[], *([k] for k in (0, 2, 3, 4, 5))]
    if tokens == 1:
        return one
    return [[], *(a + b for a in one[1:] for b in one)]


@torch.no_grad()
def distribution(model, tokens):
    """Return the probability of every response after the prompt "3", from the model's own logits."""
    found = []
    for response in responses(tokens):
        ids = [3, *response, 1][: tokens + 1]
        share = model(torch.tensor([ids]))[0].log_softmax(-1)
        found.append(sum(float(share[k, word]) for k, word in enumerate(ids[1:])))
    share = np.exp(found)
    np.testing.assert_allclose(share.sum(), 1, atol=1e-5)  # all responses there are
    return share / share.sum()


class Logits:
    """One policy of a stack as a function of token ids."""

    def __init__(self, stack, policy):
        self.stack, self.policy = stack, policy

    @torch.no_grad()
    def __call__(self, ids):
        rows = ids.expand(self.stack.size, -1)
        joined = sequences(Prompts(rows[:, :1], torch.ones_like(rows[:, :1], dtype=torch.bool)),
                           torch.nn.functional.pad(rows[:, 1:], (0, 1)), torch.float32)  # fmt: skip
        hidden = self.stack.hidden(joined.ids, joined.mask, joined.positions)
        return self.stack.logits(hidden)[self.policy][None]


def problem(tokens, equal):
    """Return middles and variances of all responses, and a source that answers with them."""
    random = np.random.default_rng(tokens)
    texts = [" ".join(map(str, one)) for one in responses(tokens)]
    middle = random.normal(0, 0.4, len(texts))
    variance = np.full(len(texts), 0.8) if equal else random.choice([0.5, 2.0], len(texts))
    row = {text: k for k, text in enumerate(texts)}
    source = TableReward(lambda p, r: middle[row[r]], lambda p, r: variance[row[r]], still=True)
    return middle, variance, source


def converged(objective, tokens, equal=False, credit="sequence"):
    """Train until nothing moves; return the mean policy, its start and the problem."""
    middle, variance, source = problem(tokens, equal)
    start = distribution(lambda ids: policy(ARMS)(ids).logits, tokens)
    one = trainer(
        4, source, ["3"], words=ARMS, tokens=tokens, model=lambda: policy(ARMS), pad="1",
        method=Method(objective, beta=BETA, credit=credit, standardized=False), lam=1.0, cliprange=0.4,
        learning_rate=8e-3, schedule="linear", iterations=60 * tokens, batch_size=128,
        mini_batch_size=128, ppo_epochs=2, max_grad_norm=1.0,
    )  # fmt: skip
    one.train()
    policies = np.stack([distribution(Logits(one.stack, j), tokens) for j in range(4)])
    return policies.mean(0), start, middle, variance


def distance(first, second):
    return 0.5 * np.abs(first - second).sum()


SOLUTIONS = {
    "vanilla": lambda r, s, p: softmax_policy(r, p, BETA),
    "variance_aware": lambda r, s, p: ppo_fixed_point(r, s, p, BETA),
    "variance_aware_exact": lambda r, s, p: exact_policy(r, s, p, BETA),
}


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("objective", list(SOLUTIONS))
def test_training_converges_to_the_solution_of_its_objective(objective, tokens):
    ours, start, middle, variance = converged(objective, tokens)
    solutions = {name: solve(middle, variance, start) for name, solve in SOLUTIONS.items()}
    found = {name: distance(ours, solution) for name, solution in solutions.items()}
    others = [distance(solutions[objective], s) for n, s in solutions.items() if n != objective]
    assert found[objective] < 0.03, found
    assert found[objective] < 0.25 * min(others), (found, others)


def token_fixed_point(middle, variance, start):
    """Return where training converges if a token answers for the penalty from itself on only.

    The second token sees R - beta sigma^2 ln of its own ratio; the first sees what follows on average.
    """
    found = np.zeros(len(start))
    value, weight, mass = [middle[0]], [variance[0]], [start[0]]
    for first in range(1, len(start), ARMS):
        rows = slice(first, first + ARMS)
        share = start[rows] / start[rows].sum()
        second = ppo_fixed_point(middle[rows], variance[rows], share, BETA)
        ratio = np.log(second / share)
        value.append((second * (middle[rows] - BETA * variance[rows] * ratio)).sum())
        weight.append((second * variance[rows]).sum())
        mass.append(start[rows].sum())
        found[rows] = second
    whole = ppo_fixed_point(value, weight, np.array(mass) / np.sum(mass), BETA)
    return np.append(whole[0], found[1:] * np.repeat(whole[1:], ARMS))


def test_credit_by_token_as_in_trl_converges_elsewhere():
    """The weight of a whole response is known at its end only: a token changes what is past."""
    ours, start, middle, variance = converged("variance_aware", 2, credit="token")
    elsewhere = token_fixed_point(middle, variance, start)
    assert distance(ours, elsewhere) < 0.03
    assert distance(elsewhere, ppo_fixed_point(middle, variance, start, BETA)) > 0.1


def test_with_equal_variances_all_three_agree():
    ends = {}
    for objective in SOLUTIONS:
        ends[objective], start, middle, _ = converged(objective, 1, equal=True)
    weighted = softmax_policy(middle, start, BETA * 0.8)
    assert distance(ends["vanilla"], softmax_policy(middle, start, BETA)) < 0.03
    assert distance(ends["variance_aware"], weighted) < 0.03
    assert distance(ends["variance_aware_exact"], weighted) < 0.03


# --- that it is trl's -------------------------------------------------------------------------------


def small_trl_problem(size, **options):
    record = json.loads((TRL / "curves.json").read_text())
    good, bad = str(record["good"]), str(record["bad"])

    def reward(prompt, response):
        words = response.split()
        return words.count(good) - words.count(bad)

    return trainer(
        size, TableReward(reward, lambda p, r: 1e-12), [str(k) for k in range(2, 8)], words=8,
        tokens=record["tokens"], method=Method("vanilla", standardized=False), critic="own_states",
        model=lambda: policy(8, load_file(TRL / "model.safetensors"), positions=8),
        **record["settings"] | options,
    )  # fmt: skip


def test_a_step_is_trls(monkeypatch):
    """Same queries, answers, value head and order of mini-batches: the same weights afterwards."""
    known = load_file(TRL / "step.safetensors")
    ours = small_trl_problem(1, iterations=1)
    ours.critic.centre.zero_()
    ours.critic.unit.fill_(1)
    ours.critic.weight.data.copy_(known["head.weight"])
    ours.critic.bias.data.copy_(known["head.bias"][None])
    prompts, responses = ours._prompts[known["queries"] - 2], known["responses"]
    with torch.no_grad():
        hidden = response_states(ours.stack, sequences(prompts, responses, torch.float32))
        seen = token_log_probabilities(ours.stack.logits(hidden), responses, 1.0)
    mask = torch.arange(responses.shape[1]) < known["lengths"][:, None]
    written = Rollout(prompts, responses, mask, seen, hidden, torch.zeros_like(seen))
    asked = [str(k) for k in known["queries"].tolist()]
    answers = response_texts(ours.tokenizer, responses.tolist())
    monkeypatch.setattr(ours, "write", lambda *_: Written(written, asked, answers))
    drawn = replace(ours.draw(), orders=known["orders"][None])
    monkeypatch.setattr(ours, "draw", lambda: drawn)
    log = ours.step()
    assert log["reward"].item() == pytest.approx(known["scores"].mean().item(), abs=1e-6)
    before = load_file(TRL / "model.safetensors")
    for name, weight in ours.stack.parameters().items():
        theirs = known[f"after.pretrained_model.{name}"]
        if name.endswith("c_attn.bias"):  # what is added to all keys has no effect and no gradient
            kept = [*range(16), *range(32, 48)]
            weight, theirs = weight[:, kept], theirs[kept]
        torch.testing.assert_close(weight[0], theirs, atol=1e-5, rtol=0)
        assert (known[f"after.pretrained_model.{name}"] - before[name]).abs().max() > 5e-3
    torch.testing.assert_close(ours.critic.weight, known["after.v_head.summary.weight"])
    torch.testing.assert_close(ours.critic.bias[0], known["after.v_head.summary.bias"])


def test_learning_curves_are_trls_within_the_spread_of_its_seeds():
    record = json.loads((TRL / "curves.json").read_text())
    theirs = np.array(record["curves"])[:, :20]  # (seeds, steps, [reward, kl, length])
    ours = small_trl_problem(12, iterations=theirs.shape[1]).train()
    for column, name in enumerate(["reward", "kl", "length"]):
        curves = ours.pivot(index="policy", columns="step", values=name).to_numpy()
        known = theirs[:, :, column]
        error = np.sqrt(known.var(0, ddof=1) / len(known) + curves.var(0, ddof=1) / len(curves))
        gap = (curves.mean(0) - known.mean(0)) / np.maximum(error, 0.02)
        assert np.abs(gap).max() < 4.5, (name, gap.round(1))
        assert np.abs(gap.mean()) < 1.5, (name, gap.round(1))


# --- that policies do not disturb each other ----------------------------------------------------------


def length_reward(prompt, response):
    return len(response) / 4 + (prompt == "3") * response.count("5")


def small(policies, objective="variance_aware", **options):
    source = TableReward(length_reward, lambda p, r: 0.5 + 0.2 * len(response_words(r)))
    return trainer(len(policies), source, ["2", "3", "4", "5 6", "7 7 2"],
                   words=9, tokens=6, policies=policies,
                   method=Method(objective, beta=0.1),
                   **({"iterations": 4, "mini_batch_size": 4, "max_grad_norm": 0.5, "learning_rate": 3e-3}
                      | options))  # fmt: skip


def response_words(response):
    return response.split()


KINDS = {
    "full weights": {},
    "own states": {"critic": "own_states", "adaptive_kl": {"target": 0.1, "horizon": 20}},
    "adapters": {"lora": LoraConfig(r=3, target_modules=["c_attn", "c_proj"], lora_dropout=0.2)},
    "accumulated": {"mini_batch_size": 2, "gradient_accumulation_steps": 2, "schedule": "linear"},
    "full divergence": {"kl_penalty": "full"},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_policy_is_the_same_bit_by_bit_whatever_its_companions(kind):
    first, second = small([3, 7, 11, 2], **KINDS[kind]), small([9, 11], **KINDS[kind])
    logs = [one.train() for one in (first, second)]
    for a, b in zip(first.stack.parameters().values(), second.stack.parameters().values(), strict=True):
        assert torch.equal(a[2], b[1])
    ours, theirs = (log[log["policy"] == 11].reset_index(drop=True) for log in logs)
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    other = logs[0][logs[0]["policy"] == 3].reset_index(drop=True)
    assert not ours["reward"].equals(other["reward"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stack_of_one_learns_the_same(kind):
    many, alone = small([3, 11, 2], **KINDS[kind]), small([11], **KINDS[kind])
    for one in (many, alone):
        one.train()
    start = small([11], **KINDS[kind]).stack.parameters()
    for name, weight in many.stack.parameters().items():
        torch.testing.assert_close(weight[1], alone.stack.parameters()[name][0], atol=1e-4, rtol=0)
    moved = max((alone.stack.parameters()[n] - w).abs().max() for n, w in start.items())
    assert moved > 5e-3


def test_runs_are_repeatable_and_seeds_differ():
    first, second, other = (small([0, 1], seed=seed).train() for seed in (4, 4, 5))
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    assert not first["reward"].equals(other["reward"])


def test_numbers_may_be_one_for_each_policy():
    rates, betas = [1e-3, 1e-3, 3e-3], [0.1, 0.4, 0.1]
    source = TableReward(length_reward, lambda p, r: 1.0 + len(r))
    options = {"words": 9, "tokens": 6, "iterations": 3}
    grid = trainer(3, source, ["2"], method=Method("uwo", betas, rates, [0.0, 1.0, 2.0]), **options)
    grid.train()
    for j in range(3):
        method = Method("uwo", betas[j], rates[j], [0.0, 1.0, 2.0][j])
        alone = trainer(2, source, ["2"], method=method, policies=[j, 8], **options)
        alone.train()
        for a, b in zip(grid.stack.parameters().values(), alone.stack.parameters().values(), strict=True):
            assert torch.equal(a[j], b[0])


def test_every_policy_goes_through_all_prompts_in_its_own_order():
    one = small([0, 1], batch_size=4, mini_batch_size=4)
    turns = {0: [], 1: []}
    for one.done in range(5):  # 20 turns are four times five prompts
        for policy_ in turns:
            turns[policy_] += one._turn(policy_).tolist()
    for turn in turns.values():
        for k in range(0, 20, 5):
            assert sorted(turn[k : k + 5]) == [0, 1, 2, 3, 4]
    assert turns[0] != turns[1]


# --- the update -------------------------------------------------------------------------------------


def test_gradients_are_clipped_by_each_policys_own_norm():
    one = small([0, 1, 2], max_grad_norm=0.7)
    random = torch.Generator().manual_seed(0)
    for k, parameter in enumerate(one._parameters):
        parameter.grad = torch.randn(parameter.shape, generator=random)
        parameter.grad[1] *= 1e-4
        parameter.grad[2] *= k
    gradients = [p.grad.clone() for p in one._parameters]
    kept = []
    one._optimizer.step = lambda factor: kept.extend(p.grad.clone() for p in one._parameters)
    norms = one._descend()
    for j in range(3):
        whole = torch.cat([g[j].flatten() for g in gradients])
        torch.testing.assert_close(norms[j], whole.norm())
        clipped = torch.cat([g[j].flatten() for g in kept])
        torch.testing.assert_close(clipped, whole * min(1.0, 0.7 / float(whole.norm())), rtol=1e-5, atol=0)


def test_the_optimizer_is_adam_for_every_policy():
    one = small([0, 1, 2])
    one.rate[:] = torch.tensor([1e-3, 2e-3, 2e-3])
    fresh = type(one._optimizer)(one._parameters, one.rate, (0.8, 0.9))
    copies = [[p.detach()[j].clone().requires_grad_() for p in one._parameters] for j in range(3)]
    own = [torch.optim.Adam(copies[j], lr=float(one.rate[j]), betas=(0.8, 0.9)) for j in range(3)]
    random = torch.Generator().manual_seed(0)
    for _ in range(4):
        gradients = [torch.randn(p.shape, generator=random) for p in one._parameters]
        for parameter, gradient in zip(one._parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        fresh.step(1.0)
        for j in range(3):
            for copy, gradient in zip(copies[j], gradients, strict=True):
                copy.grad = gradient[j].clone()
            own[j].step()
    for j in range(3):
        for parameter, copy in zip(one._parameters, copies[j], strict=True):
            torch.testing.assert_close(parameter[j], copy, atol=1e-6, rtol=1e-5)


def test_a_linear_schedule_falls_to_zero():
    one = small([0, 1], schedule="linear", iterations=4)
    factors = []
    step = one._optimizer.step
    one._optimizer.step = lambda factor: (factors.append(factor), step(factor))
    one.train()
    assert sorted(set(factors), reverse=True) == [1.0, 0.75, 0.5, 0.25]


# --- units, logs, warnings ----------------------------------------------------------------------------


def test_rewards_and_variances_are_standardized_on_the_references_responses():
    source = TableReward(lambda p, r: 50 + 7 * len(r.split()), lambda p, r: 9.0 * (1 + len(r.split())))
    one = trainer(2, source, ["2", "3"], method=Method("variance_aware"), words=9, tokens=6)
    random = np.random.default_rng(0)
    log = trainer(2, source, ["2", "3"], method=Method("variance_aware"), words=9, tokens=6,
                  batch_size=600, mini_batch_size=600, learning_rate=1e-10).train(1)  # fmt: skip
    assert abs(log["reward"].mean()) < 0.1 and abs(log["variance"].mean() - 1) < 0.05
    assert 7 < one.unit.scale < 20 and 9 < one.unit.variance < 70
    rewards, variances = random.normal(3, 2, 5000), random.gamma(2, 2, 5000)
    unit = Unit.of(rewards, variances)
    assert np.allclose([unit.location, unit.scale, unit.variance], [3, 2, 4], atol=0.15)
    raw = trainer(2, source, ["2"], method=Method(standardized=False), words=9, tokens=6)
    assert raw.unit == Unit(0.0, 1.0, 1.0)
    assert Unit.of(rewards, np.zeros(5000)).variance == 1
    for same in (np.ones(5), np.full(2048, 0.1), np.full(2048, 1e17), np.full(999, -1e-9)):
        with pytest.raises(ValueError, match="all the same"):  # whatever their deviation rounds to
            Unit.of(same, np.ones(len(same)))
    for near in (np.array([1e6, 1e6 + 1e-3]), np.array([0.0, 1e-100])):
        assert Unit.of(near, np.ones(2)).scale == near.std() > 0


def test_the_log_says_what_happened():
    one = small([4, 9], batch_size=16, mini_batch_size=8)
    log = one.train()
    assert log["policy"].tolist() == [4, 9] * 4 and log["step"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {"reward", "score", "true_reward", "kl", "variance", "penalty", "coefficient", "entropy",
            "explained_variance", "loss", "policy_loss", "value_loss", "clip_fraction", "ratio",
            "gradient_norm", "length", "finished"} <= set(log)  # fmt: skip
    assert log.notna().all().all()
    assert log["length"].between(1, 6).all() and log["finished"].between(0, 1).all()
    np.testing.assert_allclose(log["kl"][:2], 0, atol=1e-5)  # the first responses are the reference's
    np.testing.assert_allclose(log["score"], log["reward"])  # the penalty is in the tokens
    assert 0 < log["entropy"].min() <= log["entropy"].max() < np.log(9)


def test_the_reported_kl_is_that_of_the_policy():
    """Monte Carlo over sampled responses against the sum over all of them."""
    source = TableReward(lambda p, r: 2.0 * r.count("4"), lambda p, r: 1.0)
    one = trainer(1, source, ["3"], method=Method(beta=0.1), words=ARMS, tokens=2, pad="1",
                  learning_rate=3e-3, iterations=12, batch_size=64, mini_batch_size=64)  # fmt: skip
    one.train(11)
    ours = distribution(Logits(one.stack, 0), 2)
    start = distribution(lambda ids: policy(ARMS)(ids).logits, 2)
    exact = (ours * np.log(ours / start)).sum()
    one.settings = one.settings.model_copy(update={"batch_size": 6000, "mini_batch_size": 6000})
    measured = one.train(1)["kl"].item()
    assert exact > 0.05
    assert measured == pytest.approx(exact, rel=0.1)


def test_a_collapse_of_length_is_noticed():
    """Words cost more than they bring, and nothing forbids an empty response."""
    source = TableReward(lambda p, r: -float(len(r.split())), lambda p, r: 1.0)
    one = trainer(3, source, ["2", "3"], method=Method(beta=0.01), words=9, tokens=6, learning_rate=1e-2,
                  iterations=40, batch_size=32, mini_batch_size=32)  # fmt: skip
    with pytest.warns(LengthCollapseWarning, match="less than half the reference policy's mean"):
        log = one.train()
    assert log[log["step"] == 40]["length"].max() < 0.5 * one.reference_length


def test_a_minimum_length_hides_the_collapse_of_what_could_end():
    source = TableReward(lambda p, r: -float(len(r.split())), lambda p, r: 1.0)
    log = trainer(2, source, ["2"], method=Method(beta=0.01), words=9, tokens=6, learning_rate=1e-2,
                  iterations=40, batch_size=32, mini_batch_size=32,
                  sampling={"min_new_tokens": 4}).train()  # fmt: skip
    assert log["length"].min() >= 4


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"expected one of vanilla, .*got 'variance'"):
        Method("variance")
    with pytest.raises(ValueError, match="beta: expected one number or 2"):
        trainer(2, TableReward(len, len), ["2"], method=Method(beta=[0.1, 0.2, 0.3]), words=9, tokens=6)
    with pytest.raises(ValueError, match="expected 2 different indices, got"):
        small([1, 2, 3]).__class__(
            small([1, 2]).stack, policy(9), None, None, Method(), None, None, policies=[1, 2, 3]
        )


# --- the reference ------------------------------------------------------------------------------------


def test_the_reference_gives_the_states_and_log_probabilities_of_its_model():
    model = policy(9, layers=2)
    reference = ReferencePolicy(model)
    prompts = Prompts.from_lists([[2, 3], [4]], 3, 0)
    answers = torch.tensor([[5, 6, 1], [7, 1, 0]])
    states = reference.all_states(sequences(prompts, answers, torch.float32))
    assert len(states) == 3
    alone = model(torch.tensor([[2, 3, 5, 6]]), output_hidden_states=True)
    for ours, theirs in zip(states, alone.hidden_states, strict=True):
        torch.testing.assert_close(ours[0], theirs[0, -3:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reference.logits(states[-1])[0], alone.logits[0, -3:], atol=1e-5, rtol=1e-5)


# --- what objectives ask of a judgement --------------------------------------------------------------


def test_soft_worst_lies_between_mean_and_worst_and_is_the_certainty_equivalent():
    random = np.random.default_rng(0)
    low = random.normal(size=40)
    interval = Interval(np.stack((low, low + random.gamma(2, 1, 40)), axis=1))
    draws = low[:, None] + np.diff(interval.bounds) * (np.arange(20_000) + 0.5) / 20_000
    members = Members(random.normal(size=(40, 5)))
    for judgement, values in ((interval, draws), (members, members.scores)):
        for strength in (1e-6, 0.1, 1.0, 7.0):
            ours = judgement.soft_worst(np.full(40, strength))
            expected = -np.log(np.exp(-strength * values).mean(1)) / strength
            np.testing.assert_allclose(ours, expected, atol=1e-3 if strength > 1e-3 else 1e-4)
            assert (judgement.worst() <= ours + 1e-9).all()
            assert (ours <= values.mean(1) + 1e-6).all()
    small_strength = members.soft_worst(np.full(40, 0.01))
    second_order = members.scores.mean(1) - 0.005 * members.scores.var(1)
    np.testing.assert_allclose(small_strength, second_order, atol=1e-3)
