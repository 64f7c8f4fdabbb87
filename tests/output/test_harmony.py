"""Tests of gpt-oss's format: what is reasoning, what is a call, and that cuts change nothing."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoints import loaded, save_checkpoint
from helpers import FakeModel
from hypothesis import given
from hypothesis import strategies as st

from mlxlite.api.endpoints.chat_completions import parse_chat
from mlxlite.api.render import output_parser, render_chat
from mlxlite.api.tools import Tool
from mlxlite.config.options import Config
from mlxlite.output.events import (
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from mlxlite.output.harmony import MARKS, MAX_HEAD, HarmonyFormat, HarmonyParser
from mlxlite.output.parser import ParserOptions

THINK = "<|channel|>analysis<|message|>Let me see.<|end|>"
SAY = "<|start|>assistant<|channel|>final<|message|>It is 3 < 4.<|return|>"
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    '{"city": "Köln <\\"x\\">", "days": 2.0}<|call|>'
)
SCHEMAS: Mapping[str, Any] = {
    "weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
}


@dataclass
class Heard:
    """An answer, put together."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)


def hear(pieces: Iterable[str], **settings: Any) -> Heard:
    parser = HarmonyParser(ParserOptions(**{"schemas": SCHEMAS, **settings}))
    heard = Heard()

    def take(events: list[ParserEvent]) -> None:
        for event in events:
            match event:
                case ReasoningDelta(text):
                    heard.reasoning += text
                case TextDelta(text):
                    heard.content += text
                case ToolCallStart(_, name):
                    heard.calls.append((name, None))
                case ToolCallArguments(text):
                    heard.calls[-1] = (heard.calls[-1][0], json.loads(text))

    for piece in pieces:
        take(parser.push(piece))
    take(parser.flush())
    assert parser.num_calls == len(heard.calls)
    return heard


