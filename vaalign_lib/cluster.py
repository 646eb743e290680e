"""Long jobs on a dask.distributed cluster, instead of processes of this machine.

All machines see the same run store, where checkpoints and results go. A job whose worker dies is given to
another one, which goes on from the last checkpoint. Needs `pip install -e '.[cluster]'`.
"""

import queue
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from vaalign_lib import workers
from vaalign_lib.runs import PlanError, content_key, package_versions, source_hashes
from vaalign_lib.trainers import silence_libraries

Name = TypeVar("Name")
Result = TypeVar("Result")

RETRIES = 3  # of a job that failed, for a worker may have lost its GPU or its disk
CONNECT_SECONDS = 20

_one_at_a_time = threading.Lock()  # in a worker


class ClusterError(RuntimeError):
    """The cluster cannot be used as it is."""


def run_jobs(
    address: str,
    jobs: Mapping[Name, Callable[[], Result]],
    steps: int,
    description: str,
    shared: Path,
) -> dict[Name, Result]:
    """Run jobs on a cluster, in their order, under one bar.

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
    try:
        import distributed
    except ImportError:
        raise ClusterError(
            "dask.distributed is not installed; install it with `pip install -e '.[cluster]'`"
        ) from None
    reports: queue.Queue[int] = queue.Queue()
    mark = shared.resolve() / f".seen-{uuid.uuid4().hex}"
    mark.parent.mkdir(parents=True, exist_ok=True)
    try:
        client = distributed.Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(f"no dask scheduler answers at {address}: {error}") from None
    mark.touch()
    try:
        with client, client.as_current(), workers.shown(reports, steps, description):
            client.subscribe_topic(mark.name, lambda event: reports.put(int(event[1])))
            futures = {
                client.submit(
                    _run, job, code_key(), str(mark), key=f"vaalign-{uuid.uuid4().hex}",
                    pure=False, retries=RETRIES, priority=-k,
                ): name
                for k, (name, job) in enumerate(jobs.items())
            }  # fmt: skip
            try:
                for one in distributed.as_completed(list(futures)):
                    if isinstance(found := one.result(), _Refused):
                        raise found.error
            except BaseException:
                client.cancel(list(futures), force=True)
                raise
            done: dict[Name, Any] = {name: one.result() for one, name in futures.items()}
        return {name: done[name] for name in jobs}
    finally:
        mark.unlink(missing_ok=True)


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
    except (ClusterError, PlanError) as error:
        return _Refused(error)


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
        workers.report_to(_Topic(worker, Path(mark)))
        return job()


class _Topic:
    """Where a worker's reports go, as long as somebody waits for them."""

    def __init__(self, worker: Any, mark: Path) -> None:
        self.worker, self.mark = worker, mark

    def put(self, steps: int) -> None:
        if not self.mark.is_file():
            raise ClusterError(
                "nobody waits for this job any more; it stops at its last checkpoint"
            )
        self.worker.log_event(self.mark.name, steps)
