"""How each format writes calls: what a grammar lets through is read as a call that matches.

Random walks through the grammar of each of mlx-lm's formats, with a tokenizer that has the marks as
tokens and with one that has none, are read by the format's own parser.
"""

import importlib
import json
import pkgutil
import random
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jsonschema
import mlx_lm.tool_parsers
import pytest
from checkpoints import save_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlxlite.models.tokenizer import Tokenizer
from mlxlite.models.tool_probe import CallParser
from mlxlite.output.call_forms import CallForm
from mlxlite.output.call_syntax import HARMONY, CallSyntax, mistral, syntax_of
from mlxlite.output.constraint import (
    CallConstraint,
    ConstraintError,
    Kind,
    TextConstraint,
    ToolSchema,
)
from mlxlite.output.events import TextDelta, ToolCallEnd, ToolCallStart
from mlxlite.output.grammar import Grammars
from mlxlite.output.harmony import MARKS, HarmonyFormat
from mlxlite.output.markers import MarkerFormat
from mlxlite.output.parser import ParserOptions

pytest.importorskip("llguidance", reason="structured output is the extra `grammar`")

NAMES = (
    *("function_gemma", "gemma4", "glm47", "json_tools", "kimi_k2", "kimi_k3", "laguna", "longcat"),
    *("minicpm5", "minimax_m2", "mistral", "muse_spark", "pythonic", "qwen3_coder"),
)


def test_every_parser_of_mlx_lm_has_a_syntax() -> None:
    modules = [module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)]
    assert sorted(modules) == sorted(NAMES)
    assert all(syntax(name) for name in NAMES)


FLAT: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: dict[str, dict[str, Any]] = {
    "flat": FLAT,
    "empty": {"type": "object", "properties": {}, "additionalProperties": False},
    "open": {"type": "object"},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "string"}, "b": {"type": "number"}},
    },
    "bounded": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[a-c]{2,3}$"},
            "name": {"type": "string", "minLength": 2, "maxLength": 4},
            "word": {"const": "yes"},
        },
        "required": ["code", "name", "word"],
    },
}
NESTED: dict[str, dict[str, Any]] = {
    "nested": {
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
            "place": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "name": {"type": "string"}},
                "required": ["lat"],
                "additionalProperties": False,
            },
        },
        "required": ["tags", "place"],
    },
    "referred": {
        "type": "object",
        "properties": {"node": {"$ref": "#/$defs/node"}},
        "required": ["node"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "either": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
            "b": {"type": ["string", "null"]},
        },
        "required": ["a", "b"],
    },
}
SNIPPETS = (
    *("a", "b", "c", "ab", "abc", "yes", "x y", "3", "12", "-1.5", "0", "null", "true", "false"),
    *('"', "{", "}", "[", "]", ",", ":", " ", "\n", "é", "</", "<", "`", "\\n", '\\"', "Null"),
    *("value", "next", "lat", "name", "_k", "=", "'", "celsius", "NaN", '{"a":1}', "\\"),
)


def syntax(name: str) -> CallSyntax:
    found = syntax_of(name, "[ARGS]")
    assert found is not None
    return found


@cache
def tokenizer(marks: tuple[str, ...]) -> PreTrainedTokenizerFast:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        made = PreTrainedTokenizerFast.from_pretrained(folder)
    made.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return made


def grammars_of(syntax: CallSyntax, marks: tuple[str, ...] = ()) -> Grammars:
    own = tokenizer(marks)
    ends = frozenset({own.convert_tokens_to_ids("<|im_end|>")})
    return Grammars(own, num_vocab=len(own), eos_tokens=ends, syntax=syntax)


def marks_of(syntax: CallSyntax) -> tuple[str, ...]:
    return tuple(mark for mark in (syntax.begin, syntax.end, *syntax.inner) if mark)


def ends_of(syntax: CallSyntax) -> tuple[str, ...]:
    return (getattr(syntax.call, "after_value", "") or '"', *marks_of(syntax))


