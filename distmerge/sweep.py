"""One recipe, many outputs: `sweep:` over keys of the recipe, and `select:` among what comes out.

sweep:                             parameters: {step: [0, 0.5, 1]}    # short for a sweep
  trajectory.window: [4, 8]        select: {metric: loss, text: held-out.txt}

Every point of the grid is a recipe of its own; all share inputs and layout, so that one pass over
the inputs can write them all.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from distmerge.config import Config, Extrapolation, ModelEntry, parse_config
from distmerge.document import Node, Plain, dotted, load, replaced
from distmerge.errors import ConfigError
from distmerge.publication import Publication, parse_publication
from distmerge.reference import ModelRef
from distmerge.selection import Selection, parse_selection
from distmerge.trajectory import Trajectory

MAX_OUTPUTS = 1000
"""More are a mistake: each is a whole checkpoint."""

STEP = "parameters.step"
SPAN = "parameters.step.span"
_WORD = re.compile(r"[\w.+-]+")


class Variant(NamedTuple):
    """One output: its folder in OUT ('' for OUT itself), the swept values by name, its recipe."""

    name: str
    values: dict[str, Plain]
    config: Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """All outputs of one run, in order, how one of them is chosen, and where it is published.

    `inputs` are the checkpoints of all trajectories in ascending order, once they are selected.
    """

    variants: tuple[Variant, ...]
    selection: Selection | None = None
    publication: Publication | None = None
    inputs: tuple[ModelRef, ...] = ()

    @property
    def shared(self) -> Config:
        """The first recipe: for all that a sweep can't change."""
        return self.variants[0].config


class _Axis(NamedTuple):
    key: str
    values: tuple[int | float | str, ...]
    node: Node


def load_recipe(
    source: str | Path | dict[str, Plain], *, overrides: Sequence[str] = (), lenient: bool = False
) -> Recipe:
    """Read a recipe from a YAML file or a mapping.

    `overrides` are `dotted.key=value`; with `lenient`, unknown keys warn instead of failing.
    Raises ConfigError with file, line and key.
    """
    document = source if isinstance(source, dict) else Path(source)
    root = load(document, overrides=overrides, lenient=lenient)
    found = root.value if isinstance(root.value, dict) else {}
    selection = _child(root, "select") if found.get("select") is not None else None
    axes = [*_sweep(root, found), *_step_axis(root, found)]
    if selection is not None:
        axes = _with_zero(root, found, axes)
    variants = tuple(_variants(root, axes))
    _check_shared(variants, axes)
    if selection is not None and len(variants) < 2:
        selection.fail("there is nothing to choose among; add a sweep:")
    chosen = None if selection is None else parse_selection(selection)
    return Recipe(
        variants=variants,
        selection=chosen,
        publication=_publication(root, found, len(variants), chosen),
    )


def _publication(
    root: Node, found: dict[str, Plain], outputs: int, selection: Selection | None
) -> Publication | None:
    if found.get("publish") is None:
        return None
    node = _child(root, "publish")
    publication = parse_publication(node)
    if outputs > 1 and selection is None:
        node.fail(f"which of the {outputs} outputs? select: chooses one")
    if outputs > 1 and publication.stream:
        _child(node, "stream").fail(f"which of the {outputs} outputs it will be, the end shows")
    return publication


def _child(node: Node, key: str) -> Node:
    assert isinstance(node.value, dict)
    return Node(node.value[key], (*node.path, key), node.origin)


def _sweep(root: Node, found: dict[str, Plain]) -> list[_Axis]:
    if found.get("sweep") is None:
        return []
    axes = [_axis(key, node) for key, node in _lists(_child(root, "sweep"), "")]
    for axis in axes:
        # Keys name folders too, and --lenient lets any key pass.
        forbidden = axis.key.split(".")[0] in ("sweep", "select", "publish", "merge_method")
        if forbidden or not _WORD.fullmatch(axis.key):
            axis.node.fail("this key can't be swept")
    return axes


def _lists(node: Node, prefix: str) -> Iterator[tuple[str, Node]]:
    """The lists in a mapping by their dotted keys; 'a.b: [1]' and 'a: {b: [1]}' are the same."""
    if not isinstance(node.value, dict) or not node.value:
        node.fail("expected a mapping from keys of the recipe to lists of values")
    for key in node.value:
        child = _child(node, key)
        if isinstance(child.value, list):
            yield prefix + key, child
        else:
            yield from _lists(child, f"{prefix}{key}.")


def _step_node(root: Node, found: dict[str, Plain]) -> tuple[str, Node] | None:
    """Where the recipe says how far to step, and the key of that place."""
    if found.get("merge_method") != "extra_merge" or not isinstance(found.get("parameters"), dict):
        return None
    parameters = _child(root, "parameters")
    assert isinstance(parameters.value, dict)
    if "step" not in parameters.value:
        return None
    node = _child(parameters, "step")
    if isinstance(node.value, dict) and "span" in node.value:
        return SPAN, _child(node, "span")
    return STEP, node


