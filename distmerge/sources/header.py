"""Read and check the header of one safetensors file. Nothing in the file is trusted.

Format: 8 bytes little-endian length n, n bytes JSON, then the data, which the tensors'
`data_offsets` must tile without gap or overlap.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NoReturn
from unicodedata import category

from distmerge.errors import SourceError
from distmerge.sources.remote import RemoteFile
from distmerge.spec import DTYPES, TensorSpec

MAX_HEADER = 100_000_000
"""Bytes; the limit of the format's own implementation."""

MAX_DIMS = 64
"""What torch's kernels take. The product of a million sizes would keep us busy for hours."""

MAX_NAME = 1000
"""Characters of a tensor's name: every message can hold it."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 1, 80, 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """A checked header, with what identifies the file: its size, time stamp and header's hash.

    Of a `remote` file the time stamp is 0, and `path` is only for people.
    """

    path: Path
    tensors: dict[str, TensorSpec]
    size: int
    mtime_ns: int
    sha256: str
    remote: RemoteFile | None = None


def read_header(
    path: Path, number: int = 0, twin: Header | None = None, remote: RemoteFile | None = None
) -> Header:
    """Read the header of `path`, which is file `number` of its checkpoint.

    Checkpoints of one run have the same headers: a `twin` with the same one lends its tensors.
    Of a `remote` file the copy of its head is read. Raises SourceError that names the file and
    what is wrong.
    """
    try:
        with (remote.head if remote else path).open("rb") as file:
            stat = os.fstat(file.fileno())
            size = remote.size if remote else stat.st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            check_length(path, len(prefix), length, size)
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path}: can't be read: {error.strerror}") from error
    if len(raw) != length:
        _refuse(path, f"the header is cut off after {len(raw)} of {length} bytes")
    sha256 = hashlib.sha256(raw).hexdigest()
    if twin is not None and (twin.size, twin.sha256) == (size, sha256):
        tensors = twin.tensors
    else:
        tensors = _specs(path, _parse(path, raw), number, 8 + length)
        _check_tiling(path, tensors.values(), 8 + length, size)
    return Header(
        path=path,
        tensors=tensors,
        size=size,
        mtime_ns=0 if remote else stat.st_mtime_ns,
        sha256=sha256,
        remote=remote,
    )


def check_unchanged(header: Header) -> None:
    """Raise SourceError where the file is not the one, or not as, it was when `header` was read.

    To open it makes a network file system ask its server. Of a remote file every answer has been
    held against its size and ETag.
    """
    if header.remote is not None:
        return
    try:
        with header.path.open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError as error:
        raise SourceError(f"{header.path}: it can't be read any more: {error.strerror}") from error
    if (found.st_size, found.st_mtime_ns) != (header.size, header.mtime_ns):
        raise SourceError(
            f"{header.path}: it was changed after the merge had begun "
            f"({header.size} bytes then, {found.st_size} now); merge again when it is complete"
        )


def content_stamp(header: Header) -> str:
    """What no other content of the file has: nobody can set a local file's inode and the time of
    its last change. Raises OSError where it is gone."""
    if header.remote is not None:
        return header.remote.etag
    found = header.path.stat()
    times = f"{found.st_mtime_ns} {found.st_ctime_ns}"
    return f"{found.st_size} {times} {found.st_ino} {found.st_dev}"


def _refuse(path: Path, reason: str) -> NoReturn:
    raise SourceError(f"{path}: not a sound safetensors file: {reason}")


def check_length(path: Path, prefix: int, length: int, size: int) -> None:
    """Raise SourceError unless a header of `length` bytes can follow the `prefix` bytes (8) that
    state it, in a file of `size` bytes."""
    if prefix < 8:
        _refuse(path, f"it has only {size} bytes")
    if length > MAX_HEADER:
        _refuse(path, f"it claims a header of {length} bytes (the limit is {MAX_HEADER})")
    if 8 + length > size:
        _refuse(path, f"it claims a header of {length} bytes but has only {size} bytes; truncated?")


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            counts = Counter(name for name, _ in pairs)
            _refuse(path, f"the header has the key {_shown(counts.most_common(1)[0][0])} twice")
        return found

    try:
        header = json.loads(
            raw.decode(),
            object_pairs_hook=unique,
            parse_constant=_refuse_constant,
            parse_int=_integer if b"-0" in raw else int,
        )
        if b"\\u" in raw:  # JSON can spell one half of a surrogate pair
            json.dumps(header, ensure_ascii=False).encode()
    except RecursionError:
        _refuse(path, "the header is nested too deeply")
    except UnicodeEncodeError:
        _refuse(path, "the header is not Unicode text")
    except ValueError as error:  # JSON, UTF-8 and oversized integers alike
        _refuse(path, f"the header is not JSON ({error})")
    if not isinstance(header, dict):
        _refuse(path, "the header is not a JSON object")
    return header


def _shown(value: object) -> str:
    """In part, if it is long: a stranger's file must not fill our messages."""
    return _SHORT.repr(value)


