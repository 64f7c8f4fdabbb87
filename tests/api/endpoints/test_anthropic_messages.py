"""Messages and Responses: requests and answers, checked against both SDKs.

The cases are tables keyed by field, as in `test_request`; a field that has no case fails. Streams
are checked event by event against the vendors' own types, and read by their own clients.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anthropic
import httpx2
import openai
import orjson
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tables import arrived

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.endpoints.anthropic_messages import (
    COUNT_FIELDS,
    MessagesWriter,
    anthropic_error,
    parse_count_tokens,
    parse_messages,
)
from mlxlite.api.endpoints.anthropic_messages import (
    FIELDS as MESSAGES_FIELDS,
)
from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.endpoints.responses import (
    FIELDS as RESPONSES_FIELDS,
)
from mlxlite.api.endpoints.responses import (
    ResponsesRequest,
    parse_responses,
)
from mlxlite.api.fields import Field, Use, markdown
from mlxlite.api.generate import context_exceeded
from mlxlite.api.request import ChatRequest
from mlxlite.api.responses_writer import ResponsesWriter
from mlxlite.api.shared_fields import GENERATION_FIELDS
from mlxlite.api.stored_responses import MAX_CONVERSATIONS, StoredResponses
from mlxlite.api.tools import MAX_TOOLS, Tool
from mlxlite.api.writers import Collected, Envelope, StreamOptions
from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.http.errors import APIError, ErrorKind
from mlxlite.output.events import (
    Done,
    ParserEvent,
    Progress,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)
from mlxlite.output.grammar import Constraint, Kind, TextConstraint
from mlxlite.vision.images import Source

HELLO = [{"role": "user", "content": "hello"}]
USER = Message(Role.USER, "hello")
USAGE = Usage(num_prompt=10, num_cached=4, num_output=5, num_reasoning=2, decode_s=2.0)
DONE = Done(FinishReason.STOP, USAGE)
CUT = Done(FinishReason.LENGTH, USAGE)
CANCELLED = Done(FinishReason.CANCELLED, USAGE)
STOPPED = Done(FinishReason.STOP, USAGE, stop="###")
CALLED = Done(FinishReason.STOP, USAGE, num_calls=2)
FAILURE = APIError(ErrorKind.MODEL_FAILED, "the model failed")
AWKWARD = [
    "plain",
    "",
    'a "b" \\',
    "line\nbreak\r\n",
    "\0\x1f\x85\u2028",
    "🙂 日本語",
    "data: x\n\n",
]
LOGPROBS = "message.output_text.logprobs"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "Get the weather in a city.", SCHEMA)
ABOUT = {"name": WEATHER.name, "description": WEATHER.description}
MESSAGES_TOOL = {**ABOUT, "input_schema": SCHEMA}
RESPONSES_TOOL = {"type": "function", **ABOUT, "parameters": SCHEMA}
CHAT_TOOL = {"type": "function", "function": {**ABOUT, "parameters": SCHEMA}}
SCHEMA_CONSTRAINT = TextConstraint(Kind.JSON, json.dumps(SCHEMA, separators=(",", ":")))
OBJECT_CONSTRAINT = TextConstraint(Kind.JSON, '{"type":"object"}')


def token_bytes(token: int) -> bytes:
    return bytes([token])


def messages(**fields: Any) -> ChatRequest:
    body = {"model": "tiny", "max_tokens": 2048, "messages": HELLO, **fields}
    return parse_messages(json.dumps(body).encode())


def count(**fields: Any) -> ChatRequest:
    return parse_count_tokens(json.dumps({"messages": HELLO, **fields}).encode())


def response(**fields: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "tiny", "input": "hello", **fields}).encode())


DEEP: dict[str, Any] = {}
for _ in range(300):
    DEEP = {"a": DEEP}

Parse = Callable[..., ChatRequest]


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": HELLO, **fields}).encode())


def must_call(is_single: bool) -> tuple[Constraint, str]:
    """What a chat makes of a choice of tools."""
    asked = chat(tools=[CHAT_TOOL], tool_choice="required", parallel_tool_calls=not is_single)
    assert asked.constraint is not None
    return asked.constraint


def refusal(parse: Parse, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


# --- every field --------------------------------------------------------------------------------


class Works:
    """A field that arrives: at which attribute, as what, what it refuses, what it needs."""

    def __init__(
        self, attribute: str, right: Sequence[tuple[Any, Any]], wrong: Sequence[Any], **also: Any
    ) -> None:
        self.attribute, self.right, self.wrong, self.also = attribute, right, wrong, also


class Accepted:
    """A field that changes nothing by its nature."""

    def __init__(self, right: Sequence[Any], wrong: Sequence[Any]) -> None:
        self.right, self.wrong = right, wrong


class Refused:
    """A field that is not supported: values that ask for nothing, and some that ask."""

    def __init__(self, neutral: Sequence[Any], asking: Sequence[Any]) -> None:
        self.neutral, self.asking = neutral, asking


def _share(name: str) -> Works:
    return Works(name, [(0, 0.0), (0.5, 0.5), (1, 1.0)], [-0.1, 1.1, "1", True, []])


_WINDOW = Works("repetition_context_size", [(64, 64), (-1, 0)], [0, "5", True])
_REPETITION = Works("repetition_penalty", [(1.1, 1.1)], [0, "1", True])
_FLAG_WRONG: list[Any] = [0, "true", [], {}]
_TEXT_WRONG: list[Any] = [5, True, ["a"], {}]
_STOP = Works("stop", [(["a", "b"], ("a", "b")), ([], ())], [5, [""], [5]])
_TOP_P = Works("top_p", [(0.5, 0.5), (1, 1.0)], [0, 1.1, "1", True])
_TOP_K = Works("top_k", [(20, 20), (0, 0), (-1, 0)], [-2, 1.5, "5"])
_MODEL = Works("model", [("any", "any")], _TEXT_WRONG)
_STREAM = Works("is_stream", [(True, True), (False, False)], _FLAG_WRONG)
_THINKS = {"enable_thinking": True}

OWN: dict[str, Works | Accepted | Refused] = {
    "min_p": _share("min_p"),
    "seed": Works("seed", [(7, 7), (-1, None)], ["7", 1.5, True]),
    "repetition_penalty": _REPETITION,
    "repeat_penalty": _REPETITION,
    "repetition_context_size": _WINDOW,
    "repeat_last_n": _WINDOW,
    "presence_penalty": Works("presence_penalty", [(-2, -2.0), (1, 1.0)], [2.1, "1", True]),
    "frequency_penalty": Works("frequency_penalty", [(-2, -2.0), (1, 1.0)], [2.1, "1", True]),
    "logit_bias": Works("logit_bias", [({"5": 1}, ((5, 1.0),))], [{"x": 1}, 5, {"5": 101}]),
    "xtc_probability": _share("xtc_probability"),
    "xtc_threshold": _share("xtc_threshold"),
    "min_tokens": Works("min_tokens", [(3, 3)], [-1, "3", True]),
    "ignore_eos": Works("ignore_eos", [(True, True)], _FLAG_WRONG),
    "stop_token_ids": Works("stop_tokens", [([1, 2], (1, 2))], [5, ["1"], [-1]]),
    "priority": Works("priority", [(-3, -3)], ["1", 1.5, True]),
    "cache_prompt": Works("cache_prompt", [(False, False)], _FLAG_WRONG),
    "cache_salt": Works("cache_salt", [("mine", "mine")], [5, "x" * 129]),
    "chat_template_kwargs": Works(
        "template_kwargs", [({"a": 1}, {"a": 1})], [5, [], {"messages": []}]
    ),
    "chat_template": Refused([], ["{{ x }}"]),
    "n": Refused([1], [2, 0, "1", True]),
}

MESSAGES: dict[str, Works | Accepted | Refused] = {
    **OWN,
    "model": _MODEL,
    "messages": Works(
        "messages",
        [(HELLO, (USER,)), ([{"role": "user", "content": []}], (Message(Role.USER, ""),))],
        [5, "hello", {}, [], [5], [{}], [{"role": "tool", "content": "x"}], [{"role": "user"}]],
    ),
    "system": Works(
        "messages",
        [
            ("be brief", (Message(Role.SYSTEM, "be brief"), USER)),
            ([{"type": "text", "text": "be brief"}], (Message(Role.SYSTEM, "be brief"), USER)),
            ("", (USER,)),
            ([], (USER,)),
        ],
        [5, True, {}, [5], [{"type": "text"}], [{"type": "image", "source": {}}]],
    ),
    "max_tokens": Works("max_tokens", [(1, 1), (20.0, 20)], [0, -1, 1.5, "5", True]),
    "temperature": Works("temperature", [(0, 0.0), (1, 1.0)], [-0.1, 1.1, "1", True]),
    "top_p": _TOP_P,
    "top_k": _TOP_K,
    "stop_sequences": _STOP,
    "stream": _STREAM,
    "thinking": Works(
        "template_kwargs",
        [
            ({"type": "disabled"}, {"enable_thinking": False}),
            ({"type": "adaptive"}, _THINKS),
            ({"type": "adaptive", "display": "summarized"}, _THINKS),
            ({"type": "enabled", "budget_tokens": 1024}, _THINKS),
        ],
        [
            *(5, "on", True, {}, {"type": "between_tools"}, {"type": 5}, {"type": "enabled"}),
            {"type": "enabled", "budget_tokens": 1023},
            {"type": "enabled", "budget_tokens": 2048},  # not less than max_tokens
            {"type": "enabled", "budget_tokens": "1024"},
            {"type": "adaptive", "display": "omitted"},
        ],
    ),
    "output_config": Works(
        "template_kwargs",
        [
            ({"effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
            ({"effort": None, "format": None}, {}),
            ({"format": {"type": "json_schema", "schema": SCHEMA}}, {}),
        ],
        [
            *(5, {"effort": "huge"}, {"effort": 5}, {"format": 5}, {"format": {}}),
            *({"format": {"type": "json_object"}}, {"format": {"type": "json_schema"}}),
            {"format": {"type": "json_schema", "schema": 5}},
        ],
    ),
    "metadata": Accepted([{"user_id": "me"}], [5, "x"]),
    "service_tier": Accepted(["auto", "standard_only"], _TEXT_WRONG),
    "inference_geo": Accepted(["us"], _TEXT_WRONG),
    "cache_control": Accepted([{"type": "ephemeral"}], [5, "x"]),
    "context_management": Accepted(
        [
            {},
            {"edits": []},
            {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            {"edits": [{"type": "clear_thinking_20251015", "keep": {"type": "all"}}]},
        ],
        [
            *(5, {"edits": 5}, {"edits": [{"type": "clear_tool_uses_20250919"}]}),
            {"edits": [{"type": "clear_thinking_20251015"}]},
        ],
    ),
    "speed": Refused(["standard"], ["fast", 5]),
    "tool_choice": Works(
        "constraint",
        [
            ({"type": "auto"}, None),
            ({"type": "none"}, None),
            ({"type": "auto", "disable_parallel_tool_use": True}, None),
            ({"type": "any"}, must_call(is_single=False)),
            ({"type": "any", "disable_parallel_tool_use": True}, must_call(is_single=True)),
            ({"type": "tool", "name": WEATHER.name}, must_call(is_single=True)),
        ],
        [
            *(5, "any", {}, {"type": "required"}, {"type": "tool"}, {"type": "tool", "name": 5}),
            {"type": "tool", "name": "other"},
            {"type": "auto", "disable_parallel_tool_use": 1},
        ],
        tools=[MESSAGES_TOOL],
    ),
    "tools": Works(
        "tools",
        [
            ([], ()),
            ([MESSAGES_TOOL], (WEATHER,)),
            ([{**MESSAGES_TOOL, "type": "custom"}], (WEATHER,)),
            ([{**MESSAGES_TOOL, "type": None, "cache_control": {}}], (WEATHER,)),
        ],
        [
            *(5, {}, [5], [{}], [{"name": ""}], [{"name": "f", "input_schema": 5}]),
            *([MESSAGES_TOOL] * 2, [{"name": "f", "strict": 1}], [{**MESSAGES_TOOL, "type": 5}]),
            [{"name": f"f{n}"} for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "mcp_servers": Refused([[]], [[{"url": "x"}]]),
    "container": Refused([], ["id", {}]),
    "output_format": Refused([], [{"type": "json_schema"}]),
}

RESPONSES: dict[str, Works | Accepted | Refused] = {
    **OWN,
    "model": _MODEL,
    "input": Works(
        "messages",
        [("hello", (USER,)), (HELLO, (USER,)), ([{**HELLO[0], "type": "message"}], (USER,))],
        [5, {}, [], [5], [{}], [{"role": "user"}], [{"role": "tool", "content": "x"}]],
    ),
    "instructions": Works(
        "messages",
        [("be brief", (Message(Role.SYSTEM, "be brief"), USER)), ("", (USER,))],
        _TEXT_WRONG,
    ),
    "previous_response_id": Works("previous_response_id", [("resp_1", "resp_1")], _TEXT_WRONG),
    "store": Works("is_stored", [(False, False), (True, True)], _FLAG_WRONG),
    "max_output_tokens": Works("max_tokens", [(16, 16), (-1, None)], [0, "5", True]),
    "temperature": Works("temperature", [(0, 0.0), (2, 2.0)], [-0.1, "1", True]),
    "top_p": _TOP_P,
    "top_k": _TOP_K,
    "stop": Works("stop", [("a", ("a",)), (["a", "b"], ("a", "b"))], [5, [""], [5]]),
    "stop_sequences": _STOP,
    "stream": _STREAM,
    "stream_options": Works(
        "stream_options",
        [({"include_obfuscation": False}, StreamOptions())],
        [5, {"include_obfuscation": 1}],
        stream=True,
    ),
    "include": Works(
        "top_logprobs",
        [([LOGPROBS], 0), ([], None), (["reasoning.encrypted_content"], None)],
        [5, "x", [5], ["file_search_call.results"], ["message.input_image.image_url"]],
    ),
    "top_logprobs": Works("top_logprobs", [(3, 3), (0, 0)], [21, "3", True], include=[LOGPROBS]),
    "reasoning": Works(
        "template_kwargs",
        [
            ({"effort": "high", "summary": "auto"}, _THINKS | {"reasoning_effort": "high"}),
            ({"effort": "none"}, {"enable_thinking": False, "reasoning_effort": "none"}),
            ({"effort": None}, {}),
        ],
        [
            *(5, {"effort": "huge"}, {"summary": "detailed"}, {"generate_summary": "concise"}),
            *({"context": "all_turns"}, {"mode": "pro"}),
        ],
    ),
    "text": Works(
        "constraint",
        [
            ({}, None),
            ({"format": {"type": "text"}}, None),
            ({"verbosity": "medium"}, None),
            ({"format": {"type": "json_object"}}, (OBJECT_CONSTRAINT, "text.format")),
            (
                {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
                (SCHEMA_CONSTRAINT, "text.format"),
            ),
        ],
        [
            *(5, {"verbosity": "low"}, {"format": 5}, {"format": {}}, {"format": {"type": "xml"}}),
            {"format": {"type": "json_schema", "schema": SCHEMA}},
            {"format": {"type": "json_schema", "name": "x"}},
            {"format": {"type": "json_schema", "name": "x", "schema": "{}"}},
            {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": 1}},
        ],
    ),
    "metadata": Works(
        "echo.metadata",
        [({"a": "b"}, {"a": "b"}), ({}, {})],
        [5, {"a": 5}, {str(n): "" for n in range(17)}],
    ),
    "truncation": Refused(["disabled"], ["auto", 5]),
    "background": Refused([False], [True, 0]),
    "tool_choice": Works(
        "constraint",
        [
            ("auto", None),
            ("none", None),
            ("required", must_call(is_single=False)),
            ({"type": "function", "name": WEATHER.name}, must_call(is_single=True)),
        ],
        [
            *(5, "any", {}, {"type": "function"}, {"type": "function", "name": "other"}),
            *({"type": "web_search"}, {"type": "allowed_tools", "tools": []}),
        ],
        tools=[RESPONSES_TOOL],
    ),
    "tools": Works(
        "tools",
        [([], ()), ([RESPONSES_TOOL], (WEATHER,))],
        [
            *(5, {}, [5], [{}], [ABOUT], [{"type": "function"}], [RESPONSES_TOOL] * 2),
            [{"type": "function", "name": "f", "parameters": 5}],
            [{"type": "function", "function": ABOUT}],
            [{"type": "function", "name": f"f{n}"} for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "context_management": Refused([[]], [[{"type": "compaction"}]]),
    "conversation": Refused([], ["conv_1", {"id": "conv_1"}]),
    "prompt": Refused([], [{"id": "pmpt_1"}]),
    "moderation": Refused([], [{"model": "m"}]),
    "parallel_tool_calls": Works("max_calls", [(True, None), (False, 1)], _FLAG_WRONG),
    "max_tool_calls": Works("echo.max_tool_calls", [(1, 1)], [0, "1", True]),
    "prompt_cache_options": Accepted([{"mode": "implicit"}], [5]),
    "user": Works("echo.user", [("me", "me")], _TEXT_WRONG),
    "service_tier": Accepted(["auto"], _TEXT_WRONG),
    "safety_identifier": Works("echo.safety_identifier", [("me", "me")], _TEXT_WRONG),
    "prompt_cache_key": Works("echo.prompt_cache_key", [("key", "key")], _TEXT_WRONG),
    "prompt_cache_retention": Accepted(["24h"], _TEXT_WRONG),
}

TABLES: list[tuple[str, Parse, Mapping[str, Field], Mapping[str, Any]]] = [
    ("messages", messages, MESSAGES_FIELDS, MESSAGES),
    ("count_tokens", count, COUNT_FIELDS, {name: MESSAGES[name] for name in COUNT_FIELDS}),
    ("responses", response, RESPONSES_FIELDS, RESPONSES),
]
EACH = [
    pytest.param(parse, name, case, id=f"{dialect}-{name}")
    for dialect, parse, _, cases in TABLES
    for name, case in cases.items()
]


def _found(request: ChatRequest, path: str) -> Any:
    name, _, key = path.partition(".")
    value = arrived(request, name)
    return value[key] if key else value


def _essence(request: ChatRequest) -> Any:
    """All but what an answer repeats."""
    return [getattr(request, name) for name in ChatRequest.__dataclass_fields__]


@pytest.mark.parametrize(("dialect", "parse", "table", "cases"), TABLES)
def test_each_field_of_a_table_has_a_case_of_its_use(
    dialect: str, parse: Parse, table: Mapping[str, Field], cases: Mapping[str, Any]
) -> None:
    assert cases.keys() == table.keys()
    uses = {Works: Use.SUPPORTED, Accepted: Use.NO_OP, Refused: Use.UNSUPPORTED}
    assert {name: uses[type(case)] for name, case in cases.items()} == {
        name: entry.use for name, entry in table.items()
    }
    assert all(f"| `{name}` |" in markdown(table) for name in table)


@pytest.mark.parametrize(("parse", "name", "case"), EACH)
def test_a_field_arrives_or_changes_nothing(
    parse: Parse, name: str, case: Works | Accepted | Refused
) -> None:
    match case:
        case Works():
            for value, expected in case.right:
                assert _found(parse(**{name: value}, **case.also), case.attribute) == expected
        case Accepted():
            for value in case.right:
                assert _essence(parse(**{name: value})) == _essence(parse())
        case Refused():
            for value in case.neutral:
                assert _essence(parse(**{name: value})) == _essence(parse())


@pytest.mark.parametrize(("parse", "name", "case"), EACH)
def test_a_wrong_value_is_refused_by_name(
    parse: Parse, name: str, case: Works | Accepted | Refused
) -> None:
    wrong = case.asking if isinstance(case, Refused) else case.wrong
    also = case.also if isinstance(case, Works) else {}
    for value in wrong:
        if parse is count and value == {"type": "enabled", "budget_tokens": 2048}:
            continue  # there is no max_tokens that it could exceed
        error = refusal(parse, **{name: value}, **also)
        assert error.param is not None
        assert error.param.split("[")[0].split(".")[0] == name, value
        if isinstance(case, Refused) and value != 5:
            assert error.code == "unsupported_parameter"


@pytest.mark.parametrize(("dialect", "parse", "table", "cases"), TABLES)
def test_null_is_as_good_as_absent(
    dialect: str, parse: Parse, table: Mapping[str, Field], cases: Any
) -> None:
    optional = table.keys() - {"model", "messages", "max_tokens", "input"}
    assert _essence(parse(**dict.fromkeys(optional))) == _essence(parse())


@pytest.mark.parametrize(("dialect", "parse", "table", "cases"), TABLES)
def test_unknown_fields_are_ignored_and_listed(
    dialect: str, parse: Parse, table: Any, cases: Any
) -> None:
    assert parse(zebra=1, aardvark=[]).ignored == ("aardvark", "zebra")


@pytest.mark.parametrize(
    ("parse", "name"),
    [(messages, "messages"), (messages, "max_tokens"), (count, "messages"), (response, "input")],
)
def test_what_is_required_is_named(parse: Parse, name: str) -> None:
    assert refusal(parse, **{name: None}).param == name


def test_tokens_are_counted_without_max_tokens() -> None:
    assert count(system="be brief").messages == (Message(Role.SYSTEM, "be brief"), USER)


@pytest.mark.parametrize("parse", [messages, response])
def test_min_tokens_must_fit_in_the_most(parse: Parse) -> None:
    assert parse(min_tokens=5, max_tokens=5, max_output_tokens=5).sampling["min_tokens"] == 5
    error = refusal(parse, min_tokens=6, max_tokens=5, max_output_tokens=5)
    assert error.param == "min_tokens"


def test_stream_options_need_a_stream() -> None:
    asked = {"stream_options": {"include_obfuscation": False}}
    assert response(stream=True, **asked).is_stream
    assert refusal(response, **asked).param == "stream_options"


def test_top_logprobs_need_logprobs_in_include() -> None:
    assert refusal(response, top_logprobs=2).param == "top_logprobs"
    assert "top_logprobs" not in response(top_logprobs=0).sampling


def test_thinking_that_is_off_wins_over_effort_and_template_kwargs_over_both() -> None:
    asked: dict[str, Any] = {"thinking": {"type": "disabled"}, "output_config": {"effort": "max"}}
    assert messages(**asked).template_kwargs == {
        "enable_thinking": False,
        "reasoning_effort": "max",
    }
    asked["chat_template_kwargs"] = {"enable_thinking": True}
    assert messages(**asked).template_kwargs["enable_thinking"] is True


# --- tools and formats --------------------------------------------------------------------------


def _of_tools(request: ChatRequest) -> Any:
    return request.tools, request.max_calls, request.constraint


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize("is_single", [False, True])
@pytest.mark.parametrize(
    ("of_messages", "of_responses", "of_chat"),
    [
        ({"type": "auto"}, "auto", "auto"),
        ({"type": "none"}, "none", "none"),
        ({"type": "any"}, "required", "required"),
        (
            {"type": "tool", "name": "get_weather"},
            {"type": "function", "name": "get_weather"},
            {"type": "function", "function": {"name": "get_weather"}},
        ),
    ],
)
def test_tools_and_their_choice_are_a_chats(
    of_messages: Any, of_responses: Any, of_chat: Any, is_single: bool, is_strict: bool
) -> None:
    other = {"name": "ls", "strict": is_strict}
    expected = chat(
        tools=[CHAT_TOOL, {"type": "function", "function": other}],
        tool_choice=of_chat,
        parallel_tool_calls=not is_single,
    )
    found = messages(
        tools=[MESSAGES_TOOL, other],
        tool_choice={**of_messages, "disable_parallel_tool_use": is_single},
    )
    assert _of_tools(found) == _of_tools(expected)
    found = response(
        tools=[RESPONSES_TOOL, {"type": "function", **other}],
        tool_choice=of_responses,
        parallel_tool_calls=not is_single,
    )
    assert _of_tools(found) == _of_tools(expected)


@pytest.mark.parametrize("parse", [messages, response])
def test_tools_without_a_choice_may_be_called_or_not_and_several_times(parse: Parse) -> None:
    tool = MESSAGES_TOOL if parse is messages else RESPONSES_TOOL
    assert _of_tools(parse(tools=[tool])) == ((WEATHER,), None, None)


@pytest.mark.parametrize(
    ("parse", "tool"),
    [
        (messages, {"type": "web_search_20250305", "name": "web_search"}),
        (messages, {"type": "bash_20250124", "name": "bash"}),
        (count, {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"}),
        (response, {"type": "web_search"}),
        (response, {"type": "file_search", "vector_store_ids": []}),
        (response, {"type": "mcp", "server_label": "x"}),
        (response, {"type": "custom", "name": "apply_patch"}),
    ],
)
def test_a_tool_that_is_the_vendors_own_is_refused_by_name(parse: Parse, tool: Any) -> None:
    mine = RESPONSES_TOOL if parse is response else MESSAGES_TOOL
    error = refusal(parse, tools=[mine, tool])
    assert (error.param, error.code) == ("tools[1].type", "unsupported_parameter")
    assert repr(tool["type"]) in error.message


@pytest.mark.parametrize(("parse", "choice"), [(messages, {"type": "any"}), (response, "required")])
def test_a_call_cannot_be_wanted_where_there_are_no_tools(parse: Parse, choice: Any) -> None:
    error = refusal(parse, tool_choice=choice)
    assert (error.param, error.message) == ("tool_choice", "'tool_choice' needs 'tools'.")


FORMATS: list[tuple[Parse, dict[str, Any], str]] = [
    (
        messages,
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        "output_config.format",
    ),
    (
        response,
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
        "text.format",
    ),
]


@pytest.mark.parametrize(("parse", "asked", "name"), FORMATS)
def test_a_format_is_a_constraint_under_the_name_that_the_client_gave_it(
    parse: Parse, asked: dict[str, Any], name: str
) -> None:
    assert parse(**asked).constraint == (SCHEMA_CONSTRAINT, name)


@pytest.mark.parametrize(("parse", "asked", "name"), FORMATS)
def test_what_a_format_excludes_is_refused_in_the_clients_words(
    parse: Parse, asked: dict[str, Any], name: str
) -> None:
    is_response = parse is response
    tool = RESPONSES_TOOL if is_response else MESSAGES_TOOL
    choice = "required" if is_response else {"type": "any"}
    error = refusal(parse, **asked, tools=[tool], tool_choice=choice)
    assert error.message == f"'{name}' and 'tool_choice' exclude each other."
    assert error.param == "tool_choice"
    error = refusal(parse, **asked, ignore_eos=True)
    assert error.message == f"'ignore_eos' cannot be had with '{name}'."
    assert error.param == "ignore_eos"
    assert parse(**asked, tools=[tool]).constraint == (SCHEMA_CONSTRAINT, name)


def test_tools_are_counted_unless_tool_choice_is_none() -> None:
    assert count(tools=[MESSAGES_TOOL]).tools == (WEATHER,)
    assert count(tools=[MESSAGES_TOOL], tool_choice={"type": "none"}).tools == ()


# --- histories ----------------------------------------------------------------------------------


def said(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


CALL = {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/"}}
LS = ToolCall("toolu_1", "ls", {"path": "/"})


def test_blocks_of_text_are_joined_as_a_chats_and_cache_control_is_no_part_of_them() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    asked = [said("user", block("a"), block("b", **mark)), said("assistant", block("c"))]
    request = messages(messages=asked)
    assert request.messages == (Message(Role.USER, "a\nb"), Message(Role.ASSISTANT, "c"))
    assert request.is_continuation


def test_the_first_system_block_stays_at_the_head_so_that_its_billing_line_is_found() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=abc12;"
    request = messages(system=[block(billing), block("You are Claude Code.")])
    system = request.messages[0]
    assert system.content == f"{billing}\nYou are Claude Code."
    assert system.as_template()["content"] == "You are Claude Code."


def test_a_system_message_between_turns_is_one() -> None:
    request = messages(messages=[*HELLO, {"role": "system", "content": "now"}, *HELLO])
    assert request.messages == (USER, Message(Role.SYSTEM, "now"), USER)


def test_thoughts_text_and_calls_are_one_turn_and_results_are_turns_of_tools() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block("a"), block("b")]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True}
    silent = {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": False}
    request = messages(
        messages=[
            *HELLO,
            said("assistant", thought, redacted, block("let me see"), CALL),
            said("user", result, failed, silent, block("and"), block("now?")),
        ]
    )
    assert request.messages == (
        USER,
        Message(Role.ASSISTANT, "let me see", reasoning="hm", tool_calls=(LS,)),
        Message(Role.TOOL, "a\nb", tool_call_id="toolu_1"),
        Message(Role.TOOL, "Error: no", tool_call_id="toolu_2"),
        Message(Role.TOOL, "", tool_call_id="toolu_3"),
        Message(Role.USER, "and\nnow?"),
    )


CAT = {"type": "base64", "media_type": "image/png", "data": "Y2F0"}
DOG = "https://example.com/dog.png"


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


def result(*content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(content), **more}


def test_a_users_pictures_stay_among_the_words_about_them() -> None:
    content = (block("a"), block("b"), image(**CAT), block("c"), image(type="url", url=DOG))
    request = messages(messages=[said("user", *content)])
    cat = Source(b"cat", None, "messages[0].content[2].source")
    dog = Source(None, DOG, "messages[0].content[4].source")
    assert request.messages == (Message(Role.USER, "a\nb\nc", parts=("a\nb", cat, "c", dog)),)
    assert request.sources == (cat, dog)


def test_pictures_in_a_tool_result_stay_in_it_behind_the_error_mark() -> None:
    results = (
        result(image(**CAT), block("x")),
        result(image(**CAT), is_error=True),
        result(block("x"), image(**CAT), is_error=True),
    )
    turns = messages(messages=[said("user", *results, block("why?"), image(**CAT))]).messages
    assert [turn.role for turn in turns] == [Role.TOOL] * 3 + [Role.USER]
    assert [turn.content for turn in turns] == ["x", "Error: ", "Error: x", "why?"]
    place = "messages[0].content[{}].content[{}].source".format
    cats = [Source(b"cat", None, place(*at)) for at in ((0, 0), (1, 0), (2, 1))]
    cats.append(Source(b"cat", None, "messages[0].content[4].source"))
    assert [turn.parts for turn in turns] == [
        (cats[0], "x"),
        ("Error: ", cats[1]),
        ("Error: x", cats[2]),
        ("why?", cats[3]),
    ]


@pytest.mark.parametrize(("num_blocks", "num_results"), [(64, 0), (0, 64), (32, 32)])
def test_messages_have_at_most_64_pictures(num_blocks: int, num_results: int) -> None:
    content = [result(image(**CAT))] * num_results + [image(**CAT)] * num_blocks
    assert len(messages(messages=[said("user", *content)]).sources) == 64
    error = refusal(messages, messages=[said("user", *content, image(**CAT))])
    assert "at most 64" in error.message
    assert error.param == "messages[0].content[64].source"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["base64", "url", DOG]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(JUNK, JUNK, JUNK)
def test_junk_in_a_picture_of_anthropics_is_read_or_refused(kind: Any, data: Any, url: Any) -> None:
    source = {"type": kind, "data": data, "url": url, "media_type": data}
    for part in (image(**source), {"type": "image", "source": data}, {"type": kind}):
        for turn in (said("user", part), said("user", result(part))):
            with suppress(APIError):
                assert len(messages(messages=[turn]).sources) <= 1


@given(JUNK, JUNK)
def test_junk_in_a_picture_of_responses_is_read_or_refused(url: Any, detail: Any) -> None:
    for part in (item("input_image", image_url=url, detail=detail), item("input_image", **SHOWN)):
        for value in (item("message", role="user", content=[part]), {**OUTPUT, "output": [part]}):
            with suppress(APIError):
                assert len(response(input=[value]).sources) <= 1


def test_a_turn_that_only_calls_has_no_text_and_one_of_nothing_has_an_empty_one() -> None:
    request = messages(messages=[*HELLO, said("assistant", CALL), said("assistant")])
    assert [turn.content for turn in request.messages] == ["hello", None, ""]


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        (said("user", {"type": "image"}), "messages[0].content[0].source"),
        (said("user", {"type": "image", "source": {}}), "messages[0].content[0].source.type"),
        (said("user", image(type="file", file_id="x")), "messages[0].content[0].source.type"),
        (said("user", image(type="base64")), "messages[0].content[0].source.data"),
        (said("user", image(type="base64", data="*")), "messages[0].content[0].source"),
        (
            said("user", image(**(CAT | {"media_type": 5}))),
            "messages[0].content[0].source.media_type",
        ),
        (said("user", image(type="url")), "messages[0].content[0].source.url"),
        (said("user", image(type="url", url="file:///x")), "messages[0].content[0].source"),
        (said("assistant", image(**CAT)), "messages[0].content[0].type"),
        (said("system", image(**CAT)), "messages[0].content[0].type"),
        (said("user", block("a"), {"type": "document"}), "messages[0].content[1].type"),
        (said("user", CALL), "messages[0].content[0].type"),
        (said("user", {"type": 5}), "messages[0].content[0].type"),
        (said("user", 5), "messages[0].content[0]"),
        (said("user", {"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        (
            said("user", {"type": "tool_result", "tool_use_id": "x", "is_error": 1}),
            "messages[0].content[0].is_error",
        ),
        (
            said(
                "user", {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}
            ),
            "messages[0].content[0].content[0].source",
        ),
        (said("user", result({"type": "document"})), "messages[0].content[0].content[0].type"),
        (
            said("user", result({"type": "search_result"})),
            "messages[0].content[0].content[0].type",
        ),
        (said("assistant", {"type": "server_tool_use"}), "messages[0].content[0].type"),
        (said("assistant", {**CALL, "input": "x"}), "messages[0].content[0].input"),
        (said("assistant", {**CALL, "name": None}), "messages[0].content[0].name"),
        (said("assistant", {"type": "thinking"}), "messages[0].content[0].thinking"),
        (said("assistant", block(5)), "messages[0].content[0].text"),  # type: ignore[arg-type]
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
    ],
)
def test_a_broken_message_is_refused_by_its_place(turn: Any, param: str) -> None:
    assert refusal(messages, messages=[turn]).param == param


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


FUNCTION = item("function_call", call_id="call_1", name="ls", arguments='{"path": "/"}')
OUTPUT = item("function_call_output", call_id="call_1", output="etc")
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


def test_responses_have_at_most_64_pictures() -> None:
    half, rest = show(*[SHOWN] * 32), {**OUTPUT, "output": [SHOWN] * 32}
    assert len(response(input=[half, rest]).sources) == 64
    assert "at most 64" in refusal(response, input=[half, rest, show(SHOWN)]).message


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
        (item("item_reference", id="msg_1"), "input[0].type"),
        (item("custom_tool_call", name="x"), "input[0].type"),
        (show(item("input_image")), "input[0].content[0].image_url"),
        (show(item("input_image", image_url={"url": DOG})), "input[0].content[0].image_url"),
        (show(item("input_image", image_url="file:///x")), "input[0].content[0].image_url"),
        (show(item("input_image", file_id="file-1")), "input[0].content[0].file_id"),
        (show({**SHOWN, "detail": "original"}), "input[0].content[0].detail"),
        (show(SHOWN, role="assistant"), "input[0].content[0].type"),
        (show(SHOWN, role="system"), "input[0].content[0].type"),
        (show(item("input_file", file_id="file-1")), "input[0].content[0].type"),
        (show(item("input_audio")), "input[0].content[0].type"),
        ({**OUTPUT, "output": [item("input_file")]}, "input[0].output[0].type"),
        (item("message", role="user", content=5), "input[0].content"),
        ({**FUNCTION, "call_id": None}, "input[0].call_id"),
        ({**FUNCTION, "arguments": {}}, "input[0].arguments"),
        ({**OUTPUT, "output": None}, "input[0].output"),
        (item("reasoning", summary=[item("image")]), "input[0].summary[0].type"),
    ],
)
def test_a_broken_item_is_refused_by_its_place(value: Any, param: str) -> None:
    assert refusal(response, input=[value]).param == param


def test_new_instructions_precede_the_history_and_are_not_stored() -> None:
    history = (Message(Role.USER, "before"), Message(Role.ASSISTANT, "yes"))
    request = response(instructions="be brief", previous_response_id="resp_0").after(history)
    assert request.messages == (Message(Role.SYSTEM, "be brief"), *history, USER)
    assert request.conversation == (*history, USER)
    assert response().after(history).messages == request.conversation


# --- Messages: answers --------------------------------------------------------------------------

MSG = Envelope("msg_1", 1_700_000_000, "org/model", "fp_0123456789abcdef")
RESP = Envelope("resp_1", 1_700_000_000, "org/model", "fp_0123456789abcdef")


def frames(stream: bytes) -> Iterator[tuple[str, Any]]:
    """Each event's name and data, of a stream that is nothing but such events."""
    *events, rest = stream.decode().split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        payload = json.loads(data.removeprefix("data: "))
        assert payload["type"] == name.removeprefix("event: ")
        yield payload["type"], payload


