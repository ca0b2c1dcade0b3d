"""What is on the disk already: a line for every range of a shard that was written.

A line is trusted only if the range still has the checksum that it gives. So nothing has to be
synced before the line is written: what a power cut took is written again.
"""

from __future__ import annotations

import errno
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from distmerge.planner import Plan
from distmerge.spec import OutputShard

SYNCED = 16
"""Lines between two syncs of a journal: a power cut loses at most these."""

_CHUNK = 8 * 2**20
_PREFIX = "written-"


class Record(NamedTuple):
    """`length` bytes at `offset` of Plan.files[file] were written; `crc` is their CRC-32."""

    file: int
    offset: int
    length: int
    crc: int


class Journal:
    """Takes down what this rank writes, in a file of its own in `folder`."""

    def __init__(self, folder: Path, name: str):
        path = folder / f"{_PREFIX}{name}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._unsynced = 0

    def add(self, record: Record) -> None:
        line = f"{record.file} {record.offset} {record.length} {record.crc:08x}\n"
        if os.write(self._file, line.encode()) < len(line):  # what follows would join it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._unsynced += 1
        if self._unsynced >= SYNCED:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file)
        self._unsynced = 0

    def close(self) -> None:
        os.close(self._file)


def read_journals(folder: Path) -> list[Record]:
    """All records of earlier attempts; what is not a whole line (a kill, a full disk) is none."""
    found: dict[Record, None] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        for line in path.read_bytes().decode("ascii", "replace").splitlines(keepends=True):
            if (record := _parse(line)) is not None:
                found[record] = None
    return list(found)


def _parse(line: str) -> Record | None:
    parts = line.split(" ")
    if len(parts) != 4 or len(parts[3]) != 9 or not line.endswith("\n"):
        return None
    try:
        return Record(int(parts[0]), int(parts[1]), int(parts[2]), int(parts[3], 16))
    except ValueError:
        return None


def is_sound(record: Record, folder: Path, files: Sequence[OutputShard]) -> bool:
    """Whether the range still has its checksum."""
    if not 0 <= record.file < len(files) or min(record.offset, record.length) < 0:
        return False
    if record.offset + record.length > files[record.file].size:
        return False
    crc, left, offset = 0, record.length, record.offset
    try:
        with (folder / files[record.file].name).open("rb", buffering=0) as file:
            while left > 0:
                data = os.pread(file.fileno(), min(left, _CHUNK), offset)
                if not data:
                    return False
                crc, left, offset = zlib.crc32(data, crc), left - len(data), offset + len(data)
    except OSError:
        return False
    return crc == record.crc


def finished_jobs(plan: Plan, records: Iterable[Record]) -> list[int]:
    """The jobs of which `records` cover every output."""
    ranges = _merged(records)
    return [
        number
        for number, job in enumerate(plan.jobs)
        if all(
            _covers(ranges.get(plan.file(output, plan.tensors[job.tensor].shard), []), span)
            for span in [_span(plan, number)]
            for output in range(len(plan.outputs))
        )
    ]


def _span(plan: Plan, number: int) -> tuple[int, int]:
    """Where a job's result begins and ends in its shard."""
    job = plan.jobs[number]
    tensor = plan.tensors[job.tensor]
    size = tensor.dtype.itemsize
    return tensor.offset + job.start * size, tensor.offset + job.stop * size


def _merged(records: Iterable[Record]) -> dict[int, list[tuple[int, int]]]:
    """The ranges of each file, ascending, those that touch made one."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for record in sorted(records):
        known = ranges.setdefault(record.file, [])
        start, stop = record.offset, record.offset + record.length
        if known and start <= known[-1][1]:
            known[-1] = (known[-1][0], max(known[-1][1], stop))
        else:
            known.append((start, stop))
    return ranges


def _covers(ranges: Sequence[tuple[int, int]], span: tuple[int, int]) -> bool:
    place = bisect_right(ranges, (span[0], float("inf"))) - 1
    return place >= 0 and ranges[place][1] >= span[1]
