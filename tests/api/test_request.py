"""What clients may ask: every field of the table, right and wrong, and every kind of broken body.

The cases are tables keyed by field; a field of `FIELDS` that has no case fails.
"""

import json
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import arrived, with_value

from mlxlite.api.constraints import CONSTRAINT_FIELDS
from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.endpoints.admin import CancelRequest, parse_cancel
from mlxlite.api.endpoints.chat_completions import FIELDS, parse_chat
from mlxlite.api.fields import MAX_TOKEN_MAP, Use, markdown
from mlxlite.api.readers import MAX_DEPTH, MAX_VALUES
from mlxlite.api.request import ChatRequest
from mlxlite.api.shared_fields import EFFORTS, MAX_STOP_BYTES, MAX_STOP_STRINGS
from mlxlite.api.tools import MAX_TOOLS, Tool
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import MAX_CONTEXT_SIZE, SamplingParams
from mlxlite.http.errors import APIError
from mlxlite.output.grammar import CallConstraint, Constraint, Kind, TextConstraint, ToolSchema
from mlxlite.vision.images import Source

CAT = "data:image/png;base64,Y2F0"  # whether it is a picture is not the parser's to see
DOG = "https://example.com/dog.png"
URLS = st.sampled_from([CAT, DOG, "data:", "file:///x", "http://", "http://[", "data:;base64,x"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | URLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
HELLO = [{"role": "user", "content": "hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "Once"}]
SILENT = ChatRequest(messages=(Message(Role.USER, "hello"),))


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def parse(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"messages": HELLO, **fields}).encode())


def refusal(body: bytes | None = None, **fields: Any) -> APIError:
    """The 400 that a body, or a chat with these fields, gets."""
    if body is None:
        body = json.dumps({"messages": HELLO, **fields}).encode()
    with pytest.raises(APIError) as caught:
        parse_chat(body)
    assert caught.value.status == 400
    return caught.value


# --- the table ----------------------------------------------------------------------------------

_TOKENS_RIGHT = [(1, 1), (4096, 4096), (20.0, 20), (-1, None), (2**31 - 1, 2**31 - 1)]
_TOKENS_WRONG = [0, -2, 1.5, "5", True, [5], {}, 2**31, 2**70, 1e300]
_TEXT_WRONG: list[Any] = [5, 1.5, True, ["a"], {}]
_FLAG_WRONG: list[Any] = [0, 1, "true", "", [], {}]
_BIASES = {str(id): 1 for id in range(MAX_TOKEN_MAP)}


@dataclass(frozen=True)
class Works:
    """A field that arrives: at which attribute, as what, and what it refuses."""

    attribute: str
    right: list[tuple[Any, Any]]
    wrong: list[Any]
    also: dict[str, Any] = field(default_factory=dict)  # what the request needs beside it


@dataclass(frozen=True)
class Accepted:
    """A field that changes nothing by its nature."""

    right: list[Any]
    wrong: list[Any]


@dataclass(frozen=True)
class Refused:
    """A field that is not supported: values that ask for nothing, and some that ask."""

    neutral: list[Any]
    asking: list[Any]


def _tokens() -> Works:
    return Works("max_tokens", _TOKENS_RIGHT, _TOKENS_WRONG)


def _stop() -> Works:
    most = [f"{n}" for n in range(MAX_STOP_STRINGS)]
    longest = "é" * (MAX_STOP_BYTES // 2)
    return Works(
        "stop",
        [
            ("a", ("a",)),
            (["a", "b"], ("a", "b")),
            (["a", "a"], ("a",)),
            ([], ()),
            ("\n", ("\n",)),
            (most, tuple(most)),
            (longest, (longest,)),
        ],
        [5, True, {}, "", [""], ["a", ""], [5], [None], [["a"]], [*most, "x"], longest + "x"],
    )


def _penalty(attribute: str) -> Works:
    right = [(0, 0.0), (-2, -2.0), (2, 2.0), (0.5, 0.5)]
    return Works(attribute, right, [-2.1, 2.1, "1", True, [], {}])


def _repetition() -> Works:
    right = [(1, 1.0), (1.12, 1.12), (0.5, 0.5), (100, 100.0)]
    return Works("repetition_penalty", right, [0, 0.0, -1, 100.1, "1", True, [], {}])


def _window() -> Works:
    right = [(1, 1), (64, 64), (20.0, 20), (-1, 0), (MAX_CONTEXT_SIZE, MAX_CONTEXT_SIZE)]
    wrong = [0, -2, MAX_CONTEXT_SIZE + 1, 1.5, "5", True, [], {}]
    return Works("repetition_context_size", right, wrong)


def _share(attribute: str) -> Works:
    return Works(attribute, [(0, 0.0), (0.5, 0.5), (1, 1.0)], [-0.1, 1.1, "0", False, [], {}])


def _off_number(neutral: float, *asking: Any) -> Refused:
    return Refused([neutral, float(neutral)], [*asking, "x", [1], {"a": 1}])


def _off_flag() -> Refused:
    return Refused([False], [True, 0, 1, "false", [], {}])


def _effort(effort: str) -> dict[str, Any]:
    return {"enable_thinking": effort != "none", "reasoning_effort": effort}


def _off_at_all() -> Refused:
    return Refused([], [{}, [], "x", 0, False, True, {"a": 1}])


_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
_F, _G = Tool("f", "", _NO_PARAMETERS), Tool("g", "", _NO_PARAMETERS)
_AB = TextConstraint(Kind.CHOICE, '["a","b"]')
_GBNF = 'root ::= "a" | "b"'
_GRAMMAR = TextConstraint(Kind.GRAMMAR, _GBNF)


def _tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def _json(schema: dict[str, Any]) -> Constraint:
    return TextConstraint(Kind.JSON, json.dumps(schema, separators=(",", ":")))


def _constrained(field: str, value: Any, found: Constraint) -> list[tuple[Any, Any]]:
    """A value, and whether the field constrains the answer to match it."""
    return [(value, (found, field))]


def _schema(name: str) -> Works:
    right = [
        *_constrained(name, _SCHEMA, _json(_SCHEMA)),
        *_constrained(name, {}, _json({})),
        *_constrained(name, json.dumps(_SCHEMA), _json(_SCHEMA)),
    ]
    return Works("constraint", right, ["", "no JSON", "[]", "5", [], 5, True])


def _grammar(name: str) -> Works:
    right = _constrained(name, _GBNF, _GRAMMAR)
    return Works("constraint", right, ["", 5, True, [], {}])


CASES: dict[str, Works | Accepted | Refused] = {
    "model": Works("model", [("m", "m"), ("", ""), ("a/b", "a/b")], _TEXT_WRONG),
    "messages": Works(
        "messages",
        [
            (HELLO, SILENT.messages),
            ([{"role": "assistant", "content": None}], (Message(Role.ASSISTANT, None),)),
        ],
        [[], {}, "hello", 5, True],
    ),
    "max_tokens": _tokens(),
    "max_completion_tokens": _tokens(),
    "max_output_tokens": _tokens(),
    "n_predict": _tokens(),
    "temperature": Works(
        "temperature",
        [(0, 0.0), (0.7, 0.7), (1, 1.0), (2.0, 2.0), (100, 100.0)],
        [-0.1, 100.1, 1e300, 2**70, "1", True, [1], {}],
    ),
    "top_p": Works(
        "top_p", [(1, 1.0), (0.8, 0.8), (1e-9, 1e-9)], [0, 0.0, -0.5, 1.1, "1", True, [], {}]
    ),
    "top_k": Works(
        "top_k",
        [(0, 0), (-1, 0), (20, 20), (20.0, 20), (2**31 - 1, 2**31 - 1)],
        [-2, 1.5, "20", True, [], {}, 2**31],
    ),
    "min_p": Works("min_p", [(0, 0.0), (0.05, 0.05), (1, 1.0)], [-0.1, 1.1, "0", False, [], {}]),
    "seed": Works(
        "seed",
        [(0, 0), (7, 7), (-1, None), (2**64 - 1, 2**64 - 1), (-(2**63), 2**63), (7.0, 7)],
        [0.5, "7", True, [], {}],
    ),
    "stop": _stop(),
    "stop_sequences": _stop(),
    "stream": Works("is_stream", [(True, True), (False, False)], _FLAG_WRONG),
    "stream_options": Works(
        "stream_options",
        [
            ({}, StreamOptions()),
            ({"include_usage": True}, StreamOptions(include_usage=True)),
            ({"include_usage": False}, StreamOptions()),
            ({"include_usage": None}, StreamOptions()),
            ({"include_usage": True, "continuous_usage_stats": False}, StreamOptions(True)),
            ({"include_usage": True, "continuous_usage_stats": True}, StreamOptions(True, True)),
            ({"continuous_usage_stats": True}, StreamOptions()),  # as vLLM has it
            ({"include_usage": True, "include_obfuscation": False}, StreamOptions(True)),
        ],
        [True, "x", [], 1],
        also={"stream": True},
    ),
    "return_progress": Works("return_progress", [(True, True), (False, False)], _FLAG_WRONG),
    "timings_per_token": Works(
        "stream_options",
        [(True, StreamOptions(timings_per_token=True)), (False, StreamOptions())],
        _FLAG_WRONG,
    ),
    "reasoning_effort": Works(
        "template_kwargs",
        [(effort, _effort(effort)) for effort in EFFORTS],
        ["", "None", "extreme", 0, True, ["low"], {}],
    ),
    "continue_final_message": Works(
        "continue_final", [(True, True), (False, False)], _FLAG_WRONG, also={"messages": BEGUN}
    ),
    "add_generation_prompt": Works("continue_final", [(True, False)], _FLAG_WRONG),
    "chat_template_kwargs": Works(
        "template_kwargs",
        [
            ({}, {}),
            ({"enable_thinking": False}, {"enable_thinking": False}),
            ({"a": {"b": [1, None]}}, {"a": {"b": [1, None]}}),
        ],
        ["x", [], True, 1],
    ),
    **dict.fromkeys(
        (
            "user",
            "service_tier",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
        ),
        Accepted(["x", ""], _TEXT_WRONG),
    ),
    "metadata": Accepted([{}, {"a": "b"}], ["x", [], 5, True]),
    "store": Accepted([True, False], _FLAG_WRONG),
    "id_slot": Accepted([-1, 0, 7], [-2, 0.5, "0", True, [], {}]),
    "parallel_tool_calls": Works("max_calls", [(False, 1), (True, None)], _FLAG_WRONG),
    "n": Works("num_choices", [(1, 1), (2, 2), (16.0, 16)], [0, -1, 17, 1.5, "2", True, [], {}]),
    "presence_penalty": _penalty("presence_penalty"),
    "frequency_penalty": _penalty("frequency_penalty"),
    "repetition_penalty": _repetition(),
    "repeat_penalty": _repetition(),
    "repetition_context_size": _window(),
    "repeat_last_n": _window(),
    "logit_bias": Works(
        "logit_bias",
        [
            ({}, ()),
            ([], ()),
            ({"5": 1}, ((5, 1.0),)),
            ({"0": -100, "151935": 100, "7": 0.5}, ((0, -100.0), (151935, 100.0), (7, 0.5))),
            (_BIASES, tuple((id, 1.0) for id in range(MAX_TOKEN_MAP))),
        ],
        [
            *([[5, 1]], [5], "5", 5, True),
            *({"a": 1}, {"-1": 1}, {"": 1}, {"1.5": 1}, {" 5": 1}, {"٣": 1}, {"²": 1}, {"+5": 1}),
            _BIASES | {str(MAX_TOKEN_MAP): 1},
        ],
    ),
    "xtc_probability": _share("xtc_probability"),
    "xtc_threshold": _share("xtc_threshold"),
    "logprobs": Works("top_logprobs", [(True, 0), (False, None)], _FLAG_WRONG),
    "top_logprobs": Works(
        "top_logprobs",
        [(0, 0), (1, 1), (20, 20), (5.0, 5)],
        [-1, 21, 1.5, "5", True, [], {}],
        also={"logprobs": True},
    ),
    "min_tokens": Works(
        "min_tokens",
        [(0, 0), (5, 5), (20.0, 20), (2**31 - 1, 2**31 - 1)],
        [-1, 1.5, "5", False, [], {}, 2**31],
    ),
    "ignore_eos": Works("ignore_eos", [(True, True), (False, False)], _FLAG_WRONG),
    "stop_token_ids": Works(
        "stop_tokens",
        [([], ()), ([5], (5,)), ([0, 2**31 - 1], (0, 2**31 - 1)), ([5.0], (5,))],
        ["5", 5, {}, True],
    ),
    "priority": Works(
        "priority",
        [(0, 0), (-10, -10), (2**31 - 1, 2**31 - 1), (-(2**31), -(2**31)), (1.0, 1)],
        [1.5, "1", True, [], {}, 2**31, -(2**31) - 1],
    ),
    "cache_prompt": Works("cache_prompt", [(True, True), (False, False)], _FLAG_WRONG),
    "cache_salt": Works(
        "cache_salt",
        [("", ""), ("a", "a"), ("ü" * 128, "ü" * 128), ("\x00", "\x00")],
        [*_TEXT_WRONG, "a" * 129],
    ),
    "response_format": Works(
        "constraint",
        [
            ({"type": "text"}, None),
            ({"type": "json_object"}, (_json({"type": "object"}), "response_format")),
            (
                {"type": "json_object", "schema": None},
                (_json({"type": "object"}), "response_format"),
            ),
            ({"type": "json_object", "schema": _SCHEMA}, (_json(_SCHEMA), "response_format")),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}},
                (_json(_SCHEMA), "response_format"),
            ),
            (
                {"type": "json_schema", "json_schema": {"schema": {}, "strict": True}},
                (_json({}), "response_format"),
            ),
        ],
        ["text", "json_object", [], 5, True],
    ),
    "structured_outputs": Works(
        "constraint",
        [
            ({}, None),
            ({"json": None, "regex": None}, None),
            *_constrained("structured_outputs", {"json": _SCHEMA}, _json(_SCHEMA)),
            *_constrained("structured_outputs", {"json": json.dumps(_SCHEMA)}, _json(_SCHEMA)),
            *_constrained("structured_outputs", {"regex": "a+"}, TextConstraint(Kind.REGEX, "a+")),
            *_constrained("structured_outputs", {"choice": ["a", "b"]}, _AB),
            *_constrained("structured_outputs", {"grammar": _GBNF}, _GRAMMAR),
        ],
        ["json", [], 5, True, {"json": _SCHEMA, "regex": "a"}],
    ),
    "json_schema": _schema("json_schema"),
    "grammar": _grammar("grammar"),
    "guided_json": _schema("guided_json"),
    "guided_regex": Works(
        "constraint",
        _constrained("guided_regex", "[ab]+", TextConstraint(Kind.REGEX, "[ab]+")),
        ["", 5, True, [], {}],
    ),
    "guided_choice": Works(
        "constraint",
        [
            *_constrained("guided_choice", ["a", "b"], _AB),
            *_constrained("guided_choice", [""], TextConstraint(Kind.CHOICE, '[""]')),
        ],
        [[], "a", {}, 5, True],
    ),
    "guided_grammar": _grammar("guided_grammar"),
    "tools": Works(
        "tools",
        [
            ([], ()),
            ([_tool("f")], (Tool("f", "", _NO_PARAMETERS),)),
            ([{"function": {"name": "f"}}], (Tool("f", "", _NO_PARAMETERS),)),
            (
                [_tool("f", description="d", parameters=_SCHEMA), _tool("g", strict=False)],
                (Tool("f", "d", _SCHEMA), Tool("g", "", _NO_PARAMETERS)),
            ),
            ([_tool("f", description=None, parameters=None, strict=None)], (_F,)),
            ([_tool("f", parameters={"properties": {}})], (_F,)),
            (
                [_tool(f"f{n}") for n in range(MAX_TOOLS)],
                tuple(Tool(f"f{n}", "", _NO_PARAMETERS) for n in range(MAX_TOOLS)),
            ),
            (
                [_tool("a-b_C.9:d" + "x" * 119)],
                (Tool("a-b_C.9:d" + "x" * 119, "", _NO_PARAMETERS),),
            ),
        ],
        [
            *({}, "x", 5, True, False, 0),
            [_tool("f"), _tool("f")],
            [_tool(f"f{n}") for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "tool_choice": Works(  # what it makes the answer match has a test of its own
        "tools",
        [("none", ()), ("auto", (_F, _G))],
        ["", "any", 5, True, []],
        also={"tools": [_tool("f"), _tool("g")]},
    ),
    "functions": Works(
        "tools",
        [([], ()), ([{"name": "f"}], (_F,)), ([{"name": "f"}, {"name": "g"}], (_F, _G))],
        [
            *({}, "x", 5, True, False, 0),
            [{"name": "f"}, {"name": "f"}],
            [{"name": f"f{n}"} for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "function_call": Works(
        "tools",
        [("none", ()), ("auto", (_F, _G))],
        ["", "any", 5, True, []],
        also={"functions": [{"name": "f"}, {"name": "g"}]},
    ),
    **dict.fromkeys(
        ("thinking_budget", "thinking_budget_tokens", "thinking_token_budget"),
        Works(
            "thinking_budget",
            [(0, 0), (5, 5), (20.0, 20), (2**31 - 1, 2**31 - 1)],
            [-1, 1.5, "5", True, [], {}, 2**31],
        ),
    ),
    "reasoning_format": Works(
        "splits_reasoning",
        [("none", False), ("auto", True), ("split", True), ("deepseek", True)],
        ["", "None", "raw", 5, True, ["none"], {}],
    ),
    "modalities": Refused([["text"]], [["text", "audio"], ["audio"], [], "text"]),
    "verbosity": Refused(["medium"], ["low", "high", "", 1]),
    "chat_template": _off_at_all(),
    **dict.fromkeys(("typical_p", "length_penalty"), _off_number(1, 0.9, 0)),
    **dict.fromkeys(
        ("mirostat", "dry_multiplier", "dynatemp_range", "n_probs", "n_keep"),
        _off_number(0, 0.5, False),
    ),
    **dict.fromkeys(
        (
            *("echo", "use_beam_search", "include_stop_str_in_output", "post_sampling_probs"),
            *("return_token_ids", "return_tokens_as_token_ids", "return_tokens"),
        ),
        _off_flag(),
    ),
    **dict.fromkeys(
        ("skip_special_tokens", "spaces_between_special_tokens", "include_reasoning"),
        Refused([True], [False, 0, 1, "true", [], {}]),
    ),
    **dict.fromkeys(
        (
            *("audio", "prediction", "web_search_options", "moderation", "logits_processors"),
            *("bad_words", "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens"),
        ),
        _off_at_all(),
    ),
    **dict.fromkeys(("top_n_sigma", "t_max_predict_ms"), _off_number(-1, 1, 0)),
}
# What each kind of field does, one parameter a value.
WORKING = [
    (name, case, *pair)
    for name, case in CASES.items()
    if isinstance(case, Works)
    for pair in case.right
]
WRONG = [
    (name, case, value)
    for name, case in CASES.items()
    if not isinstance(case, Refused)
    for value in case.wrong
]
PASSING = [
    (name, value)
    for name, case in CASES.items()
    if not isinstance(case, Works)
    for value in (case.right if isinstance(case, Accepted) else case.neutral)
]
ASKING = [
    (name, value)
    for name, case in CASES.items()
    if isinstance(case, Refused)
    for value in case.asking
]


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_table_has_a_case_of_its_use(name: str) -> None:
    kinds = {Use.SUPPORTED: Works, Use.NO_OP: Accepted, Use.UNSUPPORTED: Refused}
    assert name in CASES, f"a new field: give {name} its values here"
    assert isinstance(CASES[name], kinds[FIELDS[name].use])


def test_there_is_no_case_without_a_field() -> None:
    assert CASES.keys() == FIELDS.keys()


@pytest.mark.parametrize(("name", "case", "value", "expected"), WORKING)
def test_a_field_that_works_arrives(name: str, case: Works, value: Any, expected: Any) -> None:
    request = parse(**case.also, **{name: value})
    assert arrived(request, case.attribute) == expected
    assert type(arrived(request, case.attribute)) is type(expected)
    without = parse(**case.also)
    assert request == with_value(without, case.attribute, expected), "and nothing else does"


@pytest.mark.parametrize(("name", "case", "value"), WRONG)
def test_a_wrong_value_is_a_400_that_names_the_field(
    name: str, case: Works | Accepted, value: Any
) -> None:
    error = refusal(**(case.also if isinstance(case, Works) else {}), **{name: value})
    assert error.param == name
    assert f"'{name}'" in error.message
    assert error.type == "invalid_request_error"
    assert error.code is None


@pytest.mark.parametrize(("name", "value"), PASSING)
def test_a_neutral_value_changes_nothing(name: str, value: Any) -> None:
    assert parse(**{name: value}) == SILENT


@pytest.mark.parametrize(("name", "value"), ASKING)
def test_an_unsupported_value_is_a_400_that_names_its_field(name: str, value: Any) -> None:
    error = refusal(**{name: value})
    assert error.code == "unsupported_parameter"
    assert error.param == name
    assert f"'{name}'" in error.message


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "messages"])
def test_null_means_not_given(name: str) -> None:
    assert parse(**{name: None}) == SILENT


def test_null_messages_are_missing_messages() -> None:
    assert refusal(messages=None).param == "messages"
    assert refusal(b"{}").param == "messages"
    assert "required" in refusal(b"{}").message


def test_an_alias_means_the_field_it_stands_for() -> None:
    aliases = {name: entry.alias_of for name, entry in FIELDS.items() if entry.alias_of}
    assert aliases == {
        "max_completion_tokens": "max_tokens",
        "max_output_tokens": "max_tokens",
        "n_predict": "max_tokens",
        "stop_sequences": "stop",
        "repeat_penalty": "repetition_penalty",
        "repeat_last_n": "repetition_context_size",
        "thinking_budget_tokens": "thinking_budget",
        "thinking_token_budget": "thinking_budget",
    }
    for name, meant in aliases.items():
        value = "x" if meant == "stop" else 5
        assert parse(**{name: value}) == parse(**{meant: value})
        assert CASES[name] == CASES[meant], "it reads the same values"


# --- tools and what an answer must match --------------------------------------------------------

ASKS: dict[str, Any] = {
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "json_schema": _SCHEMA,
    "grammar": _GBNF,
    "guided_json": _SCHEMA,
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": _GBNF,
    "tools": [_tool("f", strict=True)],
}


def test_every_constraint_field_has_a_case() -> None:
    assert ASKS.keys() == {*CONSTRAINT_FIELDS, "tools"}


@pytest.mark.parametrize("one", ASKS)
def test_an_answer_can_match_only_one_thing(one: str) -> None:
    for other in ASKS.keys() - {one}:
        error = refusal(**{one: ASKS[one], other: ASKS[other]})
        assert error.param in (one, other)
        assert f"'{one}'" in error.message
        assert f"'{other}'" in error.message
        assert "exclude" in error.message
    if one != "tools":
        error = refusal(**{one: ASKS[one]}, tools=[_tool("f")], tool_choice="required")
        assert error.param == "tool_choice"
        assert parse(**{one: ASKS[one]}, tools=[_tool("f")]).tools == (_F,), "but both are possible"
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


def calls(*tools: tuple[str, Any], is_single: bool = False, is_auto: bool = False) -> Constraint:
    """Calls of these tools, with the schemas of their arguments."""
    listed = (ToolSchema(name, json.dumps(item, separators=(",", ":"))) for name, item in tools)
    return CallConstraint(tuple(listed), is_single, not is_auto)


_BOTH = [("f", _SCHEMA), ("g", _NO_PARAMETERS)]


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
    request = parse(tools=[_tool("f", parameters=_SCHEMA), _tool("g")], **fields)
    assert [tool.name for tool in request.tools] == list(names)
    assert request.constraint == (None if wanted is None else (wanted, "tool_choice"))
    assert request.max_calls == (1 if "parallel_tool_calls" in fields else None)
    if "parallel_tool_calls" not in fields:  # the older names
        old = {"functions": [{"name": "f", "parameters": _SCHEMA}, {"name": "g"}]}
        if fields:
            old["function_call"] = fields["tool_choice"]
        was = parse(**old)
        assert was.tools == request.tools
        assert was.constraint == (None if wanted is None else (wanted, "function_call"))


def test_the_arguments_of_a_strict_tool_match_whenever_it_is_called() -> None:
    tools = [_tool("f", parameters=_SCHEMA, strict=True), _tool("g", parameters=_SCHEMA)]
    loose = ("g", {"type": "object"})
    expected = calls(("f", _SCHEMA), loose, is_auto=True)
    assert parse(tools=tools).constraint == (expected, "tools")
    single = calls(("f", _SCHEMA), loose, is_auto=True, is_single=True)
    assert parse(tools=tools, parallel_tool_calls=False).constraint == (single, "tools")
    assert parse(tools=tools, tool_choice="none").constraint is None
    asked = parse(tools=tools, tool_choice="required").constraint
    assert asked == (calls(("f", _SCHEMA), ("g", _SCHEMA)), "tool_choice")


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
        ({"tools": [_tool("f"), None]}, "tools[1]"),
        ({"tools": [{}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [_tool("f", description=5)]}, "tools[0].function.description"),
        ({"tools": [_tool("f", parameters="{}")]}, "tools[0].function.parameters"),
        ({"tools": [_tool("f", strict="yes")]}, "tools[0].function.strict"),
        ({"functions": ["f"]}, "functions[0]"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"functions": [{"name": "f", "parameters": []}, {"name": "g"}, 5]}, "functions[2]"),
        ({"tools": [_tool("f")], "tool_choice": {}}, "tool_choice.name"),
        ({"tools": [_tool("f")], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [_tool("f")], "tool_choice": {"function": "f"}}, "tool_choice"),
        ({"tools": [_tool("f")], "tool_choice": {"name": 5}}, "tool_choice.name"),
        ({"tools": [_tool("f")], "tool_choice": {"name": "g"}}, "tool_choice"),
        ({"tools": [_tool("f")], "tool_choice": _tool("g")}, "tool_choice"),
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
    error = refusal(tools=[_tool(name)])
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
    assert refusal(_chat(more=tool % (deep, b"1"))).param == "tools[0]"
    assert refusal(_chat(more=tool % (b'"function"', deep))).param == "tools[0]"


def test_the_older_form_of_tools_does_not_contradict_the_newer_one() -> None:
    tools, functions = [_tool("f")], [{"name": "g"}]
    assert refusal(tools=tools, functions=functions).param == "functions"
    assert parse(tools=tools, functions=[{"name": "f"}]).tools == (_F,)
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
    first, second = (parse(tools=[_tool("f", parameters=x)]).tools[0] for x in (one, other))
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
def test_tool_arguments_are_a_string_or_an_object(arguments: Any) -> None:
    call = {"id": None, "function": {"name": "add", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    param = refusal(messages=[message]).param
    assert param == "messages[0].tool_calls[0].function.arguments"


def test_all_that_the_launching_app_sends_is_accepted() -> None:
    request = parse(
        model="m",
        stream=True,
        n_predict=512,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        min_p=0.05,
        seed=7,
        repeat_penalty=1.12,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"42": -1.5},
        cache_prompt=True,
        chat_template_kwargs={"enable_thinking": False},
        stop_sequences=["</s>", "User:"],
    )
    assert request == replace(
        SILENT,
        model="m",
        is_stream=True,
        max_tokens=512,
        sampling={
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.05,
            "seed": 7,
            "repetition_penalty": 1.12,
            "presence_penalty": 0.1,
            "frequency_penalty": -0.2,
            "logit_bias": ((42, -1.5),),
        },
        template_kwargs={"enable_thinking": False},
        stop=("</s>", "User:"),
        cache_prompt=True,
        ignored=(),
    )


def test_unknown_fields_are_ignored_and_named() -> None:
    request = parse(zeta=1, n_cache_reuse=0, alpha=None)
    assert request == replace(SILENT, ignored=("alpha", "n_cache_reuse", "zeta"))


@pytest.mark.parametrize(
    "body",
    [
        {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.7},
        {"stream": False, "max_completion_tokens": 1000},  # to name a chat
        {"stream": True, "stop": ["<end>"], "seed": 0, "top_k": 40, "min_p": 0.0, "top_p": 0.9},
        {"stream": True, "tools": [_tool("f")], "tool_choice": "auto", "frequency_penalty": 1.1},
    ],
)
def test_all_that_open_webui_sends_is_known(body: dict[str, Any]) -> None:
    """Written from its source (`generate_chat_completion`), not captured."""
    system = {"role": "system", "content": "You are a helpful assistant."}
    user = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    assert parse(model="demo", messages=[system, user], **body).ignored == ()


def test_the_readmes_table_has_a_row_for_every_field() -> None:
    rows = markdown(FIELDS).splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(FIELDS)
    assert all(row.count("|") == 4 for row in rows), "a pipe in a note would break the table"


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


def test_stream_options_need_a_stream() -> None:
    for stream in ({}, {"stream": False}, {"stream": None}):
        assert refusal(**stream, stream_options={"include_usage": True}).param == "stream_options"
        assert refusal(**stream, stream_options={}).param == "stream_options"


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


# --- messages -----------------------------------------------------------------------------------


def message(**fields: Any) -> Message:
    return parse(messages=[fields]).messages[0]


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_every_role_is_accepted(role: str) -> None:
    assert message(role=role, content="x") == Message(Role(role), "x")


@pytest.mark.parametrize(
    ("role", "shown"),
    [("developer", "system"), ("function", "tool"), ("system", "system"), ("user", "user")],
)
def test_roles_are_mapped_to_those_of_templates(role: str, shown: str) -> None:
    assert message(role=role, content="x").as_template() == {"role": shown, "content": "x"}


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=00000;"


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (BILLING, ""),
        (f"{BILLING}\n", ""),
        (f"{BILLING}\nYou are kind.", "You are kind."),
        (f"{BILLING}\n\nYou are kind.", "You are kind."),
        (f"{BILLING.title()}\nYou are kind.", "You are kind."),
        (f"{BILLING}\n{BILLING}\nYou are kind.", "You are kind."),
        ("You are kind.", "You are kind."),
        ("\nYou are kind.\n", "\nYou are kind.\n"),
        (f"You are kind.\n{BILLING}", f"You are kind.\n{BILLING}"),
        (f" {BILLING}", f" {BILLING}"),
        ("x-anthropic-billing-headers", "x-anthropic-billing-headers"),
    ],
)
def test_a_billing_header_at_the_head_of_a_system_message_is_not_shown(
    content: str, shown: str, role: str
) -> None:
    assert message(role=role, content=content).as_template()["content"] == shown
    parts = [{"type": "text", "text": part} for part in content.split("\n", 1)]
    assert message(role=role, content=parts).as_template()["content"] == shown


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "function"])
def test_a_billing_header_in_another_role_is_kept(role: str) -> None:
    said = message(role=role, content=f"{BILLING}\nx").as_template()["content"]
    assert said == f"{BILLING}\nx"


@pytest.mark.parametrize("role", ["", "User", "narrator", 5, ["user"], {}, True, None])
def test_an_unknown_role_is_refused_by_its_path(role: Any) -> None:
    error = refusal(messages=[*HELLO, {"role": role, "content": "x"}])
    assert error.param == "messages[1].role"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x", "x"),
        ("", ""),
        ("a\0\u2028🙂", "a\0\u2028🙂"),
        ([], ""),
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
        ([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}], "a\nno"),
    ],
)
def test_content_is_a_string_or_its_parts_joined(content: Any, expected: str) -> None:
    assert message(role="user", content=content).content == expected


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (5, "content"),
        (True, "content"),
        ({"type": "text", "text": "x"}, "content"),
        (["x"], "content[0]"),
        ([{"type": "text", "text": "x"}, None], "content[1]"),
        ([{"type": "text"}], "content[0].text"),
        ([{"type": "text", "text": 5}], "content[0].text"),
        ([{"type": "refusal", "text": "x"}], "content[0].refusal"),
        ([{"text": "x"}], "content[0].type"),
        ([{"type": 5, "text": "x"}], "content[0].type"),
        ([{"type": "image_url"}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": 5}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": {}}], "content[0].image_url.url"),
        ([{"type": "image_url", "image_url": {"url": 5}}], "content[0].image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": "file:///etc/passwd"}], "content[0].image_url"),
        (
            [{"type": "image_url", "image_url": {"url": CAT, "detail": "most"}}],
            "content[0].image_url.detail",
        ),
        ([{"type": "input_image"}], "content[0].image_url"),
        ([{"type": "input_image", "image_url": {"url": CAT}}], "content[0].image_url"),
        ([{"type": "input_image", "image_url": CAT, "detail": 5}], "content[0].detail"),
        ([{"type": "input_image", "file_id": "file-1"}], "content[0].file_id"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], "content[0].type"),
        ([{"type": "file", "file": {"file_id": "x"}}], "content[0].type"),
        ([{"type": "text", "text": "x"}, {"type": "input_audio"}], "content[1].type"),
    ],
)
def test_content_of_another_kind_is_refused_by_its_path(content: Any, path: str) -> None:
    error = refusal(messages=[*HELLO, {"role": "user", "content": content}])
    assert error.param == f"messages[1].{path}"


