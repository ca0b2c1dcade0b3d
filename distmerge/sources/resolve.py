"""From the recipe's names to folders: globs, steps, Hub repositories."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from distmerge.config import Config, ModelEntry, ModelRef, Trajectory, as_path, parse_reference
from distmerge.errors import ConfigError, SourceError
from distmerge.schedules import coefficients, select, step_of
from distmerge.sources import hub
from distmerge.sources.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What a recipe reads. `coefficients` are those of a trajectory's checkpoints, in order;
    the donor may stand behind them as one input more."""

    checkpoints: tuple[Checkpoint, ...]
    donor: int
    coefficients: tuple[float, ...] | None


def pinned(config: Config) -> Config:
    """`config` with its trajectory selected and every Hub repository at a commit.

    Raises ConfigError or SourceError.
    """
    if config.trajectory:
        config = replace(config, trajectory=_selected(config.trajectory))
    models = tuple(ModelEntry(model=_pin(m.model), parameters=m.parameters) for m in config.models)
    base = _pin(config.base_model) if config.base_model else None
    return replace(config, models=models, base_model=base)


def open_sources(config: Config, *, local_only: bool) -> Sources:
    """Fetch what is on the Hub and open every input of a `pinned` recipe (headers only).

    Raises SourceError.
    """
    refs = _references(config)
    steps: Sequence[int | None] = [None] * len(refs)
    listed, weights = len(refs), None
    if config.trajectory:
        steps = _steps(refs) or steps
        weights = coefficients(config.trajectory.schedule, len(refs))
    if config.base_model and config.base_model not in refs:
        refs = [*refs, config.base_model]
        steps = [*steps, None]
    opened: list[Checkpoint] = []
    for ref, step in zip(refs, steps, strict=True):
        opened.append(_open(ref, step, local_only, twin=opened[-1] if opened else None))
    if config.base_model:
        donor = refs.index(config.base_model)
    else:
        donor = listed - 1 if config.trajectory else 0
    return Sources(checkpoints=tuple(opened), donor=donor, coefficients=weights)


def open_reference(text: str) -> Checkpoint:
    """Open what 'path' or 'path@revision' names, whole. Raises ConfigError or SourceError."""
    return _open(_pin(parse_reference(text)), None, local_only=False)


def _references(config: Config) -> list[ModelRef]:
    if config.trajectory is None:
        return [entry.model for entry in config.models]
    assert not isinstance(config.trajectory.checkpoints, str), "the recipe is pinned"
    return list(config.trajectory.checkpoints)


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
    ref: ModelRef, step: int | None, local_only: bool, twin: Checkpoint | None = None
) -> Checkpoint:
    folder = Path(ref.path) if is_local(ref) else hub.download(ref, local_only=local_only)
    if not folder.is_dir():
        what = (
            "it is a file: name the folder that holds it" if folder.exists() else "no such folder"
        )
        raise SourceError(f"{folder}: {what}")
    return open_checkpoint(folder, label=str(ref), revision=ref.commit, step=step, twin=twin)


def _selected(trajectory: Trajectory) -> Trajectory:
    found = trajectory.checkpoints
    refs = _glob(found) if isinstance(found, str) else [_pin_local(ref) for ref in found]
    steps = _steps(refs)
    if steps is None:
        if trajectory.from_step or trajectory.to_step or trajectory.min_interval:
            raise ConfigError(
                "trajectory: from_step, to_step, min_interval need steps in the names"
            )
        steps = list(range(len(refs)))
    order = sorted(range(len(refs)), key=steps.__getitem__)
    ordered = [steps[i] for i in order]
    for before, after in pairwise(ordered):
        if before == after:
            twins = [str(ref) for ref, step in zip(refs, steps, strict=True) if step == before]
            raise ConfigError(
                f"trajectory: step {before} is there twice: {' and '.join(twins[:2])}"
            )
    taken = [_pin(refs[order[i]]) for i in select(ordered, trajectory)]
    schedule = trajectory.schedule
    return Trajectory(checkpoints=tuple(taken), schedule=schedule)


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
