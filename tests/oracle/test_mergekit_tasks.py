"""Task vectors against mergekit's own results for the same recipes, in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import distmerge
from tests.oracle.task_cases import CASES
from tests.support import mergekit_oracle
from tests.support.reference import load
from tests.support.task_oracle import check_alike

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not mergekit_oracle.available(),
        reason="NOTHING WAS COMPARED WITH MERGEKIT: benchmarks/mergekit_env.sh makes what it needs",
    ),
]


@pytest.mark.parametrize("name", CASES)
def test_mergekit_has_the_same_tensors(name: str, models: Path, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(case.recipe(models)))
    mergekit_oracle.merge(case.recipe(models), tmp_path / "theirs")
    distmerge.merge(path, tmp_path / "ours")
    given = {model: load(models / model) for model in "ABC"}
    check_alike(case.method, load(tmp_path / "ours"), load(tmp_path / "theirs"), given)
