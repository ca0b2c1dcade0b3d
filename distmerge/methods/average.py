"""Weighted sums of tensors, in blocks that fit the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Terms = Sequence[tuple[int, float]]
"""Which inputs a sum adds up, in order, each with its coefficient."""


def weighted_sums(
    inputs: Sequence[torch.Tensor],
    sums: Sequence[Terms],
    outs: Sequence[torch.Tensor],
    *,
    block: int,
) -> list[bool]:
    """outs[k] = sum of c * inputs[i] over the terms (i, c) of sums[k], rounded once.

    `inputs` and `outs` are 1-D, of one length over zero and of any float dtypes. The terms of a
    sum are added in order, in float32 (float64 where one of its inputs or its output is; torch
    rounds float64 to 16 bits by way of float32); the first starts it, so a single input with
    coefficient 1 comes out as it is, to the sign of its zeros. An input is read and cast once for
    all sums, and no sum depends on what the others are.

    Returns whether each sum went well: False where an input holds NaN or Inf, where a value
    overflowed, or (rarely) where finite values are so large that their block's sum overflows.
    """
    length, device = outs[0].numel(), outs[0].device
    working = [_working(inputs, terms, out) for terms, out in zip(sums, outs, strict=True)]
    totals = [torch.empty(min(block, length), dtype=dtype, device=device) for dtype in working]
    casts = {
        dtype: torch.empty(min(block, length), dtype=dtype, device=device) for dtype in working
    }
    uses = _uses(sums, working)
    checks: list[list[torch.Tensor]] = [[] for _ in sums]
    for start in range(0, length, block):
        stop = min(start + block, length)
        for (place, dtype), targets in uses:
            term = casts[dtype][: stop - start].copy_(inputs[place][start:stop])
            for k, coefficient, first in targets:
                total = totals[k][: stop - start]
                if first:
                    torch.mul(term, coefficient, out=total)
                else:
                    total.add_(term, alpha=coefficient)
        for k, out in enumerate(outs):
            total = totals[k][: stop - start]
            checks[k].append(_round(total, out[start:stop]))
    return [bool(torch.stack(each).isfinite().all()) for each in checks]


def _working(inputs: Sequence[torch.Tensor], terms: Terms, out: torch.Tensor) -> torch.dtype:
    precise = torch.float64 in (out.dtype, *(inputs[i].dtype for i, _ in terms))
    return torch.float64 if precise else torch.float32


def _uses(
    sums: Sequence[Terms], working: Sequence[torch.dtype]
) -> list[tuple[tuple[int, torch.dtype], list[tuple[int, float, bool]]]]:
    """For each input and dtype to cast it to: which sums take it, with what coefficient, and
    whether it starts them. In the order of the inputs, which is that of every sum's terms."""
    found: dict[tuple[int, torch.dtype], list[tuple[int, float, bool]]] = {}
    for k, (terms, dtype) in enumerate(zip(sums, working, strict=True)):
        for number, (place, coefficient) in enumerate(terms):
            found.setdefault((place, dtype), []).append((k, coefficient, number == 0))
    return sorted(found.items(), key=lambda use: use[0][0])


def _round(total: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = total; returns a scalar that is finite if all values were and are."""
    out.copy_(total)
    narrow = torch.finfo(out.dtype).max < 0.99 * torch.finfo(total.dtype).max
    return (total.copy_(out) if narrow else total).sum()


def count_nonfinite(x: torch.Tensor) -> int:
    """How many values of `x` are NaN or Inf."""
    return x.numel() - int(x.isfinite().sum())
