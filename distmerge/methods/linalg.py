"""Singular vectors of matrices that come in panels, by small symmetric problems.

Of an m x n matrix only the k = min(m, n) directions of its short side are ever decomposed. They
are the eigenvectors of the Gram matrix of that side, a sum over panels. Squares cost half of the
digits: formed of float64 products of float32 entries, such a matrix still resolves singular values
down to about 1e-7 of the largest.

`wide` everywhere says that the panel is cut from an m x n matrix with m <= n along its columns;
else it is cut along the rows. Dimensions before the last two are a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]  # its stub forgets to export it

PIECE = 512
"""Rows or columns, along the long side, that are worked on at once: they fit the L2 cache."""

_TILE = 256
"""Rows of a Gram matrix that are computed at once: no more than needed is above its diagonal."""

_PROBES = 4


def pieces(panel: Tensor, *, wide: bool, dtype: torch.dtype) -> Iterator[Tensor]:
    """`panel` in pieces of PIECE along its long side, copied as `dtype`.

    Every copy is contiguous and aligned alike: where the panel's memory lies changes no bit of
    what is computed from it.
    """
    for part in torch.split(panel, PIECE, dim=-1 if wide else -2):
        yield part.to(dtype, copy=True, memory_format=torch.contiguous_format)


def gram(panel: Tensor, *, wide: bool) -> Tensor:
    """x x^T (m x m) of a wide panel, x^T x (n x n) of a tall one; float64, of any float dtype."""
    matrices = panel.reshape(-1, *panel.shape[-2:])
    side = panel.shape[-2 if wide else -1]
    total = panel.new_zeros(len(matrices), side, side, dtype=torch.float64)
    for piece in pieces(matrices, wide=wide, dtype=torch.float64):
        x = piece if wide else piece.mT
        for start in range(0, side, _TILE):
            stop = start + _TILE
            total[:, start:stop, :stop].baddbmm_(x[:, start:stop], x[:, :stop].mT)
    lower = total.tril()
    return (lower + lower.tril(-1).mT).reshape(*panel.shape[:-2], side, side)


def eigenbasis(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (... x k, descending, not negative) and eigenvectors (... x k x k, columns) of a
    Gram matrix in float64.

    Raises LinAlgError where the matrix holds NaN or Inf, which `eigh` takes without a word, and
    where what comes out is not its decomposition.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise LinAlgError("the Gram matrix holds NaN or Inf")
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)
    _check(matrix, values, vectors)
    return values, vectors


def decomposition(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `eigenbasis` gives, by SVD where `eigh` fails; and whether it did, 0 or 1 (float64)."""
    try:
        return *eigenbasis(matrix), matrix.new_zeros(())
    except LinAlgError:
        if not bool(torch.isfinite(matrix).all()):
            raise
        vectors, values, _ = torch.linalg.svd(matrix)
        _check(matrix, values, vectors)
        return values, vectors, matrix.new_ones(())


def _check(matrix: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Hold V V^T x and V diag(values) V^T x against x and `matrix` x for a few x of norm about 1.

    The full products would cost a third of the decomposition.
    """
    side = matrix.shape[-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(side, _PROBES, generator=generator, dtype=torch.float64) / side**0.5
    x = x.to(matrix.device)
    inner = vectors.mT @ x
    lost = (vectors @ inner - x).abs().amax((-2, -1))
    off = (vectors @ (values[..., None] * inner) - matrix @ x).abs().amax((-2, -1))
    bound = 1e-14 * (side + 10)
    # NaN fails too: it is not below anything.
    if not bool(((lost < bound) & (off <= bound * values[..., 0])).all()):
        raise LinAlgError("the eigenvectors of the Gram matrix are not orthogonal, or not its own")
