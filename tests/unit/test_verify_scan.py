"""How a verification reads: chunks that cut no value, NaN anywhere, files dealt by size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.pipeline import Options
from distmerge.spec import DTYPES, TensorSpec
from distmerge.verification import recompute, scan
from tests.support.checkpoints import write_checkpoint
from tests.support.damage import forge, listed
from tests.unit.recipes import average, linear


def pieces(size: int, floats: list[TensorSpec]) -> Iterator[scan.Chunk]:
    end = 0
    for chunk in scan.chunks(size, floats):
        assert chunk.start == end
        assert chunk.stop > chunk.start
        assert chunk.stop - chunk.start <= scan.CHUNK
        end = chunk.stop
        yield chunk
    assert end == size


@pytest.mark.parametrize("size", [16, 17, 23, 64, 1000])
def test_no_chunk_cuts_a_value_in_two(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Wherever tensors begin, which with other writers than ours may be at any byte."""
    monkeypatch.setattr(scan, "CHUNK", size)
    floats: list[TensorSpec] = []
    start = 11
    for number, (dtype, count) in enumerate(
        [("F64", 9), ("F16", 1), ("F32", 0), ("F32", 1), ("BF16", 40), ("F64", 1), ("F16", 3)]
    ):
        spec = DTYPES[dtype]
        nbytes = count * spec.itemsize
        floats.append(TensorSpec(str(number), spec, (count,), 0, start, nbytes))
        start += nbytes + number % 3
    seen: dict[str, int] = {}
    for chunk in pieces(start + 5, [spec for spec in floats if spec.nbytes]):
        for part in chunk.parts:
            assert chunk.start <= part.start < part.stop <= chunk.stop
            assert (part.start - part.spec.start) % part.spec.dtype.itemsize == 0
            assert (part.stop - part.spec.start) % part.spec.dtype.itemsize == 0
            assert part.start == part.spec.start + seen.get(part.spec.name, 0)
            seen[part.spec.name] = part.stop - part.spec.start
    assert seen == {spec.name: spec.nbytes for spec in floats if spec.nbytes}


def test_values_whose_sum_overflows_are_no_nan(tmp_path: Path) -> None:
    for step in (1, 2):
        huge = {"a": torch.full((64,), 3e38 - step * 1e37)}
        write_checkpoint(tmp_path / f"in/step-{step}", huge)
    recipe = linear({tmp_path / "in/step-1": 0.5, tmp_path / "in/step-2": 0.5})
    distmerge.merge(recipe, tmp_path / "out", options=Options(allow_nonfinite=True))
    assert distmerge.verify(tmp_path / "out", recompute="all").sound


@pytest.mark.parametrize(
    ("sizes", "ranks", "dealt"),
    [
        ([5, 1, 4, 2], 2, [[0, 1], [2, 3]]),
        ([1], 3, [[0], [], []]),
        ([], 2, [[], []]),
        ([0, 0, 0], 2, [[0, 1, 2], []]),
    ],
)
def test_files_are_dealt_by_size(sizes: list[int], ranks: int, dealt: list[list[int]]) -> None:
    assert scan.deal(sizes, ranks) == dealt


def test_differences_of_pieces_join() -> None:
    a, b = recompute.Difference(7, 2, 0.5), recompute.Difference(3, 1, 0.25)
    assert a.joined(b) == b.joined(a) == (3, 3, 0.5)


@pytest.mark.parametrize("size", [4096, 4099])
def test_values_across_chunks_are_all_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    large = {"a": torch.ones(5000), "b": torch.ones(7001).bfloat16(), "c": torch.ones(1).double()}
    for step in (1, 2):
        write_checkpoint(tmp_path / f"in/step-{step}", {n: x * step for n, x in large.items()})
    distmerge.merge(average(tmp_path / "in/step-*"), tmp_path / "out")
    monkeypatch.setattr(scan, "CHUNK", size)
    assert distmerge.verify(tmp_path / "out").sound
    spoiled = {**large, "a": large["a"].clone(), "b": large["b"].clone()}
    for element in (1023, 1024, 4999):
        spoiled["a"][element] = torch.nan
    spoiled["b"][7000] = torch.inf
    write_checkpoint(tmp_path / "out", spoiled)
    forge(tmp_path / "out", "model.safetensors")
    found = [line for line in listed(distmerge.verify(tmp_path / "out")) if "NaN" in line]
    assert found == [
        "model.safetensors, a: 3 NaN or Inf, the first is element 1023",
        "model.safetensors, b: 1 NaN or Inf, the first is element 7000",
    ]
