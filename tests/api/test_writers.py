"""The shapes of answers, chunks and errors, checked against OpenAI's own types.

Pure: outputs in, JSON out.
"""

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from openai.types import CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import mlxlite
from mlxlite.api.answer import failure, total_usage
from mlxlite.api.conversation import ToolCall
from mlxlite.api.endpoints import admin
from mlxlite.api.endpoints.admin import (
    cache_stats,
    model_list,
)
from mlxlite.api.endpoints.chat_completions import ChatWriter
from mlxlite.api.render import context_exceeded
from mlxlite.api.service import ModelCard
from mlxlite.api.writers import (
    MIN_LOGPROB,
    Collected,
    Envelope,
    StreamOptions,
    Writer,
    finish_reason,
    logprobs_json,
    timings_json,
    usage_json,
)
from mlxlite.config.options import Config
from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.engine.step import Load
from mlxlite.http.errors import APIError, ErrorKind, bad_request, retry_later, truncate
from mlxlite.output.events import (
    Done,
    ParserEvent,
    Progress,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)
from mlxlite.prefix_cache.operations import CacheStats

ENVELOPE = Envelope("chatcmpl-1", 1_700_000_000, "org/model", "fp_0123456789abcdef")
USAGE = Usage(num_prompt=10, num_cached=4, num_output=5, queue_s=1.0, prefill_s=0.5, decode_s=2.0)
DONE = Done(FinishReason.STOP, USAGE)
AWKWARD = [
    "plain",
    "",
    'a "quoted" \\ backslash',
    "line\nbreak\r\nand\ttab",
    "\0",
    '"\0"',
    "\x01\x1f\x7f\x85",
    "\u2028 and \u2029",
    "🙂👩‍👩‍👧 日本語 äöü",
    "\ufeff\ufffd\uffff\U0010ffff",
    "data: [DONE]\n\n",
    "</script>",
]


def token_bytes(token: int) -> bytes:
    """A byte-level vocabulary: a token is a byte."""
    return bytes([token])


def payloads_of(frames: bytes) -> list[bytes]:
    """The data of a stream's frames, each of which is one line and a blank one."""
    blocks = frames.split(b"\n\n")
    assert blocks.pop() == b""
    assert all(block.startswith(b"data: ") for block in blocks)
    payloads = [block.removeprefix(b"data: ") for block in blocks]
    assert not any(b"\n" in payload or b"\r" in payload for payload in payloads)
    return payloads


def one_chunk(frames: bytes) -> Any:
    """The payload of the only frame."""
    (payload,) = payloads_of(frames)
    return json.loads(payload)


def writer(*, num_choices: int = 1, include_usage: bool = False, **options: bool) -> ChatWriter:
    options["include_usage"] = include_usage
    return ChatWriter(ENVELOPE, token_bytes, StreamOptions(**options), num_choices=num_choices)


def chunks_of(text: str, done: Done = DONE, *, include_usage: bool = False) -> list[Any]:
    """One choice's stream: role, text, finish and, where it was asked for, usage."""
    chat: Writer = writer(include_usage=include_usage)
    frames = chat.begin() + chat.event(0, TextDelta(text)) + chat.done(0, done, done.usage)
    *payloads, end = payloads_of(frames)
    assert end == b"[DONE]"
    return [json.loads(payload) for payload in payloads]


def completion(*choices: Collected, has_logprobs: bool = False) -> bytes:
    chat = ChatWriter(ENVELOPE, token_bytes, num_choices=len(choices), has_logprobs=has_logprobs)
    dones = [choice.done for choice in choices if choice.done is not None]
    return chat.whole(choices, total_usage(dones))


def whole(text: str = "hello", done: Done = DONE) -> Any:
    return json.loads(completion(Collected([text], done=done)))


# --- the whole answer ---------------------------------------------------------------------------


def test_a_whole_answer_has_every_key_that_openais_document_requires() -> None:
    assert whole() == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "org/model",
        "system_fingerprint": "fp_0123456789abcdef",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "timings": {
            "cache_n": 4,
            "prompt_n": 6,
            "prompt_ms": 500.0,
            "prompt_per_second": 12.0,
            "predicted_n": 5,
            "predicted_ms": 2000.0,
            "predicted_per_second": 2.0,
        },
    }


