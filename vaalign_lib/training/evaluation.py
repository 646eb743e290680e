"""What policies are worth after training: Algorithms 2 and 4.

A policy's return is the mean true reward of its responses to a fixed set of prompts. Several responses
to each prompt tell how much of the variance over policies is only noise of this evaluation:

    Var_total = Var_train + Var_eval / M

with Var_eval / M the squared standard error of a policy's return, the prompts being the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vaalign_lib.models import end_id, pad_id, response_texts
from vaalign_lib.policies.checks import checked_prompts, whole
from vaalign_lib.policies.reference import NUMBERS, ReferencePolicy
from vaalign_lib.policies.sampling import (
    PIECE,
    Prompts,
    Rollout,
    Writer,
    check_finite,
    rollout,
    sequences,
    token_divergences,
)
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling
from vaalign_lib.training.objectives import Task

# what random numbers are for; training has steps here
_TRAINED, _REFERENCE, _DIVERGENCE = 2**31 + 2, 2**31 + 3, 2**31 + 4


@dataclass(frozen=True)
class Evaluator:
    """Evaluates policies on the same prompts, at least two, with two or more `samples` of each."""

    reference: ReferencePolicy  # from which the KL is measured, and that is evaluated as often (Algorithm 4)
    tokenizer: PreTrainedTokenizerBase
    task: Task
    sampling: Sampling
    samples: int
    seed: int
    device: torch.device | str = "cpu"
    answers: list[pd.DataFrame] | None = None  # gets all that is written for rewards, where it is a list

    def __post_init__(self) -> None:
        if self.samples < 2 or len(self.task.prompts) < 2:
            raise ValueError(
                "expected at least two prompts and two samples of each for a standard error, got "
                f"{len(self.task.prompts)} and {self.samples}"
            )
        whole("samples", self.samples, 2)
        whole("seed", self.seed, 0)
        checked_prompts(self.tokenizer, self.task.prompts, self.reference.config, self.sampling)

    def policies(self, stack: Writer, index: Sequence[int]) -> pd.DataFrame:
        """Evaluate a stack (Algorithm 2); return a row for each policy of `index`: mean and standard error
        of the `true_reward` and, where known, of `gold`; `kl` to the reference in nats, see `divergences`;
        `log_ratio`, the mean of ln(pi / pi_0) over the truncated samples, as trl logs it; `length` in
        tokens; `variance` of the source's rewards, in its unit.
        """
        return self._evaluated(stack, index, _TRAINED).assign(kl=self._kl(stack, index))

    def references(self, runs: Sequence[int]) -> pd.DataFrame:
        """Evaluate the reference policy once for each of `runs` (Algorithm 4); `kl` is zero."""
        return self._evaluated(self.reference, runs, _REFERENCE).assign(kl=0.0)

    def _evaluated(self, writer: Writer, index: Sequence[int], purpose: int) -> pd.DataFrame:
        size = len(index)
        if size != (held := writer.size if isinstance(writer, PolicyStack) else size):
            raise ValueError(f"index: expected one for each of {held} policies, got {size}")
        random = self._random(index, purpose)
        passes = [self._pass(writer, random, index) for _ in range(self.samples)]
        table: dict[str, np.ndarray] = {"policy": np.array(index)}
        for name in passes[0]:
            values = np.stack([one[name].reshape(size, -1) for one in passes], axis=2)
            table[name] = values.mean((1, 2))  # of (N, prompts, samples)
            if name in ("true_reward", "gold"):
                table[f"{name}_error"] = standard_error(values)
        return pd.DataFrame(table)

    @torch.no_grad()
    def _pass(
        self, writer: Writer, random: list[np.random.Generator], index: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Return what is known of one response to each prompt, policy by policy (R,)."""
        count, written = len(self.task.prompts), self._written(writer, random, index, self.sampling)
        asked = list(self.task.prompts) * len(index)
        answers = response_texts(self.tokenizer, written.responses.tolist())
        if self.answers is not None:
            about = {"policy": np.repeat(index, count), "prompt": np.tile(np.arange(count), len(index))}
            self.answers.append(pd.DataFrame(about | {"answer": answers}))
        judgement = self.task.source.judge(asked, answers, np.repeat(np.array(index), count))
        known = self.task.truths(judgement, asked, answers)
        return {
            "true_reward": known.pop("true_reward"),
            "variance": judgement.variance(),
            "log_ratio": self._log_ratio(written).double().cpu().numpy(),
            "length": written.lengths.double().cpu().numpy(),
            **known,
        }

    def _random(self, index: Sequence[int], purpose: int) -> list[np.random.Generator]:
        return [np.random.default_rng([self.seed, policy, purpose]) for policy in index]

    def _written(
        self, writer: Writer, random: list[np.random.Generator], index: Sequence[int], sampling: Sampling
    ) -> Rollout:
        """Let every policy answer every prompt once, (R, T)."""
        count = len(self.task.prompts)
        prompts = Prompts.of(self.tokenizer, self.task.prompts)  # (prompts, P)
        prompts = prompts[torch.arange(count).repeat(len(index))]  # (R, P)
        drawn = [one.random((count, sampling.max_new_tokens), np.float32) for one in random]
        uniforms = torch.from_numpy(np.concatenate(drawn)).to(self.device)  # (R, T)
        ends = end_id(self.tokenizer), pad_id(self.tokenizer)
        written = rollout(writer, prompts.to(self.device), uniforms, sampling, *ends)
        check_finite(written.log_probabilities, index, "in evaluation")
        return written

    @torch.no_grad()
    def _kl(self, stack: Writer, index: Sequence[int]) -> np.ndarray:
        """Return every policy's KL to the reference (N,), over one untruncated response to each prompt."""
        temperature = self.sampling.log_probability_temperature
        whole = {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0}
        random = self._random(index, _DIVERGENCE)
        written = self._written(stack, random, index, self.sampling.model_copy(update=whole))
        found = divergences(stack, self.reference, written, temperature)
        return found.view(len(index), -1).mean(1).double().cpu().numpy()

    def _log_ratio(self, written: Rollout) -> Tensor:
        """Return ln of a response's probability over that by the reference policy (R,)."""
        joined = sequences(written.prompts, written.responses, self.reference.dtype, written.frozen)
        temperature = self.sampling.log_probability_temperature
        reference = self.reference.log_probabilities(joined, temperature, mask=written.mask)
        return ((written.log_probabilities - reference) * written.mask).sum(1)


