"""Markers: an answer's text split into its channels, the same however it was cut.

`told` lists the outputs, with neighbours of one channel joined: the order is compared too, only the
sizes of the pieces are not. A streamed call is folded as in an answer that is not streamed;
`told_however_cut` checks that a call that is emitted whole gives the same.
"""

import importlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import mlx_lm.tool_parsers
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlite.output.events import (
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)
from mlxlite.output.markers import MarkerFormat, MarkerParser
from mlxlite.output.parser import MAX_CALL_CHARS, ParseCalls, ParserOptions
from mlxlite.output.tool_arguments import MAX_HEAD, coerced

MARKERS = MarkerFormat("<think>", "</think>", "<tool_call>", "</tool_call>")
TO_THE_END = MarkerFormat("[THINK]", "[/THINK]", "[TOOL_CALLS]", "")
SAID, THOUGHT, CALLED = "said", "thought", "called"

Told = list[tuple[str, Any]]


def parse_json(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """As mlx-lm's `json_tools` and `Model.parse_calls`."""
    call = json.loads(text.strip())
    return [(call["name"], call["arguments"])]


def parser_of(
    markers: MarkerFormat, *, parse: ParseCalls | None = None, schemas: Any = None, **kw: Any
) -> MarkerParser:
    """Without a `parse` calls are text; without `schemas` any tool may be called."""
    schemas = None if parse is None else schemas or {}
    return markers.parser(ParserOptions(parse_calls=parse, schemas=schemas, **kw))


def told(
    pieces: Iterable[str],
    markers: MarkerFormat = MARKERS,
    parse: ParseCalls | None = parse_json,
    **kw: Any,
) -> Told:
    """What came of a text in pieces."""
    parser = parser_of(markers, parse=parse, **kw)
    found: Told = []
    ids: list[str] = []
    events = [event for text in pieces for event in parser.push(text)] + parser.flush()
    for name, value in folded(events, ids):
        if name != CALLED and found and found[-1][0] == name:
            found[-1] = (name, found[-1][1] + value)
        else:
            found.append((name, value))
    assert len(set(ids)) == len(ids) == parser.num_calls
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", id) for id in ids)
    return found


def folded(events: list[ParserEvent], ids: list[str]) -> Iterator[tuple[str, Any]]:
    """The same, where a call is whole, or the text that it proved to be; adds the calls' `ids`."""
    start: ToolCallStart | None = None
    arguments = ""
    for event in events:
        match event:
            case TextDelta(text):
                assert text
                assert start is None, "a call ends before anything else is emitted"
                yield SAID, text
            case ReasoningDelta(text):
                assert text
                assert start is None
                yield THOUGHT, text
            case ToolCallStart():
                assert start is None
                start, arguments = event, ""
            case ToolCallArguments(text):
                assert start is not None
                assert text
                arguments += text
            case ToolCallEnd(canonical):
                assert start is not None
                schema = SCHEMAS.get(start.name)
                assert coerced(json.loads(arguments), schema) == json.loads(canonical)
                ids.append(start.id)
                yield CALLED, (start.name, json.loads(canonical))
                start = None
            case ToolCallInvalid(text):
                assert start is not None
                start = None
                yield SAID, text
    assert start is None, "a call ends"


def told_however_cut(
    text: str, markers: MarkerFormat = MARKERS, parse: ParseCalls | None = parse_json, **kw: Any
) -> Told:
    """The outputs for a text, compared whole, cut in two anywhere, and by the character.

    And the same where calls are streamed.
    """
    whole = told([text], markers, parse, **kw)
    ways: list[dict[str, Any]] = [{"markers": markers}]
    if markers.call_start == "<tool_call>":
        json_markers = replace(markers, has_json_calls=True)
        ways.append({"markers": json_markers, "schemas": dict.fromkeys(("f", "g", "look", "go"))})
    for way in ways:
        given = {"parse": parse, **way, **kw}
        assert told([text], **given) == whole
        assert told(text, **given) == whole, "one character at a time"
        for at in range(1, len(text)):
            assert told([text[:at], text[at:]], **given) == whole, f"cut after {text[:at]!r}"
    return whole


def call(name: str = "f", **arguments: Any) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


F = (CALLED, ("f", {}))

# --- reasoning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("Hello.", [(SAID, "Hello.")]),
        ("  Hello. \n", [(SAID, "  Hello. \n")]),
        (" \n ", [(SAID, " \n ")]),
        ("<think>hm</think>Yes", [(THOUGHT, "hm"), (SAID, "Yes")]),
        ("\n <think>\n hm \n</think>\n\n Yes \n", [(THOUGHT, "hm"), (SAID, "Yes \n")]),
        ("<think></think>Yes", [(SAID, "Yes")]),
        ("<think>\n\n</think>\n\nYes", [(SAID, "Yes")]),
        ("<think>hm", [(THOUGHT, "hm")]),
        ("<think>hm \n", [(THOUGHT, "hm")]),
        ("<think>", []),
        ("<think></think>", []),
        ("<think>hm</think>", [(THOUGHT, "hm")]),
        ("<think>hm</think>\n", [(THOUGHT, "hm")]),
        ("<think>a  b\n\nc</think>d", [(THOUGHT, "a  b\n\nc"), (SAID, "d")]),
    ],
)
def test_a_block_of_reasoning_at_the_start_is_separated(text: str, expected: Told):
    assert told_however_cut(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Say <think> to think.",
        "Say <think>hm</think> to think.",
        "a</think>b",
        "</think>",
        ". <think>x</think>",
        "< think>x</think>",
        "<Think>x</Think>",
        "<thinking>x</thinking>",
        "<thi",
        " <",
        "<<think>x",
    ],
)
def test_a_marker_in_the_middle_of_content_is_content(text: str):
    assert told_however_cut(text) == [(SAID, text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hm</think>Yes", [(THOUGHT, "hm"), (SAID, "Yes")]),
        ("\nhm\n</think>\n\nYes", [(THOUGHT, "hm"), (SAID, "Yes")]),
        ("</think>Yes", [(SAID, "Yes")]),
        ("\n</think>\n", []),
        ("never closed ", [(THOUGHT, "never closed")]),
        ("", []),
        ("half </thin", [(THOUGHT, "half </thin")]),
        ("a <think> b</think>c", [(THOUGHT, "a <think> b"), (SAID, "c")]),
        ("a</think>b</think>c", [(THOUGHT, "a"), (SAID, "b</think>c")]),
        ("a</think><think>b</think>c", [(THOUGHT, "a"), (SAID, "<think>b</think>c")]),
        ("a </th</think> b", [(THOUGHT, "a </th"), (SAID, "b")]),
    ],
)
def test_reasoning_opened_by_the_prompt_continues_to_its_end_marker(text: str, expected: Told):
    assert told_however_cut(text, starts_in_reasoning=True) == expected


