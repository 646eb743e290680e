"""Pilots: a grid of settings inside one stack, and the penalty that gives a wanted KL.

A pilot never loops over stacks: every cell of the grid is a few policies of the same stack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

from vaalign_lib.store import FinalError
from vaalign_lib.training.objectives import Method

TOLERANCE = 0.03  # of the KL, relative
LEAST = 1e-3  # nats that count as none
LAST = 10  # steps whose mean is what a policy has reached
MEASURES = ("reward", "true_reward", "gold", "kl", "length", "variance", "explained_variance")


class MatchError(FinalError):
    """No penalty on the grid, or none that was tried, gives the wanted KL."""


@dataclass(frozen=True)
class Grid:
    """Learning rates by betas, `repeats` policies each; rates vary slowest, so that equal ones adjoin."""

    learning_rates: Sequence[float]
    betas: Sequence[float]
    repeats: int = 5

    @property
    def cells(self) -> pd.DataFrame:
        """The learning rate and beta of each policy, one row per policy of the stack."""
        rows = product(self.learning_rates, self.betas, range(self.repeats))
        return pd.DataFrame(rows, columns=["learning_rate", "beta", "repeat"])

    def method(self, objective: str, **options: float | bool) -> Method:
        """Return the method that gives each policy of a stack of `len(cells)` its cell."""
        cells = {name: self.cells[name].tolist() for name in ("beta", "learning_rate")}
        return Method(objective, **cells, **options)  # type: ignore[arg-type]

    def summary(self, log: pd.DataFrame) -> pd.DataFrame:
        """Return what each cell reached by the trainer's log, whose policies are 0, 1, ... in the order of
        `cells`: means over its policies and last steps, and their errors.
        """
        reached = final(log)
        if reached.index.tolist() != list(range(len(self.cells))):
            raise ValueError(
                f"log: expected policies 0 to {len(self.cells) - 1}, one for each row of `cells`, got "
                f"{reached.index.min()} to {reached.index.max()}"
            )
        reached = reached.join(self.cells)
        grouped = reached.groupby(["learning_rate", "beta"])[[name for name in MEASURES if name in reached]]
        return grouped.mean().join(grouped.sem().add_suffix("_error")).reset_index()


def final(log: pd.DataFrame) -> pd.DataFrame:
    """Return each policy's mean over its last steps, by policy."""
    last = log[log["step"] > log["step"].max() - LAST]
    return last.groupby("policy").mean(numeric_only=True).drop(columns="step")


def beta_for_kl(betas: Sequence[float], kls: Sequence[float], target: float) -> float:
    """Interpolate the penalty whose KL is the target; all are positive, betas in any order.

    A larger penalty leaves less KL, so noise that says otherwise is averaged out (isotonic regression)
    before ln beta is interpolated over ln KL by a monotone cubic.

    Raises:
        MatchError: the target lies outside of what the betas reached.
    """
    order = np.argsort(betas)
    x, y = np.log(np.asarray(betas)[order]), np.log(np.asarray(kls)[order])
    smooth = isotonic_regression(y, increasing=False).x
    levels = np.unique(smooth)  # ascending KL
    places = np.array([x[smooth == level].mean() for level in levels])
    wanted = np.log(target)
    if not levels[0] <= wanted <= levels[-1]:
        raise MatchError(
            f"a KL of {target:.3g} lies outside of {np.exp(levels[0]):.3g} to {np.exp(levels[-1]):.3g}, "
            f"what betas of {min(betas):.3g} to {max(betas):.3g} reach; widen the grid"
        )
    if len(levels) == 1:
        return float(np.exp(places[0]))
    return float(np.exp(PchipInterpolator(levels, places)(wanted)))


def match_kl(
    train: Callable[[float], float],
    betas: Sequence[float],
    kls: Sequence[float],
    target: float,
    attempts: int = 4,
    tolerance: float = TOLERANCE,
) -> tuple[float, pd.DataFrame]:
    """Find the beta whose full stack has the target KL, checked by training it.

    `train` trains a whole stack with a beta and returns its mean KL; betas and kls are a pilot's.

    Returns:
        The beta, and a row per attempt: `beta`, `kl`, `off` (relative).

    Raises:
        MatchError: no attempt was within the relative tolerance.
    """
    pilot = {beta: max(kl, LEAST) for beta, kl in zip(betas, kls, strict=True)}
    whole: dict[float, float] = {}
    for _ in range(attempts):
        beta = _next_beta(pilot, whole, target)
        whole[beta] = max(train(beta), LEAST)
        if abs(whole[beta] / target - 1) <= tolerance:
            tried = [{"beta": one, "kl": kl, "off": kl / target - 1} for one, kl in whole.items()]
            return beta, pd.DataFrame(tried)
    raise MatchError(
        f"no beta within {tolerance:.0%} of a KL of {target:.3g} in {attempts} attempts: "
        + ", ".join(f"{beta:.4g} gave {kl:.3g}" for beta, kl in whole.items())
    )


def _next_beta(pilot: dict[float, float], whole: dict[float, float], target: float) -> float:
    """Return the beta to try next, by KLs of whole stacks and of a pilot, whose few policies say less.

    Of two whole stacks or more the line through two decides, in logarithms: those next to the target, on
    either side of it if there are such. Before that, and where noise turns it round, the pilot's curve does,
    moved to where whole stacks were; beyond its end by half as much again.
    """
    offs = {beta: np.log(kl / target) for beta, kl in whole.items()}
    near = sorted(offs, key=lambda beta: abs(offs[beta]))
    other = next((beta for beta in near[1:] if offs[beta] * offs[near[0]] < 0), None)
    pair = [near[0], other or near[1]] if len(near) > 1 else []
    if pair and (slope := (offs[pair[1]] - offs[pair[0]]) / np.log(pair[1] / pair[0])) < 0:
        return float(pair[0] * np.exp(np.clip(-offs[pair[0]] / slope, -1, 1)))
    betas = sorted(pilot)
    expected = np.exp(np.interp(np.log(near), np.log(betas), np.log([pilot[beta] for beta in betas])))
    shift = np.exp(np.mean(np.log([whole[beta] for beta in near] / expected))) if near else 1.0
    known = {beta: kl * shift for beta, kl in pilot.items()} | whole
    try:
        return beta_for_kl(list(known), list(known.values()), target)
    except MatchError:
        return min(known) / 1.5 if target > max(known.values()) else max(known) * 1.5
