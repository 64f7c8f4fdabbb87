"""Fields of chats: what a stream emits on request, and what the template receives.

Over HTTP, around a scripted runner that repeats the characters of its prompt: each text, count and
place is known in advance.
"""

import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
from helpers import ENDLESS, FakeModel, chat_body, in_a_loop, request, serving, until
from server_cases import CHAT, COMPLETIONS, PROMPT, stream

from mlxlite.engine.sequence import Prompt

# --- chats: what a stream emits on demand -------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("n", [1, 3])
def test_progress_rises_to_the_prompts_end_before_the_first_token(path: str, n: int) -> None:
    @in_a_loop
    async def test() -> None:
        settings: Any = {"prefill_chunk_size": 8, "kv_block_size": 4}
        async with serving(**settings) as served, await served.wire() as wire:
            asked = {"return_progress": True, "n": n, "prompt": PROMPT} | chat_body(PROMPT)
            asked.pop("messages" if path == COMPLETIONS else "prompt")
            for num_cached in (0, 16):
                chunks = await stream(wire, path, asked)
                progress = [c["prompt_progress"] for c in chunks if "prompt_progress" in c]
                kinds = ["prompt_progress" in c for c in chunks]
                has_text = [any(_text(choice) for choice in c["choices"]) for c in chunks]
                assert kinds.index(True) < has_text.index(True)
                assert True not in kinds[has_text.index(True) :], "none after the first token"
                assert {(p["total"], p["cache"]) for p in progress} == {(40, num_cached)}
                processed = [p["processed"] for p in progress]
                assert processed == sorted(set(processed))
                assert num_cached < processed[0]
                assert processed[-1] == 39, "the last prompt token is computed with the first row"
                times = [p["time_ms"] for p in progress]
                assert times == sorted(times)
                assert times[0] >= 0
                assert len(processed) > 1
                # The next time, half of the prompt is known.
                asked = json.loads(json.dumps(asked).replace(PROMPT[16:], PROMPT[16:][::-1]))

    test()


