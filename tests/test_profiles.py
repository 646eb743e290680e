"""Profiles: what is shipped loads, what is wrong is refused by name."""

import pytest
import yaml

from vaalign_lib.paths import PROFILES
from vaalign_lib.profiles import ProfileError, available_profiles, load_profile, local_files


def changed(tmp_path, **changes):
    content = yaml.safe_load((PROFILES / "smoke.yaml").read_text())
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = content
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_shipped_profiles_load_under_their_own_name():
    assert {"smoke", "embedded", "paper"} <= set(available_profiles())
    for name in available_profiles():
        assert load_profile(name).name == name


def test_smoke_is_smaller_than_embedded():
    smoke, embedded = load_profile("smoke"), load_profile("embedded")
    assert smoke.bandit.many_draws < embedded.bandit.many_draws
    assert smoke.theorems.draws < embedded.theorems.draws


def test_a_profile_can_be_a_file(tmp_path):
    file = changed(tmp_path, name="mine", bandit__draws=500)
    assert load_profile(file).bandit.draws == 500
    assert load_profile(str(file)).name == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"policies__training__gpt2__ppo__foo": 1},
            r"policies\.training\.gpt2\.ppo\.foo: unknown key; allowed here: iterations, ",
        ),
        (
            {"policies__training__gpt2__variance_aware": {"learning_rate": -1.0}},
            r"policies\.training\.gpt2",
        ),
        ({"bandit__drawz": 5}, r"bandit\.drawz: unknown key; allowed here: draws, many_draws"),
        ({"colour": "red"}, r"colour: unknown key; allowed here: name, description, bandit"),
        ({"bandit__draws": "many"}, r"bandit\.draws: .*valid integer, got 'many'"),
        ({"bandit__draws": 1000.5}, r"bandit\.draws: .*integer, got 1000\.5"),
        ({"bandit__draws": True}, r"bandit\.draws: .*valid integer, got True"),
        ({"bandit__draws": -5}, r"bandit\.draws: .*greater than or equal to 100, got -5"),
        ({"theorems__instances": 1}, r"theorems\.instances: .*greater than or equal to 20, got 1"),
        ({"theorems__draws": None}, r"theorems\.draws: missing; expected draws of the estimates"),
        (
            {"reward_model__optimizer": "sgd"},
            r"reward_model\.optimizer: .*'adamw_torch'.*got 'sgd'",
        ),
        ({"reward_model__device_batch_size": 5}, r"reward_model: .*32 must be a multiple of .* 5"),
        (
            {"reward_model__pretrained__lr": 1},
            r"pretrained\.lr: unknown key; allowed here: learning_rate",
        ),
        ({"reference__models__gpt2": 3}, r"reference\.models\.gpt2: .*valid string, got 3"),
        ({"name": "Not A Name"}, r"name: .*pattern"),
    ],
)
def test_wrong_content_is_refused_with_key_and_what_is_allowed(tmp_path, changes, words):
    with pytest.raises(ProfileError, match=words):
        load_profile(changed(tmp_path, **changes))


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="choose one of embedded, extended, paper, smoke"):
        load_profile("embeded")
    broken = tmp_path / "broken.yaml"
    broken.write_text("bandit: [1, 2")
    with pytest.raises(ProfileError, match="not valid YAML"):
        load_profile(broken)
    broken.write_text("just words")
    with pytest.raises(ProfileError, match="expected a mapping"):
        load_profile(broken)


def test_paths_are_relative_to_the_profile(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pairs.jsonl").write_text("{}")
    (tmp_path / "mine" / "policy").mkdir()
    (tmp_path / "mine" / "policy" / "model.safetensors").write_bytes(b"weights")
    path = tmp_path / "mine" / "mine.yaml"
    path.write_text(
        "extends: paper\nname: mine\nreward_data: {pairs: pairs.jsonl}\n"
        "reference: {models: {gpt2: policy, qwen2: Qwen/Qwen2.5-0.5B}}\n"
    )
    monkeypatch.chdir("/")
    profile = load_profile(path)
    assert profile.reward_data.pairs == str(tmp_path / "mine" / "pairs.jsonl")
    assert profile.reference.models["gpt2"] == str(tmp_path / "mine" / "policy")
    assert profile.reference.models["qwen2"] == "Qwen/Qwen2.5-0.5B"
    before = local_files(profile)
    assert len(before) == 2 and local_files(load_profile("embedded")) == {}
    (tmp_path / "mine" / "policy" / "model.safetensors").write_bytes(b"WEIGHTS")
    changed = {key for key, value in local_files(profile).items() if before[key] != value}
    assert changed == {f"{tmp_path}/mine/policy"}
