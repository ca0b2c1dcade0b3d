"""The plot of the held-out scores: is an output better than the baseline, and by how much?"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from distmerge.plots import canvas
from distmerge.plots.canvas import FAINT, INK, OUTPUT, WIDTH, Plot, clean, is_number
from distmerge.plots.reading import Numbers, in_order, is_finite, meaning, short, swept, value_of

SQUASHED = 8.0
"""Where the worst candidate is this many times as far off as what matters, it gets a zoom."""

STEPS = ("step", "span")
"""What goes along the x axis if it is swept, whatever else is."""


class Chart(NamedTuple):
    """How the candidates are laid out.

    x: the swept number along the x axis, None for a list of names. series: the key with one line
    for each of its values, None for one line. near: the differences that matter lie within
    +-near; None where all are seen well in one panel.
    """

    candidates: list[Numbers]
    x: str | None
    series: str | None
    near: float | None
    best: Numbers | None


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """scores.png: the difference of each candidate's score to the baseline."""
    found = numbers["scores"]
    chart = _chart(found) if found else None
    if chart is None or len(chart.candidates) < 2:
        return None
    title = "Held-out score of the outputs against the baseline"
    figure = _by_name(chart, found, title) if chart.x is None else _by_value(chart, found, title)
    side = "below" if found["goal"] == "min" else "above"
    bars = (
        "Bars are one standard error of the paired difference: twice a bar that reaches zero "
        "leaves it open which is better."
        if _bars(chart.candidates)
        else "Without standard errors, it stays open how much of a difference is chance."
    )
    caption = f"Points {side} zero score better than the baseline. {bars}"
    return canvas.save(figure, folder, Plot("scores.png", title, caption))


def _chart(found: Numbers) -> Chart:
    candidates = [c for c in found["candidates"] if is_finite(c["difference"])]
    keys = swept(candidates)
    numeric = [k for k in keys if all(is_number(c["values"].get(k)) for c in candidates)]
    x = series = None
    if numeric and len(keys) <= 2:
        sizes = {key: len({value_of(c, key) for c in candidates}) for key in numeric}
        x = max(numeric, key=lambda key: (short(key) in STEPS, sizes[key]))
        series = next((key for key in keys if key != x), None)
    best = next((c for c in candidates if c["name"] == found["best"]), None)
    return Chart(candidates, x, series, _near(candidates, best), best)


def _near(candidates: list[Numbers], best: Numbers | None) -> float | None:
    sizes = sorted(abs(c["difference"]) for c in candidates if c["difference"])
    errors = [c["error"] for c in candidates if is_finite(c["error"]) and c["error"] > 0]
    if not sizes:
        return None
    gain = abs(best["difference"]) if best else 0.0
    matters = max(gain, sizes[0], median(errors) if errors else 0.0)
    return 2.5 * matters if sizes[-1] > SQUASHED * matters else None


def _unit(found: Numbers) -> str:
    unit = f" ({clean(found['unit'])})" if found["unit"] else ""
    better = "lower is better" if found["goal"] == "min" else "higher is better"
    return f"difference in {_metric(found)}{unit}\n{better}"


def _metric(found: Numbers) -> str:
    return "score" if found["metric"] == "command" else clean(found["metric"])


def _baseline(chart: Chart, found: Numbers) -> str:
    score = next((c["score"] for c in chart.candidates if c["name"] == found["baseline"]), None)
    value = f"{_metric(found)} {score:.5g} {found['unit']}" if is_finite(score) else "no score"
    line = "\n" if chart.near else " "
    return f"0 is the baseline {clean(found['baseline'] or 'output')}:{line}{clean(value)}"


def _legend(figure: Figure, chart: Chart) -> None:
    if chart.best is not None:
        star = Line2D([], [], color=OUTPUT, marker="*", markersize=13, linestyle="none")
        canvas.legend_below(figure, [star], [f"best: {clean(chart.best['name'] or 'output')}"])


def _bars(entries: list[Numbers]) -> Any:
    """Standard errors for errorbar(), None where none is known."""
    errors = [c["error"] if is_finite(c["error"]) else 0.0 for c in entries]
    return errors if any(errors) else None


