"""PPO for a stack of policies: Algorithm 1 and its vanilla twin, N policies at a time.

Each policy has its own prompts, its own random numbers, its own coefficient of the KL penalty, its own
norm of the gradient and its own optimizer state. What is drawn for policy j in step s depends on the
seed, j and s alone. On a CPU in float32 its result is the same bit by bit in stacks of two and more tiny
policies, whoever the others are (the tests say of which); alone it differs by rounding, for a single
matrix gets another kernel, and training can make that larger: GPT-2's weights by up to 1e-3. In bfloat16
and on a GPU kernels are chosen by N, and results differ by more.
"""

import time
import warnings
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
    token_log_probabilities,
)
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Sampling
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, PolicyIndex, Unit
from vaalign_lib.training.critic import Critic, CriticKind, layers_seen, reference_features
from vaalign_lib.training.losses import (
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
class Batch:
    """One batch of every policy, as an update needs it; (N, responses, tokens) unless said otherwise."""

    sequences: Sequences
    features: Tensor | None  # of a critic with constant features (rows, tokens, features)
    mask: Tensor
    log_probabilities: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class Trainer:
    """Trains a stack of policies.

    Attributes:
        stack: the policies.
        index: their global indices (N,).
        unit: of rewards and variances.
        beta: the coefficient of the KL penalty (N,); it moves if it is adaptive.
        mean_weight: of the penalty over the reference's responses (N,).
        critic: what the policies expect.
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
        """Prepare everything but the first step.

        Args:
            stack: N policies, changed in place.
            reference: the policy they start from; None where a stack of adapters holds it.
            tokenizer: of both.
            task: prompts, source and gold.
            method: objective, coefficients, learning rates.
            settings: of PPO.
            sampling: of the responses.
            policies: global indices of the stack's policies, by default 0 to N - 1.
            seed: of the study.
            critic: see `critics`.
            warm_up: responses of the reference policy that the critic and the unit of reward come from.
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
            raise ValueError(
                f"reference: it has a vocabulary of {known}, the stack one of {stack.config.vocab_size}; "
                "give the model from which the stack started"
            )
        prompts = checked_prompts(tokenizer, task.prompts, stack.config, sampling)
        self._end, self._pad = end_id(tokenizer), pad_id(tokenizer)
        self._prompts = prompts.to(stack.device)
        self._layers = [stack.config.num_hidden_layers]
        if critic == "reference_states":
            self._layers = layers_seen(stack.config.num_hidden_layers, stack.config.hidden_size)
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
        size = self.stack.size
        given = np.asarray(default if value is None else value)
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
            raise ValueError(
                f"steps: the learning rate is 0 after {self.settings.iterations} of {last} steps; give "
                "the trainer more iterations"
            )
        log = pd.concat(list(self.steps(last)), ignore_index=True)
        self._watch_lengths(log)
        return log

    def steps(self, last: int) -> Iterator[pd.DataFrame]:
        """Take steps until `last` are done and yield the log of each, with a bar."""
        name = f"{self.stack.size} policies, {self.method.objective.replace('_', ' ')}"
        with bar(last, name, self.done) as shown:
            while self.done < last:
                started = time.perf_counter()
                log = self.step()
                speed = log["length"].sum() * self.settings.batch_size
                speed /= time.perf_counter() - started
                shown.set_postfix_str(
                    f"reward {log['reward'].mean():.2f}, KL {log['kl'].mean():.2f} nats, "
                    f"{speed:,.0f} tokens/s"
                )
                shown.update()
                yield log

    def _watch_lengths(self, log: pd.DataFrame) -> None:
        final = log[log["step"] > self.done - 10].groupby("policy")["length"].mean()
        short = final.index[final < SHORT * self.reference_length].tolist()
        if short:
            warnings.warn(
                f"{len(short)} of {len(final)} policies write responses of less than half the reference "
                f"policy's mean length, {self.reference_length:.1f} tokens: policies {short[:8]}",
                LengthCollapseWarning,
                stacklevel=3,
            )

    def step(self) -> pd.DataFrame:
        """Write responses, have them judged, improve every policy; return a row per policy.

        Raises:
            ValueError: a policy has diverged, or a judgement, a true reward or gold is none.
        """
        now = f"step {self.done + 1}"
        size, rows = self.stack.size, self.settings.batch_size
        drawn = [self._draw(int(policy)) for policy in self.index]
        which = torch.from_numpy(np.concatenate([one.prompts for one in drawn]))
        uniforms = np.concatenate([one.tokens for one in drawn])
        written, asked, answers = self._write(self.stack, which, uniforms)
        check_finite(written.log_probabilities, self.index, now)
        judgement = self._judged(asked, answers, self.index.repeat(rows))
        uniforms = np.concatenate([one.rewards for one in drawn])
        outcome = self._outcome(judgement, uniforms, self.strength.repeat_interleave(rows), size)
        batch, log = self._assess(written, outcome)
        log |= self._truths(judgement, asked, answers)
        log |= self._update(batch, drawn)
        check_finite(torch.stack(list(log.values()), dim=1), self.index, now)
        for weights in self._parameters:
            check_finite(torch.linalg.vector_norm(weights.detach().flatten(1), torch.inf, 1), self.index, now)
        log["length"] = _per_policy(written.lengths, size)
        log["finished"] = _per_policy((written.responses == self._end).any(1), size)
        if (control := self.settings.adaptive_kl) is not None:
            self.beta = adapted_coefficient(
                self.beta, log["divergence"], target=control.target, horizon=control.horizon, batch=rows
            )
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
        """Go back to a state of a trainer that was made with the same arguments.

        Raises:
            ValueError: the state is that of another trainer.
        """
        held = {f"weights.{name}": p for name, p in self._trained.items()} | {"beta": self.beta}
        for name, tensor in held.items():
            if name not in state or state[name].shape != tensor.shape:
                got = tuple(state[name].shape) if name in state else "none"
                raise ValueError(f"state: {name}: expected shape {tuple(tensor.shape)}, got {got}")
        for name, parameter in self._trained.items():
            parameter.copy_(state[f"weights.{name}"])
        self.beta = state["beta"].to(self.stack.device)
        self.done = int(state["done"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            kind, *place = name.split(".")
            if kind == "adam":
                moments.setdefault(int(place[0]), {})[place[1]] = tensor
        adam = self._optimizer.adam
        adam.load_state_dict(adam.state_dict() | {"state": moments})

    # --- random numbers -----------------------------------------------------------------------------

    def _draw(self, policy: int) -> "_Drawn":
        """Draw what a policy needs in this step: it depends on seed, policy and step alone."""
        settings = self.settings
        random = np.random.default_rng([self.seed, policy, self.done])
        order = np.tile(np.arange(settings.batch_size), (settings.ppo_epochs, 1))
        return _Drawn(
            self._turn(policy),
            random.random((settings.batch_size, self.sampling.max_new_tokens), dtype=np.float32),
            random.random(settings.batch_size),
            random.permuted(order, axis=1),
            int(random.integers(2**31)),
        )

    def _turn(self, policy: int) -> NDArray[np.int64]:
        """Return the prompts of this step: every epoch goes through all in the policy's own order."""
        known, size = len(self.task.prompts), self.settings.batch_size
        places = np.arange(self.done * size, (self.done + 1) * size)
        return np.array(
            [_order(self.seed, policy, place // known, known)[place % known] for place in places.tolist()]
        )

    # --- from responses to advantages -----------------------------------------------------------------

    def _write(
        self, writer: Writer, which: Tensor, uniforms: NDArray[np.float32]
    ) -> tuple[Rollout, list[str], list[str]]:
        """Return responses to the chosen prompts, and both as texts."""
        prompts = self._prompts[which.to(self.stack.device)]
        numbers = torch.from_numpy(uniforms).to(self.stack.device)
        written = rollout(writer, prompts, numbers, self.sampling, self._end, self._pad)
        asked = [self.task.prompts[k] for k in which.tolist()]
        return written, asked, response_texts(self.tokenizer, written.responses.tolist())

    def _judged(self, asked: list[str], answers: list[str], policies: PolicyIndex) -> Judgement:
        """Ask the source, and refuse what would spoil the weights."""
        judgement = self.task.source.judge(asked, answers, policies)
        if not isinstance(judgement, Members | Interval):
            raise TypeError(
                f"source: expected Members or Interval, got {type(judgement).__name__} from judge()"
            )
        if isinstance(judgement, Members):
            _checked("source: scores", judgement.scores, answers, judgement.scores.shape[1:])
        else:
            _checked("source: bounds", judgement.bounds, answers, (2,))
            if judgement.quantiles is not None:
                _checked("source: quantiles", judgement.quantiles, answers, ())
        return judgement

    def _outcome(self, judgement: Judgement, uniforms: Array, strength: Tensor, policies: int) -> Outcome:
        """Return what the source says, in the unit of the regime (policies, responses)."""
        said = self.unit.of_judgement(judgement, uniforms, strength.double().cpu().numpy())
        return Outcome(*(self._rows(one, policies) for one in said))

    def _rows(self, values: Array, policies: int) -> Tensor:
        """Arrange what is known of responses by policy (policies, responses)."""
        held = torch.from_numpy(values).float()
        if not bool(held.isfinite().all()):
            raise ValueError(
                f"source: a reward or variance of {np.abs(values).max():.3g}, in the unit of training, "
                "is not finite in float32"
            )
        return held.to(self.stack.device).view(policies, -1)

    def _shaped(self, outcome: Outcome) -> Shaped:
        objective = OBJECTIVES[self.method.objective]
        return objective(outcome, self.beta[:, None], self.strength[:, None])

    @torch.no_grad()
    def _assess(self, written: Rollout, outcome: Outcome) -> tuple[Batch, dict[str, Tensor]]:
        """Compare with the reference, shape the rewards, estimate advantages."""
        settings, size = self.settings, self.stack.size
        joined = sequences(written.prompts, written.responses, self.stack.dtype)
        states = self.reference.all_states(joined, self._layers)
        mask = written.mask.view(size, settings.batch_size, -1)
        old = self._old_log_probabilities(joined, written).view(mask.shape)
        heat = self.sampling.log_probability_temperature
        reference = self.reference.log_probabilities(joined, heat, states[-1])
        log_ratio = (old - reference.view(mask.shape)) * mask
        full = self._divergence(joined, states[-1]) if settings.kl_penalty == "full" else None
        penalty = kl_penalty(log_ratio, settings.kl_penalty, full) * mask
        shaped = self._shaped(outcome)
        coefficient = self.beta[:, None] * shaped.weight
        even = coefficient
        if self.method.credit == "sequence":  # what varies with the response comes with its score
            even = (self.beta * self.mean_weight)[:, None].expand_as(coefficient)
        late = (coefficient - even) * penalty.sum(2)
        rewards = token_rewards(shaped.score - late, penalty, even, mask)
        constant = None
        if self.critic.kind == "reference_states":
            constant = reference_features(states, written.mask)
        values = self.critic.values(written.hidden if constant is None else constant)
        advantages, returns = advantages_and_returns(values, rewards, mask, settings.gamma, settings.lam)
        log = {
            "reward": outcome.reward.mean(1),
            "score": shaped.score.mean(1),
            "variance": outcome.variance.mean(1),
            "kl": log_ratio.sum(2).mean(1),
            "divergence": penalty.sum(2).mean(1),  # by the penalty's kind, what the controller sees
            "penalty": (coefficient * penalty.sum(2)).mean(1),
            "coefficient": self.beta,
            "entropy": masked_mean(written.entropy.view(mask.shape), mask),
            "explained_variance": _explained(values, returns, mask),
        }
        return Batch(joined, constant, mask, old, values, advantages, returns), log

    def _old_log_probabilities(self, joined: Sequences, written: Rollout) -> Tensor:
        """Return what the policies thought of their tokens; in few bits only a whole pass is exact."""
        if self.stack.dtype == torch.float32:
            return written.log_probabilities
        heat = self.sampling.log_probability_temperature
        logits = self.stack.logits(response_states(self.stack, joined))
        return token_log_probabilities(logits, joined.responses, heat)

    def _divergence(self, joined: Sequences, reference_state: Tensor) -> Tensor:
        """Return KL(policy || reference) of every token's distribution (N, responses, tokens)."""
        heat = self.sampling.log_probability_temperature
        policy = (self.stack.logits(response_states(self.stack, joined)) / heat).log_softmax(-1)
        reference = (self.reference.logits(reference_state) / heat).log_softmax(-1)
        divergence = (policy.exp() * (policy - reference)).sum(-1)
        return divergence.view(self.stack.size, -1, divergence.shape[1])

    def _truths(self, judgement: Judgement, asked: list[str], answers: list[str]) -> dict[str, Tensor]:
        """Return the true reward (Algorithm 9) and gold, in their own units (N,)."""
        known = truths(self.task, judgement, asked, answers)
        size = self.stack.size
        return {name: self._rows(value, size).mean(1) for name, value in known.items()}

    # --- the update ---------------------------------------------------------------------------------

    def _update(self, batch: Batch, drawn: list["_Drawn"]) -> dict[str, Tensor]:
        """Descend the clipped losses in epochs of mini-batches; return their means (N,)."""
        settings = self.settings
        passes = settings.gradient_accumulation_steps
        orders = torch.from_numpy(np.stack([one.orders for one in drawn])).to(self.stack.device)
        seen: list[dict[str, Tensor]] = []
        with self.stack.updating([one.dropout for one in drawn]):
            for epoch in range(settings.ppo_epochs):
                for k, part in enumerate(orders[:, epoch].split(settings.mini_batch_size, dim=1), 1):
                    measured = self._pass(batch, part)
                    (measured["loss"].sum() / passes).backward()
                    if k % passes == 0:
                        measured["gradient_norm"] = self._descend()
                    seen.append(measured)
        return {name: _mean([one[name] for one in seen if name in one]) for name in seen[-1]}

    def _pass(self, batch: Batch, part: Tensor) -> dict[str, Tensor]:
        """Return the losses of some responses of every policy (N,); `part` is (N, mini-batch)."""
        size, every = batch.mask.shape[:2]
        policy = torch.arange(size, device=part.device)[:, None]
        rows = (policy * every + part).ravel()
        joined = batch.sequences[rows]
        states = response_states(self.stack, joined)
        heat = self.sampling.log_probability_temperature
        new = token_log_probabilities(self.stack.logits(states), joined.responses, heat)
        features = states if batch.features is None else batch.features[rows]
        values = self.critic.values(features)
        settings = self.settings
        found = losses(
            new.view(values.shape),
            batch.log_probabilities[policy, part],
            values,
            batch.values[policy, part],
            batch.advantages[policy, part],
            batch.returns[policy, part],
            batch.mask[policy, part],
            cliprange=settings.cliprange,
            cliprange_value=settings.cliprange_value,
            vf_coef=settings.vf_coef,
            ratio_threshold=settings.ratio_threshold,
        )
        return {
            "loss": found.total,
            "policy_loss": found.policy,
            "value_loss": found.value,
            "ratio": found.ratio,
            "clip_fraction": found.clipped,
            "value_clip_fraction": found.value_clipped,
            "approximate_kl": found.approximate_kl,
        }

    def _descend(self) -> Tensor:
        """Clip every policy's gradient by its own norm and take a step; return the norms (N,)."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1) ** 2 for g in gradients]
        norm = reduce(torch.add, squares).sqrt()  # in this order whatever N is, unlike torch.sum
        if (most := self.settings.max_grad_norm) is not None:
            factor = (most / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))
        settings = self.settings
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
        uniforms = random.random((count, self.sampling.max_new_tokens), dtype=np.float32)
        written, asked, answers = self._write(self.reference, which, uniforms)
        self.reference_length = float(written.lengths.float().mean())
        judges = np.arange(count) % self.task.population
        judgement = self._judged(asked, answers, judges)
        rewards = random.random(count)
        self.unit = Unit()
        if self.method.standardized:
            self.unit = Unit.of(judgement.sample(rewards), judgement.variance())
        states = self.reference.all_states(
            sequences(written.prompts, written.responses, self.stack.dtype), self._layers
        )
        features = states[-1]
        if kind == "reference_states":
            features = reference_features(states, written.mask)
        self.critic = Critic(kind, self.stack.size, features, written.mask)
        same = bool((self.strength == self.strength[0]).all())  # a mean of copies may round
        strength = (self.strength[0] if same else self.strength.mean()).expand(count)
        shaped = self._shaped(self._outcome(judgement, rewards, strength, 1))
        self.mean_weight = shaped.weight.mean(1).expand(self.stack.size)
        if kind == "reference_states":  # trl's head on the policy's own states starts cold
            self.critic.fit(features, written.mask, shaped.score.expand(self.stack.size, -1))


@dataclass(frozen=True)
class _Drawn:
    """Random numbers of one policy in one step."""

    prompts: NDArray[np.int64]  # (responses,)
    tokens: NDArray[np.float32]  # (responses, tokens)
    rewards: Array  # (responses,)
    orders: NDArray[np.int64]  # (ppo_epochs, responses)
    dropout: int


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
        self._rates = rates.tolist()
        ends = counts.cumsum(0).tolist()
        self._slices = [slice(end - n, end) for end, n in zip(ends, counts.tolist(), strict=True)]
        self._views = [[p.detach()[s] for p in self._parameters] for s in self._slices]
        groups = [{"params": views} for views in self._views]
        self.adam = torch.optim.Adam(groups, betas=betas, fused=True)

    def step(self, factor: float) -> None:
        """Take a step along the parameters' gradients, at a factor of the rates, and forget them."""
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate
        for part, views in zip(self._slices, self._views, strict=True):
            for parameter, view in zip(self._parameters, views, strict=True):
                view.grad = None if parameter.grad is None else parameter.grad[part]
        self.adam.step()
        for tensor in chain(self._parameters, *self._views):
            tensor.grad = None


def truths(
    task: Task, judgement: Judgement, asked: Sequence[str], answers: Sequence[str]
) -> dict[str, Array]:
    """Return the true reward (Algorithm 9) and, where known, gold, in their own units (responses,)."""
    found = {"true_reward": task.source.true_reward(judgement, asked, answers)}
    if task.gold is not None:
        found["gold"] = task.gold(asked, answers)
    return {name: _checked(name, one, answers, ()) for name, one in found.items()}


def _checked(name: str, values: object, answers: Sequence[str], shape: tuple[int, ...]) -> Array:
    """Return finite numbers (responses, *shape), or refuse what would spoil the weights."""
    found = np.asarray(values)
    if found.dtype.kind not in "bfiu":
        raise ValueError(f"{name}: expected real numbers, got {found.dtype}")
    if found.shape != (len(answers), *shape):
        got = len(found) if found.ndim == 1 + len(shape) else f"shape {found.shape}"
        raise ValueError(f"{name}: expected {len(answers)}, one a response, got {got}")
    if len(bad := np.flatnonzero(~np.isfinite(found.reshape(len(answers), -1)).all(1))):
        raise ValueError(
            f"{name}: {len(bad)} of {len(answers)} are not finite, first for the response {answers[bad[0]]!r}"
        )
    return found


def _per_policy(values: Tensor, size: int) -> Tensor:
    return values.float().view(size, -1).mean(1)


def _mean(values: list[Tensor]) -> Tensor:
    """Return the mean of vectors (N,), added in their order: torch's own sum rounds as N has it."""
    return reduce(torch.add, [value.detach() for value in values]) / len(values)


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Return the share of the returns' variance that the values explain (N,)."""
    error = returns - values
    rest = masked_mean(error**2, mask) - masked_mean(error, mask) ** 2
    spread = masked_mean(returns**2, mask) - masked_mean(returns, mask) ** 2
    return 1 - rest / spread.clamp(min=1e-8)
