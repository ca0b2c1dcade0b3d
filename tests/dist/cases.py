"""What the tests with ranks have in common: checkpoints, recipes, smaller constants."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import torch

import distmerge
from distmerge import budget, engine, matrices, planner, statistic
from distmerge.document import Plain
from distmerge.pipeline import MergeResult, Options
from distmerge.tasks import merging
from tests.support.checkpoints import raw_file, write_checkpoint

Tensors = dict[str, torch.Tensor]
Recipe = dict[str, Plain]

BLOCK = 4096
"""Elements of a block where `cut` made it small: a page of bytes, the least that is aligned."""

_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.uint8: "U8",
}  # fmt: skip


def cut(*, block: int = BLOCK, job: int = 4 * BLOCK) -> None:
    """In this process and for good: blocks and jobs so small that small tensors have several."""
    mock.patch.object(engine, "BLOCK_ELEMENTS", block).start()
    mock.patch.object(statistic, "BLOCK_ELEMENTS", block).start()
    mock.patch.object(merging, "BLOCK_ELEMENTS", block).start()
    mock.patch.object(planner, "JOB_ELEMENTS", job).start()
    mock.patch.multiple(budget, BLOCK_ELEMENTS=block, JOB_ELEMENTS=job).start()
    mock.patch.object(matrices, "_LEAST_PANEL", 64).start()


def merge_cut(recipe: Recipe, out: Path, options: Options) -> MergeResult:
    """What a rank does in most tests: merge, with small blocks and jobs."""
    cut()
    return distmerge.merge(recipe, out, options=options)


def merge(recipe: Recipe, out: Path, options: Options) -> MergeResult:
    """The same with the true constants."""
    return distmerge.merge(recipe, out, options=options)


def average(folder: Path) -> Recipe:
    return {"merge_method": "average", "trajectory": {"checkpoints": str(folder / "step-*")}}


def write_steps(
    folder: Path, make: Callable[[torch.Generator], Tensors], *, count: int = 3, shards: int = 2
) -> Recipe:
    """`count` checkpoints of a run, and the recipe of their average."""
    for step in range(count):
        tensors = make(torch.Generator().manual_seed(step))
        write_checkpoint(folder / f"step-{step}", tensors, shards=shards, config={"n": 1})
    return average(folder)


def mixed(random: torch.Generator) -> Tensors:
    """All kinds of dtypes and shapes; sizes are odd, so most tensors begin inside a page."""
    return {
        "wide": torch.randn(523, 257, generator=random).bfloat16(),
        "half": torch.randn(10007, generator=random).half(),
        "full": torch.randn(99, 173, generator=random),
        "double": torch.randn(4099, generator=random, dtype=torch.float64),
        "positions": torch.arange(9001),
        "mask": torch.arange(777) % 3 == 0,
        "scalar": torch.randn((), generator=random),
        "empty": torch.empty(0, 5),
        "counter": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "last": torch.randn(40961, generator=random).bfloat16(),
    }


def small(random: torch.Generator) -> Tensors:
    """Two tensors, some 20 steps of a block."""
    return {
        "first": torch.randn(9 * BLOCK + 1, generator=random),
        "second": torch.randn(11 * BLOCK + 1, generator=random),
    }


def write_misaligned(folder: Path, *, count: int = 3) -> Recipe:
    """Checkpoints whose floats lie at odd addresses, which other writers than ours may do."""
    for step in range(count):
        random = torch.Generator().manual_seed(step)
        tensors = {
            "odd": torch.arange(5, dtype=torch.uint8),
            "single": torch.randn(3 * BLOCK + 1, generator=random),
            "brain": torch.randn(5 * BLOCK + 1, generator=random).bfloat16(),
            "odd.again": torch.arange(4094, dtype=torch.uint8) % 251,
            "double": torch.randn(2 * BLOCK + 1, generator=random, dtype=torch.float64),
        }
        raw_file(folder / f"step-{step}" / "model.safetensors", *_in_order(tensors))
    return average(folder)


def _in_order(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, object], bytes]:
    """Header and data of a file without a gap, in the order given."""
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def fingerprints(folder: Path) -> dict[str, str]:
    """The sha256 of every file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
