"""Long jobs: in processes of this machine or on a dask.distributed cluster, under one progress bar.

Torch is imported where it is needed: it takes seconds, in which a worker is to have its watch.
"""

import ctypes
import multiprocessing
import os
import queue
import re
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tqdm.auto
import tqdm.std

from vaalign_lib.store import (
    PACKAGE,
    FinalError,
    PlanError,
    content_key,
    file_hash,
    package_versions,
    remove_unfinished,
    unfinished,
)

if TYPE_CHECKING:
    import torch

ENVIRONMENT = {  # of processes
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait do not keep others from a core
    # Freed memory is kept: else glibc gives it back and asks for it anew, a tenth of a stack of 80's time.
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}
HEADLESS = "VAALIGN_HEADLESS"  # set by `vaalign reproduce`: nobody can see a widget or move a slider
ADDRESS = re.compile(r"((tcp|tls|ucx|wss?)://)?[^\s/]+:\d{1,5}")  # of a dask scheduler
RETRIES = 3  # of a job that failed, for a worker may have lost its GPU or its disk
CONNECT_SECONDS = 5  # until a scheduler must have answered
LOOK_SECONDS = 5  # between looks whether the scheduler has workers
WATCH_SECONDS = 1.0  # between a worker's looks whether its job is still wanted

Executor = tuple[Callable[..., Any], Callable[..., Iterable[Any]], Any]  # submit, as completed, reports
T = TypeVar("T")
Name = TypeVar("Name")
Result = TypeVar("Result")


# --- bars -------------------------------------------------------------------------------------------


def headless() -> bool:
    """Whether `vaalign reproduce` runs the notebook."""
    return bool(os.environ.get(HEADLESS))


def bar(total: int | None, description: str, done: int = 0, items: Iterable[Any] | None = None) -> Any:
    """Return a bar that vanishes at the end, also for work that is not an iteration over items."""
    kind = tqdm.std.tqdm if headless() else tqdm.auto.tqdm
    return kind(items, total=total, desc=description, initial=done, leave=False)


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over items with a bar that vanishes at the end."""
    yield from bar(total, description, items=items)


def silence_libraries() -> None:
    """Switch off the libraries' own bars, their advice and the news of what they are going to rename."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


# --- what a worker knows of itself ------------------------------------------------------------------


@dataclass
class Worker:
    """The place of this process among others."""

    report: Callable[[int], None] | None = None  # tells who waits for it how far it is
    together: int = 1  # workers that share this machine, itself included
    memory: int | None = None  # bytes that it may take, if anybody says


WORKER = Worker()


def report(steps: int) -> None:
    """Tell the process that waits for this one of steps taken or, if negative, to come besides."""
    if WORKER.report is not None:
        WORKER.report(steps)


def device() -> "torch.device":
    """Return the device of this process: workers share out the GPUs."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    identity = multiprocessing.current_process()._identity or (1,)  # (1,), (2,), ... as they were started
    return torch.device("cuda", (identity[-1] - 1) % torch.cuda.device_count())


# --- running jobs -----------------------------------------------------------------------------------


def default_workers() -> int:
    """Return how many jobs this machine takes at a time: its GPUs if it has any, else its cores."""
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1


def check_workers(workers: object, least: int = 1) -> None:
    """Refuse what is neither a number of processes, at least `least`, nor the address of a dask scheduler."""
    whole = type(workers) is int and workers >= least
    if not whole and not (isinstance(workers, str) and ADDRESS.fullmatch(workers)):
        raise ValueError(
            f"workers: expected a whole number of at least {least}, or the address of a dask scheduler "
            f"such as tcp://host:8786, got {workers!r}"
        )


def run_jobs(
    jobs: Mapping[Name, Callable[[], Result]], workers: int | str, steps: int, description: str, shared: Path
) -> dict[Name, Result]:
    """Run picklable jobs, in their order, under a bar of `steps`, which they are to `report`.

    They run in processes of this machine, so many, or on the cluster of the scheduler at an address, whose
    workers all see the folder `shared`. What the first failing job raises is raised, the others given up.
    """
    check_workers(workers)
    if not jobs:
        return {}
    place = _cluster(workers, shared) if isinstance(workers, str) else _processes(workers, len(jobs))
    with place as (submit, completed, reports), _shown(reports, steps, description):
        futures = {submit(job): name for name, job in jobs.items()}
        done: dict[Name, Any] = {}
        for one in completed(futures):
            done[futures[one]] = found = one.result()
            if isinstance(found, FinalError):  # returned, for what is raised is tried again
                raise found
    return {name: done[name] for name in jobs}


@contextmanager
def _shown(reports: Any, steps: int, description: str) -> Iterator[None]:
    """Show a bar of what arrives in a queue."""
    over = threading.Event()

    def follow() -> None:
        with bar(steps, description) as shown:
            while not over.is_set():
                with suppress(queue.Empty):
                    taken = reports.get(timeout=0.5)
                    shown.total += max(-taken, 0)
                    shown.update(max(taken, 0))
                    shown.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)


# --- processes of this machine ----------------------------------------------------------------------


@contextmanager
def _processes(workers: int, jobs: int) -> Iterator[Executor]:
    reports = get_context("spawn").Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = start_processes(min(workers, jobs), workers, threads, reports)
    try:
        yield pool.submit, as_completed, reports
    except BaseException:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()  # at once: what they have is in their checkpoints
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_processes(count: int, together: int, threads: int = 1, reports: Any = None) -> ProcessPoolExecutor:
    """Return processes that end when this one does; `together` share this machine, these included."""
    for name, value in ENVIRONMENT.items():  # theirs, for they inherit it; here torch has read its own
        os.environ.setdefault(name, value)
    given = (reports, os.getpid(), together, threads)
    return ProcessPoolExecutor(count, get_context("spawn"), _begin, given)


def _begin(reports: Any, parent: int, together: int, threads: int) -> None:
    """Set up a worker: its share of the cores, silence, and an end when nobody waits for it any more."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    WORKER.together, WORKER.report = together, reports and reports.put
    torch.set_num_threads(threads)
    silence_libraries()
    sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # also for models that ask for "cuda" without a number


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# --- a cluster --------------------------------------------------------------------------------------


