"""What notebook 08 makes of its worlds (`experiments.frontier`), by the rules of data/protocols/08.md."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from vaalign_lib.experiments.frontier import MIDDLE
from vaalign_lib.statistics.arrays import Array
from vaalign_lib.statistics.tests import Estimate, mean, percentiles, rank_correlations
from vaalign_lib.theory.simulations import zero_crossing

CHOSEN = ["part", "bench", "method", "world", "n", "width", "dose"]  # columns that tell rows apart
RESAMPLES = 2000  # of worlds
CRITERIA = {"gain": 1, "signal": 1, "risk": -1, "cvar_10": 1, "regret": -1}  # 1: more is better
NEEDS = (  # least first
    "single reward model",
    "vanilla",
    "best of n",
    "uwo",
    "effective",
    "worst case",
    "reward-robust",
    "filtering",
    "variance-aware",
    "variance-aware, exact",
    "URM-weighted",
    "URME-weighted",
)


def kept(worlds: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of all worlds as they are published: what was chosen before what was measured."""
    return worlds[[*CHOSEN, *worlds.columns.difference([*CHOSEN, "origin"], sort=False)]]


def paired(table: pd.DataFrame, column: str, one: str, other: str, by: str = "method") -> Estimate:
    """Estimate the mean over worlds of one method's number less another's, on the same worlds."""
    wide = table.pivot(index="world", columns=by, values=column)
    return mean((wide[one] - wide[other]).dropna())


def against(table: pd.DataFrame, other: str, columns: Sequence[str]) -> pd.DataFrame:
    """Return columns less those of another method in the same world and bench, a row for each of the rest."""
    same = ["world", "bench"]
    beside = table.merge(
        table.loc[table["method"] == other, [*same, *columns]], on=same, suffixes=("", "_of")
    )
    less = {name: beside[name] - beside[f"{name}_of"] for name in columns}
    return beside[[*same, "method"]].assign(**less)[beside["method"] != other]


def per_world(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return a column with a row per world and a column per method, without methods that lack a world."""
    return table.pivot(index="world", columns="method", values=column).dropna(axis=1)


def resampled_worlds(worlds: int, seed: int) -> Array:
    """Return how often each world is drawn in every resample (resamples, worlds), as shares."""
    drawn = np.random.default_rng(seed).multinomial(worlds, np.full(worlds, 1 / worlds), RESAMPLES)
    return np.asarray(drawn / worlds)


def on_frontier(gain: Array, deviation: Array) -> Array:
    """Return which methods (..., methods) no other beats: a gain as high and a deviation as low, one of
    them strictly.
    """
    higher, lower = gain[..., None, :] >= gain[..., None], deviation[..., None, :] <= deviation[..., None]
    strictly = (gain[..., None, :] > gain[..., None]) | (deviation[..., None, :] < deviation[..., None])
    return np.asarray(~(higher & lower & strictly).any(-1))


def frontier_shares(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return how often each method is on the frontier of mean gain and deviation when worlds are drawn
    again, and whether it is in the worlds as they are; the placebo is left out. A row per bench, KL, method.
    """
    rows = []
    candidates = table[table["method"] != "placebo"]
    for (bench, n), part in candidates.groupby(["bench", "n"], sort=False):
        wide = [per_world(part, column) for column in ("gain", "deviation")]
        shares = resampled_worlds(len(wide[0]), seed)
        drawn = on_frontier(*(shares @ one.to_numpy() for one in wide)).mean(0)
        seen = on_frontier(*(one.mean().to_numpy() for one in wide))
        for method, share, is_on in zip(wide[0].columns, drawn, seen, strict=True):
            rows.append({"bench": bench, "n": n, "method": method, "share": share, "on_frontier": is_on})
    return pd.DataFrame(rows)


def use_when(table: pd.DataFrame) -> pd.DataFrame:
    """Return what to use, by bench, KL and criterion: the `best` mean over worlds, methods `as_good`, whose
    paired difference to it has an interval that contains 0, and the one of these that needs least, `use`.
    """
    rows = []
    for (bench, n), part in table[table["method"] != "placebo"].groupby(["bench", "n"], sort=False):
        for criterion, sign in CRITERIA.items():
            wide = sign * per_world(part, criterion)
            best = wide.mean().idxmax()
            apart = {one: mean(wide[best] - wide[one]) for one in wide if one != best}
            as_good = [one for one in NEEDS if one in apart and apart[one].low <= 0]
            use = min([best, *as_good], key=NEEDS.index)
            rows.append(
                {
                    "bench": bench,
                    "n": n,
                    "criterion": criterion,
                    "best": best,
                    "value": sign * wide[best].mean(),
                }
                | {"as_good": ", ".join(as_good), "use": use}
            )
    return pd.DataFrame(rows)


def break_even(doses: pd.DataFrame, seed: int) -> Estimate:
    """Estimate the correlation with squared errors at which weights of the family `correlated` reach
    vanilla's (gain / SD)^2, with a bootstrap over worlds; NaN where they never cross it.
    """
    family = doses[doses["method"] == "correlated"]
    known, above = (
        family.pivot(index="dose", columns="world", values=column).sort_index().to_numpy()
        for column in ("correlation", "log_ratio")
    )
    levels = known.mean(1)  # of the doses (doses,), nearly the same in all worlds
    shares = resampled_worlds(known.shape[1], seed)
    found = float(zero_crossing(levels, -above.mean(1)))
    return percentiles(found, zero_crossing(levels, -above @ shares.T), known.shape[1])


def means(table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Return the mean over worlds of every column, with Student's interval, a row per group that is there in
    all worlds: those where a method reaches a KL are no sample of all.
    """
    rows = []
    for key, part in table.groupby(list(by), sort=False, dropna=False):
        if part["world"].nunique() < table["world"].nunique():
            continue
        row = dict(zip(by, key, strict=True)) | {"worlds": part["world"].nunique()}
        for column in columns:
            row |= mean(part[column]).columns(column)
        rows.append(row)
    return pd.DataFrame(rows)


def width_correlation(table: pd.DataFrame, seed: int) -> Estimate:
    """Estimate Spearman's correlation between the narrowest and the widest features of the methods' mean
    CVaR10, with a bootstrap over worlds.
    """
    widths = sorted(table["width"].unique())
    ends = [per_world(table[table["width"] == width], "cvar_10") for width in (widths[0], widths[-1])]
    shared = ends[0].columns.intersection(ends[1].columns)
    shares = resampled_worlds(len(ends[0]), seed)
    resampled = rank_correlations(*(shares @ one[shared].to_numpy() for one in ends))
    value = rank_correlations(*(one[shared].mean().to_numpy()[None] for one in ends))[0]
    return percentiles(float(value), resampled, len(ends[0]))


def at_middle(table: pd.DataFrame, part: str, bench: str) -> pd.DataFrame:
    """Return the rows of one part and bench; of the frontier those at the middle KL."""
    rows = table[(table["part"] == part) & (table["bench"] == bench)]
    return rows[rows["n"] == MIDDLE] if part == "frontier" else rows
