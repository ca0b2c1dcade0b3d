"""Merges that fail, and the proof that they leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import distmerge
from distmerge.document import Plain
from distmerge.errors import UserError
from distmerge.pipeline import Options
from tests.support.checkpoints import write_checkpoint
from tests.unit.recipes import linear

Recipe = dict[str, Plain]
DEFAULTS = Options()


def write_pair(folder: Path) -> tuple[Path, Path]:
    tensors = {"x": torch.ones(4), "y": torch.ones(2, 2)}
    first, second = (write_checkpoint(folder / name, tensors) for name in ("first", "second"))
    return first, second


def half(first: Path, second: Path) -> Recipe:
    return linear({first: 1, second: 1})


def refusal(recipe: Recipe, out: Path, options: Options = DEFAULTS) -> UserError:
    """The error of a merge that leaves no trace."""
    out.parent.mkdir(exist_ok=True)
    before = tree(out.parent)
    with pytest.raises(UserError) as caught:
        distmerge.merge(recipe, out, options=options)
    assert caught.value.exit_code == 2
    assert "Traceback" not in str(caught.value)
    assert tree(out.parent) == before
    return caught.value


def tree(folder: Path) -> dict[str, bytes | None]:
    """All paths under `folder`, with what the files hold."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
