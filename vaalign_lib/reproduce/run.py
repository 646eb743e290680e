"""Running the notebooks in order, each once per set of inputs, with nothing half-written."""

import importlib.metadata
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vaalign_lib.jobs import check_workers
from vaalign_lib.profiles import PUBLISHED_PROFILE, Profile, load_profile, local_files
from vaalign_lib.reproduce import execute
from vaalign_lib.reproduce.execute import EXECUTED, FINDINGS
from vaalign_lib.reproduce.pages import markdown_page
from vaalign_lib.reproduce.run_folder import RECORD, UsageError, finished_record, make_way, opened, remove
from vaalign_lib.store import (
    DATA,
    FIGURES,
    NOTEBOOKS,
    PACKAGE,
    RESULTS,
    ROOT,
    RUNS,
    content_key,
    content_of,
    file_hash,
    new_folder,
    package_versions,
    replace_folder,
    write_atomically,
    write_record,
)

PAGES = ROOT / "pages"
PEOPLE = "10_people"  # the notebook of profiles that name what people have rated
FROM_RESULTS = "from_results"  # of notebooks that can be drawn from published results; True in JupyterLab
COMMON_PARAMETERS = ("profile", "seed", "run_dir", "figures_dir", "workers", FROM_RESULTS)


@dataclass(frozen=True)
class Notebook:
    """A notebook of the study."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def content(self) -> dict[str, Any]:
        """The notebook's JSON."""
        return dict(json.loads(self.path.read_text(encoding="utf-8")))

    @property
    def parameters(self) -> list[str]:
        """The names in the notebook's cell of parameters."""
        tagged = (one for one in self.content["cells"] if "parameters" in one["metadata"].get("tags", []))
        return re.findall(r"^(\w+) = ", "".join(next(tagged)["source"]), flags=re.MULTILINE)

    @property
    def reads_results(self) -> bool:
        """Whether it shows results that were published by other profiles, or can be drawn from them."""
        return FROM_RESULTS in self.parameters


@dataclass(frozen=True)
class NotebookOutcome:
    """How the run of a notebook ended: done, kept, taken, failed or skipped."""

    notebook: str
    state: str
    seconds: float = 0.0
    message: str = ""

    def __str__(self) -> str:
        return {
            "done": f"done in {self.seconds:.0f} s",
            "taken": "its published figures, tables and findings",
            "kept": f"already done (took {self.seconds:.0f} s), kept",
            "failed": f"FAILED after {self.seconds:.0f} s: {self.message}",
            "skipped": f"skipped: {self.message}",
        }[self.state]


def notebooks() -> list[Notebook]:
    """Return the notebooks of the study in reading order."""
    return [Notebook(path) for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]


def select(only: str | None, profile: Profile | None = None) -> list[Notebook]:
    """Return the notebooks that a list such as "01,02" or "01_bandit" names; all if it is None.

    With people in place of judges the profile has a part in one notebook alone.

    Raises:
        UsageError: a name fits none.
    """
    everything = notebooks()
    if profile is not None and profile.raters is not None:
        everything = [book for book in everything if book.name == PEOPLE]
    if only is None:
        return everything
    wanted = {part.strip() for part in only.split(",")}
    if unknown := wanted - {name for book in everything for name in (book.name[:2], book.name)}:
        names = ", ".join(book.name for book in everything)
        raise UsageError(f"--only: no notebook {min(unknown)!r}; there are {names}")
    return [book for book in everything if wanted & {book.name[:2], book.name}]


# --- keys ---------------------------------------------------------------------------------------------


def notebook_key(
    notebook: Notebook, profile: Profile, seed: int, settings: Mapping[str, str] | None = None
) -> str:
    """Return the key of a notebook's run: of its cells, the library, inputs, profile, seed and packages."""
    inputs = [path for path in sorted(DATA.rglob("*")) if path.is_file() and RESULTS not in path.parents]
    published = sorted((RESULTS / "runs").glob("*/*.parquet")) if notebook.reads_results else []
    others = [path for path in published if path.parent.name != profile.name]
    library = sorted(PACKAGE.rglob("*.py"))
    return content_key(
        cells=[(cell["cell_type"], "".join(cell["source"])) for cell in notebook.content["cells"]],
        files={str(path.relative_to(ROOT)): file_hash(path) for path in library + inputs},
        results={f"{path.parent.name}/{path.name}": file_hash(path) for path in others},
        profile=profile.model_dump(),
        models_and_data=local_files(profile),
        seed=seed,
        settings={name: content_of(value) for name, value in (settings or {}).items()},
        packages=package_versions() | {"matplotlib": importlib.metadata.version("matplotlib")},
    )


