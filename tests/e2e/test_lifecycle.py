"""A server's life: loading, several in one process, sockets, the stop.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
import logging
import os
import signal
import socket
import stat
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    FakeModel,
    ScriptedRunner,
    chat_body,
    chat_request,
    connect,
    in_a_loop,
    new_server,
    serving,
    slow_reader,
    text_of,
    until,
)
from server_cases import CHAT, assert_ends_with_an_error

from mlxlite.api.service import Phase
from mlxlite.config.options import Config
from mlxlite.models.interface import LoadError

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- loading ------------------------------------------------------------------------------------


@in_a_loop
async def test_while_the_model_loads_the_server_listens_and_health_reports_loading() -> None:
    gate = threading.Event()
    model, runner = FakeModel(), ScriptedRunner()

    def load(_config: Config) -> Any:
        assert gate.wait(20)
        return model, runner

    server = new_server(load)
    await server.start()
    try:
        async with await connect(server) as wire:
            for path in ("/health", "/v1/health"):
                answer = await wire.get(path)
                assert answer.status == 503
                assert answer.json == {"status": "loading"}
                assert "retry-after" in answer
            for answer in (
                await wire.get("/v1/models"),
                await wire.get("/v1/models/fake"),
                await wire.chat("hello"),
                await wire.post("/v1/cancel", {}),
            ):
                assert answer.status == 503
                assert answer.error["code"] == "unavailable"
                assert int(answer["retry-after"]) > 0
            assert (await wire.get("/metrics")).status == 200
            assert (await wire.get("/nowhere")).status == 404
            gate.set()
            await server.ready()
            assert (await wire.get("/health")).status == 200
            assert (await wire.get("/v1/models")).status == 200
            assert (await wire.chat("hello")).json["choices"][0]["message"]["content"] == "hello"
    finally:
        gate.set()
        await server.stop()


@in_a_loop
async def test_a_failed_load_is_raised_by_ready_and_reported_by_health() -> None:
    def load(_config: Config) -> Any:
        raise LoadError("there is no model at nowhere")

    server = new_server(load)
    await server.start()
    with pytest.raises(LoadError, match="there is no model at nowhere"):
        await server.ready()
    async with await connect(server) as wire:
        health = await wire.get("/health")
        assert health.status == 503
        assert health.json["status"] == "error"
        assert (await wire.chat("hello")).status == 503
    await server.stop()


@pytest.mark.parametrize("error", [LoadError("no"), RuntimeError("no"), MemoryError("no")])
def test_a_failed_load_leaves_nothing_behind(error: Exception) -> None:
    def load(_config: Config) -> Any:
        raise error

    @in_a_loop
    async def test() -> None:
        server = new_server(load)
        with pytest.raises(LoadError, match="no"):
            async with server:
                pytest.fail("it was never ready")
        assert server.service.phase is Phase.DRAINING
        assert not server.listener.is_serving

    test()


@in_a_loop
async def test_a_server_can_be_stopped_while_it_loads() -> None:
    gate = threading.Event()

    def load(_config: Config) -> Any:
        gate.wait(20)
        raise LoadError("too late")

    server = new_server(load)
    await server.start()
    async with await connect(server) as wire:
        assert (await wire.get("/health")).status == 503
        await server.stop()
        assert await wire.is_cut()
    gate.set()


# --- embedding ----------------------------------------------------------------------------------


@in_a_loop
async def test_an_embedded_server_leaves_signals_and_logging_alone() -> None:
    def state() -> list[object]:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
        root = logging.getLogger()
        ours = logging.getLogger("mlxlite")
        return [
            *(signal.getsignal(number) for number in numbers),
            *(list(log.handlers) for log in (root, ours)),
            *(log.level for log in (root, ours)),
            ours.propagate,
            logging.raiseExceptions,
        ]

    before = state()
    async with serving() as served, await served.wire() as wire:
        assert state() == before
        assert (await wire.chat("hello")).status == 200
        assert state() == before
    assert state() == before


@in_a_loop
async def test_two_servers_in_one_process_are_independent() -> None:
    async with (
        serving(FakeModel(id="one"), api_key=("k",)) as one,
        serving(FakeModel(id="two")) as two,
        await one.wire() as wire_1,
        await two.wire() as wire_2,
    ):
        assert one.server.url != two.server.url
        assert (await wire_1.get("/v1/models")).status == 401
        assert (await wire_2.get("/v1/models")).json["data"][0]["id"] == "two"
        assert (await wire_2.chat("hello")).status == 200
        assert two.num_ended("stop") == 1
        assert one.num_ended("stop") == 0
        await wire_2.close()
        await two.server.stop()
        answer = await wire_1.get("/v1/models", x_api_key="k")
        assert answer.json["data"][0]["id"] == "one"


@in_a_loop
async def test_the_port_is_free_again_after_stop() -> None:
    async with serving() as served:
        port = served.server.port
        assert served.server.url == f"http://127.0.0.1:{port}"
        async with await served.wire() as wire:
            assert (await wire.get("/health")).status == 200
    async with serving(port=port) as served:
        assert served.server.port == port


@in_a_loop
async def test_a_port_that_is_taken_is_an_oserror_at_start() -> None:
    async with serving() as served:
        second = new_server(lambda _: pytest.fail("it loads nothing"), port=served.server.port)
        with pytest.raises(OSError, match="in use"):
            await second.start()


def test_a_unix_socket_is_for_its_owner_alone_and_removed_at_stop() -> None:
    # Not in tmp_path: a socket's path may have no more than 107 bytes.
    path = Path(f"/tmp/mlxlite-test-{os.getpid()}.sock")
    with closing(socket.socket(socket.AF_UNIX)) as stale:
        stale.bind(str(path))
    assert path.exists(), "left by a process that was killed"

    @in_a_loop
    async def test() -> None:
        async with serving(uds=str(path)) as served, await served.wire() as wire:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            assert served.server.url == f"unix:{path}"
            second = new_server(lambda _: pytest.fail("it loads nothing"), uds=str(path))
            with pytest.raises(OSError, match="in use"):  # it must not steal the path
                await second.start()
            answer = await wire.post(CHAT, chat_body("hello"), host="anything")
            assert answer.json["choices"][0]["message"]["content"] == "hello"

    test()
    assert not path.exists()


# --- the end ------------------------------------------------------------------------------------


@in_a_loop
async def test_at_stop_an_answer_that_fits_the_grace_is_finished() -> None:
    async with serving(shutdown_grace_s=10) as served:
        port = served.server.port
        served.runner.hold()
        async with await served.wire() as streamed, await served.wire() as whole:
            await streamed.open_stream("hello")
            await whole.send(chat_request("world"))
            idle = await served.wire()
            await until(lambda: served.num_live == 2)
            stopping = asyncio.ensure_future(served.server.stop())
            assert await idle.is_cut(), "an idle connection is closed at once"
            await idle.close()
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            served.runner.release()
            frames = await streamed.rest()
            assert text_of(frames) == "hello"
            assert frames[-2].json["choices"][0]["finish_reason"] == "stop"
            assert frames[-1] == DONE
            assert (await whole.answer()).json["choices"][0]["message"]["content"] == "world"
            assert await streamed.is_cut()
            await stopping
        assert served.num_clients == 0


@in_a_loop
async def test_at_stop_an_answer_that_does_not_end_in_time_gets_an_error() -> None:
    async with serving(max_batch_size=1) as served:
        wires = [await served.wire() for _ in range(3)]
        decoding, waiting, whole = wires
        await decoding.open_stream("abc" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await waiting.open_stream("hello")
        await whole.send(chat_request("hello"))
        await until(lambda: served.num_live == 3)
        served.runner.hold()  # the device never answers again
        await served.server.stop()
        for wire in (decoding, waiting):
            assert_ends_with_an_error(await wire.rest(), "shutting down")
        answer = await whole.answer()
        assert answer.status >= 500
        assert "shutting down" in answer.error["message"]
        assert served.num_live == 0
        for wire in wires:
            assert await wire.is_cut()
            await wire.close()


@in_a_loop
async def test_at_stop_a_prompt_that_is_still_rendered_gets_an_answer_too() -> None:
    async with serving() as served, await served.wire() as wire:
        served.model.gate.clear()
        await wire.send(chat_request("hello"))
        await until(lambda: any(client.is_busy for client in served.clients))
        await served.server.stop()
        answer = await wire.answer()
        assert answer.status == 503
        assert "shutting down" in answer.error["message"]


@in_a_loop
async def test_while_it_stops_new_requests_are_sent_away() -> None:
    async with serving(shutdown_grace_s=10) as served, await served.wire() as wire:
        served.runner.hold()
        # Both on one connection: the second is read when the first is answered.
        served.model.gate.clear()
        await wire.send(chat_request("hello"))
        await until(lambda: any(client.is_busy for client in served.clients))
        stopping = asyncio.ensure_future(served.server.stop())
        await until(lambda: served.server.service.phase is Phase.DRAINING)
        served.model.gate.set()
        answer = await wire.answer()
        assert answer.status == 503
        assert int(answer["retry-after"]) > 0
        served.runner.release()
        await stopping


@in_a_loop
async def test_a_slow_reader_cannot_hold_up_the_stop() -> None:
    async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
        slow.sock.sendall(chat_request("hello", stream=True))
        await until(lambda: served.num_ended("stop") == 1)
        await served.server.stop()
        assert served.num_clients == 0


@in_a_loop
async def test_stopping_twice_is_stopping_once() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.get("/health")).status == 200
        await asyncio.gather(served.server.stop(), served.server.stop())


@in_a_loop
async def test_a_server_that_never_started_can_be_stopped() -> None:
    await new_server(lambda _: pytest.fail("it loads nothing")).stop()
