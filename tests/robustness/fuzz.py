"""Fuzzing: arbitrary bytes into the HTTP parser and into every parser of a request body.

A target accepts any bytes and raises nothing but an APIError with a 4xx status, or an ImageError in
the case of images. Any other exception is a finding, and so is an input that takes a second to
compute. `test_hostile_http` runs the same targets for a few seconds; here it is millions of inputs:

    python -m tests.robustness.fuzz --inputs 1000000 --seed 1

Inputs are mutations of `SEEDS` (the bodies are in `seeds.json`): of the bytes, and of the JSON
inside them. With atheris installed, `--engine atheris` lets libFuzzer choose them by coverage.
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
from itertools import cycle
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
from mlxlite.http.errors import APIError, bad_request
from mlxlite.http.parser import Body, Connection, Head, Limits, Malformed, Signal
from mlxlite.output.events import Done, TextDelta
from mlxlite.vision.decoder import Decoder
from mlxlite.vision.fetch import Limits as ImageLimits
from mlxlite.vision.images import ImageError, load, source_of

Target = Callable[[bytes], None]

SLOW_S = 1.0  # of CPU time for one input
_LIMITS = Limits(max_header_bytes=512, max_body_bytes=256)

# --- targets ----------------------------------------------------------------------------------


def http(data: bytes) -> None:
    """A connection, fed in pieces, that answers every request."""
    size = 1 + (data[0] if data else 0) % 97
    connection = Connection(_LIMITS)
    for start in range(0, len(data), size):
        connection.receive_data(data[start : start + size])
        if not _answer(connection):
            return
    connection.receive_data(b"")
    _answer(connection)


def _answer(connection: Connection) -> bool:
    """Answer every complete request; whether the connection stays open."""
    while True:
        match connection.next_event():
            case Head():
                connection.continue_100()
            case Body(data):
                assert len(data) <= _LIMITS.max_body_bytes
                assert connection.respond(200, [("x", "y")], data)[0].startswith(b"HTTP/1.1 200 ")
                if not connection.start_next_cycle():
                    return False
            case Malformed(status, message):
                assert 400 <= status <= 505
                assert message.isascii()
                assert b"onnection: close" in connection.respond(status, [])[0]
                return False
            case Signal.CLOSED:
                return False
            case _:
                return True


def _parser(parse: Callable[[bytes], Any], use: Callable[[Any], object]) -> Target:
    def target(data: bytes) -> None:
        try:
            read = parse(data)
        except APIError as error:
            _check(error)
        else:
            use(read)

    return target


def _check(error: APIError) -> None:
    """An error has a 4xx status, is short, and is valid JSON."""
    assert 400 <= error.status < 500
    assert len(error.message) < 1000
    assert json.loads(error.body())["error"]["message"] == error.message


def _use_options(request: Request) -> None:
    request.sampling_params(SamplingParams(temperature=1), seed=1)
    ",".join(request.ignored).encode()


def _use_chat(request: ChatRequest) -> None:
    _use_options(request)
    for message in request.messages:
        assert message.num_bytes >= 0
        message.as_template()
    for tool in request.tools:
        json.dumps(tool.as_template())


def _use_response(request: Any) -> None:
    """The fields that a response repeats from its request can be written."""
    _use_chat(request)

    def writer() -> ResponsesWriter:
        return ResponsesWriter(Envelope("resp_1", 0, "model", "fp"), lambda _: b"x", request.echo)

    assert writer().begin()
    usage, choice = Usage(num_prompt=1, num_output=1), Collected()
    choice.take(TextDelta("text", usage=usage))
    choice.done = Done(FinishReason.STOP, usage)
    assert writer().whole([choice], usage)


def media(data: bytes) -> None:
    """An image's URL in a request, and its bytes if the URL has them inline."""
    text = data.decode("utf-8", "replace")
    try:
        source = source_of(text, "url")
        load([source], ImageLimits(max_source_pixels=1 << 20), Decoder(()))
    except ImageError as error:
        _check(bad_request(str(error), error.param))


