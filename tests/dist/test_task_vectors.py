"""Merges on task vectors write the same bytes at any number of ranks and in any memory, and go on.

In the small memory the large matrices are over the budget: all ranks work on each together.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch

import distmerge
from distmerge import monitor
from distmerge.assembly import AssembleMode
from distmerge.assignment import assign, batches
from distmerge.budget import budget, over_budget
from distmerge.errors import OutputError
from distmerge.log import parse_bytes
from distmerge.pipeline import MergeResult, Options
from distmerge.presentation import describe
from distmerge.tasks.engine import TaskEngine
from distmerge.writer import ShardWriter
from tests.dist import cases
from tests.dist.cases import fingerprints
from tests.support.checkpoints import read_output
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks
from tests.support.tasks import SHAPES, Recipe, family, recipe, write_family

LARGE = {
    **SHAPES,
    "model.layers.1.mlp.up_proj.weight": (4000, 48),
    "model.layers.1.mlp.down_proj.weight": (48, 4000),
}
TASKS = 2


def merge(made: Recipe, out: Path, options: Options) -> MergeResult:
    """What a rank does: with small panels, and without plots."""
    prepare()
    return distmerge.merge(made, out, options=options)


def prepare() -> None:
    cases.cut()
    without_drawing().start()
    mock.patch.multiple(monitor, SILENCE=5, INTERVAL=0.1).start()


def least_memory(made: Recipe) -> str:
    """The smallest budget with which the recipe can be merged."""
    plan = distmerge.plan(made)
    try:
        describe(plan, ranks=1, memory="1kB")
    except OutputError as error:
        found = re.search(r"at least (\w+)", str(error))
        assert found is not None
        return found[1]
    raise AssertionError("1 kB is too little")


def planned(made: Recipe) -> tuple[str, list[int]]:
    """The smallest budget, and the jobs whose matrices it can't hold."""
    cases.cut()
    memory = least_memory(made)
    plan = distmerge.plan(made)
    return memory, over_budget(plan, budget(plan, parse_bytes(memory)))


class Reference(NamedTuple):
    """A merge by one process that holds all it needs."""

    made: Recipe
    files: dict[str, str]
    memory: str


RECIPES: dict[str, Callable[[Path], Recipe]] = {
    "svc": lambda folder: recipe(folder, "task_arithmetic", TASKS, calibrate={}),
    "svc on dare_ties": lambda folder: recipe(
        folder, "dare_ties", TASKS, own={"density": 0.4}, calibrate={}
    ),
    "svc on tsv_m": lambda folder: recipe(folder, "tsv_m", TASKS, calibrate={}),
    "iso_cts": lambda folder: recipe(folder, "iso_cts", TASKS),
    "ties sweep": lambda folder: {
        **recipe(folder, "ties", TASKS, own={"density": 0.4}, calibrate={}),
        "sweep": {"parameters.lambda": [0.5, 1], "calibrate.alpha": ["auto", 1]},
    },
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, family(LARGE, TASKS, dtype=torch.bfloat16), shards=2)

    @cache
    def refer(name: str) -> Reference:
        made, out = RECIPES[name](folder), folder / name
        run_ranks(merge, 1, made, out, Options())
        memory, over = run_ranks(planned, 1, made)[0]
        assert over, "the smallest budget holds all matrices"
        return Reference(made, fingerprints(out), memory)

    return refer


@pytest.fixture
def reference(request: pytest.FixtureRequest, references: Callable[[str], Reference]) -> Reference:
    return references(request.param)


def on(*names: str) -> pytest.MarkDecorator:
    """For these recipes."""
    return pytest.mark.parametrize("reference", names, indirect=True)


@on("svc")
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_writes_the_same_bytes(
    reference: Reference, tmp_path: Path, ranks: int
) -> None:
    run_ranks(merge, ranks, reference.made, tmp_path / "out", Options())
    assert fingerprints(tmp_path / "out") == reference.files


@on(*list(RECIPES)[1:])
def test_any_method_writes_the_same_bytes_on_three_ranks(
    reference: Reference, tmp_path: Path
) -> None:
    run_ranks(merge, 3, reference.made, tmp_path / "out", Options())
    assert fingerprints(tmp_path / "out") == reference.files


@on(*RECIPES)
def test_matrices_over_the_budget_come_out_the_same(reference: Reference, tmp_path: Path) -> None:
    run_ranks(merge, 3, reference.made, tmp_path / "out", Options(memory=reference.memory))
    assert fingerprints(tmp_path / "out") == reference.files


@on("svc", "ties sweep")
@pytest.mark.parametrize(("ranks", "assemble"), [(1, "direct"), (2, "gather")])
def test_so_they_do_on_one_rank_and_where_results_are_gathered(
    reference: Reference, tmp_path: Path, ranks: int, assemble: AssembleMode
) -> None:
    options = Options(memory=reference.memory, assemble=assemble)
    run_ranks(merge, ranks, reference.made, tmp_path / "out", options)
    assert fingerprints(tmp_path / "out") == reference.files


@on("svc on dare_ties", "ties sweep")
def test_results_are_gathered_by_the_ranks_that_see_the_output(
    reference: Reference, tmp_path: Path
) -> None:
    run_ranks(merge, 3, reference.made, tmp_path / "out", Options(assemble="gather"))
    assert fingerprints(tmp_path / "out") == reference.files


