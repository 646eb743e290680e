"""The experiment of notebook 04: policies of each condition, trained or looked up in the run store."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import EMBEDDED, prompts_of
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.attributes import PRIOR, urmes_of_policies
from vaalign_lib.experiments.conditions import (
    ENSEMBLES,
    HEADS_ROW,
    JUDGES,
    PEOPLE_ROW,
    PLACEBO,
    REFERENCE,
    URMES,
    Condition,
    method_of,
    sampling_of,
    stretch_of,
)
from vaalign_lib.experiments.people import heads_folder, heard_heads, heard_words
from vaalign_lib.experiments.references import reference, stack_seed
from vaalign_lib.experiments.reward_models import RewardStudy, prepare, reward_source, true_reward
from vaalign_lib.jobs import WORKER, device, report, run_jobs
from vaalign_lib.models import load_tokenizer
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.profiles import Profile, Study, load_profile, local_files
from vaalign_lib.rewards.attributes import AttributeHeads, AttributeReward
from vaalign_lib.rewards.base import RewardSource, Truth
from vaalign_lib.rewards.classifier import load_reward_model
from vaalign_lib.rewards.contrasts import Contrasts
from vaalign_lib.rewards.ensemble import EnsembleReward, load_ensemble
from vaalign_lib.rewards.heads import HeadKind
from vaalign_lib.rewards.judgements import JudgementStore
from vaalign_lib.rewards.placebo import Placebo
from vaalign_lib.rewards.prompted_judge import PromptedJudge, judge_prompt
from vaalign_lib.rewards.rated_heads import SmoothField
from vaalign_lib.rewards.raters import ExchangedWords, HeardWords
from vaalign_lib.rewards.simulated_judge import PersistentJudges, stand_ins
from vaalign_lib.store import (
    RECORD,
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
from vaalign_lib.training.run import ANSWERS, policy_trainer, with_gold, write_answers, write_stack

JUDGEMENTS = "judgements.sqlite"  # in the run folder: what prompted judges said
RATED = (PEOPLE_ROW[1], HEADS_ROW[1])  # sources that people's ratings make
SAMPLE = 4000  # responses of the reference that a placebo is fitted on, at most


@dataclass(frozen=True)
class PromptSets:
    """Prompts of training, prompts that returns are means over, and the reward behind all others."""

    training: list[str]
    evaluation: list[str]
    gold: Truth | None  # None where nobody knows it


def prompt_sets(profile: Profile, seed: int) -> PromptSets:
    """Return the prompts of a profile: of the embedded world, or of a data set.

    Of a data set training and evaluation take the same prompts, as in the paper.
    """
    sizes = profile.policies
    if sizes.data == EMBEDDED:
        world = World(seed)
        training = world.prompts(sizes.prompts, world.rng("policy prompts"))
        evaluation = world.prompts(sizes.evaluation.prompts, world.rng("evaluation prompts"))
        return PromptSets(training, evaluation, world.gold)
    prompts = prompts_of(sizes.data, max(sizes.prompts, sizes.evaluation.prompts))
    return PromptSets(prompts[: sizes.prompts], prompts[: sizes.evaluation.prompts], None)


def source_of(study: Study, condition: Condition) -> RewardSource:
    """Return what judges a condition's policies, made now or before.

    Raises:
        ValueError: the condition needs what only the embedded world has.
    """
    if condition.source in ENSEMBLES:
        ensemble = load_ensemble(ensemble_folder(study, condition), true_reward(_reward_study(study)))
        return ensemble if condition.source == "ensemble" else Contrasts(ensemble)
    if condition.source in URMES:
        return urmes(study, condition)
    if condition.source in study.profile.policies.judges:
        return _prompted_judge(study, condition)
    if condition.source in RATED:
        return _rated_source(study, condition)
    if study.profile.policies.data != EMBEDDED:
        raise ValueError(
            f"policies.judges: {condition.source} is simulated in the embedded world only; "
            "name a model for it"
        )
    world = World(study.seed, condition.disagreement)
    judge = stand_ins(world, float(condition.highest), stretch_of(condition))[JUDGES[condition.source]]
    source: RewardSource = judge
    if condition.protocol == "independent":
        seed = stack_seed(study.seed, condition.repeat)
        source = PersistentJudges(judge, world.features, seed, judge.length_scale)
    return Placebo(source, world, study.seed) if condition.objective == PLACEBO else source


def _rated_source(study: Study, condition: Condition) -> RewardSource:
    """Return what people's ratings make: heard words or heads; placebos go by what the reference writes."""
    if study.profile.raters is None:
        raise ValueError(f"raters: {condition.name} is judged by people; name what they rated")
    seed = stack_seed(study.seed, condition.repeat)
    words = condition.source == PEOPLE_ROW[1]
    source = heard_words(study, seed) if words else heard_heads(study, seed, study.profile.policies.count)
    if condition.objective != PLACEBO:
        return source
    written = pd.read_parquet(_stack(study, condition.start) / ANSWERS)["answer"]
    if isinstance(source, HeardWords):
        return ExchangedWords(source, source.uses(written.tolist()))
    return SmoothField(source, tuple(written.unique()[:SAMPLE]), seed)


