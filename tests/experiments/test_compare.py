"""`compare`: tables against other computations, sentences by rule, and tiny policies from start to answer."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments import compare as module
from vaalign_lib.experiments.answer import Answer, brief, of_trainers, sentences
from vaalign_lib.experiments.compare import Sizes, compare, read_plan
from vaalign_lib.models import tiny_config
from vaalign_lib.profiles import PPO, Evaluation, Matching, PolicyTraining, ProfileError, Sampling
from vaalign_lib.reproduce.cli import main
from vaalign_lib.rewards.base import Interval
from vaalign_lib.statistics.power import smallest_variance_ratio_seen
from vaalign_lib.training.objectives import OBJECTIVES, Method, Shaped, Task


def answer(effects, size=40, worlds=1, error=0.05, seed=0):
    """Return policies by method with a mean gain, a deviation and a KL each; the start is worth 1."""
    random, rows = np.random.default_rng(seed), []
    for world in range(worlds):
        for method, (gain, deviation, kl) in effects.items():
            values = 1 + gain + deviation * random.normal(size=size)
            rows += [
                {"world": world, "method": method, "policy": k, "outcome": one, "outcome_error": error,
                 "kl": kl * (1 + 0.01 * random.normal())}
                for k, one in enumerate(values)
            ]  # fmt: skip
    start = {
        "world": np.repeat(range(worlds), size),
        "outcome": 1 + error * random.normal(size=size * worlds),
    }
    return Answer(pd.DataFrame(rows), pd.DataFrame(start))


DIFFERENT = {"vanilla": (0.6, 1.0, 2.0), "variance_aware": (2.0, 0.3, 2.0)}
ALIKE = {"vanilla": (1.0, 0.5, 2.0), "variance_aware": (1.0, 0.5, 2.0)}


def test_the_table_against_other_computations():
    found = answer(DIFFERENT)
    row = found.table.set_index("method").loc["vanilla"]
    mine = found.policies[found.policies["method"] == "vanilla"]
    bar = found.reference["outcome"].mean()
    assert row["gain"] == pytest.approx(mine["outcome"].mean() - bar)
    t = stats.ttest_1samp(mine["outcome"], 0).confidence_interval()
    assert t.low - bar - 0.02 < row["gain_low"] < t.low - bar < row["gain"] < row["gain_high"]
    assert row["variance"] == pytest.approx(mine["outcome"].var() - 0.05**2)
    assert row["risk"] == np.mean(mine["outcome"] <= bar) and row["risk_low"] < row["risk"] < row["risk_high"]
    assert row["kl"] == pytest.approx(mine["kl"].mean()) and row["policies"] == 40


def test_the_contrasts_against_other_computations():
    found = answer(DIFFERENT)
    (row,) = found.contrasts.to_dict("records")
    wide = found.policies.pivot(index="policy", columns="method", values="outcome")
    t = stats.ttest_rel(wide["variance_aware"], wide["vanilla"]).confidence_interval()
    assert (row["gain_difference_low"], row["gain_difference_high"]) == pytest.approx((t.low, t.high))
    training = wide.var() - 0.05**2
    assert row["variance_ratio"] == pytest.approx(training["vanilla"] / training["variance_aware"])
    below = (wide <= found.reference["outcome"].mean()).mean()
    assert row["risk_difference"] == pytest.approx(below["vanilla"] - below["variance_aware"])
    assert row["kl_off"] < 0.02 and row["variance_ratio_seen"] == smallest_variance_ratio_seen(40)
    assert row["p_paired"] < 0.01 and row["measurable"]


def test_a_mean_over_worlds_has_student_s_interval_over_them():
    found = answer(DIFFERENT, worlds=4)
    rows, last = found.contrasts.iloc[:-1], found.contrasts.iloc[-1]
    assert last["world"] == "all" and len(rows) == 4
    t = stats.ttest_1samp(np.log(rows["variance_ratio"]), 0).confidence_interval()
    ends = last["variance_ratio_low"], last["variance_ratio_high"]
    assert ends == pytest.approx((np.exp(t.low), np.exp(t.high)))
    assert last["gain_difference"] == pytest.approx(rows["gain_difference"].mean())
    assert "in each of 4 worlds" in found.text


def test_sentences_are_by_rule():
    text = answer(DIFFERENT).text
    assert (
        "variance_aware gains more than vanilla: by 1" in text and "vary less" in text and "falls by" in text
    )
    assert "at like KL" in text
    turned = answer(dict(reversed(DIFFERENT.items()))).text
    assert (
        "vanilla gains less than variance_aware" in turned and "vary more" in turned and "rises by" in turned
    )
    same = answer(ALIKE, size=10).text
    assert "No difference in gain was seen" in same and "is open" in same and "not seen to differ" in same
    apart = answer(DIFFERENT | {"variance_aware": (2.0, 0.3, 4.0)}).text
    assert "% apart in KL" in apart and "at like KL" not in apart
    drowned = answer(dict.fromkeys(ALIKE, (1.0, 0.02, 2.0)), error=0.5).text
    assert "does not stand out from the noise" in drowned and "vary" not in drowned
    assert "nan" not in " ".join([text, turned, same, apart, drowned])
    (row,) = answer(ALIKE).contrasts.to_dict("records")
    (rule,) = [one for one in sentences() if one.id == "risk"]
    assert "not seen to differ" in rule.said(row)
    assert "so few can say nothing" in rule.said(row | {"risk_difference_seen": np.nan})


def test_the_interval_of_what_is_not_there_covers_it():
    """Without any difference the rules say so in nearly all samples."""
    said = [answer(ALIKE, size=16, seed=seed).contrasts.iloc[0] for seed in range(60)]
    gain = np.mean([row["gain_difference_low"] <= 0 <= row["gain_difference_high"] for row in said])
    ratio = np.mean([row["variance_ratio_low"] <= 1 <= row["variance_ratio_high"] for row in said])
    assert gain > 0.85 and ratio > 0.85


def test_policies_that_are_all_worth_the_same_have_no_ratio():
    found = answer(ALIKE | {"variance_aware": (0.5, 0.0, 2.0)}, size=5)
    assert np.isnan(found.contrasts["variance_ratio"].iloc[0]) and not found.contrasts["measurable"].iloc[0]
    assert "does not stand out" in found.text and "nan" not in found.text


def test_an_answer_is_written(tmp_path):
    found = answer(DIFFERENT | {"uwo": (1.5, 0.5, 2.0)}, size=8)
    page, record, image = found.write(tmp_path)
    assert found.text in page.read_text() and "| variance_aware |" in brief(found.table).to_markdown()
    assert [one["method"] for one in json.loads(record.read_text())["contrasts"]] == ["variance_aware", "uwo"]
    assert image.stat().st_size > 10_000
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "table.parquet"), found.table)


def test_seeds_of_trl_s_trainers_make_the_same_table():
    def trainer(rewards):
        log = [
            {"reward": one, "kl": 0.1, "completions/mean_length": 20.0, "step": k}
            for k, one in enumerate(rewards)
        ]
        return SimpleNamespace(state=SimpleNamespace(log_history=log))

    random = np.random.default_rng(0)
    logs = {
        name: [np.r_[0.0, random.normal(size=9), level + random.normal(size=10)] for _ in range(5)]
        for name, level in (("stock", 1.0), ("aware", 3.0))
    }
    found = of_trainers({name: [trainer(one) for one in logs[name]] for name in logs})
    row = found.table.set_index("method").loc["aware"]
    assert row["gain"] == pytest.approx(np.mean([one[10:].mean() for one in logs["aware"]]))
    assert row["kl"] == pytest.approx(2.0) and row["seeds"] == 5
    assert "5 seeds of each method" in found.text and "aware gains more than stock" in found.text


def test_every_rule_of_the_paragraph_reads_a_column():
    (row,) = answer(DIFFERENT).contrasts.to_dict("records")
    assert {one.measure for one in sentences()} <= set(row) and len(sentences()) == 4


# --- policies that are trained --------------------------------------------------------------------------


class Brevity:
    """Shorter is better, and the judge is less sure about short answers."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def judge(self, prompts, responses, policy):
        lengths = self.factor * np.array([len(text) for text in responses], dtype=float) / 10
        return Interval(np.stack([-lengths - 3 / (1 + lengths), -lengths + 3 / (1 + lengths)], axis=1))

    def true_reward(self, judgement, prompts, responses):
        return judgement.midpoint()


