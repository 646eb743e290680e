"""Stage 1: one reward model with one head, trained by trl's RewardTrainer (Table 5), and its features.

Any backbone of transformers will do, by name or path, causal or encoder; what is called `tiny-gemma`
is a two-layer model of the paper's reward model architecture with the embedded world's vocabulary.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer

from vaalign_lib.conversation import conversation_ids, load_tokenizer
from vaalign_lib.profiles import RewardModel
from vaalign_lib.progress import progress
from vaalign_lib.synthetic.tokenizer import world_tokenizer
from vaalign_lib.tiny import tiny_config
from vaalign_lib.trainers import train_quietly
from vaalign_lib.workers import device

TINY = "tiny-gemma"
EVALUATION_TOKENS = 16_384  # in a batch without gradients


class BackboneError(ValueError):
    """A backbone that cannot be loaded or cannot carry a reward head."""


def new_reward_model(
    backbone: str, width: int, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a model with one fresh head on a backbone, and its tokenizer.

    Args:
        backbone: `tiny-gemma`, or the name or path of a model of transformers.
        width: of the hidden states of `tiny-gemma`; ignored otherwise.
        seed: of the fresh weights; the global random state is left as it was.

    Raises:
        BackboneError: there is no such model, or it has weights in an unsafe format only.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if backbone == TINY:
            tokenizer = world_tokenizer()
            config = tiny_config("gemma", width)
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config), tokenizer
        try:
            tokenizer = load_tokenizer(backbone)
            model = AutoModelForSequenceClassification.from_pretrained(
                backbone, num_labels=1, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise BackboneError(
                f"backbone {backbone!r}: cannot be loaded as a sequence classifier with safetensors "
                f"weights; expected {TINY}, a folder or a hub name: {error}"
            ) from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def load_reward_model(
    name: str | Path, dtype: torch.dtype | str = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a trained reward model, onto a GPU if there is one: any sequence classifier with one output.

    Args:
        name: of the model, or its folder.
        dtype: of its weights; "auto" means as they were saved.

    Raises:
        BackboneError: it cannot be loaded, or has no trained head with exactly one output.
    """
    try:
        tokenizer = load_tokenizer(name)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            use_safetensors=True,
            output_loading_info=True,
            dtype=dtype,
            device_map={"": device()},
        )
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(f"{name}: cannot be loaded as a reward model: {error}") from error
    if model.config.num_labels != 1 or report["missing_keys"]:
        raise BackboneError(
            f"{name}: expected a sequence classifier with one trained output, got "
            f"{model.config.num_labels} outputs, untrained weights: {sorted(report['missing_keys'])}"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


# --- training ---------------------------------------------------------------------------------------


def train_reward_model(
    folder: Path, pairs: pd.DataFrame, *, settings: RewardModel, backbone: str, seed: int
) -> pd.DataFrame:
    """Train one reward model on preference pairs and save it, with its tokenizer, into a folder.

    Training stops when the logged loss, a mean over `settings.logging_steps` steps, reaches the
    threshold, or after the last epoch.

    Args:
        folder: an existing folder.
        pairs: a table of pairs.
        settings: Table 5's, from the profile.
        backbone: `tiny-gemma`, or the name or path of a model.
        seed: of the fresh weights and the order of the data.

    Returns:
        The log: step, loss, accuracy (of the batches since the last line).
    """
    model, tokenizer = new_reward_model(backbone, settings.width, seed)
    data = tokenized_pairs(tokenizer, pairs, settings.max_length)
    on_gpu = torch.cuda.is_available()
    passes = settings.batch_size // settings.device_batch_size
    devices = max(1, torch.cuda.device_count())
    if passes % devices:
        raise ValueError(
            f"device_batch_size {settings.device_batch_size}: on {devices} GPUs an effective batch of "
            f"{settings.batch_size} needs one that divides {settings.batch_size // devices}"
        )
    steps = math.ceil(settings.epochs * math.ceil(len(pairs) / settings.batch_size))
    arguments = RewardConfig(
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
    trainer = RewardTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[StopAtLoss(settings.loss_threshold)],
    )
    train_quietly(trainer, "reward model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return pd.DataFrame(lines)[["step", "loss", "accuracy"]].astype(float)


class StopAtLoss(TrainerCallback):
    """Ends training once the logged loss has reached a threshold."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and float(logs.get("loss", np.inf)) <= self._threshold:
            control.should_training_stop = True


def tokenized_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame, max_length: int
) -> Dataset:
    """Return pairs as trl wants them: `chosen_ids` and `rejected_ids`."""
    prompts = pairs["prompt"].tolist()
    return Dataset.from_dict(
        {
            f"{side}_ids": conversation_ids(tokenizer, prompts, pairs[side].tolist(), max_length)
            for side in ("chosen", "rejected")
        }
    )


# --- what the head sees -----------------------------------------------------------------------------


def head_of(model: PreTrainedModel) -> nn.Linear:
    """Return the last linear layer, which turns features into the score.

    Raises:
        BackboneError: the model's last layer is not linear with one output.
    """
    linear = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1
    ]
    if len(linear) != 1:
        raise BackboneError(
            f"{type(model).__name__}: expected one linear layer with one output, found {len(linear)}"
        )
    return linear[0]


@torch.no_grad()
def features_and_scores(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], description: str = ""
) -> tuple[Tensor, Tensor]:
    """Run a reward model over tokenized conversations, batched by length.

    Args:
        model: with one head; it is put into evaluation mode.
        ids: token ids of each conversation.
        description: of the progress bar; none without it.

    Returns:
        What the head sees (conversations, width), and the model's scores (conversations,).
    """
    model.eval()
    head = head_of(model)
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    features = torch.empty(len(ids), head.in_features)
    scores = torch.empty(len(ids))
    batches = _batches_by_length(ids)
    try:
        for rows in progress(batches, description) if description else batches:
            batch = _padded([ids[row] for row in rows], model.config.pad_token_id)
            out = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            found = seen.pop()
            # The last token that is not padding, as in transformers: where the end is the padding
            # token, the one before.
            written = batch["input_ids"] != model.config.pad_token_id
            last = (written * torch.arange(written.shape[1])).argmax(1)
            if found.ndim == 3:  # a causal model: every token has a score, the last one counts
                found = found[torch.arange(len(rows)), last.to(found.device)]
            features[rows] = found.float().cpu()
            scores[rows] = out.logits[:, 0].float().cpu()
    finally:
        hook.remove()
    return features, scores


def _batches_by_length(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group conversations of like length, so that little is padding; fixed by the lengths alone."""
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), row))
    batches: list[list[int]] = [[]]
    for row in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(ids[row]) > EVALUATION_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return [batch for batch in batches if batch]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for k, row in enumerate(rows):
        ids[k, : len(row)] = torch.tensor(row)
        mask[k, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


# --- for the run store ----------------------------------------------------------------------------


def write_reward_model(
    folder: Path,
    settings: dict[str, Any],
    backbone: str,
    weights: Sequence[str],
    seed: int,
    pairs: Path,
) -> None:
    """Train the reward model of stage 1 on the pairs to learn from; `weights` are hashes for the key."""
    table = pd.read_parquet(pairs / "pairs.parquet")
    log = train_reward_model(
        folder,
        table[table["part"] == "train"],
        settings=RewardModel(backbone=backbone, **settings),
        backbone=backbone,
        seed=seed,
    )
    log.to_parquet(folder / "log.parquet")


def write_features(folder: Path, part: str, max_length: int, model: Path, pairs: Path) -> None:
    """Run the frozen backbone once over the pairs of a part."""
    table = pd.read_parquet(pairs / "pairs.parquet")
    table = table[table["part"] == part]
    network, tokenizer = load_reward_model(model)
    found: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        ids = conversation_ids(
            tokenizer, table["prompt"].tolist(), table[side].tolist(), max_length
        )
        found[side], found[f"{side}_score"] = features_and_scores(network, ids, f"features, {part}")
        found[f"{side}_cut"] = torch.tensor([len(row) >= max_length for row in ids])
    found["head"] = head_of(network).weight[0].detach().float().cpu().clone()
    save_file(found, folder / "features.safetensors")
