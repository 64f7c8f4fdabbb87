"""The arguments of a call: repaired to their schema, as text, whole or as they are written. Pure.

An `OpenCall` is told in parts. Its `ArgumentScan` reads the JSON object of a call while the model
writes it, and tells at once what no later text can change: the structure, and the contents of
strings that no schema wants otherwise. A key, a number, or a string where the schema wants
something else waits until it is complete.

Invariants, all of them tested at every split point:

- What all pushes tell, put together, is byte for byte `written(repaired(...))` of the object; only
  of a key that comes twice both are told, of which every reader of JSON takes the last.
- Whatever is not JSON is not told: `rest` begins with the first token that cannot be.

Never: decides what a call is (`text` does, when it is whole), or reads a character twice.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import orjson

from mlxlite.output.events import Arguments, Call, CallPart, Closed, Opened

MAX_HEAD = 1024  # characters of a call before its arguments; after more it is told whole
# Objects and arrays in one another; orjson writes no more than 254.
MAX_DEPTH = 254
_HEAD = re.compile(
    r'[ \t\n\r]*\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*"([^"\\]*)"[ \t\n\r]*'
    r',[ \t\n\r]*"arguments"[ \t\n\r]*:[ \t\n\r]*(?=\{)'
)
_SPACE = re.compile(r"[ \t\n\r]*")
_SCALAR = re.compile(r"[\w.+-]+")  # or what might be one
# Characters of a string that stay as they are: orjson escapes no others, and writes no surrogates.
_PLAIN = re.compile(r'[^"\\\x00-\x1f\ud800-\udfff]+')
_ESCAPE = re.compile(
    r'\\(?:["\\/bfnrt]'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    r"|u(?![dD][89a-fA-F])[0-9a-fA-F]{4})"
)
_HALF_ESCAPE = re.compile(  # at the end of what has come so far
    r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}"
    r"(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?))?"
)


# --- repair -----------------------------------------------------------------------------------


def repaired(value: Any, schema: Any) -> Any:
    """Arguments with the types that their schema wants, where nothing is lost by it.

    Models write 3.0 for 3, and some formats have no types at all: "3", "true", "[1, 2]".
    """
    if not isinstance(schema, Mapping):
        return value
    wanted = _wanted(schema)
    if isinstance(value, str) and not _keeps_strings(schema):
        value = _read_as(value, wanted)
    if isinstance(value, float) and "integer" in wanted and _is_exact(value):
        return int(value)
    if isinstance(value, dict):
        return {name: repaired(item, _of_member(schema, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [repaired(item, _of_items(schema)) for item in value]
    return value


def _wanted(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema names."""
    types = schema.get("type")
    listed = types if isinstance(types, list) else [types]
    return {name for name in listed if isinstance(name, str)}


def _keeps_strings(schema: Any) -> bool:
    """Whether a string stays the string that it is."""
    wanted = _wanted(schema) if isinstance(schema, Mapping) else set()
    return not wanted or "string" in wanted


def _of_member(schema: Any, name: str) -> Any:
    own = schema.get("properties") if isinstance(schema, Mapping) else None
    return own.get(name) if isinstance(own, Mapping) else None


def _of_items(schema: Any) -> Any:
    return schema.get("items") if isinstance(schema, Mapping) else None


def _is_exact(number: float) -> bool:
    """Whether it is an integer, and surely the one that was written."""
    return number.is_integer() and abs(number) < 2**53


def _read_as(text: str, wanted: set[str]) -> Any:
    """JSON in a string, if it is of a wanted type; else the string."""
    try:
        value = orjson.loads(text.lower() if wanted == {"boolean"} else text)
    except orjson.JSONDecodeError:
        return text
    kinds = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}}
    if isinstance(value, float) and _is_exact(value):
        kinds[float] = {"number", "integer"}
    kinds |= {dict: {"object"}, list: {"array"}, type(None): {"null"}}
    return value if wanted & kinds.get(type(value), set()) else text


