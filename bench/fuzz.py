"""Bytes that nobody would send, over http1 and over whatever reads a request's body.

Every target takes any bytes and may answer with what it documents: an APIError of a 4xx, an
image's ImageError, http1 nothing but values. Everything else is a finding. The tests run the same
targets for a few seconds (`tests/test_hostile_http.py`); here it is millions of inputs, by hand:

    python -m bench.fuzz --inputs 1000000 --seed 1

Inputs are mutations of `SEEDS`: of the bytes, and of the JSON inside them. With atheris installed
(`pip install atheris`) `--engine atheris` has libFuzzer choose them by what code they reach.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from mlxlite.api.endpoints.admin import parse_cancel
from mlxlite.api.endpoints.anthropic_messages import parse_count_tokens, parse_messages
from mlxlite.api.endpoints.chat_completions import FIELDS, parse_chat
from mlxlite.api.endpoints.completions import FIELDS as COMPLETION_FIELDS
from mlxlite.api.endpoints.completions import parse_completion
from mlxlite.api.endpoints.embeddings import FIELDS as EMBEDDING_FIELDS
from mlxlite.api.endpoints.embeddings import parse_embedding
from mlxlite.api.endpoints.responses import parse_responses
from mlxlite.api.endpoints.tokenize import parse_detokenize, parse_tokenize
from mlxlite.api.request import ChatRequest, Request
from mlxlite.api.responses_writer import ResponsesWriter
from mlxlite.api.writers import Collected, Envelope
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import FinishReason, Usage
from mlxlite.http.errors import APIError, bad
from mlxlite.http.parser import Body, Connection, Head, Limits, Malformed, Signal
from mlxlite.output.events import Done, TextDelta
from mlxlite.vision.fetch import Limits as ImageLimits
from mlxlite.vision.images import ImageError, load, source_of

Target = Callable[[bytes], None]

SLOW_S = 1.0  # of computing; an input that takes longer is a finding too
_LIMITS = Limits(max_header_bytes=512, max_body_bytes=256)
_USAGE = Usage(num_prompt=1, num_output=1)
_DEFAULTS = SamplingParams(temperature=1)
# Both are of one pixel.
_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGP4z8DwHwAFAAH/iZk9"
    "HQAAAABJRU5ErkJggg=="
)
_GIF = "R0lGODlhAQABAIAAAAAAAP///ywAAAAAAQABAAACAUwAOw=="


# --- targets ----------------------------------------------------------------------------------


def http(data: bytes) -> None:
    """A connection, fed in pieces, that answers whatever it is asked."""
    size = 1 + (data[0] if data else 0) % 97
    connection = Connection(_LIMITS)
    for start in range(0, len(data), size):
        connection.receive_data(data[start : start + size])
        if not _answer(connection):
            return
    connection.receive_data(b"")
    _answer(connection)


def _answer(connection: Connection) -> bool:
    """Whether the connection goes on."""
    while True:
        match connection.next_event():
            case Head():
                connection.continue_100()
            case Body(data):
                assert len(data) <= _LIMITS.max_body_bytes
                assert connection.respond(200, [("x", "y")], data).startswith(b"HTTP/1.1 200 ")
                if not connection.start_next_cycle():
                    return False
            case Malformed(status, message):
                assert 400 <= status <= 505
                assert message.isascii()
                answer = connection.respond(status, [])
                assert b"onnection: close" in answer
                return False
            case Signal.CLOSED:
                return False
            case _:
                return True


def _parser(parse: Callable[[bytes], Any], use: Callable[[Any], None]) -> Target:
    """A body's reader, and what is done with what it has read."""

    def target(data: bytes) -> None:
        try:
            read = parse(data)
        except APIError as error:
            _check(error)
        else:
            use(read)

    return target


def _check(error: APIError) -> None:
    """A refusal is the client's mistake, short, and well formed."""
    assert 400 <= error.status < 500
    assert len(error.message) < 1000
    assert json.loads(error.body())["error"]["message"] == error.message


def _use_options(request: Request) -> None:
    request.sampling_params(_DEFAULTS, seed=1)
    ",".join(request.ignored).encode()


