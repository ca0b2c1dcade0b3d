"""A base model and models tuned from it, in every form of matrix, and recipes that merge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from distmerge.document import Plain
from tests.support.checkpoints import write_checkpoint

Tensors = dict[str, torch.Tensor]
Recipe = dict[str, Plain]

WEIGHTED = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
WHOLE = ("tsv_m", "iso_c", "iso_cts", "star")

SHAPES = {
    "model.embed_tokens.weight": (60, 24),
    "model.layers.0.self_attn.q_proj.weight": (32, 24),
    "model.layers.0.self_attn.qkv.weight": (40, 24),
    "model.layers.0.mlp.up_proj.weight": (200, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 200),
    "model.layers.0.mlp.experts.up_proj": (3, 20, 28),
    "model.layers.0.norm.weight": (24,),
    "lm_head.weight": (60, 24),
}
"""Square-ish, fused, tall, wide, stacked; and what is no matrix."""

CONFIG = {"model_type": "llama", "vocab_size": 60}


def family(
    shapes: Mapping[str, Sequence[int]],
    tasks: int,
    *,
    seed: int = 0,
    scale: float = 0.05,
    dtype: torch.dtype = torch.float32,
) -> list[Tensors]:
    """The base, then the tasks: deltas of decaying spectra that share some directions."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {name: drawn(shape) for name, shape in shapes.items()}
    shared = {name: drawn(shape) for name, shape in shapes.items()}
    models = [base]
    for _ in range(tasks):
        models.append({n: base[n] + scale * (0.7 * shared[n] + drawn(base[n].shape)) for n in base})
    return [{name: x.to(dtype) for name, x in model.items()} for model in models]


def write_family(
    folder: Path,
    models: Sequence[Tensors],
    *,
    shards: int = 1,
    config: Mapping[str, object] = CONFIG,
) -> Path:
    """Write base, task-1, task-2 ... into `folder`."""
    for number, tensors in enumerate(models):
        name = f"task-{number}" if number else "base"
        write_checkpoint(folder / name, tensors, shards=shards, config=config)
    return folder


def recipe(
    folder: Path,
    method: str,
    tasks: int,
    *,
    own: Mapping[str, Plain] | None = None,
    shared: Mapping[str, Plain] | None = None,
    calibrate: Mapping[str, Plain] | None = None,
) -> Recipe:
    """`method` on the family in `folder`: `own` parameters of every model, `shared` ones."""
    given = {"weight": 1.0, **(own or {})} if method in WEIGHTED else {}
    models: list[Plain] = [
        {"model": str(folder / f"task-{number}"), **({"parameters": dict(given)} if given else {})}
        for number in range(1, tasks + 1)
    ]
    found: Recipe = {
        "merge_method": method,
        "base_model": str(folder / "base"),
        "models": models,
        "parameters": dict(shared or {}),
    }
    return found if calibrate is None else {**found, "calibrate": {"method": "svc", **calibrate}}