@pytest.mark.parametrize("text", AWKWARD)
def test_a_whole_answer_is_what_openais_own_types_take(text: str) -> None:
    answer = ChatCompletion.model_validate_json(
        completion(Collected([text[:2], text[2:]], done=DONE)), strict=True
    )
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (FinishReason.STOP, "stop"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.CANCELLED, "abort"),
    ],
)
def test_every_end_has_its_word_streamed_or_not(reason: FinishReason, said: str) -> None:
    done = replace(DONE, reason=reason)
    assert whole(done=done)["choices"][0]["finish_reason"] == said
    assert chunks_of("x", done)[-1]["choices"][0]["finish_reason"] == said


def test_a_failed_sequence_is_an_error_with_its_reason() -> None:
    error = failure(Done(FinishReason.ERROR, USAGE, "out of memory"))
    assert error.status == 500
    assert error.message == "out of memory"
    assert failure(Done(FinishReason.ERROR)).message


def test_a_stream_that_fails_sends_the_error_in_both_forms_and_ends() -> None:
    error = failure(Done(FinishReason.ERROR, USAGE, 'out of "memory"\n'))
    frames = writer().fail(error)
    data, other, end, rest = frames.split(b"\n\n")
    assert json.loads(data.removeprefix(b"data: "))["error"]["message"] == error.message
    assert json.loads(other.removeprefix(b"error: ")) == {"message": error.message}
    assert (end, rest) == (b"data: [DONE]", b"")


# --- reasoning, calls, and why it stopped ---------------------------------------------------------

F = ToolCall("call_1", "f", '{"a":1}')
G = ToolCall("call_2", "g", "{}")
CALLED = replace(DONE, num_calls=2)


def called(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def call_events(call: ToolCall) -> list[ParserEvent]:
    """A call that is emitted whole."""
    return [
        ToolCallStart(call.id, call.name),
        ToolCallArguments(call.arguments),
        ToolCallEnd(call.arguments),
    ]


def choice_of(*events: ParserEvent, done: Done = DONE) -> Any:
    """The whole answer made of these events."""
    choice = Collected(done=done)
    for event in events:
        choice.take(event)
    raw = completion(choice)
    if done.reason is not FinishReason.CANCELLED:  # which OpenAI has no word for
        ChatCompletion.model_validate_json(raw, strict=True)
    return json.loads(raw)["choices"][0]


def test_reasoning_is_apart_from_the_content_under_both_names() -> None:
    message = choice_of(
        ReasoningDelta("hm"), ReasoningDelta("m"), TextDelta("hel"), TextDelta("lo")
    )["message"]
    assert message == {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "reasoning_content": "hmm",
        "reasoning": "hmm",
    }
    assert choice_of(ReasoningDelta("hmm"))["message"]["content"] == ""
    assert choice_of(TextDelta("x"))["message"].keys().isdisjoint({"reasoning", "tool_calls"})


def test_calls_are_listed_and_without_text_the_content_is_null() -> None:
    alone = choice_of(*call_events(F), *call_events(G), done=CALLED)
    assert alone["message"]["content"] is None
    assert alone["message"]["tool_calls"] == [called(F), called(G)]
    assert alone["finish_reason"] == "tool_calls"
    both = choice_of(TextDelta("text"), *call_events(F), done=CALLED)
    assert both["message"]["content"] == "text"


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (FinishReason.STOP, "tool_calls"),
        (FinishReason.LENGTH, "length"),
        (FinishReason.CANCELLED, "abort"),
    ],
)
def test_only_an_answer_that_ended_by_itself_ends_with_its_calls(
    reason: FinishReason, said: str
) -> None:
    done = replace(CALLED, reason=reason)
    assert finish_reason(done) == said
    assert choice_of(*call_events(F), done=done)["finish_reason"] == said
    assert chunks_of("x", done)[-1]["choices"][0]["finish_reason"] == said


@pytest.mark.parametrize(
    ("reason", "stop"),
    [(FinishReason.STOP, "User:"), (FinishReason.STOP, None), (FinishReason.LENGTH, "repetition")],
)
def test_the_matched_stop_string_is_reported(reason: FinishReason, stop: str | None) -> None:
    done = replace(DONE, reason=reason, stop=stop)
    assert choice_of(TextDelta("x"), done=done)["stop_reason"] == stop
    *others, last = chunks_of("x", done)
    assert last["choices"][0]["stop_reason"] == stop
    assert all("stop_reason" not in chunk["choices"][0] for chunk in others)


