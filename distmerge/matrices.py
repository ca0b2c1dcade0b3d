"""Which tensors are matrices, where their outputs are, into what panels they fall. Pure.

A matrix is a weight of (outputs, inputs), a slice of stacked experts or a part of a fused weight.
Along its longer side it is cut into panels, whose size its shape fixes: whatever a method sums up
over panels, it sums up in the same order at any budget and any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from distmerge.spec import Cut

Shape = tuple[int, ...]

_VOCABULARY = (
    "*embed*", "*wte.*", "*wpe.*", "*lm_head*", "*score.weight", "*classifier*", "shared.weight",
    "output.weight", "*.output_layer.weight",
)  # fmt: skip
"""Names of embeddings, of output heads and of classifiers: no matrices of a layer."""

_CONV1D = ("*.c_attn.weight", "*.c_proj.weight", "*.c_fc.weight", "*.q_attn.weight")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED_EXPERTS = ("llama4", "llama4_text", "gpt_oss")

BATCH_ELEMENTS = 16 * 2**20
"""So many elements have small matrices together that a GPU takes at once: slices of a stack, or
tensors of one shape."""

_LEAST_PANEL = 512


class Facts(NamedTuple):
    """What the donor's config.json says of the model."""

    model_type: str = ""
    vocabulary: int = 0


class Matrix(NamedTuple):
    """`slices` matrices of one shape, `step` elements apart: of a stack, or one alone.

    Of the first, stored element (i, j) of `rows` x `columns` stands at start + i * stride + j of
    the tensor. Outputs are rows, or columns where it is `transposed`.
    """

    start: int
    rows: int
    columns: int
    stride: int
    transposed: bool
    slices: int = 1
    step: int = 0

    @property
    def outputs(self) -> int:
        return self.columns if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.transposed else self.columns

    @property
    def short(self) -> int:
        return min(self.rows, self.columns)

    @property
    def by_rows(self) -> bool:
        """Whether panels are stretches of stored rows, else of columns."""
        return self.rows > self.columns or (self.rows == self.columns and self.transposed)


class Piece(NamedTuple):
    """Rows `top`..`bottom`, columns `left`..`right` of a matrix as it is stored."""

    top: int
    bottom: int
    left: int
    right: int


def is_matrix(name: str, shape: Shape, facts: Facts) -> bool:
    """Whether a tensor is calibrated, or merged as a matrix, unless the recipe says otherwise:
    2-D weights and stacks of experts, but not embeddings, output heads or convolutions."""
    if len(shape) == 3:
        return "expert" in name and min(shape) > 1
    if len(shape) != 2 or min(shape) < 2 or not name.endswith(("weight", "_proj", "kernel")):
        return False
    if facts.vocabulary > 1 and facts.vocabulary in shape:
        return False
    return not any(fnmatchcase(name, pattern) for pattern in _VOCABULARY)


def is_transposed(name: str, shape: Shape, facts: Facts) -> bool:
    """Whether a weight is stored as (inputs, outputs): GPT-2's Conv1D, and some stacks."""
    if len(shape) == 3:
        return facts.model_type in _TRANSPOSED_EXPERTS
    of_conv1d = any(fnmatchcase(f".{name}", pattern) for pattern in _CONV1D)
    return facts.model_type in _CONV1D_MODELS and of_conv1d


def matrices(shape: Shape, cut: Cut, start: int, stop: int) -> list[Matrix]:
    """The matrices between elements `start` and `stop` of a tensor, which `jobs` has chosen."""
    rows, columns = shape[-2:]
    size = rows * columns
    slices = (stop - start) // size if len(shape) == 3 else 1
    found: list[Matrix] = []
    first = start // size * size
    for part in cut.parts:
        if cut.transposed:
            found.append(Matrix(first, rows, part, columns, True, slices, size))
            first += part
        else:
            found.append(Matrix(first, part, columns, columns, False, slices, size))
            first += part * columns
    return [matrix for matrix in found if start <= matrix.start < stop]


def jobs(shape: Shape, cut: Cut | None) -> Iterator[tuple[int, int]]:
    """First and last-plus-one elements of the jobs into which a tensor falls: as few matrices as
    are contiguous, or small slices together; the whole tensor where there are none."""
    rows, columns = shape[-2:] if cut else (0, 0)
    if cut is None or (len(shape) == 2 and cut.transposed):
        yield 0, math.prod(shape)
    elif len(shape) == 3:
        slices = max(1, BATCH_ELEMENTS // (rows * columns))
        for first in range(0, shape[0], slices):
            last = min(first + slices, shape[0])
            yield first * rows * columns, last * rows * columns
    else:
        first = 0
        for part in cut.parts:
            yield first, first + part * columns
            first += part * columns


def alone(matrix: Matrix) -> list[Matrix]:
    """The slices of a batch, each by itself."""
    return [
        matrix._replace(start=matrix.start + at * matrix.step, slices=1)
        for at in range(matrix.slices)
    ]


def panels(matrix: Matrix) -> list[Piece]:
    """The panels of a matrix, in order: of equal size but the last."""
    length = matrix.rows if matrix.by_rows else matrix.columns
    wanted = max(matrix.short // 2, _LEAST_PANEL)
    size = -(-length // max(1, length // wanted))
    size = -(-size // 64) * 64
    ends = [(first, min(first + size, length)) for first in range(0, length, size)]
    if matrix.by_rows:
        return [Piece(first, last, 0, matrix.columns) for first, last in ends]
    return [Piece(0, matrix.rows, first, last) for first, last in ends]


def flops(matrix: Matrix, tasks: int) -> float:
    """Roughly the floating-point operations, of float32, that a method takes for a matrix."""
    short, elements = matrix.short, matrix.rows * matrix.columns
    return matrix.slices * (2.0 * short * elements * (tasks + 6) + 20.0 * short**3)


def working_bytes(matrix: Matrix, tasks: int, itemsize: int) -> int:
    """Roughly the memory that a method takes for a matrix, beyond what it merges: a panel of every
    task, and what is small squared."""
    short = matrix.short
    longest = max((p.bottom - p.top) * (p.right - p.left) for p in panels(matrix))
    panel = longest * ((tasks + 1) * itemsize + (tasks + 3) * 4)
    return matrix.slices * (panel + short * short * (64 + 24 * tasks)) + 2 * 8 * 512 * short
