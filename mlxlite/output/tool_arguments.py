"""The arguments of a call: where they end in a text, and with the types of their schema. Pure.

A call in JSON is emitted while the model writes it, as it writes it: `ObjectScan` follows strings,
escapes and depth, which is enough to find the object's end, and to keep an end marker that stands
in a string from ending the call. It decides nothing else: the complete text is parsed in the end,
and what does not parse is no call. Types are repaired in what was parsed, never in what is emitted.
"""

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from mlxlite.output.events import ToolCallStart

MAX_HEAD = 1024  # characters of a call before its arguments; after more it comes whole
_HEAD = re.compile(
    r'[ \t\n\r]*\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*"([^"\\]*)"[ \t\n\r]*'
    r',[ \t\n\r]*"arguments"[ \t\n\r]*:[ \t\n\r]*(?=\{)'
)
_IN_STRING = re.compile(r'[^"\\\x00-\x1f]*')
_BETWEEN = re.compile(r"[\w\s.,:+-]*")  # strings and brackets


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
    """Where a scan is; only an OPEN one takes more."""

    OPEN = "open"
    CLOSED = "closed"  # the object is complete
    LOST = "lost"  # no JSON goes on like that


class ObjectScan:
    """Finds the end of one JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self.state = ScanState.OPEN
        self._depth = 0
        self._is_string = False
        self._is_escape = False

    def push(self, text: str) -> int:
        """More text; the number of its characters that belong to the object."""
        at = 0
        while self.state is ScanState.OPEN and at < len(text):
            if self._is_escape:
                self._is_escape = False
                at += 1
                continue
            part = (_IN_STRING if self._is_string else _BETWEEN).match(text, at)
            assert part is not None, "it matches nothing, too"
            at = part.end()
            if at < len(text) and self._take(text[at]):
                at += 1
        return at

    def _take(self, char: str) -> bool:
        """A character that changes the state; False if it belongs to no object."""
        match char:
            case '"':
                self._is_string = not self._is_string
            case "\\" if self._is_string:
                self._is_escape = True
            case "{" | "[":
                self._depth += 1
            case "}" | "]":
                self._depth -= 1
                self.state = ScanState.OPEN if self._depth else ScanState.CLOSED
            case _:
                self.state = ScanState.LOST
        return self.state is not ScanState.LOST


def head_of(body: str) -> tuple[str, int] | None:
    """The name in a JSON call, and where its arguments begin, once they have."""
    head = _HEAD.match(body, 0, MAX_HEAD)
    return None if head is None else (head[1], head.end())


@dataclass(slots=True)
class OpenCall:
    """A call that is emitted while it is written: its `head`, and its arguments so far."""

    start: ToolCallStart
    head: str
    scan: ObjectScan = field(default_factory=ObjectScan)
    arguments: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The part of the call's text that was emitted as one."""
        return "".join((self.head, *self.arguments))

    def push(self, text: str) -> str:
        """More text; as much of it as belongs to the arguments."""
        text = text[: self.scan.push(text)]
        self.arguments.append(text)
        return text

    def is_what_was_read(self, calls: SequenceOf[tuple[str, Mapping[str, Any]]]) -> bool:
        """True if the whole text holds this one call. Raises what JSON's parser does."""
        if [name for name, _ in calls] != [self.start.name]:
            return False
        return written(json.loads("".join(self.arguments))) == written(calls[0][1])
