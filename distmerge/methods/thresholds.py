"""The k-th largest of more magnitudes than memory holds, exactly, by passing over them.

On the CPU a sample says in which narrow range the value lies; one pass counts what is above that
range and keeps what is inside. Where the range was wrong or holds too much (a grid of few values),
and on other devices, two passes of histograms over the bits of the floats find it. Either way the
memory is bounded, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from math import ceil, floor, inf, sqrt
from typing import NamedTuple

import numpy as np
import torch

Numbers = np.ndarray[tuple[int], np.dtype[np.float32]]


class Target(NamedTuple):
    """The `keep` largest magnitudes (at least 1, fewer than all) of task number `task`."""

    task: int
    keep: int


class Piece(NamedTuple):
    """Some magnitudes of a task: float32, 1-D, at `start` of the flattened tensor.

    The next piece may take their place in memory.
    """

    task: int
    start: int
    values: torch.Tensor


Magnitudes = Callable[[Callable[[int], Collection[int]]], Iterator[Piece]]
"""A pass over all pieces in order; the function tells which tasks are wanted of that at an index,
and is asked when the pass gets there."""


class Threshold(NamedTuple):
    """What is kept: magnitudes above `value`, and those equal to it at indices below `limit`."""

    value: float
    limit: int

    @property
    def below(self) -> float:
        """The largest magnitude that is dropped before the limit: the float32 below `value`."""
        return float(np.nextafter(np.float32(self.value), np.float32(0)))


class _Found(NamedTuple):
    """A threshold, and how many of the magnitudes equal to it are kept.

    The last of these is in the piece at `start` or a later one; `before` it there are that many.
    """

    value: float
    equal: int
    kept: int
    start: int = 0
    before: int = 0


_CAPACITY = 1 << 21
"""Magnitudes that are kept for each target."""

_DEVIATIONS = 8.0
"""Half the width of a range, in standard deviations of independent samples. Neighbours are not
independent; a range that was missed costs two passes."""

_BINS = 1 << 16


def largest(
    targets: Sequence[Target],
    magnitudes: Magnitudes,
    samples: Mapping[int, torch.Tensor],
    elements: int,
) -> dict[Target, Threshold]:
    """The threshold of each target, among magnitudes of so many `elements`.

    `samples` holds some of the magnitudes of each task; for the tasks that it lacks, histograms are
    made. Of equal magnitudes at the threshold those with the lowest indices are kept.
    """
    ranges = {
        target: spread
        for target in targets
        if target.task in samples
        and (spread := _range(samples[target.task].numpy(), target.keep, elements))
    }
    found = _collect(ranges, magnitudes) if ranges else {}
    if rest := [target for target in targets if target not in found]:
        found |= _histograms(rest, magnitudes)
    limits = _locate(found, magnitudes)
    return {t: Threshold(found[t].value, limits.get(t, elements)) for t in targets}


class _Range(NamedTuple):
    low: np.float32
    high: np.float32


def _range(sample: Numbers, keep: int, elements: int) -> _Range | None:
    """Both ends of where the threshold is likely to be; None where that is too much to keep."""
    ordered = np.sort(sample)[::-1]
    count, share = len(ordered), keep / elements
    margin = _DEVIATIONS * sqrt(count * share * (1 - share)) + _DEVIATIONS
    first, last = floor(count * share - margin), ceil(count * share + margin)
    high = ordered[first] if first >= 0 else np.float32(inf)
    low = ordered[last] if last < count else np.float32(0)
    inside = np.count_nonzero((ordered >= low) & (ordered <= high)) / count * elements
    return None if low != high and inside > _CAPACITY else _Range(low, high)


class _Collection:
    """What a pass has seen of a range: how many above it, and which (or how many) inside."""

    def __init__(self, spread: _Range):
        self._low, self._high = spread
        self._single = self._low == self._high
        self._above = self._inside = 0
        self._values: list[tuple[int, Numbers]] = []
        self._counts: list[tuple[int, int]] = []

    def add(self, start: int, values: Numbers) -> None:
        over = values > self._high
        inside = (values >= self._low) > over
        self._above += int(np.count_nonzero(over))
        if self._single:
            self._counts.append((start, int(np.count_nonzero(inside))))
            self._inside += self._counts[-1][1]
        elif self._inside <= _CAPACITY:
            self._values.append((start, values[np.flatnonzero(inside)]))
            self._inside += len(self._values[-1][1])

    def find(self, keep: int) -> _Found | None:
        """The `keep`-th largest, if it was in the range and the range not too wide."""
        place = keep - self._above
        if not 0 < place <= self._inside or (not self._single and self._inside > _CAPACITY):
            return None
        if self._single:
            return _found(self._high, place, self._counts)
        values = np.concatenate([each for _, each in self._values])
        value = np.partition(values, len(values) - place)[len(values) - place]
        kept = place - int(np.count_nonzero(values > value))
        counts = [(start, int(np.count_nonzero(each == value))) for start, each in self._values]
        return _found(value, kept, counts)


def _found(value: np.float32, kept: int, counts: Sequence[tuple[int, int]]) -> _Found:
    """With what is equal to the value counted piece by piece."""
    totals = np.cumsum([count for _, count in counts])
    place = int(np.searchsorted(totals, kept))
    start, count = counts[place]
    return _Found(float(value), int(totals[-1]), kept, start, int(totals[place]) - count)


def _collect(ranges: Mapping[Target, _Range], magnitudes: Magnitudes) -> dict[Target, _Found]:
    """What a pass finds of the targets in these ranges."""
    seen = {target: _Collection(spread) for target, spread in ranges.items()}
    by_task = _by_task(ranges)
    for piece in magnitudes(lambda _: by_task):
        for target in by_task[piece.task]:
            seen[target].add(piece.start, piece.values.numpy())
    found = {target: collection.find(target.keep) for target, collection in seen.items()}
    return {target: each for target, each in found.items() if each is not None}


def _histograms(targets: Sequence[Target], magnitudes: Magnitudes) -> dict[Target, _Found]:
    """What two passes find, whatever the magnitudes are: floats are ordered as their bits are."""
    lows, above = dict.fromkeys(targets, 0), dict.fromkeys(targets, 0)
    equal: dict[Target, int] = {}
    by_task = _by_task(targets)
    for shift in (15, 0):
        # In each pass: a bin for what is below, _BINS, and one for what is above.
        bins: dict[Target, torch.Tensor] = {}
        for piece in magnitudes(lambda _: by_task):
            for target in by_task[piece.task]:
                places = (piece.values.view(torch.int32) - lows[target]) >> shift
                places.clamp_(-1, _BINS).add_(1)
                count = torch.bincount(places, minlength=_BINS + 2)
                bins[target] = bins[target].add_(count) if target in bins else count
        for target, counts in bins.items():
            from_top = counts.cpu().flip(0).cumsum(0)
            place = int(torch.searchsorted(from_top, target.keep))
            above[target] = int(from_top[place - 1])
            equal[target] = int(from_top[place]) - above[target]
            lows[target] += (_BINS - place) << shift
    values = torch.tensor([lows[t] for t in targets], dtype=torch.int32).view(torch.float32)
    return {
        target: _Found(value, equal[target], target.keep - above[target])
        for target, value in zip(targets, values.tolist(), strict=True)
    }


def _locate(found: Mapping[Target, _Found], magnitudes: Magnitudes) -> dict[Target, int]:
    """Where some of the magnitudes equal to the threshold are kept and others not: the index
    before which they are. Zeros count for nothing, so they need none."""
    left = {
        target: each.kept - each.before
        for target, each in found.items()
        if each.kept < each.equal and each.value > 0
    }
    limits: dict[Target, int] = {}

    def wanted(start: int) -> dict[int, list[Target]]:
        return _by_task(t for t in left if t not in limits and found[t].start <= start)

    if not left:
        return limits
    for piece in magnitudes(wanted):
        for target in wanted(piece.start)[piece.task]:
            # Ones and zeros as floats: several times as fast as bools.
            equal = torch.empty_like(piece.values)
            torch.eq(piece.values, found[target].value, out=equal)
            count = int(equal.sum())
            if count < left[target]:
                left[target] -= count
            else:
                limits[target] = piece.start + int(equal.nonzero()[left[target] - 1]) + 1
        if len(limits) == len(left):
            break
    return limits


def _by_task(targets: Iterable[Target]) -> dict[int, list[Target]]:
    found: dict[int, list[Target]] = {}
    for target in targets:
        found.setdefault(target.task, []).append(target)
    return found
