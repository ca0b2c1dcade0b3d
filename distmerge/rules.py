"""How each output tensor comes from the inputs, and what does not fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

from distmerge.config import Config
from distmerge.errors import ConfigError, MismatchError
from distmerge.layout import Content
from distmerge.parameters import Layers, Parameter, evaluate
from distmerge.schedules import normalized
from distmerge.sources.resolve import Sources
from distmerge.spec import FLOATS, DType, Rule, TensorSpec

SHOWN = 10
"""Differences that an error lists; the rest is counted."""

Weights = tuple[float | None, ...]
"""One per input; None for a donor that takes no part in the sum."""


def contents(config: Config, sources: Sources) -> list[Content]:
    """The output's tensors with their rules, in the donor's order.

    Raises MismatchError that lists what differs between the inputs, ConfigError where a weight is
    missing or weights sum to zero.
    """
    names = _names(sources)
    weigh = _weigher(config, sources, names)
    found: list[Content] = []
    problems: list[str] = []
    rules: dict[Hashable, Rule] = {}
    for name in names:
        specs = [checkpoint.tensors.get(name) for checkpoint in sources.checkpoints]
        weights = weigh(name)
        problem = _disagreement(name, sources, specs) or _absence(
            config, name, sources, specs, weights
        )
        if problem:
            problems.append(problem)
        else:
            found.append(_content(config, sources.donor, name, specs, weights, rules))
    if problems:
        raise MismatchError(_summary(problems, len(names)))
    return found


def _summary(problems: Sequence[str], total: int) -> str:
    lines = [f"the inputs do not fit: {len(problems)} of {total} tensors differ"]
    # Names come from files: what can't be printed must not reach the terminal.
    lines += [f"  {p if p.isprintable() else ascii(p)}" for p in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join(lines)


def _names(sources: Sources) -> list[str]:
    """Every name once: the donor's, then what only other inputs hold."""
    donor = sources.checkpoints[sources.donor]
    names = dict.fromkeys(donor.tensors)
    for checkpoint in sources.checkpoints:
        names.update(dict.fromkeys(checkpoint.tensors))
    return list(names)


def _weigher(config: Config, sources: Sources, names: Sequence[str]) -> Callable[[str], Weights]:
    count = len(sources.checkpoints)
    if sources.coefficients is not None:
        constant = (*sources.coefficients, *[None] * (count - len(sources.coefficients)))
        return lambda _: constant
    layers = Layers(names)
    levels = [(entry.parameters, config.parameters) for entry in config.models]
    # As mergekit: a base model that is not listed takes part where a global weight includes it.
    levels += [({}, config.parameters)] * (count - len(levels))

    def weigh(name: str) -> Weights:
        position = layers.position(name)
        found = tuple(evaluate(level, "weight", name, position) for level in levels)
        for entry, weight in zip(config.models, found, strict=False):
            if weight is None:
                raise ConfigError(
                    f"models: no weight for {entry.model}, tensor {name}; give the model "
                    "parameters: {weight: ...}"
                )
        return _scaled(config.parameters, name, position, found)

    return weigh


def _scaled(
    parameters: dict[str, Parameter], name: str, position: float, found: Weights
) -> Weights:
    """The weights divided by their sum, unless the recipe says normalize: false."""
    if evaluate([parameters], "normalize", name, position) == 0.0:
        return found
    given = normalized([w for w in found if w is not None], f"tensor {name}")
    shares = iter(given)
    return tuple(None if weight is None else next(shares) for weight in found)


def _disagreement(name: str, sources: Sources, specs: Sequence[TensorSpec | None]) -> str | None:
    """Where two inputs hold tensor `name` in ways that can't be summed, in words."""
    present = [(c, s) for c, s in zip(sources.checkpoints, specs, strict=True) if s is not None]
    first, spec = present[0]
    for other, twin in present:
        if twin.dtype.kind == "opaque":
            return f"{name}: dtype {twin.dtype.name} in {other.label} can't be merged"
        if twin.shape != spec.shape:
            return (
                f"{name}: {list(spec.shape)} in {first.label}, {list(twin.shape)} in {other.label}"
            )
        if "exact" in (twin.dtype.kind, spec.dtype.kind) and twin.dtype != spec.dtype:
            return f"{name}: {spec.dtype.name} in {first.label}, {twin.dtype.name} in {other.label}"
    return None


def _absence(
    config: Config,
    name: str,
    sources: Sources,
    specs: Sequence[TensorSpec | None],
    weights: Weights,
) -> str | None:
    """Where an input that counts lacks tensor `name` and the recipe does not say what to do."""
    if None not in specs:
        return None
    absent = [i for i, spec in enumerate(specs) if spec is None and weights[i] is not None]
    if not absent or config.missing == "present":
        return None
    if config.missing == "donor" and specs[sources.donor] is not None:
        return None
    lacking = ", ".join(sources.checkpoints[i].label for i in absent[:3])
    return f"{name}: not in {lacking} (the recipe's missing: donor or present would allow it)"


def _content(
    config: Config,
    donor: int,
    name: str,
    specs: Sequence[TensorSpec | None],
    weights: Weights,
    rules: dict[Hashable, Rule],
) -> Content:
    """`rules` keeps what was made, for there are few rules and there may be a million tensors."""
    given = specs[donor] or next(spec for spec in specs if spec is not None)
    exact = given.dtype.kind == "exact"
    alike = (exact, tuple([spec is None for spec in specs]), weights)
    if alike not in rules:
        rules[alike] = (
            _exact_rule(config, donor, specs) if exact else _sum_rule(config, donor, specs, weights)
        )
    dtype = given.dtype if exact else _output_dtype(config, given.dtype)
    return Content(name, dtype, given.shape, math.prod(given.shape), rules[alike])


def _output_dtype(config: Config, stored: DType) -> DType:
    return FLOATS[config.output_dtype] if config.output_dtype else stored


def _exact_rule(config: Config, donor: int, specs: Sequence[TensorSpec | None]) -> Rule:
    holders = tuple(_holders(donor, specs))
    if config.non_float == "donor" or len(holders) == 1:
        return Rule("copy", holders[:1], ())
    return Rule("equal", holders, ())


def _holders(donor: int, specs: Sequence[TensorSpec | None]) -> Iterator[int]:
    """Inputs that hold the tensor, the donor first."""
    if specs[donor] is not None:
        yield donor
    yield from (i for i, spec in enumerate(specs) if spec is not None and i != donor)


def _sum_rule(
    config: Config, donor: int, specs: Sequence[TensorSpec | None], weights: Weights
) -> Rule:
    wanted = [i for i, weight in enumerate(weights) if weight is not None]
    held = [i for i in wanted if specs[i] is not None]
    if len(held) < len(wanted) and (config.missing == "donor" or not held):
        return Rule("sum", (donor,), (1.0,))
    values = [w for i in held if (w := weights[i]) is not None]
    if len(held) < len(wanted):  # keep the sum that the weights of all would have
        name = next(spec.name for spec in specs if spec is not None)
        total = math.fsum(w for w in weights if w is not None)
        values = [total * share for share in normalized(values, f"{name} in {len(held)} inputs")]
    terms = [(i, value) for i, value in zip(held, values, strict=True) if value] or [(held[0], 0.0)]
    return Rule("sum", tuple(i for i, _ in terms), tuple(value for _, value in terms))
