"""What is uploaded: files that the manifest vouches for, and hashed again on their way out."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from distmerge.errors import OutputError
from distmerge.manifest import output_names
from distmerge.report import BEST
from distmerge.verification.manifest import Manifest, read_manifest

SAMPLE = 512
"""Bytes of a file's start that the Hub looks at to tell text from data."""

_CHUNK = 8 * 2**20

Reached = Callable[[int], None]
"""Told how many of a file's bytes have been read, each once."""


class File(NamedTuple):
    """One file of the repository: its name there, where it lies here, and what it must hold."""

    name: str
    path: Path
    size: int
    sha256: str

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(".safetensors")

    def sample(self) -> bytes:
        with _opened(self) as raw:
            return raw.read(SAMPLE)


def chosen_output(out: Path, output: str | None) -> str:
    """The folder in `out` to publish: `output`, else the only one, else the one that was chosen.

    Raises OutputError where there is no such output, or none was chosen.
    """
    names = output_names(out)
    if output is None and names == [""]:
        return ""
    wanted = BEST if output is None else output
    name = (out / BEST).resolve().name if wanted == BEST else wanted
    if name in names:
        return name
    if names == [""]:
        raise OutputError(f"{out}: it holds one output, and none is called {wanted!r}")
    why = "none of them is chosen" if wanted == BEST else f"none is called {wanted!r}"
    raise OutputError(f"{out}: {why}; --output takes one of {', '.join(names)}")


def whole_files(out: Path, output: str) -> tuple[Manifest, list[File]]:
    """The files that the manifest of an output lists, by name; each is there with its size.

    Raises OutputError where one is not.
    """
    manifest = read_manifest(out, output)
    files = [
        File(name, manifest.folder / name, listed.num_bytes, listed.sha256)
        for name, listed in sorted(manifest.files.items())
    ]
    for file in files:
        size = file.path.stat().st_size if file.path.is_file() else None
        if size is None:
            why = "; delete_local removes weights that are published" if file.is_weights else ""
            raise OutputError(f"{file.path}: it is missing, so {out} is not whole{why}")
        if size != file.size:
            raise OutputError(
                f"{file.path}: it has {size} bytes, and the manifest says {file.size}; "
                f"find out more with: distmerge verify {out}"
            )
    return manifest, files


def _opened(file: File) -> io.FileIO:
    try:
        return file.path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: File, error: OSError) -> OutputError:
    return OutputError(f"{file.path}: can't be read: {error.strerror}")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def changed(file: File) -> OutputError:
    return OutputError(
        f"{file.path}: it is not what the merge wrote (its sha256 is another); find out more with: "
        "distmerge verify"
    )


class VerifiedFile(io.BufferedIOBase):
    """A file that is hashed while it is read for the first time: who comes to its end without an
    error has read what `file` says.

    `reached` is told how far; `read_bytes` are those of all reads, for parts may be read again, as
    after a failed request. Reading raises OutputError where the content is another.
    """

    def __init__(self, file: File, reached: Reached):
        super().__init__()
        self._file, self._reached = file, reached
        self.read_bytes = 0
        self._raw = _opened(file)
        self._digest, self._hashed = hashlib.sha256(), 0

    def read(self, size: int | None = -1, /) -> bytes:
        start = self._raw.tell()
        try:
            data = self._raw.read(-1 if size is None else size) or b""
        except OSError as error:  # the client would take it for one of the network
            raise _unreadable(self._file, error) from error
        if not data and size != 0 and start < self._file.size:
            raise changed(self._file)
        self._follow(start, memoryview(data))
        self.read_bytes += len(data)
        self._reached(self._hashed)
        return data

    def _follow(self, start: int, data: memoryview) -> None:
        known = self._hashed - start
        if not 0 <= known < len(data):
            return
        self._digest.update(data[known:])
        self._hashed = start + len(data)
        if self._hashed == self._file.size and self._digest.hexdigest() != self._file.sha256:
            raise changed(self._file)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()
