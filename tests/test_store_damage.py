"""What is kept is what was written: damage is noticed, said once, set aside, computed again."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from vaalign_lib import store as runs
from vaalign_lib.experiments import policies as policy_study
from vaalign_lib.experiments.conditions import Condition
from vaalign_lib.experiments.results import PUBLISHED, Results, published
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce import run
from vaalign_lib.reproduce.cli import main
from vaalign_lib.store import (
    Checkpoints,
    CorruptCheckpointWarning,
    DamagedError,
    DamagedResultWarning,
    NotKeptError,
    RunStore,
    sealed,
    write_atomically,
    write_record,
)

FLIPS = 1000
SMOKE = load_profile("smoke")
RUN = Condition("qwen2", "judge-a")


@pytest.fixture(autouse=True)
def _quick_keys(monkeypatch):
    monkeypatch.setattr(runs, "source_hashes", lambda module: {})
    monkeypatch.setattr(runs, "package_versions", dict)


def write_study(folder, size=6):
    """Write all kinds of files that stages keep."""
    random = torch.Generator().manual_seed(0)
    table = pd.DataFrame({"policy": range(size), "kl": np.linspace(0, 1, size)})
    table.to_parquet(folder / "policies.parquet")
    table.to_parquet(folder / "log.parquet")
    (folder / "left_out.json").write_text(json.dumps({"two equal responses": size}))
    (folder / "policy").mkdir()
    for name in ("features.safetensors", "policy/model.safetensors"):
        save_file({"weight": torch.randn(size, 40, generator=random)}, folder / name)


def table_of(size):
    return pd.DataFrame({"x": np.arange(size) / 7})


def in_the_store(root):
    """Yield what reads each folder of a store, and the folder."""
    store = RunStore(root)
    yield store.folder("study", write_study, {}), lambda: store.folder("study", write_study, {})
    store.table("table", table_of, {"size": 9})
    place = store.place("table", table_of, {"size": 9})
    yield place, lambda: store.table("table", table_of, {"size": 9})


def publish_into(folder):
    about = {"run": RUN.name, **asdict(RUN)}
    policies = pd.DataFrame([about | {"policy": 0, "kl": 1.0, "true_reward": 0.0}])
    settings = policy_study.settings_key(SMOKE, 0, RUN)
    table = pd.DataFrame([about | {"origin": "", "key": "k", "settings": settings}])
    curves = pd.DataFrame({"run": [RUN.name], "step": [1]})
    costs = pd.DataFrame(columns=["table", "what", "seconds", "bytes"])
    looks = pd.DataFrame(columns=["run", "policy", "step"])
    Results(policies, table, curves, costs, looks).write(folder / "smoke")


def a_notebook(folder):
    (folder / "figures").mkdir(parents=True)
    (folder / "figures" / "a.png").write_bytes(bytes(range(200)))
    (folder / "findings.json").write_text('{"findings": []}')
    write_record(folder, {"key": "k", "finished": "today", "seconds": 1.5}, "done.json")


def noticed_in_store(read, path, content):
    """Whether reading warns of the file, makes it anew as it was, and keeps the damaged folder."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        read()
    told = [str(one.message) for one in said if one.category is DamagedResultWarning]
    aside = [Path(found[1]) for text in told if (found := re.search(r"set aside as (\S+) and", text))]
    fresh = path.name == "run.json" or path.read_bytes() == content  # records tell the seconds
    found = len(told) == 1 and told[0].startswith(str(path)) and aside[0].is_dir()
    shutil.rmtree(aside[0])
    return found and fresh


def raises_damaged(read, path):
    try:
        read()
    except DamagedError as error:
        return str(error).startswith(str(path))
    return False


@pytest.fixture
def kept(tmp_path):
    """Return every kept file with what says whether its damage is noticed."""
    found = []
    for folder, read in in_the_store(tmp_path / "store"):
        for path in folder.rglob("*"):
            if path.is_file():
                found.append((path, lambda p, c, read=read: noticed_in_store(read, p, c)))
    publish_into(tmp_path / "published")
    a_notebook(tmp_path / "01_a")
    write_atomically(tmp_path / "together.json", sealed({"policies": 3}))
    checkpoints = Checkpoints(tmp_path / "scratch")
    for step in (1, 2):
        path = checkpoints.save(step, {"weight": torch.arange(60) + step})

    def of_checkpoint(path, content):
        with pytest.warns(CorruptCheckpointWarning, match=str(path)):
            return int(checkpoints.newest()["weight"][0]) == 1

    def of_published(path, _):
        return raises_damaged(lambda: published(SMOKE, 0, tmp_path / "published"), path)

    def of_notebook(path, _):
        with pytest.warns(DamagedResultWarning, match=str(path)):
            return run.finished_record(tmp_path / "01_a") is None

    found.append((path, of_checkpoint))
    found.append((tmp_path / "together.json", lambda p, _: raises_damaged(lambda: runs.unsealed(p), p)))
    for folder, notices in ((tmp_path / "published", of_published), (tmp_path / "01_a", of_notebook)):
        found += [(path, notices) for path in folder.rglob("*") if path.is_file()]
    return found


def test_every_flipped_bit_is_noticed_whatever_the_file(kept, tmp_path):
    kinds = {path.name for path, _ in kept}
    assert {"policies.parquet", "model.safetensors", "features.safetensors", "log.parquet"} <= kinds
    assert {"run.json", "done.json", "together.json", "left_out.json", "runs.parquet"} <= kinds
    assert len(published(SMOKE, 0, tmp_path / "published").names) == 1
    random, noticed = np.random.default_rng(0), 0
    for k in range(FLIPS):
        path, notices = kept[k % len(kept)]
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[random.integers(len(damaged))] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        noticed += notices(path, content)
        path.write_bytes(content)
    assert noticed == FLIPS


