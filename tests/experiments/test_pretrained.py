"""The profile `pretrained` with anybody's model, prompts and ratings in the places of the package's."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from vaalign_lib.experiments.conditions import HEADS_ROW, PEOPLE_ROW, PLACEBO, Condition, plan
from vaalign_lib.experiments.people_policies import stacks
from vaalign_lib.experiments.policies import settings_key, source_of, train_run
from vaalign_lib.reproduce.plan import complete_plan
from vaalign_lib.rewards.rated_heads import SmoothField
from vaalign_lib.rewards.raters import HeardWords

RUN = Condition(*PEOPLE_ROW, "variance_aware", "independent")


def test_policies_are_trained_on_what_each_has_heard(study):
    folder = train_run(study, RUN)
    policies = pd.read_parquet(folder / "policies.parquet")
    assert len(policies) == 2 and np.isfinite(policies["true_reward"]).all() and policies["gold"].isna().all()
    assert (policies["step_length"] > 0).all()
    start = pd.read_parquet(train_run(study, RUN.start) / "policies.parquet")
    assert (start["step_length"] == 0).all() and np.isfinite(start["true_reward"]).all()
    source = source_of(study, RUN)
    assert isinstance(source, HeardWords)
    assert (source.people(0) != source.people(1)).any()
    answers = pd.read_parquet(folder / "answers.parquet")
    assert answers.groupby(["policy", "prompt"]).size().tolist() == [2] * 8
    means = [source.true_reward(None, part, part).mean() for part in (
        answers["answer"][answers["policy"] == j].tolist() for j in (0, 1))]  # fmt: skip
    assert np.allclose(policies["true_reward"], means)


@pytest.mark.parametrize("row", [PEOPLE_ROW, HEADS_ROW], ids=lambda row: row[1])
def test_a_placebo_is_trained_by_what_the_reference_writes(study, row):
    runs = stacks(row)
    assert list(runs) == ["reference", "vanilla", "variance_aware", PLACEBO]
    runs = {name: replace(one, regime="equal_mean_penalty") for name, one in runs.items()}
    folders = {name: train_run(study, one) for name, one in runs.items()}
    written = pd.read_parquet(folders["reference"] / "answers.parquet")["answer"].tolist()
    source = source_of(study, runs[PLACEBO])
    if isinstance(source, SmoothField):
        assert set(source.sample) == set(written)
    else:
        assert source.used.sum() == sum(len(text.split()) for text in written)
    logs = [pd.read_parquet(folders[name] / "log.parquet") for name in ("variance_aware", PLACEBO)]
    assert (logs[0]["reward"] == logs[1]["reward"]).all()  # of the first step
    assert (logs[0]["variance"] != logs[1]["variance"]).all()


def test_the_plan_is_complete_and_small(study):
    text, lacks = complete_plan(study, 1)
    assert not lacks and text.startswith(f"{len(plan(['people']))} runs: ")


def test_other_ratings_are_other_results(study):
    before = settings_key(study.profile, 0, RUN)
    words = study.store.root.parent / "words.jsonl"
    words.write_text(words.read_text() + '\n{"text": "more", "ratings": [1, 2]}')
    assert settings_key(study.profile, 0, RUN) != before
