"""What reference policies write, and the labelled pairs of the embedded world that are made of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoModelForCausalLM

from vaalign_lib.data.pairs import PARTS, embedded_pairs, write_pairs
from vaalign_lib.data.world.world import World
from vaalign_lib.models import load_tokenizer
from vaalign_lib.policies.reference import sample

TEMPERATURE, TOP_K, TOP_P = 1.5, 50, 0.9  # of the policies' responses; the first is Table 18's


def sample_reference(
    reference: Path, prompts: list[str], seed: int, temperature: float = TEMPERATURE
) -> list[str]:
    """Sample one response to each prompt from a saved reference policy."""
    model = AutoModelForCausalLM.from_pretrained(reference).eval()
    truncation: dict[str, Any] = {"top_k": TOP_K, "top_p": TOP_P} if temperature > 1 else {}
    return sample(model, load_tokenizer(reference), prompts, seed=seed, temperature=temperature, **truncation)


def write_embedded_pairs(
    folder: Path, seed: int, train: int, held_out: int, evaluation: int, reference: Path
) -> None:
    """Draw labelled pairs of the embedded world; the column `part` says what they are for.

    A response comes, with equal chances, from the corpus, from the reference policy at temperature 1, or
    from it at temperature 1.5.
    """
    world = World(seed)
    random = world.rng("pairs")
    parts = np.repeat(PARTS, (train, held_out, evaluation))
    prompts = world.prompts(len(parts), random)
    first, second = (_mixed_responses(world, reference, prompts, random) for _ in range(2))
    texts = np.array([prompts, first, second], dtype=object)  # (3, pairs)
    tables = []
    for part in dict.fromkeys(parts):
        asked, left, right = texts[:, parts == part].tolist()
        tables.append(embedded_pairs(world, asked, left, right, random).assign(part=part))
    equal = sum(table.attrs["identical"] for table in tables)
    write_pairs(folder, pd.concat(tables, ignore_index=True), {"two equal responses": equal})


def _mixed_responses(
    world: World, reference: Path, prompts: list[str], random: np.random.Generator
) -> list[str]:
    origin = random.integers(3, size=len(prompts))
    mixed = np.empty(len(prompts), dtype=object)
    for k, temperature in enumerate((None, 1.0, TEMPERATURE)):
        rows = np.flatnonzero(origin == k)
        asked = [prompts[row] for row in rows]
        if temperature is None:
            mixed[rows] = world.responses(asked, random.beta(2, 2, len(rows)), random)
        else:
            mixed[rows] = sample_reference(reference, asked, int(random.integers(2**31)), temperature)
    return list(mixed)
