r"""The experiment of notebook 03: from pairs to ensembles, each long step kept in the run store.

    reference policies -> responses -> pairs -> reward model -> features -> heads
                                            \-> separate backbones

On real input the pairs come from a file or the hub, and there are no reference policies and no gold.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import Tensor

from vaalign_lib.data.pairs import EMBEDDED, DataError, embedded_pairs, read_pairs
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.references import TEMPERATURE, sample_reference, stack_seed
from vaalign_lib.profiles import HeadTraining, Profile, RewardModel, Study
from vaalign_lib.rewards.backbones import BackboneReward, load_backbones, write_backbones
from vaalign_lib.rewards.base import RewardSource, Truth, VarianceOf
from vaalign_lib.rewards.classifier import (
    TINY,
    load_reward_model,
    reader,
    usable,
    write_features,
    write_reward_model,
)
from vaalign_lib.rewards.ensemble import EnsembleReward, SequenceClassifierReward
from vaalign_lib.rewards.heads import HeadKind, Heads, train_heads
from vaalign_lib.store import RunStore, content_key, content_of

PARTS = ("train", "held_out", "evaluation")
REAL_SHARES = (0.6, 0.1)  # of the pairs of a file: to learn from, for the temperature; the rest is looked at


# --- pairs ------------------------------------------------------------------------------------------


def embedded_data(seed: int, train: int, held_out: int, evaluation: int, reference: Path) -> pd.DataFrame:
    """Draw labelled pairs of the embedded world; the column `part` says what they are for.

    A response comes, with equal chances, from the corpus, from the reference policy at temperature 1, or
    from it at temperature 1.5.
    """
    world = World(seed)
    random = world.rng("pairs")
    parts = np.repeat(PARTS, (train, held_out, evaluation))
    prompts = world.prompts(len(parts), random)
    sides = [_mixed_responses(world, reference, prompts, random) for _ in range(2)]
    tables = []
    for part in PARTS:
        asked, first, second = _where(parts == part, prompts, *sides)
        tables.append(embedded_pairs(world, asked, first, second, random).assign(part=part))
    pairs = pd.concat(tables, ignore_index=True)
    pairs.attrs["left out"] = {"two equal responses": sum(t.attrs["identical"] for t in tables)}
    return pairs


def _mixed_responses(
    world: World, reference: Path, prompts: list[str], random: np.random.Generator
) -> list[str]:
    origin = random.integers(3, size=len(prompts))
    mixed = np.empty(len(prompts), dtype=object)
    for k in range(3):
        rows = np.flatnonzero(origin == k)
        asked = [prompts[row] for row in rows]
        if k == 0:
            mixed[rows] = world.responses(asked, random.beta(2, 2, len(rows)), random)
        else:
            heat = (1.0, TEMPERATURE)[k - 1]
            mixed[rows] = sample_reference(reference, asked, int(random.integers(2**31)), heat)
    return list(mixed)


def _where(chosen: np.ndarray, *lists: list[str]) -> list[list[str]]:
    rows = np.flatnonzero(chosen)
    return [[one[row] for row in rows] for one in lists]


def real_data(
    seed: int,
    pairs: str,
    evaluation: str,
    limits: dict[str, int],
    backbone: str,
    max_length: int,
    hashes: Sequence[Any] = (),
) -> pd.DataFrame:
    """Read pairs from files or the hub.

    Args:
        seed: of the division.
        pairs: to learn from; also to look at, divided by prompt, if `evaluation` is empty.
        evaluation: pairs to look at; what has one of their prompts is not learned from.
        limits: pairs of a part, at most.
        backbone: is to read them; what it cannot tell apart, or not read whole, is left out.
        max_length: tokens of prompt and response together.
        hashes: of the files and folders, for the run store's key.

    Returns:
        The pairs with their `part`; `attrs["left out"]` counts what was not taken, by reason.
    """
    tables = [read_pairs(source) for source in (pairs, evaluation) if source]
    tokenizer, length = reader(backbone, max_length)
    left_out: dict[str, int] = {}
    for k, table in enumerate(tables):
        tables[k], unusable = usable(tokenizer, table, length)
        to = ", to look at" if k else ""
        left_out |= {f"{why}{to}": n for why, n in (table.attrs["left out"] | unusable).items()}
    table, shares = tables[0], REAL_SHARES
    random = np.random.default_rng(seed)
    if evaluation:
        looked_at = tables[1].assign(part="evaluation")
        known = table["prompt"].isin(looked_at["prompt"])
        left_out["prompt is among those looked at"] = int(known.sum())
        table, shares = table[~known], (1 - REAL_SHARES[1], REAL_SHARES[1])
    order = random.permutation(table["prompt"].unique())
    ends = np.round(np.cumsum(shares) * len(order)).astype(int)
    place = pd.Series(np.searchsorted(ends, np.arange(len(order)), side="right"), index=order)
    table = table.assign(part=table["prompt"].map(place).map(dict(enumerate(PARTS))))
    for part, most in limits.items():
        rows = table.index[table["part"] == part]
        surplus = random.permutation(rows)[most:]
        left_out[f"more than {most} to be {part.replace('_', ' ')}"] = len(surplus)
        table = table.drop(surplus)
    if evaluation:
        table = pd.concat([table, looked_at], ignore_index=True)
    if set(table["part"]) != set(PARTS):
        raise DataError(f"{pairs}: too few prompts ({len(order)}) to divide into {', '.join(PARTS)}")
    table = table.reset_index(drop=True)
    table.attrs["left out"] = left_out
    return table


@dataclass(frozen=True)
class RewardStudy:
    """The data of notebook 03 and how to get everything that follows from it."""

    store: RunStore
    profile: Profile
    seed: int
    data: pd.DataFrame
    data_folder: Path
    backbone: str
    _trained: dict[str, tuple[Heads, dict[int, Heads]]] = field(default_factory=dict, repr=False)
    _feature_folders: dict[str, Path] = field(default_factory=dict, repr=False)

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
        """The folder of the reward model of stage 1, the same as long as the study lives."""
        config = {
            "settings": self.settings.model_dump(exclude={"backbone", "pretrained"}),
            "backbone": self.backbone,
            "files": content_of(self.backbone),
            "seed": self.seed,
        }
        return self.store.folder("reward-model", write_reward_model, config, {"pairs": self.data_folder})

    def features(self, part: str) -> dict[str, Tensor]:
        """Return what heads see of a part's pairs: `chosen`, `rejected` (pairs, width), and the stage-1
        scores `chosen_score`, `rejected_score` (pairs,).
        """
        return load_file(self._features(part) / "features.safetensors")

    def _features(self, part: str) -> Path:
        if part in self._feature_folders:
            return self._feature_folders[part]
        config = {"part": part, "max_length": self.settings.max_length}
        inputs = {"model": self.reward_model, "pairs": self.data_folder}
        folder = self.store.folder(f"features-{part}", write_features, config, inputs)
        self._feature_folders[part] = folder
        return folder

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
        """Return trained heads and copies of them on the way, the same for the same arguments.

        See `train_heads`; `keep_first` puts the head of stage 1 in the first place, each `repeat` draws
        weights and samples of its own.
        """
        options: dict[str, Any] = {"kind": kind, "ensembles": ensembles, "pairs_each": pairs_each}
        key = content_key(
            **options, training=settings.model_dump(), first=keep_first, at=[*snapshots], repeat=repeat
        )
        if key not in self._trained:
            features = self.features("train")
            self._trained[key] = train_heads(
                features["chosen"],
                features["rejected"],
                **options,
                settings=settings,
                seed=stack_seed(self.seed, repeat),
                members=self.profile.ensembles.members,
                first_head=features["head"] if keep_first else None,
                snapshots=snapshots,
                description=f"heads, {kind}",
            )
        return self._trained[key]

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
        features, sizes = self.features("train"), self.profile.ensembles
        started = time.perf_counter()
        train_heads(
            features["chosen"],
            features["rejected"],
            kind="paper",
            settings=sizes.paper,
            seed=self.seed,
            members=sizes.members,
        )
        heads = time.perf_counter() - started
        return {"heads": heads, "features": self.store.record(self._features("train"))["seconds"]}

    def training_log(self) -> pd.DataFrame:
        """Return stage 1's log: step, loss, accuracy."""
        return pd.read_parquet(self.reward_model / "log.parquet")


