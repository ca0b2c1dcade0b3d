"""Write synthetic Llama checkpoints: real shapes, random values, no model ever held in memory."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

Dtype = Literal["bfloat16", "float16", "float32"]
Size = Literal["tiny", "0.85B", "3.4B"]
Tensors = dict[str, tuple[int, ...]]

INDEX = "model.safetensors.index.json"
SPREAD = 0.02
# Odd, so that the equal tensors of successive layers start at different places in the pool.
POOL_VALUES = (1 << 23) + 9
ITEM_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_NAMES: dict[Dtype, str] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class LlamaShape:
    """What decides the tensors of a Llama checkpoint."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 32000


SIZES: dict[Size, LlamaShape] = {
    "tiny": LlamaShape(hidden=64, intermediate=176, layers=4, heads=4),
    "0.85B": LlamaShape(hidden=2048, intermediate=5632, layers=14, heads=16),
    "3.4B": LlamaShape(hidden=3200, intermediate=8640, layers=26, heads=32),  # OpenLLaMA 3B
}


@dataclass(frozen=True)
class _Shard:
    name: str
    tensors: Tensors
    header: bytes
    nbytes: int  # of the whole file


def write_llama(
    folder: Path,
    *,
    parameters: Size | LlamaShape,
    seed: int,
    dtype: Dtype = "bfloat16",
    shard_bytes: int = 10**9,
) -> None:
    """Write one checkpoint; its values depend on ``seed`` alone, so models differ by seed."""
    shape = parameters if isinstance(parameters, LlamaShape) else SIZES[parameters]
    shards = _plan(shape, dtype, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    pool = _pool(seed, dtype)
    position = 0
    for shard in shards:
        with (folder / shard.name).open("wb", buffering=0) as file:
            file.write(shard.header)
            for name, dims in shard.tensors.items():
                nbytes = math.prod(dims) * ITEM_BYTES[dtype]
                if name.endswith("norm.weight"):
                    file.write(_norm(dims, seed, dtype))
                else:
                    position = _write_from_pool(file, pool, position, nbytes)
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2) + "\n")
    # Last, because the index is what marks the checkpoint as complete.
    (folder / INDEX).write_text(json.dumps(_index(shards, dtype), indent=2) + "\n")


def is_complete(
    folder: Path,
    *,
    parameters: Size | LlamaShape,
    dtype: Dtype = "bfloat16",
    shard_bytes: int = 10**9,
) -> bool:
    """Tell whether ``folder`` already holds the checkpoint that ``write_llama`` would write."""
    shape = parameters if isinstance(parameters, LlamaShape) else SIZES[parameters]
    shards = _plan(shape, dtype, shard_bytes)
    index = folder / INDEX
    if not index.is_file() or json.loads(index.read_text()) != _index(shards, dtype):
        return False
    files = [(folder / shard.name, shard.nbytes) for shard in shards]
    return all(file.is_file() and file.stat().st_size == nbytes for file, nbytes in files)


def llama_tensors(shape: LlamaShape) -> Tensors:
    """Name and shape of every tensor, in the order transformers writes them; lm_head is untied."""
    tensors: Tensors = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    for layer in range(shape.layers):
        tensors.update(_layer(f"model.layers.{layer}", shape))
    tensors["model.norm.weight"] = (shape.hidden,)
    tensors["lm_head.weight"] = (shape.vocab, shape.hidden)
    return tensors


def _layer(prefix: str, shape: LlamaShape) -> Tensors:
    square, up = (shape.hidden, shape.hidden), (shape.intermediate, shape.hidden)
    return {
        f"{prefix}.input_layernorm.weight": (shape.hidden,),
        **{f"{prefix}.self_attn.{part}_proj.weight": square for part in "qkvo"},
        f"{prefix}.post_attention_layernorm.weight": (shape.hidden,),
        f"{prefix}.mlp.gate_proj.weight": up,
        f"{prefix}.mlp.up_proj.weight": up,
        f"{prefix}.mlp.down_proj.weight": up[::-1],
    }


