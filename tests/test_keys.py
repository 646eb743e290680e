"""What a result is kept under covers the code that computes it, and no other."""

import shutil

import pytest

from vaalign_lib import store
from vaalign_lib.experiments.conditions import ENSEMBLE_ROW, JUDGE_ROW, Condition
from vaalign_lib.experiments.policies import _code
from vaalign_lib.experiments.trl import CODE as TRL_CODE
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.store import PACKAGE, RunStore, source_hashes


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a copy of the library that may be edited."""
    copy = tmp_path / PACKAGE.name
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "PACKAGE", copy)
    return copy


def key_of(row, folder):
    """Return the code that a stack of a row is kept under."""
    return source_hashes(*_code(Study(RunStore(folder), load_profile("smoke")), Condition(*row)))


@pytest.mark.parametrize("room", ["store.py", "jobs.py", "figures", "experiments", "reproduce", "papers"])
def test_rooms_that_compute_nothing_make_no_trained_stack_stale(room, package, tmp_path):
    before = [key_of(row, tmp_path) for row in (JUDGE_ROW, ENSEMBLE_ROW)]
    edited = package / room
    for path in [edited] if edited.is_file() else edited.rglob("*.py"):
        path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert [key_of(row, tmp_path) for row in (JUDGE_ROW, ENSEMBLE_ROW)] == before


@pytest.mark.parametrize(
    ("file", "judges", "ensembles"),
    [
        ("training/losses.py", True, True),
        ("training/ppo.py", True, True),
        ("training/matched_kl.py", True, True),
        ("policies/stack.py", True, True),
        ("rewards/base.py", True, True),
        ("models.py", True, True),
        ("data/world/attributes.py", True, True),
        ("rewards/simulated_judge.py", True, False),
        ("rewards/heads.py", False, True),
        ("training/trl.py", False, False),
        ("theory/simulations.py", False, False),
    ],
)
def test_what_computes_a_stack_makes_it_stale(file, judges, ensembles, package, tmp_path):
    before = [key_of(row, tmp_path) for row in (JUDGE_ROW, ENSEMBLE_ROW)]
    path = package / file
    path.write_text(path.read_text() + '\n"""Told again."""  # and a comment\n')
    path.write_text(path.read_text() + "\nEDITED = 1\n")
    moved = [key_of(row, tmp_path) != one for row, one in zip((JUDGE_ROW, ENSEMBLE_ROW), before, strict=True)]
    assert moved == [judges, ensembles]


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("training/trl_runs.py", True),
        ("training/trl.py", True),
        ("training/ppo.py", True),
        ("rewards/simulated_judge.py", True),
        ("data/world/grammar.py", True),
        ("rewards/heads.py", False),
        ("theory/tabular.py", False),
        ("experiments/trl.py", False),
        ("figures/trl.py", False),
    ],
)
def test_what_trains_the_policies_of_notebook_09_makes_them_stale(file, stale, package):
    before = source_hashes(*TRL_CODE)
    path = package / file
    path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert (source_hashes(*TRL_CODE) != before) == stale


def test_comments_and_docstrings_do_not_count(package, tmp_path):
    before = key_of(JUDGE_ROW, tmp_path)
    path = package / "training" / "losses.py"
    path.write_text("# said before\n" + path.read_text().replace('"""', '"""Said otherwise. ', 1))
    assert key_of(JUDGE_ROW, tmp_path) == before
