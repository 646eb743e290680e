"""Reference policies: trained from scratch in the embedded world, and frozen beside a stack."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.models import (
    CONTEXT,
    Architecture,
    conversation_ids,
    prompt_ids,
    response_texts,
    tiny_config,
)
from vaalign_lib.policies.checks import check_model
from vaalign_lib.policies.sampling import Sequences, Writer, response_states
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Precision

if TYPE_CHECKING:
    from datasets import Dataset

PIECE, NUMBERS = 512, 2**28  # rows of one pass at most, and numbers that it keeps


class ReferencePolicy(Writer):
    """One frozen policy: a model of its own, or the base under a stack of adapters."""

    def __init__(self, source: PreTrainedModel | PolicyStack, precision: Precision = "float32") -> None:
        """Take a model, with a precision of its products, or a stack of adapters, with its own."""
        self._bare: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(source, PolicyStack):
            self.model, self.precision, self._bare = source.model, source.precision, source.without_adapters
            self.frozen, self.shares_beginnings = source.frozen, source.shares_beginnings
            with self._bare():  # which refuses full weights
                pass
        elif isinstance(source, PreTrainedModel):
            check_model(source)
            self.model, self.precision = source.eval(), precision
        else:
            raise ValueError(f"reference: expected a model or a stack, got {type(source).__name__}")

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the precision, without adapters and gradients."""
        with self._bare(), torch.no_grad(), super().computing():
            yield

    @torch.no_grad()
    def log_probabilities(
        self, batch: Sequences, temperature: float, states: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Return the log-probabilities of the responses' tokens (R, T), with logits over the temperature.

        `states` are the last ones of `all_states`, where they are known; see `Writer.scored` for the mask.
        """
        found = []
        for rows in _pieces(batch, batch.responses.shape[1] * self.config.vocab_size):
            piece = batch[rows]
            state = response_states(self, piece) if states is None else states[rows]
            seen = None if mask is None else mask[rows]
            found.append(self.scored(state, piece.responses, temperature, seen))
        return torch.cat(found)

    @torch.no_grad()  # also what is made of embeddings, which checkpointing lets require gradients
    def all_states(self, batch: Sequences, layers: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """Return the hidden states of layers before each token of the responses, each (R, T, width).

        Layers are in rising order, 0 being the embeddings, by default all; the last one comes last.
        """
        tokens, every = batch.responses.shape[1], range(self.config.num_hidden_layers + 1)
        chosen, pieces = every if layers is None else layers, []
        for rows in _pieces(batch, len(every) * batch.ids.shape[1] * self.config.hidden_size):
            states = self._layer_states(batch[rows], chosen)
            pieces.append([states[layer][:, -tokens:].clone() for layer in chosen])
        return tuple(torch.cat(layer) for layer in zip(*pieces, strict=True))

    def _layer_states(self, batch: Sequences, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the hidden states of layers, and maybe of others, by layer (R, tokens, width)."""
        frozen, lower = batch.frozen, {one for one in layers if one <= self.frozen}
        if frozen is not None and frozen.of(self.model, {self.frozen, *lower}):
            return frozen.states | self.above_frozen(frozen, layers)
        options = {"use_cache": False, "output_hidden_states": True}
        out = self.outputs(batch.ids, batch.mask, batch.positions, **options)
        return dict(enumerate((*out.hidden_states[:-1], out.last_hidden_state)))


def _pieces(batch: Sequences, numbers: int) -> tuple[Tensor, ...]:
    """Return which rows go through together, if each keeps so many numbers."""
    rows = torch.arange(len(batch.ids), device=batch.ids.device)
    return rows.split(min(PIECE, max(1, NUMBERS // numbers)))


def write_reference(
    folder: Path,
    *,
    world_seed: int,
    architecture: Architecture,
    width: int,
    responses: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Teach a tiny model the corpus of a world and save it, with its tokenizer, into an existing folder.

    The learning rate is the highest of AdamW with a cosine schedule; `seed` is that of the corpus of so many
    responses, the weights and the order of the data.
    """
    from trl import SFTConfig, SFTTrainer  # here, for it takes seconds

    from vaalign_lib.trainers import quiet_training, train_quietly

    tokenizer, world = world_tokenizer(), World(world_seed)
    data = _supervised(tokenizer, *world.corpus(responses, world.rng("corpus", seed)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, width))
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=30,
        completion_only_loss=True,
        max_length=CONTEXT,
        seed=seed,
        **quiet_training(),
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    train_quietly(trainer, f"reference policy, {architecture}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _supervised(tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str]) -> "Dataset":
    """Tokenize for SFTTrainer; only the response counts in the loss."""
    whole = conversation_ids(tokenizer, prompts, responses, CONTEXT)
    asked = prompt_ids(tokenizer, prompts, CONTEXT)
    masks = [[0] * len(p) + [1] * (len(w) - len(p)) for p, w in zip(asked, whole, strict=True)]
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": whole, "completion_mask": masks})


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 32,
    batch_size: int = 512,
) -> list[str]:
    """Sample one response to each prompt; the global random state is left as it was.

    Of the likeliest words `top_k` are kept (0: all), and of those as many as make `top_p`.
    """
    rows = prompt_ids(tokenizer, prompts, CONTEXT)
    responses: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            part = {"input_ids": rows[start : start + batch_size]}
            batch = tokenizer.pad(part, padding_side="left", return_tensors="pt").to(model.device)
            written = model.generate(
                **batch,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            responses += response_texts(tokenizer, written[:, batch["input_ids"].shape[1] :].tolist())
    return responses
