"""Weighted sums of tensors, in blocks that fit the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def weighted_sum(
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    out: torch.Tensor,
    *,
    block: int,
) -> bool:
    """out = sum_i coefficients[i] * inputs[i], rounded once, to the dtype of `out`.

    `inputs` and `out` are 1-D, of one length over zero and of any float dtypes. Terms are added in
    order, in float32 (float64 where an input or `out` is; torch rounds float64 to 16 bits by way
    of float32). The first term starts the sum, so a single
    input with coefficient 1 comes out as it is, to the sign of its zeros.

    Returns whether all went well: False where an input holds NaN or Inf, where a value
    overflowed, or (rarely) where finite values are so large that their block's sum overflows.
    """
    precise = torch.float64 in (out.dtype, *(x.dtype for x in inputs))
    working = torch.float64 if precise else torch.float32
    length = out.numel()
    total = torch.empty(min(block, length), dtype=working, device=out.device)
    term = torch.empty_like(total)
    narrow = torch.finfo(out.dtype).max < 0.99 * torch.finfo(working).max
    checks = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        acc, tmp = total[: stop - start], term[: stop - start]
        torch.mul(tmp.copy_(inputs[0][start:stop]), coefficients[0], out=acc)
        for x, coefficient in zip(inputs[1:], coefficients[1:], strict=True):
            acc.add_(tmp.copy_(x[start:stop]), alpha=coefficient)
        rounded = out[start:stop].copy_(acc)
        checks.append((acc.copy_(rounded) if narrow else acc).sum())
    return bool(torch.stack(checks).isfinite().all())


def count_nonfinite(x: torch.Tensor) -> int:
    """How many values of `x` are NaN or Inf."""
    return x.numel() - int(x.isfinite().sum())
