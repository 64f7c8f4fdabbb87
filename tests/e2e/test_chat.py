"""Chat completions: streams, whole answers, context, end tokens.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import asyncio
from typing import Any

import pytest
from helpers import DONE, ENDLESS, FakeModel, in_a_loop, serving, text_of
from server_cases import CHAT

from mlxlite.models.interface import PromptError

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- answers ------------------------------------------------------------------------------------


@in_a_loop
async def test_a_stream_is_role_content_finish_done() -> None:
    async with serving() as served, await served.wire() as wire:
        head = await wire.open_stream("hello")
        assert head.status == 200
        assert head["content-type"] == "text/event-stream; charset=utf-8"
        assert head["cache-control"] == "no-cache"
        frames = await wire.rest()
        assert {frame.name for frame in frames} == {"data"}
        assert frames[-1] == DONE
        role, *texts, finish = [frame.json for frame in frames[:-1]]
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(text["choices"][0]["delta"]) == {"content"} for text in texts)
        assert text_of(frames) == "hello"
        assert finish["choices"][0]["delta"] == {}
        assert finish["choices"][0]["finish_reason"] == "stop"
        assert finish["usage"]["prompt_tokens"] == 5
        assert finish["usage"]["completion_tokens"] == 6
        assert finish["timings"]["predicted_n"] == 6
        assert len({frame.json["id"] for frame in frames[:-1]}) == 1
        assert (await wire.get("/health")).status == 200, "the connection lives on"


@in_a_loop
async def test_the_role_leaves_before_the_first_token() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("hello")
        assert (await wire.frame()).json["choices"][0]["delta"]["role"] == "assistant"
        served.runner.release()
        assert text_of(await wire.rest()) == "hello"


@in_a_loop
async def test_each_token_leaves_when_it_is_there() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("abcdef")
        await wire.frame()
        served.runner.allow(1)  # the prefill
        for letter in "abcdef":
            served.runner.allow(1)
            assert text_of([await wire.frame()]) == letter
        served.runner.release()
        assert (await wire.rest())[-1] == DONE


@pytest.mark.parametrize(
    ("content", "fields", "text", "reason"),
    [
        ("hello", {}, "hello", "stop"),
        ("hello", {"max_tokens": 2}, "he", "length"),
        ("hello", {"max_tokens": 6}, "hello", "stop"),
        ("hello" + ENDLESS, {"max_tokens": 8}, "hello∞he", "length"),
        ("hello world", {"stop": " "}, "hello", "stop"),
        ("hello world", {"stop_sequences": ["zz", "lo w"]}, "hel", "stop"),
        ("hello", {"stop": "o", "max_tokens": 5}, "hell", "stop"),
        ("hello", {"stop": "lot"}, "hello", "stop"),
        ('a\n\n\u2028🙂\0"data: [DONE]\\', {}, 'a\n\n\u2028🙂\0"data: [DONE]\\', "stop"),
    ],
)
def test_an_answer_is_the_fold_of_its_stream(
    content: str, fields: dict[str, Any], text: str, reason: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            anew = fields | {"cache_prompt": False}
            whole = (await wire.chat(content, **anew)).json
            await wire.open_stream(content, **anew)
            frames = await wire.rest()
            finish = frames[-2].json
            (choice,) = whole["choices"]
            assert choice["message"]["content"] == text_of(frames) == text
            assert choice["finish_reason"] == finish["choices"][0]["finish_reason"] == reason
            assert whole["usage"] == finish["usage"]
            assert whole["timings"].keys() == finish["timings"].keys()

    test()


@in_a_loop
async def test_usage_has_a_chunk_of_its_own_with_include_usage() -> None:
    async with serving() as served, await served.wire() as wire:
        await wire.open_stream("hello", stream_options={"include_usage": True})
        *_, finish, usage, done = await wire.rest()
        assert done == DONE
        assert finish.json["usage"] is None
        assert finish.json["timings"]["predicted_n"] == 6
        assert usage.json["choices"] == []
        assert usage.json["usage"]["total_tokens"] == 11


@in_a_loop
async def test_messages_and_template_kwargs_reach_the_model() -> None:
    async with serving() as served, await served.wire() as wire:
        history = [
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": "x"},
        ]
        body = {"messages": history, "chat_template_kwargs": {"enable_thinking": False}}
        assert (await wire.post(CHAT, body)).status == 200
        assert served.model.rendered == [
            (
                [{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "x"}],
                {"enable_thinking": False},
                True,
            )
        ]


@in_a_loop
async def test_unknown_fields_are_named_in_a_header() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.chat("x", zeta=1, alpha=2, **{"ü,\n": 3})
        assert answer["x-mlxlite-ignored"] == "alpha,zeta,%C3%BC%2C%0A"
        assert "x-mlxlite-ignored" not in await wire.chat("x")
        streamed = await wire.open_stream("x", zeta=1)
        assert streamed["x-mlxlite-ignored"] == "zeta"
        await wire.rest()
        many = await wire.chat("x", **{f"{n:04}" + "é" * 300: n for n in range(100)})
        assert len(many["x-mlxlite-ignored"]) < 8192, "proxies refuse long headers"


@in_a_loop
async def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    async with serving(FakeModel(context_size=5)) as served, await served.wire() as wire:
        fits = (await wire.chat("abcd")).json
        assert fits["choices"][0] | {"message": None} == {
            "index": 0,
            "message": None,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
        assert fits["usage"]["total_tokens"] == 5
        for content, stream in (("abcde", False), ("abcdef", True)):
            answer = await wire.chat(content, stream=stream)
            assert answer.status == 400
            assert answer.error["type"] == "exceed_context_size_error"
            assert answer.error["n_prompt_tokens"] == len(content)
            assert answer.error["n_ctx"] == 5
            assert "the request exceeds the available context size." in answer.error["message"]
        assert (await wire.chat("abc", max_tokens=1000)).json["usage"]["total_tokens"] == 5


@in_a_loop
async def test_messages_that_the_template_refuses_are_a_400() -> None:
    model = FakeModel(render_error=PromptError("roles must alternate"))
    async with serving(model) as served, await served.wire() as wire:
        answer = await wire.chat("x")
        assert answer.status == 400
        assert answer.error["message"] == "roles must alternate"
        assert answer.error["param"] == "messages"


@pytest.mark.parametrize(
    "error", [RuntimeError("/a/path"), RecursionError("deep"), ZeroDivisionError()]
)
def test_a_template_that_fails_oddly_costs_its_request_and_nothing_else(error: Exception) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(render_error=error)) as served, await served.wire() as wire:
            answer = await asyncio.wait_for(wire.chat("x"), 2)
            assert answer.status == 500
            assert answer.error["code"] == "internal_error"
            assert "/a/path" not in answer.error["message"]
            served.model.render_error = None
            assert (await wire.get("/health")).status == 200
            assert (await wire.chat("x")).status == 200

    test()


# --- end tokens and biases ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "text", "reason", "num_tokens"),
    [
        ({"ignore_eos": True, "max_tokens": 9}, "hello", "length", 9),
        ({"stop_token_ids": [ord("l")]}, "he", "stop", 3),
        ({"stop_token_ids": [ord("z"), 2**31 - 1]}, "hello", "stop", 6),
        ({"stop_token_ids": [ord("l")], "ignore_eos": True}, "he", "stop", 3),
    ],
)
def test_end_tokens_are_the_models_and_the_requests(
    fields: dict[str, Any], text: str, reason: str, num_tokens: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = (await wire.chat("hello", **fields)).json
            (choice,) = answer["choices"]
            assert choice["message"]["content"] == text
            assert choice["finish_reason"] == reason
            assert answer["usage"]["completion_tokens"] == num_tokens

    test()


@in_a_loop
async def test_a_bias_on_a_token_that_the_model_does_not_have_is_a_400() -> None:
    async with serving(FakeModel(num_vocab=100)) as served, await served.wire() as wire:
        assert (await wire.chat("x", logit_bias={"99": 1})).status == 200
        for id in ("100", "999999", "9" * 4000):
            answer = await wire.chat("x", logit_bias={"5": 1, id: 1})
            assert answer.status == 400
            assert answer.error["param"] == "logit_bias"
            assert id[:6] in answer.error["message"]
            assert len(answer.body) < 1000
        assert served.num_ended("stop") == 1
