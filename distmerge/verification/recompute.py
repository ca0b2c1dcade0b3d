"""Tensors of an output merged again from its inputs, and compared with what is on the disk."""

from __future__ import annotations

import math
import random
import re
import socket
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import torch

from distmerge.assignment import assign
from distmerge.budget import Budget, budget, default_memory
from distmerge.dist import World
from distmerge.errors import ConfigError
from distmerge.jobs import run_jobs
from distmerge.log import Progress
from distmerge.output import versions
from distmerge.planner import Plan
from distmerge.sources.reader import ByteReader, Inputs, open_reader
from distmerge.spec import BLOCK_ELEMENTS, DTYPES, PAGE, DType
from distmerge.storage import aligned_buffer, free_memory
from distmerge.stream import typed
from distmerge.tasks.engine import Handling
from distmerge.tasks.spectra import Spectra
from distmerge.verification.manifest import Finding, Manifest, some
from distmerge.verification.provenance import plan_again, with_coefficients, without_agreement

ALL = "all"
MEMORY_SHARE = 0.5
"""Of a host's free memory, what its ranks together take at most."""

DECISIVE = ("torch", "machine", "cpu_capability", "device")
"""Versions that can change last bits."""


def parse_share(text: str) -> float:
    """The share of the tensors that 'all' or '1%' means. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    share = 1.0 if text.strip() == ALL else float(match[1]) / 100 if match else 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"--recompute {text}: expected all, or a share from over 0% to 100%")
    return share


def sample(names: Sequence[str], share: float, seed: str) -> frozenset[str]:
    """A share of `names`, at least one: the same ones for the same seed, on any machine."""
    generator = random.Random(seed)
    keys = {name: generator.random() for name in names}  # all else may change between Pythons
    wanted = math.ceil(share * len(names) - 1e-9)  # 7 % of 100 are 7, up to rounding
    return frozenset(sorted(names, key=keys.__getitem__)[: max(wanted, 1)])


def other_versions(manifest: Manifest) -> list[Finding]:
    """A note where this machine may give other last bits than the one that merged."""
    ours = versions(_solver(manifest)[1])
    differing = [key for key in DECISIVE if manifest.versions.get(key) != ours[key]]
    told = ", ".join(f"{key} {manifest.versions.get(key)} (here {ours[key]})" for key in differing)
    return (
        [Finding("versions", f"merged with {told}: last bits may differ", note=True)]
        if told
        else []
    )


def _solver(manifest: Manifest) -> tuple[torch.device, str]:
    """What matrices are solved on, and its name: a GPU where it is of the kind that was used."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if name and manifest.versions.get("device") == name:
        return torch.device("cuda"), name
    return torch.device("cpu"), "cpu"


class Difference(NamedTuple):
    """How elements of a tensor differ: the first of them, how many, by how much at most."""

    first: int
    number: int
    largest: float

    def joined(self, other: Difference) -> Difference:
        """Both differences of one tensor."""
        return Difference(
            min(self.first, other.first),
            self.number + other.number,
            max(self.largest, other.largest),
        )


class Comparison:
    """An engine.Sink that reads what it should write, and keeps what differs, by tensor."""

    def __init__(self, manifest: Manifest, plan: Plan):
        self._manifest, self._plan = manifest, plan
        self._reader: tuple[int, ByteReader] | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._starts = [(t.shard, t.offset) for t in plan.tensors if t.elements]
        self._tensors = [number for number, t in enumerate(plan.tensors) if t.elements]
        self.found: dict[int, Difference] = {}

    def write(self, file: int, offset: int, data: torch.Tensor) -> None:
        """Compare `data` with the same bytes of the output."""
        there = self._read(file, offset, data.numel())
        if torch.equal(data, there):
            return
        number = self._tensors[bisect_right(self._starts, (file, offset)) - 1]
        tensor = self._plan.tensors[number]
        size = tensor.dtype.itemsize
        step = BLOCK_ELEMENTS * size
        for start in range(0, data.numel(), step):
            ours, theirs = data[start : start + step], there[start : start + step]
            if not torch.equal(ours, theirs):
                at = (offset - tensor.offset + start) // size
                self._keep(number, _difference(ours, theirs, tensor.dtype, at))

    def close(self) -> None:
        if self._reader is not None:
            self._reader[1].close()
            self._reader = None

    def _keep(self, number: int, found: Difference) -> None:
        self.found[number] = self.found[number].joined(found) if number in self.found else found

    def _read(self, file: int, offset: int, size: int) -> torch.Tensor:
        if self._reader is None or self._reader[0] != file:
            self.close()
            path = self._manifest.folder / self._plan.files[file].name
            self._reader = file, open_reader(path, "auto")
        if self._buffer.numel() < size + 2 * PAGE:
            self._buffer = aligned_buffer(size + 2 * PAGE, pinned=False)
        return self._reader[1].read(offset, size, self._buffer)


