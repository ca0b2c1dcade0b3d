"""How the ranks come together: from the launcher's variables, or in the caller's process group."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as torch_dist
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from distmerge.dist import World
from distmerge.errors import RunError
from distmerge.launchers import Launch, detect
from distmerge.log import LOGGER
from distmerge.monitor import Monitor

TIMEOUT = timedelta(hours=24)
"""Of collectives. A rank may rightly wait hours for its peers; the monitor notices dead ones."""

START_TIMEOUT = timedelta(minutes=5)
"""For all ranks to arrive."""

_SLACK = 15.0
"""Seconds for those errors to be told that torch notices by itself."""

STORE_TIMEOUT = timedelta(seconds=10)
"""For rank 0 to answer the monitor."""


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
        world.leave(error)
        raise
    finally:
        monitor.stop()
    if launch.size > 1:
        torch_dist.destroy_process_group(group if adopted else None)


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
