"""Ranks share the candidates of a sweep, and all of them get the same results.

The ranks import this module: it does without transformers, which takes them seconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from distmerge.meeting import join
from distmerge.errors import PeerError, RunError
from distmerge.evaluation import measure, measure_all
from distmerge.output import MANIFEST
from distmerge.scoring import Measured
from distmerge.selection import Selection
from distmerge.stream import single_threaded
from tests.support.ranks import observe_ranks, run_ranks

SCRIPT = """
import os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
(folder / "by").write_text(str(os.getppid()))
print(len((folder / "content").read_text()), *[name for name in os.environ if "RANK" in name])
"""


def by_command(folder: Path, script: str) -> Selection:
    (folder / "eval.py").write_text(script)
    line = (sys.executable, str(folder / "eval.py"), "{model}")
    return Selection(metric="command", command=line, goal="max")


def candidates(folder: Path, count: int) -> list[Path]:
    """Folders with a file of 10, 20, ... letters."""
    folders = [folder / f"step={number}" for number in range(count)]
    for number, each in enumerate(folders, start=1):
        each.mkdir()
        (each / "content").write_text("x" * 10 * number)
        (each / MANIFEST).write_text(f"{number}")
    return folders


def select(selection: Selection, models: list[Path], blind: tuple[int, ...] = ()) -> list[Measured]:
    """The `blind` ranks look for the candidates where there are none."""
    with join(use_cuda=False) as world:
        seen = [model / "none" for model in models] if world.rank in blind else models
        return measure_all(world, selection, seen, use_gpu=True)


@pytest.mark.parametrize(("ranks", "used"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_candidates_are_dealt_to_the_ranks(tmp_path: Path, ranks: int, used: int) -> None:
    selection, models = by_command(tmp_path, SCRIPT), candidates(tmp_path, 3)
    expected = [Measured(number=10), Measured(number=20), Measured(number=30)]
    assert run_ranks(select, ranks, selection, models) == [expected] * ranks
    assert len({(model / "by").read_text() for model in models}) == used


def test_ranks_that_do_not_see_the_outputs_leave_them_to_others(tmp_path: Path) -> None:
    selection, models = by_command(tmp_path, SCRIPT), candidates(tmp_path, 3)
    expected = [Measured(number=10), Measured(number=20), Measured(number=30)]
    assert run_ranks(select, 3, selection, models, (0, 2)) == [expected] * 3
    assert len({(model / "by").read_text() for model in models}) == 1


def test_without_a_rank_that_sees_the_outputs_all_stop(tmp_path: Path) -> None:
    selection, models = by_command(tmp_path, SCRIPT), candidates(tmp_path, 3)
    for outcome in observe_ranks(select, 2, selection, models, (0, 1)):
        assert isinstance(outcome.error, RunError), outcome.describe()
        assert str(outcome.error) == "select: no rank sees all outputs and the text"
        assert outcome.error.reported == (outcome.rank > 0)


def test_a_command_that_fails_on_one_rank_ends_those_of_the_others(tmp_path: Path) -> None:
    slow_but_second = (
        "import sys, time\nif '=1' in sys.argv[1]: sys.exit('no data')\ntime.sleep(50)"
    )
    selection, models = by_command(tmp_path, slow_but_second), candidates(tmp_path, 3)
    started = time.monotonic()
    zero, one, two = observe_ranks(select, 3, selection, models)
    assert time.monotonic() - started < 20
    assert isinstance(one.error, RunError)
    assert str(one.error).endswith("failed: exit code 1\n  no data")
    for other in (zero, two):
        assert isinstance(other.error, PeerError), other.describe()
        assert str(other.error).endswith("failed: exit code 1\n  no data")


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_loss_has_the_same_bits_on_any_number_of_ranks(tmp_path: Path, ranks: int) -> None:
    from tests.support.language import save_language_model  # noqa: PLC0415

    (tmp_path / "text").write_text("What the ranks are to measure. " * 20)
    selection = Selection(metric="loss", text=str(tmp_path / "text"))
    models = [save_language_model(tmp_path / f"step={seed}", seed) for seed in range(3)]
    for model in models:
        (model / MANIFEST).write_text(model.name)
    with single_threaded():  # as the ranks are
        alone = [measure(selection, model) for model in models]
    assert len({measured.score for measured in alone}) == 3
    assert run_ranks(select, ranks, selection, models) == [alone] * ranks
