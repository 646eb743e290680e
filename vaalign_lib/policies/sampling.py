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
from transformers.cache_utils import DynamicLayer, StaticLayer

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
    size: int = 1  # policies of which rows are told apart
    frozen: int = 0
    shares_beginnings: bool = (
        False  # whether tokens with which all prompts begin are read once by each policy
    )

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

    def above_frozen(self, frozen: Frozen, layers: Collection[int] = ()) -> dict[int, Tensor]:
        """Return what `above` does, of all tokens that frozen layers have read."""
        states, cache = frozen.states[self.frozen], None
        if frozen.beginning is not None:
            cache = Cache(layers=[DynamicLayer() for _ in range(self._layers)])
            self.begin(frozen.beginning, cache)
            cache.batch_repeat_interleave(len(states) // self.size)
        return self.above(states, frozen.mask, frozen.positions, cache, layers)

    def begin(self, states: Tensor, cache: Cache) -> None:
        """Read the tokens with which all prompts begin, of which the first layer above frozen ones is given
        states (1, tokens, width), once for each policy: their keys and values are in the cache then.
        """
        mask, positions = _from_the_start(states.shape[1], states)
        self.above(states.expand(self.size, -1, -1), mask, positions, cache)

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
        capped = getattr(self.config, "final_logit_softcapping", None) is not None
        return plain and not capped and self.config.vocab_size > LARGE

    def scored(
        self, hidden: Tensor, tokens: Tensor, temperature: float, mask: Tensor | None = None
    ) -> Tensor:
        """Return the log-probabilities (R, T) of tokens (R, T) from the states before them (R, T, width).

        Where a mask (R, T) is False they may be left out, as 0.
        """
        if not self.shares_output:
            return token_log_probabilities(self.logits(hidden), tokens, temperature)
        seen = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        weight = self.model.get_output_embeddings().weight.to(self.dtype)  # (words, width)
        states = hidden[seen].to(self.dtype)  # (M, width)
        score: Any = _Scored.apply
        found: Tensor = score(states, weight, tokens[seen], temperature)  # (M,)
        return found.new_zeros(tokens.shape).masked_scatter(seen, found)  # (R, T)


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
        lengths = torch.tensor([len(row) for row in rows])  # (R,)
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

    def beginning(self) -> Tensor:
        """Return the tokens with which all begin (1, tokens); of each prompt at least one is left."""
        lengths = self.real.sum(1)  # (R,)
        places = (self.ids.shape[1] - lengths)[:, None] + torch.arange(int(lengths.min()) - 1).to(lengths)
        tokens = self.ids.gather(1, places)  # (R, the shortest's)
        return tokens[:1, : int((tokens == tokens[:1]).all(0).cumprod(0).sum())]

    def after(self, tokens: int) -> "Prompts":
        """Return what follows so many first tokens of each, without needless padding."""
        lengths = self.real.sum(1) - tokens  # (R,)
        width = int(lengths.max())
        real = torch.arange(width, device=lengths.device) >= width - lengths[:, None]  # (R, width)
        return Prompts(self.ids[:, self.ids.shape[1] - width :], real)

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
    frozen: Frozen | None = None  # what frozen layers made of its tokens but the last

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


def _from_the_start(tokens: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mask (1, 1, tokens, tokens) and positions (1, tokens) of a text's first tokens."""
    real = torch.ones(1, tokens, dtype=torch.bool, device=like.device)
    return _scores(_behind(real), like.dtype), _positions(real)


def _positions(real: Tensor) -> Tensor:
    return (real.long().cumsum(1) - 1).clamp(min=0)  # (R, tokens)


def _scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is added to attention scores (R, 1, queries, keys)."""
    hidden = torch.finfo(dtype).min
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)[:, None]


def response_states(stack: Writer, batch: Sequences) -> Tensor:
    """Return the hidden state before each token of the responses (R, T, width)."""
    tokens, frozen = batch.responses.shape[1], batch.frozen
    if frozen is not None and frozen.of(stack.model, {stack.frozen}):
        (last,) = stack.above_frozen(frozen).values()
        return last[:, -tokens:]
    return stack.hidden(batch.ids, batch.mask, batch.positions)[:, -tokens:]


def token_log_probabilities(logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """Return the log-probabilities (R, T) of tokens (R, T) by logits (R, T, words) over the temperature,
    before any truncation.
    """
    scaled = logits if temperature == 1 else logits / temperature
    loss = functional.cross_entropy(scaled.flatten(0, 1), tokens.flatten(), reduction="none")  # (R * T,)
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
            whole = logits.logsumexp(1, keepdim=True)  # (rows, 1)
            found.append((logits.gather(1, aims[:, None]) - whole)[:, 0])
            if ctx.needs_input_grad[0]:
                share = logits.sub_(whole).exp_().to(weight.dtype)  # (rows, words)
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
    policy = (logits / temperature).log_softmax(-1)  # (..., words)
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
    rows, most = len(prompts.ids), settings.max_new_tokens
    reader = _Reader(stack, prompts, most, layers)
    state = reader.read(reader.prompts.ids)  # (R, 1, width)
    going = torch.ones(rows, dtype=torch.bool, device=prompts.ids.device)  # (R,)
    written: list[tuple[Tensor, ...]] = []
    for step in range(most):
        logits = stack.logits(state)[:, 0]  # (R, words)
        barred = end if step < settings.min_new_tokens else None
        if logits.shape[1] > LARGE and not settings.top_k and settings.top_p == 1:
            token, chosen, entropy = _draw_of_many(logits, uniforms[:, step], settings, barred)
            token = torch.where(going, token, pad)
        else:
            token = torch.where(going, _draw(logits, uniforms[:, step], settings, barred), pad)
            normal = (logits / settings.log_probability_temperature).log_softmax(1)  # (R, words)
            chosen = normal.gather(1, token[:, None])[:, 0]  # (R,)
            entropy = -(normal.exp() * normal).sum(1)  # (R,)
        written.append((token, going, chosen, entropy, state[:, 0]))
        going = going & (token != end)
        if step + 1 == most or not bool(going.any()):
            break
        state = reader.read(token[:, None])
    missing = [tuple(map(torch.zeros_like, written[0]))] * (most - len(written))  # shapes are always the same
    parts = (torch.stack(part, 1) for part in zip(*written, *missing, strict=True))
    tokens, real, chosen, entropy, hidden = parts  # (R, T) each, hidden (R, T, width)
    return Rollout(
        prompts, torch.where(real, tokens, pad), real, chosen, hidden, entropy, reader.frozen_states()
    )


class _Reader:
    """Reads prompts, and then a token of each row at a time, up to `most`; keys and values are kept, and what
    frozen layers make of the tokens: of those with which all prompts begin once, where that is the same.
    """

    def __init__(self, writer: Writer, prompts: Prompts, most: int, layers: Collection[int]) -> None:
        self.writer, self.layers = writer, layers
        shares = writer.frozen and writer.shares_beginnings
        self.beginning = prompts.beginning() if shares else prompts.ids[:1, :0]
        self.done = self.beginning.shape[1]  # tokens that were read
        self.prompts = prompts.after(self.done) if writer.frozen else prompts
        rows, width = self.prompts.ids.shape
        real = self.prompts.real
        parts = real.new_ones(rows, self.done), real, real.new_ones(rows, most)
        self.seen = torch.cat(parts, dim=1)  # (R, all tokens)
        self.later, self.positions = _scores(self.seen[:, None], writer.dtype), _positions(self.seen)
        self.cache = Cache(layers=[_FilledLayer(self.done + width + most) for _ in range(writer._layers)])
        self.below: list[dict[int, Tensor]] = []
        self.shared: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        """Return the last hidden state (R, 1, width) after ids (R, tokens), which follow what was read."""
        writer, start, self.done = self.writer, self.done, self.done + ids.shape[1]
        positions, mask = self.positions[:, start : self.done], self.later[..., : self.done]
        if ids.shape[1] > 1:
            mask = _scores(_behind(self.seen[:, : self.done]), writer.dtype)[:, :, start:]
        if not writer.frozen:
            return writer.hidden(ids, mask, positions, self.cache)[:, -1:]
        if self.below:
            below = writer.below(ids, mask, positions, self.cache, self.layers)
        else:
            below = self._prompts_below(ids, mask, positions)
        self.below.append(below)
        (state,) = writer.above(below[writer.frozen], mask, positions, self.cache).values()
        return state[:, -1:]

    def _prompts_below(self, ids: Tensor, mask: Tensor, positions: Tensor) -> dict[int, Tensor]:
        """Read prompts (R, tokens) that several rows may share, each once; see `Writer.below`."""
        writer, rows = self.writer, len(ids)
        _, which = torch.cat((ids, positions), 1).unique(dim=0, return_inverse=True)  # (R,)
        first = which.new_empty(int(which.max()) + 1).scatter_(0, which, torch.arange(rows).to(which))
        own = Cache(layers=[_FilledLayer(self.positions.shape[1]) for _ in range(writer.frozen)])
        begun = self._begin()
        for layer, held in zip(own.layers, begun, strict=False):
            layer.update(held.keys.expand(len(first), -1, -1, -1), held.values.expand(len(first), -1, -1, -1))
        found = writer.below(ids[first], mask[first], positions[first], own, self.layers)
        for layer, read in zip(self.cache.layers, own.layers, strict=False):
            layer.update(read.keys[which, :, : read.filled], read.values[which, :, : read.filled])
        for layer, held in zip(self.cache.layers[writer.frozen :], begun[writer.frozen :], strict=False):
            each = rows // writer.size
            layer.update(held.keys.repeat_interleave(each, 0), held.values.repeat_interleave(each, 0))
        return {k: states[which] for k, states in found.items()}

    def _begin(self) -> list[Any]:
        """Read the tokens with which all prompts begin, if any; return a cache's layers with their keys and
        values, of one row where all are the same and of one for each policy above.
        """
        if not self.beginning.numel():
            return []
        cache = Cache(layers=[DynamicLayer() for _ in range(self.writer._layers)])
        tokens = self.beginning.shape[1]
        mask, positions = _from_the_start(tokens, self.later[0, 0])
        found = self.writer.below(self.beginning, mask, positions, cache)
        self.shared = found[self.writer.frozen]
        self.writer.begin(self.shared, cache)
        return list(cache.layers)

    def frozen_states(self) -> Frozen | None:
        """Return what frozen layers made of all tokens but the last, if there are such layers."""
        if not self.below:
            return None
        seen, start = self.seen[:, :-1], self.beginning.shape[1]
        states = {k: torch.cat([one[k] for one in self.below], dim=1) for k in self.below[0]}
        left = seen.shape[1] - start - states[self.writer.frozen].shape[1]  # where all had ended before
        states = {k: functional.pad(one, (0, 0, 0, left)) for k, one in states.items()}
        mask = _scores(_behind(seen), self.writer.dtype)[:, :, start:]  # (R, 1, left tokens, tokens)
        return Frozen(self.writer.model, states, mask, self.positions[:, start:-1], self.shared)


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
    last = (share > 0).sum(1, keepdim=True) - 1  # (R, 1)
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
        normal = scaled.log_softmax(1)  # (rows, words)
        share = normal.exp()
        entropy = -torch.linalg.vecdot(share, normal)  # (rows,)
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
    aim = uniforms[:, None] * sums[:, -1:]  # (R, 1)
    block = _passing(sums, aim)  # (R, 1)
    before = sums.gather(1, block) - blocks.sum(2).double().gather(1, block)  # (R, 1)
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
    """Keys and values (rows, key heads, tokens, width) in memory that was allocated once; only what is filled
    is handed out.
    """

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
