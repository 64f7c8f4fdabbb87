"""A connection whose peer is already gone: what the transport raises ends it, and nothing more."""

import asyncio
import errno
import logging
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import in_a_loop

from mlxlite.http.connection import Application, Client, Connections, Exchange, Observer
from mlxlite.http.errors import APIError, ErrorKind
from mlxlite.http.parser import Limits
from mlxlite.http.refusal_log import RefusalLog

REQUEST = b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n"
GONE = [
    OSError(errno.ENOTCONN, "gone"),
    OSError(errno.EPIPE, "gone"),
    ConnectionResetError(errno.ECONNRESET, "gone"),
    RuntimeError("Cannot call write() after write_eof()"),
    AttributeError("'NoneType' object has no attribute '_get_write_buffer_size'"),
    ValueError("Invalid file descriptor: -1"),
]
CALLS = (
    *("write", "write_eof", "close", "abort", "pause_reading", "resume_reading"),
    *("get_write_buffer_size", "set_write_buffer_limits"),
)


class GoneTransport(asyncio.Transport):
    """A socket that the peer has reset: each of `raising` raises `error`."""

    def __init__(self, error: Exception, *raising: str) -> None:
        super().__init__()
        self.error = error
        self.raising = raising
        self.sent = b""
        self.is_full = False
        self.has_ended = False

    def _call(self, name: str) -> None:
        if name in self.raising:
            raise self.error

    def write(self, data: Any) -> None:
        self._call("write")
        self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._call("write_eof")

    def is_closing(self) -> bool:
        return self.has_ended

    def close(self) -> None:
        self._call("close")
        self.has_ended = True

    def abort(self) -> None:
        self._call("abort")
        self.has_ended = True

    def get_write_buffer_size(self) -> int:
        self._call("get_write_buffer_size")
        return 1000 if self.is_full else 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._call("set_write_buffer_limits")

    def pause_reading(self) -> None:
        self._call("pause_reading")

    def resume_reading(self) -> None:
        self._call("resume_reading")


class Unmoved:
    """An observer that counts nothing."""

    def connection_opened(self) -> None: ...
    def connection_closed(self) -> None: ...
    def connection_cut(self, reason: str) -> None: ...
    def http(self, route: str, method: str, status: int) -> None: ...


class Streaming:
    """Keeps the exchanges that it starts; each of `raising` raises a bug of ours."""

    def __init__(self, *raising: str) -> None:
        self.raising = raising
        self.exchanges: list[Exchange] = []
        self.lost: list[Exchange] = []

    def on_head(self, exchange: Exchange) -> None:
        assert "on_head" not in self.raising, "a bug"

    def on_body(self, exchange: Exchange, body: bytes) -> None:
        assert "on_body" not in self.raising, "a bug"
        self.exchanges.append(exchange)

    def on_disconnect(self, exchange: Exchange) -> None:
        self.lost.append(exchange)
        assert "on_disconnect" not in self.raising, "a bug"


class FakeListener(Connections):
    """Its connections are counted by hand; `error` refuses them, as a full listener does."""

    limits = Limits()

    def __init__(self, app: Application | None = None, error: APIError | None = None) -> None:
        self.app = app or Streaming()
        self.observer: Observer = Unmoved()
        self.refusals = RefusalLog()
        self.num_held_bytes = 0
        self.num_unsent_bytes = 0
        self.error = error
        self.clients: set[Client] = set()

    def joined(self, client: Client) -> APIError | None:
        self.clients.add(client)
        return self.error

    def left(self, client: Client) -> None:
        self.clients.discard(client)

    def make_room(self) -> None:
        pass

    def cut_slowest(self, max_bytes: int, now: float) -> None:
        pass


FULL = APIError(ErrorKind.UNAVAILABLE, "too many connections")


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
def test_refusing_a_client_that_has_disconnected_raises_nothing(error: Exception) -> None:
    transport = GoneTransport(error, "write_eof")
    client = Client(FakeListener(error=FULL))
    client.connection_made(transport)
    client.connection_lost(error)
    assert transport.sent.startswith(b"HTTP/1.1 503 ")


# --- a transport that raises, at each moment of a connection ------------------------------------


async def answered(client: Client, app: Streaming) -> None:
    app.exchanges[-1].respond(200, b"{}")


async def streamed(client: Client, app: Streaming) -> None:
    app.exchanges[-1].start_stream()
    client.pause_writing()
    app.exchanges[-1].write(b"frame")
    client.resume_writing()
    await asyncio.sleep(0)
    app.exchanges[-1].end_stream()


