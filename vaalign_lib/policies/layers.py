"""Layers for many policies at once: stacked weights and adapters, and attention among them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm",
             "Phi3RMSNorm", "Olmo2RMSNorm")  # fmt: skip
NORMS_FROM_ONE = ("Gemma2RMSNorm", "Gemma3RMSNorm")  # whose weight is the difference from one

SCALED_EMBEDDINGS = ("Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding")


class StackedLinear(nn.Module):
    """N linear layers: weight (N, in, out) with `inputs_first`, as in GPT-2's Conv1D, else (N, out, in); bias
    (N, out) or None.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, inputs_first: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.inputs_first = weight, bias, inputs_first

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N * rows, ..., in) to (N * rows, ..., out)."""
        weight = self.weight if self.inputs_first else self.weight.transpose(1, 2)
        rows = inputs.reshape(weight.shape[0], -1, weight.shape[1])  # (N, rows, in)
        bias = None if self.bias is None else self.bias[:, None]  # (N, 1, out)
        out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias, rows, weight)  # (N, rows, out)
        return out.view(*inputs.shape[:-1], weight.shape[2])


class StackedEmbedding(nn.Module):
    """N embeddings; weight (N, words, width). `scale` multiplies what is looked up, as in Gemma."""

    def __init__(self, weight: nn.Parameter, scale: float | None = None) -> None:
        super().__init__()
        self.weight, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        """Look up (N * rows, tokens) in (N * rows, tokens, width)."""
        size, words, width = self.weight.shape
        if (rows := ids.shape[0]) % size:
            told = f"expected a multiple of {size} rows, policy by policy, got {rows}"
            raise ValueError(f"ids: {told}; give position_ids for every row")
        first = torch.arange(size, device=ids.device).repeat_interleave(rows // size)  # (N * rows,)
        table = self.weight.reshape(size * words, width)  # (N * words, width)
        found = functional.embedding(ids + words * first[:, None], table)  # (N * rows, tokens, width)
        return found if self.scale is None else found * torch.tensor(self.scale).to(found)


class StackedNorm(nn.Module):
    """N layer norms, or root-mean-square norms where there is no bias; weight and bias (N, width).

    With `from_one` the weight is added to one, and multiplied in float32, as in Gemma.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, epsilon: float, from_one: bool = False
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.epsilon, self.from_one = weight, bias, epsilon, from_one

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalize (N * rows, ..., width) over its last dimension."""
        size, width = self.weight.shape
        if self.from_one:
            normal = functional.rms_norm(inputs.float(), (width,), eps=self.epsilon).reshape(size, -1, width)
            return (normal * (1 + self.weight.float()[:, None])).view(inputs.shape).type_as(inputs)
        if self.bias is None:
            normal = functional.rms_norm(inputs.float(), (width,), eps=self.epsilon)
        else:
            normal = functional.layer_norm(inputs, (width,), eps=self.epsilon)
        rows, weight = normal.to(inputs.dtype).reshape(size, -1, width), self.weight[:, None]
        scaled = rows * weight if self.bias is None else torch.addcmul(self.bias[:, None], rows, weight)
        return scaled.view(inputs.shape)


class StackedLora(nn.Module):
    """N low-rank adapters over one frozen layer, `base`, which may be quantized.

    `down` (N, in, rank) and `up` (N, rank, out) are peft's lora_A and lora_B, transposed. Dropout draws from
    `generators`, one for each policy; None switches it off. Not `adapted` it is the reference's layer.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base, self.scaling, self.dropout = base, scaling, dropout
        self.down, self.up = nn.Parameter(down), nn.Parameter(up)
        self.generators: list[torch.Generator] | None = None
        self.adapted = True
        self.at_once = False  # whether the change is added in one product, which rounds differently

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N * rows, ..., in) to (N * rows, ..., out)."""
        out: Tensor = self.base(inputs)
        if not self.adapted:
            return out
        size, width, _ = self.down.shape
        rows = inputs.reshape(size, -1, width).to(self.down.dtype)  # (N, rows, in)
        if self.dropout and self.generators is not None:
            drawn = [torch.rand(rows.shape[1:], generator=one, device=one.device) for one in self.generators]
            rows = rows * ((torch.stack(drawn) >= self.dropout).to(rows) / (1 - self.dropout))
        inner = torch.bmm(rows, self.down)  # (N, rows, rank)
        if self.at_once:
            up, base = self.up.to(out.dtype), out.view(size, -1, self.up.shape[2])
            return torch.baddbmm(base, inner.to(out.dtype), up, alpha=self.scaling).view(out.shape)
        change = torch.bmm(inner, self.up)  # (N, rows, out)
        return out + (self.scaling * change).view(out.shape).to(out.dtype)


def stacked(layer: nn.Module, size: int, known: dict[int, nn.Parameter]) -> nn.Module | None:
    """Return the stack of N copies that takes a layer's place, or None if it has no weights of its own.

    `known` holds stacked weights by the identity of the original, so that tied layers stay tied. A layer of
    an unknown kind is refused (TypeError).
    """
    own: dict[str, Tensor] = dict(layer.named_parameters(recurse=False))
    if not own:
        return None
    kind = type(layer).__name__
    norm = kind in (*RMS_NORMS, *NORMS_FROM_ONE) or (isinstance(layer, nn.LayerNorm) and "bias" in own)
    embedding = type(layer) is nn.Embedding or kind in SCALED_EMBEDDINGS
    if not (norm or embedding or isinstance(layer, nn.Linear | Conv1D)):
        raise TypeError(f"a stack knows linear layers, embeddings, layer and RMS norms, not {kind}")

    def copies(weight: Tensor) -> nn.Parameter:
        return nn.Parameter(weight.detach().repeat(size, *[1] * weight.dim()))

    if id(own["weight"]) not in known:
        known[id(own["weight"])] = copies(own["weight"])
    weight, bias = known[id(own["weight"])], copies(own["bias"]) if "bias" in own else None
    if norm:
        epsilon = getattr(layer, "variance_epsilon" if kind in RMS_NORMS else "eps")
        return StackedNorm(weight, bias, epsilon, kind in NORMS_FROM_ONE)
    if embedding:
        return StackedEmbedding(weight, getattr(layer, "scalar_embed_scale", None))
    return StackedLinear(weight, bias, inputs_first=isinstance(layer, Conv1D))


def stacked_lora(layer: "LoraLayer", size: int, generators: list[torch.Generator]) -> StackedLora:
    """Return the stack that takes the place of a linear layer to which peft gave an adapter.

    Each policy's generator draws its lora_A as peft does; lora_B is zero.
    """
    adapter: Any = layer
    down: Tensor = adapter.lora_A["default"].weight
    up: Tensor = adapter.lora_B["default"].weight
    rank, width = down.shape
    bound = width**-0.5  # Kaiming's uniform distribution with a = sqrt(5), peft's start
    drawn = [torch.empty(width, rank).uniform_(-bound, bound, generator=g) for g in generators]
    start = torch.stack(drawn).to(down), torch.zeros(size, rank, up.shape[0]).to(up)
    dropout = getattr(adapter.lora_dropout["default"], "p", 0.0)
    return StackedLora(adapter.base_layer, *start, adapter.scaling["default"], dropout)


ATTENTION = "vaalign"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what transformers asks of attention, (rows, queries, heads, width of a head), and None.

    Query (rows, heads, queries, width); key and value (rows, key heads, keys, width), where several heads may
    share one; the mask is added to the scores (rows, 1, queries, keys). Of one query without gradients on a
    CPU two products are quicker than transformers' own function. Scores that are capped (Gemma 2) it cannot.
    """
    if (cap := options.get("softcap")) is not None:
        return _capped_attention(query, key, value, attention_mask, scaling, cap), None
    rows, heads, queries, width = query.shape
    plain = attention_mask is None or attention_mask.is_floating_point()
    if queries > 1 or query.is_cuda or torch.is_grad_enabled() or not plain:
        options["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0], None
    grouped = query.view(rows, key.shape[1], -1, width)  # (rows, key heads, group, width)
    scores = grouped @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value  # (rows, key heads, group, width)
    return out.view(rows, 1, heads, width), None


WINDOW_BY_LAYER = ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text")


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    """Return attention with scores within -cap to cap; shapes as in `attention`. No mask means causal."""
    rows, heads, queries, width = query.shape
    grouped = query.view(rows, key.shape[1], -1, queries, width)  # (rows, key heads, group, queries, width)
    scores = grouped @ key[:, :, None].transpose(3, 4) * (width**-0.5 if scaling is None else scaling)
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.tril(key.shape[2] - queries)[None, None]  # (1, 1, queries, keys)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = (scores + mask[:, :, None]).softmax(-1, dtype=torch.float32).to(value.dtype)
    out = (shares @ value[:, :, None]).reshape(rows, heads, queries, width)
    return out.transpose(1, 2).contiguous()


def layer_masks(config: PretrainedConfig, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Return what is added to attention scores, as the layers of an architecture want it: Mistral's and
    Phi-3's all have its sliding window, others' those it says. The mask is causal (rows, 1, queries, keys).
    """
    everywhere = config.model_type in ("mistral", "phi3")
    window = config.sliding_window if everywhere or config.model_type in WINDOW_BY_LAYER else None
    queries, keys = mask.shape[-2:]
    if window is None or keys <= window:
        return mask
    near = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(keys - queries - window + 1)
    windowed = mask.masked_fill(~near, torch.finfo(mask.dtype).min)  # (rows, 1, queries, keys)
    if everywhere:
        return windowed
    return {"full_attention": mask, "sliding_attention": windowed}


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