def _use_chat(request: ChatRequest) -> None:
    _use_options(request)
    for message in request.messages:
        assert message.num_bytes >= 0
        message.as_template()
    for tool in request.tools:
        json.dumps(tool.as_template())


def _use_response(request: Any) -> None:
    """What a response repeats of its request can be written."""
    _use_chat(request)
    envelope = Envelope("resp_1", 0, "model", "fp")
    assert ResponsesWriter(envelope, _token_bytes, request.echo).begin()
    choice = Collected()
    choice.take(TextDelta("text", usage=_USAGE))
    choice.done = Done(FinishReason.STOP, _USAGE)
    assert ResponsesWriter(envelope, _token_bytes, request.echo).whole([choice], _USAGE)


def _use_nothing(_request: Any) -> None:
    pass


def _token_bytes(_token: int) -> bytes:
    return b"x"


def media(data: bytes) -> None:
    """A picture's place in a request, and its bytes where they are in it."""
    text = data.decode("utf-8", "replace")
    try:
        source = source_of(text, "url")
        load([source], ImageLimits(max_source_pixels=1 << 20))
    except ImageError as error:
        _check(bad(str(error), error.param))


PARSERS: Mapping[str, tuple[Callable[[bytes], Any], Callable[[Any], None]]] = {
    "chat": (parse_chat, _use_chat),
    "completion": (parse_completion, _use_options),
    "messages": (parse_messages, _use_chat),
    "count_tokens": (parse_count_tokens, _use_chat),
    "responses": (parse_responses, _use_response),
    "embedding": (parse_embedding, _use_nothing),
    "tokenize": (parse_tokenize, _use_nothing),
    "detokenize": (parse_detokenize, _use_nothing),
    "cancel": (parse_cancel, _use_nothing),
}
TARGETS: Mapping[str, Target] = {
    "http1": http,
    **{name: _parser(*entry) for name, entry in PARSERS.items()},
    "media": media,
}


# --- what is mutated --------------------------------------------------------------------------

