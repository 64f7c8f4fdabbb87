"""Messages and content parts in OpenAI's forms: JSON to `Message`. Pure."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

from mlxlite.api import readers
from mlxlite.api.conversation import _ROLES, SHOWS, Message, Part, Role, ToolCall, bounded, turn
from mlxlite.http.errors import APIError, Cause, bad, clip
from mlxlite.vision.images import DETAILS, ImageError, Source, source_of


@contextmanager
def image_errors() -> Iterator[None]:
    """An image that cannot be used is the client's mistake: APIError 400."""
    try:
        yield
    except ImageError as error:
        raise bad(str(error), error.param) from error


# --- readers ----------------------------------------------------------------------------------


def messages_of(value: Any, param: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise readers.wrong(param, "an array", value)
    if not value:
        raise bad(f"'{param}' must hold at least one message.", param)
    return tuple(bounded(_message(item, f"{param}[{i}]") for i, item in enumerate(value)))


def _message(value: Any, param: str) -> Message:
    fields = {
        name: item for name, item in readers.json_object(value, param).items() if item is not None
    }
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
        return readers.text(fields[name], f"{param}.{name}") if name in fields else None

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
        raise readers.wrong(param, "a string or an array of parts", value)


def _part(value: Any, param: str, *, may_show: bool) -> Part:
    part = readers.json_object(value, param)
    match part.get("type"):
        case "image_url" | "input_image" if not may_show:
            message = "only messages of users and tools may hold pictures."
            raise APIError(Cause.UNSUPPORTED, message, param=f"{param}.type")
        case "image_url":
            return _image_url(part.get("image_url"), f"{param}.image_url")
        case "input_image":
            return input_image(part, param)
        case "text" | "input_text" | "output_text":
            return readers.text(part.get("text"), f"{param}.text")
        case "refusal":
            return readers.text(part.get("refusal"), f"{param}.refusal")
        case str(kind):
            raise bad(f"content parts of type {clip(kind)!r} are not supported.", f"{param}.type")
    raise bad(f"'{param}.type' must be a string.", f"{param}.type")


def _image_url(value: Any, param: str) -> Source:
    """A chat's: an object, or the URL alone."""
    if isinstance(value, str):
        with image_errors():
            return source_of(value, param)
    if not isinstance(value, dict):
        raise readers.wrong(param, "a string or an object", value)
    detail = _detail(value.get("detail"), f"{param}.detail")
    url = readers.text(value.get("url"), f"{param}.url")
    with image_errors():
        return source_of(url, param, detail)


def input_image(part: Mapping[str, Any], param: str) -> Source:
    """The form of Responses, which chats take too. Raises APIError 400."""
    if part.get("file_id") is not None:
        message = f"'{param}.file_id' is not supported: no files are kept here."
        raise APIError(Cause.UNSUPPORTED, message, param=f"{param}.file_id")
    detail = _detail(part.get("detail"), f"{param}.detail")
    param = f"{param}.image_url"
    url = readers.text(part.get("image_url"), param)
    with image_errors():
        return source_of(url, param, detail)


def _detail(value: Any, param: str) -> str:
    if value not in (None, *DETAILS):
        raise bad(f"'{param}' must be one of {', '.join(DETAILS)}.", param)
    return "auto" if value is None else str(value)


def _tool_calls(value: Any, param: str) -> tuple[ToolCall, ...]:
    if not isinstance(value, list):
        raise readers.wrong(param, "an array", value)
    return tuple(_tool_call(item, f"{param}[{i}]") for i, item in enumerate(value))


def _tool_call(value: Any, param: str) -> ToolCall:
    call = readers.json_object(value, param)
    function = readers.json_object(call.get("function"), f"{param}.function")
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str | dict):
        raise readers.wrong(f"{param}.function.arguments", "a string or an object", arguments)
    if isinstance(arguments, str):
        with suppress(ValueError):  # a model's own broken call stays text
            value = readers.parse(arguments.encode())
            arguments = value if isinstance(value, dict) else arguments
    name = readers.text(function.get("name"), f"{param}.function.name")
    return ToolCall(readers.text(call.get("id") or "", f"{param}.id"), name, arguments)


NO_PICTURES: Final[Mapping[str, readers.Reader]] = {}
_TEXT_PARTS: Final = {  # type → where its text is
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "reasoning_text": "text",
    "refusal": "refusal",
}


def said_of(
    value: Any, param: str, pictures: Mapping[str, readers.Reader] = NO_PICTURES
) -> Iterator[Part]:
    """A string, or parts of text, and of the pictures that there may be: type → its reader."""
    if isinstance(value, str):
        yield value
        return
    for kind, part, name in readers.parts(value, param):
        if (read := pictures.get(kind)) is not None:
            yield read(part, name)
        elif (key := _TEXT_PARTS.get(kind)) is not None:
            yield readers.text(part.get(key), f"{name}.{key}")
        else:
            raise readers.unsupported_type(kind, name)


def texts_of(value: Any, param: str) -> str:
    """A string, or text parts, joined by newlines as a chat's are."""
    return "\n".join(map(str, said_of(value, param)))


def role_of(value: Any, param: str, *roles: Role) -> Role:
    return Role(readers.one_of(*(role.value for role in roles))(value, param))
