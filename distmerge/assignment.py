"""Which rank does which jobs. Pure; the only thing that depends on the number of ranks."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Container, Hashable, Sequence
from itertools import accumulate, pairwise

from distmerge.matrices import BATCH_ELEMENTS
from distmerge.planner import Plan
from distmerge.spec import ELEMENTWISE


def assign(
    plan: Plan, ranks: int, done: Container[int] = (), *, batched: bool = False
) -> list[list[int]]:
    """The jobs of each rank, without those `done`; `batched` for GPUs, see `batches`.

    Matrices (small ones in batches) are dealt out by cost, the longest first. All else is cut into
    contiguous stretches of the outputs that level the ranks: contiguous, because a rank then reads
    and writes sequentially and mostly in shards of its own; level to within one job, because most
    jobs are small beside a rank's share. Each rank has its sums and copies first, then what merges
    task vectors by element, then its matrices, each in file order.
    """
    jobs = [number for number in range(len(plan.jobs)) if number not in done]
    costs = {number: plan.cost(plan.jobs[number]) for number in jobs}
    whole = batches(plan) if batched else [[n] for n in costs if plan.matrices(plan.jobs[n])]
    together = [[n for n in batch if n in costs] for batch in whole]
    together = [batch for batch in together if batch]
    dealt, loads = _longest_first([sum(costs[n] for n in batch) for batch in together], ranks)
    rest = [number for number in jobs if not plan.matrices(plan.jobs[number])]
    stretches = _dealt(rest, [costs[number] for number in rest], loads)
    return [
        [
            *sorted(stretch, key=lambda number: plan.on_tasks(plan.jobs[number])),
            *(number for batch in sorted(mine) for number in together[batch]),
        ]
        for mine, stretch in zip(dealt, stretches, strict=True)
    ]


def whole_batches(plan: Plan, done: Container[int]) -> set[int]:
    """Of the jobs `done`, those whose batch is done: a part of a batch may get other last bits."""
    partly = {n for batch in batches(plan) if not all(m in done for m in batch) for n in batch}
    return {n for n in range(len(plan.jobs)) if n in done and n not in partly}


def batches(plan: Plan) -> list[list[int]]:
    """The jobs of matrices, those together that a GPU takes as one batch: small ones of one shape
    that come about in the same way. Not by element: their thresholds are those of a tensor."""
    alike: dict[Hashable, list[list[int]]] = {}
    for number, job in enumerate(plan.jobs):
        tensor = plan.tensors[job.tensor]
        rule, size = tensor.rule, job.stop - job.start
        if rule.cut is None:
            continue
        small = len(tensor.shape) == 2 and 2 * size <= BATCH_ELEMENTS
        alone = not small or len(plan.matrices(job)) > 1 or rule.tasks[0].method in ELEMENTWISE
        dtypes = tuple(plan.inputs[i].tensors[tensor.name].dtype.name for i in rule.inputs)
        found = alike.setdefault((tensor.shape, size, tensor.dtype.name, dtypes, rule), [[]])
        if alone or (len(found[-1]) + 1) * size > BATCH_ELEMENTS:
            found.append([])
        found[-1].append(number)
    return sorted(batch for found in alike.values() for batch in found if batch)


def _longest_first(costs: Sequence[float], ranks: int) -> tuple[list[list[int]], list[float]]:
    """Each piece of work, the costliest first, goes to the rank with the least; and what each then
    has."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    waiting = [(0.0, rank) for rank in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heapq.heappop(waiting)
        dealt[rank].append(number)
        heapq.heappush(waiting, (load + costs[number], rank))
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