PARSERS: Mapping[str, tuple[Callable[[bytes], Any], Callable[[Any], object]]] = {
    "chat": (parse_chat, _use_chat),
    "completion": (parse_completion, _use_options),
    "messages": (parse_messages, _use_chat),
    "count_tokens": (parse_count_tokens, _use_chat),
    "responses": (parse_responses, _use_response),
    "embedding": (parse_embedding, bool),
    "tokenize": (parse_tokenize, bool),
    "detokenize": (parse_detokenize, bool),
    "cancel": (parse_cancel, bool),
}
TARGETS: Mapping[str, Target] = {
    "http1": http,
    **{name: _parser(*entry) for name, entry in PARSERS.items()},
    "media": media,
}


# --- mutations --------------------------------------------------------------------------------


def _seeds() -> dict[str, tuple[bytes, ...]]:
    """By target. In the file a string is raw bytes and anything else is a JSON body."""
    values: dict[str, list[Any]] = json.loads(Path(__file__).with_name("seeds.json").read_bytes())
    values["count_tokens"] = values["messages"]
    return {
        name: tuple((v if isinstance(v, str) else json.dumps(v)).encode() for v in own)
        for name, own in values.items()
    }


SEEDS: Mapping[str, tuple[bytes, ...]] = _seeds()
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
_DEEP = re.compile(rb'"@(list|dict)(\d+)@"')


def mutated(seed: bytes, rng: random.Random) -> bytes:
    """A few changes to the JSON, if the seed is JSON, or to the bytes, or to both."""
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
    """A copy with one value replaced, removed, repeated or nested far too deep."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
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
            changed[rng.choice(("type", "schema", "a\0", "", *FIELDS))] = _nasty(rng)
        case _:
            changed[name] = _changed(value[name], rng)
    return changed


def _nasty(rng: random.Random) -> Any:
    """One value in five is a placeholder for deep nesting, which `json.dumps` cannot write."""
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
    """Counts inputs; keeps one input for each place of an undocumented exception."""

    def __init__(self) -> None:
        self.num_inputs: Counter[str] = Counter()
        self.found: dict[str, tuple[str, bytes, str]] = {}
        self.slowest = (0.0, "", b"")

    def run(self, name: str, data: bytes) -> None:
        self.num_inputs[name] += 1
        began = thread_time()
        try:
            TARGETS[name](data)
        except Exception as error:  # any undocumented exception is a finding
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
            "slowest input: {:.3f} s, {}, {} bytes".format(*self.slowest[:2], len(self.slowest[2])),
        ]
        for key, (name, data, trace) in self.found.items():
            lines += [f"--- {key}: {name}, {data[:200]!r}", trace]
        return "\n".join(lines)


def run_plain(num_inputs: int, seed: int) -> Findings:
    """Targets in turn; equal seeds give equal inputs."""
    rng, findings = random.Random(seed), Findings()
    for _, name in zip(range(num_inputs), cycle(TARGETS), strict=False):
        findings.run(name, mutated(rng.choice(SEEDS[name]), rng))
    return findings


def run_atheris(num_inputs: int, seed: int) -> None:
    """libFuzzer chooses; the first byte selects the target. Ends the process."""
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
    words.write_text("\n".join(f'"{word}"' for word in escaped), encoding="ascii")
    options = [f"-runs={num_inputs * 2}", f"-seed={seed}", f"-dict={words}", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.robustness.fuzz")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("plain", "atheris"), default="plain")
    args = parser.parse_args()
    if args.engine == "atheris":
        return run_atheris(args.inputs, args.seed)
    began = perf_counter()
    findings = run_plain(args.inputs, args.seed)
    print(findings.report(f"seed {args.seed}", perf_counter() - began))
    sys.exit(0 if findings.is_clean else 1)


if __name__ == "__main__":
    main()
