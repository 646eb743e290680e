"""The policies of notebook 07: stacks whose policies differ by the rule that their reward is made by.

What is published with the same settings is taken; else four stacks of tiny GPT-2 are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.policies import prompt_sets
from vaalign_lib.experiments.references import reference
from vaalign_lib.experiments.robust import ARCHITECTURE, LAMBDAS, gaussian_heads, key_of, reward_study
from vaalign_lib.jobs import device, run_jobs
from vaalign_lib.policies.reference_pairs import sample_reference
from vaalign_lib.profiles import Study
from vaalign_lib.rewards.base import Array, RewardSource
from vaalign_lib.rewards.classifier import load_reward_model, read
from vaalign_lib.rewards.robust import (
    PARTS,
    Brme,
    Mixture,
    Stochastic,
    nominal,
    order_mean,
    parts_of,
    units_of,
    weights_of,
)
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.statistics.tests import Estimate, mean
from vaalign_lib.store import RESULTS
from vaalign_lib.theory.robust import Rule
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.run import policy_trainer, write_stack

TABLE = "robust_policies"
RULES: tuple[Rule, ...] = (*LAMBDAS, "mean", "max")
KINDS = {"zero": (0.0, 0), "one": (1.0, 0), "random": (0.0, 1), "lowest of 5 random": (0.0, 5)}  # and draws
COEFFICIENTS = (0.0, 0.2)  # of the KL penalty in the stochastic case
FUSIONS: dict[str, tuple[Rule, bool]] = {  # of the parts of raw and of normalized sources
    "raw, 0.6": (0.6, False),
    "raw, mean": ("mean", False),
    "normalized, 0.6": (0.6, True),
    "normalized, lowest": (0.0, True),
    "normalized, mean": ("mean", True),
    "most accurate": (1.0, True),
}
SCALES = (10.0, 100.0, 20.0)  # upper ends of three judges'
REFERENCE_TEXTS = 1024  # responses of the reference policy that rewards are standardized over
SHORT = 4  # long training is so many times as long
HORIZON = 320  # responses, of the control of the KL: at most a hundredth a step
CODE = (
    "vaalign_lib.training.run",
    "vaalign_lib.rewards.robust",
    "vaalign_lib.rewards.simulated_judge",
    "vaalign_lib.policies.reference_pairs",  # writes what rewards are standardized over
)


@dataclass(frozen=True)
class Setup:
    """What the stacks share."""

    study: Study

    @cached_property
    def rewards(self) -> Any:
        """The reward models' study."""
        return reward_study(self.study)

    @cached_property
    def texts(self) -> tuple[list[str], list[str]]:
        """Prompts, and responses of the reference policy to them."""
        count = min(REFERENCE_TEXTS, 4 * self.study.profile.policies.warm_up)
        asked = World(self.study.seed).prompts(count, World(self.study.seed).rng("reference texts"))
        return asked, sample_reference(reference(self.study, ARCHITECTURE), asked, self.study.seed)

    @cached_property
    def brme(self) -> Brme:
        """As many ensembles of Gaussian heads as there are policies of a rule, each head standardized."""
        heads = gaussian_heads(self.rewards, self.study.profile.robust.ensembles, repeat=1)
        model, tokenizer = load_reward_model(self.rewards.reward_model)
        length = self.rewards.settings.max_length
        features, _ = read(model, tokenizer, *self.texts, length)
        return Brme(model, tokenizer, heads, length, units_of(heads(features)[0].double().numpy()))

    def mixture(self) -> Mixture:
        """Return the source of `RULES`, all parts of an ensemble standardized each."""

        def parts(prompts: Sequence[str], responses: Sequence[str], ensemble: NDArray[np.int64]) -> Array:
            return parts_of(self.brme(prompts, responses, ensemble))

        count = self.study.profile.robust.ensembles
        size = len(self.texts[0])
        units = np.stack([units_of(parts(*self.texts, np.full(size, one))) for one in range(count)])
        weights = np.array([weights_of(rule) for rule in RULES])
        return Mixture(parts, units, weights, World(self.study.seed).gold)

    @cached_property
    def sources(self) -> "Sources":
        """The sources of Appendix F's fusion."""
        return Sources(self)

    def fusion(self) -> Mixture:
        """Return the source of `FUSIONS`: the parts of raw sources, then those of normalized ones."""
        found = self.sources
        units = units_of(found.scores(*self.texts).T)  # (M, 2)
        best = int(np.argmax(found.accuracies()))

        def parts(prompts: Sequence[str], responses: Sequence[str], ensemble: NDArray[np.int64]) -> Array:
            raw = found.scores(prompts, responses)
            scaled = (raw - units[:, 0]) / units[:, 1]
            return np.concatenate([parts_of((one[:, best], one)) for one in (raw, scaled)])

        rows = []
        for rule, scaled in FUSIONS.values():
            own, none = weights_of(rule), [0.0] * len(PARTS)
            rows.append(none + own if scaled else own + none)
        where = np.zeros(len(self.texts[0]), dtype=np.int64)
        return Mixture(
            parts, units_of(parts(*self.texts, where))[None], np.array(rows), World(self.study.seed).gold
        )


