"""A connection whose peer is already gone: what the transport raises ends it, and nothing more."""

import asyncio
import errno
from typing import Any

import pytest

from mlxlite.http.connection import Application, Client, Connections, Observer
from mlxlite.http.errors import APIError, ErrorKind
from mlxlite.http.parser import Limits


class GoneTransport(asyncio.Transport):
    """A socket that the peer has reset: half-closing it raises, as `socket.shutdown` does."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error
        self.sent = b""

    def write(self, data: Any) -> None:
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        raise self.error

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass


class FullListener(Connections):
    """Refuses every connection, as a full or a stopping listener does."""

    app: Application
    observer: Observer
    limits = Limits()
    num_held_bytes = 0

    def joined(self, client: Client) -> APIError | None:
        return APIError(ErrorKind.UNAVAILABLE, "too many connections")

    def left(self, client: Client) -> None:
        pass

    def make_room(self) -> None:
        pass


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EPIPE, errno.ECONNRESET])
def test_refusing_a_client_that_has_disconnected_raises_nothing(number: int) -> None:
    transport = GoneTransport(OSError(number, "gone"))
    client = Client(FullListener())
    client.connection_made(transport)
    client.connection_lost(transport.error)
    assert transport.sent.startswith(b"HTTP/1.1 503 ")