@pytest.mark.parametrize("how", ["cut", "emptied", "lost"])
def test_cut_and_lost_files_are_named_and_computed_again(kept, how):
    for path, notices in kept:
        content = path.read_bytes()
        if how == "lost" and (path.parent.name == "scratch" or path.name == "done.json"):
            continue  # without the file there is nothing that could miss it
        path.unlink()
        if how != "lost":
            path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
        assert notices(path, content), path
        path.write_bytes(content)


def test_a_store_that_only_reads_lacks_what_is_damaged(tmp_path):
    folder = RunStore(tmp_path).folder("study", write_study, {})
    (folder / "log.parquet").write_bytes(b"")
    with pytest.warns(DamagedResultWarning, match="log.parquet"), pytest.raises(NotKeptError):
        RunStore(tmp_path, reads_only=True).folder("study", write_study, {})


def test_published_results_are_as_they_were_published():
    assert len(list(PUBLISHED.glob("*/runs.parquet"))) == 2
    for folder in PUBLISHED.iterdir():
        assert set(runs.read_record(folder)["files"]) == {path.name for path in folder.glob("*.parquet")}


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[" * 10_000, b'{"files": 3}', b"null"])
def test_status_and_report_survive_damaged_records(tmp_path, capsys, content):
    (tmp_path / ".vaalign").touch()
    a_notebook(tmp_path / "01_bandit")
    (tmp_path / "01_bandit" / "done.json").write_bytes(content)
    damaged = tmp_path / "store" / "table-0123456789abcdef"
    damaged.mkdir(parents=True)
    (damaged / "run.json").write_bytes(content)
    (damaged / "table.parquet").write_bytes(content)
    options = ["--profile", "smoke", "--run-dir", str(tmp_path)]
    with pytest.warns(DamagedResultWarning, match="done.json is damaged"):
        assert main(["status", *options]) == 0
    assert re.search(r"01_bandit +missing", capsys.readouterr().out)
    with pytest.warns(DamagedResultWarning):
        assert main(["report", *options]) == 0


def test_checking_costs_little_beside_reading(tmp_path):
    """The share is printed, of seconds of the processor."""
    random = np.random.default_rng(0)
    pd.DataFrame(random.random((200_000, 8)).round(4)).rename(columns=str).to_parquet(
        tmp_path / "table.parquet"
    )
    save_file({"weight": torch.rand(3_000_000)}, tmp_path / "model.safetensors")
    write_record(tmp_path, {})

    def seconds(work):
        best = []
        for _ in range(5):
            started = time.process_time()
            work()
            best.append(time.process_time() - started)
        return min(best)

    def read():
        pd.read_parquet(tmp_path / "table.parquet")
        load_file(tmp_path / "model.safetensors")["weight"].double().sum()

    share = seconds(lambda: runs.read_record(tmp_path)) / seconds(read)
    print(f"checking takes {share:.2f} of reading")
    assert share < 0.5


# --- what killed processes leave ------------------------------------------------------------------------

LEAVES = """
import os, sys
from pathlib import Path
from vaalign_lib import store as runs
root = Path(sys.argv[1])
with runs.new_folder(root / "study-0123456789abcdef") as folder:
    (folder / "half").write_bytes(bytes(1000))
    with runs.unfinished(root / "report.html"):
        os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    subprocess.run(
        [sys.executable, "-c", LEAVES, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(runs.PACKAGE.parent)},
    )
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and all(name.endswith(".unfinished") for name in left)
    theirs = [tmp_path / name for name in (".git", ".x.unfinished", ".a.b.unfinished")]
    for path in theirs:
        path.mkdir()
    with runs.new_folder(tmp_path / "mine") as living:
        runs.remove_unfinished(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([*theirs, living])
    RunStore(tmp_path).table("table", table_of, {"size": 1})  # a store clears its folder by itself
    assert not [path for path in tmp_path.glob(".*.unfinished") if path not in theirs]


def test_a_folder_that_another_process_takes_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    """Between its making and its lock it looks like one."""
    make, made = runs.tempfile.mkdtemp, []

    def taken_twice(**place):
        made.append(make(**place))
        if len(made) < 3:
            runs.remove_unfinished(tmp_path)
        return made[-1]

    monkeypatch.setattr(runs.tempfile, "mkdtemp", taken_twice)
    with runs.new_folder(tmp_path / "result") as folder:
        (folder / "file").touch()
        runs.remove_unfinished(tmp_path)
    assert len(made) == 3 and (tmp_path / "result" / "file").exists()


def test_a_killed_run_clears_its_own_leftovers_when_it_goes_on(tmp_path):
    """`.step` of this library, `.tmp` of safetensors."""
    store, scratch = RunStore(tmp_path), []

    def write(folder, scratch):
        names = {path.name for path in scratch.iterdir()}
        assert names == {".lock", "together.json"}

    place = store.place("run", write, {})
    scratch = tmp_path / f"{place.name}.scratch"
    scratch.mkdir()
    for name in (".step-abcd", ".step.abcd1234.unfinished", ".tmpAbC123", "together.json"):
        (scratch / name).write_bytes(bytes(100))
    (scratch / ".part-0123.abcd1234.unfinished").mkdir()
    assert store.resumable("run", write, {}) == place and not scratch.exists()
    scratch.mkdir()  # killed between the result and the end of the scratch folder
    store.resumable("run", write, {})
    assert not scratch.exists()
