"""No history is an error: whatever earlier turns, tools and other providers have left behind is
read, or left out by name, in every dialect.
"""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlite.api.conversation import Role
from mlxlite.api.endpoints.anthropic_messages import parse_messages
from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.endpoints.responses import parse_responses

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
KINDS = st.sampled_from(
    [
        *("text", "input_text", "output_text", "refusal", "thinking", "redacted_thinking"),
        *("image", "image_url", "input_image", "file", "input_file", "document", "input_audio"),
        *("tool_use", "tool_result", "server_tool_use", "web_search_tool_result", "mcp_tool_use"),
        *("search_result", "resource", "resource_link", "tool_reference", "tool_addition"),
        *("container_upload", "compaction", "a part of next year"),
    ]
)
MEMBERS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        (
            *("text", "content", "source", "data", "image_url", "file", "thinking", "input", "id"),
            *("name", "tool_use_id", "is_error", "resource", "title", "tool", "refusal", "uri"),
        ),
        JSON,
    ),
)
PARTS = st.builds(lambda kind, rest: {"type": kind, **rest}, KINDS, MEMBERS)
CONTENT = JSON | st.lists(PARTS | JSON, max_size=4)
ROLES = st.sampled_from(["user", "assistant", "tool", "function", "model", "critic"])
OPTIONAL: dict[str, Any] = dict.fromkeys(
    (
        *("tool_calls", "function_call", "name", "reasoning", "reasoning_content", "audio"),
        *("reasoning_details", "tool_call_id", "annotations"),
    ),
    JSON,
)
MESSAGES = st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional=OPTIONAL) | JSON
ITEM_KINDS = st.sampled_from(
    [
        *("message", "function_call", "function_call_output", "custom_tool_call", "reasoning"),
        *("custom_tool_call_output", "web_search_call", "mcp_call", "local_shell_call"),
        *("additional_tools", "compaction", "an item of next year"),
    ]
)
ITEMS = (
    st.builds(
        lambda kind, rest: {"type": kind, **rest},
        ITEM_KINDS,
        st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                (
                    *("role", "content", "call_id", "name", "arguments", "input", "output"),
                    *("summary", "encrypted_content", "tools", "action", "namespace"),
                ),
                CONTENT,
            ),
        ),
    )
    | MESSAGES
)
ANSWER = {"role": "assistant", "content": "yes"}
QUESTION = {"role": "user", "content": "And now?"}
many = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def is_instruction(item: Any) -> bool:
    return isinstance(item, dict) and item.get("role") in ("system", "developer")


@many
@given(st.lists(MESSAGES.filter(lambda item: not is_instruction(item)), max_size=4))
def test_no_history_of_a_chat_is_an_error(history: list[Any]) -> None:
    body = {"messages": [*history, ANSWER, QUESTION]}
    request = parse_chat(json.dumps(body).encode())
    assert request.messages[-1].content == "And now?"
    assert request.messages[-2].role is Role.ASSISTANT


@many
@given(st.lists(MESSAGES.filter(lambda item: not is_instruction(item)), max_size=4))
def test_no_history_of_anthropics_is_an_error(history: list[Any]) -> None:
    body = {"messages": [*history, ANSWER, QUESTION], "max_tokens": 5}
    assert parse_messages(json.dumps(body).encode()).messages[-1].content == "And now?"


@many
@given(st.lists(ITEMS.filter(lambda item: not is_instruction(item)), max_size=4))
def test_no_history_of_responses_is_an_error(history: list[Any]) -> None:
    request = parse_responses(json.dumps({"input": [*history, ANSWER, QUESTION]}).encode())
    assert request.messages[-1].content == "And now?"


@pytest.mark.parametrize("item", [5, {"role": "critic", "content": "x"}, {"content": "x"}])
def test_a_message_of_a_history_that_is_none_is_left_out_by_its_place(item: Any) -> None:
    request = parse_chat(json.dumps({"messages": [item, ANSWER, QUESTION]}).encode())
    assert request.ignored == ("messages[0]",)
    assert len(request.messages) == 2
