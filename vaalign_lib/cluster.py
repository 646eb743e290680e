"""Long jobs on a dask.distributed cluster, instead of processes of this machine.

All machines see the same run store, where checkpoints and results go. A job whose worker dies is given to
another one, which goes on from the last checkpoint. Needs `pip install -e '.[cluster]'`.
"""

import ctypes
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vaalign_lib import workers
from vaalign_lib.runs import (
    PlanError,
    content_key,
    package_versions,
    remove_unfinished,
    source_hashes,
    unfinished,
)
from vaalign_lib.trainers import silence_libraries

Name = TypeVar("Name")
Result = TypeVar("Result")

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


def run_jobs(
    address: str,
    jobs: Mapping[Name, Callable[[], Result]],
    steps: int,
    description: str,
    shared: Path,
) -> dict[Name, Result]:
    """Run jobs on a cluster, in their order, under one bar.

    A scheduler without workers is told, and some are waited for. Jobs end with their client.

    Args:
        address: of the scheduler, such as tcp://host:8786.
        jobs: picklable functions; they may call `workers.report`.
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
        workers.shown(reports, steps, description),
    ):
        client.subscribe_topic(mark.name, lambda event: reports.put(int(event[1])))
        futures = {
            client.submit(
                _run, job, code_key(), str(mark), key=f"vaalign-{uuid.uuid4().hex}",
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
    return content_key(
        source=source_hashes("vaalign_lib.policy_study"), packages=package_versions()
    )


@dataclass(frozen=True)
class _Refused:
    """In place of a result: what another attempt would not change."""

    error: Exception


def _run(job: Callable[[], Result], code: str, mark: str) -> "Result | _Refused":
    """Run a job in a worker, and say so where it cannot run at all."""
    try:
        return _run_here(job, code, mark)
    except PlanError as error:
        return _Refused(error)
    except _NobodyWaits:
        return _Refused(ClusterError("nobody waits for this job any more"))


def _run_here(job: Callable[[], Result], code: str, mark: str) -> Result:
    """Run a job, one at a time, with one thread."""
    from distributed import get_worker

    worker = get_worker()
    if code_key() != code:
        raise ClusterError(
            f"worker {worker.address} has another version of the library or of its packages"
        )
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
        workers.limit_memory(worker.memory_manager.memory_limit)
        workers.report_to(_Topic(worker, Path(mark).name))
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
