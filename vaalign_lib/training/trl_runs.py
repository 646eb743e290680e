"""Notebook 09's policies in training: PPO of this library, RLOO and GRPO of TRL, and both on one token."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from vaalign_lib.jobs import report
from vaalign_lib.models import load_tokenizer
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Profile
from vaalign_lib.rewards.base import Array, Unit
from vaalign_lib.trainers import quiet_training, train_quietly
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.one_token import (
    BETA,
    PROMPT,
    one_token_policy,
    one_token_problem,
    one_token_tokenizer,
)
from vaalign_lib.training.ppo import Trainer
from vaalign_lib.training.run import policy_trainer
from vaalign_lib.training.trl import (
    VARIANCE,
    Penalty,
    VarianceAwareGRPOTrainer,
    VarianceAwareRLOOTrainer,
    reward_function,
)

ARCHITECTURE = "gpt2"
TRAINERS: dict[str, tuple[Any, Any, Any]] = {  # of TRL: configuration, stock, variance-aware
    "rloo": (RLOOConfig, RLOOTrainer, VarianceAwareRLOOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer, VarianceAwareGRPOTrainer),
}
# GRPO's are as near to the other two as its settings allow: rewards as they are, no division by lengths.
OPTIONS: dict[str, dict[str, Any]] = {"rloo": {}, "grpo": {"scale_rewards": "none", "loss_type": "dr_grpo"}}


@dataclass(frozen=True)
class Setting:
    """Policies of one algorithm and method, one for each seed."""

    algorithm: str  # `ppo` or one of `TRAINERS`
    objective: str  # `vanilla` or `variance_aware`
    beta: float  # of the KL penalty, as it acts (see `configured`)
    policies: tuple[int, ...]  # their numbers; policy k of every setting has the same random start


@dataclass(frozen=True)
class Setup:
    """What the policies of all settings share."""

    profile: Profile
    seed: int  # of the study
    start: Path  # folder of the policy that all start from
    task: Task  # prompts, judge and gold of training
    evaluation: Task  # the same of the evaluation

    @cached_property
    def unit(self) -> Unit:
        """What rewards and variances are measured in: the reference policy's, as in our PPO."""
        return self.ppo_trainer(Method(), [0]).unit

    def ppo_trainer(self, method: Method, policies: Sequence[int], **changes: Any) -> Trainer:
        """Return this library's trainer of some policies."""
        where: dict[str, Any] = {"policies": policies, "seed": self.seed, "device": "cpu"}
        return policy_trainer(self.profile, ARCHITECTURE, self.start, self.task, method, **where, **changes)

    @cached_property
    def evaluator(self) -> Evaluator:
        """What evaluates the policies of all settings, on the same prompts."""
        sizes = self.profile.policies
        compared = ReferencePolicy(AutoModelForCausalLM.from_pretrained(self.start))
        tokenizer, samples = load_tokenizer(self.start), sizes.evaluation.samples
        return Evaluator(compared, tokenizer, self.evaluation, sizes.sampling, samples, self.seed)


def write_policies(folder: Path, setup: Setup, setting: Setting) -> None:
    """Train and evaluate the policies of a setting; write `policies.parquet`, a row for each policy as it
    is evaluated, and `log.parquet`, a row for each policy and step.
    """
    train = _train_ppo if setting.algorithm == "ppo" else _train_trl
    log, policies = train(setup, setting)
    policies.to_parquet(folder / "policies.parquet")
    log.to_parquet(folder / "log.parquet")


def _train_ppo(setup: Setup, setting: Setting) -> tuple[pd.DataFrame, pd.DataFrame]:
    sizes, policies = setup.profile.trl, list(setting.policies)
    ppo: dict[str, Any] = dict.fromkeys(("batch_size", "mini_batch_size"), sizes.completions)
    ppo |= {"ppo_epochs": 1, "iterations": sizes.steps, "learning_rate": sizes.learning_rate}
    trainer = setup.ppo_trainer(Method(setting.objective, beta=setting.beta), policies, **ppo)
    log = trainer.train()[["policy", "step", "reward", "kl"]]
    report(len(policies))
    return log, setup.evaluator.policies(trainer.stack, policies)


def _train_trl(setup: Setup, setting: Setting) -> tuple[pd.DataFrame, pd.DataFrame]:
    logs, tables = [], []
    for policy in setting.policies:
        with tempfile.TemporaryDirectory() as scratch:
            trainer = trl_trainer(setup, setting, policy, scratch)
            train_quietly(trainer, f"{setting.algorithm}, {setting.objective}")
        logs.append(training_log(trainer).assign(policy=policy)[["step", "reward", "kl", "policy"]])
        tables.append(setup.evaluator.policies(PolicyStack(trainer.model, 1), [policy]))
        report(1)
    return pd.concat(logs, ignore_index=True), pd.concat(tables, ignore_index=True)


def training_log(trainer: Any) -> pd.DataFrame:
    """Return what a trainer of TRL has logged, a row for each step, `kl` of whole completions in nats."""
    lines = pd.DataFrame([one for one in trainer.state.log_history if "reward" in one])
    return lines.assign(kl=lines.get("kl", np.nan) * lines["completions/mean_length"])  # trl's is by token


