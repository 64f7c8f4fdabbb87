"""The arguments of a tool call: where they end in a text, and their types by a schema. Pure.

A call in JSON is emitted while the model writes it, in the model's own spelling. `ObjectScan`
follows strings, escapes and depth: enough to find the object's end, and to keep an end marker that
is part of a string from ending the call. It does not validate: the complete text is parsed at the
end. Types are coerced in the parsed value, never in what is emitted.
"""

import json
import re
import secrets
from collections.abc import Mapping, Set
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import orjson

from mlxlite.output.events import ParserEvent, ToolCallArguments, ToolCallEnd, ToolCallStart
from mlxlite.output.schemas import resolved, types_of

MAX_HEAD = 1024  # characters of a call before its arguments; after more it comes whole
_HEAD = re.compile(
    r'[ \t\n\r]*\{[ \t\n\r]*"name"[ \t\n\r]*:[ \t\n\r]*"([^"\\]*)"[ \t\n\r]*'
    r',[ \t\n\r]*"arguments"[ \t\n\r]*:[ \t\n\r]*(?=\{)'
)
_IN_STRING: Mapping[str, "re.Pattern[str]"] = {
    '"': re.compile(r'[^"\\\x00-\x1f]*'),
    "'": re.compile(r"[^'\\\x00-\x1f]*"),
}
_BETWEEN = re.compile(r"[\w\s.,:+=-]*")  # strings and brackets
JSON, PYTHON = ('"', "{[", "}]"), ("\"'", "{[(", "}])")  # quotes and brackets
# The JSON Schema types of parsed JSON.
_TYPES: Mapping[type, set[str]] = {
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    dict: {"object"},
    list: {"array"},
    type(None): {"null"},
}


# --- complete arguments -----------------------------------------------------------------------


def canonical(arguments: Any, schema: Any) -> str:
    """Arguments as JSON, coerced to their schema. Raises ValueError, and what `written` does."""
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    return written(coerced(arguments, schema, schema))


def coerced(value: Any, schema: Any, root: Any = None) -> Any:
    """Arguments with the types of their schema, where the conversion loses nothing.

    Models write 3.0 for 3, and some formats have no types at all: "3", "true", "[1, 2]". `root` is
    what the schema's references are relative to.
    """
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return value
    wanted = types_of(schema, root)
    if isinstance(value, str) and wanted and "string" not in wanted:
        value = _parsed_as(value, wanted)
    branch = _branch(schema, root, value)
    match value:
        case float() if "integer" in wanted and _is_exact(value):
            return int(value)
        case dict():
            properties = branch.get("properties")
            members = properties if isinstance(properties, Mapping) else {}
            return {name: coerced(item, members.get(name), root) for name, item in value.items()}
        case list():
            return [coerced(item, branch.get("items"), root) for item in value]
        case _:
            return value


def _branch(schema: Mapping[str, Any], root: Any, value: Any) -> Mapping[str, Any]:
    """The schema, or the first of its alternatives that has the value's type."""
    for key in ("anyOf", "oneOf"):
        branches = schema.get(key)
        for branch in branches if isinstance(branches, list) else ():
            if types_of(branch, root) & _TYPES.get(type(value), set()):
                found = resolved(branch, root)
                return found if isinstance(found, Mapping) else schema
    return schema


def _is_exact(number: float) -> bool:
    """True for an integer below the size at which floats skip some."""
    return number.is_integer() and abs(number) < 2**53


def _parsed_as(text: str, wanted: Set[str]) -> Any:
    """JSON in a string, if it is of a wanted type; else the string."""
    try:
        value = orjson.loads(text.lower() if wanted == {"boolean"} else text)
    except orjson.JSONDecodeError:
        return text
    kind = int if isinstance(value, float) and _is_exact(value) else type(value)
    return value if wanted & _TYPES.get(kind, set()) else text


def written(value: Any) -> str:
    """A value as JSON; integers may exceed 64 bits. Raises TypeError."""
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
            return json.dumps(value)  # an integer that orjson refuses


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def whole_call(name: str, arguments: str) -> tuple[ParserEvent, ...]:
    """The events of a call that comes at once."""
    start = ToolCallStart(new_call_id(), name)
    return (start, ToolCallArguments(arguments), ToolCallEnd(arguments))


# --- arguments as they are written ------------------------------------------------------------


class ScanState(Enum):
    """Only an OPEN scan takes more text."""

    OPEN = "open"
    CLOSED = "closed"  # the object is complete
    LOST = "lost"  # a character that no JSON has in this place


class ObjectScan:
    """Finds the end of one JSON object, or array, in text that comes in pieces."""

    def __init__(self, signs: tuple[str, str, str] = JSON) -> None:
        self.state = ScanState.OPEN
        self._quotes, self._opening, self._closing = signs
        self._depth = 0
        self._quote = ""  # of the string that is open
        self._is_escape = False

    def push(self, text: str) -> int:
        """More text; the number of its characters that belong to the object."""
        at = 0
        while self.state is ScanState.OPEN and at < len(text):
            if self._is_escape:
                self._is_escape = False
                at += 1
                continue
            part = (_IN_STRING[self._quote] if self._quote else _BETWEEN).match(text, at)
            assert part is not None, "all patterns match the empty string"
            at = part.end()
            if at < len(text) and self._take(text[at]):
                at += 1
        return at

    def _take(self, char: str) -> bool:
        """Apply a character that changes the state; False if it is not part of the object."""
        if self._quote:
            if char == self._quote:
                self._quote = ""
            elif char == "\\":
                self._is_escape = True
            else:
                self.state = ScanState.LOST
        elif char in self._quotes:
            self._quote = char
        elif char in self._opening:
            self._depth += 1
        elif char in self._closing:
            self._depth -= 1
            self.state = ScanState.OPEN if self._depth else ScanState.CLOSED
        else:
            self.state = ScanState.LOST
        return self.state is not ScanState.LOST


def head_of(body: str) -> tuple[str, int] | None:
    """The name in a JSON call, and where its arguments begin, once they have."""
    head = _HEAD.match(body, 0, MAX_HEAD)
    return None if head is None else (head[1], head.end())


@dataclass(slots=True)
class OpenCall:
    """A call that is emitted while the model writes it: its head, and its arguments so far."""

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

    def matches(self, calls: SequenceOf[tuple[str, Mapping[str, Any]]]) -> bool:
        """True if `calls`, parsed from the complete text, are this one. Raises ValueError."""
        if [name for name, _ in calls] != [self.start.name]:
            return False
        return written(json.loads("".join(self.arguments))) == written(calls[0][1])
