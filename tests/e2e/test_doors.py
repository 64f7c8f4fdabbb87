"""What a client meets before its request is read: hosts, origins, paths, media types, encodings;
and the line that a refusal leaves in the log.
"""

import json
import logging

import pytest
from helpers import FakeModel, chat_body, in_a_loop, request, serving
from server_cases import CHAT

PAGE = "http://evil.example"
BODY = json.dumps(chat_body("hi", max_tokens=1)).encode()


@pytest.mark.parametrize(
    ("host", "allowed", "status"),
    [
        ("host.docker.internal:8080", (), 200),
        ("mac.local", (), 403),
        ("mac.local", ("mac.local",), 200),
        ("MAC.local:1", ("mac.LOCAL",), 200),
        ("other.local", ("mac.local",), 403),
        ("any.example", ("*",), 200),
    ],
)
@in_a_loop
async def test_a_host_is_let_in_by_its_name(
    host: str, allowed: tuple[str, ...], status: int
) -> None:
    async with serving(allowed_hosts=allowed) as served, await served.wire() as wire:
        answer = await wire.ask("GET", "/health", host=host)
        assert answer.status == status
        if status == 403:
            assert "--allowed-hosts" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "named", "is_allowed"),
    [
        ("chrome-extension://abcdefghijklmnop", ("chrome-extension://*",), True),
        ("moz-extension://1234-5678", ("chrome-extension://*",), False),
        ("null", ("null",), True),
        ("null", ("http://localhost",), False),
        ("app://obsidian.md", ("app://obsidian.md",), True),
        ("app://other", ("app://obsidian.md",), False),
        ("http://evil.example", ("chrome-extension://*", "null"), False),
    ],
)
@in_a_loop
async def test_an_origin_is_let_in_by_its_pattern(
    origin: str, named: tuple[str, ...], is_allowed: bool
) -> None:
    async with serving(cors_origins=named) as served, await served.wire() as wire:
        answer = await wire.ask("GET", "/health", origin=origin)
        name = "access-control-allow-origin"
        assert (name in answer and answer[name] == origin) is is_allowed


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/v1/chat/completions",
        "//v1//chat/completions",
        "/v1/chat/completions/",
    ],
)
@in_a_loop
async def test_a_doubled_prefix_or_slash_is_no_other_path(path: str) -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.ask("POST", path, BODY)).status == 200


