"""The run store: what was computed is kept under a key of what determines it, and never computed twice.

Nothing is written in place: a file or folder appears under its name only when it is complete.
"""

import ast
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, lru_cache, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import pandas as pd
import xxhash

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
Inputs = Mapping[str, Path] | None
Writer = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
PROFILES = DATA / "profiles"
RESULTS = DATA / "results"
FIGURES = ROOT / "figures"
RUNS = ROOT / "runs"
PRETRAINED = ROOT / "pretrained"  # what `make pretrained` fills; git ignores it
PACKAGE = ROOT / "vaalign_lib"
UNKEYED = {"store", "jobs", "profiles", "papers", "figures", "experiments", "reproduce"}  # compute no result
RECORD = "run.json"  # of a finished folder
WAIT = 30.0  # seconds in which the worker of a killed process notices that it is alone, and ends
KEPT = 2  # checkpoints of a run
_HUB_NAME = re.compile(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}(@[\w.-]+)?", re.ASCII)
_FILE_NAME = re.compile(
    r".*\.(jsonl?|ndjson|[ct]sv|xlsx?|ya?ml|parquet|arrow|txt|gz|zst|bz2|xz|zip|tar|safetensors|bin|pt|gguf)",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"\..+\.[a-z0-9_]{8}\.unfinished")  # in the middle as tempfile names
_CHECKPOINT = re.compile(r"step-(\d+)-([0-9a-f]{16})\.safetensors")
_NUMERICAL = "numpy scipy pandas statsmodels torch transformers trl peft accelerate bitsandbytes"


class RunDirectoryBusyError(RuntimeError):
    """Another process works in the run folder."""


class FinalError(RuntimeError):
    """What another try would not change."""


class PlanError(FinalError):
    """Something is missing that would otherwise be noticed after hours."""


class NotKeptError(LookupError):
    """A store that only reads was asked for what it has not."""


class DamagedError(OSError):
    """What was kept is not what was written."""


class DamagedResultWarning(UserWarning):
    """A result in the store is not what was written; it counts as not computed."""


class CorruptCheckpointWarning(UserWarning):
    """A checkpoint is not what was written; the one before it is taken."""


class DiskFullError(OSError):
    """There is no room to go on; what was finished is kept."""


