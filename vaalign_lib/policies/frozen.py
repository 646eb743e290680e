"""The frozen lower part of a model under adapters in its upper layers: the same for all policies and their
reference, so that what it makes of a token is computed once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from vaalign_lib.policies.layers import StackedLora

READ_IN_PARTS = ("gpt2", "llama", "mistral", "qwen2")  # architectures whose layers `passed` calls as they do


@dataclass(frozen=True)
class Frozen:
    """What frozen layers of a model made of tokens, all but those with which all rows begin."""

    model: PreTrainedModel
    states: dict[int, Tensor]  # what some layers are given, by layer (R, tokens, width)
    mask: Tensor  # (R, 1, tokens, first ones and tokens), added to attention scores
    positions: Tensor  # (R, tokens)
    beginning: Tensor | None  # what the layer above is given of the first ones (1, first ones, width)

    def __getitem__(self, rows: Tensor) -> "Frozen":
        states = {k: one[rows] for k, one in self.states.items()}
        return Frozen(self.model, states, self.mask[rows], self.positions[rows], self.beginning)

    def of(self, model: PreTrainedModel, layers: Collection[int]) -> bool:
        """Whether this is of a model and holds what these of its layers are given."""
        return self.model is model and set(layers) <= self.states.keys()


def layers_of(body: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a model without its output layer."""
    layers: nn.ModuleList = body.h if body.config.model_type == "gpt2" else body.layers
    return layers


def frozen_layers(body: PreTrainedModel) -> int:
    """Return how many lower layers without adapters can be read apart; 0 if there are no adapters at all."""
    if body.config.model_type not in READ_IN_PARTS:
        return 0
    adapted = (any(isinstance(one, StackedLora) for one in layer.modules()) for layer in layers_of(body))
    return next((k for k, found in enumerate(adapted) if found), 0)


def embedded(body: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """Return what the first layer is given of ids (R, tokens), (R, tokens, width)."""
    states: Tensor = body.get_input_embeddings()(ids)
    return states + body.wpe(positions) if body.config.model_type == "gpt2" else states


def passed(
    body: PreTrainedModel,
    states: Tensor,
    layers: Sequence[int],
    masks: Tensor | dict[str, Tensor],
    positions: Tensor,
    cache: Cache | None = None,
) -> Iterator[Tensor]:
    """Yield what is left of states (R, tokens, width) after each of some of a body's layers, as its own
    pass makes it; the masks are those of `layers.layer_masks`.
    """
    config, gpt2 = body.config, body.config.model_type == "gpt2"
    turned = {} if gpt2 else {"position_embeddings": body.rotary_emb(states, position_ids=positions)}
    for k in layers:
        mask = masks[config.layer_types[k]] if isinstance(masks, dict) else masks
        options = {"attention_mask": mask, "past_key_values": cache, "use_cache": cache is not None}
        states = layers_of(body)[k](states, position_ids=positions, **options, **turned)
        yield states


def normed(body: PreTrainedModel, states: Tensor) -> Tensor:
    """Return what the output layer is given of the last layer's states."""
    last: Tensor = (body.ln_f if body.config.model_type == "gpt2" else body.norm)(states)
    return last
