"""Ten heads on one frozen backbone against ten reward models; and 800 heads against ten.

Prints ratios of process time, from runs that alternate, on one thread:

    python benchmarks/reward_heads.py [pairs [repeats]]
"""

import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vaalign_lib.data.pairs import embedded_pairs
from vaalign_lib.data.world.world import World
from vaalign_lib.profiles import load_profile
from vaalign_lib.rewards.classifier import (
    features_and_scores,
    load_reward_model,
    tokenized_pairs,
    train_reward_model,
)
from vaalign_lib.rewards.heads import train_heads

MODELS = 10


def seconds(work: Callable[[], object]) -> float:
    """Return the process time of a piece of work."""
    started = time.process_time()
    work()
    return time.process_time() - started


def main(count: int, repeats: int) -> None:
    """Print the ratios for a number of pairs, over repeated rounds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    profile, world, random = load_profile("embedded"), World(0), np.random.default_rng(0)
    prompts = world.prompts(count, random)
    sides = [world.responses(prompts, random.beta(2, 2, count), random) for _ in range(2)]
    pairs = embedded_pairs(world, prompts, *sides, random)
    settings = profile.reward_model.model_copy(update={"epochs": 1.0})
    folder = Path(tempfile.mkdtemp())

    def one_model(seed: int) -> None:
        train_reward_model(folder, pairs, settings=settings, backbone="tiny-gemma", seed=seed)

    def features() -> dict[str, torch.Tensor]:
        model, tokenizer = load_reward_model(folder)
        data = tokenized_pairs(tokenizer, pairs, settings.max_length)
        names = ("chosen", "rejected")
        return {name: features_and_scores(model, data[f"{name}_ids"])[0] for name in names}

    def heads(ensembles: int, kind: str = "bootstrap") -> None:
        options = {"kind": kind, "settings": profile.ensembles.paper, "seed": 0}
        train_heads(found["chosen"], found["rejected"], ensembles=ensembles, **options)

    one_model(0)
    found = features()
    rows = []
    for repeat in range(repeats):
        separate = seconds(lambda r=repeat: [one_model(r * MODELS + k) for k in range(MODELS)])
        shared = [seconds(lambda: one_model(0)), seconds(features), seconds(lambda: heads(1))]
        grids = [seconds(lambda n=n: heads(n)) for n in (1, 80)]
        same = [seconds(lambda n=n: heads(n, "paper")) for n in (1, 80)]
        rows.append(
            {
                "ten models / (one model + features + ten heads)": separate / sum(shared),
                "ten models / (features + ten heads)": separate / sum(shared[1:]),
                "800 heads / 10 heads, own bootstrap samples": grids[1] / grids[0],
                "800 heads / 10 heads, own data per ensemble": same[1] / same[0],
            }
        )
    steps = int(np.ceil(profile.ensembles.paper.epochs * np.ceil(len(pairs) / 32)))
    print(f"{len(pairs)} pairs, backbone of width {settings.width}, {steps} steps of the heads")
    for name in rows[0]:
        ratios = [row[name] for row in rows]
        print(f"{name}: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    given = [int(text) for text in sys.argv[1:3]]
    main(*given, *(1000, 3)[len(given) :])
