"""One style of all figures: colours of the methods, canvas, and the marks that all share.

Blue is vanilla, vermilion variance-aware, grey the reference, and nothing else is (colour-blind safe).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter
from numpy.typing import ArrayLike

from vaalign_lib.statistics.arrays import Array

VANILLA, AWARE, REFERENCE, TRUTH = "#0072B2", "#D55E00", "#666666", "#009E73"
PRINTED, EXACT, GRPO, PESSIMIST = "#CC79A7", "#009E73", "#E69F00", "#56B4E9"
SERIES = ("#332288", "#44AA99", "#AA8800", "#882255", "#88CCEE", "#117733", "#999999", "#000000")
MARKERS = "osD^vPX*"  # of series that are no methods
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
REGIMES = {
    "matched KL": "Equal KL",
    "equal mean penalty": "Equal mean penalty",
    "as printed": "Printed coefficients",
    "printed gentle": "Printed coefficients, at a gentler rate",
    "printed fixed": "Printed coefficients, fixed, at a gentler rate",
}
METHODS = {"vanilla": "vanilla", "variance_aware": "variance-aware"}  # in tables and in words
SMALL = 8.5  # smallest text, in points: what half a page's width still shows
_STYLE: Any = {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": SMALL + 0.5,
}


@contextmanager
def canvas(
    width: float, height: float, columns: int = 1, rows: int = 1, **grid: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield an empty figure and its axes, row by row, in the house's style, not the user's matplotlibrc."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, list(figure.subplots(rows, columns, squeeze=False, **grid).flat)


@contextmanager
def grid(
    count: int, columns: int, width: float, height: float, **shared: Any
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of so many panels, each so high, in rows of equally many."""
    rows = -(-count // columns)
    with canvas(width, height * rows + 1.0, columns, rows, **shared) as (figure, panels):
        for axes in panels[count:]:
            axes.remove()
        yield figure, panels[:count]


def headline(figure: Figure, text: str) -> None:
    """Write what the figure shows above its panels, wrapped to its width, but not inside of an interval."""
    whole = re.sub(r" ?\[[^\]]*\]| = ", lambda found: found[0].replace(" ", "\xa0"), text)
    lines = [
        fill(line, int(12.5 * figure.get_figwidth())).replace("\xa0", " ") for line in whole.splitlines()
    ]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10.5)


def times(number: float) -> str:
    """Return a ratio with three digits, or two after the point where it is small."""
    return f"{number:.2f}" if abs(number) < 10 else f"{number:.3g}"


def note(axes: Axes, text: str, corner: str = "upper right", colour: str = "black", line: float = 0) -> None:
    """Write a sample size or an interval into a corner of a panel, `line` lines away from its edge."""
    vertical, side = corner.split()
    height, va, away = (0.98, "top", -1.25) if vertical == "upper" else (0.02, "bottom", 1.25)
    place: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": side, "va": va}
    background = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    at, offset = (0.99 if side == "right" else 0.01, height), (0, away * SMALL * line)
    axes.annotate(text, at, offset, color=colour, fontsize=SMALL, bbox=background, **place)


def label(axes: Axes, x: float, y: float, text: str, colour: str, **place: Any) -> None:
    """Write a line's name beside a point of it; `offset` in points, and matplotlib's `ha`, `va`."""
    offset = place.pop("offset", (4, 0))
    settings: Any = {"textcoords": "offset points", "va": "center", "fontsize": SMALL} | place
    axes.annotate(text, (x, y), offset, color=colour, **settings)


def ends(table: pd.DataFrame, value: str) -> tuple[Array, Array]:
    """Return the ends of a column's intervals, from `<value>_low` and `<value>_high`, or `low` and `high`."""
    low, high = (f"{value}_low", f"{value}_high") if f"{value}_low" in table else ("low", "high")
    centre = table[value].to_numpy(dtype=float)
    if low not in table:
        return centre, centre
    return np.where(table[low].isna(), centre, table[low]), np.where(table[high].isna(), centre, table[high])


def spans(table: pd.DataFrame, value: str) -> Array:
    """Return how far the intervals of a column reach to either side, (2, rows)."""
    low, high = ends(table, value)
    centre = table[value].to_numpy(dtype=float)
    return np.stack([centre - low, high - centre]).clip(min=0)


def band(axes: Axes, table: pd.DataFrame, x: str, y: str, colour: str, **line: Any) -> None:
    """Draw a column as a line in the band of its intervals."""
    axes.fill_between(table[x], *ends(table, y), color=colour, alpha=0.2, linewidth=0)
    axes.plot(table[x], table[y], color=colour, **line)


def forest(axes: Axes, table: pd.DataFrame, places: Array, value: str, colour: str, **marks: Any) -> None:
    """Draw a mark with its interval for every row of a table; `marks` as for `Axes.errorbar`."""
    settings: dict[str, Any] = {"fmt": "o", "markersize": 4.5, "linewidth": 1.4} | marks
    axes.errorbar(table[value], places, xerr=spans(table, value), color=colour, **settings)


