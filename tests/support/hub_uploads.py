"""A Hub on this machine that can be written to: repositories, branches, LFS uploads, commits.

As the real one, it knows contents by their sha256 and asks only for what it does not have; nothing
that is uploaded shows before a commit names it.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.support.hub_server import (
    LFS,
    Answer,
    HubServer,
    RefusedError,
    as_json,
    git_id,
    sha256,
)

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_XET = re.compile(rf"/api/models/{_REPO}/xet-write-token/(?P<revision>[^/]+)")

Fields = dict[str, str]


@dataclass
class Faults:
    """What goes wrong, and how often: numbers count down to 0.

    `failing_puts` answer 500, `cut_puts` lose the connection after `cut_after` bytes;
    `seconds_per_piece` slows every PUT down (64 kB at most at once). `before_commit` is called once
    before a commit is looked at. `full` says that there is no room: "batch" in the answer about a
    file, "create" when a repository is made; `refusal` is the answer to every write: a status, the
    Hub's name for it and its words. `dropped` are paths that a .gitignore leaves out.
    """

    failing_puts: int = 0
    cut_puts: int = 0
    cut_after: int = 0
    seconds_per_piece: float = 0.0
    before_commit: Callable[[], object] | None = None
    full: str = ""
    refusal: tuple[int, str, str] | None = None
    dropped: set[str] = field(default_factory=set)


class UploadHub(HubServer):
    """Takes what holders of `token` write. Holders of `guest` may read only, and propose.

    `part_bytes`: larger files are asked for in parts of that size. `xet`: say that there is Xet.
    `put_bytes` counts, by sha256, the bytes that came in, also in requests that broke off.
    """

    def __init__(self, token: str, guest: str | None = None, part_bytes: int | None = None):
        super().__init__(token)
        self.guest, self.part_bytes = guest, part_bytes
        self.xet = False
        self.faults = Faults()
        self.blobs: dict[str, bytes] = {}
        self.put_bytes: Counter[str] = Counter()
        self._parts: dict[str, dict[int, bytes]] = {}
        self._in_this_put: Counter[str] = Counter()
        self._routes: list[tuple[re.Pattern[str], Callable[[Fields, Any], Answer]]] = [
            (re.compile(pattern), take)
            for pattern, take in (
                (r"/api/repos/create", self._create),
                (r"/api/validate-yaml", lambda _, __: as_json({"errors": [], "warnings": []})),
                (rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", self._branch),
                (rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", self._preupload),
                (rf"/{_REPO}\.git/info/lfs/objects/batch", self._batch),
                (r"/lfs/(?P<oid>\w+)/verify", self._verify),
                (rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", self._take_commit),
            )
        ]

    def answer(self, path: str, token: str | None, wanted_range: str) -> Answer:
        if path == "/api/whoami-v2":
            self._check_known(token)
            return as_json({"name": "owner", "type": "user"})
        if _XET.fullmatch(path) and self.xet:
            return as_json({"casUrl": f"{self.url}/cas", "exp": 2**33, "accessToken": "xet"})
        return super().answer(path, token, wanted_range)

    def receive(self, path: str, num_bytes: int) -> None:
        if not (put := re.fullmatch(r"/lfs/(\w+)(/\d+)?", path)):
            return
        time.sleep(self.faults.seconds_per_piece)
        self.put_bytes[put[1]] += num_bytes
        self._in_this_put[path] += num_bytes
        if self.faults.cut_puts and self._in_this_put[path] > self.faults.cut_after:
            self.faults.cut_puts -= 1
            self._in_this_put[path] = 0
            raise ConnectionAbortedError

    def take(self, path: str, query: str, token: str | None, body: bytes) -> Answer:
        if put := re.fullmatch(r"/lfs/(?P<oid>\w+)(/(?P<part>\d+))?", path):
            return self._put(put["oid"], put["part"], body)  # signed: needs no token
        if completed := re.fullmatch(r"/lfs/(?P<oid>\w+)/complete", path):
            return self._complete(completed["oid"], json.loads(body))
        for pattern, take in self._routes:
            if found := pattern.fullmatch(path):
                fields = {name: unquote(value) for name, value in found.groupdict().items()}
                self._check_rights(path, query, token)
                fields |= {name: values[0] for name, values in parse_qs(query).items()}
                return take(fields, _lines(body) if "/commit/" in path else json.loads(body))
        raise RefusedError(404)

    def _check_known(self, token: str | None) -> None:
        if token not in (self.token, self.guest):
            raise RefusedError(401)

    def _check_rights(self, path: str, query: str, token: str | None) -> None:
        """Guests may do all that a pull request needs."""
        if self.faults.refusal:
            raise RefusedError(*self.faults.refusal)
        self._check_known(token)
        proposes = "create_pr=1" in query or ".git/info/lfs" in path or path.startswith("/lfs/")
        if token != self.token and not proposes and not path.endswith("validate-yaml"):
            raise RefusedError(403, message="You don't have the rights to write here")

    def _create(self, _: Fields, asked: Any) -> Answer:
        repo = f"{asked['organization']}/{asked['name']}"
        if self.faults.full == "create":
            raise RefusedError(402, message="Your plan has no room for another repository")
        if repo in self.commits:
            return Answer(409, {}, json.dumps({"url": f"{self.url}/{repo}"}).encode())
        if asked.get("visibility") == "private":
            self.private.add(repo)
        self.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return as_json({"url": f"{self.url}/{repo}", "name": repo, "id": repo})

    def _branch(self, at: Fields, _: Any) -> Answer:
        self.revisions[at["repo"]].setdefault(at["branch"], self.revisions[at["repo"]]["main"])
        return as_json({})

    def _preupload(self, at: Fields, asked: Any) -> Answer:
        _, files = self.resolve(at["repo"], at["revision"])
        return as_json({"files": [self._mode(file["path"], files) for file in asked["files"]]})

    def _mode(self, path: str, files: dict[str, bytes]) -> dict[str, Any]:
        large = path.endswith(LFS)
        known = {}
        if path in files:
            known["oid"] = sha256(files[path]) if large else git_id(files[path])
        ignored = path in self.faults.dropped
        mode = "lfs" if large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": ignored, **known}

    def _batch(self, _: Fields, asked: Any) -> Answer:
        objects = [self._action(each["oid"], each["size"]) for each in asked["objects"]]
        return as_json({"transfer": "basic", "objects": objects})

    def _action(self, oid: str, size: int) -> dict[str, Any]:
        about = {"oid": oid, "size": size}
        if self.faults.full == "batch":
            why = {"code": 413, "message": "You have reached your storage quota"}
            return {**about, "error": why}
        if oid in self.blobs:
            return about
        here, header = f"{self.url}/lfs/{oid}", {}
        href = f"{here}?X-Amz-Signature=secret"
        if self.part_bytes and size > self.part_bytes:
            count = -(-size // self.part_bytes)
            header = {str(part): f"{here}/{part}" for part in range(1, count + 1)}
            header["chunk_size"] = str(self.part_bytes)
            href = f"{here}/complete"
        upload = {"href": href, "header": header}
        return {**about, "actions": {"upload": upload, "verify": {"href": f"{here}/verify"}}}

    def _put(self, oid: str, part: str | None, body: bytes) -> Answer:
        if self.faults.failing_puts:
            self.faults.failing_puts -= 1
            raise RefusedError(500)
        if part is None:
            self._keep(oid, body)
        else:
            self._parts.setdefault(oid, {})[int(part)] = body
        return Answer(200, {"ETag": f'"{sha256(body)[:16]}"'}, b"")

    def _complete(self, oid: str, asked: Any) -> Answer:
        parts = self._parts.pop(oid)
        numbers = [part["partNumber"] for part in asked["parts"]]
        self._keep(oid, b"".join(parts[number] for number in numbers))
        return as_json({})

    def _keep(self, oid: str, body: bytes) -> None:
        if sha256(body) != oid:
            raise RefusedError(400, message="the content has another sha256")
        self.blobs[oid] = body

    def _verify(self, at: Fields, asked: Any) -> Answer:
        if len(self.blobs.get(at["oid"], b"")) != asked["size"]:
            raise RefusedError(400, message="the size is another")
        return as_json({})

    def _take_commit(self, at: Fields, lines: Any) -> Answer:
        if hook := self.faults.before_commit:
            self.faults.before_commit = None
            hook()
        head, files = self.resolve(at["repo"], at["revision"])
        proposes = at.get("create_pr") == "1"
        header = lines[0]["value"]
        if not proposes and header.get("parentCommit", head) != head:
            raise RefusedError(412, message="A commit has happened since")
        content = dict(files)
        for line in lines[1:]:
            self._apply(line["key"], line["value"], content)
        branch = f"refs/pr/{self._proposals(at['repo']) + 1}" if proposes else at["revision"]
        commit = self.add(at["repo"], content, [branch])
        answer = {"success": True, "commitOid": commit}
        answer["commitUrl"] = f"{self.url}/{at['repo']}/commit/{commit}"
        if proposes:
            answer["pullRequestUrl"] = f"{self.url}/{at['repo']}/discussions/{branch[8:]}"
        return as_json(answer)

    def _apply(self, key: str, value: Any, content: dict[str, bytes]) -> None:
        if key == "file":
            content[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            if value["oid"] not in self.blobs:
                raise RefusedError(400, message="a file was not uploaded")
            content[value["path"]] = self.blobs[value["oid"]]
        else:
            assert key == "deletedFile"
            del content[value["path"]]

    def _proposals(self, repo: str) -> int:
        return sum(name.startswith("refs/pr/") for name in self.revisions[repo])

    def head(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds now."""
        return self.commits[repo][self.revisions[repo][branch]]


def _lines(body: bytes) -> list[Any]:
    return [json.loads(line) for line in body.splitlines()]
