"""What a job on task vectors is given: its inputs, held in memory or read as often as it takes.

Its methods pass over them several times. Where the budget holds all inputs of a job they are read
once; else each pass reads them again. Either way a method sees the same pieces in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing
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
        return [viewed(x, matrix, first)[_place(piece)] for x in self._inputs]


def viewed(x: torch.Tensor, matrix: Matrix, first: int) -> torch.Tensor:
    """The matrices in `x`, which starts at element `first` of the tensor."""
    return x.as_strided(
        (matrix.slices, matrix.rows, matrix.columns),
        (matrix.step, matrix.stride, 1),
        x.storage_offset() + matrix.start - first,
    )


def _place(piece: Cutout) -> tuple[slice, slice, slice]:
    return slice(None), slice(piece.top, piece.bottom), slice(piece.left, piece.right)


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
    """Reads the next held job while one is worked on, into two sets of buffers."""

    def __init__(self, plan: Plan, *, elements: int, device: torch.device):
        self._plan, self._elements, self._device = plan, elements, device
        self._buffers: list[dict[int, torch.Tensor]] = [{}, {}]
        on_gpu = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.read_bytes = 0

    def run(
        self, jobs: Iterable[int], inputs: Inputs, world: World, ahead: Callable[[int], bool]
    ) -> Generator[Held]:
        """Every job, its inputs in memory until the next is asked for.

        `ahead` says whether there is room for a job beside the one before it.
        """
        reading = Threads(READERS, "read")
        try:
            before: _Loading | None = None
            for count, number in enumerate(jobs):
                if before is not None and not ahead(number):
                    yield from before.held(world)
                    before = None
                loading = _Loading(self._plan, number, self._elements)
                room = self._room(count % 2, loading.sizes)
                loading.start(inputs, room, reading, self._uploading(sum(loading.sizes)))
                self.read_bytes += self._plan.read_bytes(self._plan.jobs[number])
                if before is not None:
                    yield from before.held(world)
                before = loading
            if before is not None:
                yield from before.held(world)
        finally:
            reading.close()

    def _room(self, slot: int, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Buffers of these sizes; memory that is never touched is not taken."""
        buffers = self._buffers[slot]
        for place, size in enumerate(sizes):
            if place not in buffers or buffers[place].numel() < size:
                buffers[place] = aligned_buffer(size, pinned=self._copies is not None)
        return [buffers[place] for place in range(len(sizes))]

    def _uploading(self, size: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What brings inputs to the GPU while it computes, if it has room for two jobs of `size`;
        else their panels go there one by one."""
        if self._copies is None or 4 * size > torch.cuda.mem_get_info(self._device)[0]:
            return None
        stream, device = self._copies, self._device

        def upload(raw: torch.Tensor) -> torch.Tensor:
            with torch.cuda.stream(stream):
                moved = raw.to(device, non_blocking=True)
            stream.synchronize()
            return moved

        return upload


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

    def held(self, world: World) -> Iterator[Held]:
        world.check()
        raw = [world.wait(read) for *_, read in self._reads]
        given = [typed(x, dtype) for x, dtype in zip(raw, self._dtypes, strict=True)]
        yield Held(self._plan, self._number, self._elements, given)
        for reader, start, size, _ in self._reads:
            reader.release(start, size)