def test_element_wise_merges_of_tensors_over_the_budget(tmp_path: Path) -> None:
    """TIES looks for its thresholds in several passes over the files."""
    write_family(tmp_path, family({"x": (300, 4000), "y": (50,)}, TASKS, dtype=torch.bfloat16))
    for method in ("ties", "dare_ties"):
        made = recipe(tmp_path, method, TASKS, own={"density": 0.3})
        run_ranks(merge, 1, made, tmp_path / method / "held", Options())
        memory, _ = run_ranks(planned, 1, made)[0]
        result = run_ranks(merge, 1, made, tmp_path / method / "small", Options(memory=memory))[0]
        inputs = sum(c.nbytes for c in distmerge.plan(made).inputs)
        assert result.read_bytes > inputs, "all was held"
        assert fingerprints(tmp_path / method / "small") == fingerprints(tmp_path / method / "held")


def test_two_ranks_share_matrices_of_which_one_is_nearly_all(tmp_path: Path) -> None:
    shapes = {"big.weight": (64, 3000), **{f"small.{n}.weight": (4, 6) for n in range(5)}}
    write_family(tmp_path, family(shapes, TASKS))
    made = recipe(tmp_path, "task_arithmetic", TASKS, calibrate={})
    plan = distmerge.plan(made)
    names = [{plan.tensors[plan.jobs[n].tensor].name for n in jobs} for jobs in assign(plan, 2)]
    assert names == [{"big.weight"}, {f"small.{n}.weight" for n in range(5)}]
    run_ranks(merge, 1, made, tmp_path / "one", Options())
    run_ranks(merge, 2, made, tmp_path / "two", Options())
    assert fingerprints(tmp_path / "two") == fingerprints(tmp_path / "one")


def merge_until(made: Recipe, out: Path, options: Options, place: str, call: int) -> None:
    """Merge, but the `call`-th write of this rank fails."""
    prepare()
    real: Callable[..., object] = getattr(ShardWriter, place)
    calls = itertools.count(1)

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) >= call:
            raise ValueError("injected")
        return real(*args, **kwargs)

    mock.patch.object(ShardWriter, place, failing).start()
    distmerge.merge(made, out, options=options)


@on("svc on dare_ties", "ties sweep")
@pytest.mark.parametrize(
    ("place", "call", "small"), [("write", 14, False), ("write", 1, True), ("write_rows", 9, True)]
)
def test_a_failed_run_is_gone_on_with(
    reference: Reference, tmp_path: Path, place: str, call: int, small: bool
) -> None:
    out = tmp_path / "out"
    options = Options(memory=reference.memory if small else None)
    ends = observe_ranks(merge_until, 2, reference.made, out, options, place, call)
    assert all(end.failed for end in ends)
    assert not out.exists()
    result = run_ranks(merge, 3, reference.made, out, options)[0]
    assert fingerprints(out) == reference.files
    plan = distmerge.plan(reference.made)
    if place == "write":
        assert result.written_bytes < plan.output_bytes, "nothing was gone on with"


def test_a_rank_that_can_t_decompose_stops_all(tmp_path: Path) -> None:
    models = family(LARGE, TASKS)
    models[1]["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    write_family(tmp_path, models)
    made = recipe(tmp_path, "task_arithmetic", TASKS, calibrate={})
    for memory in (None, run_ranks(planned, 1, made)[0][0]):
        ends = observe_ranks(merge, 2, made, tmp_path / "out", Options(memory=memory))
        told = [str(end.error) for end in ends]
        assert all("task-1/model.safetensors" in text for text in told), told
        assert all("up_proj.weight holds 1 NaN or Inf" in text for text in told), told
        assert not (tmp_path / "out").exists()


def merge_in_batches(made: Recipe, out: Path) -> None:
    """As on a GPU: small matrices of one shape are solved together."""
    prepare()

    def batched(engine: TaskEngine, jobs: Sequence[int]) -> list[list[int]]:
        first = {n: batch[0] for batch in batches(distmerge.plan(made)) for n in batch}
        return [list(g) for _, g in itertools.groupby(jobs, lambda n: first.get(n, n))]

    mock.patch.object(TaskEngine, "_batched", batched).start()
    distmerge.merge(made, out)


def test_batches_of_small_matrices_come_out_as_if_each_were_alone(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n}.experts.{e}.w.weight": (40, 24) for n in (0, 1) for e in range(4)}
    write_family(tmp_path, family(shapes, TASKS))
    for method in ("task_arithmetic", "tsv_m"):
        made: Recipe = {
            **recipe(tmp_path, method, TASKS, calibrate={}),
            "sweep": {"parameters.lambda": [0.5, 1]},
        }
        assert [len(batch) for batch in batches(distmerge.plan(made))] == [8]
        together, alone = tmp_path / method / "together", tmp_path / method / "alone"
        run_ranks(merge_in_batches, 1, made, together)
        run_ranks(merge, 1, made, alone, Options())
        for name in ("lambda=0.5", "lambda=1"):
            found, expected = (read_output(folder / name) for folder in (together, alone))
            for tensor, values in expected.items():
                torch.testing.assert_close(found[tensor], values, rtol=1e-6, atol=1e-6)
        numbers = [json.loads((f / "report/spectra.json").read_bytes()) for f in (together, alone)]
        assert [entry["tensor"] for entry in numbers[0]] == list(shapes)
        for ours, theirs in zip(*numbers, strict=True):
            assert ours["products"] == pytest.approx(theirs["products"], rel=1e-5)
            for name, described in theirs["outputs"].items():
                assert ours["outputs"][name]["quantiles"] == pytest.approx(
                    described["quantiles"], rel=1e-4
                )
