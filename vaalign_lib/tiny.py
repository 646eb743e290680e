"""Tiny models of the papers' own architectures, with the embedded world's vocabulary."""

from typing import Any, Literal

from transformers import (
    GemmaConfig,
    GPT2Config,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from vaalign_lib.synthetic.tokenizer import world_tokenizer

Architecture = Literal["gpt2", "qwen2", "mistral", "gemma"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "qwen2", "mistral", "gemma")
CONTEXT = 64  # tokens of prompt and response together, at most
HEADS = 2  # of attention in policies; narrower ones cost more than they add


def tiny_config(architecture: Architecture, width: int, layers: int = 2) -> PretrainedConfig:
    """Return the configuration of a tiny policy, or of a tiny reward model's backbone (gemma)."""
    tokenizer = world_tokenizer()
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
    }
    llama_like: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
    }
    if architecture == "gpt2":
        return GPT2Config(
            n_embd=width,
            n_layer=layers,
            n_head=HEADS,
            n_positions=CONTEXT,
            activation_function="gelu",  # GPT-2 has a close approximation, four times slower here
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    if architecture == "qwen2":
        return Qwen2Config(tie_word_embeddings=True, **llama_like, **shared)
    if architecture == "mistral":
        return MistralConfig(sliding_window=None, tie_word_embeddings=False, **llama_like, **shared)
    if architecture == "gemma":
        llama_like |= {"num_attention_heads": 4, "head_dim": width // 4}  # as in Gemma 2B
        return GemmaConfig(**llama_like, **shared)
    raise ValueError(
        f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}"
    )
