"""Requests in the shapes that agents' programs send, with other words in them: all are served.

The shapes are of Codex 0.171, Claude Code 2.1, opencode 1.18 (its three dialects), Qwen Code 0.15.
"""

from collections.abc import Callable
from typing import Any

import pytest
from api_requests import function_tool, parse, refusal
from dialects import messages, response
from pictures import uri

from mlxlite.api.content_parts import IMAGE_OMITTED
from mlxlite.api.conversation import Message, Role, ToolCall

PNG = uri(b"\x89PNG\r\n\x1a\n")
CACHED = {"cache_control": {"type": "ephemeral"}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
SEEN = {"type": "image", "source": {"type": "base64", "data": "iVBORw0K"}}
DOCUMENT = {"type": "document", "source": PDF}
READ = {"type": "text", "text": "read"}
FILE_OMITTED = "[file omitted: only text is read here]"
BROKEN = "data:image/png;base64,AAAA"


def contents(request: Any) -> list[str | None]:
    return [message.content for message in request.messages]


def call(id: str, name: str, **more: Any) -> dict[str, Any]:
    """A call in a Responses history, with the ids that clients keep."""
    kept = {"type": "function_call", "status": "completed", "id": f"fc_{id}", "call_id": id}
    return {**kept, "name": name, "arguments": '{"a": 1}', **more}


def output(id: str, value: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "id": f"fco_{id}", "call_id": id, "output": value}


def text(value: str) -> dict[str, Any]:
    return {"type": "input_text", "text": value}


def test_a_turn_of_codex_with_agents_and_servers_of_tools() -> None:
    said = {"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}
    agents = {"type": "namespace", "name": "agents", "description": "helpers"}
    spawn = {"type": "function", "name": "spawn", "strict": False, "parameters": {}}
    run = {"type": "function", "name": "run", "strict": False, "parameters": {"type": "object"}}
    picture = {"type": "input_image", "image_url": PNG, "detail": "high"}
    request = response(
        model="m",
        stream=True,
        store=False,
        tools=[run, {**agents, "tools": [spawn]}, {"type": "web_search", "external": True}],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={"turn_id": "t", "x-turn": "{}"},
        input=[
            {"type": "message", "id": "msg_1", "role": "developer", "content": [text("rules")]},
            {"type": "message", "id": "msg_2", "role": "developer", "content": [text("skills")]},
            {"type": "message", "id": "msg_3", "role": "user", "content": [text("go")]},
            {"type": "message", "id": "m", "status": "completed", "role": "assistant"}
            | {"content": [said]},
            call("1", "spawn", namespace="agents"),
            output("1", '{"agent": "x"}'),
            call("2", "run"),
            output("2", [text("here:"), picture]),
        ],
    )
    assert request.ignored == ("tools[2]:web_search",)
    assert [message.role.value for message in request.messages] == [
        *("developer", "developer", "user", "assistant", "tool", "assistant", "tool"),
    ]
    assert request.messages[3] == Message(
        Role.ASSISTANT, "I look.", tool_calls=(ToolCall("1", "agents__spawn", {"a": 1}),)
    )
    assert request.asked_sources == ()


def claude_code(*turns: Any, **fields: Any) -> Any:
    """A turn with the fields of Claude Code, and a late system message in the conversation."""
    lead = "x-anthropic-billing-header: cc_version=1"
    about = {"name": "Read", "description": "reads", "input_schema": {"type": "object"}}
    return messages(
        model="m",
        max_tokens=32000,
        stream=True,
        metadata={"user_id": '{"session_id":"1"}'},
        thinking={"type": "adaptive"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        output_config={"effort": "high"},
        system=[
            {"type": "text", "text": lead},
            *({"type": "text", "text": part, **CACHED} for part in ("an agent", "rules")),
        ],
        tools=[about],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "go", **CACHED}]},
            {"role": "system", "content": "types of agents"},
            *turns,
        ],
        **fields,
    )


def used(id: str, *results: Any, beside: Any = ()) -> list[dict[str, Any]]:
    thought = {"type": "thinking", "thinking": "so", "signature": ""}
    use = {"type": "tool_use", "id": id, "name": "Read", "input": {"file_path": "a"}}
    result = {"tool_use_id": id, "type": "tool_result", "content": list(results), **CACHED}
    return [
        {"role": "assistant", "content": [thought, use]},
        {"role": "user", "content": [result, *beside]},
    ]