def run_events(writer: Any, events: Sequence[ParserEvent]) -> bytes:
    return b"".join(writer.event(0, event) for event in events)


def run(writer: Any, pieces: Sequence[str | ParserEvent], end: Done | APIError = DONE) -> bytes:
    stream: bytes = writer.begin()
    for piece in pieces:
        stream += writer.event(0, TextDelta(piece) if isinstance(piece, str) else piece)
    failed = isinstance(end, APIError)
    return stream + (writer.fail(end) if failed else writer.done(0, end, end.usage))


def thought(text: str, *logprobs: tuple[int, Logprobs]) -> ReasoningDelta:
    return ReasoningDelta(text, logprobs=logprobs)


def called(call: ToolCall, *arguments: str) -> list[ParserEvent]:
    """A call; its arguments in pieces, or whole."""
    pieces = map(ToolCallArguments, arguments or (call.arguments,))
    return [ToolCallStart(call.id, call.name), *pieces, ToolCallEnd(call.arguments)]


PARIS = ToolCall("call_1", "get_weather", '{"city":"Paris"}')
NOW = ToolCall("call_2", "now", "{}")
# As a parser emits it: reasoning, text, two calls.
FULL = [thought("h"), thought("m"), "let me ", "see", *called(PARIS), *called(NOW)]
SAID = Message(
    Role.ASSISTANT,
    "let me see",
    reasoning="hm",
    tool_calls=(
        ToolCall("call_1", "get_weather", {"city": "Paris"}),
        ToolCall("call_2", "now", {}),
    ),
)


