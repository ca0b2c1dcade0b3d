"""The steps of one rank with their inputs, read ahead, in a fixed amount of memory.

Three slots of buffers go round: while one is computed on, the next is being read and the one
before is being written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from distmerge.budget import SLOTS
from distmerge.dist import World
from distmerge.errors import NonFiniteError
from distmerge.planner import Plan
from distmerge.sources.reader import ByteReader, Inputs
from distmerge.spec import PAGE, DType, Job, OutputTensor
from distmerge.storage import aligned_buffer
from distmerge.threads import Threads

READERS = 4
"""Threads of a rank that read: one alone does not keep a fast disk or a network busy."""


class Step(NamedTuple):
    """What a rank holds at once: elements start..stop of a tensor; `last` of its job?"""

    tensor: OutputTensor
    start: int
    stop: int
    last: bool

    @property
    def offset(self) -> int:
        """Where the result goes in the tensor's shard."""
        return self.tensor.offset + self.start * self.tensor.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the result in one output."""
        return (self.stop - self.start) * self.tensor.dtype.itemsize


@dataclass(slots=True)
class Slot:
    """Buffers for one step, what is under way with them, and what was read.

    `write` is the consumer's: the buffers are not used again before it is done.
    """

    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]
    reads: list[Future[torch.Tensor]] = field(default_factory=list)
    held: list[tuple[ByteReader, int, int]] = field(default_factory=list)
    raw: list[torch.Tensor] = field(default_factory=list)
    write: Future[None] | None = None


def steps(plan: Plan, jobs: Iterable[int], elements: int) -> Iterator[Step]:
    """The steps of a rank's jobs, in order: each job in pieces of `elements`."""
    for number in jobs:
        job: Job = plan.jobs[number]
        for start in range(job.start, job.stop, elements):
            stop = min(start + elements, job.stop)
            yield Step(plan.tensors[job.tensor], start, stop, stop == job.stop)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Parallelism comes from ranks. OpenMP threads that wait for each other on busy cores cost
    more than they bring, and their number can change last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Stream:
    """Reads ahead for one pass over the inputs. For `elements` see budget.step_elements.

    `writes` says that the pass needs buffers for its outputs; `pinned` that it copies to a GPU.
    """

    def __init__(self, plan: Plan, *, elements: int, pinned: bool, writes: bool):
        self._plan, self._elements = plan, elements
        self.read_bytes = 0
        sizes = [width * elements + 2 * PAGE for width in self._widest()]
        width = max((tensor.dtype.itemsize for tensor in plan.tensors), default=0)
        result = width * elements + 2 * PAGE
        outputs = len(plan.outputs) if writes else 0
        self._slots = [
            Slot(
                [aligned_buffer(size, pinned=pinned) for size in sizes],
                [aligned_buffer(result, pinned=pinned) for _ in range(outputs)],
            )
            for _ in range(SLOTS)
        ]

    def _widest(self) -> list[int]:
        """The widest items at each place of a rule; memory that is never touched is not taken."""
        most = max((len(t.rule.inputs) for t in self._plan.tensors), default=0)
        widths = [0] * most
        for tensor in self._plan.tensors:
            for place, dtype in enumerate(input_dtypes(self._plan, tensor)):
                widths[place] = max(widths[place], dtype.itemsize)
        return widths

    def run(
        self, jobs: Iterable[int], inputs: Inputs, world: World
    ) -> Generator[tuple[Step, Slot]]:
        """Every step of `jobs`, its inputs in `Slot.raw` (uint8) until the next is asked for.

        Raises what goes wrong in reading or in a write, PeerError if another rank fails.
        """
        reading = Threads(READERS, "read")
        ahead: deque[tuple[Step, Slot]] = deque()
        try:
            for count, step in enumerate(steps(self._plan, jobs, self._elements)):
                slot = self._slots[count % SLOTS]
                _finish_write(slot, world)
                self._start_reading(step, slot, inputs, reading)
                ahead.append((step, slot))
                if len(ahead) == SLOTS - 1:
                    yield from _loaded(*ahead.popleft(), world)
            while ahead:
                yield from _loaded(*ahead.popleft(), world)
            for slot in self._slots:
                _finish_write(slot, world)
        finally:
            reading.close()

    def _start_reading(self, step: Step, slot: Slot, inputs: Inputs, pool: Threads) -> None:
        slot.reads.clear()
        for place, i in enumerate(step.tensor.rule.inputs):
            spec = self._plan.inputs[i].tensors[step.tensor.name]
            start = spec.start + step.start * spec.dtype.itemsize
            size = (step.stop - step.start) * spec.dtype.itemsize
            reader = inputs.reader(i, spec.file)
            slot.reads.append(pool.submit(reader.read, start, size, slot.inputs[place]))
            slot.held.append((reader, start, size))
            self.read_bytes += size


def _finish_write(slot: Slot, world: World) -> None:
    if slot.write is not None:
        world.wait(slot.write)
        slot.write = None


def _loaded(step: Step, slot: Slot, world: World) -> Iterator[tuple[Step, Slot]]:
    world.check()
    slot.raw = [world.wait(read) for read in slot.reads]
    moved = sum(raw.numel() for raw in slot.raw)
    yield step, slot
    slot.raw = []
    for reader, start, size in slot.held:
        reader.release(start, size)
    slot.held.clear()
    world.monitor.advance(moved)


def input_dtypes(plan: Plan, tensor: OutputTensor) -> list[DType]:
    """The dtypes of a tensor in the inputs of its rule."""
    return [plan.inputs[i].tensors[tensor.name].dtype for i in tensor.rule.inputs]


def nonfinite_input(
    plan: Plan, step: Step, place: int, count: int, *, remedy: str
) -> NonFiniteError:
    """The error for NaN or Inf in the input at `place` of the step's rule."""
    source = plan.inputs[step.tensor.rule.inputs[place]]
    file = source.files[source.tensors[step.tensor.name].file].path
    return NonFiniteError(
        f"{file}: tensor {step.tensor.name} holds {count} NaN or Inf in elements "
        f"{step.start} to {step.stop - 1}; {remedy}"
    )


def typed(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Bytes as items; a copy where a file put them at an odd address."""
    if data.storage_offset() % dtype.itemsize or data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(getattr(torch, dtype.torch_name))
