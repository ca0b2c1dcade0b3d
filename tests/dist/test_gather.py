"""Ranks that do not see the output folder send what they make to ranks that do.

All ranks of these tests share a disk. Those that are to be blind get a path that is not there for
rank 0's folder, as if its disk were not mounted on their host.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import assembly
from distmerge.attempt import Attempt
from distmerge.dist import World
from distmerge.errors import OutputError
from distmerge.pipeline import Options
from distmerge.budget import SLOTS
from distmerge.spec import PAGE
from distmerge.storage import aligned_buffer
from tests.dist import cases
from tests.dist.cases import BLOCK, Recipe, fingerprints
from tests.support.ranks import observe_ranks, run_ranks

SHARDS = Options(shard_size="100kB")
"""Makes five shards of `cases.mixed`."""


class Seen(NamedTuple):
    """What a rank had to do with the output."""

    shards: set[str]
    """Names of the shards that it opened."""
    buffers: list[int]
    """Sizes of the buffers it received in."""


def merge_blindly(recipe: Recipe, out: Path, options: Options, blind: tuple[int, ...]) -> Seen:
    """Merge; the ranks `blind` do not see the folder that rank 0 makes."""
    cases.cut()
    seen = Seen(set(), [])

    def made(num_bytes: int, *, pinned: bool) -> torch.Tensor:
        seen.buffers.append(num_bytes)
        return aligned_buffer(num_bytes, pinned=pinned)

    def listen(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, Path)):
            path = Path(args[0])
            if out.parent in path.parents and path.suffix == ".safetensors":
                seen.shards.add(path.name)

    mock.patch.object(assembly, "aligned_buffer", made).start()
    if int(os.environ["RANK"]) in blind:
        mock.patch.object(World, "on_first", elsewhere(World.on_first)).start()
        mock.patch.object(assembly, "_PATIENCE", 0.2).start()
    sys.addaudithook(listen)
    distmerge.merge(recipe, out, options=options)
    return seen


def elsewhere(on_first: Callable[..., object]) -> Callable[..., object]:
    """`on_first` where a path that rank 0 gives leads nowhere."""

    def moved(world: World, phase: str, work: Callable[[], object]) -> object:
        result = on_first(world, phase, work)
        if isinstance(result, Attempt):
            away = Path("/not-mounted-here")
            folder, state = away / result.folder.name, away / result.state.name
            return dataclasses.replace(result, folder=folder, state=state)
        return result

    return moved


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return cases.write_steps(tmp_path_factory.mktemp("mixed"), cases.mixed)


@pytest.fixture(scope="module")
def one_process(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(cases.merge_cut, 1, recipe, out, SHARDS)
    return fingerprints(out)


@pytest.mark.parametrize(
    ("ranks", "blind"), [(2, (1,)), (3, (1,)), (3, (1, 2)), (4, (2, 3)), (4, (1, 2, 3))]
)
def test_ranks_that_do_not_see_the_folder_send_to_those_that_do(
    recipe: Recipe, one_process: dict[str, str], tmp_path: Path, ranks: int, blind: tuple[int, ...]
) -> None:
    out = tmp_path / "out"
    seen = run_ranks(merge_blindly, ranks, recipe, out, SHARDS, blind)
    assert fingerprints(out) == one_process
    for rank in range(ranks):
        assert bool(seen[rank].shards) == (rank not in blind)


def test_each_shard_has_one_owner_among_the_ranks_that_see_the_folder(
    recipe: Recipe, tmp_path: Path
) -> None:
    seen = run_ranks(merge_blindly, 4, recipe, tmp_path / "out", SHARDS, (2,))
    opened = [name for rank in seen for name in rank.shards]
    assert [len(rank.shards) for rank in seen] == [2, 2, 0, 1]
    assert sorted(opened) == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))


def test_ranks_that_all_see_the_folder_write_in_place(recipe: Recipe, tmp_path: Path) -> None:
    """No rank receives anything, and one shard has three writers."""
    seen = run_ranks(merge_blindly, 3, recipe, tmp_path / "out", Options(), ())
    assert seen == [Seen({"model.safetensors"}, [])] * 3


def test_direct_is_refused_where_a_rank_does_not_see_the_folder(
    recipe: Recipe, tmp_path: Path
) -> None:
    options = Options(assemble="direct")
    outcomes = observe_ranks(merge_blindly, 3, recipe, tmp_path / "new" / "out", options, (2,))
    for outcome in outcomes:
        assert isinstance(outcome.error, OutputError), outcome.describe()
        assert outcome.error.exit_code == 2
        assert outcome.error.reported == (outcome.rank > 0)
        assert "rank 2 does not see this folder; use --assemble gather" in str(outcome.error)
        assert str(tmp_path / "new") in str(outcome.error) or outcome.rank == 2
    assert not list((tmp_path / "new").iterdir())


def test_an_owner_receives_into_a_buffer_of_one_step(tmp_path: Path) -> None:
    """Rank 0 receives half of 20 steps; with this budget a job is cut into four."""
    recipe = cases.write_steps(tmp_path / "in", cases.small, count=2)
    width = 3 * torch.float32.itemsize
    options = Options(memory=str(SLOTS * (width * BLOCK + 6 * PAGE)))
    seen = run_ranks(merge_blindly, 2, recipe, tmp_path / "out", options, (1,))
    assert seen[0].buffers == [BLOCK * torch.float32.itemsize + PAGE]
    assert seen[1].buffers == []