PPO_ = PPO(iterations=3, batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=3e-3, init_kl_coef=0.05)
SIZES = Sizes(
    training=PolicyTraining(ppo=PPO_),
    sampling=Sampling(min_new_tokens=2, max_new_tokens=8),
    warm_up=16,
    evaluation=Evaluation(prompts=4, samples=2),
    matching=Matching(factors=[0.2, 1.0, 5.0], each=1, attempts=3, tolerance=0.1),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "tiny-gpt2"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("gpt2", 8, 1)).save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts():
    return World(0).prompts(16, np.random.default_rng(0))


def test_tiny_policies_from_start_to_answer_which_is_kept(model, prompts, tmp_path, monkeypatch):
    options = {"model": model, "folder": tmp_path, "sizes": SIZES}
    found = compare(Task(prompts, Brevity()), policies=4, **options)
    assert found.methods == ["vanilla", "variance_aware"] and len(found.policies) == 8
    assert (
        found.table["kl"].min() > 0 and len(found.reference) == 4 and np.isfinite(found.table["gain"]).all()
    )
    assert found.contrasts["kl_off"].iloc[0] < 1  # the nearest of what was tried
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "write_stack", refuse)
    again = compare(Task(prompts, Brevity()), policies=4, **options)
    pd.testing.assert_frame_equal(again.policies, found.policies)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for task, changes in [
        (Task(prompts, Brevity(2.0)), {}),
        (Task(prompts[1:], Brevity()), {}),
        (Task(prompts, Brevity()), {"seeds": [1]}),
        (Task(prompts, Brevity()), {"sizes": SIZES.model_copy(update={"warm_up": 17})}),
    ]:
        with pytest.raises(AssertionError, match="trained again"):
            compare(task, policies=4, **options | changes)