def determinable(
    axes: Axes, table: pd.DataFrame, x: str, y: str, sure: pd.Series, colour: str, label: str
) -> None:
    """Draw a column with its intervals as a line through those that are `sure`; open marks are the others."""
    looks: Any = {"capsize": 2, "color": colour}
    if sure.any():
        shown = table.assign(**{y: table[y].where(sure)})  # the line breaks at the others
        axes.errorbar(shown[x], shown[y], spans(shown, y), fmt="o-", label=label, **looks)
    if not sure.all():
        rows = table[~sure]
        looks |= {"mfc": "white", "elinewidth": 0.9, "label": f"{label}: not determinable"}
        axes.errorbar(rows[x], rows[y], spans(rows, y), fmt="o", **looks)


def lines_of(axes: Axes, names: Sequence[str], groups: Sequence[str] | None = None) -> Array:
    """Name a line for each row from the top down, a bold one above each new group; return the places."""
    lines: list[tuple[str, bool]] = []  # text, and whether it names a group
    for k, name in enumerate(names):
        if groups is not None and (k == 0 or groups[k] != groups[k - 1]):
            lines.append((groups[k], True))
        lines.append((name, False))
    places = -np.arange(float(len(lines)))
    axes.set_yticks(places, [text for text, _ in lines], fontsize=SMALL)
    axes.set_ylim(0.6 - len(lines), 0.6)
    for tick, (_, head) in zip(axes.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if head else "normal")
    axes.grid(axis="y", visible=False)
    return places[[not head for _, head in lines]]


def legend_outside(figure: Figure, axes: Axes, columns: int, **settings: Any) -> None:
    """Put the legend of a panel below all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, **settings)


def percent(axis: Axis, decimals: int | None = 0) -> None:
    """Write shares as percentages."""
    axis.set_major_formatter(PercentFormatter(1, decimals=decimals))


def plain_log(axes: Axes, which: str = "x") -> None:
    """Use logarithmic axes whose minor ticks bear no numbers, which would overlap on short ranges."""
    for name in which:
        getattr(axes, f"set_{name}scale")("log")
        getattr(axes, f"{name}axis").set_minor_formatter(NullFormatter())


def log_ticks(
    axes: Axes, which: str, ticks: Sequence[float], text: Callable[[float], str] = "{:g}".format
) -> None:
    """Use a logarithmic axis with these ticks alone."""
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}ticks")(ticks, [text(tick) for tick in ticks])
    getattr(axes, f"{which}axis").set_minor_locator(mpl.ticker.NullLocator())


def octaves(axes: Axes, which: str, drawn: ArrayLike, most: float = 128.0) -> None:
    """Use a logarithmic axis of ratios that holds 1 and all that is `drawn`, ends of intervals too, as far as
    `most` and its inverse: a tick for each power of two, or of four in a long range, and more in a short one.
    """
    known = np.asarray(drawn, dtype=float)
    reach = np.clip(np.append(known[np.isfinite(known)], 1.0), 1 / most, most)
    low, high = reach.min() / 1.1, reach.max() * 1.1
    step = 2 if high > 256 * low else 1
    ticks = 2.0 ** np.arange(-8, 9, step)
    if high < 4 * low:
        ticks = np.array([0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1, 1.2, 1.4, 1.7, 2, 2.5, 3])
    ticks = ticks[(low < ticks) & (ticks < high)]
    whole = high >= 4 * low
    log_ticks(axes, which, ticks.tolist(), lambda one: f"1/{1 / one:g}" if whole and one < 1 else f"{one:g}")
    getattr(axes, f"set_{which}lim")(low, high)
    getattr(axes, "axhline" if which == "y" else "axvline")(1, color="black", linewidth=0.8)


def shares(axes: Axes, values: Array, edges: Array, colour: str, label: str | None = None) -> None:
    """Draw a histogram of shares of all values as one outline, which is fast enough for sliders."""
    counted = np.histogram(values, edges)[0] / values.size
    axes.stairs(counted, edges, fill=True, color=colour, alpha=0.55, linewidth=0, label=label)
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.08 * counted.max()))


def scatter_medians(
    axes: Axes, table: pd.DataFrame, x: str, y: str, parts: int, colour: str, average: str = "median"
) -> None:
    """Draw a cloud of points, and averages of equally many of them as a line."""
    axes.scatter(table[x], table[y], s=5, color=REFERENCE, alpha=0.25, linewidths=0, rasterized=True)
    part = pd.qcut(table[x].rank(method="first"), parts, labels=False)
    centres = table.groupby(part)[[x, y]].agg(average)
    axes.plot(centres[x], centres[y], "o-", color=colour, markersize=4)
