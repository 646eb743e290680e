"""Reward functions for TRL: rewards, variances, objectives, units, draws."""

import asyncio
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from trl.trainer.utils import get_callable_name

from tests.small_problem import TableReward
from tests.trl_problem import equal, make, weights
from vaalign_lib.data.pairs import read_pairs
from vaalign_lib.rewards.base import Interval, Members, Unit
from vaalign_lib.training.objectives import OBJECTIVES, Outcome
from vaalign_lib.training.trl import (
    VARIANCE,
    _uniforms,
    reference_unit,
    reward_function,
    text_of,
    with_variances,
)

SCORES = np.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])


class Ensemble:
    def __init__(self, scores=SCORES):
        self.scores, self.asked = scores, []

    def judge(self, prompts, responses, policy):
        self.asked.append((list(prompts), list(responses), policy.tolist()))
        return Members(self.scores)

    def true_reward(self, judgement, prompts, responses):
        return judgement.scores.mean(1)


def call(function, **columns):
    """Return rewards and what was logged."""
    logged = {}
    rewards = function(prompts=["p", "q"], completions=["r", "s"], log_extra=logged.__setitem__, **columns)
    return rewards, logged.get(VARIANCE)


def test_an_ensembles_rewards_and_variances():
    source = Ensemble()
    rewards, variances = call(reward_function(source, policy=7), completion_ids=[[1], [2]])
    assert rewards == pytest.approx([3.0, 1.0])
    assert variances == pytest.approx([7.0, 3.0])  # sample variances: 14 / 2 and 6 / 2
    assert source.asked == [(["p", "q"], ["r", "s"], [7, 7])]
    _, of_mean = call(reward_function(source, variance_of="mean"))
    assert of_mean == pytest.approx([7 / 3, 1.0])