def choice_of(pieces: Sequence[str | ParserEvent], done: Done) -> Collected:
    """What an answer that does not stream is made of."""
    choice = Collected(done=done)
    for piece in pieces:
        choice.take(TextDelta(piece) if isinstance(piece, str) else piece)
    return choice


def broken(text: str = "<call>{") -> list[ParserEvent]:
    """One that does not parse, and what follows."""
    start, arguments = ToolCallStart("call_3", "ls"), ToolCallArguments("{")
    return [start, arguments, ToolCallInvalid(text), TextDelta("!</call>")]


# Anything that may come, in any order.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ONE = st.one_of(TEXT, st.builds(thought, TEXT)).map(lambda piece: [piece])
CALLS = st.sampled_from(
    [called(PARIS), called(NOW), called(PARIS) + called(NOW), called(PARIS, '{"city":', '"Paris"}')]
)


def listed(groups: st.SearchStrategy[Any]) -> st.SearchStrategy[list[str | ParserEvent]]:
    return st.lists(groups).map(lambda found: [piece for group in found for piece in group])


PIECES = listed(ONE | CALLS)


def distinct(pieces: Sequence[str | ParserEvent]) -> list[str | ParserEvent]:
    """The same with an id of its own for every call."""
    ids = (f"call_{number}" for number in itertools.count())
    return [
        replace(piece, id=next(ids)) if isinstance(piece, ToolCallStart) else piece
        for piece in pieces
    ]


