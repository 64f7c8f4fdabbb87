"""Tables of request fields, and the reading of a body by them. Pure.

A dialect's request is a table: for each field, its reader and its use, and the same for the types
of its tools, content parts and history items (`Kinds`). What is not supported has one of three
classes, by what the client would lose. A *demand* that cannot be met is a 400 that names it. A
*hint* or offer is left out and named. *History* is never an error: what can be read is read, the
rest is left out and named. Null, and the value that means «off», ask for nothing. The parser, the
OpenAPI document and the documentation read the same tables.

Nothing is dropped in silence: what is left out, and fields that a table does not have, are in
`Given.ignored`; fields that it supports must be taken by the parser, or `Given.close` fails
(tested for each field). A parser reads in a `with reading(…)`, which closes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

from mlxlite.api.left_out import collecting
from mlxlite.api.readers import Reader, hinted, integer, json_object, number, only, token_ids
from mlxlite.engine.sampling_params import Param
from mlxlite.http.errors import bad_request, truncate

MAX_TOKEN_MAP = 1024  # tokens in logit_bias (vLLM has no bound, OpenAI's is about 300)


class Use(Enum):
    """How the server treats a field, or a type of tool, part or item."""

    SUPPORTED = "works"
    NO_OP = "accepted"  # it changes nothing by its nature
    UNSUPPORTED = "400"  # a demand: for a value that asks for something
    HINT = "left out"  # served without it, which the answer's header names
    HISTORY = "left out of a history"  # a demand in the user's last message, 400 there


@dataclass(frozen=True, slots=True)
class Field:
    """One request field: how it is read, and its note in the documentation."""

    read: Reader
    use: Use
    note: str
    alias_of: str | None = None
    is_required: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """One type of tool, content part or history item, and its note in the documentation.

    `read` is None where nothing of it is read.
    """

    use: Use
    note: str
    read: Callable[..., Any] | None = None


Table = Mapping[str, Field]
Kinds = Mapping[str, Kind]


def supported(read: Reader, note: str, alias_of: str | None = None) -> Field:
    return Field(read, Use.SUPPORTED, note, alias_of)


def required(read: Reader, note: str) -> Field:
    return Field(read, Use.SUPPORTED, note, is_required=True)


def no_op(read: Reader, note: str = "not used") -> Field:
    return Field(read, Use.NO_OP, note)


def unsupported(*values: Any, note: str = "") -> Field:
    return Field(only(*values), Use.UNSUPPORTED, note)


def hint(*values: Any, note: str = "", read: Reader | None = None) -> Field:
    """A field that is served without, unless it has one of these values."""
    return Field(read or hinted(*values), Use.HINT, note)


def hint_each(names: str, *values: Any) -> dict[str, Field]:
    return dict.fromkeys(names.split(), hint(*values))


def unsupported_each(names: str, *values: Any) -> dict[str, Field]:
    return dict.fromkeys(names.split(), unsupported(*values))


def no_op_each(names: str, read: Reader) -> dict[str, Field]:
    return dict.fromkeys(names.split(), no_op(read))


def aliases(name: str, field: Field, others: str) -> dict[str, Field]:
    return dict.fromkeys(others.split(), replace(field, note="the same", alias_of=name))


def table_of(params: type[Any]) -> dict[str, Field]:
    """The request fields that a dataclass declares: its fields with a `Param`."""
    table: dict[str, Field] = {}
    for item in fields(params):
        if (param := item.metadata.get("param")) is not None:
            read = _reader_of(item.type, param)
            table[item.name] = field = supported(read, param.note)
            table |= aliases(item.name, field, " ".join(param.aliases))
    return table


def _reader_of(type_: Any, param: Param) -> Reader:
    plain = number(param.low, param.high, is_low_open=param.is_low_open)
    if type_ is float:
        return plain
    if type_ is int:
        return _converted(integer(param.low, param.high), param)
    if type_ == tuple[int, ...]:
        return _some_ids
    assert type_ == tuple[tuple[int, float], ...], f"no reader for parameters of type {type_}"
    return _token_map(plain)


def _converted(read_number: Reader, param: Param) -> Reader:
    if (convert := param.convert) is None:
        return read_number

    def read(value: Any, name: str) -> int | None:
        try:
            return convert(read_number(value, name))
        except ValueError as error:
            raise bad_request(f"'{name}' {error}", name) from None

    return read


def _some_ids(value: Any, param: str) -> tuple[int, ...]:
    if not (ids := token_ids(value, param)):
        raise bad_request(f"'{param}' must not be empty.", param)
    return tuple(dict.fromkeys(ids))


def _token_map(read_number: Reader) -> Reader:

    def read(value: Any, param: str) -> tuple[tuple[int, float], ...]:
        if value == []:
            return ()
        given = json_object(value, param)
        if len(given) > MAX_TOKEN_MAP:
            raise bad_request(f"'{param}' may hold at most {MAX_TOKEN_MAP} tokens.", param)
        for name in given:
            if not (name.isascii() and name.isdigit() and len(name) <= 10):
                raise bad_request(
                    f"'{param}' must be keyed by token ids, not {truncate(name)!r}.", param
                )
        pairs = given.items()
        return tuple((int(name), read_number(item, f"{param}.{name}")) for name, item in pairs)

    return read


class Given:
    """The supported fields that a body has, checked, under their first names."""

    def __init__(
        self, values: dict[str, Any], unknown: tuple[str, ...], left_out: Mapping[str, None]
    ) -> None:
        self._values = values
        self._unknown = unknown
        self._left_out = left_out

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names that the table does not have, and what has been left out so far."""
        return tuple(dict.fromkeys((*self._unknown, *self._left_out)))

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def take(self, name: str, default: Any = None) -> Any:
        """The field's value, once; `default` where the request has none."""
        value = self._values.pop(name, None)
        return default if value is None else value

    def take_each(self, names: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: self.take(name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def close(self) -> None:
        """Assert that every field has been taken: one that is accepted and not used is a bug."""
        assert not self._values, f"fields were read and not used: {sorted(self._values)}"


@contextmanager
def reading(value: Mapping[str, Any], table: Table) -> Iterator[Given]:
    """The given fields of a table, all of which the block must take. Raises APIError 400."""
    with collecting() as left_out:
        given = read_fields(value, table, left_out)
        yield given
        given.close()


def read_fields(
    value: Mapping[str, Any], table: Table, left_out: Mapping[str, None] | None = None
) -> Given:
    """The given fields of a table, checked. Raises APIError 400."""
    read: dict[str, Any] = {}
    names: dict[str, str] = {}  # under which each was given first
    for name, item in value.items():
        if item is None or (entry := table.get(name)) is None:
            continue
        new = entry.read(item, name)
        if entry.use is not Use.SUPPORTED:
            continue
        key = entry.alias_of or name
        other, old = names.setdefault(key, name), read.setdefault(key, new)
        if old is None:
            read[key] = new
        elif new is not None and new != old:
            raise bad_request(f"'{name}' and its other name '{other}' disagree.", name)
    for name, entry in table.items():
        if entry.is_required and name not in read:
            raise bad_request(f"'{name}' is required.", name)
    unknown = tuple(sorted(name for name in value if name not in table))
    return Given(read, unknown, {} if left_out is None else left_out)


def markdown(table: Table) -> str:
    """A table's rows in the documentation."""
    lines = ["| field | | |", "| --- | --- | --- |"]
    for name, entry in table.items():
        lines.append(f"| `{name}` | {entry.use.value} | {entry.note} |")
    return "\n".join(lines)


def kinds_markdown(kinds: Kinds) -> str:
    """The rows of types in the documentation; `*` is any other."""
    names = {name: "any other" if name == "*" else f"`{name}`" for name in kinds}
    rows = (f"| {names[name]} | {kind.use.value} | {kind.note} |" for name, kind in kinds.items())
    return "\n".join(("| type | | |", "| --- | --- | --- |", *rows))