# --- writing ----------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, also after a crash."""
    with unfinished(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error."""
    with unfinished(path, folder=True) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
        replace_folder(temporary, path)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        text = f"{path} cannot be a folder, for there is a file; name another one"
        raise NotADirectoryError(text) from None


@contextmanager
def unfinished(path: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a new file or folder beside `path`, which goes when the block ends unless it was moved.

    Its name says that it is ours, a lock that its writer lives; see `remove_unfinished`. Of a full disk
    `DiskFullError` tells.
    """
    _make_folder(path.parent)
    try:
        temporary, held = _claimed(folder, dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished")
        try:
            yield temporary
        finally:
            os.close(held)
            _remove(temporary)
    except Exception as error:
        number = getattr(error, "errno", None)  # that of safetensors has none, only a text
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)
        if not full or isinstance(error, DiskFullError):
            raise
        raise DiskFullError(
            f"{path.parent}: the disk is full; free some of it and run again: what was finished is kept, and "
            "work goes on from the last checkpoint"
        ) from error


def _claimed(folder: bool, **place: Any) -> tuple[Path, int]:
    """Return a new file or folder and the descriptor that holds its lock."""
    while True:
        if folder:
            name = tempfile.mkdtemp(**place)
            try:
                held = os.open(name, os.O_RDONLY)
            except FileNotFoundError:  # somebody took it for a leftover at once
                continue
        else:
            held, name = tempfile.mkstemp(**place)
        with suppress(OSError):  # a file system without locks: it is never taken for a leftover
            fcntl.flock(held, fcntl.LOCK_EX)
        if Path(name).exists():  # nobody took it for a leftover before it was locked
            return Path(name), held
        os.close(held)


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left in a folder: what is named by `unfinished` and has no lock."""
    for path in folder.glob(".*.unfinished"):
        if _UNFINISHED.fullmatch(path.name) and not path.is_symlink():
            with suppress(OSError):
                held = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)
                finally:
                    os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def spared_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to write into for the user: an empty one itself, else a new one in the place of `path`,
    if all that stands there is written anew.
    """
    if path.is_dir() and not any(path.iterdir()):
        yield path
        return
    with new_folder(path) as partial:
        yield partial
        if kept := {one.name for one in path.glob("*")} - {one.name for one in partial.glob("*")}:
            raise FileExistsError(f"folder: {path} holds other things ({min(kept)}); name a new one")


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to a name that may be taken; what stood there goes only once it can be replaced."""
    retired = target.with_name(f".{target.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if target.exists():
        target.rename(retired)
    source.chmod(0o755)
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        replace_folder(source, target)  # another process was first, or brought the old one back
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def locked(run_dir: Path, wait: float = 0) -> Iterator[None]:
    """Keep other processes out of a run folder; one may still need it for some seconds."""
    _make_folder(run_dir)
    try:
        held = filelock.FileLock(run_dir / ".lock").acquire(timeout=wait)
    except filelock.Timeout:
        raise RunDirectoryBusyError(
            f"{run_dir} is in use by another process; wait for it, or choose another --run-dir"
        ) from None
    with held:
        yield


# --- keys -------------------------------------------------------------------------------------------


def content_key(**parts: Any) -> str:
    """Return a short hash of named, JSON-serializable parts; their order does not matter."""
    canonical = json.dumps(parts, sort_keys=True, default=_as_json)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _as_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return value.tolist()
    raise TypeError(f"cannot make a key of {type(value).__name__}: {value!r}")


def file_hash(path: Path) -> str:
    """Return the hash of all that a file holds: 128 bits of XXH3, ten times as quick as SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


_hash: ContextVar[Callable[[Path], str] | None] = ContextVar("_hash", default=None)


@contextmanager
def read_once() -> Iterator[None]:
    """Let `content_of` read every file at most once in a block: a model of gigabytes is in many keys."""
    token = _hash.set(_hash.get() or cache(file_hash))
    try:
        yield
    finally:
        _hash.reset(token)


def content_of(name: str | Path) -> str | dict[str, str]:
    """Return what a key covers of a file or folder: the hash of every file, by its path in the folder.

    What is neither is a name, and returned as it is.
    """
    path, hashed = Path(name), _hash.get() or file_hash
    if path.is_file():
        return hashed(path.resolve())
    return _files(path, hashed) if name and path.is_dir() else str(name)


def _files(folder: Path, hashed: Callable[[Path], str]) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashed(path.resolve()) for path in paths}


def is_hub_name(name: str) -> bool:
    """Whether this is a name on the Hugging Face hub, with `@split` if any, rather than a file's."""
    return bool(_HUB_NAME.fullmatch(name)) and not _FILE_NAME.fullmatch(name)


def source_hashes(*modules: str) -> dict[str, str]:
    """Hash the code of modules of the library, and of what they import from rooms that compute results.

    Comments, layout and docstrings do not count; neither does what the rooms of `UNKEYED` hold.
    """
    hashes: dict[str, str] = {}
    waiting = list(modules)
    for name in waiting:  # grows
        if name not in hashes and (path := _module_path(name)):
            hashes[name], imported = _code_of(path, path.read_text(encoding="utf-8"))
            waiting += [other for other in imported if other.split(".")[1] not in UNKEYED]
    return hashes


@lru_cache(maxsize=1024)
def _code_of(path: Path, text: str) -> tuple[str, list[str]]:
    """Return the hash of a module's code and the names of what it imports from the library."""
    tree = ast.parse(text)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: the library imports by full names only")
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            node.body = node.body[documented:] or [ast.Pass()]
    imported = [name for name in names if name.startswith(f"{PACKAGE.name}.")]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), imported


