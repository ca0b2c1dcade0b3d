"""The plot of singular values before and after calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from distmerge.plots import canvas
from distmerge.plots.canvas import FAINT, INK, Plot
from distmerge.plots.directions import COLOURS
from distmerge.plots.reading import Numbers

SHOWN_BELOW = 1e-5
"""Singular values below this share of the largest are left out: they are rounding."""


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """singular_values.png: before and after, of a few matrices, one panel each."""
    spectra = numbers["spectra"]
    found = spectra["singular_values"] if spectra else []
    if not found:
        return None
    note = f" ({found[0]['output']})" if found[0]["output"] else ""
    title = f"Singular values before and after calibration{note}"
    figure = canvas.new_figure(1.1 + 2.9 * -(-len(found) // 2), title)
    titles = [one["tensor"].removesuffix(".weight") for one in found]
    for number, axes in enumerate(panels := canvas.panels(figure, titles)):
        _panel(axes, found[number])
    for axes in panels[-2:]:
        axes.set_xlabel("direction, by its singular value before")
    for axes in panels[::2]:
        axes.set_ylabel("singular value")
    lines = [
        Line2D([], [], color=FAINT, linewidth=1.5),
        Line2D([], [], color=INK, marker="o", markersize=3, linewidth=0),
        *(Line2D([], [], color=COLOURS[key], alpha=0.5) for key in ("damped", "amplified")),
    ]
    canvas.legend_below(figure, lines, ["before", "after", "damped", "amplified"])
    caption = (
        "Of the update, which is added to the base model. Matrices of the first, the middle and "
        "the last layer, where gamma is spread widest; of a stack of experts, the first. Both axes "
        "are logarithmic."
    )
    return canvas.save(figure, folder, Plot("singular_values.png", title, caption))


def _panel(axes: Axes, one: Numbers) -> None:
    at, before, after = (np.array(one[key], dtype=float) for key in ("places", "before", "after"))
    seen = before > SHOWN_BELOW * before.max()
    at, before, after = at[seen], before[seen], after[seen]
    for key, where in (("damped", after < before), ("amplified", after > before)):
        axes.vlines(at[where], before[where], after[where], color=COLOURS[key], alpha=0.5)
    axes.plot(at, before, color=FAINT, linewidth=1.5)
    axes.plot(at, after, "o", color=INK, markersize=2.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
