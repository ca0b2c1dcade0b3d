"""Byte ranges of input files, as local disks, page caches and network file systems want it.

mmap: views of the page cache, without a copy, for files that are already there. pread: large
reads into the caller's buffer; past the page cache (`direct`) on local disks, through it on
network file systems, where mapped files are slow and pages can get lost. Files that stay on the
Hub are read by ranges, into the caller's buffer too.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch

from distmerge.errors import RunError, SourceError
from distmerge.log import LOGGER
from distmerge.sources import fault
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.header import Header, check_unchanged
from distmerge.sources.remote import Ranges, RemoteFile
from distmerge.spec import PAGE
from distmerge.storage import is_cached, is_local, memory_view, open_direct

ReadMode = Literal["auto", "mmap", "pread"]

_MAP_NORESERVE = 0x4000
"""The mapping is private and writable (torch wants that) but never written: reserve no memory."""


class ByteReader(Protocol):
    """One open file."""

    def read(self, start: int, num_bytes: int, buffer: torch.Tensor) -> torch.Tensor:
        """Bytes start..start+num_bytes as uint8, in `buffer` (two pages larger) or elsewhere."""

    def release(self, start: int, num_bytes: int) -> None:
        """The bytes that `read` gave are no longer needed."""

    def close(self) -> None: ...


class _Mapped:
    def __init__(self, path: Path):
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        fault.watch(self._map, path)

    def read(self, start: int, num_bytes: int, buffer: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        size = self._map.size()
        if size < start + num_bytes:
            raise _ends_early(self._path, size)
        if fault.is_lost(self._path):
            raise _lost(self._path)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=start)

    def release(self, start: int, num_bytes: int) -> None:
        """Let the pages go: they count as this process's memory while they are mapped."""
        first = start // PAGE * PAGE
        self._map.madvise(mmap.MADV_DONTNEED, first, start + num_bytes - first)

    def close(self) -> None:
        """Views may still be out; the mapping goes with the last of them."""


class _Read:
    def __init__(self, path: Path, *, direct: bool):
        self._path = path
        descriptor = open_direct(path, os.O_RDONLY) if direct else None
        self._page = PAGE if descriptor is not None else 1
        self._file = os.open(path, os.O_RDONLY) if descriptor is None else descriptor

    def read(self, start: int, num_bytes: int, buffer: torch.Tensor) -> torch.Tensor:
        first = start // self._page * self._page
        skip = start - first
        wanted = -(-(skip + num_bytes) // self._page) * self._page
        view = memory_view(buffer)
        got = 0
        while got < skip + num_bytes:
            # A direct read must go on at a page; what an interrupted one gave last is read again.
            got = got // self._page * self._page
            count = self._pread(view[got:wanted], first + got)
            got += count
            if count < self._page and got < skip + num_bytes:
                raise _ends_early(self._path, os.fstat(self._file).st_size)
        return buffer[skip : skip + num_bytes]

    def _pread(self, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._file, [view], offset)
        except OSError as error:
            raise RunError(
                f"{self._path}: read error at byte {offset}: {error.strerror}"
            ) from error

    def release(self, start: int, num_bytes: int) -> None:
        """The bytes are in the caller's buffer."""

    def close(self) -> None:
        os.close(self._file)


class _Remote:
    def __init__(self, file: RemoteFile):
        self._ranges = Ranges(file)

    def read(self, start: int, num_bytes: int, buffer: torch.Tensor) -> torch.Tensor:
        wanted = buffer[:num_bytes]
        self._ranges.fill(start, memory_view(wanted))
        return wanted

    def release(self, start: int, num_bytes: int) -> None:
        """The bytes are in the caller's buffer."""

    def close(self) -> None:
        """The connections are the process's, for all files."""


def _ends_early(path: Path, size: int) -> SourceError:
    return SourceError(
        f"{path}: it ends at byte {size}, inside a tensor that its header describes; did it change "
        "while it was read?"
    )


def _lost(path: Path) -> SourceError:
    return SourceError(f"{path}: a part of it is gone, or can't be read; did it change meanwhile?")


def open_reader(path: Path, mode: ReadMode) -> ByteReader:
    """Open `path` the way that suits where it lies, or as `mode` says."""
    try:
        local = is_local(path)
        mapped = mode == "mmap" or (mode == "auto" and local and _cached(path))
        LOGGER.debug("%s: %s", path, "mapped" if mapped else "read")
        return _Mapped(path) if mapped else _Read(path, direct=local)
    except OSError as error:
        raise SourceError(f"{path}: can't be opened: {error.strerror}") from error
    except ValueError as error:  # there is nothing to map
        raise _ends_early(path, 0) from error


def _cached(path: Path) -> bool:
    with path.open("rb") as file:
        return is_cached(file.fileno(), path.stat().st_size)


class Inputs:
    """The files of all inputs, opened as they are needed and closed as others are."""

    def __init__(self, checkpoints: Sequence[Checkpoint], mode: ReadMode):
        self._checkpoints = checkpoints
        self._mode = mode
        self._open: OrderedDict[tuple[int, int], ByteReader] = OrderedDict()
        fault.forget()
        self._used: dict[tuple[int, int], Header] = {}
        self._limit = 4 * len(checkpoints) + 16

    def reader(self, checkpoint: int, file: int) -> ByteReader:
        """The reader of a file; it stays open for at least the next 4 files of each input."""
        key = (checkpoint, file)
        if key not in self._open:
            header = self._used[key] = self._checkpoints[checkpoint].files[file]
            check_unchanged(header)
            self._open[key] = (
                open_reader(header.path, self._mode)
                if header.remote is None
                else _Remote(header.remote)
            )
        self._open.move_to_end(key)
        if len(self._open) > self._limit:
            self._open.popitem(last=False)[1].close()
        return self._open[key]

    def check_unchanged(self) -> None:
        """Raise SourceError where a file that was read here is not what it was when the plan was
        made, or could not be read in full. Call it when all that was read has been used."""
        for header in self._used.values():
            check_unchanged(header)
            if fault.is_lost(header.path):
                raise _lost(header.path)

    def close(self) -> None:
        for reader in self._open.values():
            reader.close()
        self._open.clear()
