"""An ensemble of small reward models that share nothing, each with a backbone of its own, while heads on one
frozen backbone agree about everything it does not represent; trained as one stack by `torch.func.vmap`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vaalign_lib.data.pairs import read_part
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.models import CONTEXT, conversation_ids, load_tokenizer
from vaalign_lib.profiles import HeadTraining
from vaalign_lib.rewards.base import Array, PolicyIndex, ScoreSource
from vaalign_lib.rewards.classifier import (
    SIDES,
    TINY,
    BackboneError,
    new_reward_model,
    padded,
    tokenized_pairs,
)
from vaalign_lib.rewards.heads import additive_loss, batches, steps_of

EVALUATION_ROWS = 512
_STACK = "stack.safetensors"


@dataclass(frozen=True)
class BackboneStack:
    """Separate reward models of one architecture as stacked weights, by name, each (members, ...).

    The `template` is a model of the architecture, whose own weights are not used.
    """

    template: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: dict[str, Tensor]

    @torch.no_grad()
    def scores(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Return every member's score of tokenized conversations (conversations, members)."""
        score = vmap(_scorer(self.template), in_dims=(0, None, None))
        table, lengths = padded(ids, self.tokenizer.pad_token_id)
        parts = zip(table.split(EVALUATION_ROWS), lengths.split(EVALUATION_ROWS), strict=True)
        return torch.cat([score(self.weights, *part) for part in parts], dim=1).T.contiguous()

    def save(self, folder: Path) -> None:
        """Write the stacked weights, the template's configuration and the tokenizer into a folder."""
        self.template.config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        save_file({name: w.contiguous() for name, w in self.weights.items()}, folder / _STACK)


def load_backbones(folder: str | Path) -> BackboneStack:
    """Load a stack that was saved; its scores are those of the saved one, bit by bit."""
    if not (Path(folder) / _STACK).is_file():
        raise BackboneError(f"{folder}: expected saved backbones, without {_STACK}")
    config = AutoConfig.from_pretrained(folder)
    template = template_of(AutoModelForSequenceClassification.from_config(config))
    return BackboneStack(template, load_tokenizer(folder), load_file(Path(folder) / _STACK))


@dataclass(frozen=True)
class BackboneReward(ScoreSource):
    """Separate backbones as a source of rewards, shared by all policies."""

    stack: BackboneStack

    def scores(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Array:
        """Score responses by every member (responses, members)."""
        ids = conversation_ids(self.stack.tokenizer, prompts, responses, CONTEXT)
        return self.stack.scores(ids).double().numpy()


def train_backbones(
    chosen: Sequence[Sequence[int]],
    rejected: Sequence[Sequence[int]],
    *,
    settings: HeadTraining,
    width: int,
    members: int,
    pairs_each: int,
    seed: int,
) -> BackboneStack:
    """Train models of the kind `tiny-gemma`, each from fresh weights on a bootstrap sample of `pairs_each` of
    the pairs, given as token ids of the preferred conversations and of the others.
    """
    if not len(chosen) or len(chosen) != len(rejected):
        raise ValueError(
            f"chosen, rejected: expected as many of both, at least one, got {len(chosen)} and {len(rejected)}"
        )
    if members < 2 or pairs_each < 1:
        raise ValueError(f"members, pairs_each: expected at least 2 and 1, got {members} and {pairs_each}")
    models = [new_reward_model(TINY, width, seed + k)[0].eval() for k in range(members)]
    template, tokenizer = template_of(models[0]), world_tokenizer()
    stacked = stack_module_state(models)[0]  # type: ignore[arg-type]
    weights = {name: w.detach().requires_grad_(True) for name, w in stacked.items()}
    random = torch.Generator().manual_seed(seed)
    table, lengths = padded([*chosen, *rejected], tokenizer.pad_token_id)
    samples = torch.randint(len(chosen), (members, pairs_each), generator=random)
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    optimizer = AdamW(list(weights.values()), **options, fused=True)
    schedule = CosineAnnealingLR(optimizer, steps_of(settings, pairs_each))
    score = vmap(_scorer(template), in_dims=(0, 0, 0))
    for _, batch in batches(samples, settings, random, "separate backbones"):
        rows = torch.cat((batch, batch + len(chosen)), dim=1)  # chosen, then rejected
        longest = int(lengths[rows].max())
        left, right = score(weights, table[rows][..., :longest], lengths[rows]).chunk(2, dim=1)
        optimizer.zero_grad(set_to_none=True)
        additive_loss(left - right).backward()
        optimizer.step()
        schedule.step()
    return BackboneStack(template, tokenizer, {name: w.detach() for name, w in weights.items()})


def template_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that `vmap` can run."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    return model


def _scorer(model: PreTrainedModel) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Return a function of one member's weights, ids (rows, width) and lengths (rows,): scores (rows,)."""
    states = last_states(model)

    def score(weights: dict[str, Tensor], ids: Tensor, lengths: Tensor) -> Tensor:
        return (states(weights, ids, lengths) @ weights["score.weight"].T)[:, 0]

    return score


def last_states(model: PreTrainedModel) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Return a function of one member's weights, ids (rows, tokens) and lengths (rows,): the last tokens'
    states (rows, width).

    Conversations are padded on the right, so the causal mask also hides the padding from what counts.
    """

    def states(weights: dict[str, Tensor], ids: Tensor, lengths: Tensor) -> Tensor:
        width = ids.shape[1]
        ahead = torch.ones(width, width, dtype=torch.bool).triu(1)
        mask = torch.zeros(width, width).masked_fill(ahead, torch.finfo(torch.float32).min)
        inner = {name.removeprefix("model."): w for name, w in weights.items() if "model." in name}
        inputs = {"input_ids": ids, "attention_mask": mask[None, None], "use_cache": False}
        inputs["position_ids"] = torch.arange(width)[None]
        hidden = functional_call(model.base_model, inner, (), inputs).last_hidden_state
        return hidden[torch.arange(len(ids)), lengths - 1]

    return states


def write_backbones(folder: Path, settings: dict[str, Any], pairs: Path, **options: Any) -> None:
    """Train separate small backbones and score the pairs of the other parts."""
    sides = tokenized_pairs(world_tokenizer(), read_part(pairs, "train"), CONTEXT)
    ids = [sides[f"{side}_ids"] for side in SIDES]
    stack = train_backbones(*ids, settings=HeadTraining(**settings), **options)
    stack.save(folder)
    for part in ("held_out", "evaluation"):
        sides = tokenized_pairs(stack.tokenizer, read_part(pairs, part), CONTEXT)
        scores = {side: stack.scores(sides[f"{side}_ids"]) for side in SIDES}
        save_file(scores, folder / f"{part}.safetensors")