def test_a_chunk_is_of_one_kind_and_calls_are_numbered_by_choice() -> None:
    chat = writer(num_choices=2)

    def said(index: int, event: ParserEvent) -> Any:
        chunk = one_chunk(chat.event(index, event))
        ChatCompletionChunk.model_validate(chunk, strict=True)
        (choice,) = chunk["choices"]
        assert (choice["index"], choice["finish_reason"]) == (index, None)
        return choice["delta"]

    def start(number: int, call: ToolCall) -> Any:
        return {"tool_calls": [{"index": number} | called(replace(call, arguments=""))]}

    assert said(0, ReasoningDelta("hm")) == {"reasoning_content": "hm", "reasoning": "hm"}
    assert said(0, TextDelta("x")) == {"content": "x"}
    for index, number, call in ((0, 0, F), (1, 0, G), (0, 1, G), (0, 2, F)):
        begun, arguments, end = call_events(call)
        assert said(index, begun) == start(number, call)
        more = {"index": number, "function": {"arguments": call.arguments}}
        assert said(index, arguments) == {"tool_calls": [more]}
        assert chat.event(index, end) == b""


def test_a_call_is_started_and_then_only_its_arguments_are_written() -> None:
    chat = writer()
    events = [
        ToolCallStart("call_1", "f"),
        ToolCallArguments('{"a"'),
        ToolCallArguments(":1}"),
        ToolCallEnd(F.arguments),
        ToolCallStart("x", "g"),
    ]
    frames = [chat.event(0, event) for event in events]
    assert frames.pop(3) == b""
    deltas = [one_chunk(frame)["choices"][0]["delta"]["tool_calls"] for frame in frames]
    assert deltas == [
        [{"index": 0} | called(replace(F, arguments=""))],
        [{"index": 0, "function": {"arguments": '{"a"'}}],
        [{"index": 0, "function": {"arguments": ":1}"}}],
        [{"index": 1} | called(ToolCall("x", "g", ""))],
    ]
    assert one_chunk(chat.event(0, ToolCallInvalid("", logprobs=LOGPROBS)))["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": {"content": logprobs_json(LOGPROBS, token_bytes)},
        "finish_reason": None,
    }


@pytest.mark.parametrize("event", [ReasoningDelta("hm"), *call_events(F)])
def test_reasoning_and_call_chunks_carry_usage_timings_and_logprobs_too(event: Any) -> None:
    event = replace(event, logprobs=LOGPROBS, usage=USAGE)
    options = {"include_usage": True, "continuous_usage": True, "timings_per_token": True}
    chunk = one_chunk(writer(**options).event(0, event))
    assert chunk["usage"] == usage_json(USAGE)
    assert chunk["timings"] == timings_json(USAGE)
    entries = logprobs_json(LOGPROBS, token_bytes)
    assert chunk["choices"][0]["logprobs"] == {"content": entries}


def test_tokens_of_reasoning_are_counted_in_the_output() -> None:
    usage = replace(USAGE, num_reasoning=3)
    told = usage_json(usage)
    assert told["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert told["completion_tokens"] == 5
    total = total_usage([replace(DONE, usage=usage), replace(DONE, usage=usage)])
    assert (total.num_reasoning, total.num_output) == (6, 10)
    CompletionUsage.model_validate(told, strict=True)


# --- usage and timings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "usage",
    [
        USAGE,
        Usage(),
        Usage(num_prompt=1, num_output=1, prefill_s=0.1),
        Usage(num_prompt=7, num_cached=7),
        Usage(num_prompt=100, num_cached=99, num_output=3, prefill_s=1e-9, decode_s=1e-9),
    ],
)
def test_usage_and_timings_add_up(usage: Usage) -> None:
    told, timings = usage_json(usage), timings_json(usage)
    CompletionUsage.model_validate(told, strict=True)
    assert told["total_tokens"] == told["prompt_tokens"] + told["completion_tokens"]
    assert timings["prompt_n"] + timings["cache_n"] == told["prompt_tokens"]
    assert timings["cache_n"] == told["prompt_tokens_details"]["cached_tokens"]
    assert timings["predicted_n"] == told["completion_tokens"]
    assert all(value >= 0 for value in timings.values())
    assert json.loads(json.dumps(timings, allow_nan=False)) == timings


def test_rates_are_counts_over_times() -> None:
    timings = timings_json(Usage(num_prompt=30, num_output=11, prefill_s=0.25, decode_s=0.5))
    assert timings["prompt_ms"] == 250.0
    assert timings["prompt_per_second"] == 120.0
    assert timings["predicted_ms"] == 500.0
    assert timings["predicted_per_second"] == 20.0, "11 tokens have 10 gaps"


