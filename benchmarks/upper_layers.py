"""Adapters in the upper layers of a pretrained model: a stack of policies beside trl's RLOOTrainer.

Both train the same adapters of the same model on the same prompts, responses of as many tokens and batches of
as many responses, in turn, in one process with one thread. `make pretrained` makes the model.

    python benchmarks/upper_layers.py [--policies 16] [--rounds 2] [--prompt-tokens 46] [--profile pretrained]

Prints core-seconds per policy and step of both (median over alternating rounds), their ratio, the products
that a policy's step takes, counted, and the share of the matmul limit, which is measured in every round.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import RLOOConfig, RLOOTrainer

from vaalign_lib.data.pairs import read_prompts
from vaalign_lib.jobs import silence_libraries
from vaalign_lib.models import load_tokenizer, prompt_ids
from vaalign_lib.profiles import Profile, load_profile
from vaalign_lib.rewards.base import Interval
from vaalign_lib.trainers import quiet_training
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer
from vaalign_lib.training.run import lora_config, policy_trainer


class Vowels:
    """Rewards a response by its vowels, for an answer that takes no time."""

    def judge(self, prompts: list[str], responses: list[str], policy: object) -> Interval:
        middle = np.array([sum(letter in "aeiou" for letter in one) / 10 for one in responses])
        return Interval(np.stack((middle - 1, middle + 1), axis=1))

    def true_reward(self, judgement: Interval, prompts: list[str], responses: list[str]) -> np.ndarray:
        return judgement.midpoint()


def prompts_of(profile: Profile, tokenizer: PreTrainedTokenizerBase, most: int) -> list[str]:
    """Return prompts of at most so many tokens."""
    texts = list(read_prompts(profile.policies.data)["prompt"][:2000])
    lengths = map(len, prompt_ids(tokenizer, texts, 10**6))
    return [text for text, length in zip(texts, lengths, strict=True) if length <= most][:512]


def stack_of(profile: Profile, prompts: list[str], policies: int) -> Trainer:
    """Return the trainer of a stack, with few responses to start the critic from."""
    sizes = profile.policies.model_copy(update={"warm_up": 32})
    small = profile.model_copy(update={"policies": sizes})
    model = profile.reference.models["llama"]
    return policy_trainer(small, "llama", model, Task(prompts, Vowels()), Method(), policies=range(policies))


def steps_of_trl(profile: Profile, prompts: list[str], folder: str) -> Callable[[], object]:
    """Return a function that takes a step of trl's trainer on one policy."""
    training, sampling = profile.policies.training["llama"], profile.policies.sampling
    name = profile.reference.models["llama"]
    assert training.lora is not None
    half = torch.bfloat16 if training.lora.sixteen_bit else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=half)
    ppo = training.ppo
    arguments = RLOOConfig(
        folder,
        per_device_train_batch_size=ppo.mini_batch_size,
        gradient_accumulation_steps=ppo.batch_size // ppo.mini_batch_size,
        num_generations=2,
        max_completion_length=sampling.max_new_tokens,
        beta=ppo.init_kl_coef,
        temperature=sampling.temperature,
        learning_rate=ppo.learning_rate,
        max_steps=1,
        gradient_checkpointing=False,
        **quiet_training() | {"bf16": training.precision == "bfloat16"},
    )
    trainer = RLOOTrainer(
        get_peft_model(model, lora_config(training.lora)),
        lambda completions, **_: [float(len(one[0]["content"])) for one in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": one}]} for one in prompts]),
        processing_class=load_tokenizer(name),
    )
    return trainer.train


def seconds(function: Callable[[], object]) -> float:
    """Return the process seconds that a call takes."""
    started = time.process_time()
    function()
    return time.process_time() - started


def matmul_limit(dtype: torch.dtype) -> float:
    """Return the operations per second of a large product, the best of several."""
    one = torch.randn(1024, 1024).to(dtype)
    return 2 * 1024**3 / min(seconds(lambda: one @ one) for _ in range(8))


def operations(one: Trainer, prompt: int, length: float) -> float:
    """Return the multiplications and additions of products that one policy's step takes.

    Of prompts of so many tokens the common beginning is read once by a policy, the rest and the responses by
    every row: below once, above when it is written, by the reference and, forward and backward (towards the
    states alone), in each epoch. The output layer sees tokens of responses. Attention's own products and the
    adapters' are left out.
    """
    config, settings = one.stack.config, one.settings
    layers = dict(one.stack.model.base_model.layers.named_modules())
    linear = [m for m in layers.values() if isinstance(m, torch.nn.Linear)]
    layer = 2 * sum(m.weight.numel() for m in linear) / config.num_hidden_layers
    below, above = one.stack.frozen * layer, (config.num_hidden_layers - one.stack.frozen) * layer
    head = 2 * config.vocab_size * config.hidden_size
    rows, written = settings.batch_size, one.sampling.max_new_tokens
    first = one._prompts.beginning().shape[1] if one.stack.shares_beginnings else 0
    updates = settings.ppo_epochs * settings.batch_size / settings.mini_batch_size
    tokens = rows * (prompt - first + written)
    total = tokens * below + (tokens + first) * above + rows * written * head  # written
    total += tokens * above + rows * length * head  # reference
    again = settings.ppo_epochs * (tokens * above + rows * length * head) + updates * first * above
    return total + 2 * again + (one.stack.dtype != torch.float32) * (tokens * above + rows * length * head)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--profile", default="pretrained")
    parser.add_argument("--policies", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=46)
    options = parser.parse_args()
    torch.set_num_threads(1)
    silence_libraries()
    profile = load_profile(options.profile)
    prompts = prompts_of(profile, load_tokenizer(profile.reference.models["llama"]), options.prompt_tokens)
    stack = stack_of(profile, prompts, options.policies)
    found: dict[str, list[float]] = {"stack": [], "trl": [], "limit": [], "length": []}
    with tempfile.TemporaryDirectory() as folder:
        trl_step = steps_of_trl(profile, prompts, folder)
        for k in range(options.rounds + 1):
            started = time.process_time()
            log = stack.step()
            own = (time.process_time() - started) / options.policies
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            row = {"stack": own, "trl": seconds(trl_step), "limit": matmul_limit(stack.stack.dtype)}
            row["length"] = float(log["length"].mean())
            print(f"{'warm-up' if k == 0 else 'round'}: " + ", ".join(f"{n} {v:.4g}" for n, v in row.items()))
            if k:
                found = {name: [*values, row[name]] for name, values in found.items()}
    ours, theirs, limit, length = (statistics.median(values) for values in found.values())
    work = operations(stack, stack._prompts.ids.shape[1], length)
    each = "core-seconds a policy and step"
    print(f"matmul limit {limit / 1e9:.0f} GFLOP/s; {work / 1e9:.0f} GFLOP a policy and step")
    print(f"{options.policies} policies: {ours:.2f} {each}, {work / ours / limit:.0%} of the limit")
    print(f"trl: {theirs:.2f} {each}, {theirs / ours:.1f} times as many")
    print(f"peak memory {memory:.2f} GiB, of both together")


if __name__ == "__main__":
    sys.exit(main())