def settings_of(profile: Profile, backbone: str) -> RewardModel:
    """Return the settings of stage 1 for a backbone."""
    settings = profile.reward_model
    if settings.pretrained is None or backbone == settings.backbone:
        return settings
    return settings.model_copy(update=settings.pretrained.model_dump())


def prepare(
    study: Study, *, reference: Path | None, pairs: str = "", evaluation: str = "", backbone: str = ""
) -> RewardStudy:
    """Read or draw the pairs.

    Args:
        study: store, profile and seed.
        reference: a reference policy's folder; embedded data needs one.
        pairs: `embedded`, a .jsonl file or a hub data set; empty means the profile's.
        evaluation: the same; empty with `pairs` given means a part of these.
        backbone: a name or path; empty means the profile's.

    Raises:
        DataError: the pairs cannot be read.
    """
    evaluation = evaluation or ("" if pairs else study.profile.reward_data.evaluation)
    pairs = pairs or study.profile.reward_data.pairs
    sizes = study.profile.reward_data
    backbone = backbone or study.profile.reward_model.backbone
    if pairs != EMBEDDED and backbone == TINY:
        raise DataError(f"pairs: {TINY} knows the embedded world's words only; name a backbone for {pairs}")
    if pairs == EMBEDDED:
        if reference is None:
            raise DataError("pairs: the embedded pairs need a reference policy")
        config: dict[str, Any] = {
            "seed": study.seed,
            "train": sizes.train_pairs,
            "held_out": sizes.held_out_pairs,
            "evaluation": 4 * sizes.evaluation_pairs,
        }
        folder = study.store.folder("pairs", write_embedded_data, config, {"reference": reference})
    else:
        hashes = [content_of(source) for source in (pairs, evaluation, backbone)]
        limits = {"train": sizes.train_pairs, "held_out": sizes.held_out_pairs}
        config = {"seed": study.seed, "pairs": pairs, "evaluation": evaluation, "limits": limits}
        config |= {"hashes": hashes, "backbone": backbone}
        config["max_length"] = settings_of(study.profile, backbone).max_length
        folder = study.store.folder("pairs", write_real_data, config)
    data = pd.read_parquet(folder / "pairs.parquet")
    return RewardStudy(study.store, study.profile, study.seed, data, folder, backbone)


