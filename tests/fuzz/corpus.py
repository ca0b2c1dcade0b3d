"""Where the fuzzers begin, and what was found: each case of FOUND once did what it must not."""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz.targets import SHARD


def entry(start: int = 0, stop: int = 4, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]} | changes


def as_header(header: object, size: int = 4) -> bytes:
    """Input of the target `header`: the JSON of `header` and `size` bytes of data."""
    return bytes([1, size]) + json.dumps(header).encode()


def as_map(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()


def average(checkpoints: str) -> str:
    return f"merge_method: average\ntrajectory: {{checkpoints: {checkpoints}}}\n"


STATISTIC = {
    "__metadata__": {"distmerge": '{"modules": ["a"], "elements": [3]}'},
    "gram": {"dtype": "F64", "shape": [2, 2], "data_offsets": [0, 32]},
    "modules": {"dtype": "F64", "shape": [1, 2, 2], "data_offsets": [32, 64]},
}


def statistic(size: int = 64, names: str | None = None, **tensors: Any) -> bytes:
    changes = {"__metadata__": {"distmerge": names}} if names is not None else {}
    return as_header(STATISTIC | changes | tensors, size)


SEEDS: dict[str, dict[str, bytes]] = {
    "header": {
        "one": as_header({"a": entry()}),
        "two": as_header({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry(4, 8)}, 8),
        "empty": as_header({"a": entry(0, 0, shape=[0, 3])}, 0),
        "raw": b"\0" + (2).to_bytes(8, "little") + b"{}",
    },
    "index": {"one": as_map({"a": SHARD}), "none": b"{}"},
    "recipe": {
        "average": average("[a/step-1, a/step-2]").encode(),
        "linear": b"merge_method: linear\nmodels:\n  - &m {model: a, parameters: {weight: 1}}\n"
        b"  - {<<: *m, model: b@main}\nsweep: {models.0.parameters.weight: [0.5, 1]}\n",
        "extra_merge": b"merge_method: extra_merge\ntrajectory: {checkpoints: x/*, window: 4}\n"
        b"parameters: {step: [0, 0.5], exclude: ['*.bias']}\n"
        b"select: {command: 'true {model}', goal: min}\n",
    },
    "gram": {"one": statistic()},
}

FOUND: dict[str, dict[str, bytes]] = {
    "header": {
        "terminal code in a name": as_header({"\x1b]0;x\x07": entry()}),
        "NUL in a name": as_header({"a\0b": entry()}),
        "line end in a name": as_header({"a\nerror: b": entry()}),
        "C1 code in a name": as_header({"\x9b31m": entry()}),
        "half a surrogate pair as a field": as_header({"a": entry(dtype="\ud800")}),
        "long name": as_header({"n" * 100_000: entry(shape=[])}),
        "long name twice": b"\1\4{" + b'"%s":1,' % (b"n" * 9999) * 2 + b'"x":1}',
        "long dtype": as_header({"a": entry(dtype="F" * 100_000)}),
        "nested dtype": as_header({"a": entry(dtype=[[["F32"] * 9] * 9] * 9)}),
        "sizes that overflow before the zero": as_header(
            {"a": entry(0, 0, shape=[2**62] * 9 + [0])}
        ),
        "minus zero": b'\1\0{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        "half a surrogate pair in the metadata": as_header(
            {"__metadata__": {"format": "\ud800"}, "a": entry()}
        ),
        "half a surrogate pair that nobody reads": as_header(
            {"a": entry(0, 0, shape=[0], more="\ud800")}, 0
        ),
        "long shape": as_header({"a": entry(shape=[2**63 - 1] * 64)}),
    },
    "index": {
        "number of 5000 digits in a file's name": as_map({"a": f"model-{'9' * 5000}.safetensors"}),
        "tensor twice": b'{"weight_map": {"a": "x", "a": "%s"}}' % SHARD.encode(),
        "long name": as_map({"a": "x" * 100_000}),
        "terminal code": as_map({"a": "\x1b[31m\n.safetensors"}),
        "half a surrogate pair": as_map({"a": "\ud800.safetensors", "b": "\udcff.safetensors"}),
        "nested": as_map({"a": [["x"] * 99] * 99}),
    },
    "recipe": {
        "integer that Python can't print": average("0x" + "f" * 10_000).encode(),
        "integer of a short text": average("0x" + "f" * 4000).encode(),
        "sexagesimal that overflows": average("1" + ":1" * 300 + ".5").encode(),
        "sexagesimal that takes hours": average("1" + ":1" * 200_000).encode(),
        "bool by tag": average("!!bool x").encode(),
        "time by tag": average("!!timestamp x").encode(),
        "empty integer by tag": average("!!int ''").encode(),
        "empty float by tag": average("!!float ''").encode(),
        "tag of a key": b"!mine merge_method: average",
        "terminal code in a tag": b"a: !<!%1b[31m> 1",
        "terminal code in a key": b'merge_method: linear\n"a\\e[31m\\nb": 1',
        "long key": b"? " + b"k" * 100_000 + b"\n: 1",
        "long alias": b"a: *" + b"x" * 100_000,
        "merge of itself": b"&a {<<: *a}",
        "digit that is no number": "merge_method: linear\nsweep: {a.\u00b2: [1]}".encode(),
        "path as a key": b"merge_method: linear\nsweep: {/tmp/x: [1, 2]}",
    },
    "gram": {
        "names nested": statistic(names="[" * 100_000),
        "modules as text": statistic(names='{"modules": "ab", "elements": "cd"}'),
        "shapes that do not fit": statistic(
            gram={"dtype": "F64", "shape": [4], "data_offsets": [0, 32]}
        ),
        "one number": statistic(
            40,
            gram={"dtype": "F64", "shape": [], "data_offsets": [0, 8]},
            modules={"dtype": "F64", "shape": [4], "data_offsets": [8, 40]},
        ),
        "other dtype": statistic(gram={"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]}),
        "packed dtype": statistic(gram={"dtype": "F4", "shape": [8, 8], "data_offsets": [0, 32]}),
        "negative size": statistic(names='{"modules": ["a"], "elements": [-1]}'),
    },
}
