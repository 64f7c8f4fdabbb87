"""OpenAI's Responses: the items of a request, and what Codex sends."""

from contextlib import suppress
from typing import Any

import orjson
import pytest
from dialects import (
    CALLED,
    DOG,
    HELLO,
    JUNK,
    OUTPUT,
    RESP,
    USER,
    called,
    item,
    refusal,
    response,
    run,
    token_bytes,
    validated,
)
from hypothesis import given

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.responses_writer import ResponsesWriter
from mlxlite.api.tools import Tool
from mlxlite.http.errors import APIError
from mlxlite.vision.images import Source

DEEP: dict[str, Any] = {}

for _ in range(300):
    DEEP = {"a": DEEP}


# --- histories ----------------------------------------------------------------------------------


@given(JUNK, JUNK)
def test_junk_in_a_picture_of_responses_is_read_or_refused(url: Any, detail: Any) -> None:
    for part in (item("input_image", image_url=url, detail=detail), item("input_image", **SHOWN)):
        for value in (item("message", role="user", content=[part]), {**OUTPUT, "output": [part]}):
            with suppress(APIError):
                assert len(response(input=[value]).sources) <= 1


FUNCTION = item("function_call", call_id="call_1", name="ls", arguments='{"path": "/"}')

ANSWER = item(
    "message",
    id="msg_1",
    role="assistant",
    status="completed",
    content=[item("output_text", text="hi", annotations=[])],
)


def test_consecutive_items_of_one_turn_become_one_message() -> None:
    thought = item("reasoning", id="rs_1", summary=[item("summary_text", text="hm")])
    second = {**FUNCTION, "call_id": "call_2", "arguments": "not json"}
    request = response(
        input=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [item("input_text", text="a"), item("input_text", text="b")],
            },
            thought,
            ANSWER,
            FUNCTION,
            second,
            OUTPUT,
            {**OUTPUT, "call_id": "call_2", "output": [item("input_text", text="none")]},
            ANSWER,
        ]
    )
    calls = (ToolCall("call_1", "ls", {"path": "/"}), ToolCall("call_2", "ls", "not json"))
    assert request.messages == (
        Message(Role.DEVELOPER, "be brief"),
        Message(Role.USER, "a\nb"),
        Message(Role.ASSISTANT, "hi", reasoning="hm", tool_calls=calls),
        Message(Role.TOOL, "etc", tool_call_id="call_1"),
        Message(Role.TOOL, "none", tool_call_id="call_2"),
        Message(Role.ASSISTANT, "hi"),
    )
    assert not request.is_continuation


SHOWN = item("input_image", image_url="data:image/png;base64,Y2F0")


def show(*parts: Any, role: str = "user") -> dict[str, Any]:
    return item("message", role=role, content=list(parts))


def test_pictures_of_users_and_of_functions_stay_among_the_words_about_them() -> None:
    words = item("input_text", text="a")
    link = item("input_image", image_url=DOG, detail="low", file_id=None)
    request = response(input=[show(words, SHOWN, words, link), {**OUTPUT, "output": [SHOWN]}])
    cat = Source(b"cat", None, "input[0].content[1].image_url")
    dog = Source(None, DOG, "input[0].content[3].image_url", "low")
    other = Source(b"cat", None, "input[1].output[0].image_url")
    assert request.messages == (
        Message(Role.USER, "a\na", parts=("a", cat, "a", dog)),
        Message(Role.TOOL, "", tool_call_id="call_1", parts=(other,)),
    )
    assert request.sources == (cat, dog, other)


def test_a_conversation_includes_the_pictures_of_its_history() -> None:
    before, now = (response(input=[show(SHOWN)]) for _ in range(2))
    assert now.after(before.conversation).sources == before.sources + now.sources


def test_two_answers_in_a_row_stay_two_and_text_after_a_call_begins_another() -> None:
    request = response(input=[*HELLO, ANSWER, ANSWER, FUNCTION, ANSWER])
    assert [bool(turn.tool_calls) for turn in request.messages] == [False, False, True, False]


def test_reasoning_content_is_read_and_reasoning_without_text_is_left_out() -> None:
    whole = item("reasoning", summary=[], content=[item("reasoning_text", text="long")])
    empty = item("reasoning", id="rs_2", summary=[], encrypted_content="gAAAA")
    assert response(input=[*HELLO, whole, FUNCTION]).messages[1].reasoning == "long"
    assert response(input=[*HELLO, empty, FUNCTION]).messages[1].reasoning is None
    assert refusal(response, input=[empty]).param == "input"


