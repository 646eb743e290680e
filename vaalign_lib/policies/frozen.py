"""The policy that all others are measured against: it writes, and never changes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig, PreTrainedModel

from vaalign_lib.policies.sampling import Sequences, response_states, token_log_probabilities
from vaalign_lib.policies.stack import PolicyStack, arithmetic, last_states, mixed_precision
from vaalign_lib.profiles import Precision

PIECE = 512  # rows of one pass


class ReferencePolicy:
    """One frozen policy: a model of its own, or the base under a stack of adapters."""

    def __init__(
        self, source: PreTrainedModel | PolicyStack, precision: Precision = "float32"
    ) -> None:
        """Take a model, with a precision of its products, or a stack, with its own."""
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
        for rows in torch.arange(len(batch.ids), device=batch.ids.device).split(PIECE):
            piece = batch[rows]
            state = response_states(self, piece) if states is None else states[rows]
            logits = self.logits(state)
            found.append(token_log_probabilities(logits, piece.responses, temperature))
        return torch.cat(found)

    @torch.no_grad()
    def all_states(self, batch: Sequences) -> tuple[Tensor, ...]:
        """Return the hidden states of every layer before each token of the responses, the last one
        last, each (rows, response tokens, width).
        """
        tokens = batch.responses.shape[1]
        pieces = []
        with self._alone():
            for rows in torch.arange(len(batch.ids), device=batch.ids.device).split(PIECE):
                piece = batch[rows]
                out = self.model.base_model(
                    input_ids=piece.ids,
                    attention_mask=piece.mask,
                    position_ids=piece.positions,
                    use_cache=False,
                    output_hidden_states=True,
                )
                states = (*out.hidden_states[:-1], out.last_hidden_state)
                pieces.append([layer[:, -tokens:] for layer in states])
        return tuple(torch.cat(layers) for layers in zip(*pieces, strict=True))