def _text(choice: Mapping[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


@in_a_loop
async def test_a_preempted_prompt_reports_no_progress_of_its_second_prefill() -> None:
    async with serving(max_batch_size=1) as served, await served.wire() as wire:
        served.runner.hold()
        await wire.open_stream("abc" + ENDLESS, priority=1, max_tokens=12, return_progress=True)
        served.runner.allow(6)
        await until(lambda: served.runner.num_drawn.get(1, 0) >= 4)
        async with await served.wire() as urgent:
            await urgent.send(
                request("POST", CHAT, json.dumps(chat_body("xyz", priority=0)).encode())
            )
            await until(lambda: served.num_live == 2)
            served.runner.release()
            assert (await urgent.answer()).status == 200
        chunks = [frame.json for frame in (await wire.rest())[:-1]]
        assert served.runner.admitted == [1, 2, 1], "it was preempted"
        has_text = [bool(_text(choice)) for c in chunks for choice in c["choices"]]
        has_progress = ["prompt_progress" in c for c in chunks]
        assert True in has_progress
        assert True not in has_progress[has_text.index(True) :]
        assert all(c["prompt_progress"]["processed"] <= 4 for c in chunks if "prompt_progress" in c)


@in_a_loop
async def test_only_a_stream_that_requests_progress_has_it() -> None:
    async with serving() as served, await served.wire() as wire:
        for fields in ({}, {"return_progress": False}):
            chunks = await stream(wire, CHAT, chat_body("hello", **fields))
            assert not any("prompt_progress" in chunk for chunk in chunks)
        answer = await wire.chat("hello", return_progress=True)
        assert "prompt_progress" not in answer.json


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 1}])
def test_timings_and_usage_of_each_token_add_up(path: str, n: int, extra: dict[str, Any]) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            options = {"include_usage": True, "continuous_usage_stats": True}
            asked: dict[str, Any] = {
                "prompt": "hello",
                **chat_body("hello"),
                **{"timings_per_token": True, "stream_options": options, "n": n},
                **(extra if path == CHAT else {}),
            }
            asked.pop("messages" if path == COMPLETIONS else "prompt")
            chunks = await stream(wire, path, asked)
            for index in range(n):
                own = [c for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
                texts = [c for c in own if _text(c["choices"][0])]
                assert [c["timings"]["predicted_n"] for c in texts] == [1, 2, 3, 4, 5]
                assert [c["usage"]["completion_tokens"] for c in texts] == [1, 2, 3, 4, 5]
                assert {c["timings"]["prompt_n"] + c["timings"]["cache_n"] for c in texts} == {5}
                times = [c["timings"]["predicted_ms"] for c in texts]
                assert times == sorted(times)
            assert chunks[-1]["choices"] == []
            assert chunks[-1]["usage"]["completion_tokens"] == 6 * n
            plain = await stream(wire, path, {**asked, "timings_per_token": False})
            assert not any("timings" in c for c in plain if c["choices"] and _text(c["choices"][0]))

    test()


@in_a_loop
async def test_continuous_usage_needs_include_usage() -> None:
    async with serving() as served, await served.wire() as wire:
        options = {"continuous_usage_stats": True}
        chunks = await stream(wire, CHAT, chat_body("hello", stream_options=options))
        assert [("usage" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


# --- chats: what reaches the template -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kwargs"),
    [
        ({}, {}),
        ({"reasoning_effort": None}, {}),
        (
            {"reasoning_effort": "none"},
            {"enable_thinking": False, "reasoning_effort": "none"},
        ),
        ({"reasoning_effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False, "reasoning_effort": "high"},
        ),
        (
            {"reasoning_effort": "none", "chat_template_kwargs": {"reasoning_effort": "x", "a": 1}},
            {"enable_thinking": False, "reasoning_effort": "x", "a": 1},
        ),
    ],
)
def test_an_effort_reaches_the_template(fields: dict[str, Any], kwargs: dict[str, Any]) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            assert (await wire.chat("hello", n=2, **fields)).status == 200
            assert served.model.rendered[-1][1] == kwargs
            await stream(wire, CHAT, chat_body("hello", **fields))
            assert served.model.rendered[-1][1] == kwargs

    test()


@pytest.mark.parametrize(
    ("fields", "is_continuation"),
    [
        ({}, True),
        ({"continue_final_message": True}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
@pytest.mark.parametrize("n", [1, 3])
def test_a_request_sets_whether_its_last_message_is_continued(
    fields: dict[str, Any], is_continuation: bool, n: int
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            messages = [*chat_body("x")["messages"], {"role": "assistant", "content": "hello"}]
            answer = await wire.post(CHAT, {"messages": messages, "n": n, **fields})
            assert [c["message"]["content"] for c in answer.json["choices"]] == ["hello"] * n
            assert served.model.rendered[-1][2] is is_continuation

    test()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"reasoning_effort": 5}, "reasoning_effort"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
    ],
)
def test_a_chat_that_cannot_be_is_a_400_that_names_the_field(
    fields: dict[str, Any], param: str
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            answer = await wire.chat("hello", **fields)
            assert answer.status == 400
            assert answer.error["param"] == param
            assert served.model.rendered == []

    test()


class Joined(FakeModel):
    """Its prompt is all messages, as a real template's is."""

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
    ) -> Prompt:
        super().render(messages, template_kwargs, is_continuation=is_continuation)
        return Prompt(tuple(map(ord, "|".join(m["content"] for m in messages))))


@pytest.mark.parametrize("as_parts", [False, True])
def test_a_billing_header_hides_no_prefix_and_is_seen_by_no_model(as_parts: bool) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(Joined(), kv_block_size=4) as served, await served.wire() as wire:
            found = []
            for i in range(2):
                parts = [f"x-anthropic-billing-header: cch={i}{i}{i};", PROMPT]
                content: Any = [{"type": "text", "text": part} for part in parts]
                system = {"role": "system", "content": content if as_parts else "\n".join(parts)}
                messages = [system, {"role": "user", "content": "hello"}]
                answer = await wire.post(CHAT, {"messages": messages})
                found.append(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert found == [0, 45], "of 46, all but the last"
            shown = [messages[0]["content"] for messages, _, _ in served.model.rendered]
            assert shown == [PROMPT, PROMPT]
            counted = await wire.post("/tokenize", {"messages": messages})
            assert counted.json["count"] == 46

    test()