CORPUS = {
    "thought and answer": (THINK + SAY, Heard("It is 3 < 4.", "Let me see.")),
    "thought and call": (
        THINK + CALL,
        Heard("", "Let me see.", [("weather", {"city": 'Köln <"x">', "days": 2})]),
    ),
    "a call that its end-of-sequence token has closed": (
        THINK + CALL.removesuffix("<|call|>"),
        Heard("", "Let me see.", [("weather", {"city": 'Köln <"x">', "days": 2})]),
    ),
    "the recipient in the role": (
        "<|start|>assistant to=functions.f<|channel|>commentary<|message|>{}<|call|>",
        Heard(calls=[("f", {})]),
    ),
    "words before a call": (
        "<|channel|>commentary<|message|>One moment.<|end|>" + CALL,
        Heard("One moment.", "", [("weather", {"city": 'Köln <"x">', "days": 2})]),
    ),
    "two calls": (
        CALL + CALL,
        Heard(calls=[("weather", {"city": 'Köln <"x">', "days": 2})] * 2),
    ),
    "no head at all": ('{"a": "<|x|>"}', Heard('{"a": "<|x|>"}')),
    "an end that is forgotten": (
        THINK.removesuffix("<|end|>") + SAY,
        Heard("It is 3 < 4.", "Let me see."),
    ),
    "a call that is no JSON": (
        "<|channel|>commentary to=functions.f<|message|>{oops<|call|>",
        Heard("<|channel|>commentary to=functions.f<|message|>{oops<|call|>"),
    ),
    "a call that is no object": (
        "<|channel|>commentary to=functions.f<|message|>[1]<|call|>",
        Heard("<|channel|>commentary to=functions.f<|message|>[1]<|call|>"),
    ),
    "a tool that was not given": (
        "<|channel|>commentary to=python<|message|>1+1<|end|>",
        Heard("1+1"),
    ),
    "half a mark that is none": (
        THINK + "<|start|>assistant<|channel|>final<|message|>a <|b",
        Heard("a <|b", "Let me see."),
    ),
    "a head that leads nowhere": (THINK + "<|start|>assistant<|chan", Heard("", "Let me see.")),
    "nothing": ("", Heard()),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_harmony_answer_is_parsed_the_same_however_it_is_cut(name: str):
    text, expected = CORPUS[name]
    assert hear([text]) == expected
    assert hear(text) == expected
    for at in range(len(text)):
        assert hear([text[:at], text[at:]]) == expected


@given(st.lists(st.sampled_from([*"ab<|>{}", "<|start|>", "<|channel|>", "analysis", "<|message|>",
    "<|end|>", "<|call|>", " to=functions.f", "final", '{"a":1}']), max_size=14))  # fmt: skip
def test_any_text_is_parsed_the_same_however_it_is_cut(parts: list[str]):
    text = "".join(parts)
    whole = hear([text])
    assert hear(text) == whole
    assert hear(parts) == whole


def test_without_tools_a_call_is_text():
    heard = hear([THINK + CALL], schemas=None)
    assert heard.reasoning == "Let me see."
    assert "to=functions.weather" in heard.content
    assert '"days": 2.0' in heard.content


def test_reasoning_may_stay_in_the_content():
    heard = hear([THINK + SAY], splits_reasoning=False)
    assert heard.reasoning == ""
    assert heard.content == "<|channel|>analysis<|message|>Let me see.It is 3 < 4."


def test_no_more_calls_are_emitted_than_max_calls():
    parser = HarmonyParser(ParserOptions(schemas=SCHEMAS, max_calls=1))
    events = parser.push(CALL + CALL)
    assert sum(isinstance(event, ToolCallStart) for event in events) == 1
    assert parser.is_complete


def test_a_head_without_an_end_is_text_and_bounded():
    text = "<|channel|>" + "x" * (MAX_HEAD + 50)
    assert hear([text]).content == text
    assert hear(text).content == text


def test_a_call_of_endless_length_is_text():
    head = "<|channel|>commentary to=functions.f<|message|>"
    text = head + '{"a": "' + "x" * (1 << 20) + '"}<|call|>'
    heard = hear([text[i : i + 4096] for i in range(0, len(text), 4096)])
    assert not heard.calls
    assert heard.content.startswith(head)
    assert heard.content.count("x") == 1 << 20


def test_reasoning_is_counted_while_it_lasts():
    parser = HarmonyParser(ParserOptions(schemas=SCHEMAS))
    parser.push("<|channel|>analysis<|message|>a")
    assert parser.is_reasoning
    parser.push("<|end|><|start|>assistant<|channel|>final<|message|>")
    assert not parser.is_reasoning


def test_the_template_gets_the_reasoning_before_a_call():
    call = {"role": "assistant", "content": "", "reasoning_content": "r", "tool_calls": [1]}
    assert HarmonyFormat().prepare(call)["thinking"] == "r"
    said = {"role": "assistant", "content": "c", "reasoning_content": "r"}
    assert "thinking" not in HarmonyFormat().prepare(said)


def test_a_tool_of_any_name_can_be_called():
    name = "a.b:c-d_9"
    assert Tool(name, "", {}).name == name
    text = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{{}}<|call|>"
    assert hear([text]).calls == [(name, {})]


def test_a_model_with_harmony_markers_is_detected_and_its_markers_are_text(tmp_path: Path):
    path = save_checkpoint(tmp_path / "oss")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    first = 1 + max(token["id"] for token in tokenizer["added_tokens"])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [
        {"id": first + i, "content": mark, "special": True, **plain}
        for i, mark in enumerate(sorted(MARKS))
    ]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    model = loaded(path)
    assert isinstance(model.output_format, HarmonyFormat)
    tokens = model.encode(THINK + CALL, add_special=False)
    assert hear([model.detokenize(tokens)]) == CORPUS["thought and call"][1]
    plain = loaded(save_checkpoint(tmp_path / "plain"))
    assert not isinstance(plain.output_format, HarmonyFormat)


def test_a_request_with_tools_reaches_the_format():
    model = FakeModel(output_format=HarmonyFormat())
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": SCHEMAS["weather"]}}
    ]
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": tools}).encode()
    request = parse_chat(body)
    (prompt,) = render_chat(model, request, Config())
    parser = output_parser(model, request, prompt)()
    events = [*parser.push(THINK + CALL), *parser.flush()]
    (end,) = [event for event in events if isinstance(event, ToolCallEnd)]
    assert json.loads(end.arguments) == {"city": 'Köln <"x">', "days": 2}
