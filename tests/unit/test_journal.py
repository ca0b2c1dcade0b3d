"""Journals of what is written: only whole, true lines count, whatever else lies in them."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distmerge
from distmerge import planner
from distmerge.document import Plain
from distmerge.journal import (
    Journal,
    Record,
    _covers,
    _merged,
    crc_checksum,
    finished_jobs,
    read_journals,
    sha_checksum,
    sound_records,
)
from distmerge.planner import Plan
from distmerge.spec import OutputShard
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import average

SHA = f"sha:{'0123456789abcdef' * 2}"
RECORDS = [
    Record(0, 100, 4096, "crc:deadbeef"),
    Record(3, 0, 1, SHA),
    Record(1, 2**40, 2**33, "crc:00000001"),
]


def write_journal(folder: Path, name: str, records: Sequence[Record]) -> Path:
    journal = Journal(folder, name)
    for record in records:
        journal.add(record)
    journal.sync()
    journal.close()
    return folder / f"written-{name}"


def test_what_is_taken_down_is_read_again(tmp_path: Path) -> None:
    write_journal(tmp_path, "0-aa", RECORDS[:2])
    write_journal(tmp_path, "1-bb", RECORDS[1:])
    assert read_journals(tmp_path) == RECORDS, "each once"


@pytest.mark.parametrize("kept", range(1, 60))
def test_a_torn_line_is_none(tmp_path: Path, kept: int) -> None:
    """A kill or a full disk may cut it anywhere."""
    path = write_journal(tmp_path, "0-aa", RECORDS[:2])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: min(first + kept, len(whole) - 1)])
    assert read_journals(tmp_path) == RECORDS[:1]


@pytest.mark.parametrize(
    "line",
    [
        b"0 1 2\n", b"0 1 2 3\n", b"0 1 2 00000000\n", b"0 1 2 crc:0000000g\n", b"\n",
        b"a 1 2 crc:00000000\n", b"0 1 2 crc:00000000 4\n", b"0  1 crc:00000000\n",
        b"0 1 2 crc:00000000\r\n", b"\xff\xfe \xff\n", b"0 1.5 2 crc:00000000\n",
        b"0 1 2 crc:000000000\n", b"0 1 2 sha:00000000\n", b"-1 1 2 crc:00000000\n",
        b"0 -1 2 crc:00000000\n", b"0 1 -2 crc:00000000\n", b"0 1_0 2 crc:00000000\n",
        b"0 10 crc:00 1 2 crc:00000000\n", b"\x00" * 50 + b"\n", b"0 1 2 crc:0000",
        b"0 1" + b"0" * 20 + b" 2 crc:00000000\n",
    ],
)  # fmt: skip
def test_a_foreign_line_is_none(tmp_path: Path, line: bytes) -> None:
    path = write_journal(tmp_path, "0-aa", RECORDS[:1])
    path.write_bytes(path.read_bytes() + line)
    assert read_journals(tmp_path) == RECORDS[:1]


def test_a_line_that_a_full_disk_cuts_ends_the_run(tmp_path: Path) -> None:
    """The next would join it, and both together could say what is not so."""
    journal = Journal(tmp_path, "0-aa")
    with (
        mock.patch.object(os, "write", return_value=3),
        pytest.raises(OSError, match="No space left") as raised,
    ):
        journal.add(RECORDS[0])
    assert raised.value.errno == errno.ENOSPC
    journal.close()


def sound(folder: Path, records: list[Record], size: int) -> list[Record]:
    return list(sound_records(records, folder, [OutputShard(name="a", header=b"", size=size)]))


def crc(data: bytes, start: int, stop: int) -> Record:
    return Record(0, start, stop - start, crc_checksum(memoryview(data)[start:stop]))


def sha(data: bytes, start: int, stop: int) -> Record:
    return Record(0, start, stop - start, sha_checksum(hashlib.sha256(data[:stop]).digest()))


DATA = bytes(range(256)) * 40


def test_a_range_is_sound_while_its_bytes_are(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(DATA)
    records = [
        make(DATA, start, stop)
        for make in (crc, sha)
        for start, stop in ((0, len(DATA)), (17, 4113), (len(DATA) - 1, len(DATA)), (5, 5))
    ]
    assert sorted(sound(tmp_path, records, len(DATA))) == sorted(records)
    wrong = [r._replace(checksum=r.checksum[:-1] + "xy"[r.checksum[-1] == "x"]) for r in records]
    assert sound(tmp_path, wrong, len(DATA)) == []
    one = crc(DATA, 100, 5100)
    for place, intact in ((99, True), (100, False), (3000, False), (5099, False), (5100, True)):
        changed = bytearray(DATA)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        assert sound(tmp_path, [one], len(DATA)) == [one] * intact
    path.write_bytes(DATA[:5099])
    assert sound(tmp_path, [one], len(DATA)) == [], "cut short"
    path.unlink()
    assert sound(tmp_path, [one], len(DATA)) == [], "gone"
    path.mkdir()
    assert sound(tmp_path, [one], len(DATA)) == [], "no file"


@pytest.mark.parametrize("place", [0, 999, 1000, 4500, 9999])
def test_of_a_shard_written_from_its_start_all_counts_before_the_first_damage(
    tmp_path: Path, place: int
) -> None:
    """Also where attempts in other steps have written it: their ranges overlap."""
    ends = [1000, 2000, 2500, 2500, 4000, 5000, 5001, 9000, 10000]
    chain = [sha(DATA, max(0, stop - 1000), stop) for stop in ends]
    changed = bytearray(DATA)
    changed[place] ^= 1
    (tmp_path / "a").write_bytes(changed)
    found = sound(tmp_path, chain[::-1], len(DATA))
    assert sorted(found) == sorted(record for record in chain if record.stop <= place)


@pytest.mark.parametrize("seen", [0, 1, 2])
def test_a_wrong_link_of_the_chain_is_overruled_by_a_later_true_one(
    tmp_path: Path, seen: int
) -> None:
    """That covers all bytes before it."""
    (tmp_path / "a").write_bytes(DATA)
    chain = [sha(DATA, stop - 1000, stop) for stop in (1000, 2000, 3000)]
    chain[seen] = chain[seen]._replace(checksum=SHA)
    assert sound(tmp_path, chain, len(DATA)) == chain[: 3 if seen < 2 else 2]


@pytest.mark.parametrize(
    "record",
    [
        Record(1, 0, 1, "crc:00000000"), Record(0, 99, 2, "crc:00000000"),
        Record(0, 101, 0, "crc:00000000"), Record(0, 2**62, 2**62, "crc:00000000"),
        Record(0, 10**19 - 1, 1, SHA), Record(10**19 - 1, 0, 1, SHA),
    ],
)  # fmt: skip
def test_a_range_that_no_file_has_is_not_sound(tmp_path: Path, record: Record) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    assert sound(tmp_path, [record], 100) == []


RANGES = st.lists(
    st.builds(Record, st.integers(0, 2), st.integers(0, 30), st.integers(0, 12), st.just(SHA)),
    max_size=12,
)


@given(RANGES, st.integers(0, 2), st.integers(0, 30), st.integers(1, 12))
def test_what_is_covered_is_what_every_byte_of_is(
    records: list[Record], file: int, start: int, length: int
) -> None:
    written = {(r.file, at) for r in records for at in range(r.offset, r.offset + r.length)}
    expected = all((file, at) in written for at in range(start, start + length))
    assert _covers(_merged(records).get(file, []), (start, start + length)) == expected


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two outputs of two shards, jobs of 7 elements, items of two and four bytes."""
    folder = tmp_path_factory.mktemp("plan")
    for step in (1, 2):
        tensors = {"a": torch.ones(33), "b": torch.ones(20).half(), "c": torch.ones(()),
                   "none": torch.ones(0), "d": torch.ones(5, 5).half()}  # fmt: skip
        write_checkpoint(folder / f"step-{step}", tensors)
    recipe: dict[str, Plain] = {**average(folder / "step-*"), "sweep": {"trajectory.last": [1, 2]}}
    with mock.patch.object(planner, "JOB_ELEMENTS", 7):
        return distmerge.plan(recipe, shard_size="150")


