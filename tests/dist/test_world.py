"""What the ranks do together: share, agree, wait, take over a caller's process group."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as torch_dist

import distmerge
from distmerge import meeting, monitor
from distmerge.dist import World
from distmerge.meeting import join
from distmerge.errors import ConfigError, OutputError, PeerError, RunError
from distmerge.log import Progress
from tests.dist import cases
from tests.dist.cases import Recipe, fingerprints
from tests.support.ranks import observe_ranks, run_ranks


def in_world(work: Callable[..., object], *args: object) -> object:
    with join(use_cuda=False) as world:
        return work(world, *args)


def identity(world: World) -> tuple[int, int, int, str]:
    return world.rank, world.size, world.local_rank, world.launcher


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_rank_knows_its_place(ranks: int) -> None:
    launcher = "none" if ranks == 1 else "RANK and WORLD_SIZE"
    expected = [(rank, ranks, rank, launcher) for rank in range(ranks)]
    assert run_ranks(in_world, ranks, identity) == expected


def share_from_first(world: World) -> str:
    return world.on_first("choose", lambda: f"chosen by {world.rank}")


def test_all_get_what_the_first_rank_made() -> None:
    assert run_ranks(in_world, 3, share_from_first) == ["chosen by 0"] * 3


def fail_on_first(world: World) -> None:
    def work() -> None:
        raise ConfigError("the recipe is wrong")

    world.on_first("choose", work)


def test_an_error_of_the_first_rank_reaches_all_and_is_printed_once() -> None:
    own, *others = observe_ranks(in_world, 3, fail_on_first)
    assert isinstance(own.error, ConfigError)
    assert (str(own.error), own.error.reported) == ("the recipe is wrong", False)
    for outcome in others:
        assert isinstance(outcome.error, PeerError), outcome.describe()
        message = f"rank 0 on {socket.gethostname()}, choose: the recipe is wrong"
        assert str(outcome.error) == message
        assert (outcome.error.exit_code, outcome.error.reported) == (2, True)


def gather_late(world: World) -> list[int]:
    """The first rank is the last to arrive."""

    def work() -> int:
        time.sleep(0.05 * (world.size - world.rank))
        return world.rank * 10

    return world.gather("count", work)


@pytest.mark.parametrize("ranks", [1, 4])
def test_results_come_in_the_order_of_ranks(ranks: int) -> None:
    expected = [rank * 10 for rank in range(ranks)]
    assert run_ranks(in_world, ranks, gather_late) == [expected] * ranks


def agree_on(world: World, values: list[str]) -> str:
    world.agree("plan", "plan", values[world.rank])
    return "agreed"


def test_ranks_agree_on_the_same_value() -> None:
    assert run_ranks(in_world, 3, agree_on, ["a", "a", "a"]) == ["agreed"] * 3


def test_another_value_on_one_rank_is_an_error_on_all() -> None:
    for outcome in observe_ranks(in_world, 3, agree_on, ["a", "a", "b"]):
        assert isinstance(outcome.error, RunError), outcome.describe()
        assert "rank 2 has another plan than rank 0 (b and a)" in str(outcome.error)
        assert outcome.error.reported == (outcome.rank > 0)


def fail_twice(world: World, late: int) -> None:
    def work() -> None:
        time.sleep(0.5 if world.rank == late else 0)
        if world.rank != 1:
            raise OutputError(f"of rank {world.rank}")

    world.together("write", work)


@pytest.mark.parametrize("late", [0, 2])
def test_of_two_errors_the_first_is_the_cause(late: int) -> None:
    """A rank that failed itself keeps its own error, though it came later."""
    zero, one, two = observe_ranks(in_world, 3, fail_twice, late)
    assert [str(zero.error), str(two.error)] == ["of rank 0", "of rank 2"]
    assert isinstance(one.error, PeerError)
    assert f"write: of rank {2 - late}" in str(one.error)


class Turn(NamedTuple):
    """When a rank did its part of `node_first`, and what it was told."""

    local_only: bool
    began: float
    ended: float


def take_turns() -> list[Turn]:
    """Two hosts of two ranks each."""
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    turns: list[Turn] = []

    def work(local_only: bool) -> None:
        began = time.monotonic()
        time.sleep(0.2)
        turns.append(Turn(local_only, began, time.monotonic()))

    with join(use_cuda=False) as world:
        world.node_first("fetch", work)
    return turns


def test_one_rank_of_each_host_goes_first() -> None:
    turns = run_ranks(take_turns, 4)
    assert [[turn.local_only for turn in mine] for mine in turns] == [[False], [True]] * 2
    leaders, others = [turns[0][0], turns[2][0]], [turns[1][0], turns[3][0]]
    assert max(turn.ended for turn in leaders) <= min(turn.began for turn in others)
    assert max(turn.began for turn in leaders) < min(turn.ended for turn in leaders)


def wait_for_thread(world: World) -> None:
    """Rank 0 waits for a thread that takes longer than rank 1 takes to fail."""
    if world.rank == 1:
        world.together("wait", lambda: 1 // 0)
    with ThreadPoolExecutor(1) as pool:
        released = threading.Event()
        waiting = pool.submit(released.wait, 10)
        try:
            world.together("wait", lambda: world.wait(waiting))
        finally:
            released.set()


def test_waiting_for_a_thread_ends_when_another_rank_fails() -> None:
    zero, one = observe_ranks(in_world, 2, wait_for_thread)
    assert isinstance(one.error, ZeroDivisionError)
    assert isinstance(zero.error, PeerError)
    assert str(zero.error).endswith(", wait: ZeroDivisionError: integer division or modulo by zero")
    assert max(zero.seconds, one.seconds) < 8


def adopt(recipe: Recipe, out: Path, store: str | None) -> tuple[int, float]:
    """Merge with the caller's process group, and use that afterwards."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if store:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    torch_dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    result = cases.merge_cut(recipe, out, distmerge.Options())
    total = torch.tensor(float(rank))
    torch_dist.all_reduce(total)
    torch_dist.destroy_process_group()
    return result.ranks, total.item()


