"""Recipes as mappings, and the inputs that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from distmerge.document import Plain
from tests.support.checkpoints import write_checkpoint


def linear(weights: Mapping[Path, Plain], **more: Plain) -> dict[str, Plain]:
    """merge_method: linear with one weight a folder (none for None), and `more` keys."""
    models: list[Plain] = [
        {"model": str(folder), "parameters": {} if weight is None else {"weight": weight}}
        for folder, weight in weights.items()
    ]
    return {"merge_method": "linear", "models": models, **more}


def average(checkpoints: Path | str | list[str], **trajectory: Plain) -> dict[str, Plain]:
    """merge_method: average over what matches `checkpoints`, with keys of `trajectory`."""
    found: Plain = list(checkpoints) if isinstance(checkpoints, list) else str(checkpoints)
    return {"merge_method": "average", "trajectory": {"checkpoints": found, **trajectory}}


def extra_merge(
    *, step: Plain = 0.5, trajectory: Mapping[str, Plain] | None = None, **more: Plain
) -> dict[str, Plain]:
    """merge_method: extra_merge of windows of eight; the checkpoints x need not be there."""
    return {
        "merge_method": "extra_merge",
        "trajectory": {"checkpoints": "x", "window": 8, **(trajectory or {})},
        "parameters": {"step": step},
        **more,
    }


def write_run(folder: Path, steps: Iterable[int], name: str = "step-{}") -> str:
    """One checkpoint for each of `steps`, its only tensor full of the step; the glob for all."""
    for step in steps:
        write_checkpoint(folder / name.format(step), {"a": torch.full((2,), float(step))})
    return str(folder / name.format("*"))
