"""Reward models that are sequence classifiers: stage 1 (Table 5), and the features that heads see."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vaalign_lib.data.pairs import read_part
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.jobs import device, progress
from vaalign_lib.models import conversation_ids, fitting_ids, load_tokenizer, tiny_config
from vaalign_lib.profiles import RewardModel

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import RewardConfig

_LOG = logging.getLogger(__name__)
TINY = "tiny-gemma"
SIDES = ("chosen", "rejected")
EVALUATION_TOKENS = 16_384  # in a batch without gradients


class BackboneError(ValueError):
    """A backbone that cannot be loaded or cannot carry a reward head."""


def new_reward_model(backbone: str, width: int, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model with one fresh head on a backbone, and its tokenizer.

    The backbone is `tiny-gemma` with hidden states of a `width`, or the name or path of a model. The global
    random state is left as it was.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if backbone == TINY:
            config = tiny_config("gemma", width)
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config), world_tokenizer()
        model, tokenizer, _ = loaded(f"backbone {backbone!r}", backbone, dtype=torch.float32, num_labels=1)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _words(model):
        raise BackboneError(
            f"backbone {backbone!r}: learning from pairs needs a padding token among its {_words(model)} "
            f"tokens, its tokenizer has {tokenizer.pad_token_id}; set pad_token to one it knows"
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return with_segments(model, tokenizer), tokenizer


def load_reward_model(
    name: str | Path, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained reward model, onto a GPU if there is one: any sequence classifier with one output.

    Its weights have a `dtype`; "auto" means as they were saved.
    """
    model, tokenizer, missing = loaded(f"{name}", name, dtype=dtype, device_map={"": device()})
    if model.config.num_labels != 1 or missing:
        raise BackboneError(
            f"{name}: expected a sequence classifier with one trained output, got "
            f"{model.config.num_labels} outputs, untrained weights: {missing}"
        )
    return with_segments(model.eval(), tokenizer), tokenizer


def reader(backbone: str, max_length: int) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a backbone's tokenizer and how many tokens it may read, without reading its weights."""
    with loading(f"backbone {backbone!r}"):
        tokenizer = load_tokenizer(backbone)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(backbone))
    return tokenizer, longest(model, max_length)


