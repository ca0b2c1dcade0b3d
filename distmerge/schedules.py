"""Coefficients of checkpoints along a trajectory, and which checkpoints count. Pure, float64.

Sources: PMA (arXiv 2505.12082), LAWA (2306.03241), WSM (2507.17634).
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from distmerge.errors import ConfigError
from distmerge.trajectory import Schedule, Trajectory

_STEP = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)s?[-_=]?(\d{1,18})", re.IGNORECASE)
_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "minus-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


def step_of(name: str) -> int | None:
    """The step in a name: the number after 'step', 'iter' or 'checkpoint', else the last one.

    >>> step_of("step1000-tokens4B"), step_of("checkpoint-250"), step_of("run2/00070"), step_of("x")
    (1000, 250, 70, None)
    """
    if match := _STEP.search(name):
        return int(match[1])
    numbers = re.findall(r"\d{1,18}", name)
    return int(numbers[-1]) if numbers else None


def select(steps: Sequence[int], trajectory: Trajectory) -> list[int]:
    """Positions in the ascending `steps` that the trajectory takes.

    Steps outside [from_step, to_step] go first, then those closer than `min_interval` to the
    next one taken (greedily from the last), then all but the `first` or `last` so many.
    Raises ConfigError where too few are left.
    """
    low = trajectory.from_step or 0
    high = math.inf if trajectory.to_step is None else trajectory.to_step
    taken = [i for i, step in enumerate(steps) if low <= step <= high]
    if trajectory.min_interval:
        taken = _spaced(steps, taken, trajectory.min_interval)
    wanted = trajectory.first or trajectory.last or 2
    if len(taken) < max(2, wanted):
        raise ConfigError(
            f"trajectory: {max(2, wanted)} checkpoints are needed, {len(taken)} are left "
            f"of {len(steps)} found (steps {_listed(steps)})"
        )
    if trajectory.first:
        return taken[: trajectory.first]
    return taken[-trajectory.last :] if trajectory.last else taken


def _spaced(steps: Sequence[int], taken: list[int], interval: int) -> list[int]:
    kept: list[int] = []
    for i in reversed(taken):
        if not kept or steps[kept[-1]] - steps[i] >= interval:
            kept.append(i)
    return kept[::-1]


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-2:]]) or "none"


def coefficients(schedule: Schedule, count: int) -> tuple[float, ...]:
    """The `count` coefficients of checkpoints in ascending order of step.

    Raises ConfigError where a list has another length, or a sum to normalise by is zero.
    """
    values = _raw(schedule, count)
    if schedule.reverse:
        values = values[::-1]
    if schedule.scramble is not None:
        values = _scrambled(values, schedule.scramble)
    return normalized(values, "trajectory.schedule") if schedule.normalize else tuple(values)


def windows(trajectory: Trajectory, count: int) -> list[tuple[float, ...]]:
    """Coefficients of the merged checkpoints, a row for each, over `count` raw ones.

    The last window ends with the last checkpoint; those before it are `stride` apart, so that a
    few of the first checkpoints may stand in none.
    Raises ConfigError where that makes fewer than two merged checkpoints.
    """
    window, stride = trajectory.window or 1, trajectory.stride
    if window > count:
        raise ConfigError(f"trajectory.window: {window} is more than the {count} checkpoints")
    rows = [
        (0.0,) * (end - window) + coefficients(trajectory.schedule, window) + (0.0,) * (count - end)
        for end in range(count, window - 1, -stride)
    ]
    if len(rows) < 2:
        raise ConfigError(
            f"trajectory: {count} checkpoints with window {window} and stride {stride} make one "
            f"merged checkpoint; a direction needs two: at least {window + stride} checkpoints"
        )
    return rows[::-1]


def normalized(values: Sequence[float], where: str) -> tuple[float, ...]:
    """`values` divided by their sum; raises ConfigError where that is zero up to rounding."""
    total = math.fsum(values)
    if abs(total) <= 1e-12 * math.fsum(map(abs, values)):
        raise ConfigError(f"{where}: the weights sum to zero; they can't be normalised")
    return tuple(value / total for value in values)


def _raw(schedule: Schedule, count: int) -> list[float]:
    if schedule.kind == "uniform":
        return [1 / count] * count
    if schedule.kind == "wma":
        return [2 * t / (count * (count + 1)) for t in range(1, count + 1)]
    if schedule.kind == "ema":
        a = schedule.numbers[0]
        return [(1 - a) ** (count - 1), *(a * (1 - a) ** (count - t) for t in range(2, count + 1))]
    if schedule.curve is None and len(schedule.numbers) != count:
        raise ConfigError(
            f"trajectory.schedule.{schedule.kind}: {len(schedule.numbers)} values "
            f"for {count} checkpoints"
        )
    if schedule.kind == "weights":
        return list(schedule.numbers)
    return _wsm(schedule, count)


def _wsm(schedule: Schedule, count: int) -> list[float]:
    """Coefficients whose running sum from the end is the decay curve (WSM, section 3)."""
    decay = list(schedule.numbers)
    if schedule.curve is not None:
        decay = [_CURVES[schedule.curve](i / count) for i in range(count)]
    later = [a - b for a, b in pairwise(decay[1:])] + decay[1:][-1:]
    return [1 - math.fsum(later), *later]


def _scrambled(values: list[float], seed: int) -> list[float]:
    """A permutation that every Python gives: only random() is promised to stay the same."""
    generator = random.Random(seed)
    keys = [generator.random() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]
