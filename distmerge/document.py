"""A strict YAML document: every value knows its path and line, so every error can say where."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

from distmerge.errors import ConfigError
from distmerge.log import LOGGER

MAX_NODES = 1_000_000
"""More values than this (an alias that refers to aliases that ...) are an attack or a mistake."""

MAX_NUMBER = 3.4e38
"""What float32 holds: coefficients meet tensors in float32."""

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""What YAML and JSON are made of."""

PathTo = tuple[str | int, ...]

_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


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
        return f"{self.name}{line}" + (f", {dotted}" if dotted else "")


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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from error
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
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{origin.name}: not valid YAML: {_one_line(error)}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin.name}: nested too deeply") from error


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else " ".join(problem.split())


def _plain(
    loader: yaml.SafeLoader, node: yaml.Node, path: PathTo, origin: Origin, count: Iterator[int]
) -> Plain:
    if next(count, None) is None:
        raise ConfigError(f"{origin.name}: more than {MAX_NODES} values")
    origin.lines[path] = f" line {node.start_mark.line + 1}"
    if isinstance(node, yaml.CollectionNode) and node.tag not in _TAGS:
        raise ConfigError(f"{origin.where(path)}: the tag {node.tag} is not allowed")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, n, (*path, i), origin, count) for i, n in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(loader, node, path, origin, count)
    value = loader.construct_object(node)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(node.value)


def _plain_mapping(
    loader: yaml.SafeLoader,
    node: yaml.MappingNode,
    path: PathTo,
    origin: Origin,
    count: Iterator[int],
) -> Plain:
    seen: set[str] = set()
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{origin.name} line {line}: a key must be text")
        if key.value in seen:
            raise ConfigError(f"{origin.name} line {line}: {key.value!r} stands here twice")
        seen.add(str(key.value))
    loader.flatten_mapping(node)  # `<<: *defaults`; what stands later counts
    node.value = list({str(key.value): (key, value) for key, value in node.value}.values())
    return {
        str(key.value): _plain(loader, value, (*path, str(key.value)), origin, count)
        for key, value in node.value
    }


def _override(root: Plain, override: str, origin: Origin) -> Plain:
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(
            f"--set {override}: write --set key=value, for example --set trajectory.last=4"
        )
    value = _parse(text, Origin(f"--set {override}", {}, lenient=False))
    path = dotted(key)
    for known in [p for p in origin.lines if p[: len(path)] == path]:
        del origin.lines[known]
    origin.lines[path] = " --set"
    return replaced(root, path, value, f"--set {override}")


def dotted(key: str) -> PathTo:
    """The path of 'models.0.parameters.weight'."""
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


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
