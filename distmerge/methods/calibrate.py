"""Singular Value Calibration of a merged matrix (SVC, arXiv 2602.05536).

Tasks i = 1..K have deltas D_i = W_i - W_0 (m outputs, n inputs); a base merger makes D of them,
D = U diag(sigma) V^T. Where tasks agree on an output direction u_r, D counts them more than once.
Calibration scales each direction by

    s[r,i] = <u_r^T D, u_r^T D_i> / |u_r^T D_i|^2
    gamma[r] = K / sum_i max(alpha, s[r,i])

and makes U diag(gamma) U^T D. If the base merger multiplies its result by a scale, s grows by it
and nothing else changes; so a sweep over scale and alpha shares all but the last product.

Where D_i has nothing in a direction (|u_r^T D_i|^2 is below 1e-12 |D_i|^2: rounding), s counts as
alpha. A task without a delta counts in K.

Neither V nor a full decomposition is needed. U comes from the Gram matrix D D^T; of a tall D, V
comes from D^T D, and U diag(gamma) U^T D is D V diag(gamma) V^T. Directions that the Gram matrix
can't resolve keep gamma 1. Where they could matter, as they do when alpha is tiny, a Gram matrix
of the small directions alone resolves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.methods.linalg import pieces
from distmerge.methods.projection import (
    RESOLVED,
    RESOLVED_AGAIN,
    Basis,
    decompose,
    projection,
    refinement,
)
from distmerge.methods.stages import Method, Panel

_NEGLIGIBLE = 3e-6
"""Share of the result's norm that directions without a known gamma may have."""

_AMPLIFIED = 32.0
"""How far above the whole a direction may be amplified in float32."""


class Setting(NamedTuple):
    """One output: `alpha` > 0, and `scale`, by which the base merger multiplies its result."""

    alpha: float
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How to calibrate a matrix with k = min(m, n), or a batch of them.

    `sigma` (... x k, float64) are the singular values of D, without the scale, in descending order;
    `gamma` is ... x settings x k, float64. `fallback` says for each setting why the first way was
    not good enough, if so.
    """

    sigma: Tensor
    gamma: Tensor
    wide: bool
    fallback: list[str | None]
    outputs: list[_Output]
    _last: dict[int, Tensor] = field(default_factory=dict)

    def apply(self, panel: Panel, setting: int) -> Tensor:
        """scale U diag(gamma) U^T D of this panel for the setting of this number, float32."""
        transform = self._transform(setting)
        parts = pieces(panel.merged, wide=self.wide, dtype=transform.dtype)
        if self.wide:
            return torch.cat([(transform @ part).float() for part in parts], dim=-1)
        return torch.cat([(part @ transform).float() for part in parts], dim=-2)

    def _transform(self, setting: int) -> Tensor:
        """... x k x k: of the outputs of a wide matrix, of the inputs of a tall one. As large as a
        matrix may be, so only the last one is kept."""
        if setting not in self._last:
            self._last.clear()
            self._last[setting] = self.outputs[setting].transform()
        return self._last[setting]


def calibrate(rows: int, columns: int, settings: Sequence[Setting]) -> Method[Calibration]:
    """Calibrate D (rows x columns) for all `settings` in two passes over the panels, or four.

    What comes out for a setting does not depend on the others. Raises ArithmeticError where D
    can't be decomposed: it holds NaN or Inf, or LAPACK fails.
    """
    wide = rows <= columns
    sigma, vectors, by_svd = yield decompose(wide=wide)
    first = Basis(sigma, vectors, wide, RESOLVED)
    energy, strengths = yield projection(first)
    outputs = [_output(first, energy, strengths, setting) for setting in settings]
    if any(output.doubt for output in outputs):
        finer, vectors = yield refinement(first)
        second = Basis(finer, vectors, wide, RESOLVED_AGAIN)
        energy, strengths = yield projection(second)
        outputs = [
            _output(second, energy, strengths, setting)._replace(doubt=output.doubt)
            if output.doubt
            else output
            for output, setting in zip(outputs, settings, strict=True)
        ]
    failed = "eigh failed; SVD of the Gram matrix" if bool(by_svd) else None
    return Calibration(
        sigma=sigma,
        gamma=torch.stack([output.gamma for output in outputs], dim=-2),
        wide=wide,
        fallback=[output.doubt or failed for output in outputs],
        outputs=outputs,
    )


class _Output(NamedTuple):
    """One setting: gamma (... x k) on the basis `vectors`; `coarse` if float32 will do."""

    vectors: Tensor
    gamma: Tensor
    scale: float
    coarse: bool
    doubt: str | None

    def transform(self) -> Tensor:
        vectors = self.vectors.float() if self.coarse else self.vectors
        scaled = vectors * (self.scale * self.gamma).to(vectors.dtype)[..., None, :]
        return scaled @ vectors.mT


def _output(found: Basis, energy: Tensor, strengths: Tensor, setting: Setting) -> _Output:
    """From the energies (... x k) and the strengths (... x K x k)."""
    alpha, scale = setting
    gamma = strengths.shape[-2] / (scale * strengths).clamp(min=alpha).sum(-2)
    gamma = gamma.masked_fill(~found.resolved, 1)
    whole, result = energy.sum(-1).sqrt(), (gamma.square() * energy).sum(-1).sqrt()

    # Amplified by up to 1 / alpha, unresolved directions could be more than nothing.
    unknown = energy.masked_fill(found.resolved, 0).sum(-1).sqrt()
    matter = bool((unknown > alpha * _NEGLIGIBLE * result).any())
    doubt = f"singular values below {RESOLVED:g} of the largest matter at alpha={alpha:g}"

    # In float32, what is amplified far more than the rest would drown it in rounding.
    coarse = bool((gamma.amax(-1) * whole <= _AMPLIFIED * result).all())
    return _Output(found.vectors, gamma, scale, coarse, doubt if matter else None)
