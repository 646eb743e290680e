"""What all trainings by transformers' and trl's trainers share; who imports it imports them, for seconds."""

from typing import Any

import numpy as np
from transformers import PrinterCallback, Trainer, TrainerCallback

from vaalign_lib.jobs import bar


def quiet_training() -> dict[str, Any]:
    """Return what all trainings of tiny models share: on the CPU, no checkpoints, no reports."""
    off = dict.fromkeys(("bf16", "activation_checkpointing", "dataloader_pin_memory"), False)
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 50}
    return {"use_cpu": True, **off, **quiet}


def train_quietly(trainer: Trainer, description: str) -> None:
    """Train with a bar that shows the latest loss, and without printing every log."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TrainingBar(description))
    trainer.train()


class TrainingBar(TrainerCallback):
    """A bar for the trainers of transformers and trl, with the latest loss."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar = bar(state.max_steps, self._description)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar.close()


class StopAtLoss(TrainerCallback):
    """Ends training once the logged loss has reached a threshold."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and float(logs.get("loss", np.inf)) <= self._threshold:
            control.should_training_stop = True
