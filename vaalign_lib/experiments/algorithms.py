"""Algorithms 1 to 9 on problems whose answer is known.

Each check returns what it found in words, and whether it holds. Most are about responses of one token:
eight words of known reward and variance, and a random GPT-2 that writes them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vaalign_lib.experiments.conditions import METHODS, REFERENCE, Condition
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import Prompts, response_states, sequences
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Profile, Sampling
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, PolicyIndex, RewardSource
from vaalign_lib.theory.tabular import ppo_fixed_point, softmax_policy
from vaalign_lib.training.evaluation import Evaluator
from vaalign_lib.training.objectives import Method, Task
from vaalign_lib.training.one_token import (
    BETA,
    END,
    PROMPT,
    WORDS,
    one_token_policy,
    one_token_problem,
    one_token_tokenizer,
)
from vaalign_lib.training.ppo import Trainer

Check = tuple[str, bool]
POLICIES, SMALLEST = 4, 0.5  # policies of a stack, and the smallest variance of a word
NEAR = 0.05  # in total variation, to a fixed point
ERRORS = 4  # standard errors that a mean may be off
ONE_TOKEN = Sampling(
    temperature=1.0, top_k=0, top_p=1.0, min_new_tokens=0, max_new_tokens=1, log_probability_temperature=1.0
)


class OneToken:
    """A source that knows the middle and the variance of every word (words,); its rewards are the middles."""

    def __init__(self, middle: Array, variance: Array) -> None:
        self.middle, self.half = middle, np.sqrt(3 * variance)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Interval:
        """Return intervals (responses, 2); a response that ends at once is the word `END`."""
        words = [int(one or END) for one in responses]
        ends = self.middle[words] - self.half[words], self.middle[words] + self.half[words]
        return Interval(np.stack(ends, axis=1), np.full(len(words), 0.5))

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        assert isinstance(judgement, Interval)
        return judgement.midpoint()


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = one_token_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def _stack(seed: int, size: int = POLICIES) -> PolicyStack:
    return PolicyStack(one_token_policy(seed), size)


def _trained(source: RewardSource, objective: str, seed: int, iterations: int) -> Trainer:
    batch = {"batch_size": 128, "mini_batch_size": 128, "ppo_epochs": 2, "iterations": iterations}
    ppo: dict[str, Any] = batch | {"learning_rate": 8e-3, "lam": 1.0, "cliprange": 0.4, "max_grad_norm": 1.0}
    method = Method(objective, beta=BETA, standardized=False)
    start, asked, settings = one_token_policy(seed), Task([PROMPT], source), PPO(**ppo, schedule="linear")
    trainer = Trainer(_stack(seed), start, _tokenizer(), asked, method, settings, ONE_TOKEN, seed=seed)
    trainer.train()
    return trainer


@torch.no_grad()
def _shares(stack: PolicyStack) -> Array:
    """Return the probabilities of the words (N, words)."""
    prompts = Prompts.of(_tokenizer(), [PROMPT] * stack.size)
    joined = sequences(prompts, torch.zeros(stack.size, 1, dtype=torch.long), stack.dtype)
    logits: Tensor = stack.logits(response_states(stack, joined))[:, 0]
    return logits.double().softmax(1).numpy()


def fixed_points(seed: int, iterations: int = 60) -> Check:
    """Algorithm 1: each method converges to the solution of its equation, not of the other's."""
    middle, variance = one_token_problem(seed, SMALLEST)
    start, source = _shares(_stack(seed, 1))[0], OneToken(middle, variance)
    solutions = softmax_policy(middle, start, BETA), ppo_fixed_point(middle, variance, start, BETA)
    ends = [_shares(_trained(source, one, seed, iterations).stack).mean(0) for one in METHODS]
    off = np.array([[0.5 * np.abs(end - one).sum() for one in solutions] for end in ends])
    own, other = np.diag(off), np.diag(off[:, ::-1])
    told = f"vanilla {own[0]:.3f}, variance-aware {own[1]:.3f} from its fixed point (total variation)"
    holds = bool((own < NEAR).all() and (own < other).all())
    return f"one token: {told}; {other.min():.3f} from the other's", holds


def _evaluator(seed: int, samples: int) -> Evaluator:
    task = Task([PROMPT, PROMPT], OneToken(*one_token_problem(seed, SMALLEST)))
    reference = ReferencePolicy(one_token_policy(seed))
    return Evaluator(reference, _tokenizer(), task, ONE_TOKEN, samples, seed)


def _in_errors(table: pd.DataFrame, seed: int) -> Check:
    """Compare evaluations of the start of all policies with its exact return."""
    known = float(_shares(_stack(seed, 1))[0] @ one_token_problem(seed, SMALLEST)[0])
    off = ((table["true_reward"] - known) / table["true_reward_error"]).abs().max()
    told = f"{len(table)} evaluations of a policy whose return is {known:.3f}: off by at most {off:.1f} SE"
    return told, off < ERRORS


