"""Messages in OpenAI's form: roles, content, images, names, tool calls."""

from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from api_requests import BEGUN, HELLO, message, parse, refusal
from hypothesis import given
from hypothesis import strategies as st

from mlxlite.api.content_parts import IMAGE_OMITTED
from mlxlite.api.conversation import Message, Role, ToolCall
from mlxlite.http.errors import APIError
from mlxlite.vision.images import Source

CAT = "data:image/png;base64,Y2F0"  # the parser does not decode it
DOG = "https://example.com/dog.png"
URLS = st.sampled_from([CAT, DOG, "data:", "file:///x", "http://", "http://[", "data:;base64,x"])

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | URLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("role", [role.value for role in Role])
def test_every_role_is_accepted(role: str) -> None:
    assert message(role=role, content="x") == Message(Role(role), "x")


@pytest.mark.parametrize(
    ("role", "shown"),
    [("developer", "system"), ("function", "tool"), ("system", "system"), ("user", "user")],
)
def test_roles_are_mapped_to_those_of_templates(role: str, shown: str) -> None:
    assert message(role=role, content="x").as_template() == {"role": shown, "content": "x"}


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=00000;"


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (BILLING, ""),
        (f"{BILLING}\n", ""),
        (f"{BILLING}\nYou are kind.", "You are kind."),
        (f"{BILLING}\n\nYou are kind.", "You are kind."),
        (f"{BILLING.title()}\nYou are kind.", "You are kind."),
        (f"{BILLING}\n{BILLING}\nYou are kind.", "You are kind."),
        ("You are kind.", "You are kind."),
        ("\nYou are kind.\n", "\nYou are kind.\n"),
        (f"You are kind.\n{BILLING}", f"You are kind.\n{BILLING}"),
        (f" {BILLING}", f" {BILLING}"),
        ("x-anthropic-billing-headers", "x-anthropic-billing-headers"),
    ],
)
def test_a_billing_header_at_the_head_of_a_system_message_is_not_shown(
    content: str, shown: str, role: str
) -> None:
    assert message(role=role, content=content).as_template()["content"] == shown
    parts = [{"type": "text", "text": part} for part in content.split("\n", 1)]
    assert message(role=role, content=parts).as_template()["content"] == shown


@pytest.mark.parametrize("role", ["user", "assistant", "tool", "function"])
def test_a_billing_header_in_another_role_is_kept(role: str) -> None:
    shown = message(role=role, content=f"{BILLING}\nx").as_template()["content"]
    assert shown == f"{BILLING}\nx"


@pytest.mark.parametrize("role", ["", "User", "narrator", 5, ["user"], {}, True, None])
def test_an_unknown_role_is_refused_by_its_path(role: Any) -> None:
    error = refusal(messages=[*HELLO, {"role": role, "content": "x"}])
    assert error.param == "messages[1].role"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("x", "x"),
        ("", ""),
        ("a\0\u2028🙂", "a\0\u2028🙂"),
        ([], ""),
        ([{"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}], "a\nb"),
        ([{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "no"}], "a\nno"),
    ],
)
def test_content_is_a_string_or_its_parts_joined(content: Any, expected: str) -> None:
    assert message(role="user", content=content).content == expected


@pytest.mark.parametrize(
    ("content", "path"),
    [
        (5, "content"),
        (True, "content"),
        ([{"type": "text", "text": "x"}, None], "content[1]"),
        ([{"type": "text"}], "content[0].text"),
        ([{"type": "text", "text": 5}], "content[0].text"),
        ([{"type": "refusal", "text": "x"}], "content[0].refusal"),
        ([{"text": "x"}], "content[0].type"),
        ([{"type": 5, "text": "x"}], "content[0].type"),
        ([{"type": "image_url"}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": 5}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": {}}], "content[0].image_url.url"),
        ([{"type": "image_url", "image_url": {"url": 5}}], "content[0].image_url.url"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "content[0].image_url"),
        ([{"type": "image_url", "image_url": "file:///etc/passwd"}], "content[0].image_url"),
        ([{"type": "input_image"}], "content[0].image_url"),
        ([{"type": "input_image", "file_id": "file-1"}], "content[0].file_id"),
        ([{"type": "input_audio", "input_audio": {"data": "AAAA"}}], "content[0].type"),
        ([{"type": "file", "file": {"file_id": "x"}}], "content[0].type"),
        ([{"type": "document", "source": {"type": "url", "url": "x"}}], "content[0].type"),
        ([{"type": "video_url", "video_url": {"url": "x"}}], "content[0].type"),
        ([{"type": "novelty"}], "content[0].type"),
        ([{"type": "text", "text": "x"}, {"type": "input_audio"}], "content[1].type"),
    ],
)
def test_content_of_another_kind_is_refused_by_its_path(content: Any, path: str) -> None:
    error = refusal(messages=[*HELLO, {"role": "user", "content": content}])
    assert error.param == f"messages[1].{path}"


