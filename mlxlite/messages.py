"""Messages of a chat: JSON to turns, and turns to what a chat template reads. Pure.

Decides what a message may hold: a role, text, pictures, thoughts, calls and their results, and who
may show pictures (`SHOWS`). It never drops what it does not know in silence: a part or a role that
it cannot read is a 400 that names its place. Other dialects make the same `Message` of their words.

A message without pictures is its text, and has no `parts`. Tested.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Any, Final, TypeAlias

from mlxlite.api import APIError, Cause, bad, clip
from mlxlite.fields import json_object, parse, text, wrong
from mlxlite.media import DETAILS, MAX_PICTURES, Source, source_of

Part: TypeAlias = str | Source

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


_ROLES: Final = tuple(role.value for role in Role)
SHOWS: Final = (Role.USER, Role.TOOL, Role.FUNCTION)  # templates have no pictures of others


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
    """One turn. `content` None is an assistant's turn that only called tools.

    With pictures, `parts` are they and the text in their order, and `content` is the text alone.
    """

    role: Role
    content: str | None
    name: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    parts: tuple[Part, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(part for part in self.parts if isinstance(part, Source))

    @property
    def num_bytes(self) -> int:
        """Of all that is kept of it: pictures, and text at any depth of a call's arguments."""
        total = 0
        left: list[Any] = [self.content, self.reasoning, self.name, self.tool_call_id, *self.parts]
        for call in self.tool_calls:
            left += (call.id, call.name, call.arguments)
        while left:
            match left.pop():
                case str(said):
                    total += len(said.encode())
                case Source(data, url, param):
                    total += len(data or b"")
                    left += (url, param)
                case dict(values):
                    left += values
                    left += values.values()
                case list(values):
                    left += values
        return total

    def as_template(self) -> dict[str, Any]:
        """The dict that chat templates read; templates know neither developer nor function."""
        roles = {Role.DEVELOPER: Role.SYSTEM, Role.FUNCTION: Role.TOOL}
        role, content = roles.get(self.role, self.role), self.content or ""
        if role is Role.SYSTEM:
            content = _BILLING.sub("", content)
        message: dict[str, Any] = {"role": role.value, "content": content}
        if self.parts:
            message["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in self.parts
            ]
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.as_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def turn(role: Role, parts: Iterable[Part], **rest: Any) -> Message:
    """A message of parts; texts that touch are joined by newlines. Raises APIError 400."""
    given = list(_counted(parts))
    content = "\n".join(part for part in given if isinstance(part, str))
    joined: list[Part] = []
    for kind, run in groupby(given, type):
        touching = list(run)
        joined += ["\n".join(map(str, touching))] if kind is str else touching
    has_pictures = any(isinstance(part, Source) for part in given)
    return Message(role, content, **rest, parts=tuple(joined) if has_pictures else ())


def _counted(parts: Iterable[Part], num_before: int = 0) -> Iterator[Part]:
    """The same parts, as long as there are no more pictures than a request may have."""
    for part in parts:
        num_before += isinstance(part, Source)
        if isinstance(part, Source) and num_before > MAX_PICTURES:
            raise bad(f"a request may hold at most {MAX_PICTURES} pictures.", part.param)
        yield part


def bounded(messages: Iterable[Message]) -> Iterator[Message]:
    """The same messages, as long as there are not too many pictures. Raises APIError 400."""
    num_seen = 0
    for message in messages:
        num_seen += sum(1 for _ in _counted(message.sources, num_seen))
        yield message


# --- readers ----------------------------------------------------------------------------------


def messages_of(value: Any, param: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise wrong(param, "an array", value)
    if not value:
        raise bad(f"'{param}' must hold at least one message.", param)
    return tuple(bounded(_message(item, f"{param}[{i}]") for i, item in enumerate(value)))


def _message(value: Any, param: str) -> Message:
    fields = {name: item for name, item in json_object(value, param).items() if item is not None}
    if (given_role := fields.get("role")) not in _ROLES:  # Role() would quote it, at any depth
        raise bad(f"'{param}.role' must be one of {', '.join(_ROLES)}.", f"{param}.role")
    role = Role(given_role)
    content = fields.get("content")
    said = turn(role, _parts(content, f"{param}.content", may_show=role in SHOWS))
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

    return replace(
        said,
        content=None if content is None else said.content,
        name=given("name"),
        reasoning=given("reasoning_content") or given("reasoning"),
        tool_calls=tool_calls,
        tool_call_id=given("tool_call_id"),
    )


def _parts(value: Any, param: str, *, may_show: bool) -> Iterator[Part]:
    """Of a string, null, or an array of parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield _part(item, f"{param}[{i}]", may_show=may_show)
    elif value is not None:
        raise wrong(param, "a string or an array of parts", value)


def _part(value: Any, param: str, *, may_show: bool) -> Part:
    part = json_object(value, param)
    match part.get("type"):
        case "image_url" | "input_image" if not may_show:
            message = "only messages of users and tools may hold pictures."
            raise APIError(Cause.UNSUPPORTED, message, param=f"{param}.type")
        case "image_url":
            return _image_url(part.get("image_url"), f"{param}.image_url")
        case "input_image":
            return input_image(part, param)
        case "text" | "input_text" | "output_text":
            return text(part.get("text"), f"{param}.text")
        case "refusal":
            return text(part.get("refusal"), f"{param}.refusal")
        case str(kind):
            raise bad(f"content parts of type {clip(kind)!r} are not supported.", f"{param}.type")
    raise bad(f"'{param}.type' must be a string.", f"{param}.type")


def _image_url(value: Any, param: str) -> Source:
    """A chat's: an object, or the URL alone."""
    if isinstance(value, str):
        return source_of(value, param)
    if not isinstance(value, dict):
        raise wrong(param, "a string or an object", value)
    detail = _detail(value.get("detail"), f"{param}.detail")
    return source_of(text(value.get("url"), f"{param}.url"), param, detail)


def input_image(part: Mapping[str, Any], param: str) -> Source:
    """The form of Responses, which chats take too. Raises APIError 400."""
    if part.get("file_id") is not None:
        message = f"'{param}.file_id' is not supported: no files are kept here."
        raise APIError(Cause.UNSUPPORTED, message, param=f"{param}.file_id")
    detail = _detail(part.get("detail"), f"{param}.detail")
    return source_of(part.get("image_url"), f"{param}.image_url", detail)


def _detail(value: Any, param: str) -> str:
    if value not in (None, *DETAILS):
        raise bad(f"'{param}' must be one of {', '.join(DETAILS)}.", param)
    return "auto" if value is None else str(value)


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
        with suppress(ValueError):  # a model's own broken call stays text
            value = parse(arguments.encode())
            arguments = value if isinstance(value, dict) else arguments
    name = text(function.get("name"), f"{param}.function.name")
    return ToolCall(text(call.get("id") or "", f"{param}.id"), name, arguments)