_PICTURE = f"data:image/png;base64,{_PNG}"
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_FUNCTION = {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": True}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TURNS = [
    {"role": "system", "content": "x-anthropic-billing-header: y\nsystem"},
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": _PICTURE}}]},
    {"role": "assistant", "content": None, "tool_calls": [_CALL], "reasoning_content": "hm"},
    {"role": "tool", "tool_call_id": "c", "content": "2"},
]
_OPTIONS: Mapping[str, Any] = {
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "logit_bias": {"5": 1.5},
    "n": 2,
    "priority": -1,
    "presence_penalty": 0.5,
    "stop_token_ids": [1, 2],
    "unknown": {"a": [None, True]},
}
_BODIES: Mapping[str, list[Any]] = {
    "chat": [
        {"messages": _TURNS, **_OPTIONS, "logprobs": True, "top_logprobs": 3},
        {
            "messages": _TURNS,
            "tools": [{"type": "function", "function": _FUNCTION}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "reasoning_effort": "low",
            "chat_template_kwargs": {"x": {"y": []}},
        },
        {
            "messages": _TURNS[:1],
            "response_format": {"type": "json_schema", "json_schema": {"schema": _SCHEMA}},
            "thinking_budget": 64,
        },
        {"messages": _TURNS[:1], "structured_outputs": {"regex": "a+"}, "guided_choice": None},
        {"messages": _TURNS[:1], "functions": [_FUNCTION], "function_call": "auto"},
    ],
    "completion": [{"prompt": ["a", [1, 2]], **_OPTIONS, "logprobs": 3}, {"prompt": "a"}],
    "messages": [
        {
            "max_tokens": 2048,
            "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
            "messages": [
                {"role": "user", "content": "hi"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t", "content": "2"},
                        {
                            "type": "image",
                            "source": {"type": "base64", "media_type": "image/gif", "data": _GIF},
                        },
                    ],
                },
            ],
            "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "metadata": {"user_id": "u"},
            "stop_sequences": ["a"],
        }
    ],
    "responses": [
        {
            "input": [
                {"type": "message", "role": "user", "content": "hi"},
                {"role": "user", "content": [{"type": "input_image", "image_url": _PICTURE}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "2"},
            ],
            "instructions": "be brief",
            "tools": [{"type": "function", **_FUNCTION}],
            "tool_choice": {"type": "function", "name": "f"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "metadata": {"a": "b"},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "previous_response_id": "resp_x",
        },
        {
            "input": "hi",
            "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}},
            "store": False,
        },
    ],
    "embedding": [{"input": ["a", [1, 2]], "encoding_format": "base64", "dimensions": 4}],
    "tokenize": [{"content": "a", "with_pieces": True}, {"messages": _TURNS}],
    "detokenize": [{"tokens": [1, 2, 3]}],
    "cancel": [{"id": "chatcmpl-1"}, {}],
}
_HTTP = (
    b"GET /health?x=1 HTTP/1.1\r\nHost: localhost:80\r\nAccept: */*\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
    b"3;e=1\r\nabc\r\n0\r\nA: b\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"HEAD http://x/a%20b HTTP/1.1\r\nhost: x\r\nConnection: keep-alive\r\n\r\n",
)
SEEDS: Mapping[str, tuple[bytes, ...]] = {
    "http1": _HTTP,
    **{name: tuple(json.dumps(b).encode() for b in bodies) for name, bodies in _BODIES.items()},
    "count_tokens": tuple(json.dumps(b).encode() for b in _BODIES["messages"]),
    "media": (
        _PICTURE.encode(),
        f"data:;base64,{_GIF}".encode(),
        b"https://user@[2001:db8::1]:8080/a.png?b#c",
        b"http://localhost/%00",
    ),
}
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *("", "\0", "a", "\n", "\ud800", "\U0010ffff", "x" * 5000, "null", "{}", "[" * 1000, "%00"),
    *([], {}, [[]], [None], {"": None}, {"type": []}, {"type": "text"}, ["a"] * 200),
)
WORDS: tuple[bytes, ...] = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b":", b"0\r\n", b";", b"HTTP/1.1", b"\x16\x03", b"\xff"),
    *(b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: x\r\n", b"GET / "),
    *(b"{", b"}", b"[", b"]", b",", b'"', b"\\", b"\\ud800", b"\\u0000", b"NaN", b"1e400", b"null"),
    *(b"\xef\xbb\xbf", b"\xed\xa0\x80", b"[" * 300, b"]" * 300, b'{"a":' * 300, b"9" * 400),
    *(f'"{name}":'.encode() for name in (*FIELDS, *COMPLETION_FIELDS, *EMBEDDING_FIELDS)),
)


_NAMES = ("type", "schema", "a\0", "", *FIELDS)
_DEEP = re.compile(rb'"@(list|dict)(\d+)@"')


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """A few changes to the JSON, if it is any, or to the bytes, or to both."""
    data = seed
    if seed[:1] == b"{" and rng.random() < 0.8:
        value = json.loads(seed)
        for _ in range(rng.randint(1, 4)):
            value = _changed(value, rng)
        data = json.dumps(value, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")
        data = _DEEP.sub(_brackets, data)
        if rng.random() < 0.7:
            return data
    raw = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        _change_bytes(raw, rng)
    return bytes(raw)


def _changed(value: Any, rng: random.Random) -> Any:
    """A copy in which one place is another: replaced, gone, doubled or far too deep."""
    is_full = isinstance(value, dict | list) and len(value) > 0
    if not is_full or rng.random() < 0.15:
        return _nasty(rng)
    if isinstance(value, list):
        items = list(value)
        i = rng.randrange(len(items))
        match rng.randrange(6):
            case 0:
                del items[i]
            case 1 if len(items) < 100:
                items *= rng.randint(2, 70)
            case _:
                items[i] = _changed(items[i], rng)
        return items
    name = rng.choice(list(value))
    changed = dict(value)
    match rng.randrange(6):
        case 0:
            changed[rng.choice(list(FIELDS))] = changed.pop(name)
        case 1:
            changed[rng.choice(_NAMES)] = _nasty(rng)
        case _:
            changed[name] = _changed(value[name], rng)
    return changed


def _nasty(rng: random.Random) -> Any:
    """One value in five is a mark for something deep: json has its own limit."""
    if rng.random() < 0.8:
        return rng.choice(NASTY)
    return f"@{rng.choice(('list', 'dict'))}{rng.choice((50, 99, 105, 240, 255, 500, 1000))}@"


def _brackets(mark: re.Match[bytes]) -> bytes:
    opening, closing = (b"[", b"]") if mark[1] == b"list" else (b'{"a":', b"}")
    return opening * int(mark[2]) + b"1" + closing * int(mark[2])


def _change_bytes(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw) + 1)
    match rng.randrange(5):
        case 0:
            raw[at:at] = rng.choice(WORDS)
        case 1:
            del raw[at : at + rng.randint(1, 8)]
        case 2:
            raw[at:at] = raw[at : at + rng.randint(1, 64)]
        case 3 if at < len(raw):
            raw[at] = rng.randrange(256)
        case _:
            raw[at : at + 2] = rng.choice(WORDS)


