"""One output in several attempts: which of them is gone on with, and what remains beside OUT."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import attempt as attempts
from distmerge import output, pipeline
from distmerge.attempt import Attempt, Lock, begin, identity
from distmerge.document import Plain
from distmerge.errors import OutputError, RunError
from distmerge.pipeline import MergeResult, Options
from distmerge.planner import Plan
from tests.support.checkpoints import write_checkpoint
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks
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


DEFAULTS, REPLACE = Options(), Options(overwrite=True)


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
    (attempt.state / "written-0-aa").write_text("0 0 1 crc:00000000\n")
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


HOLD = """
import fcntl, os, sys, time

file = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def untold(folder: Path) -> dict[str, bytes | None]:
    """All but the locks, which say who held them last."""
    return {name: held for name, held in tree(folder).items() if not name.endswith("/lock")}


@pytest.mark.parametrize("other", [False, True])
def test_a_run_that_is_under_way_is_not_disturbed(
    tmp_path: Path, plan: Plan, wanted: dict[str, str], other: bool
) -> None:
    """One of the same recipe, or of another."""
    out = tmp_path / "work/out"
    out.parent.mkdir()
    theirs = {**wanted, "plan": "another"} if other else wanted
    killed(out, plan, theirs)
    _, lock = begin(out, plan, theirs, overwrite=False, restart=False)
    before = untold(out.parent)
    with pytest.raises(OutputError, match="another run is writing it") as raised:
        start(out, plan, wanted)
    assert raised.value.exit_code == 2
    assert f"(process {os.getpid()} on {os.uname().nodename}); wait for it" in str(raised.value)
    assert untold(out.parent) == before
    lock.release()
    assert start(out, plan, wanted).resumed != other


