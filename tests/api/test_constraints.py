"""Tools: what a request may ask, what the template sees, and how an answer carries calls."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from live import serving
from openai import OpenAI
from openai.types.chat import ChatCompletion

import mlxlite
from mlxlite.api.conversation import ToolCall
from mlxlite.api.endpoints.chat_completions import ChatWriter, parse_chat
from mlxlite.api.request import ChatRequest
from mlxlite.api.tools import MAX_TOOLS, stable
from mlxlite.api.writers import Collected, Envelope, StreamOptions
from mlxlite.engine.sequence import FinishReason, Usage
from mlxlite.http.errors import APIError
from mlxlite.output.constraint import CallConstraint, Constraint, Kind, TextConstraint
from mlxlite.output.events import (
    Done,
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)
from mlxlite.output.tool_arguments import coerced

USER = {"role": "user", "content": "Hello"}


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": [USER], **fields}).encode())


def refusal(**fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        chat(**fields)
    assert caught.value.status == 400
    return caught.value


def names(request: ChatRequest) -> list[str]:
    return [tool.name for tool in request.tools]


def enforced(**fields: Any) -> tuple[CallConstraint, str]:
    """The constraint on calls, and the field that asks for it."""
    found = chat(**fields).constraint
    assert found is not None
    constraint, name = found
    assert isinstance(constraint, CallConstraint)
    return constraint, name


def schemas(given: CallConstraint) -> dict[str, Any]:
    """The arguments of each tool."""
    return {tool.name: json.loads(tool.parameters) for tool in given.tools}


# --- tools --------------------------------------------------------------------------------------


def test_a_function_of_a_name_alone_takes_an_empty_object():
    (tool,) = chat(tools=[function()]).tools
    assert tool.as_template() == {
        "type": "function",
        "function": {
            "name": "f",
            "description": "",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    assert not tool.is_strict


@pytest.mark.parametrize("parameters", [None, {}])
def test_empty_parameters_are_a_schema_of_an_empty_object(parameters: Any):
    (tool,) = chat(tools=[function(parameters=parameters, description=None, strict=None)]).tools
    assert tool.parameters == {"type": "object", "properties": {}}


@pytest.mark.parametrize("name", ["f", "F_1-2.3:4", "x" * 128])
def test_names_of_functions_are_letters_digits_and_marks(name: str):
    assert names(chat(tools=[function(name)])) == [name]


@pytest.mark.parametrize("name", ["", "x" * 129, "a b", "é", "a/b", "f\n", "<tool_call>", None, 3])
def test_other_names_are_refused(name: Any):
    assert refusal(tools=[function(name)]).param == "tools[0].function.name"


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ("f", "tools"),
        ([3], "tools[0]"),
        ([None], "tools[0]"),
        ([{}], "tools[0].function"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": "f"}], "tools[0].function"),
        ([function("f"), function("g", parameters=3)], "tools[1].function.parameters"),
        ([function(parameters=[1])], "tools[0].function.parameters"),
        ([function(description=3)], "tools[0].function.description"),
        ([function(strict="yes")], "tools[0].function.strict"),
        ([function("f"), function("g"), function("f")], "tools"),
        ([function(f"f{i}") for i in range(MAX_TOOLS + 1)], "tools"),
    ],
)
def test_tools_that_are_none_are_refused_by_the_field_at_fault(tools: Any, param: str):
    assert refusal(tools=tools).param == param


def test_agents_with_many_servers_bring_many_tools():
    assert len(chat(tools=[function(f"f{i}") for i in range(MAX_TOOLS)]).tools) == MAX_TOOLS


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "mcp", "x" * 5000])
def test_tools_that_a_vendor_runs_are_left_out_by_name(kind: str):
    request = chat(tools=[{"type": kind, "name": "f"}, function("g")])
    assert names(request) == ["g"]
    (name,) = request.ignored
    assert name.startswith(f"tools[0]:{kind[:200]}")
    assert len(name) < 300
    alone = chat(tools=[{"type": kind}])
    assert (alone.tools, alone.constraint) == ((), None)


@pytest.mark.parametrize("choice", ["required", {"type": "web_search"}])
def test_a_choice_that_needs_a_vendors_tool_is_refused(choice: Any):
    error = refusal(tools=[{"type": "web_search"}], tool_choice=choice)
    assert error.param is not None
    assert error.param.startswith("tool_choice")


def test_the_type_of_a_tool_is_a_string():
    assert refusal(tools=[{"type": 3, "name": "f"}]).param == "tools[0].type"


def test_a_tool_of_free_text_is_a_function_of_one_string():
    (tool,) = chat(tools=[{"type": "custom", "custom": {"name": "f", "description": "d"}}]).tools
    assert (tool.name, tool.description, tool.is_free_text) == ("f", "d", True)
    assert tool.parameters["required"] == ["input"]


def test_the_grammar_of_a_free_text_is_a_hint_that_the_model_reads():
    grammar = {"syntax": "lark", "definition": 'start: "a"'}
    format_ = {"type": "grammar", "grammar": grammar}
    request = chat(tools=[{"type": "custom", "custom": {"name": "f", "format": format_}}])
    assert request.ignored == ("tools[0].custom.format",)
    assert 'start: "a"' in request.tools[0].description


def test_a_function_in_the_form_of_responses_is_one():
    assert names(chat(tools=[{"type": "function", "name": "f"}])) == ["f"]


@pytest.mark.parametrize(
    ("mode", "is_forced"),
    [("auto", False), ("required", True)],
)
def test_a_choice_among_some_tools_hides_the_others(mode: str, is_forced: bool):
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    tools.append({"type": "custom", "custom": {"name": "h"}})
    allowed = {"mode": mode, "tools": [tools[0], tools[2]]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    request = chat(tools=[function("f"), function("g"), tools[2]], tool_choice=choice)
    assert names(request) == ["f", "h"]
    assert (request.constraint is not None) is is_forced


def test_a_tool_without_a_type_is_a_function():
    assert names(chat(tools=[{"function": {"name": "f"}}])) == ["f"]


@pytest.mark.parametrize("tools", [[], None])
def test_no_tools_are_no_tools(tools: Any):
    request = chat(tools=tools)
    assert request.tools == ()
    assert request.constraint is None


def test_functions_are_tools_of_the_older_form():
    assert chat(functions=[{"name": "f"}]).tools == chat(tools=[function()]).tools
    error = refusal(functions=[{"name": "a b"}])
    assert error.param == "functions[0].name"


@pytest.mark.parametrize(
    "functions",
    [[{"name": "f"}, {"name": "f"}], [{"name": f"f{i}"} for i in range(MAX_TOOLS + 1)]],
    ids=["twice", "too many"],
)
def test_functions_have_the_limits_of_tools(functions: Any):
    assert refusal(functions=functions).param == "functions"


# --- the order of a schema's keys ---------------------------------------------------------------

ONE_ORDER = function(
    "f",
    description="d",
    parameters={
        "type": "object",
        "properties": {"b": {"type": "string", "enum": ["z", "a"]}, "a": {"items": {}, "x": 1}},
        "required": ["b", "a"],
        "additionalProperties": False,
    },
)


def reversed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(value)}
    return [reversed_keys(item) for item in value] if isinstance(value, list) else value


def test_two_orders_of_keys_are_one_text_for_the_template():
    first, second = (
        [tool.as_template() for tool in chat(tools=[tools]).tools]
        for tools in (ONE_ORDER, reversed_keys(ONE_ORDER))
    )
    assert json.dumps(first) == json.dumps(second)
    assert json.loads(json.dumps(first)) == [ONE_ORDER]


def test_stable_keeps_the_order_of_arrays_and_every_value():
    value = {"z": [3, 1, {"b": 1, "a": None}], "type": "object", "a": "x", "properties": {"q": 1}}
    assert stable(value) == value
    assert list(stable(value)) == ["type", "properties", "a", "z"]
    assert list(stable(value)["z"][2]) == ["a", "b"]
    assert json.dumps(stable(stable(value))) == json.dumps(stable(value))


def test_two_orders_of_keys_are_one_constraint():
    first, second = (
        chat(tools=[tools], tool_choice="required").constraint
        for tools in (ONE_ORDER, reversed_keys(ONE_ORDER))
    )
    assert first == second


# --- tool_choice --------------------------------------------------------------------------------

TWO = [function("f"), function("g")]


@pytest.mark.parametrize("choice", [None, "auto"])
def test_auto_leaves_it_to_the_model(choice: Any):
    request = chat(tools=TWO, tool_choice=choice)
    assert names(request) == ["f", "g"]
    assert request.constraint is None


def test_none_hides_the_tools():
    request = chat(tools=TWO, tool_choice="none")
    assert request.tools == ()
    assert request.constraint is None


def test_none_hides_strict_tools_too():
    assert chat(tools=[function(strict=True)], tool_choice="none").constraint is None


def test_required_enforces_one_call_or_more_of_any_tool():
    given, name = enforced(tools=TWO, tool_choice="required")
    assert name == "tool_choice"
    assert list(schemas(given)) == ["f", "g"]
    assert (given.is_single, given.is_forced) == (False, True)
    given, _ = enforced(tools=TWO, tool_choice="required", parallel_tool_calls=False)
    assert given.is_single


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "g"}}, {"name": "g"}])
def test_a_named_function_is_the_only_tool_and_called_once(choice: Any):
    request = chat(tools=TWO, tool_choice=choice)
    assert names(request) == ["g"]
    given, _ = enforced(tools=TWO, tool_choice=choice)
    assert list(schemas(given)) == ["g"]
    assert given.is_single


@pytest.mark.parametrize("choice", ["required", {"name": "f"}])
def test_a_choice_needs_tools(choice: Any):
    assert refusal(tool_choice=choice).param == "tool_choice"
    assert refusal(tool_choice=choice, tools=[]).param == "tool_choice"


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_that_chooses_nothing_needs_no_tools(choice: str):
    assert chat(tool_choice=choice).tools == ()


@pytest.mark.parametrize("name", ["h", "F", "x" * 3000])
def test_a_named_function_that_is_not_there_is_refused(name: str):
    choice = {"type": "function", "function": {"name": name}}
    error = refusal(tools=TWO, tool_choice=choice)
    assert error.param == "tool_choice"
    assert name[:10] in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize("choice", ["any", 3, True, [], {}, {"function": "f"}, {"name": 3}])
def test_a_choice_that_is_none_is_refused(choice: Any):
    param = refusal(tools=TWO, tool_choice=choice).param
    assert param is not None
    assert param.startswith("tool_choice")


def test_function_call_is_the_older_tool_choice():
    functions = [{"name": "f"}, {"name": "g"}]
    assert names(chat(functions=functions, function_call="none")) == []
    assert names(chat(functions=functions, function_call={"name": "g"})) == ["g"]
    given, name = enforced(functions=functions, function_call={"name": "g"})
    assert name == "function_call"
    assert given.is_single
    assert refusal(functions=functions, function_call={"name": "h"}).param == "function_call"


def test_a_null_tool_choice_leaves_function_call_in_effect():
    request = chat(functions=[{"name": "f"}], function_call="none", tool_choice=None)
    assert request.tools == ()


# --- strict, parallel ---------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def test_a_strict_tool_enforces_its_arguments_and_leaves_other_tools_any_object():
    tools = [function("f", strict=True, parameters=SCHEMA), function("g", parameters=SCHEMA)]
    given, name = enforced(tools=tools)
    assert name == "tools"
    assert not given.is_forced
    assert schemas(given) == {"f": SCHEMA, "g": {"type": "object"}}


def test_required_enforces_the_arguments_of_all_tools():
    tools = [function("f", parameters=SCHEMA), function("g", strict=True, parameters=SCHEMA)]
    given, name = enforced(tools=tools, tool_choice="required")
    assert name == "tool_choice"
    assert list(schemas(given).values()) == [SCHEMA, SCHEMA]


@pytest.mark.parametrize(("value", "most"), [(False, 1), (True, None), (None, None)])
def test_parallel_tool_calls_false_is_one_call(value: Any, most: int | None):
    assert chat(tools=TWO, parallel_tool_calls=value).max_calls == most


# --- constraints --------------------------------------------------------------------------------

WAYS: dict[str, tuple[Any, Constraint]] = {
    "response_format": ({"type": "json_object"}, TextConstraint(Kind.JSON, '{"type":"object"}')),
    "structured_outputs": ({"regex": "a+"}, TextConstraint(Kind.REGEX, "a+")),
    "json_schema": ({"type": "null"}, TextConstraint(Kind.JSON, '{"type":"null"}')),
    "grammar": ('root ::= "a"', TextConstraint(Kind.GRAMMAR, 'root ::= "a"')),
    "guided_json": ('{"type": "null"}', TextConstraint(Kind.JSON, '{"type":"null"}')),
    "guided_regex": ("[ab]", TextConstraint(Kind.REGEX, "[ab]")),
    "guided_choice": (["x", "y"], TextConstraint(Kind.CHOICE, '["x","y"]')),
    "guided_grammar": ('start: "a"', TextConstraint(Kind.GRAMMAR, 'start: "a"')),
}


@pytest.mark.parametrize("name", WAYS)
def test_each_way_to_constrain_is_read_and_remembers_its_field(name: str):
    value, constraint = WAYS[name]
    assert chat(**{name: value}).constraint == (constraint, name)
    assert chat(**{name: None}).constraint is None


@pytest.mark.parametrize("name", [name for name in WAYS if name != "guided_regex"])
def test_two_constraints_exclude_each_other(name: str):
    error = refusal(**{name: WAYS[name][0], "guided_regex": "a"})
    assert name in error.message
    assert "guided_regex" in error.message


@pytest.mark.parametrize("name", WAYS)
def test_with_tools_an_answer_is_calls_or_matches(name: str):
    fields, answer = {name: WAYS[name][0]}, WAYS[name][1]
    for tools, strict in ((TWO, ()), ([function(strict=True)], ("tools[0].function.strict",))):
        constraint, field = enforced(**fields, tools=tools)
        assert (constraint.answer, constraint.is_forced, field) == (answer, False, name)
        assert constraint.strict == strict
        assert [tool.name for tool in constraint.tools] == [
            tool["function"]["name"] for tool in tools
        ]
    assert chat(**fields, tools=TWO, tool_choice="none").constraint == (answer, name)


@pytest.mark.parametrize("name", WAYS)
def test_of_forced_calls_there_is_no_text_that_could_match(name: str):
    constraint, field = enforced(**{name: WAYS[name][0]}, tools=TWO, tool_choice="required")
    assert (constraint.answer, constraint.is_forced, field) == (None, True, "tool_choice")


@pytest.mark.parametrize("other", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_an_answer_that_must_match_ends_where_it_does(other: dict[str, Any]):
    (name,) = other
    assert refusal(guided_regex="a", **other).param == name
    assert refusal(tools=TWO, tool_choice="required", **other).param == name
    assert chat(tools=TWO, **other).constraint is None
    assert chat(guided_regex="a", **dict.fromkeys(other, 0) | {"ignore_eos": False})


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", "response_format"),
        ({}, "response_format.type"),
        ({"type": "xml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        ({"type": "json_schema", "json_schema": {}}, "response_format.json_schema.schema"),
        (
            {"type": "json_schema", "json_schema": {"schema": "{"}},
            "response_format.json_schema.schema",
        ),
        ({"type": "json_object", "schema": 3}, "response_format.schema"),
    ],
)
def test_a_response_format_that_is_none_is_refused(value: Any, param: str):
    assert refusal(response_format=value).param == param


def test_a_response_format_of_text_is_free():
    assert chat(response_format={"type": "text"}).constraint is None


def test_a_response_format_has_its_schema():
    schema = {"type": "integer"}
    for value in (
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}},
        {"type": "json_object", "schema": schema},
    ):
        found = chat(response_format=value).constraint
        assert found == (TextConstraint(Kind.JSON, '{"type":"integer"}'), "response_format")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": ["a", 3]}, "guided_choice[1]"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"grammar": ""}, "grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": []}, "structured_outputs"),
    ],
)
def test_constraints_that_are_none_are_refused(fields: dict[str, Any], param: str):
    assert refusal(**fields).param == param


def test_structured_outputs_of_nothing_are_free():
    assert chat(structured_outputs={"json": None}).constraint is None
    assert chat(structured_outputs={}).constraint is None


# --- arguments of the types that a schema wants -------------------------------------------------


@pytest.mark.parametrize(
    ("value", "schema", "expected"),
    [
        (3.0, {"type": "integer"}, 3),
        (3.5, {"type": "integer"}, 3.5),
        (3.0, {"type": "number"}, 3.0),
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "string"}, "3"),
        ("3", {"type": ["string", "integer"]}, "3"),
        ("3", {}, "3"),
        ("True", {"type": "boolean"}, True),
        ("yes", {"type": "boolean"}, "yes"),
        ("[1]", {"type": "array"}, [1]),
        ("[1]", {"type": "object"}, "[1]"),
        ("null", {"type": ["integer", "null"]}, None),
        ({"a": ["1", 2.0]}, {"properties": {"a": {"items": {"type": "integer"}}}}, {"a": [1, 2]}),
        ({"b": "1"}, {"properties": {"a": {"type": "integer"}}}, {"b": "1"}),
        (1e20, {"type": "integer"}, 1e20),
        ("123456789012345678901234567890", {"type": "integer"}, "123456789012345678901234567890"),
        ("1e400", {"type": "number"}, "1e400"),
        ("NaN", {"type": "number"}, "NaN"),
        ("3", {"type": None}, "3"),
        ("3", {"type": [["integer"], 3]}, "3"),
        ("3", True, "3"),
        ("3", None, "3"),
    ],
)
def test_arguments_get_the_types_of_their_schema(value: Any, schema: Any, expected: Any):
    found = coerced(value, schema)
    assert found == expected
    assert type(found) is type(expected)


# --- answers ------------------------------------------------------------------------------------

ENVELOPE = Envelope("chatcmpl-1", 1, "m", "fp")
CALLS = [ToolCall(f"call_{i}", name, '{"a":1}') for i, name in enumerate("fgh")]
USAGE = Usage(num_prompt=5, num_output=9, num_reasoning=3)
DONE = Done(FinishReason.STOP, USAGE)


def events_of(call: ToolCall, *arguments: str) -> list[ParserEvent]:
    return [
        ToolCallStart(call.id, call.name),
        *map(ToolCallArguments, arguments),
        ToolCallEnd(call.arguments),
    ]


GROUPS: list[list[ParserEvent]] = [
    [ReasoningDelta("hm")],
    [ReasoningDelta(" so")],
    [TextDelta("I ")],
    [TextDelta("look.")],
    [*events_of(CALLS[0], CALLS[0].arguments), *events_of(CALLS[1], CALLS[1].arguments)],
    events_of(CALLS[2], '{"a"', ":1}"),
]


def flat(groups: list[list[ParserEvent]]) -> list[ParserEvent]:
    return [event for group in groups for event in group]


def whole(events: list[ParserEvent], done: Done) -> dict[str, Any]:
    choice = Collected()
    for event in events:
        choice.take(event)
    choice.done = done
    writer = ChatWriter(ENVELOPE, lambda _: b"")
    answer = json.loads(writer.whole([choice], done.usage))
    folded: dict[str, Any] = answer["choices"][0]
    return folded | {"usage": answer["usage"]}


def streamed(events: list[ParserEvent], done: Done) -> list[dict[str, Any]]:
    writer = ChatWriter(ENVELOPE, lambda _: b"", StreamOptions())
    data = writer.begin() + b"".join(writer.event(0, event) for event in events)
    data += writer.done(0, done, done.usage)
    frames = [frame.removeprefix("data: ") for frame in data.decode().split("\n\n")[:-1]]
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def folded(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's chunks as a client puts them together."""
    message: dict[str, Any] = {"role": None, "content": "", "refusal": None}
    reason = stop = None
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice["delta"]
        message["role"] = message["role"] or delta.get("role")
        message["content"] += delta.get("content") or ""
        for name in ("reasoning", "reasoning_content"):
            if name in delta:
                message[name] = message.get(name, "") + delta[name]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            index = call.pop("index")
            if "id" in call:
                assert index == len(calls), "calls come in order"
                calls.append(call)
            else:
                assert call.keys() == {"function"}
                assert index == len(calls) - 1
                calls[index]["function"]["arguments"] += call["function"]["arguments"]
        assert reason is None, "nothing follows the end"
        reason, stop = choice["finish_reason"], choice.get("stop_reason")
    if not message["content"] and message.get("tool_calls"):
        message["content"] = None
    usage = chunks[-1]["usage"]
    return {
        "index": 0,
        "message": message,
        "logprobs": None,
        "finish_reason": reason,
        "stop_reason": stop,
        "usage": usage,
    }


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("last", range(7))
def test_a_stream_folded_is_the_whole_answer(first: int, last: int, reason: FinishReason):
    events = flat(GROUPS[first:last])
    done = Done(reason, USAGE, num_calls=len(whole(events, DONE)["message"].get("tool_calls", ())))
    assert folded(streamed(events, done)) == whole(events, done)


