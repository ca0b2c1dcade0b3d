"""The statistic pass: every rank streams its jobs once and keeps products of the checkpoints.

The sum over all jobs must not depend on which rank had which. So each job's products are a float64
sum in a fixed order, and the jobs' sums are added without any rounding: as whole multiples of the
smallest float64, in Python's integers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import torch

from distmerge.dist import World
from distmerge.errors import NonFiniteError
from distmerge.gram import Gram, modules
from distmerge.log import LOGGER
from distmerge.methods.average import count_nonfinite
from distmerge.methods.extrapolate import GRAM_ELEMENTS, add_gram
from distmerge.output import replace_text
from distmerge.planner import Plan
from distmerge.sources.reader import Inputs
from distmerge.spec import BLOCK_ELEMENTS, OutputTensor
from distmerge.stream import Slot, Step, Stream, input_dtypes, nonfinite_input, typed

_SMALLEST = 1074
"""Every finite float64 is a whole multiple of 2 ** -_SMALLEST."""

SNAPSHOT_SECONDS = 20.0
"""Between two snapshots of a rank: a kill loses no more than this."""

_PREFIX = "summed-"

Sums = dict[str, list[int]]
"""By module: the products of every pair of checkpoints (s <= t, row by row), exact."""


def exact(value: float) -> int:
    """`value` in units of 2 ** -1074."""
    numerator, denominator = value.as_integer_ratio()
    return numerator << (_SMALLEST + 1 - denominator.bit_length())


def rounded(units: int) -> float:
    """The float64 nearest to so many units: dividing integers rounds once.

    Raises NonFiniteError.
    """
    try:
        return units / (1 << _SMALLEST)
    except OverflowError as error:
        raise NonFiniteError("the sum of products of differences overflows float64") from error


class Snapshots:
    """Keeps what a rank has summed up, now and then, in a file of its own in `folder`."""

    def __init__(self, folder: Path, name: str):
        self._path = folder / f"{_PREFIX}{name}.json"
        self._last = time.monotonic()

    def take(self, jobs: Sequence[int], sums: Sums, *, final: bool = False) -> None:
        """Write it all anew if it is time, or if the rank is through."""
        if final or time.monotonic() - self._last >= SNAPSHOT_SECONDS:
            # JSON would refuse integers of so many digits to be read again.
            content = {module: [f"{units:x}" for units in pairs] for module, pairs in sums.items()}
            replace_text(self._path, json.dumps({"jobs": list(jobs), "sums": content}))
            self._last = time.monotonic()


class Part(NamedTuple):
    """The exact sums of some jobs."""

    jobs: list[int]
    sums: Sums


def read_snapshots(folder: Path) -> list[Part]:
    """What the ranks of earlier attempts had summed up; no job is in two of them.

    A power cut may leave a file empty or cut short: its jobs are done again.
    """
    parts: list[Part] = []
    known: set[int] = set()
    for path in sorted(folder.glob(f"{_PREFIX}*.json")):
        try:
            found = json.loads(path.read_bytes())
            jobs = [int(job) for job in found["jobs"]]
            sums = {m: [int(units, 16) for units in pairs] for m, pairs in found["sums"].items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            LOGGER.warning("%s: it is damaged; what it held is done again", path)
            continue
        if known.isdisjoint(jobs):
            parts.append(Part(jobs, sums))
            known.update(jobs)
    return parts


class GramPass:
    """Runs this rank's jobs of the statistic pass."""

    def __init__(self, plan: Plan, *, elements: int, device: torch.device):
        self._plan, self._device = plan, device
        # A GPU wants larger pieces; both are fixed, so the bytes are those of one kind of chip.
        on_gpu = device.type == "cuda"
        self._piece = BLOCK_ELEMENTS if on_gpu else min(GRAM_ELEMENTS, BLOCK_ELEMENTS)
        self._stream = Stream(plan, elements=elements, pinned=on_gpu, writes=False)
        names = [tensor.name for tensor in trend_tensors(plan)]
        self._count = checkpoints(plan)
        self._module = dict(zip(names, modules(names, self._count), strict=True))

    def run(
        self, jobs: Sequence[int], inputs: Inputs, world: World, snapshots: Snapshots | None
    ) -> Sums:
        """The exact sums of this rank's jobs. Raises what goes wrong in reading, and
        NonFiniteError."""
        sums: Sums = {}
        done = 0
        products = self._zeros()
        with closing(self._stream.run(jobs, inputs, world)) as loaded:
            for step, slot in loaded:
                self._add(step, slot, products)
                if step.last:
                    _add_exact(sums, self._module[step.tensor.name], products)
                    products = self._zeros()
                    done += 1
                    if snapshots is not None:
                        snapshots.take(jobs[:done], sums)
        if snapshots is not None:
            snapshots.take(jobs, sums, final=True)
        return sums

    @property
    def read_bytes(self) -> int:
        return self._stream.read_bytes

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(self._count, self._count, dtype=torch.float64, device=self._device)

    def _add(self, step: Step, slot: Slot, products: torch.Tensor) -> None:
        dtypes = input_dtypes(self._plan, step.tensor)
        given = [typed(raw, dtype) for raw, dtype in zip(slot.raw, dtypes, strict=True)]
        moved = [x.to(self._device, non_blocking=True) for x in given]
        add_gram(moved, products, elements=self._piece)
        if not bool(products.isfinite().all()):
            raise _nonfinite(self._plan, step, given)