def _check_name(path: Path, name: str) -> None:
    """JSON can spell NUL and what a terminal obeys."""
    if len(name) > MAX_NAME:
        _refuse(path, f"a tensor's name has {len(name)} characters (the limit is {MAX_NAME})")
    if not name.isprintable() and any(category(c) == "Cc" for c in name):
        _refuse(path, f"a tensor's name holds control codes: {_shown(name)}")


def _integer(text: str) -> int:
    """To the format's own implementation -0 is no integer. (A hook for all would take time.)"""
    return int("no integer" if text == "-0" else text)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _specs(path: Path, header: dict[str, object], number: int, data: int) -> dict[str, TensorSpec]:
    _check_metadata(path, header.pop("__metadata__", {}))
    return {name: _spec(path, name, fields, number, data) for name, fields in header.items()}


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(path, "__metadata__ must map strings to strings")


def _spec(path: Path, name: str, fields: object, number: int, data: int) -> TensorSpec:
    _check_name(path, name)
    where = f"tensor {_shown(name)}"
    if not isinstance(fields, dict):
        _refuse(path, f"{where} is not described by an object")
    named = fields.get("dtype")
    dtype = DTYPES.get(named) if isinstance(named, str) else None
    if dtype is None:
        _refuse(path, f"{where} has an unknown dtype {_shown(named)}")
    shape = _naturals(path, where, "shape", fields.get("shape"))
    if len(shape) > MAX_DIMS:
        _refuse(path, f"{where} has {len(shape)} dimensions (the limit is {MAX_DIMS})")
    offsets = _naturals(path, where, "data_offsets", fields.get("data_offsets"))
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{where} has the data_offsets {_shown(list(offsets))}")
    nbytes = offsets[1] - offsets[0]
    if math.prod(filter(None, shape)) >= 2**63:  # also where a zero makes nothing of it
        _refuse(path, f"{where} has the shape {_shown(list(shape))}")
    if math.prod(shape) * dtype.bits != nbytes * 8:
        _refuse(path, f"{where} of {dtype.name} {list(shape)} can't take up {nbytes} bytes")
    return TensorSpec(name, dtype, shape, number, data + offsets[0], nbytes)


def _naturals(path: Path, where: str, key: str, value: object) -> tuple[int, ...]:
    if isinstance(value, list):
        for number in value:
            if type(number) is not int or not 0 <= number < 2**63:
                break
        else:
            return tuple(value)
    _refuse(path, f"{where} has the {key} {_shown(value)}")


def _check_tiling(path: Path, specs: Iterable[TensorSpec], data: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap from the header to the file's end."""
    end = data
    for spec in sorted(specs, key=attrgetter("start", "nbytes")):
        if spec.start != end:
            what = "overlaps the tensor before it" if spec.start < end else "leaves a gap before it"
            _refuse(
                path, f"tensor {_shown(spec.name)} {what} (byte {spec.start} where {end} is next)"
            )
        end += spec.nbytes
    if end > size:
        _refuse(path, f"tensors end at byte {end} but the file has only {size}; truncated?")
    if end < size:
        _refuse(path, f"{size - end} bytes follow the last tensor")
