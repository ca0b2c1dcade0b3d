"""The methods on task vectors, what their parameters are by default, and `calibrate:`.

merge_method: ties                 calibrate:
base_model: path-or-repo             method: svc
models:                              alpha: auto            # 1/K; 1 for tsv_m
  - model: ...                       include: [...]         # else every 2-D weight but embeddings
    parameters: {weight: 1,          exclude: [lm_head*]
                 density: 0.2}       split: {"*.qkv_proj.weight": [4096, 1024, 1024]}
parameters: {lambda: 0.3}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from distmerge.document import Node
from distmerge.errors import ConfigError

Defaults = Mapping[str, float | None]
"""Of parameters, by name; None where the recipe must give one."""


class Merger(NamedTuple):
    """What a method on task vectors takes: of each model and for all, as in mergekit where it has
    the method. `whole` methods look at whole matrices."""

    own: Defaults
    shared: Defaults
    whole: bool = False


_OWN = {"weight": None, "density": 1.0}
_SHARED = {"lambda": 1.0, "normalize": 0.0, "rescale": 0.0, "int8_mask": 0.0}
_RANDOM = {**_SHARED, "rescale": 1.0, "seed": 0.0}

MERGERS: dict[str, Merger] = {
    "task_arithmetic": Merger(_OWN, _SHARED),
    "ties": Merger(_OWN, {**_SHARED, "normalize": 1.0}),
    "dare_linear": Merger(_OWN, _RANDOM),
    "dare_ties": Merger(_OWN, _RANDOM),
    "expo": Merger({}, {"alpha": None}),
    "tsv_m": Merger({}, {"lambda": 1.0}, whole=True),
    "iso_c": Merger({}, {"lambda": 1.0}, whole=True),
    "iso_cts": Merger({}, {"lambda": 1.0, "common_share": 0.8}, whole=True),
    "star": Merger({}, {"lambda": 1.0, "eta": 0.4}, whole=True),
}


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "density": (lambda x: x > 0, "a number over 0"),
    "eta": (lambda x: 0 < x <= 1, "a number over 0 and at most 1"),
    "common_share": (lambda x: 0 < x <= 1, "a number over 0 and at most 1"),
    "seed": (lambda x: x >= 0 and x.is_integer(), "a whole number of at least 0"),
}
"""What some parameters may be, as a check and in words."""


def check_gradients(key: str, node: Node, gradients: Sequence[Sequence[float]]) -> None:
    """Raise ConfigError where a parameter, read from `node`, can't take one of these numbers."""
    allowed, words = _RANGES.get(key, (lambda _: True, ""))
    for gradient in gradients:
        for number in gradient:
            if not allowed(number):
                node.fail(f"expected {words}; got {number:g}")
        if key == "seed" and len(gradient) > 1:
            node.fail("a seed has no gradient")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Which tensors SVC calibrates, and how (methods.calibrate).

    `alpha` is None for auto. `include` and `exclude` are glob patterns of names; without `include`
    see matrices.is_matrix. `split` says, by pattern, into how many rows each the outputs of a
    fused weight fall; a single number means so many equal parts.
    """

    alpha: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    split: tuple[tuple[str, tuple[int, ...]], ...] = ()


def parse_calibration(node: Node) -> Calibration:
    """Check `calibrate:`. Raises ConfigError with its place."""
    fields = node.mapping(("method", "alpha", "include", "exclude", "side", "split"))
    if "method" not in fields:
        node.fail("method is missing; svc is the one there is")
    fields["method"].choice(("svc",))
    if "side" in fields and fields["side"].value != "output":
        fields["side"].fail("only the output side is calibrated: on the other the gain is lost")
    return Calibration(
        alpha=_alpha(fields.get("alpha")),
        include=_patterns(fields.get("include")),
        exclude=_patterns(fields.get("exclude")),
        split=_split(fields["split"]) if "split" in fields else (),
    )


def _alpha(node: Node | None) -> float | None:
    if node is None or node.value == "auto":
        return None
    try:
        alpha = 0.0 if isinstance(node.value, bool) else node.number()
    except ConfigError:
        alpha = 0.0
    if alpha <= 0:
        node.fail(
            "expected auto (1/K for K models) or a number over 0; for several alphas write "
            "sweep: {calibrate.alpha: [...]}"
        )
    return alpha


def _patterns(node: Node | None) -> tuple[str, ...]:
    return () if node is None else tuple(item.text() for item in node.items())


def _split(node: Node) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not isinstance(node.value, dict) or not node.value:
        node.fail("expected a mapping from patterns to numbers of rows, or of equal parts")
    return tuple((pattern, _rows(node.mapping([*node.value])[pattern])) for pattern in node.value)


def _rows(node: Node) -> tuple[int, ...]:
    if not isinstance(node.value, list):
        return (node.integer(minimum=2),)
    rows = tuple(item.integer(minimum=1) for item in node.items())
    if len(rows) < 2:
        node.fail("expected the rows of at least two parts, or a number of equal parts")
    return rows
