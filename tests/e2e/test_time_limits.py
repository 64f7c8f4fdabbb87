"""Time limits: silent and slow peers, request timeouts, heartbeats, slow readers.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind. Times are moved by hand:
`perf_counter` is a `Clock`.
"""

import ast
import json
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    ENDLESS,
    Clock,
    FakeModel,
    Frame,
    Served,
    chat_body,
    chat_request,
    in_a_loop,
    pass_time,
    request,
    serving,
    slow_reader,
    stand_still,
    text_of,
    until,
)
from server_cases import CHAT, assert_ends_with_an_error

from mlxlite.http import connection
from mlxlite.http.connection import (
    BODY_GRACE_S,
    BODY_TIMEOUT_S,
    HEADER_TIMEOUT_S,
    HEARTBEAT_S,
    KEEP_ALIVE_S,
    MIN_BODY_RATE,
    WRITE_TIMEOUT_S,
)

PACKAGE = Path(connection.__file__).parents[1]
pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


@pytest.mark.parametrize("step_s", [-1e6, 1e6])
def test_a_step_of_the_wall_clock_ends_nothing(
    step_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle connection, a head and a body that are not complete, and a stream."""
    head, body = chat_request("x").split(b"\r\n\r\n")

    @in_a_loop
    async def test() -> None:
        async with (
            serving(request_timeout_s=30) as served,
            await served.wire() as idle,
            await served.wire() as begun,
            await served.wire() as stream,
        ):
            await begun.send(head[:20])
            served.runner.hold()
            await stream.send(chat_request("abc", stream=True))
            await until(lambda: served.num_clients == 3)
            wall = time.time
            monkeypatch.setattr(time, "time", lambda: wall() + step_s)
            swept = served.server.metrics.lag_s
            seen = swept.count
            await until(lambda: swept.count >= seen + 5, "the sweep")
            served.runner.release()
            await begun.send(head[20:] + b"\r\n\r\n" + body)
            assert (await stream.head()).status == 200
            assert text_of(await stream.rest()) == "abc"
            assert (await begun.answer()).status == 200
            assert (await idle.ask("GET", "/health")).status == 200

    test()


def test_only_dates_come_from_the_wall_clock() -> None:
    """`created` of an answer and of a model, and when the process started; no time limit."""
    wall = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        found += [
            path.name
            for node in froms
            if node.module == "time"
            for n in node.names
            if n.name.startswith("time")
        ]
        named = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        found += [path.name for name in named if name in wall]
    assert found == ["generate.py", "server.py"]


# --- peers, requests, the device ----------------------------------------------------------------


@in_a_loop
async def _idle(clock: Clock, send: bytes, limit_s: float) -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.send(send)
        await until(lambda: served.num_clients == 1)
        if send:
            (client,) = served.clients
            await until(lambda: client.http.num_buffered or client.is_busy)
        await pass_time(served, clock, limit_s - 0.1)
        assert served.num_clients == 1
        await pass_time(served, clock, 0.2)
        await until(lambda: served.num_clients == 0)
        assert await wire.is_cut()


def test_a_silent_connection_is_closed(clock: Clock) -> None:
    _idle(clock, b"", HEADER_TIMEOUT_S)


def test_a_peer_that_does_not_finish_its_head_is_cut(clock: Clock) -> None:
    _idle(clock, b"GET /health HTTP/1.1\r\nHo", HEADER_TIMEOUT_S)


def test_a_head_that_drips_has_no_more_time_than_one_that_stops(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            (await wire.get("/health"))
            (client,) = served.clients
            for num, byte in enumerate(b"GET /he", 1):
                await wire.send(bytes([byte]))
                await until(lambda num=num: client.http.num_buffered == num)
                await pass_time(served, clock, HEADER_TIMEOUT_S / 6)
            await until(lambda: served.num_clients == 0)

    test()


def test_empty_lines_before_a_request_do_not_extend_its_deadline(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await until(lambda: served.num_clients == 1)
            for _ in range(5):
                if served.num_clients:
                    await wire.send(b"\r\n")
                    await pass_time(served, clock, HEADER_TIMEOUT_S / 3)
            assert served.num_clients == 0

    test()


def test_a_body_that_stops_gets_a_408(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(chat_request("hello")[:-5])
            await until(lambda: any(client.is_busy for client in served.clients))
            await pass_time(served, clock, BODY_TIMEOUT_S - 1)
            (client,) = served.clients
            before = client._deadline
            await wire.send(b"x")
            await until(lambda: client._deadline > before, "a byte buys time")
            await pass_time(served, clock, BODY_TIMEOUT_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            answer = await wire.answer()
            assert answer.status == 408
            assert answer["connection"] == "close"
            assert answer.error["code"] == "request_timeout"
            assert await wire.is_cut()

    test()


def test_a_body_that_drips_gets_a_408_in_the_end(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            await wire.send(request("POST", CHAT, content_length=str(1 << 20)))
            await until(lambda: any(client.is_busy for client in served.clients))
            (client,) = served.clients
            began = clock.now
            step_s = BODY_TIMEOUT_S - 1
            while clock.now - began < BODY_GRACE_S - step_s:
                before = client._num_body_bytes
                await wire.send(b" ")
                await until(lambda before=before: client._num_body_bytes > before)
                assert served.num_clients == 1
                await pass_time(served, clock, step_s)
            await wire.send(b" ")
            await pass_time(served, clock, BODY_GRACE_S + 1 - (clock.now - began))
            assert (await wire.answer()).status == 408
            assert await wire.is_cut()

    test()


def test_a_large_body_may_take_its_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            body = json.dumps(chat_body("hello")).encode()
            piece = b" " * 10 * MIN_BODY_RATE  # what 10 s at the least allow
            num = 3 * int(BODY_GRACE_S / 10)
            await wire.send(request("POST", CHAT, content_length=str(num * len(piece) + len(body))))
            await until(lambda: any(client.is_busy for client in served.clients))
            (client,) = served.clients
            for n in range(1, num + 1):
                await wire.send(piece)
                await until(lambda n=n: client._num_body_bytes == n * len(piece))
                await pass_time(served, clock, 10)
            await wire.send(body)
            assert (await wire.answer()).status == 200

    test()


def test_an_idle_connection_is_closed_after_the_keep_alive_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.get("/health")).status == 200
            await pass_time(served, clock, KEEP_ALIVE_S - 1)
            assert (await wire.get("/health")).status == 200, "each request begins it anew"
            await pass_time(served, clock, KEEP_ALIVE_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            assert await wire.is_cut()

    test()


def test_a_model_may_take_its_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            await pass_time(served, clock, 3600)
            served.runner.release()
            assert (await wire.answer()).status == 200

    test()


def test_a_silent_stream_is_kept_alive_by_comments(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.open_stream("hello")
            await wire.frame()
            for _ in range(3):
                await pass_time(served, clock, HEARTBEAT_S + 0.1)
                assert await wire.frame() == Frame("", "")
            served.runner.release()
            assert text_of(await wire.rest()) == "hello"
            await pass_time(served, clock, HEARTBEAT_S + 0.1)
            assert (await wire.get("/health")).status == 200, "and no comment before it"

    test()


def test_a_request_that_takes_too_long_ends_with_an_error_and_frees_its_row(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with (
            serving(request_timeout_s=30, max_batch_size=2) as served,
            await served.wire() as streamed,
            await served.wire() as whole,
        ):
            served.runner.hold()
            await streamed.open_stream("ab" + ENDLESS)
            await whole.send(chat_request(ENDLESS, n=2))  # the second of them in the queue
            await until(lambda: served.num_live == 3)
            await pass_time(served, clock, 20)
            late = await served.wire()
            await late.send(chat_request("hello"))
            await until(lambda: served.num_live == 4)
            await pass_time(served, clock, 10.5)
            served.runner.release()
            assert_ends_with_an_error(await streamed.rest(), "longer than 30 s")
            answer = await whole.answer()
            assert answer.status == 500
            assert "longer than 30 s" in answer.error["message"]
            assert (await late.answer()).json["choices"][0]["message"]["content"] == "hello"
            await late.close()
            assert served.num_ended("error") == 3
            assert served.num_live == 0
            await until(lambda: not served.runner.prompts, "the rows are free")

    test()


def test_without_a_time_limit_a_request_may_take_for_ever(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            await pass_time(served, clock, 1e6)
            served.runner.release()
            assert (await wire.answer()).status == 200

    test()


def test_a_device_that_hangs_makes_health_fail_until_it_answers(clock: Clock) -> None:
    async def health(served: Served) -> Any:
        async with await served.wire() as wire:
            answer = await wire.get("/health")
            assert (answer.status == 200) is (answer.json["status"] == "ok")
            return answer

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.hold()
            await wire.send(chat_request("hello"))
            await until(lambda: served.num_live == 1)
            # The first step is dispatched; the device thread waits for it in the second call.
            await until(lambda: served.engine._scheduler.num_steps == 2)
            assert served.engine._busy_since is not None
            await pass_time(served, clock, 59)
            assert (await health(served)).status == 200
            await pass_time(served, clock, 3)
            answer = await health(served)
            assert answer.status == 503
            assert answer.json["status"] == "error"
            assert "the model has not answered for 62 s" in answer.json["reason"]
            assert "retry-after" in answer
            served.runner.release()
            assert (await wire.answer()).status == 200
            assert (await health(served)).status == 200
            await pass_time(served, clock, 1e6)
            assert (await health(served)).status == 200, "an idle device does not hang"

    test()


# --- slow readers -------------------------------------------------------------------------------


def test_a_slow_reader_is_disconnected_and_delays_no_other_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1 << 18)

    @in_a_loop
    async def test() -> None:
        async with (
            serving(FakeModel(width=4096)) as served,
            await served.wire() as wire,
            slow_reader(served) as slow,
        ):
            slow.sock.sendall(chat_request(ENDLESS, stream=True))
            await wire.open_stream("hello")
            assert text_of(await wire.rest()) == "".join(char * 4096 for char in "hello")
            await until(lambda: served.num_live == 0, "the slow one is cut")
            await until(lambda: served.num_clients == 1)
            assert served.num_ended("abort") == 1
            assert (await wire.chat("x")).status == 200

    test()


def test_a_reader_that_takes_nothing_is_cut_after_a_time(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello", stream=True))
            await until(lambda: served.num_ended("stop") == 1)
            await stand_still(served, clock, slow)
            assert slow.num_unsent > 1 << 20
            await pass_time(served, clock, WRITE_TIMEOUT_S - 1)
            assert served.num_clients == 1
            await pass_time(served, clock, 2)
            await until(lambda: served.num_clients == 0)

    test()


def test_a_reader_that_is_slow_but_never_stops_is_not_cut(clock: Clock) -> None:
    """«Without progress»: the time runs from the last byte that left, not from the first delay."""

    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello"))
            await until(lambda: served.num_ended("stop") == 1)
            for _ in range(6):
                await pass_time(served, clock, WRITE_TIMEOUT_S / 3)
                assert served.num_clients == 1, "it was cut though it reads"
                num_unsent = slow.num_unsent
                while slow.num_unsent == num_unsent:
                    await slow.read()
            assert slow.num_unsent > 1 << 18, "its backlog never ran low"

    test()


def test_after_a_backlog_the_keep_alive_time_counts_again(clock: Clock) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello"))
            await until(lambda: served.num_ended("stop") == 1)
            assert slow.num_unsent > 1 << 20
            num_left = 5 << 19
            while num_left > 0:
                num_left -= await slow.read()
            await until(lambda: slow.num_unsent == 0)
            await pass_time(served, clock, WRITE_TIMEOUT_S + 1)
            assert served.num_clients == 1
            await pass_time(served, clock, KEEP_ALIVE_S + 1)
            await until(lambda: served.num_clients == 0, "an idle connection is closed")

    test()
