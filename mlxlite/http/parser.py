"""HTTP/1.1 messages: request bytes to events, responses to bytes. Sans-IO, in the shape of h11.

Decides where a request's head and body end, which shapes are refused and with which status, and
whether the connection survives the response. Input goes to `receive_data`, events come from
`next_event`, output is returned as bytes. It must never touch a socket, an event loop or a clock
(so it adds no `date`), nor raise on malformed input, which is a value; a wrong call is an `assert`.

h11 parses heads, keeps both sides' states and writes responses. Before it, `_Gate` and `_Chunks`
refuse what it accepts but a proxy may parse differently (request smuggling), or parses slowly.

Invariants, all tested:
- The events are a function of the bytes, not of how they were split.
- Head precedes Body; nothing follows Malformed but the same Malformed.
- One h11.Connection serves one request, so its refusal of 1.0 keep-alive does not bind us.
- A request holds at most its two limits (the body twice while Body is created), plus the bytes
  received beyond the message's end: `num_buffered`.
- A response that starts before the body is complete, or after Malformed, has `connection: close`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from http import HTTPStatus
from typing import TypeAlias
from urllib.parse import unquote_to_bytes

import h11

_MAX_CHUNK_LINE_BYTES = 4096  # Go's net/http/internal/chunked.go, maxLineLength
_BLANK_LINES = re.compile(rb"(?:\r\n)*")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_FOLD = re.compile(rb"\r\n[ \t]")
_MAX_JOINED = 64 << 10  # bytes of a body that are copied, to leave in one write with their head
_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length:([^\r]*)", re.IGNORECASE)
# 16 digits fill a 64-bit length; h11 accepts 20, which a proxy might truncate.
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})((?:;[\t\x20-\x7e\x80-\xff]*)?)\r\n")
# RFC 3986 §3.2.2 and a port; no ",": a merged pair of Host lines is refused.
_HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+;=:\[\]-]*")
_ABSOLUTE_TARGET = re.compile(r"https?://([^/?]*)(.*)", re.IGNORECASE)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key"})


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest sizes of a request, in bytes; exactly the limit is accepted."""

    # Request line to blank line (node: 80 KiB, IIS: 16 KiB); trailers; chunk extensions in sum.
    max_header_bytes: int = 64 * 1024
    max_fields: int = 256  # of a header: 16,000 short ones would block the event loop for 50 ms
    max_body_bytes: int = 64 * 1024 * 1024  # after de-chunking


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Headers:
    """The fields of a request, in order; names are case-insensitive, text is latin-1."""

    _pairs: tuple[tuple[str, str], ...]

    def __init__(self, raw: Iterable[tuple[bytes, bytes]] = ()) -> None:
        pairs = tuple((n.decode("latin-1"), v.decode("latin-1")) for n, v in raw)
        object.__setattr__(self, "_pairs", pairs)

    def get(self, name: str, default: str = "") -> str:
        """The first value of `name`."""
        return next(iter(self.get_all(name)), default)

    def get_all(self, name: str) -> list[str]:
        """Every value of `name`, in the order received."""
        name = name.lower()
        return [v for n, v in self._pairs if n.lower() == name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(n.lower() == name.lower() for n, _ in self._pairs)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        shown = ((n, "***" if n.lower() in _SECRET_HEADERS else v) for n, v in self._pairs)
        return "Headers(" + ", ".join(f"{n}: {v!r}" for n, v in shown) + ")"


@dataclass(frozen=True, slots=True)
class Head:
    """The request line and headers; the body may still be incomplete."""

    method: str  # upper-case token
    target: str  # as received
    path: str  # percent-decoded, without the query; "*" stays "*"
    query: str  # as received, without the "?"
    headers: Headers
    http_version: str  # "1.0" | "1.1"
    expects_continue: bool  # the client sends its body after `continue_100`
    content_length: int | None  # None: no such header


@dataclass(frozen=True, slots=True)
class Body:
    """The complete body, possibly empty; follows Head."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Malformed:
    """The request violates the protocol or a limit: respond with `status`, then close.

    400 syntax or framing, 413 body too large, 414 request line and 431 header too large,
    501 transfer coding or CONNECT, 505 version. `message` quotes none of the peer's bytes.
    """

    status: int
    message: str


class Signal(Enum):
    NEED_DATA = auto()
    PAUSED = auto()  # pipelined bytes wait for `start_next_cycle`
    CLOSED = auto()  # EOF between messages


Event: TypeAlias = Head | Body | Malformed | Signal
_Fields: TypeAlias = Sequence[tuple[str, str]]  # of a response: name, value


class _Phase(Enum):
    HEAD = auto()  # of what the next byte received is part
    SIZED = auto()  # a body with a content-length
    CHUNKED = auto()
    TRAILERS = auto()
    EMPTY = auto()  # no body, but the Body event is still to be returned
    DONE = auto()  # the next request
    FAILED = auto()  # further bytes are dropped


_BODY_OUTSTANDING = frozenset({_Phase.SIZED, _Phase.CHUNKED, _Phase.TRAILERS})


@dataclass(slots=True)
class _Chunks:
    """Decodes the chunked coding up to, and without, the CRLF that ends the last chunk's line.

    h11 accepts whitespace and bare CRs in a chunk line, does not bound the extensions, and takes
    9.7 µs a chunk (this: 1.5): a 256 KiB read of 1-byte chunks would block the loop for 400 ms.
    """

    limits: Limits
    at: int = 0  # in the buffer of the current `decode`
    num_left: int = 0  # bytes missing from the current chunk
    needs_crlf: bool = False  # the CRLF after the current chunk's data is missing
    num_extension_bytes: int = 0

    def decode(self, buffer: bytearray, body: bytearray) -> bool | Malformed:
        """Move complete data from `buffer` to `body`; True after the last chunk."""
        self.at = 0
        while (outcome := self._step(buffer, body)) is None:
            pass
        del buffer[: self.at]
        return outcome

    def _step(self, buffer: bytearray, body: bytearray) -> bool | Malformed | None:
        """Decode one chunk's rest and the next line; None to repeat, False to wait for bytes."""
        if self.num_left:
            piece = buffer[self.at : self.at + self.num_left]
            body += piece
            self.at += len(piece)
            self.num_left -= len(piece)
            if self.num_left:
                return False
        if self.needs_crlf:
            crlf = buffer[self.at : self.at + 2]
            if crlf != b"\r\n":
                return False if len(crlf) < 2 else Malformed(400, "illegal end of chunk")
            self.needs_crlf = False
            self.at += 2
        line = _CHUNK_LINE.match(buffer, self.at)
        if line is None:
            if buffer.find(b"\n", self.at, self.at + _MAX_CHUNK_LINE_BYTES) >= 0:
                return Malformed(400, "illegal chunk size")
            is_partial = len(buffer) - self.at < _MAX_CHUNK_LINE_BYTES
            return False if is_partial else Malformed(400, "chunk line too long")
        self.num_extension_bytes += len(line[2])
        if line.end() - self.at > _MAX_CHUNK_LINE_BYTES:
            return Malformed(400, "chunk line too long")
        if self.num_extension_bytes > self.limits.max_header_bytes:
            return Malformed(400, "chunk extensions too large")
        self.num_left = int(line[1], 16)
        if len(body) + self.num_left > self.limits.max_body_bytes:
            return _too_large(self.limits)
        self.needs_crlf = self.num_left > 0
        self.at = line.end() if self.num_left else line.end() - len(b"\r\n")
        return None if self.num_left else True


@dataclass(slots=True)
class _Gate:
    """Cuts the head and the trailers of one request out of `buffer`, checked for h11."""

    limits: Limits
    buffer: bytearray
    num_blank_bytes: int = 0
    num_scanned: int = 0  # bytes of the buffer in which no block ends

    def take_head(self) -> bytes | Signal | Malformed:
        """The block of a request line and headers, without blank lines before it."""
        blank = _BLANK_LINES.match(self.buffer)
        if blank is not None and blank.end():
            # RFC 9112 §2.2: ignore "at least one"; h11 would refuse them.
            del self.buffer[: blank.end()]
            self.num_blank_bytes += blank.end()
            if self.num_blank_bytes > self.limits.max_header_bytes:
                return Malformed(431, "too many empty lines before the request")
        if not self.buffer or self.buffer == b"\r":
            return Signal.NEED_DATA
        if self.buffer[0] == 0x16:  # the record type of a ClientHello, in every TLS version
            return Malformed(400, "this is a TLS handshake, but the port speaks plain HTTP")
        if self.buffer[0] < 0x21:
            return Malformed(400, "illegal request line")
        return self.take_block(self.limits.max_header_bytes - self.num_blank_bytes)

    def take_block(self, limit: int) -> bytes | Signal | Malformed:
        """Cut the buffer after its first blank line, within `limit` bytes, and check the block."""
        end = self.buffer.find(b"\r\n\r\n", max(0, self.num_scanned - 3), limit)
        stop = min(len(self.buffer), limit) if end < 0 else end + 4
        # RFC 9112 §2.2 permits a bare LF as a line's end, and h11 accepts it; a proxy that does
        # not would see one field where we see two.
        if _BARE_LF.search(self.buffer, self.num_scanned, stop):
            return Malformed(400, "a line ends without CR")
        if end < 0:
            if len(self.buffer) > limit:
                if self.buffer.find(b"\r\n", 0, limit) < 0:
                    return Malformed(414, "request line too large")
                return Malformed(431, "request header too large")
            self.num_scanned = len(self.buffer)
            return Signal.NEED_DATA
        block = bytes(self.buffer[:stop])
        del self.buffer[:stop]
        self.num_scanned = 0
        if block.count(b"\r\n") > self.limits.max_fields + 2:  # first line and blank one
            return Malformed(431, "too many header fields")
        if _CONTROL.search(block) or _FOLD.search(block):
            return Malformed(400, "control character or folded line in the header")
        return block


class Connection:
    """The server's end of one HTTP/1.1 connection, for any number of requests in turn."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._eof = False
        self._failure: Malformed | None = None
        self._must_close = False
        self._begin_cycle()

    def _begin_cycle(self) -> None:
        self._h11 = h11.Connection(h11.SERVER, self._limits.max_header_bytes)
        self._phase = _Phase.HEAD
        self._head: Head | None = None
        self._is_head = False  # a HEAD request: responses have no body
        self._body = bytearray()
        self._chunks = _Chunks(self._limits)
        self._gate = _Gate(self._limits, self._buffer)

    def receive_data(self, data: bytes) -> None:
        """Buffer received bytes for `next_event`; b"" is EOF."""
        assert not (self._eof and data), "data after EOF"
        if not data:
            self._eof = True
        elif self._phase is not _Phase.FAILED:
            self._buffer += data

    def next_event(self) -> Event:
        """The next event; never raises. Call it until it returns a Signal or Malformed."""
        event = self._step()
        if event is Signal.NEED_DATA and self._eof:
            if self._phase is _Phase.DONE or (self._phase is _Phase.HEAD and not self._buffer):
                return Signal.CLOSED
            event = Malformed(400, "the peer closed the connection in mid-message")
        if isinstance(event, Malformed):
            self._failure = event
            self._phase = _Phase.FAILED
            self._must_close = True
            self._buffer.clear()
            self._body = bytearray()
        return event

    def _step(self) -> Event:
        match self._phase:
            case _Phase.HEAD:
                return self._read_head()
            case _Phase.SIZED:
                return self._read_sized()
            case _Phase.CHUNKED | _Phase.TRAILERS:
                return self._read_chunked()
            case _Phase.EMPTY:
                self._phase = _Phase.DONE
                return Body(b"")
            case _Phase.DONE:
                return Signal.PAUSED if self._buffer else Signal.NEED_DATA
            case _Phase.FAILED:
                assert self._failure is not None
                return self._failure

    def _read_head(self) -> Event:
        block = self._gate.take_head()
        if not isinstance(block, bytes):
            return block
        self._h11.receive_data(block)
        try:
            request = self._h11.next_event()
        except h11.RemoteProtocolError as error:
            return _from_h11(error)
        assert isinstance(request, h11.Request), request
        head = _head_of(request, block, self._limits)
        if isinstance(head, Malformed):
            return head
        self._head, self._is_head = head, head.method == "HEAD"
        tokens = _tokens(head.headers, "connection")
        keeps = head.http_version == "1.1" or "keep-alive" in tokens
        self._must_close = "close" in tokens or not keeps
        if "transfer-encoding" in head.headers:
            self._phase = _Phase.CHUNKED
        elif head.content_length:
            self._phase = _Phase.SIZED
        else:
            self._phase = _Phase.EMPTY
            self._end_of_message()
        return head

    def _read_sized(self) -> Event:
        if not self._buffer:
            return Signal.NEED_DATA
        assert self._head is not None
        num_left = (self._head.content_length or 0) - len(self._body)
        piece = bytes(self._buffer[:num_left])
        del self._buffer[:num_left]
        self._h11.receive_data(piece)
        data = self._h11.next_event()
        assert isinstance(data, h11.Data), data
        self._body += data.data
        return self._finish_body() if len(piece) == num_left else Signal.NEED_DATA

    def _read_chunked(self) -> Event:
        if self._phase is _Phase.CHUNKED:
            is_last = self._chunks.decode(self._buffer, self._body)
            if isinstance(is_last, Malformed):
                return is_last
            if not is_last:
                return Signal.NEED_DATA
            self._phase = _Phase.TRAILERS
        # The block starts with the CRLF of the last chunk's line, which is not the trailers'.
        block = self._gate.take_block(self._limits.max_header_bytes + 2)
        if not isinstance(block, bytes):
            return block
        # h11 gets an empty chunked body: it checks the trailers; the chunks were checked here.
        self._h11.receive_data(b"0" + block)
        try:
            return self._finish_body()
        except h11.RemoteProtocolError as error:
            return _from_h11(error)

    def _finish_body(self) -> Body:
        self._end_of_message()
        self._phase = _Phase.DONE
        body, self._body = Body(bytes(self._body)), bytearray()
        return body

    def _end_of_message(self) -> None:
        end = self._h11.next_event()
        assert isinstance(end, h11.EndOfMessage), end

    def continue_100(self) -> bytes:
        """The interim response, or b"" if the client does not wait for one (any more)."""
        waits = self._h11.they_are_waiting_for_100_continue and self._phase in _BODY_OUTSTANDING
        # RFC 9110 §10.1.1: may be omitted once some of the body has arrived.
        if not waits or self._body or self._buffer or self.is_response_started:
            return b""
        interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        return self._h11.send(interim)

    def respond(self, status: int, headers: _Fields, body: bytes = b"") -> list[bytes]:
        """A complete response with its content-length; none if Malformed follows a started one.

        A 204 or 304 has no body; a response to HEAD has the length and no body. A large body is a
        piece of its own, which is not copied.
        """
        if self._failure is not None and self.is_response_started:
            return []
        is_bodiless = status in (204, 304)
        framing = [] if is_bodiless else [("content-length", str(len(body)))]
        frames = [self._send_head(status, headers, framing)]
        if body and not (is_bodiless or self._is_head):
            frames.append(self._h11.send(h11.Data(data=body)))
        frames.append(self._h11.send(h11.EndOfMessage()))
        return [b"".join(frames)] if len(body) <= _MAX_JOINED else frames

    def start_stream(self, status: int, headers: _Fields) -> bytes:
        """The head of a response of unknown length; for HTTP/1.0, the close ends it."""
        assert status not in (204, 304)
        self._must_close |= self._h11.their_http_version != b"1.1"
        return self._send_head(status, headers, framing=[])

    def stream_data(self, data: bytes) -> bytes:
        """One frame; b"" for HEAD and for no data (an empty chunk would end the stream)."""
        assert self._h11.our_state is h11.SEND_BODY
        if not data or self._is_head:
            return b""
        # 4 µs for a 200-byte frame (x86-64, CPython 3.11): no need to bypass h11.
        return self._h11.send(h11.Data(data=data))

    def end_stream(self) -> bytes:
        """The last chunk, if the response is chunked."""
        assert self._h11.our_state is h11.SEND_BODY
        return self._h11.send(h11.EndOfMessage())

    def _send_head(self, status: int, headers: _Fields, framing: _Fields) -> bytes:
        assert not self.is_response_started, "one response a request"
        _assert_sendable(headers)
        has_close = any(name.lower() == "connection" for name, _ in headers)
        self._must_close |= has_close or self._phase not in (_Phase.EMPTY, _Phase.DONE)
        closing = [("connection", "close")] if self._must_close and not has_close else []
        fields = [*headers, *framing, *closing]
        response = h11.Response(
            status_code=status,
            headers=[(n.encode("latin-1"), v.encode("latin-1")) for n, v in fields],
            reason=HTTPStatus(status).phrase.encode("ascii"),
        )
        head = self._h11.send(response)
        if self._h11.their_http_version == b"1.0" and not self._must_close:
            # h11 closes for any HTTP/1.0 peer, in its last field (tested); this one keeps alive.
            head = head.removesuffix(b"Connection: close\r\n\r\n")
            return head + b"connection: keep-alive\r\n\r\n"
        return head

    @property
    def is_response_started(self) -> bool:
        return self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE)

    @property
    def is_response_complete(self) -> bool:
        return self._h11.our_state in (h11.DONE, h11.MUST_CLOSE)

    @property
    def keep_alive(self) -> bool:
        """Whether the connection survives a response that starts now or has started."""
        return not self._must_close and self._phase not in _BODY_OUTSTANDING

    @property
    def num_buffered(self) -> int:
        """Bytes received and not yet consumed: a partial head, or pipelined requests."""
        return len(self._buffer)

    def start_next_cycle(self) -> bool:
        """After a complete response: True if another request may follow, False: close."""
        assert self._failure is not None or self.is_response_complete
        if self.keep_alive:
            self._begin_cycle()
        return self.keep_alive

    def __repr__(self) -> str:
        request = f"{self._head.method} {self._head.path!r}" if self._head else "none"
        return (
            f"<http1.Connection {self._phase.name} request={request}"
            f" response={self._h11.our_state} num_buffered={self.num_buffered}"
            f" keep_alive={self.keep_alive}{' eof' if self._eof else ''}>"
        )


def _head_of(request: h11.Request, block: bytes, limits: Limits) -> Head | Malformed:
    """The Head that h11 parsed from `block`, or a refusal of a shape that h11 accepts."""
    headers = Headers(request.headers.raw_items())
    target = request.target.decode("ascii")
    path = _refuse(request, headers, block) or _path_of(target, headers)
    if isinstance(path, Malformed):
        return path
    content_length = int(headers.get("content-length")) if "content-length" in headers else None
    if content_length is not None and content_length > limits.max_body_bytes:
        return _too_large(limits)
    has_body = bool(content_length) or "transfer-encoding" in headers
    http_version = request.http_version.decode("ascii")
    # RFC 9110 §10.1.1: ignored from HTTP/1.0 clients, and without a body.
    waits = has_body and http_version == "1.1" and "100-continue" in _tokens(headers, "expect")
    return Head(
        method=request.method.decode("ascii"),
        target=target,
        path=path,
        query=target.partition("?")[2],
        headers=headers,
        http_version=http_version,
        expects_continue=waits,
        content_length=content_length,
    )


def _refuse(request: h11.Request, headers: Headers, block: bytes) -> Malformed | None:
    if request.http_version not in (b"1.0", b"1.1"):
        return Malformed(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    # Methods are case-sensitive (RFC 9110 §9.1): "head" would be a HEAD to us, not to a proxy.
    if request.method != request.method.upper():
        return Malformed(400, "the method is not in upper case")
    if request.method == b"CONNECT":
        return Malformed(501, "this is not a proxy")
    # Below: shapes whose body another parser may end elsewhere (RFC 9112 §6.1-6.3).
    if "transfer-encoding" in headers:
        if "content-length" in headers:
            return Malformed(400, "both Transfer-Encoding and Content-Length")
        if request.http_version == b"1.0":
            return Malformed(400, "Transfer-Encoding in HTTP/1.0")
    # h11 merges equal lengths, as RFC 9110 §8.6 permits; no client sends them: refused.
    lengths = _CONTENT_LENGTH.findall(block)
    if len(lengths) > 1 or any(b"," in length for length in lengths):
        return Malformed(400, "more than one Content-Length")
    return None


def _path_of(target: str, headers: Headers) -> str | Malformed:
    host = headers.get("host")
    if not _HOST.fullmatch(host):
        return Malformed(400, "illegal Host")
    if target == "*":
        return target
    if (absolute := _ABSOLUTE_TARGET.fullmatch(target)) is not None:
        # RFC 9112 §3.2.2: this authority overrides Host, and clients send both alike. If they
        # differ, the application's check of Host would check the wrong one.
        if "host" in headers and absolute[1].lower() != host.lower():
            return Malformed(400, "Host differs from the request target")
        target = absolute[2] if absolute[2].startswith("/") else "/" + absolute[2]
    if not target.startswith("/"):
        return Malformed(400, "illegal request target")
    try:
        path = unquote_to_bytes(target.partition("?")[0]).decode("utf-8")
    except UnicodeDecodeError:
        return Malformed(400, "the path is not UTF-8")
    return Malformed(400, "NUL in the path") if "\0" in path else path


def _assert_sendable(headers: _Fields) -> None:
    """A CR or LF in a header of our own would split the response."""
    for name, value in headers:
        assert _TOKEN.fullmatch(name), f"illegal header name {name!r}"
        assert _FIELD_VALUE.fullmatch(value), f"illegal value of header {name!r}"
        assert name.lower() not in ("content-length", "transfer-encoding"), "framing is ours"
        assert name.lower() != "connection" or value == "close", "keep-alive is ours"


def _tokens(headers: Headers, name: str) -> set[str]:
    return {token.strip().lower() for v in headers.get_all(name) for token in v.split(",")}


def _too_large(limits: Limits) -> Malformed:
    return Malformed(413, f"the body is larger than {limits.max_body_bytes} bytes")


def _from_h11(error: h11.RemoteProtocolError) -> Malformed:
    # h11 quotes the offending line after ": bytearray", and that line may contain a key.
    return Malformed(error.error_status_hint, str(error).partition(": bytearray")[0])
