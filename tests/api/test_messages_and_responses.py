"""Messages and Responses alike: every field, tools and formats, calls in pieces.

The cases are tables keyed by field; a field that has no case fails.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from api_requests import CASES
from api_requests import Works as ChatWorks
from dialects import (
    ABOUT,
    CALL_EVENTS,
    CALLED,
    CANCELLED,
    CUT,
    DONE,
    HELLO,
    LOGPROBS,
    MESSAGES_TOOL,
    MSG,
    PARIS,
    RESPONSES_TOOL,
    SCHEMA,
    THINKS,
    USAGE,
    USER,
    WEATHER,
    Parse,
    broken,
    called,
    choice_of,
    frames,
    message_stream,
    messages,
    read_by_anthropic,
    read_by_openai,
    refusal,
    response,
    response_stream,
    responses_writer,
    run,
    validated,
)
from tables import arrived

from mlxlite.api.constraints import CONSTRAINT_FIELDS
from mlxlite.api.conversation import Message, Role
from mlxlite.api.endpoints.anthropic_messages import (
    COUNT_FIELDS,
    MessagesWriter,
    parse_count_tokens,
)
from mlxlite.api.endpoints.anthropic_messages import FIELDS as MESSAGES_FIELDS
from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.endpoints.responses import FIELDS as RESPONSES_FIELDS
from mlxlite.api.fields import Field, Use, markdown
from mlxlite.api.request import ChatRequest
from mlxlite.api.shared_fields import GENERATION_FIELDS
from mlxlite.api.tools import MAX_TOOLS
from mlxlite.api.writers import StreamOptions
from mlxlite.output.constraint import CallConstraint, Constraint, Kind, TextConstraint
from mlxlite.output.events import Done

CHAT_TOOL = {"type": "function", "function": {**ABOUT, "parameters": SCHEMA}}
SCHEMA_CONSTRAINT = TextConstraint(Kind.JSON, json.dumps(SCHEMA, separators=(",", ":")))
OBJECT_CONSTRAINT = TextConstraint(Kind.JSON, '{"type":"object"}')


def count(**fields: Any) -> ChatRequest:
    return parse_count_tokens(json.dumps({"messages": HELLO, **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": HELLO, **fields}).encode())


def must_call(is_single: bool) -> tuple[Constraint, str]:
    """What a chat makes of a choice of tools."""
    asked = chat(tools=[CHAT_TOOL], tool_choice="required", parallel_tool_calls=not is_single)
    assert asked.constraint is not None
    return asked.constraint


# --- every field --------------------------------------------------------------------------------


class Works:
    """A field that arrives: at which attribute, as what, what it refuses, what it needs."""

    def __init__(
        self, attribute: str, right: Sequence[tuple[Any, Any]], wrong: Sequence[Any], **also: Any
    ) -> None:
        self.attribute, self.right, self.wrong = attribute, right, wrong
        self.hints, self.also = also.pop("hints", ()), also


class Accepted:
    """A field that changes nothing by its nature."""

    def __init__(
        self, right: Sequence[Any], wrong: Sequence[Any], hints: Sequence[Any] = ()
    ) -> None:
        self.right, self.wrong, self.hints = right, wrong, hints


class Refused:
    """A field that is not supported: values that ask for nothing, and some that ask."""

    def __init__(self, neutral: Sequence[Any], asking: Sequence[Any]) -> None:
        self.neutral, self.asking = neutral, asking


class LeftOut(Refused):
    """A hint: values that ask for nothing, and some that ask and are left out by name."""


def _hints(case: Any) -> Sequence[Any]:
    """Values of a field that are left out."""
    return case.asking if isinstance(case, LeftOut) else getattr(case, "hints", ())


def _share(name: str) -> Works:
    return Works(name, [(0, 0.0), (0.5, 0.5), (1, 1.0)], [-0.1, 1.1, "1", True, []])


_WINDOW = Works("repetition_context_size", [(64, 64), (-1, 0)], [0, "5", True])
_REPETITION = Works("repetition_penalty", [(1.1, 1.1)], [0, "1", True])
_FLAG_WRONG: list[Any] = [0, "true", [], {}]
_TEXT_WRONG: list[Any] = [5, True, ["a"], {}]
_STOP = Works("stop", [(["a", "b"], ("a", "b")), ([], ())], [5, [""], [5]])
_TOP_P = Works("top_p", [(0.5, 0.5), (1, 1.0), (0, 0.0)], [-1, 1.1, "1", True])
_TOP_K = Works("top_k", [(20, 20), (0, 0), (-1, 0)], [-2, 1.5, "5"])
_MODEL = Works("model", [("any", "any")], _TEXT_WRONG)
_STREAM = Works("is_stream", [(True, True), (False, False)], _FLAG_WRONG)


def _of_a_chat(name: str) -> Works:
    case = CASES[name]
    assert isinstance(case, ChatWorks)
    return Works(case.attribute, case.right, case.wrong)


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
    **dict.fromkeys(("typical_p", "typ_p"), _share("typical_p")),
    "top_n_sigma": Works("top_n_sigma", [(-1, -1.0), (1.5, 1.5)], [-2, 101, "1", True]),
    "dynatemp_range": Works("dynatemp_range", [(0.5, 0.5)], [-1, 101, "1", True]),
    "dynatemp_exponent": Works("dynatemp_exponent", [(2, 2.0)], [-1, 101, "1", True]),
    "allowed_token_ids": Works("allowed_token_ids", [([5], (5,))], [[], "5", True]),
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
    "enable_thinking": Works("template_kwargs", [(True, THINKS)], _FLAG_WRONG),
    **{name: _of_a_chat(name) for name in CONSTRAINT_FIELDS},
    "n": Refused([1], [2, 0, "1", True]),
}

MESSAGES: dict[str, Works | Accepted | Refused] = {
    **OWN,
    "stop": _STOP,
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
            ({"type": "adaptive"}, THINKS),
            ({"type": "adaptive", "display": "summarized"}, THINKS),
            ({"type": "enabled", "budget_tokens": 1024}, THINKS),
        ],
        [
            *(5, "on", True, {}, {"type": "between_tools"}, {"type": 5}, {"type": "enabled"}),
            {"type": "enabled", "budget_tokens": 1023},
            {"type": "enabled", "budget_tokens": 2048},  # not less than max_tokens
            {"type": "enabled", "budget_tokens": "1024"},
        ],
        hints=[{"type": "adaptive", "display": "omitted"}],
    ),
    "output_config": Works(
        "template_kwargs",
        [
            ({"effort": "low"}, {"enable_thinking": True, "reasoning_effort": "low"}),
            ({"effort": None, "format": None}, {}),
            ({"format": {"type": "json_schema", "schema": SCHEMA}}, {}),
        ],
        [
            *(5, {"effort": 5}, {"format": 5}, {"format": {}}),
            *({"format": {"type": "json_object"}}, {"format": {"type": "json_schema"}}),
            {"format": {"type": "json_schema", "schema": 5}},
        ],
        hints=[{"effort": "huge"}],
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
        [5, {"edits": 5}],
        [
            {"edits": [{"type": "clear_tool_uses_20250919"}]},
            {"edits": [{"type": "clear_thinking_20251015"}]},
        ],
    ),
    "speed": LeftOut(["standard"], ["fast", 5]),
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
    "mcp_servers": LeftOut([[]], [[{"url": "x"}]]),
    "container": LeftOut([], ["id", {}]),
    "diagnostics": LeftOut([], [{"previous_message_id": "x"}]),
    "thread": Works("tools", [], [{"type": "continue"}, 5], hints=[{"type": "create"}]),
    "output_format": Works(
        "constraint",
        [({"type": "json_schema", "schema": SCHEMA}, (SCHEMA_CONSTRAINT, "output_format"))],
        [5, {}, {"type": "json_object"}, {"type": "json_schema"}],
    ),
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
    **dict.fromkeys(
        ("max_output_tokens", "max_tokens", "max_completion_tokens"),
        Works("max_tokens", [(16, 16), (-1, None)], [0, "5", True]),
    ),
    "reasoning_effort": Works(
        "template_kwargs", [("high", THINKS | {"reasoning_effort": "high"})], [5], hints=["huge"]
    ),
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
        [5, "x", [5]],
        hints=[["file_search_call.results"], ["message.input_image.image_url"]],
    ),
    "top_logprobs": Works("top_logprobs", [(3, 3), (0, 0)], [21, "3", True], include=[LOGPROBS]),
    "reasoning": Works(
        "template_kwargs",
        [
            ({"effort": "high", "summary": "auto"}, THINKS | {"reasoning_effort": "high"}),
            ({"effort": "none"}, {"enable_thinking": False, "reasoning_effort": "none"}),
            ({"effort": None}, {}),
        ],
        [5, {"effort": 5}],
        hints=[
            {"effort": "huge"},
            *({"summary": "detailed"}, {"generate_summary": "concise"}),
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
            *(5, {"format": 5}, {"format": {}}, {"format": {"type": "xml"}}),
            {"format": {"type": "json_schema", "schema": SCHEMA}},
            {"format": {"type": "json_schema", "name": "x"}},
            {"format": {"type": "json_schema", "name": "x", "schema": "{}"}},
            {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": 1}},
        ],
        hints=[{"verbosity": "low"}],
    ),
    "metadata": Works(
        "echo.metadata",
        [({"a": "b"}, {"a": "b"}), ({}, {})],
        [5, {"a": 5}, {str(n): "" for n in range(17)}],
    ),
    "truncation": LeftOut(["disabled"], ["auto", 5]),
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
            [{"type": "function", "name": f"f{n}"} for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "context_management": LeftOut([[]], [[{"type": "compaction"}]]),
    "conversation": Refused([], ["conv_1", {"id": "conv_1"}]),
    "prompt": Refused([], [{"id": "pmpt_1"}]),
    "moderation": LeftOut([], [{"model": "m"}]),
    "parallel_tool_calls": Works("max_calls", [(True, None), (False, 1)], _FLAG_WRONG),
    "max_tool_calls": Works("echo.max_tool_calls", [(1, 1)], [0, "1", True]),
    "prompt_cache_options": Accepted([{"mode": "implicit"}], [5]),
    "client_metadata": Accepted([{"turn_id": "1"}], [5]),
    "user": Works("echo.user", [("me", "me")], _TEXT_WRONG),
    "service_tier": Accepted(["auto"], _TEXT_WRONG),
    "safety_identifier": Works("echo.safety_identifier", [("me", "me")], _TEXT_WRONG),
    "prompt_cache_key": Works("echo.prompt_cache_key", [("key", "key")], _TEXT_WRONG),
    "prompt_cache_retention": Accepted(["24h"], _TEXT_WRONG),
}

TABLES: list[tuple[str, Parse, Mapping[str, Field], Mapping[str, Any]]] = [
    ("messages", messages, MESSAGES_FIELDS, MESSAGES),
    (
        "count_tokens",
        count,
        COUNT_FIELDS,
        MESSAGES | {"stream": Accepted([True, False], _FLAG_WRONG)},
    ),
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
    uses: dict[type, Use] = {
        Works: Use.SUPPORTED,
        Accepted: Use.NO_OP,
        Refused: Use.UNSUPPORTED,
        LeftOut: Use.HINT,
    }
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
    wrong = () if isinstance(case, LeftOut) else wrong
    also = case.also if isinstance(case, Works) else {}
    for value in wrong:
        if parse is count and value == {"type": "enabled", "budget_tokens": 2048}:
            continue  # there is no max_tokens that it could exceed
        error = refusal(parse, **{name: value}, **also)
        assert error.param is not None
        assert error.param.split("[")[0].split(".")[0] == name, value
        if isinstance(case, Refused) and value != 5:
            assert error.code == "unsupported_parameter"


@pytest.mark.parametrize(("parse", "name", "case"), EACH)
def test_a_hint_is_left_out_by_name(
    parse: Parse, name: str, case: Works | Accepted | Refused
) -> None:
    also = case.also if isinstance(case, Works) else {}
    for value in _hints(case):
        (left_out,) = parse(**{name: value}, **also).ignored
        assert left_out.split("[")[0].split(".")[0].split(":")[0] == name


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


def test_stream_options_without_a_stream_are_left_out() -> None:
    asked = {"stream_options": {"include_obfuscation": False}}
    assert response(stream=True, **asked).ignored == ()
    assert response(**asked).ignored == ("stream_options",)


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
        (response, {"type": "local_shell"}),
        (response, {"type": "a tool of next year"}),
    ],
)
def test_a_tool_that_its_vendor_runs_is_left_out_by_name(parse: Parse, tool: Any) -> None:
    mine = RESPONSES_TOOL if parse is response else MESSAGES_TOOL
    request = parse(tools=[mine, tool])
    assert request.tools == (WEATHER,)
    assert request.ignored == (f"tools[1]:{tool['type']}",)


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
    error = refusal(parse, **asked, ignore_eos=True)
    assert error.message == f"'ignore_eos' cannot be had with '{name}'."
    assert error.param == "ignore_eos"
    found = parse(**asked, tools=[tool]).constraint
    assert found is not None
    constraint, field = found
    assert isinstance(constraint, CallConstraint)
    assert (constraint.answer, constraint.is_forced, field) == (SCHEMA_CONSTRAINT, False, name)


def test_tools_are_counted_unless_tool_choice_is_none() -> None:
    assert count(tools=[MESSAGES_TOOL]).tools == (WEATHER,)
    assert count(tools=[MESSAGES_TOOL], tool_choice={"type": "none"}).tools == ()


# --- calls in answers ---------------------------------------------------------------------------


def test_a_streamed_call_is_sent_in_deltas_in_both_dialects() -> None:
    pieces = called(PARIS, '{"city":"', "Par", 'is"}')
    events = validated(response_stream("a", *pieces, end=CALLED))
    call = [(kind, x) for kind, x in events if x.get("output_index") == 1]
    added, delta, args_done, item_done = CALL_EVENTS
    assert [kind for kind, _ in call] == [added, delta, delta, delta, args_done, item_done]
    assert [x["delta"] for kind, x in call if kind == delta] == ['{"city":"', "Par", 'is"}']
    assert call[0][1]["item"]["arguments"] == ""
    assert call[4][1]["arguments"] == call[5][1]["item"]["arguments"] == PARIS.arguments
    blocks = [x for _, x in frames(message_stream("a", *pieces, end=CALLED)) if x.get("index") == 1]
    start, *deltas, stop = blocks
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
    expected = Message(Role.ASSISTANT, "a<call>{!</call>")
    assert writer.answer == whole.answer == expected, "the stored answer is the one that was sent"
    first, use, rest = read_by_anthropic(message_stream("a", *broken(), end=end)).content
    assert (first.text, use.type, use.input, rest.text) == ("a", "tool_use", {}, "!</call>")
    body = json.loads(MessagesWriter(MSG, 10).whole([choice_of(["a", *broken()], end)], USAGE))
    assert body["content"] == [{"type": "text", "text": "a<call>{!</call>"}]


# --- shared fields ------------------------------------------------------------------------------


def test_the_fields_of_each_endpoint_include_the_shared_ones() -> None:
    assert set(COUNT_FIELDS) == set(MESSAGES_FIELDS), "it takes a whole request"
    assert set(GENERATION_FIELDS) < set(MESSAGES_FIELDS) & set(RESPONSES_FIELDS)
