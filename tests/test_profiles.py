"""Profiles: what is shipped loads, what is wrong is refused by name."""

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from vaalign_lib import profiles
from vaalign_lib.experiments.conditions import ENSEMBLES, GROUPS, JUDGES, URMES, group, plan
from vaalign_lib.experiments.policies import settings_key
from vaalign_lib.models import CONTEXT, tiny_config
from vaalign_lib.profiles import (
    ASKS,
    LINEAR,
    TINY_TOKENS,
    ProfileError,
    available_profiles,
    load_profile,
    local_files,
)
from vaalign_lib.store import PROFILES, content_key


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
        try:
            assert load_profile(name).name == name
        except ProfileError as error:
            assert name == "pretrained" and "`make pretrained` makes it" in str(error)


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
        ({"policies__training__gpt2__variance_aware": {"learning_rate": -1.0}}, r"policies\.training\.gpt2"),
        ({"bandit__drawz": 5}, r"bandit\.drawz: unknown key; allowed here: draws, many_draws"),
        ({"colour": "red"}, r"colour: unknown key; allowed here: name, description, bandit"),
        ({"bandit__draws": "many"}, r"bandit\.draws: .*valid integer, got 'many'"),
        ({"bandit__draws": 1000.5}, r"bandit\.draws: .*integer, got 1000\.5"),
        ({"bandit__draws": True}, r"bandit\.draws: .*valid integer, got True"),
        ({"bandit__draws": -5}, r"bandit\.draws: .*greater than or equal to 100, got -5"),
        ({"theorems__instances": 1}, r"theorems\.instances: .*greater than or equal to 20, got 1"),
        ({"theorems__draws": None}, r"theorems\.draws: missing; expected draws of the estimates"),
        ({"reward_model__optimizer": "sgd"}, r"reward_model\.optimizer: .*'adamw_torch'.*got 'sgd'"),
        ({"reward_model__device_batch_size": 5}, r"reward_model: .*32 must be a multiple of .* 5"),
        ({"reward_model__pretrained__lr": 1}, r"pretrained\.lr: unknown key; allowed here: learning_rate"),
        ({"reference__models__gpt2": 3}, r"reference\.models\.gpt2: .*valid string, got 3"),
        ({"name": "Not A Name"}, r"name: .*pattern"),
    ],
)
def test_wrong_content_is_refused_with_key_and_what_is_allowed(tmp_path, changes, words):
    with pytest.raises(ProfileError, match=words):
        load_profile(changed(tmp_path, **changes))


def test_missing_and_broken_files_are_refused(tmp_path):
    with pytest.raises(ProfileError, match="choose one of embedded, extended, paper, pretrained, smoke"):
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
    (tmp_path / "mine" / "policy" / "config.json").write_text("{}")
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


@pytest.mark.parametrize(
    ("name", "said", "runs"),
    [
        ("smoke", "4c78fbec4883b619", "93e3cfec187fd796"),
        ("embedded", "62b014883982bad9", "9c1b6e4dcee20f75"),
        ("extended", "840933420d95b979", "1c772bf5baf6c64a"),
        ("paper", "77fa1424b0955955", "b728060a2c7dfbfe"),
    ],
)
def test_settings_of_shipped_profiles_do_not_move(name, said, runs):
    """What is published has these keys; `results.rekey` gives it new ones where a setting is added."""
    profile = load_profile(name)
    assert content_key(said=profile.model_dump(exclude_unset=True)) == said
    keys = {run.name: settings_key(profile, 0, run) for run in plan(profile.policies.runs)}
    assert content_key(runs=keys) == runs


PLAIN = "extends: smoke\nname: mine\ndescription: é\nbandit: {draws: 200}\n"


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.encode("utf-8-sig"),
        PLAIN.encode("utf-16"),
        PLAIN.replace("description: é", 'description: "\\xe9"').encode(),
        b"\n\n# a comment\n---\n" + PLAIN.encode() + b"...\n",
    ],
)
def test_the_same_profile_written_in_another_way(tmp_path, content):
    (tmp_path / "plain.yaml").write_text(PLAIN, encoding="utf-8")
    (tmp_path / "mine.yaml").write_bytes(content)
    assert load_profile(tmp_path / "mine.yaml") == load_profile(tmp_path / "plain.yaml")


def test_plain_values_aliases_and_merged_keys(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: smoke\nname: mine\ndescription: 2026-01-01\n"
        "policies:\n  training:\n"
        "    gpt2: {ppo: &ppo {learning_rate: 1e-5, gamma: .5, vf_coef: +1.5E-1, max_grad_norm: ~}}\n"
        "    qwen2: {ppo: {<<: *ppo, gamma: 1}}\n"
        "    mistral: {ppo: *ppo}\n"
    )
    profile = load_profile(path)
    gpt2, qwen2, mistral = (profile.policies.training[name].ppo for name in LINEAR)
    assert (gpt2.learning_rate, gpt2.gamma, gpt2.vf_coef, gpt2.max_grad_norm) == (1e-5, 0.5, 0.15, None)
    assert (qwen2.learning_rate, qwen2.gamma) == (1e-5, 1) and mistral == gpt2
    assert profile.description == "2026-01-01"


def test_the_narrowest_widths_run_and_narrower_ones_do_not():
    for name, width, wrong in (("qwen2", 4, 6), ("mistral", 4, 6), ("gpt2", 4, 5), ("gemma", 8, 12)):
        model = AutoModelForCausalLM.from_config(tiny_config(name, width))
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
        with pytest.raises((RuntimeError, ValueError)):
            AutoModelForCausalLM.from_config(tiny_config(name, wrong))(torch.tensor([[1, 2, 3]]))


