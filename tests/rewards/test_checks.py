"""Every question to a reward model is answered rightly by one that has the fault and by one that has not."""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit
from tokenizers import processors

from tests.rewards.conftest import save_tiny
from vaalign_lib.experiments.reward_check import read_rules
from vaalign_lib.models import conversation_ids
from vaalign_lib.rewards import checks
from vaalign_lib.rewards.checks import (
    Reader,
    label_slope,
    length_finding,
    model_findings,
    rating_findings,
    readable_findings,
    score_findings,
    times_off,
)
from vaalign_lib.rewards.classifier import SIDES, features_and_scores, load_reward_model
from vaalign_lib.statistics.tests import Estimate

RULES = {rule.id: rule for rule in read_rules()}
RANDOM = np.random.default_rng(0)


def words(count, longest):
    return ["".join(RANDOM.choice([*"abcdefgh "], RANDOM.integers(2, longest))) + "z" for _ in range(count)]


TABLE = pd.DataFrame({"prompt": words(24, 6), "chosen": words(24, 12), "rejected": words(24, 12)})
TABLE["rejected"] = TABLE["rejected"] + RANDOM.choice([*"klm"], 24)  # no common last letter


def asked(folder, max_length=4096):
    """Return the verdict on every rule about a model."""
    reader = Reader.of(folder, max_length)
    ids = {side: reader.ids(TABLE["prompt"], TABLE[side]) for side in SIDES}
    found = [*readable_findings(reader, ids["chosen"] + ids["rejected"]), length_finding(reader, TABLE)]
    if all(one.holds for one in found[:3]):
        found += model_findings(reader, TABLE, {side: reader.scores(rows) for side, rows in ids.items()})
    return {one.rule: RULES[one.rule].verdict(one) for one in found}


