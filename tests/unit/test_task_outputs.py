"""What stands beside a merge of task vectors: its recipe, its plan, and the proof of its bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import distmerge
from distmerge.cli import cli
from distmerge.document import Plain
from distmerge.pipeline import Options
from tests.dist.cases import fingerprints
from tests.support.checkpoints import INDEX
from tests.support.damage import flip, forge, listed, place
from tests.support.drawing import without_drawing
from tests.support.tasks import SHAPES, WEIGHTED, WHOLE, Recipe, family, recipe, write_family

SMALL = Options(shard_size="30kB")
OWN: dict[str, Plain] = {"weight": [0.4, 0.8], "density": [{"filter": "mlp", "value": 0.5},
                                                           {"value": 0.3}]}  # fmt: skip
SVC: dict[str, Plain] = {
    "alpha": 0.25,
    "exclude": ["*down_proj*"],
    "split": {"*.qkv.weight": [24, 8, 8], "*up_proj": 2},
}
PARAMETERS: dict[str, dict[str, Plain]] = {
    "task_arithmetic": {"lambda": 0.3, "normalize": True},
    "ties": {"lambda": [0.3, 0.9]},
    "dare_linear": {"seed": 7, "rescale": False},
    "dare_ties": {"seed": 8, "normalize": True},
    "iso_cts": {"lambda": 1.5, "common_share": 0.5},
    "star": {"eta": 0.6},
}


def plain(method: str) -> Callable[[Path], Recipe]:
    if method == "expo":
        return lambda folder: recipe(folder, "expo", 1, shared={"alpha": 1.25})
    shared = PARAMETERS.get(method)
    return lambda folder: recipe(folder, method, 2, own=OWN, shared=shared)


def calibrated(method: str, **keys: Plain) -> Callable[[Path], Recipe]:
    return lambda folder: {**plain(method)(folder), "calibrate": {"method": "svc", **keys}}


RECIPES: dict[str, Callable[[Path], Recipe]] = {
    **{method: plain(method) for method in (*WEIGHTED, "expo", *WHOLE)},
    **{f"svc on {method}": calibrated(method, **SVC) for method in (*WEIGHTED, "expo", *WHOLE)},
    "svc on its own": calibrated("task_arithmetic"),
    "svc on what is included": calibrated("task_arithmetic", include=["lm_head*"], alpha="auto"),
    "sweep": lambda folder: {
        **calibrated("ties")(folder),
        "out_dtype": "bfloat16",
        "sweep": {"parameters.lambda": [0.5, 1], "calibrate.alpha": ["auto", 1]},
    },
    "sweep without svc": lambda folder: {
        **plain("dare_ties")(folder),
        "sweep": {"parameters.seed": [1, 2], "models.0.parameters.weight": [0.1, 0.2]},
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("models"), family(SHAPES, 2), shards=2)


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The outputs of all recipes; nobody may change them."""
    folder = tmp_path_factory.mktemp("merged")
    with without_drawing():
        for name, made in RECIPES.items():
            distmerge.merge(made(models), folder / name / "out", options=SMALL)
    return {name: folder / name / "out" for name in RECIPES}


def outputs(out: Path) -> list[Path]:
    """The checkpoints in OUT: itself, or those of a sweep."""
    return sorted(path.parent for path in out.rglob(INDEX))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_in_the_manifest_makes_the_same_again(
    merged: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folders = outputs(merged[name])
    assert len(folders) == (4 if "sweep" in name else 1)
    for number, folder in enumerate(folders):
        manifest = json.loads((folder / "distmerge.json").read_text())
        with without_drawing():
            again = distmerge.merge(manifest["recipe"], tmp_path / f"{number}", options=SMALL)
        assert again.digest == manifest["plan"]
        made = json.loads((tmp_path / f"{number}/distmerge.json").read_text())
        assert made["recipe"] == manifest["recipe"]
        shards = [path.name for path in folder.glob("*.safetensors")]
        found, expected = fingerprints(tmp_path / f"{number}"), fingerprints(folder)
        assert [found[shard] for shard in shards] == [expected[shard] for shard in shards]


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_merge_left_is_sound(merged: dict[str, Path], name: str) -> None:
    found = distmerge.verify(merged[name], recompute="all")
    assert (listed(found), found.notes) == ([], ())
    assert found.sound
    assert found.outputs == (4 if "sweep" in name else 1)
    assert found.recomputed == len(SHAPES) * found.outputs


DAMAGED = ["ties", "iso_c", "svc on task_arithmetic", "svc on tsv_m", "sweep"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.experts.up_proj", "lm_head.weight"])
def test_one_bit_is_found_even_where_its_hash_is_forged(
    merged: dict[str, Path], tmp_path: Path, name: str, tensor: str
) -> None:
    out = Path(shutil.copytree(merged[name], tmp_path / "out"))
    folder = outputs(out)[-1]
    where = place(folder, tensor)
    flip(where.path, where.start)
    forge(folder, where.path.name)
    (finding,) = distmerge.verify(out, recompute="all").findings
    assert tensor in str(finding)
    assert "1 of " in str(finding)
    assert "elements differ from what the inputs give, the first is element 0" in str(finding)


def printed(*arguments: object) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", RECIPES)
def test_plan_tells_what_merge_does(models: Path, tmp_path: Path, name: str) -> None:
    config = tmp_path / "r.yaml"
    made = RECIPES[name](models)
    config.write_text(yaml.safe_dump(made, sort_keys=False))
    plan = distmerge.plan(made)
    found: dict[str, Any] = json.loads(printed("plan", config, "--json", "--ranks", 3))
    text = printed("plan", config, "--ranks", 3)
    on_tasks = sum(tensor.rule.kind == "tasks" for tensor in plan.tensors)
    assert found["digest"] == plan.digest
    assert found["tensors_by_rule"].get("tasks", 0) == on_tasks
    assert sum(found["tensors_by_rule"].values()) == len(SHAPES)
    assert f"digest {plan.digest}" in text
    if on_tasks:
        assert f"{on_tasks} tasks" in text
