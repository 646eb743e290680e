"""How much memory a stack of policies takes, from counted weights; and how many policies fit."""

import os
from contextlib import suppress
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vaalign_lib.profiles import PolicyTraining, Profile
from vaalign_lib.runs import PlanError
from vaalign_lib.tiny import tiny_config

PROMPT_TOKENS = 64  # of a prompt, about
ACTIVATIONS = 80  # bytes for each layer, token and unit of width that a backward pass keeps, about
FLOAT, FOUR_BITS, ADAM = 4, 0.55, 8  # bytes a weight: held, in 4 bits with scales, Adam's moments
HEADROOM = 0.9  # of the memory that a stack may take


@dataclass(frozen=True)
class Sizes:
    """What a policy of one architecture amounts to.

    Attributes:
        weights: of the model.
        trained: weights that are trained for each policy.
        layers: of the model.
        width: of its hidden states.
        vocabulary: tokens.
    """

    weights: int
    trained: int
    layers: int
    width: int
    vocabulary: int


def sizes_of(profile: Profile, architecture: str) -> Sizes:
    """Count the weights of an architecture without loading any.

    Raises:
        PlanError: its configuration is not at hand.
    """
    name = profile.reference.models[architecture]
    config = _config(name, architecture, profile.reference.width)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(one.numel() for one in {id(p): p for p in model.parameters()}.values())
    lora = profile.policies.training[architecture].lora
    trained = weights
    if lora is not None:
        linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
        targets = [one for one in linear if one.out_features != config.vocab_size]
        if lora.target_modules is None:  # peft's choice: queries and values
            named = dict(model.named_modules())
            targets = [one for key, one in named.items() if key.endswith(("q_proj", "v_proj"))]
        trained = sum(lora.r * (one.in_features + one.out_features) for one in targets)
    layers, width = config.num_hidden_layers, config.hidden_size
    return Sizes(weights, trained, layers, width, config.vocab_size)


def _config(name: str, architecture: str, width: int) -> PretrainedConfig:
    if name == "tiny":
        return tiny_config(architecture, width)  # type: ignore[arg-type]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PlanError(
            f"reference.models.{architecture}: {name} is not at hand: {first}"
        ) from None


def stack_bytes(sizes: Sizes, training: PolicyTraining, policies: int, written: int) -> int:
    """Return about how much memory a stack takes in training.

    The reference, then for each policy weights, gradients and Adam's moments, and what a mini-batch keeps
    for its backward pass: activations, and logits with their gradients.

    Args:
        sizes: of a policy.
        training: its settings.
        policies: in the stack.
        written: tokens of a response.
    """
    rows, tokens = training.ppo.mini_batch_size * policies, PROMPT_TOKENS + written
    kept = rows * tokens * sizes.layers * sizes.width * ACTIVATIONS
    kept += rows * written * sizes.vocabulary * 3 * FLOAT
    trained = policies * sizes.trained * (2 * FLOAT + ADAM)
    base = sizes.weights * (FOUR_BITS if training.lora and training.lora.four_bit else FLOAT)
    return int(base + trained + kept)


def available_bytes(workers: int) -> int:
    """Return the memory that a stack may take: what is free on its GPU, else its share of the machine's.

    Args:
        workers: stacks at a time on this machine.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, workers)
    return 8 * 2**30 // max(1, workers)


def fitting(sizes: Sizes, training: PolicyTraining, policies: int, written: int, room: int) -> int:
    """Return how many of a number of policies fit into memory together, 0 if not even one does."""
    for size in range(policies, 0, -1):
        if stack_bytes(sizes, training, size, written) <= HEADROOM * room:
            return size
    return 0
