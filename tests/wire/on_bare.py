"""A model without a template, a queue of one and four connections: what depends on time."""

import re
from collections.abc import Mapping
from functools import partial
from http.client import HTTPResponse

from wire.cases import (
    CHAT,
    TEXT,
    Scenario,
    Step,
    both,
    chat,
    completion,
    get,
    message,
    post,
    recite,
)
from wire.client import Link, Raw, request_bytes
from wire.models import BARE
from wire.parrot import cue

FLAGS = (
    *("--max-batch-size", "1", "--max-queue", "1", "--max-connections", "4"),
    *("--enable-prefix-caching", "false"),
)
ENDLESS = {"prompt": cue("loop"), "stream": True, "temperature": 0}
_NUM_TOKENS = re.compile(rb'("predicted_n"|"completion_tokens"|"total_tokens"):\d+')


def _first_text(stream: HTTPResponse) -> bytes:
    """Read to the first chunk of text, which is returned."""
    while b'"text":"l' not in (line := stream.readline()):
        assert line, "the stream has ended"
    return line


def _last_frames(stream: HTTPResponse) -> Raw:
    """What follows the last chunk of text: how many there are is a matter of time."""
    frames = stream.read().lstrip().split(b"\n\n")
    last = [frame for frame in frames if frame and BARE["loop"][0].encode() not in frame]
    kept = b"".join(f + b"\n\n" for f in last if b'"finish_reason":null' not in f)
    return Raw(200, (("content-type", "text/event-stream"),), _NUM_TOKENS.sub(rb"\1:0", kept))


def _ask(link: Link, method: str, path: str, body: object = None) -> Raw:
    link.send(request_bytes(method, path, body))
    return link.answer(method)


def _id_in(line: bytes) -> str:
    return line.partition(b'"id":"')[2].partition(b'"')[0].decode()


def _full_queue(port: int) -> Mapping[str, Raw]:
    """One runs, one waits, the third is refused; then both are cancelled."""
    with Link(port) as first, Link(port) as second, Link(port) as third:
        first.send(request_bytes("POST", TEXT, ENDLESS))
        running = first.begin()
        id = _id_in(_first_text(running))
        second.send(request_bytes("POST", CHAT.replace("chat/", ""), {**ENDLESS, "echo": True}))
        waiting = second.begin()
        waiting.readline()  # what it echoes: it is in the queue
        answers = {"a third is refused": _ask(third, "POST", TEXT, ENDLESS)}
        answers["health in the meantime"] = _ask(third, "GET", "/health")
        answers["one is cancelled by its id"] = _ask(third, "POST", "/v1/cancel", {"id": id})
        answers["the cancelled stream"] = _last_frames(running)
        _first_text(waiting)
        answers["all are cancelled"] = _ask(third, "POST", "/v1/cancel", {})
        answers["the other cancelled stream"] = _last_frames(waiting)
    return answers


def _full_house(port: int) -> Mapping[str, Raw]:
    """The fifth connection is refused before it asks."""
    links = [Link(port) for _ in range(4)]
    try:
        for link in links:  # answered, so counted
            _ask(link, "GET", "/version")
        with Link(port) as fifth:
            return {"the fifth connection": fifth.answer()}
    finally:
        for link in links:
            link.__exit__()


def _one_connection(port: int) -> Mapping[str, Raw]:
    """Several requests on one connection: in turn, at once, and after a promise to go on."""
    with Link(port) as link:
        answers = {"HEAD": _ask(link, "HEAD", "/version")}
        answers["GET after HEAD"] = _ask(link, "GET", "/version")
        answers["an error does not close"] = _ask(link, "GET", "/v1/nothing")
        link.send(request_bytes("GET", "/version") + request_bytes("GET", "/v1/cache"))
        answers["two at once: first"] = link.answer("GET")
        answers["two at once: second"] = link.answer("GET")
        short = {"prompt": cue("plain"), "temperature": 0, "stream": True}
        answers["a stream does not close"] = _ask(link, "POST", TEXT, short)
        head, _, body = request_bytes("POST", "/tokenize", {"content": "ab"}).partition(b"\r\n\r\n")
        link.send(head + b"\r\nexpect: 100-continue\r\n\r\n")
        assert link.line() == b"HTTP/1.1 100 Continue\r\n"
        while link.line() != b"\r\n":
            pass
        link.send(body)
        answers["after 100-continue"] = link.answer()
        link.send(request_bytes("GET", "/version", None, [("connection", "close")]))
        answers["a last request"] = link.answer("GET")
    return answers


_short = partial(completion, max_tokens=6)
CASES: list[Step] = [
    *both(recite(_short, "a completion without a template", "plain")),
    recite(_short, "a loop to its limit", "loop"),
    chat("a chat without a template", "Hello!"),
    message("a message without a template", "Hello!"),
    chat("tools without a format", "Hello!", tools=[{"function": {"name": "f"}}]),
    _short("more choices than the queue has room", cue("plain"), n=2),
    _short("more prompts than the queue has room", [cue("plain")] * 2),
    post(
        "tokenize a chat without a template",
        "/tokenize",
        {"messages": [{"role": "user", "content": "x"}]},
    ),
    Scenario("a full queue", _full_queue),
    Scenario("a full house", _full_house),
    Scenario("one connection", _one_connection),
    get("the status of one row", "/v1/status"),
]
