"""Jobs in worker processes, which end with the one that waits for them, and on a real dask scheduler,
whose workers die, join, refuse and wait.
"""

import ast
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import psutil
import pytest

from tests.jobs_to_run import fails, faults_of_freeing, job, nap, of_worker
from vaalign_lib import jobs
from vaalign_lib.experiments.conditions import Condition
from vaalign_lib.experiments.policies import train_runs
from vaalign_lib.jobs import run_jobs
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.reproduce.notebook import start
from vaalign_lib.store import PACKAGE, ROOT, RunStore

STEPS = 6
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}  # workers find tests.jobs_to_run


# --- processes of this machine --------------------------------------------------------------------------

PARENT = """
import sys
from functools import partial
from pathlib import Path
from tests.jobs_to_run import nap
from vaalign_lib.jobs import run_jobs, start_processes
job = partial(nap, Path(sys.argv[1]))
pool = start_processes(1, together=3)
pool.submit(job)
run_jobs(dict.fromkeys("abc", job), 2, 3, "naps", Path(sys.argv[1]))
"""


def wait_until(fulfilled, seconds):
    deadline = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_process_is_left_when_a_notebooks_kernel_is_killed(tmp_path):
    """Some are killed while they work, others may only begin."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    known = psutil.Process(parent.pid)

    def spawned():
        return [one for one in known.children() if "spawn_main" in " ".join(one.cmdline())]

    wait_until(lambda: len(spawned()) == 3 and list(tmp_path.iterdir()), 300)
    family = known.children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, left = psutil.wait_procs(family, timeout=10)
    assert len(gone) >= 3 and not left


def test_processes_give_results_in_order_and_what_fails_there_fails_here(tmp_path):
    found = run_jobs({k: partial(of_worker, k) for k in range(5)}, 2, 5, "jobs", tmp_path)
    assert [one[:3] for one in found.values()] == [(k, 2, "PASSIVE") for k in range(5)]
    assert os.getpid() not in {one[3] for one in found.values()}
    started = time.monotonic()
    with pytest.raises(ValueError, match="no job"):
        run_jobs({"bad": partial(fails, tmp_path), "long": partial(nap, tmp_path)}, 2, 2, "jobs", tmp_path)
    assert time.monotonic() - started < 120  # the long one is stopped


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other settings")
def test_freed_memory_stays_with_a_process(tmp_path, monkeypatch):
    kept = run_jobs({0: partial(faults_of_freeing, 8)}, 1, 1, "jobs", tmp_path)[0]
    for name in jobs.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "ENVIRONMENT", {"MALLOC_TRIM_THRESHOLD_": str(2**17)})
    given_back = run_jobs({0: partial(faults_of_freeing, 8)}, 1, 1, "jobs", tmp_path)[0]
    pages = 2**24 / os.sysconf("SC_PAGE_SIZE")
    assert kept < pages < 8 * pages < given_back


STARTING = ("multiprocessing", "subprocess", "concurrent.futures.process", "os.fork", "os.spawn")
STARTING += ("concurrent.futures.ProcessPoolExecutor",)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{one.name}" for one in node.names)


def test_one_module_starts_processes():
    """Beside it the command starts kernels, which watch their parent, and pip; threads are no matter."""
    starting = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith(STARTING) for name in imported(path))
    }
    assert starting == {"jobs", "execute", "packages"}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "", "two", "host", "tcp://host", "a:b", [2]])
def test_workers_of_a_wrong_kind(tmp_path, wrong):
    with pytest.raises(ValueError, match="workers: expected a whole number of at least 1, or the addr"):
        run_jobs({"one": nap}, wrong, 1, "jobs", tmp_path)


# --- a cluster ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduler():
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard"]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1"], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"tcp://127\.0\.0\.1:\d+", line):
            break
    yield found[0]
    process.terminate()
    process.wait(60)


@pytest.fixture(scope="module")
def worker_called(scheduler, tmp_path_factory):
    """Return a function that gives the worker process of a name, started now or before."""
    started, folder = {}, tmp_path_factory.mktemp("workers")

    def called(name):
        if name not in started:
            command = [sys.executable, "-m", "distributed.cli.dask_worker", scheduler]
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
            place = ["--name", name, "--local-directory", str(folder / name)]
            with (folder / f"{name}.log").open("w") as log:
                out = {"stderr": log, "stdout": log, "env": ENVIRONMENT}
                started[name] = subprocess.Popen([*command, *options, *place], **out)
        return started[name]

    yield called
    for process in started.values():
        process.kill()
        process.wait(20)


def small():
    profile = load_profile("smoke")
    training = dict(profile.policies.training)
    longer = training["qwen2"].ppo.model_copy(update={"iterations": STEPS})
    training["qwen2"] = training["qwen2"].model_copy(update={"ppo": longer})
    return profile.model_copy(update={"policies": profile.policies.model_copy(update={"training": training})})


def stacks():
    first = Condition("qwen2", "judge-a")
    methods = [replace(first, objective=name) for name in ("vanilla", "variance_aware")]
    return [*methods, first.start]


def contents(folders):
    return {
        run.name: (
            pd.read_parquet(folder / "policies.parquet"),
            pd.read_parquet(folder / "log.parquet") if (folder / "log.parquet").is_file() else None,
            {path.name: path.read_bytes() for path in folder.rglob("*.safetensors")},
        )
        for run, folder in folders.items()
    }


def kill_when_busy(process, name, address, root):
    """Kill a worker that has begun with a job."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        for _ in range(600):
            workers = client.scheduler_info(n_workers=-1).get("workers", {})
            mine = [key for key, one in workers.items() if one["name"] == name]
            if mine and client.processing().get(mine[0]):
                client.run(save_always)
                break
            time.sleep(0.1)
    for _ in range(600):  # until there is something to go on from
        if list(root.glob("*.scratch/step-*")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)


