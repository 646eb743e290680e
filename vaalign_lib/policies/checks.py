"""What a policy may be made of: model, adapters, tokenizer and prompts, checked before the first step.

Adapters are plain LoRA: they start as no change, and act on linear layers below the output.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.data.hub import ask_hub
from vaalign_lib.models import end_id, pad_id
from vaalign_lib.policies.sampling import Prompts
from vaalign_lib.profiles import Sampling

ARCHITECTURES = ("gpt2", "qwen2", "mistral", "llama", "qwen3", "smollm3", "gemma2", "gemma3_text", "phi",
                 "phi3", "olmo", "olmo2", "gpt_neox")  # fmt: skip
BY_LENGTH = ("dynamic", "longrope")  # rotations that a longer text changes for its first tokens as well
# Of peft's settings only these may differ from its defaults; each other one would change the base, train
# something beside the adapters, or be dropped.
LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode"}  # fmt: skip


class StackError(ValueError):
    """A stack cannot be made of what was given."""


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least`, or refuse it by its name."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))


def configuration_of(name: str | Path) -> PretrainedConfig:
    """Return the configuration of a causal model, before any weights are read.

    Raises:
        StackError: it is not at hand, or no policy can be made of such a model.
    """
    if (Path(name) / "adapter_config.json").is_file():
        told = "holds adapters, no whole model; save what peft's merge_and_unload() makes and name that"
        raise StackError(f"source: {name} {told}")
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        told = "holds no weights in safetensors (pytorch_model.bin is not read); use save_pretrained()"
        raise StackError(f"source: {name} {told}")
    ask_hub(name)
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        told = "is not at hand (expected a folder with config.json, or a name on the hub)"
        raise StackError(f"source: {name} {told}: {first_line(error)}") from None
    check_config(config)
    return config


def check_config(config: PretrainedConfig) -> None:
    """Refuse architectures that stacks do not know, and positions that depend on the length of a text."""
    if config.model_type not in ARCHITECTURES:
        raise StackError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {config.model_type}")
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rotation in BY_LENGTH:
        raise StackError(
            f"rope_type: {rotation} turns positions by the length of the text, so that a response would "
            "be written by one policy and scored by another; expected default, linear, yarn or llama3"
        )


def check_model(model: PreTrainedModel) -> None:
    """Refuse models that were changed before, and those without an output layer."""
    check_config(model.config)
    kind, layers = type(model).__name__, list(model.modules())
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # where it was not imported, nobody has adapters
    if tuners and any(isinstance(one, tuners.BaseTunerLayer) for one in layers):
        raise StackError(f"source: this {kind} has adapters already; take peft's merge_and_unload() of it")
    if stacked := {type(one).__name__ for one in layers if "Stacked" in type(one).__name__}:
        raise StackError(f"source: this {kind} is a stack already, of {', '.join(sorted(stacked))}")
    if model.get_output_embeddings() is None:
        raise StackError(f"source: expected a causal language model, {kind} has no output layer")


def check_lora(lora: Any) -> None:
    """Refuse settings of adapters beyond plain LoRA (see `LORA`), and numbers out of their range."""
    from peft import LoraConfig  # here, for it takes seconds

    if type(lora) is not LoraConfig:
        raise StackError(f"lora: expected peft's LoraConfig, got {type(lora).__name__}")
    plain = LoraConfig()
    for name in (one.name for one in fields(LoraConfig) if one.name not in LORA):
        if (value := getattr(lora, name)) != (usual := getattr(plain, name)):
            raise StackError(f"lora: {name}={value!r} is beyond plain LoRA; expected {usual!r}")
    for alpha in (lora.lora_alpha, *(lora.alpha_pattern or {}).values()):
        if not (isfinite(alpha) and alpha > 0):
            raise StackError(f"lora: expected a finite lora_alpha above 0, got {alpha}")
    if not 0 <= lora.lora_dropout < 1:
        raise StackError(f"lora: expected a lora_dropout from 0 to below 1, got {lora.lora_dropout}")


def check_layers(layers: int | Sequence[int] | None, config: PretrainedConfig) -> None:
    """Refuse layers that a model does not have, for adapters in some of them."""
    chosen = [layers] if isinstance(layers, int) else layers
    if chosen is not None and (not chosen or not set(chosen) <= set(range(config.num_hidden_layers))):
        known = f"expected some of 0 to {config.num_hidden_layers - 1}"
        raise StackError(f"lora: layers_to_transform: {known}, got {layers}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Refuse tokenizers that can end no response, and those of another model (ValueError)."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer: expected one of transformers, got {type(tokenizer).__name__}")
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: without an eos_token no response ends; set tokenizer.eos_token")
    _check_token("its eos_token", end_id(tokenizer), config)
    _check_token("its pad_token", pad_id(tokenizer), config)


def _check_token(what: str, token: int, config: PretrainedConfig) -> None:
    if token >= config.vocab_size:
        told = f"outside of the model's vocabulary of {config.vocab_size}; take the model's own tokenizer"
        raise ValueError(f"tokenizer: {what} is token {token}, {told}")


def checked_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], config: PretrainedConfig, sampling: Sampling
) -> Prompts:
    """Return prompts as a model reads them; what it cannot read or answer is refused (ValueError)."""
    check_tokenizer(tokenizer, config)
    prompts = Prompts.of(tokenizer, texts)
    _check_token("the largest of a prompt", int(prompts.ids.max()), config)
    check_room(prompts.ids.shape[1], config, sampling)
    return prompts


def check_room(longest: int, config: PretrainedConfig, sampling: Sampling) -> None:
    """Refuse prompts of so many tokens if they leave no room for a response (ValueError)."""
    if longest + sampling.max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"prompts: the longest has {longest} tokens, too many with {sampling.max_new_tokens} of a "
            f"response for the {config.max_position_embeddings} positions that this model can tell apart"
        )
