"""What a manifest says of an output, checked and typed; and what can be off."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distmerge.document import Plain
from distmerge.errors import OutputError
from distmerge.log import printable
from distmerge.manifest import is_inside, read
from distmerge.output import MANIFEST

SHOWN = 10
"""Findings of one kind that are listed; the rest is counted."""

Terms = dict[int, float]
"""Coefficients by the position of the input."""


class Finding(NamedTuple):
    """Something that is off: `where` is a file or a tensor in OUT, `what` says it in a line.

    A `note` is no fault of the output: it says what could not be looked at, and why.
    """

    where: str
    what: str
    note: bool = False

    def __str__(self) -> str:
        return printable(f"{self.where}: {self.what}")  # names come from files


class File(NamedTuple):
    """A file as the manifest lists it."""

    sha256: str
    num_bytes: int


class Given(NamedTuple):
    """An input as it was when it was merged."""

    label: str
    folder: Path
    fingerprint: str
    commit: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What one output says of itself. `name` is its folder in OUT, '' for OUT itself.

    `usual` are the coefficients of all tensors that `special` does not name.
    """

    name: str
    folder: Path
    recipe: dict[str, Plain]
    inputs: tuple[Given, ...]
    plan: str
    shard_bytes: int
    versions: dict[str, Plain]
    files: dict[str, File]
    usual: Terms
    special: dict[str, Terms]

    @property
    def shards(self) -> list[str]:
        return [name for name in self.files if name.endswith(".safetensors")]

    def terms(self, tensor: str) -> Terms:
        """The coefficients of a float tensor."""
        return self.special.get(tensor, self.usual)

    def place(self, file: str, tensor: str | None = None) -> str:
        """Where a finding is: a file, from OUT, and a tensor in it."""
        path = f"{self.name}/{file}" if self.name else file
        return path if tensor is None else f"{path}, {tensor}"

    def finding(self, file: str, what: str, *, tensor: str | None = None) -> Finding:
        return Finding(self.place(file, tensor), what)


def some(findings: Iterator[Finding]) -> list[Finding]:
    """The first of the findings of one kind, and how many more there are."""
    found = list(findings)
    if len(found) > SHOWN:
        left = len(found) - SHOWN
        found[SHOWN:] = [found[0]._replace(what=f"and {left} more findings of this kind")]
    return found


def read_manifest(out: Path, name: str) -> Manifest:
    """The manifest of the output `name`. Raises OutputError where it is not a whole one."""
    folder = out / name
    content = read(folder)
    try:
        usual, special = _coefficients(content["coefficients"])
        return Manifest(
            name=name,
            folder=folder,
            recipe=_mapping(content["recipe"]),
            inputs=tuple(_given(entry) for entry in content["inputs"]),
            plan=_digest(content["plan"]),
            shard_bytes=int(content["shard_bytes"]),
            versions=_mapping(content["versions"]),
            files=dict(_files(content["files"])),
            usual=usual,
            special=special,
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise OutputError(
            f"{folder / MANIFEST}: not a whole manifest ({type(error).__name__}: {error})"
        ) from error


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text; got {value!r:.60}")
    return value


def _digest(value: object) -> str:
    if not re.fullmatch("[0-9a-f]{64}", _text(value)):
        raise ValueError(f"expected a sha256; got {value!r:.80}")
    return _text(value)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a mapping; got {value!r:.60}")
    return value


def _given(entry: Mapping[str, object]) -> Given:
    commit = entry["commit"]
    return Given(
        _text(entry["model"]),
        Path(_text(entry["folder"])),
        _text(entry["fingerprint"]),
        None if commit is None else _text(commit),
    )


def _files(listed: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, File]]:
    for name, entry in listed.items():
        if not is_inside(name):
            raise ValueError(f"{name!r} is not the path of a file in this folder")
        yield name, File(_digest(entry["sha256"]), int(entry["bytes"]))


def _coefficients(groups: Sequence[Mapping[str, Any]]) -> tuple[Terms, dict[str, Terms]]:
    usual: Terms = {}
    special: dict[str, Terms] = {}
    for group in groups:
        terms = {int(place): float(value) for place, value in group["by_input"].items()}
        if group["tensors"] == "all others":
            usual = terms
        else:
            special |= dict.fromkeys(map(_text, group["tensors"]), terms)
    return usual, special
