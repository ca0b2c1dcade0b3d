"""A strict YAML document: every value knows its path and line, so every error can say where."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from distmerge.errors import ConfigError
from distmerge.log import LOGGER, printable

MAX_BYTES = 500_000
"""Of a recipe: ten thousand lines, and some seconds of reading."""

MAX_NODES = 200_000
"""More values than this (an alias that refers to aliases that ...) are an attack or a mistake."""

MAX_DEPTH = 50

MAX_KEY = 200
"""Characters."""

MAX_DIGITS = 1000
"""Characters of a number. Python takes hours for some of a million, and prints none of 4300."""

MAX_NUMBER = 3.4e38
"""What float32 holds: coefficients meet tensors in float32."""

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""What YAML and JSON are made of."""

PathTo = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a document came from, and on which line each value stands."""

    name: str
    lines: dict[PathTo, str]
    lenient: bool

    def where(self, path: PathTo) -> str:
        """'average.yaml line 4, trajectory.last'"""
        line = next(
            (self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), ""
        )
        dotted = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        return f"{self.name}{line}" + (f", {printable(dotted, MAX_KEY)}" if dotted else "")


@dataclass(frozen=True, slots=True)
class Node:
    """A value of the document, with checks that fail with its place."""

    value: Plain
    path: PathTo
    origin: Origin

    def fail(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.origin.where(self.path)}: {message}")

    def mapping(self, known: Sequence[str]) -> dict[str, Node]:
        """The values by key; a key that is not `known` is an error (a warning if lenient)."""
        if not isinstance(self.value, dict):
            self.fail(f"expected a mapping with {', '.join(known)}; got {_shown(self.value)}")
        nodes = {
            key: Node(value, (*self.path, key), self.origin) for key, value in self.value.items()
        }
        for key in [key for key in nodes if key not in known]:
            self._unknown(nodes.pop(key), key, known)
        return nodes

    def _unknown(self, node: Node, key: str, known: Sequence[str]) -> None:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        if not self.origin.lenient:
            node.fail(f"unknown key; {hint}")
        LOGGER.warning("%s: unknown key ignored; %s", self.origin.where(node.path), hint)

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            self.fail(f"expected a list; got {_shown(self.value)}")
        return [Node(value, (*self.path, i), self.origin) for i, value in enumerate(self.value)]

    def text(self) -> str:
        if not isinstance(self.value, str) or not self.value:
            self.fail(f"expected text; got {_shown(self.value)}")
        return self.value

    def choice(self, options: Sequence[str]) -> str:
        if self.value not in options:
            near = difflib.get_close_matches(str(self.value), options, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            self.fail(f"expected one of {', '.join(options)}; got {_shown(self.value)}{hint}")
        return str(self.value)

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self.fail(f"expected true or false; got {_shown(self.value)}")
        return self.value

    def integer(self, *, minimum: int) -> int:
        if type(self.value) is not int or self.value < minimum:
            self.fail(f"expected a whole number of at least {minimum}; got {_shown(self.value)}")
        return self.value

    def number(self) -> float:
        """A number that float32 holds. YAML 1.1 reads 1e-3 as text; people mean the number."""
        try:
            value = float(self.value) if isinstance(self.value, (int, float, str)) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not abs(value) <= MAX_NUMBER:
            self.fail(f"expected a finite number; got {_shown(self.value)}")
        return value


def _shown(value: Plain) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."


def load(
    source: Path | dict[str, Plain], *, overrides: Sequence[str] = (), lenient: bool = False
) -> Node:
    """Read a YAML file (or take a mapping) and apply `key.path=value` overrides.

    Raises ConfigError for what is not YAML, has a tag, a key twice, or an override that fits
    nowhere.
    """
    origin = Origin(str(source) if isinstance(source, Path) else "config", {}, lenient)
    value: Plain = _read_yaml(source, origin) if isinstance(source, Path) else dict(source)
    for override in overrides:
        value = _override(value, override, origin)
    return Node(value, (), origin)


def _read_yaml(path: Path, origin: Origin) -> Plain:
    try:
        with path.open("rb") as file:  # it may have no size, or no end: <(command), /dev/zero
            raw = file.read(MAX_BYTES + 1)
        text = raw[:MAX_BYTES].decode()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: more than {MAX_BYTES} bytes are no recipe")
    value = _parse(text, origin)
    if value is None:
        raise ConfigError(f"{path}: the file is empty")
    return value


def _parse(text: str, origin: Origin) -> Plain:
    """The value of a YAML document, None for an empty one; fills `origin.lines`."""
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        return None if root is None else _plain(loader, root, (), origin, iter(range(MAX_NODES)))
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{origin.name}: not valid YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin.name}: nested too deeply") from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return (f"line {mark.line + 1}: " if mark else "") + printable(" ".join(problem.split()), 200)


def _plain(
    loader: yaml.SafeLoader, node: yaml.Node, path: PathTo, origin: Origin, count: Iterator[int]
) -> Plain:
    _take(count, origin)
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{origin.name}: nested too deeply")
    origin.lines[path] = f" line {node.start_mark.line + 1}"
    _check_tag(loader, node, origin.where(path))
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, n, (*path, i), origin, count) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        entries = _entries(loader, node, origin, count)
        return {k: _plain(loader, n, (*path, k), origin, count) for k, n in entries.items()}
    if len(node.value) > MAX_DIGITS and node.tag != f"{_TAG}str":
        raise ConfigError(f"{origin.where(path)}: not valid YAML: a number of so many digits")
    value = loader.construct_object(node)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(node.value)


def _take(count: Iterator[int], origin: Origin) -> None:
    if next(count, None) is None:
        raise ConfigError(f"{origin.name}: more than {MAX_NODES} values")


def _check_tag(loader: yaml.SafeLoader, node: yaml.Node, where: str) -> None:
    """Raise ConfigError where a tag says that `node` is not what it looks like."""
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        kind, implicit = yaml.ScalarNode, (plain, not plain)
        implied = loader.resolve(kind, node.value, implicit)  # type: ignore[no-untyped-call]
    else:
        implied = f"{_TAG}seq" if isinstance(node, yaml.SequenceNode) else f"{_TAG}map"
    if node.tag != implied:
        raise ConfigError(f"{where}: the tag {printable(node.tag, 80)} is not allowed")


def _entries(
    loader: yaml.SafeLoader, node: yaml.MappingNode, origin: Origin, count: Iterator[int]
) -> dict[str, yaml.Node]:
    """The values of a mapping by key, with those that `<<: *defaults` adds and nothing replaces."""
    own: dict[str, yaml.Node] = {}
    merged: dict[str, yaml.Node] = {}
    seen: set[str] = set()
    for key, value in node.value:
        _take(count, origin)
        where = f"{origin.name} line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or len(key.value) > MAX_KEY:
            raise ConfigError(f"{where}: a key must be text of up to {MAX_KEY} characters")
        _check_tag(loader, key, where)
        if key.value in seen:
            raise ConfigError(f"{where}: {key.value!r} stands here twice")
        seen.add(key.value)
        if key.tag == f"{_TAG}merge":
            for other in reversed(_merged(value, where)):  # of several, the first counts
                merged |= _entries(loader, other, origin, count)
        else:
            own[key.value] = value
    return {**merged, **own}


def _merged(node: yaml.Node, where: str) -> list[yaml.MappingNode]:
    others = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(other, yaml.MappingNode) for other in others):
        raise ConfigError(f"{where}: expected a mapping or list of mappings for merging")
    return list(others)


def _override(root: Plain, override: str, origin: Origin) -> Plain:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(
            f"--set {override}: write --set key=value, for example --set trajectory.last=4"
        )
    value = _parse(text, Origin(f"--set {override}", {}, lenient=False))
    path = dotted(key)
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"--set {printable(override, MAX_KEY)}: nested too deeply")
    for known in [p for p in origin.lines if p[: len(path)] == path]:
        del origin.lines[known]
    origin.lines[path] = " --set"
    return replaced(root, path, value, f"--set {override}")


def dotted(key: str) -> PathTo:
    """The path of 'models.0.parameters.weight'."""
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split("."))


def replaced(node: Plain, path: PathTo, value: Plain, what: str) -> Plain:
    """A copy of `node` with `value` at `path`; missing mappings on the way are made.

    Raises ConfigError, which begins with `what`, where `path` leads through something else.
    """
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list) and isinstance(head, int) and head < len(node):
        return [replaced(n, rest, value, what) if i == head else n for i, n in enumerate(node)]
    if node is None or isinstance(node, dict):
        old = node or {}
        return {**old, str(head): replaced(old.get(str(head)), rest, value, what)}
    raise ConfigError(f"{what}: there is nothing to set at {head!r}")