PICTURE = {"type": "image_url", "image_url": {"url": CAT}}
OTHER = {"type": "image_url", "image_url": DOG}


def test_text_and_pictures_keep_their_order() -> None:
    content = [said("a"), said("b"), PICTURE, OTHER, said("c"), PICTURE]
    found = message(role="user", content=content, name="Bo")
    place = "messages[0].content[{}].image_url".format
    cat, other = (Source(b"cat", None, place(i)) for i in (2, 5))
    dog = Source(None, DOG, place(3))
    parts = ("a\nb", cat, dog, "c", other)
    assert found == Message(Role.USER, "a\nb\nc", name="Bo", parts=parts)
    assert found.sources == (cat, dog, other)
    assert found.as_template() == {
        "role": "user",
        "name": "Bo",
        "content": [
            {"type": "text", "text": "a\nb"},
            *({"type": "image"}, {"type": "image"}),
            {"type": "text", "text": "c"},
            {"type": "image"},
        ],
    }


@pytest.mark.parametrize(
    ("part", "detail"),
    [
        (PICTURE, "auto"),
        ({"type": "image_url", "image_url": CAT}, "auto"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": None}}, "auto"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": "low"}}, "low"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": "high"}}, "high"),
        ({"type": "input_image", "image_url": CAT, "file_id": None}, "auto"),
        ({"type": "input_image", "image_url": CAT, "detail": "low"}, "low"),
    ],
)
def test_a_picture_has_several_forms(part: Any, detail: str) -> None:
    (source,) = message(role="user", content=[part]).sources
    assert source == Source(b"cat", None, "messages[0].content[0].image_url", detail)