def _prompted_judge(study: Study, condition: Condition) -> PromptedJudge:
    """Return the judge of a condition behind its endpoint; all it says is recorded beside the store."""
    if condition.protocol != "shared" or condition.widths != "rescaled" or condition.disagreement != "none":
        raise ValueError(
            f"{condition.name}: only simulated judges can be independent, stretched, or disagree elsewhere"
        )
    named = study.profile.policies.judges[condition.source]
    return PromptedJudge(
        JudgementStore(study.store.root.parent / JUDGEMENTS),
        model=named.model,
        base_url=named.base_url,
        key_variable=named.key_variable,
        highest=condition.highest,
        workers=named.requests,
        refusals_say_nothing=named.refusals_say_nothing,
        reply_tokens=named.reply_tokens,
    )


def _reward_study(study: Study) -> RewardStudy:
    """Return the reward models' study; part of the embedded pairs are the reference's responses."""
    embedded = study.profile.reward_data.pairs == EMBEDDED
    return prepare(study, reference=reference(study, "gpt2") if embedded else None)


def ensemble_folder(study: Study, condition: Condition) -> Path:
    """Return the folder of a condition's heads on one frozen backbone: ten, or ten for every policy.

    In the embedded world they are bootstrap heads trained to the end, elsewhere those of Table 7.
    """
    trained, independent = _reward_study(study), condition.protocol == "independent"
    kind: HeadKind = "bootstrap" if trained.embedded else "paper"
    repeat = condition.repeat if independent else 0

    def write(folder: Path, **_: Any) -> None:
        source = reward_source(trained, kind, independent=independent, repeat=repeat)
        assert isinstance(source, EnsembleReward)
        source.save(folder)

    settings = study.profile.ensembles.model_dump()
    config = {"independent": independent, "repeat": repeat, "settings": settings, "seed": study.seed}
    inputs, code = {"model": trained.reward_model}, ("vaalign_lib.rewards.ensemble",)
    return study.store.folder("ensemble", write, config, inputs, code)


def urmes(study: Study, condition: Condition) -> AttributeReward:
    """Return the URMEs of a condition's policies, with the one of their variances that are its weights."""
    trained = _reward_study(study)
    heads = load_file(urmes_folder(study, condition) / "heads.safetensors")
    return AttributeReward(
        *load_reward_model(trained.reward_model),
        AttributeHeads(**heads),
        PRIOR,
        members=study.profile.attributes.members,
        weighed_by=condition.source.removeprefix("urme-"),
        max_length=trained.settings.max_length,
        truth=true_reward(trained),
    )


