"""Threads that are late on a busy machine, or still at work when the rest has failed."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from distmerge import command, writer
from distmerge.command import run_command
from distmerge.errors import RunError
from distmerge.spec import OutputShard
from distmerge.threads import Threads
from distmerge.writer import ShardWriter, create_shards


class Late(Threads):
    """Whose threads begin when the command has ended."""

    def _work(self) -> None:
        time.sleep(0.3)
        super()._work()


def test_what_a_fast_command_prints_is_read_by_late_threads() -> None:
    """They were told to end before they had begun: a busy machine failed a sound evaluation."""
    with mock.patch.object(command, "Threads", Late):
        found = run_command(["echo", "0.5"], Path("x"), environment=dict(os.environ))
    assert found == 0.5


def start_slow_write(folder: Path, goes_on: threading.Event) -> tuple[ShardWriter, Threads]:
    """A thread is in the middle of a write, which then waits for `goes_on`."""
    shard = OutputShard(name="a", header=b"", size=8)
    create_shards(folder, [shard], [0])
    sink = ShardWriter(folder, [shard], None)
    began, real = threading.Event(), os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        began.set()
        goes_on.wait(10)
        return real(descriptor, data, offset)

    threads = Threads(1, "write")
    with mock.patch.object(os, "pwrite", slow):
        threads.submit(sink.write, 0, 0, torch.ones(8, dtype=torch.uint8))
        assert began.wait(10)
    return sink, threads


def test_a_writer_closes_its_files_after_the_write_that_is_under_way(tmp_path: Path) -> None:
    """Its descriptors could be another file's by then: the merge's bytes would go there."""
    goes_on = threading.Event()
    sink, threads = start_slow_write(tmp_path, goes_on)
    threading.Timer(0.2, goes_on.set).start()
    sink.close()
    threads.close()
    assert goes_on.is_set()
    assert (tmp_path / "a").read_bytes() == b"\1" * 8
    with pytest.raises(RunError, match="the merge has ended"):
        sink.write(0, 0, torch.zeros(8, dtype=torch.uint8))
    assert (tmp_path / "a").read_bytes() == b"\1" * 8


def test_a_write_that_hangs_keeps_its_files_and_nobody_waits_for_it(tmp_path: Path) -> None:
    goes_on = threading.Event()
    sink, threads = start_slow_write(tmp_path, goes_on)
    with mock.patch.object(writer, "_PATIENCE", 0.1):
        sink.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    goes_on.set()
    threads.submit(lambda: None).result(10)
    threads.close()
    os.close(other)
    assert (tmp_path / "other").read_bytes() == b""
    assert (tmp_path / "a").read_bytes() == b"\1" * 8
