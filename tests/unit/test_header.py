"""Headers of safetensors files: what is refused, what is accepted, and who else agrees."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from distmerge.errors import SourceError
from distmerge.sources.header import MAX_DIMS, MAX_HEADER, read_header
from distmerge.spec import DTYPES
from tests.support.checkpoints import raw_file

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1}


def entry(start: int = 0, stop: int = 4, **changes: Any) -> dict[str, Any]:
    """A sound description of one float32 at start..stop, but for `changes`."""
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


def raw_entry(text: str) -> bytes:
    return b'{"a": {"dtype": "F32", "shape": [1], ' + text.encode() + b"}}"


NOT_JSON = {
    "no text at all": b"",
    "no JSON": b"{'a': 1}",
    "cut off": b'{"a": {"dtype"',
    "trailing NUL bytes": json.dumps({"a": entry()}).encode() + b"\0\0",
    "UTF-16": json.dumps({"a": entry()}).encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps({"a": entry()}).encode(),
    "no UTF-8": b'{"\xff": 1}',
    "NaN": raw_entry('"data_offsets": [0, 4], "x": NaN'),
    "an integer of 5000 digits": raw_entry('"data_offsets": [0, ' + "9" * 5000 + "]"),
}


@pytest.mark.parametrize("header", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json_is_refused(tmp_path: Path, header: bytes) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(SourceError, match=r"x\.safetensors: .* the header is not JSON"):
        read_header(path)


WRONG: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "list": (b"[1, 2]", "not a JSON object"),
    "text": (b'"abc"', "not a JSON object"),
    "half a surrogate pair": (b'{"\\ud800": {}}', "not Unicode text"),
    "deep list": (b'{"a": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "nested too deeply"),
    "deep object": (b'{"a": ' * 50_000 + b"1" + b"}" * 50_000, "nested too deeply"),
    "tensor twice": (b'{"a": 1, "a": 2}', "key 'a' twice"),
    "field twice": (raw_entry('"dtype": "F32", "data_offsets": [0, 4]'), "key 'dtype' twice"),
    "tensor is a number": ({"a": 1}, "not described by an object"),
    "tensor is null": ({"a": None}, "not described by an object"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, "unknown dtype None"),
    "unknown dtype": ({"a": entry(dtype="F33")}, "unknown dtype 'F33'"),
    "lower-case dtype": ({"a": entry(dtype="f32")}, "unknown dtype 'f32'"),
    "dtype is a number": ({"a": entry(dtype=32)}, "unknown dtype 32"),
    "dtype is a list": ({"a": entry(dtype=["F32"])}, "unknown dtype"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, "shape None"),
    "negative size": ({"a": entry(shape=[-1])}, r"shape \[-1\]"),
    "size is a float": ({"a": entry(shape=[1.0])}, r"shape \[1.0\]"),
    "size is true": ({"a": entry(shape=[True])}, r"shape \[True\]"),
    "shape is text": ({"a": entry(shape="1")}, "shape '1'"),
    "size overflows": ({"a": entry(shape=[2**63])}, "shape"),
    "shape overflows": ({"a": entry(shape=[2**62, 2**62])}, "shape"),
    "too many dimensions": ({"a": entry(shape=[1] * (MAX_DIMS + 1))}, "65 dimensions"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, "data_offsets None"),
    "one offset": ({"a": entry(data_offsets=[4])}, "data_offsets"),
    "three offsets": ({"a": entry(data_offsets=[0, 4, 4])}, "data_offsets"),
    "negative offset": ({"a": entry(-4, 0)}, "data_offsets"),
    "offset is a float": ({"a": entry(data_offsets=[0, 4.0])}, "data_offsets"),
    "offset is text": ({"a": entry(data_offsets=["0", "4"])}, "data_offsets"),
    "offset overflows": ({"a": entry(2**64, 2**64 + 4)}, "data_offsets"),
    "offsets the wrong way round": ({"a": entry(4, 0)}, "data_offsets"),
    "too short for its shape": ({"a": entry(0, 3)}, "can't take up 3 bytes"),
    "too long for its shape": ({"a": entry(0, 8)}, "can't take up 8 bytes"),
    "half a byte": ({"a": entry(dtype="F4", shape=[7])}, "can't take up 4 bytes"),
    "starts late": ({"a": entry(4, 8)}, "leaves a gap before it"),
    "gap": ({"a": entry(), "b": entry(8, 12)}, "'b' leaves a gap before it"),
    "same bytes twice": ({"a": entry(), "b": entry()}, "overlaps the tensor before it"),
    "overlap": ({"a": entry(0, 8, shape=[2]), "b": entry(4, 8)}, "overlaps the tensor before it"),
    "beyond the end": ({"a": entry(0, 400, shape=[100])}, "has only .* truncated"),
    "far beyond the end": ({"a": entry(0, 2**40, shape=[2**38])}, "has only .* truncated"),
    "bytes left over": ({"a": entry(0, 2, dtype="F16")}, "2 bytes follow the last tensor"),
    "no tensor but bytes": ({}, "4 bytes follow the last tensor"),
    "metadata is text": ({"__metadata__": "pt", "a": entry()}, "strings to strings"),
    "metadata is null": ({"__metadata__": None, "a": entry()}, "strings to strings"),
    "metadata holds a number": ({"__metadata__": {"n": 1}, "a": entry()}, "strings to strings"),
}


@pytest.mark.parametrize(("header", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_header_that_lies_is_refused(
    tmp_path: Path, header: bytes | dict[str, Any], message: str
) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(SourceError, match=rf"x\.safetensors: not a sound .*{message}") as caught:
        read_header(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "only 0 bytes"),
        (b"\1\0\0", "only 3 bytes"),
        (
            (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
            r"100000001 bytes \(the limit is 100000000\)",
        ),
        (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615 bytes"),
        ((3).to_bytes(8, "little") + b"{}", "3 bytes but has only 10 bytes; truncated"),
    ],
    ids=["empty", "prefix cut off", "over the limit", "largest length", "header cut off"],
)
def test_a_length_that_lies_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=rf"x\.safetensors: .*{message}"):
        read_header(path)


def test_every_truncation_of_a_sound_file_is_refused(tmp_path: Path) -> None:
    whole = raw_file(tmp_path / "whole", {"a": entry(), "b": entry(4, 8)}, bytes(8)).read_bytes()
    for length in range(len(whole)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError):
            read_header(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."], ids=["missing", "folder"])
def test_what_can_not_be_opened_is_a_source_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="can't be read"):
        read_header(tmp_path / name)


def test_a_hostile_shape_does_not_keep_us_busy(tmp_path: Path) -> None:
    """The product of n sizes takes n^2 steps: a header of 10 MB took minutes."""
    header = {"a": entry(shape=[2**63 - 1] * 200_000)}
    path = raw_file(tmp_path / "x.safetensors", header, bytes(4))
    started = time.monotonic()
    with pytest.raises(SourceError, match="200000 dimensions"):
        read_header(path)
    assert time.monotonic() - started < 5


ODD: dict[str, tuple[bytes | dict[str, Any], int, list[str]]] = {
    "spaces around": (b"  " + json.dumps({"a": entry()}).encode() + b"   ", 4, ["a"]),
    "not in order": ({"b": entry(4, 8), "a": entry()}, 8, ["b", "a"]),
    "one number": ({"a": entry(shape=[])}, 4, ["a"]),
    "empty among others": ({"a": entry(), "e": entry(4, 4, shape=[0, 9])}, 4, ["a", "e"]),
    "only an empty one": ({"e": entry(0, 0, shape=[2**62, 0])}, 0, ["e"]),
    "no tensor": ({}, 0, []),
    "only metadata": ({"__metadata__": {"format": "pt"}}, 0, []),
    "most dimensions": ({"a": entry(shape=[1] * MAX_DIMS)}, 4, ["a"]),
    "packed dtype": ({"a": entry(dtype="F4", shape=[8])}, 4, ["a"]),
    "odd names": ({"": entry(), "\u00fc/\\\u2603": entry(4, 8)}, 8, ["", "\u00fc/\\\u2603"]),
    "more fields": ({"a": entry(more=1)}, 4, ["a"]),
}


@pytest.mark.parametrize(("header", "size", "names"), ODD.values(), ids=ODD.keys())
def test_an_odd_but_sound_header_is_accepted(
    tmp_path: Path, header: bytes | dict[str, Any], size: int, names: list[str]
) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, bytes(size))
    assert list(read_header(path).tensors) == names
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(names)


def test_the_header_tells_the_file_apart(tmp_path: Path) -> None:
    first = raw_file(tmp_path / "1", {"a": entry()}, bytes(4))
    second = raw_file(tmp_path / "2", {"b": entry()}, bytes(4))
    found = read_header(first)
    assert (found.path, found.size) == (first, first.stat().st_size)
    assert found.mtime_ns == first.stat().st_mtime_ns
    assert found.sha256 != read_header(second).sha256


shapes = st.lists(st.integers(0, 3), max_size=4)
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(SIZES)), shapes),
    max_size=5,
)


@given(tensors)
def test_we_read_what_the_format_s_own_library_writes(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, list[int]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    written = {
        name: torch.randint(0, 2, shape).to(getattr(torch, DTYPES[dtype].torch_name))
        for name, (dtype, shape) in content.items()
    }
    save_file(written, path)
    raw, found = path.read_bytes(), read_header(path).tensors
    assert sorted(found) == sorted(written)
    for name, tensor in written.items():
        ours = found[name]
        assert (ours.dtype.name, list(ours.shape)) == (content[name][0], content[name][1])
        theirs = tensor.reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
        assert list(raw[ours.start : ours.start + ours.nbytes]) == theirs.int().tolist()


values: st.SearchStrategy[object] = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([None, True, 1.0, "F16", "U8", 2**63, 2**64, -(2**63), [], {}, [0], [4, 4]]),
)
places = st.sampled_from(["dtype", "shape", "data_offsets", "shape.0", "data_offsets.0"])


def changed(header: dict[str, Any], name: str, place: str, value: object) -> dict[str, Any]:
    fields = dict(header[name])
    key, _, index = place.partition(".")
    fields[key] = [value, *fields[key][1:]] if index else value
    return header | {name: fields}


@given(st.sampled_from(["a", "b", "c"]), places, values, st.integers(-3, 3))
@example(name="b", place="shape", value=[], extra=0)
def test_what_we_accept_the_format_s_own_library_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, name: str, place: str, value: object, extra: int
) -> None:
    sound = {"a": entry(), "b": entry(4, 8), "c": entry(8, 16, shape=[2])}
    header = changed(sound, name, place, value)
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    raw_file(path, header, bytes(16 + extra))
    check_that_safetensors_agrees(path)


@given(st.data())
@settings(max_examples=200)
def test_one_changed_byte_makes_no_file_that_only_we_accept(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sound = {"__metadata__": {"format": "pt"}, "a": entry(), "\u00fc": entry(4, 12, shape=[2, 1])}
    path = raw_file(tmp_path_factory.getbasetemp() / "x.safetensors", sound, bytes(12))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 13))
    content[place] = data.draw(st.sampled_from(b'0123456789[]{},:" \\eE.-\t') | st.integers(0, 255))
    path.write_bytes(content)
    check_that_safetensors_agrees(path)


def check_that_safetensors_agrees(path: Path) -> None:
    """Where we accept `path`, so must the format's own library."""
    try:
        found = read_header(path).tensors
    except SourceError:
        return
    try:
        with safe_open(path, "pt") as file:
            assert sorted(file.keys()) == sorted(found)
    except SafetensorError as error:
        pytest.fail(f"{path.read_bytes()!r} is refused by safetensors: {error}")