def urmes_folder(study: Study, condition: Condition) -> Path:
    """Return the folder of value heads for a condition's policies, made now or before."""
    trained, sizes = _reward_study(study), study.profile.attributes
    seed = stack_seed(study.seed, condition.repeat)

    def write(folder: Path, **_: Any) -> None:
        heads = urmes_of_policies(trained, study.profile.policies.count, seed)
        save_file({"weight": heads.weight, "bias": heads.bias}, folder / "heads.safetensors")

    config = {"policies": study.profile.policies.count, "settings": sizes.model_dump(), "seed": seed}
    return study.store.folder(
        "urmes", write, config, {"model": trained.reward_model}, (urmes_of_policies.__module__,)
    )


# --- one condition --------------------------------------------------------------------------------------


def prerequisites(study: Study, conditions: Sequence[Condition]) -> None:
    """Make what conditions share, before they go to their workers."""
    for one in {(one.architecture, one.world): one for one in conditions}.values():
        reference(of_world(study, one), one.architecture)
    for one in conditions:
        if one.source in ENSEMBLES:
            ensemble_folder(of_world(study, one), one)
        if one.source == HEADS_ROW[1]:
            heads_folder(study, stack_seed(study.seed, one.repeat), study.profile.policies.count)
        if one.source in RATED and one.objective == PLACEBO:
            _stack(study, one.start)
        if one.source in URMES:
            urmes_folder(of_world(study, one), one)


def settings_key(profile: Profile, seed: int, condition: Condition) -> str:
    """Return the key of a condition's settings alone: published results stay valid when code changes that is
    not meant to change them.
    """
    return content_key(config=_config(profile, seed + condition.world, condition))


def _config(profile: Profile, seed: int, condition: Condition) -> dict[str, Any]:
    sections = {"reward_data", "reference", "reward_model", "ensembles", "policies", "true_reward"}
    settings = profile.model_dump(include=sections)
    del settings["policies"]["runs"]
    judge = settings["policies"].pop("judges").get(condition.source)
    if judge is not None:  # where and how it is asked changes nothing
        settings["policies"]["judge"] = [judge["model"], judge["refusals_say_nothing"]]
    if files := local_files(profile):
        settings["files"] = files
    run = {name: one for name, one in asdict(condition).items() if name != "world"}  # which the seed says
    return {"run": run, "seed": seed, "settings": settings}


def of_world(study: Study, condition: Condition) -> Study:
    """Return the study in the world of a condition, whose seed also draws its reference and its policies."""
    return replace(study, seed=study.seed + condition.world)


def train_run(study: Study, condition: Condition, target: float | None = None) -> Path:
    """Return the folder of a condition, trained and evaluated now or before.

    It holds `policies.parquet`, a row for each policy, `log.parquet`, a row for each policy and step,
    `resources.json`, and `policy`, the first policy as an ordinary checkpoint or adapter. What was killed
    goes on from its last checkpoint. `target` is the KL that `matched_kl` is to leave, by default vanilla's.
    """
    study = of_world(study, condition)
    return _matched_run(study, condition, target) if condition.matched else _stack(study, condition)


def _stack(study: Study, condition: Condition, beta: float | None = None) -> Path:
    """Train one stack with a coefficient, by default the profile's; in parts where it is too large."""
    method = None if condition.objective == REFERENCE else method_of(condition, beta)

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        if method is None:
            evaluator = evaluator_of(study, condition)
            table = evaluator.references(range(study.profile.policies.count)).assign(step_length=0.0)
            with_gold(table).to_parquet(folder / "policies.parquet")
            write_answers(folder, evaluator)
            return
        parts = _parts_of(study.profile, condition, scratch)
        if len(parts) == 1:
            _write_stack(folder, scratch, study, condition, method, parts[0])
            return

        def part(folder: Path, scratch: Path, first: int, end: int) -> None:
            _write_stack(folder, scratch, study, condition, method, range(first, end))

        kept = RunStore(scratch)  # until they are joined
        ends = [{"first": one.start, "end": one.stop} for one in parts]
        _join_parts(folder, [kept.resumable("part", part, one, code=_code(study, condition)) for one in ends])

    config = _computed_from(study, condition, method)
    return study.store.resumable(
        condition.name, write, config, _inputs(study, condition), _code(study, condition)
    )


