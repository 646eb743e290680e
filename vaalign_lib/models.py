"""Models and their tokens: conversations as token ids, tiny models of the papers' architectures."""

import json
import logging
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vaalign_lib.data.hub import ask_hub
from vaalign_lib.data.world.tokenizer import world_tokenizer

_LOG = logging.getLogger(__name__)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or path, with a padding token.

    A folder that says it holds a plain fast tokenizer is taken at its word: for some architectures (Qwen2)
    transformers puts the architecture's own in its place, which reads other words.
    """
    ask_hub(name)
    config = Path(name) / "tokenizer_config.json"
    declared = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    plain = declared.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast")
    tokenizer = (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(name)
    if not tokenizer.vocab_size:  # what transformers makes of a folder without a tokenizer
        raise ValueError(f"tokenizer: {name} holds none (expected tokenizer.json in it)")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends a response, which every tokenizer here must have."""
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path
        raise ValueError(f"tokenizer {name}: has no token that ends a text; set its eos_token")
    return int(tokenizer.eos_token_id)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills up rows; the end's where a tokenizer has none for that."""
    pad = tokenizer.pad_token_id
    return end_id(tokenizer) if pad is None else int(pad)


class LengthError(ValueError):
    """A response that alone is longer than what may be read; responses are never cut."""


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], max_length: int
) -> list[list[int]]:
    """Return the token ids of prompts with their responses, each at most `max_length` long.

    A tokenizer's chat template is used if it has one. Without one, an encoder (whose tokenizer has a
    separator) gets prompt and response as a pair; a causal model the beginning-of-text token if its
    tokenizer puts one, the prompt, a blank line, the response and the end-of-text token. Of what is too
    long the prompt loses its beginning (in pairs after the first token), and a line of the log says how
    many did; a response that does not fit even without its prompt is a `LengthError`.
    """
    rows = fitting_ids(tokenizer, prompts, responses, max_length)
    if None in rows:
        text = f"number {rows.index(None)} is longer than the {max_length} tokens that can be read"
        raise LengthError(
            f"responses: {text}, and responses are not cut: allow longer conversations, or leave it out"
        )
    return [row for row in rows if row is not None]


def fitting_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], max_length: int
) -> list[list[int] | None]:
    """Return what `conversation_ids` does, with None for responses that do not fit."""
    check_texts(prompts=prompts, responses=responses)
    if len(prompts) != len(responses):
        raise ValueError(f"responses: expected {len(prompts)}, one a prompt, got {len(responses)}")
    rows: list[list[int] | None] = []
    cut = 0
    for k, row in enumerate(_ids(tokenizer, prompts, responses)):
        surplus = max(0, len(row) - max_length)
        first, after = _prompt_place(tokenizer, prompts[k], responses[k]) if surplus else (0, 0)
        fits = surplus <= after - first
        rows.append(row[:first] + row[first + surplus :] if fits else None)
        cut += fits and surplus > 0
    if cut:
        _LOG.warning(
            "%d of %d conversations have more than %d tokens; their prompts lose the beginning",
            cut, len(rows), max_length,
        )  # fmt: skip
    return rows


def check_texts(**texts: Sequence[str]) -> None:
    """Check that these are lists of texts; say what else is among them, and where."""
    for name, values in texts.items():
        if isinstance(values, str):
            raise ValueError(f"{name}: expected a list of texts, got one text")
        for k, one in enumerate(values):
            if not isinstance(one, str):
                raise ValueError(
                    f"{name}: number {k} is {type(one).__name__}, not text; "
                    "data.messages.prompt_text makes text of messages"
                )


def _ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str] | None = None
) -> list[list[int]]:
    """Return the token ids of whole conversations, or of prompts up to where a response begins."""
    if not prompts:
        return []
    if responses is not None and _takes_pairs(tokenizer):
        return list(tokenizer(list(prompts), list(responses), verbose=False)["input_ids"])
    turns = zip(prompts, strict=True) if responses is None else zip(prompts, responses, strict=True)
    if tokenizer.chat_template is None:
        first = tokenizer("a")["input_ids"][:1]  # some put a token before every text
        begin = tokenizer.bos_token if first == [tokenizer.bos_token_id] else ""
        end = "" if responses is None else tokenizer.eos_token or ""
        texts = [f"{begin}{prompt}\n\n{''.join(response)}{end}" for prompt, *response in turns]
    else:
        texts = [_templated(tokenizer, one) for one in turns]
    return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])


def _takes_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.chat_template is None and tokenizer.sep_token is not None


def _prompt_place(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> tuple[int, int]:
    """Return where a conversation's tokens that may be cut begin, and where they end."""
    if not _takes_pairs(tokenizer):
        return 0, len(_ids(tokenizer, [prompt])[0])
    parts = tokenizer(prompt, response, verbose=False).sequence_ids(0)
    first = parts.index(0) if 0 in parts else 0
    return first, first + parts.count(0)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_length: int
) -> list[list[int]]:
    """Return the token ids of prompts up to where a causal model's response begins."""
    check_texts(prompts=prompts)
    return [row[-max_length:] for row in _ids(tokenizer, prompts)]


def _templated(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> str:
    roles = ("user", "assistant")
    messages = [{"role": role, "content": said} for role, said in zip(roles, turns, strict=False)]
    begun = len(turns) == 1
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begun))
    except (TemplateError, TypeError, ValueError) as error:
        said = f"cannot write {roles[len(turns) - 1]}'s turn ({' '.join(str(error).split()):.160})"
        solution = "set tokenizer.chat_template to one that can, or to None"
        raise ValueError(f"tokenizer: its chat template {said}; {solution}") from None


def response_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """Decode what was written before the end; other special tokens are part of what was written.

    So is a padding token that a policy chose itself: the text must not end where the response goes on.
    """
    end = tokenizer.eos_token_id
    return list(tokenizer.batch_decode([list(takewhile(lambda one: one != end, row)) for row in ids]))


Architecture = Literal["gpt2", "qwen2", "mistral", "gemma"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "qwen2", "mistral", "gemma")
CONTEXT = 64  # tokens of prompt and response together, at most
HEADS = 2  # of attention in policies; narrower ones cost more than they add


def tiny_config(architecture: Architecture, width: int, layers: int = 2) -> PretrainedConfig:
    """Return the configuration of a tiny policy, or of a tiny reward model's backbone (gemma)."""
    tokenizer = world_tokenizer()
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    llama_like = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
    }
    sizes = {"n_embd": width, "n_layer": layers, "n_head": HEADS, "n_positions": CONTEXT}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    own: dict[Architecture, dict[str, Any]] = {
        # its own activation has a close approximation, four times slower here
        "gpt2": sizes | dropout | {"activation_function": "gelu"},
        "qwen2": llama_like | {"tie_word_embeddings": True},
        "mistral": llama_like | {"sliding_window": None, "tie_word_embeddings": False},
        # four heads, as in Gemma 2B
        "gemma": llama_like | {"num_attention_heads": 4, "head_dim": width // 4},
    }
    if architecture not in own:
        raise ValueError(f"architecture: expected one of {', '.join(own)}, got {architecture!r}")
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": pad, "eos_token_id": end, "bos_token_id": end}
    return AutoConfig.for_model(architecture, **tokens, **own[architecture])
