"""A score is what transformers itself gives for one conversation alone; what is cut, what is not."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.rewards.conftest import save_tiny
from vaalign_lib.models import LengthError, conversation_ids, end_id, prompt_ids
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.classifier import (
    BackboneError,
    features_and_scores,
    load_reward_model,
    longest,
    new_reward_model,
    reader,
    train_reward_model,
    usable,
)
from vaalign_lib.rewards.ensemble import SequenceClassifierReward

SETTINGS = load_profile("smoke").reward_model.model_copy(
    update={"epochs": 1, "logging_steps": 1, "batch_size": 8, "device_batch_size": 8}
)
PROMPTS = ["abc?", "a b<pad> c", "a b c d e f?", "a</s>b", "x"]
RESPONSES = ["x.", "hello<pad> there.", "ab<pad>", "good</s>", "<pad><pad>"]


def changed(folder, target, **settings):
    """Copy a model with another configuration."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return target


def by_hand(folder, texts):
    """Return the scores of (prompt, response), one at a time, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, response in texts:
        if tokenizer.sep_token is not None:
            given = tokenizer(prompt, response, return_tensors="pt")
        else:
            if tokenizer.chat_template is not None:
                text = f"<s>user:{prompt}</s>assistant:{response}</s>"
            else:
                text = f"<s>{prompt}\n\n{response}</s>"
            given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            scores.append(float(model(**given).logits[0, 0]))
    return scores


@pytest.mark.parametrize("pad", [0, 2, 5, None])
@pytest.mark.parametrize("architecture", ["llama", "gemma", "llama without padding"])
def test_whatever_the_padding_token_a_score_is_that_of_transformers(architecture, pad, saved, tmp_path):
    folder = changed(saved(architecture), tmp_path / "model", pad_token_id=pad)
    scores = SequenceClassifierReward.load(folder, 64)(PROMPTS, RESPONSES)
    expected = by_hand(folder, list(zip(PROMPTS, RESPONSES, strict=True)))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0.05


@pytest.mark.parametrize("architecture", ["bert", "bert with segments", "roberta"])
def test_encoders_read_prompt_and_response_as_segments(architecture, saved):
    folder = saved(architecture)
    texts = [("abc?", "x."), ("a b", "good."), ("d", "hello there"), ("a b c", "d")]
    scores = SequenceClassifierReward.load(folder)(*zip(*texts, strict=True))
    np.testing.assert_allclose(scores, by_hand(folder, texts), rtol=1e-4, atol=1e-5)
    alone = load_reward_model(folder)[0]
    ids = AutoTokenizer.from_pretrained(folder)("abc?", "x.", return_tensors="pt")["input_ids"]
    assert float(alone(ids).logits) == pytest.approx(scores[0], rel=1e-4)  # as anyone calls it
    if "segments" in architecture:
        plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        assert float(plain(ids).logits) != pytest.approx(scores[0], rel=0.01)


def test_segments_are_trained_as_well(saved, pairs, tmp_path):
    """The first loss is that of the fresh head on what transformers' own tokenizer gives."""
    table = pairs.head(8).assign(prompt="abc?", chosen=[f"good {k * 'a'}." for k in range(8)])
    table = table.assign(rejected="bad.")
    backbone = str(saved("bert with segments"))
    log = train_reward_model(tmp_path, table, settings=SETTINGS, backbone=backbone, seed=3)
    model, tokenizer = new_reward_model(backbone, 0, 3)
    fresh = AutoModelForSequenceClassification.from_pretrained(backbone).eval()
    fresh.load_state_dict(model.state_dict())
    scores = [
        [fresh(**tokenizer("abc?", one, return_tensors="pt")).logits[0, 0] for one in table[side]]
        for side in ("chosen", "rejected")
    ]
    gap = torch.stack(scores[0]) - torch.stack(scores[1])
    expected = float(-functional.logsigmoid(gap).mean())
    assert log["loss"].iloc[0] == pytest.approx(expected, abs=2e-4)


# --- what is too long ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "llama without padding", "bert", "roberta"])
def test_only_the_prompts_beginning_is_cut(architecture, saved, caplog):
    tokenizer = load_reward_model(saved(architecture))[1]
    prompts, responses = ["abcdefghijkl", "a"], ["mnopqrs", "mn"]
    whole = conversation_ids(tokenizer, prompts, responses, 64)
    with caplog.at_level(logging.WARNING):
        cut = conversation_ids(tokenizer, prompts, responses, len(whole[0]) - 10)
    assert "1 of 2 conversations have more than" in caplog.text
    assert cut[1] == whole[1] and len(cut[0]) == len(whole[0]) - 10
    pair = "bert" in architecture
    assert cut[0] == (whole[0][:1] + whole[0][11:] if pair else whole[0][10:])
    written = "".join(tokenizer.convert_ids_to_tokens(cut[0]))
    assert "mnopqrs" in written and "abcd" not in written


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_response_is_never_cut(architecture, saved):
    source = SequenceClassifierReward.load(saved(architecture), 16)
    assert len(source(["abc"] * 2, ["defgh", "i"])) == 2
    with pytest.raises(LengthError, match="number 1 is longer than the 16 tokens that can be read"):
        source(["abc"] * 2, ["i", "a" * 30])


