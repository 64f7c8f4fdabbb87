"""Tools in the forms that agents send: namespaces, free text, tools that are added later, and the
answers in the same forms.
"""

import json
from typing import Any

import pytest
from api_requests import parse
from dialects import (
    DONE,
    HELLO,
    RESP,
    USAGE,
    USER,
    called,
    choice_of,
    frames,
    messages,
    refusal,
    response,
    responses_writer,
    run,
    token_bytes,
    validated,
)

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.endpoints.chat_completions import ChatWriter
from mlxlite.api.endpoints.responses import ResponsesRequest
from mlxlite.api.tools import MAX_TOOLS

CREATE = {"type": "function", "name": "create", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "apply_patch", "description": "a patch"}
GROUP = {
    "type": "namespace",
    "name": "mcp__crm",
    "description": "customers",
    "tools": [CREATE, PATCH, {"type": "web_search"}],
}
PATCHED = ToolCall("call_1", "apply_patch", '{"input":"*** \\"patch\\""}')
CREATED = ToolCall("call_2", "mcp__crm__create", "{}")


def names(request: Any) -> list[str]:
    return [tool.name for tool in request.tools]


def test_the_tools_of_a_namespace_bear_its_name() -> None:
    request = response(tools=[CREATE, GROUP])
    assert names(request) == ["create", "mcp__crm__create", "mcp__crm__apply_patch"]
    assert [tool.description for tool in request.tools] == ["", "customers", "a patch"]
    assert [tool.own_name for tool in request.tools] == ["create", "create", "apply_patch"]
    assert request.ignored == ("tools[1].tools[2]:web_search",)


@pytest.mark.parametrize(
    ("group", "param"),
    [
        ({"type": "namespace"}, "tools[0].name"),
        ({"type": "namespace", "name": "a"}, "tools[0].tools"),
        ({"type": "namespace", "name": "a", "tools": [5]}, "tools[0].tools[0]"),
        ({**GROUP, "tools": [{"type": "function"}]}, "tools[0].tools[0].function"),
        ({**GROUP, "tools": [{**CREATE, "name": f"f{i}"} for i in range(MAX_TOOLS + 1)]}, "tools"),
    ],
)
def test_a_namespace_that_is_none_is_refused_by_the_field_at_fault(group: Any, param: str) -> None:
    assert refusal(response, tools=[group]).param == param


@pytest.mark.parametrize(
    ("choice", "wanted", "is_forced"),
    [
        ({"type": "function", "name": "create", "namespace": "mcp__crm"}, [1], True),
        ({"type": "function", "name": "create"}, [0], True),
        ({"type": "custom", "name": "apply_patch", "namespace": "mcp__crm"}, [2], True),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "create"}],
            },
            [0],
            False,
        ),
        ("required", [0, 1, 2], True),
    ],
)
def test_a_choice_names_a_tool_of_a_namespace(choice: Any, wanted: Any, is_forced: bool) -> None:
    request = response(tools=[CREATE, GROUP], tool_choice=choice)
    every = names(response(tools=[CREATE, GROUP]))
    assert names(request) == [every[i] for i in wanted]
    assert (request.constraint is not None) is is_forced


@pytest.mark.parametrize("kind", ["web_search", "mcp", "image_generation", "next_year"])
def test_a_choice_of_what_its_vendor_runs_is_refused(kind: str) -> None:
    error = refusal(response, tools=[{"type": kind}, CREATE], tool_choice={"type": kind})
    assert (error.param, error.code) == ("tool_choice.type", "unsupported_parameter")


def test_calls_of_a_history_have_the_names_that_the_model_saw() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "create", "namespace": "mcp__crm"}
    patch = {"type": "custom_tool_call", "call_id": "d", "name": "apply_patch", "input": "***"}
    done = [
        {"type": f"{kind}_output", "call_id": "c", "output": "ok"}
        for kind in ("function_call", "custom_tool_call")
    ]
    request = response(input=[*HELLO, {**call, "arguments": "{}"}, patch, *done])
    assert request.messages[1].tool_calls == (
        ToolCall("c", "mcp__crm__create", {}),
        ToolCall("d", "apply_patch", {"input": "***"}),
    )
    assert [message.content for message in request.messages[2:]] == ["ok", "ok"]


@pytest.mark.parametrize("kind", ["additional_tools", "tool_search_output"])
def test_tools_that_come_with_the_input_are_added(kind: str) -> None:
    more = {"type": kind, "tools": [{**CREATE, "name": "late"}, {**CREATE, "description": "new"}]}
    request = response(tools=[CREATE], input=[*HELLO, more])
    assert [(tool.name, tool.description) for tool in request.tools] == [
        ("create", "new"),
        ("late", ""),
    ]
    assert (request.messages, request.ignored) == ((USER,), ())


def test_an_answer_has_namespaces_and_free_text_in_their_own_items() -> None:
    writer = responses_writer(tools=[PATCH, {**GROUP, "tools": [CREATE]}])
    stream = run(writer, [*called(PATCHED, '{"input":"*', '** \\"patch\\""}'), *called(CREATED)])
    events = validated(stream)
    deltas = [data for kind, data in events if kind == "response.custom_tool_call_input.delta"]
    assert [data["delta"] for data in deltas] == ['*** "patch"']
    done = [data["item"] for kind, data in events if kind == "response.output_item.done"]
    assert done == [
        {
            "id": "ctc_1",
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "apply_patch",
            "input": '*** "patch"',
        },
        {
            "id": "fc_2",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_2",
            "name": "create",
            "namespace": "mcp__crm",
            "arguments": "{}",
        },
    ]
    whole = responses_writer(tools=[PATCH, {**GROUP, "tools": [CREATE]}])
    pieces = [*called(PATCHED), *called(CREATED)]
    body = json.loads(whole.whole([choice_of(pieces, DONE)], USAGE))
    assert body["output"] == done
    assert writer.answer == whole.answer


