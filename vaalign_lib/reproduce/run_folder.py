"""Run folders: what this program may write into, and what it may remove.

The rule, here once. A run folder carries a mark, written when it was made or found empty; one of an
earlier version is known by what lies in it. Any other folder that is not empty is refused. In a run
folder only what this program wrote is ever removed: leftovers with exactly the names that it gives, and
folders of notebooks that hold just what their record lists. Everything else stays, or is moved aside.
"""

import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaalign_lib import store
from vaalign_lib.store import file_hash, locked, remove_unfinished, write_atomically

MARK = ".vaalign"  # the file that makes a folder a run folder
RECORD = "done.json"  # in the folder of a notebook's run: its key and the hashes of its files
LEFTOVER_AGE = 24 * 3600  # seconds after which a temporary folder in the store belongs to nobody

_BOOK, _RANDOM = r"\d\d_\w+", "[a-z0-9_]{8}"  # the latter as tempfile names
_FOLDER_LEFT = re.compile(rf"\.{_BOOK}\.(partial|retired|{_RANDOM}(\.unfinished)?)")
_FILE_LEFT = re.compile(rf"\.(report\.html|scoreboard\.json|\.plan|\.vaalign)\.{_RANDOM}(\.unfinished)?")
_STORE_LEFT = re.compile(rf"\..+-[0-9a-f]{{16}}\.(retired|{_RANDOM})")
_FOLDERS = re.compile(rf"store|interactive|{_BOOK}(\.failed)?(\.aside-\d+)?|{_FOLDER_LEFT.pattern}")
_FILES = {  # of earlier versions, by their content; only then may they be written again
    ".lock": re.compile(rb""),
    ".plan": re.compile(rb"[0-9a-f]{16}"),
    "report.html": re.compile(rb".*<title>Uncertainty-aware alignment: .*", re.DOTALL),
    "judgements.sqlite": re.compile(rb"SQLite format 3\0.*", re.DOTALL),
    **{f"judgements.sqlite-{one}": re.compile(rb".*", re.DOTALL) for one in ("journal", "wal", "shm")},
    "scoreboard.json": re.compile(rb"\[\s*\{\s*\"item\": .*", re.DOTALL),
}


class UsageError(ValueError):
    """Options, a folder or a notebook's parameters that do not fit."""


def check(folder: Path) -> Path:
    """Return the path without links of a run folder, or of one that is empty or yet to be made.

    Raises:
        UsageError: it is a file, or a folder of other things.
    """
    try:
        real = folder.resolve()
    except RuntimeError:  # a loop, before Python 3.13
        real = None
    if real is None or (folder.is_symlink() and not folder.exists()):
        raise UsageError(f"--run-dir: {folder} is a link that leads nowhere")
    if real.exists() and not real.is_dir():
        raise UsageError(f"--run-dir: {folder} is a file; name a folder, or what is not there yet")
    if real.exists() and not (real / MARK).is_file() and not all(map(_known, real.iterdir())):
        raise UsageError(
            f"--run-dir: {folder} is not empty and is no run folder of vaalign; "
            "name one, an empty folder, or one that is not there yet"
        )
    return real


def _known(path: Path) -> bool:
    """Whether an earlier version, which left no mark, wrote this."""
    if path.is_symlink() or not path.is_file():
        if not _FOLDERS.fullmatch(path.name) or not path.is_dir():
            return False
        return not re.fullmatch(_BOOK, path.name) or (path / RECORD).is_file() or not any(path.iterdir())
    content = _FILES.get(path.name)
    return bool(content and content.fullmatch(path.read_bytes())) or bool(_FILE_LEFT.fullmatch(path.name))


@contextmanager
def opened(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, made and marked if need be, without leftovers.

    Raises:
        UsageError: it is no run folder.
        RunDirectoryBusyError: another process works in it.
    """
    check(folder)
    with locked(folder):
        if not (folder / MARK).exists():
            write_atomically(folder / MARK, "A run folder of vaalign, which may write here.\n")
        remove_leftovers(folder)
        yield


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run left behind; bring back what it was about to replace.

    In the store a JupyterLab may be writing at this moment, so there of what has no lock, as in earlier
    versions, only old leftovers go.
    """
    kept = folder / "store"
    remove_unfinished(folder)
    remove_unfinished(kept)
    for path in _matching(folder, _FOLDER_LEFT) + _matching(kept, _STORE_LEFT):
        original = path.with_name(path.name.removeprefix(".").removesuffix(".retired"))
        if path.name.endswith(".retired") and not original.exists():
            path.rename(original)
        elif path.parent == folder or time.time() - path.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*"):
        if _FILE_LEFT.fullmatch(path.name) and path.is_file() and not path.is_symlink():
            path.unlink()


def _matching(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Return the folders of such names, without links to folders."""
    found = [path for path in folder.glob(".*") if names.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


# --- folders of notebooks -----------------------------------------------------------------------------


def finished_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished run; None, with a warning, if a file of it is not as it was."""
    if not (folder / RECORD).is_file():
        return None
    try:
        return store.read_record(folder, RECORD)
    except store.DamagedError as error:
        text = f"{error}; {folder.name} counts as not run"
        warnings.warn(text, store.DamagedResultWarning, stacklevel=2)
        return None


def _listed_files(folder: Path) -> dict[str, str]:
    """Return the hashes of a run's files by its record, whether they are still there or not."""
    with suppress(OSError):
        return dict(store.unsealed(folder / RECORD).get("files", {}))
    return {}


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder but its record, by its path; links have none."""
    return {
        str(path.relative_to(folder)): "" if path.is_symlink() else file_hash(path)
        for path in sorted(folder.rglob("*"))
        if (path.is_file() or path.is_symlink()) and path != folder / RECORD
    }


def make_way(folder: Path) -> None:
    """Move a folder aside that holds anything but what its record lists; such a one is not replaced."""
    if not folder.is_symlink() and not folder.exists():
        return
    theirs = not folder.is_dir() or folder.is_symlink()
    if theirs or not hashes(folder).items() <= _listed_files(folder).items():
        names = (folder.with_name(f"{folder.name}.aside-{n}") for n in range(1, sys.maxsize))
        aside = next(name for name in names if not name.exists() and not name.is_symlink())
        folder.rename(aside)
        text = f"{folder.name} holds what this program did not write or record: it is now {aside}"
        tqdm.write(text, file=sys.stderr)


def remove(folder: Path) -> None:
    """Remove the folder of a notebook's run."""
    make_way(folder)
    shutil.rmtree(folder, ignore_errors=True)
