"""Tokenize and detokenize: requests and answers. Pure."""

import json
from typing import Any

import pytest
from api_requests import body, refused
from dialects import token_bytes

from mlxlite.api.conversation import Message, Role
from mlxlite.api.endpoints.tokenize import detokenized, parse_detokenize, parse_tokenize, tokenized


def test_a_text_has_a_name_in_both_dialects() -> None:
    request = parse_tokenize(body(content="hello"))
    assert request == parse_tokenize(body(prompt="hello"))
    assert request == parse_tokenize(body(prompt="hello", content="hello", parse_special=True))
    assert (request.content, request.messages, request.add_special) == ("hello", (), False)
    for name in ("add_special", "add_special_tokens"):
        assert parse_tokenize(body(content="x", **{name: True})).add_special
    assert parse_tokenize(body(content="")).content == ""
    assert parse_tokenize(body(content="x", with_pieces=True)).with_pieces
    assert parse_tokenize(body(content="x", return_token_strs=True)).with_strings
    assert parse_tokenize(body(content="x", zeta=1)).ignored == ("zeta",)


def test_a_chat_may_be_counted_as_well() -> None:
    messages = [{"role": "user", "content": "hello"}]
    request = parse_tokenize(body(messages=messages, chat_template_kwargs={"a": 1}))
    assert request.messages == (Message(Role.USER, "hello"),)
    assert request.template_kwargs == {"a": 1}
    assert request.continue_final is None
    prompted = body(messages=messages, add_generation_prompt=True)
    assert parse_tokenize(prompted).continue_final is None
    assert parse_tokenize(body(messages=messages, add_generation_prompt=False)).continue_final


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "content"),
        ({"content": None}, "content"),
        ({"content": "x", "messages": [{"role": "user", "content": "x"}]}, "content"),
        ({"content": "x", "prompt": "y"}, "prompt"),
        ({"content": 5}, "content"),
        ({"prompt": ["x"]}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"content": "x", "with_pieces": 1}, "with_pieces"),
        ({"content": "x", "return_token_strs": "true"}, "return_token_strs"),
        ({"content": "x", "add_special": 1}, "add_special"),
        ({"content": "x", "add_special": True, "add_special_tokens": False}, "add_special_tokens"),
        ({"content": "x", "parse_special": False}, "parse_special"),
        ({"content": "x", "add_generation_prompt": 0}, "add_generation_prompt"),
        (
            {"content": "x", "chat_template_kwargs": {"messages": 1}},
            "chat_template_kwargs.messages",
        ),
    ],
)
def test_what_cannot_be_tokenized_is_a_400_that_names_it(
    fields: dict[str, Any], param: str
) -> None:
    assert refused(parse_tokenize, body(**fields)).param == param


def test_tokenize_answers_in_both_dialects_with_texts_on_request() -> None:
    tokens = list("a🙂".encode())

    def answer(**fields: Any) -> Any:
        request = parse_tokenize(body(content="a🙂", **fields))
        return json.loads(tokenized(request, tokens, 4096, token_bytes))

    assert answer() == {"tokens": tokens, "count": 5, "max_model_len": 4096}
    assert answer(return_token_strs=True)["token_strs"] == ["a", *"\ufffd" * 4]
    assert answer(with_pieces=True)["tokens"] == [
        {"id": 97, "piece": "a"},
        *({"id": byte, "piece": [byte]} for byte in "🙂".encode()),
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "tokens"),
        ({"tokens": None}, "tokens"),
        ({"tokens": "abc"}, "tokens"),
        ({"tokens": 5}, "tokens"),
        ({"tokens": [5, -1]}, "tokens[1]"),
        ({"tokens": ["5"]}, "tokens[0]"),
        ({"tokens": [True]}, "tokens[0]"),
        ({"tokens": [[5]]}, "tokens[0]"),
        ({"tokens": [2**31]}, "tokens[0]"),
    ],
)
def test_what_is_no_token_is_a_400_that_names_it(fields: dict[str, Any], param: str) -> None:
    assert refused(parse_detokenize, body(**fields)).param == param


def test_detokenize_answers_in_both_dialects() -> None:
    request = parse_detokenize(body(tokens=[1, 2.0], model="m", zeta=1))
    assert (request.tokens, request.ignored) == ((1, 2), ("zeta",))
    assert parse_detokenize(body(tokens=[])).tokens == ()
    assert json.loads(detokenized("a\n🙂")) == {"content": "a\n🙂", "prompt": "a\n🙂"}
