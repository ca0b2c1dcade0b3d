"""Every kind of damage to an output, caused for real, is found with its file and tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import distmerge
from distmerge import cli
from distmerge.errors import ConfigError, OutputError, RunError
from distmerge.pipeline import Options
from distmerge.sources import reader
from distmerge.verification.recompute import parse_share, sample
from tests.support.checkpoints import INDEX, write_checkpoint
from tests.support.damage import (
    MANIFEST,
    edit_manifest,
    flip,
    forge,
    listed,
    manifest,
    overwrite,
    place,
)
from tests.support.drawing import without_drawing
from tests.unit.recipes import average, linear

FIRST, SECOND, THIRD = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
SMALL = Options(shard_size="600")


def tensors(step: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return {
        "embed": torch.randn(20, 5, generator=random),
        "layers.0.w": torch.randn(100, generator=random),
        "layers.0.half": torch.randn(7, generator=random).half(),
        "layers.1.w": torch.randn(10, 10, generator=random),
        "positions": torch.arange(9),
        "mask": torch.arange(5) > 2,
        "empty": torch.empty(0, 3),
    }


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with five checkpoints of a run; nobody may change them."""
    folder = tmp_path_factory.mktemp("verify")
    for step in range(1, 6):
        config = {"torch_dtype": "float32"}
        write_checkpoint(folder / f"step-{step}", tensors(step), shards=2, config=config)
    return folder


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "average": lambda run: average(run / "step-*"),
    "cast": lambda run: {**average(run / "step-*"), "out_dtype": "bfloat16"},
    "average sweep": lambda run: {
        **average(run / "step-*"),
        "sweep": {"trajectory.schedule.ema": [0.1, 0.2]},
    },
    "linear": lambda run: linear({run / "step-1": 0.3, run / "step-2": 0.7}),
    "filters": lambda run: linear({run / "step-1": [0.1, 0.9], run / "step-2": 0.7}),
    "copy": lambda run: linear({run / "step-1": 1, run / "step-2": 0}),
    "linear sweep": lambda run: {
        **linear({run / "step-1": 0.3, run / "step-2": 0.7}),
        "sweep": {"models.0.parameters.weight": [0, 0.5]},
    },
    "extra": lambda run: {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(run / "step-*"), "window": 2},
        "parameters": {"step": 0.5, "exclude": ["embed"]},
    },
    "extra sweep": lambda run: {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": str(run / "step-*"), "window": 2},
        "parameters": {"step": [0, 1], "exclude": ["embed"]},
        "sweep": {"trajectory.window": [2, 3]},
    },
}


@pytest.fixture(scope="session")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    with without_drawing():
        for name, recipe in RECIPES.items():
            distmerge.merge(recipe(run), folder / name / "out", options=SMALL)
    return {name: folder / name / "out" for name in RECIPES}


@pytest.fixture
def out(merged: dict[str, Path], tmp_path: Path) -> Path:
    """A sound average, to be damaged."""
    return Path(shutil.copytree(merged["average"], tmp_path / "out"))


@pytest.fixture
def swept(merged: dict[str, Path], tmp_path: Path) -> Path:
    """Two sound outputs of a sweep, to be damaged."""
    return Path(shutil.copytree(merged["average sweep"], tmp_path / "swept"))


def only(found: distmerge.Verification) -> str:
    assert len(found.findings) == 1, listed(found)
    return str(found.findings[0])


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_merge_left_is_sound(merged: dict[str, Path], name: str) -> None:
    found = distmerge.verify(merged[name], recompute="all")
    assert (listed(found), found.notes) == ([], ())
    assert found.sound
    assert found.outputs == {"average sweep": 2, "linear sweep": 2, "extra sweep": 4}.get(name, 1)
    assert found.tensors == 7 * found.outputs
    assert found.recomputed == 6 * found.outputs  # one is empty
    files = [path for path in merged[name].rglob("*") if path.is_file()]
    assert found.files == len(
        [p for p in files if p.name != MANIFEST and p.parent.name != "report"]
    )


def test_without_recompute_nothing_is_merged_again(merged: dict[str, Path]) -> None:
    found = distmerge.verify(merged["extra"])
    assert (found.sound, found.recomputed, found.seed) == (True, 0, None)


