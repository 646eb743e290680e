"""What critics explain: a value head on the policy's own states against one on the reference's states.

    python benchmarks/critics.py [--policies 20] [--steps 40]

Prints the share of the variance of returns that each explains in training on the embedded judge, over the
last ten steps, and the reward that was reached; cold heads and warmed-up ones.
"""

import argparse

import torch

from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.references import reference
from vaalign_lib.policies.sampling import sequences
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.rewards.simulated_judge import stand_ins
from vaalign_lib.store import RUNS, RunStore
from vaalign_lib.training.matched_kl import final
from vaalign_lib.training.objectives import Method
from vaalign_lib.training.ppo import Drawn, Trainer
from vaalign_lib.training.run import embedded_task, policy_trainer


def warm_up_own_states(one: Trainer) -> None:
    """Fit the head on the policy's own states as the other critic is: by ridge regression."""
    size = one.stack.size
    which = torch.arange(1024) % len(one.task.prompts)
    uniforms = torch.rand(1024, one.sampling.max_new_tokens).numpy()
    drawn = Drawn(which, uniforms, uniforms[:, 0].astype(float), torch.empty(0), [])
    told = one.write(one.reference, drawn)
    written, judgement = told.rollout, one.task.judge(told.asked, told.answers, which.numpy())
    outcome = one._outcome(judgement, drawn.rewards, torch.ones(1024), 1)
    joined = sequences(written.prompts, written.responses, one.stack.dtype)
    states = one.reference.all_states(joined)[-1]
    one.critic.fit(states, written.mask, one.shape(outcome).score.expand(size, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    embedded, world = load_profile("embedded"), World(0)
    start = reference(Study(RunStore(RUNS / "embedded" / "store"), embedded, 0), "gpt2")
    task = embedded_task(embedded, stand_ins(world)["stand-in for Gemini 1.5 Flash"], world)
    for name in ("own states, cold as in trl", "own states, warmed up", "reference states, warmed up"):
        kind = "own_states" if name.startswith("own") else "reference_states"
        policies = embedded.policies.model_copy(update={"critic": kind})
        profile = embedded.model_copy(update={"policies": policies})
        one = policy_trainer(profile, "gpt2", start, task, Method(), policies=range(options.policies))
        if name == "own states, warmed up":
            warm_up_own_states(one)
        log = one.train(options.steps)
        early, late = log[log["step"] <= 10], final(log)
        print(f"{name}: explains {early['explained_variance'].mean():.2f} in the first ten steps, "
              f"{late['explained_variance'].mean():.2f} in the last; reward {late['reward'].mean():.2f} "
              f"(SE {late['reward'].sem():.2f}) at KL {late['kl'].mean():.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
