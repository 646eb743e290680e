"""A tiny GPT-2 in TRL's own trainers: prompts and completions of a few words."""

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.small_problem import policy, tokenizer
from vaalign_lib.training.trl import VarianceAwareGRPOTrainer, VarianceAwareRLOOTrainer, with_variances

WORDS = 8
KINDS = {
    "rloo": (RLOOConfig, RLOOTrainer, VarianceAwareRLOOTrainer),
    "grpo": (GRPOConfig, GRPOTrainer, VarianceAwareGRPOTrainer),
}


def settings(kind, folder, **options):
    """Return a configuration of a few small steps on a CPU."""
    basic = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "beta": 0.3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
        "activation_checkpointing": False,
    }
    return KINDS[kind][0](**basic | options)


def rewards_of(variance=lambda ids: 1.0):
    """Return a reward function: high words are good, and each completion has a variance."""

    @with_variances
    def reward(prompts, completions, completion_ids, **_):
        return [float(sum(ids)) for ids in completion_ids], [variance(ids) for ids in completion_ids]

    return reward


def uneven(ids):
    """Return a variance that says of which completion it is."""
    return 0.1 + sum((k + 1) * word for k, word in enumerate(ids)) / 10


def prompts(count=32):
    return Dataset.from_dict({"prompt": [str(2 + k % 6) for k in range(count)]})


def start(folder, layers=1):
    """Save the policy that training begins from; TRL reads the reference policy from there too."""
    policy(WORDS, layers=layers).save_pretrained(folder)
    tokenizer(WORDS).save_pretrained(folder)
    return str(folder)


def make(kind, folder, stock=False, reward=None, model=None, penalty=None, **options):
    """Return a trainer, TRL's own or the variance-aware one."""
    chosen = KINDS[kind][1 if stock else 2]
    further = {} if penalty is None else {"penalty": penalty}
    peft = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    return chosen(
        model or start(folder / "start"),
        reward or rewards_of(),
        args=settings(kind, folder, **options),
        train_dataset=prompts(),
        processing_class=tokenizer(WORDS),
        **further,
        **peft,
    )


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
