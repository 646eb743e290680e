"""Long jobs: in processes of this machine or on a dask.distributed cluster, under one progress bar.

On a cluster all machines see the same run store, where checkpoints and results go. A job whose worker
dies is given to another one, which goes on from the last checkpoint.
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
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, TypeVar

import tqdm.auto
import tqdm.std

from vaalign_lib.store import (
    PACKAGE,
    PlanError,
    content_key,
    file_hash,
    package_versions,
    remove_unfinished,
    unfinished,
)

HEADLESS = "VAALIGN_HEADLESS"  # set by `vaalign reproduce`: nobody can see a widget or move a slider

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


if TYPE_CHECKING:
    import torch  # elsewhere where it is needed: it takes seconds, in which a worker is to have its watch

Name = TypeVar("Name")
Result = TypeVar("Result")
Report = Callable[[int], None]  # steps that were taken, or, if negative, that are to come besides

ADDRESS = re.compile(r"((tcp|tls|ucx|wss?)://)?[^\s/]+:\d{1,5}")  # of a dask scheduler

_steps: Any = None  # in a worker, where its reports go
_together = 1  # in a worker, how many there are on this machine
_memory: int | None = None  # in a worker of a cluster, the bytes that it may take


def default_workers() -> int:
    """Return how many jobs this machine takes at a time: its GPUs if it has any, else its cores."""
    import torch

    return torch.cuda.device_count() or os.cpu_count() or 1


def check_workers(workers: object, least: int = 1) -> None:
    """Refuse what is neither a number of processes nor the address of a dask scheduler.

    Raises:
        ValueError: it is something else, or fewer than `least`.
    """
    whole = isinstance(workers, int) and not isinstance(workers, bool) and workers >= least
    if not whole and not (isinstance(workers, str) and ADDRESS.fullmatch(workers)):
        raise ValueError(
            f"workers: expected a whole number of at least {least}, or the address of a dask scheduler "
            f"such as tcp://host:8786, got {workers!r}"
        )


def device() -> "torch.device":
    """Return the device of this process: workers share out the GPUs."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    identity = multiprocessing.current_process()._identity  # (1,), (2,), ... in the order of their start
    return torch.device("cuda", (identity[-1] - 1 if identity else 0) % torch.cuda.device_count())


def together() -> int:
    """Return how many workers share this machine with this one, itself included."""
    return _together


def memory_limit() -> int | None:
    """Return the bytes that this worker may take, None if nobody says."""
    return _memory


def limit_memory(most: int | None) -> None:
    """Say how many bytes this worker may take."""
    global _memory
    _memory = most


def report(steps: int) -> None:
    """Tell the process that waits for this worker how far it is."""
    if _steps is not None:
        _steps.put(steps)


def report_to(place: Any) -> None:
    """Let reports of this process go to a place with a method `put`."""
    global _steps
    _steps = place


def run_jobs(
    jobs: Mapping[Name, Callable[[], Result]], workers: int | str, steps: int, description: str, shared: Path
) -> dict[Name, Result]:
    """Run jobs in worker processes, in their order, under one bar.

    Args:
        jobs: picklable functions; they may call `report`.
        workers: processes of this machine, or the address of a dask scheduler.
        steps: that all jobs together are going to report.
        description: of the bar.
        shared: a folder that all workers see, here or elsewhere.

    Raises:
        ValueError: `workers` is neither.
        Exception: what the first failing job raised; jobs that have not begun are given up.
    """
    check_workers(workers)
    if not jobs:
        return {}
    if isinstance(workers, str):
        return run_on_cluster(workers, jobs, steps, description, shared)
    queue = get_context("spawn").Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = start_processes(min(workers, len(jobs)), workers, threads, queue)
    try:
        futures = {pool.submit(job): name for name, job in jobs.items()}
        with shown(queue, steps, description):
            done = {futures[one]: one.result() for one in as_completed(futures)}
        return {name: done[name] for name in jobs}
    except BaseException:
        _end(pool)
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def start_processes(count: int, together: int, threads: int = 1, queue: Any = None) -> ProcessPoolExecutor:
    """Return processes that end when this one does.

    Args:
        count: of them.
        together: how many share this machine, these included.
        threads: of each.
        queue: where their reports go.
    """
    given = (queue, os.getpid(), together, threads)
    return ProcessPoolExecutor(count, get_context("spawn"), _begin, given)


def _end(pool: ProcessPoolExecutor) -> None:
    """Stop the workers at once: what they have is in their checkpoints."""
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.terminate()


@contextmanager
def shown(queue: Any, steps: int, description: str) -> Iterator[None]:
    """Show a bar of what arrives in a queue."""
    over = threading.Event()

    def follow() -> None:
        with bar(steps, description) as progress:
            while not over.is_set():
                try:
                    taken = queue.get(timeout=0.5)
                except Empty:
                    continue
                progress.total += max(-taken, 0)
                progress.update(max(taken, 0))
                progress.refresh()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)


def _begin(queue: Any, parent: int, together: int, threads: int) -> None:
    """Set up a worker: its share of the cores, silence, for the output of a notebook belongs to its own
    process, and an end when nobody waits for it any more.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import torch

    global _together
    _together = together
    report_to(queue)
    torch.set_num_threads(threads)
    silence_libraries()
    sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # also for models that ask for "cuda" without a number


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


RETRIES = 3  # of a job that failed, for a worker may have lost its GPU or its disk
CONNECT_SECONDS = 5  # until a scheduler must have answered
LOOK_SECONDS = 5  # between looks whether the scheduler has workers
WATCH_SECONDS = 1.0  # between a worker's looks whether its job is still wanted

_one_at_a_time = threading.Lock()  # in a worker


class ClusterError(PlanError):
    """The cluster cannot be used as it is."""


class NoWorkersWarning(UserWarning):
    """The jobs wait, for nobody takes them."""


class _NobodyWaits(BaseException):
    """Ends a job whose client is gone; no library's `except Exception` is to keep it."""


