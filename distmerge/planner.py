"""The plan: every decision of a merge as data, made before a file is touched. Pure, without torch.

Nothing in a Plan depends on the number of ranks; only `assign`, which deals out its jobs, does.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from distmerge import collector
from distmerge.config import Config
from distmerge.errors import OutputError
from distmerge.layout import index_json, lay_out
from distmerge.log import format_bytes
from distmerge.rules import contents
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.resolve import Sources
from distmerge.spec import (
    BLOCK_ELEMENTS,
    JOB_ELEMENTS,
    PAGE,
    Job,
    OutputShard,
    OutputTensor,
)  # fmt: skip

FORMAT = 1
"""Goes up whenever the same recipe and inputs would give other bytes."""

DEFAULT_MEMORY = 512 * 10**6
"""Bytes of buffers that a rank takes at most by itself; more makes nothing faster."""

SLOTS = 3
"""Jobs of one rank that are under way at once: one read, one computed, one written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All that the ranks agree on. `digest` covers everything but time stamps and folders.

    `widths` are the bytes that one element of each tensor takes in all its inputs and the output.
    """

    inputs: tuple[Checkpoint, ...]
    donor: int
    tensors: tuple[OutputTensor, ...]
    shards: tuple[OutputShard, ...]
    jobs: tuple[Job, ...]
    widths: tuple[int, ...]
    digest: str

    @property
    def output_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def index(self) -> bytes | None:
        return index_json(self.tensors, self.shards)

    @property
    def main_dtype(self) -> str | None:
        """The torch name of the float dtype that most of the output's bytes have."""
        totals: dict[str, int] = {}
        for tensor in self.tensors:
            if tensor.dtype.kind == "float":
                name = tensor.dtype.torch_name
                totals[name] = totals.get(name, 0) + tensor.elements * tensor.dtype.itemsize
        return max(totals, key=totals.__getitem__, default=None)

    def read_bytes(self, job: Job) -> int:
        """Bytes of all inputs that `job` reads."""
        return (job.stop - job.start) * self.widths[job.tensor] - self.write_bytes(job)

    def write_bytes(self, job: Job) -> int:
        return (job.stop - job.start) * self.tensors[job.tensor].dtype.itemsize


@collector.paused()
def build_plan(config: Config, sources: Sources, *, shard_bytes: int) -> Plan:
    """Lay out the output and cut it into jobs.

    Raises MismatchError or ConfigError (see rules.contents).
    """
    tensors, shards = lay_out(contents(config, sources), shard_bytes)
    return Plan(
        inputs=sources.checkpoints,
        donor=sources.donor,
        tensors=tuple(tensors),
        shards=tuple(shards),
        jobs=tuple(_cut(tensors)),
        widths=tuple(_width(sources, tensor) for tensor in tensors),
        digest=_digest(sources, tensors, shards),
    )


def _width(sources: Sources, tensor: OutputTensor) -> int:
    width = tensor.dtype.itemsize
    for i in tensor.rule.inputs:
        width += sources.checkpoints[i].tensors[tensor.name].dtype.itemsize
    return width


def _cut(tensors: Sequence[OutputTensor]) -> Iterator[Job]:
    for number, tensor in enumerate(tensors):
        for start in range(0, tensor.elements, JOB_ELEMENTS):
            yield Job(number, start, min(start + JOB_ELEMENTS, tensor.elements))


def _digest(
    sources: Sources, tensors: Sequence[OutputTensor], shards: Sequence[OutputShard]
) -> str:
    digest = hashlib.sha256(f"distmerge {FORMAT} donor {sources.donor}\n".encode())
    for checkpoint in sources.checkpoints:
        digest.update(f"input {checkpoint.identity}\n".encode())
    for shard in shards:
        digest.update(f"shard {shard.name} {shard.size}\n".encode())
    for t in tensors:
        values = " ".join(value.hex() for value in t.rule.coefficients)
        line = (
            f"{t.name} {t.dtype.name} {t.shape} {t.shard} {t.offset} {t.rule.kind} {t.rule.inputs}"
        )
        digest.update(f"{line} {values}\n".encode())
    return digest.hexdigest()


def assign(plan: Plan, ranks: int) -> list[range]:
    """The jobs of each rank: contiguous stretches of the output with equal cost in bytes.

    Contiguous, because a rank then reads and writes sequentially and mostly in shards of its own;
    balanced to within one job, because jobs are small beside a rank's share.
    """
    ends = list(accumulate((job.stop - job.start) * plan.widths[job.tensor] for job in plan.jobs))
    total = ends[-1] if ends else 0
    bounds = [0]
    for rank in range(1, ranks):
        bounds.append(_nearest(ends, total * rank / ranks, bounds[-1]))
    return [range(a, b) for a, b in zip(bounds, [*bounds[1:], len(plan.jobs)], strict=True)]


def _nearest(ends: Sequence[int], target: float, start: int) -> int:
    """The number of jobs, at least `start`, whose total cost comes nearest to `target`."""
    index = bisect_left(ends, target, lo=start)
    if index == len(ends):
        return index
    before = ends[index - 1] if index else 0
    return index if target - before <= ends[index] - target else index + 1


def step_elements(plan: Plan, budget_bytes: int) -> int:
    """How many elements of a job a rank holds at once: a whole number of blocks within the budget.

    Raises OutputError where the budget does not hold a single block of every input.
    """
    width = max(plan.widths, default=1)
    slack = 2 * PAGE * (1 + max((len(t.rule.inputs) for t in plan.tensors), default=0))
    blocks = (budget_bytes // SLOTS - slack) // (width * BLOCK_ELEMENTS)
    if blocks < 1:
        least = SLOTS * (width * BLOCK_ELEMENTS + slack)
        raise OutputError(
            f"--memory {format_bytes(budget_bytes)} is too little for this recipe; "
            f"it needs at least {-(-least // 10**6)}MB"
        )
    return min(blocks * BLOCK_ELEMENTS, JOB_ELEMENTS)


def buffer_bytes(plan: Plan, elements: int) -> int:
    """Memory of one rank's buffers when it holds `elements` of a job at once."""
    width = max(plan.widths, default=1)
    return SLOTS * width * elements