class ClusterError(PlanError):
    """The cluster cannot be used as it is."""


class NoWorkersWarning(UserWarning):
    """The jobs wait, for nobody takes them."""


class _NobodyWaits(BaseException):
    """Ends a job whose client is gone; no library's `except Exception` is to keep it."""


@contextmanager
def _cluster(address: str, shared: Path) -> Iterator[Executor]:
    """Run jobs on a cluster whose workers see a file in `shared`; they end with their client."""
    client, reports = connected(address), queue.Queue[int]()
    futures: list[Any] = []
    remove_unfinished(shared)
    with unfinished(shared.resolve() / "seen") as mark, client, client.as_current():
        client.subscribe_topic(mark.name, lambda event: reports.put(int(event[1])))
        run, code = partial(_run_in_worker, mark=str(mark)), code_key()

        def submit(job: Callable[[], Any]) -> Any:
            options = {"pure": False, "retries": RETRIES, "priority": -len(futures)}
            futures.append(client.submit(run, job, code, key=f"vaalign-{uuid.uuid4().hex}", **options))
            return futures[-1]

        try:
            yield submit, partial(_as_completed, client, address), reports
        except BaseException:
            client.cancel(futures, force=True)
            raise


def connected(address: str) -> Any:
    """Return a client of a scheduler, waited for here: dask's limit does not hold for who never answers."""
    try:
        import distributed
    except ImportError:
        text = "dask.distributed is not installed; install it with `pip install -e '.[cluster]'`"
        raise ClusterError(text) from None
    found: list[Any] = [TimeoutError(f"no greeting within {CONNECT_SECONDS} seconds")]

    def connect() -> None:
        try:
            found.append(distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False))
        except Exception as error:  # whatever a stranger's bytes lead to
            found.append(error)

    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(CONNECT_SECONDS + 1)
    if isinstance(client := found[-1], Exception):
        raise ClusterError(f"no dask scheduler answers at {address}: {str(client) or type(client).__name__}")
    return client


def _as_completed(client: Any, address: str, futures: Iterable[Any]) -> Iterator[Any]:
    """Yield what is done, and say so while the scheduler has no workers."""
    from distributed import wait

    left, told = set(futures), False
    while left:
        with suppress(TimeoutError):
            wait(left, timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED")
        done = {one for one in left if one.done()}
        yield from done
        left -= done
        try:
            without = not done and not client.nthreads()
        except OSError:
            raise ClusterError(f"the dask scheduler at {address} answers no more") from None
        if without and not told:
            text = f"the dask scheduler at {address} has no workers: {len(left)} jobs wait for some"
            warnings.warn(f"{text}; `dask worker {address}` starts one", NoWorkersWarning, 3)
        told = without


def code_key() -> str:
    """Return a key of the code and packages that jobs run with, which must be the same everywhere."""
    code = {path.relative_to(PACKAGE).as_posix(): file_hash(path) for path in PACKAGE.rglob("*.py")}
    return content_key(code=code, packages=package_versions())


_one_at_a_time = threading.Lock()  # in a worker


def _run_in_worker(job: Callable[[], Result], code: str, mark: str) -> Result | FinalError:
    """Run a job in a worker, one at a time and with one thread; return what another try would not change."""
    import torch
    from distributed import get_worker

    worker = get_worker()
    try:
        _check_worker(worker.address, code, Path(mark))
        with _one_at_a_time:
            torch.set_num_threads(1)
            silence_libraries()
            WORKER.memory = worker.memory_manager.memory_limit
            WORKER.report = partial(worker.log_event, Path(mark).name)
            with _ended_when_unwanted(worker):
                return job()
    except FinalError as error:
        return error
    except _NobodyWaits:
        return ClusterError("nobody waits for this job any more")


def _check_worker(address: str, code: str, mark: Path) -> None:
    import torch

    if code_key() != code:
        raise ClusterError(f"worker {address} has another version of the library or of its packages")
    if not mark.is_file():
        text = "the run folder must be on a shared file system, under the same path"
        raise ClusterError(f"worker {address} does not see {mark.parent}: {text}")
    if (count := torch.cuda.device_count()) > 1:
        text = "start one worker for each, with CUDA_VISIBLE_DEVICES set to its number"
        raise ClusterError(f"worker {address} sees {count} GPUs; {text}")


@contextmanager
def _ended_when_unwanted(worker: Any) -> Iterator[None]:
    """End a job when the scheduler takes it back, as it does when the client is gone, however it went: raise
    `_NobodyWaits` in the middle of the block, whatever runs there.
    """
    key, thread = worker.get_current_task(), ctypes.c_ulong(threading.get_ident())
    over, ending, lock = threading.Event(), threading.Event(), threading.Lock()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            task = worker.state.tasks.get(key)
            if task is None or task.state == "cancelled":
                with lock:
                    if not over.is_set():
                        ending.set()
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_NobodyWaits))
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except _NobodyWaits:
        ending.clear()
        raise
    finally:
        with lock:
            over.set()
        while ending.is_set():  # it is on its way, and must not reach the next job
            time.sleep(0)
