"""Damage to an output that a merge left, caused for real."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import distmerge
from tests.support.checkpoints import INDEX

MANIFEST = "distmerge.json"


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    start: int
    stop: int


def place(out: Path, name: str) -> Place:
    """Of the tensor `name` in an output with an index."""
    weight_map = json.loads((out / INDEX).read_text())["weight_map"]
    path = out / weight_map[name]
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start, stop = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    return Place(path, 8 + length + start, 8 + length + stop)


def flip(path: Path, offset: int) -> None:
    """Change one bit of a file."""
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def manifest(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / MANIFEST).read_text())
    return found


def edit_manifest(out: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = manifest(out)
    edit(content)
    (out / MANIFEST).write_text(json.dumps(content))


def forge(out: Path, name: str) -> None:
    """Make the manifest say what the file `name` holds now."""
    raw = (out / name).read_bytes()
    entry = {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    edit_manifest(out, lambda content: content["files"].update({name: entry}))


def listed(found: distmerge.Verification) -> list[str]:
    return [str(finding) for finding in found.findings]
