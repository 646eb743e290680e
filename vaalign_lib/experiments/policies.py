"""The experiment of notebook 04: which policies are trained, on what, and how they are compared.

A run is one stack of policies: an architecture and a source of rewards (a row of the paper's tables), a
method, and the conditions under which it is compared with the other method: the protocol (do policies
share their source?) and the penalty regime.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import EMBEDDED, prompts_of
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import (
    JUDGES,
    REFERENCE,
    Condition,
    method_of,
    sampling_of,
    stretch_of,
)
from vaalign_lib.experiments.references import reference, stack_seed
from vaalign_lib.experiments.reward_models import RewardStudy, prepare, reward_source, true_reward
from vaalign_lib.jobs import WORKER, device, report, run_jobs
from vaalign_lib.models import load_tokenizer
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.profiles import Profile, Study, load_profile, local_files
from vaalign_lib.rewards.base import RewardSource, Truth
from vaalign_lib.rewards.ensemble import EnsembleReward, load_ensemble
from vaalign_lib.rewards.heads import HeadKind
from vaalign_lib.rewards.judgements import JudgementStore
from vaalign_lib.rewards.prompted_judge import PromptedJudge
from vaalign_lib.rewards.simulated_judge import PersistentJudges, stand_ins
from vaalign_lib.store import (
    DamagedError,
    NotKeptError,
    PlanError,
    RunStore,
    content_key,
    read_once,
    sealed,
    unsealed,
    write_atomically,
)
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.matched_kl import Grid, match_kl
from vaalign_lib.training.memory import available_bytes, beside_bytes, fitting, sizes_of, stack_bytes
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer
from vaalign_lib.training.run import policy_trainer, without_gold, write_stack

JUDGEMENTS = "judgements.sqlite"  # in the run folder: what prompted judges said


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


def source_of(study: Study, run: Condition) -> RewardSource:
    """Return what judges a run's policies, made now or before.

    Raises:
        ValueError: the run needs what only the embedded world has.
    """
    if run.source == "ensemble":
        truth = true_reward(_study(study))
        return load_ensemble(ensemble_folder(study, run), truth)
    if run.source in study.profile.policies.judges:
        return prompted_judge(study, run)
    if study.profile.policies.data != EMBEDDED:
        raise ValueError(
            f"policies.judges: {run.source} is simulated in the embedded world only; name a model for it"
        )
    world = World(study.seed, run.disagreement)
    judge = stand_ins(world, float(run.highest), stretch_of(run))[JUDGES[run.source]]
    if run.protocol == "independent":
        return PersistentJudges(judge, world.features, stack_seed(study.seed, run.repeat))
    return judge


def prompted_judge(study: Study, run: Condition) -> PromptedJudge:
    """Return the judge of a run behind its endpoint; all it says is recorded beside the store.

    Raises:
        ValueError: the run needs a judge of the embedded world.
    """
    if run.protocol != "shared" or run.widths != "rescaled" or run.disagreement != "none":
        raise ValueError(
            f"{run.name}: only simulated judges can be independent, stretched, or disagree elsewhere"
        )
    named = study.profile.policies.judges[run.source]
    return PromptedJudge(
        JudgementStore(study.store.root.parent / JUDGEMENTS),
        model=named.model,
        base_url=named.base_url,
        key_variable=named.key_variable,
        highest=run.highest,
        workers=named.requests,
        refusals_say_nothing=named.refusals_say_nothing,
        reply_tokens=named.reply_tokens,
    )


def _study(study: Study) -> RewardStudy:
    """Return the reward models' study; part of the embedded pairs are the reference's responses."""
    embedded = study.profile.reward_data.pairs == EMBEDDED
    start = reference(study, "gpt2") if embedded else None
    return prepare(study, reference=start)


def ensemble_folder(study: Study, run: Condition) -> Path:
    """Return the folder of a run's heads on one frozen backbone: ten, or ten for every policy.

    In the embedded world they are bootstrap heads trained to the end, elsewhere those of Table 7.
    """
    trained = _study(study)
    kind: HeadKind = "bootstrap" if trained.embedded else "paper"
    options = {
        "independent": run.protocol == "independent",
        "repeat": run.repeat if run.protocol == "independent" else 0,
    }

    def write(folder: Path, **_: Any) -> None:
        source = reward_source(trained, kind, **options)  # type: ignore[arg-type]
        assert isinstance(source, EnsembleReward)
        source.save(folder)

    settings = study.profile.ensembles.model_dump()
    config = {**options, "settings": settings, "seed": study.seed}
    inputs, code = {"model": trained.reward_model}, ("vaalign_lib.rewards.ensemble",)
    return study.store.folder("ensemble", write, config, inputs, code)


# --- one run --------------------------------------------------------------------------------------------


def prerequisites(study: Study, runs: Sequence[Condition]) -> None:
    """Make what runs share, before they go to their workers."""
    for architecture in dict.fromkeys(run.architecture for run in runs):
        reference(study, architecture)
    for run in runs:
        if run.source == "ensemble":
            ensemble_folder(study, run)


def settings_key(profile: Profile, seed: int, run: Condition) -> str:
    """Return the key of a run's settings alone: published results stay valid when code changes that is
    not meant to change them.
    """
    return content_key(config=_config(profile, seed, run))


def _config(profile: Profile, seed: int, run: Condition) -> dict[str, Any]:
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


def train_run(study: Study, run: Condition, target: float | None = None) -> Path:
    """Return the folder of a run, trained and evaluated now or before.

    It holds `policies.parquet`, a row for each policy, `log.parquet`, a row for each policy and step,
    `resources.json`, and `policy`, the first policy as an ordinary checkpoint or adapter. A run that was
    killed goes on from its last checkpoint.

    Args:
        study: store, profile and seed.
        run: which.
        target: the KL that a run with `matched_kl` is to leave, by default that of its vanilla stack.
    """
    if run.matched:
        return _matched_run(study, run, target)
    return _stack(study, run)


def _stack(study: Study, run: Condition, beta: float | None = None) -> Path:
    """Train one stack with a coefficient, by default the profile's; in parts where it is too large."""

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        if run.objective == REFERENCE:
            write_references(folder, study, run)
            return
        parts, method = _parts_of(study.profile, run, scratch), method_of(run, beta)
        if len(parts) == 1:
            _write_stack(folder, scratch, study, run, method, parts[0])
            return
        kept = RunStore(scratch)  # until they are joined

        def part(folder: Path, scratch: Path, first: int, end: int) -> None:
            chosen = range(first, end)
            _write_stack(folder, scratch, study, run, method, chosen)

        ends = [{"first": one.start, "end": one.stop} for one in parts]
        _join_parts(folder, [kept.resumable("part", part, one) for one in ends])

    method = None if run.objective == REFERENCE else method_of(run, beta)
    config = _computed_from(study, run, method)
    return study.store.resumable(run.name, write, config, _inputs(study, run), _code(study, run))


