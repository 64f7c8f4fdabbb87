"""Messages of a chat: JSON to turns, and turns to what a chat template reads. Pure.

Decides what a message may hold: a role, text or its parts, thoughts, calls and their results. It
never drops what it does not know in silence: a part or a role it cannot read is a 400 that names
its place. Other dialects make the same `Message` of their own words.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson

from mlxlite.api import bad, clip
from mlxlite.fields import json_object, text, wrong

# Claude Code's first line, different in each request: no prefix would ever be found again.
_BILLING = re.compile(r"\A(?:x-anthropic-billing-header:[^\n]*(?:\n|\Z))+\n*", re.IGNORECASE)


class Role(Enum):
    """Who speaks. DEVELOPER is OpenAI's newer word for SYSTEM, FUNCTION its older one for TOOL."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in the history. `arguments` is the parsed object, or the text if it is none."""

    id: str
    name: str
    arguments: Any

    def as_template(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` None is an assistant's turn that only called tools."""

    role: Role
    content: str | None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def as_template(self) -> dict[str, Any]:
        """The dict that chat templates read; templates know neither developer nor function."""
        roles = {Role.DEVELOPER: Role.SYSTEM, Role.FUNCTION: Role.TOOL}
        role, content = roles.get(self.role, self.role), self.content or ""
        if role is Role.SYSTEM:
            content = _BILLING.sub("", content)
        message: dict[str, Any] = {"role": role.value, "content": content}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


# --- readers ----------------------------------------------------------------------------------


def messages_of(value: Any, param: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array", value)
    if not value:
        raise bad(f"'{param}' must hold at least one message.", param)
    return tuple(_message(item, f"{param}[{i}]") for i, item in enumerate(value))


def _message(value: Any, param: str) -> Message:
    fields = {name: item for name, item in json_object(value, param).items() if item is not None}
    roles = ", ".join(role.value for role in Role)
    try:
        role = Role(fields.get("role"))
    except ValueError:
        raise bad(f"'{param}.role' must be one of {roles}.", f"{param}.role") from None
    content = _content(fields.get("content"), f"{param}.content")
    tool_calls = _tool_calls(fields.get("tool_calls", []), f"{param}.tool_calls")
    if "function_call" in fields:  # what tool_calls were before
        old_call = {"function": fields["function_call"]}
        tool_calls += (_tool_call(old_call, f"{param}.function_call"),)
    if role is not Role.ASSISTANT:
        if tool_calls:
            raise bad(f"only an assistant's message has '{param}.tool_calls'.", param)
        if content is None:
            raise bad(f"'{param}.content' is required.", f"{param}.content")

    def given(name: str) -> str | None:
        return text(fields[name], f"{param}.{name}") if name in fields else None

    return Message(
        role,
        content,
        name=given("name"),
        reasoning=given("reasoning_content") or given("reasoning"),
        tool_calls=tool_calls,
        tool_call_id=given("tool_call_id"),
    )


def _content(value: Any, param: str) -> str | None:
    """A string, null, or an array of text parts, which are joined by newlines."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(param, "a string or an array of parts", value)
    return "\n".join(_part(item, f"{param}[{i}]") for i, item in enumerate(value))


def _part(value: Any, param: str) -> str:
    part = json_object(value, param)
    match part.get("type"):
        case "text" | "input_text" | "output_text":
            return text(part.get("text"), f"{param}.text")
        case "refusal":
            return text(part.get("refusal"), f"{param}.refusal")
        case str(kind):
            raise bad(f"content parts of type {clip(kind)!r} are not supported.", f"{param}.type")
    raise bad(f"'{param}.type' must be a string.", f"{param}.type")


def _tool_calls(value: Any, param: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array", value)
    return tuple(_tool_call(item, f"{param}[{i}]") for i, item in enumerate(value))


def _tool_call(value: Any, param: str) -> ToolCall:
    call = json_object(value, param)
    function = json_object(call.get("function"), f"{param}.function")
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str | dict):
        raise wrong(f"{param}.function.arguments", "a string or an object", arguments)
    if isinstance(arguments, str):
        with suppress(orjson.JSONDecodeError):  # a model's own broken call stays text
            value = orjson.loads(arguments)
            arguments = value if isinstance(value, dict) else arguments
    name = text(function.get("name"), f"{param}.function.name")
    return ToolCall(text(call.get("id") or "", f"{param}.id"), name, arguments)
