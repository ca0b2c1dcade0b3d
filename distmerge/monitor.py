"""A thread in every rank that hears of a failure anywhere within seconds, and adds up progress.

Ranks work for hours between two collectives. So each rank sets a pulse in a shared key-value
store every second, with the bytes that it has handled, and reads whether some rank has failed.
The first rank watches all pulses, and the others watch the first rank's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed import Store  # type: ignore[attr-defined]

from distmerge.log import Progress
from distmerge.threads import Threads

INTERVAL = 1.0
"""Seconds between two pulses."""

SILENCE = 20.0
"""Seconds without a pulse after which a rank counts as dead."""

GRACE = 6.0
"""Seconds that a rank gets to stop by itself after another failed; then it is ended: it may hang
in a system call or wait for bytes that will never come."""

_CAUSE = "cause"


class Cause(NamedTuple):
    """The first failure of the run, as all ranks hear of it."""

    rank: int
    message: str
    exit_code: int


@dataclass(slots=True)
class _Watch:
    """What a rank does that must go on, and when it last did: `done` bytes at `since`."""

    phase: str
    timeout: float
    since: float
    done: int = 0


class Monitor(threading.Thread):
    """Pulse, failure and progress of one rank; `cause` is set once any rank has failed."""

    def __init__(self, store: Store, rank: int, size: int):
        super().__init__(name="monitor", daemon=True)
        self.cause: Cause | None = None
        self._store, self._rank, self._size = store, rank, size
        self._done = 0
        self._progress: Progress | None = None
        self._excused = 0
        self._watch: _Watch | None = None
        self._stopped = threading.Event()
        now = time.monotonic()
        watched = range(size) if rank == 0 else range(1)
        self._pulses = {peer: (b"", now) for peer in watched if peer != rank}
        self._store_lost: float | None = None
        self._hangs = False

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes

    @contextmanager
    def showing(
        self, progress: Progress, *, phase: str = "", timeout: float = math.inf
    ) -> Iterator[None]:
        """Count from zero, and show all ranks' bytes in `progress` meanwhile. This rank has failed
        if it handles none for `timeout` seconds."""
        self._done = 0
        self._progress = progress
        self._watch = _Watch(phase, timeout, time.monotonic())
        try:
            yield
        finally:
            self._progress = self._watch = None

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Another rank takes its time, or this one computes: no disk can be blamed."""
        self._excused += 1
        try:
            yield
        finally:
            self._excused -= 1

    def fail(self, cause: Cause) -> None:
        """Tell all ranks of a failure. What the first rank tells is the cause for all."""
        try:
            first = self._store.compare_set(_CAUSE, "", json.dumps(cause))
            self.cause = Cause(*json.loads(first))
        except RuntimeError:  # the store went with its rank
            self.cause = self.cause or cause

    def wait_for_cause(self) -> Cause | None:
        """Give the news of a failure the time to arrive."""
        deadline = time.monotonic() + SILENCE + 5 * INTERVAL
        while self.cause is None and time.monotonic() < deadline and not self._stopped.is_set():
            time.sleep(INTERVAL / 10)
        return self.cause

    def take_leave(self) -> None:
        """After a failure: the first rank holds the news, so it stays until all have left, or for
        as long as a dead rank lets the others take to hear of it."""
        deadline = time.monotonic() + 2 * INTERVAL
        try:
            left = self._store.add("left", 1)
            while self._rank == 0 and left < self._size and time.monotonic() < deadline:
                time.sleep(INTERVAL / 20)
                left = self._store.add("left", 0)
        except RuntimeError:  # the store went with its rank
            return

    def stop(self) -> None:
        self._stopped.set()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        count = 0
        talking = Threads(1, "pulse")
        while not self._stopped.wait(INTERVAL):
            count += 1
            try:
                # In a thread: a first rank that is frozen, or whose host is gone, never answers.
                talking.submit(self._exchange, count).result(timeout=SILENCE)
                self._store_lost = None
            except RuntimeError:
                self._lose_store()
            except futures.TimeoutError:
                self.cause = self.cause or self._silence_of(0)
            self._look_for_stall()
            if self.cause:
                self._end_if_stuck()

    def _exchange(self, count: int) -> None:
        self._store.set(f"pulse/{self._rank}", f"{count} {self._done} {socket.gethostname()}")
        self._read_peers()

    def _read_peers(self) -> None:
        if self._store.check([_CAUSE]):
            self.cause = self.cause or Cause(*json.loads(self._store.get(_CAUSE)))
        total, now = self._done, time.monotonic()
        for peer, (before, since) in self._pulses.items():
            key = f"pulse/{peer}"
            pulse = self._store.get(key) if self._store.check([key]) else b""
            self._pulses[peer] = (pulse, since if pulse == before else now)
            total += int(pulse.split()[1]) if pulse else 0
            if pulse == before and now - since > SILENCE:
                self.fail(self._silence_of(peer))
        if self._progress and not self._stopped.is_set():
            self._progress.show(total)

    def _silence_of(self, rank: int) -> Cause:
        pulse, _ = self._pulses.get(rank, (b"", 0.0))
        where = f" on {pulse.split()[2].decode()}" if pulse else ""
        return Cause(
            rank,
            f"rank {rank}{where} has given no sign of life for {SILENCE:.0f} s; "
            "is its host cut off, or was it killed?",
            1,
        )

    def _lose_store(self) -> None:
        """The store lives in the first rank: without it for long, that rank is gone."""
        self._store_lost = self._store_lost or time.monotonic()
        if not self.cause and time.monotonic() - self._store_lost > 2 * INTERVAL:
            self.cause = Cause(0, "lost the connection to rank 0; was it killed?", 1)

    def _look_for_stall(self) -> None:
        """A main thread that hangs in a system call can't tell anybody: this one can."""
        watch = self._watch
        if watch is None or self.cause:
            return
        now = time.monotonic()
        if watch.done != self._done or self._excused:
            watch.done, watch.since = self._done, now
        elif now - watch.since > watch.timeout:
            where = "" if self._size == 1 else f"rank {self._rank} on {socket.gethostname()}, "
            self._hangs = True
            self.fail(
                Cause(
                    self._rank,
                    f"{where}{watch.phase}: nothing was read or written for {watch.timeout:g} s; "
                    "does a disk or a network file system hang? (--timeout)",
                    1,
                )
            )

    def _end_if_stuck(self) -> None:
        """The main thread should stop at its next check; where it can't, end the process."""
        if self._stopped.wait(GRACE) or self.cause is None:
            return
        if self.cause.rank != self._rank or self._hangs:
            sys.stderr.write(f"error: rank {self._rank} stopped: {self.cause.message}\n")
        logging.shutdown()
        sys.stderr.flush()
        os._exit(self.cause.exit_code)