@pytest.mark.parametrize("starts_in_reasoning", [False, True])
def test_reasoning_that_is_not_split_is_content_with_its_markers(starts_in_reasoning: bool):
    text = "<think>\nhm\n</think>\n\nYes"
    kw: dict[str, Any] = {"splits_reasoning": False, "starts_in_reasoning": starts_in_reasoning}
    assert told_however_cut(text, **kw) == [(SAID, text)]


def test_without_markers_everything_is_text():
    text = " <think>a</think>" + call()
    assert told_however_cut(text, MarkerFormat()) == [(SAID, text)]
    assert told_however_cut(text, MarkerFormat(), starts_in_reasoning=True) == [(SAID, text)]


def test_a_marker_that_ends_nothing_leaves_all_of_it_reasoning():
    assert told_however_cut("<think>a</think>b", MarkerFormat("<think>")) == [
        (THOUGHT, "a</think>b")
    ]


def test_is_reasoning_is_true_inside_a_reasoning_block():
    parser = parser_of(MARKERS)
    states = []
    for piece in ("<think>", "a", "</think>", "b"):
        parser.push(piece)
        states.append(parser.is_reasoning)
    assert states == [True, True, False, False]
    assert parser_of(MARKERS, starts_in_reasoning=True).is_reasoning
    assert not parser_of(MARKERS, starts_in_reasoning=True, splits_reasoning=False).is_reasoning


# --- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (call(), [F]),
        (f"\n {call()} \n", [F]),
        (f"Let me see.\n\n{call()}", [(SAID, "Let me see."), F]),
        (call() + call("g", a=[1, {"b": None}]), [F, (CALLED, ("g", {"a": [1, {"b": None}]}))]),
        (f"{call()}\n{call()}\n", [F, F]),
        (f"{call()} and \n{call()}", [F, (SAID, "and"), F]),
        (f"a {call()} b", [(SAID, "a"), F, (SAID, "b")]),
        (f"<think>hm</think>\n{call()}", [(THOUGHT, "hm"), F]),
        (f"<think>{call()}</think>x", [(THOUGHT, call()), (SAID, "x")]),
        (f"{call()}\n<think>\nhm</think> x", [F, (THOUGHT, "hm"), (SAID, "x")]),
        (f"{call()}x <think>hm</think>", [F, (SAID, "x <think>hm</think>")]),
        (
            f"<think>1</think>{call()}<think>2</think>{call()}<think>3",
            [(THOUGHT, "1"), F, (THOUGHT, "2"), F, (THOUGHT, "3")],
        ),
        (
            call(s="x < y <b> </t <tool_call>"),
            [(CALLED, ("f", {"s": "x < y <b> </t <tool_call>"}))],
        ),
        (call(s="é 世界\n🙂"), [(CALLED, ("f", {"s": "é 世界\n🙂"}))]),
        (call().removesuffix("</tool_call>"), [F]),
        (call().removesuffix("l>"), [(SAID, call().removesuffix("l>"))]),
        (f"a{call().removesuffix('</tool_call>')}", [(SAID, "a"), F]),
        ("x <tool_ca", [(SAID, "x <tool_ca")]),
        ("x \n<tool_ca", [(SAID, "x \n<tool_ca")]),
        ("x <tool_call", [(SAID, "x <tool_call")]),
        ("x <tool_called>", [(SAID, "x <tool_called>")]),
        ("<<tool_call>", [(SAID, "<<tool_call>")]),
        ("x </tool_call> y", [(SAID, "x </tool_call> y")]),
        ("x \n ", [(SAID, "x \n ")]),
    ],
)
def test_calls_are_separated_from_text(text: str, expected: Told):
    assert told_however_cut(text) == expected


