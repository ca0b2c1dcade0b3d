"""The recipe's `publish:`: where on the Hub the finished merge goes. No part of what is merged.

publish:
  repo: owner/name
  private: true          # default: false
  revision: main         # a branch; made where there is none
  stream: true           # upload each shard as soon as it is finished
  delete_local: true     # remove OUT's weights once the Hub has confirmed all of them
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from distmerge.document import Node
from distmerge.errors import ConfigError

MAIN = "main"

_BRANCH = re.compile(r"(?!.*(?:\.\.|//|/\.|\.lock$|/$))[\w][\w./+-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Publication:
    """Where to publish, and how. `revision` is a branch, `create_pr` opens a pull request on it."""

    repo: str
    private: bool = False
    revision: str = MAIN
    create_pr: bool = False
    stream: bool = False
    delete_local: bool = False

    def __post_init__(self) -> None:
        if complaint := repo_complaint(self.repo) or branch_complaint(self.revision):
            raise ConfigError(complaint)


def repo_complaint(repo: str) -> str | None:
    """Why `repo` is not the name of a repository that can be published to; None if it is."""
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return f"{repo!r} is not the name of a repository; expected owner/name"
    return None if "/" in repo else f"repository {repo!r} lacks its owner; expected owner/{repo}"


def branch_complaint(revision: str) -> str | None:
    """Why `revision` is not the name of a branch; None if it is."""
    if _COMMIT.fullmatch(revision):
        return "revision is a commit; nothing can be added to that: name a branch"
    return None if _BRANCH.fullmatch(revision) else f"{revision!r} is not the name of a branch"


def parse_publication(node: Node) -> Publication:
    """Read `publish:`. Raises ConfigError with file, line and key."""
    keys = node.mapping(("repo", "private", "revision", "stream", "delete_local"))
    if "repo" not in keys:
        node.fail("repo is missing: owner/name of the repository on the Hub")
    repo = keys["repo"].text()
    revision = keys["revision"].text() if "revision" in keys else MAIN
    if complaint := repo_complaint(repo):
        keys["repo"].fail(complaint)
    if complaint := branch_complaint(revision):
        keys["revision"].fail(complaint)
    flags = {
        key: keys[key].boolean() for key in ("private", "stream", "delete_local") if key in keys
    }
    return Publication(repo=repo, revision=revision, **flags)