IMAGE = {"type": "image_url", "image_url": {"url": CAT}}
OTHER = {"type": "image_url", "image_url": DOG}


def test_text_and_pictures_keep_their_order() -> None:
    content = [text_part("a"), text_part("b"), IMAGE, OTHER, text_part("c"), IMAGE]
    found = message(role="user", content=content, name="Bo")
    place = "messages[0].content[{}].image_url".format
    cat, other = (Source(b"cat", None, place(i)) for i in (2, 5))
    dog = Source(None, DOG, place(3))
    parts = ("a\nb", cat, dog, "c", other)
    assert found == Message(Role.USER, "a\nb\nc", name="Bo", parts=parts)
    assert found.sources == (cat, dog, other)
    assert found.as_template() == {
        "role": "user",
        "name": "Bo",
        "content": [
            {"type": "text", "text": "a\nb"},
            *({"type": "image"}, {"type": "image"}),
            {"type": "text", "text": "c"},
            {"type": "image"},
        ],
    }


@pytest.mark.parametrize(
    ("part", "detail"),
    [
        (IMAGE, "auto"),
        ({"type": "image_url", "image_url": CAT}, "auto"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": None}}, "auto"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": "low"}}, "low"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": "high"}}, "high"),
        ({"type": "input_image", "image_url": CAT, "file_id": None}, "auto"),
        ({"type": "input_image", "image_url": CAT, "detail": "low"}, "low"),
        ({"type": "input_image", "image_url": {"url": CAT}, "detail": "high"}, "high"),
        ({"type": "image_url", "image_url": {"url": CAT, "detail": "most"}}, "auto"),
        ({"type": "input_image", "image_url": CAT, "detail": 5}, "auto"),
        ({"type": "image", "image": CAT}, "auto"),
        ({"type": "image", "url": CAT}, "auto"),
        ({"type": "image", "data": "Y2F0", "mimeType": "image/png"}, "auto"),
        ({"type": "image", "source": {"type": "base64", "data": "Y2F0"}}, "auto"),
        ({"type": "image", "source": {"type": "url", "url": CAT}}, "auto"),
        ({"type": "resource", "resource": {"mimeType": "image/png", "blob": "Y2F0"}}, "auto"),
    ],
)
def test_a_picture_has_several_forms(part: Any, detail: str) -> None:
    (source,) = message(role="user", content=[part]).sources
    assert (source.data, source.detail) == (b"cat", detail)
    assert source.param.startswith("messages[0].content[0].")


def test_a_message_without_pictures_is_its_text() -> None:
    found = message(role="user", content=[text_part("a"), text_part("b")])
    assert (found.parts, found.sources) == ((), ())
    assert found.as_template() == {"role": "user", "content": "a\nb"}


def test_a_picture_alone_is_a_message() -> None:
    found = message(role="user", content=[IMAGE])
    assert found.content == ""
    assert found.as_template()["content"] == [{"type": "image"}]


@pytest.mark.parametrize("part", [IMAGE, {"type": "input_image", "image_url": CAT}])
@pytest.mark.parametrize("role", [role.value for role in Role])
def test_only_users_and_tools_show_pictures(role: str, part: Any) -> None:
    body = [*HELLO, {"role": role, "content": [text_part("a"), part]}]
    if role in ("user", "tool", "function"):
        assert len(parse(messages=body).messages[1].sources) == 1
    elif role == "assistant":
        request = parse(messages=body)
        assert request.messages[1].content == f"a\n{IMAGE_OMITTED}"
        assert request.ignored == (f"messages[1].content[1]:{part['type']}",)
    else:
        error = refusal(messages=body)
        assert (error.param, error.code) == (
            "messages[1].content[1].type",
            "unsupported_parameter",
        )


