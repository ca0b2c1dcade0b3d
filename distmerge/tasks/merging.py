"""What the outputs of one job on task vectors are: first what its methods find, then every piece.

elements: thresholds and norms of the tensor -> each step of each output
matrices: base merger, then SVC, of each matrix -> each panel of each output
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch

from distmerge.engine import overflow
from distmerge.errors import NonFiniteError, RunError
from distmerge.matrices import Matrix, Piece, panels
from distmerge.methods import masks
from distmerge.methods.average import count_nonfinite
from distmerge.methods.calibrate import Calibration, Setting, calibrate
from distmerge.methods.spectral import Merge, iso_c, iso_cts, star, tsv_m
from distmerge.methods.stages import Method, Panel
from distmerge.methods.task_vectors import Block, Known, Merger, TaskVectors
from distmerge.planner import Plan
from distmerge.spec import BLOCK_ELEMENTS, ELEMENTWISE, Task
from distmerge.stream import Step
from distmerge.tasks.given import Given, Tensors

T = TypeVar("T")

Panels = Callable[[int], Panel]
"""A panel by its number."""


class Driver(Protocol):
    """Carries out methods over panels that lie on one rank, or on all."""

    def drive(self, method: Method[T], count: int, panel: Panels) -> T: ...

    def whole(self, find: Callable[[], Tensors]) -> Tensors:
        """What takes a pass over the whole tensor, which one rank makes."""


class Spectrum(NamedTuple):
    """What is reported of one matrix (of the first of a stack): singular values before, float64,
    and gamma by output; `fallback` says what was done where the usual way was not good enough."""

    sigma: torch.Tensor
    gammas: dict[int, torch.Tensor]
    fallback: str | None


def merger(task: Task, tensor: str) -> Merger:
    """The element-wise merger of `task`, with its random masks for `tensor`."""
    random = task.method.startswith("dare")
    keys = [masks.key(task.seed, i, tensor) for i in range(len(task.weights))] if random else []
    return Merger(
        method=task.method if task.method in ELEMENTWISE else "task_arithmetic",  # type: ignore[arg-type]
        weights=task.weights,
        densities=task.densities,
        normalize=task.normalize,
        rescale=task.rescale,
        keys=tuple(keys),
    )


class Elements:
    """A job whose outputs are merged element by element."""

    def __init__(self, plan: Plan, given: Given, driver: Driver, device: torch.device):
        tensor = plan.tensors[plan.jobs[given.number].tensor]
        self._given, self._device = given, device
        self._tasks = tensor.rule.tasks
        self._vectors = TaskVectors(device)
        base = plan.inputs[tensor.rule.inputs[0]].tensors[tensor.name]
        self._wide = torch.float64 if base.dtype.name == "F64" else torch.float32
        self._merged = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device=device)
        self._result = torch.empty(BLOCK_ELEMENTS, dtype=self._wide, device=device)
        self._mergers = {task.base: merger(task, tensor.name) for task in self._tasks}
        mergers = list(self._mergers.values())
        searching = any(found.method in ELEMENTWISE for found in mergers)
        find = partial(self._vectors.find, mergers, self._blocks, tensor.elements)
        known: list[Known] = driver.whole(find) if searching else find()
        self._known = dict(zip(mergers, known, strict=True))

    def _blocks(self) -> Iterator[Block]:
        for step, inputs in self._given.steps():
            yield from self.flat(step, inputs)

    def flat(self, step: Step, inputs: Tensors) -> Iterator[Block]:
        """The blocks of a step, which do not depend on its size."""
        for start in range(0, step.stop - step.start, BLOCK_ELEMENTS):
            parts = [self._moved(x[start : start + BLOCK_ELEMENTS][None]) for x in inputs]
            yield Block(step.start + start, parts[0].shape[1], parts[0], parts[1:])

    def _moved(self, x: torch.Tensor) -> torch.Tensor:
        return moved(x, self._device)

    def merge(self, base: Task, block: Block, out: torch.Tensor) -> torch.Tensor:
        """out = the merged task vectors of `block`; a scalar that is finite if all went well."""
        found = self._mergers[base]
        return self._vectors.merge(found, self._known[found], block, out)

    def results(self, step: Step, inputs: Tensors, outs: Sequence[torch.Tensor]) -> list[bool]:
        """Fill `outs`, a step of every output, 1-D; whether each went well."""
        checks: list[list[torch.Tensor]] = [[] for _ in outs]
        for block in self.flat(step, inputs):
            first = block.start - step.start
            shape = block.base.shape
            for base in self._mergers:
                merged = _part(self._merged, shape)
                check = self.merge(base, block, merged)
                for number in (n for n, task in enumerate(self._tasks) if task.base == base):
                    result = _part(self._result, shape)
                    torch.mul(merged, self._tasks[number].scale, out=result).add_(block.base)
                    out = outs[number][first : first + result.numel()]
                    checks[number] += [check.cpu(), out.copy_(result[0]).sum(dtype=result.dtype)]
        return [bool(torch.stack(each).isfinite().all()) for each in checks]


def _part(buffer: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return buffer[: shape.numel()].view(shape)


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on `device`; the loader has brought it there if there was room for all of a job."""
    return x if x.device == device else x.to(device)


