"""README: its Python runs as it stands, its commands and paths exist."""

import json
import math
import re

import dask
import distributed
import pytest
import yaml

from tests.experiments.test_paper_profile import checkpoints, data_files
from tests.papers.test_exhibits import resolve
from vaalign_lib.profiles import load_profile
from vaalign_lib.reproduce.cli import _parser, main
from vaalign_lib.reproduce.report import settings
from vaalign_lib.store import RESULTS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"\n(?=\*\*|## )", README)  # what stands in one goes together
BLOCKS = ["".join(re.findall(r"```python\n(.*?)```", one, flags=re.S)) for one in SECTIONS]
BLOCKS = [code for code in BLOCKS if code]


@pytest.mark.parametrize("code", BLOCKS)
def test_python_examples_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    exec(compile(code, "README.md", "exec"), {})


def test_the_example_profile_is_valid(tmp_path):
    (text,) = re.findall(r"```yaml\n(# mine.*?)```", README, flags=re.S)
    (tmp_path / "mine.yaml").write_text(text)
    for name in ("my_pairs.jsonl", "my_bench.jsonl", "my_prompts.jsonl"):
        (tmp_path / name).touch()
    mine, paper = load_profile(tmp_path / "mine.yaml"), load_profile("paper")
    assert {one.key_variable for one in mine.policies.judges.values()} == {"MY_KEY"}
    assert mine.policies.judges["judge-b"].refusals_say_nothing
    assert set(mine.policies.judges) == set(paper.policies.judges)
    assert mine.policies.training["gpt2"].ppo.learning_rate == 1.414e-5


def test_the_example_profile_needs_what_it_names_and_nothing_else(tmp_path, monkeypatch, capsys):
    (text,) = re.findall(r"```yaml\n(# mine.*?)```", README, flags=re.S)
    (tmp_path / "mine.yaml").write_text(text)
    models = checkpoints(tmp_path)
    (tmp_path / "my").mkdir()
    named = {"gpt2": "gpt2", "qwen2": "qwen2", "mistral": "mistral", "gemma": "backbone"}
    for made, name in (named | {"llama": "reward-model"}).items():
        (tmp_path / models[made]).rename(tmp_path / "my" / name)
    for made, name in zip(data_files(tmp_path).values(), ("pairs", "bench", "prompts"), strict=True):
        (tmp_path / made).rename(tmp_path / f"my_{name}.jsonl")
    (tmp_path / "run").mkdir()
    command = ["plan", "--profile", str(tmp_path / "mine.yaml"), "--run-dir", str(tmp_path / "run")]
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("vaalign: this is missing: policies.judges.judge-a: ")
    assert line.count("MY_KEY is not set") == 3  # the key, for three judges
    monkeypatch.setenv("MY_KEY", "secret")
    assert main(command) == 0
    assert "paid calls" in capsys.readouterr().out


def test_commands_parse():
    commands = re.findall(r"^vaalign (.*?)(?:\s+#.*)?$|`vaalign ([^`]+)`", README, flags=re.M)
    assert len(commands) > 5
    for command in commands:
        _parser().parse_args((command[0] or command[1]).split())


def test_paths_exist():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    assert len(links) > 5
    for link in links:
        assert (ROOT / link).exists(), link
    named = re.findall(r"\b(?:vaalign_lib|benchmarks|data|notebooks|figures)/[\w./*]*", README)
    assert len(named) > 40
    for name in named:
        assert any(ROOT.glob(name.rstrip("./"))), name
    for name in re.findall(r"`((?:theory|training|rewards|experiments|reproduce)/\w*(?:\.py)?)`", README):
        assert (ROOT / "vaalign_lib" / name).exists(), name


def test_dotted_names_lead_somewhere():
    names = set(re.findall(r"vaalign_lib(?:\.\w+)+", README))
    assert len(names) > 15
    for name in names:
        resolve(name)


def test_the_primary_endpoint_is_the_published_one():
    """The summary has a row for it where it is published, with its ratio, and none where it is not."""
    record = json.loads((RESULTS / "findings" / "04_ppo_runs.json").read_text(encoding="utf-8"))
    found = [one for one in record["findings"] if one["rule"] == "primary.reliability"]
    (line,) = [one for one in settings().lines if one.rule == "primary.reliability"]
    rows = [row for row in README.splitlines() if row.startswith("|") and line.text in row]
    assert len(rows) == len(found) <= 1
    for one, row in zip(found, rows, strict=True):
        ratio, low, high = (math.exp(one[name]) for name in ("value", "low", "high"))
        assert f"| {ratio:.2f} [{low:.2f}, {high:.2f}] |" in row


def test_published_runs_are_committed():
    """`--from-results` needs them on a fresh clone."""
    for profile in ("embedded", "extended"):
        for name in ("policies", "runs", "curves", "rewards", "looks"):
            assert (RESULTS / "runs" / profile / f"{name}.parquet").is_file()


def test_the_dask_recipe_names_one_interface_and_demands_certificates():
    (text,) = re.findall(r"```yaml\n(# /shared/dask.*?)```", README, flags=re.S)
    settings = dask.config.merge(dask.config.config, yaml.safe_load(text))
    with dask.config.set(settings):
        security = distributed.Security()
        assert dask.config.get("distributed.scheduler.allowed-failures") == 100
    assert security.require_encryption and security.tls_ca_file == "/shared/dask.crt"
    for role in ("scheduler", "worker", "client"):
        named = security.get_tls_config_for_role(role)
        assert (named["cert"], named["key"]) == ("/shared/dask.crt", "/shared/dask.key")
    schedulers = re.findall(r"dask scheduler --.*", README)
    assert len(schedulers) == 2 and all("--host" in one for one in schedulers)