def _difference(ours: torch.Tensor, theirs: torch.Tensor, dtype: DType, at: int) -> Difference:
    """Of two stretches (uint8) of a tensor, the first element of which is element `at`."""
    number = DTYPES["U8"] if dtype.name == "BOOL" else dtype
    differing = (ours.view(-1, dtype.itemsize) != theirs.view(-1, dtype.itemsize)).any(dim=1)
    a, b = (typed(x, number).double()[differing] for x in (ours, theirs))
    largest = (a - b).abs().nan_to_num(nan=math.inf).max()
    return Difference(at + int(differing.nonzero()[0]), int(differing.sum()), float(largest))


def merge_again(
    world: World,
    manifest: Manifest,
    names: frozenset[str],
    able: Sequence[int],
    *,
    stream_remote: bool,
    shown: bool,
) -> list[Finding]:
    """The tensors `names` of an output, merged once more by all ranks; what differs, on each.

    `able` are the ranks that see the output. Raises what a merge raises.
    """
    plan = world.node_first(
        "open the inputs",
        lambda local_only: plan_again(manifest, local_only=local_only, stream_remote=stream_remote),
    )
    world.agree("plan", "plan", plan.digest)
    plan = without_agreement(with_coefficients(plan, manifest)[0])
    left_out = {n for n, job in enumerate(plan.jobs) if plan.tensors[job.tensor].name not in names}
    assignment = assign(plan, len(able), left_out)
    mine = assignment[able.index(world.rank)] if world.rank in able else []
    allowed = _budget(world, plan)
    moved = sum(
        plan.read_bytes(job) + plan.write_bytes(job)
        for number, job in enumerate(plan.jobs)
        if number not in left_out
    )

    def work() -> dict[int, Difference]:
        # NaN in an input has its NaN in the output, which others tell.
        solver = _solver(manifest)[0]
        how = Handling(allowed, torch.device("cpu"), solver, True, Spectra(manifest.folder, None))
        with ExitStack() as stack:
            inputs = stack.enter_context(closing(Inputs(plan.inputs, "auto")))
            sink = stack.enter_context(closing(Comparison(manifest, plan)))
            progress = stack.enter_context(Progress("merge again", moved, shown=shown))
            stack.enter_context(world.monitor.showing(progress))
            run_jobs(plan, mine, inputs, sink, world, how)
            return sink.found

    return some(_told(manifest, plan, world.gather("merge again", work)))


def _budget(world: World, plan: Plan) -> Budget:
    hosts = world.gather("look for memory", socket.gethostname)
    free = int(MEMORY_SHARE * free_memory() / hosts.count(hosts[world.rank]))
    return world.together("look for memory", lambda: budget(plan, default_memory(plan, free)))


def _told(
    manifest: Manifest, plan: Plan, parts: Sequence[dict[int, Difference]]
) -> Iterator[Finding]:
    found: dict[int, Difference] = {}
    for number, difference in (item for part in parts for item in part.items()):
        found[number] = found[number].joined(difference) if number in found else difference
    for place, (first, number, largest) in sorted(found.items()):
        tensor = plan.tensors[place]
        what = (
            f"{number} of {tensor.elements} elements differ from what the inputs give, "
            f"the first is element {first}, by up to {largest:.3g}"
        )
        yield manifest.finding(plan.shards[tensor.shard].name, what, tensor=tensor.name)
