"""What an answer may and must be: the functions to call, the schema or grammar to match. Pure."""

from collections.abc import Mapping
from typing import Any

import orjson

from mlxlite.api.conversation import Tool, array_of, function_of
from mlxlite.api.fields import json_object, parse, shallow, text, wrong
from mlxlite.http.errors import APIError, Cause, bad, clip
from mlxlite.output.grammar import Constraint, Kind

CONSTRAINTS = (
    *("response_format", "structured_outputs", "json_schema", "grammar"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
)


def tools_of(read: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The tools that may be called. Raises APIError 400."""
    for name, old in (("tools", "functions"), ("tool_choice", "function_call")):
        if name in read and old in read and read[name] != read[old]:
            raise bad(f"'{old}' and its newer form '{name}' disagree.", old)
    tools: tuple[Tool, ...] = read.get("tools") or read.get("functions") or ()
    choice, name = _choice(read)
    if choice == "none":
        return ()
    if choice not in ("auto", None) and not tools:
        raise bad(f"'{name}' needs 'tools'.", name)
    if isinstance(choice, dict):
        tools = tuple(tool for tool in tools if tool.name == choice["name"])
        if not tools:
            raise bad(f"there is no tool {clip(choice['name'])!r} in 'tools'.", name)
    return tools


def _choice(read: Mapping[str, Any]) -> tuple[Any, str]:
    name = "tool_choice" if "tool_choice" in read else "function_call"
    return read.get(name), name


def constraint_of(read: Mapping[str, Any]) -> tuple[Constraint, str] | None:
    """What the answer must match, and the field that says so. Raises APIError 400."""
    given = [(read[name], name) for name in CONSTRAINTS if read.get(name) is not None]
    tools = tools_of(read)
    choice, name = _choice(read)
    if choice not in ("auto", "none", None):
        is_single = read.get("parallel_tool_calls") is False or isinstance(choice, dict)
        given.append((_calls(tools, is_single=is_single, is_auto=False), name))
    elif any(tool.is_strict for tool in tools):
        is_single = read.get("parallel_tool_calls") is False
        given.append((_calls(tools, is_single=is_single, is_auto=True), "tools"))
    if len(given) > 1:
        names = " and ".join(f"'{name}'" for _, name in given)
        raise bad(f"{names} exclude each other.", given[1][1])
    for other in ("ignore_eos", "min_tokens"):
        if given and read.get(other):
            raise bad(f"'{other}' cannot be had with '{given[0][1]}'.", other)
    return given[0] if given else None


def _calls(tools: tuple[Tool, ...], *, is_single: bool, is_auto: bool) -> Constraint:
    """What calls of these tools look like. Not `is_auto`: and that there must be one."""
    listed = [
        {
            "name": tool.name,
            "parameters": tool.parameters if tool.is_strict or not is_auto else {"type": "object"},
        }
        for tool in tools
    ]
    text = {"tools": listed, "is_single": is_single, "is_auto": is_auto}
    return Constraint(Kind.TOOLS, orjson.dumps(text).decode())


def response_format(value: Any, param: str) -> Constraint | None:
    """OpenAI's: text, json_object (llama-server: with a schema) or json_schema."""
    wanted = json_object(value, param)
    match wanted.get("type"):
        case "text":
            return None
        case "json_object":
            schema = json_object(wanted.get("schema") or {"type": "object"}, f"{param}.schema")
            return json_schema(schema, f"{param}.schema")
        case "json_schema":
            inner = json_object(wanted.get("json_schema"), f"{param}.json_schema")
            return json_schema(inner.get("schema"), f"{param}.json_schema.schema")
    raise bad(f"'{param}.type' must be text, json_object or json_schema.", f"{param}.type")


def json_schema(value: Any, param: str) -> Constraint:
    """A schema, as an object or as text."""
    if isinstance(value, str):
        try:
            value = parse(value.encode())
        except ValueError:
            raise bad(f"'{param}' is no JSON, or of too many values.", param) from None
    return Constraint(Kind.JSON, orjson.dumps(shallow(value, param)).decode())


def regex(value: Any, param: str) -> Constraint:
    return Constraint(Kind.REGEX, _filled(value, param))


def grammar(value: Any, param: str) -> Constraint:
    return Constraint(Kind.GRAMMAR, _filled(value, param))


def choice(value: Any, param: str) -> Constraint:
    if not isinstance(value, list) or not value:
        raise wrong(param, "an array of strings", value)
    options = [text(item, f"{param}[{i}]") for i, item in enumerate(value)]
    return Constraint(Kind.CHOICE, orjson.dumps(options).decode())


def structured_outputs(value: Any, param: str) -> Constraint | None:
    """vLLM's: one of json, regex, choice and grammar."""
    given = {k: v for k, v in json_object(value, param).items() if v is not None}
    readers = {"json": json_schema, "regex": regex, "choice": choice, "grammar": grammar}
    for name in given:
        if name not in readers:
            message = f"'{param}.{clip(name)}' is not supported by this server."
            raise APIError(Cause.UNSUPPORTED, message, param=f"{param}.{clip(name)}")
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
        message = f"tools of type {shown!r} are not supported."
        raise APIError(Cause.UNSUPPORTED, message, param=param)
    return function_of(tool.get("function"), f"{param}.function")


tool_list = array_of(_tool)
function_list = array_of(function_of, "functions")


def tool_choice(value: Any, param: str) -> Any:
    """A word, or the name of a function."""
    if value in ("none", "auto", "required"):
        return value
    choice = json_object(value, param)
    function = choice.get("function", choice)
    return {"name": text(json_object(function, param).get("name"), f"{param}.name")}
