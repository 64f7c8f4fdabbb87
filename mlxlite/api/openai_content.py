"""Messages in OpenAI's chat form: JSON to `Message`. Pure."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from mlxlite.api import readers
from mlxlite.api.content_parts import content_of, parts_in
from mlxlite.api.conversation import IMAGE_ROLES, Message, Role, ToolCall, message_list, turn
from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import Members
from mlxlite.api.tools import FREE_TEXT
from mlxlite.http.errors import APIError, bad_request


def role_of(value: Any, param: str, *roles: Role) -> Role:
    # Role(value) would quote the value, at any depth.
    return Role(readers.one_of(*(role.value for role in roles))(value, param))


def _messages(value: Any, param: str, *, is_last: bool) -> Iterator[Message]:
    fields = {k: item for k, item in readers.json_object(value, param).items() if item is not None}
    given = Members(fields, param)
    role, content = role_of(given.get("role"), f"{param}.role", *Role), given.get("content")
    is_asked = role.is_instruction or (role is Role.USER and is_last)
    if content is None and is_asked:
        raise bad_request(f"'{param}.content' is required.", f"{param}.content")
    thoughts: list[str] = []
    parts = parts_in(
        content_of(
            content, f"{param}.content", is_asked=is_asked, has_pictures=role in IMAGE_ROLES
        ),
        thoughts,
    )
    message, calls = turn(role, parts), _tool_calls(given)
    if role is not Role.ASSISTANT and calls:
        leave_out(f"{param}.tool_calls")
        calls = ()
    has_content = content is not None or role is not Role.ASSISTANT
    yield replace(
        message,
        content=message.content if has_content else None,
        name=_optional(given, "name"),
        reasoning=_reasoning(given) or "\n".join(thoughts) or None,
        tool_calls=calls,
        tool_call_id=_optional(given, "tool_call_id"),
    )


messages_of: Final = message_list(_messages)


def _optional(given: Members, name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        leave_out(given.path_of(name))
        return None
    return value


def _reasoning(given: Members) -> str | None:
    """In the words of vLLM, llama-server and OpenRouter."""
    if text := _optional(given, "reasoning_content") or _optional(given, "reasoning"):
        return text
    if given.get("reasoning_details") is None:
        return None
    path = given.path_of("reasoning_details")
    details = content_of(given.get("reasoning_details"), path, is_asked=False)
    return "\n".join(part for part in details if isinstance(part, str)) or None


def _tool_calls(given: Members) -> tuple[ToolCall, ...]:
    """The calls of a history; one that cannot be read is left out."""
    values, path = given.get("tool_calls"), given.path_of("tool_calls")
    if values is not None and not isinstance(values, list):
        leave_out(path)
        values = None
    items = [(value, f"{path}[{i}]") for i, value in enumerate(values or ())]
    if given.get("function_call") is not None:  # OpenAI's older form of tool_calls
        items.append(({"function": given.get("function_call")}, given.path_of("function_call")))
    calls: list[ToolCall] = []
    for value, param in items:
        try:
            calls.append(_tool_call(value, param))
        except APIError:
            leave_out(param)
    return tuple(calls)


def _tool_call(value: Any, param: str) -> ToolCall:
    call = readers.members(value, param)
    if call.get("custom") is not None:  # a call with free text
        custom: Members = call.read("custom", readers.members)
        arguments: Any = {FREE_TEXT: custom.text("input", "")}
        return ToolCall(call.text("id", ""), custom.text("name"), arguments)
    function: Members = call.read("function", readers.members)
    arguments = arguments_of(function.get("arguments"))
    return ToolCall(call.text("id", ""), function.text("name"), arguments)


def arguments_of(value: Any) -> Any:
    """A call's arguments, parsed; text that is no object, a call that a model has broken, stays."""
    if isinstance(value, str):
        with suppress(ValueError):
            parsed = readers.parse(value.encode())
            value = parsed if isinstance(parsed, dict) else value
    return value or {}
