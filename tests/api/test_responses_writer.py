"""A response's answer: streams are checked event by event against the SDK's types, and read by its
client; a whole answer equals the one that a stream ends with.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from dialects import (
    AWKWARD,
    CALL_EVENTS,
    CALLED,
    CALLS,
    CANCELLED,
    CUT,
    DONE,
    FAILURE,
    FULL,
    FULL_MESSAGE,
    HELLO,
    LOGPROBS,
    NOW,
    ONE,
    OUTPUT,
    PARIS,
    RESPONSES_TOOL,
    SCHEMA,
    STOPPED,
    USAGE,
    USER,
    broken,
    called,
    choice_of,
    frames,
    listed,
    openai_client,
    read_by_openai,
    response,
    response_stream,
    responses_writer,
    run,
    thought,
    validated,
)
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response

from mlxlite.api.conversation import Message, Role
from mlxlite.api.writers import Collected
from mlxlite.engine.sequence import FinishReason, Logprobs
from mlxlite.http.errors import APIError
from mlxlite.output.events import Done, ParserEvent, Progress, TextDelta, ToolCallStart


def distinct(pieces: Sequence[str | ParserEvent]) -> list[str | ParserEvent]:
    """The same with an id of its own for every call."""
    ids = (f"call_{number}" for number in itertools.count())
    return [
        replace(piece, id=next(ids)) if isinstance(piece, ToolCallStart) else piece
        for piece in pieces
    ]


ECHOED: dict[str, Any] = {
    "instructions": "be brief",
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "top_p": 0.9,
    "max_output_tokens": 64,
    "max_tool_calls": 3,
    "parallel_tool_calls": False,
    "previous_response_id": "resp_0",
    "user": "me",
    "safety_identifier": "me too",
    "prompt_cache_key": "key",
    "truncation": "disabled",
    "background": False,
    "tool_choice": "none",
    "tools": [{**RESPONSES_TOOL, "strict": True}, {"type": "function", "name": "f"}],
    "store": False,
    "top_logprobs": 0,
    "text": {
        "format": {
            "type": "json_schema",
            "name": "place",
            "description": "a place",
            "schema": SCHEMA,
            "strict": True,
        },
        "verbosity": "medium",
    },
}

FIRST = ["response.created", "response.in_progress"]
OPENED = ["response.output_item.added", "response.content_part.added"]

CLOSED = [
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def test_a_responses_stream_has_each_event_in_openais_order() -> None:
    events = validated(response_stream("hel", "", "lo"))
    text = ["response.output_text.delta"] * 2
    assert [kind for kind, _ in events] == [*FIRST, *OPENED, *text, *CLOSED, "response.completed"]
    by_kind = dict(events)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant"}
    assert by_kind["response.created"]["response"]["status"] == "in_progress"
    assert by_kind["response.created"]["response"]["output"] == []
    added = by_kind["response.output_item.added"]["item"]
    assert added == message | {"status": "in_progress", "content": []}
    assert by_kind["response.content_part.added"]["part"] == part | {"text": ""}
    assert by_kind["response.output_text.delta"].items() >= (place | {"delta": "lo"}).items()
    assert by_kind["response.output_text.done"].items() >= (place | {"text": "hello"}).items()
    assert by_kind["response.content_part.done"]["part"] == part
    item = message | {"status": "completed", "content": [part]}
    assert by_kind["response.output_item.done"]["item"] == item
    assert by_kind["response.completed"]["response"]["output"] == [item]


def test_a_whole_response_is_what_openais_own_types_take() -> None:
    writer = responses_writer(**ECHOED)
    body = writer.whole([Collected(["hel", "lo"], done=DONE)], USAGE)
    Response.model_validate_json(body, strict=True)
    answer = json.loads(body)
    assert answer.items() >= ECHOED.items()
    assert answer["id"] == "resp_1"
    assert answer["object"] == "response"
    assert answer["created_at"] == 1_700_000_000
    assert answer["status"] == "completed"
    assert answer["model"] == "org/model"
    assert answer["error"] is answer["incomplete_details"] is None
    assert answer["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 15,
    }
    client = openai_client(body, "application/json")
    assert client.responses.create(model="tiny", input="hello").output_text == "hello"


def test_a_silent_request_is_echoed_with_openais_defaults() -> None:
    answer = json.loads(responses_writer().whole([Collected(["x"], done=DONE)], USAGE))
    assert answer["store"] is answer["parallel_tool_calls"] is True
    assert answer["tool_choice"] == "auto"
    assert answer["tools"] == []
    assert answer["text"] == {"format": {"type": "text"}, "verbosity": "medium"}
    assert answer["reasoning"] == {"effort": None, "summary": None}
    for name in ("instructions", "temperature", "top_p", "previous_response_id", "user"):
        assert answer[name] is None
    writer = responses_writer(reasoning={"effort": "low", "summary": "auto"})
    answer = json.loads(writer.whole([Collected(["x"], done=DONE)], USAGE))
    assert answer["reasoning"]["effort"] == "low"


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [RESPONSES_TOOL], "tool_choice": "required"},
        {
            "tools": [RESPONSES_TOOL],
            "tool_choice": {"type": "function", "name": "get_weather"},
            "parallel_tool_calls": False,
        },
        {"text": {"format": {"type": "json_object"}, "verbosity": "medium"}},
    ],
)
def test_tools_tool_choice_and_format_are_echoed_as_requested(
    asked: dict[str, Any],
) -> None:
    body = responses_writer(**asked).whole([Collected(["x"], done=DONE)], USAGE)
    Response.model_validate_json(body, strict=True)
    assert json.loads(body).items() >= asked.items()
    validated(run(responses_writer(**asked), ["x"]))


RESPONSE_ENDS = [
    (DONE, "completed", None, "response.completed"),
    (STOPPED, "completed", None, "response.completed"),
    (CUT, "incomplete", {"reason": "max_output_tokens"}, "response.incomplete"),
    (CANCELLED, "cancelled", None, "response.incomplete"),
]


@pytest.mark.parametrize(("done", "status", "details", "kind"), RESPONSE_ENDS)
def test_a_streamed_response_ends_as_the_whole_one(
    done: Done, status: str, details: Any, kind: str
) -> None:
    streamed, whole = responses_writer(), responses_writer()
    *_, (last, payload) = validated(run(streamed, ["hel", "lo"], done))
    body = whole.whole([Collected(["hel", "lo"], done=done)], done.usage)
    assert last == kind
    assert payload["response"] == json.loads(body)
    assert payload["response"]["status"] == status
    assert payload["response"]["incomplete_details"] == details
    assert streamed.body == whole.body == body
    assert streamed.answer == whole.answer == Message(Role.ASSISTANT, "hello")


@pytest.mark.parametrize("end", [*(done for done, *_ in RESPONSE_ENDS), FAILURE])
def test_openais_client_reads_every_event_of_a_stream_however_it_ends(
    end: Done | APIError,
) -> None:
    stream = response_stream("hel", "lo", end=end)
    read = openai_client(stream).responses.create(model="tiny", input="hello", stream=True)
    assert [event.type for event in read] == [kind for kind, _ in frames(stream)]


def test_openais_client_accumulates_a_stream() -> None:
    events, final = read_by_openai(response_stream("hel", "lo"))
    assert final.output_text == "hello"
    assert final.usage is not None
    assert final.usage.total_tokens == 15
    assert [event.snapshot for event in events if event.type == "response.output_text.delta"] == [
        "hel",
        "hello",
    ]


@pytest.mark.parametrize("text", AWKWARD)
def test_openais_client_reads_awkward_text(text: str) -> None:
    assert read_by_openai(response_stream(text, text))[1].output_text == text + text


def test_an_empty_response_has_an_empty_message() -> None:
    stream = response_stream()
    kinds = [kind for kind, _ in validated(stream)]
    assert kinds == [*FIRST, *OPENED, *CLOSED, "response.completed"]
    assert read_by_openai(stream)[1].output_text == ""
    whole = responses_writer().whole([Collected([], done=DONE)], USAGE)
    assert json.loads(whole)["output"][0]["content"][0]["text"] == ""


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_split_of_a_text_is_the_same_response(pieces: list[str]) -> None:
    writer = responses_writer()
    read = list(frames(run(writer, pieces)))
    deltas = [payload["delta"] for kind, payload in read if kind == "response.output_text.delta"]
    assert "".join(deltas) == "".join(pieces)
    whole = responses_writer().whole([Collected(["".join(pieces)], done=DONE)], USAGE)
    assert writer.body == whole
    assert writer.answer == Message(Role.ASSISTANT, "".join(pieces))


def test_logprobs_arrive_with_their_text_and_all_of_them_at_the_end() -> None:
    drawn = [(97, Logprobs(-0.5, ((97, -0.5), (98, -1.5)))), (98, Logprobs(-0.25))]
    asked: dict[str, Any] = {"include": [LOGPROBS], "top_logprobs": 2}
    writer = responses_writer(**asked)
    stream = writer.begin() + writer.event(0, TextDelta("a", logprobs=(drawn[0],)))
    stream += writer.event(0, TextDelta("", logprobs=(drawn[1],))) + writer.done(0, DONE, USAGE)
    events = validated(stream)
    deltas = [payload for kind, payload in events if kind == "response.output_text.delta"]
    assert [[entry["token"] for entry in delta["logprobs"]] for delta in deltas] == [["a"], ["b"]]
    rivals = deltas[0]["logprobs"][0]["top_logprobs"]
    assert [entry["token"] for entry in rivals] == ["a", "b"]
    final = dict(events)["response.output_text.done"]["logprobs"]
    assert final == deltas[0]["logprobs"] + deltas[1]["logprobs"]
    whole = responses_writer(**asked)
    body = whole.whole([Collected(["a"], drawn=drawn, done=DONE)], USAGE)
    assert Response.model_validate_json(body, strict=True).top_logprobs == 2
    assert json.loads(body)["output"][0]["content"][0]["logprobs"] == final


def _ended(kind: str) -> list[str]:
    return [f"response.{kind}.done", "response.content_part.done", "response.output_item.done"]


def test_reasoning_a_message_and_calls_are_items_one_after_the_other() -> None:
    events = validated(response_stream(*FULL, end=CALLED))
    assert [kind for kind, _ in events] == [
        *FIRST,
        *(*OPENED, *["response.reasoning_text.delta"] * 2, *_ended("reasoning_text")),
        *(*OPENED, *["response.output_text.delta"] * 2, *CLOSED),
        *(*CALL_EVENTS, *CALL_EVENTS),
        "response.completed",
    ]
    output = [
        {
            "id": "rs_1",
            "type": "reasoning",
            "status": "completed",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hm"}],
        },
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [
                {"type": "output_text", "text": "let me see", "annotations": [], "logprobs": []}
            ],
        },
        {
            "id": "fc_1",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_1",
            "name": "get_weather",
            "arguments": '{"city":"Paris"}',
        },
        {
            "id": "fc_2",
            "type": "function_call",
            "status": "completed",
            "call_id": "call_2",
            "name": "now",
            "arguments": "{}",
        },
    ]
    assert events[-1][1]["response"]["output"] == output
    by_kind = [(kind.removeprefix("response."), payload) for kind, payload in events]
    assert [x["item"] for kind, x in by_kind if kind == "output_item.done"] == output
    assert [x["item"] for kind, x in by_kind if kind == "output_item.added"] == [
        item
        | {"status": "in_progress"}
        | ({"arguments": ""} if "name" in item else {"content": []})
        for item in output
    ]
    for kind, payload in by_kind:
        if "item_id" in payload:
            assert payload["item_id"] == output[payload["output_index"]]["id"]
            is_call = output[payload["output_index"]]["type"] == "function_call"
            assert payload.get("content_index") == (None if is_call else 0)
        if kind == "function_call_arguments.done":
            item = output[payload["output_index"]]
            assert (payload["name"], payload["arguments"]) == (item["name"], item["arguments"])
        if kind == "reasoning_text.done":
            assert payload["text"] == "hm"


def test_a_whole_response_with_calls_is_the_one_that_a_stream_ends_with() -> None:
    streamed, whole = responses_writer(), responses_writer()
    run(streamed, FULL, CALLED)
    body = whole.whole([choice_of(FULL, CALLED)], USAGE)
    Response.model_validate_json(body, strict=True)
    assert streamed.body == whole.body == body
    assert streamed.answer == whole.answer == FULL_MESSAGE
    client = openai_client(body, "application/json")
    read = client.responses.create(model="tiny", input="hello")
    assert read.output_text == "let me see"
    assert [item.type for item in read.output] == [
        *("reasoning", "message", "function_call", "function_call"),
    ]


def test_openais_client_accumulates_reasoning_and_calls() -> None:
    events, final = read_by_openai(response_stream(*FULL, end=CALLED))
    assert final.output_text == "let me see"
    deltas = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert [event.snapshot for event in deltas] == ['{"city":"Paris"}', "{}"]
    reasoning, _, paris, now = final.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "hm"
    assert paris.type == now.type == "function_call"
    assert (paris.call_id, paris.name, paris.arguments) == (
        "call_1",
        "get_weather",
        PARIS.arguments,
    )


def test_an_answer_that_only_calls_has_no_message() -> None:
    writer = responses_writer()
    events = validated(run(writer, called(PARIS), CALLED))
    assert [kind for kind, _ in events] == [*FIRST, *CALL_EVENTS, "response.completed"]
    assert writer.answer == Message(Role.ASSISTANT, None, tool_calls=FULL_MESSAGE.tool_calls[:1])
    body = responses_writer().whole([choice_of(called(PARIS), CALLED)], USAGE)
    assert writer.body == body


def test_a_conversation_with_calls_is_continued_by_their_outputs_alone() -> None:
    writer = responses_writer(tools=[RESPONSES_TOOL])
    run(writer, FULL, CALLED)
    assert writer.answer is not None
    asked = response(tools=[RESPONSES_TOOL], input=[OUTPUT], previous_response_id="resp_1")
    request = asked.after((*response().conversation, writer.answer))
    assert request.messages == (
        USER,
        FULL_MESSAGE,
        Message(Role.TOOL, "etc", tool_call_id="call_1"),
    )
    assert not request.is_continuation


def test_a_client_that_keeps_the_conversation_itself_sends_the_same_back() -> None:
    writer = responses_writer()
    run(writer, FULL, CALLED)
    assert writer.body is not None
    output = json.loads(writer.body)["output"]
    assert response(input=[*HELLO, *output]).messages == (USER, FULL_MESSAGE)


@pytest.mark.parametrize("done", [CUT, CANCELLED])
def test_reasoning_that_is_cut_is_incomplete_and_no_message_follows(done: Done) -> None:
    streamed = responses_writer()
    validated(run(streamed, [thought("hm")], done))
    body = responses_writer().whole([choice_of([thought("hm")], done)], USAGE)
    assert streamed.body == body
    (item,) = json.loads(body)["output"]
    assert (item["type"], item["status"]) == ("reasoning", "incomplete")
    assert streamed.answer == Message(Role.ASSISTANT, "", reasoning="hm")


def test_a_call_that_is_made_is_complete_though_the_answer_is_cut() -> None:
    done = replace(CALLED, reason=FinishReason.LENGTH)
    *_, (kind, payload) = validated(response_stream("a", *called(PARIS), end=done))
    assert kind == "response.incomplete"
    assert [item["status"] for item in payload["response"]["output"]] == ["completed"] * 2


def test_a_stream_that_fails_leaves_only_what_was_open_incomplete() -> None:
    pieces = [thought("hm"), *called(PARIS), "so"]
    *_, (_, payload) = validated(response_stream(*pieces, end=FAILURE))
    found = [(item["type"], item["status"]) for item in payload["response"]["output"]]
    assert found == [
        ("reasoning", "completed"),
        ("function_call", "completed"),
        ("message", "incomplete"),
    ]


def test_a_call_before_a_failure_stays_complete() -> None:
    *_, (_, payload) = validated(response_stream(*called(PARIS), end=FAILURE))
    assert [item["status"] for item in payload["response"]["output"]] == ["completed"]


def test_logprobs_are_held_until_there_is_a_message() -> None:
    a, b, c, d = ((97 + i, Logprobs(-0.5)) for i in range(4))
    pieces = [
        thought("h", a),
        TextDelta("x", logprobs=(b,)),
        TextDelta("", logprobs=(c,)),
        ToolCallStart(NOW.id, NOW.name, logprobs=(d,)),
        *called(NOW)[1:],
    ]
    asked: dict[str, Any] = {"include": [LOGPROBS]}
    writer, whole = responses_writer(**asked), responses_writer(**asked)
    events = validated(run(writer, pieces, CALLED))
    sent = [x["logprobs"] for kind, x in events if kind == "response.output_text.delta"]
    assert [[entry["token"] for entry in logprobs] for logprobs in sent] == [
        ["a", "b"],
        ["c"],
        ["d"],
    ]
    assert whole.whole([choice_of(pieces, CALLED)], USAGE) == writer.body


@pytest.mark.parametrize("pieces", [[thought("h", (97, Logprobs(-0.5)))], called(NOW)])
def test_logprobs_are_not_sent_without_a_message(pieces: list[ParserEvent]) -> None:
    drawn = TextDelta("", logprobs=((98, Logprobs(-0.5)),))
    events = validated(run(responses_writer(include=[LOGPROBS]), [*pieces, drawn]))
    assert "response.output_text.delta" not in dict(events)


def test_logprobs_of_an_answer_without_text_are_in_its_empty_message() -> None:
    asked: dict[str, Any] = {"include": [LOGPROBS]}
    pieces = [TextDelta("", logprobs=((98, Logprobs(-0.5)),))]
    writer, whole = responses_writer(**asked), responses_writer(**asked)
    events = dict(validated(run(writer, pieces)))
    assert [entry["token"] for entry in events["response.output_text.done"]["logprobs"]] == ["b"]
    assert whole.whole([choice_of(pieces, DONE)], USAGE) == writer.body


@given(listed(ONE | CALLS | st.builds(broken)))
def test_streamed_items_are_distinct_and_equal_a_whole_response_in_any_order(
    pieces: list[str | ParserEvent],
) -> None:
    pieces = distinct(pieces)
    streamed, whole = responses_writer(), responses_writer()
    events = list(frames(run(streamed, pieces)))
    whole.whole([choice_of(pieces, DONE)], USAGE)
    assert streamed.answer == whole.answer
    output = events[-1][1]["response"]["output"]
    assert len({item["id"] for item in output}) == len(output)
    added = [x for kind, x in events if kind == "response.output_item.added"]
    assert [x["output_index"] for x in added] == list(range(len(output)))
    done = [x["item"] for kind, x in events if kind == "response.output_item.done"]
    assert done == output
    for i, item in enumerate(output):
        streamed_part = "".join(
            x["delta"] for _, x in events if "delta" in x and x["output_index"] == i
        )
        part = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert streamed_part == part


def test_progress_is_not_sent_in_responses() -> None:
    assert responses_writer().event(0, Progress(4, USAGE)) == b""


@pytest.mark.parametrize("pieces", [[], ["hel"]])
def test_a_responses_stream_that_fails_ends_with_an_error_and_stores_no_answer(
    pieces: list[str],
) -> None:
    writer = responses_writer()
    *_, (error, reason), (failed, payload) = validated(run(writer, pieces, FAILURE))
    assert (error, failed) == ("error", "response.failed")
    assert (reason["message"], reason["code"]) == ("the model failed", "model_error")
    answer = payload["response"]
    assert answer["status"] == "failed"
    assert answer["error"] == {"code": "server_error", "message": "the model failed"}
    assert [entry["status"] for entry in answer["output"]] == ["incomplete"] * len(pieces)
    assert writer.answer is None
    assert writer.body == json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
