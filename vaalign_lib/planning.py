"""What a reproduction would run: policies, steps, judgements, time, memory, disk; and what it lacks.

Estimates are for orientation. Times come from published runs with the same settings, else from counted
arithmetic and the speed of a matrix product on this machine; memory and disk from counted weights.
"""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from vaalign_lib.data import EMBEDDED, DataError, read_pairs, read_prompts
from vaalign_lib.policy_results import published
from vaalign_lib.policy_study import ENSEMBLE_ROW, REFERENCE, Run, plan, train_run
from vaalign_lib.profiles import PolicyTraining, Profile
from vaalign_lib.rewards.models import TINY
from vaalign_lib.runs import NotKeptError, PlanError, RunStore
from vaalign_lib.tiny import tiny_config

PROMPT_TOKENS = 64  # of a prompt, about
EFFICIENCY = 0.3  # of a matrix product's speed that training reaches, about
ATTEMPTS = 2  # stacks that matching a KL takes, about
ACTIVATIONS = 34  # bytes for each layer, token and unit of width that a backward pass keeps, about
FLOAT, FOUR_BITS, ADAM = (
    4,
    0.55,
    8,
)  # bytes a weight: held, held in 4 bits with its scales, Adam's moments
HEADROOM = 0.9  # of the memory that a stack may take


@dataclass(frozen=True)
class Sizes:
    """What a policy of one architecture amounts to.

    Attributes:
        weights: of the model.
        trained: weights that are trained for each policy.
        layers: of the model.
        width: of its hidden states.
        vocabulary: tokens.
    """

    weights: int
    trained: int
    layers: int
    width: int
    vocabulary: int


def sizes_of(profile: Profile, architecture: str) -> Sizes:
    """Count the weights of an architecture without loading any.

    Raises:
        PlanError: its configuration is not at hand.
    """
    name = profile.reference.models[architecture]
    config = _config(name, architecture, profile.reference.width)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(one.numel() for one in {id(p): p for p in model.parameters()}.values())
    lora = profile.policies.training[architecture].lora
    trained = weights
    if lora is not None:
        linear = [one for one in model.modules() if isinstance(one, torch.nn.Linear)]
        targets = [one for one in linear if one.out_features != config.vocab_size]
        if lora.target_modules is None:  # peft's choice: queries and values
            named = dict(model.named_modules())
            targets = [one for key, one in named.items() if key.endswith(("q_proj", "v_proj"))]
        trained = sum(lora.r * (one.in_features + one.out_features) for one in targets)
    layers, width = config.num_hidden_layers, config.hidden_size
    return Sizes(weights, trained, layers, width, config.vocab_size)


def _config(name: str, architecture: str, width: int) -> PretrainedConfig:
    if name == "tiny":
        return tiny_config(architecture, width)  # type: ignore[arg-type]
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PlanError(
            f"reference.models.{architecture}: {name} is not at hand: {first}"
        ) from None


# --- memory -------------------------------------------------------------------------------------------


def stack_bytes(sizes: Sizes, training: PolicyTraining, policies: int, tokens: int) -> int:
    """Return about how much memory a stack takes in training.

    The reference, then for each policy weights, gradients and Adam's moments, and what a mini-batch keeps
    for its backward pass: activations, and logits with their gradients.

    Args:
        sizes: of a policy.
        training: its settings.
        policies: in the stack.
        tokens: of prompt and response.
    """
    rows = training.ppo.mini_batch_size * policies
    kept = rows * tokens * (sizes.layers * sizes.width * ACTIVATIONS + 3 * FLOAT * sizes.vocabulary)
    trained = policies * sizes.trained * (2 * FLOAT + ADAM)
    base = sizes.weights * (FOUR_BITS if training.lora and training.lora.four_bit else FLOAT)
    return int(base + trained + kept)