def walk(
    grammars: Grammars, constraint: CallConstraint, seed: int, more: tuple[str, ...] = ()
) -> str | None:
    """A random text of the grammar; None for one that does not end."""
    dice = random.Random(seed)
    matcher = grammars.compile(constraint, is_thinking=False).compiled.deep_copy()
    own = grammars._tokenizer
    pieces, ends = (
        [own.encode(text, add_special_tokens=False) for text in texts]
        for texts in (SNIPPETS, (*more, '"', "}", "]", ")"))
    )
    written: list[int] = []
    while len(written) < 500:
        if matcher.is_stopped() or (matcher.is_accepting() and dice.random() < 0.5):
            return str(own.decode(written, skip_special_tokens=False))
        forced = matcher.compute_ff_tokens()
        tokens = list(forced)
        if not tokens:
            chosen = ends if dice.random() < 0.6 else pieces
            dice.shuffle(chosen)
            fits = (piece for piece in chosen if matcher.validate_tokens(piece) == len(piece))
            tokens = next(fits, [])
        if not tokens:
            mask = matcher.compute_logit_bias()
            allowed = [id for id, bit in enumerate(mask) if bit and id != own.eos_token_id]
            if not allowed:
                return str(own.decode(written, skip_special_tokens=False))
            tokens = [dice.choice(allowed)]
        if not matcher.consume_tokens(tokens):
            raise AssertionError(matcher.get_error())
        written += tokens
    return None


