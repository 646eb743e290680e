"""How much memory a stack of policies takes, from counted weights; and how many policies fit."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from vaalign_lib.data.hub import ask_hub
from vaalign_lib.data.pairs import EMBEDDED, prompts_of
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.jobs import WORKER
from vaalign_lib.models import load_tokenizer, prompt_ids, tiny_config
from vaalign_lib.policies.checks import (
    check_layers,
    check_room,
    check_tokenizer,
    configuration_of,
    first_line,
)
from vaalign_lib.policies.frozen import READ_IN_PARTS
from vaalign_lib.policies.sampling import LARGE, PIECE
from vaalign_lib.profiles import OURS, PolicyTraining, Profile
from vaalign_lib.store import PlanError
from vaalign_lib.training.critic import AT_A_TIME, layers_seen

ACTIVATIONS = 80  # bytes for each layer, token and unit of width that a backward pass keeps, about
FLOAT, FOUR_BITS, ADAM = 4, 0.55, 8  # bytes a weight: held, in 4 bits with scales, Adam's moments
HALF, DOUBLE = 2, 8  # bytes of a number in bfloat16, and in double precision
KEPT = 4  # times the width: states of frozen layers that are kept of a token, and joined, about
HEADROOM = 0.9  # of the memory that a stack may take


@dataclass(frozen=True)
class Sizes:
    """What a policy of one architecture amounts to."""

    weights: int  # of the model
    trained: int  # weights that are trained for each policy
    layers: int
    width: int
    vocabulary: int
    prompt: int = 64  # tokens of the longest, to which all are padded
    features: int = 0  # of a token, to a critic on the reference's states
    warm_up: int = 0  # responses of the reference from which that critic starts
    frozen: int = 0  # lower layers without adapters, which are computed once
    keys: int = 0  # numbers that a layer keeps of a token while responses are written: keys and values


def sizes_of(profile: Profile, architecture: str) -> Sizes:
    """Count the weights of an architecture without loading any.

    Raises:
        PlanError: it is not at hand, no policy can start from it, or the prompts leave no room.
        DataError: the prompts cannot be read.
    """
    where, name = f"reference.models.{architecture}", profile.reference.models[architecture]
    policies = profile.policies
    if name in OURS:
        config = tiny_config(architecture, profile.reference.width)  # type: ignore[arg-type]
    else:
        config = policy_configuration(where, name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights, frozen = model.num_parameters(), 0
    trained = weights
    if (lora := policies.training[architecture].lora) is not None:
        linear = {key: one for key, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
        targets = {key: one for key, one in linear.items() if one.out_features != config.vocab_size}
        if lora.target_modules != "all-linear":
            named = lora.target_modules or ["q_proj", "v_proj"]  # peft's choice: queries and values
            targets = {key: one for key, one in linear.items() if key.rpartition(".")[2] in named}
        if (layers := lora.layers_to_transform) is not None:
            _told(where, check_layers, layers, config)
            targets = {key: one for key, one in targets.items() if int(key.split(".")[2]) in layers}
            frozen = min(layers) if config.model_type in READ_IN_PARTS else 0
        trained = sum(lora.r * (one.in_features + one.out_features) for one in targets.values())
    prompt = _longest_prompt(policies.data, policies.prompts, name)
    if policies.data != EMBEDDED:
        _told(where, check_room, prompt, config, policies.sampling)
    layers, width = config.num_hidden_layers, config.hidden_size
    sizes = weights, trained, layers, width, config.vocab_size, prompt
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    keys = 2 * head * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    critic = (0, 0)
    if policies.critic != "own_states":
        critic = 2 * width * len(layers_seen(layers, width)), policies.warm_up
    return Sizes(*sizes, *critic, frozen, keys)


@cache
def _longest_prompt(data: str, count: int, model: str) -> int:
    """Return the tokens of the longest of the first prompts of a data set, to a model's tokenizer."""
    if data == EMBEDDED:
        return Sizes.prompt
    tokenizer = world_tokenizer() if model in OURS else load_tokenizer(model)
    return max(map(len, prompt_ids(tokenizer, prompts_of(data, count), 10**6)))


def configuration(where: str, name: str) -> PretrainedConfig:
    """Return a model's configuration, or say (PlanError) where in a profile a missing one is named."""
    ask_hub(name)
    config: PretrainedConfig = _told(f"{where}: {name} is not at hand", AutoConfig.from_pretrained, name)
    return config


