"""How each format writes calls: what a grammar lets through is read as a call that matches.

Random walks through the grammar of each of mlx-lm's formats, with a tokenizer that has the marks as
tokens and with one that has none, are read by the format's own parser.
"""

import importlib
import json
import random
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jsonschema
import pytest
from checkpoints import save_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from mlxlite.models.tokenizer import Tokenizer
from mlxlite.models.tool_probe import CallParser
from mlxlite.output.call_syntax import CallSyntax, syntax_of
from mlxlite.output.constraint import (
    CallConstraint,
    ToolSchema,
)
from mlxlite.output.events import TextDelta, ToolCallEnd, ToolCallStart
from mlxlite.output.grammar import Grammars
from mlxlite.output.markers import MarkerFormat
from mlxlite.output.parser import ParserOptions

pytest.importorskip("llguidance", reason="structured output is the extra `grammar`")

NAMES = (
    *("function_gemma", "gemma4", "glm47", "json_tools", "kimi_k2", "kimi_k3", "laguna", "longcat"),
    *("minicpm5", "minimax_m2", "mistral", "muse_spark", "pythonic", "qwen3_coder"),
)
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
            chosen = ends if dice.random() < 0.4 else pieces
            dice.shuffle(chosen)
            fits = (piece for piece in chosen if matcher.validate_tokens(piece) == len(piece))
            tokens = next(fits, [])
        if not tokens:
            mask = matcher.compute_logit_bias()
            tokens = [dice.choice([id for id, bit in enumerate(mask) if bit])]
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
    ends = tuple(filter(None, (getattr(written.call, "after_value", ""), *marks)))
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