def test_a_link_to_an_output_is_followed(merged: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(merged["average"])
    assert distmerge.verify(tmp_path / "link", recompute="all").sound


def test_what_publishing_and_report_add_is_no_damage(out: Path) -> None:
    (out / "report").mkdir()
    (out / ".cache/huggingface").mkdir(parents=True)
    for name in ("README.md", ".gitattributes", "report/report.html", ".cache/huggingface/x"):
        (out / name).write_text("x")
    assert distmerge.verify(out).sound


def test_a_flipped_byte_is_found_and_with_recompute_the_element(out: Path) -> None:
    at = place(out, "layers.0.w")
    flip(at.path, at.start + 4 * 17 + 2)
    assert only(distmerge.verify(out)).startswith(f"{at.path.name}: its sha256 is ")
    _, second = listed(distmerge.verify(out, recompute="all"))
    expected = "1 of 100 elements differ from what the inputs give, the first is element 17, by up"
    assert second.startswith(f"{at.path.name}, layers.0.w: {expected} to ")


@pytest.mark.parametrize(
    ("name", "element", "value", "told"),
    [
        ("positions", 3, torch.tensor([7, 7]), "2 of 9 elements differ .* element 3, by up to 4"),
        ("mask", 4, torch.tensor([False]), "1 of 5 elements differ .* element 4, by up to 1$"),
        ("layers.0.half", 6, torch.ones(1).half(), "1 of 7 elements differ .* element 6, by up to"),
    ],
)
def test_recompute_alone_finds_what_a_forged_hash_hides(
    out: Path, name: str, element: int, value: torch.Tensor, told: str
) -> None:
    at = place(out, name)
    raw = value.view(torch.uint8).numpy().tobytes()
    overwrite(at.path, at.start + element * value.element_size(), raw)
    forge(out, at.path.name)
    assert distmerge.verify(out).sound
    found = only(distmerge.verify(out, recompute="all"))
    assert found.startswith(f"{at.path.name}, {name}: ")
    assert re.search(told, found), found


def test_a_truncated_shard(out: Path) -> None:
    size = (out / SECOND).stat().st_size
    os.truncate(out / SECOND, size - 1)
    found = distmerge.verify(out, recompute="all")
    assert only(found) == f"{SECOND}: it has {size - 1} bytes; the manifest says {size}"


def test_a_truncated_shard_with_a_forged_manifest(out: Path) -> None:
    os.truncate(out / SECOND, (out / SECOND).stat().st_size - 1)
    forge(out, SECOND)
    assert only(distmerge.verify(out, recompute="all")).startswith(
        f"{SECOND}: not a sound safetensors file: "
    )


def test_a_missing_shard(out: Path) -> None:
    (out / THIRD).unlink()
    assert only(distmerge.verify(out)) == f"{THIRD}: it is missing; the manifest lists it"


def test_a_folder_or_a_pipe_in_place_of_a_file(out: Path) -> None:
    for name, make in ((THIRD, Path.mkdir), ("config.json", os.mkfifo)):
        (out / name).unlink()
        make(out / name)
    assert sorted(listed(distmerge.verify(out))) == [
        "config.json: it is not a file", f"{THIRD}: it is not a file",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "deep/er/file", ".hidden", "link"])
def test_an_extra_file(out: Path, name: str) -> None:
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    if name == "link":
        (out / name).symlink_to(out.parent)
    else:
        (out / name).write_text("x")
    assert only(distmerge.verify(out)) == f"{name}: it is there, but no manifest lists it"


def test_many_extra_files_are_counted(out: Path) -> None:
    for number in range(25):
        (out / f"x{number:02}").touch()
    found = listed(distmerge.verify(out))
    assert len(found) == 11
    assert "and 15 more findings of this kind" in found[-1]


def test_an_edited_config(out: Path) -> None:
    (out / "config.json").write_text(json.dumps({"torch_dtype": "float16"}))
    forge(out, "config.json")
    assert only(distmerge.verify(out)) == (
        "config.json: torch_dtype is 'float16'; the tensors are float32"
    )
    for content in ("[]", "{"):
        (out / "config.json").write_text(content)
        forge(out, "config.json")
        assert only(distmerge.verify(out)).startswith("config.json: not ")


