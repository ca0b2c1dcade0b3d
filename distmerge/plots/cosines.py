"""The plot of whether successive differences point the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from distmerge.plots import canvas
from distmerge.plots.canvas import WIDTH, Plot, clean, number
from distmerge.plots.labels import Points
from distmerge.plots.reading import Numbers, shown, steps


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """cosines.png: do successive differences point the same way? Raw left, merged right."""
    trends, note = shown(numbers)
    if not any(len(trend["cosines"][kind]) > 1 for trend in trends for kind in ("raw", "merged")):
        return None
    title = f"Cosines between the steps from one checkpoint to the next{note}"
    maps = _maps(trends, numbers)
    rows = -(-len(maps) // 2)
    figure = canvas.new_figure(4.5 if rows == 1 else 3.9 * rows + 0.3, title)
    grid = list(figure.subplots(rows, 2, squeeze=False).ravel())
    limit = limit_of([m.cosines for m in maps])
    images = [_heat(axes, one, limit) for axes, one in zip(grid, maps, strict=False)]
    for axes in grid[len(maps) :]:
        axes.set_visible(False)
    image = next(image for image in images if image is not None)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02, aspect=35 if rows > 1 else 25)
    bar.set_label("cosine")
    bar.ax.grid(visible=False)
    caption = (
        "Each cell compares two differences of successive checkpoints: blue, they point the same "
        "way; red, apart; white, at right angles. Blocks of blue beside the diagonal of the "
        "merged ones come from windows that share checkpoints; the diagonal itself is left out."
    )
    return canvas.save(figure, folder, Plot("cosines.png", title, caption))


class Map(NamedTuple):
    """A square matrix of cosines between successive differences, and what its rows are."""

    title: str
    cosines: list[list[float]]
    names: list[str]
    axis: str


def _maps(trends: list[Numbers], numbers: Numbers) -> list[Map]:
    """The raw checkpoints, which most trends share, once; then the merged ones of each trend."""
    ticks, what = steps(numbers)
    raw: list[Map] = []
    merged: list[Map] = []
    for trend in trends:
        matrices = trend["cosines"]
        if not any(one.cosines == matrices["raw"] for one in raw):
            names = [number(tick) for tick in ticks]
            raw.append(Map("checkpoints as trained", matrices["raw"], names, what))
        windows = [number(step) for step in trend["merged_steps"]]
        title = f"merged: {clean(trend['label'], limit=44)}"
        merged.append(Map(title, matrices["merged"], windows, what))
    return raw + merged


def off_diagonal(rows: Sequence[Sequence[float | None]]) -> Points:
    """The cosines with an empty diagonal: what is compared with itself says nothing."""
    matrix = np.array(rows, dtype=np.float64).reshape(len(rows), len(rows))
    np.fill_diagonal(matrix, np.nan)
    return matrix


def limit_of(matrices: Sequence[Sequence[Sequence[float | None]]]) -> float:
    """One symmetric range of colours for all panels, in tenths."""
    largest = 0.0
    for matrix in map(off_diagonal, matrices):
        largest = max(largest, np.abs(matrix[np.isfinite(matrix)]).max(initial=0.0))
    return max(0.1, math.ceil(10 * largest - 1e-6) / 10)


def _heat(axes: Axes, one: Map, limit: float) -> AxesImage | None:
    """One panel; None where there is nothing to compare."""
    axes.grid(visible=False)
    axes.set_title(one.title)
    matrix = off_diagonal(one.cosines)
    count = len(matrix)
    if count < 2:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "one difference only:\nnothing to compare", ha="center", va="center")
        return None
    axes.set_facecolor("#dddddd")
    image = axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    names = one.names[-count:]
    for set_ticks, inches in ((axes.set_xticks, WIDTH * 0.36), (axes.set_yticks, WIDTH * 0.6)):
        ticks = canvas.every(names, inches)
        set_ticks(ticks, labels=[names[i] for i in ticks])
    axes.set_xlabel(f"{one.axis} at the end of the difference")
    axes.set_ylabel(one.axis)
    if count <= 10:
        write_cells(axes, matrix, limit)
    return image


def write_cells(axes: Axes, matrix: Points, limit: float) -> None:
    """The numbers, in ink that can be read on their colours."""
    decimals = 3 if limit <= 0.1 and len(matrix) <= 10 else 2
    for i, j in np.argwhere(np.isfinite(matrix)):
        axes.text(
            j,
            i,
            f"{round(float(matrix[i, j]), decimals) + 0.0:.{decimals}f}",  # no -0.00
            ha="center",
            va="center",
            fontsize=8 if len(matrix) <= 7 else 6.5,
            color="white" if abs(matrix[i, j]) > 0.65 * limit else "black",
        )
