"""The experiment of notebook 04: which policies are trained, on what, and how they are compared.

A run is one stack of policies: an architecture and a source of rewards (a row of the paper's tables), a
method, and the conditions under which it is compared with the other method: the protocol (do policies
share their source?) and the penalty regime.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.checkpoints import Checkpoints
from vaalign_lib.conversation import load_tokenizer
from vaalign_lib.data import EMBEDDED, prompts_of
from vaalign_lib.evaluation import Evaluator
from vaalign_lib.memory import available_bytes, beside_bytes, fitting, sizes_of, stack_bytes
from vaalign_lib.pilots import Grid, match_kl
from vaalign_lib.policies.frozen import ReferencePolicy
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.ppo import Method, Task, Trainer
from vaalign_lib.profiles import Profile, RunGroup, Sampling, load_profile, local_files
from vaalign_lib.reward_study import Study as RewardStudy
from vaalign_lib.reward_study import prepare, reference, reward_source, stack_seed, true_reward
from vaalign_lib.rewards.base import RewardSource, Truth
from vaalign_lib.rewards.ensemble import EnsembleReward, load_ensemble
from vaalign_lib.rewards.heads import Kind
from vaalign_lib.rewards.prompted import PromptedJudge
from vaalign_lib.rewards.records import JudgementStore
from vaalign_lib.rewards.simulated import PersistentJudges, stand_ins
from vaalign_lib.runs import (
    DamagedError,
    NotKeptError,
    PlanError,
    RunStore,
    content_key,
    package_versions,
    read_once,
    sealed,
    source_hashes,
    unsealed,
    write_atomically,
)
from vaalign_lib.study import policy_trainer
from vaalign_lib.synthetic.world import Disagreement, World
from vaalign_lib.workers import device, report, run_jobs, together

Protocol = Literal["shared", "independent"]
Regime = Literal["equal_mean_penalty", "matched_kl", "as_printed"]
METHODS = ("vanilla", "variance_aware")
JUDGES = {
    "judge-a": "stand-in for Gemini 1.5 Flash",
    "judge-b": "stand-in for Gemini 2.0 Flash",
    "judge-c": "stand-in for DeepSeek V3",
}
ENSEMBLE_ROW, JUDGE_ROW = (
    ("gpt2", "ensemble"),
    ("qwen2", "judge-b"),
)  # the second is that of Figure 7
ROWS = (ENSEMBLE_ROW, *product(("mistral", "qwen2"), JUDGES))
RANGES = (100, 50, 20, 10)  # R of Table 4
PRINTED_WIDTHS = dict(zip(RANGES, (17, 5.6, 0.92, 0.11), strict=True))  # its second column
CHECKPOINT_SECONDS = 30.0  # of work that is lost at most when a run is killed, while
CHECKPOINT_SHARE = 0.1  # of the time at most goes into writing checkpoints
JUDGEMENTS = "judgements.sqlite"  # in the run folder: what prompted judges said
REFERENCE = "reference"  # in place of a method: the policy that all start from, evaluated as often


@dataclass(frozen=True)
class Run:
    """One stack of policies.

    Attributes:
        architecture: of the policies.
        source: of their rewards: `ensemble` or one of `JUDGES`.
        objective: the method, or `reference` for evaluations of the policy they start from.
        protocol: `shared`: one source for all; `independent`: policy j has its own.
        regime: of the penalty; see `vaalign_lib.ppo.Method` and ../README.md.
        repeat: number of the whole stack; others draw other numbers, and other sources of their own.
        highest: R, the upper end of a judge's scale.
        widths: whether a judge's intervals are rescaled with R, or vary as much as Table 4 prints.
        disagreement: of the world's annotators; the last two are controls.
    """

    architecture: str
    source: str
    objective: str = "vanilla"
    protocol: Protocol = "shared"
    regime: Regime = "equal_mean_penalty"
    repeat: int = 0
    highest: int = 100
    widths: Literal["rescaled", "printed"] = "rescaled"
    disagreement: Disagreement = "none"

    @property
    def row(self) -> str:
        """The row of Tables 1 to 3."""
        return f"{self.architecture}-{self.source}"

    @property
    def name(self) -> str:
        """What a folder of the run store is called; conditions of the default go without saying."""
        plain = Run(self.architecture, self.source)
        further = [
            str(value)
            for key, value in asdict(self).items()
            if value != getattr(plain, key) and key not in ("objective", "repeat", "highest")
        ]
        if self.highest != plain.highest:
            further.append(f"to-{self.highest}")
        if self.repeat:
            further.append(f"repeat-{self.repeat}")
        return "-".join([self.row, self.objective, *further]).replace("_", "-")

    @property
    def matched(self) -> bool:
        """Whether its coefficient is to be found."""
        return self.regime == "matched_kl" and self.objective != "vanilla"

    @property
    def pilot(self) -> "Run":
        """Of what kind the pilot is that its coefficient is looked for in."""
        return Run(self.architecture, self.source, "variance_aware", disagreement=self.disagreement)

    @property
    def vanilla(self) -> "Run":
        """The stack that this one is compared with; matching changes only the variance-aware one."""
        same = replace(self, objective="vanilla")
        return replace(same, regime="equal_mean_penalty") if self.regime == "matched_kl" else same

    @property
    def start(self) -> "Run":
        """The evaluations of the policy that it starts from, by the same true reward."""
        same = replace(self.vanilla, objective=REFERENCE)
        return replace(same, protocol="shared", repeat=0)


PRIMARY = tuple(
    Run(*JUDGE_ROW, "variance_aware", protocol="independent", regime="matched_kl", repeat=repeat)
    for repeat in (0, 1)
)


# --- which runs there are -----------------------------------------------------------------------------


def _pair(run: Run) -> list[Run]:
    return [run.vanilla, replace(run, objective="variance_aware")]


def _rows() -> list[Run]:
    return [run for row in ROWS for run in _pair(Run(*row))]


def _printed_rows() -> list[Run]:
    return [run for row in ROWS for run in _pair(Run(*row, regime="as_printed"))]


def _matched() -> list[Run]:
    return [
        run for row in (ENSEMBLE_ROW, JUDGE_ROW) for run in _pair(Run(*row, regime="matched_kl"))
    ]


def _independent(repeat: int = 0) -> list[Run]:
    regimes: tuple[Regime, ...] = ("equal_mean_penalty", "matched_kl")
    return [
        run
        for row in (JUDGE_ROW, ENSEMBLE_ROW)
        for regime in regimes
        for run in _pair(Run(*row, protocol="independent", regime=regime, repeat=repeat))
    ]


def _primary() -> list[Run]:
    return [one for run in PRIMARY for one in _pair(run)]


def _ranges() -> list[Run]:
    return [
        run for top in RANGES for run in _pair(Run(*JUDGE_ROW, regime="as_printed", highest=top))
    ]


def _printed_widths() -> list[Run]:
    regimes: tuple[Regime, ...] = ("equal_mean_penalty", "as_printed")
    return [
        run
        for regime in regimes
        for top in RANGES[1:]  # at 100 they are those of the default
        for run in _pair(Run(*JUDGE_ROW, regime=regime, highest=top, widths="printed"))
    ]


def _controls() -> list[Run]:
    settings: tuple[Disagreement, ...] = ("poor", "good")
    protocols: tuple[Protocol, ...] = ("independent", "shared")
    return [
        run
        for protocol in protocols
        for where in settings
        for run in _pair(
            Run(*JUDGE_ROW, protocol=protocol, regime="matched_kl", disagreement=where)
        )
    ]


def _every_row() -> list[Run]:
    regimes: tuple[Regime, ...] = ("matched_kl", "as_printed", "equal_mean_penalty")
    protocols: tuple[Protocol, ...] = ("independent", "shared")
    return [
        run
        for protocol in protocols
        for regime in regimes
        for row in ROWS
        for run in _pair(Run(*row, protocol=protocol, regime=regime))
    ]


GROUPS: dict[RunGroup, Callable[[], list[Run]]] = {
    "rows": _rows,
    "printed_rows": _printed_rows,
    "matched_kl": _matched,
    "independent": _independent,
    "ranges": _ranges,
    "primary": _primary,
    "second_seeds": partial(_independent, 1),
    "controls": _controls,
    "printed_widths": _printed_widths,
    "every_row": _every_row,
}


def plan(groups: Sequence[RunGroup]) -> list[Run]:
    """Return the runs of groups, each once, with the evaluations of what they start from."""
    runs = [run for name in groups for run in GROUPS[name]()]
    return list(dict.fromkeys([*runs, *(run.start for run in runs)]))


# --- sources of reward ----------------------------------------------------------------------------------


def stretch_of(run: Run) -> float:
    """Return by how much intervals vary more, relative to the scale, than those up to 100 do.

    Table 4's second column is the variance of the intervals' standard deviations. Were intervals only
    rescaled, it would be proportional to (R - 1)^2.
    """
    if run.widths == "rescaled":
        return 1.0
    relative = {top: np.sqrt(printed) / (top - 1) for top, printed in PRINTED_WIDTHS.items()}
    return float(relative[run.highest] / relative[100])


@dataclass(frozen=True)
class Questions:
    """What policies are asked, and what is known of the answers.

    Attributes:
        training: prompts that training draws from.
        evaluation: prompts that returns are means over.
        gold: the reward behind all others; None where nobody knows it.
    """

    training: list[str]
    evaluation: list[str]
    gold: Truth | None


def questions_of(profile: Profile, seed: int) -> Questions:
    """Return the prompts of a profile: of the embedded world, or of a data set.

    Of a data set training and evaluation take the same prompts, as in the paper.

    Raises:
        DataError: the prompts cannot be read.
    """
    sizes = profile.policies
    if sizes.data == EMBEDDED:
        world = World(seed)
        training = world.prompts(sizes.prompts, world.rng("policy prompts"))
        evaluation = world.prompts(sizes.evaluation.prompts, world.rng("evaluation prompts"))
        return Questions(training, evaluation, world.gold)
    prompts = prompts_of(sizes.data, max(sizes.prompts, sizes.evaluation.prompts))
    return Questions(prompts[: sizes.prompts], prompts[: sizes.evaluation.prompts], None)


def source_of(store: RunStore, profile: Profile, seed: int, run: Run) -> RewardSource:
    """Return what judges a run's policies, made now or before.

    Raises:
        ValueError: the run needs what only the embedded world has.
    """
    if run.source == "ensemble":
        truth = true_reward(_study(store, profile, seed))
        return load_ensemble(ensemble_folder(store, profile, seed, run), truth)
    if run.source in profile.policies.judges:
        return prompted_judge(store, profile, run)
    if profile.policies.data != EMBEDDED:
        raise ValueError(
            f"policies.judges: {run.source} is simulated in the embedded world only; name a model for it"
        )
    world = World(seed, run.disagreement)
    judge = stand_ins(world, float(run.highest), stretch_of(run))[JUDGES[run.source]]
    if run.protocol == "independent":
        return PersistentJudges(judge, world.features, stack_seed(seed, run.repeat))
    return judge


def prompted_judge(store: RunStore, profile: Profile, run: Run) -> PromptedJudge:
    """Return the judge of a run behind its endpoint; all it says is recorded beside the store.

    Raises:
        ValueError: the run needs a judge of the embedded world.
    """
    if run.protocol != "shared" or run.widths != "rescaled" or run.disagreement != "none":
        raise ValueError(
            f"{run.name}: only simulated judges can be independent, stretched, or disagree elsewhere"
        )
    named = profile.policies.judges[run.source]
    return PromptedJudge(
        JudgementStore(store.root.parent / JUDGEMENTS),
        model=named.model,
        base_url=named.base_url,
        key_variable=named.key_variable,
        highest=run.highest,
        workers=named.requests,
        refusals_say_nothing=named.refusals_say_nothing,
        reply_tokens=named.reply_tokens,
    )


def _study(store: RunStore, profile: Profile, seed: int) -> RewardStudy:
    """Return the reward models' study; part of the embedded pairs are the reference's responses."""
    embedded = profile.reward_data.pairs == EMBEDDED
    start = reference(store, profile, seed, "gpt2") if embedded else None
    return prepare(store, profile, seed, reference=start)


def ensemble_folder(store: RunStore, profile: Profile, seed: int, run: Run) -> Path:
    """Return the folder of a run's heads on one frozen backbone: ten, or ten for every policy.

    In the embedded world they are bootstrap heads trained to the end, elsewhere those of Table 7.
    """
    study = _study(store, profile, seed)
    kind: Kind = "bootstrap" if study.embedded else "paper"
    options = {
        "independent": run.protocol == "independent",
        "repeat": run.repeat if run.protocol == "independent" else 0,
    }

    def write(folder: Path, **_: Any) -> None:
        source = reward_source(study, kind, **options)  # type: ignore[arg-type]
        assert isinstance(source, EnsembleReward)
        source.save(folder)

    settings = profile.ensembles.model_dump()
    config = {**options, "settings": settings, "seed": seed}
    return store.folder("ensemble", write, config, {"model": study.reward_model})


# --- one run --------------------------------------------------------------------------------------------


def prerequisites(store: RunStore, profile: Profile, seed: int, runs: Sequence[Run]) -> None:
    """Make what runs share, before they go to their workers."""
    for architecture in dict.fromkeys(run.architecture for run in runs):
        reference(store, profile, seed, architecture)
    for run in runs:
        if run.source == "ensemble":
            ensemble_folder(store, profile, seed, run)


def run_key(profile: Profile, seed: int, run: Run) -> str:
    """Return the key of all that determines a run's result: settings, code, packages."""
    return content_key(
        config=_config(profile, seed, run),
        source=source_hashes(__name__),
        packages=package_versions(),
    )


