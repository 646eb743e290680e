"""The checks of Algorithms 1 to 9 hold, and fail where they should."""

import numpy as np
import pandas as pd
import pytest

from vaalign_lib.experiments import algorithms
from vaalign_lib.experiments.conditions import JUDGE_ROW, Condition
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.base import Interval


def test_training_reaches_its_own_fixed_point_and_two_steps_do_not():
    assert algorithms.fixed_points(0)[1]
    assert not algorithms.fixed_points(0, iterations=2)[1]


def test_evaluations_lie_around_a_known_return():
    assert algorithms.known_return(0)[1] and algorithms.known_reference(0)[1]


def test_equal_variances_change_nothing():
    assert algorithms.equal_variances(0)[1]


def test_a_missing_policy_and_a_stack_that_was_cut_off_are_seen():
    profile, stack = load_profile("smoke"), Condition(*JUDGE_ROW, "variance_aware")
    steps = profile.policies.training[stack.architecture].settings(stack.objective).iterations
    names = ["true_reward", "true_reward_error", "gold", "kl", "length"]
    policies = pd.DataFrame(0.0, range(profile.policies.count), names).assign(run=stack.name)
    policies["policy"] = policies.index
    curves = pd.DataFrame({"run": stack.name, "step": range(1, steps + 1)})
    cases = {
        "whole": (policies, curves),
        "a policy less": (policies[1:], curves),
        "a step less": (policies, curves[:-1]),
        "a number less": (policies.assign(gold=np.nan), curves),
    }
    found = {
        name: algorithms.every_stack_complete(*given, [stack], profile)[1] for name, given in cases.items()
    }
    assert found == {name: name == "whole" for name in cases}


def test_a_source_with_an_offset_is_found_out():
    bounds = np.array([[1.0, 5.0], [2.0, 8.0]])
    judgement, ask = Interval(bounds), (["p"] * 2, ["r"] * 2)

    class Source:
        off = 0.0

        def judge(self, prompts, responses, policy):
            return judgement

        def true_reward(self, judgement, prompts, responses):
            return judgement.midpoint() + self.off

    source = Source()
    assert algorithms.midpoints(source, judgement, *ask)[1]
    assert not algorithms.contract(source, *ask)[1]  # it does not follow the order
    source.off = 0.1
    assert not algorithms.midpoints(source, judgement, *ask)[1]
    assert algorithms.variance_by_hand()[1]
    assert algorithms.mean_of_draws(judgement, np.random.default_rng(0))[1]
    with pytest.raises(ValueError, match="bounds"):
        Interval(bounds[:, ::-1])
