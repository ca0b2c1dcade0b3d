"""The same merge on a CUDA device.

The bytes are promised for one kind of chip: a GPU may fuse a product and an addition that a CPU
rounds apart. So results are held to the bound that holds on any chip, and to the bit only where
every step is exact.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.methods.extrapolate import add_gram
from distmerge.pipeline import Options
from tests.support.checkpoints import write_checkpoint
from tests.support.kernels import weighted_sum
from tests.support.reference import check_merged, check_sum, load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KINDS = {"bfloat16": [BF16] * 3, "float16": [F16] * 3, "float32": [F32] * 3,
         "float64": [F64] * 3, "mixed": [F32, BF16, F16]}  # fmt: skip
WEIGHTS = [0.7, -1 / 3, 0.55]
LENGTH = 300_007
every_kind = pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)


def random_tensors(kinds: list[torch.dtype], *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(kinds))
    return [torch.randn(shape, generator=generator).to(kind) for kind in kinds]


def summed_on_gpu(
    inputs: list[torch.Tensor], coefficients: list[float], dtype: torch.dtype, block: int
) -> torch.Tensor:
    out = torch.full((inputs[0].numel(),), torch.nan, dtype=dtype, device="cuda")
    assert weighted_sum([x.cuda() for x in inputs], coefficients, out, block=block)
    return out.cpu()


@pytest.mark.parametrize("block", [LENGTH, 98_304])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@every_kind
def test_a_sum_is_within_the_bound_that_the_cpu_keeps(
    kinds: list[torch.dtype], dtype: torch.dtype, block: int
) -> None:
    inputs = random_tensors(kinds, LENGTH)
    check_sum(summed_on_gpu(inputs, WEIGHTS, dtype, block), inputs, WEIGHTS)


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_sums_without_rounding_are_those_of_the_cpu_to_the_bit(dtype: torch.dtype) -> None:
    numbers = torch.arange(-128, 128, dtype=dtype)
    inputs, powers = [numbers, numbers.flip(0)], [0.5, -0.25]
    expected = torch.empty_like(numbers)
    assert weighted_sum(inputs, powers, expected, block=64)
    assert torch.equal(summed_on_gpu(inputs, powers, dtype, 64), expected)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_one_model_of_weight_one_comes_out_to_the_bit(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = every[every.abs() < 60_000]  # the finite ones, small enough that no block overflows
    found = summed_on_gpu([x], [1.0], dtype, x.numel())
    assert torch.equal(found.view(torch.int16), x.view(torch.int16))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 60_000.0])
def test_what_is_not_finite_is_told(bad: float) -> None:
    x = torch.ones(5000, dtype=F16, device="cuda")
    x[4321] = bad
    assert not weighted_sum([x, x], [1.0, 1.0], torch.empty_like(x), block=1024)


def write_steps(folder: Path, kinds: list[torch.dtype]) -> list[Path]:
    folders = []
    for step, kind in enumerate(kinds):
        torch.manual_seed(step)
        tensors = {"a.weight": torch.randn(700, 301).to(kind), "b.bias": torch.randn(7).to(kind)}
        tensors["ids"] = torch.arange(9)
        folders.append(write_checkpoint(folder / f"step-{step}", tensors, shards=2))
    return folders


def average(folders: list[Path]) -> dict[str, Plain]:
    listed: list[Plain] = [str(folder) for folder in folders]
    return {"merge_method": "average", "trajectory": {"checkpoints": listed}}


@every_kind
def test_a_whole_merge_on_the_gpu_is_that_of_the_reference(
    tmp_path: Path, kinds: list[torch.dtype]
) -> None:
    folders, options = write_steps(tmp_path, kinds), Options(device="cuda", memory="64MB")
    distmerge.merge(average(folders), tmp_path / "out", options=options)
    merged, inputs = load(tmp_path / "out"), [load(folder) for folder in folders]
    assert torch.equal(merged.pop("ids"), torch.arange(9))
    check_merged(merged, inputs, [1 / 3] * 3, dict.fromkeys(("a.weight", "b.bias"), kinds[-1]))


def test_nan_in_an_input_stops_a_merge_on_the_gpu(tmp_path: Path) -> None:
    folders = write_steps(tmp_path, [BF16, BF16])
    write_checkpoint(folders[1], load(folders[1]) | {"b.bias": torch.full((7,), torch.nan)}, 2)
    with pytest.raises(distmerge.NonFiniteError, match=r"tensor b\.bias holds 7 NaN"):
        distmerge.merge(average(folders), tmp_path / "out", options=Options(device="cuda"))
    assert not (tmp_path / "out").exists()


@every_kind
def test_products_of_checkpoints_on_the_gpu_are_those_of_the_cpu(kinds: list[torch.dtype]) -> None:
    points = random_tensors(kinds, LENGTH)
    expected, found = (torch.zeros(3, 3, dtype=F64, device=where) for where in ("cpu", "cuda"))
    add_gram(points, expected, elements=16_384)
    add_gram([x.cuda() for x in points], found, elements=98_304)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=0)


def test_a_sweep_of_steps_on_the_gpu_is_that_of_the_cpu(tmp_path: Path) -> None:
    folders = write_steps(tmp_path, [F32] * 5)
    recipe: dict[str, Plain] = {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": [str(folder) for folder in folders], "window": 2},
        "parameters": {"step": [0, 1]},
    }
    distmerge.merge(recipe, tmp_path / "there", options=Options(device="cuda"))
    distmerge.merge(recipe, tmp_path / "here", options=Options(device="cpu"))
    for name in ("step=0", "step=1"):
        there, here = load(tmp_path / "there" / name), load(tmp_path / "here" / name)
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-6)
