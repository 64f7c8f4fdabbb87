"""Every route: its methods, its key, its answer while the model loads, its body.

Over HTTP, around a scripted runner that repeats the characters of its prompt: each text, count and
place is known in advance.
"""

import json
import threading
from typing import Any

import pytest
from helpers import (
    ENDLESS,
    Answer,
    FakeModel,
    ScriptedRunner,
    Wire,
    chat_body,
    connect,
    in_a_loop,
    new_server,
    serving,
    until,
)
from server_cases import CHAT, COMPLETIONS

import mlxlite
from mlxlite.config.options import Config
from mlxlite.models.interface import Model

ROUTES: dict[str, tuple[str, ...]] = {
    "/chat/completions": ("POST",),
    "/completions": ("POST",),
    "/embeddings": ("POST",),
    "/tokenize": ("POST",),
    "/detokenize": ("POST",),
    "/models": ("GET",),
    "/models/fake": ("GET",),
    "/cache": ("GET", "DELETE"),
    "/cancel": ("POST",),
    "/health": ("GET",),
    "/metrics": ("GET",),
    "/status": ("GET",),
    "/version": ("GET",),
}

OPEN = ("/health", "/metrics", "/version")
NEED_NO_MODEL = OPEN

BODIES: dict[str, Any] = {
    "/chat/completions": chat_body("hello"),
    "/completions": {"prompt": "hello"},
    "/embeddings": {"input": "hello"},
    "/tokenize": {"content": "hello"},
    "/detokenize": {"tokens": [104]},
    "/cancel": {},
}

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def methods_of(path: str) -> set[str]:
    return {*ROUTES[path], *(["HEAD"] if "GET" in ROUTES[path] else [])}


async def ask(wire: Wire, method: str, path: str, route: str, **headers: str) -> Answer:
    body = json.dumps(BODIES[route]).encode() if method == "POST" and route in BODIES else None
    return await wire.ask(method, path, body, **headers)


@in_a_loop
async def test_the_routes_here_are_the_ones_there_are() -> None:
    async with serving() as served:
        table = {path.replace("/models/{id}", "/models/fake") for path in served.server.app.routes}
        assert ROUTES.keys() <= table


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_route_serves_its_methods_and_lists_them_for_others(route: str, prefix: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            path = prefix + route
            allowed = {*methods_of(route), "OPTIONS"}
            options = await wire.ask("OPTIONS", path)
            assert options.status == 204
            assert set(options["allow"].split(", ")) == allowed
            for method in METHODS:
                for query in ("", "?beta=true&x=/v1/y"):
                    answer = await ask(wire, method, path + query, route)
                    if method in allowed:
                        assert answer.status == 200
                    else:
                        assert answer.status == 405
                        assert set(answer["allow"].split(", ")) == allowed
            if "GET" in ROUTES[route]:
                head, got = await wire.ask("HEAD", path), await wire.get(path)
                assert head["content-type"] == got["content-type"]
                assert head.body == b""

    test()


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_needs_the_key_unless_it_is_open(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(api_key=("s3cret",)) as served:
            for method in ROUTES[route]:
                for key in ("", "Bearer s3cre", "Bearer s3cret"):
                    async with await served.wire() as wire:  # which a 401 before a body closes
                        answer = await ask(wire, method, route, route, authorization=key)
                        is_let_in = route in OPEN or key == "Bearer s3cret"
                        assert answer.status == (200 if is_let_in else 401)

    test()


@pytest.mark.parametrize("route", ROUTES)
def test_a_route_that_needs_the_model_is_a_503_while_it_loads(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        gate = threading.Event()

        def load(_config: Config) -> tuple[Model, ScriptedRunner]:
            assert gate.wait(20)
            return FakeModel(), ScriptedRunner()

        server = new_server(load)
        await server.start()
        try:
            async with await connect(server) as wire:
                for method in ROUTES[route]:
                    answer = await ask(wire, method, route, route)
                    is_there = route in NEED_NO_MODEL and route != "/health"
                    assert answer.status == (200 if is_there else 503)
                    assert is_there or "retry-after" in answer
        finally:
            gate.set()
            await server.ready()
            await server.stop()

    test()


@pytest.mark.parametrize("route", BODIES)
def test_a_body_is_a_json_object(route: str) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(BODIES[route]).encode()
            async with await served.wire() as refused:  # before its body is read, and closed
                answer = await refused.ask("POST", route, body, content_type="text/html")
                assert answer.status == 415
                assert answer.error["code"] == "unsupported_media_type"
            for raw in (b"", b"  ", b"[]", b"null", b"{", b'"x"'):
                answer = await wire.ask("POST", route, raw)
                is_cancel = route == "/cancel" and not raw.strip()
                assert answer.status == (200 if is_cancel else 400)
                assert is_cancel or answer.error["type"] == "invalid_request_error"

    test()


@in_a_loop
async def test_status_reports_queue_rows_model_and_versions() -> None:
    async with serving(max_queue=7, max_batch_size=2) as served, await served.wire() as wire:
        idle = (await wire.get("/v1/status")).json
        assert idle["queue"] == {"waiting": 0, "max": 7}
        assert idle["rows"] == {"running": 0, "max": 2, "steps": 0}
        assert idle["model"]["id"] == "fake"
        assert idle["model"]["fingerprint"] == "fp_0123456789abcdef"
        assert idle["versions"]["mlxlite"] == mlxlite.__version__
        async with await served.wire() as busy:
            await busy.open_stream("ab" + ENDLESS, n=5)
            await until(lambda: served.runner.num_drawn.get(2, 0) > 0)
            now = (await wire.get("/v1/status")).json
            assert now["queue"]["waiting"] == 3
            assert now["rows"]["running"] == 2
            assert now["rows"]["steps"] > 0
            busy.abort()
        await until(lambda: served.num_live == 0)
        assert (await wire.get("/version")).json == {"version": mlxlite.__version__}


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_server_answers_to_its_models_name_alone(stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        bodies = {CHAT: chat_body("hello"), COMPLETIONS: {"prompt": "hello"}}
        async with serving(strict_model_id=True) as served, await served.wire() as wire:
            for path, value in bodies.items():
                for name in ("other", "", "fake ", "org/fake"):
                    answer = await wire.post(path, {**value, "model": name, "stream": stream})
                    assert answer.status == 404
                    assert answer.error["code"] == "model_not_found"
                    assert answer.error["param"] == "model"
                for named in ({"model": "fake"}, {"model": None}, {}):
                    answer = await wire.post(path, {**value, **named, "stream": stream})
                    assert answer.status == 200
            assert served.num_live == 0
        async with serving() as served, await served.wire() as wire:
            for path, value in bodies.items():
                answer = await wire.post(path, {**value, "model": "other", "stream": stream})
                assert answer.status == 200
                text = answer.body.decode()
                assert '"model":"fake"' in text
                assert "other" not in text

    test()