@dataclass(frozen=True)
class Sources:
    """Five sources of reward of different kinds and scales (Appendix F): the reward model of stage 1, an
    ensemble of Gaussian heads that it taught, and three judges on other scales.
    """

    setup: Setup

    @property
    def names(self) -> list[str]:
        """Their names."""
        return ["stage 1", "BRME, nominal", *(f"judge, 1 to {top:.0f}" for top in SCALES)]

    def scores(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return their rewards, as they are (R, 5)."""
        brme = self.setup.brme
        features, stage_1 = read(brme.model, brme.tokenizer, prompts, responses, brme.max_length)
        heads = nominal(*brme.heads.of(features, np.zeros(len(prompts), dtype=np.int64)))
        judged = [
            one.judge(prompts, responses, np.zeros(0, dtype=np.int64)).midpoint() for one in self._judges
        ]
        return np.stack([stage_1.double().numpy(), heads, *judged], 1)

    @cached_property
    def _judges(self) -> list[Any]:
        world = World(self.setup.study.seed)
        names = list(stand_ins(world))
        return [stand_ins(world, top)[name] for name, top in zip(names, SCALES, strict=True)]

    def accuracies(self) -> Array:
        """Return how often each ranks held-out pairs as labelled (5,)."""
        pairs = self.setup.rewards.part("held_out")
        first, second = (
            self.scores(pairs["prompt"].tolist(), pairs[s].tolist()) for s in ("chosen", "rejected")
        )
        return np.asarray((first > second).mean(0))

    def table(self) -> pd.DataFrame:
        """Return Table 8 of these sources, over responses of the reference policy and held-out pairs."""
        scores = self.scores(*self.setup.texts)
        moments = {"max": scores.max(0), "min": scores.min(0), "mean": scores.mean(0), "std": scores.std(0)}
        return pd.DataFrame({"source": self.names, **moments, "acc": self.accuracies()})


# --- stacks ---------------------------------------------------------------------------------------------


def _train(
    folder: Path, scratch: Path, setup: Setup, source: RewardSource, method: Method, count: int, steps: int,
    looks: Sequence[int], target: float = 0.0, values: Sequence[float] | None = None,
) -> None:  # fmt: skip
    """Train and evaluate one stack; with a `target` each policy's coefficient holds its KL there, with
    `values` each policy's critic starts from one number.
    """
    profile, seed = setup.study.profile, setup.study.seed
    asked = prompt_sets(profile, seed)
    task = Task(asked.training, source, asked.gold, population=count)
    changes: dict[str, Any] = {"iterations": steps}
    if target:
        changes["adaptive_kl"] = {"target": target, "horizon": float(HORIZON)}
    start = reference(setup.study, ARCHITECTURE)
    options: dict[str, Any] = {"policies": range(count), "seed": seed, "device": device(), **changes}
    trainer = policy_trainer(profile, ARCHITECTURE, start, task, method, **options)
    if values is not None:
        with torch.no_grad():
            trainer.critic.weight.zero_()
            trainer.critic.bias.copy_(torch.tensor(values)[:, None])
    evaluator = Evaluator(
        trainer.reference,
        trainer.tokenizer,
        Task(asked.evaluation, source, asked.gold),
        trainer.sampling,
        profile.policies.evaluation.samples,
        seed,
        device(),
    )
    write_stack(folder, scratch, trainer, evaluator, [one for one in looks if one < steps])


def stack(study: Study, name: str, target: float = 0.0) -> Path:
    """Return the folder of one of the stacks, trained now or before: `one coefficient`, `equal KL` (with a
    target), `stochastic` with either critic, `fusion`.
    """
    sizes, setup = study.profile.robust, Setup(study)
    short = max(1, sizes.steps // SHORT)
    plain = Method("vanilla", standardized=False)

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        if name in ("one coefficient", "equal KL"):
            looks = [short, 2 * short]
            count = len(RULES) * sizes.ensembles
            _train(folder, scratch, setup, setup.mixture(), plain, count, sizes.steps, looks, target=target)
        elif name == "fusion":
            count = len(FUSIONS) * sizes.repeats
            _train(folder, scratch, setup, setup.fusion(), plain, count, short, [])
        else:
            _stochastic(folder, scratch, setup, short, "exact" in name)

    config = {"name": name, "target": target, "settings": key_of(study), "seed": study.seed}
    inputs = {"reference": reference(study, ARCHITECTURE), "model": setup.rewards.reward_model}
    return study.store.resumable(f"robust-{name.replace(' ', '-')}", write, config, inputs, CODE)


def _stochastic(folder: Path, scratch: Path, setup: Setup, steps: int, exact: bool) -> None:
    """Train the stochastic case, with critics that start from the expected reward, or from 0."""
    kinds, each = len(KINDS), setup.study.profile.robust.repeats
    constants, draws = zip(*KINDS.values(), strict=True)
    source = Stochastic(constants, draws, World(setup.study.seed).gold)
    betas = np.tile(np.repeat(COEFFICIENTS, kinds), each).tolist()
    method = Method("vanilla", beta=betas, standardized=False)
    looks = [max(1, steps // k) for k in (8, 4, 2)]
    means = [one + (order_mean(many) if many else 0.0) for one, many in KINDS.values()]
    values = (np.tile(means, len(betas) // kinds) * exact).tolist()
    _train(folder, scratch, setup, source, method, len(betas), steps, looks, values=values)


def _rows(folder: Path, name: str) -> pd.DataFrame:
    """Return a row for each policy and step of a stack, with its rule, group and number within that."""
    table, log = (pd.read_parquet(folder / f"{one}.parquet") for one in ("policies", "log"))
    table = table.assign(step=log["step"].max())
    if (folder / "looks.parquet").is_file():
        table = pd.concat([pd.read_parquet(folder / "looks.parquet"), table], ignore_index=True)
    beta = log.set_index(["policy", "step"])["coefficient"]
    rules = list(FUSIONS) if name == "fusion" else list(map(str, RULES))
    if name.startswith("stochastic"):
        rules = [f"{kind}, beta {one:g}" for one in COEFFICIENTS for kind in KINDS]
    kept = table[["policy", "step", "gold", "gold_error", "kl", "length"]].assign(stack=name)
    kept["step_length"] = table.get("step_length", np.nan)
    kept["beta"] = [beta[policy, step] for policy, step in zip(kept["policy"], kept["step"], strict=True)]
    kept["rule"] = [rules[policy % len(rules)] for policy in kept["policy"]]
    return kept.assign(repeat=kept["policy"] // len(rules))


def _target(folder: Path) -> float:
    """Return the mean log ratio of the nominal policies over the last tenth of their steps."""
    log = pd.read_parquet(folder / "log.parquet")
    mine = log[(log["policy"] % len(RULES)) == RULES.index(1.0)]
    return float(mine.loc[mine["step"] > 0.9 * mine["step"].max(), "divergence"].mean())


def start_of(study: Study) -> float:
    """Return the gold reward of the policy that all start from, on the same prompts."""
    asked = prompt_sets(study.profile, study.seed)
    start, gold = reference(study, ARCHITECTURE), World(study.seed).gold
    return float(
        np.mean([gold(asked.evaluation, sample_reference(start, asked.evaluation, k)) for k in range(16)])
    )


def policies(study: Study, workers: int | str, train: bool = False) -> pd.DataFrame:
    """Return all policies of notebook 07, a row for each and step: those that are published with these
    settings, unless they are to be trained anew, or else trained.
    """
    published, key = RESULTS / f"{TABLE}.parquet", key_of(study)
    if not train and published.is_file():
        table = pd.read_parquet(published)
        if set(table["settings"]) == {key}:
            return table
    _ = Setup(study).rewards.reward_model  # before workers ask for it at once
    names = ("one coefficient", "stochastic, exact critic", "stochastic, learned critic", "fusion")
    steps, shared = study.profile.robust.steps, study.store.root
    jobs = {name: partial(stack, study, name) for name in names}
    folders = run_jobs(jobs, workers, steps + 3 * max(1, steps // SHORT), "stacks of policies", shared)
    target = max(_target(folders["one coefficient"]), 1e-3)
    matched = {"equal KL": partial(stack, study, "equal KL", target)}
    folders |= run_jobs(matched, workers, steps, "stack at equal KL", shared)
    tables = [_rows(folder, name) for name, folder in folders.items()]
    return pd.concat(tables, ignore_index=True).assign(settings=key, start=start_of(study))


# --- contrasts ------------------------------------------------------------------------------------------


def at_step(table: pd.DataFrame, stack: str, part: float = 1.0) -> pd.DataFrame:
    """Return a stack's policies after a part of its steps."""
    mine = table[table["stack"] == stack]
    return mine[mine["step"] == max(1, round(part * mine["step"].max()))]


def contrast(table: pd.DataFrame, first: str, second: str, column: str = "gold") -> Estimate:
    """Return the mean over ensembles of one rule's outcome minus another's, in policies of one step."""
    wide = table.pivot(index="repeat", columns="rule", values=column)
    return mean(wide[first] - wide[second])
