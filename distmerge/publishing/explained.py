"""The client's errors as ours, and its own talk silenced: both may hold tokens or signed URLs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    httpx,
)
from huggingface_hub.utils import logging as client_logging

from distmerge.errors import DistmergeError, OutputError, RunError
from distmerge.log import printable

_NO_ROOM = re.compile(r"quota|storage|too large|payload|limit (is )?(reached|exceeded)", re.I)
_SECRET = re.compile(r"\bhf_\w+|\bBearer\s+\S+|(?<=\?)\S+", re.I)
_REFUSALS = {
    401: "the Hub does not know you: set HF_TOKEN to a token that may write there",
    404: "there is no such repository, or it is hidden from you",
    412: "others keep committing there; try again",
}
_LIMIT = 300
"""Characters of what a server says."""


@contextmanager
def quiet_client() -> Iterator[None]:
    """Neither warnings nor progress bars of the client."""
    verbosity, shown = client_logging.get_verbosity(), not are_progress_bars_disabled()
    client_logging.set_verbosity(logging.ERROR)
    if shown:
        disable_progress_bars()
    try:
        yield
    finally:
        client_logging.set_verbosity(verbosity)
        if shown:
            enable_progress_bars()


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """Raise the client's errors as OutputError, or as RunError where trying again may help.

    The client raises what it likes, so nothing that derives from Exception passes.
    """
    try:
        yield
    except Exception as error:
        raise _explanation(error, repo) from None


def is_stale(error: HfHubHTTPError) -> bool:
    """Whether a commit was refused because the branch has moved on."""
    return error.response is not None and error.response.status_code == 412


def _explanation(error: BaseException, repo: str) -> DistmergeError:
    """The first thing that is known in the chain of causes: uploads wrap theirs."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DistmergeError):
            return cause
        if isinstance(cause, OfflineModeIsEnabled):
            return OutputError(f"{repo}: HF_HUB_OFFLINE is set, so the Hub is not asked")
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return _answer(cause, cause.response.status_code, repo)
        if isinstance(cause, (httpx.TransportError, OSError)):
            why = getattr(cause, "strerror", None) or type(cause).__name__
            return RunError(f"{repo}: the Hub can't be reached: {why}")
        cause = cause.__cause__
    said = _harmless(str(error))
    if _NO_ROOM.search(said):
        return OutputError(f"{repo}: the Hub has no room for it: {said}")
    return RunError(f"{repo}: the Hub, or its client, refuses ({type(error).__name__}: {said})")


def _answer(error: HfHubHTTPError, status: int, repo: str) -> DistmergeError:
    said = f": {_harmless(error.server_message)}" if error.server_message else ""
    if status in (402, 413, 507) or (status == 403 and _NO_ROOM.search(said)):
        return OutputError(f"{repo}: the Hub has no room for it ({status}{said})")
    if isinstance(error, GatedRepoError):
        return OutputError(f"{repo}: the repository is gated: ask its owner for access")
    if isinstance(error, RevisionNotFoundError):
        return OutputError(f"{repo}: there is no such pull request or branch")
    if status in _REFUSALS:
        return OutputError(f"{repo}: {_REFUSALS[status]}")
    if status == 403:
        return OutputError(
            f"{repo}: you, or this token, may not write there{said}; set HF_TOKEN to one that may, "
            "or propose the change with --create-pr"
        )
    if status == 429 or status >= 500:
        return RunError(f"{repo}: the Hub answered {status}{said}; try again later")
    return OutputError(f"{repo}: the Hub refuses ({status}{said})")


def _harmless(text: str) -> str:
    """What a server or the client said, on one line and without secrets."""
    if token := get_token():
        text = text.replace(token, "***")
    return printable(" ".join(_SECRET.sub("***", text).split()), _LIMIT)
