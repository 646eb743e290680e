"""N policies of one architecture inside one unmodified transformers model."""

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from vaalign_lib.policies.checks import (
    StackError,
    check_config,
    check_layers,
    check_lora,
    check_model,
    configuration_of,
    first_line,
    whole,
)
from vaalign_lib.policies.frozen import frozen_layers
from vaalign_lib.policies.layers import ATTENTION, StackedLora, stacked, stacked_lora
from vaalign_lib.policies.sampling import Writer
from vaalign_lib.profiles import Precision
from vaalign_lib.store import spared_folder

if TYPE_CHECKING:
    from peft import LoraConfig

FOUR_BIT = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
    bnb_4bit_quant_type="nf4",
)


class PolicyStack(Writer):
    """N policies: full weights, or low-rank adapters over one shared base.

    Every policy starts as a copy of one model, the reference policy. Rows of token ids are laid out
    policy by policy, (N * rows each, tokens). Dropout acts in adapters only, and in updates only.
    """

    def __init__(
        self,
        source: str | Path | PretrainedConfig | PreTrainedModel,
        size: int,
        *,
        lora: "LoraConfig | None" = None,
        four_bit: bool = False,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        precision: Precision = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        """Load a model and stack it; what is not possible is refused (StackError, see `checks`).

        Args:
            source: a name on the hub, a folder, a configuration (fresh weights), or a model, which is
                changed in place and keeps its own dtype.
            size: N.
            lora: the adapters; None trains all weights.
            four_bit: whether the frozen base is held in 4 bits, as in Table 17; needs `lora`.
            seeds: of the policies' own random starts (adapters only), by default 0 to N - 1.
            dtype: of the weights; by default float32, and bfloat16 for a base in 4 bits.
            device: where the stack lives.
            precision: `bfloat16` computes products in it, with weights of `dtype` (mixed precision).
            gradient_checkpointing: updates compute activations twice instead of keeping them, which saves
                memory for a third more time.
        """
        self.size = whole("size", size, 1)
        self.lora, self.precision, self.gradient_checkpointing = lora, precision, gradient_checkpointing
        dtype = dtype or (torch.bfloat16 if four_bit else torch.float32)
        _check_numbers(dtype, device, precision)
        if lora is not None:
            check_lora(lora)
        elif four_bit:
            raise StackError("four_bit: weights in 4 bits cannot be trained; give lora as well")
        self.model = _load(source, four_bit, dtype, device)
        check_model(self.model)
        check_layers(lora and lora.layers_to_transform, self.model.config)
        self.model.requires_grad_(False)
        self.model.set_attn_implementation(ATTENTION)
        if lora is None:
            known: dict[int, nn.Parameter] = {}
            for name, layer in list(self.model.named_modules()):
                if (stack := stacked(layer, size, known)) is not None:
                    self.model.set_submodule(name, stack)
        else:
            own = range(size) if seeds is None else seeds
            if len(own) != size:
                raise StackError(f"seeds: expected {size}, got {len(own)}")
            self.model = _stack_adapters(self.model, lora, size, _generators(own, "cpu"))
            self.frozen = frozen_layers(self.model.base_model)
            self._let("at_once", self.frozen > 0)
            windows = getattr(self.model.config, "sliding_window", None)  # which count columns
            none = not (gradient_checkpointing or lora.lora_dropout or windows)
            self.shares_beginnings = self.frozen > 0 and none
        self.model.to(device).eval()  # dropout of the base would come from a generator of all
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": self._as_before}
            self.model.activation_checkpointing_enable(options)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name, each (N, ...); what is tied appears once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Make every policy the reference policy for a while; for adapters only."""
        if self.lora is None:
            raise StackError("policies of full weights hold no reference; load one beside them")
        self._let("adapted", False)
        try:
            yield
        finally:
            self._let("adapted", True)

    @contextmanager
    def updating(self, seeds: Sequence[int]) -> Iterator[None]:
        """Let dropout, with a seed for each policy, and checkpointing act for a while."""
        self._let("generators", _generators(seeds, self.device))
        self._checkpoint(self.gradient_checkpointing)
        try:
            yield
        finally:
            self._let("generators", None)
            self._checkpoint(False)

    def _let(self, name: str, value: Any) -> None:
        for layer in self._adapters():
            setattr(layer, name, value)

    def _checkpoint(self, active: bool) -> None:
        for block in self.model.modules():
            if isinstance(block, GradientCheckpointingLayer):
                block.training = active  # the block alone: what is inside would begin to drop out

    def _as_before(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return contexts of a block's first computation and of its second, with the same dropout."""
        generators = next((layer.generators for layer in self._adapters()), None) or []
        states = [one.get_state() for one in generators]

        @contextmanager
        def again() -> Iterator[None]:
            now = [one.get_state() for one in generators]
            _set_states(generators, states)
            try:
                yield
            finally:
                _set_states(generators, now)

        return nullcontext(), again()

    def _adapters(self) -> list[StackedLora]:
        return [module for module in self.model.modules() if isinstance(module, StackedLora)]

    def export(
        self, policy: int, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """Write one policy into a folder, as an ordinary checkpoint or a peft adapter.

        Args:
            policy: its place in the stack.
            folder: new, empty, or an earlier export, which is replaced; it appears when it is complete.
            tokenizer: is saved beside it. Beside a Qwen2 model read it by `models.load_tokenizer`:
                AutoTokenizer of transformers 5 puts the class of the model's makers in its place.
        """
        if not 0 <= policy < self.size:
            raise IndexError(f"policy: expected 0 to {self.size - 1}, got {policy}")
        weights = {name: p.detach()[policy].cpu().contiguous() for name, p in self.parameters().items()}
        with spared_folder(Path(folder)) as partial:
            if self.lora is None:
                _write_model(self.config, weights, partial)
            else:
                _write_adapter(self.lora, self.config, weights, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)


def _generators(seeds: Sequence[int], device: str | torch.device) -> list[torch.Generator]:
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _set_states(generators: Sequence[torch.Generator], states: Sequence[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


# --- making a stack ---------------------------------------------------------------------------------


def _check_numbers(dtype: torch.dtype, device: str | torch.device, precision: str) -> None:
    if precision not in get_args(Precision):
        raise StackError(f"precision: expected one of {', '.join(get_args(Precision))}, got {precision!r}")
    if not dtype.is_floating_point:
        raise StackError(f"dtype: expected one of floating point, got {dtype}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        raise StackError(f"device: {device} cannot be used here: {first_line(error)}") from None


def _load(source: Any, four_bit: bool, dtype: torch.dtype, device: str | torch.device) -> PreTrainedModel:
    kind, named = type(source).__name__, isinstance(source, str | Path)
    if four_bit and not named:
        raise StackError(f"four_bit: expected a name or folder to quantize, got {kind}")
    if isinstance(source, PreTrainedModel):
        return source
    if isinstance(source, PretrainedConfig):
        check_config(source)
        return AutoModelForCausalLM.from_config(_quick(source), dtype=dtype)
    if not named:
        expected = "a name, a folder, a configuration or a causal model of transformers"
        raise StackError(f"source: expected {expected}, got {kind}")
    config = _quick(configuration_of(source))
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            device_map={"": device},  # accelerate puts weights there as it reads them
            use_safetensors=True,  # pickled ones could run code
            output_loading_info=True,
            quantization_config=FOUR_BIT if four_bit else None,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        told = "cannot be loaded (from safetensors; pytorch_model.bin is not read)"
        raise StackError(f"source: {source} {told}: {first_line(error)}") from None
    if lacking := sorted(found["missing_keys"]):  # they would be drawn at random
        told = f"lacks {lacking[0]} ({len(lacking)} weights in all)"
        raise StackError(f"source: {source} {told}: it was not saved as a causal language model")
    for layer in model.modules():  # their layout for inference is misread by passes with gradients
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def _quick(config: PretrainedConfig) -> PretrainedConfig:
    """Name the quicker of two equal activations: the same function, in one operation."""
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def _stack_adapters(
    model: PreTrainedModel, lora: "LoraConfig", size: int, generators: list[torch.Generator]
) -> PreTrainedModel:
    """Let peft choose and make the adapters, then put stacks in their places."""
    from peft import get_peft_model  # here, for it takes seconds
    from peft.tuners.lora import LoraLayer

    output = model.get_output_embeddings()
    try:
        base = get_peft_model(model, lora).get_base_model()
    except ValueError as error:
        raise StackError(f"lora: {first_line(error)}") from None
    for name, layer in list(base.named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        if layer.get_base_layer() is output:
            raise StackError(f"lora: {name} is the output layer; adapters belong below it")
        if not layer.lora_A:
            raise StackError(f"lora: adapters of linear layers only, {name} is none")
        base.set_submodule(name, stacked_lora(layer, size, generators))
    return base


# --- writing a policy -------------------------------------------------------------------------------


def _write_model(config: PretrainedConfig, weights: dict[str, Tensor], folder: Path) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def _write_adapter(
    lora: "LoraConfig", config: PretrainedConfig, weights: dict[str, Tensor], folder: Path
) -> None:
    names, renamed = {"down": "lora_A", "up": "lora_B"}, {}
    for name, weight in weights.items():
        layer, _, part = name.rpartition(".")
        renamed[f"base_model.model.{layer}.{names[part]}.weight"] = weight.T.contiguous()
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    lora.save_pretrained(str(folder))
    record = json.loads((folder / "adapter_config.json").read_text())
    base = config.name_or_path  # a folder, or a name on the hub
    base = str(Path(base).resolve()) if Path(base).is_dir() else base
    record |= {"base_model_name_or_path": base, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(record, indent=1))
