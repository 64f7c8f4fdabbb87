"""One connection, one request at a time: from its bytes to the application and back.

Decides the timeouts of a peer, the backlog it may have, and what happens when it disconnects; the
content of a response is the application's. It must never block, and never hold more than its
bounds. A reader is disconnected for being slow, never for the size of its answer: after
`WRITE_TIMEOUT_S` without progress, below `MIN_READ_RATE`, or `MAX_UNSENT_BYTES` of frames behind a
stream; the log has a line for each, and no other connection is delayed. The next request of a
connection waits until its peer has read the answer before. EOF is a disconnect, as in nginx and
uvicorn, but an answer that is complete is sent.

Every `Exchange` gets one response: `respond`, a stream, or `fail`. After a disconnect the response
is dropped and the application is notified at once, in any state of the request (tested). No
callback of a transport raises: what goes wrong in one ends its own connection.

Reading order: `Client` (one connection), `Pace` (of its peer), `Exchange` (one request and its
response).
"""

import asyncio
import contextlib
import functools
import logging
import secrets
import socket
from collections.abc import Callable
from email.utils import formatdate
from time import perf_counter
from typing import Any, Concatenate, ParamSpec, Protocol

from mlxlite.errors import trace_of
from mlxlite.http.errors import APIError, ErrorBody, ErrorKind, error_body, internal_error, truncate
from mlxlite.http.outbox import Outbox
from mlxlite.http.parser import Body, Connection, Head, Limits, Malformed
from mlxlite.http.refusal_log import RefusalLog
from mlxlite.http.sse import sse_comment