def test_an_answer_of_calls_alone_has_null_content_and_finish_reason_tool_calls():
    done = Done(FinishReason.STOP, USAGE, num_calls=1)
    answer = whole(GROUPS[5], done)
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["tool_calls"] == [
        {"id": "call_2", "type": "function", "function": {"name": "h", "arguments": '{"a":1}'}}
    ]


def test_an_invalid_call_is_text_and_in_a_stream_the_deltas_sent_so_far():
    broken = [
        TextDelta("a"),
        ToolCallStart("call_0", "f"),
        ToolCallArguments('{"a":'),
        ToolCallInvalid('<call>{"a":'),
        TextDelta("!</call>"),
    ]
    answer = whole(broken, DONE)
    assert answer["message"]["content"] == 'a<call>{"a":!</call>'
    assert "tool_calls" not in answer["message"]
    assert answer["finish_reason"] == "stop"
    message = folded(streamed(broken, DONE))["message"]
    assert message["content"] == "a!</call>"
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a":'}


def test_an_answer_that_was_cut_after_a_call_was_cut():
    done = Done(FinishReason.LENGTH, USAGE, num_calls=3)
    assert whole(flat(GROUPS), done)["finish_reason"] == "length"


def test_reasoning_has_two_names_and_a_count():
    done = Done(FinishReason.STOP, USAGE)
    answer = whole(flat(GROUPS[:4]), done)
    assert answer["message"]["reasoning_content"] == answer["message"]["reasoning"] == "hm so"
    assert answer["message"]["content"] == "I look."
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert "reasoning" not in whole(flat(GROUPS[2:4]), done)["message"]


