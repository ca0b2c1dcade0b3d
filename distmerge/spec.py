"""Frozen data that all layers share: dtypes, tensors on disk, tensors of the output, jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["float", "exact", "opaque"]

PAGE = 4096
"""Bytes. Data of a shard starts at a multiple of this, so that aligned writes are possible."""

BLOCK_ELEMENTS = 96 * 1024
"""Elements that a kernel works on at once: fits the L2 cache, and a whole number of pages in
every dtype. Blocks start at multiples of this in each tensor, whatever the budget or the number
of ranks, so that no last bit depends on where a vector loop ends."""

JOB_ELEMENTS = 64 * BLOCK_ELEMENTS
"""A tensor is cut into jobs of this many elements (12 MiB of bf16), whatever the ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DType:
    """A safetensors dtype. `kind`: float is averaged; exact (integers, bool) is copied and must
    agree; opaque (quantised, complex) can be listed but not merged."""

    name: str
    bits: int
    kind: Kind
    torch_name: str

    @property
    def itemsize(self) -> int:
        return self.bits // 8


def _dtypes() -> dict[str, DType]:
    rows: list[tuple[str, int, Kind, str]] = [
        ("F64", 64, "float", "float64"),
        ("F32", 32, "float", "float32"),
        ("F16", 16, "float", "float16"),
        ("BF16", 16, "float", "bfloat16"),
        ("BOOL", 8, "exact", "bool"),
        *(
            (f"{u}{b}", b, "exact", t + str(b))
            for u, t in (("I", "int"), ("U", "uint"))
            for b in (8, 16, 32, 64)
        ),
        ("F8_E5M2", 8, "opaque", "float8_e5m2"),
        ("F8_E4M3", 8, "opaque", "float8_e4m3fn"),
        ("F8_E8M0", 8, "opaque", "float8_e8m0fnu"),
        ("F8_E4M3FNUZ", 8, "opaque", "float8_e4m3fnuz"),
        ("F8_E5M2FNUZ", 8, "opaque", "float8_e5m2fnuz"),
        ("F6_E2M3", 6, "opaque", ""),
        ("F6_E3M2", 6, "opaque", ""),
        ("F4", 4, "opaque", "float4_e2m1fn_x2"),
        ("C64", 64, "opaque", "complex64"),
    ]
    return {n: DType(name=n, bits=b, kind=k, torch_name=t) for n, b, k, t in rows}


DTYPES = _dtypes()
FLOATS = {d.torch_name: d for d in DTYPES.values() if d.kind == "float"}
"""By the name that configs use: float32, bfloat16 ..."""


class TensorSpec(NamedTuple):
    """One tensor of one input: `nbytes` bytes at `start` of the checkpoint's file `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: int
    start: int
    nbytes: int


ELEMENTWISE = ("ties", "dare_linear", "dare_ties")
"""Methods that need a number of the whole tensor, but merge each element by itself."""


class Task(NamedTuple):
    """How one output merges the task vectors tau_i = inputs[i] - inputs[0] of a tensor.

    `method` is that of the recipe; `scale` (lambda) multiplies what it makes of them. `share` is
    the eta of star, the common share of iso_cts. With `alpha`, SVC calibrates the result.
    """

    method: str
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    rescale: bool
    seed: int
    share: float
    scale: float
    alpha: float | None

    @property
    def base(self) -> Task:
        """What is merged before it is scaled and calibrated."""
        return self._replace(scale=1.0, alpha=None)


class Cut(NamedTuple):
    """How a tensor falls into matrices.

    `transposed`: it is stored as (inputs, outputs). `parts`: how many outputs each part of a fused
    weight has; a single one where nothing is fused.
    """

    transposed: bool
    parts: tuple[int, ...]


class Rule(NamedTuple):
    """How a tensor comes from the inputs, in every output of the run.

    sum: output k is the sum of coefficients[k][i] * inputs[i], without the inputs whose
    coefficient is zero; trend: a sum whose coefficients the statistic pass has still to find;
    tasks: inputs[0] plus what tasks[k] makes of the others' task vectors, matrix by matrix where
    there is a `cut`; equal: the bytes of inputs[0], which all the others must share; copy: the
    bytes of inputs[0].
    `inputs` are positions in Plan.inputs, in ascending order for sums.
    """

    kind: Literal["sum", "trend", "tasks", "equal", "copy"]
    inputs: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...] = ()
    tasks: tuple[Task, ...] = ()
    cut: Cut | None = None


class OutputTensor(NamedTuple):
    """One tensor, in every output: where it lies (shard, byte offset in the file) and its rule."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    elements: int
    shard: int
    offset: int
    rule: Rule


class OutputShard(NamedTuple):
    """One file of an output; `header` ends where the data starts, at a multiple of PAGE."""

    name: str
    header: bytes
    size: int


class Job(NamedTuple):
    """Elements start..stop of one tensor (a position in Plan.tensors), for every output; of a
    tensor that falls into matrices, whole ones."""

    tensor: int
    start: int
    stop: int