def message_stream(*pieces: str | ParserEvent, end: Done | APIError = DONE) -> bytes:
    return run(MessagesWriter(MSG, 10), pieces, end)


ANTHROPIC_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def anthropic_client(content: bytes, kind: str = "text/event-stream", status: int = 200) -> Any:
    """Anthropic's client, which reads this whatever it asks."""
    answer = httpx2.Response(status, content=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    return anthropic.Anthropic(api_key="x", base_url="http://test", http_client=http, max_retries=0)


def test_a_messages_stream_has_each_event_in_anthropics_order() -> None:
    events = list(frames(message_stream("hel", "", "lo")))
    assert [payload for _, payload in events] == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "org/model",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 10,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                    "output_tokens_details": {"thinking_tokens": 0},
                },
            },
        },
        {"type": "ping"},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": 6,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 2},
            },
        },
        {"type": "message_stop"},
    ]
    for kind, payload in events:
        if kind != "ping":
            ANTHROPIC_EVENT.validate_python(payload, strict=True)


ENDS = [
    (DONE, "end_turn", None),
    (CUT, "max_tokens", None),
    (STOPPED, "stop_sequence", "###"),
    (CANCELLED, None, None),
]


def read_by_anthropic(stream: bytes) -> Any:
    with anthropic_client(stream).messages.stream(
        model="tiny", max_tokens=5, messages=HELLO
    ) as read:
        return read.get_final_message()


