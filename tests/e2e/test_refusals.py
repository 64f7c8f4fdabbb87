"""Refused requests: status, envelope, and whether the connection stays.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import json

import pytest
from helpers import chat_body, chat_request, in_a_loop, request, serving, until
from server_cases import CHAT

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(("path", "kind"), [(CHAT, "openai"), ("/v1/messages", "anthropic")])
@pytest.mark.parametrize("piece", [b"zz\r\n", b"%x\r\n" % ((1 << 20) + 1)])
def test_a_body_that_turns_into_nonsense_is_refused_in_its_own_dialect(
    path: str, kind: str, piece: bytes
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(max_body_mb=1) as served, await served.wire() as wire:
            fields = {"transfer_encoding": "chunked", "x_request_id": "mine"}
            await wire.send(request("POST", path, **fields) + b"2\r\n{}\r\n")
            await until(lambda: any(client.is_busy for client in served.clients))
            await wire.send(piece)
            answer = await wire.answer()
            assert answer.status in (400, 413)
            assert ("type" in answer.json) is (kind == "anthropic")
            assert answer["x-request-id"] == "mine"
            assert answer["connection"] == "close"
            assert await wire.is_cut()

    test()


@pytest.mark.parametrize(
    ("raw", "status", "type_", "code"),
    [
        (request("GET", "/nowhere"), 404, "not_found_error", "not_found"),
        (request("GET", "/v2"), 404, "not_found_error", "not_found"),
        (request("GET", CHAT), 405, "invalid_request_error", "method_not_allowed"),
        (request("DELETE", "/health"), 405, "invalid_request_error", "method_not_allowed"),
        (request("POST", "/v1/models", b"{}"), 405, "invalid_request_error", "method_not_allowed"),
        (
            request("POST", CHAT, b"{}", content_type="text/html"),
            415,
            "invalid_request_error",
            "unsupported_media_type",
        ),
        (
            request("POST", CHAT, b"{}", content_type="multipart/form-data; boundary=x"),
            415,
            "invalid_request_error",
            "unsupported_media_type",
        ),
        (request("POST", CHAT, b"{"), 400, "invalid_request_error", None),
        (request("POST", CHAT, b"\xff"), 400, "invalid_request_error", None),
        (request("POST", CHAT, b""), 400, "invalid_request_error", None),
        (request("POST", CHAT, b"{}"), 400, "invalid_request_error", None),
        (request("POST", "/v1/cancel", b"[]"), 400, "invalid_request_error", None),
        (chat_request("x", echo=True), 400, "invalid_request_error", "unsupported_parameter"),
        (chat_request("x", tools=[{}]), 400, "invalid_request_error", None),
        (  # the model has no format for them
            chat_request("x", tools=[TOOL]),
            400,
            "invalid_request_error",
            "unsupported_parameter",
        ),
        (chat_request(""), 400, "invalid_request_error", None),
    ],
    ids=lambda value: value[:60].decode("latin-1") if isinstance(value, bytes) else str(value),
)
def test_a_refusal_has_a_status_and_an_envelope_and_keeps_the_connection(
    raw: bytes, status: int, type_: str, code: str | None
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(raw)
            answer = await wire.answer()
            assert answer.status == status
            assert answer.error["type"] == type_
            assert answer.error["code"] == code
            assert answer["x-request-id"]
            if "connection" in answer:  # the body was not read
                assert answer["connection"] == "close"
                assert await wire.is_cut()
            else:
                assert (await wire.get("/health")).status == 200

    test()


@in_a_loop
async def test_a_405_lists_the_allowed_methods() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.get(CHAT))["allow"] == "POST, OPTIONS"
        assert (await wire.ask("PUT", "/health"))["allow"] == "GET, HEAD, OPTIONS"


@in_a_loop
async def test_a_body_that_is_too_large_is_a_413_before_it_is_read() -> None:
    async with serving(max_body_mb=1) as served:
        async with await served.wire() as wire:
            await wire.send(request("POST", CHAT, content_length=str((1 << 20) + 1)))
            announced = await wire.answer()
        async with await served.wire() as wire:
            await wire.send(request("POST", CHAT, transfer_encoding="chunked"))
            await wire.send(b"%x\r\n" % ((1 << 20) + 1))
            chunked = await wire.answer()
        for answer in (announced, chunked):
            assert answer.status == 413
            assert answer.error["type"] == "invalid_request_error"
            assert answer["connection"] == "close"


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"GET / HTTP/3.0\r\nHost: localhost\r\n\r\n",
        request("GET", "/health", content_length="x"),
        request("POST", CHAT, transfer_encoding="chunked") + b"zz\r\n",
        request("POST", CHAT, content_length=str(1 << 40)),
    ],
)
def test_even_an_answer_to_broken_http_has_a_request_id_and_an_envelope(raw: bytes) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(raw)
            answer = await wire.answer()
            assert 400 <= answer.status < 600
            assert answer.error["code"] == "malformed_request"
            assert await wire.is_cut()
            assert answer["x-request-id"]

    test()


@pytest.mark.parametrize(
    ("content_type", "origin", "status"),
    [
        ("application/json", "", 200),
        ("Application/JSON; charset=utf-8", "", 200),
        ("application/vnd.api+json", "", 200),
        ("", "", 200),
        ("application/x-www-form-urlencoded", "", 200),  # curl -d
        ("application/x-www-form-urlencoded", "http://evil.example", 415),
        ("text/plain", "http://evil.example", 415),
        ("", "http://evil.example", 415),  # fetch with a Blob that has no type
    ],
)
def test_a_foreign_page_cannot_post_without_a_preflight(
    content_type: str, origin: str, status: int
) -> None:
    """A browser asks first (preflight) for JSON alone, so a foreign page may send nothing else."""

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(chat_body("x")).encode()
            answer = await wire.ask("POST", CHAT, body, content_type=content_type, origin=origin)
            assert answer.status == status

    test()
