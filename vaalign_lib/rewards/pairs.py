"""Pairs of a file or the hub for a backbone: what it can read of them, divided into parts."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vaalign_lib.data.pairs import PARTS, DataError, read_pairs, write_pairs
from vaalign_lib.rewards.classifier import reader, usable

SHARES = (0.6, 0.1)  # of the prompts: to learn from, for the temperature; the rest is looked at


def real_pairs(
    seed: int, pairs: str, evaluation: str, limits: dict[str, int], backbone: str, max_length: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Read pairs from files or the hub, and divide them by prompt.

    Without `evaluation`, pairs to look at, these are a part of `pairs`; what has one of their prompts is not
    learned from. What the backbone cannot tell apart, or not read whole, is left out. `limits` are of a part.

    Returns:
        The pairs with their `part`, and how many were not taken, by reason.
    """
    tokenizer, length = reader(backbone, max_length)
    tables: list[pd.DataFrame] = []
    left_out: dict[str, int] = {}
    for source, to in ((pairs, ""), (evaluation, ", to look at")):
        if source:
            table = read_pairs(source)
            kept, unusable = usable(tokenizer, table, length)
            tables.append(kept)
            left_out |= {f"{why}{to}": n for why, n in (table.attrs["left out"] | unusable).items()}
    table, *others = tables
    shares, random = SHARES, np.random.default_rng(seed)
    for looked_at in others:
        known = table["prompt"].isin(looked_at["prompt"])
        left_out["prompt is among those looked at"] = int(known.sum())
        table, shares = table[~known], (1 - SHARES[1], SHARES[1])
    order = random.permutation(table["prompt"].unique())
    ends = np.round(np.cumsum(shares) * len(order)).astype(int)
    place = np.searchsorted(ends, np.arange(len(order)), side="right")
    part_of = {prompt: PARTS[k] for prompt, k in zip(order, place, strict=True)}
    table = table.assign(part=table["prompt"].map(part_of))
    for part, most in limits.items():
        surplus = random.permutation(table.index[table["part"] == part])[most:]
        left_out[f"more than {most} to be {part.replace('_', ' ')}"] = len(surplus)
        table = table.drop(surplus)
    table = pd.concat([table, *(one.assign(part="evaluation") for one in others)], ignore_index=True)
    if set(table["part"]) != set(PARTS):
        raise DataError(f"{pairs}: too few prompts ({len(order)}) to divide into {', '.join(PARTS)}")
    return table, left_out


def write_real_pairs(folder: Path, hashes: Any, **arguments: Any) -> None:
    """Write the pairs of `real_pairs`; `hashes`, of the files and folders, are for the key alone."""
    write_pairs(folder, *real_pairs(**arguments))
