"""A Hub whose large files lie in a storage of another address, as the real one's do.

The Hub redirects to addresses that expire; the storage knows no tokens, serves ranges, and
misbehaves where a test tells it to.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

from tests.support.hub_server import Answer, HubServer, RefusedError

STALL = 2.0
"""Seconds without a byte, for `stall`."""

Fault = str | int
"""A status (429 with Retry-After: 1), or one of these, which stand for what the storage does:

drop (the connection, in the middle of the body), stall (in the middle), silent (no answer), whole
(the file in place of the range), half (of the file is all there is), compressed, version (another
ETag), greedy (a byte more than asked for); sound for nothing wrong.
"""


class Served(NamedTuple):
    """A range that the storage was asked for, and how many of its bytes it sent."""

    sha256: str
    first: int
    last: int
    status: int
    sent: int
    authorized: bool


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, storage: Storage):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.storage = storage

    def handle_error(self, request: object, client_address: object) -> None:
        """Silent: tests kill who asked."""


class Storage:
    """Files by their sha256, served while in its context; `served` is what was asked for.

    Each answer takes the next of `faults`. Those of `lasting`, by sha256, hit whatever is asked
    for beyond the header of a file.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: deque[Fault] = deque()
        self.lasting: dict[str, Fault] = {}
        self.served: list[Served] = []
        self._signatures: set[str] = set()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Storage:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def sent(self) -> int:
        """Bytes of all files that were sent so far."""
        return sum(served.sent for served in self.served)

    def address(self, sha256: str) -> str:
        """Where a file is, until the next `expire`."""
        self._signatures.add(signature := secrets.token_hex(8))
        return f"http://127.0.0.1:{self._server.server_port}/{sha256}?signature={signature}"

    def expire(self) -> None:
        """All addresses that were given out are no longer good."""
        self._signatures.clear()

    def fault(self, sha256: str, signature: str, first: int) -> Fault:
        """What is to go wrong with a request."""
        if signature not in self._signatures:
            return 403
        if self.faults:
            return self.faults.popleft()
        beyond = first >= header_end(self.files[sha256])
        return self.lasting.get(sha256, "sound") if beyond else "sound"


class HubWithStorage(HubServer):
    """As HubServer, but safetensors files lie in `storage`, except for members of `direct`.

    Files named in `replaced` are other ones than the repository lists, those in `gone` are gone.
    """

    def __init__(self, storage: Storage, token: str | None = None):
        super().__init__(token)
        self.storage = storage
        self.direct: set[str] = set()
        self.replaced: set[str] = set()
        self.gone: set[str] = set()

    def answer(self, path: str, token: str | None, wanted_range: str) -> Answer:
        """A redirection for a safetensors file."""
        found = super().answer(path, token, wanted_range)
        repo, _, at = path[1:].partition("/resolve/")
        name = at.rpartition("/")[2]
        if repo in self.direct or not name.endswith(".safetensors"):
            return found
        if name in self.gone:
            raise RefusedError(404, "EntryNotFound")
        data = found.body[:-1] + b"!" if name in self.replaced else found.body
        sha256 = hashlib.sha256(data).hexdigest()
        self.storage.files[sha256] = data
        headers = {
            "Location": self.storage.address(sha256),
            "X-Linked-ETag": f'"{sha256}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": found.headers["X-Repo-Commit"],
        }
        return Answer(302, headers, b"")


def header_end(data: bytes) -> int:
    """Where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Silent: requests are counted instead."""

    def do_GET(self) -> None:
        storage, address = self.server.storage, urlsplit(self.path)
        sha256, signature = address.path[1:], address.query.removeprefix("signature=")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert wanted is not None, "nobody asks for whole files here"
        first, last = map(int, wanted.groups())
        fault = storage.fault(sha256, signature, first)
        answer = _answer(storage.files[sha256], first, last, fault)
        sent = self._send(answer, fault)
        authorized = "Authorization" in self.headers
        storage.served.append(Served(sha256, first, last, answer.status, sent, authorized))

    def _send(self, answer: Answer, fault: Fault) -> int:
        """How many bytes of the file went out."""
        self.close_connection = fault in ("silent", "drop", "stall")
        if fault == "silent":
            return 0
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        body = answer.body[: len(answer.body) // 2] if self.close_connection else answer.body
        try:
            self.wfile.write(body)
        except OSError:  # who asked has gone away
            self.close_connection = True
        time.sleep(STALL if fault == "stall" else 0)
        return len(body) if answer.status in (200, 206) else 0


def _answer(data: bytes, first: int, last: int, fault: Fault) -> Answer:
    if isinstance(fault, int):
        return Answer(fault, {"Retry-After": "1"} if fault == 429 else {}, b"refused")
    if fault == "whole":
        return Answer(200, {}, data)
    if fault == "half":
        data = data[: len(data) // 2]
    if last >= len(data):
        return Answer(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
    headers = {
        "Content-Range": f"bytes {first}-{last}/{len(data)}",
        "ETag": '"another"' if fault == "version" else '"of-the-storage"',
        "Content-Encoding": "gzip" if fault == "compressed" else "identity",
    }
    return Answer(206, headers, data[first : last + 1] + (b"!" if fault == "greedy" else b""))
