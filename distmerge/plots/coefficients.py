"""The plot of what each output is made of."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes

from distmerge.plots import canvas
from distmerge.plots.canvas import FAINT, MAX_PANELS, Plot, clean
from distmerge.plots.reading import Numbers, in_order, meaning, steps, told_apart

Panel = tuple[str, list[Numbers]]


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """coefficients.png: the weight of each checkpoint in each output, one panel a trend."""
    panels = _panels(numbers)
    if not panels:
        return None
    note = f" (first {MAX_PANELS} of {len(panels)} trends)" if len(panels) > MAX_PANELS else ""
    panels = panels[:MAX_PANELS]
    title = f"Weight of each checkpoint in {_outputs(numbers)}{note}"
    figure = canvas.new_figure(4.6 if len(panels) == 1 else 2.5 * len(panels) + 0.8, title)
    grid = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    what, labels = _labels([output for _, outputs in panels for output in outputs], panels)
    for axes, (name, outputs) in zip(grid, panels, strict=True):
        _lines(axes, numbers, outputs, labels)
        axes.set_title(clean(name, limit=60))
    grid[-1].set_xlabel(steps(numbers)[1])
    if len(labels) > 1:
        canvas.key(figure, list(grid), labels, meaning(what))
    caption = (
        "Each output is the sum of the checkpoints times these weights, which add up to 1. "
        "Weights below zero are how an output lies beyond the average: older checkpoints are "
        "subtracted."
    )
    return canvas.save(figure, folder, Plot("coefficients.png", title, caption))


def _outputs(numbers: Numbers) -> str:
    count = len(numbers["outputs"])
    return "the output" if count == 1 else f"each of the {count} outputs"


def _panels(numbers: Numbers) -> list[Panel]:
    """The outputs by trend; one panel for all where there is no trend."""
    groups: dict[int | None, list[Numbers]] = {}
    for output in (one for one in numbers["outputs"] if one["coefficients"]):
        groups.setdefault(output["trend"], []).append(output)
    names = [trend["label"] for trend in numbers["trends"]]
    return [("" if n is None else names[n], outputs) for n, outputs in groups.items()]


def _labels(outputs: list[Numbers], panels: list[Panel]) -> tuple[str, list[str]]:
    """What the colours stand for, and its values, in order, over all panels."""
    within = [told_apart(group) for _, group in panels]
    what = next((key for key, _ in within if key), "")
    names = list(dict.fromkeys(name for _, group in within for name in group))
    ordered = in_order(outputs, what) if "," not in what else names
    return what, [name for name in ordered if name in names] if what else names


def _lines(axes: Axes, numbers: Numbers, outputs: list[Numbers], labels: list[str]) -> None:
    at, _ = steps(numbers)
    colour_of = dict(zip(labels, canvas.colours(labels), strict=True))
    many = len(labels) > len(canvas.LINES) or len(at) > 80
    axes.axhline(0, color=FAINT, linewidth=1)
    for output, name in zip(outputs, told_apart(outputs)[1], strict=True):
        axes.plot(
            at,
            output["coefficients"],
            "-o",
            color=colour_of.get(name, FAINT),
            linewidth=1.1 if many else 1.5,
            markersize=2.5 if many else 4.5,
        )
    if len(at) <= 12 and all(a < b for a, b in pairwise(at)):
        canvas.tick_at(axes.xaxis, at, canvas.WIDTH * 0.75)
    axes.set_ylabel("weight")
