"""Worker processes: they end with the one that waits for them, however notebooks have started them."""

import ast
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vaalign_lib import jobs
from vaalign_lib.store import PACKAGE, ROOT, NotKeptError

PLACE = "VAALIGN_TEST_PLACE"  # where jobs say that they have begun

PARENT = """
import sys
from pathlib import Path
from threading import Thread
from tests.test_workers import nap
from vaalign_lib.experiments import policies as policy_study, reward_study, trl_study
from vaalign_lib.experiments.conditions import Run
from vaalign_lib.profiles import load_profile
from vaalign_lib.store import RunStore

reward_study.reference = policy_study.train_run = trl_study.one_token_shares = nap
policy_study.prerequisites = trl_study.reference = lambda *_: None
trl_study._trained = nap
store, smoke = RunStore(Path(sys.argv[1])), load_profile("smoke")
ways = {
    "03": lambda: reward_study.start_references(store, smoke, 0, ["qwen2"], 1),
    "04": lambda: policy_study.train_runs(store, smoke, 0, [Run("qwen2", "judge-a")], 1),
    "09": lambda: trl_study.compare(store, smoke, 0, 1),
    "09, one token": lambda: trl_study.one_token_ends(0, 1, 1, store.root),
}
threads = [Thread(target=way) for way in ways.values()]
for step in (Thread.start, Thread.join):
    for thread in threads:
        step(thread)
"""


def nap(first, *_):
    """Work for a long time, in place of every job."""
    if getattr(first, "reads_only", False):
        raise NotKeptError("not computed yet")
    (Path(os.environ[PLACE]) / str(os.getpid())).touch()
    time.sleep(600)


def wait_until(fulfilled, seconds):
    deadline = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_no_process_is_left_when_a_notebooks_kernel_is_killed(tmp_path):
    """Some are killed while they work, others may only begin."""
    environment = os.environ | {PLACE: str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PARENT, str(tmp_path / "store")]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    known = psutil.Process(parent.pid)

    def spawned():
        return [one for one in known.children() if "spawn_main" in " ".join(one.cmdline())]

    wait_until(lambda: len(spawned()) == 4, 120)
    wait_until(lambda: len([one for one in tmp_path.iterdir() if one.name.isdigit()]) >= 1, 300)
    family = known.children(recursive=True)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, left = psutil.wait_procs(family, timeout=10)
    assert len(gone) >= 4 and not left


STARTING = ("multiprocessing", "subprocess", "concurrent.futures.process", "os.fork", "os.spawn")
STARTING += ("concurrent.futures.ProcessPoolExecutor",)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{one.name}" for one in node.names)


def test_one_module_starts_processes():
    """Beside it the command starts kernels, which watch their parent; threads are no matter."""
    starting = {
        path.stem
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith(STARTING) for name in imported(path))
    }
    assert starting == {"workers", "execution"}


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, None, "", "two", "host", "tcp://host", "a:b", [2]])
def test_workers_of_a_wrong_kind(tmp_path, wrong):
    with pytest.raises(ValueError, match="workers: expected a whole number of at least 1, or the addr"):
        jobs.run_jobs({"one": nap}, wrong, 1, "jobs", tmp_path)
