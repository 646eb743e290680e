"""Whether policies learn: gold gained at which KL from a judge, and a learned reward over-optimized.

    python benchmarks/learning.py [--policies 80] [--weak 8] [--out FOLDER]

Trains vanilla and variance-aware policies on the embedded judge with the profile's settings, prints the
gold gained (in standard deviations of the reference policy's gold) beside what an exponential tilt of
the reference policy's responses to each prompt would gain at the same KL, and draws learning curves.
Then a few policies per beta are trained on an ensemble of linear heads, whose reward is wrong in places.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.references import reference
from vaalign_lib.experiments.results import curves_of
from vaalign_lib.experiments.reward_models import prepare, reward_source
from vaalign_lib.figures.policies import learning_curves
from vaalign_lib.policies.best_of_n import tilt
from vaalign_lib.policies.reference_pairs import sample_reference
from vaalign_lib.profiles import Profile, Study, load_profile
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.store import RUNS, RunStore
from vaalign_lib.training.matched_kl import Grid, final
from vaalign_lib.training.objectives import Method
from vaalign_lib.training.run import embedded_task, policy_trainer

JUDGE = "stand-in for Gemini 1.5 Flash"
PROMPTS, SAMPLES = 120, 64


def tilted_gain(world: World, start: Path, kls: list[float]) -> tuple[float, float, list[float]]:
    """Return the reference's mean gold, its deviation, and what tilts by the judge gain at KLs."""
    prompts = world.prompts(PROMPTS, world.rng("tilt"))
    asked = [prompt for prompt in prompts for _ in range(SAMPLES)]
    answers = sample_reference(start, asked, seed=0)
    judge = stand_ins(world)[JUDGE]
    policy = np.zeros(len(asked), dtype=np.int64)
    proxy = judge.judge(asked, answers, policy).midpoint().reshape(PROMPTS, SAMPLES)
    gold = world.gold(asked, answers).reshape(PROMPTS, SAMPLES)
    proxy = (proxy - proxy.mean()) / proxy.std()

    def gain(kl: float) -> float:
        beta = brentq(lambda b: tilt(proxy, gold, b)[2].mean() - kl, 0.01, 50)
        return float(tilt(proxy, gold, beta)[1].mean() - gold.mean()) / gold.std()

    return float(gold.mean()), float(gold.std()), [gain(kl) for kl in kls]


def over_optimization(
    profile: Profile, world: World, store: RunStore, start: Path, each: int
) -> pd.DataFrame:
    """Train on ten linear heads with penalties from almost none to strong; return what was reached."""
    source = reward_source(prepare(Study(store, profile, 0), reference=start), "bootstrap")
    grid = Grid([1.6e-3], [0.01, 0.05, 0.2, 0.8], each)
    task = embedded_task(profile, source, world)
    policies = range(len(grid.cells))
    one = policy_trainer(profile, "gpt2", start, task, grid.method("vanilla"), policies=policies)
    return grid.summary(one.train())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", type=int, default=80)
    parser.add_argument("--weak", type=int, default=8, help="policies per beta on the learned reward")
    parser.add_argument("--out", type=Path, default=RUNS / "learning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    profile, world = load_profile("embedded"), World(0)
    store = RunStore(RUNS / "embedded" / "store")
    start = reference(Study(store, profile, 0), "gpt2")
    task = embedded_task(profile, stand_ins(world)[JUDGE], world)
    logs = {}
    for name in ("vanilla", "variance_aware"):
        one = policy_trainer(profile, "gpt2", start, task, Method(name), policies=range(options.policies))
        logs[name] = one.train()
        logs[name].to_parquet(options.out / f"{name}.parquet")
    learning_curves({name: curves_of(log) for name, log in logs.items()}).savefig(
        options.out / "learning_curves.png"
    )
    reached = {name: final(log) for name, log in logs.items()}
    mean, spread, tilts = tilted_gain(world, start, [float(r["kl"].mean()) for r in reached.values()])
    for (name, table), best in zip(reached.items(), tilts, strict=True):
        gain = (table["gold"] - mean) / spread
        print(f"{name}: gold {gain.mean():+.2f} (SE over policies {gain.sem():.2f}) reference SDs at KL "
              f"{table['kl'].mean():.2f} nats; a tilt by the judge would gain {best:.2f}; "
              f"reward {table['reward'].mean():+.2f}, {table['length'].mean():.1f} tokens")  # fmt: skip
    weak = over_optimization(profile, world, store, start, options.weak)
    print(f"learned reward, ten linear heads; the reference's gold is {mean:.2f}")
    print(weak[["beta", "kl", "reward", "gold", "gold_error"]].round(2).to_string(index=False))


if __name__ == "__main__":
    main()
