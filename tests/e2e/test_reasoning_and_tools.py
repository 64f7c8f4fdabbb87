"""Reasoning, tool calls, constraints and the repetition guard in chats.

The server runs in this process around a scripted runner, with real sockets. A debugging loop
refuses tasks, transports and errors that are left behind.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from helpers import DONE, ENDLESS, MARKERS, FakeModel, Frame, Wire, chat_body, in_a_loop, serving
from server_cases import CHAT

from mlxlite.output.constraint import ConstraintError, Kind, TextConstraint

pytestmark = pytest.mark.usefixtures("no_server_thread_is_left")


THOUGHT = "<think>hm, a 3</think>"

CALLS = (
    '<call>{"name": "f", "arguments": {"a": "3"}}</call> '
    '<call>{"name": "g", "arguments": {}}</call>'
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "adds",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    },
    {"type": "function", "function": {"name": "g"}},
]


def marked(**settings: Any) -> FakeModel:
    return FakeModel(output_format=MARKERS, **settings)


def in_parts() -> FakeModel:
    return FakeModel(output_format=replace(MARKERS, has_json_calls=True))


def folded(frames: list[Frame]) -> dict[str, Any]:
    """A stream's message, as one that does not stream has it; calls without their ids."""
    choices = [c for f in frames if f != DONE for c in f.json["choices"]]
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    for choice in choices:
        for name in ("content", "reasoning", "reasoning_content"):
            if name in choice["delta"]:
                message[name] = message.get(name, "") + choice["delta"][name]
        for call in choice["delta"].get("tool_calls", ()):
            called = message.setdefault("tool_calls", [])
            index = call.pop("index")
            if "id" in call:
                assert index == len(called)
                called.append(call)
            else:
                assert index == len(called) - 1
                called[index]["function"]["arguments"] += call["function"]["arguments"]
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    ends = {k: choices[-1][k] for k in ("finish_reason", "stop_reason")}
    return without_ids({"message": message} | ends)


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    calls = choice["message"].get("tool_calls", ())
    ids = [call.pop("id") for call in calls]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("call_") for id in ids)
    return {k: choice[k] for k in ("message", "finish_reason", "stop_reason")}


async def chat_choice(wire: Wire, content: str, **fields: Any) -> dict[str, Any]:
    """A chat's choice, which is the same in a stream, but for the white space of arguments."""
    answer = await wire.chat(content, **fields)
    assert answer.status == 200, answer.body
    choice = without_ids(answer.json["choices"][0])
    await wire.open_stream(content, **fields)
    streamed = folded(await wire.rest())
    calls = (c["message"].get("tool_calls", ()) for c in (streamed, choice))
    for call, other in zip(*calls, strict=True):
        if json.loads(call["function"]["arguments"]) == json.loads(other["function"]["arguments"]):
            call["function"]["arguments"] = other["function"]["arguments"]
    assert streamed == choice
    return choice


@in_a_loop
async def test_reasoning_is_separate_unless_reasoning_format_keeps_it_inline() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        choice = await chat_choice(wire, THOUGHT + "\n\nthree")
        assert choice["message"]["content"] == "three"
        assert choice["message"]["reasoning_content"] == "hm, a 3"
        assert choice["message"]["reasoning"] == "hm, a 3"
        usage = (await wire.chat(THOUGHT + "three")).json["usage"]
        count = usage["completion_tokens_details"]["reasoning_tokens"]
        assert len("hm, a 3") <= count <= len(THOUGHT)
        assert usage["completion_tokens"] == len(THOUGHT + "three") + 1
        for whole in ("auto", "split", "deepseek"):
            assert await chat_choice(wire, THOUGHT + "\n\nthree", reasoning_format=whole) == choice
        within = await chat_choice(wire, THOUGHT + "three", reasoning_format="none")
        assert within["message"]["content"] == THOUGHT + "three"
        assert "reasoning" not in within["message"]


@in_a_loop
async def test_reasoning_that_the_prompt_has_opened_needs_no_marker() -> None:
    async with serving(marked(is_thinking=True)) as served, await served.wire() as wire:
        message = (await chat_choice(wire, "hm</think>three"))["message"]
        assert (message["reasoning"], message["content"]) == ("hm", "three")


