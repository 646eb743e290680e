"""Judges that stay themselves: over the population the reward at each text is U[a, b]."""

import numpy as np
import pytest
from scipy.stats import kstest

from vaalign_lib.data.world.world import World
from vaalign_lib.rewards.simulated_judge import PersistentJudges, stand_ins

WORLD = World(0)
PROMPTS, RESPONSES = WORLD.corpus(400, np.random.default_rng(0))
JUDGES = stand_ins(WORLD)


def test_ten_thousand_judges_spread_as_the_interval_says():
    judge = next(iter(JUDGES.values()))
    population = PersistentJudges(judge, WORLD.features, seed=1, frequencies=64)
    texts, judges = 6, 10_000
    asked = [text for text in PROMPTS[:texts] for _ in range(judges)]
    answers = [text for text in RESPONSES[:texts] for _ in range(judges)]
    interval = population.judge(asked, answers, np.tile(np.arange(judges), texts))
    rewards = interval.sample(np.zeros(texts * judges)).reshape(texts, judges)
    a, b = interval.bounds.reshape(texts, judges, 2)[:, 0].T
    assert rewards.var(1, ddof=1) == pytest.approx((b - a) ** 2 / 12, rel=0.04)
    for row in range(texts):
        assert kstest((rewards[row] - a[row]) / (b[row] - a[row]), "uniform").pvalue > 1e-4


def test_a_judge_keeps_its_opinion_and_rates_like_texts_alike():
    judge = next(iter(JUDGES.values()))
    population = PersistentJudges(judge, WORLD.features, seed=1)
    prompts = [PROMPTS[0]] * 3
    near = RESPONSES[0]
    other = "clever clever clever question ! " * 3
    judges = np.arange(800)
    opinions = {}
    for name, text in (("first", near), ("again", near), ("far", other.strip())):
        found = population.judge([prompts[0]] * 800, [text] * 800, judges)
        opinions[name] = found.quantiles
    assert np.array_equal(opinions["first"], opinions["again"])
    alike = near.split()
    alike[alike.index(".") if "." in alike else -1] = "."
    found = population.judge([prompts[0]] * 800, [" ".join(alike)] * 800, judges).quantiles
    assert np.corrcoef(opinions["first"], found)[0, 1] > 0.9
    assert abs(np.corrcoef(opinions["first"], opinions["far"])[0, 1]) < 0.6


def test_a_judge_does_not_depend_on_who_else_is_asked():
    judge = next(iter(JUDGES.values()))
    population = PersistentJudges(judge, WORLD.features, seed=1)
    together = population.judge(PROMPTS[:20], RESPONSES[:20], np.arange(20)).quantiles
    alone = population.judge(PROMPTS[7:8], RESPONSES[7:8], np.array([7])).quantiles
    assert alone == pytest.approx(together[7:8], rel=1e-12)


def test_intervals_have_the_annotators_mean_and_variance_where_they_fit_the_scale():
    judge = JUDGES["stand-in for Gemini 1.5 Flash"]
    interval = judge.judge(PROMPTS, RESPONSES, np.zeros(400, dtype=int))
    inside = (interval.bounds[:, 0] > 1) & (interval.bounds[:, 1] < 100)
    variance = WORLD.disagreement_variance(PROMPTS, RESPONSES)
    wide = inside & (np.diff(interval.bounds)[:, 0] > 1)
    assert wide.mean() > 0.5
    unit = interval.variance()[wide] / variance[wide]
    assert unit == pytest.approx(np.full(wide.sum(), (99 * 0.12) ** 2), rel=1e-6)
    consensus = WORLD.consensus(PROMPTS, RESPONSES, judge.taste)
    assert np.corrcoef(interval.midpoint()[inside], consensus[inside])[0, 1] == pytest.approx(1)


def test_three_stand_ins_differ_in_level_and_width_and_say_what_they_are():
    everyone = np.zeros(400, dtype=int)
    found = {name: judge.judge(PROMPTS, RESPONSES, everyone) for name, judge in JUDGES.items()}
    assert len(found) == 3 and all(name.startswith("stand-in for ") for name in found)
    levels = [interval.midpoint().mean() for interval in found.values()]
    widths = [np.diff(interval.bounds).mean() for interval in found.values()]
    assert min(np.diff(sorted(levels))) > 2 and min(np.diff(sorted(widths))) > 2
    for interval in found.values():
        assert (interval.bounds >= 1).all() and (interval.bounds <= 100).all()
        assert (interval.bounds[:, 0] < interval.bounds[:, 1]).all()


@pytest.mark.parametrize("highest", [100, 50, 20, 10])
def test_other_ranges(highest):
    judge = next(iter(stand_ins(WORLD, highest).values()))
    bounds = judge.judge(PROMPTS, RESPONSES, np.zeros(400, dtype=int)).bounds
    assert bounds.min() >= 1 and bounds.max() <= highest and np.ptp(bounds) > 0.5 * highest