def edit_index(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((out / INDEX).read_text())
    edit(content)
    (out / INDEX).write_text(json.dumps(content))
    forge(out, INDEX)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c["weight_map"].pop("embed"), f"{INDEX}, embed: it is in {FIRST}, and not in"),
        (lambda c: c["weight_map"].update(embed=THIRD), f"{INDEX}, embed: it is not in {THIRD}"),
        (lambda c: c["weight_map"].update(ghost=FIRST), f"{INDEX}, ghost: it is not in {FIRST}"),
        (lambda c: c["weight_map"].update(embed="config.json"), f"{INDEX}, embed: it is said to"),
        (lambda c: c["weight_map"].update(embed="../x"), f"{INDEX}: tensor 'embed' is said to be"),
        (lambda c: c["metadata"].update(total_size=1), f"{INDEX}: total_size is 1; the shards"),
        (lambda c: c.pop("metadata"), f"{INDEX}: total_size is None; the shards hold"),
        (lambda c: c.pop("weight_map"), f"{INDEX}: it has no weight_map"),
    ],
)
def test_an_edited_index(out: Path, edit: Callable[[dict[str, Any]], object], told: str) -> None:
    edit_index(out, edit)
    assert only(distmerge.verify(out)).startswith(told)


def test_no_index_for_several_shards(out: Path) -> None:
    (out / INDEX).unlink()
    edit_manifest(out, lambda content: content["files"].pop(INDEX))
    assert "several shards need an index" in only(distmerge.verify(out))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("name", "dtype"), [("embed", torch.float32), ("layers.0.half", torch.half)]
)
def test_nan_or_inf_with_a_forged_manifest(
    out: Path, value: float, name: str, dtype: torch.dtype
) -> None:
    at = place(out, name)
    raw = torch.tensor([value, value]).to(dtype).view(torch.uint8).numpy().tobytes()
    overwrite(at.path, at.start + 3 * dtype.itemsize, raw)
    forge(out, at.path.name)
    assert only(distmerge.verify(out)) == (
        f"{at.path.name}, {name}: 2 NaN or Inf, the first is element 3"
    )


def test_a_shard_swapped_between_two_outputs(swept: Path) -> None:
    one, two = (swept / f"ema={ema}" / FIRST for ema in (0.1, 0.2))
    one.rename(swept / "aside")
    two.rename(one)
    (swept / "aside").rename(two)
    first, second = listed(distmerge.verify(swept))
    assert first.startswith(f"ema=0.1/{FIRST}: its sha256 is ")
    assert first.endswith(f"(it is ema=0.2/{FIRST})")
    assert second.endswith(f"(it is ema=0.1/{FIRST})")
    told = listed(distmerge.verify(swept, recompute="all"))[2:]
    assert {line.partition(":")[0] for line in told} == {
        f"ema={ema}/{FIRST}, {name}" for ema in (0.1, 0.2) for name in held(one)
    }


def held(path: Path) -> list[str]:
    """The tensors that differ between the outputs of a sweep."""
    return [name for name in load_file(path) if name not in ("positions", "mask", "empty")]


def test_a_manifest_that_lies_about_a_hash(out: Path) -> None:
    edit_manifest(out, lambda content: content["files"][FIRST].update(sha256="0" * 64))
    assert "the manifest says 0000000000000000..." in only(distmerge.verify(out))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.update(plan="0" * 64), "but it says 0000000000000000: inputs, manifest or"),
        (lambda c: c.update(shard_bytes=10**9), "its recipe and inputs now make the plan"),
        (lambda c: c["recipe"].update(out_dtype="float16"), "now make the plan"),
        (
            lambda c: c["recipe"]["trajectory"]["schedule"].update(
                weights=[0.2, 0.2, 0.2, 0.1, 0.3]
            ),
            "now make the plan",
        ),
        (lambda c: c["recipe"].update(merge_method="slerp"), "can't be planned again: config"),
        (
            lambda c: c["coefficients"][0]["by_input"].update({"0": 0.3}),
            "the coefficients are not those of the recipe",
        ),
    ],
)
def test_a_manifest_that_lies_about_the_recipe(
    out: Path, edit: Callable[[dict[str, Any]], object], told: str
) -> None:
    edit_manifest(out, edit)
    found = listed(distmerge.verify(out))
    assert found[0].startswith(MANIFEST)
    assert told in found[0]
    assert told in listed(distmerge.verify(out, recompute="all"))[0]


