"""A small HTTP server on loopback that behaves as the Hugging Face Hub does, with faults on demand.

It speaks what the client uses to look up and download: `/api/models/…` with sizes and hashes, `/…/resolve/…` with the
Hub's error codes, and for large files a redirect to a storage host, which is another name of this server and, as the
real one, accepts no token.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

LARGE = (".safetensors", ".model", ".bin", ".gguf")


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `start`; the rest are zeros that are made when they are asked for."""

    start: bytes
    size: int

    def part(self, begin: int, end: int) -> bytes:
        return self.start[begin:end].ljust(end - begin, b"\0")


@dataclass
class Repo:
    """A model repository: `commits` maps a commit to its files, `refs` branches and tags to commits."""

    commits: dict[str, dict[str, bytes | Sparse]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose path and range match these regular expressions.

    `status` answers with an error; `cut` closes the connection after that many bytes of the body (`reset`: rudely);
    `stall` stops sending there instead; `swap` sends other bytes of the same length; `ignore_range` sends all bytes.
    """

    path: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    stall: bool = False
    swap: bool = False
    ignore_range: bool = False
    body: bytes = b""
    times: int = 1
    range: str = ""


@dataclass
class Request:
    """A request as it came, and how many bytes of body were sent back."""

    method: str
    host: str
    path: str
    token: str
    range: str
    sent: int = 0


class HubServer:
    """The server; use as a context manager. `tokens` maps a valid token to the models its account may read."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.released = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, files: dict[str, bytes | Sparse], **settings: bool) -> str:
        """Add a commit with `files` to the main branch of `name` and return it."""
        repo = self.repos.setdefault(name, Repo({}, {}))
        for key, value in settings.items():
            setattr(repo, key, value)
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs["main"] = commit
        return commit

    def sent(self, ending: str) -> int:
        """Bytes of body sent for requests whose path ends so."""
        return sum(request.sent for request in self.requests if request.path.endswith(ending))

    def ranges(self, ending: str) -> list[str]:
        """The ranges asked for, of requests whose path ends so."""
        return [request.range for request in self.requests if request.path.endswith(ending)]

    def take(self, path: str, asked: str) -> Fault | None:
        """The fault for this request, if any; counted down."""
        for fault in self.faults:
            if fault.times > 0 and re.search(fault.path, path) and re.search(fault.range, asked):
                fault.times -= 1
                return fault
        return None


def size_of(data: bytes | Sparse) -> int:
    return data.size if isinstance(data, Sparse) else len(data)


def sha256_of(data: bytes | Sparse) -> str:
    return hashlib.sha256(data.start if isinstance(data, Sparse) else data).hexdigest()


def _sibling(name: str, data: bytes | Sparse) -> dict[str, Any]:
    size = size_of(data)
    content = b"" if isinstance(data, Sparse) else data
    entry: dict[str, Any] = {"rfilename": name, "size": size}
    if name.endswith(LARGE):
        entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256_of(data), "size": size, "pointerSize": 134}}
    else:
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    return entry


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The handler class of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urllib.parse.unquote(self.path.split("?")[0])
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            host = (self.headers.get("Host") or "").split(":")[0]
            self.request_log = Request(self.command, host, path, token, self.headers.get("Range") or "")
            hub.requests.append(self.request_log)
            self.fault = hub.take(path, self.request_log.range)
            if self.fault and self.fault.status:
                self.reply(self.fault.status, self.fault.body, self.fault.headers)
            elif host == "localhost":
                self.storage(path, token)
            elif token and token not in hub.tokens:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                self.about(found[1], found[2] or "main", token)
            elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self.resolve(found[1], found[2], found[3], token)
            else:
                self.refuse(404, "", "Not found")

        def repo(self, name: str, token: str) -> Repo | None:
            repo = hub.repos.get(name)
            if repo and (not repo.private or name in hub.tokens.get(token, ())):
                return repo
            if token:
                self.refuse(404, "RepoNotFound", "Repository not found")
            else:
                self.refuse(401, "", "Invalid username or password.")
            return None

        def commit(self, repo: Repo, revision: str) -> str | None:
            commit = repo.refs.get(revision, revision)
            if commit in repo.commits:
                return commit
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def about(self, name: str, revision: str, token: str) -> None:
            repo = self.repo(name, token)
            commit = self.commit(repo, revision) if repo else None
            if not repo or not commit:
                return
            siblings = [_sibling(file, data) for file, data in sorted(repo.commits[commit].items())]
            gated = "manual" if repo.gated else False
            about = {"_id": "0", "id": name, "modelId": name, "sha": commit, "gated": gated, "private": repo.private}
            self.reply(200, json.dumps({**about, "siblings": siblings, "tags": []}).encode())

        def resolve(self, name: str, revision: str, file: str, token: str) -> None:
            repo = self.repo(name, token)
            commit = self.commit(repo, revision) if repo else None
            if not repo or not commit:
                return
            if repo.gated and name not in hub.tokens.get(token, ()):
                return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            if file not in repo.commits[commit]:
                return self.refuse(404, "EntryNotFound", "Entry not found")
            data = repo.commits[commit][file]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{sha256_of(data)}"'}
            if not file.endswith(LARGE):
                return self.content(data, headers)
            place = f"http://localhost:{hub.port}/storage/{name}/{commit}/{file}"
            headers |= {"Location": place, "X-Linked-Size": str(size_of(data)), "X-Linked-Etag": headers["ETag"]}
            self.reply(302, b"", headers)

        def storage(self, path: str, token: str) -> None:
            if token:
                return self.reply(400, b"Only one auth mechanism allowed", {})
            owner, name, commit, file = path.removeprefix("/storage/").split("/", 3)
            self.content(hub.repos[f"{owner}/{name}"].commits[commit][file], {})

        def content(self, data: bytes | Sparse, headers: dict[str, str]) -> None:
            size, status = size_of(data), 200
            begin, end = 0, size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.range)
            if asked and not (self.fault and self.fault.ignore_range):
                begin, end, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
                if begin >= size:
                    return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
                headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
            part = data.part(begin, end) if isinstance(data, Sparse) else data[begin:end]
            if self.fault and self.fault.swap:
                part = bytes(255 - byte for byte in part)
            self.reply(status, part, headers)

        def refuse(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Code": code} if code else {}
            self.reply(status, json.dumps({"error": message}).encode(), {**headers, "X-Error-Message": message})

        def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = self.fault.cut if self.fault and status in (200, 206) else None
            try:
                for piece in _pieces(body[:cut]):
                    self.wfile.write(piece)
                    self.request_log.sent += len(piece)
                if cut is not None:
                    self.break_off()
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def break_off(self) -> None:
            assert self.fault
            self.wfile.flush()
            if self.fault.stall:
                hub.released.wait(30)
            if self.fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    return Handler


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]
