"""One output may take several attempts: what is done outlives a kill, and only one runs at a time.

Beside OUT lie the data, `.OUT.distmerge-xxxxxxxx`, and what is known of them, in a folder of the
same name with `.state`: a lock, the identity of the attempt, journals. The x are a hash of the
identity, all that decides a byte. So the same command finds its earlier attempt, and another one
does not.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from distmerge.errors import OutputError
from distmerge.log import LOGGER
from distmerge.output import MANIFEST, REPLACED, check_target, replace_text, versions
from distmerge.planner import Plan

_STATE = ".state"
_IDENTITY, _LOCK, _RENAMING = "identity.json", "lock", "renaming"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_CHANGED = {
    "plan": "the recipe changed, or the inputs' tensors",
    "inputs": "the inputs changed",
    "versions": "versions changed",
    "device": "the device changed",
    "nonfinite": "--allow-nonfinite changed",
}
"""By key of an identity: what it means if two attempts differ in it."""

Identity = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Where the data and the state of this attempt lie.

    `resumed` says that an earlier attempt has left both, `renamed` that it had come to the end:
    the data are at OUT already.
    """

    folder: Path
    state: Path
    resumed: bool
    renamed: bool


def identity(plan: Plan, device: str, *, allow_nonfinite: bool) -> dict[str, str]:
    """All that decides a byte of the output; see _CHANGED for the keys."""
    prints = "".join(checkpoint.fingerprint for checkpoint in plan.inputs)
    return {
        "plan": plan.digest,
        "inputs": hashlib.sha256(prints.encode()).hexdigest(),
        "versions": json.dumps(versions(), sort_keys=True),
        "device": device,
        "nonfinite": "allowed" if allow_nonfinite else "refused",
    }


class Lock:
    """Held by the first rank as long as it lives; the system releases it, however that ends."""

    def __init__(self, path: Path, out: Path):
        """Raises OutputError where another process holds it."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 1000, 0).decode("utf-8", "replace").strip()
            os.close(self._file)
            raise OutputError(
                f"{out}: another run is writing it ({holder}); wait for it, or end it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            LOGGER.warning("%s: this file system has no locks: start no second run", path.parent)
        if os.fstat(self._file).st_nlink == 0:  # its run ended between our open and our lock
            os.close(self._file)
            raise OutputError(f"{out}: another run has just ended there; start again")
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        os.close(self._file)


def begin(
    out: Path, plan: Plan, wanted: Identity, *, overwrite: bool, restart: bool
) -> tuple[Attempt, Lock]:
    """Find the earlier attempt at `out` that `wanted` can go on with, or make room for a new one.

    Raises OutputError where `out` may not be written, or is being written by another run.
    """
    attempt = _find(out, wanted)
    if not attempt.renamed:  # a mistake leaves no trace
        check_target(out, plan.inputs, overwrite=overwrite)
    try:
        attempt.state.mkdir(parents=True, exist_ok=True)
        lock = Lock(attempt.state / _LOCK, out)
    except OSError as error:
        raise OutputError(f"{out.parent}: can't be written: {error.strerror}") from error
    try:
        with _others_locked(out, attempt):
            attempt = _find(out, wanted)  # another run may have come to its end meanwhile
            _restore_replaced(out)
            if not attempt.renamed:
                check_target(out, plan.inputs, overwrite=overwrite)
            _remove_others(out, attempt, wanted)
        if restart or not attempt.folder.is_dir():
            _forget(attempt, keep_end=attempt.renamed)
        if not (attempt.state / _IDENTITY).is_file():  # a full disk can be gone on with
            replace_text(attempt.state / _IDENTITY, json.dumps(dict(wanted)))
    except BaseException:
        abandon(attempt, out, for_good=False)
        lock.release()
        raise
    return dataclasses.replace(attempt, resumed=attempt.folder.is_dir()), lock


def _find(out: Path, wanted: Identity) -> Attempt:
    token = hashlib.sha256(json.dumps(dict(wanted), sort_keys=True).encode()).hexdigest()[:8]
    folder = out.parent / f".{out.name}.distmerge-{token}"
    state = folder.with_name(folder.name + _STATE)
    ended = (state / _RENAMING).is_file() and not folder.exists()
    renamed = ended and _digest_at(out) == wanted["plan"]
    return Attempt(folder=folder, state=state, resumed=False, renamed=renamed)


def _digest_at(out: Path) -> object:
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    return manifest.get("plan") if isinstance(manifest, dict) else None


def _beside(out: Path, ending: str) -> list[Path]:
    """What attempts at `out` have left, by the ending of their names."""
    return sorted(out.parent.glob(f".{glob.escape(out.name)}.distmerge-????????{ending}"))


def _restore_replaced(out: Path) -> None:
    """A kill between two renames leaves what OUT held before under another name."""
    for old in _beside(out, REPLACED):
        # An empty folder at OUT is as good as none: scripts make one before every attempt.
        if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
            old.rename(out)
        else:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _others_locked(out: Path, attempt: Attempt) -> Iterator[None]:
    """Hold what other recipes' attempts hold while they run. Raises OutputError where one does."""
    with ExitStack() as stack:
        for state in _beside(out, _STATE):
            if state != attempt.state:
                stack.callback(Lock(state / _LOCK, out).release)
        yield


