"""The toy of reward-robust RLHF (arXiv 2409.15360, Section 4, Figure 1), all of its seeds trained at once.

Eight prompts, eight responses, of which the right one has the prompt's own number. The annotator is ideal:
for each prompt there are two pairs, the right response above two random others. Reward models and policies
are three-layer networks in stacks of one batched product a layer. Neither sizes nor steps are printed: they
are settings here. Shapes: S seeds, M reward models, G networks of a stack, K = 8 prompts and responses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vaalign_lib.statistics.arrays import Array
from vaalign_lib.theory.robust import Rule, integrated

SIZE = 8  # K
MODELS = 4  # the nominal one and three further
EPSILON = 1e-5  # of Adam: a bias that moves chosen and rejected alike has a gradient of rounding alone
Layers = list[tuple[Tensor, Tensor]]  # weight (G, in, out) and bias (G, 1, out) of each
Value = Callable[[Tensor], Tensor]  # of policies (G, K, K), for each (G,)


@dataclass(frozen=True)
class Settings:
    """What the paper does not print."""

    hidden: int = 16
    reward_steps: int = 200
    policy_steps: int = 200
    learning_rate: float = 0.01
    own_pairs: bool = False  # whether each reward model has pairs of its own
    centred: bool = False  # whether rewards are measured from each prompt's mean
    sampled: bool = False  # PPO on sampled responses in place of the expected reward in closed form


def draw_pairs(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draw two different wrong responses for each prompt of so many annotators (count, K, 2)."""
    places = random.permuted(np.tile(np.arange(SIZE - 1), (count, SIZE, 1)), axis=2)[..., :2]
    return np.asarray(places + (places >= np.arange(SIZE)[:, None]))


def networks(count: int, widths: Sequence[int], seed: int) -> Layers:
    """Draw a stack of networks as torch draws linear layers."""
    random, layers = torch.Generator().manual_seed(seed), []
    for inside, outside in pairwise(widths):
        shapes = (count, inside, outside), (count, 1, outside)
        drawn = [(2 * torch.rand(one, generator=random) - 1) / inside**0.5 for one in shapes]
        layers.append((drawn[0].requires_grad_(), drawn[1].requires_grad_()))
    return layers


def forward(layers: Layers, inputs: Tensor) -> Tensor:
    """Return outputs (G, rows, out) for inputs (G, rows, in), or (1, rows, in) for all."""
    for k, (weight, bias) in enumerate(layers):
        inputs = inputs.expand(len(weight), -1, -1).bmm(weight) + bias  # (G, rows, out)
        inputs = functional.relu(inputs) if k < len(layers) - 1 else inputs
    return inputs


def trained(layers: Layers, steps: int, rate: float, losses: Callable[[], Tensor]) -> None:
    """Descend the losses (G,) by Adam, which works weight by weight: each network is trained as if alone."""
    weights = [one for layer in layers for one in layer if one.requires_grad]
    adam = torch.optim.Adam(weights, rate, eps=EPSILON, fused=True)
    for _ in range(steps):
        adam.zero_grad(set_to_none=True)
        losses().sum().backward()
        adam.step()


def cells(prompts: Tensor, responses: Tensor) -> Tensor:
    """Return what a reward model sees of prompts and responses (..., rows): both one-hot (..., rows, 2 K)."""
    return torch.cat([functional.one_hot(one, SIZE).float() for one in (prompts, responses)], -1)


def train_rewards(pairs: NDArray[np.int64], settings: Settings, seed: int) -> Array:
    """Train a reward model on each annotator's pairs (G, K, 2) by Bradley-Terry; return rewards (G, K, K)."""
    layers = networks(len(pairs), [2 * SIZE, settings.hidden, settings.hidden, 1], seed)
    layers[-1][1].requires_grad_(False)  # pairs say nothing of it
    right = torch.arange(SIZE).expand(len(pairs), SIZE)[..., None]  # (G, K, 1)
    responses = torch.cat([right, torch.from_numpy(pairs)], 2).flatten(1)  # (G, 3 K)
    prompts = right.expand(-1, -1, 3).flatten(1)  # (G, 3 K)
    seen = cells(prompts, responses)  # (G, 3 K, 2 K)

    def losses() -> Tensor:
        scores = forward(layers, seen).view(-1, SIZE, 3)  # (G, K, 3)
        return -functional.logsigmoid(scores[..., :1] - scores[..., 1:]).mean((1, 2))  # (G,)

    trained(layers, settings.reward_steps, settings.learning_rate, losses)
    every = torch.cartesian_prod(torch.arange(SIZE), torch.arange(SIZE)).T  # (2, K * K)
    with torch.no_grad():
        rewards = forward(layers, cells(every[0], every[1])[None]).view(-1, SIZE, SIZE)  # (G, K, K)
    if settings.centred:
        rewards = rewards - rewards.mean(2, keepdim=True)
    return rewards.double().numpy()