log = logging.getLogger("mlxlite.connection")
HEADER_TIMEOUT_S = 10.0  # from the first byte of a request to the end of its head
BODY_TIMEOUT_S = 30.0  # between two reads of a body
BODY_GRACE_S = 120.0  # for a whole body, plus its bytes at `MIN_BODY_RATE`
MIN_BODY_RATE = 500  # bytes a second (as Apache's mod_reqtimeout): no body may drip for ever
MAX_BODIES = 8  # of the largest size in memory at a time, besides bytes received with heads
KEEP_ALIVE_S = 75.0  # between two requests (nginx's default)
WRITE_TIMEOUT_S = 30.0  # without progress, until the peer is disconnected
WRITE_GRACE_S = 120.0  # for a backlog, plus its bytes at `MIN_READ_RATE`
MIN_READ_RATE = 500  # bytes a second, as `MIN_BODY_RATE`: no answer may be held for ever
LINGER_S = 2.0  # after a response sent before the body: time for the peer to read it
NO_ROUTE = "other"
HEARTBEAT_S = 15.0  # of silence in a stream
MAX_UNSENT_BYTES = 4 << 20  # of small frames behind a stream; a large one has only its time
MAX_ALL_UNSENT_BYTES = 1 << 30  # of all connections: beyond it the slowest one is disconnected
MAX_PIPELINED_BYTES = 64 << 10  # beyond it, reading pauses until the current response is sent
MAX_AT_ONCE = 16  # pipelined requests handled before other connections are served
# Seconds of silence, then between probes, and their number. macOS has another name for the first.
KEEP_ALIVE_PROBES = {"TCP_KEEPIDLE": 60, "TCP_KEEPALIVE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
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


P = ParamSpec("P")


def _contained(
    callback: Callable[Concatenate["Client", P], None],
) -> Callable[Concatenate["Client", P], None]:
    """A callback of the event loop: a bug of ours in it ends its own connection, with a trace."""

    @functools.wraps(callback)
    def contained(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            callback(client, *args, **kwargs)
        except Exception as error:
            log.error("%r failed: %s", client, trace_of(error))
            client.abort()

    return contained


def _probe(transport: asyncio.Transport) -> None:
    """Let the system notice a peer's host that has vanished without a word."""
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family == socket.AF_UNIX:
        return
    with contextlib.suppress(OSError):  # the peer has already gone
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE_PROBES.items():
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


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
    def connection_cut(self, reason: str) -> None: ...
    def http(self, route: str, method: str, status: int) -> None: ...


class Connections(Protocol):
    """The shared state of a listener's connections."""

    app: Application
    observer: Observer
    limits: Limits
    refusals: RefusalLog
    num_held_bytes: int  # of bodies that are not parsed yet
    num_unsent_bytes: int  # that wait for their peers to read

    def joined(self, client: "Client") -> APIError | None:
        """Count a new connection; if an error is returned, it is sent and the connection closed."""
        ...

    def left(self, client: "Client") -> None: ...

    def make_room(self) -> None:
        """Reject one body: together they exceed `MAX_BODIES`."""
        ...

    def cut_slowest(self, max_bytes: int, now: float) -> None:
        """Disconnect the slowest readers, until all hold no more than `max_bytes`."""
        ...


class Pace:
    """How a peer reads its backlog: since when, how quickly, and whether that is too slow."""

    def __init__(self, out: Outbox) -> None:
        self._out = out
        self._since = self._deadline = _NEVER
        self._num_before = self._num_sent = 0  # bytes: at the beginning, and at the last look

    def begin(self, now: float) -> None:
        """Bytes stay behind; no effect while others do."""
        if self._since == _NEVER:
            self._since, self._deadline = now, now + WRITE_TIMEOUT_S
            self._num_before = self._num_sent = self._out.num_sent

    def end(self) -> None:
        """The peer has read everything."""
        self._since = self._deadline = _NEVER

    def rate(self, now: float) -> float:
        """Bytes a second; infinite in the first second."""
        seconds = now - self._since
        return (self._out.num_sent - self._num_before) / seconds if seconds > 1.0 else _NEVER

    def reason_to_cut(self, now: float) -> str | None:
        """Progress extends the deadline, up to what the minimum rate allows."""
        if (num_sent := self._out.num_sent) > self._num_sent:
            self._num_sent, self._deadline = num_sent, now + WRITE_TIMEOUT_S
        if now > self._deadline:
            return "stalled"
        latest = self._since + WRITE_GRACE_S + (num_sent - self._num_before) / MIN_READ_RATE
        return "slow" if now > latest else None


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
        self._last_id = ""  # of the current or last request, for the log
        self._deadline = perf_counter() + HEADER_TIMEOUT_S  # for the peer to send
        self._body_since = self._deadline  # the end of the current request's head
        self._num_body_bytes = 0

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

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes of responses that the socket has not taken."""
        return self._out.num_unsent

    @_contained
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._out = Outbox(transport, self.connections, self._sent)
        self.pace = Pace(self._out)
        self._out.open()
        _probe(transport)
        if (error := self.connections.joined(self)) is not None:
            self._refuse(error)

    @_contained
    def data_received(self, data: bytes) -> None:
        if self._is_lingering or self._out.is_closing:
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

    def eof_received(self) -> bool:
        """Whether the connection stays open: until a complete response is sent."""
        is_sending = self._out.is_behind and not self.is_busy
        if is_sending:
            self._out.close()
        return is_sending and self._transport.can_write_eof()  # TLS cannot stay half-open

    @_contained
    def connection_lost(self, exc: Exception | None) -> None:
        self.connections.left(self)
        self._out.clear()
        if self._exchange is not None:
            self._exchange.is_lost = True
            self._exchange.release()
            self.connections.app.on_disconnect(self._exchange)

    @_contained
    def pause_writing(self) -> None:
        self._out.pause()
        self.pace.begin(perf_counter())

    @_contained
    def resume_writing(self) -> None:
        self._out.resume()

    @_contained
    def _sent(self) -> None:
        """The peer has read all that was written: its own time counts again."""
        self.pace.end()
        if self._is_lingering:
            self._deadline = perf_counter() + LINGER_S
        elif not self.is_busy:
            timeout_s = HEADER_TIMEOUT_S if self._has_begun else KEEP_ALIVE_S
            self._deadline = perf_counter() + timeout_s
            self._pump()

    @_contained
    def _pump(self) -> None:
        """Dispatch every parsed event, until bytes are missing or a response is in progress.

        One read may contain thousands of short requests: after `MAX_AT_ONCE` the loop yields.
        """
        self._is_pumping = True
        num_left = MAX_AT_ONCE
        while num_left and not self._is_lingering and not self._out.is_closing:
            if self._out.is_behind and not self.is_busy:
                break  # until `_sent`
            match self.http.next_event():
                case Head() as head:
                    self._body_since, self._num_body_bytes = perf_counter(), 0
                    self._deadline = self._body_since + BODY_TIMEOUT_S
                    self._exchange = Exchange(self, head)
                    self._last_id = self._exchange.request_id
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
        is_waiting = self.is_busy or self._out.is_behind
        is_ahead = is_waiting and self.http.num_buffered > MAX_PIPELINED_BYTES
        self._out.read_on(bool(num_left) and not is_ahead)
        if not num_left:
            asyncio.get_running_loop().call_soon(self._pump)

    def _malformed(self, error: APIError) -> None:
        """Respond to a malformed body in the dialect, and with the id, of its request."""
        if self._exchange is not None:
            self._exchange.fail(error)
        else:
            self._refuse(error)

    def _refuse(self, error: APIError) -> None:
        """Respond to bytes that are no request, and close."""
        self.connections.refusals.note("?", "?", f"{error.status} {error.code or error.type}")
        own = (("date", formatdate(usegmt=True)), ("x-request-id", _new_request_id()))
        fields = (*own, *JSON, *error.headers)
        for piece in self.http.respond(error.status, fields, error.body()):
            self.write(piece)
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
        """Send bytes; a peer that is too slow for them is disconnected."""
        self._out.write(data)
        if self._out.num_held:
            self._bound_backlog()

    def _bound_backlog(self) -> None:
        if self._out.num_backlog > MAX_UNSENT_BYTES:
            self.cut_reader("backlog")
        elif self.connections.num_unsent_bytes > MAX_ALL_UNSENT_BYTES:
            self.connections.cut_slowest(MAX_ALL_UNSENT_BYTES, perf_counter())

    def cut_reader(self, reason: str) -> None:
        """Disconnect a peer with unsent bytes; `reason` is the metrics' label."""
        if self._out.is_behind:
            num_unsent = self._out.num_unsent
            log.warning("cut (%s): %s, %d bytes unread", reason, self._last_id, num_unsent)
            self.connections.observer.connection_cut(reason)
        self.abort()

    def finished(self) -> None:
        """The response is complete: read the next request, or close."""
        is_read = self._exchange is not None and self._exchange.has_body
        if self._exchange is not None:
            self._exchange.release()
        self._exchange = None
        self._has_begun = self.http.num_buffered > 0
        if self._is_closing or not self.http.start_next_cycle():
            self._out.close() if is_read else self._linger()
        else:
            self._deadline = perf_counter() + KEEP_ALIVE_S
            if not self._is_pumping:
                self._pump()

    def _linger(self) -> None:
        """Close after `LINGER_S`: closing with unread input would reset the peer's read."""
        self._is_lingering = True
        self._deadline = perf_counter() + LINGER_S
        self.http = Connection(self.connections.limits)  # frees a partial body
        self._out.read_on(True)
        self._out.half_close()

    @_contained
    def close_when_idle(self) -> None:
        """Close now, or as soon as the current response is complete."""
        self._is_closing = True
        if not self.is_busy:
            self._out.close()

    @_contained
    def refuse(self, error: APIError) -> None:
        """Respond with an error to a request without a response."""
        if self._exchange is not None:
            self._exchange.fail(error)

    def abort(self) -> None:
        self._out.abort()

    def cut(self, exchange: "Exchange") -> None:
        """Disconnect during a response; no effect after its end."""
        if self._exchange is exchange:
            self.abort()

    @_contained
    def tick(self, now: float) -> None:
        """Enforce the deadlines; keep a silent stream alive."""
        if self._exchange is not None:
            self._exchange.beat(now)
        if self._out.is_behind:
            if (reason := self.pace.reason_to_cut(now)) is not None:
                self.cut_reader(reason)
        elif now > self._deadline:
            if self._exchange is not None and not self._exchange.has_body:
                message = "the body did not come in time"
                self._exchange.fail(APIError(ErrorKind.SLOW_BODY, message))
            else:
                self.abort()


class Exchange:
    """One request and its response, which is one `respond`, or a stream, or one `fail`."""

    def __init__(self, client: Client, head: Head) -> None:
        self._client = client
        self.head = head
        given = head.headers.get("x-request-id")
        is_usable = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        self.request_id = given if is_usable else _new_request_id()
        self.label = NO_ROUTE  # its route's path, for metrics and logs
        self.route: Any = None  # the application's: from `on_head` to `on_body`
        self.path_rest = ""  # of the path, where the route has an `{id}`
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
        self.heartbeat: Callable[[], bytes] = sse_comment  # makes a frame for a silent stream
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
            for piece in self._client.http.respond(status, fields, body):
                self._client.write(piece)
            self._client.finished()

    def fail(self, error: APIError) -> None:
        """Respond with an error; no effect after another response."""
        if error.status >= 500 and not self.is_answered:
            log.warning("%r: %d %s", self, error.status, error.message)
        elif not self.is_answered:
            about = filter(None, (error.code, error.param, error.hint))
            self.note_refusal(f"{error.status} {truncate(' · '.join(about) or error.type)}")
        body = self.error_body(error, self.request_id)
        self.respond(error.status, body, (*JSON, *error.headers))

    def note_refusal(self, refusal: str) -> None:
        """Log that the request is refused, or a page may not read the answer."""
        refusals = self._client.connections.refusals
        path = self.head.path if self.label == NO_ROUTE else self.label  # an id may be any text
        refusals.note(truncate(self.head.method), truncate(path), refusal)

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
        """Send a frame in a silent stream: proxies close idle connections."""
        if self._written_at is not None and now - self._written_at > HEARTBEAT_S:
            self.write(self.heartbeat())
