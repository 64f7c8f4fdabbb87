"""Several choices of one chat, and logprobs.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

from typing import Any

import pytest
from helpers import DONE, ENDLESS, chat_request, in_a_loop, serving, text_of, until
from server_cases import assert_ends_with_an_error

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


# --- several choices ----------------------------------------------------------------------------

# A sequence with a temperature begins at the character of its seed: "abc", "bc", "c".
THREE: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 0}


@in_a_loop
async def test_choices_differ_by_their_seeds_and_share_one_prompt() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = (await wire.chat("abc", **THREE)).json
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert texts == ["abc", "bc", "c"]
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        assert answer["usage"]["prompt_tokens"] == 3
        assert answer["usage"]["completion_tokens"] == 4 + 3 + 2, "the ends are counted"
        assert served.num_ended("stop") == 3
        assert (await wire.chat("abc", **THREE)).json["choices"] == answer["choices"]
        (only,) = (await wire.chat("abc", n=1)).json["choices"]
        assert only["message"]["content"] == "abc"


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_of_choices_folds_to_the_whole_answer(include_usage: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            whole = (await wire.chat("abc", **THREE)).json
            options = {"stream_options": {"include_usage": True}} if include_usage else {}
            await wire.open_stream("abc", **THREE, **options)
            frames = await wire.rest()
            assert frames.count(DONE) == 1
            assert frames[-1] == DONE
            chunks = [frame.json for frame in frames[:-1]]
            assert len({chunk["id"] for chunk in chunks}) == 1
            for index, choice in enumerate(whole["choices"]):
                own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                assert own[0]["delta"] == {"role": "assistant", "content": ""}
                reasons = [part["finish_reason"] for part in own]
                assert reasons == [None] * (len(own) - 1) + [choice["finish_reason"]]
                assert text_of(frames, index) == choice["message"]["content"]
            with_usage = [chunk for chunk in chunks if chunk.get("usage") is not None]
            assert with_usage == chunks[-1:], "the usage is sent once, at the end"
            assert chunks[-1]["usage"] == whole["usage"]
            assert (chunks[-1]["choices"] == []) is include_usage
            assert sum("timings" in chunk for chunk in chunks) == 1

    test()


@in_a_loop
async def test_choices_that_do_not_fit_together_run_one_after_another() -> None:
    async with serving(max_batch_size=1) as served, await served.wire() as wire:
        answer = (await wire.chat("abc", **THREE)).json
        assert [c["message"]["content"] for c in answer["choices"]] == ["abc", "bc", "c"]


@pytest.mark.parametrize(
    ("fields", "num_prefilled"), [({}, 99 + 2 * 3), ({"cache_prompt": False}, 3 * 99)]
)
def test_choices_of_a_prompt_are_one_prefill_with_the_prefix_cache_and_else_one_each(
    fields: dict[str, Any], num_prefilled: int
) -> None:
    @in_a_loop
    async def test() -> None:
        content = "abcdefghij" * 10
        async with serving(kv_block_size=16) as served, await served.wire() as wire:
            answer = (await wire.chat(content, **THREE, **fields)).json
            texts = [choice["message"]["content"] for choice in answer["choices"]]
            assert texts == [content, content[1:], content[2:]]
            assert answer["usage"]["prompt_tokens"] == 100
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            assert served.runner.num_prefill_tokens == num_prefilled

    test()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_choice_that_fails_ends_the_answer_with_one_error(stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            served.runner.failing[2] = 5
            await wire.send(chat_request("ab" + ENDLESS, n=3, stream=stream))
            if stream:
                assert (await wire.head()).status == 200
                frames = await wire.rest()
                assert_ends_with_an_error(frames, "this sequence has failed")
                assert sum(frame.name == "error" for frame in frames) == 1
                assert frames.count(DONE) == 1
                assert len(text_of(frames, 1)) == 5
                reasons = [c["finish_reason"] for f in frames[:-3] for c in f.json["choices"]]
                assert set(reasons) == {None}
            else:
                answer = await wire.answer()
                assert answer.status == 500
                assert answer.error["message"] == "this sequence has failed"
            await until(lambda: served.num_live == 0, "the others are not wanted any more")
            assert served.num_ended("error") == 1
            assert served.num_ended("abort") == 2
            await until(lambda: not served.runner.prompts)
            assert (await wire.chat("x")).status == 200

    test()


@in_a_loop
async def test_an_ended_choice_does_not_hinder_the_failure_of_another() -> None:
    async with serving() as served, await served.wire() as wire:
        served.runner.failing[1] = 2
        await wire.open_stream("abc", **THREE)  # "c" has ended by then
        frames = await wire.rest()
        assert_ends_with_an_error(frames, "this sequence has failed")
        assert text_of(frames, 2) == "c"
        answer = await wire.chat("x")
        assert answer.status == 200


@in_a_loop
async def test_cancel_ends_every_choice_of_an_answer() -> None:
    async with serving() as served, await served.wire() as wire, await served.wire() as control:
        await wire.open_stream("ab" + ENDLESS, n=3)
        id = (await wire.frame()).json["id"]
        await until(lambda: len(served.runner.num_drawn) == 3)
        cancelled = await control.post("/v1/cancel", {"id": id})
        assert cancelled.json == {"status": "cancelled", "cancelled_count": 1}
        frames = await wire.rest()
        assert frames.count(DONE) == 1
        ends = [c for f in frames[:-1] for c in f.json["choices"] if c["finish_reason"]]
        assert sorted(c["index"] for c in ends) == [0, 1, 2]
        assert {c["finish_reason"] for c in ends} == {"abort"}
        assert frames[-2].json["usage"]["prompt_tokens"] == 3
        assert served.num_live == 0
        assert served.num_ended("abort") == 3


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("max_batch_size", [1, 2, 8])
def test_a_disconnect_ends_every_choice_of_its_request(max_batch_size: int, stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(max_batch_size=max_batch_size) as served:
            wire = await served.wire()
            await wire.send(chat_request(ENDLESS, n=4, stream=stream))
            await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
            assert served.num_live == 4
            wire.abort()
            await until(lambda: served.num_live == 0, "every choice is gone")
            assert served.num_ended("abort") == 4
            await until(lambda: not served.runner.prompts)
            async with await served.wire() as other:
                assert (await other.chat("hello")).status == 200

    test()


@in_a_loop
async def test_choices_are_queued_all_or_none() -> None:
    async with serving(max_batch_size=1, max_queue=3) as served:
        running, wire, late = await served.wire(), await served.wire(), await served.wire()
        await running.open_stream(ENDLESS)
        await until(lambda: served.runner.num_drawn.get(1, 0) > 0)
        await wire.send(chat_request("hello", n=2))
        await until(lambda: served.num_live == 3)
        assert (await late.chat("hello", n=2)).status == 429
        assert served.num_live == 3
        await running.close()
        assert len((await wire.answer()).json["choices"]) == 2
        await wire.close()
        await late.close()


@in_a_loop
async def test_more_choices_than_the_queue_can_hold_are_not_a_429() -> None:
    async with serving(max_queue=2) as served, await served.wire() as wire:
        answer = await wire.chat("hello", n=3)
        assert answer.status in (200, 400), "a 429 means that a retry may succeed"
        assert answer.status == 200 or answer.error["param"] == "n"


# --- logprobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fields", "tokens"),
    [
        ("héllo", {}, "héllo"),
        ("héllo", {"top_logprobs": 2}, "héllo"),
        ("héllo", {"max_tokens": 2, "top_logprobs": 1}, "hé"),
        ("hello", {"stop": "lo"}, "hello"),  # the tokens were drawn, though not all are shown
        ("abc", {**THREE, "top_logprobs": 20}, "abc"),
    ],
)
def test_logprobs_are_the_same_streamed_or_not(
    content: str, fields: dict[str, Any], tokens: str
) -> None:
    @in_a_loop
    async def test() -> None:
        fields["logprobs"] = True
        async with serving() as served, await served.wire() as wire:
            whole = (await wire.chat(content, **fields)).json
            await wire.open_stream(content, **fields)
            chunks = [frame.json for frame in await wire.rest() if frame != DONE]
            for index, choice in enumerate(whole["choices"]):
                own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
                parts = [part["logprobs"]["content"] for part in own if part["logprobs"]]
                entries = choice["logprobs"]["content"]
                assert [entry for part in parts for entry in part] == entries
                assert "".join(entry["token"] for entry in entries) == tokens[index:]
                assert [entry["logprob"] for entry in entries] == [
                    -0.5 - n for n in range(len(entries))
                ]
                num_top = fields.get("top_logprobs", 0)
                assert {len(entry["top_logprobs"]) for entry in entries} == {num_top}

    test()


@in_a_loop
async def test_logprobs_of_an_answer_without_tokens_are_an_empty_list() -> None:
    async with serving() as served, await served.wire() as wire:
        answer = await wire.chat("hello", logprobs=True, stop_token_ids=[ord("h")])
        (choice,) = answer.json["choices"]
        assert choice["message"]["content"] == ""
        assert choice["logprobs"] == {"content": []}


@in_a_loop
async def test_logprobs_are_null_unless_requested() -> None:
    async with serving() as served, await served.wire() as wire:
        assert (await wire.chat("hello")).json["choices"][0]["logprobs"] is None
        await wire.open_stream("hello", logprobs=False)
        chunks = [frame.json for frame in await wire.rest() if frame != DONE]
        assert all(c["logprobs"] is None for chunk in chunks for c in chunk["choices"])
