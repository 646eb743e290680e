"""Notebook 07's measures against hand computations, and its bench."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import robust
from vaalign_lib.experiments.feature_bench import TARGET
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.store import RunStore
from vaalign_lib.training.losses import advantages_and_returns


def test_lemma_1_an_exact_critic_leaves_no_advantage_to_a_constant_reward():
    """A critic that is off by little leaves some, and whitening makes them large."""
    mask = torch.arange(6) < torch.tensor([[[6], [4], [3]]])  # (N, B, T)
    rewards = torch.zeros(1, 3, 6)
    rewards[0, torch.arange(3), torch.tensor([5, 3, 2])] = 0.7
    exact = torch.full((1, 3, 6), 0.7)
    advantages, _ = advantages_and_returns(exact, rewards, mask, 1.0, 0.95)
    assert (advantages == 0).all()
    off = exact + 0.01 * torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
    advantages, _ = advantages_and_returns(off, rewards, mask, 1.0, 0.95)
    assert advantages[mask].std() == pytest.approx(1, abs=0.1)


def test_agreement_by_hand():
    labels = np.array([[1, 1], [1, -1], [0, 1], [0, 0]])
    found = {name: one.value for name, one in robust.agreement(labels).items()}
    assert found == pytest.approx(
        {"consistent": 0.5, "opposite": 0.25, "consistent_gb": 2 / 5, "opposite_gb": 2 / 5}
    )
    three = robust.agreement(np.array([[1, 1, -1]] * 50))
    assert three["consistent"].value == pytest.approx(1 / 3) and three["consistent"].low == pytest.approx(
        1 / 3
    )


def test_labels_of_a_file_are_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"text": "a or b", "ratings": [0, 1, 2]}\n{"text": "c or d", "ratings": [2, 2, 1]}\n')
    np.testing.assert_array_equal(robust.labels_of_file(path), [[0, 1, -1], [-1, -1, 1]])
    path.write_text('{"text": "a", "ratings": [3, 1, 2]}\n')
    with pytest.raises(ValueError, match="expected 0, 1 or 2"):
        robust.labels_of_file(path)
    path.write_text('{"said": [1, 2]}\n')
    with pytest.raises(ValueError, match="expected lines of JSON with `ratings`"):
        robust.labels_of_file(path)


def test_accuracies_coverage_margins_and_confidence_by_hand():
    random = np.random.default_rng(0)
    heads = tuple(random.standard_normal((2, 3, 40)) for _ in range(2))
    models = {
        "heads": heads,
        "nominal": tuple(one[:, 0] for one in heads),
        "deviations": tuple(random.random((2, 3, 40)) for _ in range(2)),
    }
    table = robust.accuracies(models, ["a"] * 10 + ["b"] * 30).set_index(["model", "category", "seed"])
    assert table.loc[("nominal", "b", 1), "accuracy"] == (heads[0][1, 0, 10:] > heads[1][1, 0, 10:]).mean()
    assert table.loc[("heads", "all", 0), "accuracy"] == pytest.approx((heads[0][0] > heads[1][0]).mean())
    sides = models["nominal"]
    pooled = np.concatenate([sides[0][0], sides[1][0]]).std()
    covariance = np.cov(sides[0][0] / pooled, sides[1][0] / pooled, ddof=0)
    assert robust.ellipse(sides)[0] == pytest.approx(np.pi * np.sqrt(np.linalg.det(covariance)))
    np.testing.assert_allclose(robust.margins(sides)[0], (sides[0][0] - sides[1][0]) / pooled)
    errors = random.standard_normal((2, 3, 80))
    own = [
        spearmanr(np.concatenate([one[1, h] for one in models["deviations"]]), np.abs(errors[1, h]))[0]
        for h in range(3)
    ]
    assert robust.confidence(models, errors)[1] == pytest.approx(np.mean(own))
    gold = random.standard_normal(80)
    gaps = robust.gaps(models, gold)
    assert (gaps["lowest"] <= gaps["heads"].min(1) + 1e-12).all()
    np.testing.assert_allclose(gaps["heads"].mean(2), 0, atol=1e-12)


def test_the_bench_compares_at_equal_kl_and_equation_6_is_worth_more_by_itself():
    table = robust.bench([3], 6, 12, 4)
    np.testing.assert_allclose(table["kl"], TARGET, rtol=2e-3)
    assert len(table) == 8 and table["method"].is_unique
    pair = pd.concat([table, table.assign(world=4, gain=table["gain"] + np.arange(8))])
    found = robust.bench_contrast(pair, "lowest", "nominal")
    assert found.low <= found.value <= found.high


def test_annotators_of_the_world_agree_more_often_than_chance():
    world = World(0)
    random = np.random.default_rng(0)
    prompts = world.prompts(300, random)
    sides = {s: world.responses(prompts, random.beta(2, 2, 300), random) for s in ("chosen", "rejected")}

    class Few:
        seed = 0

        def part(self, name):
            return pd.DataFrame({"prompt": prompts, **sides})

    labels = robust.labels_of_world(Few(), people=3)  # type: ignore[arg-type]
    assert labels.shape == (300, 3) and set(np.unique(labels)) == {-1, 0, 1}
    shuffled = np.random.default_rng(1).permuted(labels, axis=0)
    assert robust.agreement(labels)["consistent"].low > robust.agreement(shuffled)["consistent"].high


def test_policies_are_known_by_what_trains_them(tmp_path):
    profile = load_profile("embedded")
    keys = [robust.key_of(Study(RunStore(tmp_path), profile, seed)) for seed in (0, 1)]
    assert keys[0] != keys[1]
    fewer = profile.policies.model_copy(update={"runs": ["rows"], "count": 7})
    sizes = profile.robust.model_copy(update={"toy_seeds": 4})
    same = profile.model_copy(update={"policies": fewer, "robust": sizes})
    assert robust.key_of(Study(RunStore(tmp_path), same)) == keys[0]
    longer = profile.model_copy(update={"robust": profile.robust.model_copy(update={"steps": 8})})
    assert robust.key_of(Study(RunStore(tmp_path), longer)) != keys[0]


def test_the_world_outside_is_left_to_the_embedded_one():
    assert robust.in_the_world(load_profile("smoke")).name == "smoke"
    assert robust.in_the_world(load_profile("paper")).reference.models["gpt2"] == "tiny"
