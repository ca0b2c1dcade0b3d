"""One output, with its manifest and card, to one repository."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distmerge.card import model_card, pictures
from distmerge.errors import DistmergeError
from distmerge.log import LOGGER, Progress, format_bytes
from distmerge.output import MANIFEST
from distmerge.publication import MAIN, Publication
from distmerge.publishing.files import File, chosen_output, whole_files
from distmerge.publishing.repository import Repository
from distmerge.reference import as_path
from distmerge.report import FOLDER

CARD = "README.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """What is on the Hub now: the page that shows it, the commit, and the number of files.

    `sent_bytes` are those of the weights that were sent: what the Hub had already does not count
    (through Xet, which skips what it knows in smaller pieces, it does). `output` is the folder in
    OUT ('' for OUT itself).
    """

    repo: str
    url: str
    commit: str
    output: str
    files: int
    sent_bytes: int


def publish(
    out: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str = MAIN,
    create_pr: bool = False,
    output: str | None = None,
    progress: bool = False,
) -> Published:
    """Publish the merge in `out` as the repository `repo`, 'owner/name', of the Hub.

    All files become visible at once, in one commit on the branch `revision` or, with `create_pr`,
    in a pull request on it. What the Hub has already is not sent again: after a failure, the same
    call goes on. Of a sweep, `output` (default: the chosen one) is published. Needs nothing but
    `out`, the network and, in HF_TOKEN or where `hf auth login` keeps it, a token.

    Raises OutputError where `out` is not whole, or the Hub refuses what the user can mend; RunError
    for what may pass.
    """
    to = Publication(repo=repo, private=private, revision=revision, create_pr=create_pr)
    return upload(as_path(str(out)), output, Repository(to), shown=progress)


def upload(out: Path, output: str | None, repository: Repository, *, shown: bool) -> Published:
    """As `publish`, to a repository that may have some of the shards from before."""
    name = chosen_output(out, output)
    manifest, files = whole_files(out, name)
    texts = {MANIFEST: (manifest.folder / MANIFEST).read_bytes(), **_shown_files(out, name)}
    repository.open()
    _send([file for file in files if file.is_weights], repository, shown=shown)
    message = f"{manifest.recipe['merge_method']} merge, plan {manifest.plan[:12]}"
    commit = repository.commit(files, texts, message)
    if repository.to.delete_local:
        _delete(file for file in files if file.is_weights)
    return Published(
        repo=repository.to.repo,
        url=commit.url,
        commit=commit.oid,
        output=name,
        files=len(files) + len(texts),
        sent_bytes=repository.sent_bytes,
    )


def _shown_files(out: Path, output: str) -> dict[str, bytes]:
    """The card and the plots that it shows."""
    plots = {f"{FOLDER}/{path.name}": path.read_bytes() for path in pictures(out)}
    return {CARD: model_card(out, output).encode(), **plots}


def _send(shards: list[File], repository: Repository, *, shown: bool) -> None:
    done = 0
    with Progress("publish", sum(shard.size for shard in shards), shown=shown) as progress:
        for shard in shards:
            repository.send(shard, partial(_show, progress, done))
            done += shard.size
            progress.show(done)


def _show(progress: Progress, before: int, position: int) -> None:
    progress.show(before + position)


def _delete(weights: Iterable[File]) -> None:
    freed = 0
    for file in weights:
        file.path.unlink()
        freed += file.size
    LOGGER.info(
        "delete_local: %s of weights removed here; manifest, card and report stay",
        format_bytes(freed),
    )


def told_how_to_go_on(error: DistmergeError, out: Path, to: Publication) -> DistmergeError:
    """The error of a publication, for who has just waited for the merge."""
    options = ["--private"] if to.private else []
    options += ["--revision", to.revision] if to.revision != MAIN else []
    command = shlex.join(["distmerge", "publish", str(out), to.repo, *options])
    return type(error)(
        f"{error}\n{out} is complete; the same command, or this one on any machine that sees "
        f"it, publishes it: {command}"
    )
