"""Long jobs in processes of their own: one per core with one thread each, or one per GPU.

`start_processes` is the only place of the library that starts processes for its work: they end with the
one that waits for them, however that ends.
"""

import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any, TypeVar

from vaalign_lib.progress import bar

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
    identity = (
        multiprocessing.current_process()._identity
    )  # (1,), (2,), ... in the order of their start
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
    jobs: Mapping[Name, Callable[[], Result]],
    workers: int | str,
    steps: int,
    description: str,
    shared: Path,
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
        from vaalign_lib import cluster  # needs an optional package

        return cluster.run_jobs(workers, jobs, steps, description, shared)
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


def start_processes(
    count: int, together: int, threads: int = 1, queue: Any = None
) -> ProcessPoolExecutor:
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

    from vaalign_lib.trainers import silence_libraries

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