def test_a_message_without_pictures_is_its_text() -> None:
    found = message(role="user", content=[said("a"), said("b")])
    assert (found.parts, found.sources) == ((), ())
    assert found.as_template() == {"role": "user", "content": "a\nb"}


def test_a_picture_alone_is_a_message() -> None:
    found = message(role="user", content=[PICTURE])
    assert found.content == ""
    assert found.as_template()["content"] == [{"type": "image"}]


@pytest.mark.parametrize("role", [role.value for role in Role])
@pytest.mark.parametrize("part", [PICTURE, {"type": "input_image", "image_url": CAT}])
def test_only_users_and_tools_show_pictures(role: str, part: Any) -> None:
    body = [*HELLO, {"role": role, "content": [said("a"), part]}]
    if role in ("user", "tool", "function"):
        assert len(parse(messages=body).messages[1].sources) == 1
    else:
        error = refusal(messages=body)
        assert (error.param, error.code) == (
            "messages[1].content[1].type",
            "unsupported_parameter",
        )


def test_pictures_are_listed_in_the_order_of_their_messages() -> None:
    show = [{"role": "user", "content": [PICTURE, OTHER]}, *BEGUN]
    result = {"role": "tool", "content": [said("x"), PICTURE], "tool_call_id": "1"}
    places = [source.param for source in parse(messages=[*show, result]).sources]
    assert places == [
        "messages[0].content[0].image_url",
        "messages[0].content[1].image_url",
        "messages[3].content[1].image_url",
    ]
    assert parse().sources == ()