# Part, what the model reads of it in a history, and whether that is named.
LEFT_BEHIND = [
    ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "[audio omitted", True),
    ({"type": "file", "file": {"file_id": "x"}}, "[file omitted", True),
    ({"type": "document", "source": {"type": "base64", "data": "JVBERi0="}}, "[file omitted", True),
    ({"type": "image_url", "image_url": "file:///etc/passwd"}, IMAGE_OMITTED, True),
    ({"type": "image", "source": {"type": "file", "file_id": "x"}}, IMAGE_OMITTED, True),
    ({"type": "input_image", "file_id": "file-1"}, IMAGE_OMITTED, True),
    ({"type": "novelty", "value": 1}, "", True),
    ({"type": "novelty", "text": "read"}, "read", False),
    ({"type": "tool_reference", "tool_name": "f"}, "", True),
    ({"type": "server_tool_use", "id": "x", "input": {}}, "", True),
    ({"type": "redacted_thinking", "data": "x"}, "", False),
    ({"type": "text"}, "", True),
    ({"type": "text", "text": 5}, "", True),
    ({"text": "x"}, '{"text":"x"}', False),
    (5, "5", False),
    ("plain", "plain", False),
    ({"type": "resource", "resource": {"uri": "f", "text": "inside"}}, "inside", False),
    ({"type": "resource_link", "uri": "file:///a", "name": "A"}, "A file:///a", False),
    (
        {"type": "search_result", "title": "T", "source": "S", "content": [text_part("found")]},
        "T\nS\nfound",
        False,
    ),
    ({"type": "document", "source": {"type": "text", "data": "plain"}}, "plain", False),
    (
        {"type": "document", "title": "T", "source": {"type": "content", "content": "in"}},
        "T\nin",
        False,
    ),
    (
        {"type": "file", "file": {"file_data": "data:text/plain;base64,aGk="}},
        "hi",
        False,
    ),
]


@pytest.mark.parametrize(("part", "shown", "is_named"), LEFT_BEHIND)
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "function"])
def test_what_a_history_holds_is_read_or_left_out_by_name(
    role: str, part: Any, shown: str, is_named: bool
) -> None:
    old = {"role": role, "content": [text_part("a"), part]}
    request = parse(messages=[old, *BEGUN, *HELLO])
    text = request.messages[0].content
    assert text is not None
    assert text.removeprefix("a").removeprefix("\n").startswith(shown)
    kind = f":{part['type']}" if isinstance(part, dict) and "type" in part else ""
    assert request.ignored == (f"messages[0].content[1]{kind}",) * is_named


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, ""),
        ({"a": [1]}, '{"a":[1]}'),
        (5, "5"),
        ([{"a": 1}, {"b": 2}], '{"a":1}\n{"b":2}'),
        (text_part("alone"), "alone"),
    ],
)
def test_a_tools_result_is_its_json_where_it_is_no_text(content: Any, shown: str) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": content}
    request = parse(messages=[*BEGUN, result])
    assert (request.messages[-1].content, request.ignored) == (shown, ())


def test_a_result_too_deep_to_be_written_is_left_out() -> None:
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    request = parse(messages=[*BEGUN, {"role": "tool", "content": {"deep": deep}}])
    assert request.ignored == ("messages[2].content",)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "because", "signature": ""},
        {"type": "reasoning", "text": "because"},
        {"type": "thinking", "thinking": [text_part("because")]},
    ],
)
def test_thoughts_among_the_parts_are_reasoning(part: Any) -> None:
    found = message(role="assistant", content=[part, text_part("x")])
    assert found == Message(Role.ASSISTANT, "x", reasoning="because")


def test_pictures_are_listed_in_the_order_of_their_messages() -> None:
    show = [{"role": "user", "content": [IMAGE, OTHER]}, *BEGUN]
    result = {"role": "tool", "content": [text_part("x"), IMAGE], "tool_call_id": "1"}
    places = [source.param for source in parse(messages=[*show, result]).sources]
    assert places == [
        "messages[0].content[0].image_url",
        "messages[0].content[1].image_url",
        "messages[3].content[1].image_url",
    ]
    assert parse().sources == ()


def test_the_size_of_a_message_includes_its_pictures() -> None:
    plain = Message(Role.USER, "ab")
    shown = replace(plain, parts=("ab", Source(b"12345", None, "p"), Source(None, "http", "p")))
    assert (plain.num_bytes, shown.num_bytes) == (2, 2 + 2 + 5 + 1 + 4 + 1)


@given(JUNK, JUNK, st.sampled_from(["image_url", "input_image", "text", "image", "file"]))
def test_junk_in_a_part_is_read_or_refused(one: Any, other: Any, kind: str) -> None:
    parts = [
        {"type": kind, kind: one, "image_url": one, "detail": other, "file_id": None},
        {"type": kind, kind: {"url": one, "detail": other}},
        {"type": "image_url", "image_url": {"url": one, "detail": other}},
        {"type": other, "image_url": one},
        one,
    ]
    for part in parts:
        with suppress(APIError):
            request = parse(messages=[{"role": "user", "content": [part]}])
            assert len(request.sources) <= 1


@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_what_is_asked_has_content(role: str) -> None:
    assert refusal(messages=[{"role": role}]).param == "messages[0].content"
    assert refusal(messages=[{"role": role, "content": None}]).param == "messages[0].content"


