"""The files beside the weights: config, tokenizer, code. They come from the donor."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import cast

from distmerge.document import Plain
from distmerge.errors import SourceError
from distmerge.matrices import Facts
from distmerge.spec import FLOATS

SIDECARS = (
    "*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.bpe",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
"""Patterns of what is copied; weights, optimizer states and caches match none of them."""

MAX_SIDECAR = 500_000_000
"""Bytes. Tokenizers have some ten million."""

MAX_CONFIG = 10_000_000
"""Bytes of a config.json, which is parsed: that takes many times its size."""

MAX_DEPTH = 8
"""Of subfolders; what lies deeper is left out."""

_LEFT_OUT = (
    "*.index.json", "trainer_state.json", "distmerge.json", "adapter_config.json", "report/*",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.onnx", "*.gguf", "*.h5", "*.msgpack")


def sidecars(folder: Path) -> list[Path]:
    """Paths, relative to `folder` and sorted, of the files that a merge takes over from it.

    Subfolders count (chat templates, pooling configs) unless hidden, with weights of their own, or
    with a file's name.
    """
    found: list[Path] = []
    for here, subfolders, names in os.walk(folder):
        at = Path(here)
        subfolders[:] = sorted(d for d in subfolders if _may_hold_sidecars(d))
        if len(at.parts) - len(folder.parts) >= MAX_DEPTH:
            subfolders.clear()
        paths = [at / name for name in names]
        if at != folder and any(_matches(path, _WEIGHTS) for path in paths):
            subfolders.clear()
            continue
        inside = [path.relative_to(folder) for path in paths]
        found += [p for p in inside if _matches(p, SIDECARS) and not _matches(p, _LEFT_OUT)]
    return sorted(found)


def _may_hold_sidecars(subfolder: str) -> bool:
    hidden = subfolder.startswith(".") or subfolder == "__pycache__"
    return not hidden and not _matches(Path(subfolder), (*SIDECARS, *_WEIGHTS))


def read_sidecar(folder: Path, name: Path, *, limit: int = MAX_SIDECAR) -> bytes:
    """The content of a file that `sidecars` found in `folder`.

    Outputs are published. So a link may not lead out of the folder, to whatever this user can
    read; but snapshots in the Hub's cache are links to the blobs beside them.
    Raises SourceError for such a link, for what is no regular file and for one over the `limit`.
    """
    path, home = folder / name, folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = path.resolve(strict=True)
        if not any(allowed in real.parents for allowed in homes):
            raise SourceError(
                f"{path}: a link that leaves the folder, to {real}; if it belongs to the model, "
                "put a copy in its place"
            )
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe must not keep us waiting
        with os.fdopen(os.open(real, flags), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{path}: not a file that can be copied")
            if found.st_size > limit:
                raise SourceError(f"{path}: it has {found.st_size} bytes (the limit is {limit})")
            return file.read(limit)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or "links in a circle"
        raise SourceError(f"{path}: can't be read: {reason}") from error


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(path.match(pattern) for pattern in patterns)


def config_with_dtype(path: Path, dtype: str, *, everywhere: bool) -> bytes:
    """The config.json at `path` with its dtype true: `dtype` is a torch name.

    With `everywhere`, the dtypes of parts (text_config ...) are set too: all tensors were cast.
    Raises SourceError where it is not a JSON object, and what `read_sidecar` raises.
    """
    raw = read_sidecar(path.parent, Path(path.name), limit=MAX_CONFIG)
    try:
        config = cast(Plain, json.loads(raw))
        if not isinstance(config, dict):
            raise SourceError(f"{path}: not a JSON object")
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
        changed: dict[str, Plain] = {**config, **dict.fromkeys(keys, dtype)}
        if everywhere:
            changed = {key: _cast_part(value, dtype) for key, value in changed.items()}
        return raw if changed == config else (json.dumps(changed, indent=2) + "\n").encode()
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from error


def model_facts(folder: Path) -> Facts:
    """What config.json says of the model; nothing where there is none, or none that is sound: who
    copies it complains."""
    try:
        config = json.loads(read_sidecar(folder, Path("config.json"), limit=MAX_CONFIG))
    except (SourceError, ValueError, RecursionError):
        return Facts()
    parts = [config, config.get("text_config")] if isinstance(config, dict) else []
    known = [part for part in parts if isinstance(part, dict)]
    types = [part["model_type"] for part in known if isinstance(part.get("model_type"), str)]
    sizes = [part["vocab_size"] for part in known if type(part.get("vocab_size")) is int]
    return Facts(types[0] if types else "", sizes[0] if sizes else 0)


def _cast_part(value: Plain, dtype: str) -> Plain:
    if not isinstance(value, dict):
        return value
    return {
        key: dtype
        if key in ("dtype", "torch_dtype") and inner in FLOATS
        else _cast_part(inner, dtype)
        for key, inner in value.items()
    }
