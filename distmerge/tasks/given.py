"""What a job on task vectors is given: its inputs, held in memory or read as often as it takes.

Its methods pass over them several times. Where the budget holds all inputs of a job they are read
once; else each pass reads them again. Either way a method sees the same pieces in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
from itertools import chain, islice
from typing import Protocol

import torch

from distmerge.dist import World
from distmerge.matrices import Matrix
from distmerge.matrices import Piece as Cutout
from distmerge.planner import Plan
from distmerge.sources.reader import ByteReader, Inputs
from distmerge.spec import PAGE, DType, OutputTensor
from distmerge.storage import aligned_buffer
from distmerge.stream import READERS, Step, Stream, input_dtypes, steps, typed
from distmerge.threads import Threads

Tensors = list[torch.Tensor]


class Given(Protocol):
    """The inputs of one job, base first."""

    number: int

    def steps(self) -> Iterator[tuple[Step, Tensors]]:
        """A pass over the job: each step with its elements of every input, 1-D."""

    def cutout(self, matrix: Matrix, piece: Cutout) -> Tensors:
        """A piece of a matrix as it is stored, of every input: slices x rows x columns."""


class Held:
    """A job whose inputs are in memory."""

    def __init__(self, plan: Plan, number: int, elements: int, inputs: Sequence[torch.Tensor]):
        self.number, self._plan = number, plan
        self._elements, self._inputs = elements, inputs

    def steps(self) -> Iterator[tuple[Step, Tensors]]:
        first = self._plan.jobs[self.number].start
        for step in steps(self._plan, [self.number], self._elements):
            yield step, [x[step.start - first : step.stop - first] for x in self._inputs]

    def cutout(self, matrix: Matrix, piece: Cutout) -> Tensors:
        first = self._plan.jobs[self.number].start
        return [viewed(x, matrix, first)[place_of(piece)] for x in self._inputs]


def viewed(x: torch.Tensor, matrix: Matrix, first: int) -> torch.Tensor:
    """The matrices in `x`, which starts at element `first` of the tensor."""
    return x.as_strided(
        (matrix.slices, matrix.rows, matrix.columns),
        (matrix.step, matrix.stride, 1),
        x.storage_offset() + matrix.start - first,
    )


def place_of(piece: Cutout) -> tuple[slice, slice, slice]:
    """Where a piece stands in its matrices."""
    return slice(None), slice(piece.top, piece.bottom), slice(piece.left, piece.right)


class Bundle:
    """Jobs of one matrix each, all of one shape, as a batch of matrices."""

    def __init__(self, plan: Plan, members: Sequence[Given]):
        self.number, self._plan, self._members = members[0].number, plan, members

    def steps(self) -> Iterator[tuple[Step, Tensors]]:
        return chain.from_iterable(member.steps() for member in self._members)

    def cutout(self, matrix: Matrix, piece: Cutout) -> Tensors:
        alone = matrix._replace(slices=1)
        parts = [member.cutout(alone, piece) for member in self._members]
        return [torch.cat(inputs) for inputs in zip(*parts, strict=True)]


class Filed:
    """A job whose inputs are more than the budget holds. `read_bytes` are those of cutouts."""

    def __init__(self, plan: Plan, number: int, stream: Stream, inputs: Inputs, world: World):
        self.number, self._plan = number, plan
        self._stream, self._inputs, self._world = stream, inputs, world
        self.read_bytes = 0

    @property
    def _tensor(self) -> OutputTensor:
        return self._plan.tensors[self._plan.jobs[self.number].tensor]

    def steps(self) -> Iterator[tuple[Step, Tensors]]:
        dtypes = input_dtypes(self._plan, self._tensor)
        with closing(self._stream.run([self.number], self._inputs, self._world)) as loaded:
            for step, slot in loaded:
                yield step, [typed(raw, d) for raw, d in zip(slot.raw, dtypes, strict=True)]

    def cutout(self, matrix: Matrix, piece: Cutout) -> Tensors:
        dtypes = input_dtypes(self._plan, self._tensor)
        return [
            self._read(place, dtype, matrix, piece)
            for place, dtype in zip(self._tensor.rule.inputs, dtypes, strict=True)
        ]

    def _read(self, place: int, dtype: DType, matrix: Matrix, piece: Cutout) -> torch.Tensor:
        """Whole rows in one go, parts of rows one by one."""
        spec = self._plan.inputs[place].tensors[self._tensor.name]
        reader = self._inputs.reader(place, spec.file)
        rows, columns = piece.bottom - piece.top, piece.right - piece.left
        found = torch.empty(matrix.slices, rows, columns, dtype=getattr(torch, dtype.torch_name))
        runs = 1 if columns == matrix.stride else rows
        length = rows * columns // runs * dtype.itemsize
        buffer = aligned_buffer(length + 2 * PAGE, pinned=False)
        for at, out in enumerate(found.view(matrix.slices, runs, -1).unbind()):
            first = matrix.start + at * matrix.step + piece.top * matrix.stride + piece.left
            for row, target in enumerate(out.view(torch.uint8).unbind()):
                start = spec.start + (first + row * matrix.stride) * dtype.itemsize
                target.copy_(reader.read(start, length, buffer))
                reader.release(start, length)
                self.read_bytes += length
            self._world.check()
        return found


class Loader:
    """Reads the next held jobs while some are worked on, into two sets of buffers."""

    def __init__(self, plan: Plan, *, elements: int, device: torch.device):
        self._plan, self._elements, self._device = plan, elements, device
        self._buffers: list[list[torch.Tensor]] = [[], []]
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.read_bytes = 0

    def run(
        self,
        batches: Iterable[Sequence[int]],
        inputs: Inputs,
        world: World,
        ahead: Callable[[Sequence[int]], bool],
    ) -> Generator[list[Held]]:
        """The jobs of every batch, their inputs in memory until the next batch is asked for.

        `ahead` says whether there is room for a batch beside the one before it.
        """
        reading = Threads(READERS, "read")
        try:
            before: list[_Loading] = []
            for count, numbers in enumerate(batches):
                if before and not ahead(numbers):
                    yield from _held(before, world)
                    before = []
                loading = [_Loading(self._plan, number, self._elements) for number in numbers]
                self._start(loading, count % 2, inputs, reading)
                if before:
                    yield from _held(before, world)
                before = loading
            if before:
                yield from _held(before, world)
        finally:
            reading.close()

    def _start(
        self, loading: Sequence[_Loading], slot: int, inputs: Inputs, reading: Threads
    ) -> None:
        upload = self._uploading(sum(sum(job.sizes) for job in loading))
        room = iter(self._room(slot, [size for job in loading for size in job.sizes]))
        for job in loading:
            job.start(inputs, list(islice(room, len(job.sizes))), reading, upload)
            self.read_bytes += sum(job.sizes) - 2 * PAGE * len(job.sizes)

    def _room(self, slot: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Buffers of these sizes; memory that is never touched is not taken."""
        buffers = self._buffers[slot]
        for place, size in enumerate(sizes):
            if place == len(buffers):
                buffers.append(torch.empty(0, dtype=torch.uint8))
            if buffers[place].numel() < size:
                buffers[place] = aligned_buffer(size, pinned=self._copies is not None)
        return buffers[: len(sizes)]

    def _uploading(self, size: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What brings inputs to the GPU while it computes, if it has room for two jobs of `size`;
        else their panels go there one by one."""
        if self._copies is None or 4 * size > torch.cuda.mem_get_info(self._device)[0]:
            return None
        stream, device = self._copies, self._device

        def upload(raw: torch.Tensor) -> torch.Tensor:
            try:
                with torch.cuda.stream(stream):
                    moved = raw.to(device, non_blocking=True)
            except torch.cuda.OutOfMemoryError:  # others use the GPU too
                return raw
            stream.synchronize()
            return moved

        return upload


def _held(loading: Sequence[_Loading], world: World) -> Iterator[list[Held]]:
    yield [job.held(world) for job in loading]
    for job in loading:
        job.release()


class _Loading:
    """One job whose inputs are being read."""

    def __init__(self, plan: Plan, number: int, elements: int):
        self._plan, self._number, self._elements = plan, number, elements
        self._job = plan.jobs[number]
        self._tensor = plan.tensors[self._job.tensor]
        self._dtypes = input_dtypes(plan, self._tensor)
        self._reads: list[tuple[ByteReader, int, int, Future[torch.Tensor]]] = []

    @property
    def sizes(self) -> list[int]:
        length = self._job.stop - self._job.start
        return [length * dtype.itemsize + 2 * PAGE for dtype in self._dtypes]

    def start(
        self,
        inputs: Inputs,
        buffers: Sequence[torch.Tensor],
        reading: Threads,
        upload: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        def read(reader: ByteReader, start: int, size: int, buffer: torch.Tensor) -> torch.Tensor:
            raw = reader.read(start, size, buffer)
            return raw if upload is None else upload(raw)

        for place, dtype, buffer in zip(
            self._tensor.rule.inputs, self._dtypes, buffers, strict=True
        ):
            spec = self._plan.inputs[place].tensors[self._tensor.name]
            start = spec.start + self._job.start * dtype.itemsize
            size = (self._job.stop - self._job.start) * dtype.itemsize
            reader = inputs.reader(place, spec.file)
            self._reads.append(
                (reader, start, size, reading.submit(read, reader, start, size, buffer))
            )

    def held(self, world: World) -> Held:
        world.check()
        raw = [world.wait(read) for *_, read in self._reads]
        given = [typed(x, dtype) for x, dtype in zip(raw, self._dtypes, strict=True)]
        return Held(self._plan, self._number, self._elements, given)

    def release(self) -> None:
        for reader, start, size, _ in self._reads:
            reader.release(start, size)
