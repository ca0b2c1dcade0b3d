"""Made-up trajectories of checkpoints, and principal components the direct way.

The reference flattens, centres and decomposes the merged weights themselves, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from distmerge.methods.extrapolate import Trend, add_gram

F64 = torch.float64
PIECE = 64


def gram_of(points: Sequence[torch.Tensor], piece: int = PIECE) -> torch.Tensor:
    gram = torch.zeros(len(points), len(points), dtype=F64)
    add_gram(points, gram, elements=piece)
    return gram


def uniform(count: int, window: int, stride: int = 1) -> torch.Tensor:
    """The averages of `window` neighbours among `count`, the last window at the end."""
    ends = range(count, window - 1, -stride)
    rows = [[1 / window if end - window <= t < end else 0.0 for t in range(count)] for end in ends]
    return torch.tensor(rows[::-1], dtype=F64)


def walk(count: int, size: int, *, seed: int = 0, drift: float = 0.5) -> torch.Tensor:
    """`count` checkpoints of `size` weights that drift and jitter, in float64."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(count, size, generator=generator, dtype=F64)
    return (steps + drift * torch.randn(size, generator=generator, dtype=F64)).cumsum(0)


class Direct(NamedTuple):
    """Principal components of the merged weights, from the weights."""

    merged: torch.Tensor
    """J x n, not centred."""
    scores: torch.Tensor
    """J x J at most: by component, the leading one oriented along the net displacement."""
    variances: torch.Tensor
    direction: torch.Tensor

    @property
    def displacement(self) -> torch.Tensor:
        return self.merged[-1] - self.merged[0]

    def theta(self, intervals: float) -> torch.Tensor:
        eta = intervals * (self.direction @ self.displacement) / (len(self.merged) - 1)
        return self.merged[-1] + eta * self.direction


def decompose(points: torch.Tensor, merging: torch.Tensor) -> Direct:
    merged = merging @ points
    u, s, vh = torch.linalg.svd(merged - merged.mean(0), full_matrices=False)
    sign = 1.0 if vh[0] @ (merged[-1] - merged[0]) > 0 else -1.0
    u[:, 0] *= sign
    return Direct(merged, u * s, s**2, sign * vh[0])


def moved(points: torch.Tensor, trend: Trend, intervals: float) -> torch.Tensor:
    """The extrapolated weights: the raw checkpoints' weighted sum."""
    return torch.tensor(trend.coefficients(intervals), dtype=F64) @ points


def whole_numbers(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(-1000, 1000, (count, size), generator=generator).double()
