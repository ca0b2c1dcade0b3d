"""What all plots share: style, colours, text that the font can show, files that come out whole."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

WIDTH = 9.0
"""Inches. On the page a plot is 900 pixels wide, so an inch here is 100 pixels there."""

DPI = 160

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart by the colour-blind too; without black and yellow."""

RAW, MERGED, OUTPUT, INK, FAINT = "#56B4E9", "#0072B2", "#D55E00", "#222222", "#8a8a8a"

MAX_PANELS = 4

FONT = "DejaVu Sans"
"""Comes with matplotlib, so the picture does not depend on the fonts of the machine."""

STYLE: dict[Any, Any] = {
    "font.family": [FONT],
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.title_fontsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "hatch.linewidth": 0.7,
    "axes.unicode_minus": True,
    "axes.formatter.limits": (-4, 7),
    "text.parse_math": False,  # a file name may hold any number of dollar signs
    "text.usetex": False,
}


class Plot(NamedTuple):
    """A PNG in the report's folder: its file name, what it shows, and how to read it."""

    name: str
    title: str
    caption: str


@contextmanager
def style() -> Iterator[None]:
    """Our settings on top of matplotlib's own defaults, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def new_figure(height: float, title: str) -> Figure:
    """An empty figure, `height` in inches, that never meets pyplot."""
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(clean(title, limit=90))
    return figure


def panels(figure: Figure, titles: Sequence[str]) -> list[Axes]:
    """One panel a title, two beside each other."""
    columns = 1 if len(titles) == 1 else 2
    grid = figure.subplots(-(-len(titles) // columns), columns, squeeze=False).ravel()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(clean(title, limit=60))
    for axes in grid[len(titles) :]:
        axes.set_visible(False)
    return list(grid[: len(titles)])


def settle(figure: Figure) -> None:
    """Lay the figure out for good, so that text can be placed by where things are on the page."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def save(figure: Figure, folder: Path, plot: Plot) -> Plot:
    """Write the PNG under a temporary name, then rename it: nobody meets half a picture."""
    temporary = folder / f".{plot.name}.{os.getpid()}.tmp"
    try:
        agg: Any = figure.canvas
        agg.print_png(temporary, metadata={"Software": None})  # savefig() would lay out twice
        temporary.replace(folder / plot.name)
    finally:
        temporary.unlink(missing_ok=True)
    return plot


@cache
def _drawable() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(FONT))
    return frozenset(font.get_charmap())


def clean(text: object, limit: int = 40) -> str:
    """`text` on one line, its middle cut out beyond `limit`, and only what the font can show."""
    line = " ".join(str(text).split())
    shown = "".join(c if ord(c) in _drawable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    if len(shown) <= limit:
        return shown
    head = (limit - 1) * 2 // 3
    return f"{shown[:head]}\N{HORIZONTAL ELLIPSIS}{shown[head + 1 - limit :]}"


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(value: Any) -> str:
    """A swept value, a step or a count in few characters; anything else as text."""
    if is_number(value):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return clean(value, limit=32)


def apart(places: Sequence[float], least: float) -> list[int]:
    """Indices of ascending places so that no two kept ones lie nearer than `least`."""
    kept: list[int] = []
    for i, at in enumerate(places):
        if not kept or at - places[kept[-1]] >= least - 1e-9:
            kept.append(i)
    return kept


def room(labels: Sequence[str]) -> float:
    """Inches from the middle of one tick's label to that of the next."""
    return max((len(label) for label in labels), default=1) * 0.078 + 0.12


def every(labels: Sequence[str], inches: float) -> list[int]:
    """Indices of evenly spaced labels to show along `inches` of an axis."""
    return apart([i * inches / len(labels) for i in range(len(labels))], room(labels))


def tick_at(axis: Axis, values: Sequence[float], inches: float, *, log: bool = False) -> None:
    """Ticks at ascending `values`, without those whose labels would touch their neighbours'."""
    labels = [number(value) for value in values]
    places = [math.log(value) if log else float(value) for value in values]
    scale = inches / ((places[-1] - places[0]) or 1.0)
    kept = apart([place * scale for place in places], room(labels))
    axis.set_major_locator(FixedLocator([values[i] for i in kept]))
    axis.set_major_formatter(FixedFormatter([labels[i] for i in kept]))
    axis.set_minor_locator(NullLocator())


def colours(labels: Sequence[str]) -> list[Any]:
    """One colour for each label: told apart by name up to six, by order beyond."""
    if len(labels) <= len(LINES):
        return list(LINES[: len(labels)])
    # The light end of viridis can't be seen on white.
    steps = [0.9 * i / (len(labels) - 1) for i in range(len(labels))]
    return [mpl.colormaps["viridis"](step) for step in steps]


def key(figure: Figure, axes: list[Axes], labels: Sequence[str], title: str) -> None:
    """A legend of the lines up to six of them, a colour bar in their order beyond."""
    if len(labels) > len(LINES):
        _bar_of_labels(figure, axes, labels, title)
        return
    lines = [Line2D([], [], color=colour, marker="o", markersize=4) for colour in colours(labels)]
    legend_below(figure, lines, [clean(label) for label in labels], title)


def legend_below(figure: Figure, lines: Sequence[Any], labels: list[str], title: str = "") -> None:
    """A legend under the panels, in as few rows as fit."""
    # A label that starts with an underscore would be left out.
    names = [f" {label}" if label.startswith("_") else label for label in labels]
    widths = [0.07 * len(name) + 0.6 for name in names]
    columns = len(names) if sum(widths) < WIDTH else max(1, int(WIDTH / max(widths)))
    rows = -(-len(names) // columns)
    figure.legend(
        lines,
        names,
        loc="outside lower center",
        ncols=-(-len(names) // rows),
        title=title or None,
    )


def _bar_of_labels(figure: Figure, axes: list[Axes], labels: Sequence[str], title: str) -> None:
    count = len(labels)
    norm = BoundaryNorm([i - 0.5 for i in range(count + 1)], count)
    mapping = ScalarMappable(norm, ListedColormap(colours(labels)))
    bar = figure.colorbar(mapping, ax=axes, fraction=0.05, pad=0.02, aspect=35)
    stride = -(-count // 15)
    shown = list(range(0, count, stride))
    bar.set_ticks(shown, labels=[clean(labels[i], limit=32) for i in shown])
    bar.ax.tick_params(length=0)
    bar.set_label(clean(title, limit=60))
    bar.ax.grid(visible=False)
