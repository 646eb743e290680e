"""Public reward models that rate attributes, read from their safetensors files: the code that comes with them
is never run.

Three layouts are known: URM-LLaMa-3.1-8B (arXiv 2410.00847), normal distributions of attributes; QRM (arXiv
2409.10164), their quantiles; ArmoRM (arXiv 2406.12845), single numbers under the gate that QRM took over.
The backbone is an ordinary model of transformers; heads see its last states, in float32. Shapes: N
responses, K attributes, Q quantiles, states of width d.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.data.world.attributes import ATTRIBUTES
from vaalign_lib.jobs import device
from vaalign_lib.models import conversation_ids, load_tokenizer
from vaalign_lib.rewards.attributes import (
    GATING_LAYERS,
    AttributeHeads,
    Gating,
    Ratings,
    VarianceSum,
    reward,
    reward_variance,
)
from vaalign_lib.rewards.base import Array, Interval, Judgement, Members, PolicyIndex, Truth
from vaalign_lib.rewards.classifier import (
    BackboneError,
    batches_by_length,
    check_files,
    check_ids,
    loading,
    longest,
    padded,
)
from vaalign_lib.statistics.arrays import count, number

_LOG = logging.getLogger(__name__)
PARTS = ("score.", "weights.", "regression_layer.", "gating.", "reward_transform_matrix")  # names of heads
PROMPT_ENDS = {  # by backbone: how a prompt ends and a response begins; gates read the first of these tokens
    "llama": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>",
    "gemma2": "<end_of_turn>\n<start_of_turn>model",
}


# --- heads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormalHead:
    """URM's: means and log standard deviations of the attributes of HelpSteer2, in the order of `ATTRIBUTES`,
    combined by a gating layer. One model each, so H = 1 of `rewards.attributes`.
    """

    values: AttributeHeads
    gating: Gating
    how: VarianceSum = "weighted"

    def ratings(self, last: Tensor) -> tuple[Ratings, Tensor]:
        """Return the distributions and weights of attributes (1, N, K) for the last token's states (N, d)."""
        return self.values.ratings(last), self.gating(last)

    def judgement(self, last: Tensor, prompt: Tensor) -> Interval:
        """Return the reward, the middle of an interval whose variance is that of the reward."""
        ratings, weights = self.ratings(last)
        middle = reward(ratings, weights)[0].double().numpy()  # (N,)
        half = np.sqrt(3 * reward_variance(ratings, weights, self.how)[0].double().numpy())
        return Interval(np.stack([middle - half, middle + half], axis=1), np.full(len(middle), 0.5))


@dataclass(frozen=True)
class QuantileHead:
    """QRM's, and ArmoRM's, which has one number in place of quantiles.

    Attributes:
        regression: (K, Q, d), for quantiles at the levels 1 / (Q + 1) to Q / (Q + 1) of every attribute.
        gate: its layers, linear ones (`weight`, perhaps `bias`), all but the last followed by a ReLU, and
            between them normalizations of batches (with `running_mean`).
        transform: (K, K), takes shares of some attributes (verbosity) off others.
    """

    regression: Tensor
    gate: tuple[dict[str, Tensor], ...]
    temperature: float
    scale: float
    transform: Tensor

    def weights(self, prompt: Tensor) -> Tensor:
        """Return the weights of attributes (N, K), which depend on the prompt: its end's states (N, d)."""
        hidden = prompt
        for layer in self.gate:
            if "running_mean" in layer:
                mean, variance = layer["running_mean"], layer["running_var"]
                hidden = functional.batch_norm(hidden, mean, variance, layer["weight"], layer["bias"])
            else:
                hidden = functional.linear(hidden, **layer)
                hidden = hidden if layer is self.gate[-1] else hidden.relu()
        return self.scale * (hidden / self.temperature).softmax(-1) @ self.transform.T

    def quantiles(self, last: Tensor, prompt: Tensor) -> Tensor:
        """Return the reward's quantiles (N, Q), the weighted sum of the attributes' at each level."""
        return torch.einsum("nd,kqd,nk->nq", last, self.regression, self.weights(prompt))

    def judgement(self, last: Tensor, prompt: Tensor) -> Judgement:
        """Return the quantiles as scores of members, whose mean is the reward; or the one number."""
        quantiles = self.quantiles(last, prompt).double().numpy()
        return Interval(quantiles.repeat(2, axis=1)) if quantiles.shape[1] == 1 else Members(quantiles)