@pytest.mark.parametrize(("done", "reason", "stop"), ENDS)
def test_anthropics_client_reads_a_stream_and_a_whole_answer_alike(
    done: Done, reason: str | None, stop: str | None
) -> None:
    streamed = read_by_anthropic(message_stream("hel", "lo", end=done))
    body = MessagesWriter(MSG, 10).whole([Collected(["hel", "lo"], done=done)], done.usage)
    whole = anthropic_client(body, "application/json").messages.create(
        model="tiny", max_tokens=5, messages=HELLO
    )
    AnthropicMessage.model_validate_json(body, strict=True)
    for message in (streamed, whole):
        assert [block.text for block in message.content] == ["hello"]
        assert (message.stop_reason, message.stop_sequence) == (reason, stop)
        usage = message.usage
        assert (usage.input_tokens, usage.output_tokens) == (6, 5)
        assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (4, 0)


def test_thoughts_text_and_calls_are_blocks_one_after_the_other() -> None:
    events = list(frames(message_stream(*FULL, end=CALLED)))
    for kind, payload in events:
        if kind != "ping":
            ANTHROPIC_EVENT.validate_python(payload, strict=True)
    blocks = [
        (payload["index"], payload.get("content_block") or payload.get("delta"))
        for kind, payload in events
        if kind.startswith("content_block")
    ]
    use = {"type": "tool_use", "input": {}}
    assert blocks == [
        (0, {"type": "thinking", "thinking": "", "signature": ""}),
        (0, {"type": "thinking_delta", "thinking": "h"}),
        (0, {"type": "thinking_delta", "thinking": "m"}),
        (0, {"type": "signature_delta", "signature": ""}),
        (0, None),
        (1, {"type": "text", "text": ""}),
        (1, {"type": "text_delta", "text": "let me "}),
        (1, {"type": "text_delta", "text": "see"}),
        (1, None),
        (2, {**use, "id": "call_1", "name": "get_weather"}),
        (2, {"type": "input_json_delta", "partial_json": '{"city":"Paris"}'}),
        (2, None),
        (3, {**use, "id": "call_2", "name": "now"}),
        (3, {"type": "input_json_delta", "partial_json": "{}"}),
        (3, None),
    ]


def test_a_call_is_closed_at_once() -> None:
    told = [kind for kind, _ in frames(run_events(MessagesWriter(MSG, 10), called(PARIS)))]
    assert told == ["content_block_start", "content_block_delta", "content_block_stop"]


def test_anthropics_client_reads_thoughts_and_calls_alike_streamed_and_whole() -> None:
    streamed = read_by_anthropic(message_stream(*FULL, end=CALLED))
    body = MessagesWriter(MSG, 10).whole([choice_of(FULL, CALLED)], USAGE)
    AnthropicMessage.model_validate_json(body, strict=True)
    whole = anthropic_client(body, "application/json").messages.create(
        model="tiny", max_tokens=5, messages=HELLO
    )
    for message in (streamed, whole):
        assert [block.type for block in message.content] == [
            *("thinking", "text", "tool_use", "tool_use"),
        ]
        thinking, text, paris, now = message.content
        assert (thinking.thinking, thinking.signature, text.text) == ("hm", "", "let me see")
        assert (paris.id, paris.name, paris.input) == ("call_1", "get_weather", {"city": "Paris"})
        assert (now.id, now.name, now.input) == ("call_2", "now", {})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens_details.thinking_tokens == 2


def test_an_answer_that_is_sent_back_parses_to_the_same_message() -> None:
    message = read_by_anthropic(message_stream(*FULL, end=CALLED))
    content = [block.model_dump(exclude_none=True) for block in message.content]
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    asked = [*HELLO, said("assistant", *content), said("user", result)]
    request = messages(messages=asked)
    assert request.messages == (USER, SAID, Message(Role.TOOL, "sunny", tool_call_id="call_1"))


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (CALLED, "tool_use"),
        (replace(CALLED, stop="###"), "tool_use"),
        (replace(CALLED, reason=FinishReason.LENGTH), "max_tokens"),
        (replace(CUT, stop="repetition"), "max_tokens"),
        (replace(CALLED, reason=FinishReason.CANCELLED), None),
    ],
)
def test_an_answer_with_calls_stops_for_them_unless_it_was_cut(
    done: Done, reason: str | None
) -> None:
    body = MessagesWriter(MSG, 10).whole([choice_of(called(PARIS), done)], USAGE)
    for message in (read_by_anthropic(message_stream(*called(PARIS), end=done)), json.loads(body)):
        found = message if isinstance(message, dict) else message.model_dump()
        assert (found["stop_reason"], found["stop_sequence"]) == (reason, None)


@pytest.mark.parametrize("end", [DONE, CUT, CANCELLED])
def test_a_thought_that_is_cut_is_closed(end: Done) -> None:
    (block,) = read_by_anthropic(message_stream(thought("hm"), end=end)).content
    assert (block.type, block.thinking, block.signature) == ("thinking", "hm", "")


@given(PIECES)
def test_streamed_blocks_equal_those_of_a_whole_message_in_any_order_of_events(
    pieces: list[str | ParserEvent],
) -> None:
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    is_open = False
    for kind, payload in frames(message_stream(*pieces)):
        if kind == "content_block_start":
            assert not is_open
            assert payload["index"] == len(blocks)
            is_open = True
            blocks.append(payload["content_block"])
            texts.append("")
        elif kind.startswith("content_block"):
            assert is_open
            assert payload["index"] == len(blocks) - 1
            is_open = kind != "content_block_stop"
            delta = payload.get("delta", {})
            found = [delta[key] for key in ("text", "thinking", "partial_json") if key in delta]
            texts[-1] += "".join(found)
    assert not is_open
    assert all(texts)  # no block is opened for nothing
    folded = list(zip(blocks, texts, strict=True))
    whole = json.loads(MessagesWriter(MSG, 10).whole([choice_of(pieces, DONE)], USAGE))["content"]
    for name in ("thinking", "text"):
        told = "".join(text for block, text in folded if block["type"] == name)
        assert told == "".join(block[name] for block in whole if block["type"] == name)
    assert [
        {**block, "input": json.loads(text)}
        for block, text in folded
        if block["type"] == "tool_use"
    ] == [block for block in whole if block["type"] == "tool_use"]
    order = ["thinking", "text", "tool_use"]
    kinds = [order.index(block["type"]) for block in whole]
    assert kinds == sorted(kinds)


def test_an_empty_answer_has_an_empty_list_of_blocks() -> None:
    assert read_by_anthropic(message_stream()).content == []
    body = MessagesWriter(MSG, 10).whole([Collected([""], done=DONE)], USAGE)
    assert json.loads(body)["content"] == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_split_of_a_text_is_the_same_message(pieces: list[str]) -> None:
    read = list(frames(message_stream(*pieces)))
    texts = [payload["delta"]["text"] for kind, payload in read if kind == "content_block_delta"]
    assert "".join(texts) == "".join(pieces)
    whole = MessagesWriter(MSG, 10).whole([Collected(list(pieces), done=DONE)], USAGE)
    assert "".join(block["text"] for block in json.loads(whole)["content"]) == "".join(pieces)


@pytest.mark.parametrize("text", AWKWARD)
def test_anthropics_client_reads_awkward_text(text: str) -> None:
    message = read_by_anthropic(message_stream(text, text))
    assert "".join(block.text for block in message.content) == text + text


def test_progress_is_a_ping() -> None:
    ping = MessagesWriter(MSG, 10).event(0, Progress(4, USAGE))
    assert list(frames(ping)) == [("ping", {"type": "ping"})]


def test_a_messages_stream_that_fails_ends_with_anthropics_error() -> None:
    stream = message_stream("hel", end=FAILURE)
    *_, (kind, payload) = frames(stream)
    assert kind == "error"
    assert payload["error"] == {"type": "api_error", "message": "the model failed"}
    with pytest.raises(anthropic.APIError, match="the model failed"):
        read_by_anthropic(stream)


@pytest.mark.parametrize(
    ("cause", "status", "kind", "raised"),
    [
        (ErrorKind.UNSUPPORTED, 400, "invalid_request_error", anthropic.BadRequestError),
        (ErrorKind.UNAUTHORIZED, 401, "authentication_error", anthropic.AuthenticationError),
        (ErrorKind.HOST, 403, "permission_error", anthropic.PermissionDeniedError),
        (ErrorKind.NO_MODEL, 404, "not_found_error", anthropic.NotFoundError),
        (ErrorKind.METHOD, 405, "invalid_request_error", anthropic.APIStatusError),
        (ErrorKind.BAD_REQUEST, 413, "request_too_large", anthropic.APIStatusError),
        (ErrorKind.QUEUE_FULL, 429, "rate_limit_error", anthropic.RateLimitError),
        (ErrorKind.INTERNAL, 500, "api_error", anthropic.InternalServerError),
        (ErrorKind.UNAVAILABLE, 503, "overloaded_error", anthropic.InternalServerError),
        (ErrorKind.UNAVAILABLE, 529, "overloaded_error", anthropic.InternalServerError),
    ],
)
def test_an_error_has_anthropics_type_for_its_status(
    cause: ErrorKind, status: int, kind: str, raised: type[Exception]
) -> None:
    body = anthropic_error(APIError(cause, "no", status=status), "req_1")
    error = {"type": kind, "message": "no"}
    assert json.loads(body) == {"type": "error", "error": error, "request_id": "req_1"}
    client = anthropic_client(body, "application/json", status)
    with pytest.raises(raised, match="no"):
        client.messages.create(model="tiny", max_tokens=5, messages=HELLO)


