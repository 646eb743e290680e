"""Problems so small that everything about them is known: a few words, one or two tokens, any reward."""

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.rewards.base import Interval
from vaalign_lib.training.objectives import Task
from vaalign_lib.training.ppo import Trainer

END = 1


def tokenizer(words, pad="0"):
    """Return a tokenizer of the words "0", "1", ...; "1" ends a response."""
    core = Tokenizer(models.WordLevel({str(k): k for k in range(words)}, unk_token="0"))
    one = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=str(END), pad_token=pad)
    one.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return one


def policy(words, weights=None, seed=0, layers=1, positions=16):
    """Return a random GPT-2 of width 16."""
    config = GPT2Config(vocab_size=words, n_embd=16, n_layer=layers, n_head=2, n_positions=positions,
                        bos_token_id=END, eos_token_id=END, pad_token_id=0,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config)
    if weights is not None:
        model.load_state_dict(weights, strict=False)
        model.tie_weights()
    return model


class TableReward:
    """Intervals with a given middle and variance for each text; `still` ones always give the middle."""

    def __init__(self, middle, variance, still=False):
        self.middle, self.variance, self.still = middle, variance, still

    def judge(self, prompts, responses, policy):
        texts = list(zip(prompts, responses, strict=True))
        middle = np.array([self.middle(*text) for text in texts], dtype=float)
        half = np.sqrt(3 * np.array([self.variance(*text) for text in texts], dtype=float))
        bounds = np.stack((middle - half, middle + half), axis=1)
        return Interval(bounds, np.full(len(texts), 0.5) if self.still else None)

    def true_reward(self, judgement, prompts, responses):
        return judgement.midpoint()


def trainer(
    size, source, prompts, *, method, words, tokens, model=None, pad="0", critic="reference_states",
    lora=None, seed=0, policies=None, sampling=None, **settings
):  # fmt: skip
    """Return a trainer of the small problem; by default it samples from the whole distribution."""
    make = model or (lambda: policy(words))
    how = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0,
           "max_new_tokens": tokens, "log_probability_temperature": 1.0} | (sampling or {})  # fmt: skip
    return Trainer(
        PolicyStack(make(), size, lora=lora, seeds=policies),
        make() if lora is None else None,
        tokenizer(words, pad),
        Task(prompts, source),
        method,
        PPO(**{"iterations": 10, "batch_size": 8, "mini_batch_size": 8} | settings),
        Sampling(**how),
        policies=policies,
        seed=seed,
        critic=critic,
    )
