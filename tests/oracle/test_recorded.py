"""Task vectors against results of mergekit that record.py has kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import distmerge
from tests.oracle.task_cases import CASES
from tests.support.reference import load
from tests.support.task_oracle import check_alike

RECORDED = Path(__file__).parent / "recorded"


def recorded(case: str) -> dict[str, torch.Tensor]:
    with safe_open(RECORDED / "cases.safetensors", framework="pt") as file:
        prefix = f"{case}/"
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_mergekit_had_the_same_tensors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(CASES[name].recipe(RECORDED)))
    distmerge.merge(path, tmp_path / "out")
    models = {model: load(RECORDED / model) for model in "ABC"}
    check_alike(CASES[name].method, load(tmp_path / "out"), recorded(name), models)
