"""How a run ends and what it prints: alone, on a terminal, after a mistake, a kill, a signal."""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from tests.launch.trio import SHARDS, Trio, merging, slurm_step
from tests.support.checkpoints import average_recipe, linear_recipe, write_checkpoint, write_recipe
from tests.support.processes import (
    BIN,
    SCRIPTS,
    environment,
    finish,
    free_port,
    run,
    slow_writes,
    start,
    wait_for_writers,
)


def test_one_process_writes_several_shards(trio: Trio) -> None:
    shards = [name for name in trio.digests if name.endswith(".safetensors")]
    assert len(shards) == 4
    assert "1 rank" in trio.alone.stdout


def test_away_from_a_terminal_a_short_merge_prints_its_summary_and_no_bar(trio: Trio) -> None:
    assert trio.alone.stderr == ""
    first, second = trio.alone.stdout.splitlines()
    assert first.endswith("alone: 40 tensors in 4 shards, 185 kB")
    assert second.startswith("read 507 kB, wrote 185 kB in ")


def test_on_a_terminal_there_is_a_bar(trio: Trio, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = merging(trio, tmp_path / "out")
    done = subprocess.run(
        command, env=environment(), stdout=PIPE, stderr=theirs, check=False, timeout=60
    )
    os.set_blocking(ours, False)
    shown = os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)

    assert done.returncode == 0
    assert b"\rmerge:   0%|" in shown


@pytest.mark.slow
def test_away_from_a_terminal_a_long_merge_prints_lines(trio: Trio, tmp_path: Path) -> None:
    env = environment(**slow_writes(tmp_path / "slow"))

    done = run(merging(trio, tmp_path / "out"), env)

    assert done.returncode == 0
    assert done.stderr.splitlines(), "it takes longer than the ten seconds to the first line"
    line = re.compile(r"merge: \d+ kB of 676 kB, [\d.e+]+ k?B/s, \d+ s left")
    assert [text for text in done.stderr.splitlines() if not line.fullmatch(text)] == []


def misspelled(folder: Path) -> Path:
    return write_recipe(folder / "r.yaml", average_recipe("x/step-*", more="normalise: true\n"))


def nan_at_the_end(folder: Path) -> Path:
    """The last of two ranks finds it."""
    good = {f"layers.{number}.weight": torch.ones(64, 33) for number in range(40)}
    bad = {**good, "layers.39.weight": torch.full((64, 33), torch.nan)}
    pair = [write_checkpoint(folder / "a", good), write_checkpoint(folder / "b", bad)]
    return write_recipe(folder / "r.yaml", linear_recipe(dict.fromkeys(pair, 0.5)))


def test_a_mistake_in_the_recipe_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    recipe = misspelled(tmp_path)

    done = run([BIN / "distmerge", "merge", recipe, tmp_path / "out"], environment())

    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "normalise: unknown key" in done.stderr
    assert sorted(tmp_path.iterdir()) == [recipe]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (misspelled, "normalise: unknown key"),
        (nan_at_the_end, "holds 2112 NaN or Inf"),
    ],
    ids=["recipe", "last rank's input"],
)
def test_under_torchrun_a_mistake_is_told_once(
    tmp_path: Path, make: Callable[[Path], Path], message: str
) -> None:
    recipe, out = make(tmp_path), tmp_path / "out"
    before = sorted(tmp_path.iterdir())

    done = run([SCRIPTS / "torchrun.sh", recipe, out], environment(RANKS_PER_NODE="2"))

    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(message) == 1, done.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_torchrun_ends_soon_after_a_rank_was_killed_without_an_output(
    trio: Trio, victim: int, tmp_path: Path
) -> None:
    env = environment(RANKS_PER_NODE="2", **slow_writes(tmp_path / "slow"))
    results = tmp_path / "results"
    under_way = start([SCRIPTS / "torchrun.sh", trio.recipe, results / "out", *SHARDS], env)
    try:
        ranks = wait_for_writers(tmp_path / "slow", 2)
        assert list(results.glob(".out.*")), "it is under way"
        os.kill(ranks[victim], signal.SIGKILL)
    finally:
        done = finish(under_way, timeout=30)

    assert done.returncode == 1
    assert not (results / "out").exists()


@pytest.mark.slow
def test_a_rank_that_no_launcher_watches_notices_that_another_was_killed(
    trio: Trio, tmp_path: Path
) -> None:
    results, job = tmp_path / "results", free_port() - 20000
    command = merging(trio, results / "out")
    slow = slow_writes(tmp_path / "slow")
    started = [start(command, {**slurm_step(r, 2, job), **slow, "RANK": str(r)}) for r in range(2)]
    try:
        os.kill(wait_for_writers(tmp_path / "slow", 2)[1], signal.SIGKILL)
    finally:
        survivor, victim = (finish(rank, timeout=40) for rank in started)

    assert victim.returncode == -signal.SIGKILL
    assert survivor.returncode == 1
    assert survivor.stderr.count("rank 1") == 1, survivor.stderr
    assert "Traceback" not in survivor.stderr
    assert all(path.name.startswith(".out.distmerge-") for path in results.iterdir())


def test_sigterm_stops_a_lone_run_without_an_output(trio: Trio, tmp_path: Path) -> None:
    env = environment(**slow_writes(tmp_path / "slow"))
    results = tmp_path / "results"
    under_way = start(merging(trio, results / "out"), env)
    try:
        wait_for_writers(tmp_path / "slow", 1)
        assert list(results.glob(".out.*")), "it is under way"
        under_way.terminate()
    finally:
        done = finish(under_way, timeout=30)

    assert done.returncode == 143
    said = "error: stopped by SIGTERM; OUT is complete or as it was before"
    assert said in done.stderr.splitlines()
    assert all(path.name.startswith(".out.distmerge-") for path in results.iterdir())
