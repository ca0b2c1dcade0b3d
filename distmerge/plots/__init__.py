"""The plots of a report: numbers in, PNG files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distmerge.plots import (
    coefficients,
    cosines,
    directions,
    explained,
    gammas,
    modules,
    scores,
    singular_values,
    task_cosines,
    trajectory,
)
from distmerge.plots.canvas import Plot, style

__all__ = ["Plot", "draw"]

KINDS = (
    scores,
    trajectory,
    explained,
    coefficients,
    cosines,
    modules,
    gammas,
    directions,
    singular_values,
    task_cosines,
)
"""In the order of the report. Each one's draw() returns None where there is nothing to draw."""


def draw(numbers: dict[str, Any], folder: Path) -> list[Plot]:
    """Draw all that `numbers` (the content of report.json) has data for, into `folder`.

    Equal numbers give equal bytes with one version of matplotlib. Not for several threads at a
    time: matplotlib's settings, changed here and put back, belong to the whole process. Raises
    OSError where a file can't be written.
    """
    with style():
        plots = [kind.draw(numbers, folder) for kind in KINDS]
    return [plot for plot in plots if plot is not None]
