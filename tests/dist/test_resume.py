"""The same command goes on where a failed run stopped, at any number of ranks and in any steps.

Every test compares all of OUT with what an undisturbed run writes, and what is read with what was
still to do.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import monitor, statistic
from distmerge.assembly import AssembleMode
from distmerge.errors import UserError
from distmerge.journal import finished_jobs, read_journals, sound_records
from distmerge.pipeline import MergeResult, Options
from distmerge.budget import SLOTS
from distmerge.spec import PAGE
from distmerge.statistic import GramPass, read_snapshots
from distmerge.writer import ShardWriter
from tests.dist import cases, test_gather
from tests.dist.cases import BLOCK, Recipe, fingerprints
from tests.support.checkpoints import write_checkpoint
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks

SHARDS = Options(shard_size="150kB")


def merge(recipe: Recipe, out: Path, options: Options, blocks: int | None = None) -> MergeResult:
    """What a rank does: with small jobs, in steps of `blocks`, and without plots."""
    prepare(out)
    if blocks is not None:
        plan = distmerge.plan(recipe, shard_size=options.shard_size)
        buffers = len(plan.outputs) + len(plan.inputs)
        budget = SLOTS * (max(plan.widths) * blocks * BLOCK + 2 * PAGE * buffers)
        options = replace(options, memory=str(budget))
    return distmerge.merge(recipe, out, options=options)


def prepare(out: Path) -> None:
    cases.cut(job=2 * BLOCK)
    without_drawing().start()
    mock.patch.multiple(monitor, SILENCE=5, INTERVAL=0.1).start()
    mock.patch.object(statistic, "SNAPSHOT_SECONDS", 0).start()
    handler = logging.FileHandler(out.with_name("log"))
    logging.getLogger("distmerge").addHandler(handler)
    logging.getLogger("distmerge").setLevel(logging.INFO)


def merge_until(
    recipe: Recipe, out: Path, options: Options, victim: int, call: int, place: str = "write"
) -> None:
    """Merge, but the `call`-th write (or addition to the statistic) of rank `victim` fails."""
    if int(os.environ.get("RANK", "0")) == victim:
        fail_at(call, *{"write": (ShardWriter, "write"), "sum": (GramPass, "_add")}[place])
    merge(recipe, out, options)


def fail_at(call: int, holder: object, name: str) -> None:
    real: Callable[..., object] = getattr(holder, name)
    calls = itertools.count(1)

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) >= call:
            raise ValueError("injected")
        return real(*args, **kwargs)

    mock.patch.object(holder, name, failing).start()


def left_to_read(recipe: Recipe, out: Path, options: Options) -> tuple[int, int]:
    """Bytes that the jobs read which are not done, and those that all read, in the merge pass."""
    cases.cut(job=2 * BLOCK)
    plan = distmerge.plan(recipe, shard_size=options.shard_size)
    (state,) = out.parent.glob(".out.distmerge-????????.state")
    folder = state.with_suffix("")
    records = sound_records(read_journals(state), folder, plan.files)
    done = set(finished_jobs(plan, records))
    sizes = [plan.read_bytes(job) for job in plan.jobs]
    return sum(size for n, size in enumerate(sizes) if n not in done), sum(sizes)


def interrupt(recipe: Recipe, out: Path, options: Options, ranks: int, *fault: object) -> None:
    """Let a run fail; nothing is at OUT, and what is done lies beside it."""
    out.parent.mkdir(exist_ok=True)
    outcomes = observe_ranks(merge_until, ranks, recipe, out, options, *fault)
    assert all(outcome.failed for outcome in outcomes), "\n".join(o.describe() for o in outcomes)
    assert "injected" in str(outcomes[0].error), outcomes[0].describe()
    assert not out.exists()
    assert "the same command goes on with it" in out.with_name("log").read_text()


def resume(
    recipe: Recipe, out: Path, options: Options, ranks: int, blocks: int | None = None
) -> MergeResult:
    """Go on to the end; nothing but OUT and the cache remains."""
    result = run_ranks(merge, ranks, recipe, out, options, blocks)[0]
    left = {path.name for path in out.parent.iterdir()}
    assert left <= {"out", "log", ".distmerge"}, left
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return cases.write_steps(tmp_path_factory.mktemp("small"), cases.small, count=2)


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(merge, 1, recipe, out, SHARDS)
    return fingerprints(out)


class Case(NamedTuple):
    """`ranks` go until call `call` of rank `victim`; `then` ranks go on in steps of `blocks`."""

    ranks: int
    victim: int
    call: int
    assemble: AssembleMode
    then: int
    blocks: int | None


FAST = [
    Case(1, 0, 2, "direct", 3, 1),
    Case(2, 0, 5, "direct", 1, None),
    Case(2, 1, 5, "gather", 4, 2),
]
SLOW = [
    Case(3, 2, 2, "direct", 2, 1),
    Case(3, 0, 5, "gather", 3, 1),
    Case(3, 1, 4, "direct", 4, 2),
    Case(3, 1, 2, "gather", 1, 1),
    Case(4, 3, 2, "direct", 3, None),
    Case(2, 0, 4, "gather", 2, None),
]


@pytest.mark.parametrize(
    "case", [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_failed_run_is_gone_on_with(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path, case: Case
) -> None:
    """In other steps, by other ranks: only what is not done is read."""
    options, out = replace(SHARDS, assemble=case.assemble), tmp_path / "out"
    interrupt(recipe, out, options, case.ranks, case.victim, case.call)
    ((left, whole),) = run_ranks(left_to_read, 1, recipe, out, options)
    result = resume(recipe, out, options, case.then, case.blocks)
    assert fingerprints(out) == undisturbed
    assert result.read_bytes == left < whole
    assert "going on: " in (tmp_path / "log").read_text()


def test_every_failure_on_the_way_leaves_less_to_do(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """Attempt after attempt, by other ranks and in other ways to come together."""
    ways: list[tuple[int, AssembleMode]] = [(1, "direct"), (2, "direct"), (3, "gather")]
    out, lefts = tmp_path / "out", []
    for ranks, assemble in ways:
        options = replace(SHARDS, assemble=assemble)
        interrupt(recipe, out, options, ranks, 0, 2)
        ((left, _),) = run_ranks(left_to_read, 1, recipe, out, options)
        lefts.append(left)
    assert lefts == sorted(set(lefts), reverse=True)
    assert resume(recipe, out, SHARDS, 1).read_bytes == lefts[-1]
    assert fingerprints(out) == undisturbed


@pytest.mark.parametrize("then", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_damaged_range_is_written_again(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path, then: int
) -> None:
    """One bit of what was done flips on the disk, and another shard is gone."""
    out = tmp_path / "out"
    interrupt(recipe, out, SHARDS, 1, 0, 9)
    ((before, _),) = run_ranks(left_to_read, 1, recipe, out, SHARDS)
    (state,) = tmp_path.glob("*.state")
    folder = state.with_suffix("")
    record = read_journals(state)[0]
    shards = sorted(folder.glob("*.safetensors"))
    with shards[record.file].open("r+b") as file:
        file.seek(record.offset + 17)
        byte = file.read(1)[0]
        file.seek(record.offset + 17)
        file.write(bytes([byte ^ 4]))
    ((after, _),) = run_ranks(left_to_read, 1, recipe, out, SHARDS)
    assert after > before
    shards[-1].unlink()
    assert resume(recipe, out, SHARDS, then).read_bytes >= after
    assert fingerprints(out) == undisturbed


def test_what_an_attempt_left_half_written_does_not_get_into_the_output(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    """A kill while a file was being replaced, a donor's file that is gone since."""
    interrupt(recipe, tmp_path / "out", SHARDS, 2, 1, 3)
    (folder,) = tmp_path.glob(".out.distmerge-????????")
    (folder / "report").mkdir(exist_ok=True)
    for name in ("report/gram.safetensors.4711", ".distmerge.json.12", "tokenizer.json"):
        (folder / name).write_text("half")
    resume(recipe, tmp_path / "out", SHARDS, 2)
    assert fingerprints(tmp_path / "out") == undisturbed


