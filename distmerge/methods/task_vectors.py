"""Task arithmetic, TIES and DARE, element by element, on pieces of a tensor that fit the cache.

A task vector is delta_i = theta_i - theta_0 in float32. What a merger makes of them, before its
scale lambda, is (as mergekit has it)

    task_arithmetic  sum_i w_i delta_i                                     (arXiv 2212.04089)
    ties             keep the int(density * n) largest |delta_i| (one at least), elect the sign of
                     sum_i w_i delta_i, add up what agrees with it          (arXiv 2306.01708)
    dare_linear      sum_i w_i r_i m_i delta_i, m_i a random mask           (arXiv 2311.03099)
    dare_ties        the same with elected signs

With `normalize` a sum is divided by that of its weights (with signs: of those that agree, element
by element). With `rescale` what is kept of a task vector gets the L1 norm that the whole had: that
is r_i. What a merger has to know of the whole tensor beforehand, `find` finds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from math import inf
from typing import Literal, NamedTuple

import torch

from distmerge.methods import masks
from distmerge.methods.thresholds import Piece, Target, Threshold, largest

Method = Literal["task_arithmetic", "ties", "dare_linear", "dare_ties"]


class Merger(NamedTuple):
    """One output. Weights, densities and keys (of random masks, see masks.key) are by task."""

    method: Method
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    normalize: bool
    rescale: bool
    keys: tuple[int, ...] = ()


class Block(NamedTuple):
    """A stretch of a tensor: element (i, j) stands at start + i * stride + j of the flattened one.

    `base` and the `tasks` are rows x columns, in the dtypes of the files.
    """

    start: int
    stride: int
    base: torch.Tensor
    tasks: Sequence[torch.Tensor]


Blocks = Callable[[], Iterator[Block]]
"""A pass over a tensor in flat blocks (1 x n), in order: the same in each pass."""

Known = torch.Tensor
"""What a merger knows of a tensor: tasks x 4, float64, on the CPU. By task: magnitudes up to the
first number are dropped before index (the second number) of the flattened tensor, magnitudes up to
the third from there on; then r_i."""

_PIECE = 48 * 1024
"""Elements that are worked on at once: the buffers for a few tasks fit the L2 cache."""

_LARGE_PIECE = 1 << 21
"""The same on other devices, where starting a kernel costs more than so few elements."""

_SAMPLES = 1 << 17
_RUN = 16
"""Neighbours that are sampled together: half a cache line of 16-bit floats."""

_SMALL = 1 << 18
"""A tensor of fewer elements is not worth a sample."""

_BASE, _WORK, _SHARE, _TERMS = range(4)
"""Numbers of buffers: the terms' come last."""

_SIGN = -(1 << 31)