def loaded(
    label: str, name: str | Path, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """Return a sequence classifier with one output, its tokenizer, and which weights are fresh."""
    check_files(label, name)
    with loading(label):
        tokenizer = load_tokenizer(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, use_safetensors=True, output_loading_info=True, **options
        )
    return model, tokenizer, sorted(report["missing_keys"])


def check_files(label: str, name: str | Path) -> None:
    """Refuse a folder of adapters, or of pickled weights."""
    if (Path(name) / "adapter_config.json").is_file():
        raise BackboneError(
            f"{label}: holds adapters (LoRA); expected a whole sequence classifier: merge them by peft's "
            "merge_and_unload() and save that"
        )
    endings = {path.suffix for path in Path(name).glob("*")}
    if ".bin" in endings and ".safetensors" not in endings:
        raise BackboneError(
            f"{label}: holds pickled weights (.bin), which can run code when they are read; expected "
            "safetensors: load them where you trust them, and save_pretrained() the model"
        )


@contextmanager
def loading(label: str) -> Iterator[None]:
    """Say what cannot be loaded; every library has errors of its own for that."""
    try:
        yield
    except Exception as error:
        raise BackboneError(
            f"{label}: cannot be loaded; expected a folder or a hub name of a sequence classifier with "
            f"safetensors weights: {' '.join(str(error).split())}"
        ) from error


def _words(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def longest(model: PreTrainedModel, max_length: int) -> int:
    """Return how many tokens a model may read: `max_length`, or its positions if these are fewer."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return max_length
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    skipped = getattr(table, "padding_idx", None)  # RoBERTa counts from there
    return min(max_length, positions if skipped is None else positions - skipped - 1)


def with_segments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Give a model of BERT's kind, whose tokenizer tells prompt from response, the segment of every token
    whenever it is called with ids alone: 1 from what follows the first separator.
    """
    example = tokenizer("a", "a") if tokenizer.sep_token and not tokenizer.chat_template else {}
    told = torch.tensor([example.get("token_type_ids", [])])
    if not told.any():
        return model

    def segments(ids: Tensor) -> Tensor:
        ends = (ids == tokenizer.sep_token_id).long()  # (rows, tokens)
        return (ends.cumsum(1) > ends).long()

    if not segments(torch.tensor([example["input_ids"]])).equal(told):
        raise BackboneError(f"{tokenizer.name_or_path}: its tokenizer numbers segments otherwise than BERT's")

    def add(_: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids, mask = given.get("input_ids", args[0] if args else None), given.get("attention_mask")
        if given.get("token_type_ids") is None and ids is not None:
            given["token_type_ids"] = segments(ids) if mask is None else segments(ids) * mask
        return args, given

    model.register_forward_pre_hook(add, with_kwargs=True)
    return model


# --- training ---------------------------------------------------------------------------------------


def train_reward_model(
    folder: Path, pairs: pd.DataFrame, *, settings: RewardModel, backbone: str, seed: int
) -> pd.DataFrame:
    """Train a reward model on pairs, without those that `usable` leaves out; save it with its tokenizer.

    Training stops when the logged loss, a mean over `settings.logging_steps` steps, reaches the threshold, or
    after the last epoch. Returned is the log: step, loss, accuracy (of the batches since the last line).
    """
    model, tokenizer = new_reward_model(backbone, settings.width, seed)
    length = longest(model, settings.max_length)
    kept, left_out = usable(tokenizer, pairs, length)
    if any(left_out.values()):
        _LOG.warning("pairs left out: %s", ", ".join(f"{n} ({why})" for why, n in left_out.items()))
    if kept.empty:
        raise ValueError(f"pairs: none of {len(pairs)} can be learned from: {left_out}")
    from trl import RewardTrainer  # here, for it takes seconds

    from vaalign_lib.trainers import StopAtLoss, train_quietly

    trainer = RewardTrainer(
        model,
        args=_arguments(folder, settings, len(kept), seed),
        train_dataset=tokenized_pairs(tokenizer, kept, length),
        processing_class=tokenizer,
        callbacks=[StopAtLoss(settings.loss_threshold)],
    )
    train_quietly(trainer, "reward model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return pd.DataFrame(lines)[["step", "loss", "accuracy"]].astype(float)


def _arguments(folder: Path, settings: RewardModel, pairs: int, seed: int) -> "RewardConfig":
    from trl import RewardConfig

    on_gpu, devices = torch.cuda.is_available(), max(1, torch.cuda.device_count())
    passes = settings.batch_size // settings.device_batch_size
    if passes % devices:
        raise ValueError(
            f"device_batch_size {settings.device_batch_size}: on {devices} GPUs an effective batch of "
            f"{settings.batch_size} needs one that divides {settings.batch_size // devices}"
        )
    steps = math.ceil(settings.epochs * math.ceil(pairs / settings.batch_size))
    return RewardConfig(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.device_batch_size,
        gradient_accumulation_steps=passes // devices,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        optim=settings.optimizer,
        logging_steps=min(settings.logging_steps, steps),  # at least one line
        max_length=None,
        seed=seed,
        use_cpu=not on_gpu,
        bf16=False,
        activation_checkpointing=settings.gradient_checkpointing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
    )


def usable(
    tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, max_length: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the pairs that a model can tell apart, and how many others there are, by reason."""
    prompts = pairs["prompt"].tolist()
    sides = [fitting_ids(tokenizer, prompts, pairs[side].tolist(), max_length) for side in SIDES]
    both = list(zip(*sides, strict=True))
    long = np.array([None in one for one in both], dtype=bool)
    equal = np.array([chosen == rejected for chosen, rejected in both], dtype=bool) & ~long
    left_out = {f"a response longer than {max_length} tokens": int(long.sum())}
    return pairs[~(long | equal)], left_out | {"the same tokens in both responses": int(equal.sum())}


def tokenized_pairs(tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, max_length: int) -> "Dataset":
    """Return pairs as trl wants them: `chosen_ids` and `rejected_ids`."""
    from datasets import Dataset  # here, for it takes a second

    prompts, responses = pairs["prompt"].tolist(), {f"{side}_ids": pairs[side].tolist() for side in SIDES}
    ids = {name: conversation_ids(tokenizer, prompts, texts, max_length) for name, texts in responses.items()}
    return Dataset.from_dict(ids)


# --- what the head sees -----------------------------------------------------------------------------


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the last linear layer, which turns features into the score."""
    found = [one for one in model.modules() if isinstance(one, nn.Linear) and one.out_features == 1]
    if len(found) != 1:
        kind = type(model).__name__
        raise BackboneError(f"{kind}: expected one linear layer with one output, found {len(found)}")
    return found[0]


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    responses: Sequence[str],
    max_length: int,
    description: str = "",
) -> tuple[Tensor, Tensor]:
    """Return what the head sees of prompts and responses, and the scores; see `features_and_scores`."""
    ids = conversation_ids(tokenizer, prompts, responses, longest(model, max_length))
    return features_and_scores(model, ids, description)


@torch.no_grad()
def features_and_scores(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], description: str = ""
) -> tuple[Tensor, Tensor]:
    """Return what the head sees of tokenized conversations (conversations, width), and the scores
    (conversations,); conversations of like length are read together.
    """
    model.eval()
    check_ids(model, ids)
    config = model.config.get_text_config()
    own = config.pad_token_id
    seen: list[tuple[Tensor, Tensor]] = []
    head = head_of(model)
    hook = head.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    features, scores = torch.empty(len(ids), head.in_features), torch.empty(len(ids))
    batches = batches_by_length(ids)
    try:
        config.pad_token_id = 0 if own is None else own  # transformers wants one for several rows
        for rows in progress(batches, description) if description else batches:
            batch, lengths = padded([ids[row] for row in rows])
            mask = torch.arange(batch.shape[1]) < lengths[:, None]  # (rows, tokens)
            model(input_ids=batch.to(model.device), attention_mask=mask.long().to(model.device))
            found, scored = seen.pop()
            if found.ndim == 3:  # a causal model: every token has a score
                # the one that counts is, for transformers, the last that is not the configuration's padding
                counts = mask if own is None else mask & (batch != own)
                last = (counts * torch.arange(batch.shape[1])).argmax(1)  # (rows,)
                place = torch.arange(len(rows)), last
                found, scored = found[place], scored[place]  # (rows, width), (rows, 1)
            features[rows] = found.float().cpu()
            scores[rows] = scored[:, 0].float().cpu()
    finally:
        hook.remove()
        config.pad_token_id = own
    return features, scores


def check_ids(model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> None:
    """Check that a model can read tokenized conversations."""
    most, words, kind = longest(model, 10**9), _words(model), type(model).__name__
    for k, row in enumerate(ids):
        told = f"ids: conversation {k}"
        if not 1 <= len(row) <= most:
            raise ValueError(f"{told} has {len(row)} tokens; expected 1 to {most}, the positions of {kind}")
        if not 0 <= min(row) <= max(row) < words:
            why = "model and tokenizer do not belong together"
            raise ValueError(f"{told} holds token {max(row)}, {kind} knows {words}; {why}")


def batches_by_length(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group conversations of like length, so that little is padding; fixed by the lengths alone."""
    batches: list[list[int]] = []
    for row in sorted(range(len(ids)), key=lambda row: len(ids[row])):
        if not batches or (len(batches[-1]) + 1) * len(ids[row]) > EVALUATION_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def padded(rows: Sequence[Sequence[int]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """Return rows of tokens filled up on the right (rows, tokens), and their lengths (rows,)."""
    filled = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
    return filled, torch.tensor([len(row) for row in rows])


# --- for the run store ----------------------------------------------------------------------------


def write_reward_model(
    folder: Path, settings: dict[str, Any], backbone: str, files: Any, seed: int, pairs: Path
) -> None:
    """Train the reward model of stage 1 on the pairs to learn from; `files` is for the key alone."""
    stage_1 = RewardModel(backbone=backbone, **settings)
    table = read_part(pairs, "train")
    log = train_reward_model(folder, table, settings=stage_1, backbone=backbone, seed=seed)
    log.to_parquet(folder / "log.parquet")


def write_features(folder: Path, part: str, max_length: int, model: Path, pairs: Path) -> None:
    """Run the frozen backbone once over the pairs of a part."""
    table = read_part(pairs, part)
    network, tokenizer = load_reward_model(model)
    length = longest(network, max_length)
    found = {"head": head_of(network).weight[0].detach().float().cpu().clone()}
    for side in SIDES:
        texts = table["prompt"].tolist(), table[side].tolist()
        found[side], found[f"{side}_score"] = read(network, tokenizer, *texts, length, f"features, {part}")
        whole = conversation_ids(tokenizer, *texts, 10**9)
        found[f"{side}_cut"] = torch.tensor([len(row) > length for row in whole])
    save_file(found, folder / "features.safetensors")
