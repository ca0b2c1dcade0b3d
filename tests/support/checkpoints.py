"""Tiny checkpoints on the disk, sound and malformed, and the way back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shards: int = 1,
    config: Mapping[str, object] | None = None,
    index: bool = True,
) -> Path:
    """Write `tensors` into `folder` in `shards` files and return `folder`.

    One shard is model.safetensors without an index; more get an index unless `index` is false.
    Tensors go to the shards in turns, so that each shard holds some of the first and the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = (
            "model.safetensors"
            if shards == 1
            else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {key: tensors[key].contiguous() for key in list(tensors)[number::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if shards > 1 and index:
        write_index(folder, weight_map)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, object]) -> Path:
    """Write an index with `weight_map` as it is, right or wrong."""
    path = folder / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}))
    return path


def raw_file(
    path: Path, header: Mapping[str, object] | bytes, data: bytes = b"", length: int | None = None
) -> Path:
    """Write a safetensors file byte by byte: `header` as JSON or as it is, then `data`.

    `length` is what the file claims as its header's length, if that is not the truth.
    """
    raw = header if isinstance(header, bytes) else json.dumps(dict(header)).encode()
    claimed = len(raw) if length is None else length
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(claimed.to_bytes(8, "little") + raw + data)
    return path


def read_output(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, as the safetensors library reads them through the index."""
    index = folder / INDEX
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards = {name: load_file(folder / name) for name in dict.fromkeys(weight_map.values())}
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}


def write_recipe(path: Path, text: str) -> Path:
    """Write a recipe, and return where it is."""
    path.write_text(text)
    return path


def average_recipe(folders: str | Path, *, last: int | None = None, more: str = "") -> str:
    """A recipe of method average over the folders that match `folders`, with lines of `more`."""
    taken = "" if last is None else f"  last: {last}\n"
    return f"merge_method: average\ntrajectory:\n  checkpoints: {folders}\n{taken}{more}"


def linear_recipe(weights: Mapping[Path, float], more: str = "") -> str:
    """A recipe of method linear with one weight a folder, and lines of `more`."""
    models = "".join(
        f"  - model: {folder}\n    parameters: {{weight: {weight}}}\n"
        for folder, weight in weights.items()
    )
    return f"merge_method: linear\nmodels:\n{models}{more}"
