"""JSON values to checked ones: readers of fields, tables of them, and the 400s that name them.

A dialect's request is a table: for each field it knows how it is read and what becomes of it. A
field works, is accepted and changes nothing by its nature, or is refused: a value that asks for
something gives a 400 naming it, while null and the value that means «off» pass. Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import orjson

from mlxlite.api import APIError, Cause, bad

# A context of a million token ids, or any text that fits one. Reading JSON holds the interpreter:
# 60 MiB of empty arrays, which is 20 million of them, stopped every stream for 10 s.
MAX_VALUES = 1 << 20
_BEFORE_VALUES = (b",", b"[", b"{")  # in strings too, where few of them are


def parse(data: bytes) -> Any:
    """Any JSON of no more than `MAX_VALUES`. Raises ValueError, of which JSONDecodeError is one."""
    if len(data) > MAX_VALUES and sum(map(data.count, _BEFORE_VALUES)) >= MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    return orjson.loads(data)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object from a body. Raises APIError 400."""
    if not body.strip():
        raise bad("The request body is empty; a JSON object is expected.")
    try:
        value = parse(body)
    except orjson.JSONDecodeError as error:
        raise bad(f"The request body is not valid JSON: {error}") from None
    except ValueError as error:
        raise bad(f"The request body holds {error}.") from None
    if not isinstance(value, dict):
        raise bad("The request body must be a JSON object.")
    return value


# --- readers: a JSON value to a checked one, or a 400 -----------------------------------------

Reader = Callable[[Any, str], Any]
R = TypeVar("R", bound=Reader)
_SCHEMAS = "json_schema"  # a reader's attribute: what it takes, as JSON Schema says it


def describes(**rules: Any) -> Callable[[R], R]:
    """Say in JSON Schema what a reader takes."""

    def note(reader: R) -> R:
        setattr(reader, _SCHEMAS, rules)
        return reader

    return note


def schema(reader: Reader) -> dict[str, Any]:
    """What a reader takes, null included; everything where it does not say."""
    rules = dict(getattr(reader, _SCHEMAS, {}))
    if "type" in rules:
        own = rules["type"]
        rules["type"] = [*([own] if isinstance(own, str) else own), "null"]
    return rules


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    names |= {dict: "an object", list: "an array"}
    return names.get(type(value), "null")


def wrong(param: str, expected: str, value: Any) -> APIError:
    return bad(f"'{param}' must be {expected}, not {_kind(value)}.", param)


@describes(type="string")
def text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise wrong(param, "a string", value)
    return value


@describes(type="boolean")
def flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(param, "a boolean", value)
    return value


@describes(type="object")
def json_object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(param, "an object", value)
    return value


def integer(low: int, high: int) -> Reader:
    @describes(type="integer", minimum=low, maximum=high)
    def read(value: Any, param: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JavaScript clients write 20.0
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(param, "an integer", value)
        if not low <= value <= high:
            raise bad(f"'{param}' must be from {low} to {high}, not {value}.", param)
        return value

    return read


def number(low: float, high: float, *, is_low_open: bool = False) -> Reader:
    lowest = {"exclusiveMinimum": low} if is_low_open else {"minimum": low}

    @describes(type="number", maximum=high, **lowest)
    def read(value: Any, param: str) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong(param, "a number", value)
        if not low <= value <= high or (is_low_open and value == low):
            above = "above" if is_low_open else "from"
            raise bad(f"'{param}' must be {above} {low:g} to {high:g}, not {value}.", param)
        return float(value)

    return read


def off(*values: Any) -> Reader:
    """A field that is not supported: only a value that asks for nothing passes."""

    def read(value: Any, param: str) -> None:
        # Types too: False == 0 must not let a wrong one through.
        if not any(
            value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in values
        ):
            message = f"'{param}' is not supported by this server."
            raise APIError(Cause.UNSUPPORTED, message, param=param)

    return read


class Use(Enum):
    """What becomes of a field."""

    WORKS = "works"
    ACCEPTED = "accepted"  # it changes nothing by its nature
    REFUSED = "400"  # a value that asks for something is refused


@dataclass(frozen=True, slots=True)
class Field:
    """One request field: how it is read, and what the README says of it."""

    read: Reader
    use: Use
    note: str
    alias_of: str | None = None


def works(read: Reader, note: str, alias_of: str | None = None) -> Field:
    return Field(read, Use.WORKS, note, alias_of)


def accepted(read: Reader, note: str = "not used") -> Field:
    return Field(read, Use.ACCEPTED, note)


def refused(*values: Any, note: str = "") -> Field:
    return Field(off(*values), Use.REFUSED, note)


def refused_each(names: str, *values: Any) -> dict[str, Field]:
    return dict.fromkeys(names.split(), refused(*values))


def read_fields(value: Mapping[str, Any], table: Mapping[str, Field]) -> dict[str, Any]:
    """The given fields of a table, checked, under their first names. Raises APIError 400."""
    read: dict[str, Any] = {}
    names: dict[str, str] = {}  # under which each came first
    for name, item in value.items():
        if item is not None and (entry := table.get(name)):
            key, new = entry.alias_of or name, entry.read(item, name)
            other = names.setdefault(key, name)
            old = read.setdefault(key, new)
            if old is None:
                read[key] = new
            elif new is not None and new != old:
                raise bad(f"'{name}' and its other name '{other}' disagree.", name)
    return read


def markdown(table: Mapping[str, Field]) -> str:
    """A table as the README's."""
    lines = ["| field | | |", "| --- | --- | --- |"]
    for name, entry in table.items():
        lines.append(f"| `{name}` | {entry.use.value} | {entry.note} |")
    return "\n".join(lines)
