"""Calls without marks: found in any text, the same however it was cut; all else stays text."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlite.output.bare_calls import BareFormat, json_calls
from mlxlite.output.events import ReasoningDelta, TextDelta, ToolCallEnd, ToolCallStart
from mlxlite.output.markers import MAX_GAP, MarkerFormat
from mlxlite.output.parser import MAX_CALL_CHARS, ParserOptions

SCHEMAS: dict[str, Any] = {
    "look": {"type": "object", "properties": {"num": {"type": "integer"}}},
    "go": None,
}
FORMAT = BareFormat(MarkerFormat("<think>", "</think>"), None)
LOOK, GO = ("look", {"num": 3}), ("go", {})


def told(pieces: Any, **options: Any) -> list[Any]:
    """Calls as pairs, content as text, reasoning in a list."""
    parser = FORMAT.parser(ParserOptions(schemas=SCHEMAS, **options))
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    found: list[Any] = []
    for event in events:
        match event:
            case TextDelta(text):
                if found and isinstance(found[-1], str):
                    found[-1] += text
                else:
                    found.append(text)
            case ReasoningDelta(text):
                if found and isinstance(found[-1], list):
                    found[-1][0] += text
                else:
                    found.append([text])
            case ToolCallStart():
                found.append(event.name)
            case ToolCallEnd(arguments):
                found[-1] = (found[-1], json.loads(arguments))
    assert parser.num_calls == sum(isinstance(item, tuple) for item in found)
    return found


def told_however_cut(text: str, **options: Any) -> list[Any]:
    whole = told([text], **options)
    assert told(text, **options) == whole, "one character at a time"
    for at in range(1, len(text)):
        assert told([text[:at], text[at:]], **options) == whole, f"cut after {text[:at]!r}"
    return whole


def call(name: str = "look", key: str = "arguments", **arguments: Any) -> str:
    return json.dumps({"name": name, key: arguments or {"num": 3}})


CALLS: dict[str, tuple[str, list[Any]]] = {
    "arguments": (call(), [LOOK]),
    "parameters": (call(key="parameters"), [LOOK]),
    "space": ('\n { "name" :\t"look" ,\n "parameters": {"num" : 3}\n}\n', [LOOK]),
    "the arguments first": ('{"arguments": {"num": 3}, "name": "look"}', [LOOK]),
    "with a type": ('{"type": "function", "name": "look", "parameters": {"num": 3}}', [LOOK]),
    "a function in it": (
        '{"type": "function", "function": {"name": "look", "arguments": "{\\"num\\": 3}"}}',
        [LOOK],
    ),
    "a function's name": ('{"function": "look", "parameters": {"num": "3"}}', [LOOK]),
    "arguments as text": ('{"name": "look", "arguments": "{\\"num\\": 3}"}', [LOOK]),
    "no arguments": ('{"name": "go", "parameters": {}}', [GO]),
    "null arguments": ('{"name": "go", "arguments": null}', [GO]),
    "an array": (f"[{call()}, {call('go', num=1)}]", [LOOK, ("go", {"num": 1})]),
    "a semicolon between": (f"{call()}; {call(key='parameters')}", [LOOK, LOOK]),
    "a line between": (f"{call()}\n{call()}", [LOOK, LOOK]),
    "a fence": (f"```json\n{call()}\n```", [LOOK]),
    "a fence without a language": (f"```\n{call()}\n```\n", [LOOK]),
    "a fence of a name": (f"```tool_call\n{call()}\n```", [LOOK]),
    "a fence on one line": (f"```json {call()}```", [LOOK]),
    "a fence of two": (f"```json\n{call()}\n{call()}\n```", [LOOK, LOOK]),
    "a fence of an array": (f"```json\n[{call()}]\n```", [LOOK]),
    "two fences": (f"```json\n{call()}\n```\n```json\n{call()}\n```", [LOOK, LOOK]),
    "text before": (f"I look.\n\n{call()}", ["I look.", LOOK]),
    "text before a fence": (f"I look:\n```json\n{call()}\n```", ["I look:", LOOK]),
    "text after": (f"{call()}\nDone.", [LOOK, "Done."]),
    "text after a fence": (f"```json\n{call()}\n```\n\nDone.", [LOOK, "Done."]),
    "text between": (f"a {call()} b {call()} c", ["a", LOOK, "b", LOOK, "c"]),
    "tags": (f"<tool_call>\n{call()}\n</tool_call>", [LOOK]),
    "other tags": (f"Yes. <tools>{call()}</tools> No.", ["Yes.", LOOK, "No."]),
    "a tag before": (f"<|python_tag|>{call(key='parameters')}", [LOOK]),
    "a tag never closed": (f"<function_call> {call()}", [LOOK]),
    "python": ("[look(num=3)]", [LOOK]),
    "python of two": ("[look(num=3), go()]", [LOOK, GO]),
    "python of values": (
        """[go(a='it\\'s [x]', b=[1, {'c': None}], d=true, e="(")]""",
        [("go", {"a": "it's [x]", "b": [1, {"c": None}], "d": True, "e": "("})],
    ),
    "python in text": ("Well: [look(num=3)] there", ["Well:", LOOK, "there"]),
    "after reasoning": (f"<think>{call()}</think>{call()}", [[call()], LOOK]),
    "braces in strings": (
        '{"name": "go", "arguments": {"a": "} ] ``` \\" {"}}',
        [("go", {"a": '} ] ``` " {'})],
    ),
    "a brace before": (f"{{ {call()}", ["{", LOOK]),
    "a text like one before": (f'{{"name": "x"}} {call()}', ['{"name": "x"}', LOOK]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_found_however_they_are_written_and_cut(name: str):
    text, expected = CALLS[name]
    assert told_however_cut(text) == expected


NO_CALLS = (
    *(
        "",
        "Hello.",
        "{",
        "[",
        "{}",
        "[]",
        "{}{}",
        "```",
        "```json\n",
        "<tool_call>",
        "a < b",
        "`x`",
    ),
    '{"name": "fly", "arguments": {}}',
    '{"name": "look"}',
    '{"name": "look", "age": 3}',
    '{"name": "look", "arguments": [1]}',
    '{"name": "look", "arguments": "three"}',
    '{"name": "look", "arguments": {}',
    '{"name": "look", "arguments": {}, "description": "It looks.", "parameters": {}}',
    '{"type": "function", "function": {"name": "look", "description": "d", "parameters": {}}}',
    '{"type": "object"}',
    '{"names": ["look"]}',
    '{"parameters": {"num": 3}}',
    '[{"name": "look", "arguments": {}}, {"name": "fly", "arguments": {}}]',
    '[{"name": "look", "arguments": {}}, 3]',
    '```python\nx = {"a": [1, 2]}\n```',
    '```json\n{"name": "Ada"}\n```',
    "[look(3)]",
    "[look(num=x)]",
    "[fly(num=3)]",
    "[look](num=3)",
    "[looking(num=3)]",
    "[look(num=3)",
    "def f():\n    return {'a': [look(num=3), 2]}",
    "{% if x %}{{ y }}",
    '{"name": "look", "arguments": {"a": "\n"}}',
)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_stays_text_to_the_letter(text: str):
    assert told_however_cut(text) == ([text] if text else [])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                *("{", "}", "[", "]", '"', "name", '"name"', ":", ",", " ", "\n", "look", "go("),
                *(
                    "```",
                    "json",
                    "<tool_call>",
                    "<",
                    "arguments",
                    '"arguments"',
                    "a",
                    "(",
                    ")",
                    ";",
                ),
                *(
                    ")",
                    ";",
                    call(),
                    "[look(num=3)]",
                    '{"name": "look", ',
                    "'",
                    "\\",
                    "}}",
                    "<think>",
                ),
            ]
        ),
        max_size=14,
    ).map("".join)
)
@example('{"name": "look", [look(num=3)]')
def test_any_text_is_told_the_same_however_it_was_cut(text: str):
    told_however_cut(text)


