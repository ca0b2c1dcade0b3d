"""Recipes: every key, what it may be, and what people get wrong."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from distmerge.config import Config
from distmerge.document import Plain
from distmerge.errors import ConfigError
from distmerge.parameters import Conditional
from distmerge.reference import ModelRef
from distmerge.sweep import load_recipe
from distmerge.trajectory import Schedule

LINEAR = """\
merge_method: linear
models:
  - model: a
    parameters: {weight: 1}
  - model: b/c@v1
    parameters:
      weight: 0.5
"""
AVERAGE = """\
merge_method: average
trajectory:
  checkpoints: runs/x/step-*
"""


def loaded(folder: Path, text: str, *overrides: str, lenient: bool = False) -> Config:
    path = folder / "r.yaml"
    path.write_text(text)
    return load_recipe(path, overrides=overrides, lenient=lenient).shared


def trajectory(keys: str) -> str:
    """AVERAGE with keys of the trajectory in flow style."""
    return f"merge_method: average\ntrajectory: {{checkpoints: x, {keys}}}"


def test_a_linear_recipe_has_mergekit_s_keys(tmp_path: Path) -> None:
    found = loaded(tmp_path, LINEAR + "base_model: d\nparameters: {normalize: false, weight: 2}\n")
    assert [(m.model, m.parameters) for m in found.models] == [
        (ModelRef("a"), {"weight": (Conditional(None, (1.0,)),)}),
        (ModelRef("b/c", "v1"), {"weight": (Conditional(None, (0.5,)),)}),
    ]
    assert found.parameters == {
        "normalize": (Conditional(None, (0.0,)),),
        "weight": (Conditional(None, (2.0,)),),
    }
    assert (found.merge_method, found.base_model) == ("linear", ModelRef("d"))
    assert found.trajectory is None


def test_an_average_recipe_has_a_trajectory(tmp_path: Path) -> None:
    steps = "last: 4, from_step: 0, to_step: 9, min_interval: 2"
    modifiers = "schedule: {ema: 0.2}, reverse: true, scramble: 0, normalize: true"
    t = loaded(tmp_path, trajectory(f"{steps}, {modifiers}")).trajectory
    assert t is not None
    assert (t.checkpoints, t.first, t.last) == ("x", None, 4)
    assert (t.from_step, t.to_step, t.min_interval) == (0, 9, 2)
    assert t.schedule == Schedule(
        kind="ema", numbers=(0.2,), reverse=True, scramble=0, normalize=True
    )


def test_defaults_are_the_strict_ones(tmp_path: Path) -> None:
    found = loaded(tmp_path, AVERAGE)
    assert (found.missing, found.non_float, found.output_dtype) == ("error", "equal", None)
    assert found.trajectory is not None
    assert found.trajectory.schedule == Schedule(kind="uniform")


def test_a_base_model_gives_what_is_missing_unless_told_otherwise(tmp_path: Path) -> None:
    assert loaded(tmp_path, LINEAR + "base_model: a\n").missing == "donor"
    assert loaded(tmp_path, LINEAR + "base_model: a\nmissing: error\n").missing == "error"


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ("dtype: float32", "float32"),
        ("dtype: torch.float16", "float16"),
        ("out_dtype: torch.bfloat16", "bfloat16"),
        ("dtype: float32\nout_dtype: bfloat16", "bfloat16"),
        ("dtype: float64\nout_dtype: null", "float64"),
        ("dtype: null", None),
        ("", None),
    ],
)
def test_the_output_dtype_is_out_dtype_then_dtype(
    tmp_path: Path, keys: str, dtype: str | None
) -> None:
    assert loaded(tmp_path, AVERAGE + keys).output_dtype == dtype


SCHEDULES: dict[str, Schedule] = {
    "uniform": Schedule(kind="uniform"),
    "wma": Schedule(kind="wma"),
    "{ema: 1}": Schedule(kind="ema", numbers=(1.0,)),
    "{ema: 1e-3}": Schedule(kind="ema", numbers=(0.001,)),
    "{wsm: minus-sqrt}": Schedule(kind="wsm", curve="minus-sqrt"),
    "{wsm: [1, 0.5, 0.2]}": Schedule(kind="wsm", numbers=(1.0, 0.5, 0.2)),
    "{weights: [1, -0.5, 1e-1]}": Schedule(kind="weights", numbers=(1.0, -0.5, 0.1)),
}


@pytest.mark.parametrize(("text", "schedule"), SCHEDULES.items())
def test_schedules(tmp_path: Path, text: str, schedule: Schedule) -> None:
    found = loaded(tmp_path, trajectory(f"schedule: {text}")).trajectory
    assert found is not None
    assert found.schedule == schedule


@pytest.mark.parametrize(
    ("checkpoints", "expected"),
    [
        ("'runs/*'", "runs/*"),
        ("[a, b@r]", (ModelRef("a"), ModelRef("b", "r"))),
        ("[{model: {path: a, revision: r}}]", (ModelRef("a", "r"),)),
        ("{repo: o/n, revisions: [s1, s2]}", (ModelRef("o/n", "s1"), ModelRef("o/n", "s2"))),
    ],
)
def test_checkpoints_are_a_glob_a_list_or_a_repository(
    tmp_path: Path, checkpoints: str, expected: object
) -> None:
    found = loaded(tmp_path, AVERAGE, f"trajectory.checkpoints={checkpoints}").trajectory
    assert found is not None
    assert found.checkpoints == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", ModelRef("a/b")),
        ("a/b@main", ModelRef("a/b", "main")),
        ("{model: {path: a/b}}", ModelRef("a/b")),
        ("{model: {path: a/b, revision: main}}", ModelRef("a/b", "main")),
    ],
)
def test_model_references(tmp_path: Path, text: str, expected: ModelRef) -> None:
    assert loaded(tmp_path, LINEAR, f"models.0.model={text}").models[0].model == expected
    assert loaded(tmp_path, LINEAR, f"base_model={text}").base_model == expected


def test_a_folder_with_signs_in_its_name_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    found = loaded(tmp_path, LINEAR, f"models.0.model={folder}")
    assert found.models[0].model == ModelRef(str(folder))


UNKNOWN: dict[str, tuple[str, str]] = {
    "top level": ("merge_metod: linear", "line 1, merge_metod: .*did you mean 'merge_method'"),
    "method": ("merge_method: linar", "average, extra_merge, linear, .*; got 'linar' .*'linear'"),
    "far from all": (LINEAR + "zzz: 1", "line 8, zzz: unknown key; known here: merge_method"),
    "model": (LINEAR.replace("    parameters: {w", "    paramters: {w"),
              r"line 4, models\[0\]\.paramters: .*'parameters'"),
    "weight": (LINEAR.replace("      weight", "      wieght"),
               r"line 7, models\[1\]\.parameters\.wieght: .*'weight'"),
    "global in a model": (LINEAR.replace("{weight: 1}", "{normalize: false}"),
                          r"line 4, models\[0\]\.parameters\.normalize: unknown key"),
    "trajectory": (trajectory("lst: 3"), "line 2, trajectory.lst: .*'last'"),
    "schedule": (trajectory("schedule: {emma: 1}"), "'ema'"),
    "curve": (trajectory("schedule: {wsm: cosin}"), "expected one of .* 'cosine'"),
    "mapping form": (LINEAR + "base_model: {model: {path: a, rev: b}}", "known here: path"),
    "filter": (LINEAR + "parameters: {weight: [{filtr: a, value: 1}]}", "'filter'"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_a_mistyped_key_is_refused_with_line_and_hint(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'r.yaml'} line ")


def test_lenient_warns_of_unknown_keys_instead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = LINEAR.replace("- model: a", "- model: a\n    weight: 3") + "tokenizr: x\n"
    with caplog.at_level(logging.WARNING, "distmerge"):
        assert loaded(tmp_path, text, lenient=True) == loaded(tmp_path, LINEAR)
    first, second = (record.message for record in caplog.records)
    assert first.startswith(f"{tmp_path}/r.yaml line 9, tokenizr: unknown key ignored; ")
    assert "line 4, models[0].weight: unknown key ignored; " in second


WRONG: dict[str, tuple[str, str]] = {
    "a list": ("[1]", "line 1: expected a mapping with merge_method"),
    "no method": ("models: []", "line 1: merge_method is missing; one of average, extra_"),
    "method is a list": ("merge_method: [linear]", r"got \['linear'\]"),
    "no models": ("merge_method: linear", "linear needs models:"),
    "models is text": ("merge_method: linear\nmodels: a", "line 2, models: expected a list"),
    "no model at all": ("merge_method: linear\nmodels: []", "no model is listed"),
    "model without a name": ("merge_method: linear\nmodels: [{}]", "model is missing"),
    "model is text": ("merge_method: linear\nmodels: [a]", "expected a mapping with model"),
    "name is a number": (LINEAR.replace("model: a", "model: 3"), "line 3, .*expected text; got 3"),
    "name is empty": (LINEAR.replace("model: a", "model: ''"), "expected text; got ''"),
    "no revision": (LINEAR.replace("model: a", "model: a@"), "expected path or path@revision"),
    "no path": (LINEAR.replace("model: a", "model: '@r'"), "expected path or path@revision"),
    "two revisions": (LINEAR.replace("model: a", "model: a@b@c"), "expected path or path@revision"),
    "too long for a path": (LINEAR.replace(": a", ": " + "a" * 999), "can't be a path: File name"),
    "NUL in a path": (LINEAR.replace(": a", r': "a\0b"'), "can't be a path: embedded null"),
    "nobody's home": (LINEAR.replace(": a", ": ~nobody9/x"), "can't be a path: .*home"),
    "mapping without a path": (LINEAR + "base_model: {model: {}}", "path is missing"),
    "mapping without a model": (LINEAR + "base_model: {}", "expected {model: {path"),
    "weight is text": (LINEAR.replace("0.5", "half"), "line 7, .*weight: .*number; got 'half'"),
    "weight is not finite": (LINEAR.replace("0.5", ".inf"), "expected a finite number; got inf"),
    "weight is null": (LINEAR.replace("0.5", "null"), "expected a finite number; got None"),
    "empty gradient": (LINEAR.replace("0.5", "[]"), "a gradient needs at least one number"),
    "gradient with text": (LINEAR.replace("0.5", "[1, x]"), r"weight\[1\]: .*got 'x'"),
    "filter outside a list": (LINEAR.replace("0.5", "{filter: a, value: 1}"), "in a list"),
    "filter without a value": (LINEAR.replace("0.5", "[{filter: a}]"), "a filter needs a value"),
    "numbers among filters": (LINEAR.replace("0.5", "[{value: 1}, 2]"), "expected a mapping"),
    "unknown dtype": (AVERAGE + "dtype: int8", "line 4, dtype: dtype 'int8' is not supported"),
    "short dtype": (AVERAGE + "out_dtype: bf16", "one of float64, float32, float16, bfloat16"),
    "dtype is a number": (AVERAGE + "dtype: 16", "expected text; got 16"),
    "missing": (AVERAGE + "missing: ignore", "expected one of error, donor, present"),
    "non_float": (AVERAGE + "non_float: mean", "expected one of equal, donor"),
    "no trajectory": ("merge_method: average", "average needs trajectory:"),
    "models of average": (AVERAGE + "models: []", "models: belongs to merge_method: linear"),
    "parameters of average": (AVERAGE + "parameters: {}", "belongs to merge_method: linear"),
    "trajectory of linear": (LINEAR + "trajectory: {}", "belongs to merge_method: average"),
    "no checkpoints": ("merge_method: average\ntrajectory: {}", "checkpoints is missing"),
    "checkpoints is a number": (AVERAGE.replace("runs/x/step-*", "3"), "expected a list; got 3"),
    "no revisions": (AVERAGE.replace("runs/x/step-*", "{repo: a}"), "expected {repo: name"),
    "first and last": (trajectory("first: 1, last: 2"), "first and last can't both be given"),
    "last is text": (trajectory("last: all"), "whole number of at least 1; got 'all'"),
    "last is true": (trajectory("last: true"), "whole number of at least 1; got True"),
    "last is a fraction": (trajectory("last: 2.5"), "whole number of at least 1; got 2.5"),
    "last is zero": (trajectory("last: 0"), "whole number of at least 1; got 0"),
    "negative step": (trajectory("from_step: -1"), "whole number of at least 0; got -1"),
    "no interval": (trajectory("min_interval: 0"), "whole number of at least 1; got 0"),
    "reverse is a number": (trajectory("reverse: 1"), "expected true or false; got 1"),
    "seed is negative": (trajectory("scramble: -1"), "whole number of at least 0"),
    "schedule needs a value": (trajectory("schedule: ema"), "write schedule: {ema: ...}"),
    "two schedules": (trajectory("schedule: {ema: 1, wsm: linear}"), "expected one of ema, wsm"),
    "no schedule": (trajectory("schedule: {}"), "expected one of ema, wsm, weights"),
    "schedule is null": (trajectory("schedule:"), "expected one of uniform, wma, ema"),
    "ema of zero": (trajectory("schedule: {ema: 0}"), "over 0 and up to 1; got 0"),
    "ema over one": (trajectory("schedule: {ema: 1.1}"), "over 0 and up to 1; got 1.1"),
    "weights is a number": (trajectory("schedule: {weights: 1}"), "expected a list; got 1"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        loaded(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'r.yaml'} line ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: linear\nslices: []", "line 2, slices: slices are not supported yet"),
        ("merge_method: linear\nmodules: {}", "line 2, modules: modules are not supported yet"),
        (LINEAR + "tokenizer_source: union", "line 8, tokenizer_source: .*not supported yet"),
        (LINEAR + "tokenizer: {source: base}", "without it the donor's is copied"),
        (LINEAR + "chat_template: auto", "chat_template: not supported yet"),
        (LINEAR.replace("model: a", "model: a+lora"), "line 3, .*LoRA adapters .*not supported"),
        (LINEAR.replace("model: a", "model: a@r+lora@s"), "LoRA adapters .*not supported"),
    ],
)
@pytest.mark.parametrize("lenient", [False, True])
def test_what_mergekit_has_and_we_do_not_is_said_so(
    tmp_path: Path, text: str, message: str, lenient: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, text, lenient=lenient)


def test_a_mapping_is_as_good_as_a_file(tmp_path: Path) -> None:
    plain: dict[str, Plain] = yaml.safe_load(LINEAR)
    assert load_recipe(plain).shared == loaded(tmp_path, LINEAR)


def test_overrides_change_the_recipe(tmp_path: Path) -> None:
    found = loaded(tmp_path, LINEAR, "models.1.parameters.weight=3", "out_dtype=float16")
    assert found.models[1].parameters["weight"] == (Conditional(None, (3.0,)),)
    assert found.output_dtype == "float16"
    with pytest.raises(ConfigError, match=r"--set, models\[1\]\.parameters\.wait: unknown key"):
        loaded(tmp_path, LINEAR, "models.1.parameters.wait=3")


def test_gradients_and_filters_become_conditionals(tmp_path: Path) -> None:
    weight = "[{filter: mlp, value: [0, 1]}, {filter: '*', value: 0.25}, {value: 1}]"
    found = loaded(tmp_path, LINEAR, f"parameters.weight={weight}", "parameters.normalize=true")
    assert found.parameters == {
        "weight": (
            Conditional("mlp", (0.0, 1.0)), Conditional(None, (0.25,)), Conditional(None, (1.0,)),
        ),
        "normalize": (Conditional(None, (1.0,)),),
    }  # fmt: skip
