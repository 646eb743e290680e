"""Ensembles as sources of rewards: heads on one frozen backbone, or whole sequence classifiers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.rewards.base import Array, Judgement, PolicyIndex, ScoreSource, Truth
from vaalign_lib.rewards.classifier import BackboneError, load_reward_model, read
from vaalign_lib.rewards.heads import KINDS, Heads
from vaalign_lib.store import spared_folder

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
        return read(self.model, self.tokenizer, prompts, responses, self.max_length)[1].double().numpy()


@dataclass(frozen=True)
class ClassifierEnsemble(ScoreSource):
    """Rewards by at least two whole classifiers, shared by all policies; without a truth their mean is it."""

    classifiers: tuple[SequenceClassifierReward, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.classifiers) < 2:
            raise ValueError(f"classifiers: expected at least two, got {len(self.classifiers)}")

    @classmethod
    def load(
        cls, names: Sequence[str | Path], truth: Truth | None = None, max_length: int = 4096
    ) -> "ClassifierEnsemble":
        """Load classifiers with one trained output each, by name or path."""
        if isinstance(names, str | Path):
            raise ValueError(f"names: expected a list of at least two, got one, {names}")
        return cls(tuple(SequenceClassifierReward.load(one, max_length) for one in names), truth=truth)

    def scores(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Array:
        """Score responses by every classifier (responses, classifiers)."""
        return np.stack([one(prompts, responses) for one in self.classifiers], axis=1)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,)."""
        if self.truth is None:
            return judgement.sample(np.zeros(len(responses)))
        return self.truth(prompts, responses)


@dataclass(frozen=True)
class EnsembleReward(ScoreSource):
    """Rewards by a grid of heads (ensembles, members) on one frozen backbone, with the head of stage 1.

    With one ensemble all policies share it. With several, policy j is judged by ensemble j. Prompt and
    response together have at most `max_length` tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    max_length: int = 4096

    def scores(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Array:
        """Score responses by the ensemble of the policy that wrote each (responses, members)."""
        known = self.heads.ensembles
        if known > 1 and len(policy) and not 0 <= policy.min() <= policy.max() < known:
            raise IndexError(f"policy: expected indices from 0 to {known - 1}, got {policy.max()}")
        features, _ = read(self.model, self.tokenizer, prompts, responses, self.max_length)
        own = torch.from_numpy(np.array(policy, dtype=np.int64))
        return self.heads.own_scores(features, own).double().numpy()

    def save(self, folder: str | Path) -> None:
        """Write backbone, tokenizer, heads and settings into a new folder, as safetensors and JSON."""
        with spared_folder(Path(folder)) as partial:
            self.model.save_pretrained(partial / _BACKBONE)
            self.tokenizer.save_pretrained(partial / _BACKBONE)
            save_file({name: w.contiguous() for name, w in self.heads.weights.items()}, partial / _HEADS)
            record = {"kind": self.heads.kind, "max_length": self.max_length, "variance_of": self.variance_of}
            (partial / _RECORD).write_text(json.dumps(record, indent=1) + "\n")


def load_ensemble(folder: str | Path, truth: Truth | None = None) -> EnsembleReward:
    """Load an ensemble that was saved; its rewards are those of the saved one, bit by bit."""
    path = Path(folder)
    missing = [name for name in (_HEADS, _RECORD, _BACKBONE) if not (path / name).exists()]
    if missing:
        raise BackboneError(f"{path}: expected a saved ensemble, without {', '.join(missing)}")
    try:
        record = json.loads((path / _RECORD).read_text())
        kind, max_length, variance_of = (record[one] for one in ("kind", "max_length", "variance_of"))
        heads = Heads(kind, load_file(path / _HEADS))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise BackboneError(f"{path}: its heads cannot be read: {error!r}") from error
    if kind not in KINDS:
        raise BackboneError(f"{path / _RECORD}: unknown kind of heads {kind!r}")
    model, tokenizer = load_reward_model(path / _BACKBONE)
    width = next(iter(heads.weights.values())).shape[-1]
    if heads.kind != "mlp" and width != model.config.hidden_size:
        raise BackboneError(f"{path}: heads of width {width} on a backbone of another")
    return EnsembleReward(model, tokenizer, heads, max_length, truth=truth, variance_of=variance_of)