def _plan(shape: LlamaShape, dtype: Dtype, shard_bytes: int) -> list[_Shard]:
    groups = list(_groups(llama_tensors(shape), ITEM_BYTES[dtype], shard_bytes))
    shards = []
    for number, tensors in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, data_bytes = _header(tensors, dtype)
        shards.append(_Shard(name, tensors, header, len(header) + data_bytes))
    return shards


def _groups(tensors: Tensors, item_bytes: int, shard_bytes: int) -> Iterator[Tensors]:
    group: Tensors = {}
    room = shard_bytes
    for name, dims in tensors.items():
        nbytes = math.prod(dims) * item_bytes
        if group and nbytes > room:
            yield group
            group, room = {}, shard_bytes
        group[name] = dims
        room -= nbytes
    yield group


def _header(tensors: Tensors, dtype: Dtype) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + math.prod(dims) * ITEM_BYTES[dtype]
        kind = SAFETENSORS_NAMES[dtype]
        entries[name] = {"dtype": kind, "shape": list(dims), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned, as safetensors' own writer does
    return len(text).to_bytes(8, "little") + text, end


def _pool(seed: int, dtype: Dtype) -> memoryview:
    values = np.random.default_rng(seed).standard_normal(POOL_VALUES, dtype=np.float32)
    return memoryview(_encode(values * np.float32(SPREAD), dtype))


def _norm(dims: tuple[int, ...], seed: int, dtype: Dtype) -> bytes:
    """Norm weights lie around one; as noise around zero they would make a model that is all NaN."""
    noise = np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)
    return _encode(1 + noise * np.float32(SPREAD), dtype)


def _encode(values: npt.NDArray[np.float32], dtype: Dtype) -> bytes:
    if dtype == "float32":
        return values.tobytes()
    if dtype == "float16":
        return values.astype(np.float16).tobytes()
    # numpy has no bfloat16: keep the upper half of each float32, rounded to nearest even.
    bits = values.view(np.uint32)
    upper = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return upper.astype(np.uint16).tobytes()


def _write_from_pool(file: BinaryIO, pool: memoryview, position: int, nbytes: int) -> int:
    """Write ``nbytes`` from the pool as a ring; return the position for the next tensor."""
    while nbytes:
        written = file.write(pool[position : position + nbytes])
        nbytes -= written
        position = (position + written) % len(pool)
    return position


def _index(shards: list[_Shard], dtype: Dtype) -> dict[str, object]:
    values = sum(math.prod(dims) for shard in shards for dims in shard.tensors.values())
    return {
        "metadata": {"total_size": values * ITEM_BYTES[dtype]},
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }


def _config(shape: LlamaShape, dtype: Dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": SPREAD,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.heads,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": shape.vocab,
    }


def _write_missing(folder: Path, size: Size, models: int, seed: int) -> None:
    folders = [folder / f"model-{number}" for number in range(models)]
    missing = [each for each in folders if not is_complete(each, parameters=size)]
    model_bytes = sum(shard.nbytes for shard in _plan(SIZES[size], "bfloat16", 10**9))
    need = model_bytes * len(missing)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        gib = 1 << 30
        raise SystemExit(f"{folder}: needs {need / gib:.1f} GiB, has {free / gib:.1f} GiB free")
    for each in missing:
        start = time.perf_counter()
        write_llama(each, parameters=size, seed=seed + folders.index(each))
        seconds = time.perf_counter() - start
        print(f"{each}: {model_bytes / 1e9:.2f} GB in {seconds:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="gets model-0, model-1, ...; complete ones stay")
    parser.add_argument("--size", choices=SIZES, default="0.85B")
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of model-0; the next has the next")
    options = parser.parse_args()
    _write_missing(options.folder, options.size, options.models, options.seed)


if __name__ == "__main__":
    main()