@settings(max_examples=200, deadline=None)
@given(*[st.text(st.characters(exclude_characters="[{<`;"), max_size=30)] * 2)
def test_text_around_a_call_is_kept_but_for_white_space(before: str, after: str):
    found = told_however_cut(f"{before}\n{call()}\n{after}")
    assert LOOK in found
    text = "".join(item for item in found if isinstance(item, str))
    assert "".join(text.split()) in "".join(f"{before}{after}".split())


def test_text_is_held_no_longer_than_it_may_be_a_call():
    parser = FORMAT.parser(ParserOptions(schemas=SCHEMAS))
    for text, given_ in (("Hi", "Hi"), (" {", ""), ('"x', ' {"x'), ("``", ""), ("x", "``x")):
        assert "".join(e.text for e in parser.push(text) if isinstance(e, TextDelta)) == given_


def test_a_long_run_of_white_space_or_a_call_without_an_end_is_not_held():
    parser = FORMAT.parser(ParserOptions(schemas=SCHEMAS))
    sent = "".join(e.text for e in parser.push("a" + " " * 5000) if isinstance(e, TextDelta))
    assert len(sent) >= 5001 - MAX_GAP
    parser = FORMAT.parser(ParserOptions(schemas=SCHEMAS))
    text = '{"name": "look", "arguments": {"a": "' + "x" * MAX_CALL_CHARS
    sent = "".join(e.text for e in parser.push(text) if isinstance(e, TextDelta))
    assert len(sent) >= MAX_CALL_CHARS


def test_an_answer_is_complete_with_as_many_calls_as_it_may_have():
    parser = FORMAT.parser(ParserOptions(schemas=SCHEMAS, max_calls=1))
    parser.push(call())
    assert parser.is_complete
    assert told([f"{call()} {call()}"], max_calls=1) == [LOOK]


def test_without_tools_calls_are_text():
    parser = FORMAT.parser(ParserOptions())
    assert [e.text for e in parser.push(call()) if isinstance(e, TextDelta)] == [call()]


def test_many_braces_are_read_in_one_pass():
    for brace in ("{", "[", '{"', "```{"):
        text = brace * (200_000 // len(brace))
        assert told([text]) == [text]


def test_a_strict_tool_is_called_only_where_a_grammar_holds_it_to_its_schema():
    """Text before marks is free: a call in it would be one that nothing has held to its schema."""
    markers = MarkerFormat(call_start="<call>", call_end="</call>", parse=json_calls)
    for is_strict in (False, True):
        parser = BareFormat(markers, None).parser(
            ParserOptions(schemas=SCHEMAS, is_strict=is_strict)
        )
        events = parser.push(f"{call()}<call>{call()}</call>") + parser.flush()
        assert parser.num_calls == (1 if is_strict else 2)
        assert isinstance(events[0], TextDelta) is is_strict
    assert told([call()], is_strict=True) == [LOOK], "without marks there is no other way to call"
