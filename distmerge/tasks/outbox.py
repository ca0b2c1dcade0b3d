"""Results of one rank, written while the next are computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import torch

from distmerge.dist import World
from distmerge.engine import Sink
from distmerge.spec import PAGE
from distmerge.storage import aligned_buffer
from distmerge.threads import Threads


class Outbox:
    """Two buffers of results: one is written while the other is filled."""

    def __init__(self, sink: Sink, world: World, *, pinned: bool = False):
        self._sink, self._world, self._pinned = sink, world, pinned
        self._thread = Threads(1, "write")
        self._buffers = deque([torch.empty(0, dtype=torch.uint8)] * 2)
        self._writes: deque[Future[None]] = deque()

    def buffer(self, num_bytes: int, offset: int) -> torch.Tensor:
        """Room for a result that goes to `offset` of its file, until `put` is called twice more."""
        while len(self._writes) >= len(self._buffers):
            self._world.wait(self._writes.popleft())
        if self._buffers[0].numel() < num_bytes + PAGE:
            self._buffers[0] = aligned_buffer(num_bytes + PAGE, pinned=self._pinned)
        self._buffers.rotate(-1)
        return self._buffers[-1][offset % PAGE :][:num_bytes]

    def put(self, parts: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        """Write parts of the last buffer: file, offset and data."""
        self._writes.append(self._thread.submit(self._write, parts))

    def _write(self, parts: Sequence[tuple[int, int, torch.Tensor]]) -> None:
        for file, offset, data in parts:
            self._sink.write(file, offset, data)

    def finish(self) -> None:
        while self._writes:
            self._world.wait(self._writes.popleft())

    def close(self) -> None:
        self._thread.close()