def settings_key(profile: Profile, seed: int, run: Run) -> str:
    """Return the key of a run's settings alone: published results stay valid when code changes that is
    not meant to change them.
    """
    return content_key(config=_config(profile, seed, run))


def _config(profile: Profile, seed: int, run: Run) -> dict[str, Any]:
    sections = {"reward_data", "reference", "reward_model", "ensembles", "policies", "true_reward"}
    settings = profile.model_dump(include=sections)
    del settings["policies"]["runs"]
    judge = settings["policies"].pop("judges").get(run.source)
    if judge is not None:  # where and how it is asked changes nothing
        settings["policies"]["judge"] = [judge["model"], judge["refusals_say_nothing"]]
    if profile.policies.data == EMBEDDED:  # came later; keys stay as they were
        del settings["policies"]["data"]
        for training in settings["policies"]["training"].values():
            for name, default in (("precision", "float32"), ("gradient_checkpointing", False)):
                if training[name] == default:
                    del training[name]
    files = local_files(profile)
    if files or profile.policies.data != EMBEDDED:
        settings["files"] = files
    return {"run": asdict(run), "seed": seed, "settings": settings}


def train_run(
    store: RunStore, profile: Profile, seed: int, run: Run, target: float | None = None
) -> Path:
    """Return the folder of a run, trained and evaluated now or before.

    It holds `policies.parquet`, a row for each policy, `log.parquet`, a row for each policy and step,
    `resources.json`, and `policy`, the first policy as an ordinary checkpoint or adapter. A run that was
    killed goes on from its last checkpoint.

    Args:
        store: keeps the folder.
        profile: its settings.
        seed: of the study.
        run: which.
        target: the KL that a run with `matched_kl` is to leave, by default that of its vanilla stack.
    """
    if run.matched:
        return _matched_run(store, profile, seed, run, target)
    return _stack(store, profile, seed, run)


