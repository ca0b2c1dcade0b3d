"""The output's shards: made at their full size, written in place, hashed, synced.

Several ranks may write one shard, at offsets that the plan fixed. What a rank writes is hashed
on the way, as far as it continues the file from its start; the rest is read back.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from distmerge.errors import OutputError, RunError
from distmerge.journal import Journal, Record, crc_checksum, crc_of, sha_checksum
from distmerge.spec import PAGE, OutputShard
from distmerge.storage import aligned_buffer, is_local, memory_view, open_direct

_READ_BACK = 8 * 2**20

_PATIENCE = 2.0
"""Seconds that a write which is under way gets to end before its files are left open."""


class _Shard:
    """One shard that this rank writes to."""

    def __init__(self, path: Path, shard: OutputShard, hashing: Executor, *, direct: bool):
        self.path, self.size = path, shard.size
        self._hashing = hashing
        self._file = os.open(path, os.O_RDWR)
        self._direct = open_direct(path, os.O_RDWR) if direct else None
        self._hash = hashlib.sha256(shard.header)
        self._hashed = len(shard.header)
        self._lock = threading.Lock()

    def write(self, offset: int, data: torch.Tensor) -> bytes | None:
        """Whole pages go straight to the disk, the rest of the first and the last through the
        page cache, which neighbours share. The data is hashed meanwhile.

        Returns the sha256 of the file so far, if `data` went on where the hash had stopped."""
        view = memory_view(data)
        hashed = self._hashing.submit(self._follow, offset, view)
        stop = offset + len(view)
        first, last = -(-offset // PAGE) * PAGE, stop // PAGE * PAGE
        if self._direct is None or first >= last:
            _write_all(self._file, view, offset)
        else:
            _write_all(self._file, view[: first - offset], offset)
            _write_all(self._direct, view[first - offset : last - offset], first)
            _write_all(self._file, view[last - offset :], last)
        return hashed.result()

    def write_rows(self, offset: int, stride: int, rows: torch.Tensor) -> None:
        if rows.shape[1] == stride:
            rows = rows.reshape(1, -1)
        for number, row in enumerate(rows):
            _write_all(self._file, memory_view(row), offset + number * stride)

    def checksum(self, offset: int, length: int) -> str:
        """CRC-32 of a range, as the disk has it."""
        return crc_of(self._file, offset, offset + length)

    def _follow(self, offset: int, view: memoryview) -> bytes | None:
        with self._lock:
            if offset != self._hashed:
                return None
            self._hash.update(view)
            self._hashed += len(view)
            return self._hash.digest()

    def sync(self) -> None:
        os.fsync(self._file)

    def digest(self) -> str:
        """sha256 of the whole file, once every rank has written and synced."""
        source = self._file if self._direct is None else self._direct
        buffer = aligned_buffer(_READ_BACK, pinned=False)
        view = memory_view(buffer)
        while self._hashed < self.size:
            first = self._hashed // PAGE * PAGE
            count = os.preadv(source, [view], first)
            if first + count <= self._hashed:
                raise RunError(f"{self.path}: it is shorter than what was written to it")
            self._hash.update(view[self._hashed - first : count])
            self._hashed = first + count
        return self._hash.hexdigest()

    def close(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


class ShardWriter:
    """This rank's hand on the shards of all outputs in `folder`, which a rank without any need not
    see. What it writes goes into the journal, if there is one.

    An engine.Sink.
    """

    def __init__(self, folder: Path, shards: Sequence[OutputShard], journal: Journal | None):
        self._folder, self._shards, self._journal = folder, shards, journal
        self._open: dict[int, _Shard] = {}
        self._turn = threading.Condition()
        self._under_way, self._closed = 0, False
        self._hashing = ThreadPoolExecutor(1, "hash")

    def write(self, shard: int, offset: int, data: torch.Tensor) -> None:
        with self._staying_open():
            so_far = self._shard(shard).write(offset, data)
            if self._journal is not None:
                view = memory_view(data)
                checksum = crc_checksum(view) if so_far is None else sha_checksum(so_far)
                self._journal.add(Record(shard, offset, len(view), checksum))

    def write_rows(self, shard: int, offset: int, stride: int, rows: torch.Tensor) -> None:
        """Write `rows` (2-D, uint8), the first to `offset`, each next one `stride` bytes further.

        They stand in no journal before `vouch`.
        """
        with self._staying_open():
            self._shard(shard).write_rows(offset, stride, rows)

    def vouch(self, shard: int, offset: int, length: int) -> None:
        """Take down that all of a range is written: by whom, does not matter."""
        if self._journal is not None:
            with self._staying_open():
                checksum = self._shard(shard).checksum(offset, length)
            self._journal.add(Record(shard, offset, length, checksum))

    @contextmanager
    def _staying_open(self) -> Iterator[None]:
        """After a failure a thread may be writing yet: the numbers of its files must not become
        another file's meanwhile."""
        with self._turn:
            if self._closed:
                raise RunError("the merge has ended")
            self._under_way += 1
        try:
            yield
        finally:
            with self._turn:
                self._under_way -= 1
                self._turn.notify_all()

    def sync(self) -> None:
        """Return when all that this rank wrote is on the disk."""
        for shard in self._open.values():
            shard.sync()
        if self._journal is not None:
            self._journal.sync()

    def digests(self, numbers: Iterable[int]) -> dict[int, str]:
        """sha256 of the complete shards `numbers`, each opened once by the format's own reader.

        Raises RunError where a shard is not sound.
        """
        return {number: self._checked_digest(number) for number in numbers}

    def _checked_digest(self, number: int) -> str:
        shard = self._shard(number)
        try:
            with safe_open(shard.path, framework="pt"):
                pass
        except SafetensorError as error:
            raise RunError(f"{shard.path}: what was written is not sound: {error}") from error
        return shard.digest()

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            shard = self._shards[number]
            path = self._folder / shard.name
            direct = is_local(self._folder)
            self._open[number] = _Shard(path, shard, self._hashing, direct=direct)
        return self._open[number]

    def close(self) -> None:
        """Close the files, but not those of a write that hangs."""
        with self._turn:
            self._closed = True
            if self._turn.wait_for(lambda: not self._under_way, timeout=_PATIENCE):
                for shard in self._open.values():
                    shard.close()
                self._open.clear()
        self._hashing.shutdown(wait=False)


def create_shards(folder: Path, shards: Sequence[OutputShard], own: Iterable[int]) -> None:
    """Make the shards `own`, with their headers and at their full size; what an earlier attempt
    wrote stays.

    Raises OutputError where the disk is full, before any time was spent on tensors.
    """
    for shard in (shards[number] for number in own):
        descriptor = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if shard.size and is_local(folder):
                os.posix_fallocate(descriptor, 0, shard.size)
            else:  # network file systems may emulate it by writing every page
                os.ftruncate(descriptor, shard.size)
            _write_all(descriptor, memoryview(shard.header), 0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(f"{folder}: no space left for {shard.name}") from error
            raise
        finally:
            os.close(descriptor)