def _computed_from(study: Study, run: Condition, method: Method | None) -> dict[str, Any]:
    """Return the settings that a stack is computed from, with what its condition makes of them."""
    resolved = {
        "method": None if method is None else asdict(method),
        "changes": changes_of(study, run),
        "sampling": sampling_of(study.profile, run).model_dump(),
    }
    return _config(study.profile, study.seed, run) | resolved


def _inputs(study: Study, run: Condition) -> dict[str, Path]:
    """Return the folders that a stack is computed from: the reference, and the ensemble if it has one."""
    inputs = {"reference": reference(study, run.architecture)}
    return inputs | ({"ensemble": ensemble_folder(study, run)} if run.source == "ensemble" else {})


def _code(study: Study, run: Condition) -> tuple[str, ...]:
    """Return the modules that compute a stack: how policies are trained, and the source of their reward."""
    kind = "simulated_judge"
    if run.source == "ensemble":
        kind = "ensemble"
    elif run.source in study.profile.policies.judges:
        kind = "prompted_judge"
    return "vaalign_lib.training.run", "vaalign_lib.training.matched_kl", f"vaalign_lib.rewards.{kind}"


def _write_stack(
    folder: Path, scratch: Path, study: Study, run: Condition, method: Method, policies: Sequence[int]
) -> None:
    trainer = trainer_of(study, run, method, policies)
    write_stack(folder, scratch, trainer, evaluator_of(study, run, trainer))


