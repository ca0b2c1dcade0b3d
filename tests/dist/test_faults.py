"""One rank fails or dies in the merge pass: all end soon, say why, and leave nothing behind.

Ranks end here as any Python program does, by joining their threads: the command line's way out
(os._exit) must not be what saves them.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import assembly, engine, monitor, passes
from distmerge.assembly import AssembleMode
from distmerge.errors import OutputError, PeerError, RunError
from distmerge.pipeline import Options
from distmerge.sources import reader
from distmerge.threads import Threads
from distmerge.writer import ShardWriter
from tests.dist import cases
from tests.dist.cases import Recipe, Tensors
from tests.support.ranks import Outcome, observe_ranks, run_ranks

LIMIT = 30.0
"""Seconds in which all ranks must have ended."""

PLACES: dict[str, tuple[object, str]] = {
    "read": (reader._Read, "read"),
    "compute": (engine, "weighted_sums"),
    "write": (ShardWriter, "write"),
}
"""What a rank calls when it reads, computes and writes a step."""


class Fault(NamedTuple):
    """What happens to rank `victim` of `ranks` at its second call of `place`."""

    kills: bool
    place: str
    victim: int
    assemble: AssembleMode
    ranks: int

    def __str__(self) -> str:
        return f"{self.place}-rank {self.victim} of {self.ranks}-{self.assemble}"


def faults(*, kills: bool) -> list[object]:
    """All combinations; half of the errors and a quarter of the deaths, which take longer, are not
    slow tests."""
    found: list[object] = []
    modes: list[AssembleMode] = ["direct", "gather"]
    settings = itertools.product(enumerate(PLACES), (0, 1), modes, (2, 3))
    for (number, place), victim, assemble, ranks in settings:
        fault = Fault(kills, place, victim, assemble, ranks)
        fast = (number + victim + (assemble == "gather") + ranks) % 2 and not (kills and ranks == 2)
        found.append(pytest.param(fault, id=str(fault), marks=[] if fast else [pytest.mark.slow]))
    return found


def merge_with_fault(recipe: Recipe, out: Path, fault: Fault, silence: float | None) -> None:
    """`silence` is how long a rank may be silent, where the true constant would take too long."""
    cases.cut()
    if silence is not None:
        mock.patch.multiple(monitor, SILENCE=silence, INTERVAL=silence / 10).start()
    if int(os.environ["RANK"]) == fault.victim:
        fail_at_second(*PLACES[fault.place], kills=fault.kills)
    options = Options(assemble=fault.assemble, read="pread", shard_size="150kB")
    distmerge.merge(recipe, out, options=options)


def fail_at_second(holder: object, name: str, *, kills: bool) -> None:
    """Make the second call of `holder.name` raise, or kill this process."""
    real: Callable[..., object] = getattr(holder, name)
    calls = itertools.count(1)

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) == 2:
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("injected")
        return real(*args, **kwargs)

    mock.patch.object(holder, name, failing).start()


def observe(
    fn: Callable[..., None], ranks: int, recipe: Recipe, folder: Path, *args: object
) -> list[Outcome[None]]:
    """How the ranks end that merge into a folder in `folder`; checks what holds for every fault:
    all end by themselves and in time, and there is no output, but what can be gone on with."""
    work = folder / "work"
    work.mkdir()
    outcomes = observe_ranks(fn, ranks, recipe, work / "out", *args, timeout=LIMIT)
    told = "\n".join(outcome.describe() for outcome in outcomes)
    assert not any(outcome.timed_out for outcome in outcomes), told
    assert all(outcome.failed for outcome in outcomes), told
    assert all(path.name.startswith(".out.distmerge-") for path in work.iterdir()), told
    return outcomes


def check_failure(outcomes: list[Outcome[None]], victim: int) -> None:
    """The victim has its own error; the others hear who failed, when, and of what."""
    for outcome in outcomes:
        if outcome.rank == victim:
            assert isinstance(outcome.error, ValueError), outcome.describe()
            continue
        assert isinstance(outcome.error, PeerError), outcome.describe()
        assert outcome.error.exit_code == 1
        assert str(outcome.error).startswith(f"rank {victim} on ")
        assert str(outcome.error).endswith(", merge: ValueError: injected")


def check_death(outcomes: list[Outcome[None]], victim: int) -> None:
    """The others notice it, and name the rank."""
    for outcome in outcomes:
        if outcome.rank == victim:
            assert outcome.exit_code == -signal.SIGKILL, outcome.describe()
            continue
        assert isinstance(outcome.error, PeerError), outcome.describe()
        assert f"rank {victim}" in str(outcome.error)
        assert "was it killed?" in str(outcome.error)


@pytest.mark.parametrize("fault", faults(kills=False))
def test_an_error_on_one_rank_ends_all(fault: Fault, tmp_path: Path) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    outcomes = observe(merge_with_fault, fault.ranks, recipe, tmp_path, fault, 5)
    check_failure(outcomes, fault.victim)


@pytest.mark.parametrize("fault", faults(kills=True))
def test_the_death_of_one_rank_ends_all(fault: Fault, tmp_path: Path) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    outcomes = observe(merge_with_fault, fault.ranks, recipe, tmp_path, fault, 2)
    check_death(outcomes, fault.victim)


@pytest.mark.slow
@pytest.mark.parametrize("assemble", ["direct", "gather"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_is_noticed_in_time_with_the_true_constants(
    tmp_path: Path, victim: int, assemble: AssembleMode
) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    fault = Fault(True, "compute", victim, assemble, 3)
    outcomes = observe(merge_with_fault, 3, recipe, tmp_path, fault, None)
    check_death(outcomes, victim)


def many(random: torch.Generator) -> Tensors:
    return {f"t{n:02}": torch.randn(400_000, generator=random) for n in range(30)}


def gather_with_error(recipe: Recipe, out: Path, victim: int) -> None:
    """Messages are too large to leave before their receiver takes them."""
    mock.patch.object(monitor, "INTERVAL", 0.2).start()
    if int(os.environ["RANK"]) == victim:
        fail_at_second(*PLACES["compute"], kills=False)
    options = Options(assemble="gather", shard_size="2MB", memory="5MB")
    try:
        distmerge.merge(recipe, out, options=options)
    except Exception:
        check_threads_end()
        raise


def check_threads_end() -> None:
    """None of ours is left within two seconds."""
    deadline = time.monotonic() + 2
    names = {"read", "write", "receive", "hash", "monitor"}
    while left := [thread.name for thread in threading.enumerate() if thread.name in names]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 2])
def test_threads_that_wait_for_bytes_end_with_the_merge(tmp_path: Path, victim: int) -> None:
    """After the error, two ranks send to each other what neither takes any more. A caller that
    goes on would keep their buffers; one that ends could die of their late awakening."""
    recipe = cases.write_steps(tmp_path / "in", many, count=2)
    check_failure(observe(gather_with_error, 3, recipe, tmp_path, victim), victim)


def hang_in_thread() -> int:
    """A thread that is never through, as in a call to a network file system that is gone."""
    threads = Threads(2, "read")
    threads.submit(threading.Event().wait)
    result = threads.submit(lambda: 42).result(timeout=10)
    threads.close()
    return result


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    """Python would join a thread of concurrent.futures.ThreadPoolExecutor for ever."""
    assert run_ranks(hang_in_thread, 1, timeout=10) == [42]


def merge_with_full_disk(recipe: Recipe, out: Path) -> None:
    cases.cut()
    if os.environ["RANK"] == "1":
        full = OSError(errno.ENOSPC, "No space left on device")
        mock.patch.object(os, "posix_fallocate", side_effect=full).start()
        mock.patch.object(os, "ftruncate", side_effect=full).start()
    distmerge.merge(recipe, out, options=Options(shard_size="150kB"))


def test_a_full_disk_on_one_host_is_the_users_to_mend_on_all(tmp_path: Path) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    for outcome in observe(merge_with_full_disk, 3, recipe, tmp_path):
        kind = OutputError if outcome.rank == 1 else PeerError
        assert isinstance(outcome.error, kind), outcome.describe()
        assert outcome.error.exit_code == 2
        assert outcome.error.reported == (outcome.rank > 0)
        assert "no space left for model-" in str(outcome.error)
        assert ("rank 1 on " in str(outcome.error)) == (outcome.rank != 1)


def merge_with_error_between_phases(recipe: Recipe, out: Path, victim: int) -> None:
    def failing(*args: object, **kwargs: object) -> NoReturn:
        raise ValueError("injected")

    mock.patch.object(monitor, "INTERVAL", 0.2).start()
    mock.patch.object(assembly, "_PATIENCE", 0.2).start()
    if int(os.environ["RANK"]) == victim:
        mock.patch.object(passes, "assign", failing).start()
    distmerge.merge(recipe, out)


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_outside_any_phase_is_heard_of_too(tmp_path: Path, victim: int) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    for outcome in observe(merge_with_error_between_phases, 3, recipe, tmp_path, victim):
        assert outcome.seconds < monitor.SILENCE
        assert isinstance(outcome.error, ValueError if outcome.rank == victim else PeerError)
        assert str(outcome.error).endswith("injected"), outcome.describe()


def gather_with_lost_bytes(recipe: Recipe, out: Path) -> None:
    """Rank 1's receiver meets a broken connection, though nobody has failed."""
    cases.cut()
    mock.patch.multiple(monitor, SILENCE=0.5, INTERVAL=0.1).start()
    if os.environ["RANK"] == "1":
        broken = mock.patch("torch.distributed.recv", side_effect=RuntimeError("Read timeout"))
        broken.start()
    distmerge.merge(recipe, out, options=Options(assemble="gather", shard_size="150kB"))