def available_bytes() -> int:
    """Return the memory that a stack may take here: a GPU's, else the machine's."""
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    with suppress(OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * 2**30


def fitting(sizes: Sizes, training: PolicyTraining, policies: int, tokens: int, room: int) -> int:
    """Return how many of a number of policies fit into memory together, 0 if not even one does."""
    for size in range(policies, 0, -1):
        if stack_bytes(sizes, training, size, tokens) <= HEADROOM * room:
            return size
    return 0


# --- the plan -----------------------------------------------------------------------------------------


def planned(profile: Profile, store: RunStore, seed: int) -> pd.DataFrame:
    """Return a row for every run of policies that a profile asks for.

    Columns: `run`, `state` (`done`, `published` or `to do`), `policies`, `steps`, `responses` that are
    judged, `calls` to a paid judge at most (a text is asked for once), `seconds` of one worker,
    `together` (policies that fit into memory), `gigabytes` (of memory, for those), `disk` in gigabytes.

    Raises:
        PlanError: a model's configuration is not at hand.
    """
    runs = plan(profile.policies.runs)
    done = _done(store, profile, seed, runs)
    shown = published(profile, seed)
    costs = shown.runs.set_index("run")["seconds"].to_dict() if len(shown.runs) else {}
    own = profile.name == "embedded"
    rows = []
    for run in runs:
        taken = run.name in shown.names and not own
        state = "done" if run in done else "published" if taken else "to do"
        rows.append({"run": run.name, "state": state} | _amounts(profile, run, costs.get(run.name)))
    return pd.DataFrame(rows)


def _done(store: RunStore, profile: Profile, seed: int, runs: Sequence[Run]) -> set[Run]:
    kept, found = RunStore(store.root, reads_only=True), set()
    for run in runs:
        with suppress(NotKeptError):
            train_run(kept, profile, seed, run)
            found.add(run)
    return found


def _amounts(profile: Profile, run: Run, known_seconds: float | None) -> dict[str, object]:
    sizes, training = (
        sizes_of(profile, run.architecture),
        profile.policies.training[run.architecture],
    )
    settings, count = training.settings(run.objective), profile.policies.count
    tokens = PROMPT_TOKENS + profile.policies.sampling.max_new_tokens
    asked = profile.policies.evaluation.prompts * profile.policies.evaluation.samples * count
    steps = 0
    if run.objective != REFERENCE:
        attempts = ATTEMPTS if run.matched else 1
        steps = settings.iterations * attempts
        asked = asked * attempts + profile.policies.warm_up + steps * settings.batch_size * count
    paid = run.source in profile.policies.judges
    together = fitting(sizes, training, count, tokens, available_bytes())
    # a token costs 2 weights forward: written, scored by itself and the reference; then 6 in each epoch
    arithmetic = asked * tokens * sizes.weights * (6.0 + 6.0 * settings.ppo_epochs * (steps > 0))
    seconds = known_seconds if known_seconds == known_seconds and known_seconds else None
    return {
        "policies": count,
        "steps": steps,
        "responses": asked,
        "calls": asked if paid else 0,
        "seconds": seconds or arithmetic / (EFFICIENCY * flops()),
        "together": together,
        "gigabytes": stack_bytes(sizes, training, max(together, 1), tokens) / 1e9,
        "disk": ((count if steps else 0) * sizes.trained * (FLOAT + ADAM) + sizes.weights * FLOAT)
        / 1e9,
    }


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
        shown["hours"] = shown.pop("seconds") / 3600
        lines.append(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
        lines.append(
            f"together: {left['policies'].sum()} policies, {left['steps'].sum()} steps, "
            f"{left['responses'].sum():,} responses to judge, at most {left['calls'].sum():,} paid "
            f"calls, about {left['seconds'].sum() / 3600 / max(workers, 1):.3g} hours with "
            f"{workers} at a time, about {left['disk'].sum():.3g} GB on disk"
        )
    return "\n".join(lines)


# --- what is missing ----------------------------------------------------------------------------------


def missing_policies(profile: Profile) -> list[str]:
    """Return which models that policies start from are not at hand, each in a line."""
    models = {f"reference.models.{key}": name for key, name in profile.reference.models.items()}
    return [
        line
        for where, name in models.items()
        if name != "tiny"
        for line in _missing_model(where, name)
    ]


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
    found = [
        f"policies.judges.{name}: the environment variable {judge.key_variable} is not set"
        for name, judge in profile.policies.judges.items()
        if name in needed and not os.environ.get(judge.key_variable)
    ]
    if ENSEMBLE_ROW[1] in needed:
        names = {
            "reward_model.backbone": profile.reward_model.backbone,
            "true_reward": profile.true_reward,
        }
        for where, name in names.items():
            if name not in (TINY, "gold"):
                found += _missing_model(where, name)
    readers = {"policies.data": (profile.policies.data, read_prompts)}
    if ENSEMBLE_ROW[1] in needed:
        readers["reward_data.pairs"] = (profile.reward_data.pairs, read_pairs)
    for where, (name, read) in readers.items():
        if name != EMBEDDED:
            try:
                read(name)
            except (DataError, OSError) as error:
                found.append(f"{where}: {error}")
    for line in left[left["together"] == 0].drop_duplicates("gigabytes").to_dict("records"):
        found.append(
            f"{line['run']}: one policy needs about {line['gigabytes']:.3g} GB of memory, there are "
            f"{available_bytes() / 1e9:.3g}"
        )
    place = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    free = shutil.disk_usage(place).free / 1e9
    if left["disk"].sum() > free:
        found.append(
            f"{run_dir}: about {left['disk'].sum():.3g} GB are needed, {free:.3g} are free"
        )
    return found


def _missing_model(where: str, name: str) -> list[str]:
    try:
        AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        return [f"{where}: {name} is not at hand: {str(error).strip().splitlines()[0]}"]
    return []
