"""From the recipe's names to folders: globs, steps, Hub repositories."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from distmerge.config import Config, ModelEntry
from distmerge.errors import ConfigError, SourceError
from distmerge.matrices import Facts
from distmerge.reference import ModelRef, as_path, parse_reference
from distmerge.schedules import coefficients, select, step_of, windows
from distmerge.sources import hub
from distmerge.sources.checkpoint import Checkpoint, open_checkpoint
from distmerge.sources.sidecars import model_facts
from distmerge.sweep import Recipe
from distmerge.trajectory import Trajectory

Row = tuple[float | None, ...]
"""A coefficient for each input; None for one that takes no part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What a recipe reads.

    `inputs` are, for each output, the positions of the checkpoints that its recipe names. `rows`
    are, for each output, the coefficients along a trajectory; where the recipe extrapolates,
    those of the last merged checkpoint. None without a trajectory. `facts` are the donor's.
    """

    checkpoints: tuple[Checkpoint, ...]
    donor: int
    inputs: tuple[tuple[int, ...], ...]
    rows: tuple[Row, ...] | None
    facts: Facts


def pinned(recipe: Recipe) -> Recipe:
    """`recipe` with its trajectories selected and every Hub repository at a commit.

    Raises ConfigError or SourceError.
    """
    pin = cache(_pin)
    shared = recipe.shared
    models = tuple(pin(entry.model) for entry in shared.models)
    base = pin(shared.base_model) if shared.base_model else None
    refs, steps = _listed(shared.trajectory) if shared.trajectory else ([], None)
    variants, union = [], set()
    for variant in recipe.variants:
        config = replace(variant.config, models=_with(variant.config.models, models))
        if trajectory := config.trajectory:
            taken = select(steps or range(len(refs)), trajectory)
            union.update(taken)
            checkpoints = tuple(pin(refs[i]) for i in taken)
            kept = ("window", "stride", "schedule")
            bare = {name: getattr(trajectory, name) for name in kept}
            config = replace(config, trajectory=Trajectory(checkpoints=checkpoints, **bare))
        variants.append(variant._replace(config=replace(config, base_model=base)))
    inputs = tuple(pin(refs[i]) for i in sorted(union)) or models
    return replace(recipe, variants=tuple(variants), inputs=inputs)


def _with(entries: Iterable[ModelEntry], models: Iterable[ModelRef]) -> tuple[ModelEntry, ...]:
    return tuple(replace(entry, model=ref) for entry, ref in zip(entries, models, strict=True))


def open_sources(recipe: Recipe, *, local_only: bool, stream_remote: bool = False) -> Sources:
    """Fetch what is on the Hub and open every input of a `pinned` recipe (headers only).

    With `stream_remote` no weights are fetched: they are read by ranges when they are needed.
    Raises SourceError; ConfigError where the outputs of a sweep differ in their donor.
    """
    shared = recipe.shared
    refs = list(recipe.inputs)
    steps: Sequence[int | None] = (shared.trajectory and _steps(refs)) or [None] * len(refs)
    if shared.base_model and shared.base_model not in refs:
        refs = [*refs, shared.base_model]
        steps = [*steps, None]
    fetch = partial(hub.stay_remote if stream_remote else hub.download, local_only=local_only)
    opened: list[Checkpoint] = []
    for ref, step in zip(refs, steps, strict=True):
        opened.append(_open(ref, fetch, step, twin=opened[-1] if opened else None))
    configs = [variant.config for variant in recipe.variants]
    donor = _donor(configs, refs)
    return Sources(
        checkpoints=tuple(opened),
        donor=donor,
        inputs=tuple(_named(config, refs) for config in configs),
        rows=tuple(_row(c, refs) for c in configs) if shared.trajectory else None,
        facts=model_facts(opened[donor].folder),
    )


def _named(config: Config, refs: Sequence[ModelRef]) -> tuple[int, ...]:
    """Positions of all that `config` names, as a run of its own would order them; a model that is
    listed twice stands there twice."""
    if config.trajectory is None:
        return tuple(range(len(refs)))
    own = {i for i, ref in enumerate(refs) if ref in config.trajectory.checkpoints}
    base = {refs.index(config.base_model)} if config.base_model else set()
    return (*sorted(own), *(base - own))


def _donor(configs: Sequence[Config], refs: Sequence[ModelRef]) -> int:
    """The base model, else the last checkpoint of a trajectory, else the first model."""
    shared = configs[0]
    if shared.base_model:
        return refs.index(shared.base_model)
    if shared.trajectory is None:
        return 0
    last = {c.trajectory.checkpoints[-1] for c in configs if c.trajectory}
    if len(last) > 1:
        raise ConfigError(
            "sweep: the outputs end with different checkpoints; say with base_model: which one "
            "gives config and tokenizer"
        )
    return list(refs).index(last.pop())  # type: ignore[arg-type]


def _row(config: Config, refs: Sequence[ModelRef]) -> Row:
    trajectory = config.trajectory
    assert trajectory is not None, "only trajectories have rows"
    own = tuple(trajectory.checkpoints)
    values = (
        windows(trajectory, len(own))[-1]
        if config.extrapolation
        else coefficients(trajectory.schedule, len(own))
    )
    by_ref = dict(zip(own, values, strict=True))
    return tuple(by_ref.get(ref) for ref in refs)


def open_reference(text: str) -> Checkpoint:
    """Open what 'path' or 'path@revision' names, whole. Raises ConfigError or SourceError."""
    return _open(_pin(parse_reference(text)), partial(hub.download, local_only=False))


def is_local(ref: ModelRef) -> bool:
    return as_path(ref.path).exists() or not hub.looks_like_repo(ref.path)


def _pin(ref: ModelRef) -> ModelRef:
    if not is_local(ref):
        return hub.pin(ref)
    if ref.revision:
        raise SourceError(f"{ref}: {ref.path} is a folder here, and a folder has no revisions")
    return ModelRef(str(as_path(ref.path).resolve()))


def _pin_local(ref: ModelRef) -> ModelRef:
    """Steps are in the names of folders, and of revisions: the Hub is asked for those taken."""
    return _pin(ref) if is_local(ref) else ref


def _open(
    ref: ModelRef,
    fetch: Callable[[ModelRef], hub.Fetched],
    step: int | None = None,
    twin: Checkpoint | None = None,
) -> Checkpoint:
    folder, remote = hub.Fetched(Path(ref.path)) if is_local(ref) else fetch(ref)
    if not folder.is_dir():
        what = (
            "it is a file: name the folder that holds it" if folder.exists() else "no such folder"
        )
        raise SourceError(f"{folder}: {what}")
    return open_checkpoint(
        folder, label=str(ref), revision=ref.commit, step=step, twin=twin, remote=remote
    )


def _listed(trajectory: Trajectory) -> tuple[list[ModelRef], list[int] | None]:
    """All checkpoints that the trajectory may take, in ascending order, with their steps."""
    found = trajectory.checkpoints
    refs = _glob(found) if isinstance(found, str) else [_pin_local(ref) for ref in found]
    steps = _steps(refs)
    if steps is None:
        if twice := [ref for ref in refs if refs.count(ref) > 1]:
            raise ConfigError(f"trajectory.checkpoints: {twice[0]} is listed twice")
        if trajectory.from_step or trajectory.to_step or trajectory.min_interval:
            raise ConfigError(
                "trajectory: from_step, to_step, min_interval need steps in the names"
            )
        return refs, None
    order = sorted(range(len(refs)), key=steps.__getitem__)
    ordered = [steps[i] for i in order]
    for before, after in pairwise(ordered):
        if before == after:
            twins = [str(ref) for ref, step in zip(refs, steps, strict=True) if step == before]
            raise ConfigError(
                f"trajectory: step {before} is there twice: {' and '.join(twins[:2])}"
            )
    return [refs[i] for i in order], ordered


def _glob(pattern: str) -> list[ModelRef]:
    paths = [Path(p) for p in sorted(glob.glob(str(as_path(pattern))))]  # noqa: PTH207
    folders = [path.resolve() for path in paths if path.is_dir()]
    if folders and any(p.suffix == ".safetensors" for p in folders[0].iterdir()):
        return [ModelRef(str(folder)) for folder in folders]
    hint = f"; did you mean {pattern.rstrip('/')}/*?" if folders else ""
    raise SourceError(f"trajectory.checkpoints: no checkpoint folder matches {pattern!r}{hint}")


def _steps(refs: Sequence[ModelRef]) -> list[int] | None:
    """The steps in the references' names (a repository's are in its revisions), if all have one."""
    found = [step_of(_step_name(ref)) for ref in refs]
    steps = [step for step in found if step is not None]
    if steps and len(steps) < len(refs):
        stepless = refs[found.index(None)]
        raise ConfigError(
            f"trajectory.checkpoints: no step in the name of {stepless}; others have one"
        )
    return steps or None


def _step_name(ref: ModelRef) -> str:
    if is_local(ref):
        return Path(ref.path).name
    return "" if ref.revision is None or hub.is_commit(ref.revision) else ref.revision
