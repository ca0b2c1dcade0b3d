"""The three plots of the SVC experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.svc_numbers import SCALES

# Okabe and Ito's palette: told apart by readers with any kind of colour vision.
BLACK, BLUE, RED, GRAY = "#000000", "#0072B2", "#D55E00", "#888888"
CURVES = {"plain": (BLUE, "o"), "SVC": (RED, "s")}
COMPARED = {
    "tuned": ("lambda tuned on both sides", BLUE, "o", 0.18),
    "alpha": ("and alpha tuned for SVC", RED, "s", -0.18),
}
PERCENT = 100.0
BELOW_BASE = 3.0  # points; how much worse than that a merge is does not matter
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "legend.frameon": False,
    "figure.dpi": 110,
}


def draw(results: Path, suites: dict[str, dict[str, Any]]) -> None:
    """Draw all plots; `suites` is as in results.json."""
    with mpl.rc_context(STYLE):
        _save(results / "lambda.png", _lambda(suites))
        _save(results / "tuned.png", _tuned(suites))
        _save(results / "gammas.png", _gammas(suites))


def _save(path: Path, figure: Figure) -> None:
    figure.savefig(path)
    plt.close(figure)


def _lambda(suites: dict[str, dict[str, Any]]) -> Figure:
    mergers = list(next(iter(suites.values()))["mergers"])
    figure, rows = plt.subplots(
        *(len(suites), len(mergers)),
        figsize=(1.9 * len(mergers) + 0.6, 2.4 * len(suites) + 0.9),
        sharex=True,
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for (name, found), row in zip(suites.items(), rows, strict=True):
        for merger, panel in zip(mergers, row, strict=True):
            _curves(panel, found["mergers"][merger]["curve"])
        row[0].set_ylabel(f"{name}\naccuracy, %")
        row[0].set_ylim(bottom=PERCENT * found["trained"]["base"] - BELOW_BASE)
    for merger, panel in zip(mergers, rows[0], strict=True):
        panel.set_title(merger)
    for panel in rows[-1]:
        panel.set_xlabel("lambda")
    handles = rows[0][0].get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle("Accuracy over lambda, on the examples that choose", fontweight="bold")
    return figure


def _curves(panel: Axes, curve: dict[str, list[list[float]]]) -> None:
    for name, (color, marker) in CURVES.items():
        values = PERCENT * np.array(curve[name])  # (lambdas, seeds)
        panel.plot(SCALES, values, color=color, alpha=0.35, linewidth=0.8)
        label = {"plain": "without SVC", "SVC": "with SVC, alpha auto (thin: each seed)"}[name]
        panel.plot(SCALES, values.mean(axis=1), color=color, marker=marker, ms=4, label=label)
    panel.set_xscale("log")
    panel.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    panel.minorticks_off()


def _tuned(suites: dict[str, dict[str, Any]]) -> Figure:
    figure, row = plt.subplots(
        *(1, len(suites)),
        figsize=(3.6 * len(suites) + 1.2, 4.2),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for (name, found), panel in zip(suites.items(), row[0], strict=True):
        mergers = list(found["mergers"])[::-1]
        for height, merger in enumerate(mergers):
            _differences(panel, height, found["mergers"][merger]["compared"])
        panel.axvline(0, color=BLACK, linewidth=0.8, linestyle="--")
        panel.set_yticks(range(len(mergers)), mergers)
        panel.grid(axis="y", color="#e5e5e5")
        panel.set_axisbelow(True)
        panel.set_title(name)
        panel.set_xlabel("accuracy with SVC minus without, points")
    handles = [
        row[0][0].plot([], [], marker, color=color, label=label)[0]
        for label, color, marker, _ in COMPARED.values()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle("What SVC adds to a merger whose lambda is tuned", fontweight="bold")
    return figure


def _differences(panel: Axes, height: int, compared: dict[str, dict[str, Any]]) -> None:
    for name, (_, color, marker, above) in COMPARED.items():
        found, at = compared[name], height + above
        panel.plot(
            [PERCENT * value for value in found["by_seed"]],
            [at] * len(found["by_seed"]),
            ".",
            color=color,
            alpha=0.45,
        )
        panel.errorbar(
            *(PERCENT * found["difference"], at),
            xerr=PERCENT * found["error"],
            color=color,
            marker=marker,
            markersize=5,
            capsize=3,
        )


def _gammas(suites: dict[str, dict[str, Any]]) -> Figure:
    figure, row = plt.subplots(
        *(1, len(suites)),
        figsize=(3.6 * len(suites) + 0.6, 3.8),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for (name, found), panel in zip(suites.items(), row[0], strict=True):
        directions = 1 + np.array(found["gammas"]["places"])
        by_lambda = found["gammas"]["by_lambda"]
        for (scale, spectra), color in zip(by_lambda.items(), (BLUE, RED), strict=True):
            values = np.array(list(spectra.values()))  # (matrices, directions)
            panel.plot(directions, np.median(values, axis=0), color=color, label=f"lambda {scale}")
            low, high = values.min(axis=0), values.max(axis=0)
            panel.fill_between(directions, low, high, color=color, alpha=0.15, linewidth=0)
        panel.axhline(1, color=BLACK, linewidth=0.8, linestyle="--")
        panel.axhline(found["tasks"], color=GRAY, linewidth=0.8, linestyle=":")
        panel.set(xscale="log", yscale="log", xlabel="direction, the largest first", title=name)
        panel.set_ylim(0.1, 8)
        panel.set_yticks([0.1, 0.2, 0.5, 1, 2, 6], ["0.1", "0.2", "0.5", "1", "2", "6"])
        panel.minorticks_off()
    row[0][0].set_ylabel("gamma")
    row[0][0].legend(loc="lower right")
    figure.suptitle("Gamma in task arithmetic: median and range over matrices", fontweight="bold")
    return figure
