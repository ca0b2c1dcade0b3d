"""The two plots of the Extra-Merge experiment."""

from __future__ import annotations

from collections.abc import Callable
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
LINES = {4: (SKY, "o"), 6: (GREEN, "D"), 8: (ORANGE, "s"), 16: (RED, "^")}

MILLI = 1000.0  # differences are shown in thousandths of a nat
# Beyond this, a difference is large in any case; within it lies what there is to tell apart.
LOWEST, HIGHEST = -32.0, 32.0
UNIT = "loss minus best average, nats per byte / 1000 (lower is better)"
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
        _figure(results / "steps.png", corpora, _steps, 4.4, "Loss over the step, by window")
        _figure(results / "methods.png", corpora, _methods, 5.4, "What each method gives")


def _figure(
    path: Path,
    corpora: dict[str, dict[str, Any]],
    panel: Callable[[Axes, dict[str, Any]], None],
    height: float,
    title: str,
) -> None:
    figure, axes = plt.subplots(
        *(1, len(corpora)),
        figsize=(5.4 * len(corpora), height),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for at, (name, found) in zip(axes[0], corpora.items(), strict=True):
        panel(at, found)
        at.set_title(f"{name}, {found['seeds']} seeds")
    if labelled := axes[0][0].get_legend_handles_labels()[0]:
        figure.legend(handles=labelled, loc="outside lower center", ncols=len(labelled), fontsize=9)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path)
    plt.close(figure)


def _steps(panel: Axes, found: dict[str, Any]) -> None:
    for window, (color, marker) in LINES.items():
        points = [
            point
            for point in found["sweep"]
            if (point["direction"], point["window"]) == ("principal", window)
        ]
        spans = [point["span"] for point in points]
        for seed in range(found["seeds"]):
            values = [MILLI * point["by_seed"][seed] for point in points]
            panel.plot(spans, values, color=color, alpha=0.4, linewidth=0.8)
        panel.errorbar(
            spans,
            [MILLI * point["difference"] for point in points],
            [MILLI * point["error"] for point in points],
            label=f"window {window} (thin: each seed)",
            color=color,
            marker=marker,
            markersize=5,
            capsize=3,
        )
    panel.axhline(0, color=BLACK, linewidth=0.8, linestyle="--", label="best average")
    panel.set_ylim(-6, HIGHEST)
    panel.set_xlabel("step beyond the window's average, share of the merged span")
    panel.set_ylabel(UNIT.replace(", ", ",\n"))


def _methods(panel: Axes, found: dict[str, Any]) -> None:
    methods = found["methods"][::-1]
    for height, row in enumerate(methods):
        color, value = KINDS[row["kind"]], MILLI * row["difference"]
        seeds = [MILLI * one for one in row["by_seed"]]
        panel.plot(seeds, [height] * len(seeds), ".", color=color, alpha=0.5)
        if not LOWEST < value < HIGHEST:
            side = 1 if value > 0 else -1
            panel.plot(side * (HIGHEST - 1), height, ">" if value > 0 else "<", color=color)
            align = "right" if value > 0 else "left"
            label = panel.text(side * (HIGHEST - 3), height, f"{value:+.0f}", ha=align, va="center")
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
            continue
        panel.errorbar(value, height, xerr=MILLI * row["error"], color=color, marker="o", capsize=3)
    panel.axvline(0, color=BLACK, linewidth=0.8, linestyle="--")
    panel.set_xlim(LOWEST, HIGHEST)
    panel.grid(axis="y", color="#e5e5e5")
    panel.set_axisbelow(True)
    panel.set_yticks(range(len(methods)), [row["label"] for row in methods])
    panel.set_xlabel(UNIT.replace(" (", "\n("))
