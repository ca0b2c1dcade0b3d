"""mergekit's parameters: a number, a gradient over layers, or a list of filters.

Facts: docs/mergekit.md. Lookup goes from the model's own parameters to the recipe's; the first
filter that is a substring of the tensor's name decides; a gradient is piecewise linear over the
layers of a stack; tensors outside every stack take a gradient's first anchor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from distmerge.document import Node

_LAYER = re.compile(r"^(.*?)(?:^|(?<=\.))(\d+)\.")
"""The first all-digit part of a tensor's name; what stands before names the stack."""


class Conditional(NamedTuple):
    """Anchors of a gradient (one for a plain number), for names that contain `filter`."""

    filter: str | None
    anchors: tuple[float, ...]


Parameter = tuple[Conditional, ...]


def parse_parameter(node: Node) -> Parameter:
    """Read a number, a gradient or a list of {filter, value}; raises ConfigError."""
    if isinstance(node.value, dict):
        node.fail("a filter must stand in a list: write - filter: ...")
    if isinstance(node.value, list) and any(isinstance(value, dict) for value in node.value):
        return tuple(_parse_conditional(item) for item in node.items())
    return (Conditional(None, _parse_anchors(node)),)


def _parse_conditional(node: Node) -> Conditional:
    fields = node.mapping(("filter", "value"))
    if "value" not in fields:
        node.fail("a filter needs a value")
    pattern = fields["filter"].text() if "filter" in fields else None
    return Conditional(None if pattern == "*" else pattern, _parse_anchors(fields["value"]))


def _parse_anchors(node: Node) -> tuple[float, ...]:
    anchors = (
        tuple(item.number() for item in node.items())
        if isinstance(node.value, list)
        else (node.number(),)
    )
    if not anchors:
        node.fail("a gradient needs at least one number")
    return anchors


class Layers:
    """The stacks of layers in a set of tensor names, for the place of a tensor in its stack."""

    def __init__(self, names: Iterable[str]):
        self._last: dict[str, int] = {}
        for name in names:
            if match := _LAYER.match(name):
                stack, number = match[1], int(match[2])
                self._last[stack] = max(number, self._last.get(stack, 0))

    def position(self, name: str) -> float:
        """0 for the first layer to 1 for the last (1 in a stack of one); 0 outside every stack."""
        match = _LAYER.match(name)
        if match is None:
            return 0.0
        last = self._last[match[1]]
        return int(match[2]) / last if last else 1.0


def evaluate(
    levels: Iterable[Mapping[str, Parameter]], key: str, name: str, position: float
) -> float | None:
    """The value of parameter `key` for tensor `name`; None where no level decides."""
    for level in levels:
        for conditional in level.get(key, ()):
            if conditional.filter is None or conditional.filter in name:
                return _interpolate(conditional.anchors, position)
    return None


def _interpolate(anchors: tuple[float, ...], position: float) -> float:
    scaled = position * (len(anchors) - 1)
    low = int(scaled)
    high = min(low + 1, len(anchors) - 1)
    fraction = scaled - low
    return (1 - fraction) * anchors[low] + fraction * anchors[high]
