"""Extrapolation along the leading principal direction of a trajectory of merged checkpoints.

A reconstruction from the abstract of Extra-Merge (arXiv 2605.26484) and from its citations; its
window, its interval and its rule for the step were not known to us.

Raw checkpoints theta_t (T of them) are merged over windows, m_j = sum_t B[j,t] theta_t (J of them).
The direction v is the leading principal component of the centred m_j, all weights flattened to
one vector. One steps from m_last along v by kappa merge intervals:

    theta(kappa) = m_last + kappa * (v . (m_last - m_first)) / (J - 1) * v

With the J x J Gram matrix of the centred m_j and its leading unit eigenvector a, v . m_j is
sqrt(lambda) a[j] up to a constant, so that theta(kappa) is one weighted sum of raw checkpoints:

    c(kappa) = B[last] + kappa * (a[last] - a[first]) / (J - 1) * B^T a

which is the same for a and -a. All follows from the T x T Gram matrix of the theta_t; it is formed
of differences to one of them, for that of the raw weights loses the differences to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

GRAM_ELEMENTS = 16 * 1024
"""Elements of all checkpoints that are multiplied at once: their float64 differences fit the L2
cache. A block of the plan is a whole number of these."""

_ROUNDING = 1e-12
"""Share of the raw checkpoints' variance that rounding alone can make."""


def add_gram(inputs: Sequence[torch.Tensor], gram: torch.Tensor, *, elements: int) -> None:
    """gram[s,t] += (x_s - x_last) . (x_t - x_last), differences and products in float64.

    `inputs` are T tensors, 1-D, of one length and any float dtypes; `gram` is T x T, float64. The
    sum runs over pieces of `elements` in order.
    """
    rows = torch.empty(len(inputs), elements, dtype=torch.float64, device=gram.device)
    for start in range(0, inputs[0].numel(), elements):
        part = [x[start : start + elements] for x in inputs]
        # A piece that is not full gets a buffer of its own: alignment may change last bits.
        count = part[0].numel()
        d = rows if count == elements else rows.new_empty(len(inputs), count)
        last = d[-1].copy_(part[-1])
        for row, x in zip(d[:-1], part[:-1], strict=True):
            row.copy_(x).sub_(last)  # while it is in the cache
        gram[:-1, :-1].addmm_(d[:-1], d[:-1].T)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trend:
    """Where a trajectory of J merged checkpoints, made of T raw ones, leads.

    `merging` is B (J x T), `base` its last row; `interval` (T) is what one merge interval adds to
    the coefficients, `length` its L2 norm in weight space. `raw` and `merged` hold shares of
    variance by component, in descending order; all zeros where nothing varies. float64.
    """

    merging: torch.Tensor
    interval: torch.Tensor
    length: float
    raw: torch.Tensor
    merged: torch.Tensor

    @property
    def base(self) -> torch.Tensor:
        return self.merging[-1]

    def coefficients(self, intervals: float) -> tuple[float, ...]:
        """Of the raw checkpoints, `intervals` merge intervals beyond the last merged one."""
        if intervals == 0:
            return tuple(self.base.tolist())
        return tuple((self.base + intervals * self.interval).tolist())


def solve(
    gram: torch.Tensor, merging: torch.Tensor, direction: Literal["principal", "secant"]
) -> Trend:
    """The trend of raw checkpoints with Gram matrix `gram` (T x T), merged by `merging` (J x T).

    Both are float64 on the CPU; the rows of `merging` have one sum. With `secant` the direction is
    that from the first merged checkpoint to the last. `length` is zero where there is no direction:
    the merged checkpoints are equal, or end where they began.
    """
    centred = _centred(merging)
    variances, vectors = _components(gram, centred)
    if direction == "secant":
        interval = (merging[-1] - merging[0]) / (len(merging) - 1)
    else:
        a = vectors[:, 0]
        interval = (a[-1] - a[0]) / (len(merging) - 1) * (centred.T @ a)
    spread = _components(gram, _centred(torch.eye(len(gram), dtype=torch.float64)))[0]
    squared = float(interval @ gram @ interval)
    moved = squared * (len(merging) - 1) ** 2
    return Trend(
        merging=merging,
        interval=interval,
        length=squared**0.5 if moved > _ROUNDING * float(spread.sum()) else 0.0,
        raw=_shares(spread),
        merged=_shares(variances),
    )


def null_shares(merging: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of variance (raw, merged) that a random walk of as many checkpoints shows.

    In high dimension the Gram matrix of a walk with steps of equal length is min(s, t).
    """
    steps = torch.arange(1, merging.shape[1] + 1, dtype=torch.float64)
    walk = torch.minimum(steps[:, None], steps[None, :])
    eye = torch.eye(len(walk), dtype=torch.float64)
    raw, merged = (_components(walk, _centred(rows))[0] for rows in (eye, merging))
    return _shares(raw), _shares(merged)


def plane(gram: torch.Tensor, trend: Trend, points: torch.Tensor) -> torch.Tensor:
    """Coordinates of `points` (P x T, affine combinations of the raw checkpoints) as P x 2.

    The axes are the direction and the leading component of the merged checkpoints (of the raw
    ones, where that is flat) across it; the origin is the mean of the merged checkpoints, the unit
    the L2 distance in weight space.
    """
    origin = trend.merging.mean(0)
    first = trend.interval / trend.length
    across = _across(gram, first, _centred(trend.merging))
    if across is None:
        across = _across(gram, first, _centred(torch.eye(len(gram), dtype=torch.float64)))
    axes = torch.stack([first, torch.zeros_like(first) if across is None else across])
    return (points - origin) @ gram @ axes.T


def _across(gram: torch.Tensor, first: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """The leading component of `rows` across the direction `first`, as coefficients; None where
    there is nothing across it."""
    rest = rows - torch.outer(rows @ gram @ first, first)
    variances, vectors = _components(gram, rest)
    whole = float(torch.einsum("jt,tu,ju->", rows, gram, rows))
    if float(variances[0]) <= _ROUNDING * whole:
        return None
    return (rest.T @ vectors[:, 0]) / variances[0].sqrt()


def cosines(gram: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosines between the successive differences of `rows` (P x T) as P-1 x P-1; 0 where a
    difference is zero."""
    steps = rows[1:] - rows[:-1]
    products = steps @ gram @ steps.T
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, products / scale.clamp(min=1e-300), 0.0).clamp(-1, 1)


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0)


def _components(gram: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (descending, not negative) and eigenvectors of the points `rows` (P x T)."""
    product = rows @ gram @ rows.T
    variances, vectors = torch.linalg.eigh((product + product.T) / 2)
    return variances.flip(0).clamp(min=0), vectors.flip(1)


def _shares(variances: torch.Tensor) -> torch.Tensor:
    total = variances.sum()
    return variances / total if total > 0 else torch.zeros_like(variances)