@torch.no_grad()
def divergences(stack: Writer, reference: ReferencePolicy, written: Rollout, temperature: float) -> Tensor:
    """Return the KL divergence of the policies from the reference (R,), in nats a response.

    It is the sum over a response's tokens of the divergence of the next token's distribution, over all words
    at the temperature. Along responses drawn from those very distributions its mean is that of whole
    responses, by the chain rule; it is never negative.
    """
    joined = sequences(written.prompts, written.responses, reference.dtype, written.frozen)
    (state,) = reference.all_states(joined, [reference.config.num_hidden_layers])  # (R, T, width)
    if stack.shares_output and reference.shares_output:
        states = zip(*(one[written.mask].split(PIECE) for one in (written.hidden, state)), strict=True)
        each = [token_divergences(stack.logits(a), reference.logits(b), temperature) for a, b in states]
        none = torch.zeros(written.mask.shape, device=written.mask.device)
        return none.masked_scatter(written.mask, torch.cat(each)).sum(1)
    rows, tokens = written.mask.shape
    found = torch.zeros(rows, device=written.mask.device)
    for piece in torch.arange(tokens).split(max(1, NUMBERS // (rows * reference.config.vocab_size))):
        logits = stack.logits(written.hidden[:, piece]), reference.logits(state[:, piece])
        found += (token_divergences(*logits, temperature) * written.mask[:, piece]).sum(1)
    return found


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard errors (N,) of means of (N, prompts, samples), the prompts being fixed."""
    _, prompts, samples = values.shape
    within = values.var(axis=2, ddof=1).mean(axis=1)  # (N,)
    return np.asarray(np.sqrt(within / (prompts * samples)))