def test_coefficients_of_a_direction_are_proved_by_merging_again(
    merged: dict[str, Path], tmp_path: Path
) -> None:
    """No recipe states them; what contradicts it is found at once, what does not, by the bytes."""
    out = Path(shutil.copytree(merged["extra"], tmp_path / "out"))
    usual = manifest(out)["coefficients"][0]["by_input"]
    edit_manifest(out, lambda c: c["coefficients"][0]["by_input"].update({"1": usual["1"] + 0.1}))
    assert distmerge.verify(out).sound
    found = listed(distmerge.verify(out, recompute="all"))
    assert sorted(line.split(",")[1].partition(":")[0] for line in found) == [
        " layers.0.half", " layers.0.w", " layers.1.w",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "is .* an output of distmerge?"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "its format is None"),
        ('{"format": 99}', "its format is 99 and this distmerge knows"),
        ('{"format": 1}', "not a whole manifest"),
        ('{"format": 1, "outputs": ["../x"]}', "not a list of folders"),
    ],
)
def test_no_manifest_of_ours_can_not_be_verified(out: Path, content: str | None, told: str) -> None:
    (out / MANIFEST).unlink()
    if content is not None:
        (out / MANIFEST).write_text(content)
    with pytest.raises(OutputError, match=told) as caught:
        distmerge.verify(out)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", ".", "", "a\0b", "\ud800"])
def test_a_manifest_that_leads_out_of_the_folder(out: Path, name: str) -> None:
    entry = {"sha256": "0" * 64, "bytes": 1}
    edit_manifest(out, lambda content: content["files"].update({name: entry}))
    with pytest.raises(OutputError, match="is not the path of a file in this folder"):
        distmerge.verify(out)


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.pop("files"),
        lambda c: c.update(plan="no digest"),
        lambda c: c["files"][FIRST].update(sha256=None),
        lambda c: c["files"][FIRST].update(bytes="many"),
        lambda c: c["files"][FIRST].update(bytes=float("inf")),
        lambda c: c.update(inputs=[{"model": 3}]),
        lambda c: c.update(recipe=[]),
        lambda c: c.update(coefficients=[{"by_input": {"x": 1}, "tensors": []}]),
        lambda c: c.update(coefficients=7),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(
    out: Path, edit: Callable[[dict[str, Any]], object]
) -> None:
    edit_manifest(out, edit)
    with pytest.raises(OutputError, match="not a whole manifest"):
        distmerge.verify(out)


def test_a_damaged_manifest_of_one_output_leaves_the_others(swept: Path) -> None:
    (swept / "ema=0.1" / MANIFEST).write_text("{")
    found = distmerge.verify(swept, recompute="all")
    assert only(found).startswith(f"ema=0.1/{MANIFEST}: not JSON")
    assert (found.outputs, found.recomputed) == (1, 6)
    shutil.rmtree(swept / "ema=0.1")
    assert only(distmerge.verify(swept)).startswith(f"ema=0.1/{MANIFEST}: can't be read")


def test_the_folder_around_a_sweep(swept: Path) -> None:
    (swept / "best").symlink_to("ema=0.2")
    assert distmerge.verify(swept).sound
    (swept / "best").unlink()
    (swept / "best").symlink_to("elsewhere")
    (swept / "ema=0.3").mkdir()
    (swept / "ema=0.3/model.safetensors").touch()
    (swept / "config.json").touch()
    assert listed(distmerge.verify(swept)) == [
        "config.json: it is there, but no manifest lists it",
        "ema=0.3/model.safetensors: it is there, but no manifest lists it",
        "best: it is not a link to one of the outputs",
    ]


def test_an_output_that_is_a_copy_of_an_input(run: Path, tmp_path: Path) -> None:
    """As equal checkpoints make it, or a merge that did nothing."""
    for step in (1, 2):
        shutil.copytree(run / "step-3", tmp_path / f"run/step-{step}")
    distmerge.merge(average(tmp_path / "run/step-*"), tmp_path / "out", options=SMALL)
    first, second = listed(distmerge.verify(tmp_path / "out", recompute="all"))
    inputs = tmp_path / "run"
    what = f"all float tensors are those of the input {inputs}/step-1, byte for byte"
    assert first == f"{tmp_path}/out: {what}"
    assert second.endswith("step-2, byte for byte")


