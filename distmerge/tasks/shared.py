"""Matrices over the budget: all ranks work on each together, panel by panel.

Panel p is that of rank p modulo their number. Sums over panels are added in the panels' order by
one rank, which solves and tells the others. So the bytes are those that one rank would make.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TypeVar

import torch

from distmerge.dist import World
from distmerge.engine import Outcome
from distmerge.methods.stages import Method, Stage
from distmerge.planner import Plan
from distmerge.sources.reader import Inputs
from distmerge.stream import Stream
from distmerge.tasks.engine import Handling
from distmerge.tasks.given import Filed, Tensors
from distmerge.tasks.merging import Elements, MatrixMerge, Panels
from distmerge.tasks.spectra import described
from distmerge.threads import Threads
from distmerge.writer import ShardWriter

T = TypeVar("T")


class Line:
    """Passes tensors between ranks in a thread: this one must hear of it if another rank fails."""

    def __init__(self, world: World):
        self._world, self._thread = world, Threads(1, "line")

    def pass_on(self, tensors: Tensors, source: int, target: int) -> Tensors:
        """See World.pass_on."""
        self._world.check()
        return self._world.wait(self._thread.submit(self._world.pass_on, tensors, source, target))

    def share(self, tensors: Tensors, source: int) -> Tensors:
        """See World.share."""
        self._world.check()
        return self._world.wait(self._thread.submit(self._world.share, tensors, source))

    def close(self) -> None:
        self._thread.close()


class Together:
    """A merging.Driver for all ranks; `solver` is the one that solves. Panels are on `device`."""

    def __init__(self, world: World, line: Line, solver: int, device: torch.device):
        self._world, self._line, self._solver = world, line, solver
        self._device = device

    def drive(self, method: Method[T], count: int, panel: Panels) -> T:
        try:
            stage = next(method)
            while True:
                total = self._summed(stage, count, panel)
                solution = self._told(lambda: stage.solve(total))  # noqa: B023
                stage = method.send(self._moved(solution))
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]

    def whole(self, find: Callable[[], Tensors]) -> Tensors:
        return self._told(find)

    def _summed(self, stage: Stage, count: int, panel: Panels) -> Tensors:
        """The sum on the rank that solves, nothing on the others."""
        world = self._world
        total: Tensors = []
        for number in range(count):
            owner = number % world.size
            part: Tensors = []
            if owner == world.rank:
                world.check()
                part = stage.accumulate(panel(number))
            part = self._moved(self._line.pass_on(part, owner, self._solver))
            if world.rank == self._solver:
                total = stage.combine(total, part) if total else part
        return total

    def _told(self, find: Callable[[], Tensors]) -> Tensors:
        found = find() if self._world.rank == self._solver else []
        return self._line.share(found, self._solver)

    def _moved(self, tensors: Tensors) -> Tensors:
        """What has come from other ranks is on the CPU."""
        return [x.to(self._device) for x in tensors]


def run_shared(
    plan: Plan,
    jobs: Sequence[int],
    inputs: Inputs,
    writer: ShardWriter,
    world: World,
    how: Handling,
    owners: Sequence[int] | None,
) -> Outcome:
    """Merge the matrices of `jobs`, one job after the other.

    `owners` are the ranks that write each file, where not all ranks see them.
    """
    stream = Stream(plan, elements=how.budget.elements, pinned=False, writes=False)
    nonfinite = read = 0
    with closing(Line(world)) as line, world.monitor.excused():
        for turn, number in enumerate(jobs):
            job = plan.jobs[number]
            driver = Together(world, line, turn % world.size, how.solver)
            given = Filed(plan, number, stream, inputs, world)
            elements = Elements(plan, given, driver, how.solver)
            merges = [
                MatrixMerge(plan, given, matrix, elements, driver, how.solver)
                for matrix in plan.matrices(job)
            ]
            for merge in merges:
                _collect_products(merge, world, line)
                nonfinite += _write(merge, plan, writer, world, line, how, owners)
            read += given.read_bytes
            if world.rank == 0:
                how.spectra.add(described(plan, number, merges))
                world.monitor.advance(plan.read_bytes(job) + plan.write_bytes(job))
    return Outcome(read_bytes=read + stream.read_bytes, nonfinite=nonfinite)


def _collect_products(merge: MatrixMerge, world: World, line: Line) -> None:
    """Rank 0 reports what each rank has seen of the tasks."""
    for number in range(len(merge.pieces)):
        seen = [merge.products[number]] if number in merge.products else []
        for products in line.pass_on(seen, number % world.size, 0):
            merge.products[number] = products


def _write(
    merge: MatrixMerge,
    plan: Plan,
    writer: ShardWriter,
    world: World,
    line: Line,
    how: Handling,
    owners: Sequence[int] | None,
) -> int:
    nonfinite = 0
    for output in range(len(plan.outputs)):
        file = plan.file(output, merge.tensor.shard)
        for number in range(len(merge.pieces)):
            maker = number % world.size
            keeper = maker if owners is None else owners[file]
            part: Tensors = []
            if maker == world.rank:
                world.check()
                made, count = merge.rounded(number, output, allow_nonfinite=how.allow_nonfinite)
                part, nonfinite = [made], nonfinite + count
            for received in line.pass_on(part, maker, keeper):
                _write_rows(writer, file, merge, number, received)
    return nonfinite


def _write_rows(
    writer: ShardWriter, file: int, merge: MatrixMerge, number: int, part: torch.Tensor
) -> None:
    """Write a piece (slices x rows x columns), row by row."""
    piece, matrix, tensor = merge.pieces[number], merge.matrix, merge.tensor
    size = tensor.dtype.itemsize
    first = matrix.start + piece.top * matrix.stride + piece.left
    for at, rows in enumerate(part.contiguous().view(torch.uint8)):
        offset = tensor.offset + (first + at * matrix.step) * size
        writer.write_rows(file, offset, matrix.stride * size, rows)


def vouch(plan: Plan, jobs: Sequence[int], files: Sequence[int], writer: ShardWriter) -> None:
    """Take down that `jobs` are done, as far as they lie in `files`; all ranks have written."""
    for number in jobs:
        job = plan.jobs[number]
        tensor = plan.tensors[job.tensor]
        size = tensor.dtype.itemsize
        for output in range(len(plan.outputs)):
            file = plan.file(output, tensor.shard)
            if file in files:
                writer.vouch(file, tensor.offset + job.start * size, (job.stop - job.start) * size)
