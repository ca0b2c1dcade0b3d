"""The plot of how straight the path is, beside what chance alone makes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from distmerge.plots import canvas
from distmerge.plots.canvas import MERGED, RAW, Plot
from distmerge.plots.reading import Numbers, shown

COMPONENTS = 5


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """explained.png: the share of variance by component beside that of a random walk."""
    trends, note = shown(numbers)
    if not trends:
        return None
    title = f"Share of the variance by component, beside a random walk{note}"
    figure = canvas.new_figure(4.6 if len(trends) == 1 else 3.5 * -(-len(trends) // 2) + 0.4, title)
    for axes, trend in zip(
        canvas.panels(figure, [trend["label"] for trend in trends]), trends, strict=True
    ):
        _bars(axes, trend["explained"])
    handles = [Patch(**_look(kind)) for kind in ("raw", "null_raw", "merged", "null_merged")]
    names = [
        "checkpoints as trained",
        "random walk",
        "merged checkpoints",
        "random walk, merged alike",
    ]
    canvas.legend_below(figure, handles, names)
    caption = (
        "Hatched bars are a random walk of as many checkpoints under the same windows: the "
        "window alone makes this much, so a high share is no evidence of a straight path. "
        "Only the height above the hatched bar says something about the training."
    )
    return canvas.save(figure, folder, Plot("explained.png", title, caption))


def _look(kind: str) -> Numbers:
    colour = MERGED if kind.endswith("merged") else RAW
    if kind.startswith("null"):
        return {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
    return {"facecolor": colour, "edgecolor": colour}


def _bars(axes: Axes, shares: Numbers) -> None:
    """Four bars a component; those of the first carry their number."""
    most = max(len(values) for values in shares.values())
    for place_of, kind in enumerate(("raw", "null_raw", "merged", "null_merged")):
        values = [100 * share for share in shares[kind][:COMPONENTS]]
        at = [i + (place_of - 1.5) * 0.21 for i in range(len(values))]
        axes.bar(at, values, width=0.185, **_look(kind))
        for x, value in list(zip(at, values, strict=True))[:1]:
            axes.text(x, value + 1, f"{value:.0f}", ha="center", va="bottom", fontsize=8)
    count = min(most, COMPONENTS)
    axes.set_xticks(range(count), labels=[str(i + 1) for i in range(count)])
    axes.set_xlim(-0.6, max(count, 2) - 0.4)
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("component")
    axes.set_ylabel("share of the variance (%)")
