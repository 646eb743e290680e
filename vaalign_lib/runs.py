"""The run store: what was computed is kept under a key of what determines it, and never computed twice.

Nothing is written in place: a file or folder appears under its name only when it is complete.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

PACKAGE = Path(__file__).resolve().parent
WAIT = 30.0  # seconds in which the worker of a killed process notices that it is alone, and ends
_NUMERICAL_PACKAGES = (
    "numpy",
    "scipy",
    "pandas",
    "statsmodels",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
)


class RunDirectoryBusyError(RuntimeError):
    """Another process works in the run folder."""


class PlanError(RuntimeError):
    """Something is missing that would otherwise be noticed after hours."""


class NotKeptError(LookupError):
    """A store that only reads was asked for what it has not."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that readers see the old content or the new, also after a crash."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
        replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_folder(source: Path, target: Path) -> None:
    """Move a folder to a name that may be taken; what stood there goes only once it can be replaced."""
    retired = target.with_name(f".{target.name}.retired")
    shutil.rmtree(retired, ignore_errors=True)
    if target.exists():
        target.rename(retired)
    source.chmod(0o755)
    source.rename(target)
    shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def locked(run_dir: Path, wait: float = 0) -> Iterator[None]:
    """Keep other processes out of a run folder.

    Args:
        run_dir: the folder.
        wait: seconds that another process may still need it.

    Raises:
        RunDirectoryBusyError: another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        raise RunDirectoryBusyError(
            f"{run_dir} is in use by another process; wait for it, or choose another --run-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


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
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source_hashes(module: str) -> dict[str, str]:
    """Hash the code of a module of the library and of all the library's modules that it imports.

    Comments, layout and docstrings do not count.
    """
    hashes: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _module_path(name)
        if name in hashes or path is None:
            continue
        hashes[name], imported = _code_of(path, path.stat().st_mtime_ns)
        waiting += imported
    return hashes


@lru_cache(maxsize=1024)
def _code_of(path: Path, _changed: int) -> tuple[str, list[str]]:
    """Return the hash of a module's code and the names of what it imports from the library."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = _imported(tree, path)
    return hashlib.sha256(ast.unparse(_without_docstrings(tree)).encode()).hexdigest(), imported


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _module_path(name: str) -> Path | None:
    inner = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (inner.with_suffix(".py"), inner / "__init__.py"):
        if name.split(".")[0] == PACKAGE.name and path.is_file():
            return path
    return None


def _imported(tree: ast.Module, path: Path) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"{path}:{node.lineno}: the library imports by full names only")
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [
                node.module,
                *(f"{node.module}.{alias.name}" for alias in node.names),
            ]
    return [name for name in names if name.split(".")[0] == PACKAGE.name]


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute numbers."""
    return {name: importlib.metadata.version(name) for name in _NUMERICAL_PACKAGES}


# --- the store --------------------------------------------------------------------------------------


class RunStore:
    """What was computed once, each result in a folder under `root` named by its key.

    The key covers the config, the names of the inputs (which carry the keys of what made them), the
    source of the function's module with all that it imports from the library, and the versions of the
    numerical packages.
    """

    def __init__(self, root: Path, *, reads_only: bool = False) -> None:
        """Open a store.

        Args:
            root: its folder, there or not.
            reads_only: raise `NotKeptError` where something would have to be computed.
        """
        self.root, self.reads_only = root, reads_only

    def _lacks(self, folder: Path) -> bool:
        lacks = not (folder / "run.json").is_file()
        if lacks and self.reads_only:
            raise NotKeptError(f"{folder} was not computed yet")
        return lacks

    def table(
        self,
        name: str,
        compute: Callable[..., pd.DataFrame],
        config: Mapping[str, Any],
        inputs: Mapping[str, Path] | None = None,
    ) -> pd.DataFrame:
        """Return compute(**config, **inputs), from the store if it was computed before.

        Args:
            name: of the folder, for people.
            compute: a function of the library that returns a tidy table; random only through its config.
            config: arguments, JSON-serializable.
            inputs: arguments that are folders of this store.
        """

        def write(folder: Path, **arguments: Any) -> None:
            compute(**arguments).to_parquet(folder / "table.parquet")

        return pd.read_parquet(self._kept(name, compute, write, config, inputs) / "table.parquet")

    def folder(
        self,
        name: str,
        write: Callable[..., None],
        config: Mapping[str, Any],
        inputs: Mapping[str, Path] | None = None,
    ) -> Path:
        """Return a folder that write(folder, **config, **inputs) has filled, now or before."""
        return self._kept(name, write, write, config, inputs)

    def resumable(
        self,
        name: str,
        write: Callable[..., None],
        config: Mapping[str, Any],
    ) -> Path:
        """Return a folder that write(folder, scratch, **config) has filled, now or before.

        What the function keeps in `scratch` survives when it is killed, and is there when it is called
        again; it goes when the folder is complete. One process at a time works on a folder.

        Raises:
            RunDirectoryBusyError: another process is at it, and stays at it for a while.
        """
        folder = self.place(name, write, config)
        if self._lacks(folder):
            scratch = self.root / f"{folder.name}.scratch"
            with locked(scratch, WAIT):
                if self._lacks(folder):
                    self._fill(folder, partial(write, scratch=scratch), config, None)
            shutil.rmtree(scratch, ignore_errors=True)
        return folder

    def place(
        self,
        name: str,
        function: Callable[..., Any],
        config: Mapping[str, Any],
        inputs: Mapping[str, Path] | None = None,
    ) -> Path:
        """Return the folder of a result, whether it is there or not."""
        key = content_key(
            function=f"{function.__module__}.{function.__qualname__}",
            config=config,
            inputs={argument: path.name for argument, path in (inputs or {}).items()},
            source=source_hashes(function.__module__),
            packages=package_versions(),
        )
        return self.root / f"{name}-{key}"

    def _kept(
        self,
        name: str,
        function: Callable[..., Any],
        write: Callable[..., None],
        config: Mapping[str, Any],
        inputs: Mapping[str, Path] | None,
    ) -> Path:
        folder = self.place(name, function, config, inputs)
        if self._lacks(folder):
            self._fill(folder, write, config, inputs)
        return folder

    def _fill(
        self,
        folder: Path,
        write: Callable[..., None],
        config: Mapping[str, Any],
        inputs: Mapping[str, Path] | None,
    ) -> None:
        started = time.perf_counter()
        with new_folder(folder) as unfinished:
            write(unfinished, **config, **(inputs or {}))
            seconds = round(time.perf_counter() - started, 3)
            record = {"config": config, "seconds": seconds, "bytes": _size(unfinished)}
            (unfinished / "run.json").write_text(json.dumps(record, indent=1, default=_as_json))

    def record(self, folder: Path) -> dict[str, Any]:
        """Return what is known about a folder's making: config, seconds, bytes."""
        content: dict[str, Any] = json.loads((folder / "run.json").read_text())
        return content


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