def test_the_items_of_an_answer_are_parts_of_its_message() -> None:
    writer = responses_writer(tools=[PATCH])
    run(writer, ["hello", *called(PATCHED)])
    assert writer.pieces() == {
        "msg_1": Message(Role.ASSISTANT, "hello"),
        "ctc_1": Message(
            Role.ASSISTANT,
            None,
            tool_calls=(ToolCall("call_1", "apply_patch", {"input": '*** "patch"'}),),
        ),
    }


def test_a_silent_stream_shows_life_in_the_dialects_own_events() -> None:
    writer = responses_writer()
    writer.begin()
    (beat,) = frames(writer.beat())
    assert beat[0] == "response.in_progress"
    assert beat[1]["sequence_number"] == 2
    assert beat[1]["response"]["status"] == "in_progress"


# --- references to stored items -----------------------------------------------------------------


def referring(*items: Any) -> ResponsesRequest:
    request = response(input=list(items))
    assert isinstance(request, ResponsesRequest)
    return request


def test_a_reference_becomes_the_item_that_is_stored() -> None:
    request = referring(*HELLO, {"type": "item_reference", "id": "msg_1"}, *HELLO)
    answer = Message(Role.ASSISTANT, "hi")
    found = request.after((), {"msg_1": answer}.get)
    assert found.messages == (USER, answer, USER)


def test_a_reference_to_what_is_gone_is_a_404_by_name() -> None:
    request = referring({"type": "item_reference", "id": "msg_1"})
    with pytest.raises(Exception, match="'msg_1'") as caught:
        request.after(())
    assert (caught.value.status, caught.value.param) == (404, "input[0]")  # type: ignore[attr-defined]


# --- chats --------------------------------------------------------------------------------------


def chat_writer(**fields: Any) -> ChatWriter:
    request = parse(**fields)
    return ChatWriter(RESP, token_bytes, tools=request.tools, has_functions=request.has_functions)


def deltas_of(stream: bytes) -> list[Any]:
    chunks = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line]
    return [json.loads(chunk)["choices"][0] for chunk in chunks if chunk != "[DONE]"]


CHAT_PATCH = {"type": "custom", "custom": {"name": "apply_patch"}}


def test_a_chat_answers_free_text_as_a_custom_call() -> None:
    writer = chat_writer(tools=[CHAT_PATCH])
    choices = deltas_of(run(writer, called(PATCHED, '{"input":', '"*** \\"patch\\""}')))
    calls = [
        choice["delta"]["tool_calls"][0] for choice in choices if "tool_calls" in choice["delta"]
    ]
    assert calls == [
        {
            "index": 0,
            "id": "call_1",
            "type": "custom",
            "custom": {"name": "apply_patch", "input": ""},
        },
        {"index": 0, "custom": {"input": '*** "patch"'}},
    ]
    body = json.loads(
        chat_writer(tools=[CHAT_PATCH]).whole([choice_of(called(PATCHED), DONE)], USAGE)
    )
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert call == {
        "id": "call_1",
        "type": "custom",
        "custom": {"name": "apply_patch", "input": '*** "patch"'},
    }


def test_functions_are_answered_by_a_function_call() -> None:
    functions = [{"name": "create"}]
    call = ToolCall("call_1", "create", '{"a":1}')
    done = type(DONE)(DONE.reason, DONE.usage, num_calls=1)
    choices = deltas_of(run(chat_writer(functions=functions), called(call), done))
    shown = [
        choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]
    ]
    assert shown == [{"name": "create", "arguments": ""}, {"arguments": '{"a":1}'}]
    assert choices[-1]["finish_reason"] == "function_call"
    body = json.loads(
        chat_writer(functions=functions).whole([choice_of(called(call), done)], USAGE)
    )
    (choice,) = body["choices"]
    assert choice["message"]["function_call"] == {"name": "create", "arguments": '{"a":1}'}
    assert choice["finish_reason"] == "function_call"
    assert "tool_calls" not in choice["message"]


def test_a_schema_may_have_either_dialects_form() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    flat = {"type": "json_schema", "name": "x", "schema": schema}
    nested = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    own, other = parse(response_format=nested).constraint, parse(response_format=flat).constraint
    assert own == other
    assert refusal(response, text={"format": {**flat, "schema": 5}}).param == "text.format.schema"


def test_a_message_of_nothing_but_a_result_is_no_error() -> None:
    result = {"type": "tool_result", "tool_use_id": "x", "content": None}
    assert messages(messages=[{"role": "user", "content": [result]}]).messages[0].content == ""


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_tool_that_a_message_of_anthropics_defines_is_added(role: str) -> None:
    definition = {"name": "late", "input_schema": {"type": "object"}}
    blocks = [
        {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": definition}},
        {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "early"}},
    ]
    request = messages(
        messages=[*HELLO, {"role": role, "content": blocks}, *HELLO],
        tools=[{"name": "early", "input_schema": {}}],
    )
    assert names(request) == ["early", "late"]
    assert request.ignored == ()
    assert [message.content for message in request.messages if message.content] == ["hello"] * 2
