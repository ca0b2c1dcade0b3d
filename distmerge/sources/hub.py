"""Inputs from the Hugging Face Hub, through huggingface_hub's own cache."""

from __future__ import annotations

import glob
import json
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, cached_assets_path, snapshot_download
from huggingface_hub.errors import RevisionResolutionError

from distmerge.errors import RunError, SourceError
from distmerge.log import printable
from distmerge.reference import ModelRef
from distmerge.sources.checkpoint import read_index, shard_names
from distmerge.sources.client import explained
from distmerge.sources.header import check_length
from distmerge.sources.remote import OPENING, Ranges, RemoteFile, listing
from distmerge.sources.sidecars import SIDECARS
from distmerge.threads import Threads

BESIDE = (*SIDECARS, "README.md")
"""What is fetched beside the weights; the card says under which licence they are."""

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NOT_SHARDS = "consolidated*.safetensors"

HEADERS_AT_ONCE = 8
"""A header is three short requests: waiting for them takes longer than what they bring."""


def looks_like_repo(path: str) -> bool:
    """Whether `path` has the form of a repository's name: 'name' or 'owner/name'."""
    return _REPO_ID.fullmatch(path) is not None and not path.startswith(".")


def is_commit(revision: str) -> bool:
    return _COMMIT.fullmatch(revision) is not None


def pin(ref: ModelRef) -> ModelRef:
    """The same repository at the commit that its revision means now.

    What it means is cached too, for when the Hub can't be reached.
    Raises SourceError where repository or revision can't be had.
    """
    if ref.revision and is_commit(ref.revision):
        return ref._replace(commit=ref.revision)
    with explained(ref):
        try:
            found = HfApi().resolve_revision(ref.path, revision=ref.revision)
        except RevisionResolutionError as error:
            raise (error.__cause__ or error) from error
    return ref._replace(commit=found.resolved)


class Fetched(NamedTuple):
    """The folder of a repository, and its shards by name where they are not in it."""

    folder: Path
    remote: dict[str, RemoteFile] | None = None


def download(ref: ModelRef, *, local_only: bool) -> Fetched:
    """A pinned repository on this host: weights (each once) and the files beside them.

    With `local_only` nothing is fetched: another process of this host has done so.
    Raises SourceError.
    """
    with explained(ref):
        folder = _snapshot(ref, BESIDE, local_only)
        named = sorted(set(_weight_map(ref, folder).values()))
        shards = [glob.escape(name) for name in named] or ["*.safetensors"]
        return Fetched(_snapshot(ref, shards, local_only))


def _weight_map(ref: ModelRef, folder: Path) -> dict[str, str]:
    weight_map = read_index(folder)
    named = sorted(set(weight_map.values()))
    if strange := [name for name in named if not name.endswith(".safetensors")]:
        raise SourceError(f"{ref}: {printable(strange[0], 80)} is no safetensors file")
    return weight_map


def stay_remote(ref: ModelRef, *, local_only: bool) -> Fetched:
    """A pinned repository whose weights stay where they are: of each shard no more than the header
    is fetched, into the client's cache.

    `local_only` and errors as in `download`.
    """
    with explained(ref):
        folder = _snapshot(ref, BESIDE, local_only)
        heads = cached_assets_path("distmerge", namespace=ref.path, subfolder="heads")
        kept = heads / f"{ref.commit}.json"
        try:
            if not local_only:
                _keep(kept, json.dumps(listing(ref)).encode())
            found = _remote_files(ref, heads, kept)
            shards = {}
            for name in shard_names(folder, _weight_map(ref, folder), found):
                if name not in found:
                    what = printable(name, 200)
                    raise SourceError(f"{ref}: its index names {what}, which is not there")
                shards[name] = found[name]
            if not local_only:
                _fetch_heads([file for file in shards.values() if not file.head.is_file()])
        except RunError as error:  # nothing is lost yet
            raise SourceError(str(error)) from error
    return Fetched(folder, shards)


def _remote_files(ref: ModelRef, heads: Path, kept: Path) -> dict[str, RemoteFile]:
    """What the listing in `kept` says. The ETags name files of ours: they must be hashes."""
    found = {}
    for name, (size, etag) in json.loads(kept.read_bytes()).items():
        if type(size) is not int or size < 0 or not _ETAG.fullmatch(etag):
            raise ValueError(name)
        if not Path(name).match(_NOT_SHARDS):
            found[name] = RemoteFile(ref=ref, name=name, size=size, etag=etag, head=heads / etag)
    return found


def _fetch_heads(files: Sequence[RemoteFile]) -> None:
    threads = Threads(min(HEADERS_AT_ONCE, len(files)), "headers")
    try:
        for fetched in [threads.submit(_fetch_head, file) for file in files]:
            fetched.result()
    finally:
        threads.close()


def _fetch_head(file: RemoteFile) -> None:
    ranges = Ranges(file, OPENING)
    prefix = bytearray(min(8, file.size))
    ranges.fill(0, memoryview(prefix))
    length = int.from_bytes(prefix, "little")
    check_length(Path(str(file)), len(prefix), length, file.size)
    header = bytearray(length)
    ranges.fill(8, memoryview(header))
    _keep(file.head, bytes(prefix + header))


def _keep(path: Path, content: bytes) -> None:
    """Write a file that is there in full or not at all."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    part.write_bytes(content)
    part.replace(path)


def _snapshot(ref: ModelRef, patterns: Sequence[str], local_only: bool) -> Path:
    return Path(
        snapshot_download(
            ref.path,
            revision=ref.commit or ref.revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*.safetensors", _NOT_SHARDS],
            local_files_only=local_only,
        )
    )
