"""The two plots of the Extra-Merge experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, RED, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
KINDS = {"trained": BLACK, "average": BLUE, "beyond": RED, "random": PURPLE, "decay": GREEN}
LINES = {4: (SKY, "o"), 8: (ORANGE, "s"), 16: (RED, "^")}

MILLI = 1000.0  # differences are shown in thousandths of a nat
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 130,
}


def draw(results: Path, corpora: dict[str, dict[str, Any]]) -> None:
    """Draw both plots with a panel for each corpus. `corpora` is as in results.json."""
    with mpl.rc_context(STYLE):
        _steps(results / "steps.png", corpora)
        _methods(results / "methods.png", corpora)


def _panels(count: int, height: float) -> Any:
    return plt.subplots(1, count, figsize=(5.2 * count, height), layout="constrained", sharey=True)


def _steps(path: Path, corpora: dict[str, dict[str, Any]]) -> None:
    figure, axes = _panels(len(corpora), 4.2)
    panels: list[Axes] = list(axes) if len(corpora) > 1 else [axes]
    for panel, (name, found) in zip(panels, corpora.items(), strict=True):
        for window, (color, marker) in LINES.items():
            points = [
                point
                for point in found["sweep"]
                if (point["direction"], point["window"]) == ("principal", window)
            ]
            spans = [point["span"] for point in points]
            for seed in range(found["seeds"]):
                values = [MILLI * point["by_seed"][seed] for point in points]
                panel.plot(spans, values, color=color, alpha=0.35, linewidth=0.8)
            panel.errorbar(
                spans,
                [MILLI * point["difference"] for point in points],
                [MILLI * point["error"] for point in points],
                label=f"window {window}",
                color=color,
                marker=marker,
                capsize=3,
            )
        panel.axhline(0, color=BLACK, linewidth=0.8, linestyle="--")
        panel.set_title(name)
        panel.set_xlabel("step beyond the average, share of the merged span")
    panels[0].set_ylabel("loss minus best average,\nthousandths of a nat per byte")
    panels[0].legend()
    figure.savefig(path)
    plt.close(figure)


def _methods(path: Path, corpora: dict[str, dict[str, Any]]) -> None:
    figure, axes = _panels(len(corpora), 5.0)
    panels: list[Axes] = list(axes) if len(corpora) > 1 else [axes]
    for panel, (name, found) in zip(panels, corpora.items(), strict=True):
        methods = found["methods"][::-1]
        for height, row in enumerate(methods):
            color = KINDS[row["kind"]]
            seeds = [MILLI * value for value in row["by_seed"]]
            panel.plot(seeds, [height] * len(seeds), ".", color=color, alpha=0.5)
            panel.errorbar(
                MILLI * row["difference"],
                height,
                xerr=MILLI * row["error"],
                color=color,
                marker="o",
                capsize=3,
            )
        panel.axvline(0, color=BLACK, linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(methods)), [row["label"] for row in methods])
        panel.set_title(name)
        panel.set_xlabel("loss minus best average, thousandths of a nat per byte")
    figure.savefig(path)
    plt.close(figure)
