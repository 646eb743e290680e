"""Run folders: only what this program wrote is removed; other folders are refused and stay."""

import json
import os
import subprocess

import pytest

from tests.reproduce.test_reproduce import run, write_notebook
from vaalign_lib.reproduce import run as module
from vaalign_lib.reproduce.cli import main
from vaalign_lib.reproduce.run_folder import MARK, UsageError, check, hashes, make_way, opened
from vaalign_lib.store import ROOT


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def everything(folder):
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Return the folder of notebooks; of these the source of the last cell is what comes of a run."""

    def execute(notebook, folder, *_):
        (folder / "figures").mkdir()
        fill(folder, "executed.ipynb")
        return json.loads(notebook.read_text())["cells"][-1]["source"] or None

    monkeypatch.setattr("vaalign_lib.reproduce.execute.execute", execute)
    monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks"


FOREIGN = {
    "a git repository": (".git/HEAD", ".git/objects/ab/c", ".env", ".ssh/id", "code.py"),
    "a home": (".bashrc", ".cache/x", ".local/share/y", "Documents/thesis.tex"),
    "one file": ("notes.txt",),
    "one dot file": (".env",),
    "a lock of others": (".lock",),
    "a report of others": ("report.html",),
    "a store beside others' files": ("store/x", "letter.txt"),
    "a plan of others": (".plan", "store/x"),
    "a folder named as a notebook's": ("01_taxes/2024.ods",),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", [["reproduce"], ["reproduce", "--force"], ["report"], ["plan"]])
def test_a_folder_of_other_things_is_refused_and_stays(tmp_path, capsys, kind, command):
    fill(tmp_path, *FOREIGN[kind])
    before = everything(tmp_path)
    assert main([*command, "--profile", "smoke", "--run-dir", str(tmp_path)]) == 2
    assert "is not empty and is no run folder of vaalign" in capsys.readouterr().err
    assert everything(tmp_path) == before
    with pytest.raises(UsageError), opened(tmp_path):
        pass


def test_what_others_put_into_a_run_folder_stays(study, tmp_path):
    write_notebook(study, "01_first", "")
    (tmp_path / "run").mkdir()
    with opened(tmp_path / "run"):
        pass
    theirs = (".git/HEAD", ".env", ".ssh/id", ".x.partial/y", ".01_a.mine/z", "a.txt", "store/.env/x")
    fill(tmp_path / "run", *theirs)
    for _ in range(2):
        assert run(tmp_path, force=True)[0] == ["done"]
    assert all((tmp_path / "run" / name).read_text() == name for name in theirs)


@pytest.mark.parametrize("change", ["added", "edited", "linked", "failed", "not recorded"])
def test_a_notebooks_folder_with_other_things_is_moved_aside(study, tmp_path, change, capsys):
    write_notebook(study, "01_first", "")
    folder, elsewhere = tmp_path / "run" / "01_first", tmp_path / "elsewhere"
    assert run(tmp_path)[0] == ["done"]
    if change == "added":
        fill(folder, "figures/mine.txt")
    elif change == "edited":
        (folder / "executed.ipynb").write_text("mine")
    elif change == "linked":
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
    elif change == "failed":
        folder = folder.with_name("01_first.failed")
        fill(folder, "mine.txt")
    else:
        (folder / "done.json").unlink()
    before = hashes(folder.resolve())
    assert run(tmp_path, force=True)[0] == ["done"]
    assert hashes(folder.with_name(f"{folder.name}.aside-1").resolve()) == before
    assert f"now {folder}.aside-1" in capsys.readouterr().err
    assert run(tmp_path, force=True)[0] == ["done"]
    assert not folder.with_name(f"{folder.name}.aside-2").exists()  # its own it replaces


def test_taking_and_failing_spare_other_things_too(study, tmp_path, monkeypatch):
    write_notebook(study, "01_first", "it fails")
    assert run(tmp_path)[0] == ["failed"]
    fill(tmp_path / "run" / "01_first.failed", "mine.txt")
    fill(tmp_path / "run" / "01_first", "mine.txt")
    assert run(tmp_path)[0] == ["failed"]
    assert (tmp_path / "run" / "01_first.failed.aside-1" / "mine.txt").is_file()
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "findings").mkdir()
    (tmp_path / "findings" / "01_first.json").write_text('{"figures": [], "tables": []}')
    assert run(tmp_path, from_results=True)[0] == ["taken"]
    assert (tmp_path / "run" / "01_first.aside-1" / "mine.txt").is_file()


def test_links(tmp_path):
    other, empty = tmp_path / "other", tmp_path / "empty"
    fill(other, "letter.txt")
    empty.mkdir()
    for name, target in (("to_other", other), ("to_empty", empty), ("loop", tmp_path / "loop")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("to_other", "loop", "loop/x", "dangling", "other/letter.txt"):
        with pytest.raises(UsageError):
            check(tmp_path / name)
    with opened(check(tmp_path / "to_empty")):
        pass
    assert (empty / MARK).is_file()
    (empty / ".01_a.partial").symlink_to(other)  # a link inside is not ours
    (empty / "store").mkdir()
    link = empty / "store" / ".table-0123456789abcdef.retired"
    link.symlink_to(other)
    os.utime(link, (0, 0), follow_symlinks=False)
    with opened(empty):
        pass
    assert (other / "letter.txt").is_file() and link.is_symlink()
    assert (empty / ".01_a.partial").is_symlink()


def test_leftovers_go_and_what_was_being_replaced_comes_back(tmp_path):
    """In a run folder of the version before the mark, as a killed run left it."""
    old, new = "store/.t-0123456789abcdef.retired", "store/.t-0123456789abcdef.ab_cd123"
    gone = (".01_a.partial", ".03_c.abcd_123", "store/.u-0123456789abcdef.ab_cd123")
    for name in (*gone, ".02_b.retired", old, new, "01_a", "interactive"):
        (tmp_path / name).mkdir(parents=True)
    os.utime(tmp_path / gone[2], (0, 0))
    (tmp_path / ".lock").touch()
    (tmp_path / ".plan").write_text("0123456789abcdef")
    (tmp_path / ".report.html.abcd_123").touch()
    with opened(check(tmp_path)):
        names = {path.name for path in tmp_path.iterdir()}
    assert names == {".lock", ".plan", MARK, "01_a", "02_b", "interactive", "store"}
    left = {path.name for path in (tmp_path / "store").iterdir()}
    assert left == {
        "t-0123456789abcdef",
        new.removeprefix("store/"),
    }  # a JupyterLab may be writing the new one


def test_a_report_alone_is_known_as_ours(tmp_path, capsys):
    assert main(["report", "--profile", "smoke", "--run-dir", str(tmp_path)]) == 0
    (tmp_path / MARK).unlink(missing_ok=True)
    check(tmp_path)
    capsys.readouterr()


@pytest.mark.parametrize("command", ["report", "publish", "status", "plan"])
def test_a_mistyped_run_folder_is_not_made(tmp_path, capsys, command):
    folder = tmp_path / "mistyped"
    assert main([command, "--profile", "smoke", "--run-dir", str(folder)]) == 2
    assert f"there is no {folder}" in capsys.readouterr().err and not folder.exists()


def test_making_way_for_nothing(tmp_path):
    make_way(tmp_path / "missing")
    assert not list(tmp_path.iterdir())


def test_make_clean_removes_what_make_and_tests_made(tmp_path):
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    kept = ("runs/embedded/store/x", "build/mine", "mine.egg-info/x", "home/.ssh/id", ".venv/x")
    fill(tmp_path, *kept, "build/lib/x", ".mypy_cache/CACHEDIR.TAG", "vaalign.egg-info/x")
    for variables in ([], [f"VENV={tmp_path}/home"]):
        subprocess.run(["make", "-s", "clean", *variables], cwd=tmp_path, check=True)
    assert all((tmp_path / name).is_file() for name in kept)
    assert not (tmp_path / "build" / "lib").exists()
    assert not (tmp_path / "vaalign.egg-info").exists()
    fill(tmp_path, ".venv/pyvenv.cfg")  # now it is an environment
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path, check=True)
    assert not (tmp_path / ".venv").exists()
