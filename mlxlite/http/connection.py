"""One connection, one request at a time: from its bytes to the application and back.

Decides how long a peer may take, how far it may lag, and what happens when it disconnects; the
content of an answer is the application's. It must never wait, and never hold more than its bounds:
a slow reader is cut at `MAX_UNSENT_BYTES` or after `WRITE_TIMEOUT_S` without progress, and slows no
other connection. A peer's EOF is a disconnect, as in nginx and uvicorn.

Every `Exchange` gets one answer: `respond`, a stream, or `fail`. After a disconnect its answer is
dropped and the application is notified at once, whatever the request was doing (tested).

Reading order: `Client` (one connection), `Exchange` (one request and its answer).
"""

import asyncio
import logging
import secrets
from collections.abc import Callable
from email.utils import formatdate
from time import perf_counter
from typing import Any, Protocol

from mlxlite.errors import trace_of
from mlxlite.http.errors import APIError, Cause, ErrorBody, error_body, our_fault
from mlxlite.http.parser import Body, Connection, Head, Limits, Malformed
from mlxlite.http.sse import sse_comment

log = logging.getLogger("mlxlite.connection")
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its head
BODY_TIMEOUT_S = 30.0  # between two pieces of a body
BODY_GRACE_S = 120.0  # then it has to have come at
MAX_BODIES = 8  # of the largest size are held at a time, but for what came with their heads
MIN_BODY_RATE = 500  # bytes a second, or it holds its place for ever (Apache's mod_reqtimeout)
KEEP_ALIVE_S = 75.0  # between two requests (nginx's default)
WRITE_TIMEOUT_S = 30.0  # a reader that takes nothing for so long is cut
LINGER_S = 2.0  # after an answer that came before the body: let the peer read it
HEARTBEAT_S = 15.0  # of silence in a stream
MAX_UNSENT_BYTES = 4 << 20  # a slow reader's backlog
MAX_PIPELINED_BYTES = 64 << 10  # beyond it reading stops until the present answer is out
MAX_AT_ONCE = 16  # pipelined requests that are answered before everybody else has a turn
_NEVER = float("inf")
Fields = tuple[tuple[str, str], ...]
JSON: Fields = (("content-type", "application/json"),)
EVENTS: Fields = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),  # nginx would hold frames back
)


def _nothing() -> None:
    pass


def _new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class Application(Protocol):
    """What answers requests. `on_head` and `on_body` may raise APIError."""

    def on_head(self, exchange: "Exchange") -> None:
        """A request's head has arrived: refuse it, or let its body follow."""
        ...

    def on_body(self, exchange: "Exchange", body: bytes) -> None:
        """The body of a request that was let in is complete."""
        ...

    def on_disconnect(self, exchange: "Exchange") -> None:
        """The client disconnected before its answer was complete."""
        ...


class Observer(Protocol):
    """Counts connections and answers; `metrics.Metrics` is one."""

    def connection_opened(self) -> None: ...
    def connection_closed(self) -> None: ...
    def http(self, route: str, method: str, status: int) -> None: ...


class Connections(Protocol):
    """All connections of a listener, as one of them sees it."""

    app: Application
    observer: Observer
    limits: Limits
    num_held_bytes: int  # of bodies that are not read yet

    def joined(self, client: "Client") -> APIError | None:
        """Count a connection in; an error is all that it gets."""
        ...

    def left(self, client: "Client") -> None: ...

    def make_room(self) -> None:
        """Bodies are more than `MAX_BODIES` together: reject one."""
        ...


