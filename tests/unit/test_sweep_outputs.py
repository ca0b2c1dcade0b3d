"""Sweeps on the disk: many outputs from one read, each as if it had been made alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.errors import ConfigError, OutputError
from tests.support.checkpoints import read_output, write_checkpoint
from tests.support.drawing import without_drawing
from tests.support.trajectories import walk
from tests.unit.recipes import average, extra_merge, linear, write_run

Keys = dict[str, Plain]


@pytest.fixture(autouse=True)
def no_drawing() -> Iterator[None]:
    with without_drawing():
        yield


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


def write_walk(folder: Path) -> str:
    for step, point in enumerate(walk(8, 60, drift=1.0).float()):
        write_checkpoint(folder / f"step-{step}", {"a.weight": point[:50], "b.weight": point[50:]})
    return str(folder / "step-*")


EXTRAPOLATIONS: dict[str, tuple[Plain, Keys, Keys]] = {
    "step": (0.5, {}, {}),
    "span": ({"span": 0.2}, {"window": 2, "stride": 2}, {}),
    "no step": (0, {}, {}),
    "secant": (1, {}, {"direction": "secant"}),
    "exclude": (1, {}, {"exclude": ["b.*"]}),
    "last": (1, {"last": 5}, {}),
    "ema": (1, {"schedule": {"ema": 0.3}}, {}),
    "wsm": (1, {"schedule": {"wsm": "minus-sqrt"}, "reverse": True}, {}),
    "wsm listed": (1, {"schedule": {"wsm": [1, 0.5, 0.25]}, "scramble": 3}, {}),
    "weights": (1, {"schedule": {"weights": [3, -1, 4]}, "normalize": True}, {}),
}


def extrapolation(pattern: str, step: Plain, trajectory: Keys, parameters: Keys) -> Keys:
    keys: Keys = {"checkpoints": pattern, "window": 3, **trajectory}
    return {**extra_merge(trajectory=keys), "parameters": {"step": step, **parameters}}


@pytest.mark.parametrize("case", EXTRAPOLATIONS.values(), ids=EXTRAPOLATIONS)
def test_the_recipe_in_the_manifest_makes_the_same_again(
    tmp_path: Path, case: tuple[Plain, Keys, Keys]
) -> None:
    recipe = extrapolation(write_walk(tmp_path), *case)
    distmerge.merge({**recipe, "out_dtype": "bfloat16"}, tmp_path / "out")
    manifest = json.loads((tmp_path / "out/distmerge.json").read_text())
    again = distmerge.merge(manifest["recipe"], tmp_path / "again")
    assert json.loads((tmp_path / "again/distmerge.json").read_text()) == manifest
    assert again.digest == manifest["plan"]


def test_each_way_to_extrapolate_has_a_plan_of_its_own(tmp_path: Path) -> None:
    """On whose digest the ranks agree before there are coefficients."""
    pattern = write_walk(tmp_path)
    recipes = [extrapolation(pattern, *case) for case in EXTRAPOLATIONS.values()]
    digests = [distmerge.plan(recipe).digest for recipe in recipes]
    assert len(set(digests)) == len(recipes)
    assert distmerge.plan(recipes[0]).digest == digests[0]


def test_a_base_model_gives_the_config_and_takes_no_part(tmp_path: Path) -> None:
    recipe = extrapolation(write_walk(tmp_path), [0, 1], {}, {})
    base = write_checkpoint(
        tmp_path / "base",
        {"a.weight": torch.ones(50), "b.weight": torch.ones(10)},
        config={"base": 1},
    )
    distmerge.merge(recipe, tmp_path / "out")
    distmerge.merge({**recipe, "base_model": str(base)}, tmp_path / "based")
    for name in ("step=0", "step=1"):
        plain, based = (read_output(tmp_path / out / name) for out in ("out", "based"))
        assert all(torch.equal(plain[tensor], based[tensor]) for tensor in plain)
        assert (tmp_path / "based" / name / "config.json").is_file()
    numbers = json.loads((tmp_path / "based/report/report.json").read_text())
    assert [entry["step"] for entry in numbers["checkpoints"]] == list(range(8))


def test_the_manifest_tells_the_coefficients_of_what_moves_and_what_does_not(
    tmp_path: Path,
) -> None:
    recipe = extrapolation(write_walk(tmp_path), 2, {}, {"exclude": ["b.*"]})
    distmerge.merge(recipe, tmp_path / "out")
    moved, still = json.loads((tmp_path / "out/distmerge.json").read_text())["coefficients"]
    assert still["by_input"] == {str(i): 1 / 3 for i in (5, 6, 7)}
    assert (moved["tensors"], still["tensors"]) == ("all others", ["b.weight"])
    assert sum(moved["by_input"].values()) == pytest.approx(1)
    points = walk(8, 60, drift=1.0).float()[:, :50].double()
    weights = torch.tensor([moved["by_input"][str(i)] for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(read_output(tmp_path / "out")["a.weight"].double(), weights @ points,
                               rtol=1e-5, atol=1e-5)  # fmt: skip
