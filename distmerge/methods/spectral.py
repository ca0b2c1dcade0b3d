"""Base mergers that look at the singular values and vectors of whole matrices.

    tsv_m     Task Singular Vectors, Gargiulo et al., arXiv 2412.00081
    iso_c     isotropic merging in the common subspace, Marczak et al., arXiv 2502.04959
    iso_cts   the same, with subspaces of single tasks besides
    star      Spectral Truncation and Rescale, Lee et al., NAACL 2025

None needs an SVD of a whole matrix. Let it be wide, m x n with m <= n. The left singular vectors of
D_i are the eigenvectors u_r of D_i D_i^T, which is m x m; the right ones are D_i^T u_r / sigma_r.
So every result is sum_i M_i D_i with small M_i. Panels are read once or twice for sums of m x m,
and once more to apply these. A tall matrix is taken as its transpose: below, E_i is D_i with its
shorter side first, k x l. A solver holds a k x k Gram matrix in float64 for each task.

Squares cost half of the digits: a direction with sigma_r = x sigma_1 is known to about 1e-16 / x^2.
Those with x below about 1e-7 are *not resolved* and come out as zero; a full SVD puts vectors there
that rounding has chosen. What divides by sigma_r is applied in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.methods.linalg import PIECE, LinAlgError, decomposition, gram
from distmerge.methods.stages import Method, Panel, Stage, Tensors, add

_RESOLVED = 1e-7
"""Singular values below this share of sqrt(|E E^T|_F), which is sigma_1 up to a factor of k^(1/4),
are what rounding leaves."""

_DISTINCT = 1e-12
"""Singular vectors of several tasks whose Gram matrix has eigenvalues below this share of the
largest depend on each other: two that agree to within 1e-6 are one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merge:
    """What makes D: left @ rows(panels of the E_i), piece by piece.

    `left` (k x p) has the dtype in which the two are multiplied. `fallback` says what was done
    where an eigendecomposition failed; None usually.
    """

    wide: bool
    left: Tensor
    rows: Callable[[Sequence[Tensor]], Tensor]
    fallback: str | None

    def apply(self, deltas: Sequence[Tensor]) -> Tensor:
        """The panel of D (float32) from those of the D_i, in the order of the tasks."""
        merged = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
        for out, *pieces in _pieces([merged, *deltas], self.wide, PIECE):
            out.copy_(self.left @ self.rows(pieces).to(self.left.dtype))
        return merged


def iso_c(rows: int, columns: int, tasks: int) -> Method[Merge]:  # noqa: ARG001
    """Iso-C: the sum of the D_i with every singular value set to the mean of all k.

    Directions that are not resolved stay zero: of a sum of rank q, q singular values are set.
    The paper's scale, 1 or 1.5, is the caller's.
    """
    wide = rows <= columns

    def accumulate(panel: Panel) -> Tensors:
        return _summed(panel.deltas, wide, _total_gram)

    def solve(sums: Tensors) -> Tensors:
        found = _spectrum(sums[0])
        values = found.sigma.mean(-1, keepdim=True) * found.inverse
        return [_scaled(found.vectors, values) @ found.vectors.mT, found.failed]

    left, failed = yield Stage(accumulate, solve)
    return Merge(wide=wide, left=left, rows=_total, fallback=_fallback(failed))


def star(rows: int, columns: int, tasks: int, *, eta: float = 0.4) -> Method[Merge]:
    """STAR: the mean of the truncated D_i, float32.

    Of each D_i the fewest leading singular directions are kept whose singular values sum to `eta`
    (above 0, at most 1) of the nuclear norm, and scaled up to that norm. Zero deltas count too.
    """
    wide = rows <= columns

    def solve(sums: Tensors) -> Tensors:
        kept, failed = zip(*(_truncation(x, eta) for x in sums), strict=True)
        return [torch.cat(kept, dim=-1) / tasks, _any(failed)]

    left, failed = yield Stage(partial(_grams, wide=wide), solve)
    return Merge(wide=wide, left=left, rows=_on_top, fallback=_fallback(failed))


