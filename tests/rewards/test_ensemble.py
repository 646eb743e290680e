"""Ensembles as reward sources: members, variances, and the same bits after a round trip to disk."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from vaalign_lib.data.world.world import World
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.classifier import BackboneError, features_and_scores, tokenized_pairs
from vaalign_lib.rewards.ensemble import (
    ClassifierEnsemble,
    EnsembleReward,
    SequenceClassifierReward,
    load_ensemble,
)
from vaalign_lib.rewards.heads import train_heads


@pytest.fixture(scope="module")
def build(pairs, tiny):
    model, tokenizer = tiny
    data = tokenized_pairs(tokenizer, pairs, 64)
    chosen, rejected = (features_and_scores(model, data[f"{side}_ids"])[0] for side in ("chosen", "rejected"))
    settings = load_profile("smoke").ensembles.trained

    def make(kind="bootstrap", ensembles=1, **options):
        heads, _ = train_heads(chosen, rejected, kind=kind, settings=settings, seed=0, ensembles=ensembles)
        return EnsembleReward(model, tokenizer, heads, truth=World(0).gold, max_length=64, **options)

    return make


def judge(source, pairs, policy=None):
    prompts, responses = pairs["prompt"].tolist()[:50], pairs["chosen"].tolist()[:50]
    return source.judge(prompts, responses, np.zeros(50, dtype=int) if policy is None else policy)


@pytest.mark.parametrize("kind", ["bootstrap", "mlp"])
@pytest.mark.parametrize("ensembles", [1, 4])
def test_saved_and_loaded_it_gives_the_same_bits(build, pairs, tmp_path, kind, ensembles):
    source = build(kind, ensembles, variance_of="mean")
    source.save(tmp_path / "ensemble")
    loaded = load_ensemble(tmp_path / "ensemble", World(0).gold)
    policy = np.arange(50) % ensembles
    one, two = judge(source, pairs, policy), judge(loaded, pairs, policy)
    assert np.array_equal(one.scores, two.scores) and np.array_equal(one.variance(), two.variance())
    suffixes = {path.suffix for path in (tmp_path / "ensemble").rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja"}


def test_each_policy_is_judged_by_its_own_ensemble(build, pairs):
    source = build(ensembles=3)
    whole = [judge(source, pairs, np.full(50, k)).scores for k in range(3)]
    mixed = judge(source, pairs, np.arange(50) % 3).scores
    for row in range(50):
        np.testing.assert_allclose(mixed[row], whole[row % 3][row], rtol=1e-5)
    assert not np.allclose(whole[0], whole[1])
    with pytest.raises(IndexError, match="expected indices from 0 to 2, got 3"):
        judge(source, pairs, np.full(50, 3))


def test_a_shared_ensemble_ignores_the_policy(build, pairs):
    source = build()
    assert np.array_equal(judge(source, pairs).scores, judge(source, pairs, np.arange(50)).scores)


def test_scores_are_the_heads_products_with_the_features(build, pairs):
    source = build()
    judgement = judge(source, pairs)
    data = tokenized_pairs(source.tokenizer, pairs.head(50), 64)
    features, _ = features_and_scores(source.model, data["chosen_ids"])
    expected = features.double() @ source.heads.weights["weight"][0].T.double()
    np.testing.assert_allclose(judgement.scores, expected.numpy(), rtol=1e-3, atol=1e-5)


def test_the_truth_comes_from_its_own_model(build, pairs, saved):
    source = build()
    prompts, responses = pairs["prompt"].tolist()[:5], pairs["chosen"].tolist()[:5]
    truth = source.true_reward(judge(source, pairs), prompts, responses)
    assert np.array_equal(truth, World(0).gold(prompts, responses))
    without = EnsembleReward(source.model, source.tokenizer, source.heads)
    with pytest.raises(ValueError, match="without a true reward"):
        without.true_reward(judge(source, pairs), prompts, responses)
    llama = SequenceClassifierReward.load(saved("llama"))
    scores = llama(["abc?", "d"], ["fine.", "e"])
    alone = [llama([p], [r])[0] for p, r in (("abc?", "fine."), ("d", "e"))]
    assert scores == pytest.approx(alone, rel=1e-4) and scores[0] != scores[1]


@pytest.mark.parametrize("missing", ["heads.safetensors", "ensemble.json"])
def test_an_incomplete_folder_is_refused(build, tmp_path, missing):
    build().save(tmp_path / "e")
    (tmp_path / "e" / missing).unlink()
    with pytest.raises(BackboneError, match=f"without {missing}"):
        load_ensemble(tmp_path / "e")


def test_an_unknown_kind_is_refused(build, tmp_path):
    build().save(tmp_path / "e")
    record = json.loads((tmp_path / "e" / "ensemble.json").read_text())
    (tmp_path / "e" / "ensemble.json").write_text(json.dumps(record | {"kind": "magic"}))
    with pytest.raises(BackboneError, match="unknown kind of heads 'magic'"):
        load_ensemble(tmp_path / "e")


def test_global_random_state_is_left_alone(build, pairs):
    state = torch.random.get_rng_state()
    judge(build(), pairs)
    assert torch.equal(state, torch.random.get_rng_state())


def test_classifiers_are_an_ensemble(build, pairs, tmp_path):
    names = []
    for kind in range(3):
        torch.manual_seed(kind)
        model = AutoModelForSequenceClassification.from_config(build().model.config)
        model.save_pretrained(tmp_path / str(kind))
        build().tokenizer.save_pretrained(tmp_path / str(kind))
        names.append(tmp_path / str(kind))
    source = ClassifierEnsemble.load(names, max_length=64)
    judgement = judge(source, pairs)
    prompts, responses = pairs["prompt"].tolist()[:50], pairs["chosen"].tolist()[:50]
    alone = [SequenceClassifierReward.load(one, 64)(prompts, responses) for one in names]
    np.testing.assert_array_equal(judgement.scores, np.stack(alone, axis=1))
    np.testing.assert_allclose(judgement.variance(), np.var(alone, axis=0, ddof=1))
    assert judgement.scores.std(axis=1).min() > 0
    np.testing.assert_allclose(source.true_reward(judgement, prompts, responses), np.mean(alone, axis=0))
    known = ClassifierEnsemble.load(names, truth=World(0).gold, max_length=64)
    truth = known.true_reward(judgement, prompts, responses)
    np.testing.assert_array_equal(truth, World(0).gold(prompts, responses))
    with pytest.raises(ValueError, match="classifiers: expected at least two, got 1"):
        ClassifierEnsemble.load(names[:1])