@in_a_loop
async def test_calls_are_read_with_the_types_of_their_schemas() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        choice = await chat_choice(wire, f"{THOUGHT}Let me see. {CALLS}", tools=TOOLS)
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        assert choice["message"]["reasoning"] == "hm, a 3"
        assert choice["message"]["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": '{"a":3}'}},
            {"type": "function", "function": {"name": "g", "arguments": "{}"}},
        ]
        assert served.model.rendered[-1][1]["tools"] == [
            TOOLS[0],
            {
                "type": "function",
                "function": {
                    "name": "g",
                    "description": "",
                    "parameters": {"type": "object", "properties": {}},
                },
            },
        ]
        assert (await chat_choice(wire, CALLS, tools=TOOLS))["message"]["content"] is None


@in_a_loop
async def test_arguments_of_json_calls_are_streamed_as_they_are_generated() -> None:
    asked: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1}
    calls = CALLS.replace('"3"', '3, "text": "ab\\n</call>"')
    async with serving(in_parts()) as served, await served.wire() as wire:
        choice = await chat_choice(wire, f"Let me see. {calls}!", tools=TOOLS)
        f, g = (call["function"] for call in choice["message"]["tool_calls"])
        assert f == {"name": "f", "arguments": '{"a":3,"text":"ab\\n</call>"}'}
        assert (g, choice["message"]["content"]) == (
            {"name": "g", "arguments": "{}"},
            "Let me see.!",
        )
        whole = (await wire.chat(calls, **asked)).json["choices"][0]["logprobs"]["content"]
        await wire.open_stream(calls, **asked)
        choices = [c for f in await wire.rest() if f != DONE for c in f.json["choices"]]
        assert [
            entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]
        ] == whole
        assert len(whole) == len(calls)
        found = [call for c in choices for call in c["delta"].get("tool_calls", ())]
        pieces = [call["function"]["arguments"] for call in found if call["index"] == 0]
        assert pieces == ["", *'{"a": 3, "text": "ab\\n</call>"}'], "a character is a token here"
        await wire.open_stream(CALLS, tools=TOOLS)
        (f, _) = folded(await wire.rest())["message"]["tool_calls"]
        assert f["function"]["arguments"] == '{"a": "3"}', "with the model's own types"
        one = await chat_choice(wire, calls + ENDLESS, tools=TOOLS, parallel_tool_calls=False)
        assert [c["function"]["name"] for c in one["message"]["tool_calls"]] == ["f"]


@in_a_loop
async def test_a_streamed_call_that_breaks_is_no_call_and_the_whole_answer_is_text() -> None:
    broken = '<call>{"name": "f", "arguments": {"a": "3", !}}</call> so'
    async with serving(in_parts()) as served, await served.wire() as wire:
        choice = (await wire.chat(broken, tools=TOOLS)).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (broken, "stop")
        await wire.open_stream(broken, tools=TOOLS)
        streamed = folded(await wire.rest())
        (call,) = streamed["message"]["tool_calls"]
        assert call["function"] == {"name": "f", "arguments": '{"a": "3", '}
        assert streamed["message"]["content"] == "!}}</call> so"
        assert streamed["finish_reason"] == "stop"