def test_other_shapes_than_the_inputs(run: Path, tmp_path: Path, out: Path) -> None:
    """A shard of another model, with a manifest to match."""
    other = tmp_path / "other"
    write_checkpoint(other, {"embed": torch.ones(5, 20), "ghost": torch.ones(3)})
    shutil.copy(other / "model.safetensors", out / FIRST)
    forge(out, FIRST)
    found = listed(distmerge.verify(out))
    assert any(line.startswith(f"{FIRST}, embed: F32 [5, 20] at byte ") for line in found)
    assert f"{FIRST}, ghost: the inputs do not hold it, or it belongs elsewhere" in found


class Changed(NamedTuple):
    out: Path
    step: Path


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Changed:
    """An output whose inputs may change."""
    shutil.copytree(run, tmp_path / "run")
    distmerge.merge(average(tmp_path / "run/step-*"), tmp_path / "out", options=SMALL)
    return Changed(tmp_path / "out", tmp_path / "run/step-2")


def test_an_input_that_has_changed_is_noted(changed: Changed) -> None:
    write_checkpoint(changed.step, tensors(99), shards=2)
    found = distmerge.verify(changed.out)
    assert found.sound
    (note,) = map(str, found.notes)
    assert note.startswith(f"{changed.step}: its files have changed since")
    assert note.endswith("the output was not compared with it")
    again = distmerge.verify(changed.out, recompute="all")
    assert {finding.where.split(", ")[1] for finding in again.findings} == {
        "embed", "layers.0.w", "layers.0.half", "layers.1.w",
    }  # fmt: skip
    assert [note.what for note in again.notes] == [
        "its files have changed since (sizes, headers or time stamps)"
    ]


def test_an_input_with_other_headers_makes_another_plan(changed: Changed) -> None:
    write_checkpoint(changed.step, tensors(2), shards=1)
    (changed.step / INDEX).unlink()
    assert distmerge.verify(changed.out).sound
    told = only(distmerge.verify(changed.out, recompute="all"))
    assert "inputs, manifest or the version of distmerge have changed" in told


def test_a_touched_input_is_noted_and_its_bytes_prove_it(changed: Changed) -> None:
    os.utime(changed.step / "model-00001-of-00002.safetensors")
    found = distmerge.verify(changed.out, recompute="all")
    assert (found.sound, len(found.notes), found.recomputed) == (True, 1, 6)


def test_an_input_that_is_gone_is_noted_and_the_others_are_compared(changed: Changed) -> None:
    shutil.rmtree(changed.step)
    found = distmerge.verify(changed.out)
    assert found.sound
    assert str(found.notes[0]).startswith(f"{changed.step}: there is no {changed.step} here; ")
    assert f"can't be planned again: {changed.step}" in only(
        distmerge.verify(changed.out, recompute="1%")
    )
    raw = write_checkpoint(changed.out.parent / "other", {"embed": torch.ones(5, 20)})
    shutil.copy(raw / "model.safetensors", changed.out / FIRST)
    forge(changed.out, FIRST)
    told = f"{FIRST}, embed: its shape is [5, 20]; in {changed.step.parent}/step-1 it is [20, 5]"
    assert told in listed(distmerge.verify(changed.out))


