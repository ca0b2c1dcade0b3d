"""The merge pass of one rank: read ahead, compute every output, write behind.

Stream -> weighted_sums -> Sink.write
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from distmerge.dist import World
from distmerge.errors import MismatchError, NonFiniteError, RunError
from distmerge.methods.average import Terms, count_nonfinite, weighted_sums
from distmerge.planner import Plan, output_terms
from distmerge.sources.reader import Inputs
from distmerge.spec import BLOCK_ELEMENTS, PAGE, OutputTensor, Rule
from distmerge.stream import Slot, Step, Stream, input_dtypes, nonfinite_input, typed
from distmerge.threads import Threads


class Sink(Protocol):
    """Where results go; called from one thread, in the order of the steps and their outputs."""

    def write(self, file: int, offset: int, data: torch.Tensor) -> None:
        """Write `data` (uint8 on the CPU, its address congruent to `offset` modulo PAGE) to
        Plan.files[file]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a rank did: bytes in and out, and values that were not finite (if allowed)."""

    read_bytes: int = 0
    written_bytes: int = 0
    nonfinite: int = 0

    def __add__(self, other: Outcome) -> Outcome:
        return Outcome(
            read_bytes=self.read_bytes + other.read_bytes,
            written_bytes=self.written_bytes + other.written_bytes,
            nonfinite=self.nonfinite + other.nonfinite,
        )


class Engine:
    """Runs the jobs of one rank. The budget is in `elements`, see budget.step_elements."""

    def __init__(
        self,
        plan: Plan,
        *,
        elements: int,
        device: torch.device,
        allow_nonfinite: bool,
    ):
        self._plan = plan
        self._device = device
        self._allow_nonfinite = allow_nonfinite
        self._nonfinite = self._written = 0
        pinned = device.type == "cuda"
        self._stream = Stream(plan, elements=elements, pinned=pinned, writes=True)
        self._sums = cache(self._sums_of)

    def run(self, jobs: Iterable[int], inputs: Inputs, sink: Sink, world: World) -> Outcome:
        """Read, compute and write every job. Raises what goes wrong in any of the three."""
        writing = Threads(1, "write")
        try:
            with closing(self._stream.run(jobs, inputs, world)) as loaded:
                for step, slot in loaded:
                    outs = [o[step.offset % PAGE :][: step.output_bytes] for o in slot.outputs]
                    self._compute(step, slot, outs)
                    slot.write = writing.submit(self._write, sink, step, outs)
                    moved = step.output_bytes * len(outs)
                    self._written += moved
                    world.monitor.advance(moved)
        finally:
            writing.close()
        return Outcome(
            read_bytes=self._stream.read_bytes,
            written_bytes=self._written,
            nonfinite=self._nonfinite,
        )

    def _write(self, sink: Sink, step: Step, outs: Sequence[torch.Tensor]) -> None:
        for number, data in enumerate(outs):
            sink.write(self._plan.file(number, step.tensor.shard), step.offset, data)

    def _compute(self, step: Step, slot: Slot, outs: Sequence[torch.Tensor]) -> None:
        """Fill `outs` (uint8), one for each output of the run."""
        if step.tensor.rule.kind != "sum":
            self._check_equal(step, slot.raw)
            for data in outs:
                data.copy_(slot.raw[0])
            return
        dtypes = input_dtypes(self._plan, step.tensor)
        given = [typed(r, d) for r, d in zip(slot.raw, dtypes, strict=True)]
        results = [typed(data, step.tensor.dtype) for data in outs]
        sums = self._sums(step.tensor.rule)
        try:
            sound = self._add_up(given, sums, results)
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(f"{step.tensor.name}: out of GPU memory; give less --memory") from error
        if not all(sound):
            unsound = [number for number, well in enumerate(sound) if not well]
            self._report_nonfinite(step, given, {n: results[n] for n in unsound})

    def _sums_of(self, rule: Rule) -> list[Terms]:
        """The terms of every output, by the place of their inputs in the rule."""
        place = {i: n for n, i in enumerate(rule.inputs)}
        return [
            [(place[i], value) for i, value in output_terms(rule, number).items()]
            for number in range(len(self._plan.outputs))
        ]

    def _add_up(
        self, given: list[torch.Tensor], sums: Sequence[Terms], results: list[torch.Tensor]
    ) -> list[bool]:
        if self._device.type == "cpu":
            return weighted_sums(given, sums, results, block=BLOCK_ELEMENTS)
        # The buffers are pinned, so all copies are queued at once.
        moved = [x.to(self._device, non_blocking=True) for x in given]
        made = [torch.empty_like(result, device=self._device) for result in results]
        sound = weighted_sums(moved, sums, made, block=results[0].numel())
        for result, values in zip(results, made, strict=True):
            result.copy_(values)
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

    def _report_nonfinite(
        self, step: Step, given: Sequence[torch.Tensor], results: dict[int, torch.Tensor]
    ) -> None:
        """Say which input has NaN or Inf, or which of the outputs do not fit their dtype."""
        sums = self._sums(step.tensor.rule)
        used = {place for number in results for place, _ in sums[number]}
        counts = [count_nonfinite(x) if i in used else 0 for i, x in enumerate(given)]
        over = {} if any(counts) else {n: count_nonfinite(out) for n, out in results.items()}
        self._nonfinite += sum(counts) + sum(over.values())
        if self._allow_nonfinite:
            return
        for place, count in enumerate(counts):
            if count:
                remedy = "pass --allow-nonfinite to go on all the same"
                raise nonfinite_input(self._plan, step, place, count, remedy=remedy)
        for number, count in over.items():
            if count:
                raise overflow(self._plan, step.tensor, number, count)


def overflow(plan: Plan, tensor: OutputTensor, output: int, count: int) -> NonFiniteError:
    """The error for `count` values of an output that its dtype can't hold."""
    name = plan.outputs[output].name
    what = f"{name}, {tensor.name}" if name else tensor.name
    return NonFiniteError(
        f"{what}: {count} values overflow {tensor.dtype.torch_name}; "
        "set a wider out_dtype, or pass --allow-nonfinite"
    )