def written(value: Any) -> str:
    """A value as JSON; each part of it as it would be alone. Raises TypeError."""
    try:
        return orjson.dumps(value).decode()
    except TypeError as error:
        if "64-bit" not in str(error):
            raise
    match value:
        case dict():
            members = (f"{written(str(name))}:{written(item)}" for name, item in value.items())
            return "{" + ",".join(members) + "}"
        case list() | tuple():
            return "[" + ",".join(map(written, value)) + "]"
        case _:
            return json.dumps(value)  # an integer that is longer than orjson's


# --- as they are written ----------------------------------------------------------------------


class ScanState(Enum):
    """Where a scan is: OPEN takes more, the others have a `rest`."""

    OPEN = "open"
    CLOSED = "closed"  # the object is complete
    LOST = "lost"  # no JSON begins like that


class _Want(Enum):
    """What comes next, but for white space."""

    FIRST_KEY = "a key, or the end of an empty object"
    KEY = "a key"
    COLON = "a colon"
    FIRST_ITEM = "a value, or the end of an empty array"
    VALUE = "a value"
    NEXT = "a comma, or the end of what is open"
    TOLD = "more of a string that is told as it comes"
    HELD = "more of a string that waits for its end"
    HELD_KEY = "more of a key"
    SCALAR = "more of a number or a word"


@dataclass(frozen=True, slots=True)
class _Frame:
    """An object or array that is open."""

    end: str
    schema: Any


class ArgumentScan:
    """Reads one JSON object, in pieces, and tells it as `written` and `repaired` would.

    `rest` is the text that it has not told, once it is no longer open: what follows the object, or
    what cannot belong to it.
    """

    def __init__(self, schema: Any) -> None:
        self.state = ScanState.OPEN
        self.rest = ""
        self._schema = schema  # of the value that comes next
        self._frames: list[_Frame] = []
        self._want = _Want.VALUE
        self._token: list[str] = []  # what waits for its end, as the model wrote it
        self._half = ""  # of an escape

    @property
    def held(self) -> str:
        """What has come and is not told, of a scan that is open."""
        return "".join(self._token) + self._half

    def push(self, text: str) -> str:
        """More text; what can be told of it and of what was held."""
        text, self._half = self._half + text, ""
        told: list[str] = []
        at = 0
        while self.state is ScanState.OPEN and at < len(text):
            at = self._step(text, at, told)
        if self.state is not ScanState.OPEN:
            self.rest = "".join(self._token) + text[at:]
        return "".join(told)

    def _step(self, text: str, at: int, told: list[str]) -> int:
        """Take one thing at a place in a text; gives the place after it."""
        match self._want:
            case _Want.TOLD | _Want.HELD | _Want.HELD_KEY:
                return self._string(text, at, told)
            case _Want.SCALAR:
                return self._scalar(text, at, told)
        found = _SPACE.match(text, at)
        assert found is not None, "it matches nothing, too"
        at = found.end()
        return self._mark(text[at], at, told) if at < len(text) else at

    def _mark(self, char: str, at: int, told: list[str]) -> int:
        """A character between strings and scalars."""
        frame = self._frames[-1] if self._frames else None
        match self._want, char:
            case _Want.FIRST_KEY | _Want.KEY, '"':
                self._token, self._want = [char], _Want.HELD_KEY
                return at + 1
            case _Want.COLON, ":":
                self._want = _Want.VALUE
            case _Want.NEXT, "," if frame is not None:
                self._want = _Want.KEY if frame.end == "}" else _Want.VALUE
                if frame.end == "]":
                    self._schema = _of_items(frame.schema)
            case _Want.NEXT | _Want.FIRST_KEY | _Want.FIRST_ITEM, "}" | "]" if (
                frame is not None and frame.end == char
            ):
                self._frames.pop()
                self._want = _Want.NEXT
                self.state = ScanState.OPEN if self._frames else ScanState.CLOSED
            case _Want.VALUE | _Want.FIRST_ITEM, _:
                return self._value(char, at, told)
            case _:
                return self._lose(at)
        told.append(char)
        return at + 1

    def _value(self, char: str, at: int, told: list[str]) -> int:
        """The beginning of a value."""
        is_object = char == "{"
        if (is_object or (char == "[" and self._frames)) and len(self._frames) < MAX_DEPTH:
            self._frames.append(_Frame("}" if is_object else "]", self._schema))
            self._want = _Want.FIRST_KEY if is_object else _Want.FIRST_ITEM
            self._schema = None if is_object else _of_items(self._schema)
            told.append(char)
            return at + 1
        if char == '"' and self._frames:
            is_told = _keeps_strings(self._schema)
            (told if is_told else self._token).append(char)
            self._want = _Want.TOLD if is_told else _Want.HELD
            return at + 1
        if self._frames and _SCALAR.match(char):
            self._want = _Want.SCALAR
            return at
        return self._lose(at)

    def _string(self, text: str, at: int, told: list[str]) -> int:
        """One part of a string: characters that stay as they are, an escape, or its end."""
        is_told = self._want is _Want.TOLD
        if text[at] == '"' and is_told:
            told.append('"')
            self._want = _Want.NEXT
            return at + 1
        if text[at] == '"':
            self._token.append('"')
            return self._end_token(at + 1, told)
        part = _PLAIN.match(text, at) or _ESCAPE.match(text, at)
        if part is None and _HALF_ESCAPE.fullmatch(text, at):
            self._half = text[at:]
            return len(text)
        if part is None:
            return self._lose(at)
        if not is_told:
            self._token.append(part[0])
        elif text[at] == "\\":
            told.append(written(json.loads(f'"{part[0]}"'))[1:-1])
        else:
            told.append(part[0])
        return part.end()

    def _scalar(self, text: str, at: int, told: list[str]) -> int:
        part = _SCALAR.match(text, at)
        if part is None:
            return self._end_token(at, told)
        self._token.append(part[0])
        return part.end()

    def _end_token(self, at: int, told: list[str]) -> int:
        """What was held is complete."""
        try:
            value = json.loads("".join(self._token))
            if self._want is _Want.HELD_KEY:
                told.append(written(value))
                self._schema = _of_member(self._frames[-1].schema, value)
                self._want = _Want.COLON
            else:
                told.append(written(repaired(value, self._schema)))
                self._want = _Want.NEXT
        except (TypeError, ValueError):  # no JSON, or more than can be written
            return self._lose(at)
        self._token = []
        return at

    def _lose(self, at: int) -> int:
        self.state = ScanState.LOST
        return at


