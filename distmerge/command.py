"""The user's own evaluation: run a command on an output, take the last number that it prints."""

from __future__ import annotations

import codecs
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from distmerge.errors import RunError
from distmerge.launchers import detect
from distmerge.selection import MODEL
from distmerge.threads import Threads

POLL = 0.05
"""Seconds between two looks at whether the command has ended."""

GRACE = 2.0
"""Seconds that a command gets after SIGTERM; the monitor gives a rank that must stop six."""

TOLD = 10
"""Lines of a failed command's output in the error."""

_LAUNCHER = frozenset((
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK",
    "CROSS_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE",
    "SLURM_TASK_PID", "SLURM_STEPID", "SLURM_GTIDS",
))  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_STEP_", "PMI_", "PMIX_", "OMPI_")

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = re.compile(
    r"(?<![\w./+-])[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)(?![-./]?\w)(?!/)",
    re.IGNORECASE,
)


def run_command(
    command: Sequence[str],
    model: Path,
    *,
    environment: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> float:
    """Run `command` with {model} replaced by the folder; the last number on its standard output.

    Its standard error goes to ours as it comes. `check` is called while it runs: what that raises
    ends the command, as an interrupt does. Raises RunError where it can't be started, fails, or
    prints no number.
    """
    arguments = [argument.replace(MODEL, str(model)) for argument in command]
    line = shlex.join(arguments)
    out, err = bytearray(), bytearray()
    try:
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        raise RunError(f"select: can't start {line}: {error}") from error
    assert process.stdout is not None
    assert process.stderr is not None
    readers = Threads(2, "command")
    with _ending(process):
        ends = [
            readers.submit(_read, process.stdout, out.extend),
            readers.submit(_read, process.stderr, _echoing(err)),
        ]
        while not _ended(process):
            check()
            time.sleep(POLL)
    for end in ends:
        with suppress(futures.TimeoutError):  # a daemon may keep the pipe open for ever
            end.result(timeout=GRACE)
    readers.close()  # not earlier: a reader that has not begun would never read
    if process.returncode:
        said = _last_lines(err) or _last_lines(out)
        raise RunError(f"select: {line} failed: {_reason(process.returncode)}{said}")
    number = last_number(out.decode(errors="replace"), model)
    if number is None:
        raise RunError(f"select: {line} printed no number{_last_lines(out) or _last_lines(err)}")
    return number


def last_number(text: str, model: Path) -> float | None:
    """The last number that stands alone in `text`: 3, -0.5, 1e-3, 85%, nan, inf.

    Not: what is part of a word (step5), version (1.2.3), date or path, nor what the folder's own
    name holds: `step=0.5` is no result. A comma separates numbers, it is not part of one.
    """
    text = _COLOUR.sub("", text)
    for name in (str(model), model.name):
        if not _NUMBER.fullmatch(name):
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "model", text)
    numbers = _NUMBER.findall(text)
    return float(numbers[-1]) if numbers else None


def command_environment(env: Mapping[str, str], gpus: int) -> dict[str, str]:
    """`env` without what launchers set: the command must not take itself for one of our ranks.

    Where several ranks share a host's GPUs, each shows its command its own share of them only.
    """
    kept = {k: v for k, v in env.items() if k not in _LAUNCHER and not k.startswith(_PREFIXES)}
    launch = detect(env)
    visible = env.get("CUDA_VISIBLE_DEVICES") or ",".join(str(n) for n in range(gpus))
    devices = visible.split(",")
    if launch.size > 1 and gpus > 1:
        beside = int(env.get("LOCAL_WORLD_SIZE") or gpus)
        share = devices[launch.local_rank % len(devices) :: beside]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(share)
    return kept


def _read(stream: IO[bytes], keep: Callable[[bytes], object]) -> None:
    with stream:
        while data := stream.read(1 << 16):
            keep(data)


def _echoing(err: bytearray) -> Callable[[bytes], None]:
    """Keeps what it is given, and shows it on our own standard error."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def keep(data: bytes) -> None:
        err.extend(data)
        with suppress(OSError, ValueError):  # nobody listens: the command goes on
            sys.stderr.write(decoder.decode(data))
            sys.stderr.flush()

    return keep


def _ended(process: subprocess.Popen[bytes]) -> bool:
    """It stays a zombie until `wait`, so that its group's number can't become another's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens, the command and all that it started in its group end here."""
    try:
        yield
    except BaseException:
        _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while not _ended(process) and time.monotonic() < deadline:
            time.sleep(POLL)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(OSError):
        os.killpg(process.pid, number)


def _reason(code: int) -> str:
    return f"exit code {code}" if code > 0 else f"ended by {signal.Signals(-code).name}"


def _last_lines(output: bytearray) -> str:
    lines = output.decode(errors="replace").strip().splitlines()[-TOLD:]
    return "".join(f"\n  {line}" for line in lines)
