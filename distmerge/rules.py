"""How each output tensor comes from the inputs, and what does not fit. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial

from distmerge.config import Config
from distmerge.errors import ConfigError, MismatchError
from distmerge.layout import Content
from distmerge.mergers import MERGERS
from distmerge.parameters import Layers, Parameter, evaluate
from distmerge.schedules import normalized
from distmerge.sources.resolve import Row, Sources
from distmerge.spec import FLOATS, DType, Rule, TensorSpec
from distmerge.sweep import Recipe
from distmerge.task_rules import TaskRules

SHOWN = 10
"""Differences that an error lists; the rest is counted."""

Weights = tuple[float | None, ...]
"""One per input; None for a donor that takes no part in the sum."""


def contents(recipe: Recipe, sources: Sources) -> list[Content]:
    """The tensors of every output with their rules, in the donor's order.

    Raises MismatchError that lists what differs between the inputs, ConfigError where a weight is
    missing, weights sum to zero, or a pattern matches no tensor.
    """
    names = _names(sources)
    _check_patterns(recipe.shared, names)
    on_tasks = TaskRules(recipe, sources, names) if recipe.shared.merge_method in MERGERS else None
    weigh = _weigher(recipe, sources, names)
    found: list[Content] = []
    problems: list[str] = []
    rules: dict[Hashable, Rule] = {}
    for name in names:
        specs = [checkpoint.tensors.get(name) for checkpoint in sources.checkpoints]
        rows = weigh(name)
        problem = _disagreement(name, sources, specs) or _absence(
            recipe.shared, name, sources, specs, rows
        )
        if problem:
            problems.append(problem)
        else:
            content = _content(recipe.shared, sources.donor, name, specs, rows, rules)
            if on_tasks and content.dtype.kind == "float" and None not in specs:
                rule = on_tasks.rule(name, sum_rule)
                content = content._replace(rule=rules.setdefault(rule, rule))
            found.append(content)
    if problems:
        raise MismatchError(_summary(problems, len(names)))
    if recipe.shared.extrapolation and all(content.rule.kind != "trend" for content in found):
        raise ConfigError("extra_merge: parameters.exclude leaves no float tensor to extrapolate")
    return found


def _check_patterns(config: Config, names: Sequence[str]) -> None:
    for pattern in config.extrapolation.exclude if config.extrapolation else ():
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"parameters.exclude: {pattern!r} matches no tensor; the first is {names[0]!r}"
                if names
                else f"parameters.exclude: {pattern!r}: the inputs hold no tensor"
            )


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


def _weigher(
    recipe: Recipe, sources: Sources, names: Sequence[str]
) -> Callable[[str], tuple[Row, ...]]:
    """The coefficients of every output for a tensor; on task vectors all inputs count."""
    if recipe.shared.merge_method in MERGERS:
        all_count: tuple[Row, ...] = ((1.0,) * len(sources.checkpoints),) * len(recipe.variants)
        return lambda _: all_count
    if (rows := sources.rows) is not None:
        return lambda _: rows
    layers = Layers(names)
    each = [_weigh_one(variant.config, sources, layers) for variant in recipe.variants]
    return lambda name: tuple(weigh(name) for weigh in each)


def _weigh_one(config: Config, sources: Sources, layers: Layers) -> Callable[[str], Row]:
    levels = [(entry.parameters, config.parameters) for entry in config.models]
    # As mergekit: a base model that is not listed takes part where a global weight includes it.
    levels += [({}, config.parameters)] * (len(sources.checkpoints) - len(levels))

    def weigh(name: str) -> Row:
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


def _scaled(parameters: dict[str, Parameter], name: str, position: float, found: Row) -> Row:
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
    rows: Sequence[Row],
) -> str | None:
    """Where an input that counts lacks tensor `name` and the recipe does not say what to do."""
    if None not in specs:
        return None
    absent = [
        i
        for i, spec in enumerate(specs)
        if spec is None and any(row[i] is not None for row in rows)
    ]
    if not absent or (config.missing == "donor" and specs[sources.donor] is not None):
        return None
    if config.missing == "present":
        nowhere = specs[sources.donor] is None and not all(map(partial(_holds, specs), rows))
        return f"{name}: no input of one of the outputs holds it" if nowhere else None
    lacking = ", ".join(sources.checkpoints[i].label for i in absent[:3])
    ways = ["donor"] if specs[sources.donor] is not None else []
    if config.extrapolation is None and config.merge_method not in MERGERS:
        ways.append("present")
    remedy = f" (the recipe's missing: {' or '.join(ways)} would allow it)" if ways else ""
    return f"{name}: not in {lacking}{remedy}"


def _holds(specs: Sequence[TensorSpec | None], row: Row) -> bool:
    return any(s is not None and w is not None for s, w in zip(specs, row, strict=True))


def _content(
    config: Config,
    donor: int,
    name: str,
    specs: Sequence[TensorSpec | None],
    rows: tuple[Row, ...],
    rules: dict[Hashable, Rule],
) -> Content:
    """`rules` keeps what was made, for there are few rules and there may be a million tensors."""
    given = specs[donor] or next(spec for spec in specs if spec is not None)
    exact = given.dtype.kind == "exact"
    moved = not exact and _is_moved(config, name)
    alike = (exact, moved, tuple([spec is None for spec in specs]), rows)
    if alike not in rules:
        rules[alike] = (
            _exact_rule(config, donor, specs)
            if exact
            else _float_rule(config, donor, specs, rows, moved=moved)
        )
    dtype = given.dtype if exact else _output_dtype(config, given.dtype)
    return Content(name, dtype, given.shape, math.prod(given.shape), rules[alike])


def _is_moved(config: Config, name: str) -> bool:
    """Whether the recipe extrapolates tensor `name`."""
    extrapolation = config.extrapolation
    return extrapolation is not None and not any(
        fnmatchcase(name, pattern) for pattern in extrapolation.exclude
    )


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


def _float_rule(
    config: Config,
    donor: int,
    specs: Sequence[TensorSpec | None],
    rows: tuple[Row, ...],
    *,
    moved: bool,
) -> Rule:
    listed = [i for i, weight in enumerate(rows[0]) if weight is not None]
    if moved and all(specs[i] is not None for i in listed):
        return Rule("trend", tuple(listed))
    return sum_rule([_terms(config, donor, specs, row) for row in rows])


def sum_rule(outputs: Sequence[dict[int, float]]) -> Rule:
    """The rule of a sum whose outputs are given as coefficients by input."""
    inputs = sorted({i for terms in outputs for i in terms})
    return Rule(
        "sum",
        tuple(inputs),
        tuple(tuple(terms.get(i, 0.0) for i in inputs) for terms in outputs),
    )


def nonzero(terms: dict[int, float]) -> dict[int, float]:
    """`terms` without those that add nothing, but for one."""
    return {i: value for i, value in terms.items() if value} or dict([min(terms.items())])


def _terms(
    config: Config, donor: int, specs: Sequence[TensorSpec | None], row: Row
) -> dict[int, float]:
    """Coefficients by input, for the inputs that count."""
    wanted = [i for i, weight in enumerate(row) if weight is not None]
    held = [i for i in wanted if specs[i] is not None]
    if len(held) < len(wanted) and (config.missing == "donor" or not held):
        return {donor: 1.0}
    values = [w for i in held if (w := row[i]) is not None]
    if len(held) < len(wanted):  # keep the sum that the weights of all would have
        name = next(spec.name for spec in specs if spec is not None)
        total = math.fsum(w for w in row if w is not None)
        values = [total * share for share in normalized(values, f"{name} in {len(held)} inputs")]
    return nonzero(dict(zip(held, values, strict=True)))