# --- chunks -------------------------------------------------------------------------------------


def test_a_stream_is_role_text_and_a_finish_with_usage_and_timings() -> None:
    role, text, finish = chunks_of("hello")
    assert role["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert text["choices"] == [
        {"index": 0, "delta": {"content": "hello"}, "logprobs": None, "finish_reason": None}
    ]
    assert finish["choices"] == [
        {
            "index": 0,
            "delta": {},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert finish["usage"] == whole()["usage"]
    assert finish["timings"] == whole()["timings"]
    assert "usage" not in role
    assert "usage" not in text


def test_with_include_usage_the_usage_moves_to_a_chunk_of_its_own() -> None:
    role, text, finish, usage = chunks_of("hello", include_usage=True)
    assert [chunk["usage"] for chunk in (role, text, finish)] == [None, None, None]
    assert finish["timings"] == whole()["timings"], "the timings stay"
    assert usage["choices"] == []
    assert usage["usage"] == whole()["usage"]
    assert "timings" not in usage


@pytest.mark.parametrize("include_usage", [False, True])
def test_every_chunk_repeats_the_envelope(include_usage: bool) -> None:
    for chunk in chunks_of("x", include_usage=include_usage):
        assert chunk["id"] == "chatcmpl-1"
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["created"] == 1_700_000_000
        assert chunk["model"] == "org/model"
        assert chunk["system_fingerprint"] == "fp_0123456789abcdef"


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", AWKWARD)
def test_any_text_survives_a_chunk(text: str, include_usage: bool) -> None:
    chunks = [
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
        for chunk in chunks_of(text, include_usage=include_usage)
    ]
    assert chunks[1].choices[0].delta.content == text


@pytest.mark.parametrize("model", ['a"b', "\\", "null", '{"content":"x"}', "日本語", "\n"])
def test_any_model_name_survives_the_frame_that_is_built_once(model: str) -> None:
    chat = ChatWriter(replace(ENVELOPE, model=model), token_bytes, num_choices=2)
    for index in range(2):
        chunk = one_chunk(chat.event(index, TextDelta("x")))
        assert chunk["model"] == model
        assert chunk["choices"][0]["index"] == index
        assert chunk["choices"][0]["delta"] == {"content": "x"}


def test_a_stream_folds_to_the_whole_answer() -> None:
    chat = writer()
    texts = [one_chunk(chat.event(0, TextDelta(text))) for text in AWKWARD]
    joined = "".join(chunk["choices"][0]["delta"]["content"] for chunk in texts)
    assert joined == whole("".join(AWKWARD))["choices"][0]["message"]["content"]


# --- several choices ----------------------------------------------------------------------------

OTHER = Done(FinishReason.LENGTH, replace(USAGE, num_output=7, prefill_s=0.6, decode_s=3.0))


def test_choices_are_numbered_and_each_has_its_own_end() -> None:
    answer = ChatCompletion.model_validate_json(
        completion(Collected(["one"], done=DONE), Collected(["two"], done=OTHER)), strict=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.message.content for choice in answer.choices] == ["one", "two"]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "length"]


def test_usage_adds_the_choices_up_and_counts_the_prompt_once() -> None:
    answer = json.loads(
        completion(Collected(done=DONE), Collected(done=OTHER), Collected(done=DONE))
    )
    assert answer["usage"]["prompt_tokens"] == 10
    assert answer["usage"]["completion_tokens"] == 5 + 7 + 5
    assert answer["usage"]["total_tokens"] == 27
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert answer["timings"]["prompt_n"] == 6
    assert answer["timings"]["predicted_n"] == 17
    assert answer["timings"]["predicted_ms"] == 3000.0, "they ran at the same time"
    assert total_usage([DONE]) == DONE.usage


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_stream_of_choices_has_a_role_and_a_finish_for_each_and_one_usage(
    include_usage: bool,
) -> None:
    chat = writer(num_choices=2, include_usage=include_usage)
    total = total_usage([OTHER, DONE])
    frames = [
        chat.begin(),
        chat.event(1, TextDelta("two")),
        chat.event(0, TextDelta("one")),
        chat.done(1, OTHER, None),
        chat.done(0, DONE, total),
    ]
    *payloads, end = payloads_of(b"".join(frames))
    assert end == b"[DONE]"
    assert len(payloads) == 6 + include_usage
    for payload in payloads:
        ChatCompletionChunk.model_validate_json(payload, strict=True)
    chunks = [json.loads(payload) for payload in payloads]
    roles, texts, (first, last), rest = chunks[:2], chunks[2:4], chunks[4:6], chunks[6:]
    assert [chunk["choices"][0]["index"] for chunk in chunks[:6]] == [0, 1, 1, 0, 1, 0]
    assert all(chunk["choices"][0]["delta"]["role"] == "assistant" for chunk in roles)
    assert [chunk["choices"][0]["delta"] for chunk in texts] == [
        {"content": "two"},
        {"content": "one"},
    ]
    assert first["choices"][0]["finish_reason"] == "length"
    assert last["choices"][0]["finish_reason"] == "stop"
    assert "timings" not in first
    assert last["timings"] == timings_json(total)
    assert [chunk.get("usage") for chunk in chunks[:5]] == [None] * 5
    assert (last, *rest)[-1]["usage"] == usage_json(total)
    assert not include_usage or last["usage"] is None


# --- what a stream carries on demand ------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [(), ((97, Logprobs(-0.5)),)])
def test_usage_and_timings_are_in_every_text_chunk_on_request(logprobs: Any) -> None:
    now = replace(USAGE, num_output=2)
    delta = TextDelta("x", logprobs=logprobs, usage=now)
    plain = one_chunk(writer().event(0, delta))
    assert "timings" not in plain
    assert "usage" not in plain
    usage = one_chunk(writer(include_usage=True, continuous_usage=True).event(0, delta))
    assert usage == plain | {"usage": usage_json(now)}
    timed = one_chunk(writer(timings_per_token=True).event(0, delta))
    assert timed == plain | {"timings": timings_json(now)}
    both = writer(include_usage=True, continuous_usage=True, timings_per_token=True)
    assert one_chunk(both.event(0, delta)) == usage | timed
    ChatCompletionChunk.model_validate(usage, strict=True)


def test_progress_is_llama_servers_object_in_a_chunk_without_text() -> None:
    usage = replace(USAGE, num_output=0, prefill_s=0.0625)
    chunk = one_chunk(writer(num_choices=2).event(1, Progress(7, usage)))
    assert chunk["prompt_progress"] == {"total": 10, "cache": 4, "processed": 7, "time_ms": 62.5}
    (choice,) = chunk["choices"]
    assert (choice["index"], choice["delta"], choice["finish_reason"]) == (1, {}, None)
    ChatCompletionChunk.model_validate(chunk, strict=True)


# --- logprobs -----------------------------------------------------------------------------------


def test_logprobs_are_the_token_as_text_and_bytes_with_its_rivals() -> None:
    drawn = Logprobs(-0.25, ((97, -0.25), (98, -1.5)))
    assert logprobs_json([(97, drawn)], token_bytes) == [
        {
            "token": "a",
            "logprob": -0.25,
            "bytes": [97],
            "top_logprobs": [
                {"token": "a", "logprob": -0.25, "bytes": [97]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        }
    ]
    (alone,) = logprobs_json([(97, Logprobs(-0.25))], token_bytes)
    assert alone["top_logprobs"] == []


def test_the_bytes_of_halves_of_a_character_add_up_to_it() -> None:
    halves = [(byte, Logprobs(-1.0)) for byte in "a🙂".encode()]
    entries = logprobs_json(halves, token_bytes)
    assert [entry["token"] for entry in entries] == ["a", *"\ufffd" * 4]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "a🙂"


def test_a_logprob_of_minus_infinity_is_a_finite_number_in_json() -> None:
    drawn = Logprobs(-math.inf, ((97, -math.inf), (98, -20_000.0)))
    (entry,) = logprobs_json([(97, drawn)], token_bytes)
    said = [entry["logprob"], *(rival["logprob"] for rival in entry["top_logprobs"])]
    assert said == [MIN_LOGPROB] * 3
    assert math.isfinite(MIN_LOGPROB)


LOGPROBS = ((0xF0, Logprobs(-1.0, ((0xF0, -1.0), (65, -math.inf)))), (0x9F, Logprobs(-2.0)))


def test_logprobs_are_what_openais_own_types_take() -> None:
    entries = logprobs_json(LOGPROBS, token_bytes)
    choices = Collected(["x"], drawn=list(LOGPROBS), done=DONE), Collected([], done=DONE)
    asked = ChatCompletion.model_validate_json(completion(*choices, has_logprobs=True), strict=True)
    said, silent = asked.choices
    assert said.logprobs is not None
    assert said.logprobs.content is not None
    assert [item.model_dump() for item in said.logprobs.content] == entries
    assert silent.logprobs is not None
    assert silent.logprobs.content == []
    unasked = ChatCompletion.model_validate_json(
        completion(Collected(["x"], done=DONE), Collected(["y"], done=DONE)), strict=True
    )
    assert [choice.logprobs for choice in unasked.choices] == [None, None]


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", ["", "x", '"\0"\n'])
def test_a_chunk_carries_the_logprobs_of_its_tokens(text: str, include_usage: bool) -> None:
    chat = writer(num_choices=2, include_usage=include_usage)
    (payload,) = payloads_of(chat.event(1, TextDelta(text, logprobs=LOGPROBS)))
    chunk = ChatCompletionChunk.model_validate_json(payload, strict=True)
    (choice,) = chunk.choices
    assert choice.index == 1
    assert choice.delta.content == text
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    entries = [item.model_dump() for item in choice.logprobs.content]
    assert entries == logprobs_json(LOGPROBS, token_bytes)
    asked = json.loads(payload)
    asked["choices"][0]["logprobs"] = None
    assert asked == one_chunk(chat.event(1, TextDelta(text))), "and is like any other in all else"


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ErrorKind)
def test_an_error_has_all_four_keys_whatever_its_cause(cause: ErrorKind) -> None:
    error = APIError(cause, "what went wrong")
    status, type_, code = cause.value
    assert error.status == status
    assert json.loads(error.body()) == {
        "error": {"message": "what went wrong", "type": type_, "param": None, "code": code}
    }
    assert json.loads(error.line()) == {"message": "what went wrong"}
    assert str(error) == "what went wrong"


@pytest.mark.parametrize("message", [text for text in AWKWARD if text])
def test_any_message_survives_an_error_and_stays_on_one_line(message: str) -> None:
    error = bad_request(message, "stop")
    assert json.loads(error.body())["error"]["message"] == message
    assert json.loads(error.line())["message"] == message
    assert b"\n" not in error.body()
    assert b"\n" not in error.line()


def test_a_status_of_its_own_replaces_the_causes() -> None:
    assert APIError(ErrorKind.MALFORMED, "too large", status=413).status == 413


def test_a_temporary_error_has_a_retry_after_header() -> None:
    error = retry_later(ErrorKind.QUEUE_FULL, "full", retry_after_s=3)
    assert error.status == 429
    assert error.headers == (("retry-after", "3"),)


def test_the_error_for_a_too_long_prompt_has_the_phrases_that_clients_match() -> None:
    error = context_exceeded(5000, 4096)
    told = json.loads(error.body())["error"]
    assert error.status == 400
    assert "the request exceeds the available context size." in told["message"]
    assert "maximum context length" in told["message"]
    assert told["type"] == "exceed_context_size_error"
    assert told["code"] == "context_length_exceeded"
    assert told["n_prompt_tokens"] == 5000
    assert told["n_ctx"] == 4096


def test_an_error_repeats_at_most_200_characters() -> None:
    assert truncate("x" * 200) == "x" * 200
    assert truncate("x" * 201) == "x" * 200 + "…"


# --- models, health, cancel ---------------------------------------------------------------------


def test_a_model_is_what_openais_own_type_takes() -> None:
    card = ModelCard("org/model", 1_700_000_000, 4096)
    told = model_list(card)
    assert told == {
        "object": "list",
        "data": [
            {
                "id": "org/model",
                "object": "model",
                "created": 1_700_000_000,
                "owned_by": "mlx",
                "max_model_len": 4096,
            }
        ],
        "models": [],
    }
    Model.model_validate(told["data"][0], strict=True)


def test_status_is_queue_rows_memory_cache_and_versions() -> None:
    card = ModelCard("org/model", 1_700_000_000, 4096)
    load = Load(num_waiting=2, num_running=3, num_bytes=500, max_bytes=None, num_steps=7)
    engine = SimpleNamespace(load=load, cache_stats=CacheStats())
    ready: Any = SimpleNamespace(model=SimpleNamespace(fingerprint="1"), engine=engine, card=card)
    said = admin.status(ready, Config(max_batch_size=8, max_queue=256))
    assert said == {
        "object": "status",
        "model": card.as_json() | {"fingerprint": "fp_1"},
        "queue": {"waiting": 2, "max": 256},
        "rows": {"running": 3, "max": 8, "steps": 7},
        "memory": {"bytes": 500, "max_bytes": None},
        "prefix_cache": cache_stats(CacheStats()),
        "versions": {"mlxlite": mlxlite.__version__},
    }
