"""Content of messages, in the forms of all dialects: text, reasoning, pictures. Pure.

Decides what a part becomes, and what stands for one that cannot be read. Where the answer depends
on it (`is_asked`: the user's last message, instructions) that is a 400. In a history and in a
tool's result it is not: what another provider or a tool has left there is read where it can be, and
else replaced by a sentence for the model, or left out, and named.
"""

import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mlxlite.api import readers
from mlxlite.api.conversation import Part
from mlxlite.api.fields import Kind, Kinds, Use
from mlxlite.api.left_out import leave_out
from mlxlite.api.readers import Members
from mlxlite.http.errors import APIError, bad_request, not_supported, truncate
from mlxlite.vision.images import DETAILS, ImageError, Source, source_of, source_of_base64

IMAGE_OMITTED: Final = "[image omitted: it could not be read]"
TEXT_ONLY: Final = "[image omitted: this model reads text only]"
TOO_MANY: Final = "[image omitted: too many images]"
# How errors of media in the user's message begin: clients that know the words remove the media.
BAD_IMAGE: Final = "Could not process image"
BAD_PDF: Final = "The PDF specified was not valid"


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning among the parts of a message."""

    text: str


Content = Part | Thought


def content_of(
    value: Any, param: str, *, is_asked: bool, has_pictures: bool = True
) -> Iterator[Content]:
    """A string or an array of parts; null is nothing. Raises APIError 400 where it `is_asked`."""
    if isinstance(value, dict) and "type" in value:  # a part alone
        value = [value]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from part_of(item, f"{param}[{i}]", is_asked=is_asked, has_pictures=has_pictures)
    elif value is not None:
        if is_asked:
            raise readers.wrong(param, "a string or an array of parts", value)
        yield from _as_json(value, param)


def parts_in(content: Iterable[Content], thoughts: list[str] | None = None) -> Iterator[Part]:
    """The parts without reasoning, which is added to `thoughts`."""
    for part in content:
        if not isinstance(part, Thought):
            yield part
        elif thoughts is not None and part.text:
            thoughts.append(part.text)


def text_of(value: Any, param: str) -> str:
    """Instructions: a string, or text parts, joined by newlines. Raises APIError 400."""
    return "\n".join(
        part
        for part in content_of(value, param, is_asked=True, has_pictures=False)
        if isinstance(part, str)
    )


def part_of(item: Any, param: str, *, is_asked: bool, has_pictures: bool = True) -> list[Content]:
    """One part, or what stands for it. Raises APIError 400 where it `is_asked`."""
    if isinstance(item, str):
        return [item]
    if not isinstance(item, dict) or not isinstance(item.get("type"), str):
        if is_asked:
            readers.members(item, param).text("type")
        return list(_as_json(item, param))
    part, kind = Members(item, param), PARTS.get(item["type"], PARTS["*"])
    try:
        assert kind.read is not None
        content = list(kind.read(part))
        if not has_pictures and any(isinstance(one, Source) for one in content):
            raise not_supported(
                "only messages of users and tools may hold pictures.", part.path_of("type")
            )
    except APIError:
        if is_asked:
            raise
        leave_out(param, truncate(item["type"]))
        return [stand_in] if (stand_in := _STAND_INS.get(item["type"])) else []
    return content


def _as_json(value: Any, param: str) -> Iterator[str]:
    """What a tool has returned as no text: its JSON."""
    try:
        yield orjson.dumps(value).decode()
    except TypeError:  # too deep to be written
        leave_out(param)


# --- text -------------------------------------------------------------------------------------


def _text(part: Members) -> list[Content]:
    return [part.text("text")]


def _inner(part: Members, name: str) -> list[Content]:
    """Text and pictures inside a part, which hold no other parts: readers recurse no deeper."""
    value, path = part.get(name), part.path_of(name)
    if isinstance(value, str):
        return [value]
    content: list[Content] = []
    for kind, inner in readers.parts(value, path):
        if kind not in ("text", "image"):
            raise readers.unsupported_type(kind, inner.path)
        content += _text(inner) if kind == "text" else _image(inner)
    return content


def _refusal(part: Members) -> list[Content]:
    return [part.text("refusal")]


def _thought(part: Members) -> list[Content]:
    """A text, or parts of text as Mistral's."""
    name = "thinking" if part.get("thinking") is not None else "text"
    if isinstance(part.get(name), list):
        return [Thought("\n".join(one for one in _inner(part, name) if isinstance(one, str)))]
    return [Thought(part.text(name))]


def _redacted(part: Members) -> list[Content]:
    part.text("data", "")
    return []


def _search_result(part: Members) -> list[Content]:
    """A title and a source, then the text that was found."""
    head = [part.text(name) for name in ("title", "source") if part.get(name)]
    return ["\n".join(head), *_inner(part, "content")]


def _resource(part: Members) -> list[Content]:
    """An embedded resource of MCP: its text, or a picture's bytes."""
    resource: Members = part.read("resource", readers.members)
    if isinstance(resource.get("text"), str):
        return [resource.text("text")]
    if resource.text("mimeType", "").startswith("image/"):
        return [_base64(resource.text("blob"), resource.path_of("blob"))]
    raise _unsupported(part)


def _resource_link(part: Members) -> list[Content]:
    names = (part.text("name", ""), part.text("uri"), part.text("description", ""))
    return [" ".join(filter(None, names))]


