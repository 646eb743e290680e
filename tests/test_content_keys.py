"""What a key covers is checked by content: never by a name, a size, both ends or a date."""

import os
import shutil

import pytest

from vaalign_lib import store as runs
from vaalign_lib.experiments import policies
from vaalign_lib.experiments.conditions import Condition
from vaalign_lib.experiments.reward_models import RewardStudy, prepare
from vaalign_lib.profiles import Study, load_profile, local_files
from vaalign_lib.reproduce import run
from vaalign_lib.store import RunStore, content_of, read_once, source_hashes

SMOKE = load_profile("smoke")
FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "merges.txt",
    "chat_template.jinja",
    "1_Pooling/config.json",
)

PROMPTS = "merges.txt"  # one of them, in place of a file of prompts


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(3 * 2**20) if "safetensors" in name else bytes(30))
    return folder


def change_in_place(path):
    """Change one byte in the middle; size and date stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def recorded_config(study):
    class Recorder:
        def folder(self, name, write, config, inputs=None):
            self.config = config

    object.__setattr__(study, "store", Recorder())
    study.reward_model  # noqa: B018
    return study.store.config


def keys(folder, tmp_path):
    """Return every key that covers a folder that a user names."""
    named = str(folder)
    reference = SMOKE.reference.model_copy(update={"models": dict.fromkeys(SMOKE.reference.models, named)})
    judged = SMOKE.model_copy(update={"true_reward": named})
    started = SMOKE.model_copy(update={"reference": reference})
    real = SMOKE.policies.model_copy(update={"data": f"{named}/{PROMPTS}"})
    store, book = RunStore(tmp_path / "store"), run.notebooks()[2]
    setting = [run.notebook_key(book, SMOKE, 0, {name: named}) for name in ("backbone", "results")]
    return {
        "--set backbone": setting[0],
        "--set results": setting[1],
        "a stack's true reward": policies.settings_key(judged, 0, Condition("gpt2", "ensemble")),
        "what a stack starts from": policies.settings_key(started, 0, Condition("gpt2", "judge-a")),
        "a notebook's profile": run.notebook_key(book, judged, 0),
        "pairs made with a reference": store.place("pairs", keys, {}, {"reference": folder}).name,
        "a reward model": recorded_config(
            RewardStudy(store, SMOKE, data=None, data_folder=tmp_path, backbone=named)
        ),
        "prompts": local_files(SMOKE.model_copy(update={"policies": real})),
    }


@pytest.mark.parametrize("file", FILES)
def test_one_changed_byte_in_any_file_changes_every_key(model, tmp_path, file):
    before = keys(model, tmp_path)
    assert before == keys(model, tmp_path)
    change_in_place(model / file)
    after = keys(model, tmp_path)
    same = {name for name in before if before[name] == after[name]}
    assert same == (set() if file == PROMPTS else {"prompts"})


def test_a_file_that_is_added_or_lost_counts(model, tmp_path):
    before = keys(model, tmp_path)
    (model / "adapter_config.json").write_text("{}")
    assert sum(before[name] == value for name, value in keys(model, tmp_path).items()) == 1
    (model / "adapter_config.json").unlink()
    assert keys(model, tmp_path) == before
    (model / "chat_template.jinja").unlink()
    assert sum(before[name] == value for name, value in keys(model, tmp_path).items()) == 1


def test_pairs_are_keyed_by_content(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(RunStore, "folder", lambda self, name, write, config: found.append(config) or 1 / 0)
    for text in ("a", "b"):
        (tmp_path / "pairs.jsonl").write_text(text)
        with pytest.raises(ZeroDivisionError):
            prepare(
                Study(RunStore(tmp_path), SMOKE, 0),
                reference=None,
                pairs=str(tmp_path / "pairs.jsonl"),
                backbone="x",
            )
    assert found[0] != found[1] and found[0] | {"hashes": 0} == found[1] | {"hashes": 0}


def test_names_are_names(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert content_of("") == "" and content_of("org/model") == "org/model"
    (tmp_path / "model").write_text("x")
    assert content_of("model") == runs.file_hash(tmp_path / "model")


def test_a_source_counts_by_its_text_and_not_by_its_date(tmp_path, monkeypatch):
    path = tmp_path / "one.py"
    path.write_text("x = 1\n")
    monkeypatch.setattr(runs, "_module_path", lambda name: path)
    before = source_hashes("vaalign_lib.one")
    change_in_place(path)
    assert path.read_text() != "x = 1\n"
    path.write_text("x = 2\n")
    assert source_hashes("vaalign_lib.one") != before


def test_in_a_block_every_file_is_read_once(model, monkeypatch):
    read = []
    monkeypatch.setattr(runs, "file_hash", lambda path: read.append(path) or path.name)
    with read_once():
        for _ in range(3):
            content_of(model)
            with read_once():
                content_of(model / "merges.txt")
    assert len(read) == len(FILES) == len(set(read))
    content_of(model)
    assert len(read) == 2 * len(FILES)


def test_a_moved_model_is_the_same(model, tmp_path):
    shutil.copytree(model, tmp_path / "moved")
    assert content_of(model) == content_of(tmp_path / "moved")
