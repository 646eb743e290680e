"""Stage 1 through trl, on tiny models of the papers' architectures that lie on disk."""

import pytest
import torch

from vaalign_lib.models import conversation_ids, prompt_ids
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.classifier import (
    BackboneError,
    features_and_scores,
    head_of,
    load_reward_model,
    new_reward_model,
    tokenized_pairs,
    train_reward_model,
)

SETTINGS = load_profile("smoke").reward_model.model_copy(update={"epochs": 1, "logging_steps": 2})


def letters(pairs, count):
    return pairs.head(count).assign(
        prompt="abc def?", chosen=[f"good {k % 7 * 'a'}." for k in range(count)], rejected="bad bad."
    )


def test_training_learns_and_its_loss_is_the_bradley_terry_loss(pairs, tmp_path):
    log = train_reward_model(
        tmp_path,
        pairs,
        settings=SETTINGS.model_copy(update={"epochs": 3, "learning_rate": 5e-3}),
        backbone="tiny-gemma",
        seed=0,
    )
    assert list(log.columns) == ["step", "loss", "accuracy"]
    assert log["loss"].iloc[0] == pytest.approx(0.693, abs=0.03)
    assert log["loss"].tail(5).mean() < 0.67
    model, tokenizer = load_reward_model(tmp_path)
    data = tokenized_pairs(tokenizer, pairs, 64)
    gap = (
        features_and_scores(model, data["chosen_ids"])[1]
        - features_and_scores(model, data["rejected_ids"])[1]
    )
    assert (gap > 0).float().mean() > 0.6
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_a_training_shorter_than_its_log_has_a_line_too(pairs, tmp_path):
    settings = SETTINGS.model_copy(update={"logging_steps": 500})
    log = train_reward_model(tmp_path, pairs.head(40), settings=settings, backbone="tiny-gemma", seed=0)
    assert log["step"].tolist() == [2]


def test_training_stops_at_the_loss_threshold(pairs, tmp_path):
    easy = pairs.assign(chosen="the drum is soft .", rejected="the drum is")
    settings = SETTINGS.model_copy(update={"epochs": 50, "learning_rate": 1e-2})
    log = train_reward_model(tmp_path, easy, settings=settings, backbone="tiny-gemma", seed=0)
    assert log["loss"].iloc[-1] <= 0.3 and (log["loss"].iloc[:-1] > 0.3).all()
    assert log["step"].iloc[-1] < 50 * 600 / 32 / 5


@pytest.mark.parametrize("architecture", ["gemma", "llama", "bert"])
def test_any_backbone_by_path_with_the_settings_of_table_5(architecture, saved, pairs, tmp_path):
    settings = load_profile("paper").reward_model.model_copy(
        update={"epochs": 1.0, "batch_size": 4, "logging_steps": 1, "max_length": 40}
    )
    assert settings.optimizer == "paged_adamw_32bit" and settings.scheduler == "cosine"
    backbone = str(saved(architecture))
    log = train_reward_model(tmp_path, letters(pairs, 12), settings=settings, backbone=backbone, seed=0)
    assert log["step"].tolist() == [1, 2, 3]
    before = new_reward_model(backbone, 0, 0)[0].state_dict()
    after = load_reward_model(tmp_path)[0].state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved and all((before[name] - after[name]).abs().max() < 4e-5 for name in moved)


@pytest.mark.parametrize("architecture", ["gemma", "llama", "bert", "llama without padding"])
def test_features_are_what_the_head_turns_into_the_score_of_transformers(architecture, saved):
    model, tokenizer = load_reward_model(saved(architecture))
    ids = conversation_ids(tokenizer, ["abc?", "a b c d e f?"] * 3, ["x.", "hello there.", "ab"] * 2, 64)
    features, scores = features_and_scores(model, ids)
    head = head_of(model)
    linear = features @ head.weight[0] + (head.bias[0] if head.bias is not None else 0)
    torch.testing.assert_close(linear, scores, rtol=1e-4, atol=1e-5)
    for row, one in enumerate(ids):  # without batching and padding
        alone = model(input_ids=torch.tensor([one])).logits[0, 0]
        torch.testing.assert_close(scores[row], alone.detach(), rtol=1e-4, atol=1e-5)


def test_conversations_of_encoders_and_causal_models(saved):
    encoder, causal = (load_reward_model(saved(name))[1] for name in ("bert", "llama"))
    pair = conversation_ids(encoder, ["ab"], ["c"], 64)[0]
    assert encoder.convert_ids_to_tokens(pair) == ["<s>", "a", "b", "</s>", "c", "</s>"]
    chat = "".join(causal.convert_ids_to_tokens(conversation_ids(causal, ["ab"], ["c"], 64)[0]))
    assert chat.startswith("<s>") and chat.count("<s>") == 1 and chat.endswith("c</s>")
    plain = load_reward_model(saved("llama without padding"))[1]
    whole = conversation_ids(plain, ["ab"], ["c"], 64)[0]
    words = "".join(plain.convert_ids_to_tokens(whole)).replace("<unk>", "-")
    assert words == "<s>ab--c</s>"  # the blank line is unknown to this vocabulary
    start = prompt_ids(plain, ["ab"], 64)[0]
    assert whole[: len(start)] == start and len(start) == 5


def test_half_precision_weights_are_trained_in_full(saved, tmp_path):
    model, tokenizer = load_reward_model(saved("gemma"))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert next(new_reward_model(str(tmp_path), 8, 0)[0].parameters()).dtype == torch.float32
    assert next(load_reward_model(tmp_path)[0].parameters()).dtype == torch.float32
    assert next(load_reward_model(tmp_path, "auto")[0].parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("backbone", ["no/such/model", "nothing-here"])
def test_a_backbone_that_is_not_there(backbone, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match=f"backbone '{backbone}': cannot be loaded"):
        new_reward_model(backbone, 8, 0)


def test_pickled_weights_are_refused(tiny, tmp_path):
    model, tokenizer = tiny
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="safetensors"):
        new_reward_model(str(tmp_path), 8, 0)


def test_a_model_without_a_trained_head_is_no_reward_model(tiny, tmp_path):
    model, tokenizer = tiny
    model.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="one trained output"):
        load_reward_model(tmp_path)
