"""One recipe, many outputs: which, in which order, and under which names."""

from __future__ import annotations

from pathlib import Path

import pytest

from distmerge.document import Plain
from distmerge.sweep import Recipe, load_recipe, swept_values
from tests.unit.recipes import average, extra_merge, linear

Keys = dict[str, Plain]

TEXT: Keys = {"metric": "loss", "text": "held-out.txt"}


def names(recipe: dict[str, Plain], *overrides: str) -> list[str]:
    return [variant.name for variant in load_recipe(recipe, overrides=overrides).variants]


def settings(recipe: Recipe) -> list[tuple[int | None, int, float]]:
    """Window, stride and step of every output."""
    found = []
    for _, _, config in recipe.variants:
        assert config.trajectory is not None
        assert config.extrapolation is not None
        t, step = config.trajectory, config.extrapolation.step
        found.append((t.window, t.stride, step))
    return found


def test_a_list_of_steps_makes_an_output_for_each_in_order() -> None:
    recipe = load_recipe(extra_merge(step=[1, 0, 0.5, -2, 1e-5]))
    assert [variant.name for variant in recipe.variants] == [
        "step=1", "step=0", "step=0.5", "step=-2", "step=1e-05",
    ]  # fmt: skip
    assert [step for _, _, step in settings(recipe)] == [1, 0, 0.5, -2, 1e-5]
    assert recipe.variants[2].values == {"step": 0.5}


def test_steps_in_spans_are_named_so() -> None:
    recipe = load_recipe(extra_merge(step={"span": [0, 0.25]}))
    assert [variant.name for variant in recipe.variants] == ["span=0", "span=0.25"]
    extrapolations = [variant.config.extrapolation for variant in recipe.variants]
    assert [(e.step, e.spans) for e in extrapolations if e] == [(0, True), (0.25, True)]


def test_a_grid_runs_over_the_last_key_first() -> None:
    recipe = load_recipe(
        extra_merge(
            step=[0, 0.5],
            sweep={"trajectory.window": [4, 8], "trajectory.stride": [1, 3]},
        )
    )
    assert settings(recipe) == [
        (4, 1, 0), (4, 1, 0.5), (4, 3, 0), (4, 3, 0.5),
        (8, 1, 0), (8, 1, 0.5), (8, 3, 0), (8, 3, 0.5),
    ]  # fmt: skip
    assert recipe.variants[3].name == "window=4,stride=3,step=0.5"
    assert recipe.variants[3].values == {"window": 4, "stride": 3, "step": 0.5}


@pytest.mark.parametrize(
    "swept",
    [
        {"trajectory.window": [4, 2], "parameters.step": [0, 1]},
        {"trajectory": {"window": [4, 2]}, "parameters": {"step": [0, 1]}},
        {"trajectory": {"window": [4, 2]}, "parameters.step": [0, 1]},
    ],
)
def test_dotted_keys_and_nested_ones_are_the_same(swept: Keys) -> None:
    assert names(extra_merge(sweep=swept)) == [
        "window=4,step=0", "window=4,step=1", "window=2,step=0", "window=2,step=1",
    ]  # fmt: skip


def test_a_key_of_the_sweep_need_not_be_in_the_recipe() -> None:
    recipe: Keys = {**extra_merge(sweep={"parameters.step": [1, 2], "trajectory.stride": [1, 2]})}
    del recipe["parameters"]
    assert [(stride, step) for _, stride, step in settings(load_recipe(recipe))] == [
        (1, 1), (2, 1), (1, 2), (2, 2),
    ]  # fmt: skip


def test_keys_that_end_alike_are_told_apart_by_the_whole_key() -> None:
    models: list[Plain] = [
        {"model": name, "parameters": {"weight": 1}} for name in ("first", "second")
    ]
    recipe: Keys = {"merge_method": "linear", "models": models}
    recipe["sweep"] = {f"models.{i}.parameters.weight": [1, 2] for i in range(2)}
    assert names(recipe)[1] == "models.0.parameters.weight=1,models.1.parameters.weight=2"


def test_the_values_are_in_the_name() -> None:
    assert swept_values("window=8,step=0.5,wsm=minus-sqrt,ema=1e-05") == {
        "window": 8, "step": 0.5, "wsm": "minus-sqrt", "ema": 1e-5,
    }  # fmt: skip
    assert isinstance(swept_values("window=8")["window"], int)
    assert swept_values("") == {}


def test_one_value_is_written_to_out_itself() -> None:
    variant = load_recipe(extra_merge(step=[0.5], sweep={"trajectory.window": [4]})).variants[0]
    assert (variant.name, variant.values) == ("", {"window": 4, "step": 0.5})
    assert variant.config.trajectory is not None
    assert variant.config.trajectory.window == 4
    assert names(extra_merge()) == [""]