@pytest.mark.parametrize(
    "body",
    [
        "no JSON",
        "",
        "{}",
        "[]",
        "null",
        '{"name": "f"}',
        '{"name": "f", "arguments": 3}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": {"a": 1}',
        "[" * 100_000,
        '{"name": "f", "arguments": {"s": "\\ud800"}}',
        call(),
    ],
    ids=lambda body: body[:40],
)
def test_a_call_that_cannot_be_read_is_text_with_its_markers_and_white_space(body: str):
    text = f"a \n<tool_call>{body}</tool_call>\n b"
    if len(text) < 1000:
        assert told_however_cut(text) == [(SAID, text)]
    assert told([text]) == [(SAID, text)]
    assert told([text, call()])[-2:] == [(SAID, text), F]


@pytest.mark.parametrize(
    "before", ["", "\n ", "a", "a \n", "<think>a</think>\n\n", call(), call() + "\n\n"]
)
def test_a_broken_call_loses_nothing_whatever_was_before_it(before: str):
    broken = "<tool_call>{</tool_call> c"
    parts = told_however_cut(before + broken)
    assert parts[-1][0] == SAID
    assert parts[-1][1].endswith(broken)


def test_without_tools_a_call_is_text():
    text = f"a \n{call()}"
    assert told_however_cut(text, parse=None) == [(SAID, text)]
    text = f"<think>x</think>{call()}"
    assert told_however_cut(text, parse=None) == [(THOUGHT, "x"), (SAID, call())]


def test_the_parser_is_complete_after_max_calls():
    text = f"a{call()}{call('g')}"
    assert told_however_cut(text, max_calls=2) == told([text])
    parser = parser_of(MARKERS, parse=parse_json, max_calls=1)
    assert not parser.is_complete
    (said,) = parser.push(text.partition("</tool_call>")[0])
    assert not parser.is_complete
    start, *_ = parser.push("</tool_call>")
    assert parser.is_complete
    assert (said, start.name) == (TextDelta("a"), "f")


def test_more_calls_than_are_wanted_between_two_markers_are_cut():
    def parse(text: str) -> list[tuple[str, Mapping[str, Any]]]:
        return [(name, {}) for name in text.split()]

    text = "<tool_call>a b c</tool_call>"
    assert told_however_cut(text, parse=parse, max_calls=2) == [
        (CALLED, ("a", {})),
        (CALLED, ("b", {})),
    ]


def test_a_call_without_an_end_marker_extends_to_the_end():
    body = json.dumps({"name": "f", "arguments": {"s": "[TOOL_CALLS] <"}})
    expected = (CALLED, ("f", {"s": "[TOOL_CALLS] <"}))
    assert told_however_cut(f"[TOOL_CALLS]{body} \n", TO_THE_END) == [expected]
    assert told_however_cut(f"a \n[TOOL_CALLS]{body}", TO_THE_END) == [(SAID, "a"), expected]
    text = f"[THINK]hm[/THINK] [TOOL_CALLS]{body}"
    assert told_however_cut(text, TO_THE_END) == [(THOUGHT, "hm"), expected]
    text = "a \n[TOOL_CALLS]nothing to read\n"
    assert told_however_cut(text, TO_THE_END) == [(SAID, text)]


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, AttributeError, SyntaxError, RecursionError, ZeroDivisionError]
)
def test_whatever_a_parser_raises_the_call_is_text(error: type[Exception]):
    def parse(_text: str) -> list[tuple[str, Mapping[str, Any]]]:
        raise error("what foreign code says")

    assert told_however_cut(call(), parse=parse) == [(SAID, call())]


def test_integers_of_any_length_keep_their_digits():
    digits = "1" + "0" * 30
    text = '<tool_call>{"name": "f", "arguments": {"a": ' + digits + "}}</tool_call>"
    assert told_however_cut(text) == [(CALLED, ("f", {"a": int(digits)}))]


@pytest.mark.parametrize(
    "arguments", [None, "{}", 3, {"a": {1, 2}}, {1: 2}, {"a": object()}, {"s": "\ud800"}]
)
def test_arguments_that_are_no_json_object_make_the_call_text(arguments: Any):
    def parse(_text: str) -> list[tuple[str, Any]]:
        return [("f", arguments)]

    assert told_however_cut(call(), parse=parse) == [(SAID, call())]


