"""Server-sent events: the bytes of a frame. A frame is one bytes object and one write."""

import re

from mlxlite.http.parser import _TOKEN

SSE_DONE = b"data: [DONE]\n\n"
_LINE_BREAK = re.compile(rb"[\r\n]")


# A line break in a payload would end its field; JSON has no raw one, so it is a bug of ours.
def sse_data(payload: bytes) -> bytes:
    """`data: payload`, the OpenAI frame."""
    assert not _LINE_BREAK.search(payload)
    return b"data: %b\n\n" % payload


def sse_event(name: str, payload: bytes) -> bytes:
    """`event: name` and `data: payload`, the Anthropic and Responses frame."""
    assert _TOKEN.fullmatch(name)
    return b"event: %b\n%b" % (name.encode(), sse_data(payload))


def sse_comment(text: str = "") -> bytes:
    """`: text`, which clients skip: a heartbeat."""
    assert not _LINE_BREAK.search(text.encode())
    return b": %b\n\n" % text.encode()


def sse_field(name: str, payload: bytes) -> bytes:
    """`name: payload`, for the launching app's `error: {...}` line."""
    assert _TOKEN.fullmatch(name)
    assert not _LINE_BREAK.search(payload)
    return b"%b: %b\n\n" % (name.encode(), payload)
