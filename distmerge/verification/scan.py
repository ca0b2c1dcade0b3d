"""One read of a file: its sha256, and the NaN and Inf in its tensors."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, closing
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch

from distmerge.dist import World
from distmerge.errors import PeerError, RunError, SourceError
from distmerge.log import Progress
from distmerge.methods.average import count_nonfinite
from distmerge.sources.header import read_header
from distmerge.sources.reader import open_reader
from distmerge.spec import BLOCK_ELEMENTS, PAGE, TensorSpec
from distmerge.storage import aligned_buffer, memory_view
from distmerge.stream import typed
from distmerge.threads import Threads

CHUNK = 8 * 2**20
"""Bytes that are read at once, at most."""


class Part(NamedTuple):
    """Bytes start..stop of a file, all of one tensor."""

    spec: TensorSpec
    start: int
    stop: int


class Chunk(NamedTuple):
    """Bytes start..stop of a file, and what of which float tensor lies in them."""

    start: int
    stop: int
    parts: tuple[Part, ...]


class Scanned(NamedTuple):
    """The sha256 of a file; by tensor, how many values are not finite and the first of them.

    `problem` is why the file could not be read.
    """

    sha256: str
    nonfinite: dict[str, tuple[int, int]]
    problem: str = ""


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The files of each rank, by position: the largest first, each to the rank with the least."""
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        rank = loads.index(min(loads))
        dealt[rank].append(number)
        loads[rank] += sizes[number]
    return [sorted(numbers) for numbers in dealt]


class Scanner:
    """Scans files for one rank, in two buffers of CHUNK."""

    def __init__(self, world: World):
        self._world = world
        self._buffers = [aligned_buffer(CHUNK + 2 * PAGE, pinned=False) for _ in range(2)]
        self._cast = torch.empty(BLOCK_ELEMENTS)
        self._reading, self._hashing = Threads(1, "read"), Threads(1, "hash")

    def scan(self, path: Path) -> Scanned:
        """Read the whole file, as far as the disk gives it."""
        try:
            return self._scan(path)
        except PeerError:
            raise
        except (SourceError, RunError, OSError) as error:
            return Scanned("", {}, str(error).removeprefix(f"{path}: "))

    def close(self) -> None:
        self._reading.close()
        self._hashing.close()

    def _scan(self, path: Path) -> Scanned:
        size = path.stat().st_size
        digest = hashlib.sha256()
        nonfinite: dict[str, tuple[int, int]] = {}
        if size == 0:
            return Scanned(digest.hexdigest(), nonfinite)
        with closing(open_reader(path, "auto")) as reader:
            ahead: deque[tuple[Chunk, Future[torch.Tensor]]] = deque()
            for number, chunk in enumerate(chunks(size, _floats(path))):
                length, buffer = chunk.stop - chunk.start, self._buffers[number % 2]
                ahead.append(
                    (chunk, self._reading.submit(reader.read, chunk.start, length, buffer))
                )
                if len(ahead) == 2:
                    before, read = ahead.popleft()
                    self._take(before, self._world.wait(read), digest, nonfinite)
                    reader.release(before.start, before.stop - before.start)
            for chunk, read in ahead:
                self._take(chunk, self._world.wait(read), digest, nonfinite)
        return Scanned(digest.hexdigest(), nonfinite)

    def _take(
        self,
        chunk: Chunk,
        data: torch.Tensor,
        digest: hashlib._Hash,
        nonfinite: dict[str, tuple[int, int]],
    ) -> None:
        self._world.check()
        hashed = self._hashing.submit(digest.update, memory_view(data))
        for spec, start, stop in chunk.parts:
            values = typed(data[start - chunk.start : stop - chunk.start], spec.dtype)
            if (found := self._look(values)) is not None:
                count, first = found
                before, earliest = nonfinite.get(spec.name, (0, -1))
                at = (start - spec.start) // spec.dtype.itemsize + first
                nonfinite[spec.name] = before + count, earliest if before else at
        self._world.wait(hashed)
        self._world.monitor.advance(chunk.stop - chunk.start)

    def _look(self, values: torch.Tensor) -> tuple[int, int] | None:
        """How many values are not finite, and the first; None for the usual case.

        NaN and Inf survive a sum, which is ten times as fast as a test of every value; what
        overflows in it is looked at again.
        """
        if all(bool(self._sum(block).isfinite()) for block in torch.split(values, BLOCK_ELEMENTS)):
            return None
        count = count_nonfinite(values)
        return (count, int((~values.isfinite()).nonzero()[0])) if count else None

    def _sum(self, block: torch.Tensor) -> torch.Tensor:
        """Sums of 16-bit floats are slow, and a copy in the cache is not."""
        if block.dtype.itemsize > 2:
            return block.sum()
        return self._cast[: block.numel()].copy_(block).sum()


def scan_all(
    world: World, files: Sequence[tuple[Path, int]], able: Sequence[int], *, shown: bool
) -> list[Scanned]:
    """What one of the ranks `able` finds in each of `files` (with their bytes), on every rank."""
    sizes = [size for _, size in files]
    mine = deal(sizes, len(able))[able.index(world.rank)] if world.rank in able else []

    def work() -> list[tuple[int, Scanned]]:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress("check", sum(sizes), shown=shown))
            stack.enter_context(world.monitor.showing(progress))
            scanner = stack.enter_context(closing(Scanner(world)))
            return [(number, scanner.scan(files[number][0])) for number in mine]

    found = dict(item for part in world.gather("check the files", work) for item in part)
    return [found[number] for number in range(len(files))]


def _floats(path: Path) -> Iterable[TensorSpec]:
    """The tensors that can hold NaN; none where the header is not sound, which others tell."""
    if path.suffix != ".safetensors":
        return []
    try:
        header = read_header(path)
    except SourceError:
        return []
    return [s for s in header.tensors.values() if s.dtype.kind == "float" and s.nbytes]


def chunks(size: int, floats: Iterable[TensorSpec]) -> Iterator[Chunk]:
    """A file in stretches that cut no value of `floats` in two."""
    waiting = deque(sorted(floats, key=attrgetter("start")))
    start = 0
    while start < size:
        stop = min(start + CHUNK, size)
        parts: list[Part] = []
        while waiting and waiting[0].start < stop:
            spec = waiting[0]
            end = spec.start + spec.nbytes
            if end > stop:
                stop -= (stop - spec.start) % spec.dtype.itemsize
            parts.append(Part(spec, max(start, spec.start), min(end, stop)))
            if end > stop:
                break
            waiting.popleft()
        yield Chunk(start, stop, tuple(part for part in parts if part.start < part.stop))
        start = stop
