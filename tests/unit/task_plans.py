"""Plans of merges on task vectors, from headers that no file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distmerge.document import Plain
from distmerge.matrices import Facts
from distmerge.planner import Plan, build_plan
from distmerge.sources.checkpoint import Checkpoint
from distmerge.sources.resolve import Sources
from distmerge.spec import DTYPES, OutputTensor, Task, TensorSpec
from distmerge.sweep import load_recipe

Shapes = Mapping[str, tuple[int, ...]]


def checkpoint(shapes: Shapes, dtype: str = "BF16") -> Checkpoint:
    """A checkpoint of one file."""
    specs, start = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPES[dtype].itemsize
        specs[name] = TensorSpec(name, DTYPES[dtype], shape, 0, start, size)
        start += size
    return Checkpoint(
        label="x", folder=Path("x"), revision=None, step=None, files=(), tensors=specs
    )


def planned(
    shapes: Shapes,
    method: str,
    *,
    tasks: int = 2,
    own: Any = None,
    base_listed: bool = False,
    facts: Facts = Facts(),  # noqa: B008
    **keys: Any,
) -> Plan:
    """`method` on `tasks` models with parameters `own`, and other `keys` of the recipe.

    The base model comes last or, where it is listed too, first.
    """
    parameters: dict[str, Any] = {} if own is None else {"parameters": own}
    names = [f"task-{number}" for number in range(1, tasks + 1)]
    models: list[Plain] = [{"model": name, **parameters} for name in names]
    if base_listed:
        models.insert(0, {"model": "base"})
    recipe = load_recipe({"merge_method": method, "base_model": "base", "models": models, **keys})
    found = (checkpoint(shapes),) * (tasks + 1)
    everyone = (tuple(range(tasks + 1)),) * len(recipe.variants)
    donor = 0 if base_listed else tasks
    sources = Sources(checkpoints=found, donor=donor, inputs=everyone, rows=None, facts=facts)
    return build_plan(recipe, sources, shard_bytes=5 * 10**9)


def tensor_of(plan: Plan, name: str) -> OutputTensor:
    (found,) = [tensor for tensor in plan.tensors if tensor.name == name]
    return found


def task_of(plan: Plan, name: str) -> Task:
    """How a tensor is merged in the only output."""
    (task,) = tensor_of(plan, name).rule.tasks
    return task
