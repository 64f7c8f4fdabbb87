"""Hostile HTTP, over real sockets: each gets its status or a clean close, and the server serves on.

`test_http1` proves the protocol's refusals without a socket, at every split; here it is shown that
they cost the server nothing: a well-formed error, a closed connection, and the very next ordinary
request on a new connection is answered. Then anything at all, from a fuzzer, over everything that
reads a client's bytes; `python -m tests.robustness.fuzz` runs millions of inputs.
"""

import asyncio
import json
import logging
import random
import resource
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    Answer,
    Clock,
    Served,
    Wire,
    chat_request,
    in_a_loop,
    pass_time,
    request,
    serving,
    text_of,
    until,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlite.api.endpoints.chat_completions import FIELDS
from mlxlite.http import connection
from mlxlite.http.connection import (
    BODY_TIMEOUT_S,
    HEADER_TIMEOUT_S,
    KEEP_ALIVE_S,
    MAX_BODIES,
    Client,
)
from mlxlite.models.interface import PromptError
from tests.robustness.fuzz import PARSERS, SEEDS, TARGETS, mutated

CHAT = "/v1/chat/completions"
SECOND = request("GET", "/health")  # what would be smuggled
CRLF = b"\r\n"


async def assert_serves_on(served: Served) -> None:
    """The next ordinary request, on a new connection."""
    async with await served.wire() as wire:
        answer = await asyncio.wait_for(wire.chat("hello"), 5)
        assert answer.json["choices"][0]["message"]["content"] == "hello"


def assert_at_rest(served: Served) -> None:
    load = served.engine.load
    assert (load.num_waiting, load.num_running, load.num_bytes) == (0, 0, 0)
    assert served.num_live == 0
    assert served.num_held_bytes == 0
    assert not served.server.service.running
    assert not served.runner.prompts


@asynccontextmanager
async def besieged(caplog: pytest.LogCaptureFixture, **config: Any) -> AsyncIterator[Served]:
    """A server that serves on afterwards, is at rest, and has logged no error."""
    async with serving(**config) as served:
        yield served
        await assert_serves_on(served)
        await until(lambda: served.num_clients == 0, "every connection is closed")
        await until(lambda: not served.runner.prompts, "every row is free")
        assert_at_rest(served)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def refusal(wire: Wire, raw: bytes) -> Answer:
    """The answer to broken HTTP: one error, and then nothing more."""
    await wire.send(raw)
    answer = await asyncio.wait_for(wire.answer(), 5)
    assert answer.error["code"] == "malformed_request"
    assert answer.error["type"] == "invalid_request_error"
    assert answer["connection"] == "close"
    assert answer["x-request-id"]
    assert await wire.is_cut(), "a second answer would be the smuggled request's"
    return answer


# --- smuggling ----------------------------------------------------------------------------------

POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"

SMUGGLED = {
    "CL.TE": POST + b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "TE.CL": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + SECOND,
    "TE.TE, the second unknown": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n0\r\n\r\n"
    + SECOND,
    "a coding in other letters": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a coding behind a tab": POST + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a coding before a colon with space": POST
    + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"
    + SECOND,
    "a coding in HTTP/1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n" + SECOND,
    "two lengths that differ": POST + b"Content-Length: 0\r\nContent-Length: 40\r\n\r\n" + SECOND,
    "two lengths that agree": POST + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n" + SECOND,
    "a list of lengths": POST + b"Content-Length: 0, 40\r\n\r\n" + SECOND,
    "a length with a sign": POST + b"Content-Length: +40\r\n\r\n" + SECOND,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + SECOND,
    "a length in hexadecimal": POST + b"Content-Length: 0x28\r\n\r\n" + SECOND,
    "a length of 21 digits": POST + b"Content-Length: " + b"9" * 21 + CRLF * 2 + SECOND,
    "a folded coding": POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a folded field": POST + b"X: a\r\n\tContent-Length: 40\r\n\r\n" + SECOND,
    "a bare CR in a field": POST + b"X: a\rContent-Length: 40\r\n\r\n" + SECOND,
    "a bare LF between fields": POST + b"X: a\nContent-Length: 40\r\n\r\n" + SECOND,
    "NUL in a field": POST + b"X: a\0b\r\n\r\n" + SECOND,
    "a chunk size with a sign": CHUNKED + b"+0\r\n\r\n" + SECOND,
    "a chunk size with 0x": CHUNKED + b"0x0\r\n\r\n" + SECOND,
    "a chunk size with an underscore": CHUNKED + b"0_0\r\n\r\n" + SECOND,
    "a chunk size with a space": CHUNKED + b"0 \r\n\r\n" + SECOND,
    "a chunk size of 65 bits": CHUNKED + b"10000000000000002\r\n{}\r\n0\r\n\r\n" + SECOND,
    "a chunk size that is none": CHUNKED + b"two\r\n{}\r\n0\r\n\r\n" + SECOND,
    "a chunk longer than its size": CHUNKED + b"1\r\n{}\r\n0\r\n\r\n" + SECOND,
    "a chunk shorter than its size": CHUNKED + b"3\r\n{}\r\n0\r\n\r\n" + SECOND,
    "an extension with a bare LF": CHUNKED + b"0;\n\r\n\r\n" + SECOND,
    "a last chunk that ends with LF": CHUNKED + b"0\n\n" + SECOND,
    "a trailer that is a request": CHUNKED + b"0\r\n" + SECOND,
    "a space before the first field": b"GET / HTTP/1.1\r\n X: y\r\n\r\n" + SECOND,
}