def _computed_from(study: Study, condition: Condition, method: Method | None) -> dict[str, Any]:
    """Return the settings that a stack is computed from, with what its condition makes of them."""
    resolved = {
        "method": None if method is None else asdict(method),
        "changes": changes_of(study, condition),
        "sampling": sampling_of(study.profile, condition).model_dump(),
        "judge": [JUDGES.get(condition.source), stretch_of(condition), judge_prompt("", condition.highest)],
    }
    if study.profile.policies.data != EMBEDDED:  # else the world's code and the sizes say them
        asked = prompt_sets(study.profile, study.seed)
        resolved["prompts"] = [content_key(training=asked.training, evaluation=asked.evaluation)]
    return _config(study.profile, study.seed, condition) | resolved


def _inputs(study: Study, condition: Condition) -> dict[str, Path]:
    """Return the folders that a stack is computed from: the reference, and the ensemble if it has one."""
    inputs = {"reference": reference(study, condition.architecture)}
    if condition.source in ENSEMBLES:
        inputs["ensemble"] = ensemble_folder(study, condition)
    if condition.source == HEADS_ROW[1]:
        seed, count = stack_seed(study.seed, condition.repeat), study.profile.policies.count
        inputs["heads"] = heads_folder(study, seed, count)
    if condition.source in RATED and condition.objective == PLACEBO:
        inputs["start"] = _stack(study, condition.start)
    if condition.source in URMES:
        inputs["urmes"] = urmes_folder(study, condition)
    return inputs


def _code(study: Study, condition: Condition) -> tuple[str, ...]:
    """Return the modules that compute a stack: how policies are trained, and the source of their reward."""
    kind = "placebo" if condition.objective == PLACEBO else "simulated_judge"
    if condition.source in ENSEMBLES:
        kind = condition.source
    elif condition.source in URMES:
        kind = "attributes"
    elif condition.source in study.profile.policies.judges:
        kind = "prompted_judge"
    elif condition.source in RATED:
        kind = {PEOPLE_ROW[1]: "raters", HEADS_ROW[1]: "rated_heads"}[condition.source]
    return "vaalign_lib.training.run", "vaalign_lib.training.matched_kl", f"vaalign_lib.rewards.{kind}"


def _write_stack(
    folder: Path, scratch: Path, study: Study, condition: Condition, method: Method, policies: Sequence[int]
) -> None:
    trainer = trainer_of(study, condition, method, policies)
    wanted = study.profile.policies.evaluation.looks if condition.looked_at else []
    looks = [step for step in wanted if step < trainer.settings.iterations]  # then comes the end
    write_stack(folder, scratch, trainer, evaluator_of(study, condition, trainer), looks)


def _size_that_fits(profile: Profile, condition: Condition) -> int:
    """Return how many policies are trained together: all, or as many as fit into memory (else PlanError)."""
    count, training = profile.policies.count, profile.policies.training[condition.architecture]
    written, room = profile.policies.sampling.max_new_tokens, available_bytes(WORKER.together)
    sizes, beside = sizes_of(profile, condition.architecture), beside_bytes(profile, condition.source)
    if size := fitting(sizes, training, count, written, room - beside):
        return size
    needed = (stack_bytes(sizes, training, 1, written) + beside) / 1e9
    raise PlanError(
        f"{condition.name}: one policy needs about {needed:.3g} GB of memory, there are {room / 1e9:.3g}"
    )


