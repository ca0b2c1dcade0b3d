"""One output in several attempts: which earlier one is gone on with, and what remains beside OUT."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import attempt as attempts
from distmerge import output
from distmerge import report as reports
from distmerge.attempt import Attempt, Lock, begin, identity
from distmerge.document import Plain
from distmerge.errors import OutputError, RunError
from distmerge.pipeline import MergeResult, Options
from distmerge.planner import Plan
from tests.support.checkpoints import write_checkpoint
from tests.support.drawing import without_drawing
from tests.unit.recipes import average
from tests.unit.refusals import tree

Recipe = dict[str, Plain]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"in/step-{step}", {"a": torch.full((50,), float(step))})
    return average(tmp_path / "in/step-*")


@pytest.fixture
def plan(recipe: Recipe) -> Plan:
    return distmerge.plan(recipe)


@pytest.fixture
def wanted(plan: Plan) -> dict[str, str]:
    return identity(plan, "cpu", allow_nonfinite=False)


@pytest.fixture(params=["out", "out*[0-9]?", ".hidden", "with space\nand line", "[a]"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Also names that a glob would take for patterns."""
    (tmp_path / "work").mkdir()
    name: str = request.param
    return tmp_path / "work" / name


def names(out: Path) -> set[str]:
    return {path.name for path in out.parent.iterdir()}


def start(out: Path, plan: Plan, wanted: dict[str, str], *, restart: bool = False) -> Attempt:
    """Begin, and let the lock go as a kill does."""
    attempt, lock = begin(out, plan, wanted, overwrite=False, restart=restart)
    lock.release()
    return attempt


def killed(out: Path, plan: Plan, wanted: dict[str, str]) -> Attempt:
    """An attempt that has written something and was killed."""
    attempt = start(out, plan, wanted)
    output.create_folders(attempt.folder, plan)
    (attempt.state / "written-0-aa").write_text("0 0 1 00000000\n")
    return attempt


def test_an_attempt_is_found_again(out: Path, plan: Plan, wanted: dict[str, str]) -> None:
    first = killed(out, plan, wanted)
    assert not first.resumed
    assert names(out) == {first.folder.name, first.state.name}
    again = start(out, plan, wanted)
    assert again.resumed
    assert (again.folder, again.state) == (first.folder, first.state)
    assert (again.state / "written-0-aa").is_file()
    attempts.discard(again)
    assert names(out) == set()


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("plan", "the recipe changed, or the inputs' tensors"),
        ("inputs", "the inputs changed"),
        ("versions", "versions changed"),
        ("device", "the device changed"),
        ("nonfinite", "--allow-nonfinite changed"),
    ],
)
def test_another_identity_starts_anew_and_says_why(
    tmp_path: Path,
    plan: Plan,
    wanted: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    key: str,
    why: str,
) -> None:
    out = tmp_path / "work/out"
    out.parent.mkdir()
    first = killed(out, plan, {**wanted, key: "something else"})
    attempt = start(out, plan, wanted)
    assert not attempt.resumed
    assert names(out) == {attempt.state.name} != {first.state.name}
    assert [record.getMessage() for record in caplog.records] == [
        f"{out}: an earlier attempt is dropped: {why}"
    ]


def test_all_reasons_are_told(
    tmp_path: Path, plan: Plan, wanted: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path / "out", plan, {**wanted, "inputs": "x", "device": "y"})
    start(tmp_path / "out", plan, wanted)
    assert "dropped: the inputs changed; the device changed" in caplog.text


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"plan": 1}', "\0"])
def test_an_attempt_without_a_readable_identity_is_dropped(
    tmp_path: Path,
    plan: Plan,
    wanted: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    content: str,
) -> None:
    first = killed(tmp_path / "out", plan, {**wanted, "device": "y"})
    (first.state / "identity.json").write_text(content)
    start(tmp_path / "out", plan, wanted)
    assert "an earlier attempt is dropped: nothing is known of it" in caplog.text
    assert not first.folder.exists()