@pytest.mark.parametrize("num_messages", [1, 2, 65])
def test_a_request_has_at_most_64_pictures(num_messages: int) -> None:
    def show(num_pictures: int) -> list[dict[str, Any]]:
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": [said("x")]} for _ in range(num_messages)
        ]
        for i in range(num_pictures):
            turns[i % num_messages]["content"].append(PICTURE)
        return turns

    assert len(parse(messages=show(64)).sources) == 64
    assert "at most 64" in refusal(messages=show(65)).message


def test_the_size_of_a_message_includes_its_pictures() -> None:
    plain = Message(Role.USER, "ab")
    shown = replace(plain, parts=("ab", Source(b"12345", None, "p"), Source(None, "http", "p")))
    assert (plain.num_bytes, shown.num_bytes) == (2, 2 + 2 + 5 + 1 + 4 + 1)


@given(JUNK, JUNK, st.sampled_from(["image_url", "input_image", "text", "image", "file"]))
def test_junk_in_a_part_is_read_or_refused(one: Any, other: Any, kind: str) -> None:
    parts = [
        {"type": kind, kind: one, "image_url": one, "detail": other, "file_id": None},
        {"type": kind, kind: {"url": one, "detail": other}},
        {"type": "image_url", "image_url": {"url": one, "detail": other}},
        {"type": other, "image_url": one},
        one,
    ]
    for part in parts:
        with suppress(APIError):
            request = parse(messages=[{"role": "user", "content": [part]}])
            assert len(request.sources) <= 1


