"""What a reproduction would run: policies, steps, judgements, time, memory, disk; and what it lacks.

Estimates are for orientation. Times come from published runs with the same settings, else from counted
arithmetic and the speed of a matrix product on this machine; memory and disk from counted weights.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from vaalign_lib.data.pairs import EMBEDDED, DataError, prompts_of, read_pairs, read_prompts, read_ratings
from vaalign_lib.experiments.conditions import ENSEMBLE_ROW, REFERENCE, Condition, plan
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.experiments.results import published
from vaalign_lib.experiments.reward_models import prepare
from vaalign_lib.profiles import OURS, PUBLISHED_PROFILE, Profile, Study
from vaalign_lib.rewards.prompted_judge import REPLIES
from vaalign_lib.store import NotKeptError, PlanError, RunStore, read_once
from vaalign_lib.training.memory import (
    ADAM,
    FLOAT,
    Sizes,
    available_bytes,
    beside_bytes,
    classifier_weights,
    configuration,
    fitting,
    policy_configuration,
    sizes_of,
    stack_bytes,
)

PAIR_TOKENS = 400  # of a preference pair's side, about
EFFICIENCY = 0.3  # of a matrix product's speed that training reaches, about
ATTEMPTS = 2  # stacks that matching a KL takes, about


# --- the plan -----------------------------------------------------------------------------------------


@read_once()
def planned(study: Study, workers: int = 1) -> pd.DataFrame:
    """Return a row for every run of policies that a profile asks for.

    Columns: `run`, `state` (`done`, `published` or `to do`), `policies`, `steps`, `responses` that are
    judged, `calls` to a paid judge at most (a text is asked for once, and once more where the reply is
    no interval), `seconds` of one worker, `together` (policies that fit into memory), `gigabytes` (of
    memory, for those), `disk` in gigabytes.

    Args:
        study: store, profile and seed.
        workers: stacks at a time.

    Raises:
        PlanError: a model's configuration is not at hand.
    """
    runs = plan(study.profile.policies.runs)
    done = _done(study, runs)
    shown = published(study.profile, study.seed)
    costs = shown.runs.set_index("run")["seconds"].to_dict() if len(shown.runs) else {}
    own = study.profile.name == PUBLISHED_PROFILE
    sizes = {name: sizes_of(study.profile, name) for name in {run.architecture for run in runs}}
    rows = [_reward_model(study)] if _trains_reward_model(study.profile, runs) else []
    for run in runs:
        taken = run.name in shown.names and not own
        state = "done" if run in done else "published" if taken else "to do"
        rows.append(
            {"run": run.name, "state": state}
            | _amounts(study.profile, run, sizes[run.architecture], costs.get(run.name), workers)
        )
    return pd.DataFrame(rows)


def _done(study: Study, runs: Sequence[Condition]) -> set[Condition]:
    kept, found = RunStore(study.store.root, reads_only=True), set()
    for run in runs:
        with suppress(NotKeptError):
            train_run(Study(kept, study.profile, study.seed), run)
            found.add(run)
    return found


def _trains_reward_model(profile: Profile, runs: Sequence[Condition]) -> bool:
    backbone = profile.reward_model.backbone
    return backbone not in OURS and any(run.source == ENSEMBLE_ROW[1] for run in runs)


def _reward_model(study: Study) -> dict[str, object]:
    """Return the row of stage 1 (Table 5), whose frozen backbone carries the heads of all ensembles."""
    settings, pairs = study.profile.reward_model, study.profile.reward_data.train_pairs
    state = "to do"
    with suppress(NotKeptError, DataError):
        kept = RunStore(study.store.root, reads_only=True)
        state = (
            "done" if prepare(Study(kept, study.profile, study.seed), reference=None).reward_model else state
        )
    weights = 0
    with suppress(PlanError):  # `missing` tells it
        weights = classifier_weights("reward_model.backbone", settings.backbone)
    arithmetic = settings.epochs * pairs * 2 * PAIR_TOKENS * weights * 6.0
    return {
        "run": "reward model",
        "state": state,
        "policies": 0,
        "steps": math.ceil(settings.epochs * pairs / settings.batch_size),
        "responses": 0,
        "calls": 0,
        "seconds": arithmetic / (EFFICIENCY * flops()),
        "together": 1,
        "gigabytes": weights * (2 * FLOAT + ADAM) / 1e9,
        "disk": weights * FLOAT / 1e9,
    }


def _amounts(
    profile: Profile, run: Condition, sizes: Sizes, known_seconds: float | None, workers: int
) -> dict[str, object]:
    training = profile.policies.training[run.architecture]
    settings, count = training.settings(run.objective), profile.policies.count
    tokens = sizes.prompt + profile.policies.sampling.max_new_tokens
    evaluated = profile.policies.evaluation.prompts
    if profile.policies.data != EMBEDDED:
        evaluated = _count(profile.policies.data, evaluated)
    asked = evaluated * profile.policies.evaluation.samples * count
    steps = 0
    if run.objective != REFERENCE:
        attempts = ATTEMPTS if run.matched else 1
        steps = settings.iterations * attempts
        asked = asked * attempts + profile.policies.warm_up + steps * settings.batch_size * count
    paid = run.source in profile.policies.judges
    written = profile.policies.sampling.max_new_tokens
    beside = 0
    with suppress(PlanError):  # `missing` tells it
        beside = beside_bytes(profile, run.source)
    together = fitting(sizes, training, count, written, available_bytes(workers) - beside)
    # a token costs 2 weights forward: written, scored by itself and the reference; then 6 in each epoch
    arithmetic = asked * tokens * sizes.weights * (6.0 + 6.0 * settings.ppo_epochs * (steps > 0))
    seconds = known_seconds if known_seconds == known_seconds and known_seconds else None
    return {
        "policies": count,
        "steps": steps,
        "responses": asked,
        "calls": asked * REPLIES if paid else 0,
        "seconds": seconds or arithmetic / (EFFICIENCY * flops()),
        "together": together,
        "gigabytes": (stack_bytes(sizes, training, max(together, 1), written) + beside) / 1e9,
        "disk": ((count if steps else 0) * sizes.trained * (FLOAT + ADAM) + sizes.weights * FLOAT) / 1e9,
    }


@cache
def _count(data: str, most: int) -> int:
    return len(prompts_of(data, most))


@cache
def flops() -> float:
    """Return the floating-point operations per second of a matrix product here."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if where.type == "cuda" else 1024
    one = torch.rand(size, size, device=where)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((one @ one)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def in_words(table: pd.DataFrame, workers: int) -> str:
    """Return a plan as text, a line for each run that is not done, and the sums.

    Args:
        table: of `planned`.
        workers: stacks at a time.
    """
    left = table[table["state"] == "to do"]
    lines = [
        f"{len(table)} runs: {(table['state'] == 'done').sum()} done, "
        f"{(table['state'] == 'published').sum()} published, {len(left)} to do"
    ]
    if len(left):
        shown = left.drop(columns="state").copy()
        shown["time"] = shown.pop("seconds").map(_time)
        shown = shown.rename(columns={"gigabytes": "memory GB", "disk": "disk GB"})
        lines.append(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
        lines.append(
            f"together: {left['policies'].sum()} policies, {left['steps'].sum()} steps, "
            f"{left['responses'].sum():,} responses to judge, at most {left['calls'].sum():,} paid "
            f"calls, about {_time(_seconds(left['seconds'], workers))} with {workers} at a time"
            f"{' beside the time of the judges' if left['calls'].any() else ''}, about "
            f"{left['disk'].sum():.3g} GB on disk"
        )
    return "\n".join(lines)


def _seconds(seconds: pd.Series, workers: int) -> float:
    """Return the seconds of runs that share workers; none can be split over two."""
    return float(max(seconds.sum() / max(workers, 1), seconds.max()))


def _time(seconds: float) -> str:
    """Return seconds in the unit in which people say them."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} seconds"


# --- shown once before anything starts ----------------------------------------------------------------


def complete_plan(study: Study, workers: int) -> tuple[str, list[str]]:
    """Return the plan as text, and what is missing for it, each in a line."""
    if lacks := missing_first(study.profile):
        sources = {run.source for run in plan(study.profile.policies.runs)}
        lacks += _missing_sources(study.profile, sources)
        return "no plan without what policies start from and are asked", lacks
    table = planned(study, workers)
    return in_words(table, workers), missing(study.profile, table, study.store.root.parent)


def checked_plan(study: Study, workers: int) -> str:
    """Return the plan of real models and paid judges, nothing where all is made here.

    Raises:
        PlanError: something is missing, which is told before anything starts.
    """
    if _is_made_here(study.profile):
        return ""
    text, lacks = complete_plan(study, workers)
    if lacks:
        raise PlanError(f"nothing was started, for this is missing: {'; '.join(lacks)}")
    return text


def _is_made_here(profile: Profile) -> bool:
    """Whether a profile names no models, data and judges but this project's own."""
    models = [*profile.reference.models.values(), profile.reward_model.backbone]
    data = [profile.policies.data, profile.reward_data.pairs, profile.reward_data.evaluation]
    named = {*models, *data, profile.true_reward}
    return named <= set(OURS) and not profile.policies.judges


# --- what is missing ----------------------------------------------------------------------------------


def missing_first(profile: Profile) -> list[str]:
    """Return, each in a line, what policies start from and are asked that is not at hand: without it
    there is no plan.
    """
    models = {f"reference.models.{key}": name for key, name in profile.reference.models.items()}
    lines = [
        line
        for where, name in models.items()
        if name not in OURS
        for line in _missing_model(where, name, policy_configuration)
    ]
    return lines + _missing_data("policies.data", profile.policies.data, read_prompts)


def missing(profile: Profile, table: pd.DataFrame, run_dir: Path) -> list[str]:
    """Return what else a profile's runs lack, each in a line: keys, models, data, memory, disk.

    Args:
        profile: whose runs.
        table: of `planned`.
        run_dir: where results go.
    """
    left = table[table["state"] == "to do"]
    if left.empty:
        return []
    needed = {run.source for run in plan(profile.policies.runs) if run.name in set(left["run"])}
    found = _missing_sources(profile, needed)
    for line in left[left["together"] == 0].drop_duplicates("gigabytes").to_dict("records"):
        found.append(
            f"{line['run']}: one policy needs about {line['gigabytes']:.3g} GB of memory, which are not there"
        )
    place = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    free = shutil.disk_usage(place).free / 1e9
    if left["disk"].sum() > free:
        found.append(f"{run_dir}: about {left['disk'].sum():.3g} GB are needed, {free:.3g} are free")
    return found


def _missing_sources(profile: Profile, needed: set[str]) -> list[str]:
    """Return what sources of reward lack: keys, models, pairs."""
    found = [
        f"policies.judges.{name}: the environment variable {judge.key_variable} is not set"
        for name, judge in profile.policies.judges.items()
        if name in needed and not os.environ.get(judge.key_variable)
    ]
    if ENSEMBLE_ROW[1] in needed:
        names = {"reward_model.backbone": profile.reward_model.backbone, "true_reward": profile.true_reward}
        for where, name in names.items():
            if name not in OURS:
                found += _missing_model(where, name)
        for where in ("pairs", "evaluation"):
            name = getattr(profile.reward_data, where)
            found += _missing_data(f"reward_data.{where}", name, read_pairs)
    return found


def check_own(settings: Mapping[str, str]) -> None:
    """Refuse data and models of one's own, for a notebook's parameters, that cannot be read.

    Raises:
        PlanError: something is missing, which is told before anything starts.
    """
    reads = {"pairs": read_pairs, "evaluation": read_pairs, "ratings": read_ratings}
    given = {name: value for name, value in settings.items() if value and value not in OURS}
    lacks = [
        line
        for name in reads.keys() & given.keys()
        for line in _missing_data(f"--set {name}", given[name], reads[name])
    ]
    if "backbone" in given:
        lacks += _missing_model("--set backbone", given["backbone"])
    if lacks:
        raise PlanError(f"nothing was started, for this is missing: {'; '.join(sorted(lacks))}")


def _missing_data(where: str, name: str, read: Callable[[str], object]) -> list[str]:
    if name != EMBEDDED:
        try:
            read(name)
        except (DataError, OSError) as error:
            return [f"{where}: {error}"]
    return []


def _missing_model(where: str, name: str, read: Callable[[str, str], object] = configuration) -> list[str]:
    try:
        read(where, name)
    except PlanError as error:
        return [str(error)]
    return []
