"""Labels of points: each beside its point, none on another, few on a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from distmerge.plots.canvas import FAINT

Points = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

RADII = (10.0, 16.0, 24.0, 34.0, 46.0, 60.0)
"""Distances from the point to try, in points (1/72 inch)."""

ANGLES = 16


class Label(NamedTuple):
    """Text for a point (x, y), in data coordinates."""

    at: Points
    text: str
    colour: str


class Place(NamedTuple):
    """The middle of a label, in points from its own point, and the pixels that it covers."""

    dx: float
    dy: float
    box: Bbox


def place(axes: Axes, labels: Sequence[Label], paths: Sequence[Points], *, size: float) -> None:
    """Write `labels` in order of importance; one that finds no free place is left out.

    `paths` (each n x 2, data coordinates) are lines that labels should not cover. The figure must
    be complete otherwise, and settled.
    """
    pixels = [_dense(axes.transData.transform(path)) for path in paths if len(path)]
    lines = np.concatenate(pixels) if pixels else np.zeros((0, 2))
    taken: list[Bbox] = []
    for label in labels:
        found = _best(axes, label, taken, lines, size)
        if found is not None:
            taken.append(found.box)
            _write(axes, label, found, size)


def spaced(axes: Axes, points: Points, points_apart: float) -> list[int]:
    """Indices of points, the first and the last among them, that lie so far apart on the page.

    The figure must be settled.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    at = axes.transData.transform(points) * 72 / figure.dpi
    kept: list[int] = []
    for i in range(len(at)):
        if not kept or math.dist(at[i], at[kept[-1]]) >= points_apart:
            kept.append(i)
    last = len(at) - 1
    if kept and kept[-1] != last:
        kept[-1 if len(kept) > 1 else len(kept) :] = [last]
    return kept


def _dense(path: Points) -> Points:
    """Points along a line, some 4 pixels apart."""
    path = path[np.isfinite(path).all(axis=1)]
    pieces = [path[-1:]]
    for start, end in pairwise(path):
        count = min(200, 1 + int(math.dist(start, end) / 4))
        pieces.append(start + (end - start) * np.linspace(0, 1, count, endpoint=False)[:, None])
    return np.concatenate(pieces)


def _best(axes: Axes, label: Label, taken: list[Bbox], lines: Points, size: float) -> Place | None:
    """The nearest place free of labels that covers the least of the lines."""
    best, least = None, math.inf
    for candidate in _candidates(axes, label, size):
        if candidate.box.count_overlaps(taken) or not _inside(candidate.box, axes.bbox):
            continue
        covered = np.all((lines > candidate.box.p0) & (lines < candidate.box.p1), axis=1).sum()
        cost = 3.0 * covered + math.hypot(candidate.dx, candidate.dy)
        if cost < least - 1e-9:
            best, least = candidate, cost
    return best


def _candidates(axes: Axes, label: Label, size: float) -> list[Place]:
    figure = axes.get_figure(root=True)
    assert figure is not None
    scale = figure.dpi / 72
    text = axes.text(0, 0, label.text, fontsize=size)
    extent = text.get_window_extent()
    text.remove()
    width, height = extent.width + 6 * scale, extent.height + 3 * scale
    x, y = axes.transData.transform(label.at)
    places = []
    for radius in RADII:
        for turn in range(ANGLES):
            angle = 2 * math.pi * (turn + 0.5) / ANGLES
            # The radius is from the point to the near edge of the text, not to its middle.
            dx = math.cos(angle) * (radius + width / 2 / scale)
            dy = math.sin(angle) * (radius + height / 2 / scale)
            left, low = x + dx * scale - width / 2, y + dy * scale - height / 2
            places.append(Place(dx, dy, Bbox.from_bounds(left, low, width, height)))
    return places


def _inside(box: Bbox, outer: Bbox) -> bool:
    return bool(np.all(box.p0 >= outer.p0) and np.all(box.p1 <= outer.p1))


def _write(axes: Axes, label: Label, where: Place, size: float) -> None:
    text = axes.annotate(
        label.text,
        (float(label.at[0]), float(label.at[1])),
        (where.dx, where.dy),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=size,
        color=label.colour,
        path_effects=[withStroke(linewidth=2, foreground="white")],
        arrowprops={
            "arrowstyle": "-",
            "color": FAINT,
            "lw": 0.6,
            "shrinkA": 0,
            "shrinkB": 4,
        },
        zorder=6,
    )
    text.set_in_layout(False)
