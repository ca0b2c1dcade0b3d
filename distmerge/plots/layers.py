"""Grids of colours: layers along x, kinds of modules along y."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage

from distmerge.plots import canvas
from distmerge.plots.canvas import WIDTH, clean

MAX_KINDS = 24

Grid = Mapping[str, Mapping[int, float]]
"""By kind and layer."""


def grid_height(grid: Grid, row: float = 0.3) -> float:
    """Inches that a panel with such a grid takes, with rows so high."""
    return 1.1 + row * min(len(grid), MAX_KINDS)


def draw_grid(axes: Axes, grid: Grid, norm: Normalize, colours: str) -> AxesImage:
    """The first MAX_KINDS kinds; a layer that lacks a kind stays grey."""
    kinds = list(grid)[:MAX_KINDS]
    layers = sorted({layer for kind in kinds for layer in grid[kind]})
    values = [[grid[kind].get(layer, math.nan) for layer in layers] for kind in kinds]
    axes.grid(visible=False)
    axes.set_facecolor("#dddddd")
    image = axes.imshow(
        np.array(values), norm=norm, cmap=colours, aspect="auto", interpolation="nearest"
    )
    axes.set_yticks(range(len(kinds)), labels=[clean(kind, limit=34) for kind in kinds])
    ticks = canvas.every([str(layer) for layer in layers], WIDTH * 0.6)
    axes.set_xticks(ticks, labels=[str(layers[i]) for i in ticks])
    axes.set_xlabel("layer")
    return image
