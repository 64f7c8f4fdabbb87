"""A server in a process of its own, and HTTP to it with every byte of a request in sight."""

import http.client
import io
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
ROOT = Path(__file__).parents[2]
_LISTENING = re.compile(r"\[mlx\] server is listening on 127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Raw:
    """An answer as it came."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class _Reader(io.BufferedReader):
    """Outlives the answer that is read from it, for the next one on the same connection."""

    def close(self) -> None:
        """Closed with its socket."""


class Link:
    """One connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self._reader = _Reader(socket.SocketIO(self._socket, "r"))

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *exc: object) -> None:
        """Hang up, and wait for the server to do so: it counts its connections."""
        with self._socket, suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(1 << 16):
                pass

    def makefile(self, _mode: str) -> io.BufferedReader:
        """What `http.client` reads an answer from."""
        return self._reader

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def begin(self, method: str = "POST") -> http.client.HTTPResponse:
        """The next answer's head; its body is still to be read."""
        answer = http.client.HTTPResponse(self, method=method)  # type: ignore[arg-type]
        answer.begin()
        return answer

    def answer(self, method: str = "POST") -> Raw:
        answer = self.begin(method)
        headers = tuple((name.lower(), value) for name, value in answer.getheaders())
        return Raw(answer.status, headers, answer.read())

    def line(self) -> bytes:
        """One line, of what is no whole answer."""
        return self._reader.readline()


def request_bytes(
    method: str, path: str, body: Any = None, headers: Sequence[tuple[str, str]] = ()
) -> bytes:
    """A request of HTTP/1.1; a body that is not bytes is sent as JSON. A header "" is left out."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    fields = {"host": "localhost"}
    if body is not None:
        fields |= {"content-type": "application/json", "content-length": str(len(data))}
    fields |= dict(headers)
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if v)]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + data


@contextmanager
def running(*flags: str) -> Iterator[int]:
    """`python -m mlxlite` with these flags; the port of 127.0.0.1 on which it answers."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("MLXLITE_", "MLX_API"))}
    environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), environ.get("PYTHONPATH", "")])
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "mlxlite", "--port", "0", "--log-level", "error", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    lines: queue.Queue[str] = queue.Queue()
    complaints: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put)),
        threading.Thread(target=_read, args=(process.stderr, complaints.append)),
    ]
    for reader in readers:
        reader.start()
    try:
        while (found := _LISTENING.search(line := lines.get(timeout=TIMEOUT_S))) is None:
            assert line, f"the server has not started: {''.join(complaints)}"
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)
        for reader in readers:
            reader.join(TIMEOUT_S)
        process.stdout.close()
        process.stderr.close()


def _read(stream: Any, take: Any) -> None:
    for line in stream:
        take(line)
    take("")
