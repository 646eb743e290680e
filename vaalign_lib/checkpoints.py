"""Checkpoints of a long computation that is killed at any moment: the newest that is whole is taken up.

A checkpoint is one safetensors file under a name with its step and its hash. It appears under that name
only when it is complete on the disk; the two newest are kept.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from vaalign_lib.runs import file_hash, unfinished

KEPT = 2
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{16})\.safetensors")


class CorruptCheckpointWarning(UserWarning):
    """A checkpoint is not what was written; the one before it is taken."""


class Checkpoints:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: Mapping[str, Tensor]) -> Path:
        """Write the state after a step, then drop all but the newest.

        Raises:
            DiskFullError: there is no room; what was saved before is still there.
        """
        with unfinished(self.folder / "step") as temporary:
            save_file({name: one.cpu().contiguous() for name, one in state.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:07d}-{_hash(temporary)}.safetensors"
            temporary.replace(path)
        for old in self._found()[KEPT:]:
            old.unlink()
        return path

    def newest(self) -> dict[str, Tensor] | None:
        """Return the newest state that is whole, None if there is none; warn about others."""
        for path in self._found():
            if _hash(path) == _parts(path)[1]:
                return load_file(path)
            warnings.warn(
                f"{path} is damaged (its content does not fit its checksum); going back to the "
                "checkpoint before it",
                CorruptCheckpointWarning,
                stacklevel=2,
            )
            path.unlink()
        return None

    def _found(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        paths = [path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name)]
        return sorted(paths, key=_parts, reverse=True)


def _parts(path: Path) -> tuple[int, str]:
    """Return the step and the hash in a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), found[2]


def _hash(path: Path) -> str:
    return file_hash(path)[:16]