def _parts_of(profile: Profile, condition: Condition, scratch: Path) -> list[range]:
    """Return which policies are trained together; what goes on elsewhere keeps its parts."""
    record, count = scratch / "together.json", profile.policies.count
    try:
        size = unsealed(record)["policies"]
    except DamagedError:  # or not there
        size = _size_that_fits(profile, condition)
        write_atomically(record, sealed({"policies": size}))
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def _join_parts(folder: Path, parts: Sequence[Path]) -> None:
    """Put a stack together from its parts."""
    for name in (one.name for one in parts[0].glob("*.parquet")):
        joined = pd.concat(pd.read_parquet(part / name) for part in parts)
        order = [one for one in ("step", "policy") if one in joined]
        joined.sort_values(order, ignore_index=True).to_parquet(folder / name)
    spent = [json.loads((part / "resources.json").read_text()) for part in parts]
    total = {name: sum(one[name] for one in spent) for name in ("training_seconds", "seconds", "policies")}
    total["peak_bytes"] = max(one["peak_bytes"] for one in spent)
    (folder / "resources.json").write_text(json.dumps(spent[0] | total, indent=1) + "\n")
    shutil.copytree(parts[0] / "policy", folder / "policy")


def _matched_run(study: Study, condition: Condition, target: float | None) -> Path:
    """Find the coefficient that leaves as much KL as vanilla has; keep the stack it was checked with."""

    def write(folder: Path, **_: Any) -> None:
        stacks: dict[float, Path] = {}

        def train(beta: float) -> float:
            if stacks:
                report(-_iterations(study.profile, condition))
            stacks[beta] = _stack(study, condition, beta)
            return kl_of(stacks[beta])

        matching = study.profile.policies.matching
        pilot = pd.read_parquet(pilot_run(study, condition) / "cells.parquet")
        wanted = kl_of(_stack(study, condition.vanilla)) if target is None else target
        known = pilot["beta"].tolist(), pilot["kl"].tolist()
        beta, attempts = match_kl(train, *known, wanted, matching.attempts, matching.tolerance)
        shutil.copytree(stacks[beta], folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORD))
        attempts.to_parquet(folder / "attempts.parquet")

    config = _computed_from(study, condition, method_of(condition, None))
    name, inputs, code = f"{condition.name}-chosen", _inputs(study, condition), _code(study, condition)
    return study.store.folder(name, write, config, inputs, code)


