"""JSON Schemas: what a compiler of grammars lacks is left out of them, if it only refines. Pure.

Leaving out a refining keyword (`uniqueItems`, `not`, an unknown `format`) lets more through, never
something else; the names of those left out are for the client. A schema of nothing else is refused,
as is one with a dynamic reference, which is its meaning.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from mlxlite.output.constraint import ConstraintError

# A schema as text to the error of compiling it, if any, and its warnings.
Check = Callable[[str], tuple[str | None, list[str]]]
# Left out in this order, each alone and then together, of a schema that cannot be compiled.
_REFINING: tuple[tuple[str, ...], ...] = (
    ("pattern",),
    ("multipleOf",),
    ("minLength", "maxLength", "minItems", "maxItems"),
    ("patternProperties",),
)
_DYNAMIC = frozenset({"$dynamicRef", "$recursiveRef"})
_ANNOTATIONS = frozenset(
    (
        *("$schema", "$id", "id", "$comment", "title", "description", "default", "examples"),
        *("$defs", "definitions", "deprecated", "readOnly", "writeOnly", "then", "else"),
    )
)
_UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[.*\])")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NESTED = (
    *("items", "prefixItems", "additionalItems", "additionalProperties", "unevaluatedItems"),
    *("unevaluatedProperties", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "contains"),
    "propertyNames",
)
_MAX_REFS = 32  # in a chain
_TYPES: Mapping[type, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}


def relaxed(schema: str, check: Check) -> tuple[str, tuple[str, ...]]:
    """A schema that compiles, and the keywords that were left out of it. Raises ConstraintError."""
    error, warnings = check(schema)
    names: tuple[str, ...] = ()
    try:
        value = json.loads(schema)
    except RecursionError:
        raise ConstraintError(error or "it is too deep") from None
    if error is not None:
        together = tuple(name for group in _REFINING for name in group)
        for group in (*_REFINING, together):
            removed: set[str] = set()
            text = json.dumps(without(value, group, removed))
            if removed:
                failed, warnings = check(text)
                if failed is None:
                    schema, names, error = text, tuple(sorted(removed)), None
                    break
    if error is not None:
        raise ConstraintError(error)
    names = tuple(
        dict.fromkeys((*names, *(name for line in warnings for name in _named(line, schema))))
    )
    _check_rest(value, names)
    return schema, names


def _named(warning: str, schema: str) -> list[str]:
    """The keywords that one of llguidance's warnings is about."""
    if warning.startswith("min/maxProperties"):
        return [name for name in ("minProperties", "maxProperties") if f'"{name}"' in schema]
    if (keys := _UNIMPLEMENTED.match(warning)) is not None:
        return list(map(str, json.loads(keys[1])))
    return ["format"] if warning.startswith("Unknown format") else [warning.split(" ", 1)[0]]


def _check_rest(value: Any, names: tuple[str, ...]) -> None:
    for name in sorted(_DYNAMIC.intersection(names)):
        raise ConstraintError(f"{name!r} cannot be enforced")
    if names and isinstance(value, dict) and not value.keys() - _ANNOTATIONS - set(names):
        shown = ", ".join(names)
        raise ConstraintError(f"nothing is left of the schema without {shown}")


def without(schema: Any, names: tuple[str, ...], removed: set[str]) -> Any:
    """A schema without these keywords at any depth; adds those that it had to `removed`."""
    if not isinstance(schema, dict):
        return schema
    removed.update(name for name in names if name in schema)

    def inner(key: str, value: Any) -> Any:
        if key in _NAMED and isinstance(value, dict):
            return {name: without(item, names, removed) for name, item in value.items()}
        if key in _NESTED:
            if isinstance(value, list):
                return [without(item, names, removed) for item in value]
            return without(value, names, removed)
        return value

    return {key: inner(key, value) for key, value in schema.items() if key not in names}


def resolved(schema: Any, root: Any) -> Any:
    """A schema, or the one that its local reference leads to; `{}` for one that leads nowhere."""
    for _ in range(_MAX_REFS):
        if not isinstance(schema, Mapping) or not isinstance(ref := schema.get("$ref"), str):
            return schema
        schema = root
        for part in ref.removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            schema = schema.get(name) if isinstance(schema, Mapping) else None
        if schema is None:
            break
    return {}


def types_of(schema: Any, root: Any, depth: int = 8) -> frozenset[str]:
    """The types that a schema names, also by its alternatives and values; none if it names none."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or not depth:
        return frozenset()
    given = schema.get("type")
    named = given if isinstance(given, list) else [given]
    found = {name for name in named if isinstance(name, str)}
    if not found:
        values = schema.get("enum")
        values = list(values) if isinstance(values, list) else []
        values += [schema["const"]] if "const" in schema else []
        found = {_TYPES[type(value)] for value in values}
    for key in ("anyOf", "oneOf", "allOf"):
        if not found and isinstance(branches := schema.get(key), list):
            kinds = [types_of(branch, root, depth - 1) for branch in branches]
            found = set().union(*kinds) if all(kinds) or key == "allOf" else found
    return frozenset(found)