@dataclass(frozen=True)
class State:
    """What a run folder has of a notebook.

    Attributes:
        record: of its last run that ended well, if its files are as they were.
        current: whether it would have the same inputs now, with the settings it had then.
    """

    notebook: Notebook
    record: Mapping[str, Any] | None
    current: bool

    @property
    def settings(self) -> Mapping[str, str]:
        """Its own parameters, if it ran."""
        return (self.record or {}).get("settings", {})


def states(profile: Profile, run_dir: Path, seed: int = 0) -> list[State]:
    """Return what a run folder has of every notebook; each record is read, with its files, once."""
    found = []
    for notebook in notebooks():
        record = finished_record(run_dir / notebook.name)
        key = record and notebook_key(notebook, profile, seed, record.get("settings"))
        found.append(State(notebook, record, record is not None and record["key"] == key))
    return found


def status(profile: Profile, run_dir: Path, seed: int = 0) -> list[tuple[str, str, str]]:
    """Return a row for every notebook: name, state, and when it finished or why not."""
    rows = []
    for one in states(profile, run_dir, seed):
        name, failed = one.notebook.name, run_dir / f"{one.notebook.name}.failed"
        if failed.is_dir():
            rows.append((name, "failed", f"see {failed / EXECUTED}"))
        elif one.record is None:
            rows.append((name, "missing", ""))
        else:
            note = f"{one.record['seconds']:.0f} s, {one.record['finished']}"
            rows.append((name, "done" if one.current else "outdated", note))
    return rows


def is_shipped(profile: Profile) -> bool:
    """Whether a profile is, in name and sizes, the one whose results are published."""
    return profile.name == PUBLISHED_PROFILE and profile == load_profile(PUBLISHED_PROFILE)


def is_published(profile: Profile, run_dir: Path, seed: int) -> bool:
    """Whether a run's figures and tables may be committed: the shipped profile's, in its own folder."""
    return is_shipped(profile) and seed == 0 and run_dir == (RUNS / PUBLISHED_PROFILE).resolve()


def banner(profile: Profile) -> str:
    """Return what a report and pages open with whose numbers are not the study's, else nothing."""
    if is_shipped(profile):
        return ""
    return (
        f"Profile {profile.name}: {profile.description}. The numbers here are not the study's, which are "
        f"those of profile {PUBLISHED_PROFILE} as it is shipped."
    )


# --- running ------------------------------------------------------------------------------------------


def reproduce(
    profile: Profile,
    *,
    profile_source: str,
    only: str | None = None,
    workers: int | str = 0,
    run_dir: Path,
    seed: int = 0,
    force: bool = False,
    settings: Mapping[str, str] | None = None,
    from_results: bool = False,
) -> list[NotebookOutcome]:
    """Execute the selected notebooks, with further parameters `settings`, into a run folder alone.

    `profile_source` is the name or path that the notebooks get, `only` their numbers or names, `workers`
    processes (0: one per core) or the address of a dask scheduler. With `force` also what ran before runs.
    With `from_results` nothing is trained: notebooks that can are drawn from the published rows of all
    policies, of the others the published figures, tables and findings are taken.

    Raises:
        RunDirectoryBusyError: another process works in the run folder.
        UsageError: the run folder holds other things, or there is no such notebook or parameter.
        ValueError: `workers` is neither a number nor an address.
    """
    chosen, run_dir, settings = select(only, profile), run_dir.resolve(), dict(settings or {})
    check_workers(workers, least=0)
    for notebook in chosen:
        free = [name for name in notebook.parameters if name not in COMMON_PARAMETERS]
        for name in settings:
            if name not in free:
                has = ", ".join(free) or "none beside those with options of their own"
                raise UsageError(f"--set: {notebook.name} has no parameter {name!r}; it has {has}")
    outcomes: list[NotebookOutcome] = []
    own = settings | ({FROM_RESULTS: "True"} if from_results else {})  # what decides the result
    with opened(run_dir):
        for position, notebook in enumerate(chosen, start=1):
            label = f"[{position}/{len(chosen)}] {notebook.name}"
            key, record = notebook_key(notebook, profile, seed, own), finished_record(run_dir / notebook.name)
            if from_results and not notebook.reads_results:
                outcome = _take(notebook, key, run_dir, own)
            elif record is not None and record["key"] == key and not (force or from_results):
                outcome = NotebookOutcome(notebook.name, "kept", record["seconds"])
            else:
                parameters = {"profile": profile_source, "seed": seed, "workers": workers, **settings}
                if notebook.reads_results:
                    parameters[FROM_RESULTS] = from_results
                outcome = _run(notebook, parameters, run_dir, label, banner(profile), key, own)
            outcomes.append(outcome)
            tqdm.write(f"{label}: {outcome}", file=sys.stderr)
    return outcomes


