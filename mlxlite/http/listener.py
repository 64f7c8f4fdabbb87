"""Listening sockets and the connections that they accept: TCP, TLS or a Unix socket.

Decides how many connections may be open and how many bytes of incomplete bodies are in memory;
closes them at shutdown. It must never look at a path or a body.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxlite.http.connection import HEADER_TIMEOUT_S, Application, Client, Observer
from mlxlite.http.errors import APIError, ErrorKind, retry_later
from mlxlite.http.parser import Limits
from mlxlite.http.refusal_log import RefusalLog

if TYPE_CHECKING:
    from ssl import SSLContext

# The queue of pending connections, and the number accepted in one iteration of the loop. asyncio
# has one number for both, and without file descriptors logs as many errors in each of its retries.
_BACKLOG = 1024
_ACCEPT_AT_ONCE = 8


class TLSError(ValueError):
    """A certificate or key that cannot be used; the message is for the operator."""


@dataclass(frozen=True, slots=True)
class Address:
    """A host and port, a Unix socket, or a socket that already listens."""

    host: str = "127.0.0.1"
    port: int = 0
    uds: str | None = None
    uds_mode: int = 0o600
    sock: socket.socket | None = None


class Listener:
    """One listening socket and its connections. Belongs to the event loop."""

    def __init__(
        self, app: Application, observer: Observer, *, max_body_bytes: int, max_connections: int
    ) -> None:
        self.app = app
        self.observer = observer
        self.limits = Limits(max_body_bytes=max_body_bytes)
        self.num_held_bytes = 0  # of bodies that are not parsed yet
        self.num_unsent_bytes = 0  # that wait for their peers to read
        self.clients: set[Client] = set()
        self._max_connections = max_connections
        self._is_draining = False
        self.refusals = RefusalLog()
        self._has_left = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._uds: str | None = None

    async def start(self, address: Address, tls: "SSLContext | None" = None) -> None:
        """Listen. Raises OSError if the address is not available."""
        loop = asyncio.get_running_loop()
        handshake_s = None if tls is None else HEADER_TIMEOUT_S
        more: dict[str, Any] = {"backlog": _ACCEPT_AT_ONCE, "ssl": tls}
        more |= {"ssl_handshake_timeout": handshake_s}
        if address.uds is not None:
            more["sock"] = bind_unix(address.uds, address.uds_mode)
            self._uds = address.uds
            self._server = await loop.create_unix_server(lambda: Client(self), **more)
        elif address.sock is not None:
            more["sock"] = address.sock
            self._server = await loop.create_server(lambda: Client(self), **more)
        else:
            more |= {"host": address.host, "port": address.port}
            self._server = await loop.create_server(lambda: Client(self), **more)
        for listening in self._server.sockets:
            with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
                same.listen(_BACKLOG)

    @property
    def is_serving(self) -> bool:
        return self._server is not None and self._server.is_serving()

    @property
    def port(self) -> int:
        """The listening port: the system's choice for `port=0`."""
        assert self._server is not None, "start() comes first"
        return int(self._server.sockets[0].getsockname()[1])

    # --- connections ------------------------------------------------------------------------

    def joined(self, client: Client) -> APIError | None:
        """Count a new connection; an error if it cannot be served."""
        self.observer.connection_opened()
        self.clients.add(client)
        if self._is_draining:
            return retry_later(
                ErrorKind.UNAVAILABLE, "the server is shutting down", retry_after_s=5
            )
        if len(self.clients) > self._max_connections:
            return retry_later(ErrorKind.UNAVAILABLE, "too many connections", retry_after_s=1)
        return None

    def left(self, client: Client) -> None:
        self.clients.discard(client)
        self._has_left.set()
        self.observer.connection_closed()

    def make_room(self) -> None:
        """Respond 503 to the connection with the largest incomplete body."""
        largest = max(self.clients, key=lambda client: client.num_waiting_bytes)
        if largest.num_waiting_bytes:
            message = "too much is being sent at a time; try again later"
            largest.refuse(retry_later(ErrorKind.UNAVAILABLE, message, retry_after_s=5))

    def cut_slowest(self, max_bytes: int, now: float) -> None:
        """Disconnect readers, the slowest first and of equals the largest, down to `max_bytes`."""
        behind = [client for client in self.clients if client.num_unsent_bytes]
        behind.sort(key=lambda client: (client.pace.rate(now), -client.num_unsent_bytes))
        for client in behind:
            if self.num_unsent_bytes <= max_bytes:
                break
            client.cut_reader("memory")

    def tick(self, now: float) -> None:
        """Check every connection's deadlines; keep silent streams alive."""
        for client in list(self.clients):
            client.tick(now)

    # --- shutdown ---------------------------------------------------------------------------

    def drain(self) -> None:
        """Stop accepting; connections close after their current response."""
        self._is_draining = True
        if self._server is not None:
            self._server.close()
        for client in list(self.clients):
            client.close_when_idle()

    def refuse_all(self, error: APIError) -> None:
        """Respond with an error to every request without a response."""
        for client in list(self.clients):
            client.refuse(error)

    def abort_all(self) -> None:
        for client in list(self.clients):
            client.cut_reader("shutdown")

    async def until_empty(self, timeout_s: float) -> None:
        """Return when the last connection is closed, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.clients:
                    self._has_left.clear()
                    await self._has_left.wait()

    def unlink(self) -> None:
        """Remove the Unix socket's file."""
        if self._uds is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._uds)


def bind_unix(path: str, mode: int = 0o600) -> socket.socket:
    """A Unix socket with this mode. Raises OSError, also if another server listens there."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
    except FileNotFoundError:
        pass
    except ConnectionRefusedError:
        if not stat.S_ISSOCK(
            os.lstat(path).st_mode
        ):  # connecting to a file fails with the same error
            raise OSError(errno.EEXIST, "there is a file that is no socket", path) from None
        os.unlink(path)  # left by a process that was killed
    else:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE), path)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    return listener


def tls_context(certificate: str, key: str | None) -> "SSLContext":
    """TLS 1.2 and 1.3 with Python's own choice of ciphers. Raises TLSError."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Never prompt for a password: there may be no terminal.
        context.load_cert_chain(certificate, key, password=lambda: "")
    except OSError as error:  # ssl.SSLError too
        raise TLSError(error.strerror or str(error)) from None
    return context
