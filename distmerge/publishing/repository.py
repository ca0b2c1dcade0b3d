"""A repository on the Hub, through huggingface_hub's client: uploads, one commit, a look at it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import quote

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    constants,
)
from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from distmerge.errors import OutputError
from distmerge.log import printable
from distmerge.output import MANIFEST
from distmerge.publication import Publication
from distmerge.publishing.explained import explained, is_stale, quiet_client
from distmerge.publishing.files import File, Reached, VerifiedFile, changed, sha256_of

_WEIGHTS = re.compile(r"[^/]+\.safetensors(\.index\.json)?|pytorch_model[^/]*\.bin(\.index\.json)?")
"""What transformers may load from a repository; of another model it must not stay beside ours."""


class Head(NamedTuple):
    """What a branch holds: its commit, and by path what the server calls each file's content."""

    commit: str | None
    files: dict[str, str]


class Commit(NamedTuple):
    """What was published: the commit's id, and the page that shows it."""

    oid: str
    url: str


class Repository:
    """One branch of a repository. Everything raises UserError for what the user can mend, else
    RunError, without the client's own text: that may name tokens and signed addresses.

    Uploads are invisible until `commit`. The Hub knows contents by their sha256, so what it has,
    from this run or an earlier one, is not sent again.
    """

    def __init__(self, publication: Publication):
        self.to = publication
        self.sent_bytes = 0
        self._api = HfApi()
        self._xet: bool | None = None
        self._sent: dict[tuple[str, str], CommitOperationAdd] = {}

    @contextmanager
    def _asking(self) -> Iterator[None]:
        with quiet_client(), explained(self.to.repo):
            yield

    def open(self) -> None:
        """Make the repository and the branch where they are missing; find out how it takes files.

        Refuses a public one where the recipe says private, and one that holds another model.
        """
        if self._xet is not None:
            return
        with self._asking():
            self._api.create_repo(self.to.repo, private=self.to.private or None, exist_ok=True)
            found = self._info_of_branch()
            xet = self._speaks_xet()
        if self.to.private and not found.private:
            raise OutputError(f"{self.to.repo}: it exists and is public; nothing was uploaded")
        self._check_replaceable(self._head())
        self._xet = xet

    def _info_of_branch(self) -> ModelInfo:
        repo, branch = self.to.repo, self.to.revision
        try:
            return self._api.model_info(repo, revision=branch)
        except RevisionNotFoundError:
            if branch.startswith("refs/"):  # a pull request, which can't be made by its name
                raise
            self._api.create_branch(repo, branch=branch, exist_ok=True)
            return self._api.model_info(repo, revision=branch)

    def _speaks_xet(self) -> bool:
        """Whether to upload through Xet: the client would, wherever it has hf_xet, and fails at a
        Hub that does not know Xet. Such a Hub has no such route."""
        if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
            return False
        branch = quote(self.to.revision, safe="")
        answer = http_backoff(
            "GET",
            f"{self._api.endpoint}/api/models/{self.to.repo}/xet-write-token/{branch}",
            headers=build_hf_headers(),
            params={"create_pr": "1"} if self.to.create_pr else None,
        )
        if answer.status_code == 404:
            return False
        hf_raise_for_status(answer)
        return True

    def _check_replaceable(self, head: Head) -> None:
        """A pull request may propose anything; a branch must be new, or ours."""
        weights = [path for path in head.files if _WEIGHTS.fullmatch(path)]
        if weights and MANIFEST not in head.files and not self.to.create_pr:
            raise OutputError(
                f"{self.to.repo}: its branch {self.to.revision} holds another model "
                f"({printable(weights[0], 80)}) that distmerge did not publish; choose another "
                "repository, or propose the change with --create-pr"
            )

    def _head(self) -> Head:
        with self._asking():
            commit = self._api.model_info(self.to.repo, revision=self.to.revision).sha
            return Head(commit, {file.path: file.blob_id for file in self._tree(commit)})

    def _tree(self, revision: str | None) -> list[RepoFile]:
        entries = self._api.list_repo_tree(self.to.repo, recursive=True, revision=revision)
        return [entry for entry in entries if isinstance(entry, RepoFile)]

    def send(self, file: File, reached: Reached) -> None:
        """Upload one file, if the Hub does not have it. `open` must have come before."""
        if (file.name, file.sha256) in self._sent:
            return

        with ExitStack() as stack, self._asking():
            operation = self._operation(file, reached, stack)
            source = operation.path_or_fileobj
            try:
                self._api.preupload_lfs_files(
                    self.to.repo,
                    [operation],
                    revision=self.to.revision,
                    create_pr=self.to.create_pr,
                )
            finally:
                self.sent_bytes += (
                    source.read_bytes if isinstance(source, VerifiedFile) else file.size
                )
        if operation.path_or_fileobj == b"":  # how the client says that it is uploaded
            self._sent[file.name, file.sha256] = operation

    def _operation(self, file: File, reached: Reached, stack: ExitStack) -> CommitOperationAdd:
        """A file for the client, which takes its sha256 from us instead of reading it for that.

        The client uploads open files as LFS, paths through Xet. Xet reads by itself: so the file is
        hashed before.
        """
        operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=b"")
        operation.upload_info = UploadInfo(
            size=file.size, sample=file.sample(), sha256=bytes.fromhex(file.sha256)
        )
        if self._xet:
            if sha256_of(file.path) != file.sha256:
                raise changed(file)
            operation.path_or_fileobj = str(file.path)
        else:
            source = stack.enter_context(VerifiedFile(file, reached))
            operation.path_or_fileobj = source  # type: ignore[assignment]  # narrower than it is
        return operation

    def commit(self, files: Sequence[File], texts: Mapping[str, bytes], message: str) -> Commit:
        """Make `files` and `texts` visible at once, in one commit, and see that all are there.

        Old weights that are not among them go in the same commit. Where others commit meanwhile,
        but to other files, ours comes after theirs.
        """
        head = self._head()
        self._check_replaceable(head)
        ours = {*texts, *(file.name for file in files)}
        old = [path for path in head.files if _WEIGHTS.fullmatch(path) and path not in ours]
        with ExitStack() as stack:
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                *(self._sent.get((f.name, f.sha256)) or self._operation(f, _nothing, stack)
                  for f in files),
                *(CommitOperationAdd(name, self._content(text)) for name, text in texts.items()),
                *(CommitOperationDelete(path) for path in old),
            ]  # fmt: skip
            stack.enter_context(self._asking())
            made = self._commit_at(head, operations, {*ours, *old}, message)
        self._confirm(made.oid, files)
        where = f"{self._api.endpoint}/{self.to.repo}"
        branch = quote(self.to.revision, safe="")
        url = where if self.to.revision == constants.DEFAULT_REVISION else f"{where}/tree/{branch}"
        return Commit(made.oid, made.pr_url or url)

    def _content(self, text: bytes) -> bytes | io.BytesIO:
        return text if self._xet else io.BytesIO(text)

    def _commit_at(
        self,
        head: Head,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        ours: set[str],
        message: str,
    ) -> CommitInfo:
        try:
            return self._create_commit(head, operations, message)
        except HfHubHTTPError as error:
            if not is_stale(error):
                raise
        newer = self._head()
        paths = sorted(p for p in ours if head.files.get(p) != newer.files.get(p))
        if paths:
            raise OutputError(
                f"{self.to.repo}: somebody else has changed {printable(paths[0], 80)} there "
                "meanwhile; look at it, and publish again if ours is to replace it"
            )
        return self._create_commit(newer, operations, message)

    def _create_commit(
        self,
        head: Head,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
    ) -> CommitInfo:
        return self._api.create_commit(
            self.to.repo,
            operations,
            commit_message=message,
            revision=self.to.revision,
            create_pr=self.to.create_pr,
            parent_commit=head.commit,
        )

    def _confirm(self, commit: str, files: Sequence[File]) -> None:
        """A .gitignore in the repository, for one, makes the client leave files out in silence."""
        with self._asking():
            there = {entry.path: entry for entry in self._tree(commit)}
        for file in files:
            entry = there.get(file.name)
            digest = entry.lfs.sha256 if entry and entry.lfs else file.sha256
            if entry is None or (entry.size, digest) != (file.size, file.sha256):
                what = "is not there" if entry is None else "is another"
                raise OutputError(
                    f"{self.to.repo}: {printable(file.name)} {what} after the commit {commit}; "
                    "does a .gitignore leave it out?"
                )


def _nothing(position: int) -> None:
    """Nobody counts the small files."""