def read(name: str, syntax: CallSyntax, tools: Mapping[str, Any], text: str) -> list[Any]:
    """The calls in a text, as mlx-lm's parser and the marker parser read them, else the text."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")

    class Stand:
        call_parser = CallParser(module.parse_tool_call, "", "")

    listed = [
        {"type": "function", "function": {"name": tool, "parameters": schema}}
        for tool, schema in tools.items()
    ]
    markers = MarkerFormat(call_start=module.tool_call_start, call_end=module.tool_call_end)
    parse = partial(Tokenizer.parse_calls, Stand(), tools=listed)  # type: ignore[arg-type]
    parser = markers.parser(ParserOptions(schemas=tools, parse_calls=parse))
    return calls_in(parser.push(text) + parser.flush())


def has_hidden_mark(text: str) -> bool:
    """Whether a JSON string holds a mark, or a part of one, which ends a call for the parsers."""
    strings = re.findall(r'"(?:[^"\\]|\\.)*"', text)
    return any(part in string for string in strings for part in ("<", "[TOOL", "}"))


def calls_in(events: list[Any]) -> list[Any]:
    found: list[Any] = []
    for event in events:
        match event:
            case ToolCallStart():
                found.append(event.name)
            case ToolCallEnd(arguments):
                found[-1] = (found[-1], json.loads(arguments))
            case TextDelta(text):
                found.append(text)
    return found


def constraint(tools: Mapping[str, Any], **changes: Any) -> CallConstraint:
    schemas = tuple(ToolSchema(name, json.dumps(schema)) for name, schema in tools.items())
    return CallConstraint(schemas, **changes)


def tools_of(name: str) -> dict[str, dict[str, Any]]:
    return TOOLS if name == "function_gemma" else TOOLS | NESTED


@pytest.mark.parametrize("are_tokens", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_formats_grammar_lets_through_is_read_as_a_call_that_matches(
    name: str, are_tokens: bool
):
    written = syntax(name)
    marks = marks_of(written)
    grammars = grammars_of(written, marks if are_tokens else ())
    ends = ends_of(written)
    for tool, schema in tools_of(name).items():
        done = 0
        for seed in range(25):
            text = walk(grammars, constraint({tool: schema}, is_single=True), seed, ends)
            if (
                text is None
                or ("gemma" not in name and has_hidden_mark(text))
                or re.search(r"\d[eE][+-]?\d{2}", text)
            ):
                continue
            done += 1
            found = read(name, written, {tool: schema}, text)
            assert len(found) == 1, (text, found)
            assert isinstance(found[0], tuple), text
            assert found[0][0] == tool
            try:
                jsonschema.validate(found[0][1], schema)
            except jsonschema.ValidationError as error:
                raise AssertionError(f"{text!r} is {found[0][1]}: {error.message}") from None
        assert done, tool


# --- groups, and what a format cannot write -------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_several_calls_are_read_as_several(name: str):
    """As the parser reads them: function_gemma's and longcat's read one call between two marks."""
    written, tools = syntax(name), {"flat": FLAT, "empty": TOOLS["empty"]}
    grammars, seen = grammars_of(written, marks_of(written)), set()
    for seed in range(30):
        text = walk(grammars, constraint(tools), seed, ends_of(written))
        if text is None or ("gemma" not in name and has_hidden_mark(text)):
            continue
        found = read(name, written, tools, text)
        assert all(isinstance(call, tuple) for call in found), (text, found)
        for tool, arguments in found:
            jsonschema.validate(arguments, tools[tool])
        assert len(found) == text.count("flat") + text.count("empty"), text
        seen.add(len(found))
    assert max(seen, default=0) > 1, "some walk has several"


@pytest.mark.parametrize("name", NAMES)
def test_text_may_come_before_calls_that_are_not_forced_and_no_half_mark_is_a_call(name: str):
    written = syntax(name)
    for marks in ((), marks_of(written)):
        grammars = grammars_of(written, marks)
        matcher = grammars.compile(constraint(TOOLS, is_forced=False), is_thinking=False).compiled
        own = grammars._tokenizer
        for text, is_whole in (
            ("", True),
            ("Hello, <b>you</b>. [1]", True),
            (f"{written.begin[:3]} x", True),
            (f"Hello. {written.begin}", False),
            (f"Hello. {written.begin}nonsense", False),
        ):
            tokens = own.encode(text, add_special_tokens=False)
            state = matcher.deep_copy()
            is_taken = state.try_consume_tokens(tokens) == len(tokens)
            assert (is_taken and state.is_accepting()) is is_whole, text


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_calls_of_the_format_or_a_text_that_matches(name: str):
    written = syntax(name)
    answer = TextConstraint(Kind.JSON, '{"type": "integer"}')
    grammars = grammars_of(written, marks_of(written))
    either = constraint({"flat": FLAT}, is_forced=False, answer=answer)
    kinds = set()
    for seed in range(40):
        text = walk(grammars, either, seed, ends_of(written))
        if text is not None:
            is_call = written.begin in text
            kinds.add(is_call)
            assert is_call or isinstance(json.loads(text), int), text
    assert kinds == {True, False}


UNWRITABLE: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "function_gemma": [
        ("a-b", {}),
        ("f", {"properties": {"x": {"type": "array"}}, "required": ["x"]}),
        ("f", {"properties": {"x-y": {}}, "required": ["x-y"]}),
    ],
    "gemma4": [("a.b", {}), ("a:b", {}), ("f", {"properties": {"a b": {}}, "required": ["a b"]})],
    "pythonic": [
        ("a-b", {}),
        ("f", {"properties": {"class": {}}, "required": ["class"]}),
        ("f", {"properties": {"a.b": {}}, "required": ["a.b"]}),
    ],
    "mistral": [("a.b", {}), ("a:b", {}), ("a.b.c", {})],
    "qwen3_coder": [
        ("f", {"properties": {"a>b": {}}, "required": ["a>b"]}),
        ("f", {"properties": {"a b": {}}, "required": ["a b"]}),
        ("f", {"properties": {"x": {"enum": ["</parameter>"]}}, "required": ["x"]}),
    ],
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_tool_that_a_format_cannot_write_is_named_and_the_others_are_called(name: str):
    grammars = grammars_of(syntax(name))
    for tool, schema in UNWRITABLE[name]:
        schema = {"type": "object", **schema}
        with pytest.raises(ConstraintError, match=re.escape(repr(tool))):
            grammars.compile(constraint({tool: schema}), is_thinking=False)
        both = constraint({tool: schema, "flat": FLAT}, is_forced=False)
        with pytest.raises(ConstraintError, match=re.escape(repr(tool))):
            grammars.compile(both, is_thinking=False)
        found = grammars.compile(constraint({tool: schema, "flat": FLAT}), is_thinking=False)
        assert f":no call of {tool}" in found.left_out
        optional = {**schema, "required": []}
        if schema.get("required"):
            assert grammars.compile(constraint({tool: optional}), is_thinking=False)


def test_what_a_text_cannot_be_held_to_is_left_out_and_named():
    schema = {
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^a|b$"},
            "tags": {"type": "array", "uniqueItems": True},
        },
    }
    for name in ("qwen3_coder", "glm47", "minimax_m2"):
        tool = ToolSchema("f", json.dumps(schema), "tools[0].parameters")
        found = grammars_of(syntax(name)).compile(CallConstraint((tool,)), is_thinking=False)
        paths = {f"tools[0].parameters:{word}" for word in ("format", "pattern", "uniqueItems")}
        assert set(found.left_out) == paths


# --- formats that are not mlx-lm's ----------------------------------------------------------------

FORMS: dict[str, CallForm] = {
    "arguments": CallForm(),
    "parameters": CallForm("parameters"),
    "an array": CallForm(is_array=True),
    "a fence": CallForm("arguments", "```json\n", "\n```"),
    "python": CallForm(is_python=True),
    "tags": CallForm("arguments", "<call>\n", "\n</call>"),
    "tags around an array": CallForm("parameters", "<|tool|>", "<|/tool|>", is_array=True),
    "tags around python": CallForm("arguments", "<|py|>", "<|/py|>", is_python=True),
}


@pytest.mark.parametrize("is_single", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_forced_calls_of_a_templates_own_form_are_read_as_calls_that_match(
    name: str, is_single: bool
):
    written, done = FORMS[name].format(MarkerFormat()), 0
    assert written.syntax is not None
    grammars = grammars_of(written.syntax)
    tools = TOOLS | {"nested": NESTED["nested"], "referred": NESTED["referred"]}
    for seed in range(40):
        wanted = constraint(tools, is_single=is_single)
        text = walk(grammars, wanted, seed, tuple(filter(None, marks_of(written.syntax))))
        if text is None or re.search(r"\d[eE][+-]?\d{2}", text):
            continue
        if "tags" in name and has_hidden_mark(text):
            continue
        done += 1
        parser = written.parser(ParserOptions(schemas=tools))
        found = calls_in(parser.push(text) + parser.flush())
        assert all(isinstance(call, tuple) for call in found), (text, found)
        assert len(found) == 1 or not is_single
        for tool, arguments in found:
            jsonschema.validate(arguments, tools[tool])
    assert done


def test_calls_in_a_text_without_marks_cannot_be_strict_but_an_answer_may_match():
    syntax = CallForm("parameters").syntax()
    grammars = grammars_of(syntax)
    with pytest.raises(ConstraintError, match="strict"):
        grammars.compile(constraint({"flat": FLAT}, is_forced=False), is_thinking=False)
    answer = TextConstraint(Kind.CHOICE, '["yes", "no"]')
    either = constraint({"flat": FLAT}, is_forced=False, answer=answer)
    texts = {walk(grammars, either, seed) for seed in range(30)} - {None}
    assert {"yes", "no"} < texts
    assert any('"flat"' in str(text) for text in texts)


HARMONY_MARKS = tuple(sorted(MARKS))


@pytest.mark.parametrize("is_forced", [True, False])
def test_harmonys_calls_are_enforced_after_any_analysis(is_forced: bool):
    grammars, kinds = grammars_of(HARMONY, HARMONY_MARKS), set()
    tools = {"flat": FLAT, "empty": TOOLS["empty"]}
    for seed in range(60):
        wanted = constraint(tools, is_forced=is_forced)
        text = walk(grammars, wanted, seed, ("<|end|>", "<|start|>"))
        if text is None:
            continue
        parser = HarmonyFormat().parser(ParserOptions(schemas=tools))
        found = calls_in(parser.push(text) + parser.flush())
        called = [call for call in found if isinstance(call, tuple)]
        kinds.add((bool(called), "analysis" in text))
        assert len(called) <= 1
        assert called or (not is_forced and "<|channel|>final<|message|>" in text), text
        for tool, arguments in called:
            jsonschema.validate(arguments, tools[tool])
    assert {(True, False), (True, True)} <= kinds
    assert is_forced or (False, False) in kinds


@pytest.mark.parametrize("is_single", [True, False])
def test_mistrals_older_form_is_an_array(is_single: bool):
    written, tools = mistral(has_headers=False), {"flat": FLAT, "empty": TOOLS["empty"]}
    grammars, done = grammars_of(written, ("[TOOL_CALLS]",)), 0
    for seed in range(40):
        text = walk(grammars, constraint(tools, is_single=is_single), seed)
        if text is not None and not has_hidden_mark(text):
            found = read("mistral", written, tools, text)
            assert found
            assert all(isinstance(call, tuple) for call in found), (text, found)
            done += 1
    assert done
