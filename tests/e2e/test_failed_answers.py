"""Answers that fail: a step, a sequence, a token, the runner, the writer.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    POISON,
    FakeModel,
    chat_request,
    in_a_loop,
    serving,
    text_of,
    until,
)
from server_cases import assert_ends_with_an_error

from mlxlite.api.endpoints.chat_completions import ChatWriter
from mlxlite.api.service import Phase

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- one answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_token_without_bytes_ends_its_answer_at_once(stream: bool) -> None:
    class Model(FakeModel):
        def token_bytes(self, token: int) -> bytes:
            raise KeyError(token)

    @in_a_loop
    async def test() -> None:
        async with serving(Model()) as served, await served.wire() as wire:
            await wire.send(chat_request("hello", logprobs=True, stream=stream))
            head = await asyncio.wait_for(wire.head(), 2)
            assert head.status == (200 if stream else 500)
            if stream:
                assert (await asyncio.wait_for(wire.rest(), 2))[-1] == DONE
            await until(lambda: served.num_live == 0)

    test()


@pytest.mark.parametrize("names", [("begin",), ("event", "fail"), ("done", "fail")])
def test_an_answer_that_cannot_even_fail_is_cut_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("a mistake of ours")

    for name in names:
        monkeypatch.setattr(ChatWriter, name, fail)

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.open_stream("hello")).status == 200
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(wire.rest(), 2)
            await until(lambda: served.num_live == 0)
            assert not served.server.service.running
            await until(lambda: served.num_clients == 0)
            async with await served.wire() as other:
                assert (await other.chat("hello")).status == 200

    test()


# --- steps, sequences, the runner ---------------------------------------------------------------


@in_a_loop
async def test_a_failed_step_ends_its_requests_with_an_error_and_later_ones_are_served() -> None:
    async with (
        serving(max_batch_size=2) as served,
        await served.wire() as streamed,
        await served.wire() as whole,
        await served.wire() as waiting,
    ):
        await streamed.open_stream(ENDLESS)
        await whole.send(chat_request(ENDLESS))
        await until(lambda: len(served.runner.num_drawn) == 2)
        await waiting.send(chat_request("hello"))
        await until(lambda: served.num_live == 3)
        served.runner.error = RuntimeError("[metal] out of memory")
        assert_ends_with_an_error(await streamed.rest(), "out of memory")
        answer = await whole.answer()
        assert answer.status == 500
        assert answer.error["code"] == "model_error"
        assert "out of memory" in answer.error["message"]
        assert (await waiting.answer()).json["choices"][0]["message"]["content"] == "hello"
        assert served.runner.num_resets == 1
        assert served.num_ended("error") == 2
        for wire in (streamed, whole):
            assert (await wire.get("/health")).status == 200
            assert (await wire.chat("x")).status == 200


@in_a_loop
async def test_a_sequence_that_fails_alone_costs_nothing_but_itself() -> None:
    async with serving() as served, await served.wire() as one, await served.wire() as other:
        await other.open_stream("x" * 30)
        await one.open_stream("he" + POISON + "llo")
        frames = await one.rest()
        assert text_of(frames) == "he"
        assert_ends_with_an_error(frames, "this sequence has failed")
        answer = await one.chat(POISON)
        assert answer.status == 500
        assert answer.error["message"] == "this sequence has failed"
        assert text_of(await other.rest()) == "x" * 30
        assert served.runner.num_resets == 0


@in_a_loop
async def test_a_runner_that_cannot_be_reset_makes_health_and_requests_fail() -> None:
    async with serving() as served, await served.wire() as wire, await served.wire() as control:
        await wire.open_stream(ENDLESS)
        await wire.frame()
        served.runner.reset_error = RuntimeError("the device is gone")
        served.runner.error = RuntimeError("the device hangs")
        assert (await wire.rest())[-1] == DONE
        await until(lambda: served.server.service.phase is Phase.FAILED)
        health = await control.get("/health")
        assert health.status == 503
        assert health.json["status"] == "error"
        assert "the device is gone" in health.json["reason"]
        answer = await control.chat("x")
        assert answer.status == 503
        assert int(answer["retry-after"]) > 0
        assert (await control.get("/metrics")).status == 200
