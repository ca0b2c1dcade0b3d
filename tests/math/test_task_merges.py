"""Merges on task vectors from files to files, against float64 and full SVDs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.pipeline import Options
from tests.support import spectral_reference
from tests.support.checkpoints import read_output
from tests.support.drawing import without_drawing
from tests.support.reference import check_sum
from tests.support.svc_reference import calibrated
from tests.support.tasks import CONFIG, SHAPES, Recipe, Tensors, family, recipe, write_family

ATTENTION = "model.layers.0.self_attn.q_proj.weight"
FUSED = "model.layers.0.self_attn.qkv.weight"
EXPERTS = "model.layers.0.mlp.experts.up_proj"
MATRICES = [name for name in SHAPES if "layers" in name and "norm" not in name]
OTHERS = [name for name in SHAPES if name not in MATRICES]


def merged(folder: Path, made: Recipe, options: Options = Options()) -> Tensors:  # noqa: B008
    with without_drawing():
        distmerge.merge(made, folder / "out", options=options)
    return read_output(folder / "out")


def slices(x: torch.Tensor) -> list[torch.Tensor]:
    return list(x) if x.dim() == 3 else [x]


def check(
    models: Sequence[Tensors],
    found: Tensors,
    name: str,
    merge: Callable[[list[torch.Tensor]], torch.Tensor],
    tolerance: float = 2e-6,
) -> None:
    """Each matrix of tensor `name` is the base plus what `merge` makes of the task vectors."""
    base, *tasks = [slices(model[name]) for model in models]
    for at, ours in enumerate(slices(found[name])):
        deltas = [task[at].float().sub(base[at].float()).double() for task in tasks]
        delta = merge(deltas)
        off = float((ours.double() - base[at].double() - delta).norm())
        rounding = 1e-7 * float(base[at].double().norm())
        assert off <= tolerance * float(delta.norm()) + rounding, name


def plain_sum(weights: Sequence[float], scale: float) -> list[float]:
    """Coefficients of base and tasks."""
    return [1 - scale * sum(weights), *(scale * weight for weight in weights)]


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_task_arithmetic_is_a_weighted_sum(tmp_path: Path, scale: float) -> None:
    models = family(SHAPES, 3)
    write_family(tmp_path, models)
    found = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 3, shared={"lambda": scale}))
    for name in SHAPES:
        given = [model[name] for model in models]
        check_sum(found[name], given, plain_sum([1, 1, 1], scale), name)


def test_weights_of_task_arithmetic_may_be_normalised(tmp_path: Path) -> None:
    models = family(SHAPES, 2)
    write_family(tmp_path, models)
    made = recipe(tmp_path, "task_arithmetic", 2, shared={"normalize": True})
    made["models"][0]["parameters"] = {"weight": 3.0}  # type: ignore[index, call-overload]
    found = merged(tmp_path, made)
    for name in SHAPES:
        given = [model[name] for model in models]
        check_sum(found[name], given, plain_sum([0.75, 0.25], 1.0), name)


@pytest.mark.parametrize("alpha", ["auto", 0.2, 1.0])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_svc_calibrates_matrices_and_nothing_else(
    tmp_path: Path, alpha: float | str, scale: float
) -> None:
    models = family(SHAPES, 3)
    write_family(tmp_path, models)
    made = recipe(
        tmp_path, "task_arithmetic", 3, shared={"lambda": scale}, calibrate={"alpha": alpha}
    )
    found = merged(tmp_path, made)
    number = 1 / 3 if alpha == "auto" else float(alpha)
    for name in MATRICES:
        check(models, found, name, lambda deltas: _svc(deltas, number, scale))
    for name in OTHERS:
        check_sum(found[name], [m[name] for m in models], plain_sum([1, 1, 1], scale), name)


def _svc(deltas: list[torch.Tensor], alpha: float, scale: float) -> torch.Tensor:
    return calibrated(torch.stack(deltas).sum(0), deltas, alpha, scale).result


def test_one_task_comes_out_as_it_was(tmp_path: Path) -> None:
    models = family(SHAPES, 1)
    write_family(tmp_path, models)
    found = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 1, calibrate={}))
    for name in SHAPES:
        torch.testing.assert_close(found[name], models[1][name], rtol=2e-6, atol=2e-6)


def test_equal_tasks_come_out_as_one_of_them(tmp_path: Path) -> None:
    base, task = family(SHAPES, 1)
    write_family(tmp_path, [base, task, task, task])
    found = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 3, calibrate={}))
    for name in MATRICES:
        torch.testing.assert_close(found[name], task[name], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "iso_cts", "star"])
@pytest.mark.parametrize("with_svc", [False, True])
def test_methods_of_whole_matrices(tmp_path: Path, method: str, with_svc: bool) -> None:
    models = family(SHAPES, 3)
    write_family(tmp_path, models)
    calibrate: dict[str, Plain] | None = {} if with_svc else None
    made = recipe(tmp_path, method, 3, shared={"lambda": 1.5}, calibrate=calibrate)
    found = merged(tmp_path, made)
    reference: Callable[[list[torch.Tensor]], torch.Tensor] = getattr(spectral_reference, method)
    alpha = 1.0 if method == "tsv_m" else 1 / 3

    def expected(deltas: list[torch.Tensor]) -> torch.Tensor:
        base = reference(deltas)
        return calibrated(base, deltas, alpha, 1.5).result if with_svc else 1.5 * base

    for name in MATRICES:
        # Equal singular values, as Iso-C has them, leave SVC no basis of its own.
        if not (with_svc and method.startswith("iso")):
            check(models, found, name, expected, tolerance=1e-5)
    for name in OTHERS:
        check_sum(found[name], [m[name] for m in models], plain_sum([1 / 3] * 3, 1.5), name)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_svc_on_top_of_element_wise_mergers(tmp_path: Path, method: str) -> None:
    """What the merger alone makes of every tensor is what is calibrated."""
    models = family(SHAPES, 3)
    write_family(tmp_path, models)
    own: dict[str, Plain] = {"density": 0.4}
    alone = merged(tmp_path, recipe(tmp_path, method, 3, own=own))
    made = recipe(tmp_path, method, 3, own=own, shared={"lambda": 0.5}, calibrate={})
    found = merged(tmp_path, made, Options(overwrite=True))
    for name in MATRICES:
        base, *tasks = [slices(model[name]) for model in models]
        for at, ours in enumerate(slices(found[name])):
            deltas = [task[at].double() - base[at].double() for task in tasks]
            plain = slices(alone[name])[at].double() - base[at].double()
            expected = base[at].double() + calibrated(plain, deltas, 1 / 3, 0.5).result
            torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-6)


def test_expo_extrapolates_from_the_base(tmp_path: Path) -> None:
    models = family(SHAPES, 1)
    write_family(tmp_path, models)
    found = merged(tmp_path, recipe(tmp_path, "expo", 1, shared={"alpha": 1.5}))
    for name in SHAPES:
        check_sum(found[name], [model[name] for model in models], [-0.5, 1.5], name)


def test_parts_of_fused_weights_are_calibrated_one_by_one(tmp_path: Path) -> None:
    models = family(SHAPES, 2)
    write_family(tmp_path, models)
    calibrate: dict[str, Plain] = {"split": {"*.qkv.weight": [24, 8, 8]}}
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate=calibrate)
    found = merged(tmp_path, made)
    for part in (slice(0, 24), slice(24, 32), slice(32, 40)):
        parts = [{FUSED: model[FUSED][part]} for model in models]
        check(parts, {FUSED: found[FUSED][part]}, FUSED, lambda d: _svc(d, 0.5, 1.0))


@pytest.mark.parametrize("split", [None, 3])
def test_conv1d_weights_are_calibrated_on_their_columns(tmp_path: Path, split: int | None) -> None:
    name = "h.0.attn.c_attn.weight"
    models = family({name: (16, 48), "h.0.mlp.c_fc.weight": (48, 16)}, 2)
    write_family(tmp_path, models, config={"model_type": "gpt2"})
    calibrate: dict[str, Plain] = {} if split is None else {"split": {"*c_attn*": split}}
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate=calibrate)
    found = merged(tmp_path, made)
    width = 48 // (split or 1)
    for first in range(0, 48, width):
        parts = [{name: model[name][:, first : first + width].T} for model in models]
        ours = {name: found[name][:, first : first + width].T}
        check(parts, ours, name, lambda d: _svc(d, 0.5, 1.0))
    turned = [{name: model["h.0.mlp.c_fc.weight"].T} for model in models]
    ours = {name: found["h.0.mlp.c_fc.weight"].T}
    check(turned, ours, name, lambda d: _svc(d, 0.5, 1.0))


def test_stacks_that_are_stored_turned_are_calibrated_on_their_columns(tmp_path: Path) -> None:
    models = family({EXPERTS: (2, 12, 20)}, 2)
    write_family(tmp_path, models, config={**CONFIG, "model_type": "llama4"})
    found = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 2, calibrate={}))
    turned = [{EXPERTS: model[EXPERTS].mT} for model in models]
    check(turned, {EXPERTS: found[EXPERTS].mT}, EXPERTS, lambda d: _svc(d, 0.5, 1.0))


def test_include_and_exclude_choose_the_matrices(tmp_path: Path) -> None:
    models = family(SHAPES, 2)
    write_family(tmp_path, models)
    calibrate: dict[str, Plain] = {"include": ["lm_head*", "*proj*"], "exclude": ["*mlp*"]}
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate=calibrate)
    found = merged(tmp_path, made)
    for name in (ATTENTION, "lm_head.weight"):
        check(models, found, name, lambda d: _svc(d, 0.5, 1.0))
    for name in set(SHAPES) - {ATTENTION, "lm_head.weight"}:
        check_sum(found[name], [m[name] for m in models], plain_sum([1, 1], 1.0), name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_calibrated(tmp_path: Path, dtype: torch.dtype) -> None:
    models = family(SHAPES, 2, dtype=dtype)
    write_family(tmp_path, models)
    found = merged(tmp_path, recipe(tmp_path, "task_arithmetic", 2, calibrate={}))
    assert {x.dtype for x in found.values()} == {dtype}
    wide = {**recipe(tmp_path, "task_arithmetic", 2, calibrate={}), "dtype": "float64"}
    precise = merged(tmp_path, wide, Options(overwrite=True))
    for name in MATRICES:
        check(models, precise, name, lambda d: _svc(d, 0.5, 1.0), tolerance=1e-6)
        torch.testing.assert_close(found[name], precise[name].to(dtype))


def test_a_sweep_over_lambda_and_alpha_is_what_each_recipe_gives_alone(tmp_path: Path) -> None:
    write_family(tmp_path, family(SHAPES, 2))
    made = recipe(tmp_path, "ties", 2, own={"density": 0.5}, calibrate={})
    sweep = {"parameters.lambda": [0.3, 1], "calibrate.alpha": [0.25, "auto"]}
    result = distmerge.merge({**made, "sweep": sweep}, tmp_path / "out")  # type: ignore[dict-item]
    assert len(result.outputs) == 4
    for scale in (0.3, 1):
        for alpha in (0.25, "auto"):
            one = recipe(
                tmp_path, "ties", 2, own={"density": 0.5}, shared={"lambda": scale},
                calibrate={"alpha": alpha},
            )  # fmt: skip
            distmerge.merge(one, tmp_path / "one", options=Options(overwrite=True))
            files = [
                folder / "model.safetensors"
                for folder in (tmp_path / "one", tmp_path / f"out/lambda={scale},alpha={alpha}")
            ]
            assert files[0].read_bytes() == files[1].read_bytes()
