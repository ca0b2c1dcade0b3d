"""The ranks at work: what they share, agree on and pass on, how a failure on one stops all.

With `meeting` and `monitor` the only module that imports torch.distributed. A world of one has no
process group and takes the same path.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as torch_dist

from distmerge.errors import DistmergeError, PeerError, RunError
from distmerge.log import LOGGER
from distmerge.monitor import Cause, Monitor

T = TypeVar("T")

POLL = 0.5
"""Seconds between two looks at whether another rank has failed, while waiting for a thread."""

_MESSAGE = 256 * 2**20
"""Bytes of the largest message."""

_NEVER_SENT = 1
"""A tag of messages; all that are sent have tag 0."""


class _Outcome(NamedTuple):
    """What one rank tells the others at the end of a phase: the value it shares, or its failure."""

    shared: object
    failure: Cause | None


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This rank among its peers, and the ways they work together."""

    rank: int
    size: int
    local_rank: int
    launcher: str
    monitor: Monitor
    group: torch_dist.ProcessGroup | None

    def check(self) -> None:
        """Raise PeerError if any rank has failed. Cheap; call it between blocks."""
        if (cause := self.monitor.cause) is not None:
            raise self._peer_error(cause)

    def together(self, phase: str, work: Callable[[], T]) -> T:
        """Do `work` on every rank; if it fails on any, all raise.

        A rank that failed raises its own error, the others PeerError with the first cause.
        """
        result, _ = self._phase(phase, work, share=False)
        return result

    def gather(self, phase: str, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank and return all results, by rank. Errors as in `together`."""
        _, outcomes = self._phase(phase, work, share=True)
        return [outcome.shared for outcome in outcomes]  # type: ignore[misc]

    def on_first(self, phase: str, work: Callable[[], T]) -> T:
        """Do `work` on rank 0 and return its result on every rank. Errors as in `together`."""
        results = self.gather(phase, lambda: work() if self.rank == 0 else None)
        return results[0]  # type: ignore[return-value]

    def node_first(self, phase: str, work: Callable[[bool], T]) -> T:
        """Do `work(False)` on one rank of each host, then `work(True)` on the host's others."""
        leads = self.local_rank == 0
        led = self.together(phase, lambda: [work(False)] if leads else [])
        return self.together(phase, lambda: led[0] if leads else work(True))

    def who_sees(self, files: Sequence[Path]) -> list[bool]:
        """Which ranks see these files, as the first of them does: another host may have others of
        the same names."""

        def look() -> str | None:
            try:
                return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()
            except OSError:
                return None

        seen = self.gather("look for the output", look)
        first = next((found for found in seen if found is not None), None)
        return [found is not None and found == first for found in seen]

    def agree(self, phase: str, what: str, value: str) -> None:
        """Raise RunError on every rank unless all hold the same `value`."""
        values = self.gather(phase, lambda: value)

        def check() -> None:
            for rank, theirs in enumerate(values):
                if theirs != values[0]:
                    raise RunError(
                        f"{phase}: rank {rank} has another {what} than rank 0 ({theirs[:16]} and "
                        f"{values[0][:16]}): do all hosts see the same files and versions?"
                    )

        self.together(phase, check)

    def wait(self, future: futures.Future[T]) -> T:
        """The result of one of this rank's threads; PeerError if another rank fails meanwhile."""
        while not futures.wait([future], timeout=POLL).done:
            self.check()
        return future.result()

    def send(self, data: torch.Tensor, rank: int) -> None:
        """Send bytes (uint8, contiguous) to `rank`; blocks until it takes them."""
        with self._connected(rank), self.monitor.excused():
            torch_dist.send(data, rank, group=self.group)

    def receive(self, data: torch.Tensor, rank: int) -> None:
        """Fill `data` (uint8, contiguous) with the next bytes that `rank` sends to this one."""
        with self._connected(rank):
            torch_dist.recv(data, rank, group=self.group)

    def pass_on(
        self, tensors: Sequence[torch.Tensor], source: int, target: int
    ) -> list[torch.Tensor]:
        """The tensors of rank `source` on rank `target`, on the CPU; nothing on the others."""
        if self.rank == target == source:
            return list(tensors)
        if self.rank == source:
            for data in _packed(tensors):
                self.send(data, target)
        return _unpacked(lambda data: self.receive(data, source)) if self.rank == target else []

    def share(self, tensors: Sequence[torch.Tensor], source: int) -> list[torch.Tensor]:
        """The tensors of rank `source` on every rank, on the CPU but for itself."""
        if self.size == 1:
            return list(tensors)

        def broadcast(data: torch.Tensor) -> None:
            with self._connected(source), self.monitor.excused():
                torch_dist.broadcast(data, source, group=self.group)

        if self.rank != source:
            return _unpacked(broadcast)
        for data in _packed(tensors):
            broadcast(data)
        return list(tensors)

    def _phase(self, phase: str, work: Callable[[], T], *, share: bool) -> tuple[T, list[_Outcome]]:
        LOGGER.debug("%s", phase)
        try:
            self.check()
            result = _without_os_errors(work)
        except Exception as error:
            self._fail(phase, error)
            first = self.monitor.cause
            refused = isinstance(error, RunError) and isinstance(error.__cause__, OSError)
            if refused and first is not None and first.rank != self.rank:
                # A consequence: that rank has removed the output under our hands, for example.
                raise PeerError(
                    first.message, exit_code=first.exit_code, reported=self.rank > 0
                ) from error
            raise
        outcomes = self._exchange(phase, _Outcome(result if share else None, None))
        failures = [outcome.failure for outcome in outcomes if outcome.failure]
        if failures:
            first = self.monitor.cause or failures[0]
            # Rank 0 has just answered: it reports the cause.
            raise PeerError(first.message, exit_code=first.exit_code, reported=self.rank > 0)
        return result, outcomes

    def _fail(self, phase: str, error: Exception) -> None:
        """Tell all ranks of this one's error, and wait for them to stop at the phase's end too."""
        cause = self._cause(f", {phase}", error)
        if not isinstance(error, PeerError):
            self.monitor.fail(cause)
        try:
            self._exchange(phase, _Outcome(None, self.monitor.cause or cause))
        except PeerError:
            return
        if isinstance(error, DistmergeError):
            error.reported = self.rank > 0

    def _cause(self, phase: str, error: Exception) -> Cause:
        known = isinstance(error, DistmergeError)
        kind = "" if known else f"{type(error).__name__}: "
        where = "" if self.size == 1 else f"rank {self.rank} on {socket.gethostname()}{phase}: "
        return Cause(self.rank, f"{where}{kind}{error}", error.exit_code if known else 1)  # type: ignore[attr-defined]

    def _exchange(self, phase: str, mine: _Outcome) -> list[_Outcome]:
        outcomes: list[_Outcome] = [mine] * self.size
        if self.group is None:
            return outcomes
        try:
            torch_dist.all_gather_object(outcomes, mine, group=self.group)
        except (RuntimeError, OSError) as lost:
            if cause := self.monitor.wait_for_cause():
                raise self._peer_error(cause) from lost
            raise PeerError(f"{phase}: lost the connection to another rank: {lost}") from lost
        return outcomes

    def leave(self, error: Exception) -> None:
        """Make sure that all ranks hear of `error`, and end what threads still send or receive:
        they would keep the process."""
        if self.monitor.cause is None and not isinstance(error, PeerError):
            self.monitor.fail(self._cause("", error))  # it was raised between two phases
        self.monitor.take_leave()
        _break_off(self)

    @contextmanager
    def _connected(self, rank: int) -> Iterator[None]:
        """A connection breaks because a rank died or stopped: wait to hear of that first cause."""
        try:
            yield
        except RuntimeError as lost:
            if cause := self.monitor.wait_for_cause():
                raise self._peer_error(cause) from lost
            raise RunError(f"lost the connection to rank {rank}: {lost}") from lost

    def _peer_error(self, cause: Cause) -> PeerError:
        """Rank 0 prints the cause, or rank 1 where rank 0 may be dead."""
        reported = self.rank > (1 if cause.rank == 0 else 0)
        return PeerError(cause.message, exit_code=cause.exit_code, reported=reported)


def _packed(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Bytes that say what `tensors` are, then theirs, in messages that any transport takes."""
    head = json.dumps([(str(x.dtype).removeprefix("torch."), x.shape) for x in tensors]).encode()
    yield torch.tensor([len(head)]).view(torch.uint8)
    yield torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for x in tensors:
        yield from torch.split(x.detach().cpu().contiguous().view(-1).view(torch.uint8), _MESSAGE)


def _unpacked(receive: Callable[[torch.Tensor], None]) -> list[torch.Tensor]:
    length = torch.empty(8, dtype=torch.uint8)
    receive(length)
    head = torch.empty(int(length.view(torch.int64)), dtype=torch.uint8)
    receive(head)
    found = []
    for dtype, shape in json.loads(head.numpy().tobytes()):
        found.append(torch.empty(shape, dtype=getattr(torch, dtype)))
        for part in torch.split(found[-1].view(-1).view(torch.uint8), _MESSAGE):
            receive(part)
    return found


def _without_os_errors(work: Callable[[], T]) -> T:
    """What the operating system refuses is a failure of the run, not of the program."""
    try:
        return work()
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        raise RunError(f"{file}{error.strerror or error}") from error


def _break_off(world: World) -> None:
    """Close the connections: a wait that times out makes gloo close all of its group's."""
    nothing = torch.empty(1, dtype=torch.uint8)
    for peer in (rank for rank in range(world.size) if rank != world.rank):
        try:
            work = torch_dist.irecv(nothing, peer, group=world.group, tag=_NEVER_SENT)
            assert work is not None
            work.wait(timedelta(milliseconds=1))
        except RuntimeError as error:
            if "Timed out" in str(error):  # not the end of a connection that was closed before
                return