def added(base: torch.Tensor, delta: torch.Tensor, scale: float) -> torch.Tensor:
    """base + scale * delta in float32, or float64 where the base is."""
    wide = base.dtype if base.dtype == torch.float64 else torch.float32
    return torch.add(base.to(wide), delta.to(wide), alpha=scale)


@dataclass(slots=True)
class _Solved:
    """One matrix: by base merger how its panels are merged, and what calibrates them."""

    merges: dict[Task, Merge | None] = field(default_factory=dict)
    calibrations: dict[Task, tuple[Calibration, list[int]]] = field(default_factory=dict)


class MatrixMerge:
    """One matrix (or batch of them) of a job, solved by `driver` when it is made.

    `products` are, by panel that this rank has seen, those of the task vectors with each other: of
    the first with all from itself on, then of the second ..., for each matrix of a batch. `note` is
    told with the fall-backs.
    Raises NonFiniteError where an input holds NaN or Inf, RunError where a matrix can't be
    decomposed.
    """

    def __init__(
        self, plan: Plan, given: Given, matrix: Matrix, elements: Elements, driver: Driver,
        device: torch.device, note: str | None = None,
    ):  # fmt: skip
        self._plan, self._given, self.matrix = plan, given, matrix
        self._elements, self._device, self._note = elements, device, note
        self.tensor = plan.tensors[plan.jobs[given.number].tensor]
        self.pieces = panels(matrix)
        self._now: tuple[int, Tensors] | None = None
        self._checked: set[int] = set()
        self.products: dict[int, torch.Tensor] = {}
        self._solved = _Solved()
        try:
            for base in dict.fromkeys(task.base for task in self.tensor.rule.tasks):
                self._solve(base, driver)
        except ArithmeticError as error:
            raise RunError(f"{self.tensor.name}: {error}") from error

    def _solve(self, base: Task, driver: Driver) -> None:
        m, n, count = self.matrix.outputs, self.matrix.inputs, len(self.pieces)
        method = _whole(base, m, n)
        merge = None
        if method is not None:
            merge = driver.drive(method, count, lambda number: self.panel(number, None))
        self._solved.merges[base] = merge
        tasks = self.tensor.rule.tasks
        own = [i for i, task in enumerate(tasks) if task.base == base and task.alpha is not None]
        if own:
            settings = [Setting(tasks[i].alpha or 0.0, tasks[i].scale) for i in own]
            calibration = driver.drive(
                calibrate(m, n, settings), count, lambda number: self.panel(number, base)
            )
            self._solved.calibrations[base] = calibration, own

    def panel(self, number: int, base: Task | None) -> Panel:
        """A panel of the task vectors, with what `base` makes of them if it is given."""
        stored = self._stored(number)
        first = stored[0]
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        zero = first.to(wide)
        deltas = [self._turned((x.to(wide) - zero).float().contiguous()) for x in stored[1:]]
        if number not in self._checked:
            self._look_at(number, stored, deltas)
        if base is None:
            return Panel(deltas, deltas[0][..., :0])
        return Panel(deltas, self._merged(number, base, stored, deltas))

    def _stored(self, number: int) -> Tensors:
        """A panel of every input, as it is stored; kept until another is asked for."""
        if self._now is None or self._now[0] != number:
            inputs = self._given.cutout(self.matrix, self.pieces[number])
            self._now = number, [moved(x, self._device) for x in inputs]
        return self._now[1]

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs first; a batch dimension only where there is a batch."""
        x = x.mT if self.matrix.transposed else x
        return x[0] if self.matrix.slices == 1 else x

    def _look_at(self, number: int, stored: Tensors, deltas: Tensors) -> None:
        """Once for each panel: is all finite, and how alike are the tasks?"""
        flat = [delta.reshape(self.matrix.slices, -1) for delta in deltas]
        pairs = itertools.combinations_with_replacement(flat, 2)
        products = torch.stack([torch.stack([*map(_dot, a, b)]) for a, b in pairs]).cpu()
        if not bool(products.isfinite().all()):
            for place, x in enumerate(stored):
                if count := count_nonfinite(x):
                    raise self._nonfinite(place, count, self.pieces[number])
        self.products[number] = products
        self._checked.add(number)

    def _nonfinite(self, place: int, count: int, piece: Piece) -> NonFiniteError:
        source = self._plan.inputs[self.tensor.rule.inputs[place]]
        file = source.files[source.tensors[self.tensor.name].file].path
        calibrated = self.tensor.rule.tasks[0].alpha is not None
        remedy = ", or name the tensor under calibrate.exclude" if calibrated else ""
        return NonFiniteError(
            f"{file}: tensor {self.tensor.name} holds {count} NaN or Inf in rows {piece.top} to "
            f"{piece.bottom - 1}, columns {piece.left} to {piece.right - 1}: it has no singular "
            f"values; mend the input{remedy}"
        )

    def _merged(self, number: int, base: Task, stored: Tensors, deltas: Tensors) -> torch.Tensor:
        merge = self._solved.merges[base]
        if merge is not None:
            return merge.apply(deltas)
        piece, matrix = self.pieces[number], self.matrix
        out = torch.empty(stored[0].shape, device=self._device)
        for at in range(matrix.slices):
            start = matrix.start + at * matrix.step + piece.top * matrix.stride + piece.left
            block = Block(start, matrix.stride, stored[0][at], [x[at] for x in stored[1:]])
            self._elements.merge(base, block, out[at])
        return self._turned(out)

    def result(self, number: int, output: int) -> torch.Tensor:
        """A panel of an output, as it is stored: slices x rows x columns, float32 or float64."""
        task = self.tensor.rule.tasks[output]
        panel = self.panel(number, task.base)
        if task.alpha is None:
            delta, scale = panel.merged, task.scale
        else:
            calibration, own = self._solved.calibrations[task.base]
            delta, scale = calibration.apply(panel, own.index(output)), 1.0
        delta = delta[None] if self.matrix.slices == 1 else delta
        return added(self._stored(number)[0], delta.mT if self.matrix.transposed else delta, scale)

    def rounded(
        self, number: int, output: int, *, allow_nonfinite: bool
    ) -> tuple[torch.Tensor, int]:
        """The same on the CPU in the output's dtype, and how many values are not finite.

        Raises NonFiniteError where some are not, unless that is allowed.
        """
        dtype = getattr(torch, self.tensor.dtype.torch_name)
        found = self.result(number, output).to(dtype).cpu()
        if bool(found.isfinite().all()):
            return found, 0
        count = count_nonfinite(found)
        if not allow_nonfinite:
            raise overflow(self._plan, self.tensor, output, count)
        return found, count

    def spectrum(self, place: int | None = None) -> Spectrum:
        """What is reported of it, or of the matrix at `place` in the batch."""
        gammas: dict[int, torch.Tensor] = {}
        sigma = torch.empty(0)
        fallbacks = [self._note]
        for calibration, own in self._solved.calibrations.values():
            one = (...,) if place is None else (place, ...)
            sigma, gamma = calibration.sigma[one], calibration.gamma[one]
            gammas |= {i: gamma[..., n, :] for n, i in enumerate(own)}
            fallbacks += calibration.fallback
        fallbacks += [merge.fallback for merge in self._solved.merges.values() if merge]
        told = "; ".join(dict.fromkeys(f for f in fallbacks if f))
        return Spectrum(sigma, gammas, told or None)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In pieces, each in float32 and their sum in float64."""
    whole = a.numel() // BLOCK_ELEMENTS * BLOCK_ELEMENTS
    rows, others = (x[:whole].view(-1, BLOCK_ELEMENTS) for x in (a, b))
    parts: torch.Tensor = torch.linalg.vecdot(rows, others)
    return parts.double().sum() + torch.dot(a[whole:], b[whole:]).double()


def _whole(base: Task, m: int, n: int) -> Method[Merge] | None:
    """The method of whole matrices that merges them, if it is one."""
    count = len(base.weights)
    if base.method == "iso_cts":
        return iso_cts(m, n, count, common_share=base.share)
    if base.method == "star":
        return star(m, n, count, eta=base.share)
    simple = {"tsv_m": tsv_m, "iso_c": iso_c}
    return simple[base.method](m, n, count) if base.method in simple else None
