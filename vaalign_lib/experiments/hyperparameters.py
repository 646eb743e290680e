"""The hyperparameters and costs of policies, beside the paper's Tables 9 to 18."""

import re
import tempfile
from functools import reduce
from typing import Any

import pandas as pd
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from vaalign_lib.data.pairs import EMBEDDED
from vaalign_lib.experiments.conditions import JUDGES, ROWS
from vaalign_lib.papers.printed import published
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import Lora, Profile, load_profile
from vaalign_lib.training.run import lora_config

_PPO = {  # a printed setting: where it is held
    "effective_batch_size": "batch_size",
    "batch_size": "batch_size",
    "mini_batch_size": "mini_batch_size",
    "learning_rate": "learning_rate",
    "steps": "iterations",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "initial_kl_coefficient": "init_kl_coef",
    "kl_penalty_type": "kl_penalty",
    "target_kl": "adaptive_kl.target",
    "horizon": "adaptive_kl.horizon",
    "clip_range": "cliprange",
    "clip_range_value": "cliprange_value",
    "value_function_coefficient": "vf_coef",
}
_LORA = {
    "lora_rank": "r",
    "lora_scaling": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "bias_adaptation": "bias",
}
_FOUR_BIT = {
    "load_in_4bit": "load_in_4bit",
    "double_quantization": "bnb_4bit_use_double_quant",
    "quantization_type": "bnb_4bit_quant_type",
}
_SAMPLING = {
    "maximum_generated_tokens": "max_new_tokens",
    "minimum_generated_length": "min_new_tokens",
    "top_k": "top_k",
    "top_p": "top_p",
    "temperature": "temperature",
}
_TRAINED = {  # by table: whose PPO
    "9": ("gpt2", "vanilla"),
    "10": ("gpt2", "variance_aware"),
    "12": ("qwen2", "vanilla"),
    "13": ("mistral", "vanilla"),
}
SETTINGS_TABLES = (*_TRAINED, "16", "17", "18")
_NO_SETTINGS = ("methods", "other_settings", "epochs")  # sentences; the last follows from the steps


def rows_table(profile: Profile) -> pd.DataFrame:
    """Return what stands in for each (policy, source of rewards) of Tables 1 to 3."""
    real = profile.policies.data != EMBEDDED
    kind = "heads" if real else "bootstrap heads"
    heads = f"{profile.ensembles.members} {kind} on one {profile.reward_model.backbone} backbone"
    truth = profile.true_reward if real else "gold, for a separate reward model"
    rows = []
    for architecture, source in ROWS:
        lora = profile.policies.training[architecture].lora
        tiny = f"{architecture}-like, width {profile.reference.width}"
        named = profile.policies.judges.get(source)
        rows.append(
            {
                "row": f"{architecture}-{source}",
                "policy": profile.reference.models[architecture] if real else tiny,
                "trained": "adapters (LoRA)" if lora else "all weights",
                "source of rewards": named.model if named else JUDGES.get(source, heads),
                "true reward": truth if source == "ensemble" else "middle of the judge's interval",
            }
        )
    return pd.DataFrame(rows)


def settings_table(profile: Profile) -> pd.DataFrame:
    """Return a row for every printed setting of Tables 9, 10, 12, 13 and 16 to 18.

    Columns: `table`, `setting`, `printed`, `paper` (what the paper profile does), `here` (what this
    profile does), `paper_agrees` (whether `paper` is as printed).
    """
    paper, printed = load_profile("paper"), published()
    printed = printed.assign(setting=printed.index.str.partition(".").get_level_values(2))
    rows = []
    for number in SETTINGS_TABLES:
        theirs, ours = _settings(number, paper), _settings(number, profile)
        lines = printed[(printed["item"] == f"Table {number}") & ~printed["setting"].isin(_NO_SETTINGS)]
        for setting, value in zip(lines["setting"], lines["printed"], strict=True):
            row = {"table": f"Table {number}", "setting": setting.replace("_", " "), "printed": value}
            row |= {"paper": _text(theirs.get(setting)), "here": _text(ours.get(setting))}
            rows.append(row | {"paper_agrees": _same(value, theirs.get(setting))})
    return pd.DataFrame(rows)