def bytes_of(plan: Plan, number: int) -> set[tuple[int, int]]:
    """What a job writes, as positions of files and bytes."""
    job = plan.jobs[number]
    tensor = plan.tensors[job.tensor]
    size = tensor.dtype.itemsize
    places = range(tensor.offset + job.start * size, tensor.offset + job.stop * size)
    outputs = range(len(plan.outputs))
    return {(plan.file(output, tensor.shard), at) for output in outputs for at in places}


@settings(max_examples=150)
@given(data=st.data())
def test_finished_is_a_job_whose_every_byte_is_written(plan: Plan, data: st.DataObject) -> None:
    """Ranges of attempts with other steps overlap, lie in each other and come twice."""
    assert len(plan.files) == 4
    ends = [sorted({0, f.size, *(t.offset for t in plan.tensors)}) for f in plan.files]
    records = []
    for _ in range(data.draw(st.integers(0, 16))):
        file = data.draw(st.integers(0, len(plan.files) - 1))
        near = st.sampled_from(ends[file])
        start = max(0, data.draw(near) + data.draw(st.integers(-3, 30)))
        length = data.draw(st.one_of(st.integers(0, 40), st.just(plan.files[file].size)))
        records.append(Record(file, start, length, SHA))
    written = {(r.file, at) for r in records for at in range(r.offset, r.offset + r.length)}
    expected = [n for n in range(len(plan.jobs)) if bytes_of(plan, n) <= written]
    assert finished_jobs(plan, records) == expected


def test_all_is_finished_where_all_is_written(plan: Plan) -> None:
    whole = [Record(number, 0, file.size, SHA) for number, file in enumerate(plan.files)]
    assert finished_jobs(plan, whole) == list(range(len(plan.jobs)))
    assert finished_jobs(plan, whole[1:]) != list(range(len(plan.jobs)))
    assert finished_jobs(plan, []) == []
