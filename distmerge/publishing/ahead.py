"""`stream: true`: each shard is uploaded as soon as it is finished, while the merge goes on.

A thread of rank 0 reads the journals of all ranks. Whatever it uploads stays invisible until the
commit at the end, which takes each sha256 from the manifest: a shard that was uploaded wrong (its
file system showed old bytes, say) is just uploaded again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distmerge.attempt import Attempt
from distmerge.errors import DistmergeError, RunError
from distmerge.journal import finished_jobs, read_journals
from distmerge.log import LOGGER, format_bytes
from distmerge.planner import Plan
from distmerge.publication import Publication
from distmerge.publishing.files import File, sha256_of
from distmerge.publishing.publish import Published, told_how_to_go_on, upload
from distmerge.publishing.repository import Repository

POLL = 1.0
"""Seconds between two looks at the journals, at least."""

_SHARE = 0.05
"""Of the thread's time that looking at journals may take: they grow long, and the merge waits."""


class _MergeEndedError(RunError):
    """The merge failed: an upload that is under way is of no use now."""


class Publisher:
    """Rank 0's hand on the Hub during one merge, whose output is published at the end."""

    def __init__(self, to: Publication, plan: Plan, attempt: Attempt):
        self._repository = Repository(to)
        self._ahead: _Ahead | None = None
        if to.stream and not attempt.renamed:
            self._ahead = _Ahead(self._repository, plan, attempt)
            self._ahead.start()

    def finish(self, out: Path, *, shown: bool) -> Published:
        """Publish the complete merge in `out`. Raises as `publish`, and says how to go on."""
        if self._ahead is not None:
            self._ahead.end(at_once=False)
        try:
            return upload(out, None, self._repository, shown=shown)
        except DistmergeError as error:
            raise told_how_to_go_on(error, out, self._repository.to) from None

    def abandon(self) -> None:
        """The merge failed: stop soon, and let what is uploaded be."""
        if self._ahead is not None:
            self._ahead.end(at_once=True)


@contextmanager
def publishing(
    to: Publication | None, plan: Plan, attempt: Attempt, *, first: bool
) -> Iterator[Publisher | None]:
    """A publisher on the first rank, where the recipe says `publish:`."""
    publisher = Publisher(to, plan, attempt) if to is not None and first else None
    try:
        yield publisher
    except BaseException:
        if publisher is not None:
            publisher.abandon()
        raise


class _Ahead(threading.Thread):
    """Uploads the finished shards of the plan's only output."""

    def __init__(self, repository: Repository, plan: Plan, attempt: Attempt):
        super().__init__(name="publish", daemon=True)
        self._repository, self._plan, self._attempt = repository, plan, attempt
        self._ending, self._useless = threading.Event(), threading.Event()

    def end(self, *, at_once: bool) -> None:
        """Begin no other shard; return when the one under way is done or, at once, given up."""
        self._ending.set()
        if at_once:
            self._useless.set()
        else:
            self.join()

    def run(self) -> None:
        # The folder gets another name at the end of the merge: this one leads to it all the same.
        descriptor = os.open(self._attempt.folder, os.O_RDONLY)
        try:
            self._repository.open()
            self._upload_finished(Path("/proc/self/fd", str(descriptor)))
        except _MergeEndedError:
            return
        except (DistmergeError, OSError, SafetensorError) as error:
            LOGGER.warning(
                "uploading while the merge goes on failed, and is tried again at its end: %s", error
            )
        finally:
            os.close(descriptor)
            if sent := self._repository.sent_bytes:
                LOGGER.info("%s were uploaded during the merge", format_bytes(sent))

    def _upload_finished(self, folder: Path) -> None:
        left = dict(enumerate(self._plan.shards))
        pause = 0.0
        while left and not self._ending.wait(pause):
            started = time.monotonic()
            unfinished = self._unfinished()
            pause = max(POLL, (time.monotonic() - started) / _SHARE)
            for number in [n for n in left if n not in unfinished]:
                if self._ending.is_set():
                    return
                shard = left.pop(number)
                self._repository.send(_file(folder, shard.name, shard.size), self._reached)

    def _unfinished(self) -> set[int]:
        """The shards of which some job is still to do."""
        done = set(finished_jobs(self._plan, read_journals(self._attempt.state)))
        return {
            self._plan.tensors[job.tensor].shard
            for number, job in enumerate(self._plan.jobs)
            if number not in done
        }

    def _reached(self, _: int) -> None:
        if self._useless.is_set():
            raise _MergeEndedError("the merge has ended")


def _file(folder: Path, name: str, size: int) -> File:
    """A finished shard, read once: the format's own reader takes its header."""
    path = folder / name
    with safe_open(path, framework="pt"):
        return File(name, path, size, sha256_of(path))
