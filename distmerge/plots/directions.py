"""The plot of how much is damped and how much amplified."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from distmerge.plots import canvas
from distmerge.plots.canvas import Plot, clean
from distmerge.plots.layers import MAX_KINDS
from distmerge.plots.reading import Numbers, calibrated

COLOURS = {"damped": "#2166ac", "kept": "#d9d9d9", "amplified": "#b2182b"}
"""Those of the ends of the heat map of gamma."""


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """directions.png: the shares of directions damped and amplified, by kind of module."""
    outputs, names, note = calibrated(numbers)
    if not outputs:
        return None
    kinds = list(outputs[0]["modules"])[:MAX_KINDS]
    title = f"Shares of directions damped and amplified{note}"
    rows = -(-len(outputs) // 2)
    figure = canvas.new_figure(1.2 + rows * (0.7 + 0.27 * (len(kinds) + 1)), title)
    for number, axes in enumerate(panels := canvas.panels(figure, names)):
        _bars(axes, outputs[number], kinds)
        if number % 2:
            axes.tick_params(labelleft=False)
    for axes in panels[-2:]:
        axes.set_xlabel("% of directions")
    canvas.legend_below(figure, [Patch(color=c) for c in COLOURS.values()], list(COLOURS))
    caption = (
        "A matrix has as many directions as its shorter side has elements. Damped: gamma is below "
        "1. Amplified: above 1. Kept: gamma is 1, or the direction is too weak to be measured."
    )
    return canvas.save(figure, folder, Plot("directions.png", title, caption))


def _bars(axes: Axes, output: Numbers, kinds: list[str]) -> None:
    """One bar a kind, the first on top, below all of them together."""
    modules = [output["modules"].get(kind) for kind in kinds]
    rows = [*modules, output]
    for y, gammas in enumerate(rows):
        if gammas is not None:
            left = 0.0
            for kind, colour in COLOURS.items():
                share = 100 * _share(gammas, kind)
                axes.barh(y, share, left=left, color=colour, height=0.75)
                left += share
    axes.set_yticks(range(len(rows)), labels=[*(clean(k, limit=34) for k in kinds), "all matrices"])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")


def _share(gammas: Numbers, kind: str) -> float:
    rest = 1 - gammas["damped"] - gammas["amplified"]
    return float(max(0.0, rest) if kind == "kept" else gammas[kind])
