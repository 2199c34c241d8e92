"""A small HTTP server on loopback that behaves as the Hugging Face Hub does, with faults on demand.

It speaks what the client uses to look up and download: `/api/models/…` with sizes and hashes, `/…/resolve/…` with the
Hub's error codes, and for large files a redirect to a storage host, which is another name of this server and, as the
real one, accepts no token. And what it uses to upload: validation of the card, preupload, Git LFS batches with whole
files or parts, verification, conditional commits, references and tags, and the exchange of a CI job's identity for a
token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

LARGE = (".safetensors", ".model", ".bin", ".gguf", ".tflite", ".litertlm")
HARDWARE = (  # name, memory, disk, accelerator, micro-dollars a minute
    ("cpu-basic", "16 GB", "20 GB", None, 167),
    ("cpu-upgrade", "32 GB", "50 GB", None, 500),
    ("cpu-xl", "124 GB", "1 TB", None, 16667),
    ("odd", "1 TB", "N/A", None, 1),
    ("a10g-large", "46 GB", "110 GB", "A10G", 25000),
    ("a100-large", "142 GB", "1 TB", "A100", 41667),
)
"""The machines for jobs."""
NAME = "((?:spaces/)?[^/]+/[^/]+)"
"""A repository in a path; a Space has a name of its own, beside the model of that name."""
PART = 1000
"""Bytes from which on a large file is sent in parts of this size."""


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `start`; the rest are zeros that are made when they are asked for."""

    start: bytes
    size: int

    def part(self, begin: int, end: int) -> bytes:
        return self.start[begin:end].ljust(end - begin, b"\0")


@dataclass(frozen=True)
class Stored:
    """A file that stays on disk: too large for memory."""

    file: Path
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Path) -> Stored:
        with file.open("rb") as stream:
            return cls(file, file.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())

    def part(self, begin: int, end: int) -> memoryview:
        with self.file.open("rb") as stream:
            return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))[begin:end]


Data = bytes | Sparse | Stored


@dataclass
class Repo:
    """A repository: `commits` maps a commit to its files, `refs` branches and `tags` to commits.

    `objects` are large files that storage holds, by sha256, whether a commit names them or not.
    """

    commits: dict[str, dict[str, Data]]
    refs: dict[str, str]
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method, path and range match these regular expressions.

    `status` answers with an error; `cut` closes the connection after that many bytes of the body, the answer's or, of
    an upload, the request's (`reset`: rudely); `stall` stops there instead; `swap` sends other bytes, as many of them;
    `ignore_range` sends all bytes; `unanswered` does what is asked and hangs up; `slow` waits that many seconds first;
    `echo` quotes the token in the error; `run` is called when the request has come in, `skip` lets that many pass.
    """

    path: str
    method: str = ""
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
    unanswered: bool = False
    slow: float = 0.0
    echo: bool = False
    run: Callable[[], object] | None = None
    skip: int = 0


@dataclass
class Request:
    """A request as it came, how many bytes of body were sent back, and the status."""

    method: str
    host: str
    path: str
    token: str
    range: str
    sent: int = 0
    status: int = 0


class HubServer:
    """The server; use as a context manager.

    `repos` has models by `owner/name`, Spaces by `spaces/owner/name`. `tokens` maps a valid token to what its account
    may read of them, `writers` to what it may write to. `identities` maps a CI job's identity to the token that it is
    exchanged for. `jobs` and `webhooks` are those that were submitted.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.writers: dict[str, set[str]] = {}
        self.identities: dict[str, str] = {}
        self.jobs: list[dict[str, Any]] = []
        self.webhooks: list[dict[str, Any]] = []
        self.lock = threading.Lock()
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

    def add(self, name: str, files: dict[str, Data], **settings: bool) -> str:
        """Add a commit with `files` to the main branch of `name` and return it."""
        repo = self.repos.setdefault(name, Repo({}, {}))
        for key, value in settings.items():
            setattr(repo, key, value)
        commit = hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs["main"] = commit
        large = (data for file, data in files.items() if file.endswith(LARGE) and isinstance(data, bytes))
        repo.objects |= {sha256_of(data): data for data in large}
        return commit

    def count(self, method: str, path: str) -> int:
        """Requests of this method, whose path matches, that were answered well."""
        found = (request for request in self.requests if request.method == method and re.search(path, request.path))
        return sum(200 <= request.status < 300 for request in found)

    def sent(self, ending: str) -> int:
        """Bytes of body sent for requests whose path ends so."""
        return sum(request.sent for request in self.requests if request.path.endswith(ending))

    def ranges(self, ending: str) -> list[str]:
        """The ranges asked for, of requests whose path ends so."""
        return [request.range for request in self.requests if request.path.endswith(ending)]

    def take(self, method: str, path: str, asked: str) -> Fault | None:
        """The fault for this request, if any; counted down."""
        with self.lock:
            for fault in self.faults:
                wanted = re.fullmatch(fault.method or ".*", method) and re.search(fault.path, path)
                if fault.times > 0 and wanted and re.search(fault.range, asked):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None