def test_a_kill_lets_the_lock_go(tmp_path: Path, plan: Plan, wanted: dict[str, str]) -> None:
    first = killed(tmp_path / "out", plan, wanted)
    command = [sys.executable, "-c", HOLD, str(first.state / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run is writing it"):
            start(tmp_path / "out", plan, wanted)
        holder.kill()
    assert start(tmp_path / "out", plan, wanted).resumed


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


def finish_and_fail(recipe: Recipe, out: Path) -> None:
    """A run that ends, for all that OUT can tell, between the rename and the report."""
    with (
        mock.patch.object(pipeline, "_report", side_effect=OSError(5, "no report")),
        pytest.raises(RunError, match="no report"),
    ):
        distmerge.merge(recipe, out)


def finish(recipe: Recipe, out: Path, options: Options = DEFAULTS) -> MergeResult:
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


def merge_over(recipe: Recipe, out: Path, place: str, ending: str) -> None:
    """Replace OUT; die before a rename to, or removal of, what ends so."""
    holder, name = {"rename": (Path, "rename"), "rmtree": (shutil, "rmtree")}[place]
    real: Callable[..., object] = getattr(holder, name)

    def failing(*args: object, **kwargs: object) -> object:
        if str(args[-1]).endswith(ending):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    mock.patch.object(holder, name, failing).start()
    distmerge.merge(recipe, out, options=REPLACE)


def dies(recipe: Recipe, out: Path, place: str, ending: str) -> None:
    (outcome,) = observe_ranks(merge_over, 1, recipe, out, place, ending)
    assert outcome.exit_code == -signal.SIGKILL, outcome.describe()


@pytest.fixture
def other(tmp_path: Path) -> Recipe:
    return average(tmp_path / "in/step-*", last=2)


def test_what_out_held_comes_back_if_a_kill_met_its_replacement(
    recipe: Recipe, other: Recipe, out: Path
) -> None:
    """Between the two renames of --overwrite: the same command goes on, any other finds it."""
    distmerge.merge(recipe, out)
    held = tree(out)
    dies(other, out, "rename", out.name)
    assert not out.exists()
    with pytest.raises(OutputError, match="it exists and is not empty; --overwrite"):
        distmerge.merge(recipe, out)
    assert tree(out) == held
    result = finish(other, out, REPLACE)
    assert result.read_bytes == 0
    assert tree(out) != held


def test_an_empty_folder_in_its_place_does_not_cost_it(
    recipe: Recipe, other: Recipe, out: Path
) -> None:
    """As of a script that makes the folder before every attempt."""
    distmerge.merge(recipe, out)
    held = tree(out)
    dies(other, out, "rename", out.name)
    out.mkdir()
    with pytest.raises(OutputError, match="it exists and is not empty; --overwrite"):
        distmerge.merge(other, out)
    assert tree(out) == held
    finish(other, out, REPLACE)


def test_a_kill_right_after_the_replacement_leaves_nothing_of_the_old(
    recipe: Recipe, other: Recipe, out: Path
) -> None:
    distmerge.merge(recipe, out)
    old = tree(out)
    dies(other, out, "rmtree", "-replaced")
    assert any(name.endswith("-replaced") for name in names(out))
    assert finish(other, out, REPLACE).read_bytes == 0
    assert tree(out) != old


def test_a_mark_of_an_end_that_never_came_is_not_believed(
    recipe: Recipe, out: Path, plan: Plan, wanted: dict[str, str]
) -> None:
    """OUT holds what the same recipe made before. A new attempt is killed just before its rename,
    then a --restart while it throws that away: what OUT holds is not the new attempt's."""
    distmerge.merge(recipe, out)
    dies(recipe, out, "rename", "-replaced")
    (state,) = out.parent.glob("*.state")
    assert (state / "renaming").is_file()
    journal = state / "written-0-ff"
    journal.mkdir()  # can't be unlinked: it stops there, with the data gone
    with pytest.raises(RunError):
        distmerge.merge(recipe, out, options=replace(REPLACE, restart=True))
    assert not state.with_suffix("").exists()
    journal.rmdir()
    assert finish(recipe, out, REPLACE).read_bytes > 0


def test_a_choice_that_failed_is_made_by_the_same_command(
    recipe: Recipe, out: Path, tmp_path: Path
) -> None:
    """The outputs stay, and no input is read for it."""
    script = tmp_path / "eval.sh"
    script.write_text("exit 3")
    asked = {"command": f"sh {script} {{model}}", "goal": "min"}
    sweep: Recipe = {**recipe, "sweep": {"trajectory.last": [2, 3]}, "select": asked}  # type: ignore[dict-item]
    with pytest.raises(RunError, match="exit code 3"):
        distmerge.merge(sweep, out)
    made = tree(out)
    assert not (out / "best").exists()
    script.write_text("echo 0.5")
    result = finish(sweep, out)
    assert (result.read_bytes, result.written_bytes) == (0, 0)
    assert result.scores is not None
    assert (out / "best").readlink() == Path(result.scores["best"])
    assert made.items() <= tree(out).items()


@pytest.mark.parametrize("done", [0, 2])
def test_room_that_is_taken_already_is_not_asked_for_again(
    tmp_path: Path, plan: Plan, done: int
) -> None:
    """By its own shards, as far as they are on the disk: a sparse one is not."""
    folder = tmp_path / ".out.distmerge-12345678"
    folder.mkdir()
    big = replace(plan, shards=tuple(s._replace(size=2**21) for s in plan.shards))
    assert big.output_bytes == 2**21
    with (folder / big.files[0].name).open("wb") as file:
        os.truncate(file.fileno(), 2**21)
        os.posix_fallocate(file.fileno(), 0, done * 2**20 or 1)
    free = mock.Mock(free=output._SPARE + (2 - done) * 2**20 + 4096)
    with mock.patch.object(shutil, "disk_usage", return_value=free):
        output.create_folders(folder, big)
    free.free -= 3 * 4096
    with (
        mock.patch.object(shutil, "disk_usage", return_value=free),
        pytest.raises(OutputError, match=r"6\d(\.\d)? MB are needed, 6\d(\.\d)? MB are free"),
    ):
        output.create_folders(folder, big)


def test_a_full_disk_does_not_keep_an_attempt_from_being_taken_up(
    out: Path, plan: Plan, wanted: dict[str, str]
) -> None:
    """Its identity need not be written again."""
    killed(out, plan, wanted)
    with mock.patch.object(attempts, "replace_text", side_effect=OSError(28, "full")):
        assert start(out, plan, wanted).resumed
