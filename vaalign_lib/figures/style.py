"""One style of all figures: colours of the methods, canvas, and shared marks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

VANILLA, AWARE, REFERENCE, TRUTH = "#0072B2", "#D55E00", "#666666", "#009E73"
PRINTED, EXACT, GRPO, PESSIMIST = "#CC79A7", "#009E73", "#E69F00", "#56B4E9"
POLICY_COLOURS = {
    "vanilla": VANILLA,
    "variance-aware": AWARE,
    "PPO fixed point": AWARE,
    "GRPO fixed point": GRPO,
    "true optimum": EXACT,
    "as printed": PRINTED,
    "mean minus variance": PESSIMIST,
    "reference": REFERENCE,
}
SHORT_FORMS = {
    "free": "Eq. (2), (3): closed form",
    "sum_to_one": "Eq. (2), (3): sum to one",
    "simplex": "Eq. (2), (3): distributions",
    "printed": "Theorem 2.7: as printed",
    "exact": "Theorem 2.7: true optimum",
    "ppo": "fixed point of PPO, RLOO",
    "grpo": "fixed point of GRPO",
    "vanilla": "vanilla",
}
_STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


@contextmanager
def matplotlib_of_its_own(settings: Any) -> Iterator[None]:
    """Start from matplotlib's defaults and these settings, not from the user's matplotlibrc."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        yield


@contextmanager
def canvas(
    width: float, height: float, columns: int = 1, rows: int = 1, **grid: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield an empty figure and its axes, row by row, under the house's style alone."""
    with matplotlib_of_its_own(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **grid).flat)
