"""Anthropic's Messages: histories and answers. Streams are checked event by event against the
SDK's types, and read by its client.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from dialects import (
    AWKWARD,
    CALLED,
    CALLS,
    CANCELLED,
    CUT,
    DOG,
    DONE,
    FAILURE,
    FULL,
    FULL_MESSAGE,
    HELLO,
    JUNK,
    MESSAGES_TOOL,
    MSG,
    ONE,
    PARIS,
    STOPPED,
    THINKS,
    USAGE,
    USER,
    anthropic_client,
    called,
    choice_of,
    frames,
    listed,
    message_stream,
    messages,
    read_by_anthropic,
    refusal,
    thought,
)
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.api.endpoints.anthropic_messages import MessagesWriter, anthropic_error
from mlxlite.api.render import context_exceeded
from mlxlite.api.writers import Collected
from mlxlite.engine.sequence import FinishReason
from mlxlite.http.errors import APIError, ErrorKind
from mlxlite.output.events import Done, ParserEvent, Progress
from mlxlite.vision.images import Source

# --- histories ----------------------------------------------------------------------------------


def turn_of(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


CALL = {"type": "tool_use", "id": "toolu_1", "name": "ls", "input": {"path": "/"}}
LS = ToolCall("toolu_1", "ls", {"path": "/"})


def test_blocks_of_text_are_joined_as_a_chats_and_cache_control_is_no_part_of_them() -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    asked = [turn_of("user", block("a"), block("b", **mark)), turn_of("assistant", block("c"))]
    request = messages(messages=asked)
    assert request.messages == (Message(Role.USER, "a\nb"), Message(Role.ASSISTANT, "c"))
    assert request.is_continuation


def test_the_first_system_block_stays_at_the_head_so_that_its_billing_line_is_found() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=abc12;"
    request = messages(system=[block(billing), block("You are Claude Code.")])
    system = request.messages[0]
    assert system.content == f"{billing}\nYou are Claude Code."
    assert system.as_template()["content"] == "You are Claude Code."


def test_a_system_message_between_turns_is_one() -> None:
    request = messages(messages=[*HELLO, {"role": "system", "content": "now"}, *HELLO])
    assert request.messages == (USER, Message(Role.SYSTEM, "now"), USER)


def test_thoughts_text_and_calls_are_one_turn_and_results_are_turns_of_tools() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [block("a"), block("b")]}
    failed = {"type": "tool_result", "tool_use_id": "toolu_2", "content": "no", "is_error": True}
    silent = {"type": "tool_result", "tool_use_id": "toolu_3", "is_error": False}
    request = messages(
        messages=[
            *HELLO,
            turn_of("assistant", thought, redacted, block("let me see"), CALL),
            turn_of("user", result, failed, silent, block("and"), block("now?")),
        ]
    )
    assert request.messages == (
        USER,
        Message(Role.ASSISTANT, "let me see", reasoning="hm", tool_calls=(LS,)),
        Message(Role.TOOL, "a\nb", tool_call_id="toolu_1"),
        Message(Role.TOOL, "Error: no", tool_call_id="toolu_2"),
        Message(Role.TOOL, "", tool_call_id="toolu_3"),
        Message(Role.USER, "and\nnow?"),
    )


CAT = {"type": "base64", "media_type": "image/png", "data": "Y2F0"}


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


def result(*content: Any, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(content), **more}


def test_a_users_pictures_stay_among_the_words_about_them() -> None:
    content = (block("a"), block("b"), image(**CAT), block("c"), image(type="url", url=DOG))
    request = messages(messages=[turn_of("user", *content)])
    cat = Source(b"cat", None, "messages[0].content[2].source")
    dog = Source(None, DOG, "messages[0].content[4].source")
    assert request.messages == (Message(Role.USER, "a\nb\nc", parts=("a\nb", cat, "c", dog)),)
    assert request.sources == (cat, dog)


def test_pictures_in_a_tool_result_stay_in_it_behind_the_error_mark() -> None:
    results = (
        result(image(**CAT), block("x")),
        result(image(**CAT), is_error=True),
        result(block("x"), image(**CAT), is_error=True),
    )
    turns = messages(messages=[turn_of("user", *results, block("why?"), image(**CAT))]).messages
    assert [turn.role for turn in turns] == [Role.TOOL] * 3 + [Role.USER]
    assert [turn.content for turn in turns] == ["x", "Error: ", "Error: x", "why?"]
    place = "messages[0].content[{}].content[{}].source".format
    cats = [Source(b"cat", None, place(*at)) for at in ((0, 0), (1, 0), (2, 1))]
    cats.append(Source(b"cat", None, "messages[0].content[4].source"))
    assert [turn.parts for turn in turns] == [
        (cats[0], "x"),
        ("Error: ", cats[1]),
        ("Error: x", cats[2]),
        ("why?", cats[3]),
    ]


@given(JUNK, JUNK, JUNK)
def test_junk_in_a_picture_of_anthropics_is_read_or_refused(kind: Any, data: Any, url: Any) -> None:
    source = {"type": kind, "data": data, "url": url, "media_type": data}
    for part in (image(**source), {"type": "image", "source": data}, {"type": kind}):
        for turn in (turn_of("user", part), turn_of("user", result(part))):
            with suppress(APIError):
                assert len(messages(messages=[turn]).sources) <= 1


def test_a_turn_that_only_calls_has_no_text_and_one_of_nothing_has_an_empty_one() -> None:
    request = messages(messages=[*HELLO, turn_of("assistant", CALL), turn_of("assistant")])
    assert [turn.content for turn in request.messages] == ["hello", None, ""]


@pytest.mark.parametrize(
    ("turn", "param"),
    [
        (turn_of("user", {"type": "image"}), "messages[0].content[0].image_url"),
        (turn_of("user", {"type": "image", "source": {}}), "messages[0].content[0].source.type"),
        (turn_of("user", image(type="file", file_id="x")), "messages[0].content[0].source.type"),
        (turn_of("user", image(type="base64")), "messages[0].content[0].source.data"),
        (turn_of("user", image(type="base64", data="*")), "messages[0].content[0].source"),
        (turn_of("user", image(type="url")), "messages[0].content[0].source.url"),
        (turn_of("user", image(type="url", url="file:///x")), "messages[0].content[0].source"),
        (turn_of("system", image(**CAT)), "messages[0].content[0].type"),
        (turn_of("user", block("a"), {"type": "document"}), "messages[0].content[1].source"),
        (turn_of("user", CALL), "messages[0].content[0].type"),
        (turn_of("user", {"type": 5}), "messages[0].content[0].type"),
        (turn_of("user", 5), "messages[0].content[0]"),
        (turn_of("user", {"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "function", "content": "x"}, "messages[0].role"),
    ],
)
def test_a_broken_message_is_refused_by_its_place(turn: Any, param: str) -> None:
    assert refusal(messages, messages=[turn]).param == param


# --- answers ------------------------------------------------------------------------------------


def run_events(writer: Any, events: Sequence[ParserEvent]) -> bytes:
    return b"".join(writer.event(0, event) for event in events)


PIECES = listed(ONE | CALLS)
ANTHROPIC_EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def test_a_messages_stream_has_each_event_in_anthropics_order() -> None:
    events = list(frames(message_stream("hel", "", "lo")))
    assert [payload for _, payload in events] == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "org/model",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {
                    "input_tokens": 10,
                    "cache_creation_input_tokens": 0,
                    "cache_read_input_tokens": 0,
                    "output_tokens": 0,
                    "output_tokens_details": {"thinking_tokens": 0},
                },
            },
        },
        {"type": "ping"},
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hel"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "lo"}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {
                "input_tokens": 6,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 4,
                "output_tokens": 5,
                "output_tokens_details": {"thinking_tokens": 2},
            },
        },
        {"type": "message_stop"},
    ]
    for kind, payload in events:
        if kind != "ping":
            ANTHROPIC_EVENT.validate_python(payload, strict=True)


ENDS = [
    (DONE, "end_turn", None),
    (CUT, "max_tokens", None),
    (STOPPED, "stop_sequence", "###"),
    (CANCELLED, None, None),
]


@pytest.mark.parametrize(("done", "reason", "stop"), ENDS)
def test_anthropics_client_reads_a_stream_and_a_whole_answer_alike(
    done: Done, reason: str | None, stop: str | None
) -> None:
    streamed = read_by_anthropic(message_stream("hel", "lo", end=done))
    body = MessagesWriter(MSG, 10).whole([Collected(["hel", "lo"], done=done)], done.usage)
    whole = anthropic_client(body, "application/json").messages.create(
        model="tiny", max_tokens=5, messages=HELLO
    )
    AnthropicMessage.model_validate_json(body, strict=True)
    for message in (streamed, whole):
        assert [block.text for block in message.content] == ["hello"]
        assert (message.stop_reason, message.stop_sequence) == (reason, stop)
        usage = message.usage
        assert (usage.input_tokens, usage.output_tokens) == (6, 5)
        assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (4, 0)


def test_thoughts_text_and_calls_are_blocks_one_after_the_other() -> None:
    events = list(frames(message_stream(*FULL, end=CALLED)))
    for kind, payload in events:
        if kind != "ping":
            ANTHROPIC_EVENT.validate_python(payload, strict=True)
    blocks = [
        (payload["index"], payload.get("content_block") or payload.get("delta"))
        for kind, payload in events
        if kind.startswith("content_block")
    ]
    use = {"type": "tool_use", "input": {}}
    assert blocks == [
        (0, {"type": "thinking", "thinking": "", "signature": ""}),
        (0, {"type": "thinking_delta", "thinking": "h"}),
        (0, {"type": "thinking_delta", "thinking": "m"}),
        (0, {"type": "signature_delta", "signature": ""}),
        (0, None),
        (1, {"type": "text", "text": ""}),
        (1, {"type": "text_delta", "text": "let me "}),
        (1, {"type": "text_delta", "text": "see"}),
        (1, None),
        (2, {**use, "id": "call_1", "name": "get_weather"}),
        (2, {"type": "input_json_delta", "partial_json": '{"city":"Paris"}'}),
        (2, None),
        (3, {**use, "id": "call_2", "name": "now"}),
        (3, {"type": "input_json_delta", "partial_json": "{}"}),
        (3, None),
    ]


def test_a_call_is_closed_at_once() -> None:
    kinds = [kind for kind, _ in frames(run_events(MessagesWriter(MSG, 10), called(PARIS)))]
    assert kinds == ["content_block_start", "content_block_delta", "content_block_stop"]


def test_anthropics_client_reads_thoughts_and_calls_alike_streamed_and_whole() -> None:
    streamed = read_by_anthropic(message_stream(*FULL, end=CALLED))
    body = MessagesWriter(MSG, 10).whole([choice_of(FULL, CALLED)], USAGE)
    AnthropicMessage.model_validate_json(body, strict=True)
    whole = anthropic_client(body, "application/json").messages.create(
        model="tiny", max_tokens=5, messages=HELLO
    )
    for message in (streamed, whole):
        assert [block.type for block in message.content] == [
            *("thinking", "text", "tool_use", "tool_use"),
        ]
        thinking, text, paris, now = message.content
        assert (thinking.thinking, thinking.signature, text.text) == ("hm", "", "let me see")
        assert (paris.id, paris.name, paris.input) == ("call_1", "get_weather", {"city": "Paris"})
        assert (now.id, now.name, now.input) == ("call_2", "now", {})
        assert message.stop_reason == "tool_use"
        assert message.usage.output_tokens_details.thinking_tokens == 2


def test_an_answer_that_is_sent_back_parses_to_the_same_message() -> None:
    message = read_by_anthropic(message_stream(*FULL, end=CALLED))
    content = [block.model_dump(exclude_none=True) for block in message.content]
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "sunny"}
    asked = [*HELLO, turn_of("assistant", *content), turn_of("user", result)]
    request = messages(messages=asked)
    assert request.messages == (
        USER,
        FULL_MESSAGE,
        Message(Role.TOOL, "sunny", tool_call_id="call_1"),
    )


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (CALLED, "tool_use"),
        (replace(CALLED, stop="###"), "tool_use"),
        (replace(CALLED, reason=FinishReason.LENGTH), "max_tokens"),
        (replace(CUT, stop="repetition"), "max_tokens"),
        (replace(CALLED, reason=FinishReason.CANCELLED), None),
    ],
)
def test_an_answer_with_calls_stops_for_them_unless_it_was_cut(
    done: Done, reason: str | None
) -> None:
    body = MessagesWriter(MSG, 10).whole([choice_of(called(PARIS), done)], USAGE)
    for message in (read_by_anthropic(message_stream(*called(PARIS), end=done)), json.loads(body)):
        found = message if isinstance(message, dict) else message.model_dump()
        assert (found["stop_reason"], found["stop_sequence"]) == (reason, None)


@pytest.mark.parametrize("end", [DONE, CUT, CANCELLED])
def test_a_thought_that_is_cut_is_closed(end: Done) -> None:
    (block,) = read_by_anthropic(message_stream(thought("hm"), end=end)).content
    assert (block.type, block.thinking, block.signature) == ("thinking", "hm", "")


@given(PIECES)
def test_streamed_blocks_equal_those_of_a_whole_message_in_any_order_of_events(
    pieces: list[str | ParserEvent],
) -> None:
    blocks: list[dict[str, Any]] = []
    texts: list[str] = []
    is_open = False
    for kind, payload in frames(message_stream(*pieces)):
        if kind == "content_block_start":
            assert not is_open
            assert payload["index"] == len(blocks)
            is_open = True
            blocks.append(payload["content_block"])
            texts.append("")
        elif kind.startswith("content_block"):
            assert is_open
            assert payload["index"] == len(blocks) - 1
            is_open = kind != "content_block_stop"
            delta = payload.get("delta", {})
            found = [delta[key] for key in ("text", "thinking", "partial_json") if key in delta]
            texts[-1] += "".join(found)
    assert not is_open
    assert all(texts)  # no block is opened for nothing
    folded = list(zip(blocks, texts, strict=True))
    whole = json.loads(MessagesWriter(MSG, 10).whole([choice_of(pieces, DONE)], USAGE))["content"]
    for name in ("thinking", "text"):
        streamed = "".join(text for block, text in folded if block["type"] == name)
        assert streamed == "".join(block[name] for block in whole if block["type"] == name)
    assert [
        {**block, "input": json.loads(text)}
        for block, text in folded
        if block["type"] == "tool_use"
    ] == [block for block in whole if block["type"] == "tool_use"]
    order = ["thinking", "text", "tool_use"]
    kinds = [order.index(block["type"]) for block in whole]
    assert kinds == sorted(kinds)


def test_an_empty_answer_has_an_empty_list_of_blocks() -> None:
    assert read_by_anthropic(message_stream()).content == []
    body = MessagesWriter(MSG, 10).whole([Collected([""], done=DONE)], USAGE)
    assert json.loads(body)["content"] == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_split_of_a_text_is_the_same_message(pieces: list[str]) -> None:
    read = list(frames(message_stream(*pieces)))
    texts = [payload["delta"]["text"] for kind, payload in read if kind == "content_block_delta"]
    assert "".join(texts) == "".join(pieces)
    whole = MessagesWriter(MSG, 10).whole([Collected(list(pieces), done=DONE)], USAGE)
    assert "".join(block["text"] for block in json.loads(whole)["content"]) == "".join(pieces)


@pytest.mark.parametrize("text", AWKWARD)
def test_anthropics_client_reads_awkward_text(text: str) -> None:
    message = read_by_anthropic(message_stream(text, text))
    assert "".join(block.text for block in message.content) == text + text


def test_progress_is_a_ping() -> None:
    ping = MessagesWriter(MSG, 10).event(0, Progress(4, USAGE))
    assert list(frames(ping)) == [("ping", {"type": "ping"})]


def test_a_messages_stream_that_fails_ends_with_anthropics_error() -> None:
    stream = message_stream("hel", end=FAILURE)
    *_, (kind, payload) = frames(stream)
    assert kind == "error"
    assert payload["error"] == {"type": "api_error", "message": "the model failed"}
    with pytest.raises(anthropic.APIError, match="the model failed"):
        read_by_anthropic(stream)


@pytest.mark.parametrize(
    ("cause", "status", "kind", "raised"),
    [
        (ErrorKind.UNSUPPORTED, 400, "invalid_request_error", anthropic.BadRequestError),
        (ErrorKind.UNAUTHORIZED, 401, "authentication_error", anthropic.AuthenticationError),
        (ErrorKind.HOST, 403, "permission_error", anthropic.PermissionDeniedError),
        (ErrorKind.NO_MODEL, 404, "not_found_error", anthropic.NotFoundError),
        (ErrorKind.METHOD, 405, "invalid_request_error", anthropic.APIStatusError),
        (ErrorKind.BAD_REQUEST, 413, "request_too_large", anthropic.APIStatusError),
        (ErrorKind.QUEUE_FULL, 429, "rate_limit_error", anthropic.RateLimitError),
        (ErrorKind.INTERNAL, 500, "api_error", anthropic.InternalServerError),
        (ErrorKind.UNAVAILABLE, 503, "overloaded_error", anthropic.InternalServerError),
        (ErrorKind.UNAVAILABLE, 529, "overloaded_error", anthropic.InternalServerError),
    ],
)
def test_an_error_has_anthropics_type_for_its_status(
    cause: ErrorKind, status: int, kind: str, raised: type[Exception]
) -> None:
    body = anthropic_error(APIError(cause, "no", status=status), "req_1")
    error = {"type": kind, "message": "no"}
    assert json.loads(body) == {"type": "error", "error": error, "request_id": "req_1"}
    client = anthropic_client(body, "application/json", status)
    with pytest.raises(raised, match="no"):
        client.messages.create(model="tiny", max_tokens=5, messages=HELLO)


def test_a_too_long_prompt_is_an_error_in_anthropics_wording_and_in_llama_servers() -> None:
    message = json.loads(anthropic_error(context_exceeded(9000, 8192)))["error"]["message"]
    assert message.startswith("prompt is too long: 9000 tokens > 8192 maximum")
    assert "the request exceeds the available context size." in message


# --- what known clients send --------------------------------------------------------------------

EPHEMERAL = {"cache_control": {"type": "ephemeral"}}

CLAUDE_CODE: dict[str, Any] = {
    "model": "claude-sonnet-5",
    "max_tokens": 32000,
    "stream": True,
    "temperature": 1,
    "metadata": {"user_id": "user_0_account__session_1"},
    "system": [
        block("x-anthropic-billing-header: cc_version=2.1.50; cc_entrypoint=cli; cch=00000;"),
        block("You are Claude Code, Anthropic's official CLI for Claude.", **EPHEMERAL),
        block("You are an interactive agent.", **EPHEMERAL),
    ],
    "thinking": {"type": "enabled", "budget_tokens": 31999},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "messages": [
        turn_of("user", block("<system-reminder>x</system-reminder>"), block("hi", **EPHEMERAL)),
        turn_of(
            "assistant",
            {"type": "thinking", "thinking": "hm", "signature": "x"},
            {**CALL, **EPHEMERAL},
        ),
        turn_of(
            "user",
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": "etc", "is_error": False},
        ),
    ],
    "tools": [],
}


def test_what_claude_code_sends_without_tools_is_accepted() -> None:
    request = messages(**CLAUDE_CODE)
    roles = [message.role.value for message in request.messages]
    assert roles == ["system", "user", "assistant", "tool"]
    assert request.messages[0].as_template()["content"].startswith("You are Claude Code")
    assert request.ignored == ()
    assert request.template_kwargs == THINKS
    assert request.is_stream


BASH = {
    "name": "Bash",
    "description": "Executes a given bash command.",
    "input_schema": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"command": {"type": "string"}, "timeout": {"type": "number"}},
        "required": ["command"],
        "additionalProperties": False,
    },
}


def test_what_claude_code_sends_with_tools_is_accepted() -> None:
    request = messages(**CLAUDE_CODE | {"tools": [BASH, {**MESSAGES_TOOL, **EPHEMERAL}]})
    assert [tool.name for tool in request.tools] == ["Bash", "get_weather"]
    assert request.tools[0].parameters == BASH["input_schema"]
    assert request.constraint is request.max_calls is None
    assert request.ignored == ()


def test_what_claude_code_sends_with_a_search_of_anthropics_is_served_without_it() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    request = messages(**CLAUDE_CODE | {"tools": [BASH, search]})
    assert [tool.name for tool in request.tools] == ["Bash"]
    assert request.ignored == ("tools[1]:web_search_20250305",)


def test_what_zed_sends_to_anthropic_is_accepted() -> None:
    request = messages(
        max_tokens=8192,
        messages=[turn_of("user", block("hi", **EPHEMERAL))],
        stream=True,
        system="You are an assistant in Zed.",
        temperature=1.0,
        stop_sequences=[],
        thinking={"type": "enabled", "budget_tokens": 4096},
        tools=[],
        tool_choice=None,
        metadata=None,
        top_k=None,
        top_p=None,
    )
    assert request.ignored == ()
    assert [message.content for message in request.messages] == [
        "You are an assistant in Zed.",
        "hi",
    ]


def test_what_continue_sends_to_anthropic_is_accepted() -> None:
    request = messages(
        top_k=40,
        top_p=0.9,
        temperature=0.5,
        max_tokens=4096,
        stop_sequences=["```", "\n\n\n"],
        stream=True,
        messages=[turn_of("user", block("hi")), turn_of("assistant", block("ok")), *HELLO],
        system=[block("You are Continue.", **EPHEMERAL)],
    )
    assert (request.stop, request.max_tokens) == (("```", "\n\n\n"), 4096)
    assert request.sampling["top_k"] == 40
    assert len(request.messages) == 4