def _stack(
    store: RunStore, profile: Profile, seed: int, run: Run, beta: float | None = None
) -> Path:
    """Train one stack with a coefficient, by default the profile's; in parts where it is too large."""

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        if run.objective == REFERENCE:
            write_references(folder, store, profile, seed, run)
            return
        parts, method = _parts_of(profile, run, scratch), method_of(run, beta)
        if len(parts) == 1:
            write_stack(folder, scratch, store, profile, seed, run, method)
            return
        kept = RunStore(scratch)  # until they are joined

        def part(folder: Path, scratch: Path, first: int, end: int) -> None:
            chosen = range(first, end)
            write_stack(folder, scratch, store, profile, seed, run, method, chosen)

        ends = [{"first": one.start, "end": one.stop} for one in parts]
        _join_parts(folder, [kept.resumable("part", part, one) for one in ends])

    config = _config(profile, seed, run) | {"beta": beta}
    return store.resumable(run.name, write, config)


def size_that_fits(profile: Profile, run: Run) -> int:
    """Return how many of a run's policies are trained together: all, or as many as fit into memory.

    Raises:
        PlanError: not even one policy fits.
    """
    count, training = profile.policies.count, profile.policies.training[run.architecture]
    written, room = profile.policies.sampling.max_new_tokens, available_bytes(together())
    sizes, beside = sizes_of(profile, run.architecture), beside_bytes(profile, run.source)
    if size := fitting(sizes, training, count, written, room - beside):
        return size
    raise PlanError(
        f"{run.name}: one policy needs about "
        f"{(stack_bytes(sizes, training, 1, written) + beside) / 1e9:.3g} GB of memory, there are "
        f"{room / 1e9:.3g}"
    )


