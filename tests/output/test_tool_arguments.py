"""The arguments of a call: where their JSON ends, wherever it is cut, and how it is written.

`at_every_cut` feeds an object whole, cut in two anywhere, and by the character; the results
must not differ.
"""

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlxlite.output.events import ToolCallStart
from mlxlite.output.tool_arguments import (
    MAX_HEAD,
    ObjectScan,
    OpenCall,
    ScanState,
    head_of,
    written,
)


def scanned(pieces: list[str]) -> tuple[str, ScanState]:
    """The text that belongs to an object in pieces, and what became of the scan."""
    scan = ObjectScan()
    found = ""
    for piece in pieces:
        num = scan.push(piece)
        found += piece[:num]
        assert num == len(piece) or scan.state is not ScanState.OPEN
    return found, scan.state


def at_every_cut(text: str) -> tuple[str, ScanState]:
    whole = scanned([text])
    assert scanned(list(text)) == whole, "one character at a time"
    for at in range(1, len(text)):
        assert scanned([text[:at], text[at:]]) == whole, f"cut after {text[:at]!r}"
    return whole


OBJECTS = [
    "{}",
    "{ }",
    '{ "code" : "x" , "num" : 3 }',
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
def test_an_object_ends_where_its_json_does_wherever_it_is_cut(text: str):
    assert at_every_cut(text) == (text, ScanState.CLOSED)
    assert at_every_cut(text + "}\n</tool_call> and so on") == (text, ScanState.CLOSED)


@pytest.mark.parametrize("text", OBJECTS)
def test_a_prefix_of_an_object_is_open_at_every_place(text: str):
    for at in range(len(text)):
        assert scanned([text[:at]]) == (text[:at], ScanState.OPEN)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"num": </tool_call>', '{"num": '),
        ('{"num": 3; "code": 1}', '{"num": 3'),
        ('{"num": \\"3"}', '{"num": '),
        ("{'num': 3}", "{"),
        ('{"code": "x\ny"}', '{"code": "x'),
        ('{"code": "x\\\\\ty"}', '{"code": "x\\\\'),
        ('{"nu\nm": 3}', '{"nu'),
    ],
)
def test_text_that_cannot_continue_the_json_is_not_part_of_the_object(text: str, found: str):
    assert at_every_cut(text) == (found, ScanState.LOST)


@pytest.mark.parametrize("text", ["{x}", "{,}", "{]", '{"code" 3}', '{"num": tru}', '{"a": 03}'])
def test_what_is_no_json_but_balanced_ends_too_and_is_for_the_parser_to_refuse(text: str):
    assert at_every_cut(text) == (text, ScanState.CLOSED)


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
KEYS = st.sampled_from(["code", "num"]) | TEXTS
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
def test_any_object_is_found_to_its_end(value: dict[str, Any], style: str, cuts: list[int]) -> None:
    text = json.dumps(value, **STYLES[style])
    expected = (text, ScanState.CLOSED)
    assert scanned(list(cut(text + "}", cuts))) == expected
    assert scanned([*text, "}"]) == expected


@given(
    st.dictionaries(KEYS, VALUES, max_size=4),
    st.integers(0, 300),
    st.text('{}[]":,\\u0d38f\n <x', max_size=4),
    st.integers(0, 4),
)
@settings(max_examples=500, deadline=None)
@example({"code": "é"}, 12, "\\ud8", 0)
def test_any_text_is_read_the_same_in_pieces_and_an_object_in_it_to_its_end(
    value: dict[str, Any], at: int, noise: str, num_dropped: int
) -> None:
    text = json.dumps(value)
    text = text[:at] + noise + text[at + num_dropped :]
    found, state = scanned([text])
    assert scanned(list(text)) == (found, state)
    assert text.startswith(found)
    try:
        read, end = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return
    if isinstance(read, dict):
        assert (found, state) == (text[:end], ScanState.CLOSED)


# --- a call that is emitted in parts ------------------------------------------------------------


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
def test_a_call_has_a_head_when_its_name_is_first_and_its_arguments_have_begun(
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


def is_what_was_read(text: str, *calls: tuple[str, Any]) -> bool:
    call = OpenCall(ToolCallStart("call_1", "f"), '{"name": "f", "arguments": ')
    assert call.push(text + "}") == text
    assert call.text == call.head + text
    return call.matches(calls)


def test_what_was_read_of_the_complete_call_decides():
    arguments = {"code": "x", "num": 3.0}
    text = '{"code": "x",  "num": 3.0}'
    assert is_what_was_read(text, ("f", arguments))
    assert not is_what_was_read(text, ("g", arguments))
    assert not is_what_was_read(text, ("f", {"code": "y", "num": 3.0}))
    assert not is_what_was_read(text)
    assert not is_what_was_read(text, ("f", arguments), ("f", arguments))
    assert is_what_was_read('{"num": 4, "num": 3}', ("f", {"num": 3})), "of two the last counts"
    assert is_what_was_read('{"num": NaN}', ("f", {"num": float("nan")}))
    with pytest.raises(ValueError, match="Expecting"):
        is_what_was_read('{"num" 3}', ("f", {"num": 3}))