# --- over HTTP, with the demo model -------------------------------------------------------------

WEATHER = function(
    "get_weather",
    description="Get the weather in a city.",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
)
QUESTION = {"role": "user", "content": "What is the weather in Paris?"}
RESULT = json.dumps({"temperature": 21, "sky": "sunny"})


@pytest.fixture(scope="module")
def server() -> Iterator[mlxlite.Server]:
    with serving(mlxlite.Config(port=0, shutdown_grace_s=0.1)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: mlxlite.Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=30) as client:
        yield client


def create(client: OpenAI, messages: list[Any], **fields: Any) -> ChatCompletion:
    fields = {"model": "demo", "temperature": 0, "max_tokens": 200, "tools": [WEATHER], **fields}
    if not fields.pop("stream", False):
        return client.chat.completions.create(messages=messages, **fields)
    with client.chat.completions.stream(messages=messages, **fields) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


def seen(answer: ChatCompletion) -> dict[str, Any]:
    """An answer without what is never the same."""
    message = answer.choices[0].message
    calls = [
        (call.type, call.function.name, call.function.arguments)
        for call in message.tool_calls or ()
        if call.type == "function"
    ]
    return {
        "content": message.content,
        "calls": calls,
        "reason": answer.choices[0].finish_reason,
        "tokens": answer.usage and answer.usage.completion_tokens,
    }


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_conversation_with_a_tool_takes_two_steps(client: OpenAI, is_stream: bool):
    first = create(client, [QUESTION], stream=is_stream)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert message.content is None or not message.content
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    said = {
        "role": "assistant",
        "content": message.content,
        "tool_calls": [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": "get_weather", "arguments": call.function.arguments},
            }
        ],
    }
    told = {"role": "tool", "tool_call_id": call.id, "content": RESULT}
    second = create(client, [QUESTION, said, told], stream=is_stream)
    assert second.choices[0].finish_reason == "stop"
    assert not second.choices[0].message.tool_calls
    assert "21" in (second.choices[0].message.content or "")


