"""How a tensor comes from task vectors: which method, with which numbers, cut into what. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from distmerge.config import Config
from distmerge.errors import ConfigError
from distmerge.matrices import Shape, is_matrix, is_transposed
from distmerge.mergers import MERGERS
from distmerge.parameters import Layers, evaluate
from distmerge.sources.resolve import Sources
from distmerge.spec import ELEMENTWISE, Cut, Rule, Task
from distmerge.sweep import Recipe

_NO_SUM = 1e-8
"""Weights with a smaller sum are not divided by it, as in mergekit."""

Terms = dict[int, float]


class TaskRules:
    """The rules of a recipe on task vectors.

    Raises ConfigError where no model is left beside the base, a pattern matches no tensor, or
    `calibrate` leaves no tensor.
    """

    def __init__(self, recipe: Recipe, sources: Sources, names: Sequence[str]):
        self._config = recipe.shared
        self._configs = [variant.config for variant in recipe.variants]
        self._facts, self._base = sources.facts, sources.donor
        self._layers = Layers(names)
        self._tasks = [n for n in range(len(self._config.models)) if n != self._base]
        self._whole = MERGERS[self._config.merge_method].whole
        if not self._tasks:
            raise ConfigError("models: all of them are the base_model; nothing is left to merge")
        for key, pattern in self._patterns():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"calibrate.{key}: {pattern!r} matches no tensor{_first(names)}")
        self._cuts = {name: cut for name in names if (cut := self._cut(name, sources))}
        if self._config.calibration and not self._cuts:
            raise ConfigError("calibrate: it leaves no matrix to calibrate; see include:")
        for pattern, _ in self._split:
            if not any(fnmatchcase(name, pattern) for name in self._cuts):
                raise ConfigError(
                    f"calibrate.split: {pattern!r} matches no matrix that is calibrated"
                    f"{_first([*self._cuts])}"
                )

    def _patterns(self) -> list[tuple[str, str]]:
        c = self._config.calibration
        if c is None:
            return []
        listed = (("include", c.include), ("exclude", c.exclude))
        return [(key, pattern) for key, patterns in listed for pattern in patterns]

    @property
    def _split(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        return self._config.calibration.split if self._config.calibration else ()

    def rule(self, name: str, sum_rule: Callable[[Sequence[Terms]], Rule]) -> Rule:
        """How the float tensor `name` comes about, in every output; all inputs hold it."""
        tasks = tuple(self._task(config, name) for config in self._configs)
        cut = self._cuts.get(name)
        method = self._config.merge_method
        if cut is None and (self._whole or method in ("task_arithmetic", "expo")):
            return sum_rule([self._terms(task) for task in tasks])
        return Rule("tasks", (self._base, *self._tasks), tasks=tasks, cut=cut)

    def _terms(self, task: Task) -> Terms:
        """base + scale * sum of w_i * tau_i, as coefficients of the inputs."""
        total = sum(task.weights)
        divisor = total if task.normalize and abs(total) >= _NO_SUM else 1.0
        shares = [task.scale * weight / divisor for weight in task.weights]
        return {self._base: 1.0 - sum(shares), **dict(zip(self._tasks, shares, strict=True))}

    def _task(self, config: Config, name: str) -> Task:
        position = self._layers.position(name)
        method = config.merge_method
        merger = MERGERS[method]

        def shared(key: str, default: float) -> float:
            found = evaluate([config.parameters], key, name, position)
            known = merger.shared.get(key)
            return found if found is not None else default if known is None else known

        def own(key: str) -> tuple[float, ...]:
            return tuple(self._own(config, number, key, name, position) for number in self._tasks)

        count = len(self._tasks)
        weighted, sparse = "weight" in merger.own, method in ELEMENTWISE
        alike = 1.0 if method == "expo" else 1.0 / count
        return Task(
            method=method,
            weights=own("weight") if weighted else (alike,) * count,
            densities=tuple(min(x, 1.0) for x in own("density")) if sparse else (1.0,) * count,
            normalize=shared("normalize", 0.0) != 0.0,
            rescale=sparse and shared("rescale", 0.0) != 0.0,
            seed=int(shared("seed", 0.0)),
            share=shared("eta" if method == "star" else "common_share", 1.0),
            scale=shared("alpha" if method == "expo" else "lambda", 1.0),
            alpha=self._alpha(config) if name in self._cuts else None,
        )

    def _own(self, config: Config, number: int, key: str, name: str, position: float) -> float:
        levels = [config.models[number].parameters, config.parameters]
        found = evaluate(levels, key, name, position)
        default = MERGERS[config.merge_method].own[key]
        if found is not None or default is not None:
            return found if found is not None else default  # type: ignore[return-value]
        raise ConfigError(
            f"models: no {key} for {config.models[number].model}, tensor {name}; give the model "
            f"parameters: {{{key}: ...}}"
        )

    def _alpha(self, config: Config) -> float | None:
        """auto: what is merged of K tasks is suppressed and amplified by up to K, but that of
        tsv_m, which has no interference left to undo, only suppressed."""
        if config.calibration is None:
            return None
        auto = 1.0 if config.merge_method == "tsv_m" else 1.0 / len(self._tasks)
        return auto if config.calibration.alpha is None else config.calibration.alpha

    def _cut(self, name: str, sources: Sources) -> Cut | None:
        """How a tensor falls into matrices, if the method is one of whole matrices for it."""
        spec = sources.checkpoints[self._base].tensors.get(name)
        calibration = self._config.calibration
        if spec is None or spec.dtype.kind != "float" or len(spec.shape) not in (2, 3):
            return None
        if 0 in spec.shape or not (self._whole or calibration):
            return None
        if calibration is None:
            wanted = is_matrix(name, spec.shape, self._facts)
        else:
            included = (
                any(fnmatchcase(name, pattern) for pattern in calibration.include)
                if calibration.include
                else is_matrix(name, spec.shape, self._facts)
            )
            wanted = included and not any(fnmatchcase(name, p) for p in calibration.exclude)
        if not wanted:
            return None
        transposed = is_transposed(name, spec.shape, self._facts)
        return Cut(transposed, self._parts(name, spec.shape, transposed=transposed))

    def _parts(self, name: str, shape: Shape, *, transposed: bool) -> tuple[int, ...]:
        outputs = shape[-1] if transposed else shape[-2]
        for pattern, rows in self._split:
            if not fnmatchcase(name, pattern):
                continue
            if len(rows) == 1 and outputs % rows[0] == 0:
                return (outputs // rows[0],) * rows[0]
            if len(rows) == 1 or sum(rows) != outputs:
                parts = f"{rows[0]} equal parts" if len(rows) == 1 else f"{sum(rows)} in all"
                raise ConfigError(
                    f"calibrate.split: {pattern}: {name} has {outputs} outputs, not {parts}"
                )
            return rows
        return (outputs,)


def _first(names: Sequence[str]) -> str:
    return f"; the first is {names[0]!r}" if names else ""
