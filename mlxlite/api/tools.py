"""Tools of a request: their definitions, and which of them may and must be called. Pure."""

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from mlxlite.api.fields import Kind, Kinds, Use
from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import (
    MAX_DEPTH,
    Members,
    Reader,
    array,
    flag,
    members,
    one_of,
    shallow,
    text,
)
from mlxlite.http.errors import bad_request, truncate
from mlxlite.output.constraint import (
    ANY_ARGUMENTS,
    CallConstraint,
    Constraint,
    TextConstraint,
    ToolSchema,
)

MAX_TOOLS = 1024  # OpenAI's bound is 128, vLLM has none: agents with MCP servers bring hundreds
FREE_TEXT: Final = "input"  # the argument of a function that stands for a tool of free text
_MAX_TOOL_DEPTH = MAX_DEPTH + 8  # of a tool, whatever holds its schema
# OpenAI has 64 letters, digits, _ and -; no other signs, for a name is part of prompts and marks.
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_SCHEMA_ORDER = ("type", "title", "description", "enum", "properties", "required", "items")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call. `parameters` is a JSON Schema, in a stable order.

    A tool of a namespace has the name `<namespace>__<name>` for the model. One of free text is a
    function of the string `FREE_TEXT`.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    is_strict: bool = False  # its arguments must match, whenever it is called
    namespace: str = ""
    is_free_text: bool = False
    path: str = field(default="", compare=False)  # of its schema, in the request

    @property
    def strict_path(self) -> str:
        return f"{self.path.rpartition('.')[0]}.strict"

    @property
    def own_name(self) -> str:
        """The name inside its namespace."""
        return self.name.removeprefix(f"{self.namespace}__") if self.namespace else self.name

    def as_template(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": self.parameters}}

    def schema(self, *, is_strict: bool) -> ToolSchema:
        """Its arguments as a grammar enforces them; any object unless they must match."""
        written = orjson.dumps(self.parameters).decode() if is_strict else ANY_ARGUMENTS
        return ToolSchema(self.name, written, self.path)

    def in_namespace(self, namespace: str, description: str) -> "Tool":
        text = "\n".join(filter(None, (description, self.description)))
        name = name_in(namespace, self.name)
        return replace(self, name=name, description=text, namespace=namespace)


def name_in(namespace: str, name: str) -> str:
    """A tool's name as the model sees it."""
    return f"{namespace}__{name}" if namespace else name


def function_of(value: Any, param: str, schema_name: str = "parameters") -> Tool:
    """A function's definition. Raises APIError 400."""
    function = members(value, param)
    is_strict = flag(function.get("strict") or False, f"{param}.strict")
    path = function.path_of(schema_name)
    schema = shallow(function.get(schema_name) or {}, path)
    parameters = {"type": "object", "properties": {}} | stable(schema)
    description = function.text("description", "")
    return Tool(_name_of(function), description, parameters, is_strict, path=path)


def free_text_of(tool: Members) -> Tool:
    """A tool that takes free text; the grammar that the text should match is a hint."""
    description, format_ = tool.text("description", ""), tool.get("format")
    if isinstance(format_, dict) and format_.get("type", "text") != "text":
        leave_out(tool.path_of("format"))
        grammar = format_.get("grammar", format_)
        if isinstance(grammar, dict) and isinstance(grammar.get("definition"), str):
            description += f"\n\nThe input matches this grammar:\n{grammar['definition']}"
    parameters = {
        "type": "object",
        "properties": {FREE_TEXT: {"type": "string"}},
        "required": [FREE_TEXT],
    }
    path = tool.path_of("format")
    return Tool(_name_of(tool), description, parameters, is_free_text=True, path=path)


def _name_of(tool: Members) -> str:
    if not _TOOL_NAME.fullmatch(name := tool.text("name")):
        message = f"'{tool.path}.name' must be 1 to 128 letters, digits, and any of _-.:"
        raise bad_request(message, tool.path_of("name"))
    return name


def free_text(arguments: str) -> str:
    """The text in the arguments of a call with free text."""
    with suppress(ValueError):
        value = orjson.loads(arguments)
        if isinstance(value, dict) and isinstance(text := value.get(FREE_TEXT), str):
            return text
    return arguments


ReadTools = Callable[[Members], Iterable[Tool]]


def array_of(kinds: Kinds, default: str | None = "function", word: str = "tools") -> Reader:
    """The reader of an array of tools, each of a name of its own; `default` is the usual type."""

    def read_all(value: Any, param: str) -> tuple[Tool, ...]:
        items = array(value, param)
        tools = [tool for i, item in enumerate(items) for tool in read(item, f"{param}[{i}]")]
        if max(len(items), len(tools)) > MAX_TOOLS:
            raise bad_request(f"'{param}' may hold at most {MAX_TOOLS} {word}.", param)
        if len({tool.name for tool in tools}) < len(tools):
            raise bad_request(f"'{param}' holds two tools of one name.", param)
        return tuple(tools)

    def read(item: Any, param: str) -> Iterable[Tool]:
        tools = read_tool(kinds, members(item, param), default)
        shallow(item, param, _MAX_TOOL_DEPTH)  # unknown members too: Responses repeat all of it
        return tools

    return read_all


def read_tool(kinds: Kinds, tool: Members, default: str | None = "function") -> Iterable[Tool]:
    """The functions of one tool; a tool that its vendor alone can run is left out by name."""
    type_ = tool.get("type")
    name = text(default if type_ is None else type_, tool.path_of("type"))
    kind = kinds.get(name, kinds["*"])
    if kind.read is not None:
        return list(kind.read(tool))
    leave_out(tool.path, truncate(name))
    return ()


def merged(tools: Iterable[Tool]) -> tuple[Tool, ...]:
    """Tools that are added later, in place of earlier ones of the same name."""
    return tuple({tool.name: tool for tool in tools}.values())


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

    `choice` is "auto", "none", "required", {"name": …} or {"allowed": names, "mode": "auto" or
    "required"}, from the field `param`. Raises APIError 400 where it fits no tool.
    """

    tools: tuple[Tool, ...] = ()
    choice: Any = "auto"
    is_parallel: bool = True
    param: str = "tool_choice"

    def __post_init__(self) -> None:
        if self.is_forced and not self.tools:
            raise bad_request(f"'{self.param}' needs 'tools'.", self.param)
        if self.is_forced and not self.callable:
            name = truncate(self.choice.get("name") or ", ".join(self.choice["allowed"]))
            raise bad_request(f"there is no tool {name!r} in 'tools'.", self.param)

    @property
    def is_forced(self) -> bool:
        mode = self.choice.get("mode") if isinstance(self.choice, dict) else self.choice
        return mode not in ("auto", "none")

    @property
    def callable(self) -> tuple[Tool, ...]:
        if self.choice == "none":
            return ()
        if isinstance(self.choice, dict):
            names = self.choice.get("allowed") or (self.choice.get("name"),)
            return tuple(tool for tool in self.tools if tool.name in names)
        return self.tools

    @property
    def max_calls(self) -> int | None:
        return None if self.is_parallel else 1

    def constraints(self, formats: list[tuple[Constraint, str]]) -> list[tuple[Constraint, str]]:
        """What an answer must match and the field it is from; `formats` are those of its text.

        Where tools may be called it is calls, or a text that matches; of forced calls there is no
        text.
        """
        tools = self.callable
        strict = tuple(tool.strict_path for tool in tools if tool.is_strict)
        if len(formats) > 1 or not tools or not (self.is_forced or formats or strict):
            return formats
        schemas = tuple(tool.schema(is_strict=self.is_forced or tool.is_strict) for tool in tools)
        is_named = isinstance(self.choice, dict) and "name" in self.choice
        calls = CallConstraint(schemas, not self.is_parallel or is_named, self.is_forced)
        if self.is_forced:
            return [(calls, self.param)]
        answer, param = formats[0] if formats else (None, "tools")
        assert answer is None or isinstance(answer, TextConstraint)
        return [(replace(calls, answer=answer, strict=strict), param)]


def _function(tool: Members) -> Iterable[Tool]:
    """In the form of chats, or of Responses, which has no member `function`."""
    if tool.get("function") is None and tool.get("name") is not None:
        return (function_of(tool.values, tool.path),)
    return (function_of(tool.get("function"), tool.path_of("function")),)


def _custom(tool: Members) -> Iterable[Tool]:
    return (free_text_of(tool if tool.get("custom") is None else tool.read("custom", members)),)


READ_FUNCTION: Final = Kind(Use.SUPPORTED, "a function", _function)
READ_FREE_TEXT: Final = Kind(Use.SUPPORTED, "free text; its `format` is a hint", _custom)


VENDORS_ONLY: Final = Kind(Use.HINT, "what its vendor alone runs")
CHAT_TOOLS: Final[Kinds] = {
    "function": READ_FUNCTION,
    "custom": READ_FREE_TEXT,
    "*": VENDORS_ONLY,
}
_FUNCTIONS: Final[Kinds] = {
    "*": Kind(Use.SUPPORTED, "", lambda tool: (function_of(tool.values, tool.path),))
}
tool_list = array_of(CHAT_TOOLS)
function_list = array_of(_FUNCTIONS, word="functions")


def tool_choice(value: Any, param: str) -> Any:
    """Of chats; a name is in the member that the choice's type names."""
    if value in ("none", "auto", "required"):
        return value
    choice = members(value, param)
    if choice.get("type") == "allowed_tools":
        return allowed_tools(choice.read("allowed_tools", members), _chosen_name)
    return {"name": _chosen_name(choice)}


def _chosen_name(choice: Members) -> str:
    inner = choice.get("function") or choice.get("custom") or choice.values
    return members(inner, choice.path).text("name")


def allowed_tools(choice: Members, name_of: Callable[[Members], str]) -> dict[str, Any]:
    """OpenAI's choice among some of the tools."""
    mode = choice.read("mode", one_of("auto", "required"))
    path = choice.path_of("tools")
    tools = enumerate(array(choice.get("tools"), path))
    names = tuple(name_of(members(tool, f"{path}[{i}]")) for i, tool in tools)
    return {"allowed": names, "mode": mode}
