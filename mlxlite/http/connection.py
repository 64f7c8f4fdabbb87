"""One connection, one request at a time: from its bytes to the application and back.

Decides the timeouts of a peer, the backlog it may have, and what happens when it disconnects; the
content of a response is the application's. It must never block, and never hold more than its
bounds: a slow reader is disconnected at `MAX_UNSENT_BYTES`, or after `WRITE_TIMEOUT_S` without
progress, and delays no other connection. EOF is a disconnect, as in nginx and uvicorn.

Every `Exchange` gets one response: `respond`, a stream, or `fail`. After a disconnect the response
is dropped and the application is notified at once, in any state of the request (tested).

Reading order: `Client` (one connection), `Exchange` (one request and its response).
"""

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from email.utils import formatdate
from time import perf_counter
from typing import Any, Protocol

from mlxlite.errors import trace_of
from mlxlite.http.errors import APIError, ErrorBody, ErrorKind, error_body, internal_error
from mlxlite.http.parser import Body, Connection, Head, Limits, Malformed
from mlxlite.http.sse import sse_comment

log = logging.getLogger("mlxlite.connection")
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its head
BODY_TIMEOUT_S = 30.0  # between two reads of a body
BODY_GRACE_S = 120.0  # for a whole body, plus its bytes at `MIN_BODY_RATE`
MIN_BODY_RATE = 500  # bytes a second (as Apache's mod_reqtimeout): no body may drip for ever
MAX_BODIES = 8  # of the largest size in memory at a time, besides bytes received with heads
KEEP_ALIVE_S = 75.0  # between two requests (nginx's default)
WRITE_TIMEOUT_S = 30.0  # without progress, until the peer is disconnected
LINGER_S = 2.0  # after a response sent before the body: time for the peer to read it
HEARTBEAT_S = 15.0  # of silence in a stream
MAX_UNSENT_BYTES = 4 << 20  # a slow reader's backlog
MAX_PIPELINED_BYTES = 64 << 10  # beyond it, reading pauses until the current response is sent
MAX_AT_ONCE = 16  # pipelined requests handled before other connections are served
_NEVER = float("inf")
Fields = tuple[tuple[str, str], ...]
JSON: Fields = (("content-type", "application/json"),)
EVENTS: Fields = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),  # nginx would buffer frames
)


def _nothing() -> None:
    pass


def _new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class Application(Protocol):
    """Handles requests. `on_head` and `on_body` may raise APIError."""

    def on_head(self, exchange: "Exchange") -> None:
        """A request's head is complete: refuse it, or read its body."""
        ...

    def on_body(self, exchange: "Exchange", body: bytes) -> None:
        """The body of an accepted request is complete."""
        ...

    def on_disconnect(self, exchange: "Exchange") -> None:
        """The client disconnected before its response was complete."""
        ...


class Observer(Protocol):
    """Counts connections and responses; `metrics.Metrics` is one."""

    def connection_opened(self) -> None: ...
    def connection_closed(self) -> None: ...
    def http(self, route: str, method: str, status: int) -> None: ...


class Connections(Protocol):
    """The shared state of a listener's connections."""

    app: Application
    observer: Observer
    limits: Limits
    num_held_bytes: int  # of bodies that are not parsed yet

    def joined(self, client: "Client") -> APIError | None:
        """Count a new connection; if an error is returned, it is sent and the connection closed."""
        ...

    def left(self, client: "Client") -> None: ...

    def make_room(self) -> None:
        """Reject one body: together they exceed `MAX_BODIES`."""
        ...


