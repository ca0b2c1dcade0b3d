"""How the ranks' results come together in one folder.

direct: every rank sees the folder and writes its own ranges of the shards. gather: the ranks
that do not see it send their ranges to the shards' owners, who do; each owner holds one range
at a time.
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch

from distmerge.attempt import Attempt
from distmerge.dist import World
from distmerge.errors import OutputError
from distmerge.planner import Plan
from distmerge.spec import PAGE
from distmerge.storage import aligned_buffer
from distmerge.stream import steps
from distmerge.threads import Threads
from distmerge.writer import ShardWriter

AssembleMode = Literal["auto", "direct", "gather"]

_PATIENCE = 3.0
"""Seconds for a new file to show up on a network file system."""


class Assembly(NamedTuple):
    """`owners[file]` is the rank that makes, completes and hashes that file of Plan.files."""

    gather: bool
    owners: tuple[int, ...]

    def owned_by(self, rank: int) -> list[int]:
        return [file for file, owner in enumerate(self.owners) if owner == rank]


def who_sees(world: World, attempt: Attempt, mode: AssembleMode) -> list[bool]:
    """Which ranks see the folder of `attempt`, on the disk where rank 0 has made it.

    A folder of that name proves nothing: it may lie on a disk of that host's own, left by an
    attempt whose rank 0 ran there. So rank 0 leaves a file of a random name to be looked for.
    Raises OutputError where `mode` is direct and a rank does not see it.
    """
    phase = "look for the output folder"
    probe = attempt.state / world.on_first(phase, lambda: _leave_probe(attempt.state))
    seen = world.gather(phase, lambda: _appears(probe))
    world.on_first(phase, probe.unlink)
    if mode == "direct" and not all(seen):
        world.together(phase, lambda: _refuse(attempt.folder, seen.index(False)))
    return seen


def _leave_probe(folder: Path) -> str:
    name = f"probe-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name


def assembly(
    plan: Plan, assignment: Sequence[Sequence[int]], seen: Sequence[bool], mode: AssembleMode
) -> Assembly:
    """How the results of `assignment` meet, where the ranks `seen` see the output. Pure."""
    if all(seen) and mode != "gather":
        return Assembly(gather=False, owners=_first_writers(plan, assignment))
    hosts = [rank for rank, sees in enumerate(seen) if sees]
    owners = tuple(hosts[file % len(hosts)] for file in range(len(plan.files)))
    return Assembly(gather=True, owners=owners)


def _refuse(folder: Path, rank: int) -> NoReturn:
    raise OutputError(
        f"{folder.parent}: rank {rank} does not see this folder; "
        "use --assemble gather, or a folder that all hosts share"
    )


def _appears(probe: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not probe.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _first_writers(plan: Plan, assignment: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The rank that writes a shard's first bytes: it hashes what it writes on the way. Shards that
    an earlier attempt has filled are dealt out."""
    owners = [shard % len(assignment) for shard in range(len(plan.shards))]
    for rank, jobs in reversed(list(enumerate(assignment))):
        for number in reversed(jobs):
            owners[plan.tensors[plan.jobs[number].tensor].shard] = rank
    return tuple(owners * len(plan.outputs))


class Message(NamedTuple):
    """What a rank writes at once. `time` is what its jobs cost so far: about when it comes."""

    time: float
    file: int
    offset: int
    size: int


def messages(plan: Plan, jobs: Sequence[int], elements: int) -> Iterator[Message]:
    """All that a rank with these jobs writes, in the order in which it does."""
    time = 0.0
    outputs = range(len(plan.outputs))
    for number in jobs:
        job = plan.jobs[number]
        time += plan.cost(job)
        parts = list(steps(plan, [number], elements))
        if plan.matrices(job):  # one output after the other
            order = ((output, step) for output in outputs for step in parts)
        else:
            order = ((output, step) for step in parts for output in outputs)
        for output, step in order:
            file = plan.file(output, step.tensor.shard)
            yield Message(time, file, step.offset, step.output_bytes)


class GatherSink:
    """An engine.Sink that keeps what belongs to this rank's files and sends the rest.

    Every owner takes the ranks' messages by their times, and by rank where these are equal. Each
    rank sends in that order too, so some sender is always waited for, and none waits in a circle.
    """

    def __init__(
        self,
        world: World,
        owners: Sequence[int],
        writer: ShardWriter,
        by_rank: Sequence[Iterator[Message]],
    ):
        self._world, self._owners, self._writer = world, owners, writer
        self._pool = Threads(1, "receive")
        self._received: Future[None] = self._pool.submit(self._receive, by_rank)

    def write(self, file: int, offset: int, data: torch.Tensor) -> None:
        if self._received.done():
            self._received.result()  # raises what ended it, before more is computed in vain
        if self._owners[file] == self._world.rank:
            self._writer.write(file, offset, data)
        else:
            self._world.send(data, self._owners[file])

    def finish(self) -> None:
        """Return when all that the other ranks owed this one is written."""
        self._world.wait(self._received)

    def close(self) -> None:
        self._pool.close()

    def _receive(self, by_rank: Sequence[Iterator[Message]]) -> None:
        buffer = torch.empty(0, dtype=torch.uint8)
        numbered = [zip(repeat(rank), each) for rank, each in enumerate(by_rank)]
        for rank, message in heapq.merge(*numbered, key=lambda entry: (entry[1].time, entry[0])):
            if rank == self._world.rank or self._owners[message.file] != self._world.rank:
                continue
            if buffer.numel() < message.size + PAGE:
                buffer = aligned_buffer(message.size + PAGE, pinned=False)
            data = buffer[message.offset % PAGE :][: message.size]
            self._world.receive(data, rank)
            self._writer.write(message.file, message.offset, data)
