"""Stacks of today's architectures are what separate models are; docs/architectures.md says which."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, GraniteConfig, OPTConfig

from tests.policies.conftest import END, PAD, WORDS
from tests.policies.test_stack import ROWS, assert_near, batch, disturb, loss, separate, separate_logits
from tests.policies.test_stack import stacked_logits as logits_of
from vaalign_lib.policies.checks import ARCHITECTURES, StackError
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import rollout, sequences, token_log_probabilities
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LIKE = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64}  # fmt: skip
TIED, WINDOW = {"tie_word_embeddings": True}, {"sliding_window": 4}
BY_LAYER = {"layer_types": ["sliding_attention", "full_attention"] * 2}
# name of the configuration, what models have it, what the tiny one shows, its settings
KNOWN = {
    "gpt2": ("GPT-2", "learned positions, tied head",
             {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "llama": ("Llama 2 and 3, SmolLM2, TinyLlama", "grouped heads", {}),
    "mistral": ("Mistral 7B", "one sliding window", WINDOW),
    "qwen2": ("Qwen2, Qwen2.5", "biases, tied head, windows by layer",
              {**TIED, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("Qwen3", "norms of queries and keys, width of a head of its own, windows by layer",
              {**TIED, **WINDOW, "head_dim": 8, "use_sliding_window": True, "max_window_layers": 1}),
    "smollm3": ("SmolLM3", "every fourth layer without positions, tied head", TIED),
    "gemma2": ("Gemma 2", "norms from one, capped scores and logits, scaled embeddings, windows by layer",
               {**TIED, **WINDOW, **BY_LAYER, "head_dim": 8, "query_pre_attn_scalar": 6,
                "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("Gemma 3 (1B; the text part of others)",
                    "norms of queries and keys from one, two rotations, windows by layer",
                    {**TIED, **WINDOW, **BY_LAYER, "head_dim": 8, "query_pre_attn_scalar": 6}),
    "phi": ("Phi-1.5, Phi-2", "attention beside the feed-forward layer, rotation in part, head with bias",
            {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi-3 (4k), Phi-4", "queries, keys and values in one layer, one sliding window", WINDOW),
    "olmo": ("OLMo", "norms without weights, values clipped", {"clip_qkv": 0.5}),
    "olmo2": ("OLMo 2", "norms after each part, and of queries and keys", {}),
    "gpt_neox": ("Pythia, GPT-NeoX", "attention beside the feed-forward layer, rotation in part",
                 {"rotary_pct": 0.5}),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KNOWN)


def random_model(kind, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():  # fresh biases and norms would hide which policy's they are
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folder(kind, tmp_path):
    shared = LIKE if kind != "gpt2" else {name: LIKE[name] for name in list(LIKE)[:4]}
    random_model(kind, {**shared, **KNOWN[kind][2]}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_every_architecture_that_is_accepted_is_tested_and_on_the_page():
    assert set(KNOWN) == set(ARCHITECTURES)
    rows = [f"| `{kind}` | {models} | {shown} |" for kind, (models, shown, _) in KNOWN.items()]
    assert [line for line in PAGE.read_text().splitlines() if line.startswith("| `")] == rows


@kinds
def test_logits_and_gradients_of_a_stack_are_the_models(kind, folder, tmp_path):
    stack = PolicyStack(folder, 2, gradient_checkpointing=True)
    disturb(stack)
    rows, responses, prompts = batch(2)  # up to 11 tokens
    with stack.updating([0, 1]):
        logits = logits_of(stack, prompts, responses).split(ROWS)
        torch.stack([loss(one) for one in logits]).sum().backward()
    for j in range(2):
        model = separate(stack, j, tmp_path / f"out-{j}")
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate_logits(model, rows[part], responses[part])
        torch.testing.assert_close(logits[j], alone, atol=3e-5, rtol=1e-4)
        loss(alone).backward()
        assert len(list(model.parameters())) == len(stack.parameters())
        for name, weight in model.named_parameters():
            assert_near(stack.parameters()[name].grad[j], weight.grad)


@kinds
def test_logits_and_gradients_of_adapters_are_pefts(kind, folder, tmp_path):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    stack = PolicyStack(folder, 2, lora=lora)
    disturb(stack)
    rows, responses, prompts = batch(2)
    logits = logits_of(stack, prompts, responses).split(ROWS)
    torch.stack([loss(one) for one in logits]).sum().backward()
    for j in range(2):
        model = separate(stack, j, tmp_path / f"out-{j}", base=folder)
        part = slice(j * ROWS, (j + 1) * ROWS)
        alone = separate_logits(model, rows[part], responses[part])
        torch.testing.assert_close(logits[j], alone, atol=3e-5, rtol=1e-4)
        loss(alone).backward()
        theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert len(theirs) == len(stack.parameters())
        for name, parameter in stack.parameters().items():
            layer, _, side = name.rpartition(".")
            side = {"down": "lora_A", "up": "lora_B"}[side]
            assert_near(parameter.grad[j].T, theirs[f"base_model.model.{layer}.{side}.default.weight"])


@kinds
def test_what_is_written_and_what_the_reference_thinks_of_it_are_the_models(kind, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = ReferencePolicy(AutoModelForCausalLM.from_pretrained(folder))
    rows, _, prompts = batch(2)
    uniforms = torch.rand(len(rows), 12, generator=torch.Generator().manual_seed(0))
    how = Sampling(min_new_tokens=12, max_new_tokens=12, log_probability_temperature=1.0)
    for writer in (PolicyStack(folder, 2), reference):
        written = rollout(writer, prompts, uniforms, how, END, PAD)
        thought = reference.log_probabilities(sequences(prompts, written.responses, torch.float32), 1.0)
        for k, row in enumerate(rows):
            ids = torch.tensor([row + written.responses[k].tolist()[:-1]])
            plain = token_log_probabilities(model(ids).logits[:, -12:], written.responses[None, k], 1.0)[0]
            torch.testing.assert_close(written.log_probabilities[k], plain, atol=3e-5, rtol=1e-4)
            torch.testing.assert_close(thought[k], plain, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("other", [OPTConfig, FalconConfig, GraniteConfig])
def test_other_architectures_are_refused_by_name(other):
    with pytest.raises(StackError, match=f"architecture: expected one of gpt2, .*, got {other.model_type}"):
        PolicyStack(other(), 2)


def test_the_whole_of_gemma_3_is_refused():
    with pytest.raises(StackError, match=r"got gemma3$"):
        PolicyStack(AutoConfig.for_model("gemma3"), 2)


SHOWN = {
    "gemma2": ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window"),
    "gemma3_text": ("sliding_window",),
    "qwen3": ("sliding_window",),
    "phi3": ("sliding_window",),
    "olmo": ("clip_qkv",),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SHOWN.items() for name in names])
def test_the_tiny_models_show_what_the_page_says(kind, name):
    """A cap, a window or a clip that changes nothing would test nothing."""
    settings, logits = {**LIKE, **KNOWN[kind][2]}, []
    for value in (settings[name], type(settings[name])(1000)):
        model = random_model(kind, {**settings, name: value})
        with torch.no_grad():
            logits.append(model(torch.arange(2, 13)[None]).logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3