def test_a_history_may_be_without_content() -> None:
    assert message(role="assistant").content is None
    assert message(role="assistant", content=None).as_template()["content"] == ""
    assert message(role="tool", content=None).content == ""
    assert message(role="function").content == ""
    request = parse(messages=[{"role": "user", "content": None}, *BEGUN, *HELLO])
    assert request.messages[0].content == ""


@pytest.mark.parametrize("item", ["x", 5, [], True, None])
def test_a_message_is_an_object(item: Any) -> None:
    assert refusal(messages=[*HELLO, item]).param == "messages[1]"


def test_a_message_keeps_its_name_and_its_reasoning() -> None:
    found = message(role="assistant", content="x", name="Bo", reasoning_content="because")
    assert found == Message(Role.ASSISTANT, "x", name="Bo", reasoning="because")
    assert found.as_template()["reasoning_content"] == "because"
    assert found.as_template()["name"] == "Bo"
    assert message(role="assistant", content="x", reasoning="because").reasoning == "because"


@pytest.mark.parametrize("name", ["name", "reasoning_content", "reasoning", "tool_call_id"])
def test_a_messages_texts_that_are_none_are_left_out(name: str) -> None:
    request = parse(messages=[{"role": "assistant", "content": "x", name: 5}])
    assert (request.messages[0].content, request.ignored) == ("x", (f"messages[0].{name}",))
    assert message(role="assistant", content="x", **{name: None}) == Message(Role.ASSISTANT, "x")


def test_openrouters_reasoning_is_read() -> None:
    details = [{"type": "reasoning.text", "text": "because"}, {"type": "reasoning.encrypted"}]
    found = message(role="assistant", content="x", reasoning_details=details)
    assert found.reasoning == "because"


def _call(arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function, **fields}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": [1]}', {"a": [1]}),
        ({"a": [1]}, {"a": [1]}),
        ("", {}),
        ("{}", {}),
        ('{"a": ', '{"a": '),
        ("not JSON", "not JSON"),
    ],
)
def test_tool_history_reaches_the_template(arguments: Any, expected: Any) -> None:
    request = parse(
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [_call(arguments)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]
    )
    _, asked, answered = request.messages
    assert asked == Message(Role.ASSISTANT, None, tool_calls=(ToolCall("call_1", "f", expected),))
    function = {"name": "f", "arguments": expected}
    assert asked.as_template() == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
    }
    assert answered.as_template() == {"role": "tool", "content": "42", "tool_call_id": "call_1"}


@pytest.mark.parametrize("arguments", ["5", '"text"', "[1]", "null", "true"])
def test_arguments_that_are_json_but_no_object_stay_text(arguments: str) -> None:
    """Templates iterate over the object, or print the text; a bare number is neither."""
    found = message(role="assistant", tool_calls=[_call(arguments)])
    assert found.tool_calls[0].arguments == arguments


@pytest.mark.parametrize(
    ("calls", "path"),
    [
        ("x", ""),
        ({}, ""),
        ([5], "[0]"),
        ([_call(), []], "[1]"),
        ([{"id": "a"}], "[0]"),
        ([_call(function="f")], "[0]"),
        ([_call(function={})], "[0]"),
        ([_call(function={"name": 5})], "[0]"),
        ([_call(id=5)], "[0]"),
    ],
)
def test_a_broken_tool_call_is_left_out_by_its_path(calls: Any, path: str) -> None:
    request = parse(messages=[{"role": "assistant", "tool_calls": calls}])
    assert request.ignored == (f"messages[0].tool_calls{path}",)


def test_only_an_assistant_calls_tools() -> None:
    request = parse(messages=[{"role": "user", "content": "x", "tool_calls": [_call()]}])
    assert (request.messages[0].tool_calls, request.ignored) == ((), ("messages[0].tool_calls",))


def test_a_call_with_free_text_is_one_of_a_single_argument() -> None:
    call = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "free"}}
    found = message(role="assistant", tool_calls=[call])
    assert found.tool_calls == (ToolCall("c", "f", {"input": "free"}),)


@pytest.mark.parametrize(
    ("last", "is_continuation"),
    [
        ({"role": "assistant", "content": "Once upon"}, True),
        ({"role": "assistant", "tool_calls": [_call()]}, False),
        ({"role": "user", "content": "x"}, False),
        ({"role": "tool", "content": "x"}, False),
    ],
)
def test_a_trailing_assistant_message_is_continued(last: Any, is_continuation: bool) -> None:
    assert parse(messages=[*HELLO, last]).is_continuation is is_continuation


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [None]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        {"stop": [None]},
    ],
)
def test_a_null_in_the_wrong_place_is_called_null(fields: dict[str, Any]) -> None:
    assert refusal(**fields).message.endswith("not null.")
