"""The recipe for half a billion weights: its profile is valid, and its table is what `vaalign plan` says."""

import json
import re

import pytest
import torch
from transformers import Qwen2Config

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.experiments.conditions import JUDGE_ROW, Condition
from vaalign_lib.profiles import PolicyTraining, Study, load_profile
from vaalign_lib.reproduce import plan as planning
from vaalign_lib.store import ROOT, RunStore
from vaalign_lib.training.memory import fitting, sizes_of, stack_bytes

PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
SPEEDS = {"bfloat16": 250e12, "float32": 19e12}  # as the page says
GIGABYTES = (24, 80, 141)  # of GPUs
FORMS = {
    "adapters (`half.yaml`)": {},
    "the same without checkpointing": {"gradient_checkpointing": False},
    "all weights": {"lora": None},
    "all weights, products in float32": {"lora": None, "precision": "float32"},
}
QWEN = {  # Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    """Return the page's profile, its model by its configuration, its prompts of 128 tokens at most."""
    folder = tmp_path_factory.mktemp("gpu")
    (text,) = re.findall(r"```yaml\n(# half.*?)```", PAGE, flags=re.S)
    (folder / "half.yaml").write_text(text.replace("Qwen/Qwen2.5-0.5B-Instruct", "half"))
    tokenizer = world_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for name in ("half", "my/backbone", "my/reward-model"):
        Qwen2Config(**QWEN, **ends).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "model.safetensors").touch()  # weights are counted, not loaded
    rows = [{"prompt": " ".join(["drum"] * (125 - k))} for k in range(100)]
    (folder / "my_prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("my_pairs.jsonl", "my_bench.jsonl"):
        (folder / name).touch()
    return load_profile(folder / "half.yaml")


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(planning, "flops", lambda precision="float32": SPEEDS[precision])


def trained_as(profile, changes):
    training = PolicyTraining.model_validate(profile.policies.training["qwen2"].model_dump() | changes)
    policies = profile.policies.model_copy(update={"training": dict.fromkeys(("gpt2", "qwen2"), training)})
    return profile.model_copy(update={"policies": policies}), training


def row(profile, name, changes, folder):
    """Return a line of the page's table."""
    profile, training = trained_as(profile, changes)
    sizes, written = sizes_of(profile, "qwen2"), profile.policies.sampling.max_new_tokens
    memory = [f"{stack_bytes(sizes, training, count, written) / 1e9:.1f} GB" for count in (1, 8)]
    together = [str(fitting(sizes, training, 80, written, size * 10**9)) for size in GIGABYTES]
    table = planning.planned(Study(RunStore(folder), profile, 0)).set_index("run")
    planned = table.loc[Condition(*JUDGE_ROW).name]
    assert planned["together"] == int(together[1])
    disk = f"{planned['disk']:.0f} GB"
    return f"| {' | '.join([name, *memory, *together, planning._time(planned['seconds']), disk])} |"


def test_the_table_is_what_the_plan_says(profile, on_a_gpu, tmp_path):
    assert 120 <= sizes_of(profile, "qwen2").prompt <= 128 and sizes_of(profile, "qwen2").weights == 494032768
    rows = [row(profile, name, changes, tmp_path) for name, changes in FORMS.items()]
    told = [line for line in PAGE.splitlines() if line.startswith(("| adapters", "| the same", "| all w"))]
    assert told == rows
    for precision, speed in SPEEDS.items():
        assert f"{speed / 1e12:.0f}" in PAGE and precision in PAGE