def save_always():
    """Let a worker keep a checkpoint of every step."""
    from vaalign_lib.training import run as training_run

    training_run.CHECKPOINT_SECONDS = 0.0


def test_a_worker_may_die_and_another_join(scheduler, worker_called, tmp_path):
    profile, runs = small(), stacks()
    here = train_runs(Study(RunStore(tmp_path / "here"), profile, 0), runs, os.cpu_count() or 1)
    first, second = (worker_called(name) for name in ("first", "second"))

    def trouble():
        kill_when_busy(first, "first", scheduler, tmp_path / "there")
        worker_called("third")

    thread = threading.Thread(target=trouble)
    thread.start()
    there = train_runs(Study(RunStore(tmp_path / "there"), profile, 0), runs, scheduler)
    thread.join()
    assert first.wait(20) == -signal.SIGKILL
    assert list(there) == runs
    ours, theirs = contents(here), contents(there)
    for name, (policies, log, files) in ours.items():
        pd.testing.assert_frame_equal(policies, theirs[name][0], check_exact=True)
        assert files == theirs[name][2]
        if log is not None:
            assert not theirs[name][1].duplicated(["policy", "step"]).any()
            seconds = [column for column in log if "seconds" in column]
            pd.testing.assert_frame_equal(
                log.drop(columns=seconds), theirs[name][1].drop(columns=seconds), check_exact=True
            )
    assert not list((tmp_path / "there").glob(".*"))
    for process in (second, worker_called("third")):
        process.kill()
        process.wait(20)


def test_no_workers_are_told_and_waited_for(scheduler, worker_called, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.2)
    with pytest.warns(jobs.NoWorkersWarning, match=r"no workers: 1 jobs wait.*dask worker tcp"):
        thread = threading.Timer(1, worker_called, ("only",))
        thread.start()
        found = run_jobs({"a": partial(job, tmp_path, 1)}, scheduler, 1, "jobs", tmp_path / "store")
    assert found["a"][0] == 1


def test_jobs_go_to_the_workers_in_their_order_of_names(scheduler, worker_called, tmp_path):
    process = worker_called("only")
    five = {f"job {k}": partial(job, tmp_path, k) for k in range(5)}
    found = run_jobs(five, scheduler, 5, "jobs", tmp_path / "store")
    assert found == {f"job {k}": (k, process.pid) for k in range(5)}


