"""The recipe as it was carried out: numbers, absolute folders, commits. It can be run again."""

from __future__ import annotations

from distmerge.config import Config, ModelRef
from distmerge.document import Plain
from distmerge.parameters import Parameter


def as_recipe(config: Config, coefficients: tuple[float, ...] | None) -> dict[str, Plain]:
    """A mapping that `load_config` takes; `coefficients` are those of a trajectory."""
    recipe: dict[str, Plain] = {"merge_method": config.merge_method}
    if config.trajectory is not None:
        assert coefficients is not None
        recipe["trajectory"] = {
            "checkpoints": [_name(ref) for ref in config.trajectory.checkpoints],
            "schedule": {"weights": list(coefficients)},
        }
    else:
        recipe["models"] = [
            {"model": _name(entry.model), "parameters": _parameters(entry.parameters)}
            for entry in config.models
        ]
        recipe["parameters"] = _parameters(config.parameters)
    if config.base_model:
        recipe["base_model"] = _name(config.base_model)
    for key, value in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
        if value:
            recipe[key] = value
    return {**recipe, "missing": config.missing, "non_float": config.non_float}


def _name(ref: ModelRef | str) -> str:
    if isinstance(ref, str):
        return ref
    return f"{ref.path}@{ref.commit}" if ref.commit else ref.path


def _parameters(parameters: dict[str, Parameter]) -> Plain:
    return {key: _parameter(value) for key, value in parameters.items()}


def _parameter(parameter: Parameter) -> Plain:
    if len(parameter) == 1 and parameter[0].filter is None:
        return _anchors(parameter[0].anchors)
    return [
        {"filter": conditional.filter or "*", "value": _anchors(conditional.anchors)}
        for conditional in parameter
    ]


def _anchors(anchors: tuple[float, ...]) -> Plain:
    return anchors[0] if len(anchors) == 1 else list(anchors)