@in_a_loop
async def test_one_call_is_the_end_where_only_one_is_wanted() -> None:
    async with serving(marked()) as served, await served.wire() as wire:
        choice = await chat_choice(wire, CALLS + ENDLESS, tools=TOOLS, parallel_tool_calls=False)
        assert choice["finish_reason"] == "tool_calls"
        assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["f"]
        assert served.num_live == 0


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (CALLS, {}),
        (CALLS, {"tools": []}),
        (CALLS, {"tools": TOOLS, "tool_choice": "none"}),
        ("<call>{no JSON</call>", {"tools": TOOLS}),
        ("<call>[]</call>", {"tools": TOOLS}),
        ('<call>{"name": "f", "arguments": 5}</call>', {"tools": TOOLS}),
        ('<call>{"name": "f", "argum', {"tools": TOOLS}),
    ],
)
def test_without_tools_or_if_it_cannot_be_read_a_call_is_text(
    content: str, fields: dict[str, Any]
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(marked()) as served, await served.wire() as wire:
            choice = await chat_choice(wire, content, **fields)
            assert choice["message"]["content"] == content
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == "stop"

    test()


@in_a_loop
async def test_what_must_match_is_compiled_before_the_answer_begins() -> None:
    async with serving(marked(is_thinking=True)) as served, await served.wire() as wire:
        for path, body in (
            (CHAT, chat_body("x", guided_regex="a+", thinking_budget=5)),
            ("/v1/completions", {"prompt": "x", "guided_regex": "a+", "thinking_budget": 5}),
        ):
            assert (await wire.post(path, body)).status == 200
        chat, completion = served.model.compiled
        assert chat.constraint == completion.constraint == TextConstraint(Kind.REGEX, "a+")
        assert (chat.is_thinking, completion.is_thinking) == (True, False)
        assert chat.budget == completion.budget == 5
        await wire.chat("x", thinking_budget=0)
        assert (served.model.compiled[-1].constraint, served.model.compiled[-1].budget) == (None, 0)
        await wire.chat("x", response_format={"type": "text"}, tools=TOOLS)
        assert len(served.model.compiled) == 3, "nothing has to match"


STRICT = [{"function": {"name": "f", "strict": True}}, {"function": {"name": "g"}}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_strict_tool_that_cannot_be_enforced_is_served_and_named(stream: bool) -> None:
    @in_a_loop
    async def test() -> None:
        model = marked(compile_error=ConstraintError("no such thing"))
        async with serving(model) as served, await served.wire() as wire:
            answer = await wire.chat("x", stream=stream, tools=STRICT)
            assert answer.status == 200
            assert answer["x-mlxlite-ignored"] == "tools[0].function.strict"
        async with serving(model, strict_fields=True) as served, await served.wire() as wire:
            answer = await wire.chat("x", stream=stream, tools=STRICT)
            assert (answer.status, answer.error["param"]) == (400, "tools[0].function.strict")

    test()


def test_what_a_grammar_leaves_out_is_named() -> None:
    class Leaves(FakeModel):
        def compile(self, *args: Any, **more: Any) -> Any:
            left_out = ("response_format.json_schema.schema:not",)
            return replace(super().compile(*args, **more), left_out=left_out)

    @in_a_loop
    async def test() -> None:
        schema = {"type": "object", "not": {}}
        asked = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        async with serving(Leaves()) as served, await served.wire() as wire:
            answer = await wire.chat("x", response_format=asked)
            assert answer.status == 200
            assert "json_schema.schema" in answer["x-mlxlite-ignored"]
            assert "not" in answer["x-mlxlite-ignored"]
        async with serving(Leaves(), strict_fields=True) as served, await served.wire() as wire:
            assert (await wire.chat("x", response_format=asked)).status == 400

    test()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"grammar": "?"}, "grammar"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"thinking_budget": 5}, "thinking_budget"),
        ({"thinking_budget_tokens": 5}, "thinking_budget"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_cannot_be_compiled_is_a_400_with_the_reason(
    fields: dict[str, Any], param: str, stream: bool
) -> None:
    @in_a_loop
    async def test() -> None:
        model = marked(compile_error=ConstraintError("no such thing"))
        async with serving(model) as served, await served.wire() as wire:
            answer = await wire.chat("x", stream=stream, **fields)
            assert answer.status == 400
            assert answer.error["param"] == param
            assert answer.error["message"] == f"'{param}': no such thing"
            assert served.runner.admitted == []
            assert (await wire.chat("x")).status == 200

    test()


@in_a_loop
async def test_the_repetition_guard_ends_a_looping_answer_when_enabled() -> None:
    async with serving(repetition_guard=64) as served, await served.wire() as wire:
        choice = await chat_choice(wire, "over and " + ENDLESS)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "repetition")
        written = choice["message"]["content"]
        assert 64 <= len(written) <= 64 + 2 * 16
        assert written.startswith("over and " + ENDLESS)
        straight = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
        choice = await chat_choice(wire, straight)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
        assert choice["message"]["content"] == straight
    async with serving() as served, await served.wire() as wire:
        choice = await chat_choice(wire, "over and " + ENDLESS, max_tokens=500)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        assert len(choice["message"]["content"]) == 500
