"""What a result is kept under covers the code that computes it, and no other."""

import shutil

import pandas as pd
import pytest

from vaalign_lib import store
from vaalign_lib.experiments import policies
from vaalign_lib.experiments.compare import CODE as COMPARE_CODE
from vaalign_lib.experiments.conditions import ENSEMBLE_ROW, JUDGE_ROW, PLACEBO, Condition
from vaalign_lib.experiments.policies import _code, ensemble_folder
from vaalign_lib.experiments.reward_models import prepare
from vaalign_lib.experiments.robust_policies import CODE as ROBUST_CODE
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


def key_of(row, folder, **condition):
    """Return the code that a stack of a row is kept under."""
    return source_hashes(*_code(Study(RunStore(folder), load_profile("smoke")), Condition(*row, **condition)))


@pytest.mark.parametrize("room", ["store.py", "jobs.py", "figures", "experiments", "reproduce", "papers"])
def test_rooms_that_compute_nothing_make_no_trained_stack_stale(room, package, tmp_path):
    before = [key_of(row, tmp_path) for row in (JUDGE_ROW, ENSEMBLE_ROW)]
    edited = package / room
    for path in [edited] if edited.is_file() else edited.rglob("*.py"):
        path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert [key_of(row, tmp_path) for row in (JUDGE_ROW, ENSEMBLE_ROW)] == before


class Recorder(RunStore):
    """A store that notes the code behind every folder, and computes none."""

    code: dict = {}  # noqa: RUF012

    def folder(self, name, write, config, inputs=None, code=()):
        self.code[name] = source_hashes(*(code or (write.__module__,)))
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame({"prompt": ["p"], "part": "train", "gold_chosen": 1.0})
        table.to_parquet(folder / "pairs.parquet")
        return folder


def reward_folders(folder):
    """Return the code that references, pairs, reward models, features and ensembles are kept under."""
    Recorder.code = {}
    study = Study(Recorder(folder), load_profile("smoke"))
    ensemble_folder(study, Condition(*ENSEMBLE_ROW))
    trained = prepare(study, reference=folder)
    trained._features("train"), trained.backbones_folder
    drawn = Recorder.code.copy()
    prepare(study, reference=None, pairs=str(folder / "x.jsonl"), backbone="my/model")
    return drawn | {"real pairs": Recorder.code["pairs"]}


@pytest.mark.parametrize("room", ["store.py", "jobs.py", "figures", "experiments", "training", "reproduce"])
def test_rooms_that_compute_no_reward_make_no_pairs_and_no_ensemble_stale(room, package, tmp_path):
    before = reward_folders(tmp_path)
    edited = package / room
    for path in [edited] if edited.is_file() else edited.rglob("*.py"):
        path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert reward_folders(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("policies/sampling.py", {"reference-gpt2", "pairs"}),
        ("rewards/pairs.py", {"real pairs"}),
        ("rewards/heads.py", {"ensemble", "backbones"}),
        ("rewards/backbones.py", {"backbones"}),
        ("rewards/classifier.py", {"real pairs", "reward-model", "features-train", "backbones", "ensemble"}),
    ],
)
def test_what_computes_a_reward_makes_it_stale(file, stale, package, tmp_path):
    before = reward_folders(tmp_path)
    (package / file).write_text((package / file).read_text() + "\nEDITED = 1\n")
    assert {name for name, code in reward_folders(tmp_path).items() if code != before[name]} == stale


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
    ("file", "placebo", "contrasts"),
    [
        ("training/losses.py", True, True),
        ("rewards/placebo.py", True, False),
        ("rewards/simulated_judge.py", True, False),
        ("rewards/contrasts.py", False, True),
        ("theory/simulations.py", False, False),
    ],
)
def test_what_weighs_a_penalty_makes_its_stacks_stale_and_no_other(
    file, placebo, contrasts, package, tmp_path
):
    def keys():
        return [
            key_of(JUDGE_ROW, tmp_path, objective=PLACEBO),
            key_of(("gpt2", "contrasts"), tmp_path, objective="variance_aware"),
            key_of(JUDGE_ROW, tmp_path, objective="variance_aware"),
            key_of(ENSEMBLE_ROW, tmp_path, objective="variance_aware"),
        ]

    before, path = keys(), package / file
    path.write_text(path.read_text() + "\nEDITED = 1\n")
    moved = [one != other for one, other in zip(keys(), before, strict=True)]
    assert moved[:2] == [placebo, contrasts]
    if file in ("rewards/placebo.py", "rewards/contrasts.py"):
        assert moved[2:] == [False, False]