@pytest.mark.parametrize("role", [role.value for role in Role if role is not Role.ASSISTANT])
def test_only_an_assistant_message_may_have_no_content(role: str) -> None:
    assert refusal(messages=[{"role": role}]).param == "messages[0].content"
    assert refusal(messages=[{"role": role, "content": None}]).param == "messages[0].content"
    assert message(role="assistant").content is None
    assert message(role="assistant", content=None).as_template()["content"] == ""


@pytest.mark.parametrize("item", ["x", 5, [], True, None])
def test_a_message_is_an_object(item: Any) -> None:
    assert refusal(messages=[*HELLO, item]).param == "messages[1]"


def test_a_message_keeps_its_name_and_its_reasoning() -> None:
    said = message(role="assistant", content="x", name="Bo", reasoning_content="because")
    assert said == Message(Role.ASSISTANT, "x", name="Bo", reasoning="because")
    assert said.as_template()["reasoning_content"] == "because"
    assert said.as_template()["name"] == "Bo"
    assert message(role="assistant", content="x", reasoning="because").reasoning == "because"


@pytest.mark.parametrize("name", ["name", "reasoning_content", "reasoning", "tool_call_id"])
def test_a_messages_texts_are_strings_or_null(name: str) -> None:
    error = refusal(messages=[{"role": "assistant", "content": "x", name: 5}])
    assert error.param == f"messages[0].{name}"
    assert message(role="assistant", content="x", **{name: None}) == Message(Role.ASSISTANT, "x")