def test_numbers_may_be_written_as_people_do(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as text."""
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: extra_merge\ntrajectory: {checkpoints: x, window: 2}\n"
        "parameters: {step: [0.0, 1e-3, +2]}\n"
    )
    recipe = load_recipe(path)
    assert [variant.name for variant in recipe.variants] == ["step=0", "step=0.001", "step=2"]


def test_overrides_reach_the_sweep() -> None:
    assert names(extra_merge(), "parameters.step=[0, 2]") == ["step=0", "step=2"]
    assert names(extra_merge(step=[0, 2]), "parameters.step=2") == [""]
    assert names(extra_merge(), "sweep.trajectory.window=[2, 4]") == ["window=2", "window=4"]
    assert names(extra_merge(sweep={"trajectory.window": [2, 4]}), "sweep=null") == [""]
    found = load_recipe(
        extra_merge(sweep={"trajectory.stride": [2, 4]}), overrides=["trajectory.window=3"]
    )
    assert settings(found) == [(3, 2, 0.5), (3, 4, 0.5)]


def test_words_are_swept_too() -> None:
    curves: Keys = {"sweep": {"trajectory.schedule.wsm": ["linear", "minus-sqrt"]}}
    recipe = load_recipe(average("x", last=4, schedule={"wsm": "linear"}) | curves)
    assert [variant.name for variant in recipe.variants] == ["wsm=linear", "wsm=minus-sqrt"]
    schedules = [v.config.trajectory.schedule.curve for v in recipe.variants if v.config.trajectory]
    assert schedules == ["linear", "minus-sqrt"]
    assert names(average("x") | {"sweep": {"trajectory.schedule": ["uniform", "wma"]}}) == [
        "schedule=uniform", "schedule=wma",
    ]  # fmt: skip
    assert names(extra_merge(sweep={"parameters.direction": ["principal", "secant"]})) == [
        "direction=principal", "direction=secant",
    ]  # fmt: skip


def test_schedules_and_weights_and_the_last_so_many_are_swept() -> None:
    assert names(average("x") | {"sweep": {"trajectory.schedule.ema": [0.1, 0.2]}}) == [
        "ema=0.1", "ema=0.2",
    ]  # fmt: skip
    assert names(average("x") | {"sweep": {"trajectory.last": [4, 8]}}) == ["last=4", "last=8"]
    recipe = linear({Path("a"): 1, Path("b"): 1}, sweep={"models.1.parameters.weight": [0.5, 2]})
    found = [
        variant.config.models[1].parameters["weight"] for variant in load_recipe(recipe).variants
    ]
    assert [weight[0].anchors for weight in found] == [(0.5,), (2.0,)]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (extra_merge(step=[0.5, 1], select=TEXT), ["step=0", "step=0.5", "step=1"]),
        (extra_merge(step=0.5, select=TEXT), ["step=0", "step=0.5"]),
        (extra_merge(step=[1, 0], select=TEXT), ["step=1", "step=0"]),
        (extra_merge(step={"span": 0.1}, select=TEXT), ["span=0", "span=0.1"]),
        (extra_merge(step={"span": [0.1, 0.2]}, select=TEXT), ["span=0", "span=0.1", "span=0.2"]),
        (extra_merge(step=[0.5, 1]), ["step=0.5", "step=1"]),
        (extra_merge(sweep={"parameters.step": [1, 2]}), ["step=1", "step=2"]),
        (extra_merge(sweep={"parameters.step": [1, 2]}, select=TEXT),
         ["step=0", "step=1", "step=2"]),
        (extra_merge(step=0, sweep={"trajectory.window": [4, 8]}, select=TEXT),
         ["window=4,step=0", "window=8,step=0"]),
        (extra_merge(sweep={"trajectory.window": [4, 8]}, select=TEXT),
         ["window=4,step=0", "window=4,step=0.5", "window=8,step=0", "window=8,step=0.5"]),
        (average("x") | {"sweep": {"trajectory.last": [4, 8]}, "select": TEXT},
         ["last=4", "last=8"]),
    ],
)  # fmt: skip
def test_a_choice_of_steps_has_the_average_among_its_candidates(
    recipe: dict[str, Plain], expected: list[str]
) -> None:
    assert names(recipe) == expected


def test_a_choice_among_swept_steps_in_spans_has_it_too() -> None:
    recipe: Keys = {**extra_merge(sweep={"parameters": {"step": {"span": [1]}}}, select=TEXT)}
    del recipe["parameters"]
    assert names(recipe) == ["span=0", "span=1"]
