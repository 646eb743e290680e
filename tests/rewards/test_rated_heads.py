"""Ridge heads on an encoder's features, each of few people's ratings."""

import numpy as np
import pytest
import torch
from scipy.stats import norm, rankdata
from transformers import BertConfig, BertModel

from vaalign_lib.data.raters import held_out, rated, write_raters
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.rewards.rated_heads import (
    PENALTY,
    Encoder,
    HeardHeads,
    HeardTexts,
    PeopleRatings,
    SmoothField,
    load_features,
    ridge,
    with_constant,
    write_features,
    write_heads,
)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("encoder"), world_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers():
    return list(dict.fromkeys(World(0).corpus(400, np.random.default_rng(0))[1]))[:300]


def test_features_are_means_of_states_however_texts_are_batched(encoder_folder, answers):
    encoder = Encoder.load(encoder_folder)
    found = encoder(answers[:80])
    for text, features in zip(answers[:5], found, strict=False):
        ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
        mean = encoder.model(ids).last_hidden_state[0].mean(0).detach().numpy()
        assert np.allclose(features, mean / np.linalg.norm(mean), atol=1e-5)


def test_ridge_is_least_squares_with_made_up_texts():
    random = np.random.default_rng(1)
    inputs = with_constant(random.standard_normal((3 * 40, 5))).reshape(3, 40, 6)
    targets, penalty = random.standard_normal((3, 40)) + 2, 7.0
    made_up = np.eye(6)[:5] * np.sqrt(penalty / 5)
    for found, x, y in zip(ridge(inputs, targets, penalty), inputs, targets, strict=True):
        expected = np.linalg.lstsq(np.vstack([x, made_up]), np.append(y, np.zeros(5)), rcond=None)[0]
        assert np.allclose(found, expected)


def test_people_heard_are_different_ones_and_all_as_likely():
    ratings = PeopleRatings.of([np.arange(5.0), np.arange(10.0, 13.0)])
    heard = ratings.heard(np.tile([0, 1], 6000), 2, np.random.default_rng(0)).reshape(-1, 2, 2)
    assert (heard[..., 0] != heard[..., 1]).all()
    for text, first, people in ((0, 0, 5), (1, 10, 3)):
        counts = np.bincount(heard[:, text].ravel().astype(int) - first, minlength=people)
        assert len(counts) == people and np.abs(counts / 12000 - 1 / people).max() < 0.015


def test_heads_of_two_kinds_and_the_truth(tmp_path, encoder_folder, answers):
    random = np.random.default_rng(2)
    said = np.round(random.normal(0, 1, (len(answers), 6)) + random.normal(0, 1, (len(answers), 1)), 1)
    rows, texts = zip(answers, said, strict=True), tmp_path / "texts.jsonl"
    write_raters(texts, rated((text, "some", ratings.tolist()) for text, ratings in rows))
    for part in ("features", "heads"):
        (tmp_path / part).mkdir()
    write_features(tmp_path / "features", texts, encoder_folder)
    sizes = {"policies": 3, "further": 4, "size": (100, 2)}
    write_heads(
        tmp_path / "heads", 5, **sizes, texts=tmp_path / "texts.jsonl", features=tmp_path / "features"
    )
    source = HeardHeads.load(tmp_path / "heads", encoder_folder)
    assert source.own.shape == (3, 17) and source.further.shape == (4, 17)
    inputs = with_constant(load_features(tmp_path / "features").astype(float))
    learn = np.flatnonzero(~held_out(answers))
    heard = HeardTexts.drawn(PeopleRatings.of(list(said)), learn, 7, 100, 2, np.random.default_rng([5, 3]))
    assert not held_out([answers[k] for k in heard.texts.ravel()]).any()
    found = heard.ridge(inputs).fit(heard.ratings.mean(-1), PENALTY)[:3]
    assert np.allclose(found, source.own, atol=1e-6)  # which was fitted in float32
    asked, policy = [""] * 12, np.repeat([0, 1, 2], 4)
    judgement = source.judge(asked, answers[:12], policy)
    seen = source.inputs(answers[:12])
    assert np.allclose(
        judgement.sample(random.random(12)), [x @ source.own[j] for x, j in zip(seen, policy, strict=True)]
    )
    assert np.allclose(judgement.variance(), np.var([seen @ one for one in source.further], axis=0, ddof=1))
    assert np.allclose(source.true_reward(judgement, asked, answers[:12]), seen @ source.truth)


def test_the_placebo_has_the_distribution_and_knows_only_the_truth(encoder_folder, answers):
    random = np.random.default_rng(3)
    draw = lambda heads: random.standard_normal((heads, 17))  # noqa: E731
    source = HeardHeads(Encoder.load(encoder_folder), draw(2), draw(10), draw(1)[0])
    placebo = SmoothField(source, tuple(answers), seed=1)
    asked, policy = [""] * len(answers), np.zeros(len(answers), dtype=int)
    plain, judged = source.judge(asked, answers, policy), placebo.judge(asked, answers, policy)
    assert (judged.bounds == plain.bounds).all()
    variance, weight = plain.variance(), judged.weight()
    assert np.allclose(
        np.quantile(weight, [0.1, 0.5, 0.9]), np.quantile(variance, [0.1, 0.5, 0.9]), rtol=0.05
    )
    truth = source.true_reward(plain, asked, answers)
    scores = [norm.ppf((rankdata(one) - 0.5) / one.size) for one in (weight, variance, truth)]
    found = np.corrcoef(scores)
    assert abs(found[0, 1]) < 0.1 and abs(found[0, 2] - found[1, 2]) < 0.1