def _remove_others(out: Path, attempt: Attempt, wanted: Identity) -> None:
    """Earlier attempts that can't be gone on with: say why, and free their room."""
    for state in _beside(out, _STATE):
        if state != attempt.state:
            LOGGER.warning("%s: an earlier attempt is dropped: %s", out, _difference(state, wanted))
            shutil.rmtree(state.with_name(state.name.removesuffix(_STATE)), ignore_errors=True)
            shutil.rmtree(state, ignore_errors=True)
    for folder in _beside(out, ""):
        if folder != attempt.folder:
            LOGGER.warning("%s: removed; nothing is known of it", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _difference(state: Path, wanted: Identity) -> str:
    try:
        found = json.loads((state / _IDENTITY).read_bytes())
        return "; ".join(why for key, why in _CHANGED.items() if found[key] != wanted[key])
    except (OSError, ValueError, KeyError, TypeError):
        return "nothing is known of it"


def _forget(attempt: Attempt, *, keep_end: bool) -> None:
    """Remove data and journals; the lock stays.

    The mark of the end goes first: without data, it would say that they are at OUT.
    """
    if not keep_end:
        (attempt.state / _RENAMING).unlink(missing_ok=True)
    shutil.rmtree(attempt.folder, ignore_errors=True)
    kept = {_LOCK, _RENAMING} if keep_end else {_LOCK}
    for path in attempt.state.iterdir():
        if path.name not in kept:
            path.unlink()


def mark_end(attempt: Attempt) -> None:
    """From here on, data that are no longer in their folder are at OUT."""
    replace_text(attempt.state / _RENAMING, "")


def abandon(attempt: Attempt, out: Path, *, for_good: bool) -> None:
    """After an error: keep what is done, unless there is none or it can't be used again.

    What an earlier attempt has done stays in any case: a mistake in how it was to be gone on with
    (too little memory, a full disk) must not cost it.
    """
    if (attempt.state / _RENAMING).is_file() and not attempt.folder.exists():
        return  # the outputs are at OUT; only what comes after them is still to do
    done = [*attempt.state.glob("written-*"), *attempt.state.glob("summed-*")]
    if (for_good and not attempt.resumed) or not any(path.stat().st_size for path in done):
        discard(attempt)
    else:
        LOGGER.warning(
            "%s: what is done is kept; the same command goes on with it, --restart starts anew", out
        )


def discard(attempt: Attempt) -> None:
    """Remove all that the attempt has left beside OUT. Where it came to its end, the mark of that
    goes last: the same command finishes this too."""
    with suppress(OSError):
        _forget(attempt, keep_end=not attempt.folder.exists())
    shutil.rmtree(attempt.state, ignore_errors=True)
