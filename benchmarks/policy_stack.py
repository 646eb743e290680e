"""Policies per hour: a stack, a loop of stacks of one, and trl 0.11.4's PPOTrainer.

All train the embedded profile's gpt2-like model on one task with the same batches, epochs and tokens.
trl needs older packages and runs in an environment that the first run makes (about 2 GB):

    python benchmarks/policy_stack.py [--sizes 1,8,80] [--rounds 3] [--environment DIR | --without-trl]

Prints, for each N, process seconds per policy and step (median over alternating rounds), ratios, the
share of the machine's measured matmul limit, peak memory, and how time grows with N. One thread each; freed
memory stays with the process, as with workers (`jobs.ENVIRONMENT`).

Where a step of 80 goes (torch's profiler, two cores of an AVX2 server): products 36%, at half the speed of
large ones, for they read and write 17 MB for 0.2 GFLOP; attention 15%; log-softmax with its slopes and the
temperature 11%; gelu 6%; norms 4%; top-k 4%; 0.2 s are the same for every N (operations begun, transformers'
own Python). What was tried there:
- paid: keeping freed memory, 10% of the time (80,000 page faults a step). On two idle cores 32 ms a policy
  and step, 7.0 times trl, with it; 34 ms, 5.7 times, without (one run each; trl took 222 and 194 ms).
- did not: log-probabilities and their slopes in one function, a cache's worth of rows at a time (24.7
  against 24.6 ms); attention as products with kept shares (43 to 50 against 38 to 52 ms); updates of 20 or 40
  policies at a time (21.4 and 22.1 against 20.4 ms a policy); products by OpenBLAS, in loops or transposed
  (0.5 to 1.3 times torch's speed); the k largest by a vectorized sort (2% at most, for twice the code).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.jobs import ENVIRONMENT, silence_libraries
from vaalign_lib.models import tiny_config
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.ppo import Trainer

BATCH, EPOCHS, STEPS, WIDTH = 8, 4, 3, 32
PACKAGES = ("torch==2.13.0", "trl==0.11.4", "transformers==4.45.2", "rich", "numpy>=2")


def save_model(folder: Path) -> GPT2LMHeadModel:
    """Save the model that all train."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", WIDTH))
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return model


def trainer(folder: Path, size: int) -> Trainer:
    """Return a trainer of N policies."""
    world = World(0)
    task = Task(world.prompts(256, world.rng("benchmark")), stand_ins(world)[NAME])
    settings = PPO(iterations=100, batch_size=BATCH, mini_batch_size=BATCH, ppo_epochs=EPOCHS,
                   learning_rate=1e-4)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder)
    stack = PolicyStack(folder, size)
    return Trainer(stack, model, world_tokenizer(), task, Method(), settings, Sampling(min_new_tokens=32),
                   critic="own_states")  # fmt: skip


NAME = "stand-in for Gemini 1.5 Flash"


def keep_freed_memory() -> None:
    """Begin again as a process that allocates as workers do, which glibc learns from the environment."""
    if not ENVIRONMENT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def seconds_of_stack(one: Trainer) -> float:
    """Return process seconds per policy and step."""
    started = time.process_time()
    for _ in range(STEPS):
        one.step()
    return (time.process_time() - started) / STEPS / one.stack.size


def seconds_of_trl(python: Path, folder: Path) -> float:
    """Return trl's process seconds per step, its imports and its first step not counted."""
    script = Path(__file__).with_name("trl_peer.py")
    command = [str(python), str(script), str(folder), str(BATCH), str(EPOCHS), str(STEPS)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"})
    return float(json.loads(out.stdout.splitlines()[-1])["seconds"])


def trl_environment(folder: Path) -> Path:
    """Make an environment with trl 0.11.4, if it is not there, and return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for package in (PACKAGES[:1], PACKAGES[1:]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *package], check=True)
    return python


def matmul_limit() -> float:
    """Return the operations per second of a large product, the best of several."""
    one = torch.randn(1024, 1024)
    times = []
    for _ in range(10):
        started = time.process_time()
        torch.mm(one, one)
        times.append(time.process_time() - started)
    return 2 * 1024**3 / min(times)


def operations(one: Trainer) -> float:
    """Return the multiplications and additions of products in one policy's step.

    Generation and the reference go forward once over all tokens, every epoch forward and backward (three
    times the products); attention's own products are left out.
    """
    shapes = [p.shape[1:] for n, p in one.stack.parameters().items() if "wpe" not in n]
    products = sum(2 * a.numel() for a in shapes if len(a) == 2)
    head = 2 * one.stack.config.vocab_size * WIDTH
    prompt = one._prompts.ids.shape[1]
    tokens = prompt + one.sampling.max_new_tokens
    once = BATCH * (tokens * (products - head) + one.sampling.max_new_tokens * head)
    return once * (2 + 3 * EPOCHS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="1,8,80")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=Path(tempfile.gettempdir()) / "trl-0.11.4")
    parser.add_argument("--without-trl", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    silence_libraries()
    folder = Path(tempfile.mkdtemp())
    save_model(folder)
    python = None if options.without_trl else trl_environment(options.environment)
    sizes = [int(n) for n in options.sizes.split(",")]
    stacks = {n: trainer(folder, n) for n in sizes}
    loop = stacks.get(1) or trainer(folder, 1)
    for one in (*stacks.values(), loop):
        one.step()
    found: dict[str, list[float]] = {"loop": [], "trl": [], **{str(n): [] for n in sizes}}
    for _ in range(options.rounds):
        found["loop"].append(seconds_of_stack(loop))
        for n, one in stacks.items():
            found[str(n)].append(seconds_of_stack(one))
        if python is not None:
            found["trl"].append(seconds_of_trl(python, folder))
    limit = matmul_limit()
    work = operations(loop)
    median = {name: statistics.median(values) for name, values in found.items() if values}
    print(f"matmul limit {limit / 1e9:.0f} GFLOP/s; {work / 1e6:.0f} MFLOP per policy and step")
    for n in sizes:
        own = median[str(n)]
        ratios = f"{median['loop'] / own:.1f} times a loop of single policies"
        if "trl" in median:
            ratios += f", {median['trl'] / own:.1f} times trl"
        share = work / own / limit
        print(f"N = {n}: {1e3 * own:.1f} ms per policy and step, {n * own:.2f} s a step, {ratios}")
        print(f"    {share:.0%} of the limit, {3600 / own / 100:,.0f} policies of 100 steps an hour")
    if "trl" in median:
        print(f"trl 0.11.4: {1e3 * median['trl']:.1f} ms per policy and step")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {memory:.2f} GiB, all stacks together")


if __name__ == "__main__":
    sys.exit(main())