def run_on_cluster(
    address: str, jobs: Mapping[Name, Callable[[], Result]], steps: int, description: str, shared: Path
) -> dict[Name, Result]:
    """Run jobs on a cluster, in their order, under one bar.

    A scheduler without workers is told, and some are waited for. Jobs end with their client.

    Args:
        address: of the scheduler, such as tcp://host:8786.
        jobs: picklable functions; they may call `jobs.report`.
        steps: that all jobs together are going to report.
        description: of the bar.
        shared: a folder that all workers must see.

    Raises:
        ClusterError: no scheduler answers, or a worker cannot take the jobs.
        Exception: what the first failing job raised.
    """
    client = connected(address)
    reports: queue.Queue[int] = queue.Queue()
    remove_unfinished(shared)
    with (
        unfinished(shared.resolve() / "seen") as mark,
        client,
        client.as_current(),
        shown(reports, steps, description),
    ):
        client.subscribe_topic(mark.name, lambda event: reports.put(int(event[1])))
        futures = {
            client.submit(
                _run_in_worker, job, code_key(), str(mark), key=f"vaalign-{uuid.uuid4().hex}",
                pure=False, retries=RETRIES, priority=-k,
            ): name
            for k, (name, job) in enumerate(jobs.items())
        }  # fmt: skip
        try:
            for one in _as_completed(client, futures, address):
                if isinstance(found := one.result(), _Refused):
                    raise found.error
        except BaseException:
            client.cancel(list(futures), force=True)
            raise
        done: dict[Name, Any] = {name: one.result() for one, name in futures.items()}
    return {name: done[name] for name in jobs}


def connected(address: str) -> Any:
    """Return a client of a scheduler.

    It is waited for here: dask's own limit does not hold for who accepts and never answers.

    Raises:
        ClusterError: dask is not installed, or no scheduler answers.
    """
    try:
        import distributed
    except ImportError:
        raise ClusterError(
            "dask.distributed is not installed; install it with `pip install -e '.[cluster]'`"
        ) from None
    found: queue.Queue[Any] = queue.Queue()

    def connect() -> None:
        options = {"timeout": CONNECT_SECONDS, "set_as_default": False}
        try:
            found.put(distributed.Client(address, **options))
        except Exception as error:  # whatever a stranger's bytes lead to
            found.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        client = found.get(timeout=CONNECT_SECONDS + 1)
    except queue.Empty:
        client = TimeoutError(f"no greeting within {CONNECT_SECONDS} seconds")
    if isinstance(client, Exception):
        reason = str(client) or type(client).__name__
        raise ClusterError(f"no dask scheduler answers at {address}: {reason}")
    return client


def _as_completed(client: Any, futures: Iterable[Any], address: str) -> Iterator[Any]:
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
            warnings.warn(f"{text}; `dask worker {address}` starts one", NoWorkersWarning, 4)
        told = without


def code_key() -> str:
    """Return a key of the code and packages that jobs run with, which must be the same everywhere."""
    code = {path.relative_to(PACKAGE).as_posix(): file_hash(path) for path in PACKAGE.rglob("*.py")}
    return content_key(code=code, packages=package_versions())


@dataclass(frozen=True)
class _Refused:
    """In place of a result: what another attempt would not change."""

    error: Exception


def _run_in_worker(job: Callable[[], Result], code: str, mark: str) -> "Result | _Refused":
    """Run a job in a worker, and say so where it cannot run at all."""
    try:
        return _run_here(job, code, mark)
    except PlanError as error:
        return _Refused(error)
    except _NobodyWaits:
        return _Refused(ClusterError("nobody waits for this job any more"))


def _run_here(job: Callable[[], Result], code: str, mark: str) -> Result:
    """Run a job, one at a time, with one thread."""
    import torch
    from distributed import get_worker

    worker = get_worker()
    if code_key() != code:
        raise ClusterError(f"worker {worker.address} has another version of the library or of its packages")
    if not Path(mark).is_file():
        raise ClusterError(
            f"worker {worker.address} does not see {Path(mark).parent}: the run folder must be on a "
            "shared file system, under the same path"
        )
    if torch.cuda.device_count() > 1:
        raise ClusterError(
            f"worker {worker.address} sees {torch.cuda.device_count()} GPUs; start one worker for each, "
            "with CUDA_VISIBLE_DEVICES set to its number"
        )
    with _one_at_a_time:
        torch.set_num_threads(1)
        silence_libraries()
        limit_memory(worker.memory_manager.memory_limit)
        report_to(_Topic(worker, Path(mark).name))
        with _ended_when_unwanted(worker):
            return job()


@contextmanager
def _ended_when_unwanted(worker: Any) -> Iterator[None]:
    """End a job when the scheduler takes it back, as it does when the client is gone, however it went.

    Raises:
        _NobodyWaits: in the middle of the block, whatever runs there.
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
                        end = ctypes.py_object(_NobodyWaits)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, end)
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


class _Topic:
    """Where a worker's reports go."""

    def __init__(self, worker: Any, name: str) -> None:
        self.worker, self.name = worker, name

    def put(self, steps: int) -> None:
        self.worker.log_event(self.name, steps)


def silence_libraries() -> None:
    """Switch off the libraries' own bars (map, load, save), their advice and the news of what they are
    going to rename, which say nothing that a reader needs.
    """
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