def test_what_fails_there_fails_here(scheduler, worker_called, tmp_path, monkeypatch):
    worker_called("only")
    monkeypatch.setattr(jobs, "RETRIES", 1)
    with pytest.raises(ValueError, match="job -1"):
        run_jobs({"bad": partial(job, tmp_path, -1)}, scheduler, 1, "jobs", tmp_path / "store")
    assert len(list(tmp_path.glob("-1-*"))) == 2  # tried again once


def test_workers_that_cannot_take_the_jobs_are_named(scheduler, worker_called, tmp_path, monkeypatch):
    worker_called("only")
    code = jobs.code_key()
    monkeypatch.setattr(jobs, "code_key", lambda: "of another version")
    with pytest.raises(jobs.ClusterError, match="has another version of the library"):
        run_jobs({"one": partial(job, tmp_path, 1)}, scheduler, 1, "jobs", tmp_path / "store")
    refused = _run_without_folder(scheduler, tmp_path, code)  # said, not raised: nothing to try again
    assert isinstance(refused, jobs.ClusterError)
    assert re.search(r"does not see .*nowhere", str(refused))


def _run_without_folder(scheduler, tmp_path, code):
    from distributed import Client

    with Client(scheduler, set_as_default=False) as client:
        mark = str(tmp_path / "nowhere" / "mark")
        run = client.submit(jobs._run_in_worker, partial(job, tmp_path, 1), code, mark, pure=False)
        return run.result()


def test_nobody_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 1)
    with pytest.raises(jobs.ClusterError, match=r"no dask scheduler answers at tcp://127\.0\.0\.1:9"):
        run_jobs({"one": partial(job, tmp_path, 1)}, "tcp://127.0.0.1:9", 1, "jobs", tmp_path)


def test_a_scheduler_that_accepts_and_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(jobs.ClusterError, match="no greeting within 1 seconds"):
            run_jobs({"one": partial(job, tmp_path, 1)}, address, 1, "jobs", tmp_path / "store")
        assert time.monotonic() - started < 5
    assert not (tmp_path / "store").exists()


CLIENT = """
import sys
from functools import partial
from pathlib import Path
from tests.jobs_to_run import endless
from vaalign_lib.jobs import run_jobs
folder = Path(sys.argv[2])
run_jobs({"one": partial(endless, folder)}, sys.argv[1], 1, "jobs", folder / "store")
"""


def test_jobs_end_with_their_client_and_the_next_client_need_not_wait(scheduler, worker_called, tmp_path):
    process = worker_called("only")
    command = [sys.executable, "-c", CLIENT, scheduler, str(tmp_path)]
    client = subprocess.Popen(command, env=ENVIRONMENT)
    wait_until(lambda: (tmp_path / "beat").exists() or client.poll() is not None, 300)
    assert len(list((tmp_path / "store").glob(".seen.*"))) == 1
    client.kill()
    client.wait()
    killed = time.monotonic()
    found = run_jobs({"a": partial(job, tmp_path, 1)}, scheduler, 1, "jobs", tmp_path / "store")
    assert time.monotonic() - killed < 20
    assert found["a"] == (1, process.pid)  # in the same worker, alive
    last = (tmp_path / "beat").read_text()
    time.sleep(0.5)
    assert (tmp_path / "beat").read_text() == last
    assert not list((tmp_path / "store").glob(".*"))


def test_notebooks_take_an_address_as_workers(tmp_path):
    run = start("04_ppo_runs", profile="smoke", run_dir=tmp_path, workers="tcp://host:8786")
    assert run.cluster == "tcp://host:8786" and run.workers == (os.cpu_count() or 1)
    assert start("04_ppo_runs", profile="smoke", run_dir=tmp_path, workers=3).cluster == ""
    with pytest.raises(ValueError, match="the address of a dask scheduler such as"):
        start("04_ppo_runs", profile="smoke", run_dir=tmp_path, workers="two")
