"""What is fuzzed: each target takes bytes, and raises where the product does what it must not.

The product may accept the bytes or refuse them with an error of its own; the message must be one
short line without anything that a terminal would obey.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distmerge import gram as grams
from distmerge.errors import ConfigError, SourceError
from distmerge.sources.checkpoint import INDEX, open_checkpoint
from distmerge.sources.header import read_header
from distmerge.sweep import load_recipe

Target = Callable[[bytes, Path], bool]
"""Takes the bytes and a folder to work in; says whether they were accepted."""

LONGEST = 1000
"""Characters of a message, beside the path that it names."""

SHARD = "model-00001-of-00002.safetensors"


def check_message(error: Exception, folder: Path) -> None:
    """Raise AssertionError unless the message can be shown as it is."""
    text = str(error).replace(str(folder), "")
    assert text, "no message"
    assert len(text) <= LONGEST, text
    for character in text:
        kind = unicodedata.category(character)
        assert kind not in ("Cc", "Cs", "Zl", "Zp"), ascii(text)


def shaped(data: bytes) -> bytes:
    """The first byte says how the rest becomes a file: a fuzzer rarely finds the right length.

    Even: as it is. Odd: as a header, its true length before it and so many zeros as data after it
    as the second byte says.
    """
    if len(data) < 2 or data[0] % 2 == 0:
        return data[1:]
    header = data[2:]
    return len(header).to_bytes(8, "little") + header + bytes(data[1])


def header(data: bytes, folder: Path) -> bool:
    """The header of a safetensors file. What we accept, the format's own library must too."""
    path = folder / "x.safetensors"
    path.write_bytes(shaped(data))
    try:
        found = read_header(path)
    except SourceError as error:
        check_message(error, folder)
        return False
    size = path.stat().st_size
    assert all(0 <= t.start <= t.start + t.nbytes <= size for t in found.tensors.values())
    try:
        with safe_open(path, "pt") as file:
            assert sorted(file.keys()) == sorted(found.tensors)
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what we accept: {error}") from error
    return True


def index(data: bytes, folder: Path) -> bool:
    """The index of a checkpoint that has one sound shard, SHARD, with one tensor, a."""
    shard = folder / SHARD
    if not shard.exists():
        text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        shard.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    (folder / INDEX).write_bytes(data)
    try:
        found = open_checkpoint(folder, label="it")
    except SourceError as error:
        check_message(error, folder)
        return False
    assert [file.path for file in found.files] == [shard]
    return True


def recipe(data: bytes, folder: Path) -> bool:
    """A recipe in YAML."""
    path = folder / "recipe.yaml"
    path.write_bytes(data)
    try:
        found = load_recipe(path)
    except ConfigError as error:
        check_message(error, folder)
        return False
    for variant in found.variants:
        assert "/" not in variant.name
        assert variant.name not in (".", "..")
    return True


def gram(data: bytes, folder: Path) -> bool:
    """A statistic, as it lies in the cache beside OUT."""
    path = folder / "gram.safetensors"
    path.write_bytes(shaped(data))
    try:
        found = grams.load(path)
    except (OSError, ValueError):  # it becomes a warning, and the statistic is computed again
        return False
    assert found.matrix.shape == found.by_module.shape[1:]
    return True


TARGETS: dict[str, Target] = {"header": header, "index": index, "recipe": recipe, "gram": gram}