async def large(client: Client, app: Streaming) -> None:
    app.exchanges[-1].respond(200, b"x" * (1 << 20))
    client.pause_writing()
    await asyncio.sleep(0)
    client.resume_writing()


async def pipelined(client: Client, app: Streaming) -> None:
    client.data_received(REQUEST * 5000)


async def drained(client: Client, app: Streaming) -> None:
    client.close_when_idle()
    app.exchanges[-1].respond(200, b"{}")


async def malformed(client: Client, app: Streaming) -> None:
    app.exchanges[-1].respond(200, b"{}")
    client.data_received(b"\0\r\n\r\n")


async def late(client: Client, app: Streaming) -> None:
    client.pause_writing()
    client.tick(float("inf"))


async def at_eof(client: Client, app: Streaming) -> None:
    app.exchanges[-1].respond(200, b"x" * (1 << 20))
    client.eof_received()


MOMENTS = (answered, streamed, large, pipelined, drained, malformed, late, at_eof)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)
@pytest.mark.parametrize("call", CALLS)
def test_whatever_a_transport_raises_is_an_ordinary_end(
    call: str, moment: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    @in_a_loop
    async def test() -> None:
        for error in GONE:
            app = Streaming()
            listener = FakeListener(app)
            client, transport = Client(listener), GoneTransport(error)
            client.connection_made(transport)
            client.data_received(REQUEST)
            transport.raising = (call,)
            await moment(client, app)
            for _ in range(5):
                await asyncio.sleep(0)
            client.tick(0.0)
            client.abort()
            client.connection_lost(error)
            client.tick(0.0)  # a sweep that had begun
            await asyncio.sleep(0)
            assert listener.num_unsent_bytes == listener.num_held_bytes == 0
            assert not listener.clients
            if app.exchanges[-1].is_lost:
                assert app.lost == [app.exchanges[-1]]

    test()
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR or r.exc_info]


# --- bugs of our own -----------------------------------------------------------------------------


@contextmanager
def one_error(caplog: pytest.LogCaptureFixture) -> Any:
    """The log has one error, which names the place and not the message."""
    yield
    (record,) = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert "AssertionError" in record.getMessage()
    assert "a bug" not in caplog.text


@pytest.mark.parametrize("place", ["on_head", "on_body", "on_disconnect"])
def test_a_bug_in_the_application_does_not_leave_a_callback(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        app = Streaming(place)
        listener = FakeListener(app)
        client, transport = Client(listener), GoneTransport(GONE[0])
        client.connection_made(transport)
        client.data_received(REQUEST)
        assert place == "on_disconnect" or transport.sent.startswith(b"HTTP/1.1 500 ")
        client.connection_lost(None)
        assert not listener.clients

    with one_error(caplog):
        test()


@pytest.mark.parametrize("callback", ["connection_made", "data_received", "_pump", "tick"])
def test_a_bug_in_a_callback_ends_its_own_connection(
    callback: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @in_a_loop
    async def test() -> None:
        listener = FakeListener(Streaming())
        client, transport = Client(listener), GoneTransport(GONE[0])

        def bug(*_: object) -> Any:
            raise AssertionError("a bug")

        if callback == "connection_made":
            monkeypatch.setattr(listener, "joined", bug)
        client.connection_made(transport)
        if callback != "connection_made":
            client.data_received(REQUEST)
            monkeypatch.setattr(client.http, "receive_data", bug)
            monkeypatch.setattr(client.http, "next_event", bug)
            monkeypatch.setattr(Exchange, "beat", bug)
            arguments = {"data_received": (b"x",), "tick": (0.0,)}.get(callback, ())
            getattr(client, callback)(*arguments)
        assert transport.has_ended

    with one_error(caplog):
        test()


# --- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [-3600.0, 3600.0, 1e8])
def test_a_step_of_the_wall_clock_changes_the_date_alone(
    step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    @in_a_loop
    async def test() -> None:
        app = Streaming()
        client, transport = Client(FakeListener(app)), GoneTransport(GONE[0])
        client.connection_made(transport)
        client.data_received(REQUEST[:9])
        before = time.time()
        monkeypatch.setattr(time, "time", lambda: before + step_s)
        client.tick(time.perf_counter())
        client.data_received(REQUEST[9:])
        client.tick(time.perf_counter())
        app.exchanges[-1].respond(200, b"{}")
        client.tick(time.perf_counter())
        assert not transport.has_ended
        assert transport.sent.startswith(b"HTTP/1.1 200 ")

    test()