def failing(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let the disk fail where `path` lies."""
    pread, broken = reader._Read._pread, path.stat().st_ino

    def fail(self: reader._Read, view: memoryview, offset: int) -> int:
        if os.fstat(self._file).st_ino == broken:
            raise RunError(f"{self._path}: read error at byte {offset}: Input/output error")
        return pread(self, view, offset)

    monkeypatch.setattr(reader._Read, "_pread", fail)
    monkeypatch.setattr(reader, "_cached", lambda _: False)


def test_a_file_that_the_disk_does_not_give_is_found_and_the_rest_is_checked(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, out / THIRD)
    (out / "config.json").write_text("{}")
    found = distmerge.verify(out, recompute="all")
    assert listed(found)[-1] == f"{THIRD}: read error at byte 0: Input/output error"
    assert {finding.where for finding in found.findings} == {"config.json", THIRD}
    assert 0 < found.recomputed < 6


def test_an_input_that_the_disk_does_not_give_is_noted(
    changed: Changed, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, changed.step / "model-00001-of-00002.safetensors")
    found = distmerge.verify(changed.out)
    assert found.sound
    (note,) = map(str, found.notes)
    assert note.startswith(f"{changed.step}: ")
    assert note.endswith("Input/output error; is the output a copy of it?")


def test_an_input_of_several_outputs_is_noted_once(changed: Changed) -> None:
    recipe = average(changed.step.parent / "step-*")
    sweep = {"trajectory.schedule.ema": [0.1, 0.2, 0.3]}
    distmerge.merge({**recipe, "sweep": sweep}, changed.out.parent / "sweep")  # type: ignore[dict-item]
    os.utime(changed.step / "model-00001-of-00002.safetensors")
    found = distmerge.verify(changed.out.parent / "sweep")
    assert (found.sound, len(found.notes)) == (True, 1)


def test_versions_that_may_change_last_bits_are_noted(out: Path) -> None:
    edit_manifest(out, lambda content: content["versions"].update(torch="1.0", python="2"))
    assert distmerge.verify(out).notes == ()
    (note,) = distmerge.verify(out, recompute="1%").notes
    assert "merged with torch 1.0 (here " in note.what
    assert "last bits may differ" in note.what


def test_names_from_files_do_not_reach_the_terminal(out: Path) -> None:
    (out / "a\x1b[2Jb").touch()
    told = only(distmerge.verify(out))
    assert told.isprintable()
    assert "1b[2Jb: it is there" in told


@pytest.mark.parametrize("text", ["", "0%", "101%", "1", "-1%", "some", "nan%", "1%%", "1e1%"])
def test_a_bad_share_is_refused(out: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="expected all, or a share from over 0% to 100%"):
        distmerge.verify(out, recompute=text)


def test_a_share_is_drawn_by_a_seed() -> None:
    assert [parse_share(t) for t in ("all", "100%", "1%", " 0.5 % ")] == [1, 1, 0.01, 0.005]
    names = [f"t{n}" for n in range(1000)]
    assert sample(names, 1, "7 ") == set(names)
    drawn = sample(names, 0.01, "7 ")
    assert len(drawn) == 10
    assert drawn == sample(names, 0.01, "7 ")
    assert drawn != sample(names, 0.01, "8 ")
    assert len(sample(names[:5], 0.01, "7 ")) == 1
    assert [len(sample(names[:100], n / 100, "7 ")) for n in range(1, 101)] == [*range(1, 101)]
    assert sample([], 0.01, "7 ") == frozenset()
    assert sorted(sample(names[:20], 0.1, "0 a")) == ["t2", "t3"]  # on any machine


def test_the_seed_decides_what_is_merged_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[frozenset[str]] = []

    def spy(names: list[str], share: float, seed: str) -> frozenset[str]:
        drawn.append(sample(names, share, seed))
        return drawn[-1]

    monkeypatch.setattr("distmerge.verification.verify.sample", spy)
    first = distmerge.verify(out, recompute="20%")
    again = distmerge.verify(out, recompute="20%", seed=first.seed)
    assert (first.recomputed, first.seed) == (again.recomputed, again.seed)
    assert first.recomputed == 2
    assert drawn[0] == drawn[1]
    others = {sample(["a", "b", "c", "d", "e", "f"], 0.2, f"{seed} ") for seed in range(9)}
    assert len(others) > 3


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli.cli, ["verify", *(str(argument) for argument in arguments)])


def test_the_command_says_sound_and_what_it_looked_at(merged: dict[str, Path]) -> None:
    result = command(merged["extra sweep"], "--recompute", "1%", "--seed", 7)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{merged['extra sweep']}: sound\n")
    assert "looked at 4 outputs, 20 files of " in result.stdout
    assert "28 tensors, 4 of them merged again (seed 7); 1 rank, " in result.stdout


def test_the_command_lists_what_is_off_and_exits_with_1(out: Path) -> None:
    (out / THIRD).unlink()
    result = command(out)
    assert result.exit_code == 1
    assert f"{out}: 1 thing is off\n  {THIRD}: it is missing" in result.stdout
    found = json.loads(command(out, "--json").stdout)
    assert (found["sound"], found["outputs"], found["files"]) == (False, 1, 4)
    assert found["findings"] == [{"where": THIRD, "what": "it is missing; the manifest lists it"}]


def test_the_command_exits_with_2_where_there_is_nothing_to_verify(
    out: Path, tmp_path: Path
) -> None:
    for arguments in ([tmp_path], [out, "--recompute", "lots"]):
        result = command(*arguments)
        assert isinstance(result.exception, distmerge.UserError)
    assert command(out, "--seed", "x").exit_code == 2
