"""Write what trl 0.11.4 computes, for the tests of the losses and the trainer of PPO.

trl 0.11 is the last with the paper's PPOTrainer and needs older packages than this project, so it runs in
an environment of its own:

    python -m venv /tmp/trl-0.11
    /tmp/trl-0.11/bin/pip install torch==2.13.0
    /tmp/trl-0.11/bin/pip install trl==0.11.4 transformers==4.45.2 rich
    /tmp/trl-0.11/bin/python tests/trl/make_fixtures.py

It writes four files beside itself: `arithmetic.safetensors` (inputs and outputs of trl's own functions),
`model.safetensors` (the policy of the small problem), `step.safetensors` (one whole step of trl's
trainer on it) and `curves.json` (trl's learning curves).
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer
from trl.trainer.utils import AdaptiveKLController

HERE = Path(__file__).parent
WORDS, TOKENS, BATCH, STEPS, SEEDS = 8, 6, 32, 40, 12
GOOD, BAD = 5, 6  # the small problem: write the one, not the other
SETTINGS = {"learning_rate": 2e-3, "batch_size": BATCH, "mini_batch_size": 8, "ppo_epochs": 4,
            "init_kl_coef": 0.2, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2,
            "vf_coef": 0.1}  # fmt: skip


def trainer_like(**config):
    """Return what stands for a trainer where trl's methods ask for `self`."""
    config = PPOConfig(**{"batch_size": 4, "mini_batch_size": 4} | config)
    self = SimpleNamespace(config=config, kl_ctl=SimpleNamespace(value=0.3))
    self._kl_penalty = lambda a, b: PPOTrainer._kl_penalty(self, a, b)
    return self


def arithmetic():
    """Run trl's own functions on random inputs of 4 responses of different lengths."""
    random = torch.Generator().manual_seed(0)
    rows, tokens, words = 4, 7, 11
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    mask = torch.arange(tokens) < torch.tensor([7, 3, 5, 1])[:, None]
    logits, new_logits, reference_logits = (2 * draw(rows, tokens, words) for _ in range(3))
    chosen = torch.randint(words, (rows, tokens), generator=random)
    pick = lambda z: z.log_softmax(-1).gather(2, chosen[..., None])[..., 0]  # noqa: E731
    old, new, reference = pick(logits), pick(logits + 0.1 * new_logits), pick(reference_logits)
    scores, values, new_values = draw(rows), draw(rows, tokens), draw(rows, tokens)
    found = {"mask": mask, "logits": logits, "reference_logits": reference_logits, "chosen": chosen,
             "old": old, "new": new, "reference": reference, "scores": scores, "values": values,
             "new_values": new_values}  # fmt: skip
    for kind in ("kl", "abs", "mse", "full"):
        self = trainer_like(kl_penalty=kind)
        full = kind == "full"
        policy = logits.log_softmax(-1) if full else old
        against = reference_logits.log_softmax(-1) if full else reference
        rewards, _, penalties = PPOTrainer.compute_rewards(
            self, list(scores), list(policy), list(against), list(mask)
        )
        found |= {f"rewards.{kind}": rewards, f"penalties.{kind}": penalties}
    self = trainer_like(gamma=0.97, lam=0.9)
    values_, advantages, returns = PPOTrainer.compute_advantages(
        self, values.clone(), found["rewards.kl"].clone(), mask
    )
    found |= {"masked_values": values_, "advantages": advantages, "returns": returns}
    for name, threshold in (("", 10.0), (".skipped", 0.5)):
        self = trainer_like(cliprange=0.1, cliprange_value=0.3, vf_coef=0.4, ratio_threshold=threshold)
        policy, value, stats = PPOTrainer.loss(
            self, old, values_, logits, new_values, new, mask, advantages, returns
        )
        found |= {f"loss.policy{name}": policy, f"loss.value{name}": value,
                  f"loss.total{name}": policy + value}  # fmt: skip
        if not name:
            found |= {f"stats.{one.replace('/', '.')}": torch.as_tensor(number)
                      for one, number in flat(stats).items()}  # fmt: skip
    for kl in (0.1, 0.65, 0.75, 5.0):
        for batch, horizon in ((16, 19), (64, 19), (256, 19), (128, 10000)):
            control = AdaptiveKLController(0.3, 0.7, horizon)
            control.update(kl, batch)
            found[f"adaptive.{kl}.{batch}.{horizon}"] = torch.tensor(control.value)
    save_file({k: v.detach().clone().contiguous() for k, v in found.items()},
              HERE / "arithmetic.safetensors")  # fmt: skip


