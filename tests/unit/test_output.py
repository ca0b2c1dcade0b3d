"""The output folder: files, index, permissions, manifest, replacement."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import distmerge
from distmerge import output
from distmerge.document import Plain
from distmerge.pipeline import Options
from tests.support.checkpoints import INDEX, read_output, write_checkpoint
from tests.unit.recipes import average, linear
from tests.unit.refusals import tree

SMALL = Options(shard_size="100")


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Three checkpoints of a run with a config, in shards; the glob that matches them."""
    for step in (1, 2, 3):
        tensors = {f"layers.{i}.w": torch.full((10,), float(step * i)) for i in range(5)}
        folder = tmp_path / f"run/step-{step}"
        write_checkpoint(folder, tensors, shards=2, config={"torch_dtype": "float32"})
        (folder / "chat").mkdir()
        (folder / "chat/template.jinja").write_text(f"step {step}")
    return str(tmp_path / "run/step-*")


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "distmerge.json").read_text())
    return found


def test_shards_and_index_agree(tmp_path: Path, run: str) -> None:
    result = distmerge.merge(average(run), tmp_path / "out", options=SMALL)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 5 * 40}
    assert len(set(index["weight_map"].values())) == result.shards == 3
    held: dict[str, str] = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(tmp_path / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), shard)
    assert held == index["weight_map"]
    merged = read_output(tmp_path / "out")
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {
        f"layers.{i}.w": [2.0 * i] * 10 for i in range(5)
    }


def test_a_single_file_needs_no_index(tmp_path: Path, run: str) -> None:
    distmerge.merge(average(run), tmp_path / "out")
    assert sorted(tree(tmp_path / "out")) == [
        "chat", "chat/template.jinja", "config.json", "distmerge.json", "model.safetensors",
    ]  # fmt: skip


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_permissions_follow_the_umask(
    tmp_path: Path, run: str, mask: int, file: int, folder: int
) -> None:
    os.umask(mask)
    distmerge.merge(average(run), tmp_path / "new/out", options=SMALL)
    found = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert len(found) > 8
    for path in found:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (folder if path.is_dir() else file), path


def test_the_manifest_describes_every_file_but_itself(tmp_path: Path, run: str) -> None:
    out = tmp_path / "out"
    (tmp_path / "run/step-3/tokenizer.json").write_text("{}")
    distmerge.merge(average(run), out, options=SMALL)
    files = {name: content for name, content in tree(out).items() if content is not None}
    del files["distmerge.json"]
    assert manifest(out)["files"] == {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in sorted(files.items())
    }
    assert list(manifest(out)["files"]) == sorted(files)


def test_the_manifest_tells_inputs_plan_and_versions(tmp_path: Path, run: str) -> None:
    plan = distmerge.plan(average(run))
    distmerge.merge(average(run), tmp_path / "out")
    found = manifest(tmp_path / "out")
    assert (found["plan"], found["donor"]) == (plan.digest, 2)
    assert found["inputs"] == [
        {
            "model": str(tmp_path / f"run/step-{step}"),
            "folder": str(tmp_path / f"run/step-{step}"),
            "commit": None,
            "step": step,
            "bytes": 200,
            "fingerprint": plan.inputs[step - 1].fingerprint,
        }
        for step in (1, 2, 3)
    ]
    assert found["versions"]["distmerge"] == distmerge.__version__
    assert found["versions"]["torch"] == torch.__version__
    thirds = {"0": 1 / 3, "1": 1 / 3, "2": 1 / 3}
    assert found["coefficients"] == [{"by_input": thirds, "tensors": "all others"}]


def test_the_manifest_groups_tensors_by_coefficients(tmp_path: Path, run: str) -> None:
    first, second = tmp_path / "run/step-1", tmp_path / "run/step-2"
    weight: Plain = [{"filter": "s.1.", "value": 3}, {"filter": "s.2.", "value": 3}, {"value": 1}]
    distmerge.merge(linear({first: weight, second: 1}), tmp_path / "out")
    assert manifest(tmp_path / "out")["coefficients"] == [
        {"by_input": {"0": 0.5, "1": 0.5}, "tensors": "all others"},
        {"by_input": {"0": 0.75, "1": 0.25}, "tensors": ["layers.2.w", "layers.1.w"]},
    ]


