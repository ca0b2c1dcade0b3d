"""How the ranks' results come together in one folder.

direct: every rank sees the folder and writes its own ranges of the shards. gather: the ranks
that do not see it send their ranges to the shards' owners, who do; each owner holds one range
at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import zip_longest
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import torch

from distmerge.dist import World
from distmerge.errors import OutputError
from distmerge.planner import Plan
from distmerge.spec import PAGE
from distmerge.storage import aligned_buffer
from distmerge.stream import Step, steps
from distmerge.threads import Threads
from distmerge.writer import ShardWriter

AssembleMode = Literal["auto", "direct", "gather"]

_PATIENCE = 3.0
"""Seconds for a new folder to show up on a network file system."""


class Assembly(NamedTuple):
    """`owners[file]` is the rank that makes, completes and hashes that file of Plan.files."""

    gather: bool
    owners: tuple[int, ...]

    def owned_by(self, rank: int) -> list[int]:
        return [file for file, owner in enumerate(self.owners) if owner == rank]


def who_sees(world: World, folder: Path, mode: AssembleMode) -> list[bool]:
    """Which ranks see `folder`, which rank 0 has just made.

    Raises OutputError where `mode` is direct and a rank does not.
    """
    phase = "look for the output folder"
    seen = world.gather(phase, lambda: _appears(folder))
    if mode == "direct" and not all(seen):
        world.together(phase, lambda: _refuse(folder, seen.index(False)))
    return seen


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


def _appears(folder: Path) -> bool:
    deadline = time.monotonic() + _PATIENCE
    while not folder.is_dir():
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


class GatherSink:
    """An engine.Sink that keeps what belongs to this rank's files and sends the rest.

    Every owner takes the ranks' steps in turn: first all first steps, then all second ones ...,
    and of each step its outputs in order.
    Each rank sends in that order too, so some sender is always waited for, and none waits in a
    circle.
    """

    def __init__(
        self,
        world: World,
        plan: Plan,
        owners: Sequence[int],
        writer: ShardWriter,
        rank_steps: Sequence[Iterator[Step]],
    ):
        self._world, self._plan, self._owners, self._writer = world, plan, owners, writer
        self._pool = Threads(1, "receive")
        self._received: Future[None] = self._pool.submit(self._receive, rank_steps)

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

    def _receive(self, rank_steps: Sequence[Iterator[Step]]) -> None:
        buffer = torch.empty(0, dtype=torch.uint8)
        for turn in zip_longest(*rank_steps):
            for rank, step in enumerate(turn):
                if step is None or rank == self._world.rank:
                    continue
                for file in self._own_files(step):
                    if buffer.numel() < step.output_bytes + PAGE:
                        buffer = aligned_buffer(step.output_bytes + PAGE, pinned=False)
                    data = buffer[step.offset % PAGE :][: step.output_bytes]
                    self._world.receive(data, rank)
                    self._writer.write(file, step.offset, data)

    def _own_files(self, step: Step) -> list[int]:
        """The files of this rank that the step writes to."""
        outputs = range(len(self._plan.outputs))
        files = [self._plan.file(number, step.tensor.shard) for number in outputs]
        return [file for file in files if self._owners[file] == self._world.rank]


def all_steps(
    plan: Plan, assignment: Sequence[Sequence[int]], elements: int
) -> list[Iterator[Step]]:
    return [steps(plan, jobs, elements) for jobs in assignment]
