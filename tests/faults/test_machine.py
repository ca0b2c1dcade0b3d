"""Faults of the machine, by real means: disks that fill up, read-only mounts, read errors, ranks
that stop and wake up, two runs at once.

Each has one message, an exit code, nothing half-done at OUT, and is gone on with where it can be.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml

from distmerge import engine, meeting, monitor, passes, writer
from distmerge.methods.average import weighted_sums
from distmerge.pipeline import Options
from distmerge.writer import ShardWriter
from tests.dist import cases
from tests.dist.cases import Recipe, Tensors, fingerprints
from tests.support.commands import merge_command
from tests.support.processes import BIN, environment, run
from tests.support.ranks import Outcome, observe_ranks, run_ranks

SHARDS = Options(shard_size="150kB")
MEGABYTE = 2**20
ROOM = 80 * MEGABYTE
"""Of a disk on which the outputs and what must be spare fit."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return cases.write_steps(tmp_path_factory.mktemp("small"), cases.small, count=2)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(cases.merge_cut, 1, recipe, out, SHARDS)
    return fingerprints(out)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={ROOM}", "none", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def mount(*arguments: object) -> None:
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("NOT TESTED: only root can mount a small disk")
    done = subprocess.run(
        ["mount", *map(str, arguments)], check=False, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"NOT TESTED: mount is refused here: {done.stderr}")


def fill(disk: Path, *, leave: int = 0) -> None:
    """What another program writes: all but `leave` bytes of the disk, even if others write too."""
    size = 0
    with (disk / "filler").open("wb") as file:
        while (more := shutil.disk_usage(disk).free - leave) > 0:
            with suppress(OSError):
                os.posix_fallocate(file.fileno(), size, more)
                size += more


def merge(recipe: Recipe, out: Path, *more: str) -> None:
    """The command, with small jobs."""
    cases.cut()
    path = out.parent.with_name("recipe.yaml")
    path.with_suffix(f".{os.getpid()}").write_text(yaml.safe_dump(recipe))
    path.with_suffix(f".{os.getpid()}").replace(path)
    merge_command([str(path), str(out), "--quiet", "--shard-size", "150kB", *more])


def run_merge(recipe: Recipe, out: Path, ranks: int = 1) -> list[Outcome[None]]:
    return observe_ranks(merge, ranks, recipe, out)


def check(outcomes: list[Outcome[None]], code: int, message: str) -> None:
    """All end with `code`, and one says why."""
    told = "\n".join(outcome.describe() for outcome in outcomes)
    assert [outcome.exit_code for outcome in outcomes] == [code] * len(outcomes), told
    assert sum(outcome.stderr.count(message) for outcome in outcomes) == 1, told
    assert "Traceback" not in told


def check_gone_on(recipe: Recipe, out: Path, undisturbed: dict[str, str], ranks: int = 2) -> None:
    for outcome in run_merge(recipe, out, ranks):
        assert outcome.exit_code == 0, outcome.describe()
    assert fingerprints(out) == undisturbed
    assert not list(out.parent.glob(".out*"))


def test_a_disk_that_is_full_before_is_the_users_to_mend(
    recipe: Recipe, undisturbed: dict[str, str], disk: Path
) -> None:
    fill(disk, leave=10 * MEGABYTE)
    check(run_merge(recipe, disk / "out", 2), 2, f"{disk}: 67.4 MB are needed, 10.5 MB are free")
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    check_gone_on(recipe, disk / "out", undisturbed)


def merge_on_a_disk_that_fills(recipe: Recipe, out: Path, holder: str, call: int) -> None:
    """Before call number `call` of rank 0, another program takes what is left."""
    targets = {"create": (passes, "create_shards"), "write": (ShardWriter, "write")}
    place, name = targets[holder]
    real: Callable[..., object] = getattr(place, name)
    calls = itertools.count(1)

    def filling(*args: object) -> object:
        if next(calls) == call:
            fill(out.parent)
        return real(*args)

    if os.environ.get("RANK", "0") == "0":
        mock.patch.object(place, name, filling).start()
    mock.patch.object(writer, "is_local", return_value=holder == "create").start()
    merge(recipe, out)


