"""Verification by any number of ranks: they share the work, and all return the same findings."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest

import distmerge
from distmerge import Verification, cli
from distmerge.errors import SourceError
from distmerge.output import MANIFEST
from distmerge.pipeline import Options
from distmerge.verification import recompute, scan
from tests.dist import cases
from tests.dist.cases import BLOCK, Recipe
from tests.support.damage import flip, place
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks

SMALL_SHARDS = Options(shard_size="200kB")
WIDE = 523 * 257
CHUNK = 3 * BLOCK + 7


def merge(recipe: Recipe, out: Path) -> None:
    cases.cut()
    without_drawing().start()
    distmerge.merge(recipe, out, options=SMALL_SHARDS)


def prepare() -> None:
    """Many jobs and chunks for a tensor, so that all ranks have some."""
    cases.cut()
    mock.patch.object(scan, "CHUNK", CHUNK).start()


def verify(out: Path, share: str | None) -> Verification:
    prepare()
    return distmerge.verify(out, recompute=share)


def linear(folder: Path) -> Recipe:
    models: list[object] = [
        {"model": str(folder / f"step-{i}"), "parameters": {"weight": 1 + i}} for i in range(3)
    ]
    return {"merge_method": "linear", "models": models}  # type: ignore[dict-item]


def extra(folder: Path, step: object) -> Recipe:
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(folder / "step-*"), "window": 2},
        "parameters": {"step": step, "exclude": ["half"]},  # type: ignore[dict-item]
    }


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sound outputs of every method, made by one process."""
    folder = tmp_path_factory.mktemp("run")
    recipes = {"average": cases.write_steps(folder, cases.mixed, count=4)}
    recipes["linear"] = linear(folder)
    recipes["extra"] = extra(folder, 0.5)
    recipes["sweep"] = {**extra(folder, [0, 1]), "sweep": {"trajectory.window": [1, 3]}}
    for name, recipe in recipes.items():
        run_ranks(merge, 1, recipe, folder / name / "out")
    return {name: folder / name / "out" for name in recipes}


def same(results: list[Verification]) -> Verification:
    """What one rank returned; all must have found the same."""
    for result in results[1:]:
        assert (result.findings, result.notes) == (results[0].findings, results[0].notes)
        assert (result.recomputed, result.seed) == (results[0].recomputed, results[0].seed)
    return results[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["average", "linear", "extra", "sweep"])
def test_what_one_process_wrote_is_sound_to_any_number_of_ranks(
    outputs: dict[str, Path], name: str, ranks: int
) -> None:
    found = same(run_ranks(verify, ranks, outputs[name], "all"))
    assert (found.findings, found.notes, found.ranks) == ((), (), ranks)
    assert found.recomputed == 10 * (4 if name == "sweep" else 1)


@pytest.fixture
def damaged(outputs: dict[str, Path], tmp_path: Path) -> Path:
    """Wrong are the first, a middle and the last element of a tensor, and a file beside it."""
    out = Path(shutil.copytree(outputs["average"], tmp_path / "out"))
    at = place(out, "wide")
    for element in (1, 2 * 4 * BLOCK, WIDE - 1):
        flip(at.path, at.start + 2 * element)
    (out / "config.json").write_text("{}")
    return out


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_rank_returns_what_all_have_found(damaged: Path, ranks: int) -> None:
    found = same(run_ranks(verify, ranks, damaged, "all"))
    shard = place(damaged, "wide").path.name
    assert [finding.where for finding in found.findings] == [
        "config.json",
        "config.json",
        shard,
        f"{shard}, wide",
    ]
    what = found.findings[-1].what
    assert what.startswith(f"3 of {WIDE} elements differ from what the inputs give, the first")
    assert " is element 1, by up to " in what


def verify_blindly(out: Path, blind: tuple[int, ...]) -> Verification:
    """On the ranks `blind`, OUT is not there."""
    prepare()
    is_file = Path.is_file

    def seen(path: Path) -> bool:
        hidden = path == out / MANIFEST and int(os.environ["RANK"]) in blind
        return not hidden and is_file(path)

    mock.patch.object(Path, "is_file", seen).start()
    return distmerge.verify(out, recompute="all")


def test_ranks_that_do_not_see_the_output_leave_it_to_the_others(damaged: Path) -> None:
    found = same(run_ranks(verify_blindly, 3, damaged, (1,)))
    assert len(found.findings) == 4


def command(arguments: list[str]) -> None:
    prepare()
    mock.patch.object(cli, "LEAVE_LAST", 0).start()
    sys.argv[:] = ["distmerge", "verify", *arguments]
    with suppress(SystemExit):  # of success: other codes end the process at once
        cli.main()


@pytest.mark.parametrize(
    ("arguments", "code"), [([], 1), (["--recompute", "1%"], 1), (["--recompute", "x"], 2)]
)
def test_all_ranks_end_with_the_same_code(damaged: Path, arguments: list[str], code: int) -> None:
    outcomes = observe_ranks(command, 2, [str(damaged), *arguments])
    assert [outcome.exit_code for outcome in outcomes] == [code] * 2


def command_ended_by_its_launcher(arguments: list[str]) -> None:
    """SIGTERM comes while the rank waits for rank 0 to print."""

    def stop(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    mock.patch("time.sleep", stop).start()
    command(arguments)


def test_a_launcher_that_stops_a_rank_changes_neither_code_nor_output(damaged: Path) -> None:
    outcomes = observe_ranks(command_ended_by_its_launcher, 2, [str(damaged)])
    assert [(outcome.exit_code, outcome.stderr) for outcome in outcomes] == [(1, "")] * 2


def test_a_folder_that_no_merge_left_ends_all_ranks_with_2(tmp_path: Path) -> None:
    outcomes = observe_ranks(command, 3, [str(tmp_path)])
    assert [outcome.exit_code for outcome in outcomes] == [2] * 3
    assert outcomes[0].stderr.count("error:") == 1
    assert "an output of distmerge?" in outcomes[0].stderr


def test_the_command_exits_with_0_where_all_is_sound(outputs: dict[str, Path]) -> None:
    outcomes = observe_ranks(command, 2, [str(outputs["average"]), "--recompute", "all"])
    assert [(outcome.exit_code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 2


def verify_while_inputs_vanish(out: Path) -> Verification:
    """Rank 1 can't open the inputs when they are to be merged again."""
    prepare()
    if os.environ["RANK"] == "1":
        gone = SourceError("step-1: no such folder")
        mock.patch.object(recompute, "plan_again", side_effect=gone).start()
    return distmerge.verify(out, recompute="all")


def test_a_rank_that_can_not_read_the_inputs_stops_all(outputs: dict[str, Path]) -> None:
    outcomes = observe_ranks(verify_while_inputs_vanish, 2, outputs["average"])
    for outcome in outcomes:
        assert isinstance(outcome.error, distmerge.DistmergeError), outcome.describe()
        assert "step-1: no such folder" in str(outcome.error)
        assert outcome.error.exit_code == 2
