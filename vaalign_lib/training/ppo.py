"""PPO for a stack of policies: Algorithm 1 and its vanilla twin, N policies at a time.

Shapes: N policies, B responses of each in a step, T tokens of a response; R = N * B rows, policy by policy.
"""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain
from typing import get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.jobs import bar
from vaalign_lib.models import end_id, pad_id, response_texts
from vaalign_lib.policies.checks import checked_prompts, whole
from vaalign_lib.policies.reference import ReferencePolicy
from vaalign_lib.policies.sampling import (
    Rollout,
    Sequences,
    Writer,
    check_finite,
    response_states,
    rollout,
    sequences,
    token_divergences,
)
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.rewards.base import Array, Judgement, PolicyIndex, Unit
from vaalign_lib.training.critic import Critic, CriticKind, layers_seen, reference_features
from vaalign_lib.training.losses import (
    Losses,
    adapted_coefficient,
    advantages_and_returns,
    kl_penalty,
    losses,
    masked_mean,
    token_rewards,
)
from vaalign_lib.training.objectives import OBJECTIVES, Method, Outcome, Shaped, Task

SHORT = 0.5  # of the reference policy's mean length: below this a policy's responses have collapsed
_ORDER, _WARM_UP = 2**31, 2**31 + 1  # in place of a step, for what is drawn outside of steps


class LengthCollapseWarning(UserWarning):
    """Responses became so short that the penalty, a sum over tokens, was avoided by stopping."""


@dataclass(frozen=True)
class Drawn:
    """Random numbers of a step."""

    prompts: Tensor  # (R,) which are asked
    tokens: NDArray[np.float32]  # (R, T)
    rewards: Array  # (R,)
    orders: Tensor  # (N, ppo_epochs, B), of mini-batches
    dropout: list[int]  # (N,) seeds


@dataclass(frozen=True)
class Written:
    """Responses of a step, as tokens and as texts (R,)."""

    rollout: Rollout
    asked: list[str]
    answers: list[str]


@dataclass(frozen=True)
class Compared:
    """What policies, reference and critic make of responses."""

    sequences: Sequences  # R rows
    features: Tensor | None  # (R, T, F) of a critic with constant ones
    mask: Tensor  # (N, B, T)
    log_probabilities: Tensor  # (N, B, T), of the policies that wrote them
    log_ratio: Tensor  # (N, B, T), of these to the reference's
    penalty: Tensor  # (N, B, T), by the settings' kind
    values: Tensor  # (N, B, T)


