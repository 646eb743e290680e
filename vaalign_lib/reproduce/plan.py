"""What a reproduction would run: policies, steps, judgements, time, memory, disk; and what it lacks.

Estimates are for orientation. Times come from published runs with the same settings, else from counted
arithmetic and the speed of a matrix product on this machine; memory and disk from counted weights.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pandas as pd
import torch

from vaalign_lib.data.pairs import EMBEDDED, DataError, prompts_of, read_pairs, read_prompts, read_ratings
from vaalign_lib.experiments.conditions import ENSEMBLE_ROW, REFERENCE, Condition, plan
from vaalign_lib.experiments.policies import train_run
from vaalign_lib.experiments.results import published
from vaalign_lib.experiments.reward_models import prepare
from vaalign_lib.profiles import OURS, PUBLISHED_PROFILE, PolicyTraining, Precision, Profile, Study
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
_Named = tuple[str, str, Callable[..., object]]  # where something is named, its name, what reads it
_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60))


# --- the plan -----------------------------------------------------------------------------------------


@read_once()
def planned(study: Study, workers: int = 1) -> pd.DataFrame:
    """Return a row for every run of policies that a profile asks for, `workers` stacks at a time.

    Columns: `run`, `state` (`done`, `published` or `to do`), `policies`, `steps`, `responses` that are
    judged, `calls` to a paid judge at most (a text is asked for once, and once more where the reply is
    no interval), `seconds` of one worker, `together` (policies that fit into memory), `gigabytes` (of
    memory, for those), `disk` in gigabytes.

    Raises:
        PlanError: a model's configuration is not at hand.
    """
    profile, runs = study.profile, plan(study.profile.policies.runs)
    kept = replace(study, store=RunStore(study.store.root, reads_only=True))
    shown = published(profile, study.seed)
    taken = set() if profile.name == PUBLISHED_PROFILE else shown.names
    costs = shown.runs.set_index("run")["seconds"].dropna().to_dict() if len(shown.runs) else {}
    sizes = {name: sizes_of(profile, name) for name in {run.architecture for run in runs}}
    rows = []
    if profile.reward_model.backbone not in OURS and any(run.source == ENSEMBLE_ROW[1] for run in runs):
        state = "done" if _kept(lambda: prepare(kept, reference=None).reward_model) else "to do"
        rows.append({"run": "reward model", "state": state} | _reward_model(profile))
    for run in runs:
        not_done = "published" if run.name in taken else "to do"
        state = "done" if _kept(partial(train_run, kept, run)) else not_done
        amounts = _amounts(profile, run, sizes[run.architecture], workers)
        rows.append({"run": run.name, "state": state} | amounts)
        rows[-1]["seconds"] = costs.get(run.name) or amounts["seconds"]
    return pd.DataFrame(rows)


def _kept(compute: Callable[[], object]) -> bool:
    """Whether a store that only reads has what would be computed."""
    with suppress(NotKeptError, DataError):
        return compute() is not None
    return False


def _reward_model(profile: Profile) -> dict[str, float]:
    """Return the amounts of stage 1 (Table 5), whose frozen backbone carries the heads of all ensembles."""
    settings, pairs = profile.reward_model, profile.reward_data.train_pairs
    weights = 0
    with suppress(PlanError):  # `missing` tells it
        weights = classifier_weights("reward_model.backbone", settings.backbone)
    arithmetic = settings.epochs * pairs * 2 * PAIR_TOKENS * weights * 6.0
    return {
        "policies": 0,
        "steps": math.ceil(settings.epochs * pairs / settings.batch_size),
        "responses": 0,
        "calls": 0,
        "seconds": arithmetic / (EFFICIENCY * flops()),
        "together": 1,
        "gigabytes": weights * (2 * FLOAT + ADAM) / 1e9,
        "disk": weights * FLOAT / 1e9,
    }


def _counts(profile: Profile, run: Condition) -> dict[str, float]:
    """Return how many policies, steps, judged responses and paid calls a run takes."""
    sizes, settings = profile.policies, profile.policies.training[run.architecture].settings(run.objective)
    most = sizes.evaluation.prompts
    evaluated = most if sizes.data == EMBEDDED else _prompts(sizes.data, most)
    attempts = ATTEMPTS if run.matched else 1
    steps = 0 if run.objective == REFERENCE else settings.iterations * attempts
    responses = evaluated * sizes.evaluation.samples * sizes.count * attempts
    if steps:
        responses += sizes.warm_up + steps * settings.batch_size * sizes.count
    calls = responses * REPLIES if run.source in sizes.judges else 0
    return {"policies": sizes.count, "steps": steps, "responses": responses, "calls": calls}


@cache
def _prompts(data: str, most: int) -> int:
    return len(prompts_of(data, most))


def _amounts(profile: Profile, run: Condition, sizes: Sizes, workers: int) -> dict[str, float]:
    """Return what a run takes: its counts, time, memory and disk."""
    counts, training = _counts(profile, run), profile.policies.training[run.architecture]
    written, trains = profile.policies.sampling.max_new_tokens, counts["steps"] > 0
    beside = 0
    with suppress(PlanError):  # `missing` tells it
        beside = beside_bytes(profile, run.source)
    together = fitting(sizes, training, profile.policies.count, written, available_bytes(workers) - beside)
    settings = training.settings(run.objective)
    updated = counts["policies"] * counts["steps"] * settings.batch_size
    once, again = _products(sizes, training)
    tokens = sizes.prompt + written
    arithmetic = tokens * (counts["responses"] * once + updated * settings.ppo_epochs * again)
    return counts | {
        "seconds": arithmetic / (EFFICIENCY * flops(training.precision)),
        "together": together,
        "gigabytes": (stack_bytes(sizes, training, max(together, 1), written) + beside) / 1e9,
        "disk": (counts["policies"] * trains * sizes.trained * (FLOAT + ADAM) + sizes.weights * FLOAT) / 1e9,
    }


def _products(sizes: Sizes, training: PolicyTraining) -> tuple[float, float]:
    """Return the operations of a token's products when it is written, and in each epoch that trains on it.

    A pass forward takes 2 a weight: one writes, one scores, one is the reference's. Backward takes 2 for the
    states and, without adapters, 2 for the weights. Frozen lower layers are passed once, when it is written.
    """
    below = sizes.frozen / sizes.layers * (sizes.weights - sizes.vocabulary * sizes.width)
    above = sizes.weights - below
    passes = 3 - (training.lora is not None) + training.gradient_checkpointing
    return 2 * below + 6 * above, 2 * passes * above


@cache
def flops(precision: Precision = "float32") -> float:
    """Return the floating-point operations per second of a matrix product here."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if where.type == "cuda" else 1024
    one, best = torch.rand(size, size, device=where).to(getattr(torch, precision)), math.inf
    for _ in range(4):
        started = time.perf_counter()
        float((one @ one)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def in_words(table: pd.DataFrame, workers: int) -> str:
    """Return a plan as text: how many runs are done, a line for each that is not, and their sums."""
    left, states = table[table["state"] == "to do"], table["state"].value_counts()
    counts = (f"{states.get(one, 0)} {one}" for one in ("done", "published", "to do"))
    told = f"{len(table)} runs: {', '.join(counts)}"
    if left.empty:
        return told
    shown = left.drop(columns=["state", "seconds"]).assign(time=left["seconds"].map(_time))
    shown = shown.rename(columns={"gigabytes": "memory GB", "disk": "disk GB"})
    lines = shown.to_string(index=False, float_format=lambda value: f"{value:.3g}")
    sums = left.sum(numeric_only=True)
    return (
        f"{told}\n{lines}\ntogether: {sums['policies']:.0f} policies, {sums['steps']:.0f} steps, "
        f"{sums['responses']:,.0f} responses to judge, at most {sums['calls']:,.0f} paid calls, "
        f"about {_time(_seconds(left['seconds'], workers))} with {workers} at a time"
        f"{' beside the time of the judges' if sums['calls'] else ''}, about {sums['disk']:.3g} GB on disk"
    )


def _seconds(seconds: pd.Series, workers: int) -> float:
    """Return the seconds of runs that share workers; none can be split over two."""
    return float(max(seconds.sum() / max(workers, 1), seconds.max()))


def _time(seconds: float) -> str:
    """Return seconds in the unit in which people say them."""
    fits = (f"{seconds / length:.3g} {unit}" for unit, length in _UNITS if seconds >= 2 * length)
    return next(fits, f"{seconds:.3g} seconds")


# --- shown once before anything starts ----------------------------------------------------------------


def complete_plan(study: Study, workers: int) -> tuple[str, list[str]]:
    """Return the plan as text, and what is missing for it, each in a line."""
    if lacks := missing_first(study.profile):
        lacks += _missing_sources(study.profile, {run.source for run in plan(study.profile.policies.runs)})
        return "no plan without what policies start from and are asked", lacks
    table = planned(study, workers)
    return in_words(table, workers), missing(study.profile, table, study.store.root.parent)


def checked_plan(study: Study, workers: int) -> str:
    """Return the plan of real models and paid judges, nothing where all is made here.

    Raises:
        PlanError: something is missing, which is told before anything starts.
    """
    profile = study.profile
    models = {*profile.reference.models.values(), profile.reward_model.backbone, profile.true_reward}
    data = {profile.policies.data, profile.reward_data.pairs, profile.reward_data.evaluation}
    if models | data <= set(OURS) and not profile.policies.judges:
        return ""
    text, lacks = complete_plan(study, workers)
    _refuse(lacks)
    return text


def check_own(settings: Mapping[str, str]) -> None:
    """Refuse data and models of one's own, for a notebook's parameters, that cannot be read.

    Raises:
        PlanError: something is missing, which is told before anything starts.
    """
    reads: dict[str, Callable[..., object]] = {"pairs": read_pairs, "evaluation": read_pairs}
    reads |= {"ratings": read_ratings, "backbone": configuration}
    given = [(f"--set {name}", value, reads[name]) for name, value in settings.items() if name in reads]
    _refuse(sorted(_lacking(one for one in given if one[1])))


def _refuse(lacks: list[str]) -> None:
    if lacks:
        raise PlanError(f"nothing was started, for this is missing: {'; '.join(lacks)}")


# --- what is missing, each in a line ------------------------------------------------------------------


def missing_first(profile: Profile) -> list[str]:
    """Return what policies start from and are asked that is not at hand: without it there is no plan."""
    models = profile.reference.models.items()
    named: list[_Named] = [(f"reference.models.{key}", name, policy_configuration) for key, name in models]
    return _lacking([*named, ("policies.data", profile.policies.data, read_prompts)])


def missing(profile: Profile, table: pd.DataFrame, run_dir: Path) -> list[str]:
    """Return what else the runs of a plan lack: keys, models, data, memory, disk of the run folder."""
    left = table[table["state"] == "to do"]
    if left.empty:
        return []
    needed = {run.source for run in plan(profile.policies.runs) if run.name in set(left["run"])}
    found = _missing_sources(profile, needed)
    for line in left[left["together"] == 0].drop_duplicates("gigabytes").to_dict("records"):
        needs = f"one policy needs about {line['gigabytes']:.3g} GB of memory"
        found.append(f"{line['run']}: {needs}, which are not there")
    place = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    free, disk = shutil.disk_usage(place).free / 1e9, left["disk"].sum()
    if disk > free:
        found.append(f"{run_dir}: about {disk:.3g} GB are needed, {free:.3g} are free")
    return found


def _missing_sources(profile: Profile, needed: set[str]) -> list[str]:
    """Return what sources of reward lack: keys, models, pairs."""
    found = [
        f"policies.judges.{name}: the environment variable {judge.key_variable} is not set"
        for name, judge in profile.policies.judges.items()
        if name in needed and not os.environ.get(judge.key_variable)
    ]
    named: list[_Named] = [
        ("reward_model.backbone", profile.reward_model.backbone, configuration),
        ("true_reward", profile.true_reward, configuration),
        ("reward_data.pairs", profile.reward_data.pairs, read_pairs),
        ("reward_data.evaluation", profile.reward_data.evaluation, read_pairs),
    ]
    return found + (_lacking(named) if ENSEMBLE_ROW[1] in needed else [])


def _lacking(named: Iterable[_Named]) -> list[str]:
    """Return what cannot be read of models and data that are not our own."""
    found = []
    for where, name, read in (one for one in named if one[1] not in OURS):
        try:
            read(where, name) if read in (configuration, policy_configuration) else read(name)
        except PlanError as error:
            found.append(str(error))
        except (DataError, OSError) as error:
            found.append(f"{where}: {error}")
    return found