def pilot_run(study: Study, condition: Condition) -> Path:
    """Return the folder of a pilot for a kind of source: variance-aware policies, shared source, several
    coefficients in one stack; `cells.parquet` says what KL each leaves.
    """
    plain = condition.pilot
    settings = study.profile.policies.training[condition.architecture].settings("vanilla")
    matching = study.profile.policies.matching
    betas = [settings.init_kl_coef * factor for factor in matching.factors]
    repeats = max(1, min(matching.each, study.profile.policies.count // len(betas)))
    grid = Grid([settings.learning_rate], betas, repeats)

    method = grid.method("variance_aware")

    def write(folder: Path, scratch: Path, **_: Any) -> None:
        _write_stack(folder, scratch, study, plain, method, range(len(grid.cells)))
        policies = pd.read_parquet(folder / "policies.parquet").join(grid.cells["beta"])
        cells = policies.groupby("beta", as_index=False)[["kl", "true_reward", "gold"]].mean()
        cells.to_parquet(folder / "cells.parquet")

    config, name = _computed_from(study, plain, method), f"pilot-{plain.row}"
    return study.store.resumable(name, write, config, _inputs(study, plain), _code(study, plain))


def kl_of(folder: Path) -> float:
    """Return the mean KL of a condition's policies, as evaluated."""
    return float(pd.read_parquet(folder / "policies.parquet")["kl"].mean())


def trainer_of(study: Study, condition: Condition, method: Method, policies: Sequence[int]) -> Trainer:
    """Return the trainer of some of a condition's policies."""
    asked = prompt_sets(study.profile, study.seed)
    return policy_trainer(
        study.profile,
        condition.architecture,
        reference(study, condition.architecture),
        Task(
            asked.training, source_of(study, condition), asked.gold, population=study.profile.policies.count
        ),
        method,
        policies=policies,
        seed=stack_seed(study.seed, condition.repeat),
        device=device(),
        sampling=sampling_of(study.profile, condition),
        **changes_of(study, condition),
    )


def changes_of(study: Study, condition: Condition) -> dict[str, Any]:
    """Return the settings of PPO that a condition changes: as printed takes the paper's coefficients."""
    if not condition.printed or study.profile.policies.data != EMBEDDED:
        return {}
    printed = load_profile("paper").policies.training[condition.architecture].settings(condition.objective)
    changes = printed.model_dump(include={"init_kl_coef", "adaptive_kl"})
    if condition.regime == "as_printed":
        return changes
    rate = study.profile.policies.training[condition.architecture].gentle_rate
    if rate is None:
        raise ValueError(
            f"policies.training.{condition.architecture}.gentle_rate: {condition.name} needs one"
        )
    fixed = {"adaptive_kl": None} if condition.regime == "printed_fixed" else {}
    return changes | fixed | {"learning_rate": rate}


def evaluator_of(study: Study, condition: Condition, trainer: Trainer | None = None) -> Evaluator:
    """Return what evaluates a condition's policies; all answer the same prompts."""
    asked, where = prompt_sets(study.profile, study.seed), device()
    start = reference(study, condition.architecture)
    training = study.profile.policies.training[condition.architecture]
    if trainer is None:
        source, tokenizer = source_of(study, condition), load_tokenizer(start)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, device_map={"": where})
        compared = ReferencePolicy(model, training.precision)
    else:
        source, tokenizer, compared = trainer.task.source, trainer.tokenizer, trainer.reference
    return Evaluator(
        compared,
        tokenizer,
        Task(asked.evaluation, source, asked.gold),
        sampling_of(study.profile, condition),
        training.evaluation_samples or study.profile.policies.evaluation.samples,
        stack_seed(study.seed, condition.repeat),
        where,
        [] if condition.source in RATED else None,
    )


# --- all conditions -------------------------------------------------------------------------------------


def train_runs(
    study: Study,
    runs: Sequence[Condition],
    workers: int | str,
    published: Mapping[Condition, float] | None = None,
) -> dict[Condition, Path]:
    """Return the folder of every condition (Algorithm 3); what is not there yet is trained by workers:
    processes of this machine, or a dask scheduler at an address.

    What matches a KL comes after what it is matched to. `published` is the KL of conditions whose results are
    known already; they are not trained.
    """
    targets = published or {}
    runs = [condition for condition in runs if condition not in targets]
    folders: dict[Any, Path] = {}
    kept = Study(RunStore(study.store.root, reads_only=True), study.profile, study.seed)
    with read_once():
        for condition in runs:
            with suppress(NotKeptError):
                folders[condition] = train_run(kept, condition)
    missing = [condition for condition in runs if condition not in folders]
    prerequisites(study, missing)
    matched = [condition for condition in missing if condition.matched]
    first: dict[Any, Callable[[], Path]] = {
        one: partial(train_run, study, one) for one in missing if not one.matched
    }
    first |= {("pilot", one.pilot): partial(pilot_run, of_world(study, one), one.pilot) for one in matched}
    later = {
        condition: partial(train_run, study, condition, targets.get(condition.vanilla))
        for condition in matched
    }
    for jobs in (first, later):
        stacks = [name[1] if isinstance(name, tuple) else name for name in jobs]
        trained = [one for one in stacks if one.objective != REFERENCE]
        steps = sum(_iterations(study.profile, one) for one in trained)
        folders |= run_jobs(jobs, workers, steps, f"{len(trained)} stacks of policies", study.store.root)
    return {condition: folders[condition] for condition in runs}


def _iterations(profile: Profile, condition: Condition) -> int:
    return profile.policies.training[condition.architecture].settings(condition.objective).iterations
