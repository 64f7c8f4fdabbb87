"""Keys, host names, and pages in browsers.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
import json
from contextlib import suppress

import pytest
from helpers import DONE, ENDLESS, chat_body, in_a_loop, request, serving, until
from server_cases import ALLOWED, CHAT, FOREIGN

from mlxlite.api.service import Phase

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- access control -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Bearer secret "}, 200),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer second"}, 200),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "secret"}, 401),
        ({"authorization": "Bearer s\xe9cret"}, 401),
        ({"x-api-key": "secret"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
    ],
)
def test_a_key_gives_access_to_the_protected_endpoints(
    headers: dict[str, str], status: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("secret", "second")) as served:
            for method, path, body in (
                ("GET", "/v1/models", None),
                ("GET", "/models/fake", None),
                ("POST", CHAT, json.dumps(chat_body("x")).encode()),
                ("POST", "/cancel", b"{}"),
            ):
                async with await served.wire() as wire:
                    answer = await wire.ask(method, path, body, **headers)
                    assert answer.status == status, path
                    if status == 401:
                        assert answer["www-authenticate"] == "Bearer"
                        assert answer.error["type"] == "authentication_error"
                        assert answer.error["code"] == "unauthorized"
                        assert answer.error["message"] == "Unauthorized"

    test()


@in_a_loop
async def test_health_metrics_and_preflights_need_no_key() -> None:
    async with serving(api_key=("secret",)) as served, await served.wire() as wire:
        for path in ("/health", "/v1/health", "/metrics"):
            assert (await wire.get(path)).status == 200
        assert (await wire.ask("OPTIONS", CHAT)).status == 204
        assert (await wire.get("/nowhere")).status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:3000", 200),
        ("[::1]:3000", 200),
        ("app.localhost", 200),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("127.0.0.1.evil.example", 403),
        ("notlocalhost", 403),
        ("localhost.evil.example", 403),
        ("192.168.1.5", 403),
        ("[::1", 403),
        ("0.0.0.0", 403),
    ],
)
def test_on_loopback_only_local_names_are_answered(host: str, status: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served:
            for method, path in (("GET", "/health"), ("OPTIONS", CHAT), ("GET", "/v1/models")):
                async with await served.wire() as wire:
                    answer = await wire.ask(method, path, host=host)
                    assert answer.status == (
                        204 if (method, status) == ("OPTIONS", 200) else status
                    )
                    if status == 403:
                        assert answer.error["code"] == "host_not_allowed"

    test()


@in_a_loop
async def test_http_1_0_may_leave_the_host_out() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert (await wire.answer()).status == 200
        assert await wire.is_cut()


# --- pages in browsers --------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ALLOWED)
def test_a_page_on_this_machine_may_call(origin: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("k",)) as served, await served.wire() as wire:
            preflight = await wire.ask(
                "OPTIONS",
                CHAT,
                origin=origin,
                access_control_request_method="POST",
                access_control_request_headers="authorization, content-type, x-stainless-os",
            )
            assert preflight.status == 204
            assert preflight["access-control-allow-origin"] == origin
            assert "POST" in preflight["access-control-allow-methods"]
            assert "x-stainless-os" in preflight["access-control-allow-headers"]
            for answer in (
                await wire.get("/health", origin=origin),
                await wire.get("/nowhere", origin=origin),
                await wire.get("/v1/models", origin=origin),  # 401, and the page may read it
                await wire.ask("POST", CHAT, b"{", origin=origin, x_api_key="k"),
            ):
                assert answer["access-control-allow-origin"] == origin
                assert "x-request-id" in answer["access-control-expose-headers"]
                assert answer["vary"].lower() == "origin"

    test()


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize(
    "raw",
    [
        request("OPTIONS", CHAT, access_control_request_method="POST", origin="*"),
        request("GET", "/health", origin="*"),
        request("POST", CHAT, json.dumps(chat_body("x")).encode(), origin="*"),
        request("POST", CHAT, json.dumps(chat_body("x", stream=True)).encode(), origin="*"),
    ],
    ids=["preflight", "health", "chat", "stream"],
)
def test_a_page_of_a_foreign_origin_is_refused_by_cors_whatever_its_name(
    raw: bytes, origin: str
) -> None:
    @in_a_loop
    async def test() -> None:
        answer = None
        async with serving() as served:
            async with await served.wire() as wire:
                await wire.send(raw.replace(b"origin: *", f"origin: {origin}".encode()))
                with suppress(asyncio.IncompleteReadError, TimeoutError):
                    answer = await asyncio.wait_for(wire.answer(), 2)
            async with await served.wire() as wire:
                assert (await wire.chat("x")).status == 200, "the server serves on"
            assert served.server.service.phase is Phase.READY
            assert answer is not None, "it got no answer"
            assert answer.status in (200, 204)
            assert not [name for name, _ in answer.headers if "access-control" in name]

    test()


@in_a_loop
async def test_a_stream_has_the_cors_header_of_its_origin() -> None:
    async with serving() as served, await served.wire() as wire:
        body = json.dumps(chat_body("x", stream=True)).encode()
        await wire.send(request("POST", CHAT, body, origin="tauri://localhost"))
        assert (await wire.head())["access-control-allow-origin"] == "tauri://localhost"
        assert (await wire.rest())[-1] == DONE


@in_a_loop
async def test_a_key_cancels_only_its_own_answers() -> None:
    async with serving(api_key=("one", "two")) as served:
        first, second, admin = [await served.wire() for _ in range(3)]
        body = json.dumps(chat_body("a" + ENDLESS, stream=True)).encode()
        ids = []
        for wire, key in ((first, "one"), (second, "two")):
            await wire.send(request("POST", CHAT, body, x_api_key=key))
            await wire.head()
            ids.append((await wire.frame()).json["id"])
        for fields in ({"id": ids[1]}, {"id": "chatcmpl-none"}):
            answer = await admin.post("/v1/cancel", fields, x_api_key="one")
            assert answer.json == {"status": "no_active_generation", "cancelled_count": 0}
        answer = await admin.post("/v1/cancel", {}, x_api_key="one")
        assert answer.json["cancelled_count"] == 1
        assert (await first.rest())[-1] == DONE
        await until(lambda: served.num_live == 1)
        for wire in (first, second, admin):
            await wire.close()
