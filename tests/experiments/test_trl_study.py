"""Notebook 09's experiment: settings, matching, what is compared."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vaalign_lib.experiments import trl
from vaalign_lib.experiments.trl import (
    differences,
    distances,
    in_the_world,
    mean_difference,
    setup_of,
    table_of,
    train_setting,
)
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.store import RunStore
from vaalign_lib.training.trl_runs import Setting, trl_trainer

SMOKE = load_profile("smoke")


def table(gold):
    """Return policies of two algorithms; `gold` is (algorithms, objectives, policies)."""
    rows = [
        {"algorithm": a, "objective": o, "policy": k, "gold": gold[i][j][k]}
        for i, a in enumerate(("ppo", "rloo"))
        for j, o in enumerate(("vanilla", "variance_aware"))
        for k in range(len(gold[i][j]))
    ]
    return pd.DataFrame(rows)


def test_differences_are_by_policy_and_their_interval_is_t():
    gold = np.random.default_rng(0).normal(size=(2, 2, 5))
    found = differences(table(gold), "gold")
    assert found["rloo"][3] == pytest.approx(gold[1, 1, 3] - gold[1, 0, 3])
    each = (gold[:, 1] - gold[:, 0]).mean(0)
    half = stats.t.ppf(0.975, 4) * each.std(ddof=1) / 5**0.5
    one = mean_difference(table(gold), "gold")
    assert (one.value, one.low, one.high) == pytest.approx(
        (each.mean(), each.mean() - half, each.mean() + half)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return RunStore(tmp_path_factory.mktemp("trl") / "store")


def test_a_setting_is_trained_once_and_evaluated(store):
    setting = Setting("rloo", "variance_aware", 0.2, (0, 3))
    folder = train_setting(Study(store, SMOKE, 0), setting)
    policies, log = (table_of([(setting, folder)], name) for name in ("policies", "log"))
    assert policies["policy"].tolist() == [0, 3]
    assert len(log) == 2 * SMOKE.trl.steps and set(log["beta"]) == {0.2}
    assert policies[["true_reward", "gold", "kl", "length"]].notna().all().all()
    time = (folder / "log.parquet").stat().st_mtime_ns
    assert train_setting(Study(store, SMOKE, 0), setting) == folder
    assert (folder / "log.parquet").stat().st_mtime_ns == time
    first = train_setting(Study(store, SMOKE, 0), Setting("rloo", "variance_aware", 0.2, (0,)))
    alone = pd.read_parquet(first / "log.parquet")
    pd.testing.assert_frame_equal(alone, log[log["policy"] == 0][list(alone)])


def test_both_methods_see_the_same_first_responses(store, tmp_path):
    setup = setup_of(Study(store, SMOKE, 0))
    assert setup.unit.scale > 0 and setup.unit.variance > 0
    rewards = []
    for objective in trl.METHODS:
        setting = Setting("grpo", objective, 0.2, (0,))
        one = trl_trainer(setup, setting, 0, str(tmp_path))
        one.train()
        rewards.append(one.state.log_history[0]["reward"])
        assert ("reward_variance/mean" in one.state.log_history[0]) == (objective != "vanilla")
    assert rewards[0] == rewards[1]


def test_matching_takes_the_nearest_that_was_tried(store, monkeypatch):
    made = []

    def pretend(study, setting):
        made.append(setting)
        return setting

    monkeypatch.setattr(trl, "train_setting", pretend)
    monkeypatch.setattr(trl, "kl_of", lambda setting: 0.4 / setting.beta)
    wanted = Setting("grpo", "variance_aware", 0.2, (0, 1, 2))
    chosen, path = trl._matched(Study(store, SMOKE, 0), wanted, 1.0)
    assert chosen == path and chosen.policies == (0, 1, 2)
    assert chosen.beta == pytest.approx(0.4, rel=0.06)
    assert {one.policies for one in made[: len(trl.FACTORS)]} == {(0, 1)}
    monkeypatch.setattr(trl, "TOLERANCE", 0.0)  # never near enough
    assert trl._matched(Study(store, SMOKE, 0), wanted, 1.0)[0].beta == pytest.approx(0.4, rel=0.06)


def test_distances_by_hand():
    ends = pd.DataFrame(
        {
            "trainer": "one",
            "reference": [0.5, 0.5],
            "trained": [0.7, 0.3],
            "expected": [0.8, 0.2],
            "detached": [0.8, 0.2],
            "uncorrected": [0.4, 0.6],
            "exact": [0.1, 0.9],
        }
    )
    row = distances(ends).iloc[0]
    assert row[["own", "other", "start"]].tolist() == pytest.approx([0.1, 0.3, 0.3])


def test_with_real_models_it_is_still_made_in_the_world():
    paper = load_profile("paper")
    inside = in_the_world(paper)
    assert inside.reference.models["gpt2"] == "tiny" and inside.trl == paper.trl
    assert in_the_world(SMOKE) is SMOKE
    assert load_profile("extended").trl.seeds == 8 and load_profile("extended").trl.matched_kl
