"""What `test_trl_trainers` runs in two processes: each row's variance stays with it."""

import sys
from pathlib import Path

import torch

from tests.trl_problem import KINDS, equal, make, rewards_of, uneven, weights
from vaalign_lib.training.trl import VARIANCE, _uniforms


def completions(batch):
    pairs = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [row[mask.bool()].tolist() for row, mask in pairs]


def check_rows(kind, folder, model):
    """Check, row by row of this process, what came of the variances; groups span both processes."""
    options = {"reward": rewards_of(uneven), "model": model, "num_generations": 16}
    if kind == "grpo":
        options["scale_rewards"] = "none"
    one = make(kind, folder, penalty="exact", **options)  # at the start it is beta sigma^2
    kept = []
    original = one._generate_and_score_completions

    def keep(inputs):
        batch = original(inputs)
        variance = torch.tensor([uneven(ids) for ids in completions(batch)])
        if kind == "grpo":
            torch.testing.assert_close(batch[VARIANCE], variance)
        reward = torch.tensor([float(sum(ids)) for ids in completions(batch)])
        kept.append((batch, reward, variance))
        return batch

    one._generate_and_score_completions = keep
    one.train()
    batch, reward, variance = kept[0]
    rewards, variances = (one.accelerator.gather(each) for each in (reward, variance))
    mean = (rewards.sum() - reward) / 15 if kind == "rloo" else rewards.mean()
    excess = variance - (variances.sum() - variance) / 15
    by_hand = reward - mean - 0.3 * excess
    torch.testing.assert_close(batch["advantages"], by_hand, atol=1e-4, rtol=1e-4)
    print("all rows kept their variances", flush=True)


def check_a_silent_process(folder, model):
    """Check that what a whole process could not judge is left out, beside another reward."""

    def silent(completions, completion_ids, log_extra, **_):
        known = [None if first else uneven(ids) for ids in completion_ids]
        log_extra(VARIANCE, known)
        return [None if first else float(sum(ids)) for ids in completion_ids]

    def none(completions, **_):
        return [0.0] * len(completions)

    options = {"num_generations": 16, "scale_rewards": "none"}
    one = make("grpo", folder, reward=[silent, none], model=model, **options)
    first = one.accelerator.process_index == 0
    one.model.train()
    batch = one._generate_and_score_completions([{"prompt": "2"}] * 8)
    reward = torch.tensor([float(sum(ids)) for ids in completions(batch)])
    by_hand = torch.zeros(8) if first else reward - reward.mean()
    torch.testing.assert_close(batch["advantages"], by_hand, atol=1e-4, rtol=1e-4)
    draws = torch.from_numpy(_uniforms(0, 0, ["p"] * 8, ["r"] * 8))
    assert len(one.accelerator.gather(draws).unique()) == 16
    print("a silent process", flush=True)


def main(folder):
    check_a_silent_process(folder, str(folder / "model"))
    for kind in KINDS:
        model = str(folder / "model")
        check_rows(kind, folder, model)
        ends = []
        for stock in (True, False):
            one = make(kind, folder, stock=stock, model=model)
            one.train()
            ends.append(weights(one))
        assert equal(*ends)
        print("the stock trainer's weights", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
