"""Inputs from the Hugging Face Hub, through huggingface_hub's own cache."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from distmerge.errors import SourceError
from distmerge.log import printable
from distmerge.reference import ModelRef
from distmerge.sources.checkpoint import read_index
from distmerge.sources.sidecars import SIDECARS

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    with _explained(ref):
        try:
            found = HfApi().resolve_revision(ref.path, revision=ref.revision)
        except RevisionResolutionError as error:
            raise (error.__cause__ or error) from error
    return ref._replace(commit=found.resolved)


def download(ref: ModelRef, *, local_only: bool) -> Path:
    """The folder of a pinned repository: weights (each once) and the files beside them.

    With `local_only` nothing is fetched: another process of this host has done so.
    Raises SourceError.
    """
    with _explained(ref):
        folder = _snapshot(ref, SIDECARS, local_only)
        named = sorted(set(read_index(folder).values()))
        if strange := [name for name in named if not name.endswith(".safetensors")]:
            raise SourceError(f"{ref}: {printable(strange[0], 80)} is no safetensors file")
        shards = [glob.escape(name) for name in named] or ["*.safetensors"]
        return _snapshot(ref, shards, local_only)


def _snapshot(ref: ModelRef, patterns: Sequence[str], local_only: bool) -> Path:
    return Path(
        snapshot_download(
            ref.path,
            revision=ref.commit or ref.revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*.safetensors", "consolidated*.safetensors"],
            local_files_only=local_only,
        )
    )


@contextmanager
def _explained(ref: ModelRef) -> Iterator[None]:
    """Turn the client's errors into ours. The client's own text may name tokens: it is left out."""
    try:
        yield
    except GatedRepoError as error:
        raise SourceError(
            f"{ref}: the repository is gated: ask for access, set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{ref}: the repository has no such revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"{ref}: neither a folder here nor a repository on the Hub; if it is private, "
            "set HF_TOKEN"
        ) from error
    except (OfflineModeIsEnabled, IncompleteSnapshotError, LocalEntryNotFoundError) as error:
        raise SourceError(
            f"{ref}: no such folder, not in the Hub's cache, and the Hub can't be reached"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise SourceError(f"{ref}: the Hub answered {status}; try again later") from error
    except (OSError, httpx.HTTPError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{ref}: no such folder, and the Hub can't be reached: {why}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{ref}: what the Hub says of it is not sound ({type(error).__name__})"
        ) from error
