"""Messages of a chat: records of turns, and their form for chat templates. Pure.

Decides what a message may hold: a role, text, pictures, reasoning, calls and their results, and the
roles of messages with pictures (`IMAGE_ROLES`). All dialects read `Message`s; what a part becomes
is in `content_parts`.

A message without pictures is its text, and has no `parts`. Tested.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import Any, Final, Protocol, TypeAlias

from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import Reader, array
from mlxlite.http.errors import APIError, bad_request
from mlxlite.vision.images import Source

Part: TypeAlias = str | Source
# Claude Code's first line, different in each request: no prefix would ever be found again.
_BILLING = re.compile(r"\A(?:x-anthropic-billing-header:[^\n]*(?:\n|\Z))+\n*", re.IGNORECASE)


class Role(Enum):
    """The author. DEVELOPER is OpenAI's newer word for SYSTEM, FUNCTION its older one for TOOL."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    FUNCTION = "function"

    @property
    def is_instruction(self) -> bool:
        return self in (Role.SYSTEM, Role.DEVELOPER)

    @property
    def is_result(self) -> bool:
        return self in (Role.TOOL, Role.FUNCTION)


_TEMPLATE_ROLES: Final = {Role.DEVELOPER: Role.SYSTEM, Role.FUNCTION: Role.TOOL}
IMAGE_ROLES: Final = (Role.USER, Role.TOOL, Role.FUNCTION)  # the only ones in templates


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool: in a history with the parsed arguments, else with their JSON text."""

    id: str
    name: str
    arguments: Any

    def as_json(self) -> dict[str, Any]:
        """OpenAI's form, which chat templates read too."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` None is an assistant's turn of tool calls alone.

    With pictures, `parts` are these and the text in order, and `content` is the text alone.
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

    def without(self, stand_ins: Mapping[int, str]) -> "Message":
        """The same message with sentences in place of pictures, by the `id` of their sources."""
        if not self.parts:
            return self
        parts = turn(self.role, (stand_ins.get(id(part), part) for part in self.parts))
        return replace(self, content=parts.content, parts=parts.parts)

    @property
    def num_bytes(self) -> int:
        """The size of its pictures and of all text, at any depth of a call's arguments."""
        total = 0
        left: list[Any] = [self.content, self.reasoning, self.name, self.tool_call_id, *self.parts]
        for call in self.tool_calls:
            left += (call.id, call.name, call.arguments)
        while left:
            match left.pop():
                case str(text):
                    total += len(text.encode())
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
        """The dict that chat templates read."""
        role, content = _TEMPLATE_ROLES.get(self.role, self.role), self.content or ""
        if role is Role.SYSTEM:
            content = _BILLING.sub("", content)
        message: dict[str, Any] = {"role": role.value, "content": content}
        if self.parts:
            message["content"] = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in self.parts
            ]
        optional = {
            "name": self.name,
            "reasoning_content": self.reasoning,
            "tool_calls": [call.as_json() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
        }
        return message | {name: value for name, value in optional.items() if value is not None}


def turn(role: Role, parts: Iterable[Part], **rest: Any) -> Message:
    """A message of parts; adjacent texts are joined by newlines."""
    given = list(parts)
    content = "\n".join(part for part in given if isinstance(part, str))
    joined: list[Part] = []
    for kind, run in groupby(given, type):
        touching = list(run)
        joined += ["\n".join(map(str, touching))] if kind is str else touching
    has_pictures = any(isinstance(part, Source) for part in given)
    return Message(role, content, **rest, parts=tuple(joined) if has_pictures else ())


class ReadMessages(Protocol):
    """Reads one item; `is_last`: the user asks with it, see `asked_index`."""

    def __call__(self, value: Any, param: str, *, is_last: bool) -> Iterable[Any]: ...


def message_list(read: ReadMessages) -> Reader:
    """The reader of an array whose items have messages, and perhaps tools.

    One before the assistant's last that cannot be read is left out.
    """

    def read_all(value: Any, param: str) -> tuple[Any, ...]:
        if not array(value, param):
            raise bad_request(f"'{param}' must hold at least one message.", param)
        answered, found = last_index(value, is_by_assistant), list[Any]()
        asked = asked_index(value, is_by_assistant, has_result)
        for i, item in enumerate(value):
            try:
                found += read(item, f"{param}[{i}]", is_last=i == asked)
            except APIError:
                if i > answered or is_instruction(item):
                    raise
                leave_out(f"{param}[{i}]")
        return tuple(found)

    return read_all


IsMeant = Callable[[Mapping[str, Any]], bool]


def asked_index(items: Sequence[Any], is_answer: IsMeant, is_result: IsMeant) -> int:
    """The index of the message with which the user asks, -1 without one: the user's last, where
    it comes after all answers, and neither has a tool's result nor is next after one. There
    clients put the pictures and files of results; what was refused before is in earlier ones.
    """
    last = last_index(items, lambda item: item.get("role") == Role.USER.value)
    beside = (
        isinstance(one, dict) and is_result(one) for one in items[max(0, last - 1) : last + 1]
    )
    return -1 if last < last_index(items, is_answer) or any(beside) else last


def has_result(item: Mapping[str, Any]) -> bool:
    """Whether it is a tool's result, or holds one as Anthropic's messages do."""
    blocks = content if isinstance(content := item.get("content"), list) else ()
    types = (block.get("type") for block in blocks if isinstance(block, dict))
    return item.get("role") in (Role.TOOL.value, Role.FUNCTION.value) or "tool_result" in types


def is_by_assistant(item: Mapping[str, Any]) -> bool:
    return item.get("role") == Role.ASSISTANT.value


def is_instruction(item: Any) -> bool:
    """Whether it is a message that a history may not lose: the answer would be another."""
    roles = (Role.SYSTEM.value, Role.DEVELOPER.value)
    return isinstance(item, dict) and item.get("role") in roles


def last_index(items: Sequence[Any], is_meant: IsMeant) -> int:
    """The index of the last object that is meant, -1 without one."""
    indices = range(len(items) - 1, -1, -1)
    return next((i for i in indices if isinstance(items[i], dict) and is_meant(items[i])), -1)
