"""What can be mended in a recipe of extra_merge or its checkpoints, through the command line.

One clear message, exit code 2, and nothing at OUT.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import distmerge
from distmerge.document import Plain
from tests.support.checkpoints import read_output, write_checkpoint
from tests.support.commands import merge_command
from tests.support.ranks import Outcome, observe_ranks
from tests.unit.recipes import average
from tests.unit.refusals import tree

Tensors = dict[str, torch.Tensor]
Recipe = dict[str, Plain]
Point = Callable[[int], Tensors]

Q = torch.tensor([1.0, -2.0, 3.0, 0.5])


def on_a_line(step: int) -> Tensors:
    return {"x": 1 + step * Q, "y": 2 - step * Q[:2], "n": torch.tensor([7, 8])}


def extra(step: Plain = 1, exclude: Plain = None, more: Recipe | None = None) -> Recipe:
    """Windows of two; keys of the trajectory are `more`."""
    parameters: Recipe = {"step": step} if exclude is None else {"step": step, "exclude": exclude}
    trajectory: Recipe = {"checkpoints": "", "window": 2, **(more or {})}
    return {"merge_method": "extra_merge", "trajectory": trajectory, "parameters": parameters}


def command(folder: Path, recipe: Recipe, point: Point, count: int = 4) -> Outcome[None]:
    """Merge `count` checkpoints into folder/work/out."""
    (folder / "work").mkdir()
    for step in range(count):
        write_checkpoint(folder / f"step-{step}", point(step), config={})
    if isinstance(recipe.get("trajectory"), dict):
        trajectory = {**recipe["trajectory"], "checkpoints": f"{folder}/step-*"}  # type: ignore[dict-item]
        recipe = {**recipe, "trajectory": trajectory}
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [str(folder / "r.yaml"), str(folder / "work" / "out"), "--quiet"]
    (outcome,) = observe_ranks(merge_command, 1, arguments)
    return outcome


def refusal(folder: Path, recipe: Recipe, point: Point, count: int = 4) -> str:
    """What the command says, in one line or in one for each difference."""
    outcome = command(folder, recipe, point, count)
    assert outcome.exit_code == 2, outcome.describe()
    assert not (folder / "work/out").exists()
    assert not [path for path in tree(folder / "work") if not path.startswith(".distmerge")]
    head, *listed = outcome.stderr.splitlines()
    assert head.startswith("error: "), outcome.describe()
    assert all(line.startswith("  ") for line in listed), outcome.describe()
    return outcome.stderr.strip()


def without(key: str, recipe: Recipe) -> Recipe:
    return {name: value for name, value in recipe.items() if name != key}


RECIPES: dict[str, tuple[str, Recipe]] = {
    "one merged checkpoint": (
        "trajectory: 4 checkpoints with window 4 and stride 1 make one merged checkpoint; "
        "a direction needs two: at least 5 checkpoints$",
        extra(more={"window": 4}),
    ),
    "one with such a stride": ("window 2 and stride 3 make one .* at least 5 checkpoints$",
                               extra(more={"stride": 3})),
    "window too large": ("trajectory.window: 5 is more than the 4 checkpoints$",
                         extra(more={"window": 5})),
    "one of the windows too large": ("trajectory.window: 9 is more than the 4 checkpoints",
                                     {**extra(), "sweep": {"trajectory.window": [2, 9]}}),
    "too few": ("9 checkpoints are needed, 4 are left", extra(more={"last": 9})),
    "no window": ("line 5, trajectory: window is missing: how many checkpoints make one merged",
                  {**extra(), "trajectory": {"checkpoints": ""}}),
    "window of nothing": ("window: expected a whole number of at least 1; got 0",
                          extra(more={"window": 0})),
    "no stride": ("trajectory.stride: expected a whole number", extra(more={"stride": 0})),
    "weights": ("trajectory.schedule.weights: 3 values for 2 checkpoints",
                extra(more={"schedule": {"weights": [1, 1, 1]}})),
    "weights of zero": ("the weights sum to zero",
                        extra(more={"schedule": {"weights": [1, -1]}, "normalize": True})),
    "no trajectory": ("merge_method: extra_merge needs trajectory:",
                      without("trajectory", extra())),
    "models": ("models: belongs to merge_method: linear; extra_merge takes trajectory:",
               {**extra(), "models": [{"model": "a"}]}),
    "no parameters": ("parameters: step is missing: merge intervals beyond the last merged "
                      "checkpoint, a number or a list .*, or {span: share}$",
                      without("parameters", extra())),
    "no step": ("line 3, parameters: step is missing",
                {**extra(), "parameters": {"direction": "secant"}}),
    "step": ("parameters.step: expected a finite number; got 'far'", extra("far")),
    "step of a list": (r"parameters.step\[1\]: expected a number or a word", extra([0, None])),
    "infinite step": ("parameters.step: expected a finite number; got inf", extra(float("inf"))),
    "spans": ("step.spans: unknown key; did you mean 'span'", extra({"spans": 1})),
    "no span": ("parameters.step: expected a number, a list of numbers, or {span", extra({})),
    "span": ("parameters.step.span: expected a finite number", extra({"span": {}})),
    "direction": ("direction: expected one of principal, secant; got 'pca'",
                  {**extra(), "parameters": {"step": 1, "direction": "pca"}}),
    "parameters": ("parameters.setp: unknown key; did you mean 'step'?",
                   {**extra(), "parameters": {"setp": 1}}),
    "missing": ("missing: expected one of error, donor; got 'present'",
                {**extra(), "missing": "present"}),
    "exclude is no list": ("parameters.exclude: expected a list; got 'y'", extra(exclude="y")),
    "exclude of nothing": (r"parameters.exclude: 'lm_\*' matches no tensor; the first is 'n'$",
                           extra(exclude=["x", "lm_*"])),
    "exclude of everything": ("parameters.exclude leaves no float tensor to extrapolate$",
                              extra(exclude=["x", "[yz]"])),
    "average": ("trajectory.window: it belongs to merge_method: extra_merge; average takes last: n",
                average("", window=2)),
    "stride of an average": ("stride: it belongs to merge_method: extra_merge",
                             average("", stride=2)),
    "nothing to choose": ("select: there is nothing to choose among; add a sweep:",
                          {**extra(0), "select": {"metric": "loss", "text": "a"}}),
}  # fmt: skip


@pytest.mark.parametrize(("message", "recipe"), RECIPES.values(), ids=RECIPES)
def test_a_mistake_in_the_recipe_is_told(tmp_path: Path, message: str, recipe: Recipe) -> None:
    told = refusal(tmp_path, recipe, on_a_line)
    assert re.search(message, told), told
    assert len(told.splitlines()) == 1


class Case(NamedTuple):
    """`point` makes the checkpoint of a step."""

    message: str
    point: Point
    recipe: Recipe = extra()
    checkpoints: int = 4


def with_x(values: dict[int, torch.Tensor]) -> Point:
    """On a line but for some steps."""
    return lambda step: {**on_a_line(step), **({"x": values[step]} if step in values else {})}


def circle(step: int) -> Tensors:
    return on_a_line(step % 3)


def short(step: int) -> Tensors:
    tensors = on_a_line(step)
    if step == 2:
        del tensors["y"]
    return tensors


POISONED = torch.tensor([0, torch.nan, 1, torch.inf])

CASES: dict[str, Case] = {
    "all equal": Case(
        r"extra_merge: 3 merged checkpoints \(window 2, stride 1\) have no direction: "
        r"they are all equal \(.*/step-0, .*/step-1, .*/step-2, .*/step-3\)$",
        lambda _: on_a_line(0),
    ),
    "all equal, and many": Case(
        r"they are all equal \(.*/step-0, .*/step-1, .*/step-2, \.\.\., .*/step-6, .*/step-7\)$",
        lambda _: on_a_line(0), checkpoints=8,
    ),
    "all equal that count": Case("they are all equal", lambda step: {
        **on_a_line(step), "x": Q}, extra(exclude=["y"])),
    "loop": Case(r"4 merged checkpoints \(window 2, stride 1\) have no direction: "
                 r"the last is where the first was \(.*step-0, .*step-4\)$", circle, checkpoints=5),
    "loop of the secant": Case(r"\(window 2, stride 1, secant\) have no direction: the last is",
                               circle,
                               {**extra(), "parameters": {"step": 1, "direction": "secant"}}, 5),
    "NaN": Case("step-2/model.safetensors: tensor x holds 2 NaN or Inf in elements 0 to 3; leave "
                "the checkpoint out, or the tensor with parameters.exclude", with_x({2: POISONED})),
    "NaN that is excluded": Case("step-2/model.safetensors: tensor x .* --allow-nonfinite",
                                 with_x({2: POISONED}), extra(exclude=["x"])),
    "overflow": Case(
        "error: step=90000, x: 3 values overflow float16; set a wider out_dtype",
        on_a_line, {**extra([0, 90_000]), "out_dtype": "float16"},
    ),
    "overflow of the only output": Case(
        "error: x: 3 values overflow float16", on_a_line, {**extra(90_000), "out_dtype": "float16"}
    ),
    "overflow of products": Case("x: products of differences overflow float64",
                                 with_x({1: torch.full((4,), 1e200, dtype=torch.float64)})),
    "missing tensor": Case("1 of 3 tensors differ\n  y: not in .*/step-2 .the recipe's missing: "
                           "donor", short),
    "missing in the donor": Case("y: not in .*/step-2", short, {**extra(), "missing": "donor"}, 3),
    "shape": Case(r"x: \[4\] in .*/step-0, \[2, 2\] in .*/step-1", with_x({1: Q.reshape(2, 2)})),
    "integers": Case(r"n \(I64\) differs between .*/step-3 and .*/step-2; it can't be averaged. "
                     "non_float: donor", lambda step: {
                         **on_a_line(step), "n": torch.tensor([7, 8 + (step == 2)])}),
    "nothing but integers": Case("leaves no float tensor to extrapolate",
                                 lambda _: {"n": torch.tensor([7, 8])}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_checkpoints_that_do_not_make_a_trajectory_are_told(tmp_path: Path, case: Case) -> None:
    told = refusal(tmp_path, case.recipe, case.point, case.checkpoints)
    assert re.search(case.message, told), told


def merged(folder: Path, recipe: Recipe, point: Point, count: int = 4) -> tuple[Tensors, str]:
    """The output and what the command said on its way."""
    outcome = command(folder, recipe, point, count)
    assert outcome.exit_code == 0, outcome.describe()
    return read_output(folder / "work/out"), outcome.stderr


def test_a_sound_trajectory_passes_without_a_word(tmp_path: Path) -> None:
    found, told = merged(tmp_path, extra(), on_a_line)
    assert told == ""
    torch.testing.assert_close(found["x"], 1 + 3.5 * Q)
    torch.testing.assert_close(found["y"], 2 - 3.5 * Q[:2])


def test_integers_that_are_equal_are_copied(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, extra(1000), on_a_line)
    assert found["n"].tolist() == [7, 8]
    assert found["n"].dtype == torch.int64


def test_integers_that_differ_may_be_the_donor_s(tmp_path: Path) -> None:
    def counting(step: int) -> Tensors:
        return {**on_a_line(step), "n": torch.tensor([step, step])}

    found, _ = merged(tmp_path, {**extra(), "non_float": "donor"}, counting)
    assert found["n"].tolist() == [3, 3]


def test_tensors_that_are_tied_stay_so(tmp_path: Path) -> None:
    def tied(step: int) -> Tensors:
        return {**on_a_line(step), "copy": on_a_line(step)["x"]}

    found, _ = merged(tmp_path, extra(), tied)
    assert torch.equal(found["copy"], found["x"])


def test_a_tensor_that_one_checkpoint_lacks_may_be_the_donor_s(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, {**extra(), "missing": "donor"}, short)
    assert torch.equal(found["y"], on_a_line(3)["y"])
    torch.testing.assert_close(found["x"], 1 + 3.5 * Q)


def test_what_is_excluded_stays_at_the_average(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, extra(10, exclude=["x", "n"]), on_a_line)
    torch.testing.assert_close(found["x"], 1 + 2.5 * Q)
    torch.testing.assert_close(found["y"], 2 - 12.5 * Q[:2])


def noise(step: int) -> Tensors:
    return {"x": torch.randn(2000, generator=torch.Generator().manual_seed(step))}


@pytest.mark.parametrize("swept", [{}, {"sweep": {"parameters.step": [0, 1]}}])
def test_a_direction_that_may_be_noise_is_told_once(tmp_path: Path, swept: Recipe) -> None:
    """White noise looks less like a trend than a random walk does; both numbers are given."""
    outcome = command(tmp_path, {**extra(), **swept}, noise, count=12)
    assert outcome.exit_code == 0
    (line,) = outcome.stderr.splitlines()
    found = re.search(
        r"extra_merge \(window 2, stride 1\): the direction explains ([\d.]+) % of the merged "
        r"checkpoints' variance, a random walk's ([\d.]+) %: it may be noise; compare with step 0",
        line,
    )
    assert found, line
    share, null = map(float, found.groups())
    assert 10 < share < 40
    assert null == pytest.approx(65, abs=5)


def test_every_setting_of_a_sweep_is_warned_of(tmp_path: Path) -> None:
    sweep: Recipe = {"trajectory.window": [2, 3], "parameters.direction": ["principal", "secant"]}
    outcome = command(tmp_path, {**extra(), "sweep": sweep}, noise, count=12)
    lines = outcome.stderr.splitlines()
    assert [line.partition(")")[0].rpartition("(")[2] for line in lines] == [
        "window 2, stride 1", "window 3, stride 1",
    ]  # fmt: skip


def test_two_merged_checkpoints_are_always_on_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their share of 1 says nothing, so it is not compared."""
    outcome = command(tmp_path, extra(more={"window": 11}), noise, count=12)
    assert (outcome.exit_code, outcome.stderr) == (0, "")


def test_a_plan_says_what_a_merge_would(tmp_path: Path) -> None:
    for step in range(4):
        write_checkpoint(tmp_path / f"step-{step}", on_a_line(step))
    recipe = extra(more={"window": 4})
    recipe["trajectory"] = {"checkpoints": f"{tmp_path}/step-*", "window": 4}
    with pytest.raises(distmerge.ConfigError, match="at least 5 checkpoints"):
        distmerge.plan(recipe)
