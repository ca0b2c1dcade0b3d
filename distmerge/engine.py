"""One rank's jobs: read ahead, compute, write behind, in a fixed amount of memory.

    Inputs.read -> weighted_sum -> Sink.write

Three slots of buffers go round: while one is computed on, the next is being read and the one
before is being written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from distmerge.dist import World
from distmerge.errors import MismatchError, NonFiniteError, RunError
from distmerge.methods.average import count_nonfinite, weighted_sum
from distmerge.planner import SLOTS, Plan
from distmerge.sources.reader import ByteReader, Inputs
from distmerge.spec import BLOCK_ELEMENTS, PAGE, DType, Job, OutputTensor
from distmerge.storage import aligned_buffer
from distmerge.threads import Threads

READERS = 4
"""Threads of a rank that read: one alone does not keep a fast disk or a network busy."""


class Step(NamedTuple):
    """What a rank holds at once: elements start..stop of an output tensor."""

    tensor: OutputTensor
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """Where the result goes in the output tensor's shard."""
        return self.tensor.offset + self.start * self.tensor.dtype.itemsize

    @property
    def write_bytes(self) -> int:
        return (self.stop - self.start) * self.tensor.dtype.itemsize


class Sink(Protocol):
    """Where results go; called from one thread, in the order of the steps."""

    def write(self, shard: int, offset: int, data: torch.Tensor) -> None:
        """Write `data` (uint8 on the CPU, its address congruent to `offset` modulo PAGE)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a rank did: bytes in and out, and values that were not finite (if allowed)."""

    read_bytes: int
    written_bytes: int
    nonfinite: int


@dataclass(slots=True)
class _Slot:
    """Buffers for one step, and what is under way with them."""

    inputs: list[torch.Tensor]
    output: torch.Tensor
    reads: list[Future[torch.Tensor]] = field(default_factory=list)
    held: list[tuple[ByteReader, int, int]] = field(default_factory=list)
    write: Future[None] | None = None


def steps(plan: Plan, jobs: Iterable[int], elements: int) -> Iterator[Step]:
    """The steps of a rank's jobs, in order: each job in pieces of `elements`."""
    for number in jobs:
        job: Job = plan.jobs[number]
        for start in range(job.start, job.stop, elements):
            yield Step(plan.tensors[job.tensor], start, min(start + elements, job.stop))


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


