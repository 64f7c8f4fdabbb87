"""The HTTP parser: bytes in, events out, bytes out. No socket, no clock, no sleep.

Every request case is fed whole, split at every byte and byte by byte, and must give the same events
each time (after h11's test_io.py). Responses are read back with an h11 client.
"""

import ast
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlite.http import parser
from mlxlite.http.parser import Body, Connection, Event, Head, Headers, Limits, Malformed, Signal
from mlxlite.http.sse import SSE_DONE, sse_comment, sse_data, sse_event, sse_field

LIMITS = Limits(max_header_bytes=512, max_body_bytes=32)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
EOF = b""


def drain(conn: Connection) -> list[Event]:
    """All events, with a response to each request after its body."""
    events: list[Event] = []
    while True:
        event = conn.next_event()
        if event in (Signal.NEED_DATA, Signal.PAUSED):
            return events
        events.append(event)
        if isinstance(event, Malformed) or event is Signal.CLOSED:
            return events
        if isinstance(event, Body):
            conn.respond(200, [], b"ok")
            if not conn.start_next_cycle():
                return events


def events_of(pieces: Iterable[bytes], limits: Limits = LIMITS) -> list[Event]:
    """The events of one connection that receives `pieces`, up to the first Malformed."""
    conn = Connection(limits)
    events: list[Event] = []
    for piece in pieces:
        conn.receive_data(piece)
        events += drain(conn)
        if events and isinstance(events[-1], Malformed):
            break
    return events


def cut(raw: bytes, *places: int) -> list[bytes]:
    borders = [0, *sorted(places), len(raw)]
    pieces = [raw[start:stop] for start, stop in pairwise(borders)]
    return [piece for piece in pieces if piece]


def events_however_split(raw: bytes, limits: Limits = LIMITS, *, eof: bool = False) -> list[Event]:
    end = [EOF] if eof else []
    events = events_of([raw, *end], limits)
    for place in range(1, len(raw)):
        assert events_of([*cut(raw, place), *end], limits) == events, f"cut at {place}"
    assert events_of([*cut(raw, *range(1, len(raw))), *end], limits) == events, "byte by byte"
    return events


def only_head(raw: bytes, limits: Limits = LIMITS) -> Head:
    conn = Connection(limits)
    conn.receive_data(raw)
    head = conn.next_event()
    assert isinstance(head, Head), head
    return head


def after(raw: bytes, *, is_body_read: bool = True) -> Connection:
    """A connection that has delivered the Head (and the Body) of the request `raw`."""
    conn = Connection(LIMITS)
    conn.receive_data(raw)
    assert isinstance(conn.next_event(), Head)
    if is_body_read:
        assert isinstance(conn.next_event(), Body)
    return conn


@dataclass(frozen=True)
class Response:
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    num_data: int  # chunks, if chunked

    def values(self, name: bytes) -> list[bytes]:
        return [v for n, v in self.headers if n == name]