def test_conversations_are_read_as_texts(tmp_path):
    source = Ensemble()
    turns = [("system", "x"), ("user", "p"), ("assistant", "a"), ("user", "q")]
    long = [{"role": role, "content": text} for role, text in turns]
    asked = [[{"role": "user", "content": "p"}], long]
    answers = [[{"role": "assistant", "content": text}] for text in ("r", "s")]
    reward_function(source)(prompts=asked, completions=answers)
    whole = "system: x\n\nHuman: p\n\nAssistant: a\n\nHuman: q\n\nAssistant:"
    assert source.asked[0][:2] == (["p", whole], ["r", "s"])
    shared = [{"role": "assistant", "content": "yes"}]  # as a file's pairs are read
    pair = {"chosen": [*long, *answers[0]], "rejected": [*long, *shared]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    assert read_pairs(tmp_path / "pairs.jsonl")["prompt"].tolist() == [whole]
    assert text_of("as it is") == "as it is"
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == (
        "Assistant: a\n\ntool: b"
    )


@pytest.mark.parametrize("name", ["uwo", "worst_case", "reward_robust", "effective"])
def test_objectives_that_change_the_reward_only(name):
    unit = Unit(location=0.5, scale=2.0, variance=4.0)
    rewards, variances = call(reward_function(Ensemble(), objective=name, strength=0.7, unit=unit))
    mean, low = (SCORES.mean(1) - 0.5) / 2, (SCORES.min(1) - 0.5) / 2
    spread = SCORES.var(1, ddof=1) / 4
    soft = -np.log(np.exp(-0.7 * (SCORES - 0.5) / 2).mean(1)) / 0.7
    by_hand = {
        "uwo": mean - 0.7 * spread,
        "worst_case": low,
        "reward_robust": 0.7 * mean + 0.3 * low,
        "effective": soft,
    }
    assert rewards == pytest.approx(by_hand[name].tolist())
    assert variances == pytest.approx(spread.tolist())
    outcome = Outcome(*(torch.from_numpy(one)[None] for one in (mean, spread, low, soft)))
    plain = OBJECTIVES[name](outcome, torch.full((1, 1), 9.0), torch.full((1, 1), 0.7))
    assert plain.weight.eq(1).all() and rewards == pytest.approx(plain.score[0].tolist())


def test_objectives_that_weigh_the_penalty_belong_to_the_trainers():
    for name in ("variance_aware", "variance_aware_exact"):
        with pytest.raises(ValueError, match=f"objective: {name} weighs the KL penalty"):
            reward_function(Ensemble(), objective=name)
    with pytest.raises(ValueError, match=r"objective: expected one of vanilla, .*, got 'other'"):
        reward_function(Ensemble(), objective="other")


def test_draws_from_intervals_go_on_where_a_run_is_resumed():
    source = TableReward(lambda p, r: 0.0, lambda p, r: 3.0)
    first, again = reward_function(source, seed=2), reward_function(source, seed=2)
    steps = [SimpleNamespace(global_step=k) for k in (0, 0, 1, 2)]
    drawn = [call(first, trainer_state=one)[0] for one in steps]
    assert len({tuple(one) for one in drawn}) == 3  # evaluation in between would change nothing
    assert [call(again, trainer_state=one)[0] for one in steps[2:]] == drawn[2:]
    twice = first(prompts=["p"] * 400, completions=["r"] * 400, trainer_state=steps[3])
    assert len(set(twice)) == 400 and kstest(twice, "uniform", (-3, 6)).pvalue > 0.01
    assert call(reward_function(source, seed=3), trainer_state=steps[0])[0] != drawn[0]


def test_a_text_without_a_judgement_has_neither_reward_nor_variance():
    class Silent(Ensemble):
        def judge(self, prompts, responses, policy):
            return Interval(np.array([[1.0, 3.0], [np.nan, np.nan]]))

    rewards, variances = call(reward_function(Silent()))
    assert rewards[1] is None and variances == [pytest.approx(1 / 3), None]
    assert 1 <= rewards[0] <= 3
    with pytest.raises(ValueError, match="an interval has no members"):
        call(reward_function(Silent(), variance_of="mean"))


def test_the_unit_of_the_reference():
    random = np.random.default_rng(0)
    source = Ensemble(random.normal(5, 3, (400, 4)))
    unit = reference_unit(source, ["p"] * 400, ["r"] * 400)
    function = reward_function(source, unit=unit)
    logged = {}
    rewards = function(prompts=["p"] * 400, completions=["r"] * 400, log_extra=logged.__setitem__)
    assert np.mean(rewards) == pytest.approx(0, abs=1e-9)
    assert np.std(rewards) == pytest.approx(1) and np.mean(logged[VARIANCE]) == pytest.approx(1)


def test_a_unit_of_the_same_kind_and_of_what_could_be_judged():
    random = np.random.default_rng(0)
    scores = random.normal(5, 3, (200, 4))
    scores[7] = np.nan
    asked = ["p"] * 200, ["r"] * 200
    unit = reference_unit(Ensemble(scores), *asked, variance_of="mean")
    logged = {}
    function = reward_function(Ensemble(scores), variance_of="mean", unit=unit)
    function(prompts=asked[0], completions=asked[1], log_extra=logged.__setitem__)
    known = [one for one in logged[VARIANCE] if one is not None]
    assert len(known) == 199 and np.mean(known) == pytest.approx(1)
    with pytest.raises(ValueError, match="0 of 2 got a reward"):
        reference_unit(Ensemble(np.full((2, 3), np.nan)), ["p", "q"], ["r", "s"])


def test_bad_choices_are_refused_before_training():
    with pytest.raises(ValueError, match="variance_of: expected member or mean, got 'means'"):
        reward_function(Ensemble(), variance_of="means")
    with pytest.raises(ValueError, match="strength: expected 0 to 1"):
        reward_function(Ensemble(), objective="reward_robust", strength=2.0)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert text_of(parts) == "ab"
    with pytest.raises(ValueError, match="judge text, got parts of type image, text"):
        text_of([{"content": [*parts[0]["content"], {"type": "image"}]}])


def test_a_message_without_text_is_refused():
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        with pytest.raises(ValueError, match="content: expected text or parts of type text, got"):
            text_of([message])


def test_each_completion_has_its_own_judgement():
    answers = {"prompts": ["p"] * 4, "completions": ["r"] * 4}
    for rows in (SCORES[:1], SCORES):
        with pytest.raises(ValueError, match=f"of each of 4 completions, got {len(rows)}"):
            reward_function(Ensemble(rows))(**answers)


def test_pairs_in_place_of_two_lists_are_refused():
    """Of two completions, two pairs have the shape of two lists."""
    pairs = [(1.0, 0.1), (2.0, 0.2)]
    for wrong in (pairs, tuple(pairs), [list(one) for one in pairs], zip(*pairs, strict=True), 3.0):
        with pytest.raises(ValueError, match=r"expected two lists, \(rewards, variances\)"):
            call(with_variances(lambda wrong=wrong, **_: wrong))
    right = with_variances(lambda **_: (np.array([1.0, 2.0]), torch.tensor([0.25, 0.5])))
    assert call(right) == ([1.0, 2.0], [0.25, 0.5])


@pytest.mark.parametrize("bad", ["0.5", float("inf"), -np.inf, True])
def test_rewards_that_are_no_numbers_are_refused(bad):
    with pytest.raises(ValueError, match=r"rewards: completion 1 has .*; expected a finite number"):
        call(with_variances(lambda **_: ([1.0, bad], [1.0, 1.0])))
    with pytest.raises(ValueError, match="variances: expected one for each of 2 rewards, got 1"):
        call(with_variances(lambda **_: ([1.0, 2.0], [1.0])))


def test_processes_draw_differently(monkeypatch):
    alone = _uniforms(3, 2, ["p", "p"], ["r", "r"])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        drawn.append(_uniforms(3, 2, ["p", "p"], ["r", "r"]))
    assert len(np.unique(drawn)) == 6 and np.array_equal(drawn[0], alone)


def test_a_coroutine_with_variances():
    @with_variances
    async def later(prompts, completions, **_):
        return [1.0, 2.0], [3.0, 4.0]

    logged = {}
    rewards = asyncio.run(later(prompts=["p", "q"], completions=["r", "s"], log_extra=logged.__setitem__))
    assert rewards == [1.0, 2.0] and logged[VARIANCE] == [3.0, 4.0]


def test_ones_own_function_with_variances():
    @with_variances
    def mine(prompts, completions, extra, **_):
        """Say something."""
        return [float(extra), None], [2.0, None]

    assert mine.__name__ == "mine" and mine.__doc__ == "Say something."
    assert call(mine, extra=5) == ([5.0, None], [2.0, None])
    assert mine(["p", "q"], ["r", "s"], extra=5) == [5.0, None]  # without a trainer


def test_a_source_trains_the_stock_trainer_and_ours(tmp_path):
    source = TableReward(lambda p, r: len(set(r.split())), lambda p, r: 1 + r.split().count("2"), still=True)
    ends = []
    for stock in (True, False):
        one = make("rloo", tmp_path, stock=stock, reward=reward_function(source))
        one.train()
        ends.append(weights(one))
        assert "rewards/reward/mean" in one.state.log_history[0]
    assert one.state.log_history[0]["reward_variance/mean"] > 1
    assert not equal(*ends)


@with_variances
def of_lengths(completions, **_):
    return [float(len(one)) for one in completions], [1.0 for _ in completions]


def test_reward_functions_go_to_another_process_as_asyncgrpo_sends_them():
    """It pickles them, calls them there without a place to log variances, and logs them by their names."""
    source = reward_function(Ensemble(), objective="uwo", strength=0.5, policy=3, name="judge")
    here = [call(one)[0] for one in (source, of_lengths)]
    there = [pickle.loads(pickle.dumps(one)) for one in (source, of_lengths)]
    assert [one(prompts=["p", "q"], completions=["r", "s"]) for one in there] == here
    assert [get_callable_name(one) for one in there] == ["judge", "of_lengths"]