def flat(stats, name=""):
    """Return nested statistics as one dictionary of numbers."""
    out = {}
    for key, value in stats.items():
        if isinstance(value, dict):
            out |= flat(value, f"{name}{key}/")
        elif torch.is_tensor(value) and value.numel() == 1:
            out[f"{name}{key}"] = value
    return out


def policy():
    """Return the policy of the small problem, always the same."""
    config = GPT2Config(vocab_size=WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=8,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                        bos_token_id=1, eos_token_id=1, pad_token_id=0)  # fmt: skip
    model = GPT2LMHeadModel(config)
    file = HERE / "model.safetensors"
    if not file.exists():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        weights = {k: v.contiguous() for k, v in model.state_dict().items()}
        save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, file)
    model.load_state_dict(load_file(file), strict=False)
    model.tie_weights()
    return model


def start(seed):
    """Return trl's trainer of the small problem and its tokenizer, seeded."""
    np.random.seed(seed)  # noqa: NPY002 - what trl draws from
    torch.manual_seed(seed)
    words = {str(k): k for k in range(WORDS)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="1", pad_token="0"
    )
    model = AutoModelForCausalLMWithValueHead.from_pretrained(policy())
    reference = AutoModelForCausalLMWithValueHead.from_pretrained(policy())
    config = PPOConfig(**SETTINGS, adap_kl_ctrl=False, seed=seed)
    return PPOTrainer(config, model, reference, tokenizer)


def batch(trainer, random):
    """Return queries, answers and their rewards."""
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0,
                "max_new_tokens": TOKENS}  # fmt: skip
    queries = [torch.tensor([k]) for k in random.integers(2, WORDS, BATCH).tolist()]
    answers = trainer.generate(queries, return_prompt=False, batch_size=BATCH, **sampling)
    rewards = [((a == GOOD).sum() - (a == BAD).sum()).float() for a in answers]
    return queries, answers, rewards


def curve(seed):
    """Train by trl and return mean reward, mean KL and mean length of each step."""
    trainer, random = start(seed), np.random.default_rng(seed)
    log = []
    for _ in range(STEPS):
        queries, answers, rewards = batch(trainer, random)
        stats = trainer.step(queries, answers, rewards)
        lengths = [len(a) for a in answers]
        log.append([float(np.mean(rewards)), float(stats["objective/kl"]), float(np.mean(lengths))])
    return log


def step():
    """Take one step of trl's trainer; store what went in and the weights that came out."""
    trainer = start(0)
    orders = []
    permutation = np.random.permutation

    def recorded(count):
        orders.append(permutation(count))
        return orders[-1]

    np.random.permutation = recorded
    queries, answers, rewards = batch(trainer, np.random.default_rng(0))
    head = {f"head.{k}": v.clone() for k, v in trainer.model.v_head.summary.state_dict().items()}
    trainer.step(queries, answers, rewards)
    np.random.permutation = permutation
    after = {f"after.{k}": v.detach() for k, v in trainer.model.named_parameters()}
    responses = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    found = {"queries": torch.cat(queries), "responses": responses,
             "lengths": torch.tensor([len(a) for a in answers]), "scores": torch.stack(rewards),
             "orders": torch.tensor(np.array(orders))}  # fmt: skip
    save_file({k: v.contiguous() for k, v in (found | head | after).items()}, HERE / "step.safetensors")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    arithmetic()
    step()
    curves = [curve(seed) for seed in range(SEEDS)]
    record = {"settings": SETTINGS, "tokens": TOKENS, "good": GOOD, "bad": BAD,
              "columns": ["reward", "kl", "length"], "curves": np.round(curves, 4).tolist()}  # fmt: skip
    (HERE / "curves.json").write_text(json.dumps(record) + "\n")
    print(np.mean(curves, axis=0)[[0, 10, 20, 39]], np.std([c[-1] for c in curves], axis=0))