def test_a_turn_of_claude_code_whose_tools_read_files() -> None:
    failed = {"type": "tool_result", "content": "gone", "is_error": True, "tool_use_id": "c"}
    request = claude_code(
        *used("a", SEEN),
        *used("b", READ, beside=[DOCUMENT]),
        *used("c")[:1],
        {"role": "user", "content": [failed]},
    )
    assert contents(request)[4:] == ["", None, "read", FILE_OMITTED, None, "Error: gone"]
    assert request.messages[3].reasoning == "so"
    assert request.ignored == ("messages[5].content[1]:document",)


def test_the_removed_document_of_claude_code_is_text() -> None:
    removed = {"type": "text", "text": "[Document removed]", **CACHED}
    request = claude_code(*used("a", READ, beside=[removed]))
    assert contents(request)[-2:] == ["read", "[Document removed]"]


def in_chat(*parts: Any, asked: Any = ()) -> Any:
    """Tools' pictures as the AI SDK sends them to chats: in a user message after the results."""
    calls = [{"id": id, "type": "function", "function": {"name": "f"}} for id in ("a", "b")]
    return parse(
        tools=[function_tool("f", parameters={"type": "object"})],
        tool_choice="auto",
        stream=True,
        stream_options={"include_usage": True},
        messages=[
            {"role": "user", "content": "go"},
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": "read"},
            {"role": "tool", "tool_call_id": "b", "content": [READ]},
            {"role": "user", "content": [{"type": "text", "text": "Attached:"}, *parts]},
            *asked,
        ],
    )


def in_responses(*parts: Any, asked: Any = ()) -> Any:
    beside = {"role": "user", "content": [text("Attached:"), *parts]}
    return response(input=[call("a", "f"), output("a", "read"), beside, *asked])


def in_messages(*parts: Any, asked: Any = ()) -> Any:
    """In the result's message, and in one of its own after it."""
    head, results = used("a", READ)
    beside = {"role": "user", "content": [{"type": "text", "text": "Attached:"}, *parts]}
    return messages(messages=[{"role": "user", "content": "go"}, head, results, beside, *asked])


DIALECTS = [in_chat, in_responses, in_messages]
SHOWN = {"type": "image_url", "image_url": {"url": PNG}}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("part", "stand_in"),
    [
        ({"type": "image_url", "image_url": {"url": BROKEN[:20]}}, IMAGE_OMITTED),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, IMAGE_OMITTED),
        (DOCUMENT, FILE_OMITTED),
        ({"type": "file", "file": {"file_id": "f"}}, FILE_OMITTED),
        ({"type": "input_audio", "input_audio": {}}, "[audio omitted: it cannot be heard]"),
    ],
)
def test_what_a_client_puts_beside_a_result_is_the_tools(
    dialect: Callable[..., Any], part: Any, stand_in: str
) -> None:
    request = dialect(part)
    assert contents(request)[-1] == f"Attached:\n{stand_in}"
    assert len(request.ignored) == 1


@pytest.mark.parametrize("dialect", DIALECTS)
def test_only_the_message_next_to_a_result_is_the_tools(dialect: Callable[..., Any]) -> None:
    """A picture in it is none that the user asks about; one of the message after it is."""
    part = {"type": "input_image", "image_url": PNG} if dialect is in_responses else SHOWN
    question = {"role": "user", "content": [part]}
    assert dialect(part).asked_sources == ()
    asked = dialect(part, asked=[question]).asked_sources
    assert [source.param.partition(".")[0][-3:] for source in asked] == [
        {in_chat: "[5]", in_responses: "[3]", in_messages: "[4]"}[dialect]
    ]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_was_refused_once_costs_no_later_question(dialect: Callable[..., Any]) -> None:
    """A client keeps the message whose picture or file was refused, and asks something else."""
    part = {"type": "input_image", "image_url": PNG} if dialect is in_responses else SHOWN
    old = {"role": "user", "content": [part, DOCUMENT]}
    request = dialect(asked=[old, {"role": "user", "content": "And now?"}])
    assert contents(request)[-2:] == [FILE_OMITTED, "And now?"]
    assert request.asked_sources == ()


def test_a_document_that_the_user_asks_about_is_still_refused() -> None:
    error = refusal(messages=[{"role": "user", "content": [DOCUMENT]}])
    assert str(error).startswith("The PDF specified was not valid")


def test_a_turn_of_qwen_code_whose_results_are_parts() -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    request = parse(
        max_tokens=8000,
        messages=[
            {"role": "system", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "context"}]},
            {"role": "assistant", "content": "Got it."},
            {"role": "user", "content": [{"type": "text", "text": "go"}]},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "done"}]},
        ],
    )
    assert contents(request)[-2:] == [None, "done"]
    assert request.ignored == ()