def recipes(folder: Path) -> dict[str, dict[str, Plain]]:
    first, second = folder / "run/step-1", folder / "run/step-2"
    gradient: Plain = [{"filter": "s.1.", "value": 3}, {"filter": "*", "value": [0.1, 0.7]}]
    every = str(folder / "run/step-*")
    more = [folder / f"more-{number}" for number in (0, 1)]
    return {
        "uniform": average(every),
        "ema": average(every, last=2, schedule={"ema": 0.3}, reverse=True),
        "scrambled": average(every, schedule={"wsm": "minus-sqrt"}, scramble=5),
        "linear": linear({first: gradient, second: 0.3}, out_dtype="bfloat16"),
        "not normalised": linear({first: 2, second: -0.3}, parameters={"normalize": False}),
        "uneven": linear(dict.fromkeys(more, 1), missing="present", non_float="donor"),
        "base": linear({first: None}, base_model=str(second), parameters={"weight": gradient},
                       dtype="float16", non_float="donor"),
    }  # fmt: skip


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", list(recipes(Path())))
def test_the_manifest_s_recipe_gives_the_same_bytes_again(tmp_path: Path, name: str) -> None:
    for number in (0, 1):
        tensors = {"n": torch.tensor([number]), "w": torch.ones(3), f"w{number}": torch.ones(3)}
        write_checkpoint(tmp_path / f"more-{number}", tensors)
    distmerge.merge(recipes(tmp_path)[name], tmp_path / "out", options=SMALL)
    again: dict[str, Plain] = manifest(tmp_path / "out")["recipe"]
    (tmp_path / "run/step-9").mkdir()  # what a glob finds later must not matter
    distmerge.merge(again, tmp_path / "again", options=SMALL)
    assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_two_runs_leave_the_same_folder_to_the_byte(tmp_path: Path, run: str) -> None:
    distmerge.merge(average(run), tmp_path / "one")
    distmerge.merge(average(run), tmp_path / "elsewhere/two")
    assert tree(tmp_path / "one") == tree(tmp_path / "elsewhere/two")


@pytest.mark.parametrize(
    "options",
    [
        Options(read="mmap"),
        Options(read="pread"),
        Options(memory="8MB"),
        Options(assemble="direct"),
        Options(assemble="gather"),
        Options(progress=True, allow_nonfinite=True),
    ],
    ids=str,
)
def test_options_do_not_change_a_byte(tmp_path: Path, run: str, options: Options) -> None:
    distmerge.merge(average(run), tmp_path / "plain")
    distmerge.merge(average(run), tmp_path / "with", options=options)
    assert tree(tmp_path / "with") == tree(tmp_path / "plain")


def test_overwrite_replaces_all_that_was_there(tmp_path: Path, run: str) -> None:
    out = tmp_path / "out"
    distmerge.merge(average(run), out, options=SMALL)
    (out / "old.txt").write_text("old")
    distmerge.merge(average(run, last=2), out, options=Options(overwrite=True))
    distmerge.merge(average(run, last=2), tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_what_was_there_stays_until_the_new_is_complete(
    tmp_path: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    distmerge.merge(average(run), out)
    before = tree(out)

    def fail(*_: object, **__: object) -> None:
        assert tree(out) == before
        raise OSError(5, "Input/output error")

    for name in ("write_sidecars", "complete"):
        with monkeypatch.context() as patch:
            patch.setattr(output, name, fail)
            with pytest.raises(distmerge.RunError, match="Input/output error"):
                distmerge.merge(average(run, last=2), out, options=Options(overwrite=True))
        assert tree(out) == before
    distmerge.merge(average(run, last=2), out, options=Options(overwrite=True))
    assert tree(out) != before
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_the_result_counts_bytes(tmp_path: Path, run: str) -> None:
    result = distmerge.merge(average(run), tmp_path / "out")
    assert (result.out, result.ranks, result.tensors, result.shards) == (tmp_path / "out", 1, 5, 1)
    assert result.read_bytes == 3 * 200
    assert result.written_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert (result.nonfinite, result.digest) == (0, distmerge.plan(average(run)).digest)
    assert 0 < result.pass_seconds <= result.seconds
    assert result.peak_memory > 10**6


@pytest.mark.parametrize("tensors", [{}, {"e": torch.zeros(0, 3)}], ids=["none", "an empty one"])
def test_next_to_nothing_can_be_merged_too(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    first, second = (write_checkpoint(tmp_path / name, tensors) for name in "ab")
    result = distmerge.merge(linear({first: 1, second: 1}), tmp_path / "out")
    assert result.tensors == len(tensors)
    assert {k: v.shape for k, v in read_output(tmp_path / "out").items()} == {
        k: v.shape for k, v in tensors.items()
    }
