"""A Hub on this machine: the routes for reading that huggingface_hub's client uses, and a count.

`with HubServer() as hub:`, then `hub.add(...)`, and HF_ENDPOINT=`hub.url` for the processes under
test; `hub.requests` is what they asked for. One that can be written to is in `hub_uploads`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_REPO = r"/(?P<repo>[^/]+/[^/]+)"
_INFO = re.compile(rf"/api/models{_REPO}(/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(rf"/api/models{_REPO}/tree/(?P<revision>[^/]+)")
_FILE = re.compile(rf"{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")

LFS = (".safetensors", ".bin")


class Request(NamedTuple):
    """What was asked for and answered; `sent` counts the bytes of the answer's body, `received`
    those of the request's."""

    method: str
    path: str
    token: str | None
    status: int
    sent: int
    received: int = 0


def downloads(requests: Sequence[Request]) -> list[str]:
    """Paths of the files whose content was sent, in full or in part, once for each time."""
    return [
        request.path
        for request in requests
        if request.method == "GET" and request.status in (200, 206) and "/resolve/" in request.path
    ]


class Answer(NamedTuple):
    """What goes back: HEAD gets the same without its body."""

    status: int
    headers: dict[str, str]
    body: bytes


class RefusedError(Exception):
    """An answer other than the one asked for; `code` is the Hub's own name for it."""

    def __init__(self, status: int, code: str | None = None, message: str | None = None):
        self.status, self.code, self.message = status, code, message

    @property
    def answer(self) -> Answer:
        headers = {"X-Error-Code": self.code} if self.code else {}
        if self.message:
            headers["X-Error-Message"] = self.message
        return Answer(self.status, headers, b'{"error": "refused"}')


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


class HubServer:
    """Repositories in memory, served over HTTP while in its context.

    Members of `gated` show their files' names but not their content, those of `private` nothing
    without `token`; members of `failing` answer 500, those of `silent` close the connection.
    """

    def __init__(self, token: str | None = None):
        self.token = token
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.revisions: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.failing: set[str] = set()
        self.silent: set[str] = set()
        self.requests: list[Request] = []
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, repo: str, files: Mapping[str, bytes], revisions: Sequence[str] = ("main",)
    ) -> str:
        """Commit `files` as all that `revisions` of `repo` hold; returns the commit's id."""
        names = "".join(f"{name} {git_id(data)}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{repo} {names}".encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.revisions.setdefault(repo, {}).update(dict.fromkeys(revisions, commit))
        return commit

    def add_folder(self, repo: str, folder: Path, revisions: Sequence[str] = ("main",)) -> str:
        """Commit the files in `folder`, as `add` does."""
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        return self.add(repo, files, revisions)

    def answer(self, path: str, token: str | None, wanted_range: str) -> Answer:
        """What a GET of `path` gives; RefusedError, or ConnectionAbortedError for silence."""
        found = next((m for route in (_INFO, _TREE, _FILE) if (m := route.fullmatch(path))), None)
        if found is None:
            raise RefusedError(404)
        part = {name: unquote(value or "main") for name, value in found.groupdict().items()}
        self.check_access(part["repo"], content=found.re is _FILE, token=token)
        commit, files = self.resolve(part["repo"], part["revision"])
        if found.re is _FILE:
            return _file(part["path"], commit, files, wanted_range)
        if found.re is _TREE:
            return as_json([_entry(name, data) for name, data in sorted(files.items())])
        siblings = [{"rfilename": name} for name in sorted(files)]
        about = {"id": part["repo"], "private": part["repo"] in self.private, "tags": []}
        return as_json({**about, "sha": commit, "siblings": siblings})

    def receive(self, path: str, num_bytes: int) -> None:
        """Hear of a piece of a request's body. ConnectionAbortedError breaks the connection."""

    def take(self, path: str, query: str, token: str | None, body: bytes) -> Answer:  # noqa: ARG002
        """What a POST or a PUT of `body` gives; errors as in `answer`."""
        raise RefusedError(405)

    def check_access(self, repo: str, *, content: bool, token: str | None) -> None:
        if repo in self.silent:
            raise ConnectionAbortedError
        if repo in self.failing:
            raise RefusedError(500)
        known = self.token is not None and token == self.token
        if repo in self.private and not known:
            raise RefusedError(401, "RepoNotFound")
        if repo in self.gated and content and not known:
            raise RefusedError(403 if token else 401, "GatedRepo")

    def resolve(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        if repo not in self.commits:
            raise RefusedError(404, "RepoNotFound")
        commit = self.revisions[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            raise RefusedError(404, "RevisionNotFound")
        return commit, self.commits[repo][commit]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent: requests are counted instead."""

    def _respond(self, *, with_body: bool) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        wanted_range = self.headers.get("Range", "")
        self._answer(lambda: hub.answer(path, self._token, wanted_range), with_body=with_body)

    def _take(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        body = bytearray()

        def answer() -> Answer:
            while missing := int(self.headers["Content-Length"]) - len(body):
                piece = self.rfile.read1(min(missing, 2**16))
                if not piece:
                    raise ConnectionAbortedError
                body.extend(piece)
                hub.receive(url.path, len(piece))
            return hub.take(url.path, url.query, self._token, bytes(body))

        self._answer(answer, with_body=True, body=body)

    @property
    def _token(self) -> str | None:
        bearer = self.headers.get("Authorization")
        return bearer.removeprefix("Bearer ") if bearer else None

    def _answer(self, make: Callable[[], Answer], *, with_body: bool, body: Sized = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            answer = make()
        except RefusedError as refused:
            answer = refused.answer
        except (ConnectionAbortedError, ConnectionResetError):
            self.close_connection = True
            return
        sent = len(answer.body) if with_body else 0
        self.server.hub.requests.append(
            Request(self.command, path, self._token, answer.status, sent, len(body))
        )
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            with suppress(ConnectionError):  # who asked may be gone
                self.wfile.write(answer.body)


def _file(name: str, commit: str, files: Mapping[str, bytes], wanted_range: str) -> Answer:
    if name not in files:
        raise RefusedError(404, "EntryNotFound")
    data = files[name]
    tag = sha256(data) if name.endswith(LFS) else git_id(data)
    headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted_range)
    if wanted is None:
        return Answer(200, headers, data)
    first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
    if first > last:
        raise RefusedError(416)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Answer(206, headers, data[first : last + 1])


def as_json(value: object) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
    entry["oid"] = git_id(data)
    if name.endswith(LFS):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
