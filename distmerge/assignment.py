"""Which rank does which jobs. Pure; the only thing that depends on the number of ranks."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Container, Mapping, Sequence
from itertools import accumulate, pairwise

from distmerge.planner import Plan


def assign(plan: Plan, ranks: int, done: Container[int] = ()) -> list[list[int]]:
    """The jobs of each rank, without those `done`.

    Matrices are dealt out by cost, the longest first. All else is cut into contiguous stretches of
    the outputs that level the ranks: contiguous, because a rank then reads and writes sequentially
    and mostly in shards of its own; level to within one job, because most jobs are small beside a
    rank's share. Each rank has its sums and copies first, then its task vectors, in file order.
    """
    jobs = [number for number in range(len(plan.jobs)) if number not in done]
    whole = {n for n in jobs if plan.tensors[plan.jobs[n].tensor].rule.cut}
    costs = {number: plan.cost(plan.jobs[number]) for number in jobs}
    dealt, loads = _longest_first(sorted(whole), costs, ranks)
    rest = [number for number in jobs if number not in whole]
    stretches = _dealt(rest, [costs[number] for number in rest], loads)

    return [
        sorted(sorted([*mine, *stretch]), key=lambda number: plan.on_tasks(plan.jobs[number]))
        for mine, stretch in zip(dealt, stretches, strict=True)
    ]


def _longest_first(
    jobs: Sequence[int], costs: Mapping[int, float], ranks: int
) -> tuple[list[list[int]], list[float]]:
    """Each job, the costliest first, goes to the rank with the least; and what each then has."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]
    for job in sorted(jobs, key=lambda job: -costs[job]):
        load, rank = heapq.heappop(waiting)
        dealt[rank].append(job)
        heapq.heappush(waiting, (load + costs[job], rank))
    return dealt, [load for load, _ in sorted(waiting, key=lambda entry: entry[1])]


def assign_trend(plan: Plan, ranks: int, done: Container[int] = ()) -> list[list[int]]:
    """The jobs of each rank in the statistic pass, with equal bytes to read."""
    jobs = [number for number in plan.trend_jobs if number not in done]
    costs = [float(plan.read_bytes(plan.jobs[number])) for number in jobs]
    return _dealt(jobs, costs, [0.0] * ranks)


def _dealt(jobs: Sequence[int], costs: Sequence[float], loads: Sequence[float]) -> list[list[int]]:
    """`jobs` cut into contiguous parts, one for each of `loads`, that nearly level them."""
    ends = list(accumulate(costs))
    rooms = _rooms(loads, ends[-1] if ends else 0.0)
    bounds = [0]
    for target in list(accumulate(rooms))[:-1]:
        bounds.append(_nearest(ends, target, bounds[-1]))
    return [list(jobs[a:b]) for a, b in zip(bounds, [*bounds[1:], len(jobs)], strict=True)]


def _rooms(loads: Sequence[float], more: float) -> list[float]:
    """How `more` is poured over `loads`, so that the lowest become level."""
    level, poured = 0.0, 0.0
    for count, (load, above) in enumerate(pairwise([*sorted(loads), math.inf]), start=1):
        poured += load
        level = (more + poured) / count
        if level <= above:
            break
    return [max(0.0, level - load) for load in loads]


def _nearest(ends: Sequence[float], target: float, start: int) -> int:
    """The number of jobs, at least `start`, whose total cost comes nearest to `target`."""
    index = bisect_left(ends, target, lo=start)
    if index == len(ends):
        return index
    before = ends[index - 1] if index else 0
    return index if target - before <= ends[index] - target else index + 1