def test_a_too_long_prompt_is_an_error_in_anthropics_wording_and_in_llama_servers() -> None:
    message = json.loads(anthropic_error(context_exceeded(9000, 8192)))["error"]["message"]
    assert message.startswith("prompt is too long: 9000 tokens > 8192 maximum")
    assert "the request exceeds the available context size." in message


# --- Responses: answers -------------------------------------------------------------------------

OPENAI_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ECHOED: dict[str, Any] = {
    "instructions": "be brief",
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "top_p": 0.9,
    "max_output_tokens": 64,
    "max_tool_calls": 3,
    "parallel_tool_calls": False,
    "previous_response_id": "resp_0",
    "user": "me",
    "safety_identifier": "me too",
    "prompt_cache_key": "key",
    "truncation": "disabled",
    "background": False,
    "tool_choice": "none",
    "tools": [{**RESPONSES_TOOL, "strict": True}, {"type": "function", "name": "f"}],
    "store": False,
    "top_logprobs": 0,
    "text": {
        "format": {
            "type": "json_schema",
            "name": "place",
            "description": "a place",
            "schema": SCHEMA,
            "strict": True,
        },
        "verbosity": "medium",
    },
}


def responses_writer(**fields: Any) -> ResponsesWriter:
    return ResponsesWriter(RESP, token_bytes, response(**fields).echo)


def response_stream(*pieces: str | ParserEvent, end: Done | APIError = DONE) -> bytes:
    return run(responses_writer(), pieces, end)


def openai_client(content: bytes, kind: str = "text/event-stream") -> openai.OpenAI:
    answer = httpx2.Response(200, content=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    return openai.OpenAI(api_key="x", base_url="http://test", http_client=http, max_retries=0)


def read_by_openai(stream: bytes) -> tuple[list[Any], Response]:
    with openai_client(stream).responses.stream(model="tiny", input="hello") as read:
        return list(read), read.get_final_response()


def validated(stream: bytes) -> list[tuple[str, Any]]:
    """The events, each of which is what OpenAI's types take, and numbered."""
    events = list(frames(stream))
    for number, (_, payload) in enumerate(events):
        assert payload["sequence_number"] == number
        # JSON's strictness: a whole number is a float's value too
        OPENAI_EVENT.validate_json(json.dumps(payload), strict=True)
    return events


FIRST = ["response.created", "response.in_progress"]
OPENED = ["response.output_item.added", "response.content_part.added"]
CLOSED = [
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def test_a_responses_stream_has_each_event_in_openais_order() -> None:
    events = validated(response_stream("hel", "", "lo"))
    text = ["response.output_text.delta"] * 2
    assert [kind for kind, _ in events] == [*FIRST, *OPENED, *text, *CLOSED, "response.completed"]
    by_kind = dict(events)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant"}
    assert by_kind["response.created"]["response"]["status"] == "in_progress"
    assert by_kind["response.created"]["response"]["output"] == []
    added = by_kind["response.output_item.added"]["item"]
    assert added == message | {"status": "in_progress", "content": []}
    assert by_kind["response.content_part.added"]["part"] == part | {"text": ""}
    assert by_kind["response.output_text.delta"].items() >= (place | {"delta": "lo"}).items()
    assert by_kind["response.output_text.done"].items() >= (place | {"text": "hello"}).items()
    assert by_kind["response.content_part.done"]["part"] == part
    item = message | {"status": "completed", "content": [part]}
    assert by_kind["response.output_item.done"]["item"] == item
    assert by_kind["response.completed"]["response"]["output"] == [item]


def test_a_whole_response_is_what_openais_own_types_take() -> None:
    writer = responses_writer(**ECHOED)
    body = writer.whole([Collected(["hel", "lo"], done=DONE)], USAGE)
    Response.model_validate_json(body, strict=True)
    answer = json.loads(body)
    assert answer.items() >= ECHOED.items()
    assert answer["id"] == "resp_1"
    assert answer["object"] == "response"
    assert answer["created_at"] == 1_700_000_000
    assert answer["status"] == "completed"
    assert answer["model"] == "org/model"
    assert answer["error"] is answer["incomplete_details"] is None
    assert answer["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
    client = openai_client(body, "application/json")
    assert client.responses.create(model="tiny", input="hello").output_text == "hello"


def test_a_silent_request_is_echoed_with_openais_defaults() -> None:
    answer = json.loads(responses_writer().whole([Collected(["x"], done=DONE)], USAGE))
    assert answer["store"] is answer["parallel_tool_calls"] is True
    assert answer["tool_choice"] == "auto"
    assert answer["tools"] == []
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert answer["reasoning"] == {"effort": None, "summary": None}
    for name in ("instructions", "temperature", "top_p", "previous_response_id", "user"):
        assert answer[name] is None
    told = responses_writer(reasoning={"effort": "low", "summary": "auto"})
    answer = json.loads(told.whole([Collected(["x"], done=DONE)], USAGE))
    assert answer["reasoning"]["effort"] == "low"


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [RESPONSES_TOOL], "tool_choice": "required"},
        {
            "tools": [RESPONSES_TOOL],
            "tool_choice": {"type": "function", "name": "get_weather"},
            "parallel_tool_calls": False,
        },
        {"text": {"format": {"type": "json_object"}, "verbosity": "medium"}},
    ],
)
def test_tools_tool_choice_and_format_are_echoed_as_requested(
    asked: dict[str, Any],
) -> None:
    body = responses_writer(**asked).whole([Collected(["x"], done=DONE)], USAGE)
    Response.model_validate_json(body, strict=True)
    assert json.loads(body).items() >= asked.items()
    validated(run(responses_writer(**asked), ["x"]))


RESPONSE_ENDS = [
    (DONE, "completed", None, "response.completed"),
    (STOPPED, "completed", None, "response.completed"),
    (CUT, "incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
    (CANCELLED, "cancelled", None, "response.incomplete"),
]


@pytest.mark.parametrize(("done", "status", "details", "kind"), RESPONSE_ENDS)
def test_a_streamed_response_ends_as_the_whole_one(
    done: Done, status: str, details: Any, kind: str
) -> None:
    streamed, whole = responses_writer(), responses_writer()
    *_, (last, payload) = validated(run(streamed, ["hel", "lo"], done))
    body = whole.whole([Collected(["hel", "lo"], done=done)], done.usage)
    assert last == kind
    assert payload["response"] == json.loads(body)
    assert payload["response"]["status"] == status
    assert payload["response"]["incomplete_details"] == details
    assert streamed.body == whole.body == body
    assert streamed.answer == whole.answer == Message(Role.ASSISTANT, "hello")


@pytest.mark.parametrize("end", [*(done for done, *_ in RESPONSE_ENDS), FAILURE])
def test_openais_client_reads_every_event_of_a_stream_however_it_ends(
    end: Done | APIError,
) -> None:
    stream = response_stream("hel", "lo", end=end)
    read = openai_client(stream).responses.create(model="tiny", input="hello", stream=True)
    assert [event.type for event in read] == [kind for kind, _ in frames(stream)]


def test_openais_client_accumulates_a_stream() -> None:
    events, final = read_by_openai(response_stream("hel", "lo"))
    assert final.output_text == "hello"
    assert final.usage is not None
    assert final.usage.total_tokens == 15
    assert [event.snapshot for event in events if event.type == "response.output_text.delta"] == [
        "hel",
        "hello",
    ]


@pytest.mark.parametrize("text", AWKWARD)
def test_openais_client_reads_awkward_text(text: str) -> None:
    assert read_by_openai(response_stream(text, text))[1].output_text == text + text


def test_an_empty_response_has_an_empty_message() -> None:
    stream = response_stream()
    kinds = [kind for kind, _ in validated(stream)]
    assert kinds == [*FIRST, *OPENED, *CLOSED, "response.completed"]
    assert read_by_openai(stream)[1].output_text == ""
    whole = responses_writer().whole([Collected([], done=DONE)], USAGE)
    assert json.loads(whole)["output"][0]["content"][0]["text"] == ""


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_split_of_a_text_is_the_same_response(pieces: list[str]) -> None:
    writer = responses_writer()
    read = list(frames(run(writer, pieces)))
    deltas = [payload["delta"] for kind, payload in read if kind == "response.output_text.delta"]
    assert "".join(deltas) == "".join(pieces)
    whole = responses_writer().whole([Collected(["".join(pieces)], done=DONE)], USAGE)
    assert writer.body == whole
    assert writer.answer == Message(Role.ASSISTANT, "".join(pieces))


def test_logprobs_arrive_with_their_text_and_all_of_them_at_the_end() -> None:
    drawn = [(97, Logprobs(-0.5, ((97, -0.5), (98, -1.5)))), (98, Logprobs(-0.25))]
    asked: dict[str, Any] = {"include": [LOGPROBS], "top_logprobs": 2}
    writer = responses_writer(**asked)
    stream = writer.begin() + writer.event(0, TextDelta("a", logprobs=(drawn[0],)))
    stream += writer.event(0, TextDelta("", logprobs=(drawn[1],))) + writer.done(0, DONE, USAGE)
    events = validated(stream)
    deltas = [payload for kind, payload in events if kind == "response.output_text.delta"]
    assert [[entry["token"] for entry in delta["logprobs"]] for delta in deltas] == [["a"], ["b"]]
    rivals = deltas[0]["logprobs"][0]["top_logprobs"]
    assert [entry["token"] for entry in rivals] == ["a", "b"]
    final = dict(events)["response.output_text.done"]["logprobs"]
    assert final == deltas[0]["logprobs"] + deltas[1]["logprobs"]
    whole = responses_writer(**asked)
    body = whole.whole([Collected(["a"], drawn=drawn, done=DONE)], USAGE)
    assert Response.model_validate_json(body, strict=True).top_logprobs == 2
    assert json.loads(body)["output"][0]["content"][0]["logprobs"] == final


def _ended(kind: str) -> list[str]:
    return [f"response.{kind}.done", "response.content_part.done", "response.output_item.done"]


CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def test_reasoning_a_message_and_calls_are_items_one_after_the_other() -> None:
    events = validated(response_stream(*FULL, end=CALLED))
    assert [kind for kind, _ in events] == [
        *FIRST,
        *(*OPENED, *["response.reasoning_text.delta"] * 2, *_ended("reasoning_text")),
        *(*OPENED, *["response.output_text.delta"] * 2, *CLOSED),
        *(*CALL_EVENTS, *CALL_EVENTS),
        "response.completed",
    ]
    output = [
        {
            "id": "rs_1",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "let me see", "annotations": [], "logprobs": []}
            ],
        },
        {
            "id": "fc_1",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "get_weather",
            "arguments": '{"city":"Paris"}',
        },
        {
            "id": "fc_2",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_2",
            "name": "now",
            "arguments": "{}",
        },
    ]
    assert events[-1][1]["response"]["output"] == output
    by_kind = [(kind.removeprefix("response."), payload) for kind, payload in events]
    assert [x["item"] for kind, x in by_kind if kind == "output_item.done"] == output
    assert [x["item"] for kind, x in by_kind if kind == "output_item.added"] == [
        item
        | {"status": "in_progress"}
        | ({"arguments": ""} if "name" in item else {"content": []})
        for item in output
    ]
    for kind, payload in by_kind:
        if "item_id" in payload:
            assert payload["item_id"] == output[payload["output_index"]]["id"]
            is_call = output[payload["output_index"]]["type"] == "function_call"
            assert payload.get("content_index") == (None if is_call else 0)
        if kind == "function_call_arguments.done":
            item = output[payload["output_index"]]
            assert (payload["name"], payload["arguments"]) == (item["name"], item["arguments"])
        if kind == "reasoning_text.done":
            assert payload["text"] == "hm"


