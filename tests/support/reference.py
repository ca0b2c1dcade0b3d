"""A merger to read: it loads whole tensors, adds them in float64, and knows no plan, no blocks.

And the bound that holds for anything faster: the exact result, rounded once, plus what float32
loses on the terms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from tests.support.checkpoints import read_output

Tensors = Mapping[str, torch.Tensor]


def weighted_sum(inputs: Sequence[torch.Tensor], coefficients: Sequence[float]) -> torch.Tensor:
    """sum_i coefficients[i] * inputs[i] in float64."""
    terms = [c * x.double() for c, x in zip(coefficients, inputs, strict=True)]
    return torch.stack(terms).sum(dim=0)


def exact_sum(inputs: Sequence[torch.Tensor], coefficients: Sequence[float]) -> list[Fraction]:
    """The same without any rounding, where float64 itself is under test; slow."""
    weights = [Fraction(c) for c in coefficients]
    columns = zip(*(x.double().tolist() for x in inputs), strict=True)
    return [
        sum((w * Fraction(v) for w, v in zip(weights, column, strict=True)), Fraction())
        for column in columns
    ]


def half_ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The most by which rounding to `dtype` moves a number as large as `x`, in float64."""
    info = torch.finfo(dtype)
    _, exponents = np.frexp(x.double().numpy())  # |x| < 2**exponent
    spacing = torch.as_tensor(np.ldexp(info.eps, exponents - 1))
    return spacing.clamp_min(info.tiny * info.eps) / 2


def bound(
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    exact: torch.Tensor,
    dtype: torch.dtype,
    working: torch.dtype = torch.float32,
) -> torch.Tensor:
    """How far from `exact` each element may lie after sums in `working` and rounding to `dtype`.

    A term takes K + 1 roundings at most: of its coefficient, of the product, and of K - 1
    additions; one more pays for their products with each other, and for our own float64. Below
    the smallest normal number a product loses half a subnormal instead.

    Half an ulp is taken at the far end of that error, not at `exact`: just below a power of two
    the accumulated value may lie just above it, where ulps are twice as wide.
    """
    info, count = torch.finfo(working), len(inputs)
    size = weighted_sum([x.double().abs() for x in inputs], [abs(c) for c in coefficients])
    lost = (count + 2) * info.eps / 2 * size + count * info.tiny * info.eps
    farthest = exact.abs() + lost
    total = lost + half_ulp(farthest, dtype)
    if working == torch.float64 and torch.finfo(dtype).bits == 16:
        total += half_ulp(farthest, torch.float32)  # torch goes from 64 to 16 bits by way of 32
    return total


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole, as the safetensors library reads them."""
    return read_output(folder)


def check_merged(
    merged: Tensors,
    inputs: Sequence[Tensors],
    coefficients: Sequence[float],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Assert that `merged` is the weighted sum of `inputs`, tensor by tensor, in `dtypes`."""
    assert merged.keys() == dtypes.keys()
    for name, dtype in dtypes.items():
        found, given = merged[name], [tensors[name] for tensors in inputs]
        assert (found.dtype, found.shape) == (dtype, given[0].shape), name
        check_sum(found, given, coefficients, name)


def check_sum(
    found: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    coefficients: Sequence[float],
    what: str = "",
) -> None:
    """Assert that `found` is the weighted sum of `inputs` within `bound`, sums being in float32."""
    exact = weighted_sum(inputs, coefficients)
    error = (found.double() - exact).abs()
    excess = error / bound(inputs, coefficients, exact, found.dtype)
    assert bool((excess <= 1).all()), f"{what}: off by {float(excess.max()):.3f} of the bound"
