"""Constraints on an answer: the functions to call, the schema or grammar to match. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mlxlite.api.conversation import Tool, array_of, function_of
from mlxlite.api.fields import Field, Given, supported
from mlxlite.api.readers import json_object, members, parse, shallow, text, wrong
from mlxlite.http.errors import bad, clip, not_supported
from mlxlite.output.grammar import CallConstraint, Constraint, Kind, TextConstraint


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and which of them may and must be called.

    `choice` is "auto", "none", "required" or {"name": …}, from the field `param`. Raises APIError
    400 where it fits no tool.
    """

    tools: tuple[Tool, ...] = ()
    choice: Any = "auto"
    is_parallel: bool = True
    param: str = "tool_choice"

    def __post_init__(self) -> None:
        if self.is_forced and not self.tools:
            raise bad(f"'{self.param}' needs 'tools'.", self.param)
        if self.is_forced and not self.callable:
            name = clip(self.choice["name"])
            raise bad(f"there is no tool {name!r} in 'tools'.", self.param)

    @property
    def is_forced(self) -> bool:
        return self.choice not in ("auto", "none")

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The tools that may be called."""
        if self.choice == "none":
            return ()
        if isinstance(self.choice, dict):
            return tuple(tool for tool in self.tools if tool.name == self.choice["name"])
        return self.tools

    @property
    def max_calls(self) -> int | None:
        return None if self.is_parallel else 1

    def constraints(self) -> list[tuple[Constraint, str]]:
        """The constraint on calls, where they are forced or strict, and the field it is from."""
        tools = self.callable
        if not self.is_forced and not any(tool.is_strict for tool in tools):
            return []
        schemas = tuple(tool.schema(is_strict=self.is_forced or tool.is_strict) for tool in tools)
        is_single = not self.is_parallel or isinstance(self.choice, dict)
        constraint = CallConstraint(schemas, is_single, self.is_forced)
        return [(constraint, self.param if self.is_forced else "tools")]


def take_constraints(given: Given) -> list[tuple[Constraint, str]]:
    """The constraints of a request, each with its field."""
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
            inner = members(wanted.get("json_schema"), f"{param}.json_schema")
            return json_schema(inner.get("schema"), inner.path_of("schema"))
    raise bad(f"'{param}.type' must be text, json_object or json_schema.", f"{param}.type")


def json_schema(value: Any, param: str) -> Constraint:
    """A schema, as an object or as text."""
    if isinstance(value, str):
        try:
            value = parse(value.encode())
        except ValueError:
            raise bad(f"'{param}' is no JSON, or of too many values.", param) from None
    return TextConstraint(Kind.JSON, orjson.dumps(shallow(value, param)).decode())


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
            path = f"{param}.{clip(name)}"
            raise not_supported(f"'{path}' is not supported by this server.", path)
    if len(given) > 1:
        raise bad(f"'{param}' must have one of {', '.join(readers)}.", param)
    return next((readers[name](item, f"{param}.{name}") for name, item in given.items()), None)


def _filled(value: Any, param: str) -> str:
    if not text(value, param):
        raise bad(f"'{param}' must not be empty.", param)
    return str(value)


def _tool(value: Any, param: str) -> Tool:
    tool = json_object(value, param)
    if (kind := tool.get("type", "function")) != "function":
        shown = clip(kind) if isinstance(kind, str) else "no string"  # which may be of any depth
        raise not_supported(f"tools of type {shown!r} are not supported.", param)
    return function_of(tool.get("function"), f"{param}.function")


tool_list = array_of(_tool)
function_list = array_of(function_of, "functions")


def tool_choice(value: Any, param: str) -> Any:
    """A word, or the name of a function."""
    if value in ("none", "auto", "required"):
        return value
    choice = json_object(value, param)
    return {"name": members(choice.get("function", choice), param).text("name")}


_NEEDS = "; needs the extra `grammar`"
CONSTRAINT_FIELDS: Final[Mapping[str, Field]] = {
    "response_format": supported(response_format, "text, json_object, json_schema" + _NEEDS),
    "structured_outputs": supported(structured_outputs, "json, regex, choice or grammar" + _NEEDS),
    "json_schema": supported(json_schema, "a schema (llama-server)" + _NEEDS),
    "grammar": supported(grammar, "GBNF or Lark (llama-server)" + _NEEDS),
    "guided_json": supported(json_schema, "vLLM's older names" + _NEEDS),
    "guided_regex": supported(regex, "the same"),
    "guided_choice": supported(choice, "the same"),
    "guided_grammar": supported(grammar, "the same"),
}