def _step_axis(root: Node, found: dict[str, Plain]) -> list[_Axis]:
    """A list of steps is short for a sweep."""
    place = _step_node(root, found)
    return [_axis(*place)] if place and isinstance(place[1].value, list) else []


def _with_zero(root: Node, found: dict[str, Plain], axes: Sequence[_Axis]) -> list[_Axis]:
    """`axes` where a step of zero is among the values, first if it was not there: to choose
    means to choose against the plain average too."""
    axes = list(axes)
    place = _step_node(root, found)
    if place and not any(axis.key in (STEP, SPAN) for axis in axes):
        key, node = place
        axes.append(_Axis(key, (_number(node.number()),), node))
    return [
        axis._replace(values=(0, *axis.values))
        if axis.key in (STEP, SPAN) and 0 not in axis.values
        else axis
        for axis in axes
    ]


def _axis(key: str, node: Node) -> _Axis:
    values = tuple(_swept(item) for item in node.items())
    if not values:
        node.fail("a sweep needs at least one value")
    if len(set(values)) < len(values):
        node.fail("a value is listed twice")
    return _Axis(key, values, node)


def _swept(node: Node) -> int | float | str:
    """A number, or a word that can stand in a folder's name."""
    if isinstance(node.value, (bool, list, dict)) or node.value is None:
        node.fail("expected a number or a word")
    try:
        return _number(node.number())
    except ConfigError:
        if not _WORD.fullmatch(node.text()) or set(node.text()) <= {"."}:
            node.fail("expected a number or a word of letters, digits and . + - _")
        return node.text()


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


def _variants(root: Node, axes: Sequence[_Axis]) -> Iterator[Variant]:
    count = 1
    for axis in axes:
        count *= len(axis.values)
    if count > MAX_OUTPUTS:
        root.fail(f"sweep: {count} outputs are more than {MAX_OUTPUTS}")
    names = _short_names(axes)
    for point in itertools.product(*(axis.values for axis in axes)):
        value = root.value
        for axis, at in zip(axes, point, strict=True):
            value = replaced(value, dotted(axis.key), at, f"sweep: {axis.key}")
        config = parse_config(Node(value, root.path, root.origin))
        values: dict[str, Plain] = dict(zip(names, point, strict=True))
        name = ",".join(f"{key}={at}" for key, at in values.items())
        yield Variant(name if count > 1 else "", values, config)


def swept_values(name: str) -> dict[str, Plain]:
    """The values in the name of an output, 'window=8,step=0.5'."""
    pairs = [part.partition("=") for part in name.split(",") if part]
    return {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> int | float | str:
    try:
        return _number(float(text))
    except ValueError:
        return text


def _short_names(axes: Sequence[_Axis]) -> list[str]:
    """The last word of each key, or the whole key where two end alike."""
    keys = [axis.key for axis in axes]
    for number, axis in enumerate(axes):
        if axis.key in keys[:number]:
            axis.node.fail(f"{axis.key} is swept twice")
    last = [key.split(".")[-1] for key in keys]
    return [
        short if last.count(short) == 1 else axis.key
        for short, axis in zip(last, axes, strict=True)
    ]


def _check_shared(variants: Sequence[Variant], axes: Sequence[_Axis]) -> None:
    """Raise ConfigError where a swept key changes what all outputs must share, or nothing."""
    for variant in variants[1:]:
        if _skeleton(variant.config) != _skeleton(variants[0].config):
            keys = ", ".join(axis.key for axis in axes)
            raise ConfigError(
                f"sweep: {keys}: it changes which checkpoints are read or how they are written, "
                "not only how they are weighted; make a recipe for each"
            )
    for number, variant in enumerate(variants):
        if variant.config in [other.config for other in variants[:number]]:
            raise ConfigError(f"sweep: {variant.name} is no other recipe than one before it")


def _skeleton(config: Config) -> Config:
    """`config` without what may differ between the outputs of a sweep."""
    trajectory = config.trajectory
    if trajectory is not None:
        kept = Trajectory(checkpoints=trajectory.checkpoints)
        # The statistic is that of all selected checkpoints: one selection for all outputs.
        trajectory = (
            replace(trajectory, window=None, stride=1, schedule=kept.schedule)
            if config.extrapolation
            else kept
        )
    extrapolation = config.extrapolation and Extrapolation(
        step=0.0, exclude=config.extrapolation.exclude
    )
    calibration = config.calibration and replace(config.calibration, alpha=None)
    return replace(
        config,
        trajectory=trajectory,
        extrapolation=extrapolation,
        calibration=calibration,
        models=tuple(ModelEntry(model=entry.model) for entry in config.models),
        parameters={},
    )
