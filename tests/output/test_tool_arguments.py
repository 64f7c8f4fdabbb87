"""The arguments of a call, told as they are written: the same text as if they were told whole.

`at_every_cut` feeds an object whole, cut in two anywhere, and by the character; what comes of it
must not differ.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlite.output.events import Arguments, Call, Closed, Opened
from mlxlite.output.tool_arguments import (
    MAX_DEPTH,
    MAX_HEAD,
    ArgumentScan,
    OpenCall,
    ScanState,
    head_of,
    repaired,
    written,
)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "code": {"type": "string"},
        "num": {"type": "integer"},
        "real": {"type": "number"},
        "flag": {"type": "boolean"},
        "any": {},
        "none": None,
        "either": {"type": ["string", "integer"]},
        "list": {"type": "array", "items": {"type": "integer"}},
        "files": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"text": {"type": "string"}, "num": {"type": "integer"}},
            },
        },
        "tree": {"type": "object", "properties": {"num": {"type": "integer"}}},
    },
}


def scanned(pieces: list[str], schema: Any = SCHEMA) -> tuple[str, ScanState, str]:
    """What is told of an object in pieces, what became of it, and what is left of the text."""
    scan = ArgumentScan(schema)
    told, left = "", ""
    for piece in pieces:
        if scan.state is ScanState.OPEN:
            told += scan.push(piece)
        else:
            left += piece
    rest = scan.held if scan.state is ScanState.OPEN else scan.rest
    return told, scan.state, rest + left


def at_every_cut(text: str, schema: Any = SCHEMA) -> tuple[str, ScanState, str]:
    whole = scanned([text], schema)
    assert scanned(list(text), schema) == whole, "one character at a time"
    for at in range(1, len(text)):
        assert scanned([text[:at], text[at:]], schema) == whole, f"cut after {text[:at]!r}"
    return whole


def at_once(text: str, schema: Any = SCHEMA) -> str:
    """What a call that is read whole has as its arguments."""
    return written(repaired(json.loads(text), schema))


OBJECTS = [
    "{}",
    "{ }",
    ' { "code" : "x" , "num" : 3 }',
    '{"code": "a\\n\\"b\\"\\t\\\\ \\/ \\u00e9 \\u000b \\b\\f\\r é 世界 🙂 \u2028 \x7f"}',
    '{"code": "\\ud83d\\ude42 \\uD83D\\uDE42 \\u4e16"}',
    '{"code": "a < b </tool_call> <tool_call> </t"}',
    '{"code": "", "any": ""}',
    '{"code": "not \\"}\\" the end", "num": 1}',
    '{"num": 3.0, "real": 3.0, "flag": true, "any": 3.0}',
    '{"num": "3", "real": "1e3", "flag": "True", "any": "3", "either": "3"}',
    '{"num": "\\u0033", "list": "[1, 2.0]", "tree": "{\\"num\\": \\"3\\"}"}',
    '{"num": "many", "list": ["1", 2.0, "x"], "none": "3"}',
    '{"files": [{"text": "a\\nb", "num": "4"}, {"num": 5.0, "text": ""}], "list": []}',
    '{"tree": {"num": 3.0, "b": {"c": [null, true, false, [], {}]}}, "\\u0063ode": "x"}',
    '{"é\\n": 1, "": 2, "unknown": {"num": 3.0}}',
    '{"any": [1e16, 1E-7, -0.0, 0.1, 12345678901234567890123, NaN, Infinity, -Infinity]}',
    '{"real": 12345678901234567890123, "any": 1e16, "code": "after"}',
    '{\r\n\t"code"\n:\t"x"\r,"list"\n:[ 1 ,\n2 ] }',
    '{"code": {"num": 3.0}, "list": {"num": "3"}, "tree": ["3"]}',
]


@pytest.mark.parametrize("text", OBJECTS)
def test_an_object_is_told_as_if_it_were_told_whole_wherever_it_is_cut(text: str):
    assert at_every_cut(text) == (at_once(text), ScanState.CLOSED, "")
    after = "}\n</tool_call> and so on"
    assert at_every_cut(text + after) == (at_once(text), ScanState.CLOSED, after)


@pytest.mark.parametrize("schema", [None, True, {}, {"properties": 3}, {"properties": {"code": 3}}])
def test_without_a_schema_all_stays_as_it_is(schema: Any):
    for text in OBJECTS:
        assert scanned([text], schema) == (at_once(text, schema), ScanState.CLOSED, "")


@pytest.mark.parametrize(
    ("text", "told", "rest"),
    [
        ("[1]", "", "[1]"),
        ('"x"', "", '"x"'),
        ("{x}", "{", "x}"),
        ("{,}", "{", ",}"),
        ("{]", "{", "]"),
        ('{"code" 3}', '{"code"', "3}"),
        ('{"code": }', '{"code":', "}"),
        ('{"code": "x",}', '{"code":"x",', "}"),
        ('{"code": "x" "y"}', '{"code":"x"', '"y"}'),
        ('{"code": "x"; ', '{"code":"x"', "; "),
        ('{"code": "x\ny"}', '{"code":"x', '\ny"}'),
        ('{"code": "x\\y"}', '{"code":"x', '\\y"}'),
        ('{"code": "x\\u12g4"}', '{"code":"x', '\\u12g4"}'),
        ('{"code": "x\\ud83d"}', '{"code":"x', '\\ud83d"}'),
        ('{"code": "x\\ud83d\\n"}', '{"code":"x', '\\ud83d\\n"}'),
        ('{"code": "x\\ud83d\\ud83d"}', '{"code":"x', '\\ud83d\\ud83d"}'),
        ('{"code": "x\\ude42"}', '{"code":"x', '\\ude42"}'),
        ('{"code": "x\ud83d"}', '{"code":"x', '\ud83d"}'),
        ('{"num": "3\n"}', '{"num":', '"3\n"}'),
        ('{"nu\nm": 3}', "{", '"nu\nm": 3}'),
        ('{"num": 3 4}', '{"num":3', "4}"),
        ('{"num": 03}', '{"num":', "03}"),
        ('{"num": -}', '{"num":', "-}"),
        ('{"num": tru}', '{"num":', "tru}"),
        ('{"num": 1_000}', '{"num":', "1_000}"),
        ('{"num": </tool_call>', '{"num":', "</tool_call>"),
        ('{"num": ' + "1" * 5000 + "}", '{"num":', "1" * 5000 + "}"),
        ('{"list": [1, 2}', '{"list":[1,2', "}"),
        ('{"list": [1,]', '{"list":[1,', "]"),
        ('{"tree": {"a": 1]', '{"tree":{"a":1', "]"),
    ],
)
def test_what_is_no_json_is_left_from_its_first_token_on(text: str, told: str, rest: str):
    check = at_every_cut if len(text) < 1000 else lambda text: scanned([text])
    assert check(text) == (told, ScanState.LOST, rest)


def test_what_the_whole_call_could_not_be_told_of_is_left_too():
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    with pytest.raises(TypeError):
        written({"any": json.loads(deep)})
    _, state, rest = scanned(['{"any": ' + deep + "}"])
    assert (state, rest) == (ScanState.LOST, deep[MAX_DEPTH - 1 :] + "}")
    bearable = '{"any": ' + deep[1:-1] + "}"
    assert scanned([bearable]) == (at_once(bearable), ScanState.CLOSED, "")
    in_a_string = '{"list": "' + "[" * 300 + "]" * 300 + '"}'
    told, state, _ = scanned([in_a_string])
    assert (told, state) == ('{"list":', ScanState.LOST)


def test_only_what_a_later_text_may_change_is_held():
    scan = ArgumentScan(SCHEMA)
    steps = [
        ("{", "{"),
        ('"co', ""),
        ('de"', '"code"'),
        (': "', ':"'),
        ("print", "print"),
        ("(1)\\", "(1)"),
        ("n\\ud83d", "\\n"),
        ("\\ude42", "🙂"),
        ('", "num": 3', '","num":'),
        (".0", ""),
        (",", "3,"),
        ('"num": "', '"num":'),
        ("4", ""),
        ('"', "4"),
        (', "files": [{"text": "x', ',"files":[{"text":"x'),
        ('"}]}', '"}]}'),
    ]
    assert [(text, scan.push(text)) for text, _ in steps] == steps
    assert scan.state is ScanState.CLOSED


def test_of_a_key_that_comes_twice_both_are_told_and_the_last_counts():
    text = '{"code": "a", "num": 1, "code": "b\\n", "num": "2"}'
    told, state, rest = at_every_cut(text)
    assert (told, state, rest) == (
        '{"code":"a","num":1,"code":"b\\n","num":2}',
        ScanState.CLOSED,
        "",
    )
    assert json.loads(told) == json.loads(at_once(text)) == {"code": "b\n", "num": 2}


def test_every_part_of_a_value_is_written_as_it_would_be_alone():
    value = {"a": [1e16, 10**30, {"b\n": -(10**20), "c": 1e-7}], "d": True, "e": "é"}
    assert written(value) == (
        f'{{"a":[{written(1e16)},{10**30},{{"b\\n":{-(10**20)},"c":{written(1e-7)}}}],'
        '"d":true,"e":"é"}'
    )
    assert json.loads(written(value)) == value
    for bad in ({"a": {1, 2}}, {"a": {1, 2}, "b": 10**30}, {"s": "\ud800"}):
        with pytest.raises(TypeError):
            written(bad)


# --- any object ---------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["</tool_call>", "3", "3.0", "true", "[1, 2.0]", '{"num": "3"}', "null", '"', "\\", "\x00\x1f"]
)
NUMBERS = st.integers() | st.floats(allow_nan=False) | st.sampled_from([3.0, 10**30, 1e16, -0.0])
KEYS = st.sampled_from(list(SCHEMA["properties"])) | st.sampled_from(["text", "num"]) | TEXTS
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
STYLES: dict[str, dict[str, Any]] = {
    "escaped": {},
    "plain": {"ensure_ascii": False},
    "tight": {"separators": (",", ":")},
    "wide": {"indent": 2, "ensure_ascii": False},
}


def cut(text: str, cuts: list[int]) -> Iterator[str]:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return (text[a:b] for a, b in pairwise(bounds))


@given(
    st.dictionaries(KEYS, VALUES, max_size=5),
    st.sampled_from(list(STYLES)),
    st.lists(st.integers(0, 300), max_size=6),
)
@settings(max_examples=500, deadline=None)
def test_any_object_is_told_as_if_it_were_told_whole(
    value: dict[str, Any], style: str, cuts: list[int]
) -> None:
    text = json.dumps(value, **STYLES[style])
    expected = (at_once(text), ScanState.CLOSED, "")
    assert scanned(list(cut(text, cuts))) == expected
    assert scanned(list(text)) == expected


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.integers(0, 300),
    st.text('{}[]":,\\u0d38f\n <x', max_size=4),
    st.integers(0, 4),
)
@settings(max_examples=500, deadline=None)
@example({"code": "é"}, 12, "\\ud8", 0)
def test_any_text_is_told_up_to_where_it_cannot_be_json(
    value: dict[str, Any], at: int, noise: str, num_dropped: int
) -> None:
    """Broken somewhere: what is told begins what can be read, and the pieces make no difference."""
    text = json.dumps(value)
    text = text[:at] + noise + text[at + num_dropped :]
    told, state, rest = scanned([text])
    assert scanned(list(text)) == (told, state, rest)
    assert text.endswith(rest)
    start = len(text) - len(text.lstrip(" \n"))
    try:
        read, end = json.JSONDecoder().raw_decode(text, start)
        whole = at_once(text[:end])
    except (TypeError, ValueError):
        assert state is not ScanState.CLOSED
        return
    assert (state is ScanState.CLOSED) == isinstance(read, dict)
    if state is ScanState.CLOSED:
        assert (json.loads(told), rest) == (json.loads(whole), text[end:])


# --- a call that is told in parts ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"name": "f", "arguments": {', "f"),
        ('\n{ "name":"f","arguments"\n:{', "f"),
        ('{"name": "é世", "arguments": {}}', "é世"),
        ('{"name": "f", "arguments": ', None),
        ('{"name": "f", "arguments": [', None),
        ('{"name": "f", "arguments": "{', None),
        ('{"name": "f\\n", "arguments": {', None),
        ('{"arguments": {}, "name": "f"}', None),
        ('{"id": 1, "name": "f", "arguments": {', None),
        ('{"name": "f", "parameters": {', None),
        ('[{"name": "f", "arguments": {', None),
    ],
)
def test_a_call_has_a_head_when_its_name_comes_first_and_its_arguments_begin(
    body: str, expected: str | None
):
    found = head_of(body)
    assert (found and found[0]) == expected
    if found is not None:
        assert body[found[1]] == "{"


def test_a_head_has_a_bound():
    body = '{"name": "f", "arguments":{'
    assert head_of(" " * (MAX_HEAD - len(body)) + body)
    assert not head_of(" " * (MAX_HEAD - len(body) + 1) + body)


def told_of(text: str, call: Call) -> tuple[str, Any]:
    """The parts of an open call's arguments, and what ends it: what was read of the whole."""
    open_call = OpenCall(Opened("call_1", "f"), SCHEMA)
    parts = [*open_call.push(text), *open_call.close((call,))]
    arguments = "".join(part.text for part in parts if isinstance(part, Arguments))
    last = parts[-1] if parts else None
    return arguments, last.call if isinstance(last, Closed) else None


def test_what_was_read_of_the_whole_call_decides():
    call = Call("call_2", "f", '{"code":"x","num":3}')
    own = Call("call_1", "f", call.arguments)
    text = '{"code": "x", "num": 3.0}'
    assert told_of(text, call) == (call.arguments, own)
    assert told_of('{"code": "x", !!', call) == (call.arguments, own), "its reader knew more"
    assert told_of(text, Call("call_2", "g", call.arguments)) == (call.arguments, None)
    assert told_of('{"code": "y"}', call) == ('{"code":"y"}', None)
    twice = '{"num": 4, "code": "x", "num": 3}'
    read = Call("call_2", "f", '{"num":3,"code":"x"}')
    assert told_of(twice, read)[1] == Call("call_1", "f", read.arguments)
    half = '{"code": "x", "code": "y", !'
    assert told_of(half, Call("call_2", "f", '{"code":"y"}'))[1] is None
    open_call = OpenCall(Opened("call_1", "f"), SCHEMA)
    open_call.push(text)
    assert open_call.close(()) == open_call.close((call, call)) == ()
