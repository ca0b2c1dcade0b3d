"""One rank fails or dies in the merge pass: all end soon, say why, and leave nothing behind."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

import distmerge
from distmerge import engine, monitor
from distmerge.assembly import AssembleMode
from distmerge.errors import PeerError
from distmerge.pipeline import Options
from distmerge.sources import reader
from distmerge.writer import ShardWriter
from tests.dist import cases
from tests.dist.cases import Recipe
from tests.support.ranks import Outcome, observe_ranks

LIMIT = 30.0
"""Seconds in which all ranks must have ended."""

PLACES: dict[str, tuple[object, str]] = {
    "read": (reader._Read, "read"),
    "compute": (engine, "weighted_sum"),
    "write": (ShardWriter, "write"),
}
"""What a rank calls when it reads, computes and writes a step."""


class Fault(NamedTuple):
    """What happens to rank `victim`, at its second step."""

    kills: bool
    place: str
    victim: int
    assemble: AssembleMode
    ranks: int

    def __str__(self) -> str:
        what = "killed" if self.kills else "raises"
        return f"{what}-{self.place}-{self.victim}of{self.ranks}-{self.assemble}"


def merge_with_fault(recipe: Recipe, out: Path, fault: Fault, silence: float) -> None:
    cases.cut()
    mock.patch.multiple(monitor, SILENCE=silence, INTERVAL=silence / 10).start()
    if int(os.environ["RANK"]) == fault.victim:
        holder, name = PLACES[fault.place]
        patched = failing(getattr(holder, name), kills=fault.kills)
        mock.patch.object(holder, name, patched).start()
    distmerge.merge(recipe, out, options=Options(assemble=fault.assemble, read="pread", shard_size="150kB"))


def failing(real: Callable[..., object], *, kills: bool) -> Callable[..., object]:
    calls = itertools.count(1)

    def wrapper(*args: object, **kwargs: object) -> object:
        if next(calls) == 2:
            if kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("injected")
        return real(*args, **kwargs)

    return wrapper


def run(fault: Fault, folder: Path, *, silence: float) -> list[Outcome[None]]:
    """Merge with the fault, and check what holds for every fault."""
    recipe = cases.write_steps(folder / "in", cases.small, count=2)
    (folder / "work").mkdir()
    outcomes = observe_ranks(
        merge_with_fault, fault.ranks, recipe, folder / "work" / "out", fault, silence
    )
    told = "\n".join(outcome.describe() for outcome in outcomes)
    print(told)
    assert max(outcome.seconds for outcome in outcomes) < LIMIT
    assert not any(outcome.timed_out for outcome in outcomes), told
    assert not list((folder / "work").iterdir()), told
    return outcomes


def check_error(fault: Fault, outcomes: list[Outcome[None]]) -> None:
    """The victim has its own error, the others hear of it: who, when, what."""
    for outcome in outcomes:
        assert outcome.exit_code == 1
        if outcome.rank == fault.victim:
            assert isinstance(outcome.error, ValueError), outcome.describe()
            continue
        assert isinstance(outcome.error, PeerError), outcome.describe()
        assert outcome.error.exit_code == 1
        message = str(outcome.error)
        assert message.startswith(f"rank {fault.victim} on ")
        assert message.endswith(", merge: ValueError: injected")


def check_death(fault: Fault, outcomes: list[Outcome[None]]) -> None:
    """The others notice, and name the rank."""
    for outcome in outcomes:
        if outcome.rank == fault.victim:
            assert outcome.exit_code == -signal.SIGKILL
            continue
        assert isinstance(outcome.error, PeerError), outcome.describe()
        assert f"rank {fault.victim}" in str(outcome.error)
        assert "was it killed?" in str(outcome.error)


ALL = [
    Fault(*values)
    for values in itertools.product(
        (False, True), PLACES, (0, 1), ("direct", "gather"), (2, 3)
    )
]
SOME = ALL


@pytest.mark.parametrize("fault", [fault for fault in SOME if not fault.kills], ids=str)
def test_an_error_on_one_rank_ends_all(fault: Fault, tmp_path: Path) -> None:
    check_error(fault, run(fault, tmp_path, silence=2))


@pytest.mark.parametrize("fault", [fault for fault in SOME if fault.kills], ids=str)
def test_the_death_of_one_rank_ends_all(fault: Fault, tmp_path: Path) -> None:
    check_death(fault, run(fault, tmp_path, silence=2))