def _call(arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **fields}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ({"a": [1]}, {"a": [1]}),
        ("", {}),
        ("{}", {}),
        ('{"a": ', '{"a": '),
        ("not JSON", "not JSON"),
    ],
)
def test_tool_history_reaches_the_template(arguments: Any, expected: Any) -> None:
    request = parse(
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [_call(arguments)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]
    )
    _, asked, answered = request.messages
    assert asked == Message(Role.ASSISTANT, None, tool_calls=(ToolCall("call_1", "f", expected),))
    function = {"name": "f", "arguments": expected}
    assert asked.as_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    assert answered.as_template() == {"role": "tool", "content": "42", "tool_call_id": "call_1"}


@pytest.mark.parametrize("arguments", ["5", '"text"', "[1]", "null", "true"])
def test_arguments_that_are_json_but_no_object_stay_text(arguments: str) -> None:
    """Templates iterate over the object, or print the text; a bare number is neither."""
    said = message(role="assistant", tool_calls=[_call(arguments)])
    assert said.tool_calls[0].arguments == arguments


@pytest.mark.parametrize(
    ("calls", "path"),
    [
        ("x", ""),
        ({}, ""),
        ([5], "[0]"),
        ([_call(), []], "[1]"),
        ([{"id": "a"}], "[0].function"),
        ([_call(function="f")], "[0].function"),
        ([_call(function={})], "[0].function.name"),
        ([_call(function={"name": 5})], "[0].function.name"),
        ([_call(id=5)], "[0].id"),
    ],
)
def test_a_broken_tool_call_is_refused_by_its_path(calls: Any, path: str) -> None:
    error = refusal(messages=[{"role": "assistant", "tool_calls": calls}])
    assert error.param == f"messages[0].tool_calls{path}"