@pytest.mark.parametrize("path", ["/", "/v1", "//"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@in_a_loop
async def test_the_root_is_a_page_with_the_base_urls(method: str, path: str) -> None:
    async with serving(api_key=("k",)) as served, await served.wire() as wire:
        answer = await wire.ask(method, path, host="localhost:99")
        assert answer.status == 200
        assert answer["content-type"].startswith("text/html")
        if method == "GET":
            page = answer.body.decode()
            assert "http://localhost:99/v1" in page
            ready = served.server.service.ready
            assert ready is not None
            assert ready.card.id in page
            assert f"{ready.card.context_size} tokens" in page


@in_a_loop
async def test_the_page_shows_a_hosts_name_as_text() -> None:
    async with serving(allowed_hosts=("*",)) as served, await served.wire() as wire:
        answer = await wire.ask("GET", "/", host="<script>")
        assert b"<script>" not in answer.body


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 200),
        ({"content_type": "text/plain;charset=UTF-8", "origin": "http://localhost"}, 200),
        ({"content_type": "text/plain", "origin": PAGE}, 415),
        ({"content_type": "text/xml"}, 415),
        ({"content_encoding": "gzip"}, 415),
        ({"content_encoding": "identity"}, 200),
    ],
)
@in_a_loop
async def test_a_simple_request_is_served_but_to_pages_of_other_origins(
    headers: dict[str, str], status: int
) -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.ask("POST", CHAT, BODY, **headers)
        assert answer.status == status
        if "content_encoding" in headers and status == 415:
            assert "'gzip'" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"\xef\xbb\xbf" + BODY, 200, ""),
        (BODY.decode().encode("utf-16"), 400, "UTF-16"),
        (BODY.decode().encode("utf-16-le"), 400, "UTF-16"),
        (BODY.decode().encode("utf-32"), 400, "UTF-16 or UTF-32"),
        (BODY.replace(b"hi", "é".encode("latin-1")), 400, "must be UTF-8, and byte"),
        (BODY[:-1], 400, "not valid JSON"),
    ],
)
@in_a_loop
async def test_a_bodys_encoding_is_named_where_it_is_wrong(
    body: bytes, status: int, said: str
) -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.ask("POST", CHAT, body)
        assert answer.status == status
        assert said in answer.body.decode()


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        (request("GET", "/nowhere"), "GET '/nowhere' 404 not_found"),
        (request("PUT", CHAT), "PUT '/v1/chat/completions' 405 method_not_allowed"),
        (
            request("POST", CHAT, b'{"messages": [], "top_p": 2}'),
            "POST '/v1/chat/completions' 400 messages",
        ),
        (request("POST", CHAT, BODY, content_type="text/xml"), "415 unsupported_media_type"),
        (request("GET", "/health", host="evil.example"), "403 host_not_allowed · --allowed-hosts"),
        (request("GET", "/health", origin=PAGE), "origin not allowed · --cors-origins"),
        (request("OPTIONS", CHAT, origin=PAGE), "origin not allowed · --cors-origins"),
        (b"no request\r\n\r\n", "400 malformed_request"),
    ],
)
@in_a_loop
async def test_a_refusal_is_one_line_of_the_log_with_what_would_help(
    asked: bytes, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving() as served, await served.wire() as wire:
        with caplog.at_level(logging.INFO, "mlxlite.http"):
            await wire.send(asked)
            await wire.answer()
    (record,) = [record for record in caplog.records if record.name == "mlxlite.http"]
    assert line in record.getMessage()


@in_a_loop
async def test_a_missing_key_is_logged_without_the_one_that_was_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(api_key=("right",)) as served, await served.wire() as wire:
        with caplog.at_level(logging.INFO, "mlxlite.http"):
            await wire.ask("POST", CHAT, BODY, authorization="Bearer wrong")
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "401 unauthorized · --api-key" in text
    assert "wrong" not in text


@pytest.mark.parametrize(
    "path", ["/v1/messages", "/v1/messages/", "/v1/messages/unknown", "/v1/messages/count_tokens"]
)
@pytest.mark.parametrize("host", ["localhost", "evil.example"])
@in_a_loop
async def test_errors_below_messages_are_anthropics(path: str, host: str) -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.ask("POST", path, b"{}", host=host)
        assert answer.status in (400, 403, 404)
        assert answer.json["type"] == "error"


@in_a_loop
async def test_models_are_listed_in_the_words_of_the_client() -> None:
    async with serving(FakeModel()) as served, await served.wire() as wire:
        openai = (await wire.ask("GET", "/v1/models")).json
        assert (openai["object"], openai["models"]) == ("list", [])
        asked = {"anthropic_version": "2023-06-01"}
        anthropic = (await wire.ask("GET", "/v1/models", **asked)).json
        (model,) = anthropic["data"]
        assert (model["type"], model["id"]) == ("model", openai["data"][0]["id"])
        assert (anthropic["has_more"], anthropic["first_id"]) == (False, model["id"])
        one = (await wire.ask("GET", f"/v1/models/{model['id']}", **asked)).json
        assert one == model


@pytest.mark.parametrize("is_strict", [False, True])
@in_a_loop
async def test_strict_fields_refuse_what_would_be_left_out(is_strict: bool) -> None:
    body = json.dumps(chat_body("hi", max_tokens=1, verbosity="low", zebra=1)).encode()
    async with serving(strict_fields=is_strict) as served, await served.wire() as wire:
        answer = await wire.ask("POST", CHAT, body)
        if is_strict:
            assert (answer.status, answer.json["error"]["param"]) == (400, "zebra")
        else:
            assert (answer.status, answer["x-mlxlite-ignored"]) == (200, "zebra,verbosity")
