"""Sampling from a stack of policies, with random numbers that the caller has drawn.

Rows are laid out policy by policy: R = N * B of them, of prompts of P and responses of T tokens.
"""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import StaticLayer

from vaalign_lib.models import pad_id, prompt_ids
from vaalign_lib.policies.frozen import Frozen, embedded, normed, passed
from vaalign_lib.policies.layers import layer_masks
from vaalign_lib.profiles import Precision, Sampling

LARGE = 4096  # words of a vocabulary above which distributions are not sorted and logits not kept
PIECE, BLOCK = 64, 256  # of such logits: rows that are worked on at a time, words that are summed first


class Writer:
    """A policy or a stack of them: a model whose products are computed in a precision.

    What its `frozen` lower layers make of a token is the same for all policies and their reference.
    """

    model: PreTrainedModel
    precision: Precision
    frozen: int = 0

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers between layers."""
        held: torch.dtype = self.model.get_output_embeddings().weight.dtype
        return torch.bfloat16 if self.precision == "bfloat16" else held

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context in which products have the precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def hidden(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the last hidden states (R, tokens, width) of ids and positions (R, tokens).

        The mask (R, 1, tokens, tokens seen) is added to the attention scores; the cache grows.
        """
        options: Any = {"past_key_values": cache, "use_cache": cache is not None}
        states: Tensor = self.outputs(ids, mask, positions, **options).last_hidden_state
        return states

    def below(
        self,
        ids: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        layers: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Return what the first layer above the frozen ones is given, and some below, (R, tokens, width)
        each; see `hidden`.
        """
        body, masks = self.model.base_model, layer_masks(self.config, mask)
        with self.computing():
            first = embedded(body, ids, positions)
            lower = passed(body, first, range(self.frozen), masks, positions, cache)
            found = {k: one for k, one in enumerate(chain([first], lower)) if k == self.frozen or k in layers}
        return found

    def above(
        self,
        states: Tensor,
        mask: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        layers: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """Return the last hidden states, and what some layers above the frozen ones are given, from what the
        first of these is given (R, tokens, width); see `hidden`.
        """
        body, masks, last = self.model.base_model, layer_masks(self.config, mask), self._layers
        found = {}
        with self.computing():
            upper = passed(body, states, range(self.frozen, last), masks, positions, cache)
            for k, one in enumerate(upper, start=self.frozen + 1):
                if k == last or k in layers:
                    found[k] = normed(body, one) if k == last else one
        return found

    @property
    def _layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    def outputs(self, ids: Tensor, mask: Tensor, positions: Tensor, **options: Any) -> Any:
        """Return what the model below its output layer makes of ids; see `hidden`."""
        masks = layer_masks(self.config, mask)
        with self.computing():
            return self.model.base_model(
                input_ids=ids, attention_mask=masks, position_ids=positions, **options
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return (R, tokens, words) in float32."""
        with self.computing():
            logits: Tensor = self.model.get_output_embeddings()(hidden).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def shares_output(self) -> bool:
        """Whether all policies have one frozen output layer, of many words."""
        output = self.model.get_output_embeddings()
        plain = isinstance(output, nn.Linear) and output.bias is None and not output.weight.requires_grad
        return plain and self.config.vocab_size > LARGE

    def scored(self, hidden: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities (R, T) of tokens (R, T) from the states before them (R, T, width)."""
        if not self.shares_output:
            return token_log_probabilities(self.logits(hidden), tokens, temperature)
        weight = self.model.get_output_embeddings().weight.to(self.dtype)
        states = hidden.flatten(0, 1).to(self.dtype)
        found: Tensor = _Scored.apply(states, weight, tokens.flatten(), temperature)  # type: ignore[no-untyped-call]
        return found.view(tokens.shape)


@dataclass(frozen=True)
class Prompts:
    """Prompts as a model reads them: their ends aligned, padding before them."""

    ids: Tensor  # (R, P)
    real: Tensor  # (R, P), False where there is padding

    @classmethod
    def from_lists(cls, rows: list[list[int]], width: int, pad: int) -> "Prompts":
        """Align token ids; a prompt that is empty or longer than `width` is refused."""
        longest, shortest = max(map(len, rows)), min(map(len, rows))
        if not 0 < shortest <= longest <= width:
            raise ValueError(f"prompts: expected 1 to {width} tokens, got {shortest} to {longest}")
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return cls(ids, torch.arange(width) >= width - lengths[:, None])

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> "Prompts":
        """Tokenize and align texts, whatever their lengths."""
        rows = prompt_ids(tokenizer, texts, 10**6)
        if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
            raise ValueError(f"prompts: {empty[0]!r} becomes no token; expected texts that become some")
        return cls.from_lists(rows, max(map(len, rows)), pad_id(tokenizer))

    def __getitem__(self, rows: Tensor) -> "Prompts":
        return Prompts(self.ids[rows], self.real[rows])

    def to(self, device: torch.device | str) -> "Prompts":
        return Prompts(self.ids.to(device), self.real.to(device))


@dataclass(frozen=True)
class Rollout:
    """Responses of a stack of policies."""

    prompts: Prompts
    responses: Tensor  # (R, T) token ids, padding after the end
    mask: Tensor  # (R, T), True for tokens of the response with its end
    log_probabilities: Tensor  # (R, T), as the policy that wrote them sees them
    hidden: Tensor  # (R, T, width), the policy's last hidden state before each token
    entropy: Tensor  # (R, T), of the distribution each token was drawn from, before truncation
    frozen: Frozen | None = None  # what frozen layers made of its tokens but the last (R, P + T - 1, width)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, with its end (R,)."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class Sequences:
    """Prompts with responses, ready for one pass: the last token is left out, nothing follows it."""

    ids: Tensor  # (R, P + T - 1)
    mask: Tensor  # (R, 1, tokens, tokens), added to attention scores
    positions: Tensor  # (R, tokens)
    responses: Tensor  # (R, T), the tokens to predict
    frozen: Frozen | None = None  # what frozen layers make of the ids

    def __getitem__(self, rows: Tensor) -> "Sequences":
        frozen = None if self.frozen is None else self.frozen[rows]
        return Sequences(self.ids[rows], self.mask[rows], self.positions[rows], self.responses[rows], frozen)


def sequences(
    prompts: Prompts, responses: Tensor, dtype: torch.dtype, frozen: Frozen | None = None
) -> Sequences:
    """Join prompts and responses; padding after the end is seen by nothing that counts."""
    before = responses[:, :-1]
    ids = torch.cat((prompts.ids, before), dim=1)  # (R, P + T - 1)
    real = torch.cat((prompts.real, torch.ones_like(before, dtype=torch.bool)), dim=1)
    return Sequences(ids, _scores(_behind(real), dtype), _positions(real), responses, frozen)


def _behind(real: Tensor) -> Tensor:
    """Return what each token sees: real ones that are not after it (R, tokens, tokens)."""
    width = real.shape[1]
    return real[:, None] & torch.ones(width, width, dtype=torch.bool, device=real.device).tril()


def _positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores (R, 1, queries, keys)."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)[:, None]


def response_states(stack: Writer, batch: Sequences) -> Tensor:
    """Return the hidden state before each token of the responses (R, T, width)."""
    tokens, frozen = batch.responses.shape[1], batch.frozen
    if frozen is not None and frozen.of(stack.model, {stack.frozen}):
        states = frozen.states[stack.frozen]
        (last,) = stack.above(states, batch.mask, batch.positions).values()
        return last[:, -tokens:]
    return stack.hidden(batch.ids, batch.mask, batch.positions)[:, -tokens:]


def token_log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities (R, T) of tokens (R, T) by logits (R, T, words) over the temperature,
    before any truncation.
    """
    scaled = logits if temperature == 1 else logits / temperature
    loss = functional.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none")
    return -loss.view(tokens.shape)


class _Scored(torch.autograd.Function):
    """Log-probabilities (M,) of tokens (M,) by states (M, width) and an output layer (words, width), whose
    logits are never kept: the slope in the states, (weight[token] - share @ weight) / temperature, comes with
    the value.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        found, slopes = [], []
        for some, aims in zip(states.split(PIECE), tokens.split(PIECE), strict=True):
            logits = (some @ weight.T).float()  # (rows, words)
            logits = logits if temperature == 1 else logits.div_(temperature)
            whole = logits.logsumexp(1, keepdim=True)
            found.append((logits.gather(1, aims[:, None]) - whole)[:, 0])
            if ctx.needs_input_grad[0]:
                share = logits.sub_(whole).exp_().to(weight.dtype)
                slopes.append((weight[aims] - share @ weight).div_(temperature))
        if slopes:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradients[0][:, None] * slope).to(slope.dtype), None, None, None


def token_divergences(logits: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """Return KL(policy || reference) of the next token's distribution (R, T), of logits (R, T, words)."""
    policy = (logits / temperature).log_softmax(-1)
    return (policy.exp() * (policy - (reference / temperature).log_softmax(-1))).sum(-1)


@torch.no_grad()
def rollout(
    stack: Writer,
    prompts: Prompts,
    uniforms: Tensor,
    settings: Sampling,
    end: int,
    pad: int,
    layers: Collection[int] = (),
) -> Rollout:
    """Let every policy answer its prompts (R, P); `uniforms` (R, max_new_tokens) in [0, 1) draw the tokens.

    A response ends with the token `end`, which `pad` follows. What the first layer above frozen ones is given
    is kept, and what these `layers` below it are.
    """
    (rows, width), most = prompts.ids.shape, settings.max_new_tokens
    cache = Cache(layers=[_FilledLayer(width + most) for _ in range(stack._layers)])
    below: list[dict[int, Tensor]] = []  # of the frozen layers, for the tokens so far

    def read(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        if not stack.frozen:
            return stack.hidden(ids, mask, positions, cache)[:, -1:]
        part = _prompts_below if not below else Writer.below
        below.append(part(stack, ids, mask, positions, cache, layers))
        (state,) = stack.above(below[-1][stack.frozen], mask, positions, cache).values()
        return state[:, -1:]

    seen = torch.cat((prompts.real, prompts.real.new_ones(rows, most)), dim=1)  # (R, P + T)
    later, positions = _scores(seen[:, None], stack.dtype), _positions(seen)
    mask = _scores(_behind(prompts.real), stack.dtype)
    state = read(prompts.ids, mask, positions[:, :width])  # (R, 1, width)
    going = torch.ones(rows, dtype=torch.bool, device=prompts.ids.device)
    written: list[tuple[Tensor, ...]] = []
    for step in range(most):
        logits = stack.logits(state)[:, 0]  # (R, words)
        barred = end if step < settings.min_new_tokens else None
        if logits.shape[1] > LARGE and not settings.top_k and settings.top_p == 1:
            token, chosen, entropy = _draw_of_many(logits, uniforms[:, step], settings, barred)
            token = torch.where(going, token, pad)
        else:
            token = torch.where(going, _draw(logits, uniforms[:, step], settings, barred), pad)
            normal = (logits / settings.log_probability_temperature).log_softmax(1)
            chosen = normal.gather(1, token[:, None])[:, 0]
            entropy = -(normal.exp() * normal).sum(1)
        written.append((token, going, chosen, entropy, state[:, 0]))
        going = going & (token != end)
        if step + 1 == most or not bool(going.any()):
            break
        place = width + step
        state = read(token[:, None], later[..., : place + 1], positions[:, place : place + 1])
    missing = [tuple(map(torch.zeros_like, written[0]))] * (most - len(written))  # shapes are always the same
    parts = (torch.stack(part, 1) for part in zip(*written, *missing, strict=True))
    tokens, real, chosen, entropy, hidden = parts  # (R, T) each, hidden (R, T, width)
    frozen = Frozen.joined(stack.model, below, width + most - 1) if below else None
    return Rollout(prompts, torch.where(real, tokens, pad), real, chosen, hidden, entropy, frozen)


def _prompts_below(
    stack: Writer, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache, layers: Collection[int]
) -> dict[int, Tensor]:
    """Read prompts that several rows may share, each once; see `Writer.below`."""
    rows, width = ids.shape
    _, which = torch.cat((ids, positions), 1).unique(dim=0, return_inverse=True)  # (R,)
    first = which.new_empty(int(which.max()) + 1).scatter_(0, which, torch.arange(rows, device=ids.device))
    own = Cache(layers=[_FilledLayer(width) for _ in range(stack.frozen)])
    found = stack.below(ids[first], mask[first], positions[first], own, layers)
    for layer, held in zip(cache.layers, own.layers, strict=False):
        layer.update(held.keys[which], held.values[which])
    return {k: states[which] for k, states in found.items()}


def _draw(logits: Tensor, uniforms: Tensor, settings: Sampling, barred: int | None) -> Tensor:
    """Draw a token per row (R,) of logits (R, words): temperature, then the top k, then the top p of those.

    The token `barred`, if any, does not come.
    """
    if barred is not None:
        logits = logits.index_fill(1, torch.tensor([barred], device=logits.device), -torch.inf)
    kept = min(settings.top_k or logits.shape[1], logits.shape[1])
    values, words = (logits / settings.temperature).topk(kept, dim=1)  # (R, k)
    share = values.softmax(1)
    sums = share.cumsum(1)
    if settings.top_p < 1:
        share = share * (sums - share < settings.top_p)
        sums = share.cumsum(1)
    place = torch.searchsorted(sums, (uniforms[:, None] * sums[:, -1:]).to(sums), right=True)
    last = (share > 0).sum(1, keepdim=True) - 1
    place = torch.minimum(place, last).clamp(min=0)  # below 0 where nothing is finite any more
    return words.gather(1, place)[:, 0]


def _draw_of_many(
    logits: Tensor, uniforms: Tensor, settings: Sampling, barred: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token per row of logits (R, words), which are not sorted, from the whole distribution; return
    it, its log-probability, and the entropy (R,), the last two at the temperature of log-probabilities.
    """
    found, same = [], settings.temperature == settings.log_probability_temperature
    for some, aims in zip(logits.split(PIECE), uniforms.split(PIECE), strict=True):
        scaled = some / settings.log_probability_temperature
        normal = scaled.log_softmax(1)
        share = normal.exp()
        entropy = -torch.linalg.vecdot(share, normal)
        if not same:
            share = (some / settings.temperature).softmax(1)
        if barred is not None:
            share[:, barred] = 0
        token = _inverse(share, aims)
        found.append((token, normal.gather(1, token[:, None])[:, 0], entropy))
    token, chosen, entropy = (torch.cat(part) for part in zip(*found, strict=True))
    return token, chosen, entropy


def _inverse(share: Tensor, uniforms: Tensor) -> Tensor:
    """Return the word at which sums of shares (R, words), of any total, pass a part of the total (R,)."""
    blocks = functional.pad(share, (0, -share.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = blocks.sum(2).double().cumsum(1)  # (R, blocks)
    aim = uniforms[:, None] * sums[:, -1:]
    block = _passing(sums, aim)  # (R, 1)
    before = sums.gather(1, block) - blocks.sum(2).double().gather(1, block)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum(1)  # (R, BLOCK)
    return (block * BLOCK + _passing(inside, aim - before))[:, 0].clamp(max=share.shape[1] - 1)


def _passing(sums: Tensor, aim: Tensor) -> Tensor:
    """Return the first place at which rising sums (R, places) are above an aim (R, 1), at most where they end
    to rise; 0 where nothing is finite any more.
    """
    last = torch.searchsorted(sums, sums[:, -1:].contiguous(), right=False)  # the first that has it all
    place = torch.searchsorted(sums, aim.contiguous(), right=True)
    return torch.minimum(place, last).clamp(max=sums.shape[1] - 1)


def check_finite(values: Tensor, index: Sequence[int] | NDArray[np.int64], when: str) -> None:
    """Refuse to go on with a policy whose numbers (R, ...) are not finite in float32 (ValueError)."""
    held = values.reshape(len(index), -1).isfinite().all(1).tolist()
    if not all(held):
        told = f"policy {index[held.index(False)]}, {when}: its numbers are no longer finite in float32"
        raise ValueError(
            f"{told}; take a lower learning rate, max_grad_norm, or smaller rewards and variances"
        )


class _FilledLayer(StaticLayer):
    """Keys and values in memory that was allocated once; only what is filled is handed out."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.filled = 0
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, start : self.filled] = key_states
        self.values[:, :, start : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]
