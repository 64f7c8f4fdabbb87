"""Constraints on an answer: the schema, expression or grammar that it must match. Pure."""

from typing import Any, Final

import orjson

from mlxlite.api.fields import Given, Table, supported
from mlxlite.api.readers import json_object, members, parse, shallow, text, wrong
from mlxlite.http.errors import bad_request, not_supported, truncate
from mlxlite.output.constraint import Constraint, Kind, TextConstraint


def take_constraints(given: Given) -> list[tuple[Constraint, str]]:
    found = given.take_each(CONSTRAINT_FIELDS)
    return [(constraint, name) for name, constraint in found.items()]


def response_format(value: Any, param: str) -> Constraint | None:
    """OpenAI's: text, json_object (llama-server: with a schema) or json_schema."""
    wanted = members(value, param)
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            schema = json_object(wanted.get("schema") or {"type": "object"}, f"{param}.schema")
            return json_schema(schema, f"{param}.schema")
        case "json_schema":
            inner = wanted  # in the form of Responses
            if wanted.get("json_schema") is not None or wanted.get("schema") is None:
                inner = members(wanted.get("json_schema"), f"{param}.json_schema")
            return json_schema(inner.get("schema"), inner.path_of("schema"))
    raise bad_request(f"'{param}.type' must be text, json_object or json_schema.", f"{param}.type")


def json_schema(value: Any, param: str) -> Constraint:
    if isinstance(value, str):
        try:
            value = parse(value.encode())
        except ValueError:
            raise bad_request(f"'{param}' is no JSON, or of too many values.", param) from None
    return TextConstraint(Kind.JSON, orjson.dumps(shallow(value, param)).decode(), param)


def regex(value: Any, param: str) -> Constraint:
    return TextConstraint(Kind.REGEX, _filled(value, param))


def grammar(value: Any, param: str) -> Constraint:
    return TextConstraint(Kind.GRAMMAR, _filled(value, param))


def choice(value: Any, param: str) -> Constraint:
    if not isinstance(value, list) or not value:
        raise wrong(param, "an array of strings", value)
    options = [text(item, f"{param}[{i}]") for i, item in enumerate(value)]
    return TextConstraint(Kind.CHOICE, orjson.dumps(options).decode())


def structured_outputs(value: Any, param: str) -> Constraint | None:
    """vLLM's: one of json, regex, choice and grammar."""
    given = {k: v for k, v in json_object(value, param).items() if v is not None}
    readers = {"json": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
    for name in given:
        if name not in readers:
            path = f"{param}.{truncate(name)}"
            raise not_supported(f"'{path}' is not supported by this server.", path)
    if len(given) > 1:
        raise bad_request(f"'{param}' must have one of {', '.join(readers)}.", param)
    return next((readers[name](item, f"{param}.{name}") for name, item in given.items()), None)


def _filled(value: Any, param: str) -> str:
    if not text(value, param):
        raise bad_request(f"'{param}' must not be empty.", param)
    return str(value)


_NEEDS = "; needs the extra `grammar`"
CONSTRAINT_FIELDS: Final[Table] = {
    "response_format": supported(response_format, "text, json_object, json_schema" + _NEEDS),
    "structured_outputs": supported(structured_outputs, "json, regex, choice or grammar" + _NEEDS),
    "json_schema": supported(json_schema, "a schema (llama-server)" + _NEEDS),
    "grammar": supported(grammar, "GBNF or Lark (llama-server)" + _NEEDS),
    "guided_json": supported(json_schema, "vLLM's older names" + _NEEDS),
    "guided_regex": supported(regex, "the same"),
    "guided_choice": supported(choice, "the same"),
    "guided_grammar": supported(grammar, "the same"),
}
