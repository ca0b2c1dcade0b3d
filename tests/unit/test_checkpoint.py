"""Folders of safetensors files: which files count, which tensors, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import distmerge
from distmerge.document import Plain
from distmerge.errors import SourceError
from distmerge.sources.checkpoint import INDEX, Checkpoint, open_checkpoint
from tests.support.checkpoints import raw_file, write_checkpoint, write_index


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 3), float(number)) for number, name in enumerate(names)}


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(folder, label="it")


def shards_of(found: Checkpoint) -> dict[str, str]:
    return {name: found.files[spec.file].path.name for name, spec in found.tensors.items()}


def test_a_single_file_is_read_whole_in_file_order(tmp_path: Path) -> None:
    content = {"small": torch.ones(3, dtype=torch.int8), "big": torch.ones(2, 2)}
    found = opened(write_checkpoint(tmp_path, content))
    assert list(found.tensors) == ["big", "small"]  # the widest dtype lies first in the file
    assert (found.tensors["big"].dtype.name, found.tensors["big"].shape) == ("F32", (2, 2))
    assert found.tensors["small"].start == found.tensors["big"].start + 16
    assert (found.nbytes, found.label, found.revision, found.step) == (19, "it", None, None)


def test_shards_are_read_through_the_index(tmp_path: Path) -> None:
    found = opened(write_checkpoint(tmp_path, tensors("a", "b", "c", "d", "e"), shards=2))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert list(shards_of(found).items()) == [
        ("a", first), ("c", first), ("e", first), ("b", second), ("d", second),
    ]  # fmt: skip


def test_shards_come_in_numeric_order(tmp_path: Path) -> None:
    names = [f"model-{number}-of-10.safetensors" for number in (1, 2, 9, 10)]
    for number, name in reversed(list(enumerate(names))):
        save_file(tensors(f"t{number}"), tmp_path / name)
    write_index(tmp_path, {f"t{number}": name for number, name in enumerate(names)})
    assert [file.path.name for file in opened(tmp_path).files] == names


def test_shards_of_one_number_have_one_order(tmp_path: Path) -> None:
    """They came out of a set: each process had an order of its own."""
    names = [f"m-{'0' * zeros}1.safetensors" for zeros in range(5, -1, -1)]
    for name in names:
        save_file(tensors(name), tmp_path / name)
    write_index(tmp_path, {name: name for name in names})
    assert [file.path.name for file in opened(tmp_path).files] == sorted(names)


@pytest.mark.parametrize(
    ("beside", "counts"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["model.safetensors", "consolidated.safetensors"], "model.safetensors"),
        (["model.safetensors", "other.safetensors"], "model.safetensors"),
        (["consolidated.safetensors", "weights.safetensors"], "weights.safetensors"),
        (["consolidated.safetensors"], "consolidated.safetensors"),
        (["adapter-free-name.safetensors"], "adapter-free-name.safetensors"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_without_an_index_one_file_counts(tmp_path: Path, beside: list[str], counts: str) -> None:
    for name in beside:
        save_file(tensors(name), tmp_path / name)
    assert shards_of(opened(tmp_path)) == {counts: counts}


def test_files_that_the_index_does_not_name_do_not_count(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors("a", "b"), shards=2)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not even sound")
    (tmp_path / "model.safetensors").write_bytes(b"neither")
    assert sorted(opened(tmp_path).tensors) == ["a", "b"]


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors("a", "b", "c"), shards=3, index=False)
    with pytest.raises(SourceError, match=f"3 safetensors files .* no {INDEX}"):
        opened(tmp_path)


def test_a_tensor_that_only_its_shard_knows_counts_too(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors("a", "b", "more"), shards=2)
    write_index(tmp_path, {"a": "model-00001-of-00002.safetensors",
                           "b": "model-00002-of-00002.safetensors"})  # fmt: skip
    assert shards_of(opened(tmp_path))["more"] == "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("counts", ["x-1.safetensors", "x-2.safetensors"])
def test_of_two_copies_the_index_says_which_counts(tmp_path: Path, counts: str) -> None:
    save_file(tensors("a", "twice"), tmp_path / "x-1.safetensors")
    save_file(tensors("b", "twice"), tmp_path / "x-2.safetensors")
    write_index(tmp_path, {"a": "x-1.safetensors", "b": "x-2.safetensors", "twice": counts})
    assert shards_of(opened(tmp_path))["twice"] == counts


def test_of_two_copies_that_no_index_names_the_first_counts(tmp_path: Path) -> None:
    save_file(tensors("a", "twice"), tmp_path / "x-1.safetensors")
    save_file(tensors("b", "twice"), tmp_path / "x-2.safetensors")
    write_index(tmp_path, {"b": "x-2.safetensors", "a": "x-1.safetensors"})
    assert shards_of(opened(tmp_path))["twice"] == "x-1.safetensors"


WRONG_MAPS: dict[str, tuple[Mapping[str, object], str]] = {
    "parent": ({"a": "../outside.safetensors"}, "'../outside.safetensors', which is not the name"),
    "absolute": ({"a": "/etc/passwd"}, "'/etc/passwd', which is not the name"),
    "subfolder": ({"a": "sub/x.safetensors"}, "which is not the name of a file in this folder"),
    "dots": ({"a": ".."}, "which is not the name"),
    "this folder": ({"a": "."}, "which is not the name"),
    "number": ({"a": 3}, "is said to be in 3, which is not the name"),
    "null": ({"a": None}, "is said to be in None"),
    "empty name": ({"a": ""}, "is not"),
    "missing shard": ({"a": "gone.safetensors"}, "it names gone.safetensors, which is not in"),
    "folder": ({"a": "folder"}, "it names folder, which is not in"),
    "no such name possible": ({"a": "x" * 300}, "which is not in"),
    "NUL byte": ({"a": "x\0y"}, "which is not in"),
    "empty": ({}, "it has no weight_map"),
    "elsewhere": ({"a": "model.safetensors", "b": "model.safetensors"}, "tensor 'b' is not in"),
}


@pytest.mark.parametrize(("weight_map", "message"), WRONG_MAPS.values(), ids=WRONG_MAPS.keys())
def test_an_index_that_lies_is_refused(
    tmp_path: Path, weight_map: Mapping[str, object], message: str
) -> None:
    save_file(tensors("a"), tmp_path / "outside.safetensors")
    folder = write_checkpoint(tmp_path / "model", tensors("a"))
    (folder / "folder").mkdir()
    write_index(folder, weight_map)
    with pytest.raises(SourceError, match=message) as caught:
        opened(folder)
    assert str(folder / INDEX) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": ["a"]}', "no weight_map"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_checkpoint(tmp_path, tensors("a"))
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(SourceError, match=f"{INDEX}: .*{message}"):
        opened(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors("a", "b"), shards=2)
    raw_file(tmp_path / "model-00002-of-00002.safetensors", {"b": 1})
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors: not a sound"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no \\*.safetensors in it$"),
        (["config.json"], "no \\*.safetensors in it$"),
        (["pytorch_model.bin"], "found pytorch_model.bin: convert it to safetensors first"),
        (["model.pt"], "found model.pt: convert"),
    ],
)
def test_a_folder_without_safetensors_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(SourceError, match=message):
        opened(tmp_path)


def test_a_missing_folder_and_a_file_in_its_place_are_told_apart(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path / "model", tensors("a")) / "model.safetensors"
    recipe: dict[str, Plain] = {"merge_method": "linear", "parameters": {"weight": 1}}
    with pytest.raises(SourceError, match=f"{tmp_path}/gone: no such folder"):
        distmerge.plan({**recipe, "models": [{"model": str(tmp_path / "gone")}]})
    with pytest.raises(SourceError, match="it is a file: name the folder that holds it"):
        distmerge.plan({**recipe, "models": [{"model": str(file)}]})
    with pytest.raises(SourceError, match="a folder has no revisions"):
        distmerge.plan({**recipe, "models": [{"model": f"{tmp_path / 'model'}@main"}]})


def test_identity_is_that_of_the_content_and_fingerprint_also_of_the_time(tmp_path: Path) -> None:
    first = write_checkpoint(tmp_path / "1", tensors("a", "b"), shards=2)
    copy = write_checkpoint(tmp_path / "2", tensors("a", "b"), shards=2)
    other = write_checkpoint(tmp_path / "3", tensors("a", "c"), shards=2)
    before = opened(first)
    assert before.identity == opened(copy).identity != opened(other).identity
    os.utime(first / "model-00002-of-00002.safetensors", ns=(1, 1))
    after = opened(first)
    assert after.identity == before.identity
    assert after.fingerprint != before.fingerprint
