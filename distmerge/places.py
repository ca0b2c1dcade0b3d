"""Where in a model a tensor or a module stands, as its name tells: which layer, which kind."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYER = re.compile(r"(?:(?P<stack>.*?)\.)??(?P<layer>\d+)(?:\.(?P<kind>.*))?", re.DOTALL)
"""'model.layers.3.mlp': the first number is that of the layer."""

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")

WHOLE = "whole layer"


class Row(NamedTuple):
    """All that has one kind in one stack of layers ('model.layers'); numbers after the layer's,
    as those of experts, are stars."""

    stack: str
    kind: str


class Place(NamedTuple):
    row: Row
    layer: int


def place(name: str) -> Place | None:
    """Where `name` stands; None for what is in no layer."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    kind = _NUMBER.sub("*", match["kind"] or WHOLE)
    return Place(Row(match["stack"] or "", kind), int(match["layer"]))


def row_names(rows: Iterable[Row]) -> dict[Row, str]:
    """Each row, once, and what it is called: by its kind alone where there is but one stack."""
    found = list(dict.fromkeys(rows))
    alone = len({row.stack for row in found}) == 1
    return {
        row: row.kind if alone else f"{row.stack}.*.{row.kind}".removesuffix(f".{WHOLE}")
        for row in found
    }
