"""A study of anybody's model, prompts and ratings, in the places of the package's."""

import json

import numpy as np
import pytest
import yaml
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig

from vaalign_lib.data.world.tokenizer import world_tokenizer
from vaalign_lib.data.world.world import World
from vaalign_lib.models import CONTEXT
from vaalign_lib.profiles import Study, load_profile
from vaalign_lib.store import RunStore


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
    training["ppo"]["learning_rate"] = 0.1  # so that one step leaves a KL
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
