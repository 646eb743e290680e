"""Checkpoints: whole or not at all, the newest that is whole, a full disk."""

import errno

import pytest
import torch

from vaalign_lib.store import Checkpoints, CorruptCheckpointWarning, DiskFullError


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
