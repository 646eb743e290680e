"""What all uses of transformers' and trl's trainers share: one bar instead of printed dictionaries."""

import warnings
from typing import Any

import datasets
import tqdm.auto
import tqdm.std
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback

from vaalign_lib.progress import headless


def silence_libraries() -> None:
    """Switch off the libraries' own bars (map, load, save), their advice and the news of what they are
    going to rename, which say nothing that a reader needs.
    """
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


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
        bar = tqdm.std.tqdm if headless() else tqdm.auto.tqdm
        self._bar = bar(total=state.max_steps, desc=self._description, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar.close()
