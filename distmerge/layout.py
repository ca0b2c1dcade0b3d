"""The files of the output: which tensor in which shard at which offset. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from distmerge.spec import PAGE, DType, OutputShard, OutputTensor, Rule


class Content(NamedTuple):
    """An output tensor that has no place yet."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    elements: int
    rule: Rule

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def lay_out(
    contents: Iterable[Content], shard_bytes: int
) -> tuple[list[OutputTensor], list[OutputShard]]:
    """Fill shards in the given order, up to `shard_bytes` of data each.

    A larger tensor gets a shard of its own. Within a shard the widest dtypes come first, so that
    every tensor is aligned to its items.
    Returns the tensors in file order and the shards with their complete headers.
    """
    groups = _fill(contents, shard_bytes)
    tensors: list[OutputTensor] = []
    shards: list[OutputShard] = []
    for number, group in enumerate(groups):
        group.sort(key=lambda content: -content.dtype.itemsize)
        header = _header(group)
        offset = len(header)
        for c in group:
            tensors.append(
                OutputTensor(c.name, c.dtype, c.shape, c.elements, number, offset, c.rule)
            )
            offset += c.nbytes
        shards.append(OutputShard(_shard_name(number, len(groups)), header, offset))
    return tensors, shards


def _fill(contents: Iterable[Content], shard_bytes: int) -> list[list[Content]]:
    groups: list[list[Content]] = [[]]
    filled = 0
    for content in contents:
        if groups[-1] and filled + content.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(content)
        filled += content.nbytes
    return groups


def _shard_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _header(group: Sequence[Content]) -> bytes:
    """Length and JSON, padded with spaces so that the data starts at a multiple of PAGE."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for content in group:
        start, end = end, end + content.nbytes
        entries[content.name] = {
            "dtype": content.dtype.name,
            "shape": content.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    length = -(-(8 + len(text)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def index_json(tensors: Sequence[OutputTensor], shards: Sequence[OutputShard]) -> bytes | None:
    """model.safetensors.index.json, None for a single file."""
    if len(shards) == 1:
        return None
    total = sum(t.elements * t.dtype.itemsize for t in tensors)
    weight_map = {tensor.name: shards[tensor.shard].name for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()
