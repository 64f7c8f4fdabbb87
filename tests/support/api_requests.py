"""Requests for tests of the API: a case for each field of a chat, parses and refusals.

The cases are keyed by field; a field of `FIELDS` that has none fails in `test_chat_completions`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from mlxlite.api.conversation import Message, Role
from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.fields import MAX_TOKEN_MAP
from mlxlite.api.request import ChatRequest
from mlxlite.api.shared_fields import (
    EFFORTS,
    MAX_BAD_WORDS,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
)
from mlxlite.api.tools import MAX_TOOLS, Tool
from mlxlite.api.writers import StreamOptions
from mlxlite.engine.sampling_params import MAX_CONTEXT_SIZE
from mlxlite.http.errors import APIError
from mlxlite.output.constraint import CallConstraint, Constraint, Kind, TextConstraint, ToolSchema

HELLO = [{"role": "user", "content": "hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "Once"}]
SILENT = ChatRequest(messages=(Message(Role.USER, "hello"),))


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def refused(parser: Callable[[bytes], Any], raw: bytes) -> APIError:
    with pytest.raises(APIError) as caught:
        parser(raw)
    assert caught.value.status == 400
    return caught.value


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


_TOKENS_RIGHT = [(1, 1), (4096, 4096), (20.0, 20), (-1, None), (2**31 - 1, 2**31 - 1)]
_TOKENS_WRONG = [-2, 1.5, "5", True, [5], {}, 2**31, 2**70, 1e300]
_TEXT_WRONG: list[Any] = [5, 1.5, True, ["a"], {}]
_FLAG_WRONG: list[Any] = [0, 1, "true", "", [], {}]
_WORDS = [f"w{n}" for n in range(MAX_BAD_WORDS)]
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


@dataclass(frozen=True)
class LeftOut(Refused):
    """A hint: a value that asks for something is left out by name."""


def _tokens(*wrong: int) -> Works:
    return Works("max_tokens", _TOKENS_RIGHT, [*wrong, *_TOKENS_WRONG])


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


def _numbers(attribute: str, low: float, high: float) -> Works:
    right = [(low, float(low)), (0.5, 0.5), (high, float(high))]
    return Works(attribute, right, [low - 0.1, high + 0.1, "0", False, [], {}])


def _flag(attribute: str) -> Works:
    return Works(attribute, [(True, True), (False, False)], _FLAG_WRONG)


def _off_number(neutral: float, *asking: Any) -> Refused:
    return Refused([neutral, float(neutral)], [*asking, "x", [1], {"a": 1}])


def _off_flag() -> Refused:
    return Refused([False], [True, 0, 1, "false", [], {}])


def _effort(effort: str) -> dict[str, Any]:
    return {"enable_thinking": effort != "none", "reasoning_effort": effort}


def _off_at_all() -> Refused:
    return Refused([], [{}, [], "x", 0, False, True, {"a": 1}])


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
TOOL_F, TOOL_G = Tool("f", "", NO_PARAMETERS), Tool("g", "", NO_PARAMETERS)
_AB = TextConstraint(Kind.CHOICE, '["a","b"]')
GBNF = 'root ::= "a" | "b"'
_GRAMMAR = TextConstraint(Kind.GRAMMAR, GBNF)


def function_tool(name: str, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **function}}


def _json(schema: dict[str, Any]) -> Constraint:
    return TextConstraint(Kind.JSON, json.dumps(schema, separators=(",", ":")))


def _constrained(field: str, value: Any, found: Constraint) -> list[tuple[Any, Any]]:
    """A value, and whether the field constrains the answer to match it."""
    return [(value, (found, field))]


def _schema(name: str) -> Works:
    right = [
        *_constrained(name, SCHEMA, _json(SCHEMA)),
        *_constrained(name, {}, _json({})),
        *_constrained(name, json.dumps(SCHEMA), _json(SCHEMA)),
    ]
    return Works("constraint", right, ["", "no JSON", "[]", "5", [], 5, True])


def _grammar(name: str) -> Works:
    right = _constrained(name, GBNF, _GRAMMAR)
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
    **dict.fromkeys(
        (
            *("max_completion_tokens", "max_output_tokens"),
            *("n_predict", "num_predict", "max_new_tokens"),
        ),
        _tokens(0),
    ),
    "prompt_logprobs": Works(
        "prompt_logprobs", [(0, 0), (5, 5), (20.0, 20)], [-1, 21, 1.5, "5", True, [], {}]
    ),
    "temperature": Works(
        "temperature",
        [(0, 0.0), (0.7, 0.7), (1, 1.0), (2.0, 2.0), (100, 100.0)],
        [-0.1, 100.1, 1e300, 2**70, "1", True, [1], {}],
    ),
    "top_p": Works(
        "top_p", [(1, 1.0), (0.8, 0.8), (1e-9, 1e-9), (0, 0.0)], [-0.5, 1.1, "1", True, [], {}]
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
        [0, True, ["low"], {}],
    ),
    "enable_thinking": Works(
        "template_kwargs",
        [(True, {"enable_thinking": True}), (False, {"enable_thinking": False})],
        _FLAG_WRONG,
    ),
    "thinking": Works(
        "template_kwargs",
        [
            ({"type": "enabled"}, {"enable_thinking": True}),
            ({"type": "disabled"}, {"enable_thinking": False}),
            (True, {"enable_thinking": True}),
        ],
        [0, "on"],
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
    "n": Works("num_choices", [(1, 1), (2, 2), (16.0, 16)], [0, -1, 129, 1.5, "2", True, [], {}]),
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
    "logprobs": Works(
        "top_logprobs",
        [(True, 0), (False, None), (0, 0), (3, 3), (20.0, 20)],
        [-1, 21, 1.5, "true", "", [], {}],
    ),
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
            ({"type": "json_object", "schema": SCHEMA}, (_json(SCHEMA), "response_format")),
            (
                {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
                (_json(SCHEMA), "response_format"),
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
            *_constrained("structured_outputs", {"json": SCHEMA}, _json(SCHEMA)),
            *_constrained("structured_outputs", {"json": json.dumps(SCHEMA)}, _json(SCHEMA)),
            *_constrained("structured_outputs", {"regex": "a+"}, TextConstraint(Kind.REGEX, "a+")),
            *_constrained("structured_outputs", {"choice": ["a", "b"]}, _AB),
            *_constrained("structured_outputs", {"grammar": GBNF}, _GRAMMAR),
        ],
        ["json", [], 5, True, {"json": SCHEMA, "regex": "a"}],
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
            ([function_tool("f")], (Tool("f", "", NO_PARAMETERS),)),
            ([{"function": {"name": "f"}}], (Tool("f", "", NO_PARAMETERS),)),
            (
                [
                    function_tool("f", description="d", parameters=SCHEMA),
                    function_tool("g", strict=False),
                ],
                (Tool("f", "d", SCHEMA), Tool("g", "", NO_PARAMETERS)),
            ),
            ([function_tool("f", description=None, parameters=None, strict=None)], (TOOL_F,)),
            ([function_tool("f", parameters={"properties": {}})], (TOOL_F,)),
            (
                [function_tool(f"f{n}") for n in range(MAX_TOOLS)],
                tuple(Tool(f"f{n}", "", NO_PARAMETERS) for n in range(MAX_TOOLS)),
            ),
            (
                [function_tool("a-b_C.9:d" + "x" * 119)],
                (Tool("a-b_C.9:d" + "x" * 119, "", NO_PARAMETERS),),
            ),
        ],
        [
            *({}, "x", 5, True, False, 0),
            [function_tool("f"), function_tool("f")],
            [function_tool(f"f{n}") for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "tool_choice": Works(  # what it makes the answer match has a test of its own
        "tools",
        [("none", ()), ("auto", (TOOL_F, TOOL_G))],
        ["", "any", 5, True, []],
        also={"tools": [function_tool("f"), function_tool("g")]},
    ),
    "functions": Works(
        "tools",
        [
            ([], ()),
            ([{"name": "f"}], (TOOL_F,)),
            ([{"name": "f"}, {"name": "g"}], (TOOL_F, TOOL_G)),
        ],
        [
            *({}, "x", 5, True, False, 0),
            [{"name": "f"}, {"name": "f"}],
            [{"name": f"f{n}"} for n in range(MAX_TOOLS + 1)],
        ],
    ),
    "function_call": Works(
        "tools",
        [("none", ()), ("auto", (TOOL_F, TOOL_G))],
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
    "verbosity": LeftOut(["medium"], ["low", "high", "", 1]),
    "chat_template": _off_at_all(),
    **dict.fromkeys(("typical_p", "typ_p"), _share("typical_p")),
    "top_n_sigma": _numbers("top_n_sigma", -1, 100),
    "dynatemp_range": _numbers("dynatemp_range", 0, 100),
    "dynatemp_exponent": _numbers("dynatemp_exponent", 0, 100),
    "allowed_token_ids": Works(
        "allowed_token_ids",
        [([5], (5,)), ([2, 1, 2], (2, 1)), ([0, 2**31 - 1], (0, 2**31 - 1)), ([5.0], (5,))],
        [[], "5", 5, {}, True],
    ),
    "bad_words": Works(
        "bad_words",
        [(["a"], ("a",)), ([" a", "b c", " a"], (" a", "b c")), (_WORDS, tuple(_WORDS))],
        ["a", 5, {}, True, [""], [" "], ["a" * (MAX_STOP_BYTES + 1)], [*_WORDS, "x"]],
    ),
    "include_stop_str_in_output": _flag("shows_stop"),
    "return_token_ids": _flag("returns_tokens"),
    "return_tokens_as_token_ids": _flag("has_ids"),
    "skip_special_tokens": Works("shows_special", [(True, False), (False, True)], _FLAG_WRONG),
    "spaces_between_special_tokens": Accepted([True, False], _FLAG_WRONG),
    "include_reasoning": _flag("shows_reasoning"),
    "truncate_prompt_tokens": Works(
        "num_last", [(1, 1), (20.0, 20), (-1, -1)], [0, -2, 1.5, "5", True, [], {}]
    ),
    "t_max_predict_ms": Works(
        "max_predict_ms", [(1, 1), (500.0, 500), (0, None), (-1, None)], [-2, 1.5, "5", True, []]
    ),
    "n_keep": Accepted([-1, 0, 5], [-2, 0.5, "0", True, [], {}]),
    "n_probs": Works(
        "top_logprobs", [(5, 5), (20, 20), (0, None)], [-1, 21, 1.5, "5", True, [], {}]
    ),
    **dict.fromkeys(
        ("dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        Accepted([0, 1.75, -1], ["1", True, [], {}]),
    ),
    "dry_sequence_breakers": Accepted([[], ["\n"]], ["x", 5, True, {}]),
    **dict.fromkeys(("mirostat_tau", "mirostat_eta"), Accepted([0, 5.0], [-1, "1", True, [], {}])),
    "length_penalty": LeftOut([1, 1.0], [0.9, 0]),
    **dict.fromkeys(("prediction", "web_search_options", "moderation"), LeftOut([], [{}, "x"])),
    **dict.fromkeys(("mirostat", "dry_multiplier"), _off_number(0, 0.5, False)),
    **dict.fromkeys(
        ("echo", "use_beam_search", "post_sampling_probs", "return_tokens"), _off_flag()
    ),
    **dict.fromkeys(("audio", "logits_processors"), _off_at_all()),
}


def calls(*tools: tuple[str, Any], is_single: bool = False, is_auto: bool = False) -> Constraint:
    """Calls of these tools, with the schemas of their arguments."""
    listed = (ToolSchema(name, json.dumps(item, separators=(",", ":"))) for name, item in tools)
    return CallConstraint(tuple(listed), is_single, not is_auto)


def message(**fields: Any) -> Message:
    return parse(messages=[fields]).messages[0]
