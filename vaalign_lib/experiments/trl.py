"""The experiment of notebook 09: PPO of this library, RLOO and GRPO of TRL, with and without variances.

It is made in the embedded world whatever the profile. All policies start from one tiny GPT-2, are asked
the same prompts and judged by the same simulated judge, whose answers are drawn anew for every query;
rewards and variances are in units of the reference policy's.
"""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.stats import ttest_1samp
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import JUDGES, METHODS
from vaalign_lib.experiments.policies import kl_of, questions_of
from vaalign_lib.experiments.references import reference
from vaalign_lib.jobs import report, run_jobs
from vaalign_lib.models import load_tokenizer, train_quietly
from vaalign_lib.policies.reference import ReferencePolicy, quiet_training
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Profile, Study, load_profile
from vaalign_lib.rewards.base import Array, Unit
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.statistics.tests import Estimate
from vaalign_lib.store import RunStore
from vaalign_lib.theory.tabular import exact_policy, grpo_fixed_point, ppo_fixed_point
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.matched_kl import MatchError, match_kl
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.run import embedded_task, policy_trainer
from vaalign_lib.training.trl import (
    VARIANCE,
    Penalty,
    VarianceAwareGRPOTrainer,
    VarianceAwareRLOOTrainer,
    reward_function,
)

ARCHITECTURE, JUDGE = "gpt2", JUDGES["judge-b"]
TRAINERS = {  # of TRL: configuration, stock, variance-aware
    "rloo": (RLOOConfig, RLOOTrainer, VarianceAwareRLOOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer, VarianceAwareGRPOTrainer),
}
ALGORITHMS = ("ppo", *TRAINERS)
# GRPO's are as near to the other two as its settings allow: rewards as they are, no division by lengths.
OPTIONS: dict[str, dict[str, Any]] = {"rloo": {}, "grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"}}
FACTORS = (0.3, 0.55, 1.0, 1.8, 3.3)  # of vanilla's coefficient, in the pilot of a search
ATTEMPTS, TOLERANCE = 4, 0.05  # of a search, and how near its KL is to come


@dataclass(frozen=True)
class Setting:
    """Policies of one algorithm and method, one for each seed.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        objective: one of `METHODS`.
        beta: of the KL penalty, as it acts; GRPO's configuration gets (G - 1) / G times that, for G
            completions to a prompt.
        policies: their numbers; policy k of every setting has the same random start.
    """

    algorithm: str
    objective: str
    beta: float
    policies: tuple[int, ...]


# --- the world ------------------------------------------------------------------------------------------


def in_the_world(profile: Profile) -> Profile:
    """Return a profile whose policies are tiny ones of the embedded world."""
    if profile.reference.models[ARCHITECTURE] == "tiny":
        return profile
    return load_profile("embedded").model_copy(update={"trl": profile.trl})


def task_of(profile: Profile, seed: int) -> Task:
    """Return prompts, judge and gold."""
    world = World(seed)
    return embedded_task(profile, stand_ins(world)[JUDGE], world)


def unit_of(profile: Profile, seed: int, start: Path) -> Unit:
    """Return what rewards and variances are measured in: the reference policy's, as in our PPO."""
    task = task_of(profile, seed)
    trainer = policy_trainer(
        profile, ARCHITECTURE, start, task, Method(), policies=[0], seed=seed, device="cpu"
    )
    return trainer.unit


# --- training and evaluation ----------------------------------------------------------------------------


def train_setting(study: Study, setting: Setting) -> Path:
    """Return a folder with `policies.parquet`, a row for each policy as it is evaluated, and
    `log.parquet`, a row for each policy and step; trained now or before.
    """

    def write(folder: Path, **_: Any) -> None:
        train = _train_ppo if setting.algorithm == "ppo" else _train_trl
        start = reference(study, ARCHITECTURE)
        log, policies = train(study.profile, study.seed, setting, start)
        policies.to_parquet(folder / "policies.parquet")
        log.to_parquet(folder / "log.parquet")

    settings = study.profile.model_dump(include={"trl", "policies", "reference"})
    for name in ("seeds", "matched_kl", "one_token_steps"):
        del settings["trl"][name]
    for name in ("runs", "judges", "data", "matching"):
        del settings["policies"][name]
    settings["policies"]["training"] = settings["policies"]["training"][ARCHITECTURE]
    config = {"setting": asdict(setting), "seed": study.seed, "settings": settings}
    name = f"{setting.algorithm}-{setting.objective.replace('_', '-')}"
    return study.store.folder(name, write, config)


