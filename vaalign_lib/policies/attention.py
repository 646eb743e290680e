"""Attention for many short rows on a CPU: one token at a time it is a few small products.

Here is also what a layer with a sliding window sees: transformers takes a mask of four dimensions as
it is.

torch's fused kernel is the better one for whole sequences, and is used for them; for the single query of
each step of a generation it takes about twice as long as plain products.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "vaalign"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what transformers asks of attention: (rows, queries, heads, width of a head), and None.

    Args:
        module: the layer.
        query: (rows, heads, queries, width).
        key: (rows, key heads, keys, width); several heads may share one.
        value: as key.
        attention_mask: added to the scores (rows, 1, queries, keys).
        scaling: of the scores, by default one over the root of the width.
        options: of transformers' own function.
    """
    rows, heads, queries, width = query.shape
    plain = attention_mask is None or attention_mask.is_floating_point()
    if queries > 1 or query.is_cuda or torch.is_grad_enabled() or not plain:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
        return out, None
    grouped = query.view(rows, key.shape[1], -1, width)  # the heads of one key head as its queries
    scores = grouped @ key.transpose(2, 3)
    scores = scores * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.view(rows, 1, heads, width), None


def layer_masks(config: PretrainedConfig, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return what is added to attention scores, as the layers of an architecture want it.

    Args:
        config: of the model; Mistral's layers all have its sliding window, Qwen2's those it says.
        mask: causal (rows, 1, queries, keys), padding only before a text and after it.
    """
    window = config.sliding_window if config.model_type in ("mistral", "qwen2") else None
    queries, keys = mask.shape[-2:]
    if window is None or keys <= window:
        return mask
    near = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(
        keys - queries - window + 1
    )
    windowed = mask.masked_fill(~near, torch.finfo(mask.dtype).min)
    if config.model_type == "mistral":
        return windowed
    return {"full_attention": mask, "sliding_attention": windowed}


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
