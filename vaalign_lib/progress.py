"""Progress bars: widgets in JupyterLab, text on stderr when the notebook runs headless."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import tqdm.auto
import tqdm.std
from transformers import TrainerCallback

HEADLESS = (
    "VAALIGN_HEADLESS"  # set by `vaalign reproduce`: nobody can see a widget or move a slider
)

T = TypeVar("T")


def headless() -> bool:
    """Whether `vaalign reproduce` runs the notebook."""
    return bool(os.environ.get(HEADLESS))


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items with a bar that vanishes at the end."""
    bar = tqdm.std.tqdm if headless() else tqdm.auto.tqdm
    yield from bar(items, desc=description, total=total, leave=False)


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

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any
    ) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self._bar.close()
