"""How a recipe names a model: a folder, or a Hub repository with a revision."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distmerge.document import Node
from distmerge.errors import ConfigError


class ModelRef(NamedTuple):
    """A folder or a Hub repository, `path[@revision]`; `commit` is what the revision meant."""

    path: str
    revision: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


def as_path(text: str) -> Path:
    """`text` as a path, with ~ expanded. Raises ConfigError where it can't be one."""
    try:
        path = Path(text).expanduser()
        path.exists()
        path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{text[:60]!r} can't be a path: {reason}") from error
    return path


def parse_reference(text: str) -> ModelRef:
    """The model that 'path' or 'path@revision' names. Raises ConfigError."""
    if as_path(text).exists():
        return ModelRef(text)
    if "+" in text:
        raise ConfigError(f"{text}: LoRA adapters (model+adapter) are not supported yet")
    path, at, revision = text.partition("@")
    if at and ("@" in revision or not revision or not path):
        raise ConfigError(f"expected path or path@revision; got {text!r}")
    return ModelRef(path, revision or None)


def parse_model(node: Node) -> ModelRef:
    """'path', 'path@revision', or mergekit's {model: {path, revision}}. Raises ConfigError."""
    if isinstance(node.value, dict):
        fields = node.mapping(("model",))
        if "model" not in fields:
            node.fail("expected {model: {path: ..., revision: ...}}")
        inner = fields["model"].mapping(("path", "revision"))
        if "path" not in inner:
            fields["model"].fail("path is missing")
        return ModelRef(
            inner["path"].text(), inner["revision"].text() if "revision" in inner else None
        )
    try:
        return parse_reference(node.text())
    except ConfigError as error:
        node.fail(str(error))