def policy_configuration(where: str, name: str) -> PretrainedConfig:
    """Return the configuration of a model from which policies can start, or say (PlanError) what is wrong
    with it or its tokenizer; see `policies.checks`.
    """
    config: PretrainedConfig = _told(where, configuration_of, name)
    _told(where, check_tokenizer, _told(where, load_tokenizer, name), config)
    return config


def _told(where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; what it refuses is said with the place in a profile."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        raise PlanError(f"{where}: {first_line(error)}") from None


def stack_bytes(sizes: Sizes, training: PolicyTraining, policies: int, written: int) -> int:
    """Return about how much memory so many policies take in training, with responses of `written` tokens.

    The reference, then for each policy weights, gradients and Adam's moments (and, in main memory, where
    it started), and what a mini-batch keeps for its backward pass: activations, and logits with their
    gradients, beside what frozen layers made of the tokens; or what writing keeps, if that is more: keys and
    values, and the logits of one token of all responses.
    """
    rows, tokens = training.ppo.mini_batch_size * policies, sizes.prompt + written
    states = rows * tokens * sizes.width  # numbers that a layer hands on
    lora = training.lora
    mixed = training.precision == "bfloat16" or bool(lora and lora.sixteen_bit)
    layer = states * ACTIVATIONS * (HALF / FLOAT if mixed else 1)
    upper = sizes.layers - sizes.frozen
    kept = upper * layer
    if training.gradient_checkpointing:  # of every layer what it is given, and one computed anew
        kept = upper * states * FLOAT + layer
    if lora is None or sizes.vocabulary <= LARGE:
        kept += rows * written * sizes.vocabulary * 3 * FLOAT
    else:  # logits of a piece at a time, and the output layer in the precision of products
        kept += sizes.vocabulary * (PIECE * 4 * FLOAT + HALF * sizes.width * mixed)
    number, read = HALF if mixed else FLOAT, training.ppo.batch_size * policies * tokens
    if sizes.frozen:
        kept += KEPT * read * sizes.width * number
    writing = read * sizes.layers * sizes.keys * number
    writing += training.ppo.batch_size * policies * sizes.vocabulary * 3 * FLOAT
    kept = max(kept, writing)
    start = FLOAT * (not torch.cuda.is_available())
    trained = policies * sizes.trained * (2 * FLOAT + ADAM + HALF * mixed + start)
    held = (lora.four_bit and FOUR_BITS) or (lora.sixteen_bit and HALF) if lora else 0
    base = sizes.weights * (held or FLOAT)
    return int(base + trained + kept + critic_bytes(sizes, training, policies, written))


def critic_bytes(sizes: Sizes, training: PolicyTraining, policies: int, written: int) -> int:
    """Return about how much memory a critic on the reference's states takes, at most at a time.

    The features of tokens with the states and sums that they are made of, of the warm-up's or a batch's;
    or the warm-up's with the Gram matrix and its copies; and the critics' weights.
    """
    token, seen = FLOAT * sizes.features, sizes.warm_up * written
    pieces = DOUBLE * 2 * min(AT_A_TIME, seen * sizes.features)
    fitted = token * seen + pieces + 3 * DOUBLE * sizes.features**2
    made = 3 * token * max(seen, policies * written * training.ppo.batch_size)
    return max(made, fitted) + policies * token * 4  # weights with gradient and Adam's moments


def beside_bytes(profile: Profile, source: str) -> int:
    """Return about how much memory the reward models of a source take beside a stack."""
    if source != "ensemble":
        return 0
    backbone = ("reward_model.backbone", profile.reward_model.backbone, FLOAT)
    models = (backbone, ("true_reward", profile.true_reward, HALF))
    return sum(classifier_weights(where, name) * size for where, name, size in models if name not in OURS)


@cache
def classifier_weights(where: str, name: str) -> int:
    """Count the weights of a sequence classifier, named in a profile, without loading any."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(configuration(where, name))
    return int(model.num_parameters())


def available_bytes(workers: int) -> int:
    """Return the memory that one of so many stacks at a time may take: what is free on its GPU, else its
    share of the machine's.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    machine = 8 * 2**30
    with suppress(OSError, ValueError):
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine // max(1, workers), WORKER.memory or machine)


def fitting(sizes: Sizes, training: PolicyTraining, policies: int, written: int, room: int) -> int:
    """Return how many of a number of policies fit into memory together, 0 if not even one does."""
    most = HEADROOM * room
    fits = (one for one in range(policies, 0, -1) if stack_bytes(sizes, training, one, written) <= most)
    return next(fits, 0)
