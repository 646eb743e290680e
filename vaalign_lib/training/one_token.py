"""The problem of one token: eight words, of which a policy writes one; where it converges to is known."""

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from vaalign_lib.rewards.base import Array

WORDS, END, PROMPT, BETA = 8, 1, "3", 0.5  # of the problem of one token


def one_token_problem(seed: int, smallest: float = 0.3) -> tuple[Array, Array]:
    """Return rewards and variances of the eight completions."""
    random = np.random.default_rng(seed)
    return random.normal(0, 0.4, WORDS), random.choice([smallest, 2.0], WORDS)


def one_token_policy(seed: int) -> Any:
    """Return a random GPT-2 that writes the words."""
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**size, **none, bos_token_id=END, eos_token_id=END, pad_token_id=0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def one_token_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words "0", "1", ...; "1" ends a response."""
    words = Tokenizer(models.WordLevel({str(k): k for k in range(WORDS)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(END), pad_token="0")
