"""The coefficients that no recipe states: found by a statistic pass, or known from one before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distmerge import gram as grams
from distmerge import report, trend
from distmerge.attempt import Attempt
from distmerge.dist import World
from distmerge.gram import Gram
from distmerge.log import LOGGER
from distmerge.passes import NOTHING, Done, Means, statistic_pass
from distmerge.planner import Plan, solved
from distmerge.stream import single_threaded
from distmerge.sweep import Recipe


def find_coefficients(
    world: World, recipe: Recipe, plan: Plan, means: Means, places: tuple[Path, Attempt]
) -> tuple[Plan, Done]:
    """The plan with all coefficients, and what it took to find them. `places` are OUT, the attempt.

    Raises MismatchError where there is no direction.
    """
    if recipe.shared.extrapolation is None:
        return plan, NOTHING
    out, attempt = places
    path, known = world.on_first(
        "look for a statistic", lambda: _known(grams.cache_path(out, plan, means.device.type))
    )
    gram, done = known, NOTHING
    if gram is None:
        gram, done = statistic_pass(world, plan, means, attempt)
    rows = world.on_first("solve", lambda: _solve(recipe, plan, gram))
    world.on_first("keep the statistic", lambda: _keep(gram, attempt, path))
    return solved(plan, rows), done


def _keep(gram: Gram, attempt: Attempt, cache: Path) -> None:
    """With the outputs, for no report can be made without it, and in the cache."""
    folder = attempt.folder / report.FOLDER
    folder.mkdir(exist_ok=True)
    grams.save(gram, folder / report.GRAM)
    grams.keep(gram, [cache])


def _known(path: Path) -> tuple[Path, Gram | None]:
    if (found := grams.cached(path)) is not None:
        LOGGER.info("statistic: known from %s; the inputs are read once", path)
    return path, found


def _solve(recipe: Recipe, plan: Plan, gram: Gram) -> list[Sequence[float]]:
    configs = [variant.config for variant in recipe.variants]
    labels = [plan.inputs[i].label for i in range(len(gram.matrix))]
    with single_threaded():
        trends = trend.find_trends(configs, gram.matrix, labels)
        trend.warn_of_noise(trends)
        return trend.coefficients(configs, trends)
