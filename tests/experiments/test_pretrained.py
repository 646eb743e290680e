"""The profile `pretrained` with anybody's model, prompts and ratings in the places of the package's."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.experiments.conditions import HEADS_ROW, PEOPLE_ROW, PLACEBO, Condition, plan
from vaalign_lib.experiments.people_policies import stacks
from vaalign_lib.experiments.policies import settings_key, source_of, train_run
from vaalign_lib.models import CONTEXT
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.reproduce.plan import complete_plan
from vaalign_lib.rewards.rated_heads import SmoothField
from vaalign_lib.rewards.raters import HeardWords
from vaalign_lib.store import RunStore

RUN = Condition(*PEOPLE_ROW, "variance_aware", "independent")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of a tiny random Llama that answers the world's prompts, whose words three people rated."""
    folder, tokenizer = tmp_path_factory.mktemp("mine"), world_tokenizer()
    ids = dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), tokenizer.eos_token_id)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "max_position_embeddings": CONTEXT}  # fmt: skip
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    random = np.random.default_rng(0)
    rated = [{"text": word, "ratings": random.integers(-4, 5, 3).tolist()} for word in tokenizer.get_vocab()]
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, rated)))
    bert = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(tokenizer), **bert)).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    texts = [{"text": one, "ratings": random.integers(-4, 5, 4).tolist()}
             for one in dict.fromkeys(World(0).corpus(3000, random)[1])]  # fmt: skip
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    asked = [{"prompt": one} for one in World(0).prompts(20, random)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    training = {"lora": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, "precision": "bfloat16"}
    training["ppo"] = {"iterations": 1, "batch_size": 4, "mini_batch_size": 4, "ppo_epochs": 1}
    profile = {
        "extends": "smoke",
        "name": "mine",
        "reference": {"models": {"llama": "model"}},
        "raters": {"words": "words.jsonl", "texts": "texts.jsonl"},
        "reward_model": {"backbone": "encoder"},
        "policies": {"count": 2, "runs": ["people"], "data": "prompts.jsonl", "prompts": 20, "warm_up": 16,
                     "evaluation": {"prompts": 4, "samples": 2}, "training": {"llama": training}},
    }  # fmt: skip
    (folder / "mine.yaml").write_text(yaml.safe_dump(profile))
    return Study(RunStore(folder / "store"), load_profile(folder / "mine.yaml"), 0)


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
