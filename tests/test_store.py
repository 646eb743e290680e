"""The run store: keys from what determines a result, nothing half-written, nothing computed twice; and
checkpoints, whole or not at all.
"""

import errno
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch

from vaalign_lib import store as runs
from vaalign_lib.store import (
    Checkpoints,
    CorruptCheckpointWarning,
    DiskFullError,
    RunDirectoryBusyError,
    RunStore,
    content_key,
    locked,
    new_folder,
    source_hashes,
    write_atomically,
)

CALLS = []


def table_of(size: int) -> pd.DataFrame:
    CALLS.append(size)
    return pd.DataFrame({"x": range(size)})


@pytest.fixture(autouse=True)
def _count_calls(monkeypatch):
    CALLS.clear()
    # the functions of this file are no part of the library; give them a source to hash
    monkeypatch.setattr(runs, "source_hashes", lambda module: {"source": SOURCE[0]})
    SOURCE[0] = "first"


SOURCE = ["first"]


def test_a_table_is_computed_once_per_config(tmp_path):
    store = RunStore(tmp_path)
    first = store.table("t", table_of, {"size": 3})
    again = RunStore(tmp_path).table("t", table_of, {"size": 3})
    store.table("t", table_of, {"size": 4})
    assert CALLS == [3, 4]
    pd.testing.assert_frame_equal(first, again)


def test_a_changed_source_is_computed_again(tmp_path):
    store = RunStore(tmp_path)
    store.table("t", table_of, {"size": 3})
    SOURCE[0] = "second"
    store.table("t", table_of, {"size": 3})
    assert CALLS == [3, 3]


def test_a_failure_leaves_nothing(tmp_path):
    def fails(size: int) -> pd.DataFrame:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        RunStore(tmp_path).table("t", fails, {"size": 3})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_folders_do_not_appear(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "result") as folder:
        (folder / "half").write_text("...")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with new_folder(tmp_path / "result") as folder:
            (folder / "whole").write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result" / "whole").read_text() == "second"


def test_interrupted_files_keep_their_old_content(tmp_path, monkeypatch):
    file = tmp_path / "file"
    write_atomically(file, "old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full_disk)
    with pytest.raises(DiskFullError, match=f"{tmp_path}: the disk is full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_keys_depend_on_content_and_not_on_order():
    assert content_key(a=1, b=[1, 2]) == content_key(b=[1, 2], a=1)
    assert content_key(a=1) != content_key(a=2)
    assert content_key(a=1) != content_key(b=1)
    with pytest.raises(TypeError, match="cannot make a key of object"):
        content_key(a=object())


def test_source_hashes_follow_imports(monkeypatch):
    monkeypatch.undo()
    theory = source_hashes("vaalign_lib.theory.bounds")
    assert {"vaalign_lib.theory.bounds", "vaalign_lib.theory.tabular"} <= set(theory)
    assert "vaalign_lib.reproduce.cli" not in theory
    assert "vaalign_lib.figures.theory" not in source_hashes("vaalign_lib.theory.simulations")


def test_two_processes_cannot_use_one_run_folder(tmp_path):
    code = textwrap.dedent(
        f"""
        from pathlib import Path
        from vaalign_lib.store import RunDirectoryBusyError, locked
        try:
            with locked(Path({str(tmp_path)!r})):
                print("entered")
        except RunDirectoryBusyError as error:
            print(error)
        """
    )
    with locked(tmp_path):
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is in use by another process" in inside.stdout
    assert after.stdout.strip() == "entered"
    with locked(tmp_path), pytest.raises(RunDirectoryBusyError), locked(tmp_path):
        pass


# --- checkpoints ----------------------------------------------------------------------------------------


def state(step):
    return {"weight": torch.full((3,), float(step)), "count": torch.tensor(step)}


def test_the_newest_state_comes_back_and_two_are_kept(tmp_path):
    kept = Checkpoints(tmp_path / "scratch")
    assert kept.newest() is None
    for step in (5, 90, 100):
        kept.save(step, state(step))
    assert torch.equal(kept.newest()["weight"], torch.full((3,), 100.0))
    assert len(list((tmp_path / "scratch").iterdir())) == 2


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1))
    path = kept.save(2, state(2))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-4]), "emptied": b""}[how])
    with pytest.warns(CorruptCheckpointWarning, match="damaged"):
        assert int(kept.newest()["count"]) == 1
    assert not path.exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device")]
)
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, error):
    kept = Checkpoints(tmp_path)
    kept.save(1, state(1))

    def full(*_):
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DiskFullError, match=r"disk is full.*last checkpoint"):
        kept.save(2, state(2))
    assert int(kept.newest()["count"]) == 1 and len(list(tmp_path.iterdir())) == 1


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Checkpoints(tmp_path).save(1, state(1))
    assert not list(tmp_path.iterdir())
