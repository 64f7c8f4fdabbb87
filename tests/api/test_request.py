"""What requests share: tools and constraints, options inside fields, bodies, sampling."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from api_requests import (
    BEGUN,
    GBNF,
    NO_PARAMETERS,
    SCHEMA,
    SILENT,
    TOOL_F,
    calls,
    function_tool,
    parse,
    refusal,
)
from helpers import FakeModel
from tables import with_value

from mlxlite.api.constraints import CONSTRAINT_FIELDS
from mlxlite.api.conversation import Role, ToolCall
from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.readers import MAX_DEPTH, MAX_VALUES
from mlxlite.api.render import with_bad_words
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.output.constraint import Constraint

# --- tools and what an answer must match --------------------------------------------------------

ASKS: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "json_schema": SCHEMA,
    "grammar": GBNF,
    "guided_json": SCHEMA,
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": GBNF,
}


def test_every_constraint_field_has_a_case() -> None:
    assert ASKS.keys() == set(CONSTRAINT_FIELDS)


@pytest.mark.parametrize("one", ASKS)
def test_an_answer_can_match_only_one_thing(one: str) -> None:
    for other in ASKS.keys() - {one}:
        error = refusal(**{one: ASKS[one], other: ASKS[other]})
        assert error.param in (one, other)
        assert f"'{one}'" in error.message
        assert f"'{other}'" in error.message
        assert "exclude" in error.message
    assert parse(**{one: ASKS[one]}, tools=[function_tool("f")]).tools == (TOOL_F,)
    both = {"response_format": {"type": "text"}} | {one: ASKS[one]}
    assert parse(**both).constraint == parse(**{one: ASKS[one]}).constraint


@pytest.mark.parametrize("name", ASKS)
def test_what_must_match_ends_where_it_ends(name: str) -> None:
    ask = {name: ASKS[name]}
    for other, value in (("ignore_eos", True), ("min_tokens", 1)):
        error = refusal(**ask, **{other: value})
        assert error.param == other
        assert f"'{other}'" in error.message
        assert f"'{name}'" in error.message
    off = parse(**ask, ignore_eos=False, min_tokens=0)
    assert with_value(off, "min_tokens", None) == parse(**ask)


def test_a_thinking_budget_is_compatible_with_every_constraint() -> None:
    for name, value in ASKS.items():
        request = parse(**{name: value}, thinking_budget=5)
        assert request.thinking_budget == 5
        assert request.constraint is not None
    assert parse(thinking_budget=5, ignore_eos=True, min_tokens=5).thinking_budget == 5


_BOTH = [("f", SCHEMA), ("g", NO_PARAMETERS)]


@pytest.mark.parametrize(
    ("fields", "names", "wanted"),
    [
        ({}, "fg", None),
        ({"tool_choice": "auto"}, "fg", None),
        ({"tool_choice": "none"}, "", None),
        ({"tool_choice": "required"}, "fg", calls(*_BOTH)),
        (
            {"tool_choice": "required", "parallel_tool_calls": False},
            "fg",
            calls(*_BOTH, is_single=True),
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "f",
            calls(_BOTH[0], is_single=True),
        ),
        ({"tool_choice": {"name": "g"}}, "g", calls(_BOTH[1], is_single=True)),
    ],
)
def test_a_tool_choice_selects_the_tools_and_the_constraint(
    fields: dict[str, Any], names: str, wanted: Constraint | None
) -> None:
    request = parse(tools=[function_tool("f", parameters=SCHEMA), function_tool("g")], **fields)
    assert [tool.name for tool in request.tools] == list(names)
    assert request.constraint == (None if wanted is None else (wanted, "tool_choice"))
    assert request.max_calls == (1 if "parallel_tool_calls" in fields else None)
    if "parallel_tool_calls" not in fields:  # the older names
        old = {"functions": [{"name": "f", "parameters": SCHEMA}, {"name": "g"}]}
        if fields:
            old["function_call"] = fields["tool_choice"]
        was = parse(**old)
        assert was.tools == request.tools
        assert (was.has_functions, was.max_calls) == (True, 1), "the older form has one call"
        alone = wanted and replace(wanted, is_single=True)
        assert was.constraint == (None if alone is None else (alone, "function_call"))


def test_the_arguments_of_a_strict_tool_match_whenever_it_is_called() -> None:
    tools = [
        function_tool("f", parameters=SCHEMA, strict=True),
        function_tool("g", parameters=SCHEMA),
    ]
    loose = ("g", {"type": "object"})
    expected = calls(("f", SCHEMA), loose, is_auto=True)
    assert parse(tools=tools).constraint == (expected, "tools")
    single = calls(("f", SCHEMA), loose, is_auto=True, is_single=True)
    assert parse(tools=tools, parallel_tool_calls=False).constraint == (single, "tools")
    assert parse(tools=tools, tool_choice="none").constraint is None
    asked = parse(tools=tools, tool_choice="required").constraint
    assert asked == (calls(("f", SCHEMA), ("g", SCHEMA)), "tool_choice")


@pytest.mark.parametrize("name", ["tool_choice", "function_call"])
@pytest.mark.parametrize("tools", [{}, {"tools": []}, {"functions": []}, {"tools": None}])
def test_a_choice_among_no_tools_is_a_400(name: str, tools: dict[str, Any]) -> None:
    for value in ("required", {"name": "f"}):
        error = refusal(**tools, **{name: value})
        assert error.param == name
        assert "'tools'" in error.message
    for value in ("none", "auto"):
        assert parse(**tools, **{name: value}) == SILENT


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": ["text"]}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "schema": "x"}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"grammar": 5}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"guided_choice": ["a", None]}, "guided_choice[1]"),
        ({"tools": [5]}, "tools[0]"),
        ({"tools": [function_tool("f"), None]}, "tools[1]"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": ""}}]}, "tools[0].custom.name"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [function_tool("f", description=5)]}, "tools[0].function.description"),
        ({"tools": [function_tool("f", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [function_tool("f", strict="yes")]}, "tools[0].function.strict"),
        ({"functions": ["f"]}, "functions[0]"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f", "parameters": []}, {"name": "g"}, 5]}, "functions[2]"),
        ({"tools": [function_tool("f")], "tool_choice": {}}, "tool_choice.name"),
        ({"tools": [function_tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [function_tool("f")], "tool_choice": {"function": "f"}}, "tool_choice"),
        ({"tools": [function_tool("f")], "tool_choice": {"name": 5}}, "tool_choice.name"),
        ({"tools": [function_tool("f")], "tool_choice": {"name": "g"}}, "tool_choice"),
        ({"tools": [function_tool("f")], "tool_choice": function_tool("g")}, "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call"),
    ],
)
def test_a_part_that_is_wrong_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert len(error.message) < 300


@pytest.mark.parametrize("name", ["", "a b", "f\n", "ü", "x" * 129, "f/g", "f(x)"])
def test_a_tool_name_must_fit_every_tool_call_format(name: str) -> None:
    error = refusal(tools=[function_tool(name)])
    assert error.param == "tools[0].function.name"
    assert "'tools[0].function.name'" in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("name", "value", "path"),
    [
        ("guided_json", b"%b", "guided_json"),
        ("structured_outputs", b'{"json":%b}', "structured_outputs.json"),
        (
            "response_format",
            b'{"type":"json_schema","json_schema":{"schema":%b}}',
            "response_format.json_schema.schema",
        ),
        (
            "tools",
            b'[{"function":{"name":"f","parameters":%b}}]',
            "tools[0].function.parameters",
        ),
        ("functions", b'[{"name":"f","strict":true,"parameters":%b}]', "functions[0].parameters"),
    ],
)
def test_a_schema_may_be_nested_up_to_the_limit(name: str, value: bytes, path: str) -> None:
    def body(depth: int, opening: bytes, end: bytes) -> bytes:
        deep = b'{"a":' + opening * (depth - 2) + b"{}" + end * (depth - 2) + b"}"
        return _chat(more=b',"%b":%b' % (name.encode(), value % deep))

    for opening, end in ((b'{"a":', b"}"), (b"[", b"]")):
        assert parse_chat(body(MAX_DEPTH, opening, end))
        for depth in (MAX_DEPTH + 1, 300, 1000):
            assert refusal(body(depth, opening, end)).param == path


@pytest.mark.parametrize("deep", [b"[" * 1000 + b"]" * 1000, b'{"a":' * 1000 + b"1" + b"}" * 1000])
def test_unread_fields_of_a_tool_have_the_same_depth_limit(deep: bytes) -> None:
    tool = b',"tools":[{"type":%b,"function":{"name":"f"},"else":%b}]'
    assert refusal(_chat(more=tool % (deep, b"1"))).param == "tools[0].type"
    assert refusal(_chat(more=tool % (b'"function"', deep))).param == "tools[0]"


def test_the_older_form_of_tools_does_not_contradict_the_newer_one() -> None:
    tools, functions = [function_tool("f")], [{"name": "g"}]
    assert refusal(tools=tools, functions=functions).param == "functions"
    assert parse(tools=tools, functions=[{"name": "f"}]).tools == (TOOL_F,)
    assert refusal(tools=tools, tool_choice="auto", function_call="none").param == "function_call"
    assert parse(tools=tools, tool_choice="none", function_call="none").tools == ()


def test_the_order_of_a_schemas_keys_is_not_the_clients() -> None:
    """So that the prompts of two clients begin alike."""
    one = {
        "type": "object",
        "properties": {"b": {"type": "string", "minLength": 1}},
        "required": [],
    }
    other = {"required": [], "properties": {"b": {"minLength": 1, "type": "string"}}}
    first, second = (parse(tools=[function_tool("f", parameters=x)]).tools[0] for x in (one, other))
    assert first == second
    assert json.dumps(first.as_template()) == json.dumps(second.as_template())


def test_two_names_of_one_field_must_agree_whatever_their_order() -> None:
    assert parse(max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert parse(max_tokens=5, n_predict=-1).max_tokens == 5  # -1 is llama-server's «no limit»
    assert parse(n_predict=-1, max_tokens=5).max_tokens == 5
    assert refusal(max_tokens=5, n_predict=6).param == "n_predict"
    error = refusal(n_predict=6, max_tokens=5)
    assert error.param == "max_tokens"
    assert "'max_tokens' and its other name 'n_predict' disagree" in error.message


def test_an_old_function_call_in_the_history_is_a_tool_call() -> None:
    call = {"name": "add", "arguments": '{"a": 1}'}
    message = {"role": "assistant", "content": None, "function_call": call}
    (parsed,) = parse(messages=[message]).messages
    assert [(c.name, c.arguments) for c in parsed.tool_calls] == [("add", {"a": 1})]


@pytest.mark.parametrize("arguments", [5, True, [1]])
def test_tool_arguments_of_other_kinds_are_kept_for_the_template(arguments: Any) -> None:
    call = {"id": None, "function": {"name": "add", "arguments": arguments}}
    request = parse(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert request.messages[0].tool_calls == (ToolCall("", "add", arguments),)


# --- options inside fields ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [100.5, -101, "1", None, True, [1], {}])
def test_a_tokens_bias_is_refused_by_its_path(value: Any) -> None:
    assert refusal(logit_bias={"5": 1, "6": value}).param == "logit_bias.6"


def test_a_token_id_that_is_absurdly_long_is_a_400() -> None:
    """Python refuses to read a number of more than 4300 digits."""
    error = refusal(logit_bias={"9" * 5000: 1})
    assert error.param is not None
    assert error.param.startswith("logit_bias")
    assert len(error.body()) < 1000


@pytest.mark.parametrize("value", [-1, 1.5, "5", None, True, [5], 2**31])
def test_a_stop_token_is_refused_by_its_path(value: Any) -> None:
    assert refusal(stop_token_ids=[5, value]).param == "stop_token_ids[1]"


def test_top_logprobs_need_logprobs() -> None:
    for logprobs in ({}, {"logprobs": False}, {"logprobs": None}):
        assert refusal(**logprobs, top_logprobs=1).param == "top_logprobs"
        assert parse(**logprobs, top_logprobs=0) == SILENT, "asks for nothing"


def test_min_tokens_are_at_most_max_tokens() -> None:
    for name in ("max_tokens", "max_completion_tokens", "n_predict"):
        assert refusal(min_tokens=6, **{name: 5}).param == "min_tokens"
        assert parse(min_tokens=5, **{name: 5}).sampling["min_tokens"] == 5
    assert parse(min_tokens=6, n_predict=-1).sampling["min_tokens"] == 6
    assert parse(min_tokens=6).sampling["min_tokens"] == 6


def test_stream_options_without_a_stream_are_left_out() -> None:
    for stream in ({}, {"stream": False}, {"stream": None}):
        for options in ({"include_usage": True}, {}):
            assert parse(**stream, stream_options=options).ignored == ("stream_options",)
    assert parse(stream=True, stream_options={}).ignored == ()


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_include_usage_is_a_boolean(value: Any) -> None:
    error = refusal(stream=True, stream_options={"include_usage": value})
    assert error.param == "stream_options.include_usage"


@pytest.mark.parametrize("value", ["true", 1, 0, [], {}])
def test_continuous_usage_is_a_boolean(value: Any) -> None:
    error = refusal(stream=True, stream_options={"continuous_usage_stats": value})
    assert error.param == "stream_options.continuous_usage_stats"


def test_chat_template_kwargs_take_precedence_over_reasoning_effort() -> None:
    kwargs = {"enable_thinking": True, "reasoning_effort": "high", "other": 1}
    request = parse(reasoning_effort="none", chat_template_kwargs=kwargs)
    assert request.template_kwargs == kwargs
    request = parse(reasoning_effort="low", chat_template_kwargs={"enable_thinking": False})
    assert request.template_kwargs == {"enable_thinking": False, "reasoning_effort": "low"}


@pytest.mark.parametrize(
    ("fields", "is_continuation"),
    [
        ({}, True),
        ({"continue_final_message": None, "add_generation_prompt": None}, True),
        ({"continue_final_message": True}, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, True),
        ({"continue_final_message": False}, False),
        ({"continue_final_message": False, "add_generation_prompt": True}, False),
        ({"add_generation_prompt": True}, False),
    ],
)
def test_a_request_may_set_whether_its_last_message_is_continued(
    fields: dict[str, Any], is_continuation: bool
) -> None:
    assert parse(messages=BEGUN, **fields).is_continuation is is_continuation


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            {"continue_final_message": False, "add_generation_prompt": False},
            "add_generation_prompt",
        ),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_a_request_cannot_contradict_itself_about_its_last_message(
    fields: dict[str, Any], param: str
) -> None:
    assert refusal(messages=BEGUN, **fields).param == param


def test_a_deep_role_is_a_400() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    body = b'{"messages":[{"role":%b,"content":"x"}]}' % deep
    assert refusal(body).param == "messages[0].role"


@pytest.mark.parametrize("role", [role.value for role in Role if role is not Role.ASSISTANT])
def test_only_an_assistants_message_is_continued(role: str) -> None:
    messages = [*BEGUN, {"role": role, "content": "x"}]
    error = refusal(messages=messages, continue_final_message=True)
    assert error.param == "continue_final_message"
    assert not parse(messages=messages, continue_final_message=False).is_continuation
    assert not parse(messages=messages, add_generation_prompt=True).is_continuation


@pytest.mark.parametrize("value", ["false", 0, 1, [], {}])
def test_enable_thinking_is_a_boolean(value: Any) -> None:
    error = refusal(chat_template_kwargs={"enable_thinking": value})
    assert error.param == "chat_template_kwargs.enable_thinking"


@pytest.mark.parametrize(
    "name",
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "not an identifier",
        "",
    ],
)
def test_template_kwargs_cannot_set_what_the_server_sets(name: str) -> None:
    error = refusal(chat_template_kwargs={name: "x"})
    assert error.param == f"chat_template_kwargs.{name}"


# --- bodies -------------------------------------------------------------------------------------


def _chat(content: bytes = b'"x"', more: bytes = b"") -> bytes:
    return b'{"messages":[{"role":"user","content":' + content + b"}]" + more + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n\t",
        b"null",
        b"[]",
        b"5",
        b'"messages"',
        b"true",
        b"{",
        b'{"messages"}',
        b"{'messages': []}",
        _chat()[:-1],
        _chat() + b"}",
        _chat() + _chat(),
        _chat(more=b","),
        b"\xff\xfe",
        _chat(b'"\xff"'),
        _chat(b'"\xed\xa0\x80"'),
        _chat(rb'"\ud800"'),
        _chat(rb'"\udc00x"'),
        _chat(rb'"\ud800\ud800"'),
        _chat(b'"a\nb"'),
        _chat(more=b',"temperature":NaN'),
        _chat(more=b',"temperature":Infinity'),
        _chat(more=b',"temperature":-Infinity'),
        _chat(more=b',"temperature":1e400'),
        _chat(more=b',"seed":' + b"9" * 5000),
        _chat(b"[" * 10_000 + b"]" * 10_000),
        _chat(b"[" * 10_000),
        b"[" * 10_000,
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        _chat(more=b',"unknown":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    ],
    ids=lambda body: repr(body[:50]),
)
def test_a_body_that_is_no_json_object_is_a_400(body: bytes) -> None:
    error = refusal(body)
    assert error.type == "invalid_request_error"
    assert len(error.message) < 300
    assert json.loads(error.body())["error"]["message"] == error.message


@pytest.mark.parametrize("value", [b"0", b"[]", b'{"a":0}', b'{"a":[0]}'])
def test_a_body_of_very_many_values_is_a_400_before_it_is_read(value: bytes) -> None:
    num_marks = sum(map(value.count, (b",", b"[", b"{"))) + 1
    num = (MAX_VALUES - _chat(more=b',"user":[]').count(b"[") - 20) // num_marks
    fits = _chat(more=b',"unknown":[' + b",".join([value] * num) + b"]")
    assert parse_chat(fits + b" " * MAX_VALUES).ignored == ("unknown",)
    many = _chat(more=b',"unknown":[' + b",".join([value] * (num + 20)) + b"]")
    assert "more than 1048576 values" in refusal(many + b" " * MAX_VALUES).message


def test_arguments_and_schemas_in_strings_have_no_more_values_than_a_body() -> None:
    """An escaped comma is none until the string is read."""
    escaped = b'"[' + rb"0\u002c" * MAX_VALUES + b'0]"'
    assert refusal(_chat(more=b',"json_schema":' + escaped)).param == "json_schema"
    arguments = escaped.replace(b'"[', rb'"{\"a\":[').replace(b'0]"', b'0]}"')
    call = b'{"function":{"name":"f","arguments":%b}}' % arguments
    history = _chat()[:-2] + b',{"role":"assistant","tool_calls":[%b]}]}' % call
    assert isinstance(parse_chat(history).messages[1].tool_calls[0].arguments, str)
    few = history.replace(rb"0\u002c" * MAX_VALUES, rb"0\u002c" * 3)
    assert parse_chat(few).messages[1].tool_calls[0].arguments == {"a": [0, 0, 0, 0]}


def test_a_text_may_be_as_long_as_a_body() -> None:
    text = "a word, and then " * (MAX_VALUES - 100)
    assert parse_chat(_chat(json.dumps(text).encode())).messages[0].content == text


def test_a_deep_value_in_a_known_field_is_a_400() -> None:
    for name in ("temperature", "stop", "tools", "response_format", "logit_bias", "model"):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            deep = opening * 1000 + b"1" + closing * 1000
            param = refusal(_chat(more=b',"%b":%b' % (name.encode(), deep))).param
            assert param in (name, f"{name}[0]", f"{name}.type")


def test_an_escaped_pair_of_surrogates_is_one_character() -> None:
    assert parse_chat(_chat(rb'"\ud83d\ude42\u0000"')).messages[0].content == "🙂\0"


@pytest.mark.parametrize("number", [2**64, -(2**64), 10**30, -(10**300)])
def test_a_huge_integer_is_out_of_range_wherever_it_stands(number: int) -> None:
    for name in ("seed", "max_tokens", "top_k", "temperature", "top_p", "min_p", "n"):
        error = refusal(_chat(more=b',"%b":%d' % (name.encode(), number)))
        assert error.param == name
        assert len(error.message) < 500


def test_an_error_repeats_little_of_what_was_sent() -> None:
    kind = "k" * 100_000
    content = [{"type": kind}]
    assert len(refusal(messages=[{"role": "user", "content": content}]).message) < 400
    assert len(refusal(chat_template_kwargs={"-" * 100_000: 1}).body()) < 1000


def test_the_last_of_two_equal_names_counts() -> None:
    assert parse_chat(_chat(more=b',"top_k":5,"top_k":6')).sampling == {"top_k": 6}


# --- sampling -----------------------------------------------------------------------------------


def test_a_silent_request_samples_by_the_models_defaults() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=40, min_p=0.1)
    assert SILENT.sampling_params(defaults, seed=5) == replace(defaults, seed=5)


def test_zero_is_an_answer_and_not_silence() -> None:
    defaults = SamplingParams(temperature=0.6, top_p=0.9, top_k=40, min_p=0.1)
    request = parse(temperature=0, top_p=1, top_k=-1, min_p=0, seed=0)
    assert request.sampling_params(defaults, seed=5) == SamplingParams(temperature=0.0)


def test_every_sampling_setting_reaches_the_sampler() -> None:
    request = parse(
        temperature=0.5,
        top_p=0.6,
        top_k=7,
        min_p=0.1,
        seed=9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repeat_last_n=64,
        logit_bias={"5": 1},
        xtc_probability=0.4,
        xtc_threshold=0.2,
        typical_p=0.9,
        top_n_sigma=1.5,
        dynatemp_range=0.4,
        dynatemp_exponent=2,
        allowed_token_ids=[4],
        bad_words=["x"],
        min_tokens=3,
        logprobs=True,
        top_logprobs=4,
    )
    params = SamplingParams(
        temperature=0.5,
        top_p=0.6,
        top_k=7,
        min_p=0.1,
        seed=9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_context_size=64,
        logit_bias=((5, 1.0),),
        xtc_probability=0.4,
        xtc_threshold=0.2,
        typical_p=0.9,
        top_n_sigma=1.5,
        dynatemp_range=0.4,
        dynatemp_exponent=2.0,
        allowed_token_ids=(4,),
        bad_words=((120,),),
        min_tokens=3,
        top_logprobs=4,
    )
    request = with_bad_words(FakeModel(), request)
    assert request.sampling_params(SamplingParams(), seed=5) == params
    names = {item.name for item in fields(SamplingParams)}
    default = SamplingParams()
    same = [name for name in names if getattr(params, name) == getattr(default, name)]
    assert not same, "a setting that this test has not changed"


def test_a_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert parse(seed=-2).sampling_params(SamplingParams(), seed=5).seed == 2**64 - 2
    assert parse(seed=-1).sampling_params(SamplingParams(), seed=5).seed == 5