def size_that_fits(profile: Profile, run: Condition) -> int:
    """Return how many of a run's policies are trained together: all, or as many as fit into memory.

    Raises:
        PlanError: not even one policy fits.
    """
    count, training = profile.policies.count, profile.policies.training[run.architecture]
    written, room = profile.policies.sampling.max_new_tokens, available_bytes(WORKER.together)
    sizes, beside = sizes_of(profile, run.architecture), beside_bytes(profile, run.source)
    if size := fitting(sizes, training, count, written, room - beside):
        return size
    raise PlanError(
        f"{run.name}: one policy needs about "
        f"{(stack_bytes(sizes, training, 1, written) + beside) / 1e9:.3g} GB of memory, there are "
        f"{room / 1e9:.3g}"
    )


def _parts_of(profile: Profile, run: Condition, scratch: Path) -> list[range]:
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
    total = {name: sum(one[name] for one in spent) for name in ("training_seconds", "seconds", "policies")}
    total["peak_bytes"] = max(one["peak_bytes"] for one in spent)
    (folder / "resources.json").write_text(json.dumps(spent[0] | total, indent=1) + "\n")
    shutil.copytree(parts[0] / "policy", folder / "policy")


def _matched_run(study: Study, run: Condition, target: float | None) -> Path:
    """Find the coefficient that leaves as much KL as vanilla has; keep the stack it was checked with."""

    def write(folder: Path, **_: Any) -> None:
        stacks: dict[float, Path] = {}

        def train(beta: float) -> float:
            if stacks:
                report(-_iterations(study.profile, run))
            stacks[beta] = _stack(study, run, beta)
            return kl_of(stacks[beta])

        matching = study.profile.policies.matching
        pilot = pd.read_parquet(pilot_run(study, run) / "cells.parquet")
        wanted = target
        if wanted is None:
            wanted = kl_of(train_run(study, run.vanilla))
        beta, attempts = match_kl(
            train, pilot["beta"].tolist(), pilot["kl"].tolist(), wanted, matching.attempts, matching.tolerance
        )
        for name in ("policies.parquet", "log.parquet", "resources.json"):
            shutil.copyfile(stacks[beta] / name, folder / name)
        shutil.copytree(stacks[beta] / "policy", folder / "policy")
        attempts.to_parquet(folder / "attempts.parquet")

    config = _computed_from(study, run, method_of(run, None))
    name, inputs, code = f"{run.name}-chosen", _inputs(study, run), _code(study, run)
    return study.store.folder(name, write, config, inputs, code)