def test_a_whole_response_with_calls_is_the_one_that_a_stream_ends_with() -> None:
    streamed, whole = responses_writer(), responses_writer()
    run(streamed, FULL, CALLED)
    body = whole.whole([choice_of(FULL, CALLED)], USAGE)
    Response.model_validate_json(body, strict=True)
    assert streamed.body == whole.body == body
    assert streamed.answer == whole.answer == SAID
    client = openai_client(body, "application/json")
    read = client.responses.create(model="tiny", input="hello")
    assert read.output_text == "let me see"
    assert [item.type for item in read.output] == [
        *("reasoning", "message", "function_call", "function_call"),
    ]


def test_openais_client_accumulates_reasoning_and_calls() -> None:
    events, final = read_by_openai(response_stream(*FULL, end=CALLED))
    assert final.output_text == "let me see"
    told = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.snapshot for event in told] == ['{"city":"Paris"}', "{}"]
    reasoning, _, paris, now = final.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "hm"
    assert paris.type == now.type == "function_call"
    assert (paris.call_id, paris.name, paris.arguments) == (
        "call_1",
        "get_weather",
        PARIS.arguments,
    )


def test_an_answer_that_only_calls_has_no_message() -> None:
    writer = responses_writer()
    events = validated(run(writer, called(PARIS), CALLED))
    assert [kind for kind, _ in events] == [*FIRST, *CALL_EVENTS, "response.completed"]
    assert writer.answer == Message(Role.ASSISTANT, None, tool_calls=SAID.tool_calls[:1])
    body = responses_writer().whole([choice_of(called(PARIS), CALLED)], USAGE)
    assert writer.body == body


def test_a_conversation_with_calls_is_continued_by_their_outputs_alone() -> None:
    writer = responses_writer(tools=[RESPONSES_TOOL])
    run(writer, FULL, CALLED)
    assert writer.answer is not None
    asked = response(tools=[RESPONSES_TOOL], input=[OUTPUT], previous_response_id="resp_1")
    request = asked.after((*response().conversation, writer.answer))
    assert request.messages == (USER, SAID, Message(Role.TOOL, "etc", tool_call_id="call_1"))
    assert not request.is_continuation


def test_a_client_that_keeps_the_conversation_itself_sends_the_same_back() -> None:
    writer = responses_writer()
    run(writer, FULL, CALLED)
    assert writer.body is not None
    output = json.loads(writer.body)["output"]
    assert response(input=[*HELLO, *output]).messages == (USER, SAID)


@pytest.mark.parametrize("done", [CUT, CANCELLED])
def test_reasoning_that_is_cut_is_incomplete_and_no_message_follows(done: Done) -> None:
    streamed = responses_writer()
    validated(run(streamed, [thought("hm")], done))
    body = responses_writer().whole([choice_of([thought("hm")], done)], USAGE)
    assert streamed.body == body
    (item,) = json.loads(body)["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")
    assert streamed.answer == Message(Role.ASSISTANT, "", reasoning="hm")


def test_a_call_that_is_made_is_complete_though_the_answer_is_cut() -> None:
    done = replace(CALLED, reason=FinishReason.LENGTH)
    *_, (kind, payload) = validated(response_stream("a", *called(PARIS), end=done))
    assert kind == "response.incomplete"
    assert [item["status"] for item in payload["response"]["output"]] == ["completed"] * 2


def test_a_stream_that_fails_leaves_only_what_was_open_incomplete() -> None:
    pieces = [thought("hm"), *called(PARIS), "so"]
    *_, (_, payload) = validated(response_stream(*pieces, end=FAILURE))
    found = [(item["type"], item["status"]) for item in payload["response"]["output"]]
    assert found == [
        ("reasoning", "completed"),
        ("function_call", "completed"),
        ("message", "incomplete"),
    ]


def test_a_call_before_a_failure_stays_complete() -> None:
    *_, (_, payload) = validated(response_stream(*called(PARIS), end=FAILURE))
    assert [item["status"] for item in payload["response"]["output"]] == ["completed"]


def test_logprobs_are_held_until_there_is_a_message() -> None:
    a, b, c, d = ((97 + i, Logprobs(-0.5)) for i in range(4))
    pieces = [
        thought("h", a),
        TextDelta("x", logprobs=(b,)),
        TextDelta("", logprobs=(c,)),
        ToolCallStart(NOW.id, NOW.name, logprobs=(d,)),
        *called(NOW)[1:],
    ]
    asked: dict[str, Any] = {"include": [LOGPROBS]}
    writer, whole = responses_writer(**asked), responses_writer(**asked)
    events = validated(run(writer, pieces, CALLED))
    told = [x["logprobs"] for kind, x in events if kind == "response.output_text.delta"]
    assert [[entry["token"] for entry in logprobs] for logprobs in told] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]
    assert whole.whole([choice_of(pieces, CALLED)], USAGE) == writer.body


@pytest.mark.parametrize("pieces", [[thought("h", (97, Logprobs(-0.5)))], called(NOW)])
def test_logprobs_are_not_sent_without_a_message(pieces: list[ParserEvent]) -> None:
    drawn = TextDelta("", logprobs=((98, Logprobs(-0.5)),))
    events = validated(run(responses_writer(include=[LOGPROBS]), [*pieces, drawn]))
    assert "response.output_text.delta" not in dict(events)


def test_logprobs_of_an_answer_without_text_are_in_its_empty_message() -> None:
    asked: dict[str, Any] = {"include": [LOGPROBS]}
    pieces = [TextDelta("", logprobs=((98, Logprobs(-0.5)),))]
    writer, whole = responses_writer(**asked), responses_writer(**asked)
    events = dict(validated(run(writer, pieces)))
    assert [entry["token"] for entry in events["response.output_text.done"]["logprobs"]] == ["b"]
    assert whole.whole([choice_of(pieces, DONE)], USAGE) == writer.body


def test_a_streamed_call_is_sent_in_deltas_in_both_dialects() -> None:
    pieces = called(PARIS, '{"city":"', "Par", 'is"}')
    events = validated(response_stream("a", *pieces, end=CALLED))
    call = [(kind, x) for kind, x in events if x.get("output_index") == 1]
    added, delta, args_done, item_done = CALL_EVENTS
    assert [kind for kind, _ in call] == [added, delta, delta, delta, args_done, item_done]
    assert [x["delta"] for kind, x in call if kind == delta] == ['{"city":"', "Par", 'is"}']
    assert call[0][1]["item"]["arguments"] == ""
    assert call[4][1]["arguments"] == call[5][1]["item"]["arguments"] == PARIS.arguments
    told = [x for _, x in frames(message_stream("a", *pieces, end=CALLED)) if x.get("index") == 1]
    start, *deltas, stop = told
    assert start["content_block"] == {
        **{"type": "tool_use", "id": "call_1", "name": "get_weather"},
        "input": {},
    }
    assert [x["delta"]["partial_json"] for x in deltas] == ['{"city":"', "Par", 'is"}']
    assert stop["type"] == "content_block_stop"
    (_, use) = read_by_anthropic(message_stream("a", *pieces, end=CALLED)).content
    assert use.input == {"city": "Paris"}
    _, final = read_by_openai(response_stream("a", *pieces, end=CALLED))
    assert final.output[1].arguments == PARIS.arguments  # type: ignore[union-attr]


@pytest.mark.parametrize("end", [DONE, CUT, CANCELLED])
def test_an_invalid_call_is_incomplete_and_its_text_follows(end: Done) -> None:
    writer, whole = responses_writer(), responses_writer()
    *_, (_, last) = validated(run(writer, ["a", *broken()], end))
    found = [(item["type"], item["status"]) for item in last["response"]["output"]]
    ended = "completed" if end is DONE else "incomplete"
    assert found == [("message", "completed"), ("function_call", "incomplete"), ("message", ended)]
    whole.whole([choice_of(["a", *broken()], end)], USAGE)
    said = Message(Role.ASSISTANT, "a<call>{!</call>")
    assert writer.answer == whole.answer == said, "the stored answer is the one that was sent"
    first, use, rest = read_by_anthropic(message_stream("a", *broken(), end=end)).content
    assert (first.text, use.type, use.input, rest.text) == ("a", "tool_use", {}, "!</call>")
    body = json.loads(MessagesWriter(MSG, 10).whole([choice_of(["a", *broken()], end)], USAGE))
    assert body["content"] == [{"type": "text", "text": "a<call>{!</call>"}]