# --- calls that are emitted as they are written -------------------------------------------------

IN_PARTS = replace(MARKERS, has_json_calls=True)
SCHEMAS: dict[str, Any] = {
    "f": {
        "type": "object",
        "properties": {
            "code": {"type": "string"},
            "num": {"type": "integer"},
            "list": {"type": "array", "items": {"type": "integer"}},
        },
    },
    "g": {"type": "object", "properties": {}},
}


def listening(**kw: Any) -> MarkerParser:
    return parser_of(IN_PARTS, parse=parse_json, schemas=SCHEMAS, **kw)


def shown(pieces: Iterable[str], **kw: Any) -> Told:
    """What a stream shows: calls with the arguments that were emitted, ended or not."""
    parser = listening(**kw)
    found: Told = []
    for event in [event for text in pieces for event in parser.push(text)] + parser.flush():
        match event:
            case ToolCallStart(_, name):
                found.append((CALLED, [name, ""]))
            case ToolCallArguments(text):
                found[-1][1][1] += text
            case ToolCallEnd():
                found[-1] = (CALLED, tuple(found[-1][1]))
            case TextDelta(text) if found and found[-1][0] == SAID:
                found[-1] = (SAID, found[-1][1] + text)
            case TextDelta(text):
                found.append((SAID, text))
    return found


def shown_however_cut(text: str, **kw: Any) -> Told:
    whole = shown([text], **kw)
    assert shown(text, **kw) == whole, "one character at a time"
    for at in range(1, len(text)):
        assert shown([text[:at], text[at:]], **kw) == whole, f"cut after {text[:at]!r}"
    return whole


def raw_call(arguments: str, name: str = "f", rest: str = "") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}{rest}}}\n</tool_call>'


def test_a_call_is_emitted_as_it_is_generated():
    parser = listening()
    steps: list[tuple[str, list[Any]]] = [
        ("Look: <tool_call>\n", ["Look:"]),
        ('{"name": "f"', []),
        (', "arguments": ', []),
        ("{", [ToolCallStart, "{"]),
        ('"code": "', ['"code": "']),
        ("print", ["print"]),
        ("(</tool_call>", ["(</tool_call>"]),
        (")\\", [")\\"]),
        ('n", "num', ['n", "num']),
        ('": 3.0', ['": 3.0']),
        ("}", ["}"]),
        ("}\n</tool_", []),
        ("call>", [ToolCallEnd]),
    ]
    for text, expected in steps:
        found = [
            event.text if isinstance(event, TextDelta | ToolCallArguments) else type(event)
            for event in parser.push(text)
        ]
        assert found == expected, text
        assert parser.num_calls == (ToolCallEnd in expected)
    assert parser.flush() == []


@pytest.mark.parametrize(
    "arguments",
    [
        "{}",
        '{"code": "x", "num": "3", "list": ["1", 2.0]}',
        '{"code": "a </tool_call> b <tool_call> <think>"}',
        '{"num": 3.0, "code": "é 世界\\ud83d\\ude42 🙂 \\n \\/", "z": {"code": [1.0, {}]}}',
        '{"z": [1e16, 123456789012345678901234567890], "list": "[3]"}',
    ],
)
def test_a_streamed_call_ends_with_the_same_arguments_as_a_whole_one(arguments: str):
    whole = parser_of(MARKERS, parse=parse_json, schemas=SCHEMAS)
    *_, end = whole.push(raw_call(arguments.replace("</tool_call>", "MARK")))
    assert isinstance(end, ToolCallEnd)
    text = raw_call(arguments)
    canonical = end.arguments.replace("MARK", "</tool_call>")
    assert listening().push(text)[-1] == ToolCallEnd(canonical)
    expected = (CALLED, ("f", arguments))
    assert shown_however_cut(text) == [expected]
    assert shown_however_cut(f"a {text}\n{text} b") == [(SAID, "a"), *[expected] * 2, (SAID, "b")]
    assert shown_however_cut(text.removesuffix("</tool_call>")) == [expected]
    assert shown([raw_call(arguments, rest=', "id": "x"')]) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"arguments": {"code": "x"}, "name": "f"}</tool_call>',
        '<tool_call>{"id": 1, "name": "f", "arguments": {"code": "x"}}</tool_call>',
        raw_call('{"code": "x"}', "unknown"),
        raw_call('{"code": "x"}').replace("\n{", " " * MAX_HEAD + "{"),
    ],
    ids=["order", "another member", "an unknown tool", "a long head"],
)
def test_a_call_of_another_form_is_emitted_whole(text: str):
    parser = listening()
    _, arguments, _ = [event for char in text for event in parser.push(char)]
    assert arguments == ToolCallArguments('{"code":"x"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # The answer ends within the arguments: they are what there is.
        ('<tool_call>{"name": "f", "arguments": {', [["f", "{"]]),
        ('a<tool_call>{"name": "f", "arguments": {"co', ["a", ["f", '{"co']]),
        ('<tool_call>{"name": "f", "arguments": {"code": "x\\u00', [["f", '{"code": "x\\u00']]),
        ('<tool_call>{"name": "f", "arguments": {"num": 3.', [["f", '{"num": 3.']]),
        ('<tool_call>{"name": "f", "arguments": {"code": "</tool_', [["f", '{"code": "</tool_']]),
        # What cannot be theirs is text.
        (raw_call('{"code": "x"') + " b", [["f", '{"code": "x"}'], "\n</tool_call> b"]),
        (raw_call('{"num": </tool_call>'), [["f", '{"num": '], "</tool_call>}\n</tool_call>"]),
        (raw_call('{"code" 1}') + call("g"), [["f", '{"code" 1}'], "}\n</tool_call>", ("g", "{}")]),
        (raw_call("{}", rest=" x"), [["f", "{}"], " x}\n</tool_call>"]),
        # A string that is never closed has the end marker in it: what follows it may call again.
        (
            '<tool_call>{"name": "f", "arguments": {"code": "x</tool_call>\n' + call("g"),
            [["f", '{"code": "x</tool_call>'], ("g", "{}")],
        ),
    ],
)
def test_a_call_that_turns_out_invalid_loses_no_text_and_emits_none_twice(
    text: str, expected: list[Any]
):
    kinds = [(SAID if isinstance(part, str) else CALLED, part) for part in expected]
    assert shown_however_cut(text) == kinds
    kw = {"schemas": SCHEMAS, "parse": parse_json}
    assert told([text], IN_PARTS, **kw) == told(text, IN_PARTS, **kw) == told([text])