def test_a_stream_with_a_call_equals_the_whole_answer(client: OpenAI):
    one, other = seen(create(client, [QUESTION])), seen(create(client, [QUESTION], stream=True))
    one["content"] = other["content"] = one["content"] or other["content"] or None
    (written,), (streamed,) = one.pop("calls"), other.pop("calls")
    assert one == other
    assert written == ("function", "get_weather", '{"city":"Paris"}')
    assert streamed == ("function", "get_weather", '{"city": "Paris"}'), "as the model writes it"


def raw_stream(client: OpenAI, **fields: Any) -> list[Any]:
    """Its chunks as they come: the client's own accumulator refuses a stream that is cut."""
    chunks = client.chat.completions.create(
        model="demo",
        messages=[QUESTION],  # type: ignore[list-item]
        tools=[WEATHER],  # type: ignore[list-item]
        temperature=0,
        stream=True,
        **fields,
    )
    return [chunk.choices[0] for chunk in chunks]


def test_a_streamed_call_opens_and_its_arguments_follow_as_they_are_generated(client: OpenAI):
    deltas = raw_stream(client)
    calls = [choice.delta.tool_calls for choice in deltas if choice.delta.tool_calls]
    (first,), *others = [[call.model_dump(exclude_unset=True) for call in call] for call in calls]
    assert first.pop("id").startswith("call_")
    opening = {"name": "get_weather", "arguments": ""}
    assert first == {"index": 0, "type": "function", "function": opening}
    told = [more["function"]["arguments"] for (more,) in others]
    assert others == [[{"index": 0, "function": {"arguments": text}}] for text in told]
    assert len(told) > 3
    assert "".join(told) == '{"city": "Paris"}'
    assert not any("<tool_call" in (choice.delta.content or "") for choice in deltas)
    assert deltas[-1].finish_reason == "tool_calls"


