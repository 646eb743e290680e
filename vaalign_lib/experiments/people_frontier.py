"""Notebook 10 in the terms of notebook 08: all its methods, on the real model's responses by real people."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from vaalign_lib.experiments.frontier import MIDDLE, PUBLISHED, Case, case_of_intervals, frontier
from vaalign_lib.experiments.frontier_tables import at_middle, per_world, resampled_worlds
from vaalign_lib.experiments.people_bench import WORLDS, Judged
from vaalign_lib.statistics.tests import Estimate, percentiles, rank_correlations
from vaalign_lib.store import RESULTS

BENCHES = {"people": "words, heard from one person each", "heads": "heads of few people"}


def case_of(judged: Judged, prompts: slice) -> Case:
    """Return the case of some prompts: policies that hear one person or head each, its variance stated."""
    truth, variance, drawn = (one[prompts] for one in (judged.truth, judged.variance, judged.placebo))
    return case_of_intervals(truth, judged.heard[:, prompts], variance, drawn)


def rows(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """Return a row for every bench, world, method and KL, as `experiments.frontier.frontier` has them."""
    found = []
    for bench in BENCHES:
        for world, prompts in enumerate(np.array_split(np.arange(len(judged[bench].truth)), WORLDS)):
            case = case_of(judged[bench], slice(prompts[0], prompts[-1] + 1))
            found += [{"bench": bench, "world": world} | row for row in frontier(case)]
    return pd.DataFrame(found)


def ranking(table: pd.DataFrame, bench: str, other: str, seed: int) -> Estimate:
    """Estimate Spearman's correlation of the methods' mean CVaR10 here, at the KL of best of 4, with that on
    a bench of notebook 08 as published; worlds of both are drawn again. The placebo is left out.
    """
    here = table[(table["bench"] == bench) & (table["n"] == MIDDLE)]
    there = at_middle(pd.read_parquet(RESULTS / f"{PUBLISHED}.parquet"), "frontier", other)
    wide = [per_world(one, "cvar_10") for one in (here, there)]
    methods = wide[0].columns.intersection(wide[1].columns).drop("placebo")
    numbers = [one[methods].to_numpy() for one in wide]
    drawn = [resampled_worlds(len(one), seed + k) @ one for k, one in enumerate(numbers)]
    value = rank_correlations(*(one.mean(0)[None] for one in numbers))[0]
    return percentiles(float(value), rank_correlations(*drawn), len(here["world"].unique()))
