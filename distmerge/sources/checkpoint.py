"""One input checkpoint: a folder of safetensors files, with an index or without."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count, repeat
from operator import attrgetter
from pathlib import Path

from distmerge import collector
from distmerge.errors import SourceError
from distmerge.log import printable
from distmerge.sources.header import Header, read_header
from distmerge.sources.remote import RemoteFile
from distmerge.spec import TensorSpec

INDEX = "model.safetensors.index.json"

MAX_INDEX = 100_000_000
"""Bytes, as of a header; an index of a million tensors has half."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The tensors of one input by name, and the files that hold them.

    `label` is how the user named it; `revision` the commit of a Hub repository; `step` its place
    on a trajectory. Tensors are in file order: shard by shard, offset by offset.
    """

    label: str
    folder: Path
    revision: str | None
    step: int | None
    files: tuple[Header, ...]
    tensors: dict[str, TensorSpec]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def identity(self) -> str:
        """Hash of names, sizes and headers: the same for copies on several hosts."""
        return self._hash(lambda file: f"{file.path.name} {file.size} {file.sha256}\n")

    @property
    def fingerprint(self) -> str:
        """Hash of `identity` and of what tells changes: the commit of a repository, whose files
        hosts may have since different times or not at all; else the files' time stamps."""
        return self._hash(
            lambda file: (
                f"{file.path.name} {file.size} {file.sha256} {self.revision or file.mtime_ns}\n"
            )
        )

    def _hash(self, line: Callable[[Header], str]) -> str:
        text = "".join(map(line, self.files))
        # File names are bytes: those that are not UTF-8 reach us as surrogates.
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


@collector.paused()
def open_checkpoint(
    folder: Path,
    *,
    label: str,
    revision: str | None = None,
    step: int | None = None,
    twin: Checkpoint | None = None,
    remote: Mapping[str, RemoteFile] | None = None,
) -> Checkpoint:
    """Read the index and the headers in `folder`, nothing else.

    `twin` is another checkpoint of the same run, if there is one: see read_header. `remote` are
    the shards by name, all that count, where they stay on the Hub.
    Raises SourceError where the folder holds no safetensors, where index and shards disagree, or
    where a header is damaged.
    """
    weight_map = read_index(folder)
    names = shard_names(folder, weight_map, _weights(folder) if remote is None else remote)
    twins = chain(twin.files if twin else (), repeat(None))
    if remote is None:
        paths = [_existing_shard(folder, name) for name in names]
        files = tuple(map(read_header, paths, count(), twins))
    else:
        shards = [remote[name] for name in names]
        paths = [Path(str(shard)) for shard in shards]
        files = tuple(map(read_header, paths, count(), twins, shards))
    tensors = {}
    for name, header in zip(names, files, strict=True):
        for spec in _by_offset(header):
            if weight_map and weight_map.setdefault(spec.name, name) != name:
                continue  # a second copy; the index says which one counts
            tensors[spec.name] = spec
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise SourceError(
            f"{folder / INDEX}: tensor {_shown(missing[0])} is not in {weight_map[missing[0]]} "
            f"({len(missing)} tensors are not where the index says)"
        )
    return Checkpoint(
        label=label, folder=folder, revision=revision, step=step, files=files, tensors=tensors
    )


def open_file(path: Path) -> Checkpoint:
    """Read the header of one safetensors file as if it were a checkpoint. Raises SourceError."""
    header = read_header(path)
    tensors = {spec.name: spec for spec in _by_offset(header)}
    return Checkpoint(
        label=str(path), folder=path.parent, revision=None, step=None, files=(header,),
        tensors=tensors,
    )  # fmt: skip


def _by_offset(header: Header) -> list[TensorSpec]:
    return sorted(header.tensors.values(), key=attrgetter("start", "name"))


def _natural_sort(names: set[str]) -> list[str]:
    """model-2-of-10 before model-10-of-10; names that count alike (1, 01) by their text."""

    def key(name: str) -> tuple[list[tuple[int, str]], str]:
        # A number longer than 18 digits is cut: Python refuses to read those of 4300.
        return [(int(d or 0), t) for d, t in re.findall(r"(\d{1,18})|(\D+)", name)], name

    return sorted(names, key=key)


def read_index(folder: Path) -> dict[str, str]:
    """The weight_map of the folder's index, empty without one: which file holds which tensor.

    Raises SourceError unless every file is named as one in `folder` itself.
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    index = _parsed(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: it has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard in (".", ".."):
            raise SourceError(
                f"{path}: tensor {_shown(tensor)} is said to be in {_shown(shard)}, "
                "which is not the name of a file in this folder"
            )
    return weight_map


def _parsed(path: Path) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    try:
        if path.stat().st_size > MAX_INDEX:
            raise SourceError(f"{path}: more than {MAX_INDEX} bytes are no index")
        return json.loads(path.read_bytes(), object_pairs_hook=unique)
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not JSON ({error})") from error


def _shown(value: object) -> str:
    return printable(repr(value), 200)


def _existing_shard(folder: Path, name: str) -> Path:
    path = folder / name
    try:
        found = path.is_file()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        what = printable(name, 200)
        raise SourceError(f"{folder / INDEX}: it names {what}, which is not in {folder}")
    return path


def shard_names(folder: Path, weight_map: Mapping[str, str], there: Iterable[str]) -> list[str]:
    """The files that count, in order: those of the index, or else the only one of the safetensors
    files `there`. Raises SourceError where it isn't clear which that is."""
    if weight_map:
        return _natural_sort(set(weight_map.values()))
    return [_single_file(folder, there)]


def _weights(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("*.safetensors") if path.is_file()]


def _single_file(folder: Path, there: Iterable[str]) -> str:
    found = sorted(there)
    if "model.safetensors" in found:
        return "model.safetensors"
    candidates = [name for name in found if not name.startswith("consolidated")] or found
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise SourceError(
            f"{folder}: {len(candidates)} safetensors files ({', '.join(candidates[:3])} ...) "
            f"but no {INDEX} that says which tensors count"
        )
    raise SourceError(f"{folder}: no *.safetensors in it{_elsewhere(folder)}")


def _elsewhere(folder: Path) -> str:
    """What may have been meant: the outputs of a sweep, or files of other formats."""
    inside = sorted(path.parent.name for path in folder.glob("*/model*.safetensors"))
    if inside:
        return f", but in {', '.join(dict.fromkeys(inside[:4]))}: name one of these folders"
    other = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    return f" (found {other[0]}: convert it to safetensors first)" if other else ""
