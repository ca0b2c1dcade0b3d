"""Merges of task vectors on a CUDA device: near the CPU's and float64's, alike on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

import distmerge
from distmerge.budget import budget, over_budget
from distmerge.document import Plain
from distmerge.methods.calibrate import Calibration, Setting, calibrate
from distmerge.methods.stages import Panel, drive
from distmerge.pipeline import DeviceChoice, MergeResult, Options
from tests.dist.cases import fingerprints
from tests.support.checkpoints import read_output
from tests.support.commands import merge_command
from tests.support.drawing import without_drawing
from tests.support.ranks import observe_ranks, run_ranks
from tests.support.svc_reference import calibrated
from tests.support.tasks import (
    SHAPES,
    WEIGHTED,
    WHOLE,
    Recipe,
    Tensors,
    family,
    recipe,
    write_family,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

DEVICE: DeviceChoice = "cuda"
LARGE = {
    **SHAPES,
    "model.layers.0.mlp.experts.up_proj": (40, 64, 96),
    **{f"model.layers.{n}.self_attn.k_proj.weight": (48, 80) for n in range(12)},
    "model.layers.1.mlp.up_proj.weight": (3000, 96),
    "model.layers.1.mlp.down_proj.weight": (96, 3000),
}
"""Stacks and alike matrices that are taken as a batch, and matrices of several panels."""
ALIKE = "model.layers.7.self_attn.k_proj.weight"
OWN: Mapping[str, Plain] = {"density": 0.4}


def merge(made: Recipe, out: Path, options: Options) -> MergeResult:
    """What a rank does; without plots."""
    without_drawing().start()
    return distmerge.merge(made, out, options=options)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    return write_family(folder, family(LARGE, 3, dtype=torch.bfloat16), shards=2)


@pytest.fixture(scope="module")
def precise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("precise"), family(LARGE, 3))


def near(found: Tensors, expected: Tensors, base: Tensors, tolerance: float) -> None:
    """The change of each tensor is that of the other, to a share of its norm."""
    assert list(found) == list(expected)
    for name, x in found.items():
        change = expected[name].double() - base[name].double()
        off = float((x.double() - expected[name].double()).norm())
        assert off <= tolerance * float(change.norm()) + 2e-7 * float(base[name].norm()), name


@pytest.mark.parametrize("with_svc", [False, True])
@pytest.mark.parametrize("method", [*WEIGHTED, "expo", *WHOLE])
def test_every_method_is_that_of_the_cpu(
    precise: Path, tmp_path: Path, method: str, with_svc: bool
) -> None:
    alone = method == "expo"
    made = recipe(
        precise, method, 1 if alone else 3, own=OWN, shared={"alpha": 1.5} if alone else {},
        calibrate={} if with_svc else None,
    )  # fmt: skip
    merge(made, tmp_path / "there", Options(device=DEVICE))
    merge(made, tmp_path / "here", Options(device="cpu"))
    found, expected = read_output(tmp_path / "there"), read_output(tmp_path / "here")
    # Iso-C makes all singular values equal: then SVC's basis is what rounding makes of it.
    loose = with_svc and method.startswith("iso")
    near(found, expected, read_output(precise / "base"), 1e-2 if loose else 2e-5)


def solved(deltas: list[torch.Tensor], alpha: float, device: str) -> tuple[Calibration, Panel]:
    """The sum of `deltas` calibrated on a device."""
    there = [x.to(device) for x in deltas]
    panel = Panel(there, torch.stack(there).sum(0))
    rows, columns = deltas[0].shape[-2:]
    return drive(calibrate(rows, columns, [Setting(alpha, 1.0)]), lambda: [panel]), panel


@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("shape", [(96, 3000), (3000, 96), (300, 300)])
def test_gamma_is_that_of_float64(shape: tuple[int, int], alpha: float) -> None:
    models = family({"x": shape}, 4)
    deltas = [model["x"] - models[0]["x"] for model in models[1:]]
    found, panel = solved(deltas, alpha, DEVICE)
    expected = calibrated(torch.stack(deltas).sum(0), deltas, alpha)
    gamma = found.gamma[0].cpu()
    torch.testing.assert_close(gamma, expected.gamma, rtol=1e-4, atol=1e-4)
    off = found.apply(panel, 0).cpu().double() - expected.result
    assert float(off.norm()) <= 1e-5 * float(expected.result.norm())


def test_a_batch_is_its_matrices_one_by_one() -> None:
    models = family({"x": (40, 64, 96)}, 3)
    deltas = [model["x"] - models[0]["x"] for model in models[1:]]
    together, panel = solved(deltas, 0.3, DEVICE)
    for at in (0, 17, 39):
        alone, part = solved([x[at] for x in deltas], 0.3, DEVICE)
        torch.testing.assert_close(together.gamma[at], alone.gamma, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            together.apply(panel, 0)[at], alone.apply(part, 0), rtol=1e-5, atol=1e-5
        )


RECIPES: dict[str, Callable[[Path], Recipe]] = {
    "svc": lambda folder: recipe(folder, "task_arithmetic", 3, calibrate={}),
    "svc on ties": lambda folder: recipe(folder, "ties", 3, own=OWN, calibrate={}),
    "dare_ties": lambda folder: recipe(folder, "dare_ties", 3, own=OWN),
    "iso_cts": lambda folder: recipe(folder, "iso_cts", 3),
    "sweep": lambda folder: {
        **recipe(folder, "tsv_m", 3, calibrate={}),
        "sweep": {"parameters.lambda": [0.5, 1], "calibrate.alpha": [0.5, 1]},
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_on_one_device_write_the_bytes_of_one(
    models: Path, tmp_path: Path, name: str
) -> None:
    made, options = RECIPES[name](models), Options(device=DEVICE)
    for ranks in (1, 2):
        run_ranks(merge, ranks, made, tmp_path / f"{ranks}", options, timeout=100)
    assert fingerprints(tmp_path / "2") == fingerprints(tmp_path / "1")


@pytest.mark.parametrize("name", RECIPES)
def test_matrices_over_the_budget_are_merged_by_both_ranks(tmp_path: Path, name: str) -> None:
    """What crosses ranks is on the CPU, and goes back."""
    write_family(tmp_path, family({"wide.weight": (96, 12_000), "tall.weight": (12_000, 96)}, 3))
    made, plan = RECIPES[name](tmp_path), distmerge.plan(RECIPES[name](tmp_path))
    assert over_budget(plan, budget(plan, 12 * 10**6)) or name == "dare_ties"
    small = Options(device=DEVICE, memory="12MB")
    run_ranks(merge, 2, made, tmp_path / "there", small, timeout=100)
    merge(made, tmp_path / "here", Options(device="cpu"))
    folder = "lambda=0.5,alpha=1" if name == "sweep" else ""
    found, expected = (read_output(tmp_path / where / folder) for where in ("there", "here"))
    near(found, expected, read_output(tmp_path / "base"), 2e-5)


def merge_in(share: float, arguments: list[str]) -> None:
    """`distmerge merge` where this process may have so much of the GPU's memory."""
    if DEVICE == "cuda":
        torch.cuda.set_per_process_memory_fraction(share)
    merge_command(arguments)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_a_matrix_that_does_not_fit_is_left_to_the_cpu(tmp_path: Path, method: str) -> None:
    """A Gram matrix of 2,000 x 2,000 takes 32 MB, and solving it more."""
    write_family(tmp_path, family({"a.weight": (2000, 2100), "b.weight": (64, 64)}, 2))
    made = recipe(tmp_path, method, 2, own=OWN, calibrate={})
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    total = torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 1
    arguments = [str(tmp_path / "r.yaml"), str(tmp_path / "out"), "--device", DEVICE]
    (outcome,) = observe_ranks(merge_in, 1, 160e6 / total, arguments, timeout=100)
    assert outcome.exit_code == 0, outcome.describe()
    assert "a.weight: on the GPU, out of memory; trying with less" in outcome.stderr
    merge(made, tmp_path / "cpu", Options(device="cpu"))
    found, expected = read_output(tmp_path / "out"), read_output(tmp_path / "cpu")
    near(found, expected, read_output(tmp_path / "base"), 2e-5)


def test_nan_in_a_batch_is_told_with_its_tensor(tmp_path: Path) -> None:
    broken = family(LARGE, 2)
    broken[2][ALIKE][3, 4] = torch.nan
    write_family(tmp_path, broken)
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate={})
    with pytest.raises(distmerge.NonFiniteError, match=rf"task-2/.*: tensor {ALIKE} holds 1 NaN"):
        merge(made, tmp_path / "out", Options(device=DEVICE))
    assert not (tmp_path / "out").exists()