def test_a_connection_that_breaks_by_itself_ends_all(tmp_path: Path) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    outcomes = observe(gather_with_lost_bytes, 3, recipe, tmp_path)
    assert [type(outcome.error) for outcome in outcomes] == [PeerError, RunError, PeerError]
    assert all("lost the connection to rank" in str(outcome.error) for outcome in outcomes)


def merge_with_hanging_read(recipe: Recipe, out: Path, victim: int) -> None:
    """As on a network file system whose server is gone: the call never returns."""
    cases.cut()
    mock.patch.object(monitor, "INTERVAL", 0.1).start()
    if int(os.environ.get("RANK", "0")) == victim:  # one process alone has no RANK
        hanging = mock.patch.object(reader._Read, "read", side_effect=lambda *_: time.sleep(60))
        hanging.start()
    distmerge.merge(recipe, out, options=Options(read="pread", timeout=1.5))


@pytest.mark.parametrize(("ranks", "victim"), [(1, 0), (3, 1)])
def test_a_rank_that_hangs_is_named_with_what_it_did(
    tmp_path: Path, ranks: int, victim: int
) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    for outcome in observe(merge_with_hanging_read, ranks, recipe, tmp_path, victim):
        told = str(outcome.error)
        assert "merge: nothing was read or written for 1.5 s" in told
        assert ("rank 1 on " in told) == (ranks > 1)