def changed(folder, architecture, change):
    """Save a tiny model, load it, change it and its tokenizer, and save it again."""
    save_tiny(folder, architecture)
    model, tokenizer = load_reward_model(folder)
    with torch.no_grad():
        change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def drop_head(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def two_outputs(folder):
    text = (folder / "config.json").read_text().replace('"LABEL_0"', '"LABEL_0", "1": "LABEL_1"', 1)
    assert "LABEL_1" in text
    (folder / "config.json").write_text(text)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] = weights["score.weight"].repeat(2, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def begin_twice(model, tokenizer):
    added = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = added


def template(text):
    def change(model, tokenizer):
        tokenizer.chat_template = text

    return change


def far_away(model, tokenizer):
    model.classifier.bias += 1000


FAULTS = {
    "weights.finite": ("llama", lambda m, t: m.score.weight[0, 0].fill_(np.inf), "failed"),
    "tokens.known": ("llama", lambda m, t: m.resize_token_embeddings(9), "failed"),
    "padding.own": ("llama", lambda m, t: setattr(t, "pad_token", "</s>"), "warned"),
    "padding.batch": ("llama", lambda m, t: setattr(m.config, "pad_token_id", 5), "failed"),
    "padding.other_side": ("gpt2", lambda m, t: None, "warned"),
    "end.marked": ("llama", template("{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"), "warned"),
    "template.whole": ("llama", template("<s>{{ messages[-1]['content'] }}</s>"), "failed"),
    "template.once": ("llama", begin_twice, "warned"),
    "dtype.bfloat16": ("bert", far_away, "warned"),
    "dtype.float16": ("llama", lambda m, t: m.score.weight.mul_(1e6), "warned"),
    "scale.spread": ("llama", lambda m, t: m.score.weight.mul_(0), "failed"),
    "scale.centre": ("bert", far_away, "warned"),
}


def centre(model, tokenizer):
    """Turn the head away from what all conversations share."""
    ids = conversation_ids(tokenizer, list(TABLE["prompt"]), list(TABLE["chosen"]), 4096)
    shared = features_and_scores(model, ids)[0].mean(0)
    weight = model.score.weight[0]
    weight -= (weight @ shared) / (shared @ shared) * shared


def test_a_sound_model_passes_everything(tmp_path):
    found = asked(changed(tmp_path, "llama", centre))
    assert set(found) == {one.id for one in RULES.values() if one.about == "model"}
    assert found.pop("length.fits") == "unclear"  # all of 48, which could be 93%
    assert set(found.values()) == {"passed"}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_fault_is_found(rule, tmp_path):
    architecture, change, verdict = FAULTS[rule]
    assert asked(changed(tmp_path, architecture, change))[rule] == verdict


def test_a_head_that_is_not_in_the_files_and_two_outputs_are_found(tmp_path):
    for fault in (drop_head, two_outputs):
        folder = save_tiny(tmp_path / fault.__name__, "llama")
        fault(folder)
        found = asked(folder)
        assert found["weights.present"] == "failed" and "padding.batch" not in found


def test_no_padding_token_at_all_gives_no_scores_in_a_batch(tmp_path):
    folder = changed(tmp_path, "llama", lambda m, t: setattr(m.config, "pad_token_id", None))
    assert asked(folder)["padding.batch"] == "failed"


def test_texts_that_are_too_long_are_counted(tmp_path):
    reader = Reader.of(save_tiny(tmp_path, "llama"), 35)
    found = length_finding(reader, TABLE)
    whole = Reader.of(tmp_path, 4096)
    lengths = [len(row) for side in SIDES for row in whole.ids(TABLE["prompt"], TABLE[side])]
    assert found.value == np.mean(np.array(lengths) <= 35) and 0 < found.value < 1


def test_changes_of_a_padded_score_are_those_of_transformers_own_padding(tmp_path):
    reader = Reader.of(save_tiny(tmp_path, "gpt2"), 4096)
    rows = [row for row in reader.ids(TABLE["prompt"], TABLE["chosen"]) if row is not None][:6]
    for side in ("left", "right"):
        reader.tokenizer.padding_side = side
        batch = reader.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        with torch.no_grad():
            expected = reader.model(**batch).logits[:, 0].double().numpy()
        np.testing.assert_allclose(reader.padded_scores(rows, side), expected, atol=1e-6)


# --- of scores ------------------------------------------------------------------------------------------


def pairs(gap, size=400, members=4, noise=1.0, shift=0.0, subsets=1, seed=0):
    """Return labelled texts and scores, with noise of each member and shifts of whole members."""
    random = np.random.default_rng(seed)
    texts = {side: ["x" * k for k in random.integers(1, 60, size)] for side in SIDES}
    table = pd.DataFrame(texts).assign(subset=[f"part {k % subsets}" for k in range(size)])
    moved = shift * random.normal(size=members)
    scores = {
        side: sign * gap / 2
        + random.normal(size=(size, 1))
        + noise * random.normal(size=(size, members))
        + moved
        for side, sign in zip(SIDES, (1, -1), strict=True)
    }
    return table, scores


def verdicts(table, scores):
    return {one.rule: RULES[one.rule].verdict(one) for one in score_findings(table, scores)}


def test_good_scores_pass_everything():
    table, scores = pairs(
        1.4
    )  # noise of the mean gap: variance 2.5; log odds are about 0.56 the gap... times
    found = verdicts(table, {side: one * 1.0 for side, one in scores.items()})
    assert set(found) == {one.id for one in RULES.values() if one.about == "scores"} - {
        "ratings.rank", "variance.rank", "variance.size"}  # fmt: skip
    assert {verdict for name, verdict in found.items() if name != "scale.labels"} == {"passed"}


def test_faults_of_scores_are_found():
    table, scores = pairs(1.4, noise=0.01)
    assert verdicts(table, scores)["members.spread"] == "warned"
    table, scores = pairs(1.4, noise=0.1, shift=3.0)
    found = verdicts(table, scores)
    assert found["members.spread"] == "passed" and found["members.order"] == "warned"
    table, scores = pairs(-0.5)
    assert verdicts(table, scores)["accuracy.all"] == "failed"
    table, scores = pairs(0.0)
    assert verdicts(table, scores)["accuracy.all"] == "unclear"
    assert "accuracy.all" not in verdicts(table.drop(columns="subset"), scores)


def test_a_subset_that_is_ranked_the_other_way_round_is_named():
    table, scores = pairs(1.4, subsets=4)
    bad = (table["subset"] == "part 2").to_numpy()
    scores["chosen"][bad], scores["rejected"][bad] = scores["rejected"][bad], scores["chosen"][bad].copy()
    (found,) = [one for one in score_findings(table, scores) if one.rule == "accuracy.subsets"]
    assert found.holds is False and "part 2" in found.reproduced and "part 1" not in found.reproduced


def test_a_reward_for_length_is_found():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 60, (400, 2))
    longer = np.sort(lengths, axis=1)[:, ::-1]  # chosen is the longer one
    longer[::5] = longer[::5, ::-1]  # but in every fifth pair
    table = pd.DataFrame({side: ["x" * k for k in longer[:, i]] for i, side in enumerate(SIDES)})
    scores = {side: longer[:, [i]] / 10 + random.normal(size=(400, 1)) for i, side in enumerate(SIDES)}
    found = verdicts(table.assign(subset="a"), scores)
    assert found["length.rewarded"] == found["accuracy.shorter"] == "warned"
    assert found["accuracy.all"] == "passed"  # which hides it


