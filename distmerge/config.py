"""The recipe of one output, strict: mergekit's YAML for models, a `trajectory` for checkpoints.

merge_method: linear                 merge_method: extra_merge
models:                              trajectory: {checkpoints: runs/x/step-*, window: 8}
  - model: path-or-repo[@revision]   parameters:
    parameters: {weight: 0.5}          step: 0.5        # merge intervals, or {span: share}
  - ...                                direction: principal
parameters: {normalize: true}          exclude: [lm_head.*]

The methods on task vectors are in `mergers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from distmerge.document import Node
from distmerge.mergers import MERGERS, Calibration, check_gradients, parse_calibration
from distmerge.parameters import Parameter, parse_parameter
from distmerge.reference import ModelRef, parse_model
from distmerge.spec import FLOATS
from distmerge.trajectory import Trajectory, parse_trajectory

METHODS = ("average", "extra_merge", "linear", *MERGERS)
PARAMETERS = ("weight", "normalize")

Missing = Literal["error", "donor", "present"]
NonFloat = Literal["equal", "donor"]
Direction = Literal["principal", "secant"]

_LATER = {
    "slices": "slices are not supported yet",
    "modules": "modules are not supported yet",
    "tokenizer": "merging tokenizers is not supported yet; without it the donor's is copied",
    "tokenizer_source": "merging tokenizers is not supported yet; without it the donor's is copied",
    "chat_template": "not supported yet; without it the donor's is copied",
}
_KEYS = (
    "merge_method", "models", "trajectory", "base_model", "parameters", "calibrate", "sweep",
    "select", "publish", "dtype", "out_dtype", "missing", "non_float",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One of `models:`, with its own parameters."""

    model: ModelRef
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extrapolation:
    """How far beyond the last merged checkpoint, and which way (methods.extrapolate).

    `step` counts merge intervals or, with `spans`, whole spans of the merged trajectory. Tensors
    whose names match a glob pattern of `exclude` stay at the average.
    """

    step: float
    spans: bool = False
    direction: Direction = "principal"
    exclude: tuple[str, ...] = ()

    def intervals(self, merged: int) -> float:
        """The step in merge intervals, on a trajectory of `merged` checkpoints."""
        return self.step * (merged - 1) if self.spans else self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A checked recipe.

    `dtype` and `out_dtype` are torch names; the output takes `out_dtype`, else `dtype`, else the
    donor's. `missing` says what becomes of a tensor that not all inputs hold, `non_float` what
    becomes of integer and bool tensors.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] = ()
    trajectory: Trajectory | None = None
    extrapolation: Extrapolation | None = None
    base_model: ModelRef | None = None
    parameters: dict[str, Parameter] = field(default_factory=dict)
    calibration: Calibration | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    missing: Missing = "error"
    non_float: NonFloat = "equal"

    @property
    def output_dtype(self) -> str | None:
        return self.out_dtype or self.dtype


def parse_config(root: Node) -> Config:
    """Check a document, but for `sweep`, `select`, `publish`. Raises ConfigError with its place."""
    if isinstance(root.value, dict):
        for key in [key for key in _LATER if key in root.value]:
            Node(root.value[key], (key,), root.origin).fail(_LATER[key])
    keys = root.mapping(_KEYS)
    if "merge_method" not in keys:
        root.fail(f"merge_method is missing; one of {', '.join(METHODS)}")
    method = keys["merge_method"].choice(METHODS)
    extrapolates, on_tasks = method == "extra_merge", method in MERGERS
    base_model = parse_model(keys["base_model"]) if "base_model" in keys else None
    models = _parse_models(root, keys, method) if on_tasks or method == "linear" else ()
    if on_tasks:
        _check_tasks(root, method, models, base_model)
    if "calibrate" in keys and not on_tasks:
        keys["calibrate"].fail(f"{method} has no task vectors; one of {', '.join(MERGERS)} has")
    calibrated = "calibrate" in keys and keys["calibrate"].value is not None
    return Config(
        merge_method=method,
        models=models,
        trajectory=None if models else _parse_trajectory(root, keys, method),
        extrapolation=_parse_extrapolation(root, keys) if extrapolates else None,
        base_model=base_model,
        parameters=_parse_shared(root, keys, method) if models else {},
        calibration=parse_calibration(keys["calibrate"]) if calibrated else None,
        dtype=_parse_dtype(keys.get("dtype")),
        out_dtype=_parse_dtype(keys.get("out_dtype")),
        missing=cast(Missing, _choice(
            keys, "missing",
            ("error", "donor") if extrapolates or on_tasks else ("error", "donor", "present"),
            "donor" if base_model else "error")),
        non_float=cast(NonFloat, _choice(keys, "non_float", ("equal", "donor"), "equal")),
    )  # fmt: skip