def reward_source(
    study: RewardStudy,
    kind: HeadKind | Literal["backbones"],
    *,
    independent: bool = False,
    variance_of: VarianceOf = "member",
    repeat: int = 0,
) -> RewardSource:
    """Return an ensemble as the source of rewards that policies are trained with.

    Args:
        study: with its reward model.
        kind: of heads, of which `paper` is the paper's recipe; or `backbones`, separate small ones.
        independent: an ensemble for every policy, each with pairs of its own, instead of one for all.
        variance_of: a single member's variance, as in the paper, or that of the mean.
        repeat: number of the whole draw of heads.
    """
    if kind == "backbones":
        if independent or not study.embedded:
            raise ValueError(
                "kind: separate backbones are one ensemble for all policies of the embedded world"
            )
        return BackboneReward(load_backbones(study.backbones_folder), true_reward(study), variance_of)
    sizes = study.profile.ensembles
    training = sizes.paper if kind == "paper" else sizes.trained
    if independent:
        grid: dict[str, Any] = {"ensembles": sizes.independent, "pairs_each": sizes.independent_pairs}
        heads, _ = study.heads(kind, training, repeat=repeat, **grid)
    else:
        heads, _ = study.heads(kind, training, keep_first=kind == "paper", repeat=repeat)
    model, tokenizer = load_reward_model(study.reward_model)
    return EnsembleReward(model, tokenizer, heads, true_reward(study), study.settings.max_length, variance_of)


def true_reward(study: RewardStudy) -> Truth:
    """Return the true reward that the profile names: the world's gold, or a sequence classifier."""
    name = study.profile.true_reward
    return World(study.seed).gold if name == "gold" else SequenceClassifierReward.load(name)


# --- what is kept in the store ----------------------------------------------------------------------


def write_embedded_data(folder: Path, **arguments: Any) -> None:
    """Write the pairs of `embedded_data`."""
    _write_pairs(folder, embedded_data(**arguments))


def write_real_data(folder: Path, **arguments: Any) -> None:
    """Write the pairs of `real_data`."""
    _write_pairs(folder, real_data(**arguments))


def _write_pairs(folder: Path, pairs: pd.DataFrame) -> None:
    left_out = pairs.attrs.pop("left out")
    pairs.attrs.clear()
    pairs.to_parquet(folder / "pairs.parquet")
    (folder / "left_out.json").write_text(json.dumps(left_out) + "\n")
