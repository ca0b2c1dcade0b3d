"""The statistic of a trajectory: Gram matrices of its checkpoints, whole and by module; its file.

A matrix that was once computed serves every step, window and stride. So it is kept with the
output, and in a cache beside it under a key of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized

from distmerge.log import LOGGER
from distmerge.output import versions
from distmerge.planner import Plan
from distmerge.sources.header import content_stamp

CACHE = ".distmerge"
"""Folder beside OUT."""

MODULE_PAIRS = 2**20
"""Products of two checkpoints, over all modules, that are kept at most: some 200 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gram:
    """T x T, float64: products of the checkpoints' differences to the last of them.

    `by_module` has the same for the tensors of each module, M x T x T, in the order of `modules`;
    `elements` are the modules' sizes.
    """

    matrix: torch.Tensor
    by_module: torch.Tensor
    modules: tuple[str, ...]
    elements: tuple[int, ...]


def modules(names: Sequence[str], checkpoints: int) -> list[str]:
    """The module that each tensor is counted to, as fine as MODULE_PAIRS allows.

    'model.layers.3.mlp.up.weight' is in 'model.layers.3.mlp', else in 'model.layers.3', else in
    'model.layers'.
    """
    found: list[str] = []
    for depth in (1, 0, -1):
        found = [_module(name, depth) for name in names]
        if len(set(found)) * checkpoints**2 <= MODULE_PAIRS:
            break
    return found


def _module(name: str, depth: int) -> str:
    parts = name.split(".")
    layer = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if layer is None:
        return ".".join(parts[:-1]) or name
    return ".".join(parts[: min(layer + 1 + depth, len(parts) - 1)])


def save(gram: Gram, path: Path) -> None:
    """Write the file under its own name only once it is whole. Raises OSError."""
    names = json.dumps({"modules": gram.modules, "elements": gram.elements})
    tensors = {"gram": gram.matrix, "modules": gram.by_module.contiguous()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)  # of a kill; in containers the same numbers come again
        # Not by save_file: its errors are none of Python's, and nobody else may read its files.
        with temporary.open("xb") as file:  # through no link that somebody put there
            file.write(serialized(tensors, metadata={"distmerge": names}))
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def load(path: Path) -> Gram:
    """Read what `save` wrote. Raises OSError or ValueError."""
    try:
        with safe_open(path, framework="pt") as file:
            names = json.loads((file.metadata() or {})["distmerge"])
            found = Gram(
                matrix=file.get_tensor("gram"),
                by_module=file.get_tensor("modules"),
                modules=tuple(names["modules"]),
                elements=tuple(names["elements"]),
            )
        if not _is_sound(found):
            raise ValueError("its parts do not fit")
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a statistic of distmerge ({error})") from error
    return found


def _is_sound(gram: Gram) -> bool:
    """Whether shapes, dtypes and numbers are such as `save` was given."""
    if gram.matrix.dim() != 2:
        return False
    checkpoints, count = len(gram.matrix), len(gram.modules)
    return (
        gram.matrix.shape == (checkpoints, checkpoints)
        and gram.by_module.shape == (count, checkpoints, checkpoints)
        and all(m.dtype == torch.float64 for m in (gram.matrix, gram.by_module))
        and all(bool(m.isfinite().all()) for m in (gram.matrix, gram.by_module))
        and len(gram.elements) == count
        and all(isinstance(name, str) for name in gram.modules)
        and all(type(size) is int and size >= 0 for size in gram.elements)
    )


def cache_path(out: Path, plan: Plan, device: str) -> Path:
    """Where the statistic of `plan` lies beside `out`: under a hash of all that it depends on.

    The headers, sizes and times that fingerprint an input could be the same for other contents, if
    somebody set the times: see header.content_stamp.
    """
    tensors = [tensor.name for tensor in plan.tensors if tensor.rule.kind == "trend"]
    rule = next(tensor.rule for tensor in plan.tensors if tensor.rule.kind == "trend")
    digest = hashlib.sha256(json.dumps([tensors, versions(), device]).encode())
    for i in rule.inputs:
        for file in plan.inputs[i].files:
            line = f"{file.path} {file.sha256} {content_stamp(file)}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return out.parent / CACHE / f"gram-{digest.hexdigest()[:32]}.safetensors"


def cached(path: Path) -> Gram | None:
    """What lies at `path`; None without it, or (with a warning) where it can't be read."""
    if not path.is_file():
        return None
    try:
        return load(path)
    except (OSError, ValueError) as error:
        LOGGER.warning("%s: can't be used (%s); the statistic is computed again", path, error)
        return None


def keep(gram: Gram, paths: Iterable[Path]) -> None:
    """Save `gram`; where a disk refuses a copy, that costs time later and nothing now."""
    for path in paths:
        try:
            path.parent.mkdir(exist_ok=True)
            save(gram, path)
        except OSError as error:
            LOGGER.warning("%s: can't be written: %s", path, error.strerror)