def merge_blindly(recipe: Recipe, out: Path, options: Options, blind: tuple[int, ...]) -> None:
    without_drawing().start()
    prepare(out)
    with mock.patch.object(cases, "cut"):
        test_gather.merge_blindly(recipe, out, options, blind)


def test_ranks_that_do_not_see_the_folder_help_to_go_on(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    interrupt(recipe, tmp_path / "out", SHARDS, 2, 1, 4)
    run_ranks(merge_blindly, 4, recipe, tmp_path / "out", SHARDS, (1, 3))
    assert fingerprints(tmp_path / "out") == undisturbed


def extra(folder: Path) -> Recipe:
    """Two windows by two steps: four outputs."""
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(folder / "step-*")},
        "parameters": {"step": [0, 0.5]},
        "sweep": {"trajectory.window": [2, 3]},
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("swept")
    cases.write_steps(folder, cases.mixed, count=5)
    return extra(folder)


@pytest.fixture(scope="module")
def undisturbed_sweep(swept: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("one") / "out"
    run_ranks(merge, 1, swept, out, SHARDS)
    return fingerprints(out)


def left_to_sum(recipe: Recipe, out: Path) -> tuple[int, int, int]:
    """Bytes that the statistic pass has yet to read, all of them, and those of the merge pass."""
    cases.cut(job=2 * BLOCK)
    plan = distmerge.plan(recipe, shard_size=SHARDS.shard_size)
    (state,) = out.parent.glob(".out.distmerge-????????.state")
    done = {job for part in read_snapshots(state) for job in part.jobs}
    sizes = {n: plan.read_bytes(plan.jobs[n]) for n in plan.trend_jobs}
    left = sum(size for n, size in sizes.items() if n not in done)
    return left, sum(sizes.values()), sum(plan.read_bytes(job) for job in plan.jobs)


@pytest.mark.parametrize(
    ("ranks", "victim", "call", "then"),
    [
        (3, 1, 6, 2),
        pytest.param(1, 0, 9, 3, marks=pytest.mark.slow),
        pytest.param(2, 1, 13, 4, marks=pytest.mark.slow),
    ],
)
def test_the_statistic_is_gone_on_with(
    swept: Recipe,
    undisturbed_sweep: dict[str, str],
    tmp_path: Path,
    ranks: int,
    victim: int,
    call: int,
    then: int,
) -> None:
    """Its sums are exact, so they come out the same, whoever summed up what."""
    out = tmp_path / "out"
    interrupt(swept, out, SHARDS, ranks, victim, call, "sum")
    ((left, whole, merging),) = run_ranks(left_to_sum, 1, swept, out)
    result = resume(swept, out, SHARDS, then)
    assert fingerprints(out) == undisturbed_sweep
    assert result.read_bytes == left + merging
    assert left < whole


@pytest.mark.parametrize("damage", [b"", b'{"jobs": [0], "sums"'], ids=["empty", "torn"])
def test_a_damaged_snapshot_is_done_without(
    swept: Recipe, undisturbed_sweep: dict[str, str], tmp_path: Path, damage: bytes
) -> None:
    """A power cut may leave it so: it is renamed before it is synced."""
    interrupt(swept, tmp_path / "out", SHARDS, 1, 0, 9, "sum")
    (snapshot,) = tmp_path.glob("*.state/summed-*")
    snapshot.write_bytes(damage)
    resume(swept, tmp_path / "out", SHARDS, 1)
    assert fingerprints(tmp_path / "out") == undisturbed_sweep
    assert "it is damaged; what it held is done again" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("ranks", "victim", "then"), [(2, 0, 3), pytest.param(3, 2, 1, marks=pytest.mark.slow)]
)
def test_all_outputs_of_a_sweep_are_gone_on_with(
    swept: Recipe,
    undisturbed_sweep: dict[str, str],
    tmp_path: Path,
    ranks: int,
    victim: int,
    then: int,
) -> None:
    """A job is done when it is in every output; the statistic is not made again."""
    out = tmp_path / "out"
    interrupt(swept, out, SHARDS, ranks, victim, 11)
    result = resume(swept, out, SHARDS, then)
    assert fingerprints(out) == undisturbed_sweep
    ((_, _, whole),) = run_ranks(reads, 1, swept)
    assert 0 < result.read_bytes < whole
    assert result.statistic_seconds == 0