def test_policies_in_parts_are_the_same_policies(model, prompts, tmp_path):
    task, methods = Task(prompts, Brevity()), {"a": Method("vanilla"), "b": Method("vanilla", beta=0.5)}
    options = {"model": model, "policies": 4, "match_kl": False}
    whole = compare(task, methods, folder=tmp_path / "whole", sizes=SIZES, **options)
    sizes = SIZES.model_copy(update={"together": 2})
    parts = compare(task, methods, folder=tmp_path / "parts", sizes=sizes, **options)
    pd.testing.assert_frame_equal(parts.policies, whole.policies, rtol=1e-5)
    assert (whole.policies.groupby("method")["beta"].first() == [0.05, 0.5]).all()


def test_an_objective_of_ones_own_is_known_by_its_instructions(monkeypatch):
    def softened(outcome, beta, strength):
        return Shaped(outcome.reward, outcome.variance.sqrt())

    def other(outcome, beta, strength):
        return Shaped(outcome.reward, outcome.variance.exp())

    keys = []
    for one in (softened, other, softened):
        monkeypatch.setitem(OBJECTIVES, "softened", one)
        keys.append(module._code_of("softened"))
    assert keys[0] == keys[2] != keys[1] and module._code_of("vanilla") == ""


def test_prompts_that_are_evaluated_are_not_trained_on(prompts):
    run = module._Run(Task(prompts, Brevity()), "x", 4, SIZES, 0, None, None)
    trained, evaluated = run.prompts
    assert not set(trained) & set(evaluated) and len(evaluated) == 4
    given = replace(run, evaluation=["one ?", "one ?", "two ?"]).prompts
    assert given == (list(dict.fromkeys(prompts)), ["one ?", "two ?"])


@pytest.mark.parametrize(
    ("methods", "changes", "words"),
    [
        (["vanilla"], {}, "methods: expected at least two"),
        (["vanilla", "uwo"], {"policies": 2}, "policies: expected at least three"),
        ({"a": Method(), "b": Method(beta=0.0)}, {}, "match_kl: vanilla needs one coefficient above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(model, prompts, tmp_path, monkeypatch, methods, changes, words):
    empty = pd.DataFrame({"kl": [1.0]})
    monkeypatch.setattr(module._Run, "trained", lambda *_: empty)
    options = {"policies": 4, "model": model, "folder": tmp_path, "sizes": SIZES} | changes
    with pytest.raises(ValueError, match=words):
        compare(Task(prompts, Brevity()), methods, **options)


@pytest.fixture(scope="module")
def file(model, prompts, tmp_path_factory):
    """Return a file for the command, with two reward models beside it."""
    folder = tmp_path_factory.mktemp("mine")
    for k in range(2):
        torch.manual_seed(k)
        config = tiny_config("gemma", 16, 1)
        config.num_labels = 1
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / f"reward-{k}")
        world_tokenizer().save_pretrained(folder / f"reward-{k}")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in prompts))
    content = {
        "policy": str(model),
        "prompts": "prompts.jsonl",
        "rewards": ["reward-0", "reward-1"],
        "methods": {"vanilla": None, "pessimist": {"objective": "worst_case", "beta": 0.1}},
        "policies": 3,
        "match_kl": False,
        "seeds": [0, 1],
        **json.loads(SIZES.model_dump_json(exclude_none=True)),
    }
    place = folder / "mine.yaml"
    place.write_text(yaml.safe_dump(content))
    return place


def test_the_command_compares_what_a_file_says(file, tmp_path, capsys):
    assert main(["compare", str(file), "--out", str(tmp_path)]) == 0
    assert "3 policies of each method in each of 2 worlds." in capsys.readouterr().out
    record = json.loads((tmp_path / "answer.json").read_text())
    assert [row["world"] for row in record["contrasts"]] == ["0", "1", "all"]
    assert (tmp_path / "answer.png").is_file()
    page = (tmp_path / "answer.html").read_text()
    assert page.count("<img ") == 1 and page.count("<table") == 2 and "answer.png" not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reward": ["x"]}, "reward: unknown key; allowed here: training, sampling"),
        ({"policy": "./none"}, "policy: there is no"),
        ({"training": {"ppo": {"iterations": 0}}}, "training.ppo.iterations"),
        ({"policies": None}, "policies"),
    ],
)
def test_a_wrong_file_is_refused_with_its_key(file, change, words):
    place = file.with_name("wrong.yaml")
    place.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    with pytest.raises(ProfileError, match=words):
        read_plan(place)
    assert main(["compare", str(place)]) == 2


def test_one_reward_model_has_no_variance(file, tmp_path, capsys):
    place = file.with_name("one.yaml")
    place.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"rewards": ["reward-0"]}))
    assert main(["compare", str(place), "--out", str(tmp_path)]) == 2
    assert "one model, without a variance" in capsys.readouterr().err
