"""A Hugging Face hub on 127.0.0.1: as much of it as `snapshot_download` asks for.

It serves files from memory, in plain HTTP and with ranges, notes every request, and can refuse, or
break off in the middle of a file. Files are cached by the real huggingface_hub, which is the point.
"""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass(frozen=True)
class Refusal:
    """An answer instead of a repository. `code` is the hub's own `X-Error-Code`."""

    status: int
    code: str | None = None


GATED = Refusal(403, "GatedRepo")
NOT_FOUND = Refusal(404, "RepoNotFound")
BAD_TOKEN = Refusal(401, None)
BUSY = Refusal(503)


@dataclass(frozen=True)
class Call:
    """One request; `path` is without the query."""

    method: str
    path: str
    range: str | None
    authorization: str | None

    @property
    def file(self) -> str | None:
        """The name of the file that this fetches the body of."""
        _, found, name = self.path.partition(f"/resolve/{COMMIT}/")
        return name if found and self.method == "GET" else None


@dataclass
class Hub:
    """The repositories: files by name, or a refusal. `cuts` are the bytes after which the next
    answer with a file's body breaks off, one cut an answer."""

    repos: dict[str, Mapping[str, bytes] | Refusal] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def __enter__(self) -> Self:
        hub: Hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def fetched(self) -> list[str]:
        """The names of the files whose bodies were asked for, each one once, sorted."""
        return sorted({call.file for call in self.calls if call.file is not None})


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        headers = self.headers
        call = Call(self.command, path, headers.get("Range"), headers.get("Authorization"))
        self.state.calls.append(call)
        owner, name, *rest = path.removeprefix("/api/models").strip("/").split("/")
        repo = self.state.repos.get(f"{owner}/{name}", NOT_FOUND)
        match repo, rest:
            case Refusal(), _:
                extra = {"X-Error-Code": repo.code} if repo.code else {}
                if repo is BAD_TOKEN:
                    extra["X-Error-Message"] = "Invalid credentials in Authorization header"
                self._send(repo.status, b"no", extra)
            case _, ["revision", _]:
                info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []}
                self._send(200, json.dumps(info).encode())
            case _, ["tree", _]:
                entries = [
                    {"type": "file", "path": file, "size": len(body), "oid": _etag(body)}
                    for file, body in repo.items()
                ]
                self._send(200, json.dumps(entries).encode())
            case _, ["resolve", _, *parts] if "/".join(parts) in repo:
                self._send_file("/".join(parts), repo["/".join(parts)], call.range)
            case _:
                self._send(404, b"no", {"X-Error-Code": "EntryNotFound"})

    def _send_file(self, name: str, body: bytes, range: str | None) -> None:
        start = int(range.removeprefix("bytes=").rstrip("-")) if range else 0
        headers = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if range:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        cuts = self.state.cuts.get(name)
        cut = cuts.pop(0) if cuts and self.command == "GET" else None
        self._send(206 if range else 200, body[start:], headers, cut)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = True


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()
