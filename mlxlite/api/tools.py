"""Tools of a request: their definitions, and which of them may and must be called. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from mlxlite.api.readers import MAX_DEPTH, Reader, array, flag, json_object, members, shallow
from mlxlite.http.errors import bad_request, not_supported, truncate
from mlxlite.output.grammar import CallConstraint, Constraint, ToolSchema

MAX_TOOLS = 128  # OpenAI's
_MAX_TOOL_DEPTH = MAX_DEPTH + 8  # of a tool, whatever holds its schema
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SCHEMA_ORDER = ("type", "title", "description", "enum", "properties", "required", "items")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON Schema, in a stable order."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool = False  # its arguments must match, whenever it is called

    def as_template(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": self.parameters}}

    def schema(self, *, is_strict: bool) -> ToolSchema:
        """Its arguments as a grammar enforces them; any object unless they must match."""
        parameters = self.parameters if is_strict else {"type": "object"}
        return ToolSchema(self.name, orjson.dumps(parameters).decode())


def function_of(value: Any, param: str, schema_name: str = "parameters") -> Tool:
    """A function's definition. Raises APIError 400."""
    function = members(value, param)
    name = function.text("name")
    if not _TOOL_NAME.fullmatch(name):
        message = f"'{param}.name' must be 1 to 128 letters, digits, and any of _-.:"
        raise bad_request(message, f"{param}.name")
    is_strict = flag(function.get("strict") or False, f"{param}.strict")
    schema = shallow(function.get(schema_name) or {}, f"{param}.{schema_name}")
    parameters = {"type": "object", "properties": {}} | stable(schema)
    return Tool(name, function.text("description", ""), parameters, is_strict)


def array_of(read: Reader, word: str = "tools") -> Reader:
    """The reader of an array of tools, each of a name of its own."""

    def read_all(value: Any, param: str) -> tuple[Tool, ...]:
        if len(array(value, param)) > MAX_TOOLS:
            raise bad_request(f"'{param}' may hold at most {MAX_TOOLS} {word}.", param)
        tools = tuple(read(item, f"{param}[{i}]") for i, item in enumerate(value))
        for i, item in enumerate(value):  # unknown members too: Responses repeat all of it
            shallow(item, f"{param}[{i}]", _MAX_TOOL_DEPTH)
        if len({tool.name for tool in tools}) < len(tools):
            raise bad_request(f"'{param}' holds two tools of one name.", param)
        return tools

    return read_all


def stable(value: Any) -> Any:
    """A schema with its keys in one order, whatever order the client's language gave them.

    Prompts that differ in nothing else then share their beginning.
    """
    if isinstance(value, dict):
        known = [key for key in _SCHEMA_ORDER if key in value]
        return {key: stable(value[key]) for key in (*known, *sorted(value.keys() - set(known)))}
    return [stable(item) for item in value] if isinstance(value, list) else value


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
            raise bad_request(f"'{self.param}' needs 'tools'.", self.param)
        if self.is_forced and not self.callable:
            name = truncate(self.choice["name"])
            raise bad_request(f"there is no tool {name!r} in 'tools'.", self.param)

    @property
    def is_forced(self) -> bool:
        return self.choice not in ("auto", "none")

    @property
    def callable(self) -> tuple[Tool, ...]:
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


def _tool(value: Any, param: str) -> Tool:
    tool = json_object(value, param)
    if (kind := tool.get("type", "function")) != "function":
        shown = (
            truncate(kind) if isinstance(kind, str) else "no string"
        )  # which may be of any depth
        raise not_supported(f"tools of type {shown!r} are not supported.", param)
    return function_of(tool.get("function"), f"{param}.function")


tool_list = array_of(_tool)
function_list = array_of(function_of, "functions")


def tool_choice(value: Any, param: str) -> Any:
    if value in ("none", "auto", "required"):
        return value
    choice = json_object(value, param)
    return {"name": members(choice.get("function", choice), param).text("name")}