class Client(asyncio.Protocol):
    """One connection: bytes to the parser, its events to the application."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.http = Connection(connections.limits)
        self._exchange: Exchange | None = None
        self._is_pumping = False
        self._is_lingering = False
        self._is_closing = False  # after the current response
        self._has_begun = False  # bytes of the next request have arrived
        self._num_written = 0  # bytes, and how many of them were sent
        self._num_sent = 0
        self._deadline = perf_counter() + HEADER_TIMEOUT_S  # for the peer to send
        self._body_since = self._deadline  # the end of the current request's head
        self._num_body_bytes = 0
        self._write_deadline = _NEVER  # for the peer to read

    def __repr__(self) -> str:
        return f"<Client {self.http!r} {self._exchange!r}>"

    @property
    def num_waiting_bytes(self) -> int:
        """Received bytes of a body that is not complete."""
        is_waiting = self._exchange is not None and not self._exchange.has_body
        return self._num_body_bytes if is_waiting else 0

    @property
    def is_busy(self) -> bool:
        """Whether a request has no complete response yet."""
        return self._exchange is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        if (error := self.connections.joined(self)) is not None:
            self._refuse(error)

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            return
        if self._exchange is not None:
            if not self._exchange.has_body:
                self._extend_body_deadline(self._exchange, len(data))
        elif not self._has_begun:  # only at the first byte: empty lines do not extend it
            self._has_begun = True
            self._deadline = perf_counter() + HEADER_TIMEOUT_S
        self.http.receive_data(data)
        self._pump()
        if self.connections.num_held_bytes > MAX_BODIES * self.connections.limits.max_body_bytes:
            self.connections.make_room()

    def _extend_body_deadline(self, exchange: "Exchange", num_bytes: int) -> None:
        """Each read extends the deadline, up to what the minimum rate allows."""
        self._num_body_bytes += num_bytes
        exchange.hold(num_bytes)
        latest = self._body_since + BODY_GRACE_S + self._num_body_bytes / MIN_BODY_RATE
        self._deadline = min(perf_counter() + BODY_TIMEOUT_S, latest)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.left(self)
        if self._exchange is not None:
            self._exchange.is_lost = True
            self._exchange.release()
            self.connections.app.on_disconnect(self._exchange)

    def pause_writing(self) -> None:
        self._write_deadline = perf_counter() + WRITE_TIMEOUT_S

    def resume_writing(self) -> None:
        self._write_deadline = _NEVER

    def _pump(self) -> None:
        """Dispatch every parsed event, until bytes are missing or a response is in progress.

        One read may contain thousands of short requests: after `MAX_AT_ONCE` the loop yields.
        """
        self._is_pumping = True
        num_left = MAX_AT_ONCE
        while num_left and not self._is_lingering and not self._transport.is_closing():
            match self.http.next_event():
                case Head() as head:
                    self._body_since, self._num_body_bytes = perf_counter(), 0
                    self._deadline = self._body_since + BODY_TIMEOUT_S
                    self._exchange = Exchange(self, head)
                    self._guard(self._exchange, self.connections.app.on_head)
                    if not self._is_lingering:
                        self.write(self.http.continue_100())
                case Body(data):
                    assert self._exchange is not None
                    num_left -= 1
                    self._deadline = _NEVER
                    self._exchange.has_body = True
                    self._guard(self._exchange, self.connections.app.on_body, data)
                case Malformed(status, message):
                    self._malformed(APIError(ErrorKind.MALFORMED, message, status=status))
                case _:
                    break
        self._is_pumping = False
        if not num_left:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._pump)
        elif self.http.num_buffered > MAX_PIPELINED_BYTES and self.is_busy:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _malformed(self, error: APIError) -> None:
        """Respond to a malformed body in the dialect, and with the id, of its request."""
        if self._exchange is not None:
            self._exchange.fail(error)
        else:
            self._refuse(error)

    def _refuse(self, error: APIError) -> None:
        """Respond to bytes that are no request, and close."""
        own = (("date", formatdate(usegmt=True)), ("x-request-id", _new_request_id()))
        fields = (*own, *JSON, *error.headers)
        self.write(self.http.respond(error.status, fields, error.body()))
        self._linger()

    def _guard(self, exchange: "Exchange", call: Callable[..., None], *args: bytes) -> None:
        try:
            call(exchange, *args)
        except APIError as error:
            exchange.fail(error)
        except Exception as error:  # our own bug gets a response too
            log.error("%r failed: %s", exchange, trace_of(error))
            exchange.abandon(internal_error())

    def write(self, data: bytes) -> None:
        """Send bytes; disconnect a peer whose backlog exceeds `MAX_UNSENT_BYTES`."""
        if not data or self._transport.is_closing():
            return
        self._num_written += len(data)
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._transport.abort()

    def finished(self) -> None:
        """The response is complete: read the next request, or close."""
        is_read = self._exchange is not None and self._exchange.has_body
        if self._exchange is not None:
            self._exchange.release()
        self._exchange = None
        self._has_begun = self.http.num_buffered > 0
        if self._is_closing or not self.http.start_next_cycle():
            self._transport.close() if is_read else self._linger()
        else:
            self._deadline = perf_counter() + KEEP_ALIVE_S
            if not self._is_pumping:
                self._pump()

    def _linger(self) -> None:
        """Close after `LINGER_S`: closing with unread input would reset the peer's read."""
        self._is_lingering = True
        self._deadline = perf_counter() + LINGER_S
        self.http = Connection(self.connections.limits)  # frees a partial body
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            with contextlib.suppress(OSError):  # the peer is gone: `connection_lost` follows
                self._transport.write_eof()

    def close_when_idle(self) -> None:
        """Close now, or as soon as the current response is complete."""
        self._is_closing = True
        if not self.is_busy:
            self._transport.close()

    def refuse(self, error: APIError) -> None:
        """Respond with an error to a request without a response."""
        if self._exchange is not None:
            self._exchange.fail(error)

    def abort(self) -> None:
        self._transport.abort()

    def cut(self, exchange: "Exchange") -> None:
        """Disconnect during a response; no effect after its end."""
        if self._exchange is exchange:
            self._transport.abort()

    def tick(self, now: float) -> None:
        """Enforce the deadlines; keep a silent stream alive."""
        if self._exchange is not None:
            self._exchange.beat(now)
        num_sent = self._num_written - self._transport.get_write_buffer_size()
        if num_sent > self._num_sent and self._write_deadline < _NEVER:
            self._write_deadline = now + WRITE_TIMEOUT_S
        self._num_sent = num_sent
        if now > self._write_deadline:
            self._transport.abort()
        elif now > self._deadline:
            if self._exchange is not None and not self._exchange.has_body:
                message = "the body did not come in time"
                self._exchange.fail(APIError(ErrorKind.SLOW_BODY, message))
            else:
                self._transport.abort()


