"""Readers: a JSON value to a checked one, or a 400 that names its place. Pure.

A reader takes a value and its path in the body, and raises APIError. `describes` attaches the JSON
Schema of its values, so that the OpenAPI document cannot differ from the parser.
"""

from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from mlxlite.api.left_out import leave_out
from mlxlite.http.errors import APIError, bad_request, not_supported, truncate

# A context of a million token ids, or any text that fits one. Reading JSON holds the interpreter:
# 60 MiB of empty arrays, which is 20 million of them, stopped every stream for 10 s.
MAX_VALUES = 1 << 20
_BEFORE_VALUES = (b",", b"[", b"{")  # in strings too, where few of them are
MAX_DEPTH = 100  # of a schema; writing one as text fails at 255
MAX_PROMPTS = 2048  # in one request, OpenAI's bound

Reader = Callable[[Any, str], Any]
R = TypeVar("R", bound=Reader)
Text = str | tuple[int, ...]  # a prompt, or its token ids
_SCHEMA = "json_schema"  # a reader's attribute


def parse(data: bytes) -> Any:
    """Any JSON of no more than `MAX_VALUES`. Raises ValueError, of which JSONDecodeError is one."""
    if len(data) > MAX_VALUES and sum(map(data.count, _BEFORE_VALUES)) >= MAX_VALUES:
        raise ValueError(f"more than {MAX_VALUES} values")
    return orjson.loads(data)


def parse_object(body: bytes) -> dict[str, Any]:
    """Raises APIError 400."""
    body = body.removeprefix(BOM_UTF8)
    if not body.strip():
        raise bad_request("The request body is empty; a JSON object is expected.")
    try:
        value = parse(body)
    except orjson.JSONDecodeError as error:
        complaint = _encoding_complaint(body) or f"is not valid JSON: {error}"
        raise bad_request(f"The request body {complaint}") from None
    except ValueError as error:
        raise bad_request(f"The request body holds {error}.") from None
    if not isinstance(value, dict):
        raise bad_request("The request body must be a JSON object.")
    return value


def _encoding_complaint(body: bytes) -> str | None:
    if body.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or body[:4].count(0) >= 2:
        return "must be UTF-8, and is UTF-16 or UTF-32."
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return f"must be UTF-8, and byte {error.start} is none (Latin-1?)."
    return None


def describes(**rules: Any) -> Callable[[R], R]:
    """Attach to a reader the JSON Schema of the values that it accepts."""

    def note(reader: R) -> R:
        setattr(reader, _SCHEMA, rules)
        return reader

    return note


def schema(reader: Reader) -> dict[str, Any]:
    """The JSON Schema of a reader, null included; `{}` where it has none."""
    rules = dict(getattr(reader, _SCHEMA, {}))
    if "type" in rules:
        own = rules["type"]
        rules["type"] = [*([own] if isinstance(own, str) else own), "null"]
    return rules


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    names |= {dict: "an object", list: "an array"}
    return names.get(type(value), "null")


def wrong(param: str, expected: str, value: Any) -> APIError:
    return bad_request(f"'{param}' must be {expected}, not {_kind(value)}.", param)


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


@dataclass(frozen=True, slots=True)
class Members:
    """The members of a JSON object, and its path: an error about a member names both."""

    values: Mapping[str, Any]
    path: str

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def path_of(self, name: str) -> str:
        return f"{self.path}.{name}"

    def read(self, name: str, reader: Reader) -> Any:
        return reader(self.values.get(name), self.path_of(name))

    def text(self, name: str, default: str | None = None) -> str:
        """A string; `default` where the member is empty or absent, if it may be."""
        value = self.values.get(name)
        return text(value if default is None else value or default, self.path_of(name))


def members(value: Any, param: str) -> Members:
    return Members(json_object(value, param), param)


def array(value: Any, param: str, of: str = "") -> list[Any]:
    if not isinstance(value, list):
        raise wrong(param, f"an array{of}", value)
    return value


