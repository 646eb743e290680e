"""Hyperparameters and costs beside the paper's tables."""

import pandas as pd
import pytest

from vaalign_lib.experiments import hyperparameters as policy_settings
from vaalign_lib.experiments.hyperparameters import (
    SETTINGS_TABLES,
    quantization_of,
    resources_table,
    rows_table,
    settings_table,
)
from vaalign_lib.papers.printed import published
from vaalign_lib.profiles import load_profile


def test_every_printed_setting_has_a_row_and_the_paper_profile_has_its_value():
    table = settings_table(load_profile("embedded"))
    printed = published()
    for number in SETTINGS_TABLES:
        names = set(printed.loc[printed["item"] == f"Table {number}", "quantity"])
        ours = set(table.loc[table["table"] == f"Table {number}", "setting"].str.replace(" ", "_"))
        assert names - ours <= {"methods", "other_settings", "epochs"} and ours <= names
    assert table["paper_agrees"].all()
    rates = table[table["setting"] == "learning rate"].set_index("table")
    assert rates["paper"].to_dict() == {
        "Table 9": "1.414e-05",
        "Table 10": "1.5e-05",
        "Table 12": "3.14e-09",
        "Table 13": "5.7e-05",
    }
    assert set(rates["here"]) == {"0.0012"}


def test_a_setting_that_differs_is_seen(monkeypatch):
    paper = load_profile("paper")
    changed = paper.model_copy(
        update={
            "policies": paper.policies.model_copy(
                update={"sampling": paper.policies.sampling.model_copy(update={"top_k": 49})}
            )
        }
    )
    monkeypatch.setattr(policy_settings, "load_profile", lambda _: changed)
    table = settings_table(paper)
    assert table.loc[~table["paper_agrees"], "setting"].tolist() == ["top k"]


def test_quantization_is_read_back_from_what_was_loaded():
    lora = load_profile("paper").policies.training["mistral"].lora
    made = quantization_of(lora)
    assert made.load_in_4bit and made.bnb_4bit_quant_type == "nf4"


def test_the_seven_rows_say_what_stands_in():
    rows = rows_table(load_profile("embedded"))
    assert len(rows) == 7 and rows["source of rewards"].str.contains("stand-in").sum() == 6
    assert rows["trained"].value_counts().to_dict() == {"all weights": 4, "adapters (LoRA)": 3}


def test_costs_are_shares_of_a_stack():
    runs = pd.DataFrame(
        {
            "architecture": ["gpt2", "gpt2", "mistral", "gpt2"],
            "objective": ["vanilla", "variance_aware", "vanilla", "reference"],
            "policies": [80, 80, 40, None],
            "training_seconds": [160.0, 320.0, 80.0, None],
            "peak_bytes": [8e8, 8e8, 4e8, None],
            "bytes": [1e6, 1e6, 5e5, None],
            "weights": [1000, 1000, 10, None],
            "device": "a core",
        }
    )
    rewards = pd.DataFrame([{"table": "Table 6", "what": "a model", "seconds": 9.0, "bytes": 2e6}])
    table = resources_table(runs, rewards).set_index("table")
    assert table.index.tolist() == ["Table 6", "Table 11", "Table 15"]
    assert table.loc["Table 11", "seconds"] == 3 and table.loc["Table 15", "seconds"] == 2
    assert table.loc["Table 11", "megabytes_of_memory"] == pytest.approx(10)
    assert table.loc["Table 6", "megabytes_of_disk"] == 2
    assert table.loc["Table 11", "printed_training_time"] == "3.86 hours"