def test_an_answer_that_is_cut_inside_a_call_is_its_text(client: OpenAI):
    cut = seen(create(client, [QUESTION], max_tokens=5))
    assert cut["reason"] == "length"
    assert not cut["calls"]
    assert cut["content"].startswith("<tool_call>")


def test_streamed_arguments_that_are_cut_stay_a_prefix_of_the_whole(client: OpenAI):
    num_tokens = seen(create(client, [QUESTION]))["tokens"]
    partial = set()
    for num in range(1, num_tokens):
        chunks = raw_stream(client, max_tokens=num)
        assert chunks[-1].finish_reason == "length"
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        texts = [call.function.arguments or "" for call in calls if call.function]
        partial.add("".join(texts))
    whole = '{"city": "Paris"}'
    assert whole in partial
    assert all(whole.startswith(arguments) for arguments in partial)
    assert len(partial) > 3


def test_an_answer_that_is_cut_right_after_a_call_is_a_call_and_was_cut(client: OpenAI):
    num_tokens = seen(create(client, [QUESTION]))["tokens"]
    cut = seen(create(client, [QUESTION], max_tokens=num_tokens - 1))
    assert cut["calls"] == [("function", "get_weather", '{"city":"Paris"}')]
    assert cut["reason"] == "length"


@pytest.mark.parametrize("is_stream", [False, True])
def test_without_parallel_calls_the_answer_ends_with_its_first(client: OpenAI, is_stream: bool):
    answer = seen(create(client, [QUESTION], parallel_tool_calls=False, stream=is_stream))
    assert len(answer["calls"]) == 1
    assert answer["reason"] == "tool_calls"