def test_an_ensemble_is_in_the_key_of_its_contrasts_by_its_folder(tmp_path, monkeypatch):
    """Their own code scores nothing; what scores is in the key of the folder that they load."""
    study, run = Study(RunStore(tmp_path), load_profile("smoke")), Condition("gpt2", "contrasts")
    monkeypatch.setattr(policies, "reference", lambda *_: tmp_path / "reference")
    monkeypatch.setattr(policies, "ensemble_folder", lambda *_: tmp_path / "ensemble-of-some-key")
    assert policies._inputs(study, run)["ensemble"] == tmp_path / "ensemble-of-some-key"
    inputs = [{"ensemble": tmp_path / name} for name in ("ensemble-of-some-key", "ensemble-of-another")]
    assert len({study.store.place("stack", keys_of_nothing, {}, one).name for one in inputs}) == 2


def keys_of_nothing():
    """Stand for what fills a folder."""


CODES = {"trl": TRL_CODE, "robust": ROBUST_CODE, "compare": COMPARE_CODE}


@pytest.mark.parametrize(
    ("file", "stale"),
    [
        ("training/losses.py", {"trl", "robust", "compare"}),
        ("training/ppo.py", {"trl", "robust", "compare"}),
        ("training/objectives.py", {"trl", "robust", "compare"}),
        ("training/evaluation.py", {"trl", "robust", "compare"}),
        ("policies/sampling.py", {"trl", "robust", "compare"}),
        ("rewards/base.py", {"trl", "robust", "compare"}),
        ("training/trl_runs.py", {"trl"}),
        ("training/trl.py", {"trl"}),
        ("rewards/simulated_judge.py", {"trl", "robust"}),
        ("data/world/grammar.py", {"trl", "robust", "compare"}),
        ("rewards/robust.py", {"robust"}),
        ("rewards/heads.py", {"robust"}),
        ("rewards/classifier.py", {"robust"}),
        ("theory/robust.py", {"robust"}),
        ("policies/reference_pairs.py", {"robust"}),  # writes what rewards are standardized over
        ("training/matched_kl.py", {"compare"}),
        ("rewards/ensemble.py", set()),  # a user's source is known by what it answers, see `known_by`
        ("theory/tabular.py", set()),
    ],
)
def test_what_trains_the_stacks_of_trl_of_robust_rewards_and_of_compare_makes_them_stale(
    file, stale, package
):
    before = {name: source_hashes(*code) for name, code in CODES.items()}
    path = package / file
    path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert {name for name, code in CODES.items() if source_hashes(*code) != before[name]} == stale


@pytest.mark.parametrize("room", ["store.py", "jobs.py", "figures", "experiments", "reproduce", "papers"])
@pytest.mark.parametrize("name", CODES)
def test_rooms_that_compute_nothing_make_none_of_these_stale(name, room, package):
    before = source_hashes(*CODES[name])
    edited = package / room
    for path in [edited] if edited.is_file() else edited.rglob("*.py"):
        path.write_text(path.read_text() + "\nEDITED = 1\n")
    assert source_hashes(*CODES[name]) == before


def test_comments_and_docstrings_do_not_count(package, tmp_path):
    before = key_of(JUDGE_ROW, tmp_path)
    path = package / "training" / "losses.py"
    path.write_text("# said before\n" + path.read_text().replace('"""', '"""Said otherwise. ', 1))
    assert key_of(JUDGE_ROW, tmp_path) == before


def test_what_a_judge_is_asked_is_in_the_key(tmp_path, monkeypatch):
    study = Study(RunStore(tmp_path), load_profile("smoke"))
    condition = Condition(*JUDGE_ROW)
    before = policies._computed_from(study, condition, None)
    monkeypatch.setattr(policies, "judge_prompt", lambda text, highest: "asked otherwise")
    assert policies._computed_from(study, condition, None) != before
