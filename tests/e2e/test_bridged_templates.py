"""Agents' conversations in every dialect, with models whose templates refuse them as they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import Site, serving

import mlxlite
from mlxlite.models.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parents[1] / "support" / "templates"
SAMPLING = {"temperature": 0}


@pytest.fixture(scope="module", params=["qwen35", "gemma2", "mistral_v3", "llama31", "gpt_oss"])
def site(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Site]:
    template = str(TEMPLATES / f"{request.param}.jinja")
    config = mlxlite.Config(
        model=str(checkpoint), port=0, ctx_size=10_000, chat_template=template, shutdown_grace_s=0.1
    )
    with serving(config) as server:
        yield Site(server)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenized from now on."""
    texts: list[str] = []
    encode = Tokenizer.encode

    def recording(self: Tokenizer, text: str, *, add_special: bool) -> tuple[int, ...]:
        texts.append(text)
        return encode(self, text, add_special=add_special)

    monkeypatch.setattr(Tokenizer, "encode", recording)
    return texts


def assert_answered(site: Site, prompts: list[str], path: str, body: Any, words: str) -> None:
    """Every word is in the prompt; those after a colon are in this order."""
    status, given = site.post(path, {"model": "tiny", **SAMPLING, **body})
    assert status == 200, given
    anywhere, _, ordered = words.rpartition(":")
    assert all(word in prompts[0] for word in anywhere.split())
    at = 0
    for word in ordered.split():
        at = prompts[0].find(word, at)
        assert at >= 0, (word, prompts[0])


CALL = {"name": "look", "arguments": '{"path": "half'}


def chat_call(id: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": CALL}


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("s-one d-two u-three", "one two: three"),
        ("s-one u-two a-three d-four u-five", "one: two three four five"),
        ("u-one u-two a-three a-four u-five", "one two three four five"),
        ("a-one u-two", "one two"),
        ("s-one", "one"),
        ("t-one u-two", "one two"),
        ("u-one c- t-two u-three s-four", "four: one look half two three"),
        ("u-one a-", "one"),
    ],
)
def test_chats(site: Site, prompts: list[str], messages: str, words: str) -> None:
    roles = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    given = []
    for kind, text in (message.split("-") for message in messages.split()):
        match kind:
            case "c":
                calls = [chat_call("toolu_01"), chat_call("x")]
                given.append({"role": "assistant", "content": None, "tool_calls": calls})
            case "t":
                given.append({"role": "tool", "content": text, "tool_call_id": "x"})
            case _:
                given.append({"role": roles[kind], "content": text})
    body = {"messages": given, "max_tokens": 2}
    assert_answered(site, prompts, "/v1/chat/completions", body, words)


def test_responses(site: Site, prompts: list[str]) -> None:
    call = {"type": "function_call", "call_id": "fc_01", **CALL}
    items = [
        {"role": "developer", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "user", "content": "four"},
        call,
        {**call, "call_id": "fc_02"},
        {"type": "function_call_output", "call_id": "fc_02", "output": "five"},
        {"type": "function_call_output", "call_id": "fc_gone", "output": "six"},
        {"role": "system", "content": "seven"},
        {"role": "user", "content": "eight"},
    ]
    words = "one two five six: three four look half seven eight"
    body = {"instructions": "one", "input": items, "max_output_tokens": 16}
    assert_answered(site, prompts, "/v1/responses", body, words)


def test_messages(site: Site, prompts: list[str]) -> None:
    use = {"type": "tool_use", "id": "toolu_01", "name": "look", "input": {"path": "half"}}
    messages = [
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": [use, {**use, "id": "toolu_02"}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_02", "content": "five"},
                {"type": "tool_result", "tool_use_id": "toolu_01", "content": "six"},
                {"type": "text", "text": "seven"},
            ],
        },
    ]
    body = {"system": "one", "messages": messages, "max_tokens": 2}
    words = "one two five six: three four look half seven"
    assert_answered(site, prompts, "/v1/messages", body, words)
