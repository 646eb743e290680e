"""The hyperparameters and costs of policies, beside the paper's Tables 9 to 18."""

import re
import tempfile
from collections.abc import Callable
from typing import Any

import pandas as pd
from transformers import BitsAndBytesConfig, MistralConfig, MistralForCausalLM

from vaalign_lib.data.pairs import EMBEDDED
from vaalign_lib.experiments.conditions import JUDGES, ROWS
from vaalign_lib.papers.printed import published
from vaalign_lib.policies.stack import PolicyStack
from vaalign_lib.profiles import PPO, Lora, Profile, Sampling, load_profile
from vaalign_lib.training.run import lora_config

SETTINGS_TABLES = ("9", "10", "12", "13", "16", "17", "18")
_TRAINED = {
    "9": ("gpt2", "vanilla"),
    "10": ("gpt2", "variance_aware"),
    "12": ("qwen2", "vanilla"),
    "13": ("mistral", "vanilla"),
}
_TEXTS = ("methods", "other_settings")  # sentences, not settings
_FOLLOWS = ("epochs",)  # from the steps and the number of prompts

_PPO: dict[str, Callable[[PPO], Any]] = {
    "effective_batch_size": lambda ppo: ppo.batch_size,
    "batch_size": lambda ppo: ppo.batch_size,
    "mini_batch_size": lambda ppo: ppo.mini_batch_size,
    "learning_rate": lambda ppo: ppo.learning_rate,
    "steps": lambda ppo: ppo.iterations,
    "gradient_accumulation_steps": lambda ppo: ppo.gradient_accumulation_steps,
    "initial_kl_coefficient": lambda ppo: ppo.init_kl_coef,
    "adaptive_kl_control": lambda ppo: ppo.adaptive_kl is not None,
    "kl_penalty_type": lambda ppo: ppo.kl_penalty,
    "target_kl": lambda ppo: ppo.adaptive_kl and ppo.adaptive_kl.target,
    "horizon": lambda ppo: ppo.adaptive_kl and ppo.adaptive_kl.horizon,
    "clip_range": lambda ppo: ppo.cliprange,
    "clip_range_value": lambda ppo: ppo.cliprange_value,
    "value_function_coefficient": lambda ppo: ppo.vf_coef,
}
_LORA: dict[str, Callable[[Any], Any]] = {
    "lora_rank": lambda lora: lora.r,
    "lora_scaling": lambda lora: lora.lora_alpha,
    "lora_dropout": lambda lora: lora.lora_dropout,
    "bias_adaptation": lambda lora: lora.bias,
}
_FOUR_BIT: dict[str, Callable[[BitsAndBytesConfig], Any]] = {
    "load_in_4bit": lambda config: config.load_in_4bit,
    "weight_bits": lambda config: 4 if config.load_in_4bit else 8,
    "compute_data_type": lambda config: str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
    "double_quantization": lambda config: config.bnb_4bit_use_double_quant,
    "quantization_type": lambda config: config.bnb_4bit_quant_type,
}
_SAMPLING: dict[str, Callable[[Sampling], Any]] = {
    "maximum_generated_tokens": lambda sampling: sampling.max_new_tokens,
    "minimum_generated_length": lambda sampling: sampling.min_new_tokens,
    "top_k": lambda sampling: sampling.top_k,
    "top_p": lambda sampling: sampling.top_p,
    "temperature": lambda sampling: sampling.temperature,
    "stochastic_decoding": lambda sampling: sampling.temperature > 0,
}


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
    paper = load_profile("paper")
    rows = []
    for number in SETTINGS_TABLES:
        theirs, ours = _settings(number, paper), _settings(number, profile)
        printed = published()
        printed = printed[printed["item"] == f"Table {number}"]
        for key, value in printed["printed"].items():
            setting = str(key).partition(".")[2]
            if setting in _TEXTS or setting in _FOLLOWS:
                continue
            rows.append(
                {
                    "table": f"Table {number}",
                    "setting": setting.replace("_", " "),
                    "printed": value,
                    "paper": _text(theirs.get(setting)),
                    "here": _text(ours.get(setting)),
                    "paper_agrees": _same(value, theirs.get(setting)),
                }
            )
    return pd.DataFrame(rows)


def _settings(number: str, profile: Profile) -> dict[str, Any]:
    """Return a profile's value of each setting of a table; nothing where it has no such part."""
    if number == "18":
        return {name: get(profile.policies.sampling) for name, get in _SAMPLING.items()}
    lora = profile.policies.training["mistral"].lora
    if number == "16":
        return {} if lora is None else {k: get(lora_config(lora)) for k, get in _LORA.items()}
    if number == "17":
        if lora is None or not lora.four_bit:
            return {"load_in_4bit": False}
        made = quantization_of(lora)
        return {name: get(made) for name, get in _FOUR_BIT.items()}
    architecture, objective = _TRAINED[number]
    ppo = profile.policies.training[architecture].settings(objective)
    return {name: get(ppo) for name, get in _PPO.items()}


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

    Args:
        runs: of `results.Results`.
        rewards: rows with `table`, `what`, `seconds`, `bytes`.

    Memory is the worker process's peak up to the end of a stack, so an upper bound; time is that of
    training alone.
    """
    printed = published()["printed"]
    rows = [
        {"table": row["table"], "what": row["what"], "seconds": row["seconds"],
         "megabytes_of_disk": row["bytes"] / 1e6}
        for row in rewards.to_dict("records")
    ]  # fmt: skip
    costly = runs[runs["objective"] != "reference"]
    for number, architecture in (("11", "gpt2"), ("14", "qwen2"), ("15", "mistral")):
        mine = costly[costly["architecture"] == architecture]
        if mine.empty:
            continue
        rows.append(
            {
                "table": f"Table {number}",
                "what": f"one {architecture} policy of {mine['policies'].median():.0f} in a stack, "
                + ", ".join(mine["device"].unique()),
                "seconds": (mine["training_seconds"] / mine["policies"]).median(),
                "megabytes_of_memory": (mine["peak_bytes"] / mine["policies"]).median() / 1e6,
                "megabytes_of_disk": mine["bytes"].median() / 1e6,
                "trained_weights": mine["weights"].median(),
            }
        )
    for row in rows:
        key = str(row["table"]).lower().replace(" ", "")
        row |= {
            f"printed_{name}": printed.get(f"{key}.{name}", "")
            for name in ("training_time", "disk_space", "gpu_memory", "gpu_model")
        }
        units = published()["unit"]
        for name in ("training_time", "disk_space", "gpu_memory"):
            row[f"printed_{name}"] = f"{row[f'printed_{name}']} {units.get(f'{key}.{name}', '')}"
    return pd.DataFrame(rows)
