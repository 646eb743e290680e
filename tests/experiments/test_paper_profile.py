"""The paper profile on tiny random checkpoints of its architectures, a local judge, and data files.

Only paths, addresses and sizes differ from data/profiles/paper.yaml.
"""

import hashlib
import json
import re
import sqlite3

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GemmaConfig, LlamaConfig

from tests.rewards.judge_server import judge_server
from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import plan
from vaalign_lib.experiments.policies import train_runs
from vaalign_lib.models import tiny_config
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.reproduce import cli
from vaalign_lib.store import RunStore

CHAT = ("alpacaeval-easy", "alpacaeval-hard", "mt-bench-easy")


def save(model, folder):
    model.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return folder.name  # profiles name paths relative to themselves


def checkpoints(folder):
    """Save a tiny random checkpoint of every architecture that the profile names."""
    torch.manual_seed(0)
    found = {
        name: save(AutoModelForCausalLM.from_config(tiny_config(name, 32)), folder / name)
        for name in ("gpt2", "qwen2", "mistral")
    }
    gemma = tiny_config("gemma", 32)
    assert isinstance(gemma, GemmaConfig)
    found["gemma"] = save(AutoModelForCausalLM.from_config(gemma), folder / "gemma")
    words = tiny_config("qwen2", 32).to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id",
             "num_attention_heads", "num_key_value_heads", "eos_token_id", "bos_token_id")  # fmt: skip
    llama = LlamaConfig(**{name: words[name] for name in names}, num_labels=1)
    found["llama"] = save(AutoModelForSequenceClassification.from_config(llama), folder / "llama")
    return found


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path.name


def data_files(folder):
    """Write pairs to learn from, and pairs and prompts to look at, in the published layouts."""
    world, random = World(0), np.random.default_rng(0)
    asked, answers = world.corpus(240, random)
    _, others = world.corpus(240, random)
    pairs = [
        {"prompt": p, "chosen": a, "rejected": b} for p, a, b in zip(asked, answers, others, strict=True)
    ]
    bench = [one | {"subset": CHAT[k % 3]} for k, one in enumerate(pairs[160:])]
    return {
        "pairs": lines(folder / "pairs.jsonl", pairs[:160]),
        "evaluation": lines(folder / "bench.jsonl", bench),
        "prompts": lines(
            folder / "prompts.jsonl", [{"subset": one["subset"], "prompt": one["prompt"]} for one in bench]
        ),
    }