def test_a_folder_without_a_state_is_removed_and_others_are_not(
    out: Path, plan: Plan, wanted: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """OUT's own leftovers only: neighbours' names begin or end in the same way."""
    neighbours = [
        f".{out.name}.distmerge-12345678x", f".x{out.name}.distmerge-12345678",
        f"{out.name}.distmerge-12345678", f".{out.name}2.distmerge-12345678",
    ]  # fmt: skip
    for name in [*neighbours, f".{out.name}.distmerge-12345678"]:
        (out.parent / name).mkdir()
    attempt = start(out, plan, wanted)
    assert names(out) == {attempt.state.name, *neighbours}
    assert ".distmerge-12345678: removed; nothing is known of it" in caplog.text


def test_restart_throws_away_what_is_done(out: Path, plan: Plan, wanted: dict[str, str]) -> None:
    first = killed(out, plan, wanted)
    attempt = start(out, plan, wanted, restart=True)
    assert not attempt.resumed
    assert not first.folder.exists()
    assert sorted(path.name for path in attempt.state.iterdir()) == ["identity.json", "lock"]


def test_journals_without_data_are_nothing(out: Path, plan: Plan, wanted: dict[str, str]) -> None:
    shutil.rmtree(killed(out, plan, wanted).folder)
    attempt = start(out, plan, wanted)
    assert not attempt.resumed
    assert not list(attempt.state.glob("written-*"))


def hold(path: Path, out: Path, ready: Callable[[], None]) -> None:
    Lock(path, out)
    ready()
    signal.pause()


@pytest.mark.parametrize("other", [False, True])
def test_a_run_that_another_process_writes_is_refused(
    tmp_path: Path, plan: Plan, wanted: dict[str, str], other: bool
) -> None:
    """Of the same recipe and of another; a kill lets the lock go."""
    out = tmp_path / "work/out"
    out.parent.mkdir()
    first = killed(out, plan, {**wanted, "plan": "another"} if other else wanted)
    before = tree(out.parent)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(first.state / "lock", out, ready.set))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(OutputError, match="another run is writing it") as raised:
            start(out, plan, wanted)
    finally:
        holder.kill()
        holder.join()
    assert raised.value.exit_code == 2
    assert f"(process {holder.pid} on {os.uname().nodename}); wait for it" in str(raised.value)
    after = tree(out.parent)
    assert {n: c for n, c in after.items() if "lock" not in n} == {
        n: c for n, c in before.items() if "lock" not in n
    }
    assert start(out, plan, wanted).resumed != other


def test_a_lock_that_went_with_its_run_is_none(tmp_path: Path) -> None:
    """Its run ends after another has opened the file, and before that locks it: who comes third
    would make a new file and hold that."""
    real = os.open

    def slow(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = real(path, flags, mode)
        path.unlink()
        return descriptor

    with (
        mock.patch.object(os, "open", slow),
        pytest.raises(OutputError, match="another run has just ended there; start again"),
    ):
        Lock(tmp_path / "lock", tmp_path / "out")


def finish_and_fail(recipe: Recipe, out: Path, *, overwrite: bool = False) -> None:
    """A run that is killed, as far as OUT can tell, between the rename and the report."""
    with (
        mock.patch.object(reports, "make", side_effect=OSError(5, "killed")),
        mock.patch.object(distmerge.pipeline, "_report", lambda recipe, out: reports.make(out)),
        pytest.raises(RunError, match="killed"),
    ):
        distmerge.merge(recipe, out, options=Options(overwrite=overwrite))


def finish(recipe: Recipe, out: Path, options: Options = Options()) -> MergeResult:
    """Go on to the end: OUT alone remains, beside the cache."""
    with without_drawing():
        result = distmerge.merge(recipe, out, options=options)
    assert names(out) <= {out.name, ".distmerge"}
    return result


@pytest.mark.parametrize("options", [Options(), Options(overwrite=True), Options(restart=True)])
def test_what_comes_after_the_rename_is_done_alone(
    recipe: Recipe, out: Path, options: Options
) -> None:
    finish_and_fail(recipe, out)
    kept = tree(out)
    strays = [out / "report/.report.json.4711", out / ".best.12"]
    (out / "report").mkdir()
    for path in strays:
        path.write_text("cut short by a kill")
    result = finish(recipe, out, options)
    assert (result.read_bytes, result.written_bytes) == (0, 0)
    assert {name: held for name, held in tree(out).items() if name != "report"} == kept
    with pytest.raises(OutputError, match="it exists and is not empty"):
        finish(recipe, out)


def test_an_end_of_which_out_knows_nothing_is_none(recipe: Recipe, out: Path) -> None:
    """Somebody has removed or replaced OUT after the rename: all is done again."""
    finish_and_fail(recipe, out)
    shutil.rmtree(out)
    assert finish(recipe, out).read_bytes > 0


def kill_at_rename(recipe: Recipe, out: Path, call: int) -> None:
    """Die at call number `call` of Path.rename, before it does anything."""
    real, calls = Path.rename, iter(range(1, 100))

    def rename(self: Path, target: Path) -> Path:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, target)

    with mock.patch.object(Path, "rename", rename):
        distmerge.merge(recipe, out, options=Options(overwrite=True))


def died(recipe: Recipe, out: Path, call: int) -> None:
    process = multiprocessing.get_context("fork").Process(
        target=kill_at_rename, args=(recipe, out, call)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
