"""Processes as a user or a launcher starts them, with nothing of this test run's own launch."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "launch"
BIN = Path(sys.executable).parent

_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "CROSS_RANK", "MASTER_ADDR", "MASTER_PORT", "NODES")
_PREFIXES = ("SLURM_", "ACCELERATE_", "TORCHELASTIC_", "RANKS_PER_")

SLOW_WRITES = """
import os, pathlib, threading, time

write = os.pwrite

def slow(descriptor, data, offset):
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    mark = pathlib.Path(os.environ["MARKS"], rank)
    new = mark.with_suffix(f".{threading.get_ident()}")
    new.write_text(str(os.getpid()))
    new.rename(mark)
    time.sleep(float(os.environ["WRITE_SECONDS"]))
    return write(descriptor, data, offset)

os.pwrite = slow
"""
"""A sitecustomize: every write takes some time, and leaves the rank's process id."""


def environment(**variables: str) -> dict[str, str]:
    """This process's variables without a launcher's, with the venv first on PATH."""
    kept = {k: v for k, v in os.environ.items() if k not in _LAUNCH and not k.startswith(_PREFIXES)}
    path = f"{BIN}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "OMP_NUM_THREADS": "1", **variables}


def run(
    command: Sequence[str | Path], env: Mapping[str, str], timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run to the end, with both streams."""
    started = start(command, env)
    return finish(started, timeout)


def start(command: Sequence[str | Path], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start in a process group of its own, so that `finish` leaves no rank behind."""
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Wait, and end the process with its children where that takes longer than `timeout`."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def slow_writes(folder: Path, seconds: float = 0.25) -> dict[str, str]:
    """Variables that slow a run down; its ranks leave their process ids in `folder`/marks.

    Every write takes `seconds`.
    """
    marks, hook = folder / "marks", folder / "hook"
    marks.mkdir(parents=True)
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(SLOW_WRITES)
    return {"PYTHONPATH": str(hook), "MARKS": str(marks), "WRITE_SECONDS": str(seconds)}


def wait_for_writers(folder: Path, ranks: int, timeout: float = 40) -> dict[int, int]:
    """Process ids by rank, once all `ranks` of a run with `slow_writes` are writing."""
    deadline = time.monotonic() + timeout
    marks = [folder / "marks" / str(rank) for rank in range(ranks)]
    while not all(mark.exists() for mark in marks):
        assert time.monotonic() < deadline, "the ranks did not get as far as writing"
        time.sleep(0.05)
    return {rank: int(mark.read_text()) for rank, mark in enumerate(marks)}


def free_port(low: int = 20000, high: int = 30000) -> int:
    """A port that nothing listens on now, outside the range that the kernel hands out."""
    while True:
        port = random.randrange(low, high)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