def integer(low: float, high: float) -> Reader:
    @describes(type="integer", minimum=low, maximum=high)
    def read(value: Any, param: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JavaScript clients write 20.0
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(param, "an integer", value)
        if not low <= value <= high:
            raise bad_request(f"'{param}' must be from {low} to {high}, not {value}.", param)
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
            raise bad_request(f"'{param}' must be {above} {low:g} to {high:g}, not {value}.", param)
        return float(value)

    return read


def only(*values: Any) -> Reader:
    """The reader of a demand: only these values pass, which ask for nothing."""

    def read(value: Any, param: str) -> None:
        if not _is_one_of(value, values):
            raise not_supported(f"'{param}' is not supported by this server.", param)

    return read


def hinted(*values: Any) -> Reader:
    """The reader of a hint, which is left out unless it has one of these values."""

    def read(value: Any, param: str) -> None:
        if not _is_one_of(value, values):
            leave_out(param)

    return read


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Types count too: False == 0 must not let a wrong one through."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def one_of(*words: str) -> Reader:
    def read(value: Any, param: str) -> str:
        if value not in words:
            raise bad_request(f"'{param}' must be one of {', '.join(words)}.", param)
        return str(value)

    return read


def nested(required: str = "", /, **table: Reader) -> Reader:
    """An object of known fields; null is as good as absent."""

    def read(value: Any, param: str) -> dict[str, Any]:
        given = json_object(value, param)
        need(given, param, *required.split())
        return {
            name: reader(given[name], f"{param}.{name}")
            for name, reader in table.items()
            if given.get(name) is not None
        }

    return read


def need(given: Mapping[str, Any], param: str, *names: str) -> None:
    """Raises APIError 400 for the first of these names that is absent."""
    for name in names:
        if given.get(name) is None:
            raise bad_request(f"'{param}.{name}' is required.", f"{param}.{name}")


def parts(value: Any, param: str) -> Iterator[tuple[str, Members]]:
    """The objects of an array, each with its type."""
    if not isinstance(value, list):
        raise wrong(param, "a string or an array", value)
    for i, item in enumerate(value):
        part = members(item, f"{param}[{i}]")
        yield part.text("type"), part


def unsupported_type(kind: str, param: str) -> APIError:
    return not_supported(f"{truncate(kind)!r} is not supported in '{param}'.", f"{param}.type")


def of_kind(kind: str, value: Any, param: str, default: str | None = None) -> Members:
    """An object of one type, which may be left out if it is the default."""
    given = members(value, param)
    type_ = given.get("type")
    found = text(default if type_ is None else type_, f"{param}.type")
    if found != kind:
        raise unsupported_type(found, param)
    return given


def shallow(value: Any, param: str, max_depth: int = MAX_DEPTH) -> dict[str, Any]:
    """An object of bounded depth: parsers and writers of JSON recurse."""
    given = json_object(value, param)
    level: list[Any] = [given]
    for _ in range(max_depth):
        holders = [item for item in level if isinstance(item, dict | list)]
        level = [x for item in holders for x in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return given
    raise bad_request(f"'{param}' is nested more than {max_depth} deep.", param)


def token_ids(value: Any, param: str, max_ids: int | None = None) -> tuple[int, ...]:
    """Token ids; the model's range is checked later."""
    ids = array(value, param, " of integers" if max_ids is not None else " of token ids")
    if max_ids is not None and len(ids) > max_ids:
        raise bad_request(f"'{param}' may hold at most {max_ids} tokens.", param)
    read = integer(0, 2**31 - 1)
    return tuple(read(item, f"{param}[{i}]") for i, item in enumerate(ids))


def _one_text(value: Any, param: str) -> Text:
    if isinstance(value, list):
        value = token_ids(value, param)
    elif not isinstance(value, str):
        raise wrong(param, "a string or an array of token ids", value)
    if not value:
        raise bad_request(f"'{param}' must not be empty.", param)
    return value if isinstance(value, tuple) else str(value)


def texts(value: Any, param: str) -> tuple[Text, ...]:
    """A string, token ids, or an array of either."""
    is_one = isinstance(value, str) or (
        isinstance(value, list) and bool(value) and not isinstance(value[0], str | list)
    )
    if is_one:
        return (_one_text(value, param),)
    if not isinstance(value, list):
        raise wrong(param, "a string or an array", value)
    if not 0 < len(value) <= MAX_PROMPTS:
        raise bad_request(f"'{param}' must hold 1 to {MAX_PROMPTS} items, not {len(value)}.", param)
    return tuple(_one_text(item, f"{param}[{i}]") for i, item in enumerate(value))
