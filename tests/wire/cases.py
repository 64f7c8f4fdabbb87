"""What a case of the record is: one request, or a few whose order in time is what they show."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from wire.client import Link, Raw, request_bytes
from wire.parrot import cue

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
PICTURE_URL = f"data:image/png;base64,{PICTURE}"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
_ID = re.compile(rb'"id":"([a-z]+[-_][0-9a-f]{24})"')
_REFERENCE = re.compile(rb"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Case:
    """A request on a connection of its own.

    `${name}` in path or body is the id of an earlier case's answer; `raw` replaces all else but
    the method, on which it depends whether the answer has a body.
    """

    name: str
    method: str
    path: str = ""
    body: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes = b""

    def run(self, port: int, earlier: Mapping[str, Raw]) -> Iterator[tuple[str, Raw]]:
        def id_of(match: re.Match[bytes]) -> bytes:
            found = _ID.search(earlier[match[1].decode()].body)
            assert found is not None, f"{match[1]!r} was answered without an id"
            return found[1]

        path = _REFERENCE.sub(id_of, self.path.encode()).decode()
        body = self.body
        if not isinstance(body, bytes | None):
            body = _REFERENCE.sub(id_of, json.dumps(body).encode())
        data = request_bytes(self.method, path, body, tuple(self.headers.items()))
        with Link(port) as link:
            link.send(self.raw or data)
            yield self.name, link.answer(self.method)


@dataclass(frozen=True)
class Scenario:
    """Requests whose order in time matters; `play` gives each answer a name."""

    name: str
    play: Callable[[int], Mapping[str, Raw]]

    def run(self, port: int, earlier: Mapping[str, Raw]) -> Iterator[tuple[str, Raw]]:
        for name, raw in self.play(port).items():
            yield f"{self.name}: {name}", raw


Step: TypeAlias = Case | Scenario


def post(name: str, path: str, body: Any, **headers: str) -> Case:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(name, "POST", path, body, named)


def get(name: str, path: str, method: str = "GET", **headers: str) -> Case:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Case(name, method, path, None, named)


def raw(name: str, *lines: str, body: bytes = b"", method: str = "GET") -> Case:
    """The lines of a head, and what follows it."""
    return Case(name, method, raw="\r\n".join((*lines, "", "")).encode("latin-1") + body)


def said(content: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def turns(given: Any) -> Any:
    """A text is one message of the user's."""
    return [said(given)] if isinstance(given, str) else given


def chat(name: str, messages: Any, **fields: Any) -> Case:
    """Greedy and short, unless the fields say otherwise; None leaves a field out."""
    body = {"messages": turns(messages), "temperature": 0, "max_tokens": 12, **fields}
    return post(name, CHAT, {key: value for key, value in body.items() if value is not None})


def completion(name: str, prompt: Any, **fields: Any) -> Case:
    return post(name, TEXT, {"prompt": prompt, "temperature": 0, "max_tokens": 8, **fields})


def message(name: str, messages: Any, path: str = MESSAGES, **fields: Any) -> Case:
    body = {"messages": turns(messages), **fields}
    most = {"temperature": 0, "max_tokens": 12} if path == MESSAGES else {}
    return post(name, path, most | body)


def response(name: str, input: Any, **fields: Any) -> Case:
    return post(
        name, RESPONSES, {"input": input, "temperature": 0, "max_output_tokens": 12} | fields
    )


def both(case: Case) -> Sequence[Case]:
    """The same request as a whole answer, and streamed."""
    streamed = {**case.body, "stream": True}
    return case, replace(case, name=f"{case.name}, streamed", body=streamed)


def recite(make: Callable[..., Case], name: str, script: str | None = None, **fields: Any) -> Case:
    """A parrot's answer to a cue, which has the case's own name unless it is given."""
    return make(name, cue(script or name), **fields)


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def flat(name: str, **fields: Any) -> dict[str, Any]:
    """A function as Responses have it."""
    return {"type": "function", "name": name, **fields}


def without(case: Case, *names: str) -> Case:
    return replace(case, body={key: v for key, v in case.body.items() if key not in names})