def _machine(name: str, memory: str, disk: str, accelerator: str | None, price: int) -> dict[str, Any]:
    card = {"type": "gpu", "model": accelerator, "quantity": "1", "vram": "24 GB", "manufacturer": "Nvidia"}
    return {
        **{"name": name, "prettyName": name.upper(), "cpu": "2 vCPU", "ram": memory, "ephemeralStorage": disk},
        **{"accelerator": card if accelerator else None, "unitCostMicroUSD": price, "unitCostUSD": price / 1e6},
        "unitLabel": "minute",
    }


def size_of(data: Data) -> int:
    return len(data) if isinstance(data, bytes) else data.size


def sha256_of(data: Data) -> str:
    if isinstance(data, Stored):
        return data.sha256
    return hashlib.sha256(data.start if isinstance(data, Sparse) else data).hexdigest()


def oid_of(name: str, data: Data) -> str:
    """The name that the Hub has for a file's content: its sha256 if it is large, else git's."""
    if name.endswith(LARGE):
        return sha256_of(data)
    return hashlib.sha1(b"blob %d\0" % size_of(data) + (data if isinstance(data, bytes) else b"")).hexdigest()


def _front_matter(card: object) -> dict[str, Any]:
    """`cardData` as the Hub tells it, of a README.md that begins with it."""
    found = re.match(rb"---\n(.*?)\n---\n", card, re.DOTALL) if isinstance(card, bytes) else None
    try:
        return {"cardData": yaml.safe_load(found[1])} if found else {}
    except yaml.YAMLError:
        return {}