@given(listed(ONE | CALLS | st.builds(broken)))
def test_streamed_items_are_distinct_and_equal_a_whole_response_in_any_order(
    pieces: list[str | ParserEvent],
) -> None:
    pieces = distinct(pieces)
    streamed, whole = responses_writer(), responses_writer()
    events = list(frames(run(streamed, pieces)))
    whole.whole([choice_of(pieces, DONE)], USAGE)
    assert streamed.answer == whole.answer
    output = events[-1][1]["response"]["output"]
    assert len({item["id"] for item in output}) == len(output)
    added = [x for kind, x in events if kind == "response.output_item.added"]
    assert [x["output_index"] for x in added] == list(range(len(output)))
    done = [x["item"] for kind, x in events if kind == "response.output_item.done"]
    assert done == output
    for i, item in enumerate(output):
        told = "".join(x["delta"] for _, x in events if "delta" in x and x["output_index"] == i)
        part = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert told == part


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "name": "f", "else": DEEP}]}, "tools[0]"),
        ({"text": {"format": {"type": "text", "schema": DEEP}}}, "text.format.schema"),
    ],
)
def test_what_responses_repeat_is_never_too_deep_to_write(
    fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(TypeError):
        orjson.dumps(DEEP)
    assert refusal(response, **fields).param == param


def test_progress_is_not_sent_in_responses() -> None:
    assert responses_writer().event(0, Progress(4, USAGE)) == b""


@pytest.mark.parametrize("pieces", [[], ["hel"]])
def test_a_responses_stream_that_fails_ends_with_an_error_and_stores_no_answer(
    pieces: list[str],
) -> None:
    writer = responses_writer()
    *_, (error, told), (failed, payload) = validated(run(writer, pieces, FAILURE))
    assert (error, failed) == ("error", "response.failed")
    assert (told["message"], told["code"]) == ("the model failed", "model_error")
    answer = payload["response"]
    assert answer["status"] == "failed"
    assert answer["error"] == {"code": "server_error", "message": "the model failed"}
    assert [entry["status"] for entry in answer["output"]] == ["incomplete"] * len(pieces)
    assert writer.answer is None
    assert writer.body == json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()


# --- conversations ------------------------------------------------------------------------------


def turn(text: str) -> tuple[Message, ...]:
    return (Message(Role.USER, text),)


def test_a_conversation_is_found_until_it_is_deleted() -> None:
    kept = StoredResponses()
    assert kept.load("resp_1") is kept.body("resp_1") is None
    kept.store("resp_1", turn("hello"), b"{}")
    assert kept.load("resp_1") == turn("hello")
    assert kept.body("resp_1") == b"{}"
    assert kept.delete("resp_1")
    assert not kept.delete("resp_1")
    assert (len(kept), kept.num_bytes) == (0, 0)


def test_the_oldest_conversations_are_dropped_when_there_are_too_many() -> None:
    kept = StoredResponses(max_entries=2)
    for i in range(3):
        kept.store(f"resp_{i}", turn("x"))
    assert [kept.load(f"resp_{i}") for i in range(3)] == [None, turn("x"), turn("x")]
    assert kept.num_bytes == 2


def test_conversations_are_kept_up_to_the_bounds() -> None:
    kept = StoredResponses()
    for i in range(MAX_CONVERSATIONS + 1):
        kept.store(f"resp_{i}", ())
    assert len(kept) == 1024
    kept.store("resp_x", turn("x" * (64 * 2**20)))
    kept.store("resp_y", turn("x" * (64 * 2**20 + 1)))
    assert kept.load("resp_x") is not None
    kept.store("resp_z", turn("x"))
    assert (len(kept), kept.num_bytes) == (1, 1)


def test_the_oldest_conversations_are_dropped_when_they_are_too_large() -> None:
    kept = StoredResponses(max_bytes=10)
    kept.store("resp_0", turn("éé"), b"1234")
    kept.store("resp_1", turn("1"))
    assert (len(kept), kept.num_bytes) == (2, 9)
    kept.store("resp_2", turn("123"))
    assert kept.load("resp_0") is None
    assert kept.num_bytes == 4
    kept.store("resp_3", turn("x" * 11))
    assert kept.load("resp_3") is None
    assert len(kept) == 2  # it did not cost the others their place


def test_a_conversation_that_is_put_again_is_counted_once() -> None:
    kept = StoredResponses()
    kept.store("resp_0", turn("12345"))
    kept.store("resp_0", turn("123"))
    assert (len(kept), kept.num_bytes) == (1, 3)


def test_all_text_of_a_conversation_counts() -> None:
    call = ToolCall("12", "345", {"a": ["bc", {"d": 1}], "e": "f"})
    message = Message(Role.ASSISTANT, "xy", reasoning="z", tool_calls=(call,))
    kept = StoredResponses()
    kept.store("resp_0", (message, Message(Role.TOOL, "r", name="n", tool_call_id="id")))
    assert kept.num_bytes == 5 + 6 + 3 + 4


def test_the_pictures_of_a_conversation_count_and_are_bounded() -> None:
    shown = Message(Role.USER, "", parts=(Source(bytes(100), None, "p"),))
    kept = StoredResponses(max_bytes=250)
    for i in range(3):
        kept.store(f"resp_{i}", (shown,))
    assert (len(kept), kept.num_bytes) == (2, 202)
    kept.store("resp_3", (shown,) * 3)
    assert kept.load("resp_3") is None
    assert len(kept) == 2


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.text(max_size=8), st.booleans())))
def test_the_bounds_hold_whatever_is_put_and_deleted(
    calls: list[tuple[str, str, bool]],
) -> None:
    kept, held = StoredResponses(max_entries=3, max_bytes=24), dict[str, str]()
    for id, text, is_deletion in calls:
        if is_deletion:
            assert kept.delete(id) == (held.pop(id, None) is not None)
        else:
            kept.store(id, turn(text))
            held.pop(id, None)
            if len(text.encode()) <= 24:
                held[id] = text
            while len(held) > 3 or sum(len(text.encode()) for text in held.values()) > 24:
                held.pop(next(iter(held)))
        assert {id: kept.load(id) for id in "abcdef"} == {
            id: turn(held[id]) if id in held else None for id in "abcdef"
        }
        assert kept.num_bytes == sum(len(text.encode()) for text in held.values())


# --- what known clients send --------------------------------------------------------------------

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-sonnet-5",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "metadata": {"user_id": "user_0_account__session_1"},
    "system": [
        block("x-anthropic-billing-header: cc_version=2.1.50; cc_entrypoint=cli; cch=00000;"),
        block("You are Claude Code, Anthropic's official CLI for Claude.", **EPHEMERAL),
        block("You are an interactive agent.", **EPHEMERAL),
    ],
    "thinking": {"type": "enabled", "budget_tokens": 31999},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "messages": [
        said("user", block("<system-reminder>x</system-reminder>"), block("hi", **EPHEMERAL)),
        said(
            "assistant",
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {**CALL, **EPHEMERAL},
        ),
        said(
            "user",
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "etc", "is_error": False},
        ),
    ],
    "tools": [],
}


def test_what_claude_code_sends_without_tools_is_accepted() -> None:
    request = messages(**CLAUDE_CODE)
    roles = [message.role.value for message in request.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert request.messages[0].as_template()["content"].startswith("You are Claude Code")
    assert request.ignored == ()
    assert request.template_kwargs == _THINKS
    assert request.is_stream


BASH = {
    "name": "Bash",
    "description": "Executes a given bash command.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    },
}


def test_what_claude_code_sends_with_tools_is_accepted() -> None:
    request = messages(**CLAUDE_CODE | {"tools": [BASH, {**MESSAGES_TOOL, **EPHEMERAL}]})
    assert [tool.name for tool in request.tools] == ["Bash", "get_weather"]
    assert request.tools[0].parameters == BASH["input_schema"]
    assert request.constraint is request.max_calls is None
    assert request.ignored == ()


def test_what_claude_code_sends_with_a_search_of_anthropics_is_refused_by_name() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    error = refusal(messages, **CLAUDE_CODE | {"tools": [BASH, search]})
    assert (error.param, error.code) == ("tools[1].type", "unsupported_parameter")
    assert json.loads(anthropic_error(error))["error"]["type"] == "invalid_request_error"


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


def test_what_zed_sends_to_anthropic_is_accepted() -> None:
    request = messages(
        max_tokens=8192,
        messages=[said("user", block("hi", **EPHEMERAL))],
        stream=True,
        system="You are an assistant in Zed.",
        temperature=1.0,
        stop_sequences=[],
        thinking={"type": "enabled", "budget_tokens": 4096},
        tools=[],
        tool_choice=None,
        metadata=None,
        top_k=None,
        top_p=None,
    )
    assert request.ignored == ()
    assert [message.content for message in request.messages] == [
        "You are an assistant in Zed.",
        "hi",
    ]


def test_what_continue_sends_to_anthropic_is_accepted() -> None:
    request = messages(
        top_k=40,
        top_p=0.9,
        temperature=0.5,
        max_tokens=4096,
        stop_sequences=["```", "\n\n\n"],
        stream=True,
        messages=[said("user", block("hi")), said("assistant", block("ok")), *HELLO],
        system=[block("You are Continue.", **EPHEMERAL)],
    )
    assert (request.stop, request.max_tokens) == (("```", "\n\n\n"), 4096)
    assert request.sampling["top_k"] == 40
    assert len(request.messages) == 4


def test_the_fields_of_each_endpoint_include_the_shared_ones() -> None:
    assert set(COUNT_FIELDS) < set(MESSAGES_FIELDS)
    assert set(GENERATION_FIELDS) < set(MESSAGES_FIELDS) & set(RESPONSES_FIELDS)
