"""Layers of a Llama and fine-tunes of them, whose task vectors are as trained ones are.

A task vector's singular values fall off as a power of their rank, and half of its energy lies in
directions that all tasks share, which is what calibration is about. What a task changes is 2 % of
the weights (root mean square), stored in bfloat16 as fine-tunes are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

TASKS = 4
BASE_RMS, TASK_RMS = 0.02, 0.0004
DECAY = 0.6
VOCAB = 1000
"""Small: embeddings take no part."""


class Shape(NamedTuple):
    """Of a Llama with grouped queries: `kv` is the width of keys and values."""

    hidden: int
    kv: int
    intermediate: int
    layers: int

    @property
    def name(self) -> str:
        return "x".join(map(str, self))


def matrices(shape: Shape) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of every matrix that is calibrated, in the order of the layers."""
    hidden, kv, intermediate, layers = shape
    parts = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    for layer in range(layers):
        for part, size in parts.items():
            yield f"model.layers.{layer}.{part}.weight", size


def write_missing(folder: Path, shape: Shape) -> list[Path]:
    """The base and the tasks, as checkpoints that transformers loads; what is there stays."""
    models = [folder / name for name in ("base", *(f"task-{n}" for n in range(1, TASKS + 1)))]
    if all((each / "config.json").is_file() for each in models):
        return models
    states = [_beside(shape) for _ in models]
    for number, (name, size) in enumerate(matrices(shape)):
        random = torch.Generator().manual_seed(number)
        base = BASE_RMS * torch.randn(size, generator=random)
        vectors = [torch.zeros(size), *_task_vectors(size, random)]
        for state, vector in zip(states, vectors, strict=True):
            state[name] = (base + vector).bfloat16()
    for model, state in zip(models, states, strict=True):
        model.mkdir(parents=True, exist_ok=True)
        save_file(state, model / "model.safetensors", metadata={"format": "pt"})
        # Last: it says that the folder is complete.
        (model / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n")
    return models


def _task_vectors(size: tuple[int, int], random: torch.Generator) -> Iterator[Tensor]:
    shared = _decaying(size, random)
    for _ in range(TASKS):
        yield TASK_RMS * (0.5**0.5) * (shared + _decaying(size, random))


def _decaying(size: tuple[int, int], random: torch.Generator) -> Tensor:
    """m x n of root mean square 1; the singular values fall off nearly as rank ** -DECAY."""
    m, n = size
    ranks = min(m, n)
    scales = torch.arange(1, ranks + 1) ** -DECAY
    made = (torch.randn(m, ranks, generator=random) * scales) @ torch.randn(
        ranks, n, generator=random
    )
    return made / made.square().mean().sqrt()


def _beside(shape: Shape) -> dict[str, Tensor]:
    """Norms and embeddings: no task changes them."""
    random = torch.Generator().manual_seed(10**6)
    hidden = shape.hidden
    embedding = BASE_RMS * torch.randn(VOCAB, hidden, generator=random)
    norms = [
        f"model.layers.{layer}.{which}_layernorm.weight"
        for layer in range(shape.layers)
        for which in ("input", "post_attention")
    ]
    ones = {
        name: torch.ones(hidden, dtype=torch.bfloat16) for name in (*norms, "model.norm.weight")
    }
    return {"model.embed_tokens.weight": embedding.bfloat16(), **ones}


def _config(shape: Shape) -> dict[str, object]:
    heads = shape.hidden // 128
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads * shape.kv // shape.hidden,
        "vocab_size": VOCAB,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