def test_an_invalid_call_does_not_count():
    parser = listening(max_calls=1)
    parser.push(raw_call('{"code" 1}'))
    assert (parser.num_calls, parser.is_complete) == (0, False)
    parser.push(call("g"))
    assert (parser.num_calls, parser.is_complete) == (1, True)
    assert not parser.push(call("f"))


def test_the_last_of_two_equal_argument_keys_counts():
    text = raw_call('{"code": "a", "num": 1, "code": "b"}')
    assert shown_however_cut(text) == [(CALLED, ("f", '{"code": "a", "num": 1, "code": "b"}'))]
    assert listening().push(text)[-1] == ToolCallEnd('{"code":"b","num":1}')


def test_a_streamed_call_that_the_parser_reads_differently_is_invalid():
    """Its name is repeated after its arguments, or its reader finds more in the text."""
    text = raw_call('{"code": "x"}', rest=', "name": "g"')
    expected = [(CALLED, ["f", '{"code": "x"}']), (SAID, ', "name": "g"}\n</tool_call>')]
    assert shown_however_cut(text) == expected
    assert told([text], IN_PARTS, parse_json, schemas=SCHEMAS) == [(SAID, text)]

    def parse(text: str) -> list[tuple[str, Mapping[str, Any]]]:
        return [*parse_json(text), *parse_json(text)]

    text = raw_call('{"code": "x"}')
    assert told([text], IN_PARTS, parse, schemas=SCHEMAS) == [(SAID, text)]


def test_an_open_call_that_never_ends_has_a_bound_too():
    head = '<tool_call>{"name": "f", "arguments": {"code": "'
    num_head = len(head) - len("<tool_call>")
    text = head + "x" * MAX_CALL_CHARS + "y z"
    expected = [
        (CALLED, ["f", '{"code": "' + "x" * (MAX_CALL_CHARS - num_head)]),
        (SAID, "x" * num_head + "y z"),
    ]
    step = MAX_CALL_CHARS // 4
    assert shown([text]) == expected
    assert shown([text[i : i + step] for i in range(0, len(text), step)]) == expected
    assert told([text], IN_PARTS, schemas=SCHEMAS) == [(SAID, text)]
    fits = raw_call('{"code": "' + "x" * (MAX_CALL_CHARS - num_head - 5) + '"}')
    assert shown([fits[:100], fits[100:]])[0][0] == CALLED


def test_a_long_argument_is_emitted_at_once_however_small_its_pieces():
    """Held, or read again and again, it would cost the square of its length."""
    parser = listening()
    parser.push('<tool_call>{"name": "f", "arguments": {"code": "')
    num_told = 0
    for _ in range(50_000):
        for event in parser.push("word "):
            assert isinstance(event, ToolCallArguments)
            num_told += len(event.text)
    assert num_told == 50_000 * len("word ")


# --- bounds -------------------------------------------------------------------------------------


def test_a_call_that_never_ends_is_emitted_as_text_at_the_bound():
    parser = parser_of(MARKERS, parse=parse_json)
    assert not parser.push("a <tool_call>")[1:]
    step = MAX_CALL_CHARS // 4
    pieces = [piece for _ in range(4) for piece in parser.push("x" * step)]
    assert not pieces
    pieces = parser.push("x")
    assert "".join(piece.text for piece in pieces) == " <tool_call>" + "x" * (4 * step + 1)
    assert "".join(piece.text for piece in parser.push("y z")) == "y z"