def _module_path(name: str) -> Path | None:
    package, *inner = name.split(".")
    path = PACKAGE.joinpath(*inner)
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((one for one in files if package == PACKAGE.name and one.is_file()), None)


@cache
def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute numbers."""
    return {name: importlib.metadata.version(name) for name in _NUMERICAL.split()}


# --- records ----------------------------------------------------------------------------------------


def write_record(folder: Path, content: Config, name: str = RECORD) -> None:
    """Write the record of a finished folder: what is given, a checksum of every file, and its own."""
    write_atomically(folder / name, sealed(dict(content) | {"files": _files(folder, file_hash)}))


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any]:
    """Return the record of a folder; raise `DamagedError` if a file of it is not as it was written."""
    record = unsealed(folder / name)
    for file, digest in record["files"].items():
        if not (folder / file).is_file():
            raise DamagedError(f"{folder / file} is missing")
        if file_hash(folder / file) != digest:
            raise DamagedError(f"{folder / file} is damaged: it does not fit its checksum in {name}")
    return record


def sealed(record: Mapping[str, Any]) -> str:
    """Return a record, which is not empty, as JSON that ends with its own checksum."""
    body = json.dumps(record, indent=1, default=_as_json).removesuffix("\n}")
    return body + _seal(body.encode()).decode()


def unsealed(path: Path) -> dict[str, Any]:
    """Return what `sealed` has made a file of; raise `DamagedError` if it is not as it was written."""
    if not path.is_file():
        raise DamagedError(f"{path} is missing")
    content, length = path.read_bytes(), len(_seal(b""))
    if content[-length:] != _seal(content[:-length]):
        raise DamagedError(f"{path} is damaged: it does not fit the checksum at its end")
    return dict(json.loads(content))


def _seal(body: bytes) -> bytes:
    return b',\n "sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()


# --- the store --------------------------------------------------------------------------------------


class RunStore:
    """What was computed once, each result in a folder under `root` named by its key.

    The key covers the config, the inputs, the code that computes the result (see `source_hashes`), and the
    versions of the numerical packages. An input of this store counts by its name, which carries the key of
    what made it, any other by what its files hold. In its methods `name` is for people, `config` are
    arguments that are JSON-serializable, `inputs` arguments that are folders, of this store or elsewhere,
    and `code` modules whose code decides the result, by default that of the function.
    """

    def __init__(self, root: Path, *, reads_only: bool = False) -> None:
        """Open a store; one that reads only raises `NotKeptError` where something would be computed."""
        self.root, self.reads_only = root, reads_only

    def table(
        self, name: str, compute: Callable[..., pd.DataFrame], config: Config, code: Sequence[str] = ()
    ) -> pd.DataFrame:
        """Return the tidy table compute(**config), from the store if it was computed before."""

        def write(folder: Path, **arguments: Any) -> None:
            compute(**arguments).to_parquet(folder / "table.parquet")

        folder = self.place(name, compute, config, code=code)
        return pd.read_parquet(self._filled(folder, write, config) / "table.parquet")

    def folder(
        self, name: str, write: Writer, config: Config, inputs: Inputs = None, code: Sequence[str] = ()
    ) -> Path:
        """Return a folder that write(folder, **config, **inputs) has filled, now or before."""
        return self._filled(self.place(name, write, config, inputs, code), write, config, inputs)

    def resumable(
        self, name: str, write: Writer, config: Config, inputs: Inputs = None, code: Sequence[str] = ()
    ) -> Path:
        """Return a folder that write(folder, scratch, **config) has filled, now or before.

        What the function keeps in `scratch` survives when it is killed, and is there when it is called
        again; it goes when the folder is complete. One process at a time works on a folder: another waits
        for a while, then raises `RunDirectoryBusyError`.
        """
        folder = self.place(name, write, config, inputs, code)
        scratch = self.root / f"{folder.name}.scratch"
        if self._lacks(folder):
            with locked(scratch, WAIT):
                for path in scratch.glob(".*"):  # ours, of a process that was killed
                    if path.name != ".lock":
                        _remove(path)
                self._filled(folder, partial(write, scratch=scratch), config)
        if not self.reads_only:
            shutil.rmtree(scratch, ignore_errors=True)
        return folder

    def place(
        self, name: str, function: Writer, config: Config, inputs: Inputs = None, code: Sequence[str] = ()
    ) -> Path:
        """Return the folder of a result, whether it is there or not."""
        ours, found = self.root.resolve(), (inputs or {}).items()
        key = content_key(
            function=f"{function.__module__}.{function.__qualname__}",
            config=config,
            inputs={k: path.name if path.parent.resolve() == ours else content_of(path) for k, path in found},
            source=source_hashes(*(code or (function.__module__,))),
            packages=package_versions(),
        )
        return self.root / f"{name}-{key}"

    def record(self, folder: Path) -> dict[str, Any]:
        """Return what is known about a folder's making: config, seconds, bytes, and its files' hashes."""
        return unsealed(folder / RECORD)

    def _filled(self, folder: Path, write: Writer, config: Config, inputs: Inputs = None) -> Path:
        if self._lacks(folder):
            remove_unfinished(self.root)
            started = time.perf_counter()
            with new_folder(folder) as unfinished:
                write(unfinished, **config, **(inputs or {}))
                seconds = round(time.perf_counter() - started, 3)
                size = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
                write_record(unfinished, {"config": config, "seconds": seconds, "bytes": size})
        return folder

    def _lacks(self, folder: Path) -> bool:
        """Whether a result is to be computed; one that is damaged is set aside, and said to be."""
        if folder.exists():
            try:
                read_record(folder)
                return False
            except DamagedError as error:
                text = f"{error}; the folder is set aside as {_set_aside(folder)} and counts as not computed"
                warnings.warn(text, DamagedResultWarning, stacklevel=4)
        if self.reads_only:
            raise NotKeptError(f"{folder} was not computed yet")
        return True


def _set_aside(folder: Path) -> Path:
    """Rename a damaged folder; it stays until somebody deletes it."""
    names = (folder.with_name(f"{folder.name}.damaged-{k}") for k in count(1))
    aside = next(one for one in names if not one.exists())
    with suppress(OSError):  # another process was first, or nothing can be written here
        folder.rename(aside)
    return aside


# --- checkpoints ------------------------------------------------------------------------------------


class Checkpoints:
    """The newest states of long work, in one folder, each named by its step and its hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: Mapping[str, "Tensor"]) -> Path:
        """Write the state after a step, then drop all but the newest; where that fails, none is dropped."""
        from safetensors.torch import save_file

        with unfinished(self.folder / "step") as temporary:
            save_file({name: one.cpu().contiguous() for name, one in state.items()}, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            path = self.folder / f"step-{step:07d}-{file_hash(temporary)[:16]}.safetensors"
            temporary.replace(path)
        for _, _, old in self._found()[KEPT:]:
            old.unlink()
        return path

    def newest(self) -> "dict[str, Tensor] | None":
        """Return the newest state that is whole, None if there is none; warn about others."""
        from safetensors.torch import load_file

        for _, name, path in self._found():
            if file_hash(path)[:16] == name:
                return load_file(path)
            text = f"{path} is damaged: it does not fit its checksum; going back to the checkpoint before it"
            warnings.warn(text, CorruptCheckpointWarning, stacklevel=2)
            path.unlink()
        return None

    def _found(self) -> list[tuple[int, str, Path]]:
        """Return step, hash and path of the checkpoints, the newest first."""
        named = [(_CHECKPOINT.fullmatch(path.name), path) for path in self.folder.glob("step-*")]
        return sorted(((int(found[1]), found[2], path) for found, path in named if found), reverse=True)