def _run(
    notebook: Notebook,
    parameters: dict[str, Any],
    run_dir: Path,
    label: str,
    banner: str,
    key: str,
    settings: Mapping[str, str],
) -> NotebookOutcome:
    folder, failed = run_dir / notebook.name, run_dir / f"{notebook.name}.failed"
    partial = run_dir / f".{notebook.name}.partial"
    started = time.perf_counter()
    try:
        partial.mkdir(parents=True)
        error = execute.execute(notebook.path, partial, parameters, run_dir, label, banner)
        seconds = time.perf_counter() - started
        _record(partial, key, seconds, settings)
        place = folder if error is None else failed
        make_way(place)
        replace_folder(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if error is None:
        remove(failed)
        return NotebookOutcome(notebook.name, "done", seconds)
    message = f"{error}\n    executed copy: {failed / EXECUTED}"
    return NotebookOutcome(notebook.name, "failed", seconds, message)


def _record(folder: Path, key: str, seconds: float, settings: Mapping[str, str]) -> None:
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"key": key, "settings": dict(settings), "finished": finished, "seconds": round(seconds, 1)}
    write_record(folder, record, RECORD)


def _take(notebook: Notebook, key: str, run_dir: Path, settings: Mapping[str, str]) -> NotebookOutcome:
    """Put what was published of a notebook into the run folder."""
    published = RESULTS / "findings" / f"{notebook.name}.json"
    if not published.is_file():
        return NotebookOutcome(notebook.name, "skipped", message=f"nothing is published at {published}")
    record = json.loads(published.read_text(encoding="utf-8"))
    kinds = (("figures", FIGURES, (".png", ".pdf")), ("tables", RESULTS, (".parquet", ".md")))
    files = {
        Path(kind, entry["name"] + ending): source / (entry["name"] + ending)
        for kind, source, endings in kinds
        for entry in record[kind]
        for ending in endings
    }
    if lost := [str(path) for path in files.values() if not path.is_file()]:
        return NotebookOutcome(notebook.name, "skipped", message=f"published, but missing: {lost[0]}")
    make_way(run_dir / notebook.name)
    with new_folder(run_dir / notebook.name) as partial:
        for name, path in files.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, partial / name)
        write_atomically(partial / FINDINGS, json.dumps(record | {"taken": True}, indent=1) + "\n")
        _record(partial, key, 0, settings)
    return NotebookOutcome(notebook.name, "taken")


def publish(
    folder: Path, figures: Path = FIGURES, results: Path = RESULTS, pages: Path = PAGES
) -> list[Path]:
    """Copy what a finished notebook made to where it is committed, with its page; return what changed."""
    contents = {
        target / path.name: path.read_bytes()
        for source, target in (("figures", figures), ("tables", results))
        for path in sorted((folder / source).glob("*"))
    }
    if (folder / FINDINGS).is_file():
        contents[results / "findings" / f"{folder.name}.json"] = (folder / FINDINGS).read_bytes()
    if (folder / EXECUTED).is_file():
        contents[pages / f"{folder.name}.md"] = markdown_page(folder).encode()
    changed = {
        target: content
        for target, content in contents.items()
        if not target.is_file() or target.read_bytes() != content
    }
    for target, content in changed.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content)
    return list(changed)
