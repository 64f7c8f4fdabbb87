"""What several tests of a server share: paths, origins, checks of answers."""

import json
from typing import Any

from helpers import DONE, Frame, Wire, request

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
PROMPT = "It was a bright cold day in April, and so"[:40]
ENVELOPE_KEYS = {"message", "type", "param", "code"}

ALLOWED = [
    "tauri://localhost",
    "http://localhost:5173",
    "http://127.0.0.1:8080",
    "http://localhost",
]

FOREIGN = [
    "http://evil.example",
    "https://localhost",
    "http://localhost.evil.example",
    "http://evil.example#http://localhost",
    "http://user@evil.example",
    "null",
    "localhost",
    "http://[",
    "http://[::1",
    "://",
]


def assert_ends_with_an_error(frames: list[Frame], message: str) -> None:
    data, line, done = frames[-3:]
    assert data.name == "data"
    assert set(data.json["error"]) >= ENVELOPE_KEYS
    assert message in data.json["error"]["message"]
    assert line.name == "error"
    assert line.json == {"message": data.json["error"]["message"]}
    assert done == DONE


async def stream(wire: Wire, path: str, value: Any) -> list[Any]:
    """The chunks of a stream that ends well."""
    body = json.dumps({**value, "stream": True}).encode()
    await wire.send(request("POST", path, body))
    assert (await wire.head()).status == 200
    frames = await wire.rest()
    assert frames[-1] == DONE
    assert frames.count(DONE) == 1
    return [frame.json for frame in frames[:-1]]


def ids(text: str) -> list[int]:
    return list(map(ord, text))