def test_a_call_of_the_greatest_length_is_read():
    text = call(s="x" * (MAX_CALL_CHARS - 100))
    assert told([text[:1000], text[1000:]])[0][0] == CALLED


def test_a_call_past_the_bound_is_text_however_it_was_cut():
    text = call(s="x" * MAX_CALL_CHARS)
    in_halves = told([text[: len(text) // 2], text[len(text) // 2 :]])
    late = told([text[:-3], text[-3:]])
    assert told([text]) == in_halves == late == [(SAID, text)]


# --- any text -----------------------------------------------------------------------------------

_WORDS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<thi", "nk>", "</to", "<", "/"),
    *(" ", "\n", "\n\n", "a", "word", "世", "{}", "!"),
)
TEXTS = st.lists(st.sampled_from(_WORDS), max_size=14).map("".join)


def parse_words(text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Reads whatever has no «!»."""
    if "!" in text:
        raise ValueError("cannot be read")
    return [("f", {"body": text})]


@given(TEXTS, st.lists(st.integers(0, 60), max_size=6), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
@example("<think>a</think>\n<tool_call>!</tool_call> <tool_call>x", [], False, True)
def test_any_text_is_accounted_for_however_it_was_cut(
    text: str, cuts: list[int], starts_in_reasoning: bool, has_tools: bool
) -> None:
    kw: dict[str, Any] = {
        "parse": parse_words if has_tools else None,
        "starts_in_reasoning": starts_in_reasoning,
    }
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = told([text], **kw)
    assert told([text[a:b] for a, b in pairwise(bounds)], **kw) == whole
    assert told(text, **kw) == whole
    rebuilt = "".join(
        squashed(f"<tool_call>{part[1]['body']}</tool_call>" if name == CALLED else part)
        for name, part in whole
    )
    assert rebuilt in (squashed(text), squashed(text) + "</tool_call>")


def squashed(text: str) -> str:
    """Without what is dropped: white space, and the markers of reasoning."""
    return re.sub(r"\s", "", re.sub(r"</?think>", "", text))


@given(st.text(max_size=60), st.booleans())
@settings(max_examples=150, deadline=None)
def test_text_without_markers_is_emitted_unchanged(text: str, has_tools: bool) -> None:
    whole = told(text, parse=parse_json if has_tools else None)
    assert whole == ([(SAID, text)] if text else [])


@given(st.lists(st.sampled_from(_WORDS), max_size=14), st.sampled_from([1, 2]))
@settings(max_examples=150, deadline=None)
def test_the_first_calls_are_the_same_with_a_limit(words: list[str], max_calls: int) -> None:
    text = "".join(words)
    free = [part for part in told([text], parse=parse_words) if part[0] == CALLED]
    bound = [part for part in told(text, parse=parse_words, max_calls=max_calls)]
    assert [part for part in bound if part[0] == CALLED] == free[:max_calls]


_HEAD = '<tool_call>{"name": "f", "arguments": {'
_PARTS = (
    *(
        _HEAD,
        _HEAD,
        "<tool_call>",
        "</tool_call>",
        "</tool",
        "}}</tool_call>",
        "<think>",
        "</think>",
    ),
    *(
        '"code": ',
        '"num": ',
        '"list": [',
        '"',
        '"',
        "\\",
        "\\u00e9",
        "\\ud83d",
        "3",
        "3.0",
        "x",
        "世",
    ),
    *("{", "}", "]", ",", ", ", ":", " ", "\n"),
)


@given(st.lists(st.sampled_from(_PARTS), max_size=16), st.lists(st.integers(0, 200), max_size=6))
@settings(max_examples=600, deadline=None)
@example([_HEAD, '"code": ', '"', "x", '"', "}}</tool_call>", _HEAD, "}"], [])
def test_any_call_in_parts_is_accounted_for_however_it_was_cut(
    words: list[str], cuts: list[int]
) -> None:
    text = "".join(words)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(bounds)]
    kw: dict[str, Any] = {"markers": IN_PARTS, "parse": parse_json, "schemas": SCHEMAS}
    whole = told([text], **kw)
    assert told(pieces, **kw) == told(text, **kw) == whole
    assert shown(pieces) == shown(text) == shown([text])
    if not any(name == CALLED for name, _ in whole):
        assert squashed("".join(part for _, part in whole)) == squashed(text)


# --- mlx-lm's parsers ---------------------------------------------------------------------------

NAMES = sorted(module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__))
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "num": {"type": "integer"},
                    "tree": {"type": "object"},
                },
            },
        },
    }
    for name in ("look", "go")
]
TEXT = 'x < y\nand <b>é 世界</b> & "z"'
FLAT = "x < y\nand <b>é 世界</b>"
TREE = {"a": [1, {"b": "< 世"}, None, True], "c": {}}
JSON_TREE = json.dumps(TREE, ensure_ascii=False)
JSON_ALL = json.dumps({"text": TEXT, "num": 3, "tree": TREE}, ensure_ascii=False)
GLM = "<tool_call>look\n" + "".join(
    f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
    for key, value in (("text", TEXT), ("num", 3), ("tree", JSON_TREE))
)
BOTH = [("look", {"text": TEXT, "num": 3, "tree": TREE}), ("go", {"num": 4})]

# A text of several calls in each format, and what is read of it.
FORMATS: dict[str, tuple[str, Sequence[tuple[str, Mapping[str, Any]]]]] = {
    "function_gemma": (
        f"<start_function_call>call:look{{text:<escape>{FLAT}<escape>,num:3}}<end_function_call>"
        "<start_function_call>call:go{num:4}<end_function_call>",
        [("look", {"text": FLAT, "num": 3}), ("go", {"num": 4})],
    ),
    "gemma4": (
        f'<|tool_call>call:look{{text:<|"|>{TEXT}<|"|>,num:3,'
        'tree:{a:[1,{b:<|"|>< 世<|"|>},null,true],c:{}}}<tool_call|>'
        "<|tool_call>call:go{num:4}<tool_call|>",
        BOTH,
    ),
    "glm47": (
        GLM + "</tool_call>\n<tool_call>go\n<arg_key>num</arg_key>\n"
        "<arg_value>4</arg_value>\n</tool_call>",
        BOTH,
    ),
    "json_tools": (
        f'<tool_call>\n{{"name": "look", "arguments": {JSON_ALL}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "go", "arguments": {"num": 4}}\n</tool_call>',
        BOTH,
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>"
        f"<|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>{JSON_ALL}"
        "<|tool_call_end|><|tool_call_begin|>functions.go:1<|tool_call_argument_begin|>"
        '{"num": 4}<|tool_call_end|><|tool_calls_section_end|>',
        BOTH,
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="look" index="1"<|sep|>'
        f'<|open|>argument key="text" type="string"<|sep|>{TEXT}<|close|>argument<|sep|>'
        '<|open|>argument key="num" type="integer"<|sep|>3<|close|>argument<|sep|>'
        f'<|open|>argument key="tree" type="object"<|sep|>{JSON_TREE}<|close|>argument<|sep|>'
        '<|close|>call<|sep|><|open|>call tool="go" index="2"<|sep|>'
        '<|open|>json type="object"<|sep|>{"num": 4}<|close|>json<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        BOTH,
    ),
    "longcat": (
        (GLM + "</tool_call><tool_call>go\n<arg_key>num</arg_key><arg_value>4</arg_value>")
        .replace("arg_", "longcat_arg_")
        .replace("tool_call", "longcat_tool_call")
        + "</longcat_tool_call>",
        BOTH,
    ),
    "minicpm5": (
        f'<function name="look"><param name="text"><![CDATA[{TEXT}]]></param>'
        f'<param name="num">3</param><param name="tree"><![CDATA[{JSON_TREE}]]></param></function>'
        '<function name="go"><param name="num">4</param></function>',
        BOTH,
    ),
    "minimax_m2": (
        f'<minimax:tool_call>\n<invoke name="look">\n<parameter name="text">{TEXT}</parameter>\n'
        f'<parameter name="num">3</parameter>\n<parameter name="tree">{JSON_TREE}</parameter>\n'
        '</invoke>\n<invoke name="go">\n<parameter name="num">4</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        BOTH,
    ),
    "mistral": (f'[TOOL_CALLS]look[ARGS]{JSON_ALL}[TOOL_CALLS]go[ARGS]{{"num": 4}}', BOTH),
    "muse_spark": (
        '<atem:function_calls>\n<atem:invoke name="look">\n'
        f'<atem:parameter name="text">{TEXT}</atem:parameter>\n'
        '<atem:parameter name="num">3</atem:parameter>\n'
        f'<atem:parameter name="tree">{JSON_TREE}</atem:parameter>\n</atem:invoke>\n'
        '<atem:invoke name="go">\n<atem:parameter name="num">4</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls>",
        BOTH,
    ),
    "pythonic": (
        f"<|tool_call_start|>[look(text={TEXT!r}, num=3, tree={JSON_TREE}), go(num=4)]"
        "<|tool_call_end|>",
        BOTH,
    ),
    "qwen3_coder": (
        f"<tool_call>\n<function=look>\n<parameter=text>\n{TEXT}\n</parameter>\n"
        f"<parameter=num>\n3\n</parameter>\n<parameter=tree>\n{JSON_TREE}\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=go>\n<parameter=num>\n4\n"
        "</parameter>\n</function>\n</tool_call>",
        BOTH,
    ),
}
FORMATS["laguna"] = FORMATS["glm47"]


def parsed(parser: Callable[..., Any], text: str) -> list[tuple[str, Mapping[str, Any]]]:
    """What `Tokenizer.parse_calls` makes of a parser's result."""
    from mlxlite.models.tokenizer import Tokenizer
    from mlxlite.models.tool_probe import CallParser

    class Stand:
        call_parser = CallParser(parser, "", "")

    return Tokenizer.parse_calls(Stand(), text, TOOLS)  # type: ignore[arg-type]


def of_module(name: str) -> tuple[MarkerFormat, ParseCalls]:
    module = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    markers = MarkerFormat("<think>", "</think>", module.tool_call_start, module.tool_call_end)
    return markers, partial(parsed, module.parse_tool_call)


def test_every_parser_of_mlx_lm_has_its_text_here():
    assert sorted(FORMATS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_format_is_read_the_same_however_it_was_cut(name: str):
    text, expected = FORMATS[name]
    markers, parse = of_module(name)
    whole = told_however_cut(text, markers, parse)
    assert whole == [(CALLED, call) for call in expected]
    around = told([f"<think>hm</think>\nI look.\n{text}"], markers, parse)
    assert around == [(THOUGHT, "hm"), (SAID, "I look."), *whole]


@pytest.mark.parametrize("name", NAMES)
def test_each_format_cut_short_anywhere_is_calls_or_text_and_never_lost(name: str):
    """An answer that ends in the middle of its first call: a call that can be read, or its text."""
    text, expected = FORMATS[name]
    markers, parse = of_module(name)
    for at in range(1, len(text), 7):
        found = told([text[:at]], markers, parse)
        if name == "json_tools":
            given = {"schemas": {"look": None, "go": None}}
            assert told(text[:at], replace(markers, has_json_calls=True), parse, **given) == found
        said = "".join(part for kind, part in found if kind == SAID)
        called = [part for kind, part in found if kind == CALLED]
        assert said or called or not text[:at].strip(), f"cut after {text[:at]!r}"
        if not called:
            assert said == text[:at]
        assert [name for name, _ in called] in (["look"], ["look", "go"], []) or name in (
            "glm47",
            "laguna",  # this parser reads a name out of anything
            "minicpm5",
        ), called
    assert expected


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_call_in_a_format_is_text_or_a_call_and_never_lost(name: str):
    markers, parse = of_module(name)
    for body in ("", " ", "?", "{", "[", "<", "null", "3", '"x"', "[[]]", "x(", "call:f{a", "\0"):
        text = markers.call_start + body + markers.call_end
        found = told_however_cut(text, markers, parse)
        assert found in ([(SAID, text)],) or [kind for kind, _ in found] == [CALLED], body


def test_function_gemma_cannot_read_nested_objects_and_cuts_them_at_the_first_brace():
    markers, parse = of_module("function_gemma")
    text = "<start_function_call>call:look{tree:{a:1},num:3}<end_function_call>"
    assert told_however_cut(text, markers, parse) == [(CALLED, ("look", {"tree": "{a:1"}))]


def test_function_gemma_reads_the_first_of_two_calls_between_its_markers():
    markers, parse = of_module("function_gemma")
    text = "<start_function_call>call:look{num:3}call:go{num:4}<end_function_call>"
    assert told_however_cut(text, markers, parse) == [(CALLED, ("look", {"num": 3}))]


def test_longcat_cannot_read_a_call_without_arguments_so_it_is_text():
    markers, parse = of_module("longcat")
    text = "<longcat_tool_call>look\n</longcat_tool_call>"
    assert told_however_cut(text, markers, parse) == [(SAID, text)]


def test_an_end_marker_in_a_json_string_turns_a_whole_call_into_text():
    markers, parse = of_module("json_tools")
    text = call("look", text="a </tool_call> b")
    assert told([text], markers, parse) == told(text, markers, parse) == [(SAID, text)]
    in_parts = partial(told, markers=replace(markers, has_json_calls=True), parse=parse)
    expected = [(CALLED, ("look", {"text": "a </tool_call> b"}))]
    assert in_parts([text], schemas={"look": None}) == expected
    assert in_parts(text, schemas={"look": None}) == expected


@pytest.mark.parametrize("arguments", ['"{\\"num\\": 3}"', '{"num": 3}'])
def test_arguments_that_a_model_writes_as_text_are_read_too(arguments: str):
    markers, parse = of_module("json_tools")
    text = f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>'
    assert told_however_cut(text, markers, parse) == [(CALLED, ("look", {"num": 3}))]


@pytest.mark.parametrize("arguments", ["", ', "arguments": null', ', "arguments": {}'])
def test_a_call_without_arguments_has_an_empty_object(arguments: str):
    markers, parse = of_module("json_tools")
    text = f'<tool_call>{{"name": "look"{arguments}}}</tool_call>'
    assert told_however_cut(text, markers, parse) == [(CALLED, ("look", {}))]