def test_layers_that_can_have_adapters():
    for name, layers in LINEAR.items():
        model = AutoModelForCausalLM.from_config(tiny_config(name, 8))
        linear = {
            where.rpartition(".")[2]
            for where, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
        }
        assert linear - {"lm_head"} == set(layers)


def test_files_are_looked_for_beside_the_profile(tmp_path, monkeypatch):
    (tmp_path / "pairs.JSONL").write_text("")
    text = "extends: smoke\nname: mine\nreward_data: {{pairs: {}}}\n"
    path = tmp_path / "mine.yaml"
    monkeypatch.chdir("/")
    for named in ("pairs.JSONL", "./pairs.JSONL", str(tmp_path / "pairs.JSONL")):
        path.write_text(text.format(named))
        assert load_profile(path).reward_data.pairs == str(tmp_path / "pairs.JSONL")
    for hub in ("owner/name", "owner/name@train", "Qwen/Qwen2.5-0.5B"):
        path.write_text(text.format(hub))
        assert load_profile(path).reward_data.pairs == hub


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A profile like the shipped `pretrained`, beside what `make pretrained` makes."""
    folder = tmp_path / "data" / "profiles"
    folder.mkdir(parents=True)
    shipped = (PROFILES / "pretrained.yaml").read_text()
    (folder / "mine.yaml").write_text(shipped.replace("name: pretrained\n", "name: mine\n"))
    home = tmp_path / "pretrained"
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        (home / name).mkdir(parents=True)
        (home / name / "config.json").write_text('{"model_type": "llama"}')
    (home / "ratings").mkdir()
    for name in ("words.jsonl", "texts.jsonl", "prompts.jsonl"):
        (home / "ratings" / name).touch()
    monkeypatch.setattr(profiles, "PRETRAINED", home)
    return folder / "mine.yaml"


def test_a_pretrained_model_and_ratings_are_ordinary_folders_and_files(pretrained):
    profile, home = load_profile(pretrained), pretrained.parents[2] / "pretrained"
    assert profile.reference.models["llama"] == str(home / "smollm2-135m-instruct")
    assert profile.reward_model.backbone == str(home / "all-minilm-l6-v2")
    assert str(home / "ratings" / "words.jsonl") in local_files(profile)


@pytest.mark.parametrize(
    "absent", ["smollm2-135m-instruct", "all-minilm-l6-v2", "ratings/words.jsonl", "ratings/prompts.jsonl"]
)
def test_what_make_pretrained_makes_is_said_to_be(pretrained, absent):
    place = pretrained.parents[2] / "pretrained" / absent
    place.rename(place.with_name("elsewhere"))
    with pytest.raises(ProfileError, match=rf"{absent}'; `make pretrained` makes it$"):
        load_profile(pretrained)


@pytest.mark.parametrize(
    ("line", "other", "told"),
    [
        ("words: ../../pretrained/ratings/words.jsonl", "words: mine.jsonl", "raters.words: expected a file"),
        (
            "raters:\n  words: ../../pretrained/ratings/words.jsonl\n"
            "  texts: ../../pretrained/ratings/texts.jsonl\n",
            "",
            "raters: missing; runs people",
        ),
        ("data: ../../pretrained/ratings/prompts.jsonl", "data: embedded", "policies.data: runs people need"),
        (
            "models: {llama: ../../pretrained/smollm2-135m-instruct}",
            "width: 32",
            "reference.models.llama: missing",
        ),
        ("llama: ../../pretrained/smollm2-135m-instruct", "llama: tiny", "llama: expected a name on the hub"),
        ("target_modules: [q_proj,", "target_modules: [c_attn,", "got c_attn"),
        ("runs: [people]", "runs: [people, rows]", "the runs ask judge-a"),
    ],
)
def test_what_people_cannot_judge_is_refused(pretrained, line, other, told):
    text = pretrained.read_text()
    assert text.count(line) == 1
    pretrained.write_text(text.replace(line, other))
    with pytest.raises(ProfileError, match=told) as error:
        load_profile(pretrained)
    assert "make pretrained" not in str(error.value)


def asking(what):
    return {one for one, asked in ASKS.items() if what in asked}


def test_what_profiles_know_of_groups_and_tiny_policies():
    groups = {name: group(name) for name in GROUPS}
    assert asking("matched") == {name for name in groups if any(run.matched for run in groups[name])}
    assert asking("own_ensembles") == {
        name
        for name in groups
        if any(run.source in ENSEMBLES and run.protocol == "independent" for run in groups[name])
    }
    assert TINY_TOKENS == CONTEXT


def test_which_judges_a_group_asks_is_what_its_runs_ask():
    for name in GROUPS:
        runs = [run for run in group(name) if run.source in JUDGES]
        simulated = any(
            (run.protocol, run.widths, run.disagreement, run.world) != ("shared", "rescaled", "none", 0)
            or run.regime in ("printed_gentle", "printed_fixed")  # at a rate of the embedded world's
            for run in runs
        ) or any(run.source in URMES for run in group(name))
        assert simulated == ("simulated" in ASKS[name]), name
        asked = {run.source for run in runs}
        assert asked == (set(JUDGES) if "three_judges" in ASKS[name] else {"judge-b"} if runs else set()), (
            name
        )
