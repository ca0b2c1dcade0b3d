"""The plot of how alike the task vectors are."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from distmerge.plots import canvas
from distmerge.plots.canvas import FAINT, Plot, clean
from distmerge.plots.cosines import limit_of, off_diagonal, write_cells
from distmerge.plots.reading import Numbers

MAX_WRITTEN = 16
"""So many tasks have room for their numbers."""

MAX_NAMED = 24


def draw(numbers: Numbers, folder: Path) -> Plot | None:
    """tasks.png: the cosines between the task vectors."""
    spectra = numbers["spectra"]
    if spectra is None or len(spectra["tasks"]) < 2:
        return None
    tasks = [clean(name, limit=24) for name in spectra["tasks"]]
    title = "Cosines between the task vectors"
    figure = canvas.new_figure(2.4 + min(4.6, max(1.2, 0.42 * len(tasks))), title)
    figure.set_layout_engine("compressed")  # the squares are narrower than the page
    axes = figure.subplots()
    _heat(axes, spectra["cosines"], tasks)
    bar = figure.colorbar(axes.images[0], ax=axes, fraction=0.04, pad=0.02, aspect=20)
    bar.set_label("cosine")
    bar.ax.grid(visible=False)
    caption = (
        "Over all matrices that are merged as such. Blue: two models were tuned the same way, so "
        "that a sum counts it twice; red: against each other; white: they have nothing in common. "
        "Grey: the diagonal, and models that are the base there."
    )
    return canvas.save(figure, folder, Plot("tasks.png", title, caption))


def _heat(axes: Axes, cosines: list[list[float | None]], tasks: list[str]) -> None:
    matrix, limit = off_diagonal(cosines), limit_of([cosines])
    axes.grid(visible=False)
    axes.set_facecolor("#dddddd")
    axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
    shown = range(0, len(tasks), -(-len(tasks) // MAX_NAMED))
    names = [tasks[n] for n in shown]
    turned = max(map(len, names)) > 6
    axes.set_xticks(shown, labels=names, rotation=45 * turned, ha="right" if turned else "center")
    axes.set_yticks(shown, labels=names)
    axes.tick_params(color=FAINT)
    if len(tasks) <= MAX_WRITTEN:
        write_cells(axes, matrix, limit)
