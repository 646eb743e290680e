"""The experiment of notebook 03: how data is divided, and the whole notebook on real input."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from tests.hostile import alive
from tests.rewards.conftest import save_tiny
from vaalign_lib.data.pairs import PARTS, DataError
from vaalign_lib.experiments.references import reference
from vaalign_lib.experiments.reward_models import RewardStudy, prepare, reward_source
from vaalign_lib.experiments.reward_tables import ratings_table
from vaalign_lib.models import conversation_ids
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.reproduce import cli
from vaalign_lib.rewards.classifier import reader, write_features
from vaalign_lib.rewards.heads import KINDS
from vaalign_lib.rewards.pairs import real_pairs
from vaalign_lib.store import RunStore

SMOKE = load_profile("smoke")
HOSTILE = "<img src=x onerror=alert(1)>"  # a name of a subset, and in every prompt
LIMITS = {"train": 1000, "held_out": 1000}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("backbone"), "llama"))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    random = np.random.default_rng(0)
    lines = []
    for k in range(240):
        words = ["".join(random.choice(list("abcdefgh"), 4)) for _ in range(6)]
        record = {"subset": ("llmbar-natural", HOSTILE)[k % 2],
                  "prompt": f"{HOSTILE} {words[0]} {k // 2}?",
                  "chosen": " ".join(words[1:4]), "rejected": " ".join(words[4:])}  # fmt: skip
        lines.append(json.dumps(record))
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_real_pairs_are_divided_by_prompt_and_nothing_is_lost(file, backbone):
    table, _ = real_pairs(0, str(file), "", LIMITS, backbone, 64)
    assert len(table) == 240
    parts = {part: set(table.loc[table["part"] == part, "prompt"]) for part in PARTS}
    assert sum(len(prompts) for prompts in parts.values()) == table["prompt"].nunique()
    shares = table["part"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.02)
    assert shares["held_out"] == pytest.approx(0.1, abs=0.02)
    assert not table.equals(real_pairs(1, str(file), "", LIMITS, backbone, 64)[0])


def test_pairs_for_evaluation_are_not_learned_from(file, backbone, tmp_path):
    other = tmp_path / "evaluation.jsonl"
    other.write_text("\n".join(file.read_text().splitlines()[:40]))
    table, reasons = real_pairs(0, str(file), str(other), LIMITS, backbone, 64)
    looked_at = set(table.loc[table["part"] == "evaluation", "prompt"])
    assert len(table[table["part"] == "evaluation"]) == 40
    assert not looked_at & set(table.loc[table["part"] != "evaluation", "prompt"])
    assert set(table["part"]) == set(PARTS)
    assert reasons["prompt is among those looked at"] + len(table) == 240 + 40


def test_what_the_reader_leaves_out_is_counted_too(file, backbone, tmp_path):
    path, other = tmp_path / "more.jsonl", tmp_path / "other.jsonl"
    same = json.dumps({"prompt": "p", "chosen": "a", "rejected": "a "})
    path.write_text(f"{file.read_text()}\n{same}\n{same}")
    other.write_text(f"{json.dumps({'prompt': 'q', 'chosen': 'a', 'rejected': 'b'})}\n{same}")
    _, reasons = real_pairs(0, str(path), str(other), LIMITS, backbone, 64)
    assert reasons["chosen and rejected are the same text"] == 2
    assert reasons["chosen and rejected are the same text, to look at"] == 1


def test_limits_are_kept_and_what_is_left_out_is_counted(file, backbone):
    limits = {"train": 50, "held_out": 10}
    table, reasons = real_pairs(0, str(file), "", limits, backbone, 64)
    assert table["part"].value_counts()[["train", "held_out"]].tolist() == [50, 10]
    assert sum(reasons.values()) + len(table) == 240
    assert reasons["more than 50 to be train"] > 50


def test_pairs_that_the_backbone_cannot_tell_apart_are_left_out(file, backbone, tmp_path):
    """Capital letters are unknown to the tokenizer; what is left has its features, row by row."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for k, one in enumerate(lines):
        if k % 4 == 0:
            one |= {"chosen": "ABC", "rejected": "XYZ"}
    lines[1]["chosen"] = "a" * 200
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    store = RunStore(tmp_path / "store")
    study = prepare(Study(store, SMOKE, 0), reference=None, pairs=str(path), backbone=backbone)
    assert study.left_out["the same tokens in both responses"] == 60
    assert study.left_out["a response longer than 128 tokens"] == 1
    assert len(study.data) == 240 - 61 and not study.data["chosen"].str.contains("ABC").any()
    features = study.features("evaluation")
    assert len(features["chosen"]) == len(study.part("evaluation"))
    assert not (features["chosen_score"] == features["rejected_score"]).any()
    assert not features["chosen_cut"].any()
    heads, _ = study.heads("bootstrap", SMOKE.ensembles.trained)
    rated = pd.DataFrame({"prompt": "ask?", "response": [*"abcdefgh", "a" * 200]})
    rated["ratings"] = [[float(k), 1.0] for k in range(9)]
    table, (text,) = ratings_table(study, {"bootstrap": heads}, rated)
    assert len(table) == 8 and "n = 8" in text


