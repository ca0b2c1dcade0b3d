"""The plot of how calibration treats the matrices of each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from distmerge.plots import canvas
from distmerge.plots.canvas import Plot, clean
from distmerge.plots.layers import MAX_KINDS, Grid, draw_grid, grid_height
from distmerge.plots.reading import Numbers, calibrated

LEAST_RANGE = 1.25
"""Colours reach so far from 1 at least: what is smaller is no difference to look at."""

MAX_WRITTEN = 14
"""So many layers have room for their numbers."""


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """gamma.png: the median gamma by layer and kind of module, one panel an output."""
    outputs, names, note = calibrated(numbers)
    grids = [(name, _grid(output)) for name, output in zip(names, outputs, strict=True)]
    grids = [(name, grid) for name, grid in grids if grid]
    if not grids:
        return None
    title = f"Median gamma by layer and module{note}"
    row = 0.3 if sum(len(grid) for _, grid in grids) <= MAX_KINDS else 0.2
    heights = [grid_height(grid, row) for _, grid in grids]
    figure = canvas.new_figure(max(2.6, sum(heights) + 0.6), title)
    panels = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    norm = _norm([grid for _, grid in grids])
    for axes, (name, grid) in zip(panels, grids, strict=True):
        image = draw_grid(axes, grid, norm, "RdBu_r")
        axes.set_title(clean(name, limit=60))
        axes.set_xlabel("layer" if axes is panels[-1] else "")
        _write(axes, grid, norm)
    bar = figure.colorbar(image, ax=list(panels), fraction=0.03, pad=0.015, aspect=18 * len(grids))
    _label(bar, norm)
    caption = (
        "Red: most directions of these matrices are amplified; blue: damped; white: kept. Several "
        "matrices in one cell (experts, parts of a fused weight) show that in the middle. Grey: "
        "the layer has no such matrix. What is in no layer is in the table."
    )
    return canvas.save(figure, folder, Plot("gamma.png", title, caption))


def _grid(output: Numbers) -> Grid:
    found = {name: dict(gammas["layers"]) for name, gammas in output["modules"].items()}
    return {name: layers for name, layers in found.items() if layers}


def _norm(grids: Sequence[Grid]) -> LogNorm:
    """As far above 1 as below: a factor of 2 and one of 1/2 are equally strong colours."""
    values = [value for grid in grids for layers in grid.values() for value in layers.values()]
    limit = max(LEAST_RANGE, *(math.exp(abs(math.log(value))) for value in values))
    return LogNorm(1 / limit, limit)


def _write(axes: Axes, grid: Grid, norm: LogNorm) -> None:
    """The numbers, where there is room for them."""
    kinds = list(grid)[:MAX_KINDS]
    layers = sorted({layer for kind in kinds for layer in grid[kind]})
    if len(layers) > MAX_WRITTEN:
        return
    for y, kind in enumerate(kinds):
        for x, layer in enumerate(layers):
            if layer in grid[kind]:
                value = grid[kind][layer]
                colour = "white" if abs(float(norm(value)) - 0.5) > 0.33 else "black"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)


def _label(bar: Colorbar, norm: LogNorm) -> None:
    assert norm.vmax is not None
    powers = math.floor(math.log2(norm.vmax) + 1e-9)
    ticks = [1 / norm.vmax, 1.0, norm.vmax]
    if powers:
        stride = -(-powers // 4)
        ticks = [2.0**power for power in range(-(powers // stride) * stride, powers + 1, stride)]
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_major_formatter(FixedFormatter([f"{tick:.3g}" for tick in ticks]))
    bar.set_label("median gamma")
    bar.ax.grid(visible=False)