class TaskVectors:
    """Merges the task vectors of tensors, with buffers of its own: one for each thread.

    What it makes does not depend on how a tensor is cut into blocks for `merge`.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._piece = _PIECE if device.type == "cpu" else _LARGE_PIECE
        self._buffers: list[torch.Tensor] = []
        self._views = lru_cache(maxsize=256)(self._view)  # making one costs as much as adding up

    def find(self, mergers: Sequence[Merger], blocks: Blocks, elements: int) -> list[Known]:
        """What each merger has to know of a tensor of so many `elements`: in passes over its
        blocks that all mergers share (none, where every density is 1)."""
        targets = dict.fromkeys(
            target for merger in mergers for target in _targets(merger, elements) if target
        )
        found = self._largest(list(targets), blocks, elements) if targets else {}
        known = [_known(merger, found, elements) for merger in mergers]
        self._rescale(mergers, known, blocks)
        return known

    def merge(self, merger: Merger, known: Known, block: Block, out: torch.Tensor) -> torch.Tensor:
        """out (rows x columns, float32) = the merged task vectors of a block.

        Returns a scalar that is finite if the deltas are (and their sum does not overflow).
        """
        combine = self._elect if merger.method in ("ties", "dare_ties") else _add
        rows, checks = known.tolist(), []
        for piece, place in self._pieces(block):
            base = self._like(_BASE, piece.base).copy_(piece.base)
            terms = []
            for i, (task, row) in enumerate(zip(piece.tasks, rows, strict=True)):
                term = self._delta(i, task, base)
                checks.append(term.sum())
                self._sparsify(merger, i, row, piece, term, out=term)
                factor = merger.weights[i] * row[-1]
                terms.append(term if factor == 1 else term.mul_(factor))
            combine(merger, terms, out[place])
        return torch.stack(checks).sum()

    def _elect(self, merger: Merger, terms: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out = the sum of the terms whose sign is that of the sum of all; changes the terms."""
        total = self._like(_WORK, out).copy_(terms[0])
        for term in terms[1:]:
            total.add_(term)
        # Its sign, as bits: it turns what agrees positive, and all else negative.
        signs = total.view(torch.int32).bitwise_and_(_SIGN)
        weight = self._like(_SHARE, out).zero_()
        out.zero_()
        for term, each in zip(terms, merger.weights, strict=True):
            term.view(torch.int32).bitwise_xor_(signs)
            out.add_(term.relu_())
            if merger.normalize:
                weight.add_(term.gt_(0), alpha=each)
        out.view(torch.int32).bitwise_xor_(signs)
        if merger.normalize:
            out.div_(weight.add_(torch.eq(weight, 0, out=terms[0])))

    def _largest(
        self, targets: Sequence[Target], blocks: Blocks, elements: int
    ) -> dict[Target, Threshold]:
        tasks = sorted({target.task for target in targets})
        sampled = self._device.type == "cpu" and elements >= _SMALL
        samples = _sample(tasks, blocks, elements) if sampled else {}

        def magnitudes(wanted: Callable[[int], Collection[int]]) -> Iterator[Piece]:
            for piece, task, values in self._magnitudes(wanted, blocks):
                yield Piece(task, piece.start, values.view(-1))

        return largest(targets, magnitudes, samples, elements)

    def _magnitudes(
        self, wanted: Callable[[int], Collection[int]], blocks: Blocks
    ) -> Iterator[tuple[Block, int, torch.Tensor]]:
        """|delta_i| piece by piece and, in each, for the tasks wanted at its start."""
        for block in blocks():
            for piece, _ in self._pieces(block):
                if not (tasks := wanted(piece.start)):
                    continue
                base = self._like(_BASE, piece.base).copy_(piece.base)
                for i in tasks:
                    yield piece, i, self._delta(i, piece.tasks[i], base).abs_()

    def _rescale(self, mergers: Sequence[Merger], known: Sequence[Known], blocks: Blocks) -> None:
        """Find the r_i. Terms of the norms are float64 sums of pieces, added in order."""
        uses = [
            (k, i)
            for k, merger in enumerate(mergers)
            for i, density in enumerate(merger.densities)
            if merger.rescale and merger.method != "task_arithmetic" and density < 1
        ]
        if not uses:
            return
        tasks = sorted({i for _, i in uses})
        whole, kept = dict.fromkeys(tasks, 0.0), dict.fromkeys(uses, 0.0)
        rows = [each.tolist() for each in known]
        for piece, task, values in self._magnitudes(lambda _: tasks, blocks):
            whole[task] += float(values.sum(dtype=torch.float64))
            left = self._like(_WORK, values)
            for k, i in uses:
                if i == task:
                    self._sparsify(mergers[k], i, rows[k][i], piece, values, out=left)
                    kept[k, i] += float(left.sum(dtype=torch.float64))
        for (k, i), norm in kept.items():
            known[k][i, -1] = whole[i] / norm if norm else 1.0

    def _sparsify(
        self, merger: Merger, i: int, row: Sequence[float], piece: Block, x: torch.Tensor,
        *, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """out = what the merger keeps of task i in a piece, zeros elsewhere; `out` may be `x`."""
        if merger.densities[i] >= 1 or merger.method == "task_arithmetic":
            if out is not x:
                out.copy_(x)
        elif merger.method == "ties":
            _cut(row, piece, x, out)
        elif merger.densities[i] <= 0:
            out.zero_()
        else:
            mask = self._like(_SHARE, x)
            masks.fill(
                mask, merger.keys[i], merger.densities[i], start=piece.start, stride=piece.stride
            )
            torch.mul(x, mask, out=out)

    def _delta(self, i: int, task: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return self._like(_TERMS + i, task).copy_(task).sub_(base)

    def _like(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """A buffer in the shape of `x`; there are as many as are asked for."""
        return self._views(number, *x.shape)

    def _view(self, number: int, rows: int, columns: int) -> torch.Tensor:
        while len(self._buffers) <= number:
            self._buffers.append(torch.empty(self._piece, device=self._device))
        return self._buffers[number][: rows * columns].view(rows, columns)

    def _pieces(self, block: Block) -> Iterator[tuple[Block, tuple[slice, slice]]]:
        """A block in stretches that fit the buffers, and where in the block they are."""
        rows, columns = block.base.shape
        if rows * columns <= self._piece:
            yield block, (slice(None), slice(None))
            return
        width = min(columns, self._piece)
        height = max(1, self._piece // max(1, width))
        for top in range(0, rows, height):
            for left in range(0, columns, width):
                place = slice(top, top + height), slice(left, left + width)
                start = block.start + top * block.stride + left
                tasks = [task[place] for task in block.tasks]
                yield Block(start, block.stride, block.base[place], tasks), place


def _targets(merger: Merger, elements: int) -> list[Target | None]:
    """By task: how many magnitudes are kept, where that has to be found."""
    return [
        Target(i, max(1, int(density * elements)))
        if merger.method == "ties" and 0 < density < 1
        else None
        for i, density in enumerate(merger.densities)
    ]


def _known(merger: Merger, found: dict[Target, Threshold], elements: int) -> Known:
    rows = []
    for target, density in zip(_targets(merger, elements), merger.densities, strict=True):
        kept = Threshold(0.0 if density > 0 else inf, 0) if target is None else found[target]
        rows.append((kept.below, kept.limit, kept.value, 1.0))
    return torch.tensor(rows, dtype=torch.float64)


def _sample(tasks: Iterable[int], blocks: Blocks, elements: int) -> dict[int, torch.Tensor]:
    """Some magnitudes of each task, evenly spread over all rows and columns."""
    step = max(_RUN, _RUN * elements // _SAMPLES) | 1  # odd, so in other columns in each row
    found: dict[int, list[torch.Tensor]] = {i: [] for i in tasks}
    for block in blocks():
        first = -block.start % step
        if first + _RUN > block.base.numel():
            continue
        base = block.base[0, first:].unfold(0, _RUN, step).float()
        for i, parts in found.items():
            runs = block.tasks[i][0, first:].unfold(0, _RUN, step).float()
            parts.append(torch.sub(runs, base).abs_().flatten())
    return {i: torch.cat(parts) for i, parts in found.items()}


def _cut(row: Sequence[float], piece: Block, x: torch.Tensor, out: torch.Tensor) -> None:
    """out = x without the magnitudes that are too small."""
    before, limit, after, _ = row
    rows, columns = x.shape
    reach = int(limit) - piece.start
    if reach >= (rows - 1) * piece.stride + columns:
        torch.hardshrink(x, before, out=out)
    elif reach <= 0:
        torch.hardshrink(x, after, out=out)
    elif rows == 1:
        torch.hardshrink(x[:, :reach], before, out=out[:, :reach])
        torch.hardshrink(x[:, reach:], after, out=out[:, reach:])
    else:
        for i in range(rows):
            part = piece._replace(start=piece.start + i * piece.stride)
            _cut(row, part, x[i : i + 1], out[i : i + 1])


def _add(merger: Merger, terms: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """out = the sum of the terms."""
    out.copy_(terms[0])
    for term in terms[1:]:
        out.add_(term)
    weight = sum(merger.weights)
    if merger.normalize and abs(weight) >= 1e-8:
        out.div_(weight)
