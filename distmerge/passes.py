"""The two passes over the inputs, as all ranks make them together.

statistic: products of the checkpoints, from which the coefficients of Extra-Merge follow.
merge: every tensor of every output, on the disk.
"""

from __future__ import annotations

import itertools
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from distmerge import output
from distmerge.assembly import AssembleMode, Assembly, GatherSink, assembly, messages, who_sees
from distmerge.assignment import assign, assign_trend, whole_batches
from distmerge.attempt import Attempt
from distmerge.budget import Budget, budget, default_memory, over_budget
from distmerge.dist import World
from distmerge.document import Plain
from distmerge.engine import Outcome
from distmerge.gram import Gram
from distmerge.jobs import run_jobs
from distmerge.journal import Journal, finished_jobs, read_journals, sound_records
from distmerge.log import LOGGER, Progress, format_bytes, parse_bytes
from distmerge.planner import Plan
from distmerge.sources.reader import Inputs, ReadMode
from distmerge.statistic import GramPass, Snapshots, Sums, read_snapshots, total
from distmerge.storage import free_memory
from distmerge.stream import single_threaded
from distmerge.tasks.engine import Handling
from distmerge.tasks.shared import run_shared, vouch
from distmerge.tasks.spectra import Numbers, Spectra, ordered, read_spectra
from distmerge.writer import ShardWriter, create_shards

MEMORY_SHARE = 0.5
"""Of a host's free memory, what its ranks together take at most where --memory does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Means:
    """What the passes work with; see pipeline.Options, tasks.engine.Handling. `shown`: progress."""

    device: torch.device
    solver: torch.device
    memory: str | None
    read: ReadMode
    assemble: AssembleMode
    allow_nonfinite: bool
    timeout: float
    shown: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What a pass did: bytes of all ranks, counts as in engine.Outcome, wall time.

    `shards` describes the files of the plan, in order, as the manifest lists them; `spectra` the
    matrices that were calibrated.
    """

    read_bytes: int
    seconds: float
    written_bytes: int = 0
    nonfinite: int = 0
    shards: tuple[Plain, ...] = ()
    spectra: tuple[Numbers, ...] = ()


NOTHING = Done(read_bytes=0, seconds=0.0)


def statistic_pass(world: World, plan: Plan, means: Means, attempt: Attempt) -> tuple[Gram, Done]:
    """The Gram matrices of the checkpoints, on every rank: the same to the bit at any number."""
    started = time.monotonic()
    elements = _agreed_budget(world, plan, means.memory).elements
    known = world.on_first("look for sums", lambda: read_snapshots(attempt.state))
    done = {job for part in known for job in part.jobs}
    jobs = assign_trend(plan, world.size, done)[world.rank]

    def work() -> tuple[Sums, int]:
        passing = GramPass(plan, elements=elements, device=means.device)
        moved = sum(plan.read_bytes(plan.jobs[n]) for n in plan.trend_jobs if n not in done)
        name = _own_name(world, attempt)
        snapshots = Snapshots(attempt.state, name) if name is not None else None
        with _streaming(world, plan, means, "statistic", moved) as inputs:
            return passing.run(jobs, inputs, world, snapshots), passing.read_bytes

    parts = world.gather("statistic", work)
    gram = total(plan, [*(part.sums for part in known), *(sums for sums, _ in parts)])
    read = sum(count for _, count in parts)
    return gram, Done(read_bytes=read, seconds=time.monotonic() - started)


def merge_pass(world: World, plan: Plan, means: Means, attempt: Attempt) -> Done:
    """Every tensor of every output in the attempt's folder, written, synced and hashed."""
    started = time.monotonic()
    allowed = _agreed_budget(world, plan, means.memory)
    seen = who_sees(world, attempt, means.assemble)
    finished = _finished(world, plan, attempt, seen)
    batched = means.solver.type == "cuda"
    if batched:
        finished = frozenset(whole_batches(plan, finished))
    shared = [n for n in over_budget(plan, allowed) if n not in finished]
    assignment = assign(plan, world.size, {*finished, *shared}, batched=batched)
    where = assembly(plan, assignment, seen, means.assemble)
    own = where.owned_by(world.rank)
    with ExitStack() as stack:
        name = _own_name(world, attempt)
        # In a phase: a rank that fails before it may have removed the state that is yet empty.
        journal = world.together(
            "open the journal", lambda: None if name is None else Journal(attempt.state, name)
        )
        if journal is not None:
            stack.enter_context(closing(journal))
        writer = stack.enter_context(closing(ShardWriter(attempt.folder, plan.files, journal)))
        spectra = Spectra(attempt.state, name)
        how = Handling(allowed, means.device, means.solver, means.allow_nonfinite, spectra)
        world.together("create the shards", lambda: create_shards(attempt.folder, plan.files, own))
        outcomes = _merge_large(world, plan, means, (shared, where), writer, how)
        outcomes += world.gather(
            "merge", lambda: _run_jobs(world, plan, means, (where, assignment), writer, how)
        )
        world.together("sync the shards", writer.sync)
        digests = world.gather("check the shards", lambda: writer.digests(own))
    found = {number: digest for part in digests for number, digest in part.items()}
    return Done(
        read_bytes=sum(outcome.read_bytes for outcome in outcomes),
        written_bytes=plan.output_bytes - sum(plan.write_bytes(plan.jobs[n]) for n in finished),
        seconds=time.monotonic() - started,
        nonfinite=sum(outcome.nonfinite for outcome in outcomes),
        shards=tuple(
            output.described(found[number], file.size) for number, file in enumerate(plan.files)
        ),
        spectra=_collected(world, plan, attempt, spectra),
    )