# --- reading them ---------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a folder's heads by name; each is taken once, with the shape that it must have."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left = folder, dict[str, Tensor]()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:  # reads the header; the backbone's stay on disk
                    names = [name for name in file.keys() if name.startswith(PARTS)]  # noqa: SIM118
                    self.left |= {name: file.get_tensor(name) for name in names}
            except (OSError, SafetensorError) as error:
                raise BackboneError(f"{path}: cannot be read as safetensors: {error}") from None

    def take(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor in float32; None stands for any size."""
        told = f"({', '.join('any' if size is None else str(size) for size in shape)})"
        if name not in self.left:
            raise BackboneError(
                f"{self.folder}: no tensor {name}, expected one {told}; left of its heads: {self.names}"
            )
        tensor = self.left.pop(name)
        fits = len(shape) == tensor.ndim and all(
            one in (None, size) for one, size in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise BackboneError(f"{self.folder}: {name}: expected {told}, got {tuple(tensor.shape)}")
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise BackboneError(
                f"{self.folder}: {name}: expected finite numbers of a floating type, neither quantized nor "
                f"NaN, got {tensor.dtype}"
            )
        return tensor.float()

    @property
    def names(self) -> str:
        return ", ".join(sorted(self.left)) or "none"


def read_head(folder: Path, config: PretrainedConfig) -> NormalHead | QuantileHead:
    """Read the head of a public reward model, of whichever layout its folder holds."""
    tensors, width = _Tensors(folder), int(config.get_text_config().hidden_size)
    head: NormalHead | QuantileHead
    if "regression_layer.weight" in tensors.left:
        head = _quantile_head(tensors, width, config)
    elif "weights.fc.0.weight" in tensors.left:
        head = _normal_head(tensors, width)
    else:
        raise BackboneError(
            f"{folder}: expected the heads of URM (score.weight and weights.fc), or of ArmoRM or QRM "
            f"(regression_layer and gating.layers) in its safetensors files, found {tensors.names}"
        )
    if tensors.left:
        raise BackboneError(
            f"{folder}: holds tensors of heads that its layout does not have: {tensors.names}"
        )
    return head


def _normal_head(tensors: _Tensors, width: int) -> NormalHead:
    """Read URM's: `score.weight` viewed as (5, 2), mean and log standard deviation, and linear layers with
    SELU between them.
    """
    score = tensors.take("score.weight", 2 * len(ATTRIBUTES), width)
    gating: dict[str, Tensor] = {}
    for layer, rows in zip(GATING_LAYERS, (None, None, len(ATTRIBUTES)), strict=True):
        gating[f"{layer}.weight"] = tensors.take(f"weights.fc.{layer}.weight", rows, width)[None]
        width = gating[f"{layer}.weight"].shape[1]
        gating[f"{layer}.bias"] = tensors.take(f"weights.fc.{layer}.bias", width)[None]
    weight = score.unflatten(0, (-1, 2))[None]  # (1, K, 2, d)
    return NormalHead(AttributeHeads(weight, torch.zeros(weight.shape[:3])), Gating(gating))


def _quantile_head(tensors: _Tensors, width: int, config: PretrainedConfig) -> QuantileHead:
    """Read ArmoRM's, or QRM's, whose configuration has `num_quantiles`; without `reward_transform_matrix`
    attributes are taken as they are.
    """
    place, told = f"{tensors.folder / 'config.json'}: ", config.to_dict()
    temperature = number(f"{place}gating_temperature", told.get("gating_temperature"), above=0)
    levels = count(f"{place}num_quantiles", told.get("num_quantiles", 1))
    gate = _gate(tensors, width)
    attributes = len(gate[-1]["weight"])
    scale = float(tensors.take("gating.logit_scale", 1))
    transform = torch.eye(attributes)
    if "reward_transform_matrix" in tensors.left:
        transform = tensors.take("reward_transform_matrix", attributes, attributes)
    rows = tensors.take("regression_layer.weight", attributes * levels, width)
    return QuantileHead(rows.unflatten(0, (attributes, levels)), gate, temperature, scale, transform)


def _gate(tensors: _Tensors, width: int) -> tuple[dict[str, Tensor], ...]:
    """Read a gate's layers in the order of their numbers; a ReLU or dropout has a number but no tensor."""
    found = [re.match(r"gating\.layers\.(\d+)\.", name) for name in tensors.left]
    layers: list[dict[str, Tensor]] = []
    for place in (f"gating.layers.{k}." for k in sorted({int(one[1]) for one in found if one})):
        if f"{place}running_mean" in tensors.left:
            names = ("running_mean", "running_var", "weight", "bias")
            layers.append({name: tensors.take(place + name, width) for name in names})
            tensors.left.pop(f"{place}num_batches_tracked", None)
            continue
        layers.append({"weight": tensors.take(f"{place}weight", None, width)})
        width = len(layers[-1]["weight"])
        if f"{place}bias" in tensors.left:
            layers[-1]["bias"] = tensors.take(f"{place}bias", width)
    if not layers or "running_mean" in layers[-1]:
        raise BackboneError(
            f"{tensors.folder}: gating.layers: expected linear layers, the last of them at the end"
        )
    return tuple(layers)


# --- a source of rewards --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicReward:
    """Rewards by a public model, shared by all policies; without a truth the reward is it.

    Called with prompts and responses it is a truth itself. `prompt_end` are the tokens (`PROMPT_ENDS`) whose
    last occurrence a gate reads.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: NormalHead | QuantileHead
    prompt_end: tuple[int, ...] = ()
    truth: Truth | None = None
    max_length: int = 4096

    @classmethod
    def load(cls, folder: str | Path, truth: Truth | None = None, max_length: int = 4096) -> "PublicReward":
        """Load a model from a folder, onto a GPU if there is one, the backbone in the type it was saved in.

        Raises:
            ValueError: the folder holds no known layout, or none that is whole; says what would be.
        """
        path = Path(folder)
        if not path.is_dir():
            raise BackboneError(
                f"{folder}: expected a model's folder; `hf download OWNER/NAME --local-dir FOLDER` makes one"
            )
        check_files(str(path), path)
        with loading(str(path)):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        head, end = read_head(path, config), ""
        if isinstance(head, QuantileHead):
            if config.model_type not in PROMPT_ENDS:
                raise BackboneError(
                    f"{path}: model_type: a gate's place is known for {' and '.join(PROMPT_ENDS)}, got "
                    f"{config.model_type}"
                )
            end = PROMPT_ENDS[config.model_type]
            if head.regression.shape[1] == 1:
                _LOG.warning("%s: does not say how sure it is: its rewards have variance 0", path)
        model, tokenizer = _backbone(path, config)
        tokens = tuple(tokenizer(end, add_special_tokens=False)["input_ids"])
        return cls(model, tokenizer, head, tokens, truth, max_length)

    def judge(self, prompts: Sequence[str], responses: Sequence[str], policy: PolicyIndex) -> Judgement:
        """Judge responses in the model's chat template."""
        last, prompt = self.states(prompts, responses).unbind(1)
        return self.head.judgement(last, prompt)

    def true_reward(self, judgement: Judgement, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the true reward (responses,)."""
        if self.truth is None:
            return judgement.sample(np.zeros(len(responses)))
        return self.truth(prompts, responses)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Array:
        """Return the reward of each response (responses,)."""
        nobody = np.zeros(len(responses), dtype=np.int64)
        return self.judge(prompts, responses, nobody).sample(np.zeros(len(responses)))

    @torch.no_grad()
    def states(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Return the states (N, 2, d) of each conversation's last token, and of that where its prompt ends,
        for heads without a gate of the prompt the last again. No other conversation changes them.
        """
        ids = conversation_ids(self.tokenizer, prompts, responses, longest(self.model, self.max_length))
        check_ids(self.model, ids)
        places = torch.tensor([[len(row) - 1, self._end(k, row)] for k, row in enumerate(ids)]).view(-1, 2)
        found = torch.empty(len(ids), 2, self.model.config.get_text_config().hidden_size)
        self.model.eval()
        for rows in batches_by_length(ids):
            batch, lengths = padded([ids[row] for row in rows])
            mask = (torch.arange(batch.shape[1]) < lengths[:, None]).long()  # (rows, tokens)
            given = {"input_ids": batch, "attention_mask": mask}
            given = {name: one.to(self.model.device) for name, one in given.items()}
            hidden = self.model(**given, use_cache=False).last_hidden_state  # (rows, tokens, d)
            found[rows] = hidden[torch.arange(len(rows))[:, None], places[rows]].float().cpu()
        return found

    def _end(self, row_number: int, row: Sequence[int]) -> int:
        """Return where a conversation's last prompt ends."""
        size = len(self.prompt_end)
        if not size:
            return len(row) - 1
        for place in range(len(row) - size, -1, -1):
            if tuple(row[place : place + size]) == self.prompt_end:
                return place
        raise ValueError(
            f"responses: conversation {row_number} has no {self.tokenizer.decode(self.prompt_end)!r}, where "
            "the gate reads; expected the chat template that the model was trained with"
        )


def _backbone(folder: Path, config: PretrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load what lies below the head; attention that Gemma 2 cuts off softly is computed as it is written."""
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    with loading(str(folder)):
        tokenizer = load_tokenizer(folder)
        model, report = AutoModel.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            attn_implementation=attention,
            dtype="auto",
            device_map={"": device()},
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise BackboneError(f"{folder}: expected a whole backbone beside its head, without {missing}")
    return model, tokenizer
