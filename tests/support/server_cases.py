"""What several tests of a server share: paths, origins, checks of answers."""

from helpers import DONE, Frame

CHAT = "/v1/chat/completions"

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
