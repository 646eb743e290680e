"""Estimates of memory against what autograd really keeps, and how many policies fit."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

from tests.small_problem import TableReward, tokenizer
from vaalign_lib import memory
from vaalign_lib.memory import Sizes, available_bytes, fitting, sizes_of, stack_bytes
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.ppo import Method, Task, Trainer
from vaalign_lib.profiles import PPO, PolicyTraining, Sampling, load_profile
from vaalign_lib.runs import PlanError
from vaalign_lib.study import lora_config
from vaalign_lib.tiny import tiny_config

SPECIAL = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
LLAMA = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip


def config(architecture, words):
    if architecture == "gpt2":
        size = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 128}
        none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(vocab_size=words, **size, **none, **SPECIAL)
    return Qwen2Config(vocab_size=words, **LLAMA, **SPECIAL)


def kept_bytes(trainer):
    """Count what one step keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in trainer.stack.model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.step()
    return sum(kept.values())


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2"])
@pytest.mark.parametrize("words", [500, 4000])
def test_estimates_are_near_what_a_step_keeps(architecture, words, tmp_path, monkeypatch):
    monkeypatch.setattr(
        memory, "PROMPT_TOKENS", 1
    )  # to this tokenizer a prompt is one unknown word
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(architecture, words))
    model.save_pretrained(tmp_path)
    ppo = PPO(iterations=1, batch_size=8, mini_batch_size=8, ppo_epochs=1)
    source = TableReward(lambda p, r: float(len(r)), lambda p, r: 1.0)
    trainer = Trainer(
        PolicyStack(tmp_path, 2), model, tokenizer(words), Task(["5"] * 4, source),
        Method(standardized=False), ppo, Sampling(min_new_tokens=24, max_new_tokens=24),
        critic="own_states", warm_up=8,
    )  # fmt: skip
    weights = sum(p.numel() for p in model.parameters())
    sizes = Sizes(weights, weights, 4, 128, words)
    without = weights * 4 + 2 * weights * 16
    estimate = stack_bytes(sizes, PolicyTraining(ppo=ppo), 2, 24) - without
    ratio = estimate / kept_bytes(trainer)
    assert 0.8 < ratio < 2


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "mistral"])
def test_weights_are_counted_as_a_stack_has_them(architecture):
    profile = load_profile("smoke")
    settings = profile.policies.training[architecture]
    lora = None if settings.lora is None else lora_config(settings.lora)
    tiny = tiny_config(architecture, profile.reference.width)
    stack = PolicyStack(tiny, 3, lora=lora)
    sizes = sizes_of(profile, architecture)
    assert sizes.trained == sum(p[0].numel() for p in stack.parameters().values())
    whole = AutoModelForCausalLM.from_config(tiny)
    assert sizes.weights == sum(p.numel() for p in whole.parameters())


def test_as_many_policies_as_fit():
    sizes, ppo = (
        Sizes(10**6, 10**6, 2, 64, 1000),
        PPO(iterations=1, mini_batch_size=4, batch_size=4),
    )
    training = PolicyTraining(ppo=ppo)
    room = stack_bytes(sizes, training, 5, 32) / 0.9 + 1
    assert fitting(sizes, training, 80, 32, int(room)) == 5
    assert fitting(sizes, training, 3, 32, int(room)) == 3
    assert fitting(sizes, training, 80, 32, 10**6) == 0
    assert available_bytes(4) * 4 <= available_bytes(1) or torch.cuda.is_available()


def test_a_model_that_is_not_at_hand_is_named(tmp_path):
    profile = load_profile("smoke")
    models = profile.reference.models | {"gpt2": str(tmp_path / "nowhere")}
    changed = profile.model_copy(
        update={"reference": profile.reference.model_copy(update={"models": models})}
    )
    with pytest.raises(PlanError, match=r"reference.models.gpt2: .*nowhere is not at hand"):
        sizes_of(changed, "gpt2")
