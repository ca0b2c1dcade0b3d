"""What a checkpoint holds, from its headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmerge.document import Plain
from distmerge.reference import as_path
from distmerge.sources.checkpoint import Checkpoint, open_file
from distmerge.sources.resolve import open_reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """The tensors of a checkpoint, in file order, and the bytes that they take."""

    checkpoint: Checkpoint

    def as_plain(self) -> dict[str, Plain]:
        """For JSON: tensors with dtype, shape, shard and bytes; shards; totals by dtype."""
        c = self.checkpoint
        by_dtype: dict[str, int] = {}
        for spec in c.tensors.values():
            by_dtype[spec.dtype.name] = by_dtype.get(spec.dtype.name, 0) + spec.nbytes
        return {
            "folder": str(c.folder),
            "commit": c.revision,
            "fingerprint": c.fingerprint,
            "bytes": c.nbytes,
            "bytes_by_dtype": dict(by_dtype),
            "shards": [{"name": file.path.name, "bytes": file.size} for file in c.files],
            "tensors": [
                {
                    "name": spec.name,
                    "dtype": spec.dtype.name,
                    "shape": list(spec.shape),
                    "shard": c.files[spec.file].path.name,
                    "bytes": spec.nbytes,
                }
                for spec in c.tensors.values()
            ],
        }


def inspect(path: str | Path) -> Inspection:
    """Read the headers of a folder, of one safetensors file, or of a Hub repository[@revision].

    Raises ConfigError or SourceError.
    """
    file = as_path(str(path))
    return Inspection(checkpoint=open_file(file) if file.is_file() else open_reference(str(path)))
