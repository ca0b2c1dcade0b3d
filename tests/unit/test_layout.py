"""The files of the output: what is in which shard, and where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from distmerge.layout import Content, index_json, lay_out
from distmerge.sources.header import read_header
from distmerge.spec import DTYPES, PAGE, OutputShard, OutputTensor, Rule

RULE = Rule("sum", (0,), ((1.0,),))


def content(name: str, dtype: str, *shape: int) -> Content:
    elements = 1
    for size in shape:
        elements *= size
    return Content(name, DTYPES[dtype], shape, elements, RULE)


def by_shard(tensors: list[OutputTensor], shards: list[OutputShard]) -> list[list[str]]:
    return [[t.name for t in tensors if t.shard == number] for number in range(len(shards))]


def test_one_shard_has_the_single_file_s_name_and_no_index() -> None:
    tensors, shards = lay_out([content("a", "F32", 2), content("b", "F32", 2)], 100)
    assert [shard.name for shard in shards] == ["model.safetensors"]
    assert index_json(tensors, shards) is None


@pytest.mark.parametrize(
    ("shard_bytes", "expected"),
    [
        (1000, [["a", "b", "c", "d"]]),
        (40, [["a", "b", "c", "d"]]),
        (39, [["a", "b", "c"], ["d"]]),
        (20, [["a"], ["b", "c"], ["d"]]),
        (16, [["a"], ["b"], ["c", "d"]]),
        (1, [["a"], ["b"], ["c"], ["d"]]),
        (0, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_shards_are_filled_in_order_up_to_their_size(
    shard_bytes: int, expected: list[list[str]]
) -> None:
    given_order = [content(name, "F32", n) for name, n in zip("abcd", (4, 4, 1, 1), strict=True)]
    assert by_shard(*lay_out(given_order, shard_bytes)) == expected


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own() -> None:
    order = [content("a", "U8", 3), content("big", "U8", 100), content("b", "U8", 3)]
    assert by_shard(*lay_out(order, 10)) == [["a"], ["big"], ["b"]]


def test_shards_are_numbered_and_indexed() -> None:
    order = [content(name, "BF16", 5) for name in ("z", "\u00fc", "a")]
    tensors, shards = lay_out(order, 10)
    assert [shard.name for shard in shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    index = index_json(tensors, shards)
    assert index is not None
    assert json.loads(index) == {
        "metadata": {"total_size": 30},
        "weight_map": {
            "z": "model-00001-of-00003.safetensors",
            "\u00fc": "model-00002-of-00003.safetensors",
            "a": "model-00003-of-00003.safetensors",
        },
    }


def test_the_widest_dtypes_come_first_and_keep_their_order_otherwise() -> None:
    order = [
        content("b1", "U8", 1),
        content("h1", "BF16", 1),
        content("f1", "F32", 1),
        content("h2", "F16", 1),
        content("d1", "I64", 1),
        content("b2", "BOOL", 1),
    ]
    tensors, _ = lay_out(order, 100)
    assert [t.name for t in tensors] == ["d1", "f1", "h1", "h2", "b1", "b2"]


contents = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=6).filter(
        lambda name: name != "__metadata__"
    ),
    st.tuples(
        st.sampled_from(["F64", "F32", "BF16", "U8", "BOOL", "I64", "U16"]),
        st.lists(st.integers(0, 5), max_size=3),
    ),
    max_size=8,
).map(lambda found: [content(name, dtype, *shape) for name, (dtype, shape) in found.items()])


@given(contents, st.integers(0, 200))
def test_every_shard_is_a_sound_file_as_two_readers_see_it(
    tmp_path_factory: pytest.TempPathFactory, given_order: list[Content], shard_bytes: int
) -> None:
    tensors, shards = lay_out(given_order, shard_bytes)
    assert sorted(t.name for t in tensors) == sorted(c.name for c in given_order)
    for number, shard in enumerate(shards):
        own = {t.name: t for t in tensors if t.shard == number}
        path = write(tmp_path_factory.getbasetemp() / "shard", shard)
        assert len(shard.header) % PAGE == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert sorted(file.keys()) == sorted(own)
        found = read_header(path).tensors
        assert list(found) == list(own)
        for name, entry in found.items():
            planned = own[name]
            assert (entry.dtype, entry.shape) == (planned.dtype, planned.shape)
            assert entry.start == planned.offset
            assert entry.start % entry.dtype.itemsize == 0


def write(path: Path, shard: OutputShard) -> Path:
    path.write_bytes(shard.header.ljust(shard.size, b"\0"))
    assert path.stat().st_size == shard.size
    return path


@given(contents, st.integers(0, 200))
def test_no_shard_holds_more_than_asked_but_for_single_tensors(
    given_order: list[Content], shard_bytes: int
) -> None:
    tensors, shards = lay_out(given_order, shard_bytes)
    size = {c.name: c.nbytes for c in given_order}
    groups = by_shard(tensors, shards)
    for number, (group, shard) in enumerate(zip(groups, shards, strict=True)):
        held = sum(size[name] for name in group)
        assert shard.size == len(shard.header) + held
        # empty tensors may follow a tensor that fills a shard on its own
        assert held <= shard_bytes or sum(size[name] > 0 for name in group) == 1
        if number:
            before = sum(size[name] for name in groups[number - 1])
            assert before + size[next(n for n in size if n in group)] > shard_bytes
