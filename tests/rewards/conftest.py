"""A small world of pairs, a tiny reward model, and tiny random models of the papers' architectures."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from vaalign_lib.data import embedded_pairs
from vaalign_lib.rewards.models import new_reward_model
from vaalign_lib.synthetic.world import World


@pytest.fixture(scope="session")
def pairs():
    world = World(0)
    random = np.random.default_rng(0)
    prompts = world.prompts(600, random)
    first, second = (world.responses(prompts, random.beta(2, 2, 600), random) for _ in range(2))
    return embedded_pairs(world, prompts, first, second, random)


@pytest.fixture(scope="session")
def tiny():
    return new_reward_model("tiny-gemma", 16, 0)


def save_tiny(folder, architecture):
    """Save a tiny random model of an architecture with a tokenizer of its own."""
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "user",
        "assistant",
        ":",
        *"abcdefghijklmnopqrstuvwxyz .?",
    ]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special: dict = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "bos_token": "<s>",
    }
    if architecture == "bert":
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair="<s> $A </s> $B </s>",
            special_tokens=[("<s>", 1), ("</s>", 2)],
        )
    if architecture == "llama without padding":  # as GPT-2 and the Llamas come
        del special["pad_token"]
        special["add_bos_token"] = True
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if architecture in ("llama", "gemma"):
        tokenizer.chat_template = (
            "<s>{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
        )
    size = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "pad_token_id": 0, "num_labels": 1}  # fmt: skip
    config = {
        "llama": LlamaConfig(num_key_value_heads=1, **size),
        "gemma": GemmaConfig(num_key_value_heads=1, head_dim=8, **size),
        "bert": BertConfig(**size),
    }[architecture.split()[0]]
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    made = {}

    def get(architecture):
        if architecture not in made:
            made[architecture] = save_tiny(tmp_path_factory.mktemp(architecture), architecture)
        return made[architecture]

    return get
