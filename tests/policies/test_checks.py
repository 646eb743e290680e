"""What a policy may be made of: what is allowed is right, what is not is refused (see also bad_input)."""

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.policies.conftest import END, PAD, WORDS, config
from tests.policies.test_stack import TOKENS, batch, disturb, separate, separate_logits
from tests.policies.test_stack import stacked_logits as logits_of
from vaalign_lib.policies.checks import LORA, StackError, check_lora
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import Prompts, rollout, sequences, token_log_probabilities
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling

ALLOWED = {
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"v_proj": 7},
    "layers_to_transform": [1],
    "exclude_modules": ["v_proj"],
    "lora_alpha": 3,
    "use_rslora": True,
}


@pytest.mark.parametrize("name", ALLOWED)
def test_settings_that_adapters_may_have_start_at_the_base_and_are_pefts(name, saved, tmp_path):
    lora = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], name: ALLOWED[name]})
    folder = saved("mistral")
    stack = PolicyStack(folder, 1, lora=lora)
    rows, responses, prompts = batch(1)
    base = separate_logits(AutoModelForCausalLM.from_pretrained(folder), rows, responses)
    torch.testing.assert_close(logits_of(stack, prompts, responses), base, atol=2e-5, rtol=1e-5)
    disturb(stack)
    alone = separate(stack, 0, tmp_path / "out", base=folder)
    theirs = separate_logits(alone, rows, responses)
    torch.testing.assert_close(logits_of(stack, prompts, responses), theirs, atol=3e-5, rtol=1e-5)
    assert (theirs - base).abs().max() > 0.05


def test_what_is_not_listed_is_refused_whatever_peft_adds():
    assert {one.name for one in fields(LoraConfig)} >= LORA
    for name in {one.name for one in fields(LoraConfig)} - LORA:
        changed = LoraConfig()
        setattr(changed, name, "something")
        with pytest.raises(StackError, match=f"lora: {name}='something' is beyond plain LoRA"):
            check_lora(changed)
    check_lora(LoraConfig(task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path="x"))


ROTATIONS = {
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
def test_with_rotations_that_are_allowed_what_is_written_is_what_is_scored(kind):
    """Token by token with a cache, all at once, and by the plain model, beyond the original length."""
    rotation = {"rope_type": kind, "rope_theta": 10_000.0} | ROTATIONS[kind]
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(
        LlamaConfig(**config("llama").to_dict() | {"rope_parameters": rotation})
    ).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rows, _, prompts = batch(1)
    uniforms = torch.rand(len(rows), 14, generator=torch.Generator().manual_seed(0))
    how = Sampling(min_new_tokens=14, max_new_tokens=14, log_probability_temperature=1.0)
    reference = ReferencePolicy(plain)
    written = rollout(reference, prompts, uniforms, how, END, PAD)
    at_once = reference.log_probabilities(sequences(prompts, written.responses, torch.float32), 1.0)
    torch.testing.assert_close(written.log_probabilities, at_once, atol=2e-5, rtol=1e-5)
    for k, row in enumerate(rows):
        ids = torch.tensor([row + written.responses[k].tolist()[:-1]])
        alone = token_log_probabilities(plain(ids).logits[:, -14:], written.responses[None, k], 1.0)
        torch.testing.assert_close(at_once[k], alone[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_padding_is_where_it_was_put_whichever_token_it_is(kind, saved):
    """A pad that the configuration does not name, and pads inside of prompts and responses."""
    model = AutoModelForCausalLM.from_pretrained(saved(kind))
    stack = PolicyStack(saved(kind), 2)
    pad = 9
    assert model.config.pad_token_id == PAD != pad
    rows = [[5, pad, 6], [PAD, 7, PAD, 8, pad], [pad], [4, 3], [pad, pad], [PAD]]
    random = torch.Generator().manual_seed(0)
    responses = torch.randint(2, WORDS, (len(rows), TOKENS), generator=random)
    responses[:, 2], responses[:, 4] = pad, PAD
    for fill in (pad, PAD, 11):
        logits = logits_of(stack, Prompts.from_lists(rows, 6, fill), responses)
        alone = separate_logits(model, rows, responses)
        torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)