def reward_models(seeds: int, settings: Settings, seed: int) -> Array:
    """Return the rewards of every seed's four models (S, M, K, K), on the same pairs or on own ones."""
    drawn = draw_pairs(seeds * (MODELS if settings.own_pairs else 1), np.random.default_rng([seed, 1]))
    pairs = drawn if settings.own_pairs else np.repeat(drawn, MODELS, 0)
    return train_rewards(pairs, settings, seed).reshape(seeds, MODELS, SIZE, SIZE)


def of_rule(models: Array, rule: Rule) -> Array:
    """Return the reward that policies of a rule are trained with (S, K, K), of models (S, M, K, K).

    The first model is nominal, the others are the uncertainty set; `mean` and `max` are of all four.
    """
    members = np.moveaxis(models if rule in ("mean", "max") else models[:, 1:], 1, -1)  # (S, K, K, M)
    return integrated(models[:, 0], members, rule)


def train_policies(value: Value, count: int, settings: Settings, seed: int) -> Array:
    """Maximize a value (G,) of policies (G, K, K), exact sums over the responses; return them."""
    layers = networks(count, [SIZE, settings.hidden, settings.hidden, SIZE], seed)
    prompts = torch.eye(SIZE)[None]
    steps, rate = settings.policy_steps, settings.learning_rate
    trained(layers, steps, rate, lambda: -value(forward(layers, prompts).softmax(-1)))
    with torch.no_grad():
        return forward(layers, prompts).softmax(-1).double().numpy()


def expected(rewards: Array) -> Value:
    """Return the expected reward, mean over prompts, for rewards (G, K, K)."""
    table = torch.from_numpy(rewards).float()
    return lambda policy: (policy * table).sum(2).mean(1)  # (G,)


def worst_return(nominal: Array, members: Array, weight: float) -> Value:
    """Return Equation 7 with Equation 6 as written: the minimum of the returns by members (G, M, K, K)."""
    first, others = (torch.from_numpy(one).float() for one in (nominal, members))

    def value(policy: Tensor) -> Tensor:
        worst = (policy[:, None] * others).sum(3).mean(2).amin(1)  # (G,)
        return weight * (policy * first).sum(2).mean(1) + (1 - weight) * worst

    return value


def ppo_policies(
    rewards: Array, settings: Settings, seed: int, samples: int = 4, epochs: int = 4, clip: float = 0.2
) -> Array:
    """Train policies by PPO on rewards (G, K, K): `samples` responses a prompt and step, advantages over the
    policy's own expected reward, `epochs` steps of Adam on the clipped surrogate; return them (G, K, K).
    """
    table, count = torch.from_numpy(rewards).float(), len(rewards)
    layers, random = networks(count, [SIZE, settings.hidden, settings.hidden, SIZE], seed), torch.Generator()
    random.manual_seed(seed + 1)
    prompts, weights = torch.eye(SIZE)[None], [one for layer in layers for one in layer]
    adam = torch.optim.Adam(weights, lr=settings.learning_rate, eps=EPSILON, fused=True)
    for _ in range(settings.policy_steps):
        with torch.no_grad():
            policy = forward(layers, prompts).softmax(-1)  # (G, K, K)
            drawn = policy.flatten(0, 1).multinomial(samples, True, generator=random).view(count, SIZE, -1)
            old = policy.gather(2, drawn).log()  # (G, K, samples)
            advantages = table.gather(2, drawn) - (policy * table).sum(2, keepdim=True)
        for _ in range(epochs):
            new = forward(layers, prompts).log_softmax(-1).gather(2, drawn)  # (G, K, samples)
            ratio = (new - old).exp()
            surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
            adam.zero_grad(set_to_none=True)
            (-surrogate.mean((1, 2)).sum()).backward()
            adam.step()
    with torch.no_grad():
        return forward(layers, prompts).softmax(-1).double().numpy()


def right_ones(policy: Array) -> NDArray[np.bool_]:
    """Whether each prompt's most probable response is the right one (..., K)."""
    return np.asarray(policy.argmax(-1) == np.arange(SIZE))


def play(models: Array, rules: Sequence[Rule], settings: Settings, seed: int) -> dict[Rule, Array]:
    """Train one policy a seed by every rule on models (S, M, K, K); return them (S, K, K).

    All rules of a seed start from the same weights. The rule `returns` is Equation 6 as written, lambda 0.4.
    """
    found: dict[Rule, Array] = {}
    for rule in rules:
        if rule == "returns":
            value = worst_return(models[:, 0], models[:, 1:], 0.4)
            found[rule] = train_policies(value, len(models), settings, seed)
        elif settings.sampled:
            found[rule] = ppo_policies(of_rule(models, rule), settings, seed)
        else:
            found[rule] = train_policies(expected(of_rule(models, rule)), len(models), settings, seed)
    return found