def _other(part: Members) -> list[Content]:
    """Text is text, whatever its wrapper."""
    if isinstance(part.get("text"), str):
        return _text(part)
    raise _unsupported(part)


def _unsupported(part: Members) -> APIError:
    kind = truncate(part.text("type"))
    message = f"content parts of type {kind!r} are not supported."
    return not_supported(message, part.path_of("type"))


# --- documents --------------------------------------------------------------------------------


def _document(part: Members) -> list[Content]:
    """Anthropic's: plain text, or content; its title and context come first."""
    source: Members = part.read("source", readers.members)
    head: list[Content] = [part.text(name) for name in ("title", "context") if part.get(name)]
    match source.text("type"):
        case "text":
            return [*head, source.text("data")]
        case "content":
            return [*head, *_inner(source, "content")]
        case "base64":
            return [*head, _file_text(source.text("data"), source.text("media_type", ""), part)]
    raise _unreadable_file(part)


def _file(part: Members) -> list[Content]:
    """OpenAI's: text in a data: URI."""
    file = part if part.get("file") is None else part.read("file", readers.members)
    head, comma, data = file.text("file_data", "").partition(",")
    if not comma or not head.lower().startswith("data:"):
        raise _unreadable_file(part)
    return [_file_text(data, head[5:].removesuffix(";base64"), part)]


def _file_text(data: str, media_type: str, part: Members) -> str:
    if not media_type.lower().startswith("text/") and "json" not in media_type.lower():
        raise _unreadable_file(part)
    try:
        return binascii.a2b_base64(data.encode()).decode()
    except ValueError:
        raise _unreadable_file(part) from None


def _unreadable_file(part: Members) -> APIError:
    message = f"{BAD_PDF}: this server reads files of text alone."
    return not_supported(message, part.path_of("type"))


# --- pictures ---------------------------------------------------------------------------------


@contextmanager
def image_errors() -> Iterator[None]:
    """An image that cannot be used is the client's mistake: APIError 400."""
    try:
        yield
    except ImageError as error:
        raise bad_request(f"{BAD_IMAGE}: {error}", error.param) from error


def _image_url(part: Members) -> list[Content]:
    """Of chats and Responses; `image_url` is a string, or an object with a `url`."""
    if part.get("file_id") is not None:
        param = part.path_of("file_id")
        raise not_supported(f"{BAD_IMAGE}: no files are kept here, '{param}'.", param)
    value, param = part.get("image_url"), part.path_of("image_url")
    detail, url = part.get("detail"), value
    if isinstance(value, dict):
        detail, url = value.get("detail", detail), Members(value, param).text("url")
    elif not isinstance(value, str):
        raise readers.wrong(param, "a string or an object", value)
    known = detail if detail in DETAILS else "auto"
    with image_errors():
        return [source_of(url, param, known)]


def _image(part: Members) -> list[Content]:
    """Anthropic's `source`, MCP's `data`, or a URL; the bytes show the format."""
    if part.get("source") is not None:
        source: Members = part.read("source", readers.members)
        with image_errors():
            match source.text("type"):
                case "base64":
                    return [_base64(source.text("data"), source.path)]
                case "url":
                    return [source_of(source.text("url"), source.path)]
        raise readers.unsupported_type(source.text("type"), source.path)
    if part.get("data") is not None:
        return [_base64(part.text("data"), part.path_of("data"))]
    name = next((name for name in ("url", "image") if part.get(name) is not None), "image_url")
    return _image_url(Members({"image_url": part.get(name)}, part.path))


def _base64(data: str, param: str) -> Source:
    with image_errors():
        return source_of_base64(data, param)


def _kind(note: str, read: Callable[[Members], list[Content]]) -> Kind:
    return Kind(Use.SUPPORTED, note, read)


_MEDIA: Final = Kind(Use.HISTORY, "no network behind it is served here", _other)
PARTS: Final[Kinds] = {
    **dict.fromkeys(("text", "input_text", "output_text"), _kind("text", _text)),
    **dict.fromkeys(("summary_text", "reasoning_text"), _kind("text", _text)),
    "refusal": _kind("text", _refusal),
    **dict.fromkeys(("thinking", "reasoning"), _kind("reasoning", _thought)),
    "redacted_thinking": _kind("nothing: readable for its maker alone", _redacted),
    **dict.fromkeys(("image_url", "input_image"), _kind("a picture of users or tools", _image_url)),
    "image": _kind("a picture: Anthropic's and MCP's forms", _image),
    "document": _kind("plain text and content; no PDF", _document),
    **dict.fromkeys(("file", "input_file"), _kind("text in a data: URI; no PDF", _file)),
    "search_result": _kind("its title, source and text", _search_result),
    "resource": _kind("MCP's: text or a picture", _resource),
    "resource_link": _kind("MCP's: name, address and description as text", _resource_link),
    **dict.fromkeys(("input_audio", "audio", "audio_url", "video_url", "video"), _MEDIA),
    "*": Kind(Use.HISTORY, "its `text`, if it has one", _other),
}
_STAND_INS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("image_url", "input_image", "image"), IMAGE_OMITTED),
    **dict.fromkeys(("document", "file", "input_file"), "[file omitted: only text is read here]"),
    **dict.fromkeys(("input_audio", "audio", "audio_url"), "[audio omitted: it cannot be heard]"),
    **dict.fromkeys(("video_url", "video"), "[video omitted: it cannot be seen]"),
    "resource": "[resource omitted: it could not be read]",
}