def test_a_greeting_needs_no_tool(client: OpenAI):
    answer = seen(create(client, [{"role": "user", "content": "Hello!"}]))
    assert answer["reason"] == "stop"
    assert answer["content"]
    assert not answer["calls"]


def test_with_a_choice_of_none_a_call_would_be_text(client: OpenAI):
    answer = seen(create(client, [QUESTION], tool_choice="none"))
    assert not answer["calls"]
    assert answer["reason"] != "tool_calls"


def test_functions_of_the_older_form_are_called_too(client: OpenAI):
    fields: dict[str, Any] = {"functions": [WEATHER["function"]]}
    answer = create(client, [QUESTION], tools=openai.omit, extra_body=fields)
    (call,) = create(client, [QUESTION]).choices[0].message.tool_calls or ()
    assert call.type == "function"
    choice = answer.choices[0]
    assert choice.finish_reason == "function_call"
    assert choice.message.tool_calls is None
    assert choice.message.function_call is not None
    assert choice.message.function_call.name == call.function.name
    assert choice.message.function_call.arguments == call.function.arguments


def history(arguments: Any) -> list[Any]:
    called = {"id": "call_1", "type": "function"}
    called["function"] = {"name": "get_weather", "arguments": arguments}
    return [
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": RESULT},
    ]