@pytest.mark.parametrize("launched", [True, False])
def test_a_process_group_of_the_caller_is_used_and_left_alone(
    tmp_path: Path, launched: bool
) -> None:
    """Also one that met by other means than the launcher's variables."""
    recipe = cases.write_steps(tmp_path / "in", cases.small)
    store = None if launched else f"file://{tmp_path / 'store'}"
    assert run_ranks(adopt, 3, recipe, tmp_path / "out", store) == [(3, 3.0)] * 3
    run_ranks(cases.merge_cut, 1, recipe, tmp_path / "one", distmerge.Options())
    assert fingerprints(tmp_path / "out") == fingerprints(tmp_path / "one")


def merge_again(recipe: Recipe, folder: Path) -> list[int]:
    """Two merges in a row, then one that fails, then another one."""
    found = [distmerge.merge(recipe, folder / name).ranks for name in ("one", "two")]
    with pytest.raises((OutputError, PeerError), match="not empty"):
        distmerge.merge(recipe, folder / "two")
    found.append(distmerge.merge(recipe, folder / "three").ranks)
    return found


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_can_merge_more_than_once(tmp_path: Path, ranks: int) -> None:
    recipe = cases.write_steps(tmp_path / "in", cases.small)
    assert run_ranks(merge_again, ranks, recipe, tmp_path) == [[ranks] * 3] * ranks
    one, *others = [fingerprints(tmp_path / name) for name in ("one", "two", "three")]
    assert others == [one, one]


def advance(world: World) -> list[int]:
    """The sums that a rank's progress shows until it has seen all of them or two seconds pass."""
    shown: list[int] = []
    progress = mock.create_autospec(Progress, instance=True)
    progress.show.side_effect = shown.append
    with world.monitor.showing(progress):
        world.monitor.advance(10**world.rank)
        world.monitor.advance(10**world.rank)
        deadline = time.monotonic() + 2
        while world.rank == 0 and 222 not in shown and time.monotonic() < deadline:
            time.sleep(0.02)
    world.together("end", lambda: None)
    return shown


def advance_twice() -> list[list[int]]:
    """A second count starts from zero."""
    mock.patch.object(monitor, "INTERVAL", 0.05).start()
    with join(use_cuda=False) as world:
        return [advance(world), advance(world)]


def test_progress_counts_the_bytes_of_all_ranks() -> None:
    first, second = run_ranks(advance_twice, 3)[0]
    assert first[-1] == second[-1] == 222
    assert first == sorted(first)


def look_from(folder: Path) -> list[bool]:
    """What rank 1 sees under that name is a file of its own."""
    with join(use_cuda=False) as world:
        name = "theirs" if world.rank == 1 else "ours"
        return world.who_sees([folder / name / "x"])


def test_a_file_of_the_same_name_is_not_the_same_file(tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    assert run_ranks(look_from, 3, tmp_path) == [[True, False, True]] * 3


def never_meet() -> None:
    def hang(*_: object) -> None:
        time.sleep(60)

    short = timedelta(seconds=0)
    mock.patch.multiple(meeting, START_TIMEOUT=short, _SLACK=0.5, _start=hang).start()
    with join(use_cuda=False):
        pass


def test_ranks_that_do_not_meet_end() -> None:
    """gloo may wait for ever while it connects: a timer ends the process."""
    ends = observe_ranks(never_meet, 2, timeout=20)
    assert [end.exit_code for end in ends] == [1, 1]
    assert all("can't meet the others" in end.stderr for end in ends), ends
