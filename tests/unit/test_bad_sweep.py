"""Sweeps that can't be: what is wrong, and where."""

from __future__ import annotations

from pathlib import Path

import pytest

from distmerge import sweep
from distmerge.document import Plain
from distmerge.errors import ConfigError
from distmerge.sweep import load_recipe
from tests.unit.recipes import average, extra_merge, linear

TEXT: dict[str, Plain] = {"metric": "loss", "text": "held-out.txt"}


def refused(recipe: dict[str, Plain], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe, overrides=overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert message in refused(extra_merge(sweep={"trajectory.window": values}))


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
    assert message in refused(extra_merge(sweep=swept))


def test_the_file_and_the_line_are_told(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: average\ntrajectory: {checkpoints: x}\nsweep:\n  trajectory.last: [4, 4]\n"
    )
    with pytest.raises(ConfigError, match=r"r\.yaml line 4, sweep\.trajectory\.last: a value is"):
        load_recipe(path)


def test_steps_swept_twice_are_refused() -> None:
    message = refused(extra_merge(step=[0, 1], sweep={"parameters.step": [0, 1]}))
    assert "parameters.step: parameters.step is swept twice" in message


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (extra_merge(sweep={"out_dtype": ["float32", "bfloat16"]}), "out_dtype"),
        (extra_merge(sweep={"dtype": ["float32", "bfloat16"]}), "dtype"),
        (extra_merge(sweep={"missing": ["error", "donor"]}), "missing"),
        (extra_merge(sweep={"non_float": ["equal", "donor"]}), "non_float"),
        (extra_merge(sweep={"base_model": ["a", "b"]}), "base_model"),
        (extra_merge(sweep={"trajectory.checkpoints": ["a", "b"]}), "trajectory.checkpoints"),
        (extra_merge(sweep={"trajectory.last": [10, 12]}), "trajectory.last"),
        (extra_merge(sweep={"trajectory.min_interval": [1, 2]}), "trajectory.min_interval"),
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
    message = refused(extra_merge(step=steps, sweep={"trajectory.window": list(range(1, 27))}))
    assert message == "config: sweep: 1040 outputs are more than 1000"
    monkeypatch.setattr(sweep, "MAX_OUTPUTS", 3)
    assert len(load_recipe(extra_merge(step=[1, 2, 3])).variants) == 3
    assert "4 outputs are more than 3" in refused(extra_merge(step=[1, 2, 3], select=TEXT))


@pytest.mark.parametrize(
    "recipe",
    [
        extra_merge(step=0, select=TEXT),
        extra_merge(step=[0], select=TEXT),
        average("x") | {"select": TEXT},
        average("x") | {"select": TEXT, "sweep": {"trajectory.last": [4]}},
        linear({Path("a"): 1}) | {"select": TEXT},
    ],
)
def test_a_choice_needs_something_to_choose_among(recipe: dict[str, Plain]) -> None:
    assert refused(recipe) == "config, select: there is nothing to choose among; add a sweep:"


def test_a_mistake_in_a_step_is_told_before_zero_is_added() -> None:
    assert "parameters.step: expected a finite number" in refused(
        extra_merge(step="x", select=TEXT)
    )
    assert "step is missing" in refused({**extra_merge(select=TEXT), "parameters": {}})
