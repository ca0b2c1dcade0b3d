"""The plot of where in the model a step of the merge moves the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from distmerge.places import WHOLE, Place, place, row_names
from distmerge.plots import canvas
from distmerge.plots.canvas import LINES, Plot, clean
from distmerge.plots.layers import draw_grid, grid_height
from distmerge.plots.reading import Numbers, shown

LOG_BEYOND = 5.0
"""From this ratio on the scale is logarithmic: layer norms often move far more than matrices."""

MAX_BARS = 20


class Split(NamedTuple):
    """Root mean squares by row and layer, and of modules outside the layers."""

    layered: dict[str, dict[int, float]]
    others: dict[str, float]


class Sum(NamedTuple):
    squares: float
    elements: int


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """modules.png: root mean square of a step by layer and kind, and outside the layers."""
    trends, note = shown(numbers)
    trends = [trend for trend in trends if trend["modules"]]
    if not trends:
        return None
    splits = [split(trend["modules"]) for trend in trends]
    title = f"Where a step of one merge interval moves the weights{note}"
    figure = _figure(splits, title)
    rows = [s for s in splits if s.layered]
    axes = list(figure.axes)
    if rows:
        names = [clean(t["label"], 60) for t, s in zip(trends, splits, strict=True) if s.layered]
        _layered(figure, axes[: len(rows)], rows, names)
    if any(s.others for s in splits):
        _others(figure, axes[len(rows)], splits, [clean(t["label"], 60) for t in trends])
    caption = (
        "The root mean square change per parameter: the L2 norm of the step within a module over "
        "the square root of its number of parameters, so that large and small modules compare. "
        "Grey: the layer has no such module, or it does not move."
    )
    return canvas.save(figure, folder, Plot("modules.png", title, caption))


def split(entries: list[Numbers]) -> Split:
    """Sort modules into layers and others; numbers after the layer's (experts) are pooled."""
    sums: dict[Place, Sum] = defaultdict(lambda: Sum(0.0, 0))
    others = {}
    for entry in entries:
        at = place(entry["name"])
        if at is None:
            others[entry["name"]] = _rms(Sum(entry["norm"] ** 2, entry["elements"]))
            continue
        old = sums[at]
        sums[at] = Sum(old.squares + entry["norm"] ** 2, old.elements + entry["elements"])
    names = row_names(at.row for at in sums)
    layered: dict[str, dict[int, float]] = {}
    for at, total in sums.items():
        layered.setdefault(names[at.row], {})[at.layer] = _rms(total)
    return Split(layered, others)


def _rms(total: Sum) -> float:
    return math.sqrt(total.squares / total.elements) if total.elements else math.nan


def _figure(splits: list[Split], title: str) -> Figure:
    """Panels of the right heights: one for each trend with layers, one for all that is left."""
    heights = [_height(s) for s in splits if s.layered]
    names = {name for s in splits for name in s.others}
    if names:
        bars = min(len(names), MAX_BARS)
        heights.append(0.75 + bars * max(0.26, 0.13 * len(splits)))
    figure = canvas.new_figure(sum(heights) + 0.6, title)
    figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    return figure


def _height(one: Split) -> float:
    return 2.6 if len(one.layered) == 1 else grid_height(one.layered)


def _norm(values: list[float]) -> Normalize:
    """From 0 where that shows the differences; logarithmic where that would hide small ones."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if positive and max(positive) > LOG_BEYOND * min(positive):
        return LogNorm(min(positive), max(positive))
    return Normalize(0, max(finite, default=1) or 1)


def _layered(figure: Figure, grid: list[Axes], rows: list[Split], names: list[str]) -> None:
    values = [v for row in rows for of in row.layered.values() for v in of.values()]
    norm = _norm(values)
    if all(len(row.layered) == 1 for row in rows):
        for axes, row, name in zip(grid, rows, names, strict=True):
            _columns(axes, row, name)
            axes.set_ylim(0, 1.05 * (max(filter(math.isfinite, values), default=0) or 1))
        return
    image: Any = None
    for axes, row, name in zip(grid, rows, names, strict=True):
        image = draw_grid(axes, row.layered, norm, "viridis")
        axes.set_title(name)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.015, aspect=12 * len(grid))
    bar.set_label("RMS change per parameter" if len(grid) > 1 else "RMS change\nper parameter")
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_locator(FixedLocator(_decades(norm)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}"))
    bar.ax.grid(visible=False)


def _decades(norm: LogNorm) -> list[float]:
    """Ticks at powers of ten and, where these are few, between them."""
    assert norm.vmin is not None
    assert norm.vmax is not None
    first, last = math.floor(math.log10(norm.vmin)), math.ceil(math.log10(norm.vmax))
    factors = (1, 2, 5) if norm.vmax < 30 * norm.vmin else (1, 3) if last - first <= 3 else (1,)
    ticks = [f * 10.0**power for power in range(first, last + 1) for f in factors]
    return [tick for tick in ticks if norm.vmin <= tick <= norm.vmax]


def _columns(axes: Axes, row: Split, name: str) -> None:
    """One kind only: bars show more than a heat map of one row."""
    ((kind, of),) = row.layered.items()
    axes.bar(list(of), list(of.values()), color=LINES[0], width=0.8)
    axes.set_title(name if kind == WHOLE else f"{name}: {clean(kind)}")
    axes.set_xlabel("layer")
    axes.set_ylabel("RMS change per parameter")
    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(15, integer=True))


def _others(figure: Figure, axes: Axes, splits: list[Split], names: list[str]) -> None:
    """Horizontal bars, the largest on top; one colour for each trend."""
    largest: dict[str, float] = {}
    for one in splits:
        for name, value in one.others.items():
            largest[name] = max(value, largest.get(name, 0.0))
    order = sorted(largest, key=lambda name: (-largest[name], name))[:MAX_BARS]
    thick = 0.8 / len(splits)
    for number, one in enumerate(splits):
        at = [i + (number - (len(splits) - 1) / 2) * thick for i in range(len(order))]
        values = [one.others.get(name, math.nan) for name in order]
        axes.barh(at, values, height=thick * 0.9, color=LINES[number])
        if len(splits) == 1:
            for y, value in zip(at, values, strict=True):
                if math.isfinite(value):
                    axes.text(value, y, f" {value:.2e}", va="center", fontsize=8)
            axes.set_xmargin(0.12)
    axes.set_yticks(range(len(order)), labels=[clean(name, limit=34) for name in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("RMS change per parameter")
    cut = f" (the largest {MAX_BARS} of {len(largest)})" if len(largest) > MAX_BARS else ""
    where = "Modules outside the layers" if any(one.layered for one in splits) else "Modules"
    axes.set_title(f"{where}{cut}")
    if len(splits) > 1:
        handles = [Patch(color=LINES[i]) for i in range(len(splits))]
        canvas.legend_below(figure, handles, names)