def _parts_of(profile: Profile, run: Run, scratch: Path) -> list[range]:
    """Return which policies are trained together; a run that goes on elsewhere keeps its parts."""
    record, count = scratch / "together.json", profile.policies.count
    try:
        size = unsealed(record)["policies"]
    except DamagedError:  # or not there
        size = size_that_fits(profile, run)
        write_atomically(record, sealed({"policies": size}))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _join_parts(folder: Path, parts: Sequence[Path]) -> None:
    """Put a run together from its parts."""
    for name in ("policies.parquet", "log.parquet"):
        tables = [pd.read_parquet(part / name) for part in parts]
        order = ["step", "policy"] if "step" in tables[0] else ["policy"]
        joined = pd.concat(tables).sort_values(order, ignore_index=True)
        joined.to_parquet(folder / name)
    spent = [json.loads((part / "resources.json").read_text()) for part in parts]
    total = {
        name: sum(one[name] for one in spent)
        for name in ("training_seconds", "seconds", "policies")
    }
    total["peak_bytes"] = max(one["peak_bytes"] for one in spent)
    (folder / "resources.json").write_text(json.dumps(spent[0] | total, indent=1) + "\n")
    shutil.copytree(parts[0] / "policy", folder / "policy")


def _matched_run(
    store: RunStore, profile: Profile, seed: int, run: Run, target: float | None
) -> Path:
    """Find the coefficient that leaves as much KL as vanilla has; keep the stack it was checked with."""

    def write(folder: Path, **_: Any) -> None:
        stacks: dict[float, Path] = {}

        def train(beta: float) -> float:
            if stacks:
                report(-_iterations(profile, run))
            stacks[beta] = _stack(store, profile, seed, run, beta)
            return kl_of(stacks[beta])

        matching = profile.policies.matching
        pilot = pd.read_parquet(pilot_run(store, profile, seed, run) / "cells.parquet")
        wanted = target
        if wanted is None:
            wanted = kl_of(train_run(store, profile, seed, run.vanilla))
        beta, attempts = match_kl(
            train,
            pilot["beta"].tolist(),
            pilot["kl"].tolist(),
            wanted,
            matching.attempts,
            matching.tolerance,
        )
        for name in ("policies.parquet", "log.parquet", "resources.json"):
            shutil.copyfile(stacks[beta] / name, folder / name)
        shutil.copytree(stacks[beta] / "policy", folder / "policy")
        attempts.to_parquet(folder / "attempts.parquet")

    return store.folder(f"{run.name}-chosen", write, _config(profile, seed, run))


