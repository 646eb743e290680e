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
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import Prompts, Rollout, Writer, check_finite, rollout, sequences
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Sampling
from vaalign_lib.training.objectives import Task

_TRAINED, _REFERENCE = 2**31 + 2, 2**31 + 3  # what random numbers are for; training has steps here


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
        of the `true_reward` and, where known, of `gold`; `kl` to the reference in nats; `length` in
        tokens; `variance` of the source's rewards, in its unit.
        """
        return self._evaluated(stack, index, _TRAINED)

    def references(self, runs: Sequence[int]) -> pd.DataFrame:
        """Evaluate the reference policy once for each of `runs` (Algorithm 4); `kl` is zero."""
        return self._evaluated(self.reference, runs, _REFERENCE)

    def _evaluated(self, writer: Writer, index: Sequence[int], purpose: int) -> pd.DataFrame:
        size = len(index)
        if size != (held := writer.size if isinstance(writer, PolicyStack) else size):
            raise ValueError(f"index: expected one for each of {held} policies, got {size}")
        random = [np.random.default_rng([self.seed, policy, purpose]) for policy in index]
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
        count, size = len(self.task.prompts), len(index)
        asked = list(self.task.prompts) * size
        prompts = Prompts.of(self.tokenizer, asked[:count])[torch.arange(count).repeat(size)]  # (R, P)
        drawn = [one.random((count, self.sampling.max_new_tokens), np.float32) for one in random]
        uniforms = torch.from_numpy(np.concatenate(drawn)).to(self.device)  # (R, T)
        ends = end_id(self.tokenizer), pad_id(self.tokenizer)
        written = rollout(writer, prompts.to(self.device), uniforms, self.sampling, *ends)
        check_finite(written.log_probabilities, index, "in evaluation")
        answers = response_texts(self.tokenizer, written.responses.tolist())
        judgement = self.task.source.judge(asked, answers, np.repeat(np.array(index), count))
        known = self.task.truths(judgement, asked, answers)
        return {
            "true_reward": known.pop("true_reward"),
            "variance": judgement.variance(),
            "kl": self._log_ratio(written).double().cpu().numpy(),
            "length": written.lengths.double().cpu().numpy(),
            **known,
        }

    def _log_ratio(self, written: Rollout) -> Tensor:
        """Return ln of a response's probability over that by the reference policy (R,)."""
        joined = sequences(written.prompts, written.responses, self.reference.dtype)
        reference = self.reference.log_probabilities(joined, self.sampling.log_probability_temperature)
        return ((written.log_probabilities - reference) * written.mask).sum(1)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Return the standard errors (N,) of means of (N, prompts, samples), the prompts being fixed."""
    _, prompts, samples = values.shape
    within = values.var(axis=2, ddof=1).mean(axis=1)
    return np.asarray(np.sqrt(within / (prompts * samples)))