def test_only_an_assistant_calls_tools() -> None:
    error = refusal(messages=[{"role": "user", "content": "x", "tool_calls": [_call()]}])
    assert error.param is not None
    assert error.param.startswith("messages[0]")


@pytest.mark.parametrize(
    ("last", "is_continuation"),
    [
        ({"role": "assistant", "content": "Once upon"}, True),
        ({"role": "assistant", "tool_calls": [_call()]}, False),
        ({"role": "user", "content": "x"}, False),
        ({"role": "tool", "content": "x"}, False),
    ],
)
def test_a_trailing_assistant_message_is_continued(last: Any, is_continuation: bool) -> None:
    assert parse(messages=[*HELLO, last]).is_continuation is is_continuation


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [None]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": None}]}]},
        {"stop": [None]},
    ],
)
def test_a_null_in_the_wrong_place_is_called_null(fields: dict[str, Any]) -> None:
    assert refusal(**fields).message.endswith("not null.")


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
    said = _chat()[:-2] + b',{"role":"assistant","tool_calls":[%b]}]}' % call
    assert isinstance(parse_chat(said).messages[1].tool_calls[0].arguments, str)
    few = said.replace(rb"0\u002c" * MAX_VALUES, rb"0\u002c" * 3)
    assert parse_chat(few).messages[1].tool_calls[0].arguments == {"a": [0, 0, 0, 0]}


