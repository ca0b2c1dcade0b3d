"""Ranges of files on the Hub, read over the network as they are needed.

The Hub says where a file is stored, with its size and ETag (the sha256 of its content); a storage
or a CDN gives the bytes, at an address that expires. Both are held against what the file was when
the plan was made: each time that the Hub is asked, and with every answer.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    httpx,
    parse_ratelimit_headers,
)

from distmerge.errors import RunError, SourceError
from distmerge.log import LOGGER, printable
from distmerge.reference import ModelRef
from distmerge.sources.client import explained
from distmerge.version import __version__

PATIENCE = 480.0
"""Seconds without a byte after which a read has failed, and the longest wait that a server may ask
for; less than the default of --timeout."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds between two trials: each pause is twice the one before, up to half of it less."""

OPENING = 6.0
"""The same for listings and headers, which somebody waits for."""

_PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_EXPIRED = (401, 403, 404, 410)
"""How a storage refuses an address that it gave out some time ago."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """A file of a repository at a commit. `head` is a copy of its beginning, header included."""

    ref: ModelRef
    name: str
    size: int
    etag: str
    head: Path

    def __str__(self) -> str:
        return f"{self.ref}/{self.name}"


def listing(ref: ModelRef) -> dict[str, tuple[int, str]]:
    """Size and ETag of every safetensors file of a pinned repository, by name.

    Raises RunError where the Hub gives no answer, and what its client raises.
    """
    trials = _Trials(ref, OPENING)
    while True:
        try:
            with _passing_errors():
                entries = list(HfApi().list_repo_tree(ref.path, revision=ref.commit))
            break
        except _AgainError as reason:
            trials.wait(reason)
    return {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile) and re.fullmatch(r"[^/]+\.safetensors", entry.path)
    }


@dataclass(kw_only=True, slots=True)
class _Source:
    """Where the bytes are now; the ETag is the storage's own, known from its first answer, unless
    the Hub itself is the storage."""

    url: str
    headers: dict[str, str]
    etag: str | None


class _AgainError(Exception):
    """What may go well another time, `after` as many seconds as the server asks for."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class Ranges:
    """Reads ranges of one file; any number of threads may at once."""

    def __init__(self, file: RemoteFile, patience: float | None = None):
        self._file = file
        self._patience = PATIENCE if patience is None else patience
        self._lock = threading.Lock()
        self._source: _Source | None = None

    def fill(self, start: int, view: memoryview) -> None:
        """Read the file from byte `start` into all of `view` (of bytes).

        What breaks off is gone on with. Raises RunError where nothing comes for `patience`
        seconds, SourceError where the file is no longer the one that was planned with.
        """
        trials = _Trials(self._file, self._patience)
        done = 0
        while done < len(view):
            try:
                for chunk in self._chunks(start + done, len(view) - done):
                    view[done : done + len(chunk)] = chunk
                    done += len(chunk)
                    trials.begin()
            except _AgainError as reason:
                trials.wait(reason)

    def _chunks(self, start: int, count: int) -> Iterator[bytes]:
        source = self._located()
        wanted = {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
        with (
            _network_errors(self._file),
            get_session().stream(
                "GET",
                source.url,
                headers={**source.headers, **wanted},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
            ) as answer,
        ):
            self._check(answer, source, start, count)
            left = count
            for chunk in answer.iter_raw():
                left -= len(chunk)
                if left < 0:
                    raise SourceError(f"{self._file}: its server gives more than is asked for")
                yield chunk
        if left:
            raise _AgainError("the answer broke off")

    def _located(self) -> _Source:
        with self._lock:  # where an address has expired, one thread asks for all
            if self._source is None:
                self._source = _locate(self._file)
            return self._source

    def _ask_again(self, source: _Source, reason: str) -> NoReturn:
        """Where the file is now: the Hub will say as well whether it has changed."""
        with self._lock:
            if self._source is source:
                self._source = None
        raise _AgainError(reason)

    def _check(self, answer: httpx.Response, source: _Source, start: int, count: int) -> None:
        """Raise unless the body of `answer` is what was asked for."""
        status = answer.status_code
        _check_passing(answer)
        if status in _EXPIRED:
            self._ask_again(source, f"the storage answered {status}")
        if status == 200 or answer.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(
                f"{self._file}: its server sends whole or compressed files where a part is asked "
                "for; merge without --stream-remote"
            )
        if status not in (206, 416):
            raise RunError(
                f"{self._file}: can't be had from the Hub: the storage answered {status}"
            )
        given = answer.headers.get("Content-Range", "no Content-Range")
        if given != f"bytes {start}-{start + count - 1}/{self._file.size}":
            raise _changed(self._file, printable(given, 60))
        etag = _etag(answer)
        if source.etag not in (None, etag):
            self._ask_again(source, "the storage holds another version of it")
        source.etag = etag


def _locate(file: RemoteFile) -> _Source:
    """Ask the Hub where the file is now. Raises SourceError where it is another one."""
    url = hf_hub_url(file.ref.path, file.name, revision=file.ref.commit)
    try:
        with explained(file.ref), _passing_errors():
            found = get_hf_file_metadata(
                url,
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                library_name="distmerge",
                library_version=__version__,
            )
    except SourceError as error:  # to give access back is a reason to go on, not to start anew
        raise RunError(str(error)) from error
    commit = found.commit_hash or file.ref.commit
    if (found.size, found.etag, commit) != (file.size, file.etag, file.ref.commit):
        raise _changed(file, f"{found.size} bytes with the ETag {printable(str(found.etag), 80)}")
    on_hub = urlsplit(found.location)[:2] == urlsplit(url)[:2]
    return _Source(
        url=found.location,
        headers=build_hf_headers(
            token=None if on_hub else False,
            library_name="distmerge",
            library_version=__version__,
        ),
        etag=file.etag if on_hub else None,
    )


def _changed(file: RemoteFile, found: str) -> SourceError:
    return SourceError(
        f"{file}: its server no longer gives what was planned with ({file.size} bytes with the "
        f"ETag {file.etag}), but {found}"
    )


@contextmanager
def _passing_errors() -> Iterator[None]:
    """_AgainError for what may pass; the client's other errors as they are."""
    try:
        yield
    except _PASSING as error:
        raise _AgainError(type(error).__name__) from error
    except HfHubHTTPError as error:
        if error.response is not None:
            _check_passing(error.response)
        raise


@contextmanager
def _network_errors(file: RemoteFile) -> Iterator[None]:
    try:
        with _passing_errors():
            yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise RunError(f"{file}: can't be had from the Hub: {type(error).__name__}") from error


def _check_passing(answer: httpx.Response) -> None:
    if answer.status_code in (408, 429) or answer.status_code >= 500:
        raise _AgainError(f"the server answered {answer.status_code}", _retry_after(answer))


def _retry_after(answer: httpx.Response) -> float:
    """Seconds, from the Hub's own header or the standard one (a number or a date)."""
    limit = parse_ratelimit_headers(answer.headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = answer.headers.get("Retry-After", "0").strip()
    try:
        if text.isdigit():
            return float(text)
        return (parsedate_to_datetime(text) - datetime.now(timezone.utc)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _etag(answer: httpx.Response) -> str:
    found: str = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
    return found.removeprefix("W/").strip('"')


class _Trials:
    """When to try again: later each time, and no longer than `patience` seconds in all."""

    def __init__(self, what: object, patience: float):
        self._what, self._patience = what, patience
        self.begin()

    def begin(self) -> None:
        """Something came: count from here."""
        self._since, self._pause = time.monotonic(), FIRST_PAUSE

    def wait(self, reason: _AgainError) -> None:
        """Raises RunError where the next trial would come too late."""
        # Ranks that failed together must not come back together.
        pause = max(self._pause * random.uniform(0.5, 1), reason.after)
        patience = PATIENCE if reason.after else self._patience  # it is there, and busy
        if time.monotonic() - self._since + pause > patience:
            raise RunError(
                f"{self._what}: can't be had from the Hub: {reason}; gave up after {patience:.0f} s"
            ) from reason
        LOGGER.info("%s: %s; trying again in %.1f s", self._what, reason, pause)
        time.sleep(pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