@pytest.mark.parametrize(("architecture", "positions"), [("bert", 40), ("roberta", 19), ("gpt2", 30)])
def test_no_more_is_read_than_a_model_has_positions(architecture, positions, saved):
    folder = saved(architecture)
    model, tokenizer = load_reward_model(folder)
    assert longest(model, 4096) == positions and longest(model, 7) == 7
    assert reader(str(folder), 4096)[1] == positions
    scores = SequenceClassifierReward.load(folder)(["abc" * 30, "a"], ["fine.", "fine."])
    assert np.isfinite(scores).all()
    with pytest.raises(ValueError, match=f"conversation 1 has {positions + 1} tokens; expected 1 to"):
        features_and_scores(model, [[1], [1] * (positions + 1)])
    ids = conversation_ids(tokenizer, ["abc" * 30], ["fine."], positions)
    assert len(ids[0]) == positions and scores[0] == pytest.approx(float(features_and_scores(model, ids)[1]))


# --- pairs that cannot be told apart ------------------------------------------------------------------


def sixty(pairs):
    """Return pairs of which every second has responses of unknown letters only, and two are long."""
    chosen = [f"{'A' if k % 2 else 'a'}{'b' * (k % 5)}" for k in range(60)]
    rejected = [f"{'B' if k % 2 else 'c'}{'b' * (k % 5)}" for k in range(60)]
    chosen[0] = rejected[2] = "d" * 70
    return pairs.head(60).assign(prompt="ask?", chosen=chosen, rejected=rejected)


def test_pairs_that_are_the_same_to_the_model_are_left_out_and_counted(saved, pairs, tmp_path, caplog):
    backbone = str(saved("llama"))
    kept, left_out = usable(reader(backbone, 64)[0], sixty(pairs), 64)
    assert len(kept) == 28 and list(kept.index[:3]) == [4, 6, 8]
    assert left_out == {"a response longer than 64 tokens": 2, "the same tokens in both responses": 30}
    settings = SETTINGS.model_copy(update={"max_length": 64, "learning_rate": 1e-2, "epochs": 8})
    with caplog.at_level(logging.WARNING):
        log = train_reward_model(tmp_path, sixty(pairs), settings=settings, backbone=backbone, seed=0)
    assert "30 (the same tokens in both responses)" in caplog.text
    assert log["step"].iloc[-1] <= 8 * 4 and log["accuracy"].iloc[-1] > 0.9
    equal = sixty(pairs).iloc[1::2]
    with pytest.raises(ValueError, match="none of 30 can be learned from"):
        train_reward_model(tmp_path, equal, settings=settings, backbone=backbone, seed=0)


# --- tokenizers and models that lack something --------------------------------------------------------


def test_without_padding_and_end_a_model_scores_and_does_not_learn(saved, tmp_path):
    folder = save_tiny(tmp_path / "bare", "llama without padding")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["eos_token"]
    path.write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(folder).eos_token is None
    source = SequenceClassifierReward.load(folder, 64)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = prompt_ids(source.tokenizer, ["ab", "abc"], 64)
    rows = [row + source.tokenizer(text)["input_ids"][1:] for row, text in zip(rows, "xy", strict=True)]
    expected = [float(model(torch.tensor([row])).logits) for row in rows]
    np.testing.assert_allclose(source(["ab", "abc"], ["x", "y"]), expected, rtol=1e-4)
    with pytest.raises(BackboneError, match="needs a padding token among its 36 tokens"):
        new_reward_model(str(folder), 0, 0)
    with pytest.raises(ValueError, match="has no token that ends a text; set its eos_token"):
        end_id(source.tokenizer)


def test_a_padding_token_that_the_model_does_not_know_is_no_hindrance_to_scores(saved, tmp_path):
    shutil.copytree(saved("llama"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "model")
    scores = SequenceClassifierReward.load(tmp_path / "model", 64)(["abc", "d"], ["x", "hello."])
    expected = by_hand(saved("llama"), [("abc", "x"), ("d", "hello.")])
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    with pytest.raises(BackboneError, match=r"padding token among its \d+ tokens, its tokenizer has"):
        new_reward_model(str(tmp_path / "model"), 0, 0)
