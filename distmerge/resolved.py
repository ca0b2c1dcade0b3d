"""The recipe as it was carried out: numbers, absolute folders, commits. It can be run again."""

from __future__ import annotations

from collections.abc import Sequence

from distmerge.config import Config, Extrapolation
from distmerge.document import Plain
from distmerge.mergers import Calibration
from distmerge.parameters import Parameter
from distmerge.reference import ModelRef
from distmerge.trajectory import Schedule, Trajectory


def as_recipe(config: Config, coefficients: Sequence[float]) -> dict[str, Plain]:
    """A mapping that `load_recipe` takes; `coefficients` are those of an averaged trajectory."""
    recipe: dict[str, Plain] = {"merge_method": config.merge_method}
    if config.trajectory is not None and config.extrapolation is not None:
        recipe["trajectory"] = _windowed(config.trajectory)
        recipe["parameters"] = _extrapolation(config.extrapolation)
    elif config.trajectory is not None:
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
    if config.calibration is not None:
        recipe["calibrate"] = _calibration(config.calibration)
    if config.base_model:
        recipe["base_model"] = _name(config.base_model)
    for key, value in (("dtype", config.dtype), ("out_dtype", config.out_dtype)):
        if value:
            recipe[key] = value
    return {**recipe, "missing": config.missing, "non_float": config.non_float}


def _windowed(trajectory: Trajectory) -> dict[str, Plain]:
    """Not as coefficients: they are in the manifest, and this says where they come from."""
    return {
        "checkpoints": [_name(ref) for ref in trajectory.checkpoints],
        "window": trajectory.window,
        "stride": trajectory.stride,
        **_schedule(trajectory.schedule),
    }


def _schedule(schedule: Schedule) -> dict[str, Plain]:
    kind: Plain = schedule.kind
    if schedule.kind == "ema":
        kind = {"ema": schedule.numbers[0]}
    elif schedule.kind in ("wsm", "weights"):
        kind = {schedule.kind: schedule.curve or list(schedule.numbers)}
    found: dict[str, Plain] = {"schedule": kind}
    if schedule.scramble is not None:
        found["scramble"] = schedule.scramble
    given = {"reverse": schedule.reverse, "normalize": schedule.normalize}
    return {**found, **{key: True for key, value in given.items() if value}}


def _extrapolation(extrapolation: Extrapolation) -> dict[str, Plain]:
    step: Plain = {"span": extrapolation.step} if extrapolation.spans else extrapolation.step
    return {
        "step": step,
        "direction": extrapolation.direction,
        "exclude": list(extrapolation.exclude),
    }


def _calibration(calibration: Calibration) -> dict[str, Plain]:
    recipe: dict[str, Plain] = {
        "method": "svc",
        "alpha": "auto" if calibration.alpha is None else calibration.alpha,
        "exclude": list(calibration.exclude),
    }
    if calibration.include:
        recipe["include"] = list(calibration.include)
    if calibration.split:
        recipe["split"] = {
            pattern: list(rows) if len(rows) > 1 else rows[0] for pattern, rows in calibration.split
        }
    return recipe


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