def trl_trainer(setup: Setup, setting: Setting, policy: int, folder: str) -> Any:
    """Return TRL's trainer of one policy, stock or variance-aware."""
    config, stock, aware = TRAINERS[setting.algorithm]
    seed = 1000 * setup.seed + policy
    return (stock if setting.objective == "vanilla" else aware)(
        str(setup.start),
        reward_function(setup.task.source, unit=setup.unit, policy=policy, seed=seed),
        args=config(folder, **trl_options(setup.profile, setting), seed=seed),
        train_dataset=conversations(setup.task.prompts),
        processing_class=load_tokenizer(setup.start),
    )


def trl_options(profile: Profile, setting: Setting) -> dict[str, Any]:
    """Return the settings of a profile as TRL's configurations name them."""
    sizes, sampling = profile.trl, profile.policies.sampling
    return {
        "max_steps": sizes.steps,
        "learning_rate": sizes.learning_rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "max_completion_length": sampling.max_new_tokens,
        "generation_kwargs": {"min_new_tokens": sampling.min_new_tokens},
        **sampling.model_dump(include={"temperature", "top_k", "top_p"}),
        **_groups(setting.algorithm, setting.beta, sizes.completions, sizes.generations),
        **quiet_training() | {"logging_steps": 1},
    }


def _groups(algorithm: str, beta: float, completions: int, generations: int) -> dict[str, Any]:
    """Return what decides how completions to a prompt are compared, and the coefficient."""
    sizes = {"per_device_train_batch_size": completions, "num_generations": generations}
    return sizes | OPTIONS[algorithm] | {"beta": configured(beta, algorithm, generations)}


def conversations(prompts: Sequence[str]) -> Dataset:
    """Return prompts as TRL takes them."""
    return Dataset.from_list([{"prompt": [{"role": "user", "content": one}]} for one in prompts])


def configured(beta: float, algorithm: str, generations: int) -> float:
    """Return what a trainer's configuration needs for a coefficient to act: in GRPO (G - 1) / G times
    that, for G completions to a prompt.
    """
    return beta * (generations - 1) / generations if algorithm == "grpo" else beta


# --- one token ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """A variance-aware trainer and where it converges on one-token completions."""

    algorithm: str  # one of `TRAINERS`
    penalty: Penalty  # of the trainer
    solution: Callable[..., Array]  # where it converges to, from rewards, variances, reference and beta
    corrected: bool = True  # GRPO's `use_bias_correction_kl`, TRL's default

    @property
    def name(self) -> str:
        plain = "" if self.corrected else ", uncorrected KL"
        return f"{self.algorithm.upper()}{plain}, {self.penalty}"


def one_token_shares(
    variant: Variant, seed: int, steps: int, completions: int = 256, generations: int = 4
) -> tuple[Array, Array]:
    """Return the probabilities of the eight words before and after training (words,) each."""
    middle, variance = one_token_problem(seed)

    def reward(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
        log_extra(VARIANCE, [float(variance[ids[0]]) for ids in completion_ids])
        return [float(middle[ids[0]]) for ids in completion_ids]

    options = _groups(variant.algorithm, BETA, completions, generations)
    options |= {} if variant.corrected else {"use_bias_correction_kl": False}
    kind = partial(TRAINERS[variant.algorithm][2], penalty=variant.penalty)
    before, after = _small_training(variant.algorithm, kind, reward, seed, steps, **options)
    return _shares(before), _shares(after)


def equals_stock(algorithm: str) -> bool:
    """Whether variances of 1 give the weights of TRL's own trainer after three steps, bit by bit."""

    def reward(completion_ids: list[list[int]], log_extra: Any, **_: Any) -> list[float]:
        log_extra(VARIANCE, [1.0] * len(completion_ids))
        return [float(sum(ids)) for ids in completion_ids]

    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 3}
    ends = [_small_training(algorithm, one, reward, 0, 3, **options)[1] for one in TRAINERS[algorithm][1:]]
    weights = (model.parameters() for model in ends)
    return all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def _small_training(
    algorithm: str, kind: Any, reward: Any, seed: int, steps: int, **options: Any
) -> tuple[Any, Any]:
    """Train the random GPT-2 of eight words by one kind of trainer; return it as it was and as it became."""
    small = {"max_completion_length": 1, "learning_rate": 1e-2, "beta": BETA, "seed": seed}
    small |= {"max_steps": steps, "logging_steps": steps}
    tokenizer, start = one_token_tokenizer(), one_token_policy(seed)
    data = Dataset.from_dict({"prompt": [PROMPT] * 1024})  # more than a batch takes
    with tempfile.TemporaryDirectory() as folder:
        start.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        arguments = TRAINERS[algorithm][0](folder, **quiet_training() | small | options)
        trainer = kind(folder, reward, args=arguments, train_dataset=data, processing_class=tokenizer)
        train_quietly(trainer, f"{algorithm} on few words")
    return start, trainer.model


@torch.no_grad()
def _shares(model: Any) -> Array:
    logits = model(torch.tensor([[int(PROMPT)]])).logits[0, 0]
    return np.asarray(logits.double().softmax(0).numpy())