@pytest.mark.parametrize(
    ("value", "param"),
    [
        (show(item("input_image")), "input[0].content[0].image_url"),
        (show(item("input_image", image_url={"url": 5})), "input[0].content[0].image_url.url"),
        (show(item("input_image", image_url="file:///x")), "input[0].content[0].image_url"),
        (show(item("input_image", file_id="file-1")), "input[0].content[0].file_id"),
        (show(SHOWN, role="system"), "input[0].content[0].type"),
        (show(item("input_file", file_id="file-1")), "input[0].content[0].type"),
        (show(item("input_audio")), "input[0].content[0].type"),
        (item("message", role="user", content=5), "input[0].content"),
        (item("message", role="judge", content="x"), "input[0].role"),
        (5, "input[0]"),
    ],
)
def test_what_is_asked_and_cannot_be_read_is_refused_by_its_place(value: Any, param: str) -> None:
    assert refusal(response, input=[value]).param == param


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (item("computer_call", id="x"), "input[1]"),
        (item("mcp_list_tools", tools=[]), "input[1]"),
        (item("novelty"), "input[1]"),
        (show(item("input_audio"), role="assistant"), "input[1].content[0]"),
        (show(SHOWN, role="assistant"), "input[1].content[0]"),
        ({**OUTPUT, "output": [item("input_file")]}, "input[1].output[0]"),
        (item("reasoning", summary=[item("image")]), "input[1].summary[0]"),
    ],
)
def test_what_a_history_holds_is_left_out_by_its_place(value: Any, name: str) -> None:
    request = response(input=[*HELLO, value, *HELLO])
    assert request.messages[0] == request.messages[-1] == USER
    assert [left_out.partition(":")[0] for left_out in request.ignored] == [name]


def test_new_instructions_precede_the_history_and_are_not_stored() -> None:
    history = (Message(Role.USER, "before"), Message(Role.ASSISTANT, "yes"))
    request = response(instructions="be brief", previous_response_id="resp_0").after(history)
    assert request.messages == (Message(Role.SYSTEM, "be brief"), *history, USER)
    assert request.conversation == (*history, USER)
    assert response().after(history).messages == request.conversation


F = {"type": "function", "name": "f"}

# --- depth --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "name": "f", "else": DEEP}]}, "tools[0]"),
        ({"text": {"format": {"type": "text", "schema": DEEP}}}, "text.format.schema"),
        ({"tool_choice": {"type": "web_search", "else": DEEP}}, "tool_choice.type"),
        (
            {"tools": [F], "tool_choice": {"type": "function", "name": "f", "x": DEEP}},
            "tool_choice",
        ),
    ],
)
def test_what_responses_repeat_is_never_too_deep_to_write(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(TypeError):
        orjson.dumps(DEEP)
    assert refusal(response, **fields).param == param


# --- what Codex sends ---------------------------------------------------------------------------

CODEX: dict[str, Any] = {
    "model": "gpt-5-codex",
    "instructions": "You are Codex.",
    "input": [
        item("message", role="developer", content=[item("input_text", text="sandboxed")]),
        item("message", role="user", content=[item("input_text", text="<environment_context>")]),
        item("message", role="user", content=[item("input_text", text="list files")]),
        item("reasoning", id="rs_1", summary=[], content=None, encrypted_content="gAAAA"),
        FUNCTION,
        OUTPUT,
    ],
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199-session",
}


def test_what_codex_sends_without_tools_is_accepted() -> None:
    request = response(**CODEX)
    roles = [message.role.value for message in request.messages]
    assert roles == ["system", "developer", "user", "user", "assistant", "tool"]
    assert request.ignored == ()
    assert (request.is_stored, request.is_stream) == (False, True)
    assert request.template_kwargs == {"enable_thinking": True, "reasoning_effort": "medium"}
    validated(run(ResponsesWriter(RESP, token_bytes, request.echo), ["ok"]))


def test_what_codex_sends_with_tools_is_accepted() -> None:
    parameters = {"type": "object", "properties": {"command": {"type": "array"}}}
    shell = item("function", name="shell", description="", strict=False, parameters=parameters)
    request = response(**CODEX | {"tools": [shell]})
    assert request.tools == (Tool("shell", "", parameters),)
    assert (request.max_calls, request.constraint, request.ignored) == (1, None, ())
    writer = ResponsesWriter(RESP, token_bytes, request.echo)
    events = validated(
        run(writer, called(ToolCall("call_1", "shell", '{"command":["ls"]}')), CALLED)
    )
    assert events[-1][1]["response"]["tools"] == [shell]