def test_arguments_in_the_history_reach_the_template_as_objects(server: mlxlite.Server):
    assert server.service.ready is not None
    model = server.service.ready.model
    texts = set()
    for arguments in ('{"city": "Paris"}', '{ "city" :"Paris" }', {"city": "Paris"}):
        request = parse_chat(json.dumps({"messages": history(arguments)}).encode())
        messages = [message.as_template() for message in request.messages]
        assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
        prompt = model.render(messages, {}, is_continuation=False)
        texts.add(model.detokenize(prompt.tokens))
    (text,) = texts
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in text
    assert RESULT in text


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "3", ""])
def test_broken_arguments_in_the_history_are_no_reason_to_refuse(client: OpenAI, arguments: str):
    assert create(client, history(arguments)).choices[0].finish_reason == "stop"


def test_reasoning_is_separate_from_the_content_and_counted(client: OpenAI):
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    answer = create(client, question, tools=openai.omit, extra_body=thinks)
    message = answer.choices[0].message.model_dump()
    assert message["reasoning"]
    assert message["reasoning"] == message["reasoning_content"]
    assert "think>" not in message["content"] + message["reasoning"]
    assert "4" in message["content"]
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens is not None
    assert 0 < details.reasoning_tokens < answer.usage.completion_tokens
    streamed = create(client, question, tools=openai.omit, extra_body=thinks, stream=True)
    assert streamed.choices[0].message.content == message["content"]
    within = create(
        client, question, tools=openai.omit, extra_body={**thinks, "reasoning_format": "none"}
    )
    content = within.choices[0].message.content or ""
    assert message["reasoning"] in content
    assert "</think>" in content
    assert "reasoning" not in within.choices[0].message.model_dump()


def test_tools_that_differ_in_the_order_of_keys_share_their_prefix(client: OpenAI):
    properties = {
        f"p{i}": {"type": "string", "enum": [f"{i} of them", f"none of {i}"]} for i in range(30)
    }
    tool = function("cached", description="Look it up.", parameters={"properties": properties})
    first = create(client, [QUESTION], tools=[tool], max_tokens=2)
    again = create(client, [QUESTION], tools=[tool], max_tokens=2)
    other = create(client, [QUESTION], tools=[reversed_keys(tool)], max_tokens=2)
    cached = [
        answer.usage.prompt_tokens_details.cached_tokens
        for answer in (first, again, other)
        if answer.usage is not None and answer.usage.prompt_tokens_details is not None
    ]
    assert cached[1] == cached[2]
    assert (cached[1] or 0) > 200


def test_a_model_without_a_format_for_tools_refuses_them(checkpoint: Path):
    config = mlxlite.Config(model=str(checkpoint), port=0, shutdown_grace_s=0.1)
    with serving(config) as server, OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, [QUESTION])
        assert caught.value.param == "tools"
        hidden = create(client, [QUESTION], tool_choice="none", max_tokens=2)
        assert hidden.choices[0].finish_reason == "length"