def trend_tensors(plan: Plan) -> Iterator[OutputTensor]:
    """The tensors that the statistic covers."""
    return (tensor for tensor in plan.tensors if tensor.rule.kind == "trend")


def checkpoints(plan: Plan) -> int:
    """How many checkpoints the statistic compares."""
    return len(next(trend_tensors(plan)).rule.inputs)


def _add_exact(sums: Sums, module: str, products: torch.Tensor) -> None:
    rows = products.tolist()
    pairs = [exact(value) for s, row in enumerate(rows) for value in row[s:]]
    before = sums.get(module)
    sums[module] = pairs if before is None else [a + b for a, b in zip(before, pairs, strict=True)]


def _nonfinite(plan: Plan, step: Step, given: Sequence[torch.Tensor]) -> NonFiniteError:
    """No direction can be found with a NaN, so --allow-nonfinite does not help here."""
    remedy = "leave the checkpoint out, or the tensor with parameters.exclude"
    for place, x in enumerate(given):
        if count := count_nonfinite(x):
            return nonfinite_input(plan, step, place, count, remedy=remedy)
    return NonFiniteError(f"{step.tensor.name}: products of differences overflow float64")


def total(plan: Plan, parts: Sequence[Sums]) -> Gram:
    """The matrices from the sums of all ranks: the same whatever rank had which job."""
    names = [tensor.name for tensor in trend_tensors(plan)]
    count = checkpoints(plan)
    sizes: dict[str, int] = {}
    for tensor, module in zip(trend_tensors(plan), modules(names, count), strict=True):
        sizes[module] = sizes.get(module, 0) + tensor.elements
    nothing = [0] * (count * (count + 1) // 2)
    by_module = {
        module: _added([part[module] for part in parts if module in part] or [nothing])
        for module in sizes
    }
    return Gram(
        matrix=_matrix(_added(list(by_module.values())), count),
        by_module=torch.stack([_matrix(pairs, count) for pairs in by_module.values()]),
        modules=tuple(sizes),
        elements=tuple(sizes.values()),
    )


def _added(parts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(values) for values in zip(*parts, strict=True)]


def _matrix(pairs: Sequence[int], count: int) -> torch.Tensor:
    """Symmetric, from the products of every pair s <= t."""
    matrix = torch.zeros(count, count, dtype=torch.float64)
    row, column = torch.triu_indices(count, count)
    values = torch.tensor([rounded(units) for units in pairs], dtype=torch.float64)
    matrix[row, column] = values
    matrix[column, row] = values
    return matrix
