"""How a method that looks at a whole matrix is told: in stages, each a sum over panels and then a
small problem.

A matrix is cut along its longer side into panels whose sizes its shape fixes. So it may be larger
than memory, or lie spread over ranks, and every sum runs in one order all the same:

    def method(...) -> Method[Result]:
        solution = yield Stage(accumulate, solve)      # as often as need be
        return result

Whoever drives a method adds up what `accumulate` returns for each panel, in order, lets `solve`
make the solution of the sum, and sends it in. `drive` is the plainest driver; ranks have another.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")

Tensors = list[torch.Tensor]


class Panel(NamedTuple):
    """A stretch of a matrix along its longer side: m x b of a wide one (m <= n), b x n of a tall
    one (m > n), where m counts outputs and n inputs; any dimensions before are a batch. float32.

    `deltas` are W_i - W_0 of the tasks, in order; `merged` is what the base merger makes of them
    (before its scale), empty as long as that is not known.
    """

    deltas: Sequence[torch.Tensor]
    merged: torch.Tensor


def add(total: Tensors, more: Tensors) -> Tensors:
    """total += more, in place."""
    for sum_, term in zip(total, more, strict=True):
        sum_.add_(term)
    return total


class Stage(NamedTuple):
    """One pass over the panels.

    `accumulate` returns fresh tensors, whose shapes do not depend on the panel's size; `combine`
    joins those of the panels before with those of the next; `solve` gets what came out.
    """

    accumulate: Callable[[Panel], Tensors]
    solve: Callable[[Tensors], Tensors]
    combine: Callable[[Tensors, Tensors], Tensors] = add


Method = Generator[Stage, Tensors, T]


def drive(method: Method[T], panels: Callable[[], Iterable[Panel]]) -> T:
    """Carry out `method` on `panels()`, which gives the same panels in the same order each time."""
    try:
        stage = next(method)
        while True:
            total: Tensors | None = None
            for panel in panels():
                part = stage.accumulate(panel)
                total = part if total is None else stage.combine(total, part)
            assert total is not None, "a matrix has a panel"
            stage = method.send(stage.solve(total))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
