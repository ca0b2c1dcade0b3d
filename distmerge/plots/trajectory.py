"""The plot of the path that the checkpoints take through weight space."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distmerge.plots import canvas
from distmerge.plots.canvas import INK, MERGED, OUTPUT, RAW, Plot, clean, number
from distmerge.plots.labels import Label, Points, place, spaced
from distmerge.plots.reading import Numbers, short, shown, steps, told_apart, value_of

EQUAL_UP_TO = 3.0
"""Beyond this ratio of width to height, equal scales would leave a flat line to look at."""

FLAT = 1e-6
"""A path flatter than this is a straight line, and its height rounding: not to be magnified."""

ZOOM_BELOW = 0.3
"""Outputs that span less than this share of the path get a panel of their own."""


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """trajectory.png: raw and merged checkpoints and the outputs in the plane of most variance."""
    trends, note = shown(numbers)
    if not trends:
        return None
    title = f"The path of the checkpoints through weight space{note}"
    small = len(trends) == 1 and _is_small(trends[0])
    figure = (
        _with_zoom(trends[0], numbers, title) if small else _side_by_side(trends, numbers, title)
    )
    caption = (
        "Points are joined in order of training; numbers at the ends are training steps, those "
        "at the stars the steps of the merge. An arch is what a random walk shows in such a "
        "plane too: look at whether the outputs continue the path."
    )
    return canvas.save(figure, folder, Plot("trajectory.png", title, caption))


def _side_by_side(trends: list[Numbers], numbers: Numbers, title: str) -> Figure:
    figure = canvas.new_figure(6.0 if len(trends) == 1 else 4.4 * -(-len(trends) // 2), title)
    grid = canvas.panels(figure, [trend["label"] for trend in trends])
    for axes, trend in zip(grid, trends, strict=True):
        _paths(axes, trend)
    _legend(figure, numbers, trends[0])
    canvas.settle(figure)
    for axes, trend in zip(grid, trends, strict=True):
        _label(axes, trend, _stars(axes, trend, numbers) + _ends(trend, numbers))
    return figure


def _with_zoom(trend: Numbers, numbers: Numbers, title: str) -> Figure:
    figure = canvas.new_figure(4.8, title)
    whole, end = canvas.panels(figure, [trend["label"]] * 2)
    for axes in (whole, end):
        _paths(axes, trend)
    _zoom(end, trend)
    _legend(figure, numbers, trend)
    canvas.settle(figure)
    _label(whole, trend, _ends(trend, numbers))
    _label(end, trend, _stars(end, trend, numbers))
    return figure


def _points(trend: Numbers) -> tuple[Points, Points, Points]:
    plane = trend["plane"]
    at = [output["at"] for output in plane["outputs"]]
    raw, merged, outputs = (
        np.asarray(points, dtype=np.float64).reshape(-1, 2)
        for points in (plane["raw"], plane["merged"], at)
    )
    return raw, merged, outputs


def _is_small(trend: Numbers) -> bool:
    """Whether the outputs lie so near to each other that they need a panel of their own."""
    raw, merged, outputs = _points(trend)
    whole = np.ptp(np.concatenate([raw, merged, outputs]), axis=0)
    end = np.ptp(np.concatenate([merged[-2:], outputs]), axis=0)
    return len(outputs) > 0 and float(end.max()) < ZOOM_BELOW * float(whole.max())


def _paths(axes: Axes, trend: Numbers) -> None:
    """Draw one panel without its labels."""
    raw, merged, outputs = _points(trend)
    size = 12 if len(outputs) <= 8 else 8
    axes.plot(*raw.T, "-o", color=RAW, linewidth=1, markersize=3.5)
    axes.plot(*merged.T, "-o", color=MERGED, linewidth=1.8, markersize=4.5)
    axes.plot(*outputs.T, "*", color=OUTPUT, markersize=size, mec="white", mew=0.6, zorder=4)
    axes.margins(0.1)
    width, height = np.ptp(np.concatenate([raw, merged, outputs]), axis=0)
    if height < FLAT * width or width < EQUAL_UP_TO * height < EQUAL_UP_TO**2 * width:
        axes.set_aspect("equal", adjustable="datalim")
    else:
        axes.set_title(f"{axes.get_title()} (axes differ in scale)")
    x, y = (clean(name).capitalize() for name in trend["plane"]["axes"])
    axes.set_xlabel(f"{x} (L2 distance in weight space)")
    axes.set_ylabel(f"{y} (L2 distance)")


def _zoom(axes: Axes, trend: Numbers) -> None:
    """The outputs and the end of the merged path, at one scale: angles are true here."""
    _, merged, outputs = _points(trend)
    near = np.concatenate([merged[-2:], outputs])
    middle, reach = (near.min(axis=0) + near.max(axis=0)) / 2, np.ptp(near, axis=0).max()
    reach = 0.65 * reach if reach > 0 else 1.0
    axes.set_xlim(middle[0] - reach, middle[0] + reach)
    axes.set_ylim(middle[1] - reach, middle[1] + reach)
    axes.set_aspect("equal", adjustable="box")
    axes.set_title("the end of the path (axes of one scale)")


def _legend(figure: Figure, numbers: Numbers, trend: Numbers) -> None:
    handles = [
        Line2D([], [], color=RAW, marker="o", markersize=4),
        Line2D([], [], color=MERGED, marker="o", markersize=5),
        Line2D([], [], color=OUTPUT, marker="*", markersize=11, linestyle="none"),
    ]
    what, _ = told_apart(_outputs(trend, numbers))
    star = f"outputs, labelled by {clean(short(what))}" if what else "output"
    canvas.legend_below(figure, handles, ["checkpoints as trained", "merged checkpoints", star])


def _outputs(trend: Numbers, numbers: Numbers) -> list[Numbers]:
    return [numbers["outputs"][entry["output"]] for entry in trend["plane"]["outputs"]]


def _star_names(outputs: list[Numbers]) -> list[str]:
    """What tells the outputs apart; all that is known of it where there is one."""
    if len(outputs) == 1:
        return [", ".join(f"{k}={value_of(outputs[0], k)}" for k in outputs[0]["values"])]
    return told_apart(outputs)[1]


def _stars(axes: Axes, trend: Numbers, numbers: Numbers) -> list[Label]:
    """Labels of as many outputs as there is room for: the last and the first come first."""
    _, _, outputs = _points(trend)
    names = [clean(name, limit=28) for name in _star_names(_outputs(trend, numbers))]
    widest = max((len(name) for name in names), default=0)
    near = spaced(axes, outputs, min(40.0, 6 + 5.5 * widest))
    order = [*near[-1:], *near[:-1]]
    return [Label(outputs[i], names[i], OUTPUT) for i in order if names[i]]


def _ends(trend: Numbers, numbers: Numbers) -> list[Label]:
    """Training steps at the first and the last point of both paths."""
    raw, merged, _ = _points(trend)
    ticks = [number(step) for step in steps(numbers)[0]][-len(raw) :]
    windows = [number(step) for step in trend["merged_steps"]]
    return [
        *(Label(raw[i], ticks[i], INK) for i in (0, -1)),
        *(Label(merged[i], windows[i], MERGED) for i in (0, -1)),
    ]


def _label(axes: Axes, trend: Numbers, labels: list[Label]) -> None:
    place(axes, labels, _points(trend), size=8.5)
