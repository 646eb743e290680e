"""The policy that all others are measured against: it writes, and never changes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from vaalign_lib.policies.attention import layer_masks
from vaalign_lib.policies.checks import check_model
from vaalign_lib.policies.sampling import Sequences, response_states, token_log_probabilities
from vaalign_lib.policies.stack import PolicyStack, arithmetic, last_states, mixed_precision
from vaalign_lib.profiles import Precision

PIECE, NUMBERS = 512, 2**28  # rows of one pass at most, and numbers that it keeps


class ReferencePolicy:
    """One frozen policy: a model of its own, or the base under a stack of adapters."""

    def __init__(
        self, source: PreTrainedModel | PolicyStack, precision: Precision = "float32"
    ) -> None:
        """Take a model, with a precision of its products, or a stack of adapters, with its own."""
        if isinstance(source, PolicyStack):
            with source.without_adapters():  # which refuses full weights
                pass
        elif isinstance(source, PreTrainedModel):
            check_model(source)
        else:
            raise ValueError(f"reference: expected a model or a stack, got {type(source).__name__}")
        self._stack = source if isinstance(source, PolicyStack) else None
        self.model = source.model if isinstance(source, PolicyStack) else source.eval()
        self.precision = source.precision if isinstance(source, PolicyStack) else precision
        self.dtype = arithmetic(self.model, self.precision)

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let it compute without adapters, in its precision."""
        bare = nullcontext() if self._stack is None else self._stack.without_adapters()
        with bare, mixed_precision(self.model.device, self.precision):
            yield

    @torch.no_grad()
    def hidden(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Return the last hidden states (rows, tokens, width); see `PolicyStack.hidden`."""
        with self._alone():
            return last_states(self.model, ids, mask, positions, cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return (rows, tokens, words) in float32."""
        with self._alone():
            return self.model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def log_probabilities(
        self, batch: Sequences, temperature: float, states: Tensor | None = None
    ) -> Tensor:
        """Return the log-probabilities of the responses' tokens (rows, response tokens).

        Args:
            batch: prompts with responses.
            temperature: divides the logits.
            states: the last ones of `all_states`, where they are known.
        """
        found = []
        for rows in _pieces(batch, batch.responses.shape[1] * self.config.vocab_size):
            piece = batch[rows]
            state = response_states(self, piece) if states is None else states[rows]
            logits = self.logits(state)
            found.append(token_log_probabilities(logits, piece.responses, temperature))
        return torch.cat(found)

    @torch.no_grad()
    def all_states(
        self, batch: Sequences, layers: Sequence[int] | None = None
    ) -> tuple[Tensor, ...]:
        """Return the hidden states of layers before each token of the responses, the last one last, each
        (rows, response tokens, width).

        Args:
            batch: prompts with responses.
            layers: in rising order, 0 being the embeddings; by default all.
        """
        tokens, every = batch.responses.shape[1], range(self.config.num_hidden_layers + 1)
        chosen = every if layers is None else layers
        pieces = []
        with self._alone():
            for rows in _pieces(batch, len(every) * batch.ids.shape[1] * self.config.hidden_size):
                piece = batch[rows]
                out = self.model.base_model(
                    input_ids=piece.ids,
                    attention_mask=layer_masks(self.config, piece.mask),
                    position_ids=piece.positions,
                    use_cache=False,
                    output_hidden_states=True,
                )
                states = (*out.hidden_states[:-1], out.last_hidden_state)
                pieces.append([states[layer][:, -tokens:].clone() for layer in chosen])
        return tuple(torch.cat(layer) for layer in zip(*pieces, strict=True))


def _pieces(batch: Sequences, numbers: int) -> tuple[Tensor, ...]:
    """Return which rows go through together, if each keeps so many numbers."""
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    return rows.split(min(PIECE, max(1, NUMBERS // numbers)))
