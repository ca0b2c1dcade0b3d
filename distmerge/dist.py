"""The ranks: who we are, what we agree on, how a failure on one rank stops all.

The only module, with `monitor`, that imports torch.distributed. A world of one has no process
group and takes the same path.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as torch_dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from distmerge.errors import DistmergeError, PeerError, RunError
from distmerge.launchers import Launch, detect
from distmerge.log import LOGGER
from distmerge.monitor import Cause, Monitor

T = TypeVar("T")

TIMEOUT = timedelta(hours=24)
"""Of collectives. A rank may rightly wait hours for its peers; the monitor notices dead ones."""

START_TIMEOUT = timedelta(minutes=5)
"""For all ranks to arrive."""

_SLACK = 15.0
"""Seconds for those errors to be told that torch notices by itself."""

POLL = 0.5
"""Seconds between two looks at whether another rank has failed, while waiting for a thread."""

_MESSAGE = 256 * 2**20
"""Bytes of the largest message."""

_NEVER_SENT = 1
"""A tag of messages; all that are sent have tag 0."""

STORE_TIMEOUT = timedelta(seconds=10)
"""For rank 0 to answer the monitor."""


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

    def _leave(self, error: Exception) -> None:
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


@contextmanager
def join(*, use_cuda: bool) -> Iterator[World]:
    """Join the ranks that the launcher started, or the process group that the caller made.

    A group made here is taken down on success only: after a failure the peers may hang in it.
    Raises RunError where the ranks can't meet.
    """
    adopted = torch_dist.is_available() and torch_dist.is_initialized()
    launch = _adopted() if adopted else detect(os.environ)
    if launch.warning:
        LOGGER.warning("%s", launch.warning)
    with _within(START_TIMEOUT, launch):
        if launch.size > 1 and not adopted:
            _start(launch, use_cuda)
        group = torch_dist.new_group(backend="gloo", timeout=TIMEOUT) if launch.size > 1 else None
        monitor = Monitor(_store(launch, group), launch.rank, launch.size)
    monitor.start()
    world = World(
        rank=launch.rank,
        size=launch.size,
        local_rank=launch.local_rank,
        launcher=launch.launcher,
        monitor=monitor,
        group=group,
    )
    try:
        yield world
    except Exception as error:
        world._leave(error)
        raise
    finally:
        monitor.stop()
    if launch.size > 1:
        torch_dist.destroy_process_group(group if adopted else None)


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


@contextmanager
def _within(limit: timedelta, launch: Launch) -> Iterator[None]:
    """End the process unless the ranks meet in time: while they connect, gloo heeds no time-out."""

    def give_up() -> None:
        sys.stderr.write("error: " + _not_met(launch, "no answer") + "\n")
        sys.stderr.flush()
        os._exit(RunError.exit_code)

    timer = threading.Timer(limit.total_seconds() + _SLACK, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _start(launch: Launch, use_cuda: bool) -> None:
    assert launch.address is not None
    host, port = launch.address
    try:
        torch_dist.init_process_group(
            "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
            init_method=f"tcp://{host}:{port}" if launch.launcher == "slurm" else "env://",
            rank=launch.rank,
            world_size=launch.size,
            timeout=START_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(_not_met(launch, f"{error}")) from error


def _not_met(launch: Launch, why: str) -> str:
    place = "{}:{}".format(*launch.address) if launch.address else "the caller's group"
    return (
        f"rank {launch.rank} of {launch.size} can't meet the others at {place}: {why}; "
        "MASTER_ADDR and MASTER_PORT say where to meet, GLOO_SOCKET_IFNAME on which network"
    )


def _adopted() -> Launch:
    found = detect(os.environ)
    return Launch(
        launcher="the caller",
        rank=torch_dist.get_rank(),
        size=torch_dist.get_world_size(),
        local_rank=found.local_rank,
    )


def _store(launch: Launch, group: torch_dist.ProcessGroup | None) -> Store:
    """A key-value store of our own for the monitor, hosted by rank 0."""
    if launch.size == 1:
        return HashStore()
    host = os.environ.get("MASTER_ADDR") or (launch.address or (socket.gethostname(),))[0]
    store, told = None, [""]
    if launch.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        told = [f"{host} {store.port}"]
    torch_dist.broadcast_object_list(told, src=0, group=group)
    if store is None:
        host, port = told[0].split()
        store = TCPStore(host, int(port), timeout=START_TIMEOUT, wait_for_workers=False)
    store.set_timeout(STORE_TIMEOUT)
    return store
