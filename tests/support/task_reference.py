"""Task arithmetic, TIES and DARE to read: whole tensors, float64, sorted."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def deltas(base: torch.Tensor, tasks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """theta_i - theta_0, rounded to float32, as float64."""
    return [(task.float() - base.float()).double() for task in tasks]


def kept(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Which elements TIES keeps (bool): of equal magnitudes those that come first."""
    if density >= 1:
        return torch.ones_like(delta, dtype=torch.bool)
    if density <= 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    count = max(1, int(density * delta.numel()))
    order = torch.sort(delta.abs().flatten(), descending=True, stable=True).indices[:count]
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view(delta.shape)


def rescaled(delta: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What the mask leaves of a delta, with the L1 norm of the whole."""
    left = delta * mask
    norm = left.abs().sum()
    return left * (delta.abs().sum() / norm) if norm else left


def merged(
    terms: Sequence[torch.Tensor], weights: Sequence[float], *, elect: bool, normalize: bool
) -> torch.Tensor:
    """The sum of the weighted terms; with `elect` only of those whose sign is that of the sum."""
    products = torch.stack([w * term for w, term in zip(weights, terms, strict=True)])
    if not elect:
        total = sum(weights)
        return products.sum(0) / (total if normalize and abs(total) >= 1e-8 else 1)
    sign = torch.where(products.sum(0) >= 0, 1.0, -1.0)
    agree = products.sign() == sign
    share = (torch.tensor(weights).double().view(-1, *[1] * sign.dim()) * agree).sum(0)
    share = torch.where(share == 0, 1.0, share) if normalize else torch.ones_like(share)
    return (products * agree).sum(0) / share
