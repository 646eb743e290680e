"""What rows about the store, results and clusters need; see `prepare`."""

import socket
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from vaalign_lib.experiments.conditions import Condition
from vaalign_lib.store import write_record


def silent_server(folder: Path):
    """Accept connections and never say a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"


def results(folder: Path) -> None:
    """Write results that are complete, and such as lack something."""
    about = {"run": "mine", **asdict(Condition("qwen2", "judge-b"))}
    tables = {
        "policies": pd.DataFrame({"run": ["mine"], "policy": [0], "true_reward": [1.0]}),
        "runs": pd.DataFrame([about]),
        "curves": pd.DataFrame({"run": ["mine"], "step": [1]}),
    }
    for name in ("complete", "without_curves", "cut", "without_column", "twice", "unknown"):
        place = folder / name
        place.mkdir()
        for table, rows in tables.items():
            rows.to_parquet(place / f"{table}.parquet")
    write_record(folder / "complete", {})
    (folder / "without_curves" / "curves.parquet").unlink()
    cut = folder / "cut" / "policies.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    tables["policies"].drop(columns="true_reward").to_parquet(folder / "without_column" / "policies.parquet")
    pd.concat([tables["runs"]] * 2).to_parquet(folder / "twice" / "runs.parquet")
    tables["policies"].assign(run="another").to_parquet(folder / "unknown" / "policies.parquet")
