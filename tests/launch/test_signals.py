"""SIGTERM and SIGINT at the command: how it ends, and that the same command goes on."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest

from tests.launch.trio import SHARDS, Trio, digests, merging, reads
from tests.support.processes import (
    SCRIPTS,
    environment,
    finish,
    run,
    slow_writes,
    start,
    wait_for_writers,
)

SLOW_END = """
import os, time

leave = os._exit

def slow(code):
    open(os.path.join(os.environ["MARKS"], "leaving"), "w").close()
    time.sleep(float(os.environ["LEAVES_IN"]))
    leave(code)

os._exit = slow
"""
"""For sitecustomize: the way out takes a while, so that a second signal meets the process there."""


def wait_for(path: Path, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def interrupted(
    trio: Trio, folder: Path, numbers: list[signal.Signals], leaves_in: float = 0.0
) -> tuple[int, str]:
    """Exit code and standard error of a run that gets `numbers`, one after another."""
    slow = slow_writes(folder / "slow")
    hook = folder / "slow/hook/sitecustomize.py"
    hook.write_text(hook.read_text() + SLOW_END)
    env = environment(**slow, LEAVES_IN=str(leaves_in))
    under_way = start(merging(trio, folder / "results/out"), env)
    try:
        wait_for_writers(folder / "slow", 1)
        wait_for_line(folder / "results")
        for number in numbers:
            under_way.send_signal(number)
            wait_for(folder / "slow/marks/leaving")
    finally:
        done = finish(under_way, timeout=20)
    return done.returncode, done.stderr


def wait_for_line(results: Path, timeout: float = 30) -> None:
    """Something is done that is worth to be kept."""
    deadline = time.monotonic() + timeout
    while not any(path.stat().st_size for path in results.glob(".out.*.state/written-*")):
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
    ],
)
def test_a_signal_stops_a_run_and_the_same_command_goes_on(
    trio: Trio, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    ended, said = interrupted(trio, tmp_path, [number])
    assert ended == code
    out = tmp_path / "results/out"
    assert said.splitlines() == [
        f"{out}: what is done is kept; the same command goes on with it, --restart starts anew",
        f"error: stopped by {number.name}; OUT is complete or as it was before",
        f"to go on: {shlex.join(['distmerge', *map(str, merging(trio, out)[1:])])}",
    ]
    assert not out.exists()

    done = run(merging(trio, out), environment())

    assert done.returncode == 0
    assert re.fullmatch(r"going on: [\d.]+ kB were written before\n", done.stderr)
    assert digests(out) == trio.digests
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert reads(done.stdout) < reads(trio.alone.stdout)


@pytest.mark.slow
def test_two_sigterms_are_one(trio: Trio, tmp_path: Path) -> None:
    """Launchers send a second while the first is being obeyed."""
    code, said = interrupted(trio, tmp_path, [signal.SIGTERM, signal.SIGTERM], 1.0)
    assert code == 143
    assert said.count("stopped by SIGTERM") == 1


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(trio: Trio, tmp_path: Path) -> None:
    started = time.monotonic()
    code, _ = interrupted(trio, tmp_path, [signal.SIGINT, signal.SIGINT], 60.0)
    assert code == -signal.SIGINT
    assert time.monotonic() - started < 50


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_under_torchrun_too(trio: Trio, tmp_path: Path, number: signal.Signals, whom: str) -> None:
    """A scheduler signals torchrun or all of its processes, as a terminal does."""
    env = environment(RANKS_PER_NODE="2", **slow_writes(tmp_path / "slow"))
    results = tmp_path / "results"
    command: list[str | Path] = [SCRIPTS / "torchrun.sh", trio.recipe, results / "out", *SHARDS]
    under_way = start(command, env)
    try:
        ranks = wait_for_writers(tmp_path / "slow", 2)
        wait_for_line(results)
        if whom == "all":
            os.killpg(under_way.pid, number)
        else:
            under_way.send_signal(number)
    finally:
        done = finish(under_way, timeout=30)
    assert done.returncode != 0
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    assert not (results / "out").exists()

    again = run(command, environment(RANKS_PER_NODE="3"))

    assert again.returncode == 0, again.stderr
    assert digests(results / "out") == trio.digests
    assert [path.name for path in results.iterdir()] == ["out"]
    assert reads(again.stdout) < reads(trio.alone.stdout)
