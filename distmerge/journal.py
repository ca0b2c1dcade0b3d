"""What is on the disk already: a line for every range of a shard that was written.

A line is trusted only if the disk still has the checksum that it gives. So nothing has to be
synced before the line is written: what a power cut took is written again.

Where a shard is written from its start on, as it mostly is, the checksum is its sha256 so far,
which the writer knows; elsewhere it is a CRC-32 of the range, which costs time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distmerge.planner import Plan
from distmerge.spec import OutputShard

SYNC_SECONDS = 30.0
"""Between two syncs of a journal: a power cut loses no more than what was done meanwhile."""

_CHUNK = 8 * 2**20
_PREFIX = "written-"
_LINE = re.compile(r"(\d{1,19}) (\d{1,19}) (\d{1,19}) (crc:[0-9a-f]{8}|sha:[0-9a-f]{32})\n")


class Record(NamedTuple):
    """`length` bytes at `offset` of Plan.files[file] were written.

    `checksum` is 'crc:' and the CRC-32 of the range, or 'sha:' and (half of) the sha256 of the file
    from its start to the end of the range; both in hex.
    """

    file: int
    offset: int
    length: int
    checksum: str

    @property
    def stop(self) -> int:
        return self.offset + self.length


def crc_checksum(data: memoryview) -> str:
    return f"crc:{zlib.crc32(data):08x}"


def sha_checksum(digest: bytes) -> str:
    return f"sha:{digest.hex()[:32]}"


class Journal:
    """Takes down what this rank writes, in a file of its own in `folder`."""

    def __init__(self, folder: Path, name: str):
        path = folder / f"{_PREFIX}{name}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._synced = time.monotonic()

    def add(self, record: Record) -> None:
        line = f"{record.file} {record.offset} {record.length} {record.checksum}\n"
        if os.write(self._file, line.encode()) < len(line):  # what follows would join it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        os.close(self._file)
        self._file = -1  # a thread that still writes must not get at another file


def read_journals(folder: Path) -> list[Record]:
    """All records of earlier attempts; what is not a whole line (a kill, a full disk) is none."""
    found: dict[Record, None] = {}
    for path in sorted(folder.glob(f"{_PREFIX}*")):
        for line in path.read_bytes().decode("ascii", "replace").splitlines(keepends=True):
            if match := _LINE.fullmatch(line):
                found[Record(int(match[1]), int(match[2]), int(match[3]), match[4])] = None
    return list(found)


def sound_records(
    records: Iterable[Record], folder: Path, files: Sequence[OutputShard]
) -> Iterator[Record]:
    """Those of `records` whose ranges still have their checksums."""
    by_file: dict[int, list[Record]] = {}
    for record in records:
        if record.file < len(files) and record.stop <= files[record.file].size:
            by_file.setdefault(record.file, []).append(record)
    for number, listed in by_file.items():
        try:
            with (folder / files[number].name).open("rb", buffering=0) as file:
                yield from _sound_ranges(file.fileno(), listed)
                yield from _sound_start(file.fileno(), listed)
        except OSError:
            continue


def _sound_ranges(file: int, records: Iterable[Record]) -> Iterator[Record]:
    for record in (r for r in records if r.checksum.startswith("crc:")):
        if record.checksum == crc_of(file, record.offset, record.stop):
            yield record


def crc_of(file: int, start: int, stop: int) -> str:
    """The checksum of bytes start..stop of a file."""
    crc = 0
    for data in _read(file, start, stop):
        crc = zlib.crc32(data, crc)
    return f"crc:{crc:08x}"


def _sound_start(file: int, records: Iterable[Record]) -> list[Record]:
    """The records up to the last that the file's sha256 confirms: it covers all before."""
    chain = sorted((r for r in records if r.checksum.startswith("sha:")), key=lambda r: r.stop)
    digest, position, sound = hashlib.sha256(), 0, 0
    for count, record in enumerate(chain, 1):
        for data in _read(file, position, record.stop):
            digest.update(data)
        position = record.stop
        if record.checksum == sha_checksum(digest.digest()):
            sound = count
    return chain[:sound]


def _read(file: int, start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        data = os.pread(file, min(stop - start, _CHUNK), start)
        if not data:
            return
        yield data
        start += len(data)


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
        start, stop = record.offset, record.stop
        if known and start <= known[-1][1]:
            known[-1] = (known[-1][0], max(known[-1][1], stop))
        else:
            known.append((start, stop))
    return ranges


def _covers(ranges: Sequence[tuple[int, int]], span: tuple[int, int]) -> bool:
    place = bisect_right(ranges, (span[0], float("inf"))) - 1
    return place >= 0 and ranges[place][1] >= span[1]