# --- a call that is told in parts -------------------------------------------------------------


def head_of(body: str) -> tuple[str, int] | None:
    """The name in a JSON call, and where its arguments begin, once they have."""
    head = _HEAD.match(body, 0, MAX_HEAD)
    return None if head is None else (head[1], head.end())


class OpenCall:
    """A call whose arguments are told while they are written, and which proves to be one or not.

    `num_told` are characters of it that have been told, as its user counts them.
    """

    def __init__(self, opened: Opened, schema: Any) -> None:
        self.num_told = 0
        self._opened = opened
        self._scan = ArgumentScan(schema)
        self._told: list[str] = []

    @property
    def state(self) -> ScanState:
        return self._scan.state

    @property
    def rest(self) -> str:
        """What has been pushed and not been told."""
        return self._scan.held if self.state is ScanState.OPEN else self._scan.rest

    def push(self, text: str) -> tuple[CallPart, ...]:
        """More text; what can be told of it."""
        return self._tell(self._scan.push(text))

    def cut(self) -> tuple[CallPart, ...]:
        """No more text: the last of it, as it is."""
        return self._tell(self.rest)

    def close(self, calls: tuple[Call, ...]) -> tuple[CallPart, ...]:
        """What there is to tell yet, if what was read of the whole is the call that was told."""
        told = "".join(self._told)
        if [call.name for call in calls] != [self._opened.name]:
            return ()
        call = replace(calls[0], id=self._opened.id)
        last: tuple[CallPart, ...] = ()
        if call.arguments.startswith(told):  # the reader may know more than the scan
            last = self._tell(call.arguments[len(told) :])
        elif not _is_same(told, call.arguments):
            return ()
        return (*last, Closed(call))

    def _tell(self, text: str) -> tuple[CallPart, ...]:
        if not text:
            return ()
        self._told.append(text)
        return (Arguments(text),)


def _is_same(text: str, other: str) -> bool:
    """Whether two texts are the same JSON for whoever reads them: a key may come twice in one."""
    try:
        return bool(orjson.loads(text) == orjson.loads(other))
    except orjson.JSONDecodeError:
        return False
