"""`vaalign check-reward`: files in, a page, a JSON and an exit code out."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from tests.rewards.conftest import save_tiny
from vaalign_lib.experiments.reward_check import RULES, check_rewards, read_rules, texts_of
from vaalign_lib.reproduce.cli import main
from vaalign_lib.rewards.classifier import load_reward_model
from vaalign_lib.rewards.ensemble import EnsembleReward, SequenceClassifierReward
from vaalign_lib.rewards.heads import Heads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("reward") / "first", "llama")


@pytest.fixture(scope="module")
def second(folder):
    place = save_tiny(folder.parent / "second", "llama")
    model, _ = load_reward_model(place)
    with torch.no_grad():
        model.score.weight.copy_(model.score.weight.flip(1))
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def pairs(folder):
    """Return a file of pairs that are labelled as the first model ranks them, in two subsets."""
    table, _ = texts_of(None, 60)
    score = SequenceClassifierReward.load(folder)
    texts = {name: table[name].tolist() for name in ("prompt", "chosen", "rejected")}
    gap = score(texts["prompt"], texts["chosen"]) - score(texts["prompt"], texts["rejected"])
    rows = []
    for k, (row, lead) in enumerate(zip(table.to_dict("records"), gap, strict=True)):
        first, other = (row["chosen"], row["rejected"])[:: 1 if lead > 0 else -1]
        rows.append({"prompt": row["prompt"], "chosen": first, "rejected": other, "subset": "ab"[k % 2]})
    place = folder.parent / "pairs.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def turned(pairs):
    rows = pd.read_json(pairs, lines=True).rename(columns={"chosen": "rejected", "rejected": "chosen"})
    place = pairs.parent / "turned.jsonl"
    rows.to_json(place, orient="records", lines=True)
    return place


def test_the_command_passes_and_fails_by_rule(folder, pairs, tmp_path, capsys):
    options = ["check-reward", str(folder), "--out", str(tmp_path)]
    assert main([*options, "--pairs", str(pairs)]) == 0
    content = json.loads((tmp_path / "check.json").read_text())
    rows = {one["rule"]: one for one in content["rules"]}
    assert content["passed"] and rows["accuracy.all"]["value"] == 1.0
    assert [one["accuracy"] for one in content["tables"]["Accuracy by subset"]] == [1.0, 1.0]
    assert rows["members.spread"]["verdict"] == rows["ratings.rank"]["verdict"] == "not measured"
    page = (tmp_path / "check.md").read_text()
    assert page.startswith("# Reward models: passed") and "## Accuracy by subset" in page
    shown = (tmp_path / "check.html").read_text()
    assert "<title>Reward models: passed</title>" in shown and "all end with &lt;/s&gt;" in shown
    assert "<table" in shown and "<script" not in shown
    assert main([*options, "--pairs", str(turned(pairs))]) == 1
    assert "failed: accuracy.all" in capsys.readouterr().out
    page = (tmp_path / "check.md").read_text()
    assert "mixed up" in page.partition("## Every rule")[0]  # what to do about it


def test_rules_of_ones_own_decide(folder, pairs, tmp_path):
    own = yaml.safe_load(RULES.read_text())
    for rule in own:
        rule["stops"] = False
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(own))
    options = ["--pairs", str(turned(pairs)), "--rules", str(tmp_path / "rules.yaml")]
    assert main(["check-reward", str(folder), *options, "--out", str(tmp_path / "found")]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["{folder}/none"], "none: cannot be loaded; expected a folder"),
        (["{folder}", "--pairs", "{folder}/none.jsonl"], "there is no such file"),
        (["{folder}", "--rules", "{folder}/none.yaml"], "No such file"),
        (["{folder}", "--max-length", "8"], "responses"),
    ],
)
def test_what_cannot_be_asked_is_told_in_a_line(folder, tmp_path, capsys, options, words):
    options = [one.format(folder=folder) for one in options]
    code = main(["check-reward", *options, "--out", str(tmp_path)])
    if "--max-length" in options:  # a finding: nothing fits
        assert code in (0, 1) and "length.fits" in capsys.readouterr().out
        return
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("vaalign: ") and words in line


def test_members_are_compared_and_copies_found(folder, second, pairs):
    found = check_rewards([folder, second], pairs)
    verdicts = found.rows.set_index(["model", "rule"])["verdict"]
    assert verdicts["all members", "members.spread"] == "passed"
    assert verdicts[str(folder), "padding.batch"] == verdicts[str(second), "padding.batch"] == "passed"
    assert len(found.tables["Scores by member"]) == 2
    copies = check_rewards([folder, folder], pairs).rows.set_index("rule")["verdict"]
    assert copies["members.spread"] == "warned" and copies["members.order"] == "not measured"


def test_a_saved_ensemble_and_ratings(folder, tmp_path):
    model, tokenizer = load_reward_model(folder)
    torch.manual_seed(0)
    EnsembleReward(model, tokenizer, Heads("paper", {"weight": torch.randn(1, 4, 16)})).save(
        tmp_path / "heads"
    )
    table, _ = texts_of(None, 40)
    ratings = np.random.default_rng(0).integers(1, 6, (40, 3)).tolist()
    rows = zip(table["prompt"], table["chosen"], ratings, strict=True)
    lines = (json.dumps({"prompt": p, "response": r, "ratings": many}) + "\n" for p, r, many in rows)
    (tmp_path / "ratings.jsonl").write_text("".join(lines))
    found = check_rewards([tmp_path / "heads"], ratings=tmp_path / "ratings.jsonl", limit=40)
    rows = found.rows.set_index("rule")
    assert len(found.tables["Scores by member"]) == 4
    assert rows.loc["members.spread", "verdict"] == "passed"
    assert rows.loc["variance.rank", "count"] == 40 and rows.loc["variance.size", "verdict"] != "not measured"
    assert rows.loc["accuracy.all", "verdict"] == "not measured" and "no pairs were given" in found.texts


def test_every_rule_has_an_answer_somewhere():
    ids = [rule.id for rule in read_rules()]
    assert len(ids) == len(set(ids)) == 24
    stopping = {rule.id for rule in read_rules() if rule.stops}
    assert {"weights.present", "padding.batch", "accuracy.all"} < stopping
