"""An ensemble of heads as a source of rewards: the mean, the sample variance, the members."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.models import conversation_ids
from vaalign_lib.rewards.base import (
    Array,
    Judgement,
    Members,
    PolicyIndex,
    Truth,
    VarianceOf,
    check_variance_of,
)
from vaalign_lib.rewards.classifier import BackboneError, features_and_scores, load_reward_model, longest
from vaalign_lib.rewards.heads import KINDS, Heads
from vaalign_lib.store import new_folder

_HEADS, _RECORD, _BACKBONE = "heads.safetensors", "ensemble.json", "backbone"


@dataclass(frozen=True)
class SequenceClassifierReward:
    """The true reward by a sequence classifier, such as sfairXC/FsfairX-LLaMA3-RM-v0.1."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int = 4096

    @classmethod
    def load(cls, name: str | Path, max_length: int = 4096) -> "SequenceClassifierReward":
        """Load any sequence classifier with one trained output, by name or path."""
        return cls(*load_reward_model(name, dtype="auto"), max_length)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the score of each response (responses,), in the model's chat template."""
        length = longest(self.model, self.max_length)
        ids = conversation_ids(self.tokenizer, prompts, responses, length)
        return features_and_scores(self.model, ids)[1].double().numpy()


@dataclass(frozen=True)
class ClassifierEnsemble:
    """Rewards by several sequence classifiers, whole models, shared by all policies.

    Attributes:
        classifiers: at least two.
        truth: gives the true reward; None takes the classifiers' mean.
        variance_of: a single member's variance, as in the paper, or that of the mean.
    """

    classifiers: tuple[SequenceClassifierReward, ...]
    truth: Truth | None = None
    variance_of: VarianceOf = "member"

    def __post_init__(self) -> None:
        if len(self.classifiers) < 2:
            raise ValueError(f"classifiers: expected at least two, got {len(self.classifiers)}")
        check_variance_of(self.variance_of)

    @classmethod
    def load(
        cls, names: Sequence[str | Path], truth: Truth | None = None, max_length: int = 4096
    ) -> "ClassifierEnsemble":
        """Load classifiers with one trained output each, by name or path."""
        if isinstance(names, str | Path):
            raise ValueError(f"names: expected a list of at least two, got one, {names}")
        return cls(tuple(SequenceClassifierReward.load(one, max_length) for one in names), truth)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Members:
        """Score responses by every classifier (responses, classifiers)."""
        scores = [one(prompts, responses) for one in self.classifiers]
        return Members(np.stack(scores, axis=1), self.variance_of)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,)."""
        if self.truth is not None:
            return self.truth(prompts, responses)
        return judgement.sample(np.zeros(len(responses)))


@dataclass(frozen=True)
class EnsembleReward:
    """Rewards by heads on one frozen backbone.

    With one ensemble all policies share it. With several, policy j is judged by ensemble j.

    Attributes:
        model: the backbone, with the head of stage 1.
        tokenizer: its tokenizer.
        heads: a grid (ensembles, members).
        truth: gives the true reward; None if there is none at hand.
        max_length: tokens of prompt and response together.
        variance_of: a single member's variance, as in the paper, or that of the mean.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    truth: Truth | None = None
    max_length: int = 4096
    variance_of: VarianceOf = "member"

    def __post_init__(self) -> None:
        check_variance_of(self.variance_of)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Members:
        """Score responses by the ensemble of the policy that wrote each.

        Raises:
            IndexError: a policy has no ensemble.
        """
        known = self.heads.ensembles
        if known > 1 and len(policy) and not 0 <= policy.min() <= policy.max() < known:
            raise IndexError(f"policy: expected indices from 0 to {known - 1}, got {policy.max()}")
        length = longest(self.model, self.max_length)
        ids = conversation_ids(self.tokenizer, prompts, responses, length)
        features, _ = features_and_scores(self.model, ids)
        scores = self.heads.own_scores(features, torch.from_numpy(np.array(policy, dtype=np.int64)))
        return Members(scores.double().numpy(), self.variance_of)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,); it does not depend on the judgement.

        Raises:
            ValueError: no true reward was given.
        """
        if self.truth is None:
            raise ValueError("truth: this ensemble was made without a true reward; give it one")
        return self.truth(prompts, responses)

    def save(self, folder: str | Path) -> None:
        """Write backbone, tokenizer, heads and settings into a new folder, as safetensors and JSON."""
        with new_folder(Path(folder)) as partial:
            self.model.save_pretrained(partial / _BACKBONE)
            self.tokenizer.save_pretrained(partial / _BACKBONE)
            weights = {name: w.contiguous() for name, w in self.heads.weights.items()}
            save_file(weights, partial / _HEADS)
            record = {"kind": self.heads.kind, "max_length": self.max_length, "variance_of": self.variance_of}
            (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n")


def load_ensemble(folder: str | Path, truth: Truth | None = None) -> EnsembleReward:
    """Load an ensemble that was saved; its rewards are those of the saved one, bit by bit.

    Raises:
        BackboneError: the folder holds something else.
    """
    path = Path(folder)
    missing = [name for name in (_HEADS, _RECORD, _BACKBONE) if not (path / name).exists()]
    if missing:
        raise BackboneError(f"{path}: expected a saved ensemble, without {', '.join(missing)}")
    try:
        record = json.loads((path / _RECORD).read_text())
        kind, max_length, variance_of = (record[one] for one in ("kind", "max_length", "variance_of"))
        weights = load_file(path / _HEADS)
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BackboneError(f"{path}: its heads cannot be read: {error!r}") from error
    if kind not in KINDS:
        raise BackboneError(f"{path / _RECORD}: unknown kind of heads {kind!r}")
    heads = Heads(kind, weights)
    model, tokenizer = load_reward_model(path / _BACKBONE)
    width = next(iter(heads.weights.values())).shape[-1]
    if heads.kind != "mlp" and width != model.config.hidden_size:
        raise BackboneError(f"{path}: heads of width {width} on a backbone of another")
    return EnsembleReward(model, tokenizer, heads, truth, max_length, variance_of)