def _check_tasks(
    root: Node, method: str, models: Sequence[ModelEntry], base_model: ModelRef | None
) -> None:
    """Raise ConfigError where there is no base, or nothing beside it."""
    if base_model is None:
        root.fail(f"merge_method: {method} needs base_model:, from which its models were tuned")
    tasks = [entry for entry in models if entry.model != base_model]
    if not tasks or (method == "expo" and len(tasks) > 1):
        count = "one model" if method == "expo" else "at least one model"
        root.fail(f"merge_method: {method} needs {count} beside base_model under models:")


def _choice(keys: dict[str, Node], key: str, options: Sequence[str], default: str) -> str:
    return keys[key].choice(options) if key in keys else default


def _parse_dtype(node: Node | None) -> str | None:
    if node is None or node.value is None:
        return None
    name = node.text().removeprefix("torch.")
    if name not in FLOATS:
        node.fail(f"dtype {name!r} is not supported; one of {', '.join(FLOATS)}")
    return name


def _parse_models(root: Node, keys: dict[str, Node], method: str) -> tuple[ModelEntry, ...]:
    if "models" not in keys:
        root.fail(f"merge_method: {method} needs models:")
    if "trajectory" in keys:
        keys["trajectory"].fail(f"it belongs to merge_method: average; {method} takes models:")
    known = [*MERGERS[method].own] if method in MERGERS else ["weight"]
    entries = tuple(_parse_entry(node, known) for node in keys["models"].items())
    if not entries:
        keys["models"].fail("no model is listed")
    return entries


def _parse_entry(node: Node, known: Sequence[str]) -> ModelEntry:
    fields = node.mapping(("model", "parameters"))
    if "model" not in fields:
        node.fail("model is missing")
    parameters = _parse_parameters(fields.get("parameters"), known)
    return ModelEntry(model=parse_model(fields["model"]), parameters=parameters)


def _parse_shared(root: Node, keys: dict[str, Node], method: str) -> dict[str, Parameter]:
    merger = MERGERS.get(method)
    known = (*merger.shared, *merger.own) if merger else PARAMETERS
    found = _parse_parameters(keys.get("parameters"), known)
    for name, default in merger.shared.items() if merger else ():
        if default is None and name not in found:
            keys.get("parameters", root).fail(f"{name} is missing")
    return found


def _parse_parameters(node: Node | None, known: Sequence[str]) -> dict[str, Parameter]:
    if node is None or node.value is None:
        return {}
    if not known and node.value:
        node.fail("this merge_method takes no parameters here")
    return {key: _parse_parameter(key, value) for key, value in node.mapping(known).items()}


def _parse_parameter(key: str, node: Node) -> Parameter:
    found = parse_parameter(node)
    check_gradients(key, node, [conditional.anchors for conditional in found])
    return found


def _parse_trajectory(root: Node, keys: dict[str, Node], method: str) -> Trajectory:
    if "trajectory" not in keys:
        root.fail(f"merge_method: {method} needs trajectory:")
    for key in ("models", "parameters") if method == "average" else ("models",):
        if key in keys:
            keys[key].fail(f"belongs to merge_method: linear; {method} takes trajectory:")
    return parse_trajectory(keys["trajectory"], windowed=method == "extra_merge")


def _parse_extrapolation(root: Node, keys: dict[str, Node]) -> Extrapolation:
    node = keys.get("parameters", Node({}, ("parameters",), root.origin))
    fields = node.mapping(("step", "direction", "exclude"))
    if "step" not in fields:
        node.fail(
            "step is missing: merge intervals beyond the last merged checkpoint, a number or a "
            "list (with select:, held-out data choose), or {span: share}"
        )
    spans = isinstance(fields["step"].value, dict)
    step = fields["step"].mapping(("span",)).get("span") if spans else fields["step"]
    if step is None:
        fields["step"].fail("expected a number, a list of numbers, or {span: number or list}")
    patterns = [item.text() for item in fields["exclude"].items()] if "exclude" in fields else []
    direction = _choice(fields, "direction", ("principal", "secant"), "principal")
    return Extrapolation(
        step=step.number(),
        spans=spans,
        direction=cast(Direction, direction),
        exclude=tuple(patterns),
    )
