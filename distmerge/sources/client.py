"""What huggingface_hub's client raises, as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

from distmerge.errors import SourceError
from distmerge.reference import ModelRef

_ADVICE: dict[object, str] = {
    401: "is HF_TOKEN right?",
    403: "may the owner of HF_TOKEN read it?",
    404: "a file is no longer there",
}


@contextmanager
def explained(ref: ModelRef) -> Iterator[None]:
    """Turn the client's errors into SourceError. Its own text may name tokens: it is left out."""
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
        advice = _ADVICE.get(status, "try again later")
        raise SourceError(f"{ref}: the Hub answered {status}; {advice}") from error
    except (OSError, httpx.HTTPError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise SourceError(f"{ref}: no such folder, and the Hub can't be reached: {why}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"{ref}: what the Hub says of it is not sound ({type(error).__name__})"
        ) from error
