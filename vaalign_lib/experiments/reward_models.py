"""The experiment of notebook 03: from pairs to ensembles, each long step kept in the run store.

Pairs come from reference policies of the embedded world, or from a file or the hub, without gold rewards.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from vaalign_lib.data.pairs import EMBEDDED, DataError
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.references import stack_seed
from vaalign_lib.policies.reference_pairs import write_embedded_pairs
from vaalign_lib.profiles import HeadTraining, Profile, RewardModel, Study
from vaalign_lib.rewards.backbones import BackboneReward, load_backbones, write_backbones
from vaalign_lib.rewards.base import RewardSource, Truth, VarianceOf
from vaalign_lib.rewards.classifier import TINY, load_reward_model, read, write_features, write_reward_model
from vaalign_lib.rewards.ensemble import EnsembleReward, SequenceClassifierReward
from vaalign_lib.rewards.heads import HeadKind, Heads, train_heads
from vaalign_lib.rewards.pairs import write_real_pairs
from vaalign_lib.store import content_key, content_of


@dataclass(frozen=True)
class RewardStudy(Study):
    """The data of notebook 03 and all that follows; folders and heads stay the same as long as it lives."""

    data: pd.DataFrame = field(kw_only=True)
    data_folder: Path = field(kw_only=True)
    backbone: str = field(kw_only=True)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def embedded(self) -> bool:
        """Whether the true reward is known."""
        return "gold_chosen" in self.data

    @property
    def left_out(self) -> dict[str, int]:
        """How many pairs were not taken, by reason."""
        counts: dict[str, int] = json.loads((self.data_folder / "left_out.json").read_text())
        return {reason: count for reason, count in counts.items() if count}

    def part(self, name: str) -> pd.DataFrame:
        """Return the pairs of one part."""
        return self.data[self.data["part"] == name].reset_index(drop=True)

    @property
    def settings(self) -> RewardModel:
        """The settings of stage 1; a pretrained backbone in a profile of tiny ones has its own."""
        return settings_of(self.profile, self.backbone)

    @cached_property
    def reward_model(self) -> Path:
        """The folder of the reward model of stage 1."""
        config = {
            "settings": self.settings.model_dump(exclude={"backbone", "pretrained"}),
            "backbone": self.backbone,
            "files": content_of(self.backbone),
            "seed": self.seed,
        }
        return self.store.folder("reward-model", write_reward_model, config, {"pairs": self.data_folder})

    def training_log(self) -> pd.DataFrame:
        """Return stage 1's log: step, loss, accuracy."""
        return pd.read_parquet(self.reward_model / "log.parquet")

    def features(self, part: str) -> dict[str, Tensor]:
        """Return what heads see of a part's pairs, `chosen` and `rejected` (pairs, width), and the scores
        of stage 1, `chosen_score` and `rejected_score` (pairs,).
        """
        return load_file(self._features(part) / "features.safetensors")

    def _features(self, part: str) -> Path:
        if part not in self._kept:
            config = {"part": part, "max_length": self.settings.max_length}
            inputs = {"model": self.reward_model, "pairs": self.data_folder}
            self._kept[part] = self.store.folder(f"features-{part}", write_features, config, inputs)
        return Path(self._kept[part])

    def read(
        self, prompts: Sequence[str], responses: Sequence[str], description: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Return what heads see of other texts (responses, width), and stage 1's scores (responses,)."""
        model = load_reward_model(self.reward_model)
        return read(*model, prompts, responses, self.settings.max_length, description)

    def heads(
        self,
        kind: HeadKind,
        settings: HeadTraining,
        *,
        ensembles: int = 1,
        pairs_each: int | None = None,
        snapshots: Sequence[int] = (),
        keep_first: bool = False,
        repeat: int = 0,
    ) -> tuple[Heads, dict[int, Heads]]:
        """Return heads and copies of them, as `train_heads` does, the same ones for the same arguments.

        `keep_first` puts the head of stage 1 in the first place, each `repeat` is a draw of its own.
        """
        options: dict[str, Any] = {"kind": kind, "ensembles": ensembles, "pairs_each": pairs_each}
        key = content_key(
            **options, training=settings.model_dump(), first=keep_first, at=[*snapshots], repeat=repeat
        )
        if key not in self._kept:
            features, members = self.features("train"), self.profile.ensembles.members
            options |= {"seed": stack_seed(self.seed, repeat), "members": members, "snapshots": snapshots}
            options |= {"settings": settings, "first_head": features["head"] if keep_first else None}
            options["description"] = f"heads, {kind}"
            self._kept[key] = train_heads(features["chosen"], features["rejected"], **options)
        heads: tuple[Heads, dict[int, Heads]] = self._kept[key]
        return heads

    def backbones(self, part: str) -> dict[str, Tensor]:
        """Return the scores of separate backbones: `chosen`, `rejected` (pairs, members)."""
        return load_file(self.backbones_folder / f"{part}.safetensors")

    @cached_property
    def backbones_folder(self) -> Path:
        """The folder of an ensemble of separately trained small backbones."""
        sizes = self.profile.ensembles
        config = {
            "settings": sizes.backbones.model_dump(),
            "width": sizes.backbone_width,
            "members": sizes.members,
            "pairs_each": sizes.backbone_pairs,
            "seed": self.seed,
        }
        return self.store.folder("backbones", write_backbones, config, {"pairs": self.data_folder})

    def resources(self) -> dict[str, float]:
        """Return the seconds that running the frozen backbone and training ten heads take."""
        features = self._features("train")
        started = time.perf_counter()
        replace(self, _kept={"train": features}).heads("paper", self.profile.ensembles.paper)
        seconds = time.perf_counter() - started
        return {"heads": seconds, "features": self.store.record(features)["seconds"]}


def settings_of(profile: Profile, backbone: str) -> RewardModel:
    """Return the settings of stage 1 for a backbone."""
    settings = profile.reward_model
    if settings.pretrained is None or backbone == settings.backbone:
        return settings
    return settings.model_copy(update=settings.pretrained.model_dump())


def prepare(
    study: Study, *, reference: Path | None, pairs: str = "", evaluation: str = "", backbone: str = ""
) -> RewardStudy:
    """Read the pairs of a file or a hub data set, or draw `embedded` ones, which need a reference policy's
    folder. What is empty is the profile's; without `evaluation`, `pairs` that are given are divided.
    """
    sizes = study.profile.reward_data
    evaluation = evaluation or ("" if pairs else sizes.evaluation)
    pairs = pairs or sizes.pairs
    backbone = backbone or study.profile.reward_model.backbone
    if pairs == EMBEDDED:
        if reference is None:
            raise DataError("pairs: the embedded pairs need a reference policy")
        config: dict[str, Any] = {
            "seed": study.seed,
            "train": sizes.train_pairs,
            "held_out": sizes.held_out_pairs,
            "evaluation": 4 * sizes.evaluation_pairs,
        }
        folder = study.store.folder("pairs", write_embedded_pairs, config, {"reference": reference})
    elif backbone == TINY:
        raise DataError(f"pairs: {TINY} knows the embedded world's words only; name a backbone for {pairs}")
    else:
        config = {
            "seed": study.seed,
            "pairs": pairs,
            "evaluation": evaluation,
            "limits": {"train": sizes.train_pairs, "held_out": sizes.held_out_pairs},
            "hashes": [content_of(source) for source in (pairs, evaluation, backbone)],
            "backbone": backbone,
            "max_length": settings_of(study.profile, backbone).max_length,
        }
        folder = study.store.folder("pairs", write_real_pairs, config)
    pairs_of: Any = {"data": pd.read_parquet(folder / "pairs.parquet"), "data_folder": folder}
    return RewardStudy(study.store, study.profile, study.seed, **pairs_of, backbone=backbone)


def reward_source(
    study: RewardStudy,
    kind: HeadKind | Literal["backbones"],
    *,
    independent: bool = False,
    variance_of: VarianceOf = "member",
    repeat: int = 0,
) -> RewardSource:
    """Return an ensemble as the source of rewards that policies are trained with: heads of a kind, or
    separate small `backbones`; `independent` is one for every policy, with pairs of its own.
    """
    shared: dict[str, Any] = {"truth": true_reward(study), "variance_of": variance_of}
    if kind == "backbones":
        if independent or not study.embedded:
            raise ValueError("kind: backbones are one ensemble for all policies of the embedded world")
        return BackboneReward(load_backbones(study.backbones_folder), **shared)
    sizes = study.profile.ensembles
    grid = {"ensembles": sizes.independent, "pairs_each": sizes.independent_pairs}
    options: dict[str, Any] = grid if independent else {"keep_first": kind == "paper"}
    training = sizes.paper if kind == "paper" else sizes.trained
    heads, _ = study.heads(kind, training, repeat=repeat, **options)
    return EnsembleReward(*load_reward_model(study.reward_model), heads, study.settings.max_length, **shared)


def true_reward(study: Study) -> Truth:
    """Return the true reward that the profile names: the world's gold, or a sequence classifier."""
    name = study.profile.true_reward
    return World(study.seed).gold if name == "gold" else SequenceClassifierReward.load(name)