def read_back(raw: bytes | list[bytes], method: str = "GET", *, eof: bool = False) -> Response:
    """The response that an h11 client parses from `raw`, which must be exactly one."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(raw if isinstance(raw, bytes) else b"".join(raw))
    if eof:
        client.receive_data(EOF)
    response = client.next_event()
    assert isinstance(response, h11.Response), response
    data = []
    while isinstance(event := client.next_event(), h11.Data):
        data.append(bytes(event.data))
    assert isinstance(event, h11.EndOfMessage), event
    assert client.trailing_data[0] == b""
    return Response(response.status_code, list(response.headers), b"".join(data), len(data))


# -- requests that are understood -----------------------------------------------------------

UNDERSTOOD = {
    "no body": (GET, "GET", "/", "", [b""]),
    "a query": (b"GET /a?b=%20&c HTTP/1.1\r\nHost: x\r\n\r\n", "GET", "/a", "b=%20&c", [b""]),
    "a percent-encoded path": (
        b"GET /%C3%A9/%2e%25?%ff HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET",
        "/é/.%",
        "%ff",
        [b""],
    ),
    "an absolute target": (
        b"GET http://X:1/a?b HTTP/1.1\r\nHost: x:1\r\n\r\n",
        "GET",
        "/a",
        "b",
        [b""],
    ),
    "an absolute target without a path": (
        b"GET http://x?b HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET",
        "/",
        "b",
        [b""],
    ),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "OPTIONS", "*", "", [b""]),
    "an IPv6 host": (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", "GET", "/", "", [b""]),
    "an empty host": (b"GET / HTTP/1.1\r\nHost:\r\n\r\n", "GET", "/", "", [b""]),
    "empty lines before it": (b"\r\n\r\n" + GET, "GET", "/", "", [b""]),
    "a sized body": (POST + b"Content-Length: 5\r\n\r\nhello", "POST", "/", "", [b"hello"]),
    "an empty sized body": (POST + b"Content-Length: 0\r\n\r\n", "POST", "/", "", [b""]),
    "a body with line ends": (
        POST + b"Content-Length: 4\r\n\r\n\n\r\n\0",
        "POST",
        "/",
        "",
        [b"\n\r\n\0"],
    ),
    "a chunked body": (
        CHUNKED + b"3\r\nabc\r\n0000A\r\n0123456789\r\n0\r\n\r\n",
        "POST",
        "/",
        "",
        [b"abc0123456789"],
    ),
    "an empty chunked body": (CHUNKED + b"0\r\n\r\n", "POST", "/", "", [b""]),
    "chunk extensions": (
        CHUNKED + b'3;a;b="c d"\r\nabc\r\n0;z\r\n\r\n',
        "POST",
        "/",
        "",
        [b"abc"],
    ),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\nX: y\r\nZ:\r\n\r\n", "POST", "/", "", [b"a"]),
    "the coding in upper case": (
        POST + b"transfer-encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "POST",
        "/",
        "",
        [b"a"],
    ),
    "HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", "GET", "/", "", [b""]),
    "an upgrade we ignore": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        "GET",
        "/",
        "",
        [b""],
    ),
}


@pytest.mark.parametrize(
    ("raw", "method", "path", "query", "bodies"), UNDERSTOOD.values(), ids=UNDERSTOOD.keys()
)
def test_a_request_gives_its_head_and_body_for_every_split(
    raw: bytes, method: str, path: str, query: str, bodies: list[bytes]
) -> None:
    events = events_however_split(raw)
    head, *rest = events
    assert isinstance(head, Head)
    assert (head.method, head.path, head.query) == (method, path, query)
    assert rest == [Body(data) for data in bodies]


def test_a_head_has_the_fields_that_were_sent() -> None:
    head = only_head(
        b"POST /v1/%63hat?a=%20 HTTP/1.1\r\nHost: x\r\nX-Name:  caf\xe9 \r\nx-name: 2\r\n"
        b"Content-Length: 5\r\nExpect: 100-Continue\r\n\r\n"
    )
    assert head.target == "/v1/%63hat?a=%20"
    assert head.path == "/v1/chat"
    assert head.query == "a=%20"
    assert head.http_version == "1.1"
    assert head.content_length == 5
    assert head.expects_continue
    assert head.headers.get("X-NAME") == "café"
    assert head.headers.get_all("x-Name") == ["café", "2"]
    assert "HOST" in head.headers
    assert "Origin" not in head.headers
    assert head.headers.get("Origin") == ""
    assert head.headers.get("Origin", "null") == "null"
    assert head.headers.get_all("Origin") == []
    assert list(head.headers)[:2] == [("Host", "x"), ("X-Name", "café")]


def test_a_head_without_a_length_has_none() -> None:
    assert only_head(GET).content_length is None
    assert only_head(CHUNKED).content_length is None
    assert only_head(POST + b"Content-Length: 0\r\n\r\n").content_length == 0


def test_headers_keep_keys_out_of_their_repr() -> None:
    headers = Headers([(b"Authorization", b"Bearer sk-1"), (b"X-API-Key", b"sk-2"), (b"A", b"b")])
    assert repr(headers) == "Headers(Authorization: '***', X-API-Key: '***', A: 'b')"


def test_pipelined_requests_are_parsed_in_order_for_every_split() -> None:
    sized = POST + b"Content-Length: 3\r\n\r\nabc"
    chunked = CHUNKED + b"1\r\nz\r\n0\r\n\r\n"
    events = events_however_split(sized + b"\r\n" + chunked + GET, eof=True)
    assert [event for event in events if not isinstance(event, Head)] == [
        Body(b"abc"),
        Body(b"z"),
        Body(b""),
        Signal.CLOSED,
    ]


def test_a_pipelined_request_waits_for_the_next_cycle() -> None:
    conn = after(GET + b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
    assert conn.next_event() is Signal.PAUSED
    assert conn.num_buffered == len(b"GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
    conn.respond(200, [])
    assert conn.next_event() is Signal.PAUSED
    assert conn.start_next_cycle()
    head = conn.next_event()
    assert isinstance(head, Head)
    assert head.path == "/2"
    assert conn.num_buffered == 0


def test_nothing_is_read_after_a_request_that_closes() -> None:
    conn = after(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" + GET)
    conn.respond(200, [])
    assert not conn.start_next_cycle()
    assert conn.next_event() is Signal.PAUSED


def test_eof_between_requests_is_a_close() -> None:
    assert events_of([EOF]) == [Signal.CLOSED]
    assert events_of([b"\r\n", EOF]) == [Signal.CLOSED]
    assert events_of([GET, EOF])[1:] == [Body(b""), Signal.CLOSED]
    conn = Connection(LIMITS)
    conn.receive_data(EOF)
    conn.receive_data(EOF)
    assert [conn.next_event(), conn.next_event()] == [Signal.CLOSED] * 2


def test_eof_before_the_response_is_a_close_and_the_response_can_still_be_sent() -> None:
    conn = after(GET)
    conn.receive_data(EOF)
    assert conn.next_event() is Signal.CLOSED
    assert read_back(conn.respond(200, [], b"ok")).body == b"ok"


@pytest.mark.parametrize(
    "raw",
    [
        GET[:1],
        GET[:-1],
        b"\r",
        POST + b"Content-Length: 5\r\n\r\nhell",
        CHUNKED,
        CHUNKED + b"5",
        CHUNKED + b"5\r\nhell",
        CHUNKED + b"5\r\nhello",
        CHUNKED + b"5\r\nhello\r\n0\r\n",
        CHUNKED + b"0\r\nA: b\r\n",
    ],
)
def test_eof_in_mid_message_is_malformed(raw: bytes) -> None:
    last = events_however_split(raw, eof=True)[-1]
    assert last == Malformed(400, "the peer closed the connection in mid-message")


# -- requests that are refused --------------------------------------------------------------

REFUSED = {
    # Smuggling: the framing of the body is ambiguous.
    "both framings": (
        POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "both framings, reversed": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        400,
    ),
    "both framings, empty length": (
        POST + b"Transfer-Encoding: chunked\r\nContent-Length:\r\n\r\n",
        400,
    ),
    "chunked in HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "lengths that differ": (POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400),
    "lengths that agree": (POST + b"Content-Length: 3\r\ncontent-length: 3\r\n\r\n", 400),
    "a list of lengths": (POST + b"Content-Length: 3, 3\r\n\r\n", 400),
    "a list of lengths that differ": (POST + b"Content-Length: 3, 4\r\n\r\n", 400),
    "a signed length": (POST + b"Content-Length: +3\r\n\r\n", 400),
    "a negative length": (POST + b"Content-Length: -3\r\n\r\n", 400),
    "a hexadecimal length": (POST + b"Content-Length: 0x3\r\n\r\n", 400),
    "a length with a space": (POST + b"Content-Length: 1 0\r\n\r\n", 400),
    "a length with an underscore": (POST + b"Content-Length: 1_0\r\n\r\n", 400),
    "an empty length": (POST + b"Content-Length:\r\n\r\n", 400),
    "a length too long to count": (POST + b"Content-Length: " + b"9" * 21 + b"\r\n\r\n", 400),
    "an unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
    "two codings": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 501),
    "chunked twice": (POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n", 501),
    "two coding lines": (
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        501,
    ),
    "two coding lines, one hidden": (
        POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n",
        501,
    ),
    "the identity coding": (POST + b"Transfer-Encoding: identity\r\n\r\n", 501),
    "an empty coding": (POST + b"Transfer-Encoding:\r\n\r\n", 501),
    "a coding in quotes": (POST + b'Transfer-Encoding: "chunked"\r\n\r\n', 501),
    "a coding with a parameter": (POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n", 501),
    "a coding behind a control character": (POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n", 400),
    "a space before the colon": (POST + b"Transfer-Encoding : chunked\r\n\r\n", 400),
    "a tab before the colon": (POST + b"Content-Length\t: 3\r\n\r\n", 400),
    # Smuggling: where a line or a field ends is ambiguous.
    "a folded line": (POST + b"A: b\r\n c\r\n\r\n", 400),
    "a folded coding": (POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n", 400),
    "a space before the first field": (b"POST / HTTP/1.1\r\n Host: x\r\n\r\n", 400),
    "bare LFs everywhere": (b"GET / HTTP/1.1\nHost: x\n\n", 400),
    "a bare LF in a value": (POST + b"A: b\nContent-Length: 3\r\n\r\n", 400),
    "a bare LF at the end": (POST + b"\n", 400),
    "a bare LF before the request": (b"\n" + GET, 400),
    "a bare CR in a value": (POST + b"A: b\rContent-Length: 3\r\n\r\n", 400),
    "a bare CR before the request": (b"\r" + GET, 400),
    "two CRs in a line end": (POST + b"A: b\r\r\n\r\n", 400),
    "NUL in a value": (POST + b"A: b\0\r\n\r\n", 400),
    "NUL in a name": (POST + b"A\0: b\r\n\r\n", 400),
    "a control character in a value": (POST + b"A: b\x01\r\n\r\n", 400),
    "DEL in a value": (POST + b"A: b\x7f\r\n\r\n", 400),
    "a line without a colon": (POST + b"A\r\n\r\n", 400),
    "an empty name": (POST + b": a\r\n\r\n", 400),
    "a name outside ASCII": (POST + b"\xe9: a\r\n\r\n", 400),
    # Smuggling: chunks.
    "a chunk size with a space after": (CHUNKED + b"1 \r\na\r\n0\r\n\r\n", 400),
    "a chunk size with a space before": (CHUNKED + b" 1\r\na\r\n0\r\n\r\n", 400),
    "a chunk size with a prefix": (CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", 400),
    "a signed chunk size": (CHUNKED + b"+1\r\na\r\n0\r\n\r\n", 400),
    "a negative chunk size": (CHUNKED + b"-1\r\na\r\n0\r\n\r\n", 400),
    "an empty chunk size": (CHUNKED + b"\r\na\r\n0\r\n\r\n", 400),
    "a chunk size that is no number": (CHUNKED + b"g\r\na\r\n0\r\n\r\n", 400),
    "a chunk size past 64 bits": (CHUNKED + b"0" * 16 + b"1\r\na\r\n0\r\n\r\n", 400),
    "a chunk line with a bare LF": (CHUNKED + b"1\na\r\n0\r\n\r\n", 400),
    "an extension with a bare LF": (CHUNKED + b"1;a\nb\r\na\r\n0\r\n\r\n", 400),
    "an extension with a bare CR": (CHUNKED + b"1;a\rb\r\na\r\n0\r\n\r\n", 400),
    "a chunk longer than its size": (CHUNKED + b"1\r\nab\r\n0\r\n\r\n", 400),
    "a chunk that ends with LF": (CHUNKED + b"1\r\na\n0\r\n\r\n", 400),
    "a last chunk that ends with LF": (CHUNKED + b"0\r\n\n", 400),
    "a folded trailer": (CHUNKED + b"0\r\nA: b\r\n c\r\n\r\n", 400),
    "a trailer with a bare LF": (CHUNKED + b"0\r\nA: b\nC: d\r\n\r\n", 400),
    "a trailer that is no field": (CHUNKED + b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
    # The request line.
    "no version": (b"GET /\r\n\r\n", 400),
    "two spaces": (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a tab": (b"GET\t/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space in the target": (b"GET /a b HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a raw byte in the target": (b"GET /\xe9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a space before the method": (b" GET / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a method in lower case": (b"get / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a version in lower case": (b"GET / http/1.1\r\nHost: x\r\n\r\n", 400),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n", 501),
    "a target without a slash": (b"GET a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "another scheme": (b"GET ftp://x/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a path outside UTF-8": (b"GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "a path cut in a character": (b"GET /%c3?a HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "NUL in the path": (b"GET /%00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: x\r\n\r\n", 505),
    "HTTP/0.9": (b"GET / HTTP/0.9\r\n\r\n", 505),
    "TLS": (bytes.fromhex("16030100f8010000f4030300") + b"\r\n\r\n", 400),
    # Host: what the driver's check against DNS rebinding rests on.
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "a list of hosts": (b"GET / HTTP/1.1\r\nHost: x, y\r\n\r\n", 400),
    "a host with a path": (b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "a host with a user": (b"GET / HTTP/1.1\r\nHost: a@x\r\n\r\n", 400),
    "a host unlike the target's": (b"GET http://y/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
}


@pytest.mark.parametrize(("raw", "status"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_shape_is_malformed_for_every_split(raw: bytes, status: int) -> None:
    last = events_however_split(raw, eof=False)[-1]
    assert isinstance(last, Malformed)
    assert last.status == status


def test_nothing_follows_a_refusal() -> None:
    conn = Connection(LIMITS)
    conn.receive_data(b"GET /\r\n\r\n" + GET)
    first = conn.next_event()
    conn.receive_data(GET)
    assert conn.num_buffered == 0
    assert conn.next_event() is first
    conn.receive_data(EOF)
    assert conn.next_event() is first
    assert conn.num_buffered == 0
    assert not conn.keep_alive


def test_a_tls_handshake_is_refused_at_its_first_byte() -> None:
    [event] = events_of([b"\x16"])
    assert isinstance(event, Malformed)
    assert "TLS" in event.message


@pytest.mark.parametrize("raw", [b"\0", b" ", b"\n", b"\rG"])
def test_an_impossible_first_byte_is_refused_before_the_end_of_its_line(raw: bytes) -> None:
    assert events_of([raw]) == [Malformed(400, "illegal request line")]


def test_a_refusal_does_not_quote_the_peer() -> None:
    [event] = events_of([POST + b"Authorization : Bearer sk-secret\r\n\r\n"])
    assert event == Malformed(400, "illegal header line")


# -- limits ---------------------------------------------------------------------------------


def head_of_size(num_bytes: int) -> bytes:
    fixed = len(POST) + len(b"A: \r\n\r\n")
    return POST + b"A: " + b"a" * (num_bytes - fixed) + b"\r\n\r\n"


def test_a_header_may_fill_its_limit_and_not_exceed_it() -> None:
    limits = Limits(max_header_bytes=100)
    assert isinstance(events_however_split(head_of_size(100), limits)[0], Head)
    assert events_however_split(head_of_size(101), limits) == [
        Malformed(431, "request header too large")
    ]
    assert events_however_split(head_of_size(300), limits) == [
        Malformed(431, "request header too large")
    ]


def test_a_request_line_longer_than_the_header_may_be_is_414() -> None:
    line = b"GET /" + b"a" * 200 + b" HTTP/1.1\r\n"
    limits = Limits(max_header_bytes=100)
    assert events_however_split(line, limits) == [Malformed(414, "request line too large")]


def test_empty_lines_count_as_header() -> None:
    limits = Limits(max_header_bytes=100)
    assert isinstance(events_however_split(b"\r\n" + head_of_size(98), limits)[0], Head)
    assert isinstance(events_however_split(b"\r\n" + head_of_size(99), limits)[0], Malformed)
    assert events_however_split(b"\r\n" * 51 + GET, limits) == [
        Malformed(431, "too many empty lines before the request")
    ]


def test_the_header_limit_applies_to_each_request() -> None:
    limits = Limits(max_header_bytes=100)
    events = events_however_split((b"\r\n" + head_of_size(98)) * 3, limits)
    assert [type(event) for event in events] == [Head, Body] * 3


def test_a_sized_body_may_fill_its_limit_and_a_larger_one_is_refused_at_its_head() -> None:
    assert events_however_split(POST + b"Content-Length: 32\r\n\r\n" + b"x" * 32)[1:] == [
        Body(b"x" * 32)
    ]
    assert events_however_split(POST + b"Content-Length: 33\r\n\r\n") == [
        Malformed(413, "the body is larger than 32 bytes")
    ]


def test_a_chunked_body_may_fill_its_limit_and_not_exceed_it() -> None:
    full = CHUNKED + b"10\r\n" + b"x" * 16 + b"\r\n10\r\n" + b"y" * 16 + b"\r\n"
    assert events_however_split(full + b"0\r\n\r\n")[1:] == [Body(b"x" * 16 + b"y" * 16)]
    too_large = Malformed(413, "the body is larger than 32 bytes")
    assert events_however_split(full + b"1\r\nz\r\n0\r\n\r\n")[1:] == [too_large]
    assert events_of([CHUNKED + b"21\r\n"])[1:] == [too_large]
    assert events_of([CHUNKED + b"f" * 16 + b"\r\n"])[1:] == [too_large]


def test_trailers_may_fill_the_header_limit_and_not_exceed_it() -> None:
    limits = Limits(max_header_bytes=100)
    body = CHUNKED + b"0\r\n"
    fits = body + b"A: " + b"a" * 93 + b"\r\n\r\n"
    assert events_however_split(fits, limits)[1:] == [Body(b"")]
    exceeds = body + b"A: " + b"a" * 94 + b"\r\n\r\n"
    assert events_however_split(exceeds, limits)[1:] == [Malformed(431, "request header too large")]


def test_the_number_of_fields_is_bounded_in_headers_and_trailers() -> None:
    limits = Limits(max_fields=5)
    too_many = Malformed(431, "too many header fields")
    line = b"GET / HTTP/1.1\r\nHost: x\r\n"
    assert events_of([line + b"a:\r\n" * 4 + b"\r\n"], limits)[1] == Body(b"")
    assert events_however_split(line + b"a:\r\n" * 5 + b"\r\n", limits) == [too_many]
    body = CHUNKED + b"0\r\n"
    assert events_however_split(body + b"a:\r\n" * 5 + b"\r\n", limits)[1:] == [Body(b"")]
    assert events_however_split(body + b"a:\r\n" * 6 + b"\r\n", limits)[1:] == [too_many]


def test_chunk_lines_are_bounded() -> None:
    limits = Limits(max_header_bytes=10_000)
    for num_bytes, expected in ((4096, Body(b"a")), (4097, Malformed(400, "chunk line too long"))):
        line = b"1;" + b"e" * (num_bytes - 4) + b"\r\n"
        raw = CHUNKED + line + b"a\r\n0\r\n\r\n"
        for pieces in ([raw], cut(raw, *range(1, len(raw))), cut(raw, len(CHUNKED) + 4096)):
            assert events_of(pieces, limits)[1:] == [expected]


def test_chunk_extensions_are_bounded_in_sum() -> None:
    limits = Limits(max_header_bytes=100)
    chunk = b"1;" + b"e" * 49 + b"\r\na\r\n"
    assert events_however_split(CHUNKED + chunk * 2 + b"0\r\n\r\n", limits)[1:] == [Body(b"aa")]
    assert events_however_split(CHUNKED + chunk * 2 + b"0;\r\n\r\n", limits)[1:] == [
        Malformed(400, "chunk extensions too large")
    ]


# -- 100-continue ---------------------------------------------------------------------------

EXPECTING = POST + b"Content-Length: 3\r\nExpect: 100-continue\r\n\r\n"


def test_a_client_that_waits_gets_one_100() -> None:
    conn = after(EXPECTING, is_body_read=False)
    assert conn.next_event() is Signal.NEED_DATA
    assert conn.continue_100() == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert conn.continue_100() == b""
    conn.receive_data(b"abc")
    assert conn.next_event() == Body(b"abc")
    assert read_back(conn.respond(200, [], b"ok")).body == b"ok"
    assert conn.start_next_cycle()


def test_a_chunked_client_that_waits_gets_its_100_too() -> None:
    conn = after(
        POST + b"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n", is_body_read=False
    )
    assert conn.continue_100() == b"HTTP/1.1 100 Continue\r\n\r\n"


def test_no_100_after_the_first_bytes_of_the_body() -> None:
    conn = after(EXPECTING + b"a", is_body_read=False)
    assert conn.continue_100() == b""
    assert conn.next_event() is Signal.NEED_DATA
    assert conn.continue_100() == b""
    conn.receive_data(b"bc")
    assert conn.next_event() == Body(b"abc")
    assert conn.continue_100() == b""


def test_no_100_after_a_started_response_or_a_failed_request() -> None:
    conn = after(EXPECTING, is_body_read=False)
    conn.start_stream(200, [])
    assert conn.continue_100() == b""
    failed = after(EXPECTING, is_body_read=False)
    failed.receive_data(EOF)
    assert isinstance(failed.next_event(), Malformed)
    assert failed.continue_100() == b""


@pytest.mark.parametrize(
    "raw",
    [
        GET,
        POST + b"Content-Length: 3\r\n\r\n",
        POST + b"Content-Length: 0\r\nExpect: 100-continue\r\n\r\n",
        b"POST / HTTP/1.0\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n",
        POST + b"Content-Length: 3\r\nExpect: 200-ok\r\n\r\n",
    ],
)
def test_a_client_that_does_not_wait_gets_no_100(raw: bytes) -> None:
    assert not only_head(raw).expects_continue
    assert after(raw, is_body_read=False).continue_100() == b""


# -- responses ------------------------------------------------------------------------------


def test_a_response_reads_back_with_its_length_and_the_headers_as_given() -> None:
    conn = after(GET)
    fields = [("X-Case", "a \xe9"), ("set-cookie", "1"), ("set-cookie", "2")]
    (raw,) = conn.respond(404, fields, b"no")
    assert raw.startswith(b"HTTP/1.1 404 Not Found\r\nX-Case: a \xe9\r\n")
    response = read_back(raw)
    assert (response.status, response.body) == (404, b"no")
    assert response.values(b"content-length") == [b"2"]
    assert response.values(b"set-cookie") == [b"1", b"2"]
    assert response.values(b"connection") == []
    assert conn.is_response_started
    assert conn.is_response_complete
    assert conn.start_next_cycle()
    assert not conn.is_response_started


def test_an_empty_response_has_length_zero() -> None:
    assert read_back(after(GET).respond(200, [])).values(b"content-length") == [b"0"]


def test_a_response_to_head_has_the_length_and_not_the_body() -> None:
    conn = after(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    response = read_back(conn.respond(200, [], b"hello"), "HEAD")
    assert (response.body, response.values(b"content-length")) == (b"", [b"5"])
    assert conn.start_next_cycle()


@pytest.mark.parametrize("status", [204, 304])
def test_a_bodiless_status_has_neither_body_nor_length(status: int) -> None:
    conn = after(GET)
    response = read_back(conn.respond(status, [], b"dropped"))
    assert (response.status, response.body) == (status, b"")
    assert response.values(b"content-length") == []
    assert response.values(b"transfer-encoding") == []
    assert conn.start_next_cycle()


def test_a_stream_is_one_chunk_a_frame_and_keeps_the_connection() -> None:
    conn = after(GET)
    raw = conn.start_stream(200, [("content-type", "text/event-stream")])
    assert conn.is_response_started
    assert not conn.is_response_complete
    assert conn.stream_data(b"") == b""
    for frame in (b"one", b"twenty-six characters long", b"3"):
        sent = conn.stream_data(frame)
        assert sent == b"%x\r\n%b\r\n" % (len(frame), frame)
        raw += sent
    raw += conn.end_stream()
    response = read_back(raw)
    assert response.body == b"onetwenty-six characters long3"
    assert response.num_data == 3
    assert response.values(b"transfer-encoding") == [b"chunked"]
    assert conn.is_response_complete
    assert conn.start_next_cycle()


def test_a_stream_for_head_is_its_head() -> None:
    conn = after(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    raw = conn.start_stream(200, [])
    assert conn.stream_data(b"hello") == b""
    assert conn.end_stream() == b""
    assert read_back(raw, "HEAD").body == b""
    assert conn.start_next_cycle()


def test_a_stream_for_http_1_0_is_not_chunked_and_ends_with_the_connection() -> None:
    conn = after(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    raw = conn.start_stream(200, [])
    assert conn.stream_data(b"hello") == b"hello"
    raw += b"hello" + conn.end_stream()
    response = read_back(raw, eof=True)
    assert response.body == b"hello"
    assert response.values(b"connection") == [b"close"]
    assert response.values(b"transfer-encoding") == []
    assert not conn.start_next_cycle()


@pytest.mark.parametrize(
    ("request_headers", "keeps", "answer"),
    [
        (b"HTTP/1.1\r\nHost: x\r\n", True, []),
        (b"HTTP/1.1\r\nHost: x\r\nConnection: keep-alive\r\n", True, []),
        (b"HTTP/1.1\r\nHost: x\r\nConnection: TE, Close\r\n", False, [b"close"]),
        (b"HTTP/1.1\r\nHost: x\r\nConnection: TE\r\nConnection: close\r\n", False, [b"close"]),
        (b"HTTP/1.0\r\n", False, [b"close"]),
        (b"HTTP/1.0\r\nConnection: Keep-Alive\r\n", True, [b"keep-alive"]),
        (b"HTTP/1.0\r\nConnection: keep-alive, close\r\n", False, [b"close"]),
    ],
)
def test_the_connection_is_kept_as_the_client_asks(
    request_headers: bytes, keeps: bool, answer: list[bytes]
) -> None:
    conn = after(b"GET / " + request_headers + b"\r\n")
    response = read_back(conn.respond(200, [], b"ok"))
    assert response.values(b"connection") == answer
    assert conn.keep_alive is keeps
    assert conn.start_next_cycle() is keeps


def test_a_kept_http_1_0_connection_serves_the_next_request() -> None:
    request = b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi"
    assert events_however_split(request * 2)[1::2] == [Body(b"hi"), Body(b"hi")]


def test_a_close_header_of_the_application_is_kept() -> None:
    conn = after(GET)
    response = read_back(conn.respond(503, [("Connection", "close")]))
    assert response.values(b"connection") == [b"close"]
    assert not conn.start_next_cycle()


@pytest.mark.parametrize("raw", [POST + b"Content-Length: 3\r\n\r\n", CHUNKED, CHUNKED + b"0\r\n"])
def test_a_response_before_the_body_closes(raw: bytes) -> None:
    conn = after(raw, is_body_read=False)
    assert not conn.keep_alive
    response = read_back(conn.respond(401, [], b"key?"), "POST")
    assert (response.status, response.values(b"connection")) == (401, [b"close"])
    assert not conn.start_next_cycle()


def test_a_response_before_the_body_closes_even_if_the_body_follows() -> None:
    conn = after(POST + b"Content-Length: 3\r\n\r\n", is_body_read=False)
    raw = conn.start_stream(200, [])
    conn.receive_data(b"abc")
    assert conn.next_event() == Body(b"abc")
    raw += conn.stream_data(b"x") + conn.end_stream()
    assert read_back(raw, "POST").values(b"connection") == [b"close"]
    assert not conn.keep_alive


def test_a_response_at_the_head_of_a_bodiless_request_keeps_the_connection() -> None:
    conn = after(GET + GET, is_body_read=False)
    assert conn.keep_alive
    assert read_back(conn.respond(200, [])).values(b"connection") == []
    assert conn.start_next_cycle()
    assert isinstance(conn.next_event(), Head)


@pytest.mark.parametrize(
    "raw", [raw for raw, _ in REFUSED.values()] + [b"\x16\x03", head_of_size(600), GET[:9]]
)
def test_every_refusal_allows_one_response_and_closes(raw: bytes) -> None:
    conn = Connection(LIMITS)
    conn.receive_data(raw)
    if not isinstance(event := conn.next_event(), Malformed):
        event = conn.next_event()
    if event is Signal.NEED_DATA:
        conn.receive_data(EOF)
        event = conn.next_event()
    assert isinstance(event, Malformed)
    response = read_back(conn.respond(event.status, [], event.message.encode()))
    assert (response.status, response.body) == (event.status, event.message.encode())
    assert response.values(b"connection") == [b"close"]
    assert conn.is_response_complete
    assert conn.respond(500, []) == []
    assert not conn.start_next_cycle()


def test_a_refusal_during_a_stream_adds_no_second_response() -> None:
    conn = after(CHUNKED, is_body_read=False)
    raw = conn.start_stream(200, [])
    conn.receive_data(b"what?\r\n")
    assert isinstance(conn.next_event(), Malformed)
    assert conn.respond(400, []) == []
    assert not conn.is_response_complete
    raw += conn.stream_data(b"bye") + conn.end_stream()
    assert read_back(raw, "POST").body == b"bye"


@pytest.mark.parametrize(
    "headers",
    [
        [("a", "b\r\nc: d")],
        [("a", "b\n")],
        [("a", "b\0")],
        [("a", " b")],
        [("a", "日")],
        [("a b", "c")],
        [("a\r\nb", "c")],
        [("", "c")],
        [("Content-Length", "3")],
        [("transfer-encoding", "chunked")],
        [("connection", "keep-alive")],
    ],
)
def test_a_header_that_would_split_the_response_fails_an_assertion(
    headers: Sequence[tuple[str, str]],
) -> None:
    with pytest.raises(AssertionError):
        after(GET).respond(200, headers)
    with pytest.raises(AssertionError):
        after(GET).start_stream(200, headers)


def test_sending_in_the_wrong_state_fails_an_assertion() -> None:
    conn = after(GET)
    with pytest.raises(AssertionError):
        conn.stream_data(b"x")
    with pytest.raises(AssertionError):
        conn.end_stream()
    with pytest.raises(AssertionError):
        conn.start_next_cycle()
    conn.respond(200, [])
    with pytest.raises(AssertionError):
        conn.respond(200, [])
    conn.receive_data(EOF)
    with pytest.raises(AssertionError):
        conn.receive_data(b"x")


def test_the_repr_has_the_state() -> None:
    conn = Connection(LIMITS)
    assert repr(conn) == (
        "<http1.Connection HEAD request=none response=IDLE num_buffered=0 keep_alive=True>"
    )
    conn.receive_data(POST + b"Content-Length: 3\r\n\r\nabcGET")
    conn.next_event()
    conn.next_event()
    conn.start_stream(200, [])
    conn.receive_data(EOF)
    assert repr(conn) == (
        "<http1.Connection DONE request=POST '/' response=SEND_BODY num_buffered=3"
        " keep_alive=True eof>"
    )


# -- anything at all ------------------------------------------------------------------------

FRAGMENTS = [
    *(raw for raw, _ in REFUSED.values()),
    *(raw for raw, *_ in UNDERSTOOD.values()),
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"0\r\n", b"5\r\n", b";", b"HTTP/1.1", b"\x16"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", POST, CHUNKED),
]
anything = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.binary(max_size=4)), max_size=6).map(
        b"".join
    ),
)


@given(raw=anything, seed=st.integers(0, 2**16), eof=st.booleans())
@example(raw=b"", seed=0, eof=True)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_any_bytes_give_the_same_events_in_any_pieces_and_never_raise(
    raw: bytes, seed: int, eof: bool
) -> None:
    end = [EOF] if eof else []
    whole = events_of([*cut(raw), *end])
    rng = random.Random(seed)
    places = [rng.randrange(len(raw)) for _ in range(rng.randrange(9))] if raw else []
    assert events_of([*cut(raw, *places), *end]) == whole
    assert events_of([*cut(raw, *range(1, len(raw))), *end]) == whole
    kinds = [type(event) for event in whole if event is not Signal.CLOSED]
    if kinds and kinds[-1] is Malformed:
        kinds.pop()
    assert kinds == [Head, Body] * (len(kinds) // 2) + [Head] * (len(kinds) % 2)


@given(body=st.binary(max_size=32), sizes=st.lists(st.integers(1, 9), max_size=40))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_chunked_body_of_an_h11_client_is_decoded(body: bytes, sizes: list[int]) -> None:
    client = h11.Connection(h11.CLIENT)
    headers = [("Host", "x"), ("Transfer-Encoding", "chunked")]
    raw = client.send(h11.Request(method="POST", target="/", headers=headers))
    rest = body
    for size in [*sizes, len(body)]:
        raw += client.send(h11.Data(data=rest[:size]))
        rest = rest[size:]
    raw += client.send(h11.EndOfMessage())
    assert events_of([raw])[1:] == [Body(body)]


# -- server-sent events ---------------------------------------------------------------------


def test_sse_frames() -> None:
    assert sse_data(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert sse_event("message_stop", b"{}") == b"event: message_stop\ndata: {}\n\n"
    assert sse_event("response.done", b"{}") == b"event: response.done\ndata: {}\n\n"
    assert sse_comment() == b": \n\n"
    assert sse_comment("prefill 3/9") == b": prefill 3/9\n\n"
    assert sse_field("error", b"{}") == b"error: {}\n\n"
    assert SSE_DONE == b"data: [DONE]\n\n"


def test_a_line_break_inside_a_frame_fails_an_assertion() -> None:
    for bad in (b"a\nb", b"a\rb"):
        for make in (
            sse_data,
            lambda p: sse_event("e", p),
            lambda p: sse_field("f", p),
        ):
            with pytest.raises(AssertionError):
                make(bad)
    with pytest.raises(AssertionError):
        sse_comment("a\n\ndata: b")
    with pytest.raises(AssertionError):
        sse_event("a\nb", b"{}")


def test_the_parser_imports_neither_asyncio_nor_sockets_nor_clocks() -> None:
    tree = ast.parse(Path(parser.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert not imported & {"asyncio", "socket", "ssl", "time", "datetime", "mlxlite"}
    assert "h11" in imported