class Exchange:
    """One request and its response, which is one `respond`, or a stream, or one `fail`."""

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self.head = head
        given = head.headers.get("x-request-id")
        is_usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        self.request_id = given if is_usable else _new_request_id()
        self.label = "other"  # of its route, for the metrics
        self.route: Any = None  # the application's: from `on_head` to `on_body`
        self.key = b""  # the API key that authorized it
        self.error_body: ErrorBody = error_body
        self.extra_headers: list[tuple[str, str]] = []
        self.has_body = False  # the request is complete
        self.is_kept = False  # a thread reads the body: `release(is_read=True)` ends that
        self.num_held = 0  # bytes of the body in memory
        self.is_lost = False  # the client has disconnected
        self.is_answered = False  # the response has started
        self.is_ended = False  # the application is done with it
        self.on_end: Callable[[], object] = _nothing
        self._written_at: float | None = None  # of a stream: its last frame

    def __repr__(self) -> str:
        return f"<Exchange {self.head.method} {self.head.path!r} {self.request_id}>"

    def _headers(self, status: int, extra: Fields) -> Fields:
        own: Fields = (("date", formatdate(usegmt=True)), ("x-request-id", self.request_id))
        if self.error_body is not error_body:
            own += (("request-id", self.request_id),)  # Anthropic's name for it
        self._client.connections.observer.http(self.label, self.head.method, status)
        return (*own, *self.extra_headers, *extra)

    def respond(self, status: int, body: bytes, headers: Fields = JSON) -> None:
        """Send a complete response; no effect after another one."""
        if not self.is_lost and not self.is_answered:
            self.is_answered = True
            fields = self._headers(status, headers)
            self._client.write(self._client.http.respond(status, fields, body))
            self._client.finished()

    def fail(self, error: APIError) -> None:
        """Respond with an error; no effect after another response."""
        if error.status >= 500 and not self.is_answered:
            log.warning("%r: %d %s", self, error.status, error.message)
        body = self.error_body(error, self.request_id)
        self.respond(error.status, body, (*JSON, *error.headers))

    def hold(self, num_bytes: int) -> None:
        """Count received bytes of the body as memory."""
        self.num_held += num_bytes
        self._client.connections.num_held_bytes += num_bytes

    def release(self, *, is_read: bool = False) -> None:
        """Count the body as freed; no effect while a thread still reads it."""
        if is_read or not self.is_kept:
            self._client.connections.num_held_bytes -= self.num_held
            self.num_held = 0

    def abandon(self, error: APIError) -> None:
        """Respond to a bug of ours; a started stream is aborted, so that it looks incomplete."""
        if self.is_answered:
            self._client.cut(self)
        else:
            self.fail(error)

    def start_stream(self) -> None:
        if not self.is_lost:
            self.is_answered = True
            self._written_at = perf_counter()
            self._client.write(self._client.http.start_stream(200, self._headers(200, EVENTS)))

    def write(self, frame: bytes) -> None:
        """One frame of the stream, in one write."""
        if not self.is_lost:
            self._written_at = perf_counter()
            self._client.write(self._client.http.stream_data(frame))

    def end_stream(self) -> None:
        if not self.is_lost:
            self._client.write(self._client.http.end_stream())
            self._client.finished()

    def end(self) -> None:
        """The application is done: release the request and stop its work."""
        self.is_ended = True
        on_end, self.on_end = self.on_end, _nothing  # it refers to this exchange: no cycle stays
        on_end()

    def beat(self, now: float) -> None:
        """Send a comment in a silent stream: proxies close idle connections."""
        if self._written_at is not None and now - self._written_at > HEARTBEAT_S:
            self.write(sse_comment())