def _train_ppo(
    profile: Profile, seed: int, setting: Setting, start: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    sizes, task = profile.trl, task_of(profile, seed)
    trainer = policy_trainer(
        profile, ARCHITECTURE, start, task, Method(setting.objective, beta=setting.beta),
        policies=setting.policies, seed=seed, device="cpu", iterations=sizes.steps,
        batch_size=sizes.completions, mini_batch_size=sizes.completions, ppo_epochs=1,
        learning_rate=sizes.learning_rate,
    )  # fmt: skip
    log = trainer.train()[["policy", "step", "reward", "kl"]]
    report(len(setting.policies))
    return log, _evaluated(profile, seed, start, trainer.stack, setting.policies)


def _train_trl(
    profile: Profile, seed: int, setting: Setting, start: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    unit, logs, tables = unit_of(profile, seed, start), [], []
    for policy in setting.policies:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = trl_trainer(profile, seed, setting, start, unit, policy, scratch)
            train_quietly(trainer, f"{setting.algorithm}, {setting.objective}")
        lines = pd.DataFrame([one for one in trainer.state.log_history if "reward" in one])
        length = lines["completions/mean_length"]
        kl = lines["kl"] * length if "kl" in lines else np.nan  # trl logs it by token
        logs.append(lines[["step", "reward"]].assign(kl=kl, policy=policy))
        stack = PolicyStack(trainer.model, 1)
        tables.append(_evaluated(profile, seed, start, stack, [policy]))
        report(1)
    return pd.concat(logs, ignore_index=True), pd.concat(tables, ignore_index=True)


def trl_trainer(
    profile: Profile, seed: int, setting: Setting, start: Path, unit: Unit, policy: int, folder: str
) -> Any:
    """Return TRL's trainer of one policy, stock or variance-aware."""
    sizes, how, task = profile.trl, profile.policies.sampling, task_of(profile, seed)
    config, stock, aware = TRAINERS[setting.algorithm]
    number = 1000 * seed + policy
    arguments = config(
        output_dir=folder,
        max_steps=sizes.steps,
        per_device_train_batch_size=sizes.completions,
        num_generations=sizes.generations,
        max_completion_length=how.max_new_tokens,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        generation_kwargs={"min_new_tokens": how.min_new_tokens},
        learning_rate=sizes.learning_rate,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        beta=configured(setting.beta, setting.algorithm, sizes.generations),
        seed=number,
        **OPTIONS[setting.algorithm],
        **quiet_training() | {"logging_steps": 1},
    )
    rewards = reward_function(task.source, unit=unit, policy=policy, seed=number)
    prompts = [{"prompt": [{"role": "user", "content": one}]} for one in task.prompts]
    return (stock if setting.objective == "vanilla" else aware)(
        str(start),
        rewards,
        args=arguments,
        train_dataset=Dataset.from_list(prompts),
        processing_class=load_tokenizer(start),
    )


def configured(beta: float, algorithm: str, generations: int) -> float:
    """Return what a trainer's configuration needs for a coefficient to act (see `trl_trainers`)."""
    return beta * (generations - 1) / generations if algorithm == "grpo" else beta


def _evaluated(
    profile: Profile, seed: int, start: Path, stack: PolicyStack, policies: Sequence[int]
) -> pd.DataFrame:
    return _evaluator(profile, seed, start).policies(stack, list(policies))


def reference_gold(study: Study) -> float:
    """Return the gold reward of the policy that all start from, as they are evaluated."""
    start = reference(study, ARCHITECTURE)
    return float(_evaluator(study.profile, study.seed, start).references([0])["gold"][0])


def _evaluator(profile: Profile, seed: int, start: Path) -> Evaluator:
    sizes, asked = profile.policies, questions_of(profile, seed)
    compared = ReferencePolicy(AutoModelForCausalLM.from_pretrained(start))
    return Evaluator(
        compared,
        load_tokenizer(start),
        Task(asked.evaluation, task_of(profile, seed).source, asked.gold),
        sizes.sampling,
        sizes.evaluation.samples,
        seed,
    )


# --- the comparison -------------------------------------------------------------------------------------


def compare(study: Study, workers: int | str) -> list[tuple[Setting, Path]]:
    """Return both methods of every algorithm, each with its folder; with `matched_kl` the variance-aware
    coefficients are those that leave vanilla's KL.
    """
    reference(study, ARCHITECTURE)
    numbers = tuple(range(study.profile.trl.seeds))
    vanilla, aware = (
        [Setting(algorithm, one, study.profile.trl.beta, numbers) for algorithm in ALGORITHMS]
        for one in METHODS
    )
    alone = partial(_trained, study)
    if not study.profile.trl.matched_kl:
        return _in_workers(
            [partial(alone, one) for one in vanilla + aware], study.store, study.profile, workers
        )
    known = _in_workers([partial(alone, one) for one in vanilla], study.store, study.profile, workers)
    searches = [
        partial(_matched, study, one, kl_of(folder)) for one, (_, folder) in zip(aware, known, strict=True)
    ]
    return known + _in_workers(searches, study.store, study.profile, workers)


def _in_workers(
    jobs: Sequence[Callable[[], tuple[Setting, Path]]], store: RunStore, profile: Profile, workers: int | str
) -> list[tuple[Setting, Path]]:
    steps = len(jobs) * profile.trl.seeds
    done = run_jobs(dict(enumerate(jobs)), workers, steps, "policies", store.root)
    return list(done.values())


def _trained(study: Study, setting: Setting) -> tuple[Setting, Path]:
    return setting, train_setting(study, setting)


def _matched(study: Study, setting: Setting, target: float) -> tuple[Setting, Path]:
    """Return the setting whose policies end nearest to a KL: a pilot of two, then a few tries."""
    made: dict[float, Path] = {}

    def train(beta: float) -> float:
        made[beta] = train_setting(study, replace(setting, beta=beta))
        return kl_of(made[beta])

    betas = [factor * setting.beta for factor in FACTORS]
    few = replace(setting, policies=setting.policies[:2])
    kls = [kl_of(train_setting(study, replace(few, beta=one))) for one in betas]
    with suppress(MatchError):
        match_kl(train, betas, kls, target, ATTEMPTS, TOLERANCE)
    nearest = min(made, key=lambda beta: abs(kl_of(made[beta]) - target))
    return replace(setting, beta=nearest), made[nearest]


def together(found: Sequence[tuple[Setting, Path]], name: str) -> pd.DataFrame:
    """Return a table of all settings, `policies` or `log`, with their algorithm, objective and beta."""
    tables = [
        pd.read_parquet(folder / f"{name}.parquet").assign(
            algorithm=setting.algorithm, objective=setting.objective, beta=setting.beta
        )
        for setting, folder in found
    ]
    return pd.concat(tables, ignore_index=True)


def differences(policies: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Return variance-aware minus vanilla by algorithm and policy: `algorithm`, `policy`, `difference`.

    Args:
        policies: of `together`.
        measure: a column.
    """
    wide = policies.pivot(index=["algorithm", "policy"], columns="objective", values=measure)
    return (wide["variance_aware"] - wide["vanilla"]).rename("difference").reset_index()


def mean_difference(policies: pd.DataFrame, measure: str) -> Estimate:
    """Return the mean over algorithms of variance-aware minus vanilla, with its 95% t interval over
    policies; those of one number share their random start, so they are taken together.
    """
    each = differences(policies, measure).groupby("policy")["difference"].mean()
    tested = ttest_1samp(each, 0.0)
    low, high = tested.confidence_interval(0.95)
    return Estimate(float(each.mean()), float(low), float(high), len(each))


def kl_gap(policies: pd.DataFrame) -> float:
    """Return how far the methods' mean KLs are apart at most, relative to vanilla's, over algorithms."""
    kl = policies.groupby(["algorithm", "objective"])["kl"].mean().unstack()
    return float((kl["variance_aware"] / kl["vanilla"] - 1).abs().max())


# --- one token ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A variance-aware trainer and where it converges on one-token completions.

    Attributes:
        algorithm: `rloo` or `grpo`.
        penalty: of the trainer.
        corrected: GRPO's `use_bias_correction_kl`, TRL's default.
        solution: the policy that it converges to, from rewards, variances, reference and beta.
    """

    algorithm: str
    penalty: Penalty
    corrected: bool
    solution: Callable[..., Array]

    @property
    def name(self) -> str:
        plain = "" if self.corrected else ", uncorrected KL"
        return f"{self.algorithm.upper()}{plain}, {self.penalty}"


VARIANTS = (
    Variant("rloo", "detached", True, ppo_fixed_point),
    Variant("grpo", "detached", True, ppo_fixed_point),
    Variant("grpo", "detached", False, grpo_fixed_point),
    Variant("rloo", "exact", True, exact_policy),
    Variant("grpo", "exact", True, exact_policy),
)
WORDS, PROMPT, BETA = 8, "3", 0.5  # of the problem of one token


def one_token_problem(seed: int) -> tuple[Array, Array]:
    """Return rewards and variances of the eight completions."""
    random = np.random.default_rng(seed)
    return random.normal(0, 0.4, WORDS), random.choice([0.3, 2.0], WORDS)


def one_token_shares(
    variant: Variant, seed: int, steps: int, completions: int = 256, generations: int = 4
) -> tuple[Array, Array]:
    """Return the probabilities of the eight words before and after training (words,) each."""
    middle, variance = one_token_problem(seed)

    def reward(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
        log_extra(VARIANCE, [float(variance[ids[0]]) for ids in completion_ids])
        return [float(middle[ids[0]]) for ids in completion_ids]

    aware: Any
    config, _, aware = TRAINERS[variant.algorithm]
    options: dict[str, Any] = dict(OPTIONS[variant.algorithm])
    if variant.algorithm == "grpo":
        options["use_bias_correction_kl"] = variant.corrected
    options |= {"per_device_train_batch_size": completions, "num_generations": generations}
    options["beta"] = configured(BETA, variant.algorithm, generations)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _small_arguments(config, folder, seed, steps, **options)
        own = {"penalty": variant.penalty}
        trainer = _small_trainer(aware, folder, reward, arguments, seed, **own)
        before = _shares(trainer.model)
        train_quietly(trainer, variant.name)
    return before, _shares(trainer.model)


def equals_stock(algorithm: str, seed: int = 0, steps: int = 3) -> bool:
    """Whether variances that are all 1 give the weights of TRL's own trainer, bit by bit."""

    def reward(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
        log_extra(VARIANCE, [1.0] * len(completion_ids))
        return [float(sum(ids)) for ids in completion_ids]

    config, *classes = TRAINERS[algorithm]
    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 3}
    ends = []
    for kind in classes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = _small_arguments(config, folder, seed, steps, **options)
            trainer = _small_trainer(kind, folder, reward, arguments, seed)
            train_quietly(trainer, f"{algorithm} with equal variances")
        ends.append(list(trainer.model.parameters()))
    return all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def _small_arguments(config: Any, folder: str, seed: int, steps: int, **options: Any) -> Any:
    quiet = quiet_training() | {"logging_steps": steps}
    basic = {"max_completion_length": 1, "learning_rate": 1e-2, "beta": BETA, "seed": seed}
    return config(output_dir=folder, max_steps=steps, **quiet | basic | options)


def _small_trainer(kind: Any, folder: str, reward: Any, arguments: Any, seed: int, **options: Any) -> Any:
    """Return a trainer of a random GPT-2 of eight words, which is saved into its folder."""
    tokenizer = _small_model(folder, seed)
    data = Dataset.from_dict({"prompt": [PROMPT] * 1024})  # more than a batch takes
    return kind(folder, reward, args=arguments, train_dataset=data, processing_class=tokenizer, **options)


def _small_model(folder: str, seed: int) -> PreTrainedTokenizerBase:
    """Save a random GPT-2 of eight words into a folder, and return its tokenizer."""
    words = Tokenizer(models.WordLevel({str(k): k for k in range(WORDS)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=WORDS, **size, **none, **ends)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def _shares(model: Any) -> Array:
    logits = model(torch.tensor([[int(PROMPT)]])).logits[0, 0]
    return np.asarray(logits.double().softmax(0).numpy())


def one_token_ends(seed: int, steps: int, workers: int, folder: Path) -> pd.DataFrame:
    """Train every variant on one token.

    Returns:
        A row for each variant and word: `trainer`, `word`, `reward`, `variance`, `reference`, `trained`,
        and the three solutions, `detached`, `uncorrected` and `exact`, in `expected` the variant's own.
    """
    jobs = {one: partial(one_token_shares, one, seed, steps) for one in VARIANTS}
    ends = run_jobs(jobs, workers, 0, "trainers on one token", folder)
    middle, variance = one_token_problem(seed)
    tables = []
    for variant, (before, after) in ends.items():
        problem = (middle, variance, before, BETA)
        tables.append(
            pd.DataFrame(
                {
                    "trainer": variant.name,
                    "word": range(WORDS),
                    "reward": middle,
                    "variance": variance,
                    "reference": before,
                    "trained": after,
                    "expected": variant.solution(*problem),
                    "detached": ppo_fixed_point(*problem),
                    "uncorrected": grpo_fixed_point(*problem),
                    "exact": exact_policy(*problem),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def distances(ends: pd.DataFrame) -> pd.DataFrame:
    """Return each trainer's total variation distance to its own solution and to the nearest other."""
    rows = []
    for trainer, one in ends.groupby("trainer", sort=False):
        found = {
            name: 0.5 * (one["trained"] - one[name]).abs().sum()
            for name in ("detached", "uncorrected", "exact")
        }
        own = 0.5 * (one["trained"] - one["expected"]).abs().sum()
        others = [value for value in found.values() if value != own]
        start = 0.5 * (one["reference"] - one["expected"]).abs().sum()
        rows.append({"trainer": trainer, "own": own, "other": min(others), "start": start})
    return pd.DataFrame(rows)
