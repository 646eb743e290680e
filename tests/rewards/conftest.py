"""A small world of pairs, a tiny reward model, and tiny random models of the papers' architectures."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from vaalign_lib.data.pairs import embedded_pairs
from vaalign_lib.data.world.world import World
from vaalign_lib.rewards.classifier import new_reward_model


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
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *"abcdefghijklmnopqrstuvwxyz .?"]
    core = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special: dict = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    if architecture.startswith(("bert", "roberta")):
        second = ":1" if architecture == "bert with segments" else ""
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            pair=f"<s> $A </s> $B{second} </s>{second}",
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
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {
        "llama": LlamaConfig(num_key_value_heads=1, **size),
        "gemma": GemmaConfig(num_key_value_heads=1, head_dim=8, **size),
        "bert": BertConfig(max_position_embeddings=40, **no_dropout, **size),
        "roberta": RobertaConfig(max_position_embeddings=20, **size),
        "gpt2": GPT2Config(n_positions=30, n_embd=16, n_layer=1, n_head=2, **size),
    }[architecture.split()[0]]
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():  # larger than fresh ones, so that scores differ
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
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