def test_a_disk_that_fills_up_before_its_room_is_reserved(
    recipe: Recipe, undisturbed: dict[str, str], disk: Path
) -> None:
    outcomes = observe_ranks(merge_on_a_disk_that_fills, 2, recipe, disk / "out", "create", 1)
    check(outcomes, 2, "no space left for model-")
    assert [path.name for path in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    check_gone_on(recipe, disk / "out", undisturbed)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_disk_that_fills_up_in_the_middle_costs_nothing_that_is_done(
    recipe: Recipe, undisturbed: dict[str, str], disk: Path, ranks: int
) -> None:
    """On a file system where room can't be reserved."""
    out = disk / "out"
    outcomes = observe_ranks(merge_on_a_disk_that_fills, ranks, recipe, out, "write", 2)
    check(outcomes, 1, "No space left on device")
    (state,) = disk.glob(".out.distmerge-*.state")
    before = (state / "identity.json").stat().st_mtime_ns
    check(run_merge(recipe, out), 2, " MB are needed, ")
    assert not out.exists()
    (disk / "filler").unlink()
    assert (state / "identity.json").stat().st_mtime_ns == before, "it is the same attempt"
    assert any(path.stat().st_size for path in state.glob("written-*"))
    check_gone_on(recipe, out, undisturbed)


def test_a_disk_that_can_only_be_read(
    recipe: Recipe, undisturbed: dict[str, str], disk: Path
) -> None:
    mount("-o", "remount,ro", disk)
    check(run_merge(recipe, disk / "out"), 2, f"{disk}: can't be written: Read-only file system")
    mount("-o", "remount,rw", disk)
    assert not list(disk.iterdir())
    check_gone_on(recipe, disk / "out", undisturbed)


def test_a_disk_that_can_only_be_read_any_more_keeps_what_is_done(
    recipe: Recipe, undisturbed: dict[str, str], disk: Path
) -> None:
    """As a file system does that has met an error: the same command goes on once that is mended."""
    out = disk / "out"
    observe_ranks(merge_on_a_disk_that_fills, 1, recipe, out, "write", 3)
    (disk / "filler").unlink()
    mount("-o", "remount,ro", disk)
    check(run_merge(recipe, out), 2, "can't be written: Read-only file system")
    mount("-o", "remount,rw", disk)
    assert any(path.stat().st_size for path in disk.glob(".out.*.state/written-*"))
    check_gone_on(recipe, out, undisturbed)


READ_ERROR = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int bad(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    const char *wanted = getenv("BAD_FILE");
    return wanted && !strcmp(path, wanted);
}

#define SHIM(name, arguments, pass) \\
    ssize_t name arguments { \\
        static ssize_t (*real) arguments; \\
        if (!real) real = dlsym(RTLD_NEXT, #name); \\
        if (bad(fd)) { errno = EIO; return -1; } \\
        return real pass; \\
    }

SHIM(preadv, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset))
SHIM(preadv64, (int fd, const struct iovec *v, int n, off_t offset), (fd, v, n, offset))
SHIM(preadv2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f))
SHIM(preadv64v2, (int fd, const struct iovec *v, int n, off_t offset, int f), (fd, v, n, offset, f))
"""
"""A library whose reads of $BAD_FILE fail, as those of a bad disk do."""


def many(random: torch.Generator) -> Tensors:
    return {f"t{n}": torch.randn(10_000, generator=random) for n in range(8)}


@pytest.mark.slow
def test_a_read_error_names_the_file_and_costs_nothing_that_is_done(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("NOT TESTED: no gcc here to make a library whose reads fail")
    (tmp_path / "bad.c").write_text(READ_ERROR)
    library = tmp_path / "bad.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "bad.c", "-ldl"], check=True
    )
    recipe = cases.write_steps(tmp_path / "in", many, count=2, shards=8)
    path, out = tmp_path / "r.yaml", tmp_path / "work/out"
    path.write_text(yaml.safe_dump(recipe))
    command: list[str | Path] = [BIN / "distmerge", "merge", path, out, "--read", "pread"]
    bad = tmp_path / "in/step-1/model-00008-of-00008.safetensors"

    done = run(command, environment(LD_PRELOAD=str(library), BAD_FILE=str(bad)))

    assert done.returncode == 1
    kept, told = done.stderr.splitlines()
    assert kept.startswith(f"{out}: what is done is kept; the same command goes on with it")
    assert told == f"error: {bad}: read error at byte 0: Input/output error"
    assert not out.exists()
    again, fresh = run(command, environment()), tmp_path / "fresh"
    assert (again.returncode, again.stderr[:9]) == (0, "going on:")
    assert run([*command[:3], fresh], environment()).returncode == 0
    assert fingerprints(out) == fingerprints(fresh)


def merge_and_stop(recipe: Recipe, out: Path, marks: Path, victim: int) -> None:
    """Rank `victim` stops at its second step, as under a debugger or in a frozen container."""
    mock.patch.multiple(monitor, SILENCE=1.5, INTERVAL=0.15, GRACE=1).start()
    mock.patch.object(meeting, "STORE_TIMEOUT", timedelta(seconds=1)).start()
    (marks / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    calls = itertools.count(1)

    def stopping(*args: Any, **kwargs: Any) -> list[bool]:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGSTOP)
        return weighted_sums(*args, **kwargs)

    if os.environ["RANK"] == str(victim):
        mock.patch.object(engine, "weighted_sums", stopping).start()
    cases.merge_cut(recipe, out, SHARDS)


def is_alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_stops_is_named_and_harms_nothing_when_it_wakes_up(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path, victim: int
) -> None:
    """It sleeps while the others end and the same command goes on. The first rank sleeps with the
    lock, so nobody goes on before it has woken up."""
    out, ends = tmp_path / "work/out", list[Outcome[None]]()
    args = (recipe, out, tmp_path, victim)
    thread = threading.Thread(
        target=lambda: ends.extend(observe_ranks(merge_and_stop, 3, *args, timeout=50))
    )
    thread.start()
    marks = [tmp_path / f"{rank}.pid" for rank in range(3)]
    wait_for(lambda: all(mark.is_file() and mark.read_text() for mark in marks))
    processes = [int(mark.read_text()) for mark in marks]
    try:
        wait_for(lambda: [is_alive(p) for p in processes] == [r == victim for r in range(3)])
        assert not out.exists()
        if victim:
            run_ranks(cases.merge_cut, 2, recipe, out, SHARDS)
            assert fingerprints(out) == undisturbed
        else:
            check(run_merge(recipe, out), 2, f"another run is writing it (process {processes[0]}")
    finally:
        os.kill(processes[victim], signal.SIGCONT)
        thread.join()
    for outcome in ends:
        assert (outcome.exit_code, outcome.timed_out) == (1, False), outcome.describe()
        if outcome.rank != victim:
            assert f"rank {victim}" in outcome.describe()
            assert "was it killed?" in outcome.describe()
    if not victim:
        run_ranks(cases.merge_cut, 2, recipe, out, SHARDS)
    assert fingerprints(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.05)


def merge_and_wait(recipe: Recipe, out: Path, marks: Path) -> None:
    """Wait in the second write until the file `go` is there."""
    real, calls = ShardWriter.write, itertools.count(1)

    def waiting(*args: object) -> object:
        if next(calls) == 2:
            (marks / "waits").write_text(str(os.getpid()))
            while not (marks / "go").exists():
                time.sleep(0.02)
        return real(*args)  # type: ignore[arg-type]

    mock.patch.object(ShardWriter, "write", waiting).start()
    cases.merge_cut(recipe, out, SHARDS)


@pytest.mark.parametrize("other", [False, True], ids=["same recipe", "other recipe"])
def test_two_runs_do_not_write_one_output(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path, other: bool
) -> None:
    """The second is refused and names the first, which finishes undisturbed."""
    out, ends = tmp_path / "work/out", list[Outcome[None]]()
    thread = threading.Thread(
        target=lambda: ends.extend(observe_ranks(merge_and_wait, 1, recipe, out, tmp_path))
    )
    thread.start()
    try:
        wait_for((tmp_path / "waits").exists)
        holder = (tmp_path / "waits").read_text()
        before = sorted(path.name for path in out.parent.iterdir())
        second: Recipe = {**recipe, "dtype": "float64"} if other else recipe
        message = f"error: {out}: another run is writing it (process {holder} on "
        check(run_merge(second, out, 2), 2, message)
        assert sorted(path.name for path in out.parent.iterdir()) == before
    finally:
        (tmp_path / "go").touch()
        thread.join()
    assert not ends[0].failed, ends[0].describe()
    assert fingerprints(out) == undisturbed
    assert [path.name for path in out.parent.iterdir()] == ["out"]
