"""Run a function on several ranks, as a launcher would start them, and see how each one ends.

The ranks are forked from a server that has loaded torch and distmerge already: a fork of pytest
itself could inherit locks of its threads, and a fresh start takes seconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Generic, TypeVar

import torch

from distmerge.errors import PeerError

T = TypeVar("T")

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["torch.distributed", "numpy", "safetensors.torch", "tqdm", "pytest", "distmerge.cli"]
)
_LAUNCHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_", "ACCELERATE_", "CROSS_",
)  # fmt: skip
"""What the variables that launchers set begin with."""


@dataclass(kw_only=True, slots=True)
class Outcome(Generic[T]):
    """How a rank ended: with a result, with an error, or without a word (killed, stuck).

    `exit_code` is the process's, negative for a signal; `seconds` is how long it lived.
    """

    rank: int
    result: T | None = None
    error: BaseException | None = None
    trace: str = ""
    reported: bool = False
    exit_code: int | None = None
    seconds: float = 0
    timed_out: bool = False
    stderr: str = ""

    @property
    def failed(self) -> bool:
        return not self.reported or self.error is not None or self.exit_code != 0

    def describe(self) -> str:
        state = "still running, so killed" if self.timed_out else f"exit code {self.exit_code}"
        return (
            f"--- rank {self.rank}: {state} after {self.seconds:.1f} s\n{self.trace}{self.stderr}"
        )


def run_ranks(fn: Callable[..., T], world: int, *args: object, timeout: float = 60) -> list[T]:
    """Call `fn(*args)`, a function of a module, on `world` ranks; returns their results.

    Raises AssertionError with what every rank has to say, the first cause on top.
    """
    outcomes = observe_ranks(fn, world, *args, timeout=timeout)
    if failed := [outcome for outcome in outcomes if outcome.failed]:
        raise AssertionError("\n".join(o.describe() for o in sorted(failed, key=_lateness)))
    return [outcome.result for outcome in outcomes]  # type: ignore[misc]


def _lateness(outcome: Outcome[T]) -> tuple[bool, bool, float]:
    """Own errors and deaths come before errors for another's sake, and those before hangs."""
    return outcome.timed_out, isinstance(outcome.error, PeerError), outcome.seconds


def observe_ranks(
    fn: Callable[..., T], world: int, *args: object, timeout: float = 60
) -> list[Outcome[T]]:
    """As `run_ranks`, but tells how every rank ended, whatever happened."""
    with tempfile.TemporaryDirectory() as name, _free_port() as port:
        folder = Path(name)
        started = time.monotonic()
        processes = [
            _SERVER.Process(target=_rank, args=(folder, _environment(rank, world, port), fn, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        ends = _wait(processes, started + timeout)
        for rank in (rank for rank in range(world) if rank not in ends):
            _end(processes[rank])
        outcomes: list[Outcome[T]] = [_outcome(folder, rank) for rank in range(world)]
        for rank, (outcome, process) in enumerate(zip(outcomes, processes, strict=True)):
            process.join()
            outcome.exit_code = process.exitcode
            outcome.timed_out = rank not in ends
            outcome.seconds = ends.get(rank, time.monotonic()) - started
        return outcomes


@contextmanager
def _free_port() -> Iterator[int]:
    """A port that nobody gets before rank 0 listens there: bound, but not listened on."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    if world == 1:
        return {}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), **address}


def _wait(processes: Sequence[ForkServerProcess], deadline: float) -> dict[int, float]:
    """When each rank ended, for those that did before `deadline`."""
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    ends: dict[int, float] = {}
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in connection.wait(list(running), left):
            assert isinstance(sentinel, int)
            ends[running.pop(sentinel)] = time.monotonic()
    return ends


def _end(process: ForkServerProcess) -> None:
    """End a process that hangs; at SIGABRT, faulthandler writes where each thread stands."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGABRT)
        process.join(5)
        process.kill()


def _outcome(folder: Path, rank: int) -> Outcome[T]:
    report, stderr = folder / f"{rank}.pickle", folder / f"{rank}.stderr"
    outcome: Outcome[T] = Outcome(rank=rank)
    if report.is_file():
        outcome = pickle.loads(report.read_bytes())
    if stderr.is_file():
        outcome.stderr = stderr.read_text(errors="replace")
    return outcome


def _rank(
    folder: Path, environment: dict[str, str], fn: Callable[..., T], args: tuple[object, ...]
) -> None:
    """What runs in the rank's process. It ends as any Python program does: threads are joined."""
    rank = int(environment.get("RANK", 0))
    stderr = os.open(folder / f"{rank}.stderr", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(stderr, 2)
    faulthandler.enable(stderr)
    warnings.simplefilter("error")
    for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(environment)
    os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"  # torch looks up the names of all it meets
    torch.set_num_threads(1)
    outcome: Outcome[T] = Outcome(rank=rank, reported=True)
    try:
        outcome.result = fn(*args)
    except BaseException as error:
        outcome.error, outcome.trace = error, traceback.format_exc()
    _write(folder / f"{rank}.pickle", outcome)
    if outcome.error is not None:
        raise SystemExit(1)


def _write(path: Path, outcome: Outcome[T]) -> None:
    try:
        content = pickle.dumps(outcome)
        pickle.loads(content)
    except Exception as error:
        told = outcome.trace or f"the result can't be pickled: {error}"
        content = pickle.dumps(
            Outcome[T](rank=outcome.rank, reported=True, error=AssertionError(told), trace=told)
        )
    path.with_suffix(".part").write_bytes(content)
    path.with_suffix(".part").rename(path)
