"""Choosing among the finished outputs of a sweep: measure, score, let OUT/best lead to the best."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distmerge import report
from distmerge.dist import World
from distmerge.document import Plain
from distmerge.errors import DistmergeError, OutputError
from distmerge.evaluation import measure_all
from distmerge.log import LOGGER
from distmerge.manifest import output_names
from distmerge.scoring import scores
from distmerge.selection import Selection
from distmerge.stream import single_threaded
from distmerge.sweep import swept_values

STEPS = ("step", "span")


def choose(
    world: World, selection: Selection, out: Path, names: Sequence[str], *, use_gpu: bool = True
) -> dict[str, Plain]:
    """The scores of the outputs `names` of `out`, on every rank; links OUT/best.

    Compared with the first that does not extrapolate, else with the first.
    Raises what evaluation.measure_all and scoring.scores raise; the outputs stay.
    """
    first = baseline(names)
    candidates = [first, *(name for name in names if name != first)]

    def conclude() -> dict[str, Plain]:
        values = [swept_values(name) for name in candidates]
        found = scores(selection, candidates, values, measured)
        report.keep_scores(out, found)
        return found

    try:
        with single_threaded():
            models = [out / name for name in candidates]
            measured = measure_all(world, selection, models, use_gpu=use_gpu)
        return world.on_first("choose", conclude)
    except DistmergeError:
        if world.rank == 0:
            LOGGER.warning(
                "%s: its %d outputs are complete, only the choice failed; choose again with: "
                "distmerge select %s --text FILE (or --command)",
                out, len(names), out,
            )  # fmt: skip
        raise


def baseline(names: Sequence[str]) -> str:
    """The output that the others are compared with."""
    for name in names:
        values = swept_values(name)
        if any(values.get(key) == 0 for key in STEPS):
            return name
    return names[0]


def outputs_to_choose_from(out: Path) -> list[str]:
    """The outputs of the sweep in `out`. Raises OutputError where it holds none."""
    names = output_names(out)
    if len(names) < 2:
        raise OutputError(f"{out}: it holds one output, not a sweep; there is nothing to choose")
    return names