class Trainer:
    """Trains a stack of policies; `step` is one iteration of Algorithm 1, in the order of the methods `draw`,
    `write`, `judge`, `outcome`, `shape`, `compare`, `rewards`, `advantages`, `update`.

    Policies share nothing; what is drawn for policy j in step s depends on the seed, j and s alone. On a CPU
    in float32 its result is the same bit by bit in stacks of two and more tiny policies, whoever the others
    are; alone it differs by rounding, for a single matrix gets another kernel, and training can make that
    larger: GPT-2's weights by up to 1e-3. In bfloat16 and on a GPU kernels are chosen by N.

    Attributes:
        index: the policies' global indices (N,).
        unit: of rewards and variances.
        beta: the coefficient of the KL penalty (N,); it moves if it is adaptive.
        mean_weight: of the penalty over the reference's responses (N,).
        reference_length: mean tokens of the reference policy's responses.
        done: steps taken.
    """

    def __init__(
        self,
        stack: PolicyStack,
        reference: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        method: Method,
        settings: PPO,
        sampling: Sampling,
        *,
        policies: Sequence[int] | None = None,
        seed: int = 0,
        critic: CriticKind = "reference_states",
        warm_up: int = 2048,
    ) -> None:
        """Prepare everything but the first step; the stack is changed in place.

        `reference` is the policy that all start from, None where a stack of adapters holds it; `policies` are
        the stack's global indices, by default 0 to N - 1; the critic and the unit of reward come from so many
        responses of the reference as `warm_up` says.
        """
        self.stack, self.tokenizer, self.task = stack, tokenizer, task
        self.method, self.settings, self.sampling = method, settings, sampling
        self.seed, self.done = whole("seed", seed, 0), 0
        index = range(stack.size) if policies is None else policies
        self.index: PolicyIndex = np.array([whole("policies", one, 0) for one in index])
        if self.index.shape != (stack.size,) or len(set(self.index.tolist())) != stack.size:
            raise ValueError(f"policies: expected {stack.size} different indices, got {policies}")
        self._check_kinds(critic)
        self.beta = self._each("beta", method.beta, settings.init_kl_coef)
        self.strength = self._each("strength", method.strength, 1.0)
        self.rate = self._each("learning_rate", method.learning_rate, settings.learning_rate)
        method.check(settings)
        self.reference = ReferencePolicy(stack if reference is None else reference, stack.precision)
        if (known := self.reference.config.vocab_size) != stack.config.vocab_size:
            told = f"it has a vocabulary of {known}, the stack one of {stack.config.vocab_size}"
            raise ValueError(f"reference: {told}; give the model from which the stack started")
        prompts = checked_prompts(tokenizer, task.prompts, stack.config, sampling)
        self._end, self._pad = end_id(tokenizer), pad_id(tokenizer)
        self._prompts = prompts.to(stack.device)
        layers, width = stack.config.num_hidden_layers, stack.config.hidden_size
        self._layers = layers_seen(layers, width) if critic == "reference_states" else [layers]
        self._warm_up(critic, whole("warm_up", warm_up, 2))
        self._trained = stack.parameters() | self.critic.parameters()
        self._parameters = list(self._trained.values())
        self._optimizer = _Adam(self._parameters, self.rate, settings.adam_betas)

    def _check_kinds(self, critic: str) -> None:
        for name, kind in {"task": Task, "method": Method, "settings": PPO, "sampling": Sampling}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        if critic not in get_args(CriticKind):
            raise ValueError(f"critic: expected one of {', '.join(get_args(CriticKind))}, got {critic!r}")

    def _each(self, name: str, value: float | Sequence[float] | None, default: float) -> Tensor:
        """Return one number per policy (N,)."""
        given, size = np.asarray(default if value is None else value), self.stack.size
        if given.dtype.kind not in "fiu":
            raise ValueError(f"{name}: expected numbers, got {value!r}")
        values = torch.as_tensor(given, dtype=torch.float32)
        if values.dim() and values.shape != (size,):
            raise ValueError(f"{name}: expected one number or {size}, got {tuple(values.shape)}")
        if not bool((values.isfinite() & (values >= 0)).all()):
            raise ValueError(f"{name}: expected finite numbers of at least 0, got {value}")
        return values.expand(size).clone().to(self.stack.device)

    # --- training -----------------------------------------------------------------------------------

    def train(self, steps: int | None = None) -> pd.DataFrame:
        """Take steps, by default up to the settings' iterations; return a row per policy and step.

        Raises:
            ValueError: there are none to take, or the rate, which falls linearly, is 0 by then.
        """
        last = self.settings.iterations if steps is None else self.done + whole("steps", steps, 0)
        if last <= self.done:
            raise ValueError(f"steps: expected steps to take, all of {self.done} are done")
        if self.settings.schedule == "linear" and last > self.settings.iterations:
            told = f"the learning rate is 0 after {self.settings.iterations} of {last} steps"
            raise ValueError(f"steps: {told}; give the trainer more iterations")
        log = pd.concat(list(self._steps(last)), ignore_index=True)
        final = log[log["step"] > self.done - 10].groupby("policy")["length"].mean()
        if short := final.index[final < SHORT * self.reference_length].tolist():
            half = f"half the reference policy's mean length, {self.reference_length:.1f} tokens"
            told = f"{len(short)} of {len(final)} policies write responses of less than {half}"
            warnings.warn(f"{told}: policies {short[:8]}", LengthCollapseWarning, stacklevel=2)
        return log

    def _steps(self, last: int) -> Iterator[pd.DataFrame]:
        """Take steps until `last` are done and yield the log of each, with a bar."""
        name = f"{self.stack.size} policies, {self.method.objective.replace('_', ' ')}"
        with bar(last, name, self.done) as shown:
            while self.done < last:
                started = time.perf_counter()
                log = self.step()
                speed = log["length"].sum() * self.settings.batch_size / (time.perf_counter() - started)
                means = f"reward {log['reward'].mean():.2f}, KL {log['kl'].mean():.2f} nats"
                shown.set_postfix_str(f"{means}, {speed:,.0f} tokens/s")
                shown.update()
                yield log

    def step(self) -> pd.DataFrame:
        """Write responses, have them judged, improve every policy; return a row per policy.

        Raises:
            ValueError: a policy has diverged, or a judgement, a true reward or gold is none.
        """
        now = f"step {self.done + 1}"
        drawn = self.draw()
        written = self.write(self.stack, drawn)
        check_finite(written.rollout.log_probabilities, self.index, now)
        judgement = self.judge(written)  # Algorithm 6
        outcome = self.outcome(judgement, drawn)  # Algorithms 7 and 8
        shaped = self.shape(outcome)  # Equation (5) or (6)
        compared = self.compare(written.rollout)
        rewards = self.rewards(shaped, compared)
        advantages, returns = self.advantages(rewards, compared)
        log = self._measured(written.rollout, outcome, shaped, compared, returns)
        known = self.task.truths(judgement, written.asked, written.answers)  # Algorithm 9
        log |= {name: self._rows(value).mean(1) for name, value in known.items()}
        log |= self.update(compared, advantages, returns, drawn)  # Algorithm 5
        check_finite(torch.stack(list(log.values()), dim=1), self.index, now)
        for weights in self._parameters:
            check_finite(torch.linalg.vector_norm(weights.detach().flatten(1), torch.inf, 1), self.index, now)
        ended = (written.rollout.responses == self._end).any(1)
        for name, values in {"length": written.rollout.lengths, "finished": ended}.items():
            log[name] = values.float().view(self.stack.size, -1).mean(1)
        if (control := self.settings.adaptive_kl) is not None:
            limits = {**control.model_dump(), "batch": self.settings.batch_size}
            self.beta = adapted_coefficient(self.beta, log["divergence"], **limits)
        self.done += 1
        table = {name: value.double().cpu().numpy() for name, value in log.items()}
        return pd.DataFrame({"policy": self.index, "step": self.done, **table})

    # --- checkpoints ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return all that changes in training, by name; what is drawn depends on the step alone."""
        weights = {f"weights.{name}": p.detach() for name, p in self._trained.items()}
        moments = {
            f"adam.{place}.{name}": tensor
            for place, kept in self._optimizer.adam.state_dict()["state"].items()
            for name, tensor in kept.items()
        }
        return weights | moments | {"beta": self.beta, "done": torch.tensor(self.done)}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state of a trainer that was made with the same arguments; others are refused."""
        held = {f"weights.{name}": p for name, p in self._trained.items()} | {"beta": self.beta}
        for name, tensor in held.items():
            if name not in state or state[name].shape != tensor.shape:
                got = tuple(state[name].shape) if name in state else "none"
                raise ValueError(f"state: {name}: expected shape {tuple(tensor.shape)}, got {got}")
        for name, parameter in self._trained.items():
            parameter.copy_(state[f"weights.{name}"])
        self.beta = state["beta"].to(self.stack.device)
        self.done = int(state["done"])
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name in (one for one in state if one.startswith("adam.")):
            _, place, moment = name.split(".")
            moments[int(place)][moment] = state[name]
        adam = self._optimizer.adam
        adam.load_state_dict(adam.state_dict() | {"state": dict(moments)})

    # --- random numbers and responses -----------------------------------------------------------------

    def draw(self) -> Drawn:
        """Draw what a step needs; each policy's part depends on seed, policy and step alone."""
        size, epochs = self.settings.batch_size, self.settings.ppo_epochs
        drawn = []
        for policy in self.index.tolist():
            random = np.random.default_rng([self.seed, policy, self.done])
            tokens = random.random((size, self.sampling.max_new_tokens), dtype=np.float32)
            rewards = random.random(size)
            orders = random.permuted(np.tile(np.arange(size), (epochs, 1)), axis=1)  # (epochs, B)
            drawn.append((self._turn(policy), tokens, rewards, orders, int(random.integers(2**31))))
        prompts, tokens, rewards, orders, dropout = zip(*drawn, strict=True)
        return Drawn(
            torch.from_numpy(np.concatenate(prompts)),
            np.concatenate(tokens),
            np.concatenate(rewards),
            torch.from_numpy(np.stack(orders)).to(self.stack.device),
            list(dropout),
        )

    def _turn(self, policy: int) -> NDArray[np.int64]:
        """Return the prompts of this step (B,): every epoch goes through all in the policy's own order."""
        known, size = len(self.task.prompts), self.settings.batch_size
        places = range(self.done * size, (self.done + 1) * size)
        return np.array([_order(self.seed, policy, one // known, known)[one % known] for one in places])

    def write(self, writer: Writer, drawn: Drawn) -> Written:
        """Let the stack, or the reference, answer the prompts that were drawn."""
        prompts = self._prompts[drawn.prompts.to(self.stack.device)]
        uniforms = torch.from_numpy(drawn.tokens).to(self.stack.device)  # (R, T)
        written = rollout(writer, prompts, uniforms, self.sampling, self._end, self._pad, self._layers)
        asked = [self.task.prompts[k] for k in drawn.prompts.tolist()]
        return Written(written, asked, response_texts(self.tokenizer, written.responses.tolist()))

    # --- from responses to advantages -----------------------------------------------------------------

    def judge(self, written: Written) -> Judgement:
        """Have the stack's responses judged (Algorithm 6), (R,)."""
        return self.task.judge(written.asked, written.answers, self.index.repeat(self.settings.batch_size))

    def outcome(self, judgement: Judgement, drawn: Drawn) -> Outcome:
        """Return sampled reward (Algorithm 7) and variance (Algorithm 8), (N, B) in the regime's unit."""
        return self._outcome(judgement, drawn, self.strength)

    def _outcome(self, judgement: Judgement, drawn: Drawn, strength: Tensor) -> Outcome:
        """Return what is said of responses of as many policies as there are strengths."""
        each = strength.repeat_interleave(len(drawn.rewards) // len(strength))  # (R,)
        said = self.unit.of_judgement(judgement, drawn.rewards, each.double().cpu().numpy())
        return Outcome(*(self._rows(one, len(strength)) for one in said))

    def _rows(self, values: Array, policies: int | None = None) -> Tensor:
        """Arrange what is known of responses by policy (policies, responses)."""
        held = torch.from_numpy(values).float()
        if not bool(held.isfinite().all()):
            told = f"a reward or variance of {np.abs(values).max():.3g}, in the unit of training,"
            raise ValueError(f"source: {told} is not finite in float32")
        return held.to(self.stack.device).view(policies or self.stack.size, -1)

    def shape(self, outcome: Outcome) -> Shaped:
        """Return score and weight of the penalty by the method's objective (N, B)."""
        objective = OBJECTIVES[self.method.objective]
        return objective(outcome, self.beta[:, None], self.strength[:, None])

    @torch.no_grad()
    def compare(self, written: Rollout) -> Compared:
        """Compare with the reference, and ask the critic."""
        kind, temperature = self.settings.kl_penalty, self.sampling.log_probability_temperature
        joined = sequences(written.prompts, written.responses, self.stack.dtype, written.frozen)
        states = self.reference.all_states(joined, self._layers)
        mask = written.mask.view(self.stack.size, self.settings.batch_size, -1)  # (N, B, T)
        old, full, rounded = written.log_probabilities, None, self.stack.dtype != torch.float32
        if rounded or kind == "full":
            state = response_states(self.stack, joined)  # (R, T, width)
            if rounded:  # in few bits only a whole pass is exact
                old = self.stack.scored(state, joined.responses, temperature, written.mask)
            if kind == "full":
                logits = self.stack.logits(state)  # (R, T, words)
                full = token_divergences(logits, self.reference.logits(states[-1]), temperature)
                full = full.view(mask.shape)  # (N, B, T)
        reference = self.reference.log_probabilities(joined, temperature, states[-1], written.mask)  # (R, T)
        log_ratio = (old.view(mask.shape) - reference.view(mask.shape)) * mask  # (N, B, T)
        constant = self.critic.kind == "reference_states"
        features = reference_features(states, written.mask) if constant else None  # (R, T, F)
        values = self.critic.values(written.hidden if features is None else features)  # (N, B, T)
        penalty = kl_penalty(log_ratio, kind, full) * mask
        return Compared(joined, features, mask, old.view(mask.shape), log_ratio, penalty, values)

    def rewards(self, shaped: Shaped, compared: Compared) -> Tensor:
        """Return every token's reward (N, B, T); what it answers for depends on the method's credit."""
        coefficient = self.beta[:, None] * shaped.weight  # (N, B)
        even = coefficient
        if self.method.credit == "sequence":  # what varies with the response comes with its score
            even = (self.beta * self.mean_weight)[:, None].expand_as(coefficient)  # (N, B)
        late = (coefficient - even) * compared.penalty.sum(2)  # (N, B)
        return token_rewards(shaped.score - late, compared.penalty, even, compared.mask)

    def advantages(self, rewards: Tensor, compared: Compared) -> tuple[Tensor, Tensor]:
        """Return whitened advantages, and returns (N, B, T)."""
        gamma, lam = self.settings.gamma, self.settings.lam
        return advantages_and_returns(compared.values, rewards, compared.mask, gamma, lam)

    def _measured(
        self, written: Rollout, outcome: Outcome, shaped: Shaped, compared: Compared, returns: Tensor
    ) -> dict[str, Tensor]:
        """Return what is logged of a batch before its update (N,)."""
        mask, penalty = compared.mask, compared.penalty.sum(2)  # (N, B, T), (N, B)
        return {
            "reward": outcome.reward.mean(1),
            "score": shaped.score.mean(1),
            "variance": outcome.variance.mean(1),
            "kl": compared.log_ratio.sum(2).mean(1),
            "divergence": penalty.mean(1),  # by the penalty's kind, what the controller sees
            "penalty": (self.beta[:, None] * shaped.weight * penalty).mean(1),
            "coefficient": self.beta,
            "entropy": masked_mean(written.entropy.view(mask.shape), mask),
            "explained_variance": _explained(compared.values, returns, mask),
        }

    # --- the update ---------------------------------------------------------------------------------

    def update(
        self, compared: Compared, advantages: Tensor, returns: Tensor, drawn: Drawn
    ) -> dict[str, Tensor]:
        """Descend the clipped losses in epochs of mini-batches (Algorithm 5); return their means (N,)."""
        settings, seen = self.settings, []
        with self.stack.updating(drawn.dropout):
            for epoch in range(settings.ppo_epochs):
                parts = drawn.orders[:, epoch].split(settings.mini_batch_size, dim=1)
                for k, part in enumerate(parts, 1):
                    measured = dict(vars(self.losses(compared, advantages, returns, part)))
                    (measured["loss"].sum() / settings.gradient_accumulation_steps).backward()
                    if k % settings.gradient_accumulation_steps == 0:
                        measured["gradient_norm"] = self._descend()
                    seen.append(measured)
        return {name: _mean([one[name] for one in seen if name in one]) for name in seen[-1]}

    def losses(self, compared: Compared, advantages: Tensor, returns: Tensor, part: Tensor) -> Losses:
        """Return the losses of some responses of every policy; `part` is (N, mini-batch)."""
        size, every = compared.mask.shape[:2]
        policy = torch.arange(size, device=part.device)[:, None]  # (N, 1)
        rows = (policy * every + part).ravel()  # (N * mini-batch,)
        joined, settings = compared.sequences[rows], self.settings
        states = response_states(self.stack, joined)  # (N * mini-batch, T, width)
        temperature = self.sampling.log_probability_temperature
        seen = compared.mask.flatten(0, 1)[rows]  # (N * mini-batch, T)
        new = self.stack.scored(states, joined.responses, temperature, seen)
        values = self.critic.values(states if compared.features is None else compared.features[rows])
        known = compared.values, advantages, returns, compared.mask
        limits = settings.model_dump(include={"cliprange", "cliprange_value", "vf_coef", "ratio_threshold"})
        old = compared.log_probabilities[policy, part]  # (N, mini-batch, T)
        return losses(new.view(values.shape), old, values, *(one[policy, part] for one in known), **limits)

    def _descend(self) -> Tensor:
        """Clip every policy's gradient by its own norm and take a step; return the norms (N,)."""
        settings = self.settings
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) ** 2 for g in gradients]
        norm = reduce(torch.add, squares).sqrt()  # in this order whatever N is, unlike torch.sum
        if settings.max_grad_norm is not None:
            factor = (settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)  # (N,)
            for gradient in gradients:
                gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        left = 1 - self.done / settings.iterations if settings.schedule == "linear" else 1.0
        self._optimizer.step(max(left, 0.0))
        return norm

    # --- before the first step ------------------------------------------------------------------------

    def _warm_up(self, kind: CriticKind, count: int) -> None:
        """Let the reference policy answer; set the unit of rewards and start the critic from that.

        Nothing here depends on which policies share the stack, unless their strengths differ: the critic
        of `effective` starts from their mean.
        """
        random = np.random.default_rng([self.seed, _WARM_UP])
        which = torch.from_numpy(random.integers(len(self.task.prompts), size=count))
        tokens = random.random((count, self.sampling.max_new_tokens), dtype=np.float32)
        drawn = Drawn(which, tokens, random.random(count), torch.empty(0), [])
        written = self.write(self.reference, drawn)
        answers, mask = written.rollout, written.rollout.mask  # (warm-up, T)
        self.reference_length = float(answers.lengths.float().mean())
        judges = np.arange(count) % self.task.population
        judgement = self.task.judge(written.asked, written.answers, judges)
        self.unit = Unit()
        if self.method.standardized:
            self.unit = Unit.of(judgement.sample(drawn.rewards), judgement.weight())
        joined = sequences(answers.prompts, answers.responses, self.stack.dtype, answers.frozen)
        states = self.reference.all_states(joined, self._layers)
        features = reference_features(states, mask) if kind == "reference_states" else states[-1]
        self.critic = Critic(kind, self.stack.size, features, mask)
        same = bool((self.strength == self.strength[0]).all())  # a mean of copies may round
        strength = self.strength[0] if same else self.strength.mean()
        shaped = self.shape(self._outcome(judgement, drawn, strength[None]))
        self.mean_weight = shaped.weight.mean(1).expand(self.stack.size)
        if kind == "reference_states":  # trl's head on the policy's own states starts cold
            self.critic.fit(features, mask, shaped.score.expand(self.stack.size, -1))


@lru_cache(maxsize=4096)
def _order(seed: int, policy: int, epoch: int, prompts: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, policy, _ORDER, epoch]).permutation(prompts)


class _Adam:
    """Adam for stacked weights, with a learning rate for each policy.

    Neighbours with the same rate share a call of torch's fused Adam on their slices.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rate: Tensor, betas: tuple[float, float]) -> None:
        self._parameters = list(parameters)
        rates, counts = torch.unique_consecutive(rate.cpu(), return_counts=True)
        self._rates, self._counts = rates.tolist(), counts.tolist()
        split = [p.detach().split(self._counts) for p in self._parameters]
        self._views = list(zip(*split, strict=True))  # of the parameters, for each rate
        self.adam = torch.optim.Adam([{"params": views} for views in self._views], betas=betas, fused=True)

    def step(self, factor: float) -> None:
        """Take a step along the parameters' gradients, at a factor of the rates, and forget them."""
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        for parameter, views in zip(self._parameters, zip(*self._views, strict=True), strict=True):
            if parameter.grad is not None:
                for view, gradient in zip(views, parameter.grad.split(self._counts), strict=True):
                    view.grad = gradient
        self.adam.step()
        for tensor in chain(self._parameters, *self._views):
            tensor.grad = None


def _mean(values: list[Tensor]) -> Tensor:
    """Return the mean of vectors (N,), added in their order: torch's own sum rounds as N has it."""
    return reduce(torch.add, [value.detach() for value in values]) / len(values)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain (N,)."""
    error = returns - values
    rest = masked_mean(error**2, mask) - masked_mean(error, mask) ** 2  # (N,)
    spread = masked_mean(returns**2, mask) - masked_mean(returns, mask) ** 2
    return 1 - rest / spread.clamp(min=1e-8)
