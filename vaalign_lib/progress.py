"""Progress bars: widgets in JupyterLab, text on stderr when the notebook runs headless."""

import os
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import tqdm.auto
import tqdm.std

HEADLESS = (
    "VAALIGN_HEADLESS"  # set by `vaalign reproduce`: nobody can see a widget or move a slider
)

T = TypeVar("T")


def headless() -> bool:
    """Whether `vaalign reproduce` runs the notebook."""
    return bool(os.environ.get(HEADLESS))


def bar(total: int, description: str, done: int = 0) -> Any:
    """Return a bar that vanishes at the end, for work that is not an iteration over items."""
    kind = tqdm.std.tqdm if headless() else tqdm.auto.tqdm
    return kind(total=total, desc=description, initial=done, leave=False)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items with a bar that vanishes at the end."""
    kind = tqdm.std.tqdm if headless() else tqdm.auto.tqdm
    yield from kind(items, desc=description, total=total, leave=False)
