"""How much a rank holds at once, by the memory that it may take. Pure."""

from __future__ import annotations

from typing import NamedTuple

from distmerge.errors import OutputError
from distmerge.log import format_bytes
from distmerge.matrices import working_bytes
from distmerge.planner import Plan
from distmerge.spec import BLOCK_ELEMENTS, JOB_ELEMENTS, PAGE, Job

DEFAULT_MEMORY = 512 * 10**6
"""Bytes of buffers that a rank takes at most by itself; more makes nothing faster."""

SLOTS = 3
"""Jobs of one rank that are under way at once: one read, one computed, one written."""


class Budget(NamedTuple):
    """Bytes that a rank may hold, and how many elements of a step that makes."""

    memory: int
    elements: int


def budget(plan: Plan, memory: int) -> Budget:
    """Raises OutputError, see step_elements."""
    return Budget(memory, step_elements(plan, memory))


def step_elements(plan: Plan, budget_bytes: int) -> int:
    """How many elements of a job a rank holds at once: a whole number of blocks within the budget.

    Raises OutputError where the budget does not hold a single block of every input, or no panel of
    the largest matrix.
    """
    width = max(plan.widths, default=1)
    buffers = len(plan.outputs) + max((len(t.rule.inputs) for t in plan.tensors), default=0)
    slack = 2 * PAGE * buffers
    blocks = (budget_bytes // SLOTS - slack) // (width * BLOCK_ELEMENTS)
    least = max(SLOTS * (width * BLOCK_ELEMENTS + slack), _panel_bytes(plan))
    if blocks < 1 or budget_bytes < least:
        raise OutputError(
            f"--memory {format_bytes(budget_bytes)} is too little for this recipe; "
            f"it needs at least {-(-least // 10**6)}MB"
        )
    return min(blocks * BLOCK_ELEMENTS, JOB_ELEMENTS)


def _panel_bytes(plan: Plan) -> int:
    """Memory of a rank that holds one panel of the largest matrix at a time."""
    if not any(tensor.rule.cut for tensor in plan.tensors):
        return 0
    return max(
        working_bytes(matrix, len(tensor.rule.inputs) - 1, tensor.dtype.itemsize)
        for job in plan.jobs
        for tensor in [plan.tensors[job.tensor]]
        for matrix in plan.matrices(job)
    )


def held_bytes(plan: Plan, job: Job) -> int:
    """Memory of a rank that holds all inputs and one output of a job on task vectors."""
    tensor = plan.tensors[job.tensor]
    tasks, size = len(tensor.rule.inputs) - 1, tensor.dtype.itemsize
    working = max((working_bytes(m, tasks, size) for m in plan.matrices(job)), default=0)
    return plan.read_bytes(job) + 2 * (job.stop - job.start) * size + working


def over_budget(plan: Plan, allowed: Budget) -> list[int]:
    """The jobs whose matrices a rank can't hold."""
    return [
        number
        for number, job in enumerate(plan.jobs)
        if plan.tensors[job.tensor].rule.cut and held_bytes(plan, job) > allowed.memory
    ]


def default_memory(plan: Plan, share: int) -> int:
    """The budget of a rank to which `share` bytes of its host's memory fall. Sums get no faster
    with more; matrices and thresholds do, that are held and not read again."""
    held = [held_bytes(plan, job) for job in plan.jobs if plan.on_tasks(job)]
    return min(share, max(DEFAULT_MEMORY, 2 * max(held, default=0)))


def buffer_bytes(plan: Plan, allowed: Budget) -> int:
    """Memory of one rank's buffers, at most."""
    held = [held_bytes(plan, job) for job in plan.jobs if plan.on_tasks(job)]
    kept = max((size for size in held if size <= allowed.memory), default=0)
    streamed = SLOTS * max(plan.widths, default=1) * allowed.elements
    return max(streamed, kept, _panel_bytes(plan))