def pilot_run(store: RunStore, profile: Profile, seed: int, run: Run) -> Path:
    """Return the folder of a pilot for a kind of source: variance-aware policies, shared source, several
    coefficients in one stack; `cells.parquet` says what KL each leaves.
    """
    plain = run.pilot
    settings = profile.policies.training[run.architecture].settings("vanilla")
    betas = [settings.init_kl_coef * factor for factor in profile.policies.matching.factors]
    repeats = max(1, profile.policies.count // len(betas))
    grid = Grid([settings.learning_rate], betas, repeats)

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        method = grid.method(plain.objective)
        index = range(len(grid.cells))
        write_stack(folder, scratch, store, profile, seed, plain, method, index)
        policies = pd.read_parquet(folder / "policies.parquet").join(grid.cells["beta"])
        cells = policies.groupby("beta", as_index=False)[["kl", "true_reward", "gold"]].mean()
        cells.to_parquet(folder / "cells.parquet")

    config = _config(profile, seed, plain) | {"betas": betas}
    return store.resumable(f"pilot-{plain.row}", write, config)


def kl_of(folder: Path) -> float:
    """Return the mean KL of a run's policies, as evaluated."""
    return float(pd.read_parquet(folder / "policies.parquet")["kl"].mean())


def method_of(run: Run, beta: float | None) -> Method:
    """Return the method of a run; `as_printed` means raw units and trl's reward for each token."""
    if run.regime == "as_printed":
        return Method(run.objective, beta=beta, credit="token", standardized=False)
    return Method(run.objective, beta=beta)


def trainer_of(
    store: RunStore,
    profile: Profile,
    seed: int,
    run: Run,
    method: Method,
    policies: Sequence[int],
) -> Trainer:
    """Return the trainer of some of a run's policies."""
    asked = questions_of(profile, seed)
    source = source_of(store, profile, seed, run)
    task = Task(asked.training, source, asked.gold, population=profile.policies.count)
    changes: dict[str, Any] = {}
    if run.regime == "as_printed" and profile.policies.data == EMBEDDED:
        printed = load_profile("paper").policies.training[run.architecture].settings(run.objective)
        changes = printed.model_dump(include={"init_kl_coef", "adaptive_kl"})
    return policy_trainer(
        profile,
        run.architecture,
        reference(store, profile, seed, run.architecture),
        task,
        method,
        policies=policies,
        seed=stack_seed(seed, run.repeat),
        device=device(),
        sampling=sampling_of(profile, run),
        **changes,
    )


def sampling_of(profile: Profile, run: Run) -> Sampling:
    """Return how a run's policies write; `as_printed`, log-probabilities are those at temperature 1."""
    if run.regime != "as_printed":
        return profile.policies.sampling
    return profile.policies.sampling.model_copy(update={"log_probability_temperature": 1.0})


def write_stack(
    folder: Path,
    scratch: Path,
    store: RunStore,
    profile: Profile,
    seed: int,
    run: Run,
    method: Method,
    policies: Sequence[int] | None = None,
) -> None:
    """Train a stack, with checkpoints, and evaluate it."""
    index = range(profile.policies.count) if policies is None else policies
    started = time.perf_counter()
    trainer = trainer_of(store, profile, seed, run, method, index)
    start = [one.detach().to("cpu", copy=True) for one in trainer.stack.parameters().values()]
    log, seconds = _train(trainer, Checkpoints(scratch))
    table = evaluator_of(store, profile, seed, run, trainer).policies(trainer.stack, index)
    table["step_length"] = step_lengths(start, trainer.stack)
    _without_gold(table)
    trainer.stack.export(0, folder / "policy")
    log.to_parquet(folder / "log.parquet")
    table.to_parquet(folder / "policies.parquet")
    spent = {
        "training_seconds": seconds,
        "seconds": time.perf_counter() - started,
        "policies": len(index),
        "weights": sum(one.numel() for one in start) // len(index),
        "bytes": sum(path.stat().st_size for path in (folder / "policy").glob("*.safetensors")),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }
    (folder / "resources.json").write_text(json.dumps(spent, indent=1) + "\n")


@torch.no_grad()
def step_lengths(start: Sequence[torch.Tensor], stack: PolicyStack) -> np.ndarray:
    """Return how far each policy's trained weights are from where they started (policies,).

    It is the root mean square over weights, so that it compares with a learning rate.
    """
    moved = zip(stack.parameters().values(), start, strict=True)
    squares = [((now.cpu() - then).flatten(1).double() ** 2).sum(1) for now, then in moved]
    count = sum(one.numel() for one in start) / stack.size
    return np.asarray((torch.stack(squares).sum(0) / count).sqrt())


def write_references(folder: Path, store: RunStore, profile: Profile, seed: int, run: Run) -> None:
    """Evaluate the policy that a run's policies start from as often as there are policies."""
    evaluator = evaluator_of(store, profile, seed, run)
    table = evaluator.references(range(profile.policies.count)).assign(step_length=0.0)
    _without_gold(table)
    table.to_parquet(folder / "policies.parquet")


def _without_gold(table: pd.DataFrame) -> None:
    """Say that a gold reward is unknown."""
    for name in ("gold", "gold_error"):
        if name not in table:
            table[name] = np.nan


def _train(trainer: Trainer, checkpoints: Checkpoints) -> tuple[pd.DataFrame, float]:
    """Take the steps that are left; return the whole log, and the seconds of training so far."""
    logs: list[pd.DataFrame] = []
    before = 0.0
    if (state := checkpoints.newest()) is not None:
        trainer.load_state(state)
        logs.append(_from_tensors(state))
        before = float(state["seconds"])
    report(trainer.done)
    started = saved = time.perf_counter()
    pause = CHECKPOINT_SECONDS
    while trainer.done < trainer.settings.iterations:
        logs.append(trainer.step())
        report(1)
        now = time.perf_counter()
        if now - saved >= pause:
            logs = [pd.concat(logs, ignore_index=True)]
            spent = torch.tensor(before + now - started, dtype=torch.float64)
            state = trainer.state() | _as_tensors(logs[0]) | {"seconds": spent}
            checkpoints.save(trainer.done, state)
            saved = time.perf_counter()
            pause = max(CHECKPOINT_SECONDS, (saved - now) / CHECKPOINT_SHARE)
    log = pd.concat(logs, ignore_index=True)
    names = ["policy", "step", *sorted(set(log) - {"policy", "step"})]  # checkpoints keep no order
    return log[names], before + time.perf_counter() - started


def _as_tensors(log: pd.DataFrame) -> dict[str, torch.Tensor]:
    return {f"log.{name}": torch.tensor(log[name].to_numpy()) for name in log}


def _from_tensors(state: Mapping[str, torch.Tensor]) -> pd.DataFrame:
    columns = {name: one.numpy() for name, one in state.items() if name.startswith("log.")}
    return pd.DataFrame({name.removeprefix("log."): one for name, one in columns.items()})


def evaluator_of(
    store: RunStore, profile: Profile, seed: int, run: Run, trainer: Trainer | None = None
) -> Evaluator:
    """Return what evaluates a run's policies; all runs answer the same prompts."""
    asked, where = questions_of(profile, seed), device()
    start = reference(store, profile, seed, run.architecture)
    if trainer is None:
        source, tokenizer = source_of(store, profile, seed, run), load_tokenizer(start)
        model = AutoModelForCausalLM.from_pretrained(
            start, dtype=torch.float32, device_map={"": where}
        )
        precision = profile.policies.training[run.architecture].precision
        compared = ReferencePolicy(model, precision)
    else:
        source, tokenizer, compared = trainer.task.source, trainer.tokenizer, trainer.reference
    return Evaluator(
        compared,
        tokenizer,
        Task(asked.evaluation, source, asked.gold),
        sampling_of(profile, run),
        profile.policies.evaluation.samples,
        stack_seed(seed, run.repeat),
        where,
    )


# --- all runs -------------------------------------------------------------------------------------------


def train_runs(
    store: RunStore,
    profile: Profile,
    seed: int,
    runs: Sequence[Run],
    workers: int | str,
    published: Mapping[Run, float] | None = None,
) -> dict[Run, Path]:
    """Return the folder of every run; what is not there yet is trained in worker processes.

    Runs that match a KL come after what they are matched to.

    Args:
        store: keeps the folders.
        profile: its settings.
        seed: of the study.
        runs: which.
        workers: processes of this machine, or the address of a dask scheduler.
        published: the KL of runs whose results are known already; they are not trained.
    """
    targets = published or {}
    runs = [run for run in runs if run not in targets]
    folders: dict[Any, Path] = {}
    with read_once():
        for run in runs:
            with suppress(NotKeptError):
                folders[run] = train_run(RunStore(store.root, reads_only=True), profile, seed, run)
    missing = [run for run in runs if run not in folders]
    prerequisites(store, profile, seed, missing)
    matched = [run for run in missing if run.matched]
    first_jobs: dict[Any, Callable[[], Path]] = {
        run: partial(train_run, store, profile, seed, run) for run in missing if not run.matched
    }
    for run in dict.fromkeys(one.pilot for one in matched):
        first_jobs["pilot", run] = partial(pilot_run, store, profile, seed, run)
    later_jobs = {
        run: partial(train_run, store, profile, seed, run, targets.get(run.vanilla))
        for run in matched
    }
    for jobs in (first_jobs, later_jobs):
        trained = [name for name in jobs if getattr(name, "objective", "") != REFERENCE]
        steps = sum(
            _iterations(profile, name[1] if isinstance(name, tuple) else name) for name in trained
        )
        description = f"{len(trained)} stacks of policies"
        folders |= run_jobs(jobs, workers, steps, description, store.root)
    return {run: folders[run] for run in runs}


def _iterations(profile: Profile, run: Run) -> int:
    return profile.policies.training[run.architecture].settings(run.objective).iterations