class Engine:
    """Runs the jobs of one rank. The budget is in `elements`, see planner.step_elements."""

    def __init__(
        self,
        plan: Plan,
        *,
        elements: int,
        device: torch.device,
        allow_nonfinite: bool,
    ):
        self._plan = plan
        self._elements, self._device = elements, device
        self._allow_nonfinite = allow_nonfinite
        self._nonfinite = 0

    def run(self, jobs: Iterable[int], inputs: Inputs, sink: Sink, world: World) -> Outcome:
        """Read, compute and write every job. Raises what goes wrong in any of the three."""
        slots = [self._slot() for _ in range(SLOTS)]
        reading, writing = Threads(READERS, "read"), Threads(1, "write")
        ahead: deque[tuple[Step, _Slot]] = deque()
        read = written = 0
        try:
            for count, step in enumerate(steps(self._plan, jobs, self._elements)):
                slot = slots[count % SLOTS]
                if slot.write is not None:
                    world.wait(slot.write)
                read += self._start_reading(step, slot, inputs, reading)
                written += step.write_bytes
                ahead.append((step, slot))
                if len(ahead) == SLOTS - 1:
                    self._finish(*ahead.popleft(), sink, writing, world)
            while ahead:
                self._finish(*ahead.popleft(), sink, writing, world)
            for slot in slots:
                if slot.write is not None:
                    world.wait(slot.write)
        finally:
            reading.close()
            writing.close()
        return Outcome(read_bytes=read, written_bytes=written, nonfinite=self._nonfinite)

    def _slot(self) -> _Slot:
        """Buffers for the widest tensors; memory that is never touched is never taken."""
        pinned = self._device.type == "cuda"
        most = max((len(t.rule.inputs) for t in self._plan.tensors), default=0)
        widths = [0] * most
        output = 0
        for tensor in self._plan.tensors:
            output = max(output, tensor.dtype.itemsize)
            for place, dtype in enumerate(self._dtypes(tensor)):
                widths[place] = max(widths[place], dtype.itemsize)
        sizes = [width * self._elements + 2 * PAGE for width in (*widths, output)]
        *buffers, last = [aligned_buffer(size, pinned=pinned) for size in sizes]
        return _Slot(buffers, last)

    def _dtypes(self, tensor: OutputTensor) -> list[DType]:
        return [self._plan.inputs[i].tensors[tensor.name].dtype for i in tensor.rule.inputs]

    def _start_reading(self, step: Step, slot: _Slot, inputs: Inputs, pool: Threads) -> int:
        """Queue the reads of a step; returns how many bytes they are."""
        slot.reads.clear()
        total = 0
        for place, i in enumerate(step.tensor.rule.inputs):
            spec = self._plan.inputs[i].tensors[step.tensor.name]
            start = spec.start + step.start * spec.dtype.itemsize
            size = (step.stop - step.start) * spec.dtype.itemsize
            reader = inputs.reader(i, spec.file)
            slot.reads.append(pool.submit(reader.read, start, size, slot.inputs[place]))
            slot.held.append((reader, start, size))
            total += size
        return total

    def _finish(self, step: Step, slot: _Slot, sink: Sink, pool: Threads, world: World) -> None:
        """Compute a step whose reads are under way, and queue its write."""
        world.check()
        raw = [world.wait(read) for read in slot.reads]
        data = slot.output[step.offset % PAGE :][: step.write_bytes]
        try:
            self._compute(step, raw, data)
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(f"{step.tensor.name}: out of GPU memory; give less --memory") from error
        for reader, start, size in slot.held:
            reader.release(start, size)
        slot.held.clear()
        slot.write = pool.submit(sink.write, step.tensor.shard, step.offset, data)
        world.monitor.advance(sum(r.numel() for r in raw) + data.numel())

    def _compute(self, step: Step, raw: list[torch.Tensor], data: torch.Tensor) -> None:
        rule = step.tensor.rule
        if rule.kind != "sum":
            self._check_equal(step, raw)
            data.copy_(raw[0])
            return
        given = [_typed(r, d) for r, d in zip(raw, self._dtypes(step.tensor), strict=True)]
        out = _typed(data, step.tensor.dtype)
        if self._device.type == "cpu":
            sound = weighted_sum(given, rule.coefficients, out, block=BLOCK_ELEMENTS)
        else:
            sound = self._sum_on_device(given, rule.coefficients, out)
        if not sound:
            self._report_nonfinite(step, given, out)

    def _sum_on_device(
        self, given: list[torch.Tensor], coefficients: tuple[float, ...], out: torch.Tensor
    ) -> bool:
        """The same sum on the GPU; the buffers are pinned, so all copies are queued at once."""
        moved = [x.to(self._device, non_blocking=True) for x in given]
        result = torch.empty_like(out, device=self._device)
        sound = weighted_sum(moved, coefficients, result, block=out.numel())
        out.copy_(result)
        return sound

    def _check_equal(self, step: Step, raw: list[torch.Tensor]) -> None:
        for place, other in enumerate(raw[1:], start=1):
            if not torch.equal(raw[0], other):
                labels = [self._plan.inputs[step.tensor.rule.inputs[i]].label for i in (0, place)]
                raise MismatchError(
                    f"{step.tensor.name} ({step.tensor.dtype.name}) differs between {labels[0]} "
                    f"and {labels[1]}; it can't be averaged. non_float: donor in the recipe takes "
                    f"the donor's ({self._plan.inputs[self._plan.donor].label})"
                )

    def _report_nonfinite(self, step: Step, given: list[torch.Tensor], out: torch.Tensor) -> None:
        """Say which input has NaN or Inf, or that the result does not fit its dtype."""
        counts = [count_nonfinite(x) for x in given]
        overflowed = 0 if any(counts) else count_nonfinite(out)
        self._nonfinite += sum(counts) + overflowed
        if self._allow_nonfinite or not (any(counts) or overflowed):
            return
        if overflowed:
            raise NonFiniteError(
                f"{step.tensor.name}: {overflowed} values overflow {step.tensor.dtype.torch_name}; "
                "set out_dtype: float32 or bfloat16, or pass --allow-nonfinite"
            )
        place = next(i for i, count in enumerate(counts) if count)
        source = self._plan.inputs[step.tensor.rule.inputs[place]]
        file = source.files[source.tensors[step.tensor.name].file].path
        raise NonFiniteError(
            f"{file}: tensor {step.tensor.name} holds {counts[place]} NaN or Inf in elements "
            f"{step.start} to {step.stop - 1}; pass --allow-nonfinite to go on all the same"
        )


def _typed(data: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Bytes as items; a copy where a file put them at an odd address."""
    if data.storage_offset() % dtype.itemsize or data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(getattr(torch, dtype.torch_name))