def reply(prompt):
    """Answer with an interval inside the range that the prompt names, by a hash of the prompt."""
    highest = int(re.findall(r"b ≤ (\d+)", prompt)[0])
    digest = hashlib.sha256(prompt.encode()).digest()
    a = 1 + digest[0] / 255 * (highest - 1) * 0.6
    return f"a: {a:.2f}\nb: {a + (0.05 + digest[1] / 255 * 0.3) * (highest - 1):.2f}"


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Yield the path of the profile, with a judge that is there."""
    folder = tmp_path_factory.mktemp("paper")
    models, files = checkpoints(folder), data_files(folder)
    with judge_server() as server:
        server.reply = reply
        judge = {"base_url": server.url, "key_variable": "TEST_JUDGE_KEY"}
        steps = {"ppo": {"iterations": 1}}
        profile = {
            "extends": "paper",
            "name": "paper-tiny",
            "description": "the paper profile on tiny random checkpoints",
            "bandit": {"draws": 200, "many_draws": 20_000},
            "theorems": {"draws": 2000, "instances": 40, "settings": 40},
            "bench": {"worlds": 2, "prompts": 16, "responses": 24, "policies": 8},
            "reward_data": {
                "pairs": files["pairs"],
                "evaluation": files["evaluation"],
                "train_pairs": 96,
                "held_out_pairs": 32,
            },
            "reference": {"models": {name: models[name] for name in ("gpt2", "qwen2", "mistral")}},
            "reward_model": {"backbone": models["gemma"], "max_length": 64},
            "true_reward": models["llama"],
            "policies": {
                "count": 3,
                "data": files["prompts"],
                "judges": dict.fromkeys(("judge-a", "judge-b", "judge-c"), judge),
                "warm_up": 16,
                "evaluation": {"prompts": 6, "samples": 2},
                "training": dict.fromkeys(("gpt2", "qwen2", "mistral"), steps),
            },
        }
        path = folder / "paper-tiny.yaml"
        path.write_text(yaml.safe_dump(profile))
        yield path


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")


def test_only_paths_and_sizes_differ(paper):
    ours, theirs = load_profile(paper), load_profile("paper")
    for name, training in theirs.policies.training.items():
        mine = ours.policies.training[name]
        assert mine.lora == training.lora and mine.variance_aware == training.variance_aware
        assert mine.ppo == training.ppo.model_copy(update={"iterations": 1})
    assert ours.policies.sampling == theirs.policies.sampling
    assert ours.ensembles == theirs.ensembles
    assert ours.policies.judges["judge-b"].model == "gemini-2.0-flash"


def test_nothing_starts_while_something_is_missing_and_the_plan_says_what_would(
    paper, tmp_path, capsys, monkeypatch
):
    command = ["reproduce", "--profile", str(paper), "--run-dir", str(tmp_path), "--only", "04"]
    monkeypatch.delenv("TEST_JUDGE_KEY")
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert told.count("the environment variable TEST_JUDGE_KEY is not set") == 3
    assert not list(tmp_path.glob("0*"))
    monkeypatch.setenv("TEST_JUDGE_KEY", "secret-key")
    assert cli.main(["plan", "--profile", str(paper), "--run-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "runs: 0 done" in shown and "paid calls" in shown
    assert not list(tmp_path.glob("0*"))


def test_everything_of_the_paper(paper, tmp_path, capsys):
    """From the reward model to Tables 1 to 4, by the command that users type; the theory of notebooks 01
    and 02 uses none of the paper's models.
    """
    options = ["--profile", str(paper), "--run-dir", str(tmp_path)]
    assert cli.main(["plan", *options]) == 0
    told = capsys.readouterr().out
    assert cli.main(["reproduce", *options, "--only", "03,04,05"]) == 0, capsys.readouterr().err
    rows = {row["id"]: row for row in json.loads((tmp_path / "scoreboard.json").read_text())}
    assert rows["table1.variance_ratios"]["verdict"] != "not yet"
    assert rows["table3.risks"]["value"] is not None and rows["table4.ranges"]["low"] is not None
    profile = load_profile(paper)
    folders = train_runs(
        Study(RunStore(tmp_path / "store", reads_only=True), profile, 0), plan(profile.policies.runs), 1
    )
    for run, folder in folders.items():
        table = pd.read_parquet(folder / "policies.parquet")
        assert len(table) == 3 and table["gold"].isna().all()
        assert table.drop(columns=["gold", "gold_error"]).notna().all().all()
        if run.source != "ensemble":
            assert table["true_reward"].between(1, run.highest).all()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 100 and not any(b"secret-key" in path.read_bytes() for path in written)
    with sqlite3.connect(tmp_path / "judgements.sqlite") as judgements:
        (asked,) = judgements.execute("SELECT count(*) FROM judgements").fetchone()
    (planned,) = re.findall(r"at most ([\d,]+) paid calls", told)
    assert 0 < asked <= int(planned.replace(",", ""))
    capsys.readouterr()
    assert cli.main(["reproduce", *options, "--only", "03,04,05"]) == 0  # the plan stays shown
    assert capsys.readouterr().err.count("kept") == 3
    layout = (tmp_path / "05_statistics" / "tables" / "table_1.md").read_text()
    assert "gemini-2.0-flash" in layout and "as printed" in layout