def reads(recipe: Recipe) -> tuple[int, int, int]:
    cases.cut(job=2 * BLOCK)
    return 0, 0, sum(map(distmerge.plan(recipe).read_bytes, distmerge.plan(recipe).jobs))


def another_input(folder: Path) -> None:
    write_checkpoint(
        folder / "step-1",
        cases.small(torch.Generator().manual_seed(7)),
        shards=2,
        config={"n": 1},
    )


def test_other_contents_of_an_input_start_anew(tmp_path: Path) -> None:
    recipe, out = cases.write_steps(tmp_path / "in", cases.small, count=2), tmp_path / "work/out"
    interrupt(recipe, out, SHARDS, 2, 1, 4)
    another_input(tmp_path / "in")
    resume(recipe, out, SHARDS, 2)
    said = out.with_name("log").read_text()
    assert f"{out}: an earlier attempt is dropped: the inputs changed\n" in said
    (tmp_path / "fresh").mkdir()
    run_ranks(merge, 1, recipe, tmp_path / "fresh/out", SHARDS)
    assert fingerprints(out) == fingerprints(tmp_path / "fresh/out")


def merge_wrongly(recipe: Recipe, out: Path) -> None:
    merge(recipe, out, replace(SHARDS, memory="1kB"))


def test_a_mistake_in_how_to_go_on_does_not_cost_what_is_done(
    recipe: Recipe, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupt(recipe, out, SHARDS, 2, 1, 4)
    ((left, whole),) = run_ranks(left_to_read, 1, recipe, out, SHARDS)
    for outcome in observe_ranks(merge_wrongly, 2, recipe, out):
        assert isinstance(outcome.error, UserError), outcome.describe()
    assert resume(recipe, out, SHARDS, 1).read_bytes == left < whole
    assert fingerprints(out) == undisturbed
