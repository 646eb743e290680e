"""Executing one notebook headless, in this very interpreter, to a copy with outputs and a page."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import nbformat
import papermill
from jupyter_client.kernelspec import NATIVE_KERNEL_NAME, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from tqdm import tqdm
from traitlets import default

from vaalign_lib.html_pages import write_page
from vaalign_lib.progress import HEADLESS
from vaalign_lib.reproduce import EXECUTED, PAGE


def execute(
    notebook: Path,
    folder: Path,
    parameters: dict[str, Any],
    run_dir: Path,
    label: str,
) -> str | None:
    """Execute a notebook with papermill into a folder; return the error in a few lines, if any."""
    target = folder / EXECUTED
    paths = {"run_dir": str(run_dir), "figures_dir": str(folder / "figures")}
    error = None
    with _headless(), _InnerBars(sys.stderr) as bars, TemporaryDirectory() as nobody:
        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(target),
                parameters=parameters | paths,
                kernel_name=NATIVE_KERNEL_NAME,
                kernel_manager_class=_ThisInterpreter,
                cwd=notebook.parent,
                progress_bar={
                    "desc": label,
                    "file": sys.stderr,
                    "leave": False,
                    "position": 0,
                },
                stderr_file=bars,
                log_output=False,
                coalesce_streams=True,
                extra_arguments=[
                    "--IPKernelApp.log_level=40",
                    f"--IPKernelApp.ipython_dir={nobody}",  # not the user's, with their startup files
                ],
            )
        except papermill.PapermillExecutionError as failure:
            error = f"cell {failure.exec_count}: {failure.ename}: {_shortened(failure.evalue)}"
        except Exception as failure:  # the kernel died or never started; the other notebooks go on
            error = f"{type(failure).__name__}: {_shortened(str(failure))}"
    try:
        executed = nbformat.read(target if target.is_file() else notebook, as_version=4)
        _without_bars(executed.cells)
        nbformat.write(executed, target)
        write_page(executed, folder / PAGE, title=notebook.stem)
    except Exception as failure:
        error = error or f"page: {type(failure).__name__}: {_shortened(str(failure))}"
    return error


class _ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter that runs, whatever kernels are installed under its name; what the process
    says when it is ended is for nobody: messages of cells come otherwise.
    """

    @default("kernel_spec_manager")
    def _native_only(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])

    async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
        await super()._async_launch_kernel(kernel_cmd, **options, stderr=subprocess.DEVNULL)


def _literal(path: Path) -> str:
    """Return a path as papermill takes it, which fills in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _shortened(text: str, lines: int = 5) -> str:
    return "\n    ".join(text.strip().splitlines()[:lines])


@contextmanager
def _headless() -> Iterator[None]:
    before = os.environ.get(HEADLESS)
    os.environ[HEADLESS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[HEADLESS]
        else:
            os.environ[HEADLESS] = before


class _InnerBars:
    """A file that shows the progress bars which a notebook writes to its stderr, below its own line."""

    def __init__(self, terminal: TextIO) -> None:
        self._bar = tqdm(
            total=0,
            position=1,
            bar_format="    {desc}",
            leave=False,
            file=terminal,
            disable=None,
        )

    def __enter__(self) -> "_InnerBars":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def write(self, text: str) -> None:
        shown = [part.strip() for part in re.split(r"[\r\n]", text) if part.strip()]
        if shown:
            self._bar.set_description_str(shown[-1][:110])

    def flush(self) -> None:
        self._bar.refresh()


def _without_bars(cells: list[Any]) -> None:
    """Drop what was overwritten on the terminal, that is, everything up to the last carriage return."""
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                output.text = re.sub(r"[^\n]*\r", "", output.text).strip()
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if out.get("text") != ""]