def test_what_was_cut_is_counted(backbone, tmp_path):
    """A conversation that just fits is not cut."""
    tokenizer, _ = reader(backbone, 64)
    longest = len(conversation_ids(tokenizer, ["ask"], ["ab"], 64)[0])
    pairs = {"prompt": ["ask", "asks"], "chosen": "ab", "rejected": "a", "part": "train"}
    pd.DataFrame(pairs).to_parquet(tmp_path / "pairs.parquet")
    write_features(tmp_path, "train", longest, Path(backbone), tmp_path)
    found = load_file(tmp_path / "features.safetensors")
    assert found["chosen_cut"].tolist() == [False, True] and not found["rejected_cut"].any()


def test_real_texts_need_a_real_backbone(file, tmp_path):
    with pytest.raises(DataError, match="tiny-gemma knows the embedded world's words only"):
        prepare(Study(RunStore(tmp_path), SMOKE, 0), reference=None, pairs=str(file))


def test_too_few_pairs_are_told(backbone, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match=r"few.jsonl: too few prompts \(1\) to divide into train"):
        prepare(
            Study(RunStore(tmp_path), SMOKE, 0), reference=None, pairs=str(path),
            backbone=backbone,
        )  # fmt: skip


def test_a_pretrained_backbone_gets_its_own_settings(tmp_path):
    def settings(backbone, profile=SMOKE):
        nothing = {"data": None, "data_folder": tmp_path, "backbone": backbone}
        return RewardStudy(RunStore(tmp_path), profile, 0, **nothing).settings

    assert settings("tiny-gemma") == SMOKE.reward_model
    assert settings("some/model").learning_rate == SMOKE.reward_model.pretrained.learning_rate
    paper = load_profile("paper")
    assert settings("x", paper) == paper.reward_model


def test_the_notebook_on_real_input_by_parameters_alone(file, tmp_path, capsys):
    ratings = tmp_path / "ratings.jsonl"
    rated = [{"prompt": "ask", "response": f"answer {k}", "ratings": [k % 3, 1, 2]} for k in range(30)]
    ratings.write_text("\n".join(json.dumps(line) for line in rated))
    backbone = save_tiny(tmp_path / "bert", "bert")
    options = ["reproduce", "--profile", "smoke", "--only", "03", "--run-dir", str(tmp_path / "run")]
    given = {"pairs": file, "backbone": backbone, "ratings": ratings}
    assert cli.main([*options, *(f"--set={name}={path}" for name, path in given.items())]) == 0
    folder = tmp_path / "run" / "03_ensemble_disagreement"
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"figure_1", "figure_8", "human_disagreement", "calibration", "variance_steps"} <= figures
    assert "selection_gains" not in figures  # there is no gold reward
    kinds = (folder / "tables" / "disagreement_kinds.md").read_text()
    pages = (tmp_path / "run" / "report.html", folder / "page.html")
    assert [alive(page.read_text()) for page in pages] == [[], []]
    assert "onerror" in pages[1].read_text()
    assert "label_loss" in kinds and "separate small backbones" not in kinds


def test_bad_input_ends_with_file_line_and_reason(file, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(file.read_text() + '\n{"prompt": "x"}\n')
    options = ["reproduce", "--profile", "smoke", "--only", "03", "--run-dir", str(tmp_path / "run")]
    assert cli.main([*options, f"--set=pairs={broken}", "--set=backbone=any/model"]) == 2
    shown = capsys.readouterr().err
    assert "broken.jsonl:241: no field 'chosen'; expected prompt, chosen, rejected" in shown


def test_every_kind_is_a_source_of_rewards_for_policies(tmp_path):
    store = RunStore(tmp_path)
    study = prepare(Study(store, SMOKE, 0), reference=reference(Study(store, SMOKE, 0), "gpt2"))
    few = study.part("evaluation").head(6)
    texts = few["prompt"].tolist(), few["chosen"].tolist()
    policies = np.arange(6)
    for kind in (*KINDS, "backbones"):
        source = reward_source(study, kind)
        judgement = source.judge(*texts, policies)
        assert judgement.scores.shape == (6, SMOKE.ensembles.members)
        assert source.true_reward(judgement, *texts) == pytest.approx(few["gold_chosen"])
    shared = reward_source(study, "bootstrap").judge(*texts, policies)
    assert np.array_equal(shared.scores, reward_source(study, "bootstrap").judge(*texts, policies).scores)
    own = reward_source(study, "bootstrap", independent=True, variance_of="mean")
    first, other = own.judge(*texts, policies), own.judge(*texts, policies[::-1])
    assert not np.allclose(first.scores, other.scores)
    assert first.variance() == pytest.approx(first.scores.var(1, ddof=1) / SMOKE.ensembles.members)
    with pytest.raises(ValueError, match="one ensemble for all policies"):
        reward_source(study, "backbones", independent=True)