def pilot_run(study: Study, run: Condition) -> Path:
    """Return the folder of a pilot for a kind of source: variance-aware policies, shared source, several
    coefficients in one stack; `cells.parquet` says what KL each leaves.
    """
    plain = run.pilot
    settings = study.profile.policies.training[run.architecture].settings("vanilla")
    betas = [settings.init_kl_coef * factor for factor in study.profile.policies.matching.factors]
    repeats = max(1, study.profile.policies.count // len(betas))
    grid = Grid([settings.learning_rate], betas, repeats)

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        method = grid.method(plain.objective)
        index = range(len(grid.cells))
        _write_stack(folder, scratch, study, plain, method, index)
        policies = pd.read_parquet(folder / "policies.parquet").join(grid.cells["beta"])
        cells = policies.groupby("beta", as_index=False)[["kl", "true_reward", "gold"]].mean()
        cells.to_parquet(folder / "cells.parquet")

    config = _computed_from(study, plain, grid.method(plain.objective))
    inputs, code = _inputs(study, plain), _code(study, plain)
    return study.store.resumable(f"pilot-{plain.row}", write, config, inputs, code)


def kl_of(folder: Path) -> float:
    """Return the mean KL of a run's policies, as evaluated."""
    return float(pd.read_parquet(folder / "policies.parquet")["kl"].mean())


def trainer_of(study: Study, run: Condition, method: Method, policies: Sequence[int]) -> Trainer:
    """Return the trainer of some of a run's policies."""
    asked = questions_of(study.profile, study.seed)
    source = source_of(study, run)
    task = Task(asked.training, source, asked.gold, population=study.profile.policies.count)
    return policy_trainer(
        study.profile,
        run.architecture,
        reference(study, run.architecture),
        task,
        method,
        policies=policies,
        seed=stack_seed(study.seed, run.repeat),
        device=device(),
        sampling=sampling_of(study.profile, run),
        **changes_of(study, run),
    )


def changes_of(study: Study, run: Condition) -> dict[str, Any]:
    """Return the settings of PPO that a condition changes: `as_printed` takes the paper's coefficients."""
    if run.regime != "as_printed" or study.profile.policies.data != EMBEDDED:
        return {}
    printed = load_profile("paper").policies.training[run.architecture].settings(run.objective)
    return printed.model_dump(include={"init_kl_coef", "adaptive_kl"})


def write_references(folder: Path, study: Study, run: Condition) -> None:
    """Evaluate the policy that a run's policies start from as often as there are policies."""
    evaluator = evaluator_of(study, run)
    table = evaluator.references(range(study.profile.policies.count)).assign(step_length=0.0)
    without_gold(table)
    table.to_parquet(folder / "policies.parquet")


def evaluator_of(study: Study, run: Condition, trainer: Trainer | None = None) -> Evaluator:
    """Return what evaluates a run's policies; all runs answer the same prompts."""
    asked, where = questions_of(study.profile, study.seed), device()
    start = reference(study, run.architecture)
    if trainer is None:
        source, tokenizer = source_of(study, run), load_tokenizer(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, device_map={"": where})
        precision = study.profile.policies.training[run.architecture].precision
        compared = ReferencePolicy(model, precision)
    else:
        source, tokenizer, compared = trainer.task.source, trainer.tokenizer, trainer.reference
    return Evaluator(
        compared,
        tokenizer,
        Task(asked.evaluation, source, asked.gold),
        sampling_of(study.profile, run),
        study.profile.policies.evaluation.samples,
        stack_seed(study.seed, run.repeat),
        where,
    )


# --- all runs -------------------------------------------------------------------------------------------


def train_runs(
    study: Study,
    runs: Sequence[Condition],
    workers: int | str,
    published: Mapping[Condition, float] | None = None,
) -> dict[Condition, Path]:
    """Return the folder of every run; what is not there yet is trained in worker processes.

    Runs that match a KL come after what they are matched to.

    Args:
        study: store, profile and seed.
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
                folders[run] = train_run(
                    Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed), run
                )
    missing = [run for run in runs if run not in folders]
    prerequisites(study, missing)
    matched = [run for run in missing if run.matched]
    first_jobs: dict[Any, Callable[[], Path]] = {
        run: partial(train_run, study, run) for run in missing if not run.matched
    }
    for run in dict.fromkeys(one.pilot for one in matched):
        first_jobs["pilot", run] = partial(pilot_run, study, run)
    later_jobs = {run: partial(train_run, study, run, targets.get(run.vanilla)) for run in matched}
    for jobs in (first_jobs, later_jobs):
        trained = [name for name in jobs if getattr(name, "objective", "") != REFERENCE]
        steps = sum(
            _iterations(study.profile, name[1] if isinstance(name, tuple) else name) for name in trained
        )
        description = f"{len(trained)} stacks of policies"
        folders |= run_jobs(jobs, workers, steps, description, study.store.root)
    return {run: folders[run] for run in runs}


def _iterations(profile: Profile, run: Condition) -> int:
    return profile.policies.training[run.architecture].settings(run.objective).iterations
