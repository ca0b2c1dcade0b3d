"""The two passes over the inputs, as all ranks make them together.

statistic: products of the checkpoints, from which the coefficients of Extra-Merge follow.
merge: every tensor of every output, on the disk.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from distmerge import output
from distmerge.assembly import AssembleMode, Assembly, GatherSink, all_steps, choose
from distmerge.dist import World
from distmerge.document import Plain
from distmerge.engine import Engine, Outcome
from distmerge.gram import Gram
from distmerge.log import Progress, parse_bytes
from distmerge.planner import DEFAULT_MEMORY, Plan, assign, assign_trend, step_elements
from distmerge.sources.reader import Inputs, ReadMode
from distmerge.statistic import GramPass, Sums, total
from distmerge.storage import free_memory
from distmerge.stream import single_threaded
from distmerge.writer import ShardWriter, create_shards

MEMORY_SHARE = 0.5
"""Of a host's free memory, what its ranks together take at most where --memory does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What the passes work with; see pipeline.Options. `shown` is for progress."""

    device: torch.device
    memory: str | None
    read: ReadMode
    assemble: AssembleMode
    allow_nonfinite: bool
    shown: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What a pass did: bytes of all ranks, counts as in engine.Outcome, wall time.

    `shards` describes the files of the plan, in order, as the manifest lists them.
    """

    read_bytes: int
    seconds: float
    nonfinite: int = 0
    shards: tuple[Plain, ...] = ()


def statistic_pass(world: World, plan: Plan, means: Means) -> tuple[Gram, Done]:
    """The Gram matrices of the checkpoints, on every rank: the same to the bit at any number."""
    started = time.monotonic()
    elements = _agreed_elements(world, plan, means.memory)
    jobs = assign_trend(plan, world.size)

    def work() -> tuple[Sums, int]:
        passing = GramPass(plan, elements=elements, device=means.device)
        moved = sum(plan.read_bytes(plan.jobs[number]) for number in plan.trend_jobs)
        with _streaming(world, plan, means, "statistic", moved) as inputs:
            return passing.run(jobs[world.rank], inputs, world), passing.read_bytes

    parts = world.gather("statistic", work)
    gram = total(plan, [sums for sums, _ in parts])
    read = sum(count for _, count in parts)
    return gram, Done(read_bytes=read, seconds=time.monotonic() - started)


def merge_pass(world: World, plan: Plan, means: Means, folder: Path) -> Done:
    """Every tensor of every output in `folder`, written, synced and hashed."""
    started = time.monotonic()
    elements = _agreed_elements(world, plan, means.memory)
    assignment = assign(plan, world.size)
    where = choose(world, plan, assignment, folder, means.assemble)
    own = where.owned_by(world.rank)
    with closing(ShardWriter(folder, plan.files)) as writer:
        world.together("create the shards", lambda: create_shards(folder, plan.files, own))
        outcomes = world.gather(
            "merge",
            lambda: _run_jobs(world, plan, means, (where, assignment, elements), writer),
        )
        world.together("sync the shards", writer.sync)
        digests = world.gather("check the shards", lambda: writer.digests(own))
    found = {number: digest for part in digests for number, digest in part.items()}
    return Done(
        read_bytes=sum(outcome.read_bytes for outcome in outcomes),
        seconds=time.monotonic() - started,
        nonfinite=sum(outcome.nonfinite for outcome in outcomes),
        shards=tuple(
            output.described(found[number], file.size) for number, file in enumerate(plan.files)
        ),
    )


def _agreed_elements(world: World, plan: Plan, memory: str | None) -> int:
    """How much of a job every rank holds at once: the same everywhere, for the tightest host."""
    hosts = world.gather("look for memory", lambda: (socket.gethostname(), free_memory()))

    def within_budget() -> int:
        if memory is not None:
            return step_elements(plan, parse_bytes(memory))
        names = [name for name, _ in hosts]
        budgets = [int(MEMORY_SHARE * free / names.count(name)) for name, free in hosts]
        return step_elements(plan, min(DEFAULT_MEMORY, *budgets))

    return world.together("look for memory", within_budget)


@contextmanager
def _streaming(world: World, plan: Plan, means: Means, label: str, moved: int) -> Iterator[Inputs]:
    """The inputs, with progress over `moved` bytes of all ranks."""
    with ExitStack() as stack:
        stack.enter_context(single_threaded())
        inputs = stack.enter_context(closing(Inputs(plan.inputs, means.read)))
        shown = means.shown and world.rank == 0
        progress = stack.enter_context(Progress(label, moved, shown=shown))
        stack.enter_context(world.monitor.showing(progress))
        yield inputs


def _run_jobs(
    world: World,
    plan: Plan,
    means: Means,
    dealt: tuple[Assembly, Sequence[range], int],
    writer: ShardWriter,
) -> Outcome:
    """This rank's jobs of the merge pass."""
    where, assignment, elements = dealt
    engine = Engine(
        plan, elements=elements, device=means.device, allow_nonfinite=means.allow_nonfinite
    )
    moved = sum(plan.read_bytes(job) + plan.write_bytes(job) for job in plan.jobs)
    with _streaming(world, plan, means, "merge", moved) as inputs:
        if not where.gather:
            return engine.run(assignment[world.rank], inputs, writer, world)
        theirs = all_steps(plan, assignment, elements)
        with closing(GatherSink(world, plan, where.owners, writer, theirs)) as sink:
            outcome = engine.run(assignment[world.rank], inputs, sink, world)
            sink.finish()
        return outcome