def _settings(number: str, profile: Profile) -> dict[str, Any]:
    """Return a profile's value of each setting of a table; nothing where it has no such part."""
    if number in _TRAINED:
        architecture, objective = _TRAINED[number]
        ppo = profile.policies.training[architecture].settings(objective)
        return _held(ppo, _PPO) | {"adaptive_kl_control": ppo.adaptive_kl is not None}
    if number == "18":
        sampling = profile.policies.sampling
        return _held(sampling, _SAMPLING) | {"stochastic_decoding": sampling.temperature > 0}
    lora = profile.policies.training["mistral"].lora
    if number == "16":
        return {} if lora is None else _held(lora_config(lora), _LORA)
    if lora is None or not lora.four_bit:
        return {"load_in_4bit": False}
    made = quantization_of(lora)
    computed = str(made.bnb_4bit_compute_dtype).removeprefix("torch.")
    return _held(made, _FOUR_BIT) | {
        "weight_bits": 4 if made.load_in_4bit else 8,
        "compute_data_type": computed,
    }


def _held(settings: Any, places: dict[str, str]) -> dict[str, Any]:
    """Return what is held in places such as `adaptive_kl.target`; None where a part is None."""
    return {
        name: reduce(lambda part, one: part and getattr(part, one), place.split("."), settings)
        for name, place in places.items()
    }


def quantization_of(lora: Lora) -> BitsAndBytesConfig:
    """Return how a base in 4 bits is held, read back from a tiny one that was loaded."""
    small = MistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        MistralForCausalLM(small).save_pretrained(folder)
        stack = PolicyStack(folder, 1, lora=lora_config(lora), four_bit=True, device="cpu")
    found: BitsAndBytesConfig = stack.model.config.quantization_config
    return found


def _same(printed: str, value: Any) -> bool:
    if value is None:
        return False
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value).lower() in re.findall(r"\w+", printed.lower())
    return bool(float(printed) == value)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def resources_table(runs: pd.DataFrame, rewards: pd.DataFrame) -> pd.DataFrame:
    """Return what a policy and a reward model cost here, beside the paper's tables.

    Memory is the worker process's peak up to the end of a stack, so an upper bound; time is that of
    training alone. Both arguments are of `results.Results`.
    """
    found = rewards[["table", "what", "seconds"]].assign(megabytes_of_disk=rewards["bytes"] / 1e6)
    rows = [dict(found.iloc[place]) for place in range(len(found))]
    for number, architecture in (("11", "gpt2"), ("14", "qwen2"), ("15", "mistral")):
        mine = runs[(runs["objective"] != "reference") & (runs["architecture"] == architecture)]
        if mine.empty:
            continue
        devices = ", ".join(mine["device"].unique())
        rows.append(
            {
                "table": f"Table {number}",
                "what": f"one {architecture} policy of {mine['policies'].median():.0f} in a stack, {devices}",
                "seconds": (mine["training_seconds"] / mine["policies"]).median(),
                "megabytes_of_memory": (mine["peak_bytes"] / mine["policies"]).median() / 1e6,
                "megabytes_of_disk": mine["bytes"].median() / 1e6,
                "trained_weights": mine["weights"].median(),
            }
        )
    return pd.DataFrame([row | _printed_costs(row["table"]) for row in rows])


def _printed_costs(table: str) -> dict[str, str]:
    lines = published()[["printed", "unit"]].agg(" ".join, axis=1).str.strip()
    names = ("training_time", "disk_space", "gpu_memory", "gpu_model")
    key = table.lower().replace(" ", "")
    return {f"printed_{name}": lines.get(f"{key}.{name}", "") for name in names}