def _sibling(name: str, data: Data) -> dict[str, Any]:
    size = size_of(data)
    entry: dict[str, Any] = {"rfilename": name, "size": size}
    if name.endswith(LARGE):
        entry |= {"blobId": "0" * 40, "lfs": {"sha256": sha256_of(data), "size": size, "pointerSize": 134}}
    else:
        entry["blobId"] = oid_of(name, data)
    return entry


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    """The handler class of one server."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # the client was killed
                self.close_connection = True

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            self.asked()

        def do_POST(self) -> None:
            self.asked()

        def do_PUT(self) -> None:
            self.asked()

        def asked(self) -> None:
            path = urllib.parse.unquote(self.path.split("?")[0]).replace("/api/spaces/", "/api/models/spaces/", 1)
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            host = (self.headers.get("Host") or "").split(":")[0]
            self.request_log = Request(self.command, host, path, token, self.headers.get("Range") or "")
            hub.requests.append(self.request_log)
            self.fault = hub.take(self.command, path, self.request_log.range)
            if self.fault and self.fault.slow:
                hub.released.wait(self.fault.slow)
            self.body = self.received()
            if self.fault and self.fault.run:
                self.fault.run()
            if self.fault and self.fault.cut is not None and self.command in ("POST", "PUT"):
                return
            if self.fault and self.fault.status:
                words = f"not with {token}"
                said = json.dumps({"error": words}).encode() if self.fault.echo else self.fault.body
                headers = {"X-Error-Message": words} if self.fault.echo else {}
                self.reply(self.fault.status, said, {**headers, **self.fault.headers})
            elif self.command == "GET" or self.command == "HEAD":
                self.get(host, path, token)
            else:
                self.post(host, path, token)

        def received(self) -> bytes:
            """The body of the request, as far as the fault lets it come."""
            length = int(self.headers.get("Content-Length") or 0)
            if self.command in ("GET", "HEAD") or not self.fault or self.fault.cut is None:
                return self.rfile.read(length) if self.headers.get("Transfer-Encoding") is None else self.chunks()
            part = self.rfile.read(min(self.fault.cut, length))
            self.break_off()
            return part

        def chunks(self) -> bytes:
            data = bytearray()
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return bytes(data)

        def get(self, host: str, path: str, token: str) -> None:
            if path == "/identity":
                self.reply(200, json.dumps({"value": token.removeprefix("job-")}).encode())
            elif host == "localhost":
                self.storage(path, token)
            elif token and token not in hub.tokens:
                self.refuse(401, "", "Invalid credentials in Authorization header")
            elif path == "/api/jobs/hardware":
                self.reply(200, json.dumps([_machine(*each) for each in HARDWARE]).encode())
            elif found := re.fullmatch(rf"/api/models/{NAME}/refs", path):
                self.references(found[1], token)
            elif found := re.fullmatch(rf"/api/models/{NAME}(?:/revision/(.+))?", path):
                self.about(found[1], found[2] or "main", token)
            elif found := re.fullmatch(rf"/{NAME}/resolve/([^/]+)/(.+)", path):
                self.resolve(found[1], found[2], found[3], token)
            else:
                self.refuse(404, "", "Not found")

        def post(self, host: str, path: str, token: str) -> None:
            if host == "localhost":
                return self.store(path, token)
            if path == "/oauth/token":
                return self.exchange()
            if path == "/api/validate-yaml":
                bad = "license:" not in json.loads(self.body)["content"]
                said = {"errors": [{"message": "no licence"}] if bad else [], "warnings": []}
                return self.reply(400 if bad else 200, json.dumps(said).encode())
            if token not in hub.tokens:
                return self.refuse(401, "", "Invalid credentials in Authorization header")
            if found := re.fullmatch(r"/api/jobs/([^/]+)", path):
                return self.submit(found[1])
            if path == "/api/settings/webhooks":
                return self.watch()
            for pattern, work in (
                (rf"/api/models/{NAME}/preupload/(.+)", self.preupload),
                (rf"/{NAME}\.git/info/lfs/objects/(batch)", self.batch),
                (rf"/{NAME}\.git/info/lfs/objects/(verify)", self.verify),
                (rf"/api/models/{NAME}/commit/(.+)", self.make_commit),
                (rf"/api/models/{NAME}/tag/(.+)", self.make_tag),
            ):
                if found := re.fullmatch(pattern, path):
                    if found[1] not in hub.writers.get(token, ()):
                        return self.refuse(403, "", "you are not allowed to write")
                    with hub.lock:
                        return work(hub.repos[found[1]], found[1], found[2])
            self.refuse(404, "", "Not found")

        def submit(self, namespace: str) -> None:
            hub.jobs.append({"namespace": namespace, **json.loads(self.body)})
            owner = {"id": "1", "name": namespace, "type": "user"}
            said = {"id": f"job{len(hub.jobs)}", "owner": owner, "status": {"stage": "SCHEDULING", "message": None}}
            self.reply(200, json.dumps(said).encode())

        def watch(self) -> None:
            asked = json.loads(self.body)
            if asked["jobSourceId"] not in {f"job{place}" for place, _ in enumerate(hub.jobs, start=1)}:
                return self.refuse(404, "", "Job not found")
            hub.webhooks.append(asked)
            told = {"id": f"hook{len(hub.webhooks)}", "watched": asked["watched"], "domains": asked["domains"]}
            self.reply(200, json.dumps({"webhook": {**told, "disabled": False}}).encode())

        def exchange(self) -> None:
            token = hub.identities.get(json.loads(self.body)["subject_token"])
            if not token:
                return self.refuse(401, "", "no trusted publisher matches")
            self.reply(200, json.dumps({"access_token": token, "expires_in": 3600}).encode())

        def preupload(self, repo: Repo, name: str, revision: str) -> None:
            there = repo.commits[repo.refs[revision]]
            files = []
            for file in json.loads(self.body)["files"]:
                mode = "lfs" if file["path"].endswith(LARGE) else "regular"
                oid = oid_of(file["path"], there[file["path"]]) if file["path"] in there else None
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.reply(200, json.dumps({"files": files}).encode())

        def batch(self, repo: Repo, name: str, _: str) -> None:
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                oid, size = wanted["oid"], wanted["size"]
                if oid in repo.objects:
                    objects.append({"oid": oid, "size": size})
                    continue
                store = f"http://localhost:{hub.port}/upload/{name}/{oid}"
                upload: dict[str, Any] = {"href": f"{store}?X-Amz-Signature=s1gned"}
                if size > PART:
                    repo.parts[oid] = {}
                    parts = {str(i + 1): f"{store}/{i + 1}?X-Amz-Signature=s1gned" for i in range(-(-size // PART))}
                    upload = {"href": f"{store}/complete?X-Amz-Signature=s1gned"}
                    upload["header"] = {"chunk_size": str(PART), **parts}
                check = {"href": f"{hub.endpoint}/{name}.git/info/lfs/objects/verify"}
                objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": check}})
            self.reply(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

        def store(self, path: str, token: str) -> None:
            """A large file, or a part of one, arrives; as the real storage, this takes only what has the right hash."""
            if token:
                return self.reply(400, b"Only one auth mechanism allowed", {})
            name, oid, rest = re.fullmatch(rf"/upload/{NAME}/([0-9a-f]{{64}})(/.+)?", path).groups()  # type: ignore[union-attr]
            repo, part = hub.repos[name], [rest.removeprefix("/")] if rest else []
            with hub.lock:
                if part == ["complete"]:
                    data = b"".join(data for _, data in sorted(repo.parts[oid].items()))
                elif part:
                    repo.parts[oid][int(part[0])] = self.body
                    return self.reply(200, b"", {"ETag": f'"{part[0]}"'})
                else:
                    data = self.body
                if sha256_of(data) != oid:
                    return self.reply(400, b"BadDigest", {})
                repo.objects[oid] = data
            self.reply(200, b"{}", {})

        def verify(self, repo: Repo, name: str, _: str) -> None:
            asked = json.loads(self.body)
            there = repo.objects.get(asked["oid"])
            if there is None or len(there) != asked["size"]:
                return self.refuse(404, "", "the object is not there")
            self.reply(200, b"{}")

        def make_commit(self, repo: Repo, name: str, branch: str) -> None:
            head, *operations = map(json.loads, self.body.splitlines())
            if head["value"].get("parentCommit") not in (None, repo.refs[branch]):
                return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[repo.refs[branch]])
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        return self.refuse(404, "EntryNotFound", "A file with this name doesn't exist")
                elif operation["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif value["oid"] in repo.objects:
                    files[value["path"]] = repo.objects[value["oid"]]
                else:
                    return self.refuse(400, "", f"LFS object {value['oid']} is missing")
            commit = hub.add(name, files)
            place = f"{hub.endpoint}/{name}/commit/{commit}"
            self.reply(200, json.dumps({"success": True, "commitOid": commit, "commitUrl": place}).encode())

        def make_tag(self, repo: Repo, name: str, revision: str) -> None:
            tag, commit = json.loads(self.body)["tag"], repo.refs.get(revision, revision)
            if tag in repo.tags:
                return self.refuse(409, "", f"tag {tag} exists already")
            if commit not in repo.commits:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            repo.tags[tag] = commit
            self.reply(200, b"{}")

        def references(self, name: str, token: str) -> None:
            if repo := self.repo(name, token):
                kinds = {"branches": ("heads", repo.refs), "tags": ("tags", repo.tags), "converts": ("converts", {})}
                said = {
                    kind: [
                        {"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": commit}
                        for ref, commit in refs.items()
                    ]
                    for kind, (where, refs) in kinds.items()
                }
                self.reply(200, json.dumps(said).encode())

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
            commit = (repo.refs | repo.tags).get(revision, revision)
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
            own = name.removeprefix("spaces/")
            about = {"_id": "0", "id": own, "modelId": own, "sha": commit, "gated": gated, "private": repo.private}
            card = _front_matter(repo.commits[commit].get("README.md"))
            self.reply(200, json.dumps({**about, "siblings": siblings, "tags": [], **card}).encode())

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
            name, commit, file = re.fullmatch(rf"/storage/{NAME}/([0-9a-f]{{40}})/(.+)", path).groups()  # type: ignore[union-attr]
            self.content(hub.repos[name].commits[commit][file], {})

        def content(self, data: Data, headers: dict[str, str]) -> None:
            size, status = size_of(data), 200
            begin, end = 0, size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.request_log.range)
            if asked and not (self.fault and self.fault.ignore_range):
                begin, end, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
                if begin >= size:
                    return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
                headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
            part = data[begin:end] if isinstance(data, bytes) else data.part(begin, end)
            if self.fault and self.fault.swap:
                part = bytes(255 - byte for byte in part)
            self.reply(status, part, headers)

        def refuse(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Code": code} if code else {}
            self.reply(status, json.dumps({"error": message}).encode(), {**headers, "X-Error-Message": message})

        def reply(self, status: int, body: bytes | memoryview, headers: dict[str, str] | None = None) -> None:
            self.request_log.status = status
            if self.fault and self.fault.unanswered:
                return self.break_off()
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = self.fault.cut if self.fault and status in (200, 206) and self.command == "GET" else None
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


def _pieces(body: bytes | memoryview) -> Iterator[bytes | memoryview]:
    for start in range(0, len(body), 1 << 16):
        yield body[start : start + (1 << 16)]
