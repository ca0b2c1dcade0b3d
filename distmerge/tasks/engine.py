"""The jobs on task vectors of one rank: each held in memory, or read again for every pass.

Loader -> Elements or MatrixMerge -> Sink.write
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import NamedTuple, TypeVar

import torch

from distmerge.assignment import batches
from distmerge.budget import Budget, held_bytes
from distmerge.dist import World
from distmerge.engine import Outcome, Sink, overflow
from distmerge.errors import NonFiniteError, PeerError, RunError
from distmerge.log import LOGGER
from distmerge.matrices import Matrix, alone
from distmerge.methods.average import count_nonfinite
from distmerge.methods.stages import Method, drive
from distmerge.planner import Plan
from distmerge.sources.reader import Inputs
from distmerge.spec import PAGE
from distmerge.stream import Step, Stream, nonfinite_input, steps, typed
from distmerge.tasks.given import (
    Bundle,
    Filed,
    Given,
    Loader,
    Tensors,
    place_of,
    viewed,
)
from distmerge.tasks.merging import Elements, MatrixMerge, Panels
from distmerge.tasks.outbox import Outbox
from distmerge.tasks.spectra import Spectra, described

T = TypeVar("T")


class Handling(NamedTuple):
    """How jobs are run: sums on `device`, task vectors on `solver`. `spectra` takes down what
    becomes of matrices."""

    budget: Budget
    device: torch.device
    solver: torch.device
    allow_nonfinite: bool
    spectra: Spectra


class Alone:
    """A merging.Driver for one rank."""

    def __init__(self, world: World):
        self._world = world

    def drive(self, method: Method[T], count: int, panel: Panels) -> T:
        def all_panels() -> Iterator[object]:
            for number in range(count):
                self._world.check()
                yield panel(number)

        return drive(method, all_panels)  # type: ignore[arg-type]

    def whole(self, find: Callable[[], Tensors]) -> Tensors:
        return find()


class TaskEngine:
    """Runs the jobs of one rank that merge task vectors."""

    def __init__(self, plan: Plan, how: Handling):
        self._plan, self._how, self._device = plan, how, how.solver
        self._pinned = self._device.type == "cuda"
        self._nonfinite = self._written = 0
        self._loader = Loader(plan, elements=how.budget.elements, device=self._device)

    @cached_property
    def _stream(self) -> Stream:
        return Stream(
            self._plan, elements=self._how.budget.elements, pinned=self._pinned, writes=False
        )

    def run(self, jobs: Sequence[int], inputs: Inputs, sink: Sink, world: World) -> Outcome:
        """Read, merge and write every job, in order. Raises what goes wrong in any of the three."""
        with closing(Outbox(sink, world, pinned=self._pinned)) as outbox:
            for held, batches in itertools.groupby(self._batched(jobs), self._is_held):
                if held:
                    self._run_held(list(batches), inputs, world, outbox)
                else:
                    for number in itertools.chain.from_iterable(batches):
                        filed = Filed(self._plan, number, self._stream, inputs, world)
                        self._merge([filed], world, outbox)
            outbox.finish()
        read = self._loader.read_bytes
        if "_stream" in self.__dict__:
            read += self._stream.read_bytes
        return Outcome(read_bytes=read, written_bytes=self._written, nonfinite=self._nonfinite)

    def _batched(self, jobs: Sequence[int]) -> list[list[int]]:
        """A GPU takes small matrices of one shape together; a core gains nothing by that."""
        if self._device.type == "cpu":
            return [[number] for number in jobs]
        first = {number: batch[0] for batch in batches(self._plan) for number in batch}
        grouped = itertools.groupby(jobs, key=lambda number: first.get(number, number))
        return [list(batch) for _, batch in grouped]

    def _is_held(self, batch: Sequence[int]) -> bool:
        return self._held_bytes(batch) <= self._how.budget.memory

    def _held_bytes(self, batch: Sequence[int]) -> int:
        return sum(held_bytes(self._plan, self._plan.jobs[number]) for number in batch)

    def _run_held(
        self, batches: Sequence[Sequence[int]], inputs: Inputs, world: World, outbox: Outbox
    ) -> None:
        largest = max(map(self._held_bytes, batches))

        def ahead(batch: Sequence[int]) -> bool:
            read = sum(self._plan.read_bytes(self._plan.jobs[number]) for number in batch)
            return largest + read <= self._how.budget.memory

        with closing(self._loader.run(batches, inputs, world, ahead)) as loaded:
            for held in loaded:
                self._merge(held, world, outbox)

    def _merge(self, batch: Sequence[Given], world: World, outbox: Outbox) -> None:
        jobs = [self._plan.jobs[given.number] for given in batch]
        try:
            with world.monitor.excused():
                if self._plan.matrices(jobs[0]):
                    self._matrices(batch, world, outbox)
                else:
                    self._elements(batch[0], world, outbox)
        except torch.cuda.OutOfMemoryError as error:
            name = self._plan.tensors[jobs[0].tensor].name
            raise RunError(f"{name}: out of GPU memory; use --device cpu") from error
        for job in jobs:
            world.monitor.advance(self._plan.read_bytes(job) + self._plan.write_bytes(job))
            self._written += self._plan.write_bytes(job)

    def _elements(self, given: Given, world: World, outbox: Outbox) -> None:
        elements = Elements(self._plan, given, Alone(world), self._device)
        outputs = range(len(self._plan.outputs))
        for step, inputs in given.steps():
            apart = -(-step.output_bytes // PAGE) * PAGE + PAGE
            room = outbox.buffer(len(outputs) * apart, 0)
            parts = [room[n * apart + step.offset % PAGE :][: step.output_bytes] for n in outputs]
            results = [typed(part, step.tensor.dtype) for part in parts]
            sound = elements.results(step, inputs, results)
            for number in (n for n in outputs if not sound[n]):
                self._report_nonfinite(step, inputs, results[number], number)
            files = [self._plan.file(n, step.tensor.shard) for n in outputs]
            outbox.put([(f, step.offset, x) for f, x in zip(files, parts, strict=True)])

    def _report_nonfinite(
        self, step: Step, inputs: Tensors, result: torch.Tensor, output: int
    ) -> None:
        counts = [count_nonfinite(x) for x in inputs]
        over = 0 if any(counts) else count_nonfinite(result)
        self._nonfinite += (sum(counts) if output == 0 else 0) + over
        if self._how.allow_nonfinite:
            return
        for place, count in enumerate(counts):
            if count:
                remedy = "pass --allow-nonfinite to go on all the same"
                raise nonfinite_input(self._plan, step, place, count, remedy=remedy)
        if over:
            raise overflow(self._plan, step.tensor, output, over)

    def _matrices(self, batch: Sequence[Given], world: World, outbox: Outbox) -> None:
        """Solve every matrix of the jobs, then write one output of a job after the other."""
        if len(batch) > 1:
            self._bundle(batch, world, outbox)
            return
        given = batch[0]
        job = self._plan.jobs[given.number]
        tensor = self._plan.tensors[job.tensor]
        elements = Elements(self._plan, given, Alone(world), self._device)
        merges = [
            merge
            for matrix in self._plan.matrices(job)
            for merge in self._with_room(given, matrix, elements, world)
        ]
        self._how.spectra.add(described(self._plan, given.number, merges))
        for output in range(len(self._plan.outputs)):
            out = self._room(given.number, outbox)
            result = typed(out, tensor.dtype)
            for merge in merges:
                target = viewed(result, merge.matrix, job.start)
                for piece, part in self._parts(merge, output, world):
                    target[piece] = part
            self._put(given.number, output, out, outbox)

    def _bundle(self, batch: Sequence[Given], world: World, outbox: Outbox) -> None:
        """The same for jobs of one matrix each, which are solved as a batch; one by one where that
        fails: each takes less memory, and an error names its tensor."""
        solved = self._together(batch, world)
        if solved is None:
            for given in batch:
                self._matrices([given], world, outbox)
            return
        merge, results = solved
        for place, given in enumerate(batch):
            self._how.spectra.add(described(self._plan, given.number, [merge], place))
            for output, result in enumerate(results):
                out = self._room(given.number, outbox)
                typed(out, merge.tensor.dtype).copy_(result[place].view(-1))
                self._put(given.number, output, out, outbox)

    def _together(self, batch: Sequence[Given], world: World) -> tuple[MatrixMerge, Tensors] | None:
        """A batch and all its outputs (matrices x rows x columns), or None."""
        given, before = Bundle(self._plan, batch), self._nonfinite
        job = self._plan.jobs[given.number]
        matrix = self._plan.matrices(job)[0]._replace(slices=len(batch))
        try:
            elements = Elements(self._plan, given, Alone(world), self._device)
            merge = MatrixMerge(self._plan, given, matrix, elements, Alone(world), self._device)
            dtype = getattr(torch, merge.tensor.dtype.torch_name)
            results = []
            for output in range(len(self._plan.outputs)):
                results.append(torch.empty(len(batch), matrix.rows, matrix.columns, dtype=dtype))
                for piece, part in self._parts(merge, output, world):
                    results[-1][piece] = part
            return merge, results
        except (torch.cuda.OutOfMemoryError, NonFiniteError, RunError) as error:
            LOGGER.debug("one by one instead of a batch of %d: %s", len(batch), error)
            self._nonfinite = before
            return None

    def _parts(
        self, merge: MatrixMerge, output: int, world: World
    ) -> Iterator[tuple[tuple[slice, slice, slice], torch.Tensor]]:
        """Every panel of an output, and where in the matrix it stands."""
        for number, piece in enumerate(merge.pieces):
            world.check()
            part, count = merge.rounded(number, output, allow_nonfinite=self._how.allow_nonfinite)
            self._nonfinite += count
            yield place_of(piece), part

    def _room(self, number: int, outbox: Outbox) -> torch.Tensor:
        job = self._plan.jobs[number]
        tensor = self._plan.tensors[job.tensor]
        size = tensor.dtype.itemsize
        return outbox.buffer((job.stop - job.start) * size, tensor.offset + job.start * size)

    def _put(self, number: int, output: int, out: torch.Tensor, outbox: Outbox) -> None:
        """Write a job's result in one output, in steps as any other."""
        parts = list(steps(self._plan, [number], self._how.budget.elements))
        file, first = self._plan.file(output, parts[0].tensor.shard), parts[0].offset
        outbox.put([(file, s.offset, out[s.offset - first :][: s.output_bytes]) for s in parts])

    def _with_room(
        self, given: Given, matrix: Matrix, elements: Elements, world: World
    ) -> list[MatrixMerge]:
        """The matrix, or its slices one by one, or on the CPU, if a GPU's memory is too small."""
        cpu, failed = torch.device("cpu"), ""
        ways = [(self._device, [matrix]), (self._device, alone(matrix)), (cpu, [matrix])]
        for device, parts in ways if self._device.type == "cuda" else ways[:1]:
            try:
                if device != self._device:
                    elements = Elements(self._plan, given, Alone(world), device)
                note = None if device == self._device else f"cpu: on the GPU, {failed}"
                return [
                    MatrixMerge(self._plan, given, part, elements, Alone(world), device, note)
                    for part in parts
                ]
            except torch.cuda.OutOfMemoryError:
                failed = "out of memory"
            except RunError as error:  # its library can't decompose it
                if device.type == "cpu" or isinstance(error, PeerError):
                    raise
                failed = str(error)
            self._tell(given, failed)
        raise AssertionError("the CPU raises no such error")

    def _tell(self, given: Given, failed: str) -> None:
        torch.cuda.empty_cache()
        name = self._plan.tensors[self._plan.jobs[given.number].tensor].name
        LOGGER.warning("%s: on the GPU, %s; trying with less, or on the CPU", name, failed)
