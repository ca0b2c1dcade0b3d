"""The recipe: mergekit's YAML for `linear`, our own `trajectory` for `average`. Strict.

merge_method: linear                 merge_method: average
models:                              trajectory:
  - model: path-or-repo[@revision]     checkpoints: runs/x/step-*
    parameters: {weight: 0.5}          last: 8
  - ...                                schedule: uniform
parameters: {normalize: true}        out_dtype: bfloat16
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, cast

from distmerge.document import Node, Plain, load
from distmerge.errors import ConfigError
from distmerge.parameters import Parameter, parse_parameter
from distmerge.spec import FLOATS

METHODS = ("average", "linear")
PARAMETERS = ("weight", "normalize")
SCHEDULES = ("uniform", "wma", "ema", "wsm", "weights")
CURVES = ("linear", "minus-sqrt", "cosine")

Missing = Literal["error", "donor", "present"]
NonFloat = Literal["equal", "donor"]

_LATER = {
    "slices": "slices are not supported yet",
    "modules": "modules are not supported yet",
    "tokenizer": "merging tokenizers is not supported yet; without it the donor's is copied",
    "tokenizer_source": "merging tokenizers is not supported yet; without it the donor's is copied",
    "chat_template": "not supported yet; without it the donor's is copied",
}
_KEYS = (
    "merge_method", "models", "trajectory", "base_model", "parameters",
    "dtype", "out_dtype", "missing", "non_float",
)  # fmt: skip


class ModelRef(NamedTuple):
    """A folder or a Hub repository, `path[@revision]`; `commit` is what the revision meant."""

    path: str
    revision: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One of `models:`, with its own parameters."""

    model: ModelRef
    parameters: dict[str, Parameter] = field(default_factory=dict)


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
    """Checkpoints of one run. `checkpoints` is a glob pattern or a tuple of references."""

    checkpoints: str | tuple[ModelRef, ...]
    first: int | None = None
    last: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    min_interval: int | None = None
    schedule: Schedule = Schedule()


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
    base_model: ModelRef | None = None
    parameters: dict[str, Parameter] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    missing: Missing = "error"
    non_float: NonFloat = "equal"

    @property
    def output_dtype(self) -> str | None:
        return self.out_dtype or self.dtype


def load_config(
    source: str | Path | dict[str, Plain], *, overrides: Sequence[str] = (), lenient: bool = False
) -> Config:
    """Read a recipe from a YAML file or a mapping.

    `overrides` are `dotted.key=value`; with `lenient`, unknown keys warn instead of failing.
    Raises ConfigError with file, line and key.
    """
    document = source if isinstance(source, dict) else Path(source)
    root = load(document, overrides=overrides, lenient=lenient)
    if isinstance(root.value, dict):
        for key in [key for key in _LATER if key in root.value]:
            Node(root.value[key], (key,), root.origin).fail(_LATER[key])
    keys = root.mapping(_KEYS)
    if "merge_method" not in keys:
        root.fail(f"merge_method is missing; one of {', '.join(METHODS)}")
    method = keys["merge_method"].choice(METHODS)
    base_model = _parse_ref(keys["base_model"]) if "base_model" in keys else None
    return Config(
        merge_method=method,
        models=_parse_models(root, keys) if method == "linear" else (),
        trajectory=_parse_trajectory(root, keys) if method == "average" else None,
        base_model=base_model,
        parameters=_parse_parameters(keys.get("parameters"), PARAMETERS),
        dtype=_parse_dtype(keys.get("dtype")),
        out_dtype=_parse_dtype(keys.get("out_dtype")),
        missing=cast(Missing, _choice(keys, "missing", ("error", "donor", "present"),
                                      "donor" if base_model else "error")),
        non_float=cast(NonFloat, _choice(keys, "non_float", ("equal", "donor"), "equal")),
    )  # fmt: skip


def _choice(keys: dict[str, Node], key: str, options: Sequence[str], default: str) -> str:
    return keys[key].choice(options) if key in keys else default


def _parse_dtype(node: Node | None) -> str | None:
    if node is None or node.value is None:
        return None
    name = node.text().removeprefix("torch.")
    if name not in FLOATS:
        node.fail(f"dtype {name!r} is not supported; one of {', '.join(FLOATS)}")
    return name


def _parse_ref(node: Node) -> ModelRef:
    """'path', 'path@revision', or mergekit's {model: {path, revision}}."""
    if isinstance(node.value, dict):
        fields = node.mapping(("model",))
        if "model" not in fields:
            node.fail("expected {model: {path: ..., revision: ...}}")
        inner = fields["model"].mapping(("path", "revision"))
        if "path" not in inner:
            fields["model"].fail("path is missing")
        return ModelRef(
            inner["path"].text(), inner["revision"].text() if "revision" in inner else None
        )
    try:
        return parse_reference(node.text())
    except ConfigError as error:
        node.fail(str(error))


def as_path(text: str) -> Path:
    """`text` as a path, with ~ expanded. Raises ConfigError where it can't be one."""
    try:
        path = Path(text).expanduser()
        path.exists()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{text[:60]!r} can't be a path: {reason}") from error
    return path


def parse_reference(text: str) -> ModelRef:
    """The model that 'path' or 'path@revision' names. Raises ConfigError."""
    if as_path(text).exists():
        return ModelRef(text)
    if "+" in text:
        raise ConfigError(f"{text}: LoRA adapters (model+adapter) are not supported yet")
    path, at, revision = text.partition("@")
    if at and ("@" in revision or not revision or not path):
        raise ConfigError(f"expected path or path@revision; got {text!r}")
    return ModelRef(path, revision or None)


def _parse_models(root: Node, keys: dict[str, Node]) -> tuple[ModelEntry, ...]:
    if "models" not in keys:
        root.fail("merge_method: linear needs models:")
    if "trajectory" in keys:
        keys["trajectory"].fail("it belongs to merge_method: average; linear takes models:")
    entries = tuple(_parse_model(node) for node in keys["models"].items())
    if not entries:
        keys["models"].fail("no model is listed")
    return entries


def _parse_model(node: Node) -> ModelEntry:
    fields = node.mapping(("model", "parameters"))
    if "model" not in fields:
        node.fail("model is missing")
    parameters = _parse_parameters(fields.get("parameters"), ("weight",))
    return ModelEntry(model=_parse_ref(fields["model"]), parameters=parameters)


def _parse_parameters(node: Node | None, known: Sequence[str]) -> dict[str, Parameter]:
    if node is None or node.value is None:
        return {}
    return {key: parse_parameter(value) for key, value in node.mapping(known).items()}


def _parse_trajectory(root: Node, keys: dict[str, Node]) -> Trajectory:
    if "trajectory" not in keys:
        root.fail("merge_method: average needs trajectory:")
    for key in ("models", "parameters"):
        if key in keys:
            keys[key].fail("belongs to merge_method: linear; average takes trajectory:")
    counts = ("first", "last", "from_step", "to_step", "min_interval")
    node = keys["trajectory"]
    fields = node.mapping(("checkpoints", *counts, "schedule", "reverse", "scramble", "normalize"))
    if "checkpoints" not in fields:
        node.fail("checkpoints is missing: a list, a glob pattern, or {repo, revisions}")
    if "first" in fields and "last" in fields:
        fields["first"].fail("first and last can't both be given")
    minimum = {"from_step": 0, "to_step": 0}
    numbers = {k: fields[k].integer(minimum=minimum.get(k, 1)) for k in counts if k in fields}
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
    return tuple(_parse_ref(item) for item in node.items())


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
