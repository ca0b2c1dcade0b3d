"""The files beside the weights: config, tokenizer, code. They come from the donor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import cast

from distmerge.document import Plain
from distmerge.errors import SourceError
from distmerge.spec import FLOATS

SIDECARS = (
    "*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.bpe",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Patterns of what is copied; weights, optimizer states and caches match none of them."""

_LEFT_OUT = (
    "*.index.json", "trainer_state.json", "distmerge.json", "adapter_config.json", "report/*",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.gguf", "*.h5", "*.msgpack")


def sidecars(folder: Path) -> list[Path]:
    """Paths, relative to `folder` and sorted, of the files that a merge takes over from it.

    Subfolders count (chat templates, pooling configs) unless hidden or with weights of their own.
    """
    found: list[Path] = []
    for here, subfolders, names in os.walk(folder):
        at = Path(here)
        subfolders[:] = sorted(
            d for d in subfolders if not d.startswith(".") and d != "__pycache__"
        )
        paths = [at / name for name in names]
        if at != folder and any(_matches(path, _WEIGHTS) for path in paths):
            subfolders.clear()
            continue
        inside = [path.relative_to(folder) for path in paths]
        found += [p for p in inside if _matches(p, SIDECARS) and not _matches(p, _LEFT_OUT)]
    return sorted(found)


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def config_with_dtype(path: Path, dtype: str, *, everywhere: bool) -> bytes:
    """The config.json at `path` with its dtype true: `dtype` is a torch name.

    With `everywhere`, the dtypes of parts (text_config ...) are set too: all tensors were cast.
    Raises SourceError where it is not a JSON object.
    """
    raw = path.read_bytes()
    try:
        config = cast(Plain, json.loads(raw))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise SourceError(f"{path}: not a JSON object")
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    changed: dict[str, Plain] = {**config, **dict.fromkeys(keys, dtype)}
    if everywhere:
        changed = {key: _cast_part(value, dtype) for key, value in changed.items()}
    return raw if changed == config else (json.dumps(changed, indent=2) + "\n").encode()


def _cast_part(value: Plain, dtype: str) -> Plain:
    if not isinstance(value, dict):
        return value
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and inner in FLOATS
        else _cast_part(inner, dtype)
        for key, inner in value.items()
    }
