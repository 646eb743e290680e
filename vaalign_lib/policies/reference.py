"""Reference policies: tiny models of the papers' own architectures, taught by trl's SFTTrainer."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from vaalign_lib.conversation import conversation_ids, prompt_ids, response_texts
from vaalign_lib.synthetic.tokenizer import world_tokenizer
from vaalign_lib.synthetic.world import World
from vaalign_lib.tiny import CONTEXT, Architecture, tiny_config
from vaalign_lib.trainers import train_quietly


def train_reference(
    folder: Path,
    *,
    world: World,
    architecture: Architecture,
    width: int,
    responses: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Teach a tiny model the world's corpus and save it, with its tokenizer, into a folder.

    Args:
        folder: an existing folder.
        world: whose corpus is learned.
        architecture: of the model.
        width: of its hidden states.
        responses: in the corpus.
        epochs: over the corpus.
        batch_size: of responses.
        learning_rate: the highest, of AdamW with a cosine schedule.
        seed: of the corpus, the weights and the order of the data.
    """
    tokenizer = world_tokenizer()
    prompts, written = world.corpus(responses, world.rng("corpus", seed))
    data = _supervised(tokenizer, prompts, written)
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
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    train_quietly(trainer, f"reference policy, {architecture}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_reference(folder: Path, *, world_seed: int, **settings: Any) -> None:
    """Train the reference policy of the world of a seed, for the run store; see `train_reference`."""
    train_reference(folder, world=World(world_seed), **settings)


def quiet_training() -> dict[str, Any]:
    """Return what all trainings of tiny models share: on the CPU, no checkpoints, no reports."""
    return {
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 50,
        "dataloader_pin_memory": False,
    }


def _supervised(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str]
) -> Dataset:
    """Tokenize for SFTTrainer; only the response counts in the loss."""
    whole = conversation_ids(tokenizer, prompts, responses, CONTEXT)
    asked = prompt_ids(tokenizer, prompts, CONTEXT)
    masks = [[0] * len(p) + [1] * (len(w) - len(p)) for p, w in zip(asked, whole, strict=True)]
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
    """Sample one response to each prompt.

    Args:
        model: a causal model.
        tokenizer: its tokenizer.
        prompts: texts.
        seed: of the sampling; the global random state is left as it was.
        temperature: divides the logits.
        top_k: words kept of the likeliest; 0 means all.
        top_p: probability kept of the likeliest; 1 means all.
        max_new_tokens: of a response, with its end.
        batch_size: of the computation.
    """
    rows = prompt_ids(tokenizer, prompts, CONTEXT)
    responses: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(rows), batch_size):
            batch = tokenizer.pad(
                {"input_ids": rows[start : start + batch_size]},
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            written = model.generate(
                **batch,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = written[:, batch["input_ids"].shape[1] :].tolist()
            responses += response_texts(tokenizer, new)
    return responses
