"""Tools end to end on templates of many kinds: a random model calls what it is forced to call."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from checkpoints import edit, save_checkpoint
from live import serving
from openai import OpenAI
from tool_templates import CALL_PARTS, LLAMA3, PYTHONIC, chatml

from mlxlite.config.options import Config

pytest.importorskip("llguidance", reason="structured output is the extra `grammar`")

SCHEMA = {
    "type": "object",
    "properties": {"unit": {"enum": ["celsius", "kelvin"]}, "exact": {"type": "boolean"}},
    "required": ["unit", "exact"],
    "additionalProperties": False,
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "other", "parameters": {"not": {}}}},
]
STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
TEMPLATES: dict[str, Any] = {
    "llama 3": LLAMA3,
    "llama 4": PYTHONIC,
    "a fence": chatml(f"\n```json\n{CALL_PARTS}\n```"),
    "tags": chatml(f"\n<call>\n{CALL_PARTS}\n</call>"),
    "named": [
        {"name": "default", "template": chatml("", "none")},
        {"name": "tool_use", "template": LLAMA3},
    ],
    "qwen3_coder": chatml("<tool_call>\\n<function="),
    "glm47": chatml("<arg_key>"),
    "pythonic": chatml("<|tool_call_start|>"),
    "minimax_m2": chatml("<minimax:tool_call>"),
}


@pytest.fixture(scope="module", params=TEMPLATES)
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OpenAI]:
    path = save_checkpoint(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)
    edit(path / "tokenizer_config.json", chat_template=TEMPLATES[request.param])
    config = Config(model=str(path), port=0, shutdown_grace_s=0.1)
    with (
        serving(config) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=60) as client,
    ):
        yield client


def create(client: OpenAI, *, is_stream: bool = False, **fields: Any) -> Any:
    messages = [{"role": "user", "content": "How warm is it?"}]
    fields = {"max_tokens": 400, "temperature": 1.0, "seed": 1, "tools": TOOLS, **fields}
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "extra_body": fields}
    if not is_stream:
        return client.chat.completions.create(**body)
    with client.chat.completions.stream(**body) as stream:
        for _ in stream:
            pass
        return stream.get_final_completion()


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_forced_call_is_made_in_the_models_own_format(client: OpenAI, is_stream: bool):
    chosen = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        answer = create(client, is_stream=is_stream, tool_choice=chosen, seed=seed)
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert not choice.message.content
        (call,) = choice.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather"
        assert arguments.keys() == {"unit", "exact"}
        assert arguments["unit"] in ("celsius", "kelvin")
        assert isinstance(arguments["exact"], bool)


def test_an_answer_is_a_call_or_one_of_the_choices(client: OpenAI):
    choices, kinds = ["yes", "no", "maybe", "never"], set()
    for seed in range(16):
        answer = create(
            client,
            is_stream=bool(seed % 2),
            tools=STRICT,
            guided_choice=choices,
            temperature=20.0,  # any of what the grammar allows
            seed=seed,
            parallel_tool_calls=False,
        )
        (choice,) = answer.choices
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert choice.message.content in choices
        elif choice.finish_reason == "tool_calls":
            assert json.loads(choice.message.tool_calls[0].function.arguments).keys() == {
                "unit",
                "exact",
            }
            assert not choice.message.content
    assert "stop" in kinds


def test_what_is_left_out_of_a_schema_is_named(client: OpenAI):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_tokens=1,
        extra_body={"tools": TOOLS, "tool_choice": "required"},
    )
    assert raw.headers["x-mlxlite-ignored"].startswith("tools[1].function.parameters")


def test_a_strict_tool_that_is_not_forced_is_served(client: OpenAI):
    assert create(client, tools=STRICT, max_tokens=5).choices


def test_tools_are_refused_only_where_the_template_never_shows_them(tmp_path: Path):
    path = save_checkpoint(tmp_path / "tiny")
    with (
        serving(Config(model=str(path), port=0, shutdown_grace_s=0.1)) as server,
        OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
        pytest.raises(openai.BadRequestError) as caught,
    ):
        create(client)
    assert caught.value.param == "tools"