def _merge_large(
    world: World,
    plan: Plan,
    means: Means,
    dealt: tuple[Sequence[int], Assembly],
    writer: ShardWriter,
    how: Handling,
) -> list[Outcome]:
    """The matrices that no rank can hold alone: all ranks do each of them together."""
    jobs, where = dealt
    if not jobs:
        return []
    owners = where.owners if where.gather else None

    def work() -> Outcome:
        moved = sum(plan.read_bytes(plan.jobs[n]) + plan.write_bytes(plan.jobs[n]) for n in jobs)
        with _streaming(world, plan, means, "merge large matrices", moved) as inputs:
            return run_shared(plan, jobs, inputs, writer, world, how, owners)

    outcomes = world.gather("merge large matrices", work)
    mine = where.owned_by(world.rank)
    world.together("look at large matrices", lambda: vouch(plan, jobs, mine, writer))
    return outcomes


def _collected(world: World, plan: Plan, attempt: Attempt, spectra: Spectra) -> tuple[Numbers, ...]:
    """What became of every matrix, on the first rank: in this attempt, and in those before it."""
    known = world.on_first("look for spectra", lambda: read_spectra(attempt.state))
    found = world.gather("collect the spectra", lambda: spectra.found)
    return tuple(ordered(plan, itertools.chain(known, *found)))


def _own_name(world: World, attempt: Attempt) -> str | None:
    """What this rank's files in the attempt's state are called; None where it does not see it."""
    return f"{world.rank}-{secrets.token_hex(4)}" if attempt.state.is_dir() else None


def _finished(world: World, plan: Plan, attempt: Attempt, seen: Sequence[bool]) -> frozenset[int]:
    """The jobs that earlier attempts have done, as the bytes on the disk still show."""
    records = world.on_first("look for what is done", lambda: read_journals(attempt.state))
    if not records:
        return frozenset()
    able = [rank for rank, sees in enumerate(seen) if sees]
    mine = [record for record in records if able[record.file % len(able)] == world.rank]
    parts = world.gather(
        "check what is done", lambda: list(sound_records(mine, attempt.folder, plan.files))
    )
    finished = finished_jobs(plan, [record for part in parts for record in part])
    if world.rank == 0:
        size = sum(plan.write_bytes(plan.jobs[number]) for number in finished)
        LOGGER.info("going on: %s were written before", format_bytes(size))
    return frozenset(finished)


def _agreed_budget(world: World, plan: Plan, memory: str | None) -> Budget:
    """How much every rank holds at once: the same everywhere, for the tightest host."""
    hosts = world.gather("look for memory", lambda: (socket.gethostname(), free_memory()))

    def within_budget() -> Budget:
        if memory is not None:
            return budget(plan, parse_bytes(memory))
        names = [name for name, _ in hosts]
        budgets = [int(MEMORY_SHARE * free / names.count(name)) for name, free in hosts]
        return budget(plan, default_memory(plan, min(budgets)))

    return world.together("look for memory", within_budget)


@contextmanager
def _streaming(world: World, plan: Plan, means: Means, label: str, moved: int) -> Iterator[Inputs]:
    """The inputs, with progress over `moved` bytes of all ranks; they must stay as they are."""
    with ExitStack() as stack:
        stack.enter_context(single_threaded())
        inputs = stack.enter_context(closing(Inputs(plan.inputs, means.read)))
        shown = means.shown and world.rank == 0
        progress = stack.enter_context(Progress(label, moved, shown=shown))
        stack.enter_context(world.monitor.showing(progress, phase=label, timeout=means.timeout))
        yield inputs
        inputs.check_unchanged()


def _run_jobs(
    world: World,
    plan: Plan,
    means: Means,
    dealt: tuple[Assembly, Sequence[Sequence[int]]],
    writer: ShardWriter,
    how: Handling,
) -> Outcome:
    """This rank's jobs of the merge pass."""
    where, assignment = dealt
    jobs = [plan.jobs[number] for each in assignment for number in each]
    moved = sum(plan.read_bytes(job) + plan.write_bytes(job) for job in jobs)
    mine = assignment[world.rank]
    with _streaming(world, plan, means, "merge", moved) as inputs:
        if not where.gather:
            return run_jobs(plan, mine, inputs, writer, world, how)
        theirs = [messages(plan, each, how.budget.elements) for each in assignment]
        with closing(GatherSink(world, where.owners, writer, theirs)) as sink:
            outcome = run_jobs(plan, mine, inputs, sink, world, how)
            sink.finish()
        return outcome
