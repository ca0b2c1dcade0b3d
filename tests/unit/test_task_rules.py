"""How each tensor of a merge on task vectors comes about: parameters as in mergekit, cuts, sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmerge
from distmerge.document import Plain
from distmerge.matrices import Facts
from distmerge.spec import Cut
from tests.support.checkpoints import read_output
from tests.support.tasks import CONFIG, SHAPES, WEIGHTED, WHOLE, family, recipe, write_family
from tests.unit.task_plans import planned, task_of, tensor_of

LAYERS = 5
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
NAMES = {
    EMBED: (60, 24),
    **{f"model.layers.{n}.mlp.up.weight": (32, 24) for n in range(LAYERS)},
    **{f"model.layers.{n}.attn.q.weight": (24, 24) for n in range(LAYERS)},
    NORM: (24,),
}
UP = "model.layers.2.mlp.up.weight"
ATTENTION = "model.layers.2.attn.q.weight"
SVC: Any = {"method": "svc"}


def weights(own: Any, name: str, **keys: Any) -> tuple[float, ...]:
    return task_of(planned(NAMES, "ties", own=own, **keys), name).weights


def test_a_model_s_own_weight_counts_before_the_shared_one() -> None:
    assert weights({"weight": 0.25}, UP, parameters={"weight": 3}) == (0.25, 0.25)
    assert weights(None, UP, parameters={"weight": 3}) == (3, 3)


def test_a_filter_that_does_not_match_leaves_it_to_the_next_level() -> None:
    own: Any = {"weight": [{"filter": "attn", "value": 0.5}]}
    assert weights(own, ATTENTION, parameters={"weight": 3}) == (0.5, 0.5)
    assert weights(own, UP, parameters={"weight": 3}) == (3, 3)


def test_the_first_filter_that_is_part_of_a_name_decides() -> None:
    own: Any = {
        "weight": [
            {"filter": "layers.2.", "value": 1},
            {"filter": "mlp", "value": 2},
            {"value": 3},
        ]
    }
    found = {name: weights(own, name)[0] for name in NAMES}
    assert found[UP] == found[ATTENTION] == 1
    assert found["model.layers.3.mlp.up.weight"] == 2
    assert found["model.layers.3.attn.q.weight"] == found[EMBED] == found[NORM] == 3


@pytest.mark.parametrize("key", ["weight", "density"])
def test_gradients_run_from_the_first_layer_to_the_last(key: str) -> None:
    plan = planned(NAMES, "dare_ties", own={"weight": 1, key: [0.2, 0.6]})
    tasks = [task_of(plan, f"model.layers.{n}.mlp.up.weight") for n in range(LAYERS)]
    found = [(task.weights if key == "weight" else task.densities)[0] for task in tasks]
    assert found == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6], abs=1e-15)
    outside = task_of(plan, NORM)
    assert (outside.weights if key == "weight" else outside.densities)[0] == 0.2


def test_lambda_may_run_along_the_layers_too() -> None:
    plan = planned(NAMES, "ties", own={"weight": 1}, parameters={"lambda": [0, 1]})
    scales = [task_of(plan, f"model.layers.{n}.attn.q.weight").scale for n in range(LAYERS)]
    assert scales == [0, 0.25, 0.5, 0.75, 1]


DEFAULTS = [
    ("ties", {"normalize": True, "rescale": False}),
    ("dare_linear", {"normalize": False, "rescale": True}),
    ("dare_ties", {"normalize": False, "rescale": True}),
]


@pytest.mark.parametrize(("method", "expected"), DEFAULTS)
def test_defaults_are_those_of_mergekit(method: str, expected: dict[str, Any]) -> None:
    task = task_of(planned(NAMES, method, own={"weight": 2}), UP)
    assert {key: getattr(task, key) for key in expected} == expected
    assert (task.densities, task.scale, task.seed, task.alpha) == ((1, 1), 1, 0, None)
    other = {"normalize": not expected["normalize"], "rescale": not expected["rescale"]}
    turned = task_of(planned(NAMES, method, own={"weight": 2}, parameters=other), UP)
    assert {key: getattr(turned, key) for key in other} == other


@pytest.mark.parametrize("method", WEIGHTED)
def test_what_is_only_for_memory_there_is_taken_and_changes_nothing(method: str) -> None:
    plain = planned(NAMES, method, own={"weight": 1})
    masked = planned(NAMES, method, own={"weight": 1}, parameters={"int8_mask": True})
    assert plain.digest == masked.digest


def test_a_density_above_one_keeps_all() -> None:
    plain = planned(NAMES, "ties", own={"weight": 1})
    assert planned(NAMES, "ties", own={"weight": 1, "density": 1.5}).digest == plain.digest
    assert planned(NAMES, "ties", own={"weight": 1, "density": 0.9}).digest != plain.digest


@pytest.mark.parametrize("method", [*WEIGHTED, *WHOLE])
def test_a_base_that_is_listed_among_the_models_is_no_task(method: str) -> None:
    own: Any = {"weight": 1} if method in WEIGHTED else None
    found = planned(NAMES, method, own=own, base_listed=True, calibrate=SVC)
    rule = tensor_of(found, UP).rule
    assert rule.inputs == (0, 1, 2)
    assert len(rule.tasks[0].weights) == 2
    unlisted = planned(NAMES, method, own=own, calibrate=SVC)
    assert tensor_of(unlisted, UP).rule.inputs == (2, 0, 1)
    assert tensor_of(unlisted, UP).rule.tasks == rule.tasks


def test_where_the_base_is_listed_changes_no_more_than_the_order_of_a_sum(tmp_path: Path) -> None:
    write_family(tmp_path, family(SHAPES, 2))
    made = recipe(tmp_path, "task_arithmetic", 2, calibrate={})
    models: Any = made["models"]
    with_base = {**made, "models": [models[0], {"model": str(tmp_path / "base")}, models[1]]}
    for number, each in enumerate((made, with_base)):
        distmerge.merge(each, tmp_path / f"out-{number}")
    found = [read_output(tmp_path / f"out-{number}") for number in (0, 1)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [1, 2, 8])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "iso_c", "star"])
def test_alpha_is_one_over_the_number_of_tasks_by_itself(method: str, tasks: int) -> None:
    own: Any = {"weight": 1} if method in WEIGHTED else None
    for calibrate in (SVC, {"method": "svc", "alpha": "auto"}):
        plan = planned(NAMES, method, tasks=tasks, own=own, calibrate=calibrate)
        assert task_of(plan, UP).alpha == 1 / tasks
    given_ = planned(NAMES, method, tasks=tasks, own=own, calibrate={"method": "svc", "alpha": 3})
    assert task_of(given_, UP).alpha == 3


def test_what_tsv_m_made_is_only_suppressed() -> None:
    assert task_of(planned(NAMES, "tsv_m", tasks=8, calibrate=SVC), UP).alpha == 1
    low: Any = {"method": "svc", "alpha": 0.25}
    assert task_of(planned(NAMES, "tsv_m", tasks=8, calibrate=low), UP).alpha == 0.25


@pytest.mark.parametrize("method", ["task_arithmetic", "tsv_m", "iso_c", "iso_cts", "star"])
def test_what_is_no_matrix_is_a_sum(method: str) -> None:
    """Of the tasks with their weights; where a method has none, of their mean."""
    own: Any = {"weight": 0.5} if method in WEIGHTED else None
    plan = planned(NAMES, method, own=own, calibrate=SVC, parameters={"lambda": 3})
    share = 1.5
    for name in (EMBED, NORM):
        rule = tensor_of(plan, name).rule
        assert rule.kind == "sum"
        assert dict(zip(rule.inputs, rule.coefficients[0], strict=True)) == pytest.approx(
            {0: share, 1: share, 2: 1 - 2 * share}
        )


def test_task_arithmetic_and_expo_without_svc_are_sums() -> None:
    plan = planned(NAMES, "task_arithmetic", own={"weight": 2}, parameters={"normalize": True})
    assert {tensor.rule.kind for tensor in plan.tensors} == {"sum"}
    assert tensor_of(plan, UP).rule.coefficients == ((0.5, 0.5, 0.0),)
    step = planned(NAMES, "expo", tasks=1, parameters={"alpha": 1.5})
    assert tensor_of(step, UP).rule.coefficients == ((1.5, -0.5),)


@given(st.lists(st.floats(-2, 2).map(lambda x: round(x, 3)), min_size=1, max_size=5))
def test_the_coefficients_of_a_sum_add_up_to_one(values: list[float]) -> None:
    """So a tensor in which no model differs from the base comes out as it was."""
    for name, value in (("normalize", True), ("normalize", False)):
        own: Any = {"weight": values} if len(values) > 1 else {"weight": values[0]}
        plan = planned(NAMES, "task_arithmetic", own=own, parameters={name: value, "lambda": 0.7})
        for tensor in plan.tensors:
            assert sum(tensor.rule.coefficients[0]) == pytest.approx(1, abs=1e-12)


def cuts(calibrate: Plain, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Cut]:
    plan = planned(
        shapes, "task_arithmetic", own={"weight": 1}, calibrate=calibrate,
        facts=Facts(str(CONFIG["model_type"]), 60),
    )  # fmt: skip
    return {tensor.name: tensor.rule.cut for tensor in plan.tensors if tensor.rule.cut}


QKV = "model.layers.0.self_attn.qkv.weight"


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ({"*.qkv.weight": [24, 8, 8]}, (24, 8, 8)),
        ({"*.qkv.weight": 5}, (8, 8, 8, 8, 8)),
        ({"*.qkv.*": 2, "*.qkv.weight": 5}, (20, 20)),
    ],
)
def test_the_first_pattern_of_split_that_matches_cuts_a_fused_weight(
    split: Plain, parts: tuple[int, ...]
) -> None:
    found = cuts({"method": "svc", "split": split})
    assert found.pop(QKV) == Cut(False, parts)
    assert all(len(cut.parts) == 1 for cut in found.values())


def test_include_takes_what_is_no_matrix_by_itself_and_exclude_has_the_last_word() -> None:
    everything = cuts({"method": "svc"})
    assert "lm_head.weight" not in everything
    included = cuts({"method": "svc", "include": ["lm_head*", "*mlp*"], "exclude": ["*down*"]})
    assert set(included) == {"lm_head.weight", *(n for n in everything if "mlp" in n)} - {
        name for name in everything if "down" in name
    }


def test_vectors_are_never_included() -> None:
    found = cuts({"method": "svc", "include": ["*"]})
    assert set(found) == {name for name, shape in SHAPES.items() if len(shape) > 1}


def test_a_conv1d_weight_is_cut_along_its_columns() -> None:
    plan = planned({"h.0.attn.c_attn.weight": (16, 48)}, "iso_c", facts=Facts("gpt2"))
    assert plan.tensors[0].rule.cut == Cut(True, (48,))
