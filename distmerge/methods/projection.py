"""The singular directions of a matrix in panels, and how far others agree with it along them.

For a matrix D = U diag(sigma) V^T and others D_i of its shape (m x n), with k = min(m, n): each
direction r has an energy |u_r^T D|^2, and each D_i a strength <u_r^T D, u_r^T D_i> / |u_r^T D_i|^2,
the factor by which D holds more of that direction than D_i has.

A wide matrix (m <= n) is projected on U. Of a tall one only V is known: D V is U diag(sigma), and
its products with the D_i are summed over panels before their rows can be measured.

All is multiplied in float32 but what float32 would drown: a direction far below the largest, and
the D V that stands for U.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.methods.linalg import LinAlgError, decomposition, gram, pieces
from distmerge.methods.stages import Panel, Stage, Tensors

RESOLVED = 1e-7
"""Share of the largest singular value down to which a Gram matrix tells directions apart."""

RESOLVED_AGAIN = 1e-12
"""The same for a Gram matrix of the small directions alone."""

_SMALL = 1e-5
"""Share of the largest singular value below which these are."""

_COARSE = 2.0**-10
"""Share of the largest singular value down to which float32 measures a direction."""

_NOISE = 1e-12
"""Share of |D_i|^2 that rounding alone can leave in one direction."""


@dataclass(frozen=True, slots=True)
class Basis:
    """Singular values (... x k, descending) and vectors (... x k x k, columns) of D's short side,
    float64: U of a wide matrix, V of a tall one.

    `floor` is the share of the largest singular value above which a direction is resolved.
    """

    sigma: Tensor
    vectors: Tensor
    wide: bool
    floor: float

    @property
    def resolved(self) -> Tensor:
        """Which directions (... x k) are known; none of a zero matrix."""
        return self.sigma > self.floor * self.sigma[..., :1]

    def at_least(self, share: float) -> int:
        """How many directions have `share` of the largest singular value, in all of a batch."""
        return int((self.sigma >= share * self.sigma[..., :1]).sum(-1).min())

    def unit(self) -> Tensor:
        """A power of two (...) that brings D near 1: then float32 products do not underflow."""
        exponent = torch.frexp(self.sigma[..., 0]).exponent.clamp(-100, 100)
        return torch.ldexp(torch.ones_like(self.sigma[..., 0]), -exponent)


def decompose(*, wide: bool) -> Stage:
    """Finds sigma and vectors, and whether these are from an SVD because `eigh` failed (0 or 1).

    Raises ArithmeticError where D can't be decomposed, as where it holds NaN.
    """
    return Stage(lambda panel: [gram(panel.merged, wide=wide)], _decompose)


def refinement(first: Basis) -> Stage:
    """Finds sigma and vectors again: small directions are decomposed among themselves, where the
    squares of the large ones do not drown them."""
    start = first.at_least(_SMALL)
    small = first.vectors[..., start:]

    def accumulate(panel: Panel) -> Tensors:
        parts = pieces(panel.merged, wide=first.wide, dtype=torch.float64)
        project = (small.mT @ part if first.wide else part @ small for part in parts)
        return [sum((gram(x, wide=first.wide) for x in project), small.new_zeros(()))]

    def solve(total: Tensors) -> Tensors:
        sigma, rotation, _ = _decompose(total)
        return [
            torch.cat([first.sigma[..., :start], sigma], dim=-1),
            torch.cat([first.vectors[..., :start], small @ rotation], dim=-1),
        ]

    return Stage(accumulate, solve)


def _decompose(total: Tensors) -> Tensors:
    try:
        values, vectors, by_svd = decomposition(total[0])
    except LinAlgError as error:
        raise ArithmeticError(f"the merged matrix can't be decomposed: {error}") from error
    return [values.sqrt(), vectors, by_svd]


def projection(onto: Basis) -> Stage:
    """Finds the energies (... x k, times unit^2) and the strengths (... x K x k), float64.

    A strength is 0 where the direction is not resolved, or D_i has nothing of it but rounding.
    """
    known = int(onto.resolved.sum(-1).max())
    split = min(onto.at_least(_COARSE), known)
    return (_wide if onto.wide else _tall)(onto, known, split)


def _wide(onto: Basis, known: int, split: int) -> Stage:
    basis = onto.vectors
    size, batch, scale = basis.shape[-1], basis.shape[:-2], onto.unit()[..., None, None]
    coarse = (basis[..., :split] * scale).mT.float()
    fine = (basis[..., split:] * scale).mT

    def project(x: Tensor, count: int) -> Tensor:
        """The first `count` rows of unit U^T x."""
        first = coarse @ x
        if count == split:
            return first
        return torch.cat([first.double(), fine[..., : count - split, :] @ x.double()], dim=-2)

    def accumulate(panel: Panel) -> Tensors:
        tasks = len(panel.deltas)
        energy, whole = basis.new_zeros(*batch, size), basis.new_zeros(*batch, tasks)
        inner, squared = basis.new_zeros(2, *batch, tasks, known)
        for merged, *deltas in _in_step(panel, wide=True):
            a = project(merged, size)
            energy += _squared(a, -1)
            for i, delta in enumerate(deltas):
                b = project(delta, known)
                inner[..., i, :] += torch.linalg.vecdot(a[..., :known, :].to(b.dtype), b)
                squared[..., i, :] += _squared(b, -1)
                whole[..., i] += _squared(delta, (-2, -1))
        return [energy, inner, squared, whole]

    def solve(total: Tensors) -> Tensors:
        energy, inner, squared, whole = total
        whole = whole * scale[..., 0].square()
        return [energy, _strengths(inner, squared, whole, size)]

    return Stage(accumulate, solve)


def _tall(onto: Basis, known: int, split: int) -> Stage:
    scale = onto.unit()[..., None, None]
    columns = onto.vectors * scale
    side, batch = columns.shape[-1], columns.shape[:-2]

    def accumulate(panel: Panel) -> Tensors:
        tasks, count = len(panel.deltas), batch.numel()
        energy, whole = columns.new_zeros(*batch, side), columns.new_zeros(*batch, tasks)
        coarse = [panel.merged.new_zeros(count, split, side) for _ in range(tasks)]
        fine = [columns.new_zeros(count, known - split, side) for _ in range(tasks)]
        for merged, *deltas in _in_step(panel, wide=False):
            # unit U diag(sigma): in float32 it would no longer be orthogonal.
            u = merged.double() @ columns
            energy += _squared(u, -2)
            u = u.mT.reshape(count, side, -1)
            first, rest = u[:, :split].float(), u[:, split:known]
            for i, delta in enumerate(deltas):
                x = delta.reshape(count, -1, side)
                coarse[i].baddbmm_(first, x)
                if split < known:
                    fine[i].baddbmm_(rest, x.double())
                whole[..., i] += _squared(delta, (-2, -1))
        return [energy, whole, *coarse, *fine]

    def solve(total: Tensors) -> Tensors:
        energy, whole, *sums = total
        tasks = whole.shape[-1]
        inner, squared = columns.new_zeros(2, *batch, tasks, known)
        rows = columns.mT[..., :known, :]
        for i, (first, rest) in enumerate(zip(sums[:tasks], sums[tasks:], strict=True)):
            # unit diag(sigma) U^T D_i
            x = torch.cat([first.double(), rest], dim=-2).reshape(*batch, known, side)
            inner[..., i, :] = torch.linalg.vecdot(rows, x)
            squared[..., i, :] = _squared(x, -1) / energy[..., :known]
        squared, whole = squared * scale.square(), whole * scale[..., 0].square()
        return [energy, _strengths(inner, squared, whole, side)]

    return Stage(accumulate, solve)


def _in_step(panel: Panel, *, wide: bool) -> zip[tuple[Tensor, ...]]:
    """The same piece of D and of every D_i, together."""
    matrices = (panel.merged, *panel.deltas)
    return zip(*(pieces(x, wide=wide, dtype=torch.float32) for x in matrices), strict=True)


def _squared(x: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Squared norms along `dim`, summed in float64."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64)
    return norms.square()


def _strengths(inner: Tensor, squared: Tensor, whole: Tensor, size: int) -> Tensor:
    """inner / squared (... x K x known, to ... x K x size), 0 where there is nothing but noise."""
    strengths = torch.where(squared > _NOISE * whole[..., None], inner / squared, 0.0)
    return torch.nn.functional.pad(strengths, (0, size - inner.shape[-1]))
