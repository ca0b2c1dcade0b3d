"""Singular Value Calibration by its formulas: a full SVD in float64, and no tricks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Calibrated(NamedTuple):
    result: torch.Tensor
    gamma: torch.Tensor
    sigma: torch.Tensor
    """Of the scaled matrix, descending."""


def calibrated(
    merged: torch.Tensor, deltas: Sequence[torch.Tensor], alpha: float, scale: float = 1.0
) -> Calibrated:
    """U diag(gamma) U^T (scale * merged) with all it follows from, float64; inputs m x n."""
    d = scale * merged.double()
    u, sigma, _ = torch.linalg.svd(d, full_matrices=False)
    a, total = u.T @ d, torch.zeros_like(sigma)
    for delta in deltas:
        b = u.T @ delta.double()
        squared = b.square().sum(1)
        something = squared > 1e-12 * delta.double().square().sum()
        s = torch.where(something, (a * b).sum(1) / squared, alpha)
        total += s.clamp(min=alpha)
    gamma = len(deltas) / total
    return Calibrated(u @ (gamma[:, None] * a), gamma, sigma)
