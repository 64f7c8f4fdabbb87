"""Messages and Responses for tests: requests of both, and answers as a parser's events."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.endpoints.anthropic_messages import MessagesWriter, parse_messages
from mlxlite.api.endpoints.responses import ResponsesRequest, parse_responses
from mlxlite.api.request import ChatRequest
from mlxlite.api.responses_writer import ResponsesWriter
from mlxlite.api.tools import Tool
from mlxlite.api.writers import Collected, Envelope
from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.http.errors import APIError, ErrorKind
from mlxlite.output.events import (
    Done,
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)

HELLO = [{"role": "user", "content": "hello"}]
USER = Message(Role.USER, "hello")
USAGE = Usage(num_prompt=10, num_cached=4, num_output=5, num_reasoning=2, decode_s=2.0)
DONE = Done(FinishReason.STOP, USAGE)
CUT = Done(FinishReason.LENGTH, USAGE)
CANCELLED = Done(FinishReason.CANCELLED, USAGE)
STOPPED = Done(FinishReason.STOP, USAGE, stop="###")
CALLED = Done(FinishReason.STOP, USAGE, num_calls=2)
FAILURE = APIError(ErrorKind.MODEL_FAILED, "the model failed")

AWKWARD = [
    "plain",
    "",
    'a "b" \\',
    "line\nbreak\r\n",
    "\0\x1f\x85\u2028",
    "🙂 日本語",
    "data: x\n\n",
]

LOGPROBS = "message.output_text.logprobs"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool("get_weather", "Get the weather in a city.", SCHEMA)
ABOUT = {"name": WEATHER.name, "description": WEATHER.description}
MESSAGES_TOOL = {**ABOUT, "input_schema": SCHEMA}
RESPONSES_TOOL = {"type": "function", **ABOUT, "parameters": SCHEMA}


def token_bytes(token: int) -> bytes:
    """A byte-level vocabulary: a token is a byte."""
    return bytes([token])


def messages(**fields: Any) -> ChatRequest:
    body = {"model": "tiny", "max_tokens": 2048, "messages": HELLO, **fields}
    return parse_messages(json.dumps(body).encode())


def response(**fields: Any) -> ResponsesRequest:
    return parse_responses(json.dumps({"model": "tiny", "input": "hello", **fields}).encode())


Parse = Callable[..., ChatRequest]


def refusal(parse: Parse, **fields: Any) -> APIError:
    with pytest.raises(APIError) as caught:
        parse(**fields)
    assert caught.value.status == 400
    return caught.value


THINKS = {"enable_thinking": True}
DOG = "https://example.com/dog.png"

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["base64", "url", DOG]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def item(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


OUTPUT = item("function_call_output", call_id="call_1", output="etc")
MSG = Envelope("msg_1", 1_700_000_000, "org/model", "fp_0123456789abcdef")
RESP = Envelope("resp_1", 1_700_000_000, "org/model", "fp_0123456789abcdef")


def frames(stream: bytes) -> Iterator[tuple[str, Any]]:
    """Each event's name and data, of a stream that is nothing but such events."""
    *events, rest = stream.decode().split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        payload = json.loads(data.removeprefix("data: "))
        assert payload["type"] == name.removeprefix("event: ")
        yield payload["type"], payload


def run(writer: Any, pieces: Sequence[str | ParserEvent], end: Done | APIError = DONE) -> bytes:
    stream: bytes = writer.begin()
    for piece in pieces:
        stream += writer.event(0, TextDelta(piece) if isinstance(piece, str) else piece)
    failed = isinstance(end, APIError)
    return stream + (writer.fail(end) if failed else writer.done(0, end, end.usage))


def thought(text: str, *logprobs: tuple[int, Logprobs]) -> ReasoningDelta:
    return ReasoningDelta(text, logprobs=logprobs)


def called(call: ToolCall, *arguments: str) -> list[ParserEvent]:
    """A call; its arguments in pieces, or whole."""
    pieces = map(ToolCallArguments, arguments or (call.arguments,))
    return [ToolCallStart(call.id, call.name), *pieces, ToolCallEnd(call.arguments)]


PARIS = ToolCall("call_1", "get_weather", '{"city":"Paris"}')
NOW = ToolCall("call_2", "now", "{}")

# As a parser emits it: reasoning, text, two calls.
FULL = [thought("h"), thought("m"), "let me ", "see", *called(PARIS), *called(NOW)]

FULL_MESSAGE = Message(
    Role.ASSISTANT,
    "let me see",
    reasoning="hm",
    tool_calls=(
        ToolCall("call_1", "get_weather", {"city": "Paris"}),
        ToolCall("call_2", "now", {}),
    ),
)


def choice_of(pieces: Sequence[str | ParserEvent], done: Done) -> Collected:
    """What an answer that does not stream is made of."""
    choice = Collected(done=done)
    for piece in pieces:
        choice.take(TextDelta(piece) if isinstance(piece, str) else piece)
    return choice


def broken(text: str = "<call>{") -> list[ParserEvent]:
    """One that does not parse, and what follows."""
    start, arguments = ToolCallStart("call_3", "ls"), ToolCallArguments("{")
    return [start, arguments, ToolCallInvalid(text), TextDelta("!</call>")]


# Anything that may come, in any order.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ONE = st.one_of(TEXT, st.builds(thought, TEXT)).map(lambda piece: [piece])

CALLS = st.sampled_from(
    [called(PARIS), called(NOW), called(PARIS) + called(NOW), called(PARIS, '{"city":', '"Paris"}')]
)


def listed(groups: st.SearchStrategy[Any]) -> st.SearchStrategy[list[str | ParserEvent]]:
    return st.lists(groups).map(lambda found: [piece for group in found for piece in group])


def message_stream(*pieces: str | ParserEvent, end: Done | APIError = DONE) -> bytes:
    return run(MessagesWriter(MSG, 10), pieces, end)


def anthropic_client(content: bytes, kind: str = "text/event-stream", status: int = 200) -> Any:
    """Anthropic's client, which reads this whatever it asks."""
    answer = httpx2.Response(status, content=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    return anthropic.Anthropic(api_key="x", base_url="http://test", http_client=http, max_retries=0)


def read_by_anthropic(stream: bytes) -> Any:
    with anthropic_client(stream).messages.stream(
        model="tiny", max_tokens=5, messages=HELLO
    ) as read:
        return read.get_final_message()


OPENAI_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def responses_writer(**fields: Any) -> ResponsesWriter:
    request = response(**fields)
    return ResponsesWriter(RESP, token_bytes, request.echo, request.tools)


def response_stream(*pieces: str | ParserEvent, end: Done | APIError = DONE) -> bytes:
    return run(responses_writer(), pieces, end)


def openai_client(content: bytes, kind: str = "text/event-stream") -> openai.OpenAI:
    answer = httpx2.Response(200, content=content, headers={"content-type": kind})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda _: answer))
    return openai.OpenAI(api_key="x", base_url="http://test", http_client=http, max_retries=0)


def read_by_openai(stream: bytes) -> tuple[list[Any], Response]:
    with openai_client(stream).responses.stream(model="tiny", input="hello") as read:
        return list(read), read.get_final_response()


def validated(stream: bytes) -> list[tuple[str, Any]]:
    """The events, each of which is what OpenAI's types take, and numbered."""
    events = list(frames(stream))
    for number, (_, payload) in enumerate(events):
        assert payload["sequence_number"] == number
        # JSON's strictness: a whole number is a float's value too
        OPENAI_EVENT.validate_json(json.dumps(payload), strict=True)
    return events


CALL_EVENTS = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]
