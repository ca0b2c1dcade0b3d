"""Small matrices of one shape solved as one batch, as on a GPU, but here on the CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch

import distmerge
from distmerge.assignment import batches
from distmerge.pipeline import Options
from distmerge.tasks.engine import TaskEngine
from distmerge.tasks.merging import MatrixMerge
from tests.support.checkpoints import read_output
from tests.support.drawing import without_drawing
from tests.support.tasks import WHOLE, Recipe, Tensors, family, recipe, write_family

SHAPES = {
    **{f"layers.{n}.q.weight": (24, 40) for n in range(5)},
    **{f"layers.{n}.up.weight": (700, 24) for n in range(3)},
    "layers.0.norm.weight": (24,),
}
LAST = "layers.4.q.weight"
OVER = Options(overwrite=True)


def in_batches(engine: TaskEngine, jobs: Sequence[int]) -> list[list[int]]:
    first = {number: batch[0] for batch in batches(engine._plan) for number in batch}
    grouped: dict[int, list[int]] = {}
    for number in jobs:
        grouped.setdefault(first.get(number, number), []).append(number)
    return list(grouped.values())


@pytest.fixture
def solved() -> Iterator[list[int]]:
    """How many matrices were solved at once; with batches."""
    sizes: list[int] = []
    real = MatrixMerge.__init__

    def noting(
        self: MatrixMerge, plan: object, given: object, matrix: object, *rest: object
    ) -> None:
        sizes.append(matrix.slices)  # type: ignore[attr-defined]
        real(self, plan, given, matrix, *rest)  # type: ignore[arg-type]

    with (
        mock.patch.object(TaskEngine, "_batched", in_batches),
        mock.patch.object(MatrixMerge, "__init__", noting),
        without_drawing(),
    ):
        yield sizes


def merged(folder: Path, made: Recipe) -> Tensors:
    distmerge.merge(made, folder / "out", options=OVER)
    return read_output(folder / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["task_arithmetic", *WHOLE])
def test_a_batch_gives_what_its_matrices_give_alone(
    tmp_path: Path, solved: list[int], method: str, dtype: torch.dtype
) -> None:
    models = family(SHAPES, 3, dtype=dtype)
    write_family(tmp_path, models)
    calibrate: Recipe | None = None if method.startswith("iso") else {}
    made = {**recipe(tmp_path, method, 3, calibrate=calibrate), "out_dtype": "float32"}
    found = merged(tmp_path, made)
    assert sorted(solved) == [3, 5]
    with mock.patch.object(TaskEngine, "_batched", lambda _, jobs: [[n] for n in jobs]):
        expected = merged(tmp_path, made)
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=2e-6, atol=2e-6)


def test_each_output_of_a_sweep_is_its_own(tmp_path: Path, solved: list[int]) -> None:
    write_family(tmp_path, family(SHAPES, 2))
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate={})
    distmerge.merge({**made, "sweep": {"calibrate.alpha": [0.25, 1]}}, tmp_path / "swept")
    assert sorted(solved) == [3, 5]
    for alpha in (0.25, 1):
        one = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 2, calibrate={"alpha": alpha}))
        swept = read_output(tmp_path / f"swept/alpha={alpha}")
        assert all(torch.equal(swept[name], one[name]) for name in one)


def test_what_is_not_finite_in_a_batch_is_told_with_its_tensor(
    tmp_path: Path, solved: list[int]
) -> None:
    models = family(SHAPES, 2)
    models[2][LAST][3, 4] = torch.nan
    write_family(tmp_path, models)
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate={})
    with pytest.raises(distmerge.NonFiniteError) as caught:
        merged(tmp_path, made)
    assert re.search(rf"task-2/\S+: tensor {LAST} holds 1 NaN or Inf", str(caught.value))
    assert solved[0] == 5


def test_a_value_that_overflows_in_a_batch_is_told_with_its_tensor(
    tmp_path: Path, solved: list[int]
) -> None:
    models = [{**model, LAST: 1e5 * model[LAST]} for model in family(SHAPES, 2)]
    write_family(tmp_path, models)
    made = {**recipe(tmp_path, "task_arithmetic", 2, calibrate={}), "out_dtype": "float16"}
    with pytest.raises(distmerge.NonFiniteError, match=rf"{LAST}: \d+ values overflow float16"):
        merged(tmp_path, made)
    assert solved[0] == 5


@pytest.mark.parametrize("place", ["solving", "rounding"])
def test_a_batch_that_does_not_fit_is_taken_one_by_one(
    tmp_path: Path, solved: list[int], place: str
) -> None:
    """Out of memory is what a GPU says; here it is said in its name."""
    write_family(tmp_path, family(SHAPES, 2))
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate={})
    expected = merged(tmp_path, made)
    name = "panel" if place == "solving" else "rounded"
    real = getattr(MatrixMerge, name)

    def tight(self: MatrixMerge, *args: object, **kwargs: object) -> object:
        if self.matrix.slices > 1:
            raise torch.cuda.OutOfMemoryError
        return real(self, *args, **kwargs)

    with mock.patch.object(MatrixMerge, name, tight):
        found = merged(tmp_path, made)
    assert solved.count(1) == 8
    for each, x in expected.items():
        torch.testing.assert_close(found[each], x, rtol=2e-6, atol=2e-6)