def tsv_m(rows: int, columns: int, tasks: int) -> Method[Merge]:
    """TSV-M: the leading singular directions of each D_i, made orthogonal to those of the others.

    Each task gives k // tasks of them, as in the authors' program, but at least one. With U and V
    their singular vectors side by side, and U', V' the polar factors of these,
    D = U' diag(sigma) V'^T. Polar factors are those of the space that the vectors span (inverse
    square roots are pseudo-inverses): a direction that two tasks share comes once, with the mean of
    its singular values.
    """
    wide, own = rows <= columns, max(1, min(rows, columns) // tasks)

    def solve(sums: Tensors) -> Tensors:
        parts = [_leading(_spectrum(x), own) for x in sums]
        one = parts[0]
        common = one._replace(short=one.short[..., :0], rows=one.rows[..., :0, :])
        return _frame(common, parts, torch.cat([x.sigma for x in parts], dim=-1))

    return (yield from _orthogonalised(wide, Stage(partial(_grams, wide=wide), solve)))


def iso_cts(rows: int, columns: int, tasks: int, *, common_share: float = 0.8) -> Method[Merge]:
    """Iso-CTS: the leading singular directions of the sum, and for each task those of what is
    left of D_i outside of them, all made orthogonal, with one singular value.

    As in the authors' program: of k directions, k - int(k * common_share) are dealt out to the
    tasks in equal numbers, rounded to the nearest; the others are common. The singular value is the
    mean of the k that belong to them. What is outside is (I - U U^T) D_i, with U on the side of the
    outputs for a tall matrix too. `common_share` is from 0 to 1. Directions that are not resolved,
    or depend on others, are as in `iso_c` and `tsv_m`.
    """
    wide, k = rows <= columns, min(rows, columns)
    own = min(round((k - int(k * common_share)) / tasks), k // tasks)

    def accumulate(panel: Panel) -> Tensors:
        products = _summed(panel.deltas, wide, _total_gram if wide else _with_total)
        return _grams(panel, wide=wide) + products

    def solve(sums: Tensors) -> Tensors:
        grams, products = sums[:tasks], sums[tasks:]
        whole = reduce(torch.add, products)
        common = _leading(_spectrum((whole + whole.mT) / 2), k - tasks * own)
        if wide:
            parts = [_outside_short(x, common, own) for x in grams]
        else:
            parts = [_outside_long(x, y, common, own) for x, y in zip(grams, products, strict=True)]
        sigma = torch.cat([x.sigma for x in (common, *parts)], dim=-1)
        return _frame(common, parts, sigma.mean(-1, keepdim=True))

    return (yield from _orthogonalised(wide, Stage(accumulate, solve)))


class _Spectrum(NamedTuple):
    """Of E with E E^T given: singular vectors of the short side as columns (k x k), singular
    values (k, descending), their inverses (0 where not resolved), 1 where `eigh` failed or 0."""

    vectors: Tensor
    sigma: Tensor
    inverse: Tensor
    failed: Tensor


def _spectrum(product: Tensor) -> _Spectrum:
    values, vectors, failed = _decomposed(product)
    return _resolved(values, vectors, product, failed)


def _rest_spectrum(rest: Tensor, product: Tensor) -> _Spectrum:
    """The spectrum of what is left of E, where `product` is E E^T and `rest` what is left of that:
    it has the rounding errors of `product`, and may have negative eigenvalues for them."""
    shift = torch.linalg.matrix_norm(product)[..., None]
    lifted = rest + torch.diag_embed(shift.expand(rest.shape[:-1]))
    values, vectors, failed = _decomposed((lifted + lifted.mT) / 2)
    return _resolved((values - shift).clamp(min=0), vectors, product, failed)


def _resolved(squares: Tensor, vectors: Tensor, product: Tensor, failed: Tensor) -> _Spectrum:
    floor = _RESOLVED**2 * torch.linalg.matrix_norm(product)[..., None]
    inverse = torch.where(squares > floor, squares.rsqrt(), 0.0)
    return _Spectrum(vectors, squares.sqrt(), inverse, failed)


def _decomposed(product: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return decomposition(product)
    except LinAlgError as error:
        raise ArithmeticError(f"the deltas can't be decomposed: {error}") from error


class _Directions(NamedTuple):
    """r singular directions of a matrix.

    `short` (k x r) holds the vectors of the short side, `sigma` (r) the values, and `rows` (r x k)
    what makes the vectors of the long side: rows @ E, less overlap @ the common ones, of which
    `overlap` (r x c, or r x 0) says how much to take off. Vectors and rows are zero where a
    direction is not resolved.
    """

    short: Tensor
    sigma: Tensor
    rows: Tensor
    overlap: Tensor
    failed: Tensor


def _leading(found: _Spectrum, count: int) -> _Directions:
    vectors, inverse = found.vectors[..., :count], found.inverse[..., :count]
    rows = _scaled(vectors, inverse).mT
    short = _scaled(vectors, inverse > 0)
    return _Directions(short, found.sigma[..., :count], rows, rows[..., :0], found.failed)


def _outside_short(product: Tensor, common: _Directions, count: int) -> _Directions:
    """The leading directions of H E, with H = I - P P^T and P the common vectors of the short side;
    `product` is E E^T."""

    def outside(x: Tensor) -> Tensor:
        return x - common.short @ (common.short.mT @ x)

    found = _leading(_rest_spectrum(outside(outside(product).mT), product), count)
    # Weak directions mix with the common ones, which E has in full strength.
    return found._replace(short=outside(found.short), rows=outside(found.rows.mT).mT)


def _outside_long(
    product: Tensor, with_total: Tensor, common: _Directions, count: int
) -> _Directions:
    """The leading directions of E (I - P P^T), with P the common vectors of the long side;
    `product` is E E^T, `with_total` is E times the transpose of the sum."""
    seen = with_total @ common.rows.mT
    found = _leading(_rest_spectrum(product - seen @ seen.mT, product), count)
    return found._replace(overlap=found.rows @ seen)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Makes the long side's singular vectors as rows: c common ones, of the sum of the E_i, then r
    of each task. `common` is c x k, `own` K x r x k, `overlap` K x r x c or K x r x 0."""

    common: Tensor
    own: Tensor
    overlap: Tensor

    def __call__(self, pieces: Sequence[Tensor]) -> Tensor:
        common = self.common @ _total(pieces)
        off = common[..., : self.overlap.shape[-1], :]
        tasks = zip(self.own.unbind(-3), self.overlap.unbind(-3), pieces, strict=True)
        own = (rows @ x.double() - overlap @ off for rows, overlap, x in tasks)
        return torch.cat([common, *own], dim=-2)


def _frame(common: _Directions, tasks: Sequence[_Directions], values: Tensor) -> Tensors:
    """The first stage's solution: U' diag(values) of the short side (k x p), the rows of the long
    side, and whether any decomposition failed."""
    short = torch.cat([x.short for x in (common, *tasks)], dim=-1)
    root, failed = _inverse_root(short.mT @ short)
    return [
        _scaled(short @ root, values),
        common.rows,
        torch.stack([x.rows for x in tasks], dim=-3),
        torch.stack([x.overlap for x in tasks], dim=-3),
        _any([common.failed, failed, *(x.failed for x in tasks)]),
    ]


def _orthogonalised(wide: bool, frame: Stage) -> Method[Merge]:
    """U' diag(values) V'^T, after a second stage for the Gram matrix of V."""
    left, common, own, overlap, failed = yield frame
    rows = _Rows(common, own, overlap)

    def accumulate(panel: Panel) -> Tensors:
        return _summed(panel.deltas, wide, lambda pieces: [gram(rows(pieces), wide=True)])

    def solve(sums: Tensors) -> Tensors:
        root, worse = _inverse_root(sums[0])
        return [left @ root, _any([failed, worse])]

    left, failed = yield Stage(accumulate, solve)
    return Merge(wide=wide, left=left, rows=rows, fallback=_fallback(failed))


def _inverse_root(product: Tensor) -> tuple[Tensor, Tensor]:
    """(X X^T)^(-1/2) on the space that the rows of X span, zero elsewhere."""
    values, vectors, failed = _decomposed(product)
    distinct = values > _DISTINCT * values[..., :1]
    roots = torch.where(distinct, values.rsqrt(), 0.0)
    return _scaled(vectors, roots) @ vectors.mT, failed


def _truncation(product: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """What makes of E its truncated and rescaled form (k x k, float32)."""
    found = _spectrum(product)
    sums = found.sigma.cumsum(-1)
    kept = sums - found.sigma < eta * sums[..., -1:]
    share = (found.sigma * kept).sum(-1, keepdim=True)
    scale = torch.where(share > 0, sums[..., -1:] / share, 0.0)
    return (_scaled(found.vectors, kept * scale) @ found.vectors.mT).float(), found.failed


def _scaled(columns: Tensor, values: Tensor) -> Tensor:
    """columns @ diag(values)"""
    return columns * values[..., None, :]


def _any(failed: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(failed)).amax()


def _fallback(failed: Tensor) -> str | None:
    return "svd: eigenvectors of a Gram matrix did not pass their check" if bool(failed) else None


def _pieces(panels: Sequence[Tensor], wide: bool, size: int) -> Iterator[tuple[Tensor, ...]]:
    """The same stretch of the long side of every panel, shorter side first."""
    parts = (torch.split(x if wide else x.mT, size, dim=-1) for x in panels)
    return zip(*parts, strict=True)


def _summed(
    deltas: Sequence[Tensor], wide: bool, function: Callable[[Sequence[Tensor]], Tensors]
) -> Tensors:
    """The sum of what `function` makes of each piece of a panel."""
    side = deltas[0].shape[-2 if wide else -1]
    # As large as what comes out: float64 copies do not grow with the panel, nor sums cost much.
    parts = (function(pieces) for pieces in _pieces(deltas, wide, max(PIECE, side)))
    return reduce(add, parts)


def _grams(panel: Panel, *, wide: bool) -> Tensors:
    return [gram(x, wide=wide) for x in panel.deltas]


def _total(pieces: Sequence[Tensor]) -> Tensor:
    """The sum in float64."""
    total = pieces[0].to(torch.float64, copy=True, memory_format=torch.contiguous_format)
    for x in pieces[1:]:
        total.add_(x)
    return total


def _total_gram(pieces: Sequence[Tensor]) -> Tensors:
    return [gram(_total(pieces), wide=True)]


def _with_total(pieces: Sequence[Tensor]) -> Tensors:
    """E_i times the transpose of the sum, for each task."""
    total = _total(pieces)
    return [x.double() @ total.mT for x in pieces]


def _on_top(pieces: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(pieces), dim=-2)