@pytest.mark.parametrize("raw", SMUGGLED.values(), ids=SMUGGLED)
def test_a_smuggled_request_is_never_answered(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            assert (await refusal(wire, raw)).status in (400, 501)
            assert served.runner.admitted == []

    test()


# --- what is not HTTP/1.1 -----------------------------------------------------------------------


def client_hello() -> bytes:
    """What a browser sends first where it expects TLS."""
    sent = ssl.MemoryBIO()
    context = ssl.create_default_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname="localhost").do_handshake()
    return sent.read()


FOREIGN = {
    "TLS": (client_hello(), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 505),
    "HTTP/2 upgrade without a host": (b"GET / HTTP/1.1\r\nUpgrade: h2c\r\n\r\n", 400),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400),
    "HTTP/0.9 with its number": (b"GET /health HTTP/0.9\r\n\r\n", 505),
    "HTTP/3": (b"GET /health HTTP/3.0\r\nHost: localhost\r\n\r\n", 505),
    "SSH": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400),
    "SMTP": (b"EHLO example.org\r\n\r\n", 400),
    "Redis": (b"*1\r\n$4\r\nPING\r\n\r\n", 400),
    "the PROXY protocol": (b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n" + SECOND, 400),
    "the PROXY protocol, second version": (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", 400),
    "SOCKS": (b"\5\1\0", 400),
    "NULs": (b"\0" * 64, 400),
    "a bare LF": (b"GET / HTTP/1.1\nHost: localhost\n\n", 400),
    "CONNECT": (b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n", 501),
    "an emoji": ("🙂 / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), 400),
    "garbage": (random.Random(1).randbytes(4096) + CRLF * 2, 400),
}


@pytest.mark.parametrize(("raw", "status"), FOREIGN.values(), ids=FOREIGN)
def test_another_protocol_is_refused_with_an_http_error(
    raw: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            assert (await refusal(wire, raw)).status == status

    test()


@pytest.mark.parametrize("raw", [b"GET /health\r\n", b"\xff\xfe garbage", b"GET / HTTP/1.1\r\nHo"])
def test_endless_input_is_cut_without_an_answer(
    raw: bytes, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            await wire.send(raw)
            await until(lambda: any(c.http.num_buffered for c in served.clients))
            await assert_serves_on(served)
            await pass_time(served, clock, HEADER_TIMEOUT_S + 1)
            assert await wire.is_cut()

    test()


def test_garbage_is_refused_or_dropped_and_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    @in_a_loop
    async def test() -> None:
        rng = random.Random(8)
        async with besieged(caplog) as served:
            for _ in range(150):
                seed = rng.choice([SECOND, chat_request("x"), chat_request("x", stream=True)])
                raw = rng.randbytes(rng.randrange(1, 400))
                raw = raw if rng.random() < 0.3 else mutated(seed, rng)
                for status, body in answers_in(await said_to(served, raw)):
                    assert status != 500, raw
                    assert 200 <= status <= 505
                    if status >= 400:
                        assert json.loads(body)["error"]["message"]

    test()


async def said_to(served: Served, raw: bytes) -> bytes:
    """All bytes up to the end, which the server sends because the client has."""
    async with await served.wire() as wire:
        with suppress(ConnectionError):
            await wire.send(raw)
            wire._writer.write_eof()
            return await asyncio.wait_for(wire._reader.read(), 5)
    return b""


def answers_in(said: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each whole answer; streams are left out with what is behind them."""
    answers = []
    while said:
        head, end, said = said.partition(CRLF * 2)
        assert end, "an answer breaks off in its head"
        line, *fields = head.decode("latin-1").split("\r\n")
        version, status, _ = line.split(" ", 2)
        assert version == "HTTP/1.1"
        length = [f.partition(":")[2] for f in fields if f.lower().startswith("content-length:")]
        if not length:
            break
        answers.append((int(status), said[: int(length[0])]))
        said = said[int(length[0]) :]
    return answers


# --- targets ------------------------------------------------------------------------------------

TARGET_LINES: dict[str, tuple[bytes, int]] = {
    "NUL": (b"/%00", 400),
    "NUL in a name": (b"/v1/models/a%00b", 400),
    "not UTF-8": (b"/%ff", 400),
    "half a character": (b"/%c3", 400),
    "a surrogate": (b"/%ed%a0%80", 400),
    "an overlong slash": (b"/%c0%af", 400),
    "a raw byte": (b"/\xff", 400),
    "a raw byte in the query": (b"/health?\xff", 400),
    "a raw space": (b"/health /", 400),
    "no slash": (b"health", 400),
    "a fragment": (b"/health#x", 404),
    "a percent sign": (b"/%", 404),
    "a character outside ASCII": (b"/caf%C3%A9", 404),
    "line breaks": (b"/health%0d%0aSet-Cookie:%20x", 404),
    "two slashes": (b"//health", 200),
    "upwards": (b"/../health", 404),
    "upwards in escapes": (b"/%2e%2e/%2e%2e/etc/passwd", 404),
    "very long": (b"/" + b"a" * 60_000, 404),
    "very long in escapes": (b"/" + b"%41" * 20_000, 404),
    "a star": (b"*", 404),
    "absolute": (b"http://localhost/health", 200),
    "absolute in capitals": (b"HTTP://LOCALHOST/health", 200),
    "absolute without a path": (b"http://localhost", 200),
    "absolute, of another host": (b"http://evil.example/health", 400),
    "absolute, with a user": (b"http://localhost@evil.example/health", 400),
    "absolute, of another scheme": (b"ftp://localhost/health", 400),
    "a query of nonsense": (b"/health?%00%ff&&==", 200),
}


@pytest.mark.parametrize(("target", "status"), TARGET_LINES.values(), ids=TARGET_LINES)
def test_a_strange_target_has_its_status(
    target: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            await wire.send(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await wire.answer()
            assert answer.status == status
            assert "set-cookie" not in answer
            if status != 200:
                assert len(answer.error["message"]) < 300
            if status != 400:  # the request was whole: the connection lives
                assert (await wire.get("/health")).status == 200

    test()


# --- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"x:\r\n" * 300 + CRLF, 431),
        (b"GET /" + b"x" * 70_000, 414),
        (CRLF * 40_000, 431),
        (POST + b"Content-Length: 1048577\r\n\r\n", 413),
        (POST + b"Content-Length: 18446744073709551616\r\n\r\n", 413),
        (CHUNKED + b"100001\r\n", 413),
        (CHUNKED + b"80000\r\n" + b" " * 0x80000 + b"\r\n80001\r\n", 413),
        (CHUNKED + b"1;" + b"x" * 5000, 400),
        (CHUNKED + b"0\r\n" + b"x: y\r\n" * 20_000, 431),
    ],
    ids=lambda value: repr(value[:70]) if isinstance(value, bytes) else str(value),
)
def test_a_too_large_request_is_refused_and_its_sender_can_read_the_refusal(
    raw: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog, max_body_mb=1) as served, await served.wire() as wire:
            sending = asyncio.ensure_future(wire.send(raw + b"x" * (3 << 20)))
            answer = await asyncio.wait_for(wire.answer(), 5)
            assert answer.status == status
            assert answer.error["code"] == "malformed_request"
            assert answer["connection"] == "close"
            (client,) = served.clients
            assert client.http.num_buffered == 0, "what follows it is dropped"
            with suppress(ConnectionError):
                await sending

    test()


async def _upload(served: Served, wire: Wire, num_bytes: int) -> None:
    """Most of a body of the largest size, once its head has been read."""
    num_busy = sum(client.is_busy for client in served.clients)
    await wire.send(POST + b"Content-Length: 1048576\r\n\r\n")
    await until(lambda: sum(client.is_busy for client in served.clients) > num_busy)
    await wire.send(b" " * num_bytes)


def test_bodies_are_bounded_together_and_small_requests_are_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog, max_body_mb=1) as served:
            wires = [await served.wire() for _ in range(MAX_BODIES + 1)]
            for n, wire in enumerate(wires[:-1], 1):
                await _upload(served, wire, 1_040_000 + n)
                await until(lambda n=n: served.num_held_bytes > n * 1_040_000)
            await _upload(served, wires[-1], 1_048_000)
            assert (await wires[-2].answer()).status == 503, "the largest so far"
            await until(lambda: served.num_held_bytes >= 7 * 1_040_000 + 1_048_000)
            await assert_serves_on(served)
            room = (MAX_BODIES << 20) - served.num_held_bytes
            said = "x" * (room + 1000)
            raw = chat_request(said, max_tokens=1)
            async with await served.wire() as wire:
                await wire.send(raw[:100])
                await until(lambda: any(c.http.num_buffered for c in served.clients))
                await wire.send(raw[100:300])
                await until(lambda: sum(c.is_busy for c in served.clients) == 9)
                await wire.send(raw[300:])
                answer = await wire.answer()
                assert answer.json["choices"][0]["message"]["content"] == "x"
            answer = await wires[-1].answer()
            assert answer.status == 503, "the largest now"
            assert answer["retry-after"] == "5"
            assert answer["connection"] == "close"
            assert served.num_held_bytes == 7 * 1_040_000 + sum(range(8))
            for wire in wires:
                await wire.close()

    test()


def _busy(served: Served) -> list[Client]:
    return [client for client in served.clients if client.is_busy]


def test_a_body_counts_until_it_is_read(caplog: pytest.LogCaptureFixture) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog, max_body_mb=1) as served:
            served.model.gate.clear()
            large = chat_request("x" * 1_040_000)
            wires = [await served.wire() for _ in range(9)]
            head, body = large[:300], large[300:]
            for num, wire in enumerate(wires[:8], 1):
                await wire.send(head)
                await until(lambda num=num: len(_busy(served)) == num)
                await wire.send(body)
                await until(lambda num=num: served.num_held_bytes == num * len(body))
            assert not any(client.num_waiting_bytes for client in _busy(served))
            await wires[8].send(head)
            await until(lambda: len(_busy(served)) == 9)
            await wires[8].send(body[:-1])
            assert (await wires[8].answer()).status == 503
            served.model.render_error = PromptError("not this one")
            served.model.gate.set()
            for wire in wires[:8]:
                assert (await wire.answer()).status == 400
            await until(lambda: served.num_held_bytes == 0)
            served.model.render_error = None
            for wire in wires:
                await wire.close()

    test()


# --- JSON ---------------------------------------------------------------------------------------

_TURN = b'[{"role":"user","content":%b}]'
BODIES = {  # with a place for the text, and one for more fields
    CHAT: b'{"messages":' + _TURN + b"%b}",
    "/v1/messages": b'{"max_tokens":9,"messages":' + _TURN + b"%b}",
    "/v1/messages/count_tokens": b'{"messages":' + _TURN + b"%b}",
    "/v1/completions": b'{"prompt":%b%b}',
    "/v1/responses": b'{"input":%b%b}',
    "/v1/embeddings": b'{"input":%b%b}',
    "/tokenize": b'{"content":%b%b}',
}
DEEP = 10_000
BAD_JSON = {
    "a raw NUL": (b'"a\0b"', b""),
    "not UTF-8": (b'"\xff"', b""),
    "an overlong character": (b'"\xc0\x80"', b""),
    "a surrogate in UTF-8": (b'"\xed\xa0\x80"', b""),
    "a lone high surrogate": (rb'"\ud800"', b""),
    "a lone low surrogate": (rb'"a\udfff"', b""),
    "surrogates in the wrong order": (rb'"\ude42\ud83d"', b""),
    "10,000 arrays": (b"[" * DEEP + b"]" * DEEP, b""),
    "10,000 objects in an unknown field": (
        b'"a"',
        b',"x":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    ),
    "10,000 arrays that never close": (b"[" * DEEP, b""),
    "NaN": (b'"a"', b',"temperature":NaN'),
    "Infinity": (b'"a"', b',"temperature":Infinity'),
    "-Infinity": (b'"a"', b',"x":-Infinity'),
    "a number beyond all bounds": (b'"a"', b',"temperature":1e400'),
    "a number of 5,000 digits": (b'"a"', b',"seed":' + b"9" * 5000),
    "a name that is not UTF-8": (b'"a"', b',"\xff":1'),
    "hexadecimal": (b'"a"', b',"seed":0x10'),
    "a comment": (b'"a"', b'/**/,"seed":1'),
    "single quotes": (b"'a'", b""),
    "a comma too many": (b'"a"', b","),
    "two million values": (b'"a"', b',"x":[' + b"[]," * (1 << 21) + b"1]"),
}


@pytest.mark.parametrize("path", BODIES)
def test_invalid_json_is_a_400_in_every_dialect_and_keeps_the_connection(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def refused(wire: Wire, body: bytes, name: str) -> None:
        answer = await asyncio.wait_for(wire.ask("POST", path, body), 10)
        assert answer.status == 400, name
        assert answer.json["error"]["type"] == "invalid_request_error", name
        assert 0 < len(answer.json["error"]["message"]) < 300, name
        assert ("request_id" in answer.json) is ("/messages" in path), name

    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            for name, given in BAD_JSON.items():
                await refused(wire, BODIES[path] % given, name)
            good = BODIES[path] % (b'"a"', b"")
            for raw in (
                b"",
                b"\xef\xbb\xbf" * 2 + good,
                good.decode().encode("utf-16"),
                good + good,
            ):
                await refused(wire, raw, repr(raw[:20]))
            assert (await wire.ask("POST", path, good)).status == 200
            assert served.num_clients == 1

    test()


@pytest.mark.parametrize("path", BODIES)
def test_numbers_that_are_too_large_for_their_field_are_a_400(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        numbers = [str(2**64), str(-(2**64)), "1" + "0" * 300, "1e308", "-1e308"]
        fields = ["temperature", "max_tokens", "top_k", "seed", "n", "priority"]
        async with besieged(caplog) as served, await served.wire() as wire:
            for name in fields:
                for number in numbers:
                    more = b',"%b":%b' % (name.encode(), number.encode())
                    answer = await wire.ask("POST", path, BODIES[path] % (b'"a"', more))
                    is_known = f"'{name}'" in answer.body.decode()
                    assert answer.status == (400 if is_known else 200), (name, number)
                    assert is_known or name in answer["x-mlxlite-ignored"]

    test()


@in_a_loop
async def test_of_two_equal_names_the_last_one_counts() -> None:
    async with serving() as served, await served.wire() as wire:
        turn = b'{"role":"user","content":"one","content":"two"}'
        body = b'{"messages":1,"messages":[' + turn + b'],"n":"x","n":1}'
        answer = await wire.ask("POST", CHAT, body)
        assert answer.json["choices"][0]["message"]["content"] == "two"


@in_a_loop
async def test_an_escaped_nul_and_any_character_are_returned_as_they_were_sent() -> None:
    async with serving() as served, await served.wire() as wire:
        said = "a\0b\u2028\u202e\ufeff\U0010ffff🙂\x7f\x1b[31m"
        assert (await wire.chat(said)).json["choices"][0]["message"]["content"] == said
        await wire.open_stream(said)
        assert text_of(await wire.rest()) == said


# --- slow, idle, half gone ----------------------------------------------------------------------


def test_a_hundred_dripping_heads_or_bodies_are_cut_and_delay_no_other_request(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as other:
            head, body = SECOND[:-4], chat_request("x")[:-20]
            wires = [await served.wire() for _ in range(100)]
            for i, wire in enumerate(wires):
                await wire.send(body if i % 2 else head)
            await until(lambda: sum(c.is_busy for c in served.clients) == 50)
            step_s = HEADER_TIMEOUT_S / 5
            for step in range(4):
                for wire in wires:
                    await wire.send(b" ")
                await pass_time(served, clock, step_s)
                assert served.num_clients == 101, step
                assert (await other.chat("hello")).status == 200
            await pass_time(served, clock, 2 * step_s)
            await until(lambda: served.num_clients == 51, "no byte has bought a head more time")
            await pass_time(served, clock, BODY_TIMEOUT_S + 1)
            for i, wire in enumerate(wires):
                if i % 2:
                    assert (await wire.answer()).status == 408
                await wire.close()
            assert (await other.chat("hello")).status == 200

    test()


@pytest.fixture
def many_files() -> None:
    """Room for 2 × 1,000 sockets in this process, if it may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            pytest.skip(f"only {hard} files may be open")
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_idle_connections_cost_a_stream_nothing_and_time_out(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        with ExitStack() as resources:
            await siege(resources)

    async def siege(resources: ExitStack) -> None:
        async with (
            besieged(caplog, max_connections=1001) as served,
            await served.wire() as wire,
        ):
            loop, num_tasks = asyncio.get_running_loop(), len(asyncio.all_tasks())
            idle = [resources.enter_context(closing(socket.socket())) for _ in range(1000)]
            for n, sock in enumerate(idle, 1):
                sock.connect(("127.0.0.1", served.server.port))  # the backlog takes it at once
                if n % 100 == 0:
                    await until(lambda n=n: served.num_clients == n + 1)
            for sock in idle[::2]:
                sock.sendall(SECOND)
            for sock in idle[::2]:
                sock.setblocking(False)
                assert (await loop.sock_recv(sock, 4096)).startswith(b"HTTP/1.1 200 ")
            assert served.num_clients == 1001
            assert len(asyncio.all_tasks()) == num_tasks, "an idle connection is no task"
            await wire.open_stream("hello")
            assert text_of(await wire.rest()) == "hello"
            async with await served.wire() as late:
                assert (await late.answer()).status == 503
            await pass_time(served, clock, HEADER_TIMEOUT_S + 1)
            await until(lambda: served.num_clients == 501, "those without any request")
            assert (await wire.chat("hello")).status == 200
            await pass_time(served, clock, KEEP_ALIVE_S - HEADER_TIMEOUT_S)
            await until(lambda: served.num_clients == 1, "those after one request")
            assert (await wire.chat("hello")).status == 200

    test()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        CRLF,
        SECOND[:10],
        SECOND[:-2],
        POST,
        chat_request("hello")[:-1],
        CHUNKED + b"5\r\nab",
        CHUNKED + b"0\r\n",
    ],
)
def test_half_a_request_before_eof_is_closed_without_an_answer(
    raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            await wire.send(raw)
            wire._writer.write_eof()
            assert await wire.is_cut()

    test()


@in_a_loop
async def test_complete_requests_before_eof_are_answered() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(SECOND * 3)
        wire._writer.write_eof()
        for _ in range(3):
            assert (await wire.answer()).status == 200
        assert await wire.is_cut()


@pytest.mark.parametrize("stream", [False, True])
def test_eof_during_generation_frees_the_row(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            await wire.send(chat_request(ENDLESS, stream=stream))
            await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
            wire._writer.write_eof()
            await until(lambda: served.num_live == 0)
            assert served.num_ended("abort") == 1

    test()


def test_a_reset_at_any_byte_of_a_request_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    @in_a_loop
    async def test() -> None:
        raw = chat_request("hello", stream=True)
        async with besieged(caplog) as served:
            for stop in range(0, len(raw) + 1, 7):
                wire = await served.wire()
                await wire.send(raw[:stop])
                wire.abort()
                await wire.close()

    test()


def test_a_client_that_stops_reading_a_stream_is_cut_at_the_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1 << 16)

    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served:
            served.model.width = 4096
            wire = await served.wire()
            sock = wire._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            wire._writer.transport.pause_reading()
            await wire.send(chat_request(ENDLESS, stream=True))
            await until(lambda: served.num_ended("abort") == 1, "it is cut")
            await wire.close()
            served.model.width = 1

    test()


# --- pipelines ----------------------------------------------------------------------------------


@in_a_loop
async def test_fifty_chats_in_one_packet_are_answered_in_their_order() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(b"".join(chat_request(f"number {i}", stream=i % 3 == 0) for i in range(50)))
        for i in range(50):
            if i % 3 == 0:
                await wire.head()
                frames = await wire.rest()
                assert text_of(frames) == f"number {i}"
                assert frames[-1] == DONE
            else:
                content = (await wire.answer()).json["choices"][0]["message"]["content"]
                assert content == f"number {i}"


@pytest.mark.parametrize("raw", [b"\x16\x03\x01", b"\0", b"NONSENSE\r\n\r\n", SMUGGLED["CL.TE"]])
def test_nonsense_behind_a_request_is_refused_after_its_answer(
    raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            await wire.send(chat_request("one") + SECOND + raw)
            assert (await wire.answer()).json["choices"][0]["message"]["content"] == "one"
            assert (await wire.answer()).json["status"] == "ok"
            assert (await wire.answer()).error["code"] == "malformed_request"
            assert await wire.is_cut()

    test()


def test_a_client_that_pipelines_without_reading_is_held_back_and_cut_after_a_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The next request waits until the answer before is read, so that no answers pile up."""
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.5)

    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served:
            wire = await served.wire()
            wire._writer.transport.pause_reading()
            sending = asyncio.ensure_future(wire.send(request("GET", "/metrics") * 20_000))
            await until(lambda: served.num_clients == 1)
            (client,) = served.clients
            await until(lambda: client.num_unsent_bytes > 0, "an answer waits")
            assert client.num_unsent_bytes < 1 << 16
            await until(lambda: client._transport.is_closing(), "it is cut")
            assert client.http.num_buffered < 20_000 * len(SECOND)
            assert served.server.metrics.num_cut["stalled"].number == 1
            with suppress(ConnectionError):
                await sending
            wire._writer.transport.resume_reading()
            await wire.close()

    test()


def test_a_client_that_pipelines_first_and_reads_later_gets_every_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1 << 14)

    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as wire:
            wire._writer.transport.pause_reading()
            sending = asyncio.ensure_future(wire.send(request("GET", "/metrics") * 1000))
            await until(lambda: any(client.num_unsent_bytes for client in served.clients))
            wire._writer.transport.resume_reading()
            for _ in range(1000):
                assert (await wire.answer()).status == 200
            await sending

    test()


def test_a_reset_in_mid_answer_affects_no_other_stream(caplog: pytest.LogCaptureFixture) -> None:
    @in_a_loop
    async def test() -> None:
        async with besieged(caplog) as served, await served.wire() as other:
            await other.open_stream("hello" + ENDLESS, max_tokens=1000)
            for _ in range(20):
                wire = await served.wire()
                linger = struct.pack("ii", 1, 0)
                sock = wire._writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                await wire.open_stream(ENDLESS)
                await wire.frame()
                await wire.close()
            frames = await other.rest()
            assert len(text_of(frames)) == 1000
            assert frames[-1] == DONE

    test()


# --- anything at all ----------------------------------------------------------------------------

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["text", "user", "function", "image_url", "auto", "json_schema", "data:"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(sorted(FIELDS)), inner, max_size=4)
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("name", PARSERS)
def test_what_the_fuzzer_starts_from_is_accepted(name: str) -> None:
    """So that its changes reach what is behind the first check."""
    parse, use = PARSERS[name]
    for body in SEEDS[name]:
        use(parse(body))


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutation_of_what_is_accepted_raises_what_is_not_documented(name: str) -> None:
    @BOUNDED
    @given(st.sampled_from(SEEDS[name]), st.integers(0, 2**32))
    def test(body: bytes, seed: int) -> None:
        TARGETS[name](mutated(body, random.Random(seed)))

    test()


@pytest.mark.parametrize("name", PARSERS)
def test_no_value_in_any_field_raises_what_is_not_documented(name: str) -> None:
    bodies = [json.loads(body) for body in SEEDS[name]]
    names = sorted({*FIELDS, *(field for body in bodies for field in body)})

    @BOUNDED
    @given(
        st.sampled_from(bodies),
        st.dictionaries(st.sampled_from(names), json_values, min_size=1, max_size=3),
    )
    def test(body: dict[str, Any], more: dict[str, Any]) -> None:
        TARGETS[name](json.dumps(body | more).encode())

    test()


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_at_all_raise_what_is_not_documented(name: str) -> None:
    @BOUNDED
    @given(st.binary(max_size=300))
    def test(data: bytes) -> None:
        TARGETS[name](data)

    test()