def test_the_slope_of_labels_is_the_likeliest_and_its_interval_covers():
    covered = []
    for seed in range(300):
        random = np.random.default_rng(seed)
        gap = random.normal(size=200)
        gap = np.where(random.random(200) < expit(2.5 * gap), gap, -gap)  # of the chosen one
        found = label_slope(gap)
        covered.append(found.low <= 2.5 <= found.high)
        if seed < 5:
            best = minimize_scalar(
                lambda b, gap=gap: -log_expit(b * gap).sum(), bounds=(1e-3, 50), method="bounded"
            )
            assert found.value == pytest.approx(best.x, rel=1e-3)
    assert 0.92 < np.mean(covered) < 0.985
    assert np.isnan(label_slope(np.ones(9)).value) and np.isnan(label_slope(-np.ones(9)).value)


def test_times_off_is_the_same_both_ways():
    assert times_off(Estimate(0.5, 0.4, 0.8, 9)) == Estimate(2.0, 1.25, 2.5, 9)
    assert times_off(Estimate(2.0, 1.25, 2.5, 9)) == Estimate(2.0, 1.25, 2.5, 9)
    assert times_off(Estimate(1.5, 0.5, 2.0, 9)).low == 1.0


# --- against people -------------------------------------------------------------------------------------


def rated(scale=1.0, knows=True, sign=1, size=500):
    """Return members' scores, whose errors have the deviations they state times a scale, and people's."""
    random = np.random.default_rng(3)
    truth, deviation = random.normal(size=size), random.lognormal(-0.5, 0.7, size)
    told = deviation if knows else random.permutation(deviation)
    error = scale * deviation * random.normal(size=size)
    members = sign * (truth + error)[:, None] + told[:, None] * _exact(random, size)
    return members, truth[:, None] + 0.3 * random.normal(size=(size, 3))


def _exact(random, size):
    """Draw six members each, of mean 0 and variance 1."""
    one = random.normal(size=(size, 6))
    one -= one.mean(1, keepdims=True)
    return one / one.std(1, ddof=1, keepdims=True)


@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({}, {}),
        ({"sign": -1}, {"ratings.rank": "failed"}),
        ({"knows": False}, {"variance.rank": "unclear"}),
        ({"scale": 8.0}, {"variance.size": "warned"}),
    ],
)
def test_variances_against_ratings(options, bad):
    found = {one.rule: RULES[one.rule].verdict(one) for one in rating_findings(*rated(**options))}
    assert set(found) == {"ratings.rank", "variance.rank", "variance.size"}
    expected = dict.fromkeys(found, "passed") | bad
    keys = bad if options else found
    assert {name: found[name] for name in keys} == {name: expected[name] for name in keys}


def test_what_gives_no_answer_is_not_asked():
    assert rating_findings(np.zeros((9, 3)), [[1.0, 2.0]] * 9) == []
    (one,) = rating_findings(np.arange(9.0)[:, None], [[k, k + 1.0] for k in range(9)])
    assert one.rule == "ratings.rank" and one.value == 1.0
    assert checks.LEAST == 5
