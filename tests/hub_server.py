"""A stand-in for the Hugging Face Hub on 127.0.0.1: the routes that huggingface_hub and datasets ask for, and its faults.

It serves FOLDER/OWNER/NAME/... as data sets (and OWNER/NAME@parquet as the branch refs/convert/parquet of one); point the
client at it with HF_ENDPOINT in a process of its own, for that is read at import. Requests for what is not
in Git are answered by a redirect to /storage/ of another origin, as the Hub does.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import hub_uploads

HOME = tempfile.TemporaryDirectory(prefix="hf_home")
"""What the clients of this process and its children keep."""
RESERVED = socket.socket()


def reserved_endpoint() -> str:
    """Return an address of 127.0.0.1 that nobody else can take, for the Hub of this process and all that it starts."""
    if RESERVED.getsockname()[1] == 0:
        RESERVED.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        RESERVED.bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{RESERVED.getsockname()[1]}"


COMMIT = hashlib.sha1(b"main").hexdigest()
CONVERTED = hashlib.sha1(b"refs/convert/parquet").hexdigest()
STORED = (".parquet", ".wav", ".flac")
"""What is not in Git, but beside it."""
ROUTES = {
    "resolve": re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
    "storage": re.compile(r"/storage/([^/]+/[^/]+)/(.+)"),
    "tree": re.compile(r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?"),
    "paths-info": re.compile(r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)"),
    "revision": re.compile(r"/api/datasets/([^/]+/[^/]+)/revision/([^/]+)"),
    "info": re.compile(r"/api/datasets/([^/]+/[^/]+)"),
} | hub_uploads.ROUTES


@dataclasses.dataclass
class Fault:
    """What happens to `times` requests of a route (a key of ROUTES) whose path contains `path`, after `skip` of them."""

    kind: str
    """status; stall (half, then nothing); trickle (half, then a byte at a time); cut (closes after half); slow (0.1 s);
    gone (the whole server)."""
    route: str = "storage"
    path: str = ".parquet"
    times: int = 1
    skip: int = 0
    status: int = 503
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 60.0


class HubServer(ThreadingHTTPServer):
    """Serves data sets until `close`; counts requests by route and bytes of files sent."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.token: str | None = None
        self.commit = COMMIT
        self.faults: list[Fault] = []
        self.requests: Counter[str] = Counter()
        self.log: list[str] = []
        self.bytes_sent = 0
        self.first_fault = 0.0
        self.ended = threading.Event()
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> tuple[socket.socket, tuple]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def close(self) -> None:
        """Stop listening, and hang up on everyone."""
        self.ended.set()
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    def reopen(self) -> None:
        """Listen on the same port again after `close`."""
        self.__init__(self.folder, self.server_port)

    def reset(self) -> None:
        """Forget faults, counts and the token."""
        with self.lock:
            self.token, self.commit = None, COMMIT
            self.faults.clear()
            self.requests.clear()
            self.log.clear()
            self.bytes_sent, self.first_fault = 0, 0.0

    def handle_error(self, request, client_address) -> None:
        """A client that closes a connection is what the faults are for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        quoted = urlsplit(
            self.path
        ).path  # a branch such as refs%2Fconvert%2Fparquet is one part of the path
        path = unquote(quoted)
        route, match = next(
            ((name, m) for name, pattern in ROUTES.items() if (m := pattern.fullmatch(quoted))),
            ("other", None),
        )
        parts = [unquote(part or "") for part in match.groups()] if match else []
        with self.server.lock:
            self.server.requests[route] += 1
            self.server.log.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
            fault = self.next_fault(route, path)
        self.fault = fault
        token = self.server.token
        if fault and fault.kind == "status":
            self.fault = None
            self.reply(fault.status, headers=fault.headers)
        elif fault and fault.kind == "gone":
            self.close_connection = True
            threading.Thread(target=self.server.close).start()
        elif fault and fault.kind == "slow":
            time.sleep(0.1)
            self.fault = None
            self.dispatch(route, parts)
        elif (
            token and route != "storage" and self.headers.get("Authorization") != f"Bearer {token}"
        ):
            self.reply(
                401,
                headers={"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        elif route == "storage" and "Authorization" in self.headers:
            self.reply(400)  # as S3 does: the token must not leave the Hub
        else:
            self.dispatch(route, parts)

    def next_fault(self, route: str, path: str) -> Fault | None:
        for fault in self.server.faults:
            if fault.route == route and fault.path in path and fault.times > 0:
                if fault.skip == 0:
                    fault.times -= 1
                    self.server.first_fault = self.server.first_fault or time.monotonic()
                    return fault
                fault.skip -= 1
        return None

    def dispatch(self, route: str, parts: list[str]) -> None:
        if not parts:
            return self.reply(404)
        self.commit = self.server.commit
        if route in hub_uploads.ROUTES:
            status, told = hub_uploads.take(
                self.server.endpoint, self.server.folder, route, parts, self.body
            )
            return self.json(told, status)
        revision = parts[1] if route not in ("info", "storage") else "main"
        converted = revision in ("refs/convert/parquet", CONVERTED)
        self.commit = CONVERTED if converted else self.commit
        folder = self.server.folder / (parts[0] + "@parquet" * converted)
        if not folder.is_dir():
            return self.reply(404, headers={"X-Error-Code": "RepoNotFound"})
        known = ("main", COMMIT, self.server.commit, "refs/convert/parquet", CONVERTED)
        if revision not in known:
            return self.reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        if route in ("info", "revision"):
            files = [{"rfilename": name} for name in self.names(folder)]
            return self.json(
                {
                    "id": parts[0],
                    "sha": self.commit,
                    "private": False,
                    "tags": [],
                    "siblings": files,
                }
            )
        if route == "tree":
            return self.tree(folder, parts[2].strip("/"))
        if route == "paths-info":
            form = parse_qs(self.body.decode())
            paths = form.get("paths") or json.loads(self.body).get("paths", [])
            return self.json([e for p in paths for e in self.entry(folder, folder / p.strip("/"))])
        path = folder / parts[-1]
        if not path.is_file():
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        if route == "resolve" and path.suffix in STORED and self.command == "GET":
            host = (
                f"http://localhost:{self.server.server_port}"  # another origin than the endpoint's
            )
            signed = f"{host}/storage/{folder.relative_to(self.server.folder)}/{parts[-1]}?Signature=signed-secret"
            return self.reply(302, headers={"Location": signed, **self.describe(path)})
        return self.file(path)

    def names(self, folder: Path) -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def entry(self, folder: Path, path: Path) -> list[dict]:
        name = str(path.relative_to(folder))
        oid = hashlib.sha1(name.encode()).hexdigest()
        if path.is_dir():
            return [{"type": "directory", "path": name, "oid": oid, "size": 0}]
        if path.is_file():
            return [{"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}]
        return []

    def tree(self, folder: Path, below: str) -> None:
        root = folder / below
        if not root.is_dir():
            return self.reply(404, headers={"X-Error-Code": "EntryNotFound"})
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in (
            "true",
            "1",
        )
        found = sorted(root.rglob("*") if recursive else root.iterdir())
        return self.json([e for path in found for e in self.entry(folder, path)])

    def describe(self, path: Path) -> dict[str, str]:
        etag = hashlib.sha1(f"{path}-{path.stat().st_size}".encode()).hexdigest()
        return {"ETag": f'"{etag}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}

    def file(self, path: Path) -> None:
        data, size = path.read_bytes(), path.stat().st_size
        status, headers = 200, self.describe(path)
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else max(0, size - int(match[2]))
            last = min(size - 1, int(match[2])) if match[1] and match[2] else size - 1
            if first > last:
                return self.reply(416)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.reply(status, data, headers)

    def json(self, value: object, status: int = 200) -> None:
        self.reply(
            status,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", "X-Repo-Commit": self.commit},
        )

    def reply(self, status: int, data: bytes = b"", headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = data[: len(data) // 2] if self.fault else data
        with self.server.lock:
            self.server.bytes_sent += len(sent)
        self.wfile.write(sent)
        if self.fault and self.fault.kind == "stall":
            self.server.ended.wait(self.fault.seconds)
        elif self.fault and self.fault.kind == "trickle":
            ends = time.monotonic() + self.fault.seconds
            for byte in data[len(sent) :]:
                self.wfile.write(bytes([byte]))
                if self.server.ended.wait(0.02) or time.monotonic() > ends:
                    break
        self.close_connection = self.fault is not None