def _by_value(chart: Chart, found: Numbers, title: str) -> Figure:
    assert chart.x is not None
    figure = canvas.new_figure(4.8, title)
    grid = list(figure.subplots(1, 2 if chart.near else 1, squeeze=False)[0])
    lines = in_order(chart.candidates, chart.series) if chart.series else [""]
    for axes in grid:
        _value_panel(axes, chart, lines)
    grid[0].set_ylabel(_unit(found))
    grid[0].set_title(_baseline(chart, found))
    if chart.near:
        grid[1].set_ylim(-chart.near, chart.near)
        grid[1].set_title("the same, near the baseline")
    if chart.series and len(lines) > 1:
        _key_of_lines(figure, grid, chart, lines)
    else:
        _legend(figure, chart)
    return figure


def _key_of_lines(figure: Figure, grid: list[Axes], chart: Chart, lines: list[str]) -> None:
    """The lines of a second swept value; the best stands in the same legend where it fits."""
    assert chart.series is not None
    title = clean(short(chart.series))
    if len(lines) > len(canvas.LINES):
        canvas.key(figure, grid, lines, title)
        _legend(figure, chart)
        return
    handles = [Line2D([], [], color=c, marker="o", markersize=4) for c in canvas.colours(lines)]
    names = [f"{title} {line}" for line in lines]
    if chart.best is not None:
        handles.append(Line2D([], [], color=OUTPUT, marker="*", markersize=13, linestyle="none"))
        names.append(f"best: {clean(chart.best['name'] or 'output')}")
    canvas.legend_below(figure, handles, names)


def _value_panel(axes: Axes, chart: Chart, lines: list[str]) -> None:
    assert chart.x is not None
    axes.axhline(0, color=INK, linewidth=1, linestyle="--")
    for line, colour in zip(lines, canvas.colours(lines), strict=True):
        members = [
            c for c in chart.candidates if not chart.series or value_of(c, chart.series) == line
        ]
        members.sort(key=lambda c: float(c["values"][chart.x]))
        at = [float(c["values"][chart.x]) for c in members]
        axes.errorbar(
            at,
            [c["difference"] for c in members],
            yerr=_bars(members),
            fmt="-o",
            color=colour,
            markersize=4.5,
            linewidth=1.4,
            capsize=3,
        )
    if chart.best is not None:
        at_best = float(chart.best["values"][chart.x])
        _star(axes, at_best, chart.best["difference"])
    _ticks(axes, sorted({float(c["values"][chart.x]) for c in chart.candidates}), chart)
    axes.set_xlabel(clean(meaning(chart.x), limit=50))


def _star(axes: Axes, x: float, y: float) -> None:
    axes.plot([x], [y], "*", color=OUTPUT, markersize=15, mec="white", mew=0.8, zorder=5)


def _ticks(axes: Axes, values: list[float], chart: Chart) -> None:
    """Ticks at the swept values themselves; a logarithmic axis where they span decades."""
    log = values[0] > 0 and values[-1] / values[0] >= 50
    if log:
        axes.set_xscale("log")
    if log or len(values) <= 12:
        canvas.tick_at(axes.xaxis, values, WIDTH * (0.36 if chart.near else 0.8), log=log)


def _by_name(chart: Chart, found: Numbers, title: str) -> Figure:
    """A list from the top: names on the y axis, as they may be long."""
    count = len(chart.candidates)
    figure = canvas.new_figure(1.9 + 0.24 * min(count, 60), title)
    grid = list(figure.subplots(1, 2 if chart.near else 1, squeeze=False, sharey=True)[0])
    differences = [c["difference"] for c in chart.candidates]
    rows = list(range(count))
    for axes in grid:
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.errorbar(
            differences,
            rows,
            xerr=_bars(chart.candidates),
            fmt="o",
            color=canvas.LINES[0],
            markersize=4.5,
            capsize=3,
        )
        if chart.best is not None:
            _star(axes, chart.best["difference"], chart.candidates.index(chart.best))
        axes.set_xlabel(_unit(found))
    grid[0].set_title(_baseline(chart, found))
    grid[0].set_yticks(rows, labels=[clean(c["name"] or "output") for c in chart.candidates])
    grid[0].set_ylim(count - 0.4, -0.6)
    if chart.near:
        grid[1].set_xlim(-chart.near, chart.near)
        grid[1].set_title("the same, near the baseline")
    _legend(figure, chart)
    return figure
