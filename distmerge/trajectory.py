"""`trajectory:` of a recipe: the checkpoints of one run and how they are weighted.

trajectory:
  checkpoints: runs/x/step-*       a glob, a list, or {repo, revisions}
  last: 24                         also: first, from_step, to_step, min_interval
  schedule: uniform                also: reverse, scramble, normalize
  window: 8                        these two for merge_method: extra_merge
  stride: 1
"""

from __future__ import annotations

from dataclasses import dataclass

from distmerge.document import Node
from distmerge.reference import ModelRef, parse_model

SCHEDULES = ("uniform", "wma", "ema", "wsm", "weights")
CURVES = ("linear", "minus-sqrt", "cosine")

_LEAST = {
    "first": 1, "last": 1, "from_step": 0, "to_step": 0, "min_interval": 1,
    "window": 1, "stride": 1,
}  # fmt: skip
_WINDOWED = ("window", "stride")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How the coefficients run along a trajectory; `numbers` as the kind needs them.

    ema: [a]; wsm: the curve's values, if they are given instead of its name; weights: all of them.
    """

    kind: str = "uniform"
    curve: str | None = None
    numbers: tuple[float, ...] = ()
    reverse: bool = False
    scramble: int | None = None
    normalize: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """Checkpoints of one run. `checkpoints` is a glob pattern or a tuple of references.

    With a `window`, that many neighbouring checkpoints make one merged one, weighted by the
    schedule; the next merged one begins `stride` checkpoints later.
    """

    checkpoints: str | tuple[ModelRef, ...]
    first: int | None = None
    last: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    min_interval: int | None = None
    window: int | None = None
    stride: int = 1
    schedule: Schedule = Schedule()


def parse_trajectory(node: Node, *, windowed: bool) -> Trajectory:
    """Read the mapping; `windowed` says that the method takes a window. Raises ConfigError."""
    fields = node.mapping(("checkpoints", *_LEAST, "schedule", "reverse", "scramble", "normalize"))
    if "checkpoints" not in fields:
        node.fail("checkpoints is missing: a list, a glob pattern, or {repo, revisions}")
    if "first" in fields and "last" in fields:
        fields["first"].fail("first and last can't both be given")
    for key in _WINDOWED:
        if key in fields and not windowed:
            fields[key].fail("it belongs to merge_method: extra_merge; average takes last: n")
    if windowed and "window" not in fields:
        node.fail("window is missing: how many checkpoints make one merged one")
    numbers = {k: fields[k].integer(minimum=_LEAST[k]) for k in _LEAST if k in fields}
    return Trajectory(
        checkpoints=_parse_checkpoints(fields["checkpoints"]),
        schedule=_parse_schedule(fields),
        **numbers,
    )


def _parse_checkpoints(node: Node) -> str | tuple[ModelRef, ...]:
    if isinstance(node.value, str):
        return node.text()
    if isinstance(node.value, dict):
        fields = node.mapping(("repo", "revisions"))
        if len(fields) < 2:
            node.fail("expected {repo: name, revisions: [...]}")
        repo = fields["repo"].text()
        return tuple(ModelRef(repo, revision.text()) for revision in fields["revisions"].items())
    return tuple(parse_model(item) for item in node.items())


def _parse_schedule(fields: dict[str, Node]) -> Schedule:
    node = fields.get("schedule")
    kind, curve, numbers = _parse_kind(node) if node else ("uniform", None, ())
    return Schedule(
        kind=kind,
        curve=curve,
        numbers=numbers,
        reverse=fields["reverse"].boolean() if "reverse" in fields else False,
        scramble=fields["scramble"].integer(minimum=0) if "scramble" in fields else None,
        normalize=fields["normalize"].boolean() if "normalize" in fields else False,
    )


def _parse_kind(node: Node) -> tuple[str, str | None, tuple[float, ...]]:
    if not isinstance(node.value, dict):
        kind = node.choice(SCHEDULES)
        if kind not in ("uniform", "wma"):
            node.fail(f"{kind} needs a value: write schedule: {{{kind}: ...}}")
        return kind, None, ()
    given = node.mapping(("ema", "wsm", "weights"))
    if len(given) != 1:
        node.fail("expected one of ema, wsm, weights")
    kind, value = next(iter(given.items()))
    if kind == "wsm" and not isinstance(value.value, list):
        return kind, value.choice(CURVES), ()
    if kind == "ema":
        if not 0 < value.number() <= 1:
            value.fail(f"expected a number over 0 and up to 1; got {value.value}")
        return kind, None, (value.number(),)
    return kind, None, tuple(item.number() for item in value.items())