# --- runs -------------------------------------------------------------------------------------


class Findings:
    """Counts inputs, and keeps one of each kind that did what no target documents."""

    def __init__(self) -> None:
        self.num_inputs: Counter[str] = Counter()
        self.found: dict[str, tuple[str, bytes, str]] = {}
        self.slowest = (0.0, "", b"")

    def run(self, name: str, data: bytes) -> None:
        self.num_inputs[name] += 1
        began = thread_time()
        try:
            TARGETS[name](data)
        except Exception as error:  # the point of the whole
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
            self.found.setdefault(key, (name, data, traceback.format_exc(limit=-8)))
        self.slowest = max(self.slowest, (thread_time() - began, name, data))

    @property
    def is_clean(self) -> bool:
        return not self.found and self.slowest[0] < SLOW_S

    def report(self, engine: str, seconds: float) -> str:
        lines = [
            f"{self.num_inputs.total():,} inputs in {seconds:.0f} s ({engine}): "
            + ", ".join(f"{name} {num:,}" for name, num in self.num_inputs.items()),
            f"uncaught exceptions: {len(self.found)}",
            f"slowest input: {self.slowest[0] * 1000:.0f} ms, {self.slowest[1]}, "
            f"{len(self.slowest[2])} bytes",
        ]
        for key, (name, data, trace) in self.found.items():
            lines += [f"--- {key}: {name}, {data[:200]!r}", trace]
        return "\n".join(lines)


def run_plain(num_inputs: int, seed: int) -> Findings:
    """Targets in turn; the same seed gives the same inputs."""
    rng = random.Random(seed)
    findings = Findings()
    names = list(TARGETS)
    for i in range(num_inputs):
        name = names[i % len(names)]
        findings.run(name, mutated(rng.choice(SEEDS[name]), rng))
    return findings


def run_atheris(num_inputs: int, seed: int) -> None:
    """libFuzzer's choice; the first byte names the target. It ends the process itself."""
    import atheris

    findings, names, began = Findings(), list(TARGETS), perf_counter()
    atheris.instrument_all()

    def one(data: bytes) -> None:
        if data:
            findings.run(names[data[0] % len(names)], data[1:])
        if findings.num_inputs.total() == num_inputs:
            print(findings.report("atheris", perf_counter() - began), flush=True)

    corpus = Path(tempfile.mkdtemp(prefix="mlxlite-fuzz-"))
    for i, name in enumerate(names):
        for j, data in enumerate(SEEDS[name]):
            (corpus / f"{name}-{j}").write_bytes(bytes([i]) + data)
    words = corpus.with_suffix(".dict")
    escaped = ("".join(f"\\x{byte:02x}" for byte in word[:64]) for word in WORDS)
    words.write_text("".join(f'"{word}"\n' for word in escaped), encoding="ascii")
    options = [f"-runs={num_inputs * 2}", f"-seed={seed}", f"-dict={words}", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("plain", "atheris"), default="plain")
    args = parser.parse_args()
    if args.engine == "atheris":
        run_atheris(args.inputs, args.seed)
        return
    began = perf_counter()
    findings = run_plain(args.inputs, args.seed)
    print(findings.report(f"seed {args.seed}", perf_counter() - began))
    sys.exit(0 if findings.is_clean else 1)


if __name__ == "__main__":
    main()