def test_a_text_may_be_as_long_as_a_body() -> None:
    said = "a word, and then " * (MAX_VALUES - 100)
    assert parse_chat(_chat(json.dumps(said).encode())).messages[0].content == said


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
        min_tokens=3,
        top_logprobs=4,
    )
    assert request.sampling_params(SamplingParams(), seed=5) == params
    names = {item.name for item in fields(SamplingParams)}
    default = SamplingParams()
    same = [name for name in names if getattr(params, name) == getattr(default, name)]
    assert not same, "a setting that this test has not changed"


def test_a_negative_seed_is_taken_modulo_two_to_the_64() -> None:
    assert parse(seed=-2).sampling_params(SamplingParams(), seed=5).seed == 2**64 - 2
    assert parse(seed=-1).sampling_params(SamplingParams(), seed=5).seed == 5


# --- cancel -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "id"),
    [
        (b"", None),
        (b" ", None),
        (b"{}", None),
        (b'{"id": null}', None),
        (b'{"id": "chatcmpl-1"}', "chatcmpl-1"),
        (b'{"other": 1}', None),
    ],
)
def test_a_cancel_names_one_answer_or_means_all(body: bytes, id: str | None) -> None:
    assert parse_cancel(body) == CancelRequest(id)


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b'"x"', b'{"id": 5}', b'{"id": []}'])
def test_a_broken_cancel_is_a_400(body: bytes) -> None:
    with pytest.raises(APIError) as caught:
        parse_cancel(body)
    assert caught.value.status == 400
