"""What plan, inspect and merge print, as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import distmerge
from distmerge import cli
from distmerge.errors import ConfigError, SourceError
from tests.support.checkpoints import average_recipe, write_checkpoint, write_recipe

MIXED = {"w": torch.ones(4, 2), "h": torch.ones(3, dtype=torch.float16), "n": torch.ones(1).long()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, [str(argument) for argument in arguments])


def printed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    return result.stdout


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """An average over three checkpoints, each in two shards."""
    for step in (1, 2, 3):
        tensors = {**MIXED, "w": torch.full((4, 2), float(step))}
        write_checkpoint(tmp_path / f"step-{step}", tensors, shards=2, config={})
    return write_recipe(tmp_path / "r.yaml", average_recipe(tmp_path / "step-*"))


def test_plan_describes_the_merge_as_json(recipe: Path) -> None:
    found: dict[str, Any] = json.loads(printed("plan", recipe, "--json", "--ranks", 2))
    plan = distmerge.plan(recipe)
    assert found["digest"] == plan.digest
    assert [(row["step"], row["donor"], row["bytes"]) for row in found["inputs"]] == [
        (1, False, 46), (2, False, 46), (3, True, 46),
    ]  # fmt: skip
    assert [row["fingerprint"] for row in found["inputs"]] == [c.fingerprint for c in plan.inputs]
    assert found["tensors_by_rule"] == {"sum": 2, "equal": 1}
    assert found["shards"] == [{"name": "model.safetensors", "bytes": 4096 + 46}]
    assert (found["tensors"], found["jobs"], len(found["ranks"])) == (3, 3, 2)
    assert (found["read_bytes"], found["write_bytes"]) == (3 * 46, 4096 + 46)
    assert sum(row["write_bytes"] for row in found["ranks"]) == 46
    assert found["memory_bytes"] > 0


def test_plan_reads_headers_and_writes_nothing(tmp_path: Path, recipe: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    text = printed("plan", recipe, "--shard-size", "40", "--ranks", 20)
    assert sorted(tmp_path.rglob("*")) == before
    assert "*  " in text
    assert "Output: 3 tensors (2 sum, 1 equal), 2 shards" in text
    assert "model-00002-of-00002.safetensors" in text
    assert "..." in text  # of twenty ranks
    assert f"digest {distmerge.plan(recipe, shard_size='40').digest}" in text


def test_plan_counts_tensors_that_not_all_inputs_hold(tmp_path: Path, recipe: Path) -> None:
    write_checkpoint(tmp_path / "step-3", {**MIXED, "more": torch.ones(2)}, shards=2)
    text = printed("plan", recipe, "--json", "--set", "missing=present")
    assert json.loads(text)["tensors_by_rule"] == {"sum": 2, "sum of fewer inputs": 1, "equal": 1}


def test_plan_s_memory_follows_the_budget(recipe: Path) -> None:
    small, large = (
        json.loads(printed("plan", recipe, "--json", "--memory", size))["memory_bytes"]
        for size in ("10MB", "50MB")
    )
    assert small < 10 * 10**6
    assert small < large < 50 * 10**6


def test_inspect_lists_a_folder(tmp_path: Path, recipe: Path) -> None:
    found: dict[str, Any] = json.loads(printed("inspect", tmp_path / "step-1", "--json"))
    assert found == distmerge.inspect(tmp_path / "step-1").as_plain()
    first, second = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    assert found["tensors"] == [
        {"name": "n", "dtype": "I64", "shape": [1], "shard": first, "bytes": 8},
        {"name": "w", "dtype": "F32", "shape": [4, 2], "shard": first, "bytes": 32},
        {"name": "h", "dtype": "F16", "shape": [3], "shard": second, "bytes": 6},
    ]
    assert [row["name"] for row in found["shards"]] == [first, second]
    assert found["bytes"] == 46
    assert found["bytes_by_dtype"] == {"I64": 8, "F32": 32, "F16": 6}
    assert (found["folder"], found["commit"]) == (str(tmp_path / "step-1"), None)
    text = printed("inspect", tmp_path / "step-1")
    assert "3 tensors in 2 shards, 46 B (8 B I64, 32 B F32, 6 B F16)" in text
    assert f"fingerprint {found['fingerprint']}" in text


def test_inspect_lists_one_file(tmp_path: Path, recipe: Path) -> None:
    file = tmp_path / "step-1/model-00002-of-00002.safetensors"
    found = distmerge.inspect(file).as_plain()
    assert found["folder"] == str(tmp_path / "step-1")
    assert found["shards"] == [{"name": file.name, "bytes": file.stat().st_size}]
    assert found["bytes_by_dtype"] == {"F16": 6}


def test_inspect_lists_what_can_not_be_merged_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"q": torch.ones(4).to(torch.float8_e4m3fn)})
    assert "F8_E4M3" in printed("inspect", tmp_path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("{}/gone", SourceError, "gone: no such folder"),
        ("{}", SourceError, r"no \*.safetensors in it"),
        ("{}/r.yaml", SourceError, "r.yaml: not a sound safetensors file"),
        ("nobody/nothing", SourceError, "not in the Hub's cache, and the Hub can't be reached"),
        ("a@b@c", ConfigError, "expected path or path@revision"),
    ],
)
def test_inspect_refuses_what_holds_no_tensors(
    tmp_path: Path, recipe: Path, path: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        distmerge.inspect(path.format(tmp_path))


def test_merge_sums_up_what_it_did(tmp_path: Path, recipe: Path) -> None:
    text = printed("merge", recipe, tmp_path / "out", "--shard-size", "40", "--memory", "50MB")
    assert text.startswith(f"{tmp_path}/out: 3 tensors in 2 shards, ")
    assert "read 138 B, wrote " in text
    assert "1 rank, peak memory" in text


def test_quiet_prints_nothing(tmp_path: Path, recipe: Path) -> None:
    assert run("merge", recipe, tmp_path / "out", "--quiet").output == ""
    assert (tmp_path / "out/model.safetensors").is_file()


def test_allowed_non_finite_values_are_told(tmp_path: Path, recipe: Path) -> None:
    spoiled = {**MIXED, "w": torch.full((4, 2), float("nan"))}
    write_checkpoint(tmp_path / "step-2", spoiled, shards=2)
    text = printed("merge", recipe, tmp_path / "out", "--allow-nonfinite")
    assert "warning: 8 values were NaN or Inf" in text


def test_lenient_warns_and_goes_on(tmp_path: Path, recipe: Path) -> None:
    with recipe.open("a") as file:
        file.write("dtypo: x\n")
    assert isinstance(run("plan", recipe).exception, ConfigError)
    result = run("plan", recipe, "--lenient")
    assert result.exit_code == 0
    assert "line 4, dtypo: unknown key ignored; did you mean 'dtype'?" in result.stderr


def test_the_version_is_the_package_s() -> None:
    assert printed("--version").strip() == f"distmerge, version {distmerge.__version__}"