class Client(asyncio.Protocol):
    """One connection: feeds bytes to http1 and its events to the server, one request at a time."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.http = Connection(connections.limits)
        self._exchange: Exchange | None = None
        self._is_pumping = False
        self._is_lingering = False
        self._is_leaving = False
        self._has_begun = False  # something of the next request has come
        self._num_written = 0  # bytes, and how many of them the peer has taken
        self._num_taken = 0
        self._deadline = perf_counter() + HEADER_TIMEOUT_S  # for the peer to send
        self._body_since = self._deadline  # of the present request: when its head was there
        self._num_body_bytes = 0
        self._write_deadline = _NEVER  # for the peer to take what is sent

    def __repr__(self) -> str:
        return f"<Client {self.http!r} {self._exchange!r}>"

    @property
    def num_waiting_bytes(self) -> int:
        """Of a body that has not come to its end."""
        waits = self._exchange is not None and not self._exchange.has_body
        return self._num_body_bytes if waits else 0

    @property
    def is_busy(self) -> bool:
        """A request is being answered."""
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
                self._body_came(self._exchange, len(data))
        elif not self._has_begun:  # at the first byte only: empty lines buy no time
            self._has_begun = True
            self._deadline = perf_counter() + HEADER_TIMEOUT_S
        self.http.receive_data(data)
        self._pump()
        if self.connections.num_held_bytes > MAX_BODIES * self.connections.limits.max_body_bytes:
            self.connections.make_room()

    def _body_came(self, exchange: "Exchange", num_bytes: int) -> None:
        """A piece buys time, but no more than a body takes that is not made to drip."""
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
        """Hand on every event there is; ends when bytes are missing or an answer is under way.

        One read may hold thousands of short requests: after a few of them the others' turn comes.
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
                    self._malformed(APIError(Cause.MALFORMED, message, status=status))
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
        """A body that breaks off in nonsense is a request's still: its dialect, its id."""
        if self._exchange is not None:
            self._exchange.fail(error)
        else:
            self._refuse(error)

    def _refuse(self, error: APIError) -> None:
        """Answer what is no request, and close."""
        own = (("date", formatdate(usegmt=True)), ("x-request-id", _new_request_id()))
        fields = (*own, *JSON, *error.headers)
        self.write(self.http.respond(error.status, fields, error.body()))
        self._linger()

    def _guard(self, exchange: "Exchange", call: Callable[..., None], *args: bytes) -> None:
        try:
            call(exchange, *args)
        except APIError as error:
            exchange.fail(error)
        except Exception as error:  # our own mistake: said, and not the connection dropped
            log.error("%r failed: %s", exchange, trace_of(error))
            exchange.abandon(our_fault())

    def write(self, data: bytes) -> None:
        """Send bytes; a peer whose backlog has grown past the bound is cut."""
        if not data or self._transport.is_closing():
            return
        self._num_written += len(data)
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._transport.abort()

    def finished(self) -> None:
        """The answer is complete: read the next request, or close."""
        is_read = self._exchange is not None and self._exchange.has_body
        if self._exchange is not None:
            self._exchange.release()
        self._exchange = None
        self._has_begun = self.http.num_buffered > 0
        if self._is_leaving or not self.http.start_next_cycle():
            self._transport.close() if is_read else self._linger()
        else:
            self._deadline = perf_counter() + KEEP_ALIVE_S
            if not self._is_pumping:
                self._pump()

    def _linger(self) -> None:
        """Close, but not before the peer has had time to read: unread input would reset it away."""
        self._is_lingering = True
        self._deadline = perf_counter() + LINGER_S
        self.http = Connection(
            self.connections.limits
        )  # what has come of a body is not kept so long
        self._transport.resume_reading()
        if self._transport.can_write_eof():
            self._transport.write_eof()

    def leave(self) -> None:
        """The server goes: close now, or as soon as the present answer is complete."""
        self._is_leaving = True
        if not self.is_busy:
            self._transport.close()

    def refuse(self, error: APIError) -> None:
        """Answer a request that has had no answer yet with an error."""
        if self._exchange is not None:
            self._exchange.fail(error)

    def abort(self) -> None:
        self._transport.abort()

    def cut(self, exchange: "Exchange") -> None:
        """Hang up in the middle of an answer; void after its end."""
        if self._exchange is exchange:
            self._transport.abort()

    def tick(self, now: float) -> None:
        """Look at the deadline; keep a silent stream alive."""
        if self._exchange is not None:
            self._exchange.beat(now)
        num_taken = self._num_written - self._transport.get_write_buffer_size()
        if num_taken > self._num_taken and self._write_deadline < _NEVER:
            self._write_deadline = now + WRITE_TIMEOUT_S
        self._num_taken = num_taken
        if now > self._write_deadline:
            self._transport.abort()
        elif now > self._deadline:
            if self._exchange is not None and not self._exchange.has_body:
                message = "the body did not come in time"
                self._exchange.fail(APIError(Cause.SLOW_BODY, message))
            else:
                self._transport.abort()


class Exchange:
    """One request and its answer, which is one `respond`, or a stream, or one `fail`."""

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self.head = head
        given = head.headers.get("x-request-id")
        is_usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        self.request_id = given if is_usable else _new_request_id()
        self.label = "other"  # the route, for the metrics
        self.route: Any = None  # the application's: from `on_head` to `on_body`
        self.key = b""  # the API key that let it in
        self.error_body: ErrorBody = error_body
        self.extra_headers: list[tuple[str, str]] = []
        self.has_body = False  # the request has been read to its end
        self.is_kept = False  # whoever reads the body says when it is read
        self.num_held = 0  # bytes of it
        self.is_lost = False  # the client went away
        self.is_answered = False  # the answer has begun
        self.is_ended = False  # nothing more will be said
        self.on_end: Callable[[], object] = _nothing
        self._written_at: float | None = None  # of a stream: when it last said anything

    def __repr__(self) -> str:
        return f"<Exchange {self.head.method} {self.head.path!r} {self.request_id}>"

    def _headers(self, status: int, extra: Fields) -> Fields:
        own: Fields = (("date", formatdate(usegmt=True)), ("x-request-id", self.request_id))
        if self.error_body is not error_body:
            own += (("request-id", self.request_id),)  # as Anthropic calls it
        self._client.connections.observer.http(self.label, self.head.method, status)
        return (*own, *self.extra_headers, *extra)

    def respond(self, status: int, body: bytes, headers: Fields = JSON) -> None:
        """The whole answer at once; void after another one."""
        if not self.is_lost and not self.is_answered:
            self.is_answered = True
            fields = self._headers(status, headers)
            self._client.write(self._client.http.respond(status, fields, body))
            self._client.finished()

    def fail(self, error: APIError) -> None:
        """The answer is an error; void after another answer."""
        if error.status >= 500 and not self.is_answered:
            log.warning("%r: %d %s", self, error.status, error.message)
        body = self.error_body(error, self.request_id)
        self.respond(error.status, body, (*JSON, *error.headers))

    def hold(self, num_bytes: int) -> None:
        """More of the body is in memory."""
        self.num_held += num_bytes
        self._client.connections.num_held_bytes += num_bytes

    def release(self, *, is_read: bool = False) -> None:
        """The body is in memory no more; void while somebody still reads it."""
        if is_read or not self.is_kept:
            self._client.connections.num_held_bytes -= self.num_held
            self.num_held = 0

    def abandon(self, error: APIError) -> None:
        """Our own mistake. A stream that has begun is cut: nobody waits, or takes it for whole."""
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
        """Nothing more will be said here: the server may forget it, and stop what still runs."""
        self.is_ended = True
        self.on_end()

    def beat(self, now: float) -> None:
        """A comment in a stream that has long been silent: proxies cut what looks dead."""
        if self._written_at is not None and now - self._written_at > HEARTBEAT_S:
            self.write(sse_comment())
