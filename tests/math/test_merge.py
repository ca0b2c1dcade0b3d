"""Whole merges of tiny checkpoints against a merger that loads them and adds in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.pipeline import Options
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import check_merged, load

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = {
    "model.embed_tokens.weight": (67, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 31),
    "model.layers.1.mlp.down_proj.weight": (24, 31),
    "model.norm.weight": (24,),
    "model.scale": (),
    "model.nothing.weight": (0, 24),
}
ONE_EACH = {"bfloat16": (BF16, BF16, BF16, BF16), "float16": (F16, F16, F16, F16),
            "float32": (F32, F32, F32, F32), "mixed": (F32, BF16, F16, BF16)}  # fmt: skip


class Run(NamedTuple):
    """Checkpoints of a made-up run, in ascending order of step."""

    folders: list[Path]
    dtypes: Sequence[torch.dtype]


def write_run(folder: Path, dtypes: Sequence[torch.dtype], shards: int = 2) -> Run:
    """Write one checkpoint in each of `dtypes`."""
    folders = []
    for step, dtype in enumerate(dtypes):
        generator = torch.Generator().manual_seed(step)
        tensors = {
            name: torch.randn(shape, generator=generator).to(dtype)
            for name, shape in SHAPES.items()
        }
        folders.append(write_checkpoint(folder / f"step-{step}", tensors, shards=shards))
    return Run(folders, dtypes)


def average(run: Run, **schedule: Plain) -> dict[str, Plain]:
    listed: list[Plain] = [str(folder) for folder in run.folders]
    return {"merge_method": "average", "trajectory": {"checkpoints": listed, **schedule}}


def check(
    recipe: dict[str, Plain], out: Path, run: Run, weights: Sequence[float], dtype: torch.dtype,
    options: Options | None = None,
) -> None:  # fmt: skip
    """Merge, and compare every tensor with the reference's."""
    result = distmerge.merge(recipe, out, options=options or Options())
    assert result.tensors == len(SHAPES)
    check_merged(load(out), [load(f) for f in run.folders], weights, dict.fromkeys(SHAPES, dtype))


def ema(a: float, count: int) -> list[float]:
    """What is left of each checkpoint when the mean moves a share `a` towards each next one."""
    weights = [1.0]
    for _ in range(count - 1):
        weights = [(1 - a) * weight for weight in weights] + [a]
    return weights


def wsm(values: Sequence[float]) -> list[float]:
    """WSM, arXiv 2507.17634: averaging that stands in for a decay curve of the learning rate."""
    later = [*(a - b for a, b in pairwise(values[1:])), values[-1]]
    return [1 - math.fsum(later), *later]


MINUS_SQRT = [1 - math.sqrt(i / 4) for i in range(4)]
SCHEDULES: dict[str, tuple[dict[str, Plain], list[float]]] = {
    "uniform": ({}, [1 / 4] * 4),
    "wma": ({"schedule": "wma"}, [0.1, 0.2, 0.3, 0.4]),
    "wma reversed": ({"schedule": "wma", "reverse": True}, [0.4, 0.3, 0.2, 0.1]),
    "ema": ({"schedule": {"ema": 0.2}}, ema(0.2, 4)),
    "wsm linear": ({"schedule": {"wsm": "linear"}}, [1 / 4] * 4),
    "wsm minus-sqrt": ({"schedule": {"wsm": "minus-sqrt"}}, wsm(MINUS_SQRT)),
    "wsm listed": ({"schedule": {"wsm": [1.0, 0.7, 0.2, 0.1]}}, wsm([1.0, 0.7, 0.2, 0.1])),
    "weights": ({"schedule": {"weights": [2.5, -1.25, 0, -0.25]}}, [2.5, -1.25, 0.0, -0.25]),
    "normalized": (
        {"schedule": {"weights": [3, -1, 1, 1]}, "normalize": True},
        [0.75, -0.25, 0.25, 0.25],
    ),
}


def test_the_reference_knows_the_published_coefficients() -> None:
    assert wsm(MINUS_SQRT) == pytest.approx([0.5, 0.2071, 0.1589, 0.1340], abs=5e-5)
    assert ema(0.2, 3) == pytest.approx([0.64, 0.16, 0.2])


@pytest.mark.parametrize("dtypes", ONE_EACH.values(), ids=ONE_EACH)
@pytest.mark.parametrize(("schedule", "weights"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_trajectory_is_averaged_by_its_schedule(
    tmp_path: Path, schedule: dict[str, Plain], weights: list[float], dtypes: list[torch.dtype]
) -> None:
    run = write_run(tmp_path, dtypes)
    check(average(run, **schedule), tmp_path / "out", run, weights, dtypes[-1])


@pytest.mark.parametrize("out", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("dtypes", ONE_EACH.values(), ids=ONE_EACH)
def test_the_result_is_rounded_once_to_the_dtype_asked_for(
    tmp_path: Path, dtypes: list[torch.dtype], out: torch.dtype
) -> None:
    run = write_run(tmp_path, dtypes)
    recipe = average(run) | {"out_dtype": str(out).removeprefix("torch.")}
    check(recipe, tmp_path / "out", run, [1 / 4] * 4, out)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtypes", ONE_EACH.values(), ids=ONE_EACH)
def test_models_are_added_by_their_weights(
    tmp_path: Path, dtypes: list[torch.dtype], normalize: bool
) -> None:
    run, weights = write_run(tmp_path, dtypes), [1.5, -0.5, 2.0, 0.3]
    models: list[Plain] = [
        {"model": str(folder), "parameters": {"weight": weight}}
        for folder, weight in zip(run.folders, weights, strict=True)
    ]
    recipe: dict[str, Plain] = {"merge_method": "linear", "models": models}
    recipe["parameters"] = {"normalize": normalize}
    shares = [weight / 3.3 for weight in weights] if normalize else weights
    check(recipe, tmp_path / "out", run, shares, dtypes[0])


def test_one_model_of_weight_one_is_copied_to_the_bit(tmp_path: Path) -> None:
    run = write_run(tmp_path, [BF16])
    model: Plain = {"model": str(run.folders[0]), "parameters": {"weight": 1}}
    distmerge.merge({"merge_method": "linear", "models": [model]}, tmp_path / "out")
    merged, given = load(tmp_path / "out"), load(run.folders[0])
    for name in SHAPES:
        assert torch.equal(merged[name].view(torch.int16), given[name].view(torch.int16))


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_tensors_of_many_blocks_and_jobs_are_averaged(
    tmp_path: Path, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmerge.planner.JOB_ELEMENTS", 2 * 98_304)
    monkeypatch.setitem(SHAPES, "model.embed_tokens.weight", (5003, 101))
    run = write_run(tmp_path, [BF16, F32, BF16])
    options = Options(read="mmap" if read == "mmap" else "pread", memory="10MB")
    check(average(run), tmp_path / "out", run, [1 / 3] * 3, BF16, options)


def test_values_whose_sum_would_overflow_are_no_error(tmp_path: Path) -> None:
    """Every result is finite; only the check that adds up a whole block overflows."""
    large = {"w": torch.full((70, 70), 3e38, dtype=BF16)}
    folders = [write_checkpoint(tmp_path / f"step-{i}", large) for i in range(2)]
    distmerge.merge(average(Run(folders, [])), tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")["w"], large["w"])
