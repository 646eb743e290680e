"""Tiny random policies of the architectures that a stack knows."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

WORDS, WIDTH, PAD, END = 23, 16, 0, 1


def config(kind):
    """Return a configuration of `gpt2`, `qwen2`, `mistral` or `llama`; `-untied` where heads are."""
    name, _, untied = kind.partition("-")
    shared = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": END, "bos_token_id": END,
              "tie_word_embeddings": not untied}  # fmt: skip
    if name == "gpt2":
        return GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=40, **shared)
    llama_like = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2,
                  "max_position_embeddings": 40}  # fmt: skip
    kinds = {"qwen2": Qwen2Config, "mistral": MistralConfig, "llama": LlamaConfig}
    return kinds[name](**llama_like, **shared)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a random model of a kind and returns its folder."""

    def save(kind, seed=0):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(kind))
        with torch.no_grad():  # fresh biases and norms would hide which policy's they are
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"{kind}-{seed}")
        return tmp_path / f"{kind}-{seed}"

    return save
