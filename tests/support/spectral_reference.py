"""The spectral mergers by full SVDs in float64.

As the papers and their programs have them, but for what these leave to chance: singular vectors of
singular values that are zero, and polar factors of vectors that depend on each other. Both are left
out here. All take m x n matrices and return one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDING = 1e-7
"""Singular values below this share of the largest are zero."""


def tsv_m(deltas: Sequence[Tensor]) -> Tensor:
    k = min(deltas[0].shape)
    parts = [_svd(d, max(1, k // len(deltas))) for d in deltas]
    u, sigma, vt = _beside(parts)
    return _polar(u) @ sigma.diag() @ _polar(vt)


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    total = _total(deltas)
    u, _, vt = _svd(total, min(total.shape))
    mean: Tensor = torch.linalg.svdvals(total).mean()
    return mean * (u @ vt)


def iso_cts(deltas: Sequence[Tensor], *, common_share: float = 0.8) -> Tensor:
    k, total = min(deltas[0].shape), _total(deltas)
    own = min(round((k - int(k * common_share)) / len(deltas)), k // len(deltas))
    common = _svd(total, k - len(deltas) * own)
    outside = [d.double() - common[0] @ (common[0].T @ d.double()) for d in deltas]
    parts = [_svd(r, own, d) for r, d in zip(outside, deltas, strict=True)]
    u, sigma, vt = _beside([common, *parts])
    return sigma.sum() / k * _polar(u) @ _polar(vt)


def star(deltas: Sequence[Tensor], *, eta: float = 0.4) -> Tensor:
    return _total([_truncated(d, eta) for d in deltas]) / len(deltas)


def _truncated(delta: Tensor, eta: float) -> Tensor:
    u, sigma, vt = _svd(delta, min(delta.shape))
    r = int((sigma.cumsum(0) < eta * sigma.sum()).sum()) + 1
    kept = sigma[:r]
    return (u[:, :r] * kept) @ vt[:r] * (sigma.sum() / kept.sum() if len(kept) else 0)


def _svd(delta: Tensor, r: int, before: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """At most r leading directions; `before` is what `delta` is a rest of."""
    u, sigma, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    norm = torch.linalg.matrix_norm((delta if before is None else before).double(), 2)
    r = min(r, int((sigma > ROUNDING * norm).sum()))
    return u[:, :r], sigma[:r], vt[:r]


def _beside(parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    u, sigma, vt = zip(*parts, strict=True)
    return torch.cat(u, 1), torch.cat(sigma), torch.cat(vt)


def _polar(matrix: Tensor) -> Tensor:
    u, sigma, vt = torch.linalg.svd(matrix, full_matrices=False)
    r = int((sigma > 1e-6 * sigma[:1]).sum())
    factor: Tensor = u[:, :r] @ vt[:r]
    return factor


def _total(matrices: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(matrices)).double().sum(0)
