"""mergekit's parameters: gradients, filters, precedence, normalisation, unlisted base models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distmerge
from distmerge.document import Plain
from distmerge.errors import ConfigError
from distmerge.parameters import Conditional, Layers, evaluate
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import linear

LAYERED = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.mlp.weight" for i in range(5)),
    *(f"model.layers.{i}.attn.weight" for i in range(5)),
    "model.norm.weight",
    "lm_head.weight",
)


def models(folder: Path, names: Sequence[str] = LAYERED, count: int = 2) -> list[Path]:
    tensors = {name: torch.zeros(1) for name in names}
    return [write_checkpoint(folder / f"model{i}", tensors) for i in range(count)]


def weights(recipe: dict[str, Plain]) -> dict[str, dict[int, float]]:
    """Coefficients of each tensor by input."""
    return {
        tensor.name: dict(zip(tensor.rule.inputs, *tensor.rule.coefficients, strict=True))
        for tensor in distmerge.plan(recipe).tensors
    }


def of_first(folder: Path, weight: Plain, names: Sequence[str] = LAYERED) -> dict[str, float]:
    """The weights of an only model, as they are."""
    (model,) = models(folder, names, 1)
    found = weights(linear({model: weight}, parameters={"normalize": False}))
    return {name: by_input[0] for name, by_input in found.items()}


def test_a_gradient_runs_from_the_first_layer_to_the_last(tmp_path: Path) -> None:
    found = of_first(tmp_path, [1, 3])
    for kind in ("mlp", "attn"):
        along = [found[f"model.layers.{i}.{kind}.weight"] for i in range(5)]
        assert along == [1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
)
def test_what_stands_outside_the_layers_takes_the_first_anchor(tmp_path: Path, name: str) -> None:
    assert of_first(tmp_path, [2, 5, 3])[name] == 2


def test_a_gradient_may_have_any_number_of_anchors(tmp_path: Path) -> None:
    names = [f"h.{i}.w" for i in range(4)]
    many = of_first(tmp_path, [1, 2, 4], names)
    assert list(many.values()) == pytest.approx([1, 1 + 2 / 3, 2 + 2 / 3, 4], abs=1e-15)
    assert set(of_first(tmp_path, [7], names).values()) == {7}


def test_layers_are_counted_and_not_sorted_as_text(tmp_path: Path) -> None:
    found = of_first(tmp_path, [1, 12], [f"layers.{i}.w" for i in range(12)])
    assert [found[f"layers.{i}.w"] for i in range(12)] == pytest.approx(list(range(1, 13)))


def test_a_stack_of_one_layer_takes_the_last_anchor(tmp_path: Path) -> None:
    assert of_first(tmp_path, [1, 3], ["layers.0.w", "head"]) == {"layers.0.w": 3, "head": 1}


def test_each_stack_has_its_own_length_and_the_outer_number_counts(tmp_path: Path) -> None:
    names = [
        *(f"vision.blocks.{i}.w" for i in range(3)),
        *(f"text.layers.{i}.experts.{e}.w" for i in range(2) for e in (0, 63)),
        "0.weight",
        "4.weight",
        "layer2.weight",
        "heads.2",
    ]
    assert of_first(tmp_path, [1, 3], names) == {
        "vision.blocks.0.w": 1,
        "vision.blocks.1.w": 2,
        "vision.blocks.2.w": 3,
        "text.layers.0.experts.0.w": 1,
        "text.layers.0.experts.63.w": 1,
        "text.layers.1.experts.0.w": 3,
        "text.layers.1.experts.63.w": 3,
        "0.weight": 1,
        "4.weight": 3,
        "layer2.weight": 1,
        "heads.2": 1,
    }


@pytest.mark.parametrize(
    ("value", "mlp", "other"),
    [
        ([{"filter": "mlp", "value": 2}, {"value": 3}], 2, 3),
        ([{"filter": "mlp", "value": 2}, {"filter": "*", "value": 3}], 2, 3),
        ([{"value": 3}, {"filter": "mlp", "value": 2}], 3, 3),
        ([{"filter": "*", "value": 3}, {"filter": "mlp", "value": 2}], 3, 3),
        ([{"filter": "lp.we", "value": 2}, {"filter": "mlp", "value": 4}, {"value": 3}], 2, 3),
        ([{"filter": "m.p", "value": 2}, {"filter": "ml*", "value": 2}, {"value": 3}], 3, 3),
        ([{"filter": "mlp", "value": [2, 4]}, {"value": [3, 5]}], 4, 5),
    ],
    ids=["filter", "star", "first wins", "star first", "substring", "no pattern", "gradients"],
)
def test_the_first_filter_that_is_part_of_the_name_decides(
    tmp_path: Path, value: Plain, mlp: float, other: float
) -> None:
    found = of_first(tmp_path, value)
    assert found["model.layers.4.mlp.weight"] == mlp
    assert found["model.layers.4.attn.weight"] == other


def test_what_no_filter_of_a_model_covers_falls_to_the_recipe_s_own_weight(tmp_path: Path) -> None:
    first, second = models(tmp_path)
    only_mlp: Plain = [{"filter": "mlp", "value": 2}]
    rest: Plain = [{"filter": "attn", "value": 5}, {"value": 7}]
    recipe = linear({first: only_mlp, second: 1}, parameters={"weight": rest, "normalize": False})
    found = weights(recipe)
    assert found["model.layers.0.mlp.weight"] == {0: 2, 1: 1}
    assert found["model.layers.0.attn.weight"] == {0: 5, 1: 1}
    assert found["lm_head.weight"] == {0: 7, 1: 1}


def test_a_weight_that_nothing_gives_is_missed_by_name(tmp_path: Path) -> None:
    first, second = models(tmp_path)
    with pytest.raises(ConfigError, match=f"no weight for {second}, tensor lm_head"):
        weights(linear({first: 1, second: None}))
    only_mlp: Plain = [{"filter": "mlp", "value": 2}]
    with pytest.raises(ConfigError, match=f"no weight for {second}, tensor lm_head"):
        weights(linear({first: 1, second: only_mlp}, parameters={"weight": only_mlp}))


@pytest.mark.parametrize(
    ("given_weights", "normalize", "expected"),
    [
        ((1, 3), None, {0: 0.25, 1: 0.75}),
        ((1, 3), True, {0: 0.25, 1: 0.75}),
        ((1, 3), 1, {0: 0.25, 1: 0.75}),
        ((1, 3), False, {0: 1, 1: 3}),
        ((1, 3), 0, {0: 1, 1: 3}),
        ((3, -1), True, {0: 1.5, 1: -0.5}),
        ((-1, -1), True, {0: 0.5, 1: 0.5}),
        ((True, True), True, {0: 0.5, 1: 0.5}),
        (("1e-3", 3e-3), True, {0: 0.25, 1: 0.75}),
        ((0, 2), True, {1: 1}),
        ((0, 0), False, {0: 0}),
    ],
)
def test_weights_are_normalised_unless_the_recipe_says_no(
    tmp_path: Path,
    given_weights: tuple[Plain, Plain],
    normalize: Plain,
    expected: dict[int, float],
) -> None:
    pair = models(tmp_path, ["w"])
    parameters: Plain = {} if normalize is None else {"normalize": normalize}
    recipe = linear(dict(zip(pair, given_weights, strict=True)), parameters=parameters)
    assert weights(recipe) == {"w": pytest.approx(expected, abs=1e-15)}


def test_normalize_may_be_filtered_too(tmp_path: Path) -> None:
    first, second = models(tmp_path, ["a.w", "b.w"])
    chosen: Plain = [{"filter": "a.", "value": False}, {"filter": "b.", "value": True}]
    found = weights(linear({first: 1, second: 1}, parameters={"normalize": chosen}))
    assert found == {"a.w": {0: 1, 1: 1}, "b.w": {0: 0.5, 1: 0.5}}


@pytest.mark.parametrize("pair", [(0, 0), (1, -1), (0.1, -0.1 - 1e-17)])
def test_weights_that_sum_to_zero_can_not_be_normalised(
    tmp_path: Path, pair: tuple[float, float]
) -> None:
    first, second = models(tmp_path, ["w"])
    with pytest.raises(ConfigError, match="tensor w: the weights sum to zero"):
        weights(linear({first: pair[0], second: pair[1]}))


@pytest.mark.parametrize(
    ("given_weights", "parameters", "expected"),
    [
        ((1, 1), {}, {0: 0.5, 1: 0.5}),
        ((1, 1), {"weight": 2}, {0: 0.25, 1: 0.25, 2: 0.5}),
        ((None, None), {"weight": 1}, {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}),
        ((1, 1), {"weight": [{"filter": "other", "value": 1}]}, {0: 0.5, 1: 0.5}),
    ],
    ids=["not in the sum", "by a global weight", "all by it", "its filter does not match"],
)
def test_an_unlisted_base_model_counts_only_where_a_global_weight_includes_it(
    tmp_path: Path,
    given_weights: tuple[Plain, Plain],
    parameters: dict[str, Plain],
    expected: dict[int, float],
) -> None:
    first, second, base = models(tmp_path, ["w"], 3)
    recipe = linear(
        dict(zip((first, second), given_weights, strict=True)),
        base_model=str(base),
        parameters=parameters,
    )
    plan = distmerge.plan(recipe)
    assert (plan.donor, len(plan.inputs)) == (2, 3)
    assert weights(recipe) == {"w": pytest.approx(expected)}


def test_a_listed_base_model_counts_as_listed_and_gives_the_config(tmp_path: Path) -> None:
    first, second = models(tmp_path, ["w"])
    recipe = linear({first: 1, second: 3}, base_model=str(second))
    plan = distmerge.plan(recipe)
    assert (plan.donor, len(plan.inputs)) == (1, 2)
    assert weights(recipe) == {"w": {0: 0.25, 1: 0.75}}


anchors = st.lists(st.floats(-10, 10), min_size=1, max_size=6).map(tuple)


@given(anchors, st.integers(1, 40), st.data())
def test_a_gradient_is_piecewise_linear(
    points: tuple[float, ...], layers: int, data: st.DataObject
) -> None:
    names = [f"layers.{i}.w" for i in range(layers)]
    number = data.draw(st.integers(0, layers - 1))
    position = Layers(names).position(names[number])
    value = evaluate([{"p": (Conditional(None, points),)}], "p", names[number], position)
    t = number / (layers - 1) if layers > 1 else 1.0
    expected = np.interp(t * (len(points) - 1), range(len(points)), points)
    assert value == pytest.approx(expected, abs=1e-9)
    assert value is not None
    assert min(points) - 1e-12 <= value <= max(points) + 1e-12


@given(st.lists(st.sampled_from("abcd*"), max_size=4), st.text("abcd", max_size=3))
def test_the_first_matching_filter_of_the_first_level_decides(
    filters: list[str], name: str
) -> None:
    level = {
        "p": tuple(Conditional(None if f == "*" else f, (float(i),)) for i, f in enumerate(filters))
    }
    expected = next((float(i) for i, f in enumerate(filters) if f == "*" or f in name), None)
    assert evaluate([level], "p", name, 0.0) == expected
    fallback = {"p": (Conditional(None, (9.0,)),)}
    assert evaluate([level, fallback], "p", name, 0.0) == (9.0 if expected is None else expected)
    assert evaluate([{}, fallback], "p", name, 0.0) == 9.0
    assert evaluate([level, fallback], "other", name, 0.0) is None
