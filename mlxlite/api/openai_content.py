"""Messages and content parts in OpenAI's forms: JSON to `Message`. Pure."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final

from mlxlite.api import readers
from mlxlite.api.conversation import IMAGE_ROLES, Message, Part, Role, ToolCall, message_list, turn
from mlxlite.api.readers import Members
from mlxlite.http.errors import bad_request, not_supported, truncate
from mlxlite.vision.images import DETAILS, ImageError, Source, source_of


@contextmanager
def image_errors() -> Iterator[None]:
    """An image that cannot be used is the client's mistake: APIError 400."""
    try:
        yield
    except ImageError as error:
        raise bad_request(str(error), error.param) from error


def role_of(value: Any, param: str, *roles: Role) -> Role:
    # Role(value) would quote the value, at any depth.
    return Role(readers.one_of(*(role.value for role in roles))(value, param))


def _messages(value: Any, param: str) -> Iterator[Message]:
    fields = {k: item for k, item in readers.json_object(value, param).items() if item is not None}
    given = Members(fields, param)
    role, content = role_of(given.get("role"), f"{param}.role", *Role), given.get("content")
    message = turn(role, _parts(content, f"{param}.content", has_pictures=role in IMAGE_ROLES))
    calls = readers.array(fields.get("tool_calls", []), f"{param}.tool_calls")
    tool_calls = [_tool_call(item, f"{param}.tool_calls[{i}]") for i, item in enumerate(calls)]
    if "function_call" in fields:  # OpenAI's older form of tool_calls
        old_call = {"function": fields["function_call"]}
        tool_calls.append(_tool_call(old_call, f"{param}.function_call"))
    if role is not Role.ASSISTANT:
        if tool_calls:
            raise bad_request(f"only an assistant's message has '{param}.tool_calls'.", param)
        if content is None:
            raise bad_request(f"'{param}.content' is required.", f"{param}.content")

    def optional(name: str) -> str | None:
        return given.text(name) if name in fields else None

    yield replace(
        message,
        content=None if content is None else message.content,
        name=optional("name"),
        reasoning=optional("reasoning_content") or optional("reasoning"),
        tool_calls=tuple(tool_calls),
        tool_call_id=optional("tool_call_id"),
    )


messages_of: Final = message_list(_messages)


def _parts(value: Any, param: str, *, has_pictures: bool) -> Iterator[Part]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield _part(readers.members(item, f"{param}[{i}]"), has_pictures=has_pictures)
    elif value is not None:
        raise readers.wrong(param, "a string or an array of parts", value)


def _part(part: Members, *, has_pictures: bool) -> Part:
    param = part.path_of("type")
    match part.get("type"):
        case "image_url" | "input_image" if not has_pictures:
            raise not_supported("only messages of users and tools may hold pictures.", param)
        case "image_url":
            return _image_url(part.get("image_url"), part.path_of("image_url"))
        case "input_image":
            return input_image(part)
        case "text" | "input_text" | "output_text":
            return part.text("text")
        case "refusal":
            return part.text("refusal")
        case str(kind):
            raise bad_request(f"content parts of type {truncate(kind)!r} are not supported.", param)
    raise bad_request(f"'{param}' must be a string.", param)


def _image_url(value: Any, param: str) -> Source:
    if isinstance(value, str):
        with image_errors():
            return source_of(value, param)
    if not isinstance(value, dict):
        raise readers.wrong(param, "a string or an object", value)
    return _source(Members(value, param), "url", param)


def input_image(part: Members) -> Source:
    """The form of Responses, which chats take too. Raises APIError 400."""
    if part.get("file_id") is not None:
        param = part.path_of("file_id")
        raise not_supported(f"'{param}' is not supported: no files are kept here.", param)
    return _source(part, "image_url", part.path_of("image_url"))


def _source(image: Members, name: str, param: str) -> Source:
    detail = image.get("detail")
    if detail is not None:
        image.read("detail", readers.one_of(*DETAILS))
    url = image.text(name)
    with image_errors():
        return source_of(url, param, detail or "auto")


def _tool_call(value: Any, param: str) -> ToolCall:
    call = readers.members(value, param)
    function: Members = call.read("function", readers.members)
    arguments = function.get("arguments") or {}
    if not isinstance(arguments, str | dict):
        raise readers.wrong(function.path_of("arguments"), "a string or an object", arguments)
    if isinstance(arguments, str):
        with suppress(ValueError):  # a call that the model has broken stays text
            value = readers.parse(arguments.encode())
            arguments = value if isinstance(value, dict) else arguments
    name = function.text("name")
    return ToolCall(call.text("id", ""), name, arguments)


_TEXT_PARTS: Final = {  # type → the member that holds its text
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("summary_text", "reasoning_text"), "text"),
    "refusal": "refusal",
}
PartReaders = Mapping[str, Callable[[Members], Source]]


def parts_of(value: Any, param: str, pictures: PartReaders | None = None) -> Iterator[Part]:
    """A string, or parts of text, and of the pictures that there may be: type → its reader."""
    if isinstance(value, str):
        yield value
        return
    for kind, part in readers.parts(value, param):
        if (read := (pictures or {}).get(kind)) is not None:
            yield read(part)
        elif (key := _TEXT_PARTS.get(kind)) is not None:
            yield part.text(key)
        else:
            raise readers.unsupported_type(kind, part.path)


def text_of(value: Any, param: str) -> str:
    """A string, or text parts, joined by newlines as a chat's are."""
    return "\n".join(map(str, parts_of(value, param)))