def known_return(seed: int, samples: int = 200) -> Check:
    """Algorithm 2: policies' evaluations lie around their exact return."""
    return _in_errors(_evaluator(seed, samples).policies(_stack(seed), range(POLICIES)), seed)


def known_reference(seed: int, samples: int = 200) -> Check:
    """Algorithm 4: so do the reference's, as many as there are policies, at a KL of zero."""
    table = _evaluator(seed, samples).references(range(POLICIES))
    told, holds = _in_errors(table, seed)
    return f"{told}, KL {table['kl'].abs().max():.1g}", holds and bool((table["kl"].abs() < 1e-6).all())


def every_stack_complete(
    policies: pd.DataFrame, curves: pd.DataFrame, planned: Sequence[Condition], profile: Profile
) -> Check:
    """Algorithm 3: all planned stacks were trained to their last step, and each policy was evaluated."""
    stacks = [one for one in planned if one.objective != REFERENCE]
    names = ["true_reward", "true_reward_error", "gold", "kl", "length"]
    finite = bool(np.isfinite(policies[names].to_numpy(dtype=float)).all())
    counts, last = policies.groupby("run")["policy"].nunique(), curves.groupby("run")["step"].max()
    training = profile.policies.training
    steps = {one.name: training[one.architecture].settings(one.objective).iterations for one in stacks}
    ended = all(last.get(name) == count for name, count in steps.items())
    whole = all(counts.get(one.name) == profile.policies.count for one in planned)
    told = f"{len(stacks)} stacks of {profile.policies.count} policies trained to their end"
    return told, finite and ended and whole


def equal_variances(seed: int, iterations: int = 3) -> Check:
    """Algorithm 5: with variance 1 everywhere both methods' updates give the same weights, bit for bit."""
    source = OneToken(one_token_problem(seed)[0], np.ones(WORDS))
    vanilla, aware = (_trained(source, one, seed, iterations).state() for one in METHODS)
    same = all(torch.equal(one, aware[name]) for name, one in vanilla.items())
    told = "the same" if same else "other"
    return f"variance 1 everywhere: {told} weights as vanilla's after {iterations} steps, bit for bit", same


def contract(source: RewardSource, prompts: Sequence[str], responses: Sequence[str]) -> Check:
    """Algorithm 6: an interval for each response, whatever the order in which they are asked."""
    policy = np.zeros(len(prompts), dtype=np.int64)
    order = np.arange(len(prompts))[::-1]
    plain = source.judge(prompts, responses, policy)
    turned = source.judge([prompts[k] for k in order], [responses[k] for k in order], policy)
    assert isinstance(plain, Interval) and isinstance(turned, Interval)
    a, b = plain.bounds.T
    holds = plain.bounds.shape == (len(prompts), 2) and bool((a <= b).all())
    same = np.array_equal(plain.bounds[order], turned.bounds)
    return f"judgements {plain.bounds.shape}, lower ends first, in any order", holds and same


def mean_of_draws(judgement: Interval, random: np.random.Generator, draws: int = 2000) -> Check:
    """Algorithm 7: sampled rewards of U[a, b] average to (a + b) / 2."""
    drawn = np.stack([judgement.sample(random.random(len(judgement.bounds))) for _ in range(draws)])
    off = np.abs(drawn.mean(0) - judgement.bounds.mean(1)) / (drawn.std(0, ddof=1) / np.sqrt(draws))
    return f"means of {draws} draws lie within {off.max():.1f} SE of (a + b) / 2", bool(off.max() < ERRORS)


def variance_by_hand() -> Check:
    """Algorithm 8: (b - a)^2 / 12 of an interval, the sample variance (ddof=1) of an ensemble."""
    interval, members = Interval(np.array([[40.0, 70.0]])), Members(np.array([[1.0, 2.0, 6.0]]))
    found = interval.variance()[0], members.variance()[0]
    told = f"[40, 70]: {found[0]:g} = 30² / 12; scores 1, 2, 6: {found[1]:g} = (4 + 1 + 9) / 2"
    return told, found == (75.0, 7.0)


def midpoints(
    source: RewardSource, judgement: Interval, prompts: Sequence[str], responses: Sequence[str]
) -> Check:
    """Algorithm 9: the true reward by a judge is the middle of its interval."""
    found = source.true_reward(judgement, prompts, responses)
    off = float(np.abs(found - (judgement.bounds[:, 0] + judgement.bounds[:, 1]) / 2).max())
    return f"true rewards differ from (a + b) / 2 by at most {off:.1g}", off < 1e-9
