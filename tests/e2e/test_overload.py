"""More load than fits: the queue, priorities, memory.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    FakeModel,
    ScriptedRunner,
    chat_body,
    chat_request,
    in_a_loop,
    request,
    serving,
    text_of,
    until,
)

from mlxlite.engine.memory import Memory
from mlxlite.models.interface import LoadError

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- priorities ---------------------------------------------------------------------------------


@in_a_loop
async def test_an_urgent_request_overtakes_the_queue_but_not_its_own_priority() -> None:
    async with serving(max_batch_size=1) as served:
        wires = [await served.wire() for _ in range(4)]
        served.runner.hold()
        for n, (wire, priority) in enumerate(zip(wires, (-10, 0, 5, -10), strict=True), 1):
            await wire.send(chat_request(f"number {n}", priority=priority))
            await until(lambda n=n: served.num_live == n)  # type: ignore[misc]
        served.runner.release()
        for n, wire in enumerate(wires, 1):
            answer = await wire.answer()
            assert answer.json["choices"][0]["message"]["content"] == f"number {n}"
            await wire.close()
        assert served.runner.admitted == [1, 4, 2, 3]


@in_a_loop
async def test_an_urgent_request_takes_the_place_of_another_which_loses_nothing() -> None:
    async with serving(max_batch_size=1) as served:
        async with await served.wire() as patient, await served.wire() as urgent:
            await patient.open_stream("patience" + ENDLESS, max_tokens=300)
            await until(lambda: served.runner.num_drawn.get(1, 0) > 10)
            assert (await urgent.chat("now", priority=-10)).status == 200
            frames = await patient.rest()
            assert text_of(frames) == (("patience" + ENDLESS) * 34)[:300]
            assert frames[-2].json["usage"]["completion_tokens"] == 300
        assert served.runner.admitted == [1, 2, 1]


# --- the queue ----------------------------------------------------------------------------------


@in_a_loop
async def test_a_full_queue_is_a_429_with_a_retry_after_header() -> None:
    async with serving(max_batch_size=1, max_queue=1) as served, await served.wire() as wire:
        running, waiting = await served.wire(), await served.wire()
        await running.open_stream("a" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await waiting.open_stream("hello")
        for stream in (False, True):
            answer = await wire.chat("hello", stream=stream)
            assert answer.status == 429
            assert answer["retry-after"] == "1"
            assert answer.error["type"] == "rate_limit_error"
            assert answer.error["code"] == "queue_full"
        await running.close()
        assert text_of(await waiting.rest()) == "hello"
        assert (await wire.chat("hello")).status == 200
        await waiting.close()


def keyed(key: str, content: str, **fields: Any) -> bytes:
    body = json.dumps(chat_body(content, **fields)).encode()
    return request("POST", "/v1/chat/completions", body, x_api_key=key)


@in_a_loop
async def test_a_key_that_fills_the_queue_gives_a_place_to_another_key() -> None:
    keys = ("many", "few")
    async with serving(api_key=keys, max_batch_size=1, max_queue=2) as served:
        a, b, c, other = [await served.wire() for _ in range(4)]
        served.runner.hold()
        for n, (wire, text) in enumerate(((a, "first"), (b, "second"), (c, "third")), 1):
            await wire.send(keyed("many", text))
            await until(lambda n=n: served.num_live == n)  # type: ignore[misc]
        await other.send(keyed("few", "other"))
        answer = await c.answer()  # the latest of the other key
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert answer["retry-after"] == "1"
        served.runner.release()
        for wire in (a, b, other):
            assert (await wire.answer()).status == 200
            await wire.close()
        await c.close()


@in_a_loop
async def test_a_displaced_stream_ends_with_its_error() -> None:
    async with serving(max_batch_size=1, max_queue=1) as served:
        a, b, c = [await served.wire() for _ in range(3)]
        await a.open_stream("a" + ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await b.open_stream("hello", priority=1)
        await c.open_stream("hello", priority=0)
        frames = await b.rest()
        assert frames[-1] == DONE
        assert "the request queue is full" in str(frames)
        await a.close()
        assert text_of(await c.rest()) == "hello"
        await b.close()
        await c.close()


@in_a_loop
async def test_a_priority_above_the_limit_of_a_key_is_lowered_and_named() -> None:
    keys = ("one", "two")
    async with serving(api_key=keys, max_priority=-2) as served, await served.wire() as wire:
        for priority, is_lowered in ((0, False), (-2, False), (-3, True), (-(2**31), True)):
            await wire.send(keyed("one", "hello", priority=priority))
            answer = await wire.answer()
            assert answer.status == 200
            assert ("x-mlxlite-ignored" in answer) is is_lowered
            assert not is_lowered or answer["x-mlxlite-ignored"] == "priority"


@in_a_loop
async def test_many_requests_at_once_each_get_their_own_answer() -> None:
    async with serving() as served:

        async def one(n: int) -> None:
            async with await served.wire() as wire:
                text = f"number {n} " * (1 + n % 7)
                if n % 2:
                    await wire.open_stream(text)
                    frames = await wire.rest()
                    assert text_of(frames) == text
                    assert frames[-1] == DONE
                else:
                    assert (await wire.chat(text)).json["choices"][0]["message"]["content"] == text

        await asyncio.gather(*(one(n) for n in range(40)))
        assert served.num_live == 0
        assert served.num_ended("stop") == 40


# --- memory -------------------------------------------------------------------------------------


def memory_for(*lengths: int) -> Memory:
    """The memory of rows of these numbers of tokens."""
    memory = Memory(row_bytes=100, layers=((10, None),))
    return replace(memory, budget_bytes=memory.batch(lengths))


@in_a_loop
async def test_the_context_is_no_longer_than_the_memory(caplog: pytest.LogCaptureFixture) -> None:
    runner = ScriptedRunner(memory_for(512))
    async with serving(runner=runner) as served, await served.wire() as wire:
        assert "memory limits the context to 512 tokens" in caplog.messages
        assert (await wire.get("/v1/models")).json["data"][0]["max_model_len"] == 512
        answer = await wire.chat("x" * 512)
        assert answer.status == 400
        assert answer.error["n_prompt_tokens"] == 512
        assert answer.error["n_ctx"] == 512
        answer = (await wire.chat("x" * 500 + ENDLESS, max_tokens=10_000)).json
        assert answer["usage"]["total_tokens"] == 512
        assert answer["choices"][0]["finish_reason"] == "length"


@in_a_loop
async def test_a_memory_that_holds_all_of_the_context_leaves_it_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(FakeModel(context_size=512), ScriptedRunner(memory_for(512))) as served:
        async with await served.wire() as wire:
            assert (await wire.get("/v1/models")).json["data"][0]["max_model_len"] == 512
        assert caplog.messages == []


@in_a_loop
async def test_a_memory_that_holds_no_sequence_is_no_server() -> None:
    runner = ScriptedRunner(replace(memory_for(1), budget_bytes=150))
    with pytest.raises(LoadError, match=r"insufficient memory: 0 tokens"):
        async with serving(runner=runner):
            pytest.fail("it could serve no request")


@in_a_loop
async def test_rows_that_do_not_fit_together_wait_for_one_another() -> None:
    """Two short rows fit; decoding outgrows the budget, and the preempted one loses no token."""
    runner = ScriptedRunner(memory_for(100, 100))
    async with serving(runner=runner) as served:
        text = "abcdefgh" + ENDLESS

        async def one() -> None:
            async with await served.wire() as wire:
                answer = (await wire.chat(text, max_tokens=300)).json
                assert answer["choices"][0]["message"]["content"] == (text * 40)[:300]

        await asyncio.gather(*(one() for _ in range(4)))
        assert len(runner.admitted) > 4, "no sequence was preempted"
