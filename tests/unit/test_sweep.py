"""One recipe, many outputs: which, in which order, under which names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge import sweep
from distmerge.document import Plain
from distmerge.errors import ConfigError, OutputError
from distmerge.sweep import Recipe, load_recipe, swept_values
from tests.support.checkpoints import read_output, write_checkpoint
from tests.unit.recipes import average, linear, write_run

Keys = dict[str, Plain]

TEXT: Keys = {"metric": "loss", "text": "held-out.txt"}


def extra(*, step: Plain = 0.5, trajectory: Keys | None = None, **more: Plain) -> dict[str, Plain]:
    """merge_method: extra_merge of what need not be there."""
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": "x", "window": 8, **(trajectory or {})},
        "parameters": {"step": step},
        **more,
    }


def names(recipe: dict[str, Plain], *overrides: str) -> list[str]:
    return [variant.name for variant in load_recipe(recipe, overrides=overrides).variants]


def refused(recipe: dict[str, Plain], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides=overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    recipe = load_recipe(extra(step=[1, 0, 0.5, -2, 1e-5]))
    assert [variant.name for variant in recipe.variants] == [
        "step=1", "step=0", "step=0.5", "step=-2", "step=1e-05",
    ]  # fmt: skip
    assert [step for _, _, step in settings(recipe)] == [1, 0, 0.5, -2, 1e-5]
    assert recipe.variants[2].values == {"step": 0.5}


def test_steps_in_spans_are_named_so() -> None:
    recipe = load_recipe(extra(step={"span": [0, 0.25]}))
    assert [variant.name for variant in recipe.variants] == ["span=0", "span=0.25"]
    extrapolations = [variant.config.extrapolation for variant in recipe.variants]
    assert [(e.step, e.spans) for e in extrapolations if e] == [(0, True), (0.25, True)]


def test_a_grid_runs_over_the_last_key_first() -> None:
    recipe = load_recipe(
        extra(
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
    assert names(extra(sweep=swept)) == [
        "window=4,step=0", "window=4,step=1", "window=2,step=0", "window=2,step=1",
    ]  # fmt: skip


def test_a_key_of_the_sweep_need_not_be_in_the_recipe() -> None:
    recipe: Keys = {**extra(sweep={"parameters.step": [1, 2], "trajectory.stride": [1, 2]})}
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
    variant = load_recipe(extra(step=[0.5], sweep={"trajectory.window": [4]})).variants[0]
    assert (variant.name, variant.values) == ("", {"window": 4, "step": 0.5})
    assert variant.config.trajectory is not None
    assert variant.config.trajectory.window == 4
    assert names(extra()) == [""]


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
    assert names(extra(), "parameters.step=[0, 2]") == ["step=0", "step=2"]
    assert names(extra(step=[0, 2]), "parameters.step=2") == [""]
    assert names(extra(), "sweep.trajectory.window=[2, 4]") == ["window=2", "window=4"]
    assert names(extra(sweep={"trajectory.window": [2, 4]}), "sweep=null") == [""]
    found = load_recipe(
        extra(sweep={"trajectory.stride": [2, 4]}), overrides=["trajectory.window=3"]
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
    assert names(extra(sweep={"parameters.direction": ["principal", "secant"]})) == [
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
    ("values", "message"),
    [
        ([], "sweep.trajectory.window: a sweep needs at least one value"),
        ([4, 4], "sweep.trajectory.window: a value is listed twice"),
        ([4, 4.0], "a value is listed twice"),
        ([4, "4"], "a value is listed twice"),
        ([True], "sweep.trajectory.window[0]: expected a number or a word"),
        ([None], "expected a number or a word"),
        ([[4]], "expected a number or a word"),
        ([{"a": 4}], "expected a number or a word"),
        ([""], "expected text; got ''"),
        (["a/b"], "sweep.trajectory.window[0]: expected a number or a word of letters, digits"),
        (["a b"], "a word of letters"),
        (["a,b"], "a word of letters"),
        (["a=b"], "a word of letters"),
        ([".."], "a word of letters"),
        (["a\0"], "a word of letters"),
        (["a\n"], "a word of letters"),
        ([float("nan")], "expected"),
        ([0], "trajectory.window: expected a whole number of at least 1; got 0"),
        ([2.5], "trajectory.window: expected a whole number of at least 1; got 2.5"),
        (["many"], "trajectory.window: expected a whole number of at least 1; got 'many'"),
    ],
)
def test_a_value_that_can_t_be_one_is_refused(values: list[Plain], message: str) -> None:
    assert message in refused(extra(sweep={"trajectory.window": values}))


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ({"trajectory.windw": [1, 2]}, "trajectory.windw: unknown key; did you mean 'window'?"),
        ({"tokenizer": ["a", "b"]}, "tokenizer: merging tokenizers is not supported yet"),
        ({"parameters.step.span": [1, 2]}, "sweep: parameters.step.span: there is nothing to set"),
        (
            {"trajectory.window.x": [1]},
            "sweep: trajectory.window.x: there is nothing to set at 'x'",
        ),
        ({"models.0.parameters.weight": [1, 2]}, "belongs to merge_method: linear"),
        ({"merge_method": ["average", "linear"]}, "sweep.merge_method: this key can't be swept"),
        ({"select.metric": ["loss", "x"]}, "this key can't be swept"),
        ({"sweep": {"x": [1]}}, "this key can't be swept"),
        ({"trajectory.window": 4}, "sweep.trajectory.window: expected a mapping from keys"),
        ({"trajectory": {}}, "sweep.trajectory: expected a mapping from keys"),
        ({}, "sweep: expected a mapping from keys of the recipe to lists of values"),
        ([4, 8], "sweep: expected a mapping from keys"),
        ("trajectory.window", "sweep: expected a mapping from keys"),
        ({"trajectory.window": [4], "trajectory": {"window": [8]}}, "window is swept twice"),
    ],
)
def test_a_sweep_that_can_t_be_one_is_refused(swept: Plain, message: str) -> None:
    assert message in refused(extra(sweep=swept))


def test_the_file_and_the_line_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: average\ntrajectory: {checkpoints: x}\nsweep:\n  trajectory.last: [4, 4]\n"
    )
    with pytest.raises(ConfigError, match=r"r\.yaml line 4, sweep\.trajectory\.last: a value is"):
        load_recipe(path)


def test_steps_swept_twice_are_refused() -> None:
    message = refused(extra(step=[0, 1], sweep={"parameters.step": [0, 1]}))
    assert "parameters.step: parameters.step is swept twice" in message


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (extra(sweep={"out_dtype": ["float32", "bfloat16"]}), "out_dtype"),
        (extra(sweep={"dtype": ["float32", "bfloat16"]}), "dtype"),
        (extra(sweep={"missing": ["error", "donor"]}), "missing"),
        (extra(sweep={"non_float": ["equal", "donor"]}), "non_float"),
        (extra(sweep={"base_model": ["a", "b"]}), "base_model"),
        (extra(sweep={"trajectory.checkpoints": ["a", "b"]}), "trajectory.checkpoints"),
        (extra(sweep={"trajectory.last": [10, 12]}), "trajectory.last"),
        (extra(sweep={"trajectory.min_interval": [1, 2]}), "trajectory.min_interval"),
        (average("x") | {"sweep": {"trajectory.checkpoints": ["a", "b"]}}, "checkpoints"),
        (linear({Path("a"): 1}) | {"sweep": {"models.0.model": ["a", "b"]}}, "models.0.model"),
    ],
)  # fmt: skip
def test_what_all_outputs_share_can_t_be_swept(recipe: dict[str, Plain], key: str) -> None:
    message = refused(recipe)
    assert message.startswith("sweep: ")
    assert key in message
    assert message.endswith(
        "it changes which checkpoints are read or how they are written, not only how they are "
        "weighted; make a recipe for each"
    )


def test_more_outputs_than_anybody_wants_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Plain] = list(range(40))
    message = refused(extra(step=steps, sweep={"trajectory.window": list(range(1, 27))}))
    assert message == "config: sweep: 1040 outputs are more than 1000"
    monkeypatch.setattr(sweep, "MAX_OUTPUTS", 3)
    assert len(names(extra(step=[1, 2, 3]))) == 3
    assert "4 outputs are more than 3" in refused(extra(step=[1, 2, 3], select=TEXT))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (extra(step=[0.5, 1], select=TEXT), ["step=0", "step=0.5", "step=1"]),
        (extra(step=0.5, select=TEXT), ["step=0", "step=0.5"]),
        (extra(step=[1, 0], select=TEXT), ["step=1", "step=0"]),
        (extra(step={"span": 0.1}, select=TEXT), ["span=0", "span=0.1"]),
        (extra(step={"span": [0.1, 0.2]}, select=TEXT), ["span=0", "span=0.1", "span=0.2"]),
        (extra(step=[0.5, 1]), ["step=0.5", "step=1"]),
        (extra(sweep={"parameters.step": [1, 2]}), ["step=1", "step=2"]),
        (extra(sweep={"parameters.step": [1, 2]}, select=TEXT), ["step=0", "step=1", "step=2"]),
        (extra(step=0, sweep={"trajectory.window": [4, 8]}, select=TEXT),
         ["window=4,step=0", "window=8,step=0"]),
        (extra(sweep={"trajectory.window": [4, 8]}, select=TEXT),
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
    recipe: Keys = {**extra(sweep={"parameters": {"step": {"span": [1]}}}, select=TEXT)}
    del recipe["parameters"]
    assert names(recipe) == ["span=0", "span=1"]


@pytest.mark.parametrize(
    "recipe",
    [
        extra(step=0, select=TEXT),
        extra(step=[0], select=TEXT),
        average("x") | {"select": TEXT},
        average("x") | {"select": TEXT, "sweep": {"trajectory.last": [4]}},
        linear({Path("a"): 1}) | {"select": TEXT},
    ],
)
def test_a_choice_needs_something_to_choose_among(recipe: dict[str, Plain]) -> None:
    assert refused(recipe) == "config, select: there is nothing to choose among; add a sweep:"


def test_a_mistake_in_a_step_is_told_before_zero_is_added() -> None:
    assert "parameters.step: expected a finite number" in refused(extra(step="x", select=TEXT))
    assert "step is missing" in refused({**extra(select=TEXT), "parameters": {}})


def write_ones(folder: Path, count: int = 4) -> Path:
    for step in range(count):
        write_checkpoint(folder / f"step-{step}", {"a": torch.full((3,), 2.0**step)}, config={})
    return folder / "step-*"


def test_each_output_is_a_checkpoint_in_a_folder_of_its_own(tmp_path: Path) -> None:
    recipe = average(write_ones(tmp_path)) | {"sweep": {"trajectory.last": [2, 4]}}
    result = distmerge.merge(recipe, tmp_path / "out")
    assert result.outputs == ("last=2", "last=4")
    assert read_output(tmp_path / "out/last=2")["a"].tolist() == [6.0] * 3
    assert read_output(tmp_path / "out/last=4")["a"].tolist() == [3.75] * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "distmerge.json", "last=2", "last=4",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/distmerge.json").read_text())["outputs"] == [
        "last=2", "last=4",
    ]  # fmt: skip
    assert (tmp_path / "out/last=2/config.json").is_file()


def test_inputs_that_many_outputs_take_are_read_once(tmp_path: Path) -> None:
    recipe = average(write_ones(tmp_path)) | {"sweep": {"trajectory.last": [2, 3, 4]}}
    result = distmerge.merge(recipe, tmp_path / "out")
    assert result.read_bytes == 4 * 3 * 4


def test_outputs_that_begin_with_the_first_end_apart_and_need_a_donor(tmp_path: Path) -> None:
    recipe = average(write_ones(tmp_path)) | {"sweep": {"trajectory.first": [2, 3]}}
    with pytest.raises(
        ConfigError, match="the outputs end with different checkpoints; say with ba"
    ):
        distmerge.plan(recipe)
    base = str(write_checkpoint(tmp_path / "base", {"a": torch.ones(3)}, config={"base": 1}))
    distmerge.merge({**recipe, "base_model": base}, tmp_path / "out")
    for last, value in ((2, 1.5), (3, 7 / 3)):
        folder = tmp_path / f"out/first={last}"
        assert read_output(folder)["a"].tolist() == pytest.approx([value] * 3)
        assert json.loads((folder / "config.json").read_text())["base"] == 1


def test_a_value_that_the_checkpoints_do_not_allow_is_refused(tmp_path: Path) -> None:
    pattern = write_run(tmp_path, [1, 2, 3])
    with pytest.raises(ConfigError, match="4 checkpoints are needed, 3 are left"):
        distmerge.plan(average(pattern) | {"sweep": {"trajectory.last": [2, 4]}})
    weights: Keys = {"schedule": {"weights": [1, 1]}}
    with pytest.raises(ConfigError, match="weights: 2 values for 3 checkpoints"):
        distmerge.plan(average(pattern, **weights) | {"sweep": {"trajectory.last": [2, 3]}})


def test_items_of_a_list_are_swept_by_their_number(tmp_path: Path) -> None:
    pattern = write_run(tmp_path, [1, 2])
    recipe = average(pattern, schedule={"weights": [1, 1]})
    recipe["sweep"] = {"trajectory.schedule.weights.1": [0.5, 2]}
    assert distmerge.merge(recipe, tmp_path / "out").outputs == ("1=0.5", "1=2")
    assert read_output(tmp_path / "out/1=2")["a"].tolist() == [5.0, 5.0]


def test_a_name_that_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [1])
    recipe = linear(dict.fromkeys([tmp_path / "step-1"], 1))
    entries = recipe["models"]
    assert isinstance(entries, list)
    recipe["models"] = entries * 12
    swept: Keys = {f"models.{i}.parameters.weight": [1] for i in range(11)}
    recipe["sweep"] = {**swept, "models.11.parameters.weight": [1, 2]}
    with pytest.raises(OutputError, match="can't be written: File name too long"):
        distmerge.merge(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
