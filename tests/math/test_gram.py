"""Products of differences: exact where they can be, the same to the bit however they are cut."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch

from distmerge.methods.extrapolate import add_gram, solve
from tests.support.trajectories import PIECE, decompose, gram_of, uniform, walk, whole_numbers

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def exact_gram(points: Sequence[torch.Tensor]) -> list[list[Fraction]]:
    rows = [[Fraction(value) for value in point.double().tolist()] for point in points]
    d = [[a - b for a, b in zip(row, rows[-1], strict=True)] for row in rows]
    return [[sum((a * b for a, b in zip(s, t, strict=True)), Fraction()) for t in d] for s in d]


OFFSETS = {BF16: 8.0, F16: 1.0, F32: 1e-3, F64: 1e-4}
"""How far apart checkpoints around 1000 lie: a few units in their last places, but in float64."""


@pytest.mark.parametrize("dtype", OFFSETS, ids=str)
def test_small_differences_between_large_weights_are_kept(dtype: torch.dtype) -> None:
    points = (1000 + OFFSETS[dtype] * walk(5, 200)).to(dtype)
    exact = torch.tensor([[float(v) for v in row] for row in exact_gram(list(points))], dtype=F64)
    scale = float(exact.abs().max())
    assert scale > 0
    torch.testing.assert_close(gram_of(list(points)), exact, rtol=1e-12, atol=1e-13 * scale)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_products_of_the_weights_themselves_would_lose_the_differences(dtype: torch.dtype) -> None:
    """Why a reference is subtracted before anything is multiplied."""
    points, merging = (1000 + OFFSETS[dtype] * walk(8, 5000)).to(dtype), uniform(8, 2)
    direct = decompose(points.double(), merging)
    share = float(direct.variances[0] / direct.variances.sum())
    raw = points.double() @ points.double().T
    ours, naive = (solve(g, merging, "principal") for g in (gram_of(list(points)), raw))
    assert float(ours.merged[0]) == pytest.approx(share, rel=1e-9)
    assert abs(float(naive.merged[0]) - share) > 1e-8


def test_products_are_exact_where_float64_holds_them() -> None:
    """In any mixture of dtypes, and added to what was there."""
    dtypes = (F64, BF16, F16, F32, BF16)
    small = whole_numbers(5, 301).clamp(-200, 200)
    points = [x.to(dtype) for x, dtype in zip(small, dtypes, strict=True)]
    expected = [[int(value) for value in row] for row in exact_gram(points)]
    for piece in (16, 64, 301, 1000):
        gram = torch.ones(5, 5, dtype=F64)
        add_gram(points, gram, elements=piece)
        assert (gram - 1).tolist() == expected
    assert not any(expected[-1])


@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000, 2048])
def test_cutting_at_whole_pieces_changes_no_bit(size: int) -> None:
    points = list(walk(7, size).to(BF16))
    whole = gram_of(points)
    for cut in (PIECE, 3 * PIECE, 16 * PIECE):
        parts = torch.zeros_like(whole)
        for start in range(0, size, cut):
            # A copy at another address, as another rank's buffer would be.
            add_gram([x[start : start + cut].clone() for x in points], parts, elements=PIECE)
        assert torch.equal(parts.view(torch.int64), whole.view(torch.int64))
