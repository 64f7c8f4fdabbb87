"""Tools on templates that mlx-lm has no parser for: their form is read from what they render.

The templates are the parts about tools of the real ones.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import loaded, save_checkpoint
from tool_templates import (
    CALL_FUNCTION,
    CALL_PARTS,
    LLAMA3,
    PYTHON_TAG,
    PYTHONIC,
    chatml,
)
from transformers import AutoTokenizer

from mlxlite.models.tool_probe import call_form
from mlxlite.output.bare_calls import BareFormat
from mlxlite.output.call_forms import CallForm
from mlxlite.output.events import TextDelta, ToolCallEnd, ToolCallStart
from mlxlite.output.markers import MarkerFormat
from mlxlite.output.parser import ParserOptions

TEMPLATES: dict[str, tuple[str, CallForm | None]] = {
    "llama 3": (LLAMA3, CallForm("parameters")),
    "llama 3 with a tag": (PYTHON_TAG, CallForm("parameters", "<|python_tag|>")),
    "llama 4": (PYTHONIC, CallForm(is_python=True)),
    "bare": (chatml(CALL_PARTS), CallForm()),
    "of a whole call": (chatml("{{ call | tojson }}"), CallForm()),
    "an array": (chatml("[" + CALL_FUNCTION + "]"), CallForm(is_array=True)),
    "a fence": (
        chatml(f"\n```json\n{CALL_PARTS}\n```"),
        CallForm("arguments", "```json\n", "\n```"),
    ),
    "tags": (
        chatml(f"\n<call>\n{CALL_PARTS}\n</call>"),
        CallForm("arguments", "<call>\n", "\n</call>"),
    ),
    "phi 4": (
        chatml(f"<|tool_call|>[{CALL_PARTS}]<|/tool_call|>"),
        CallForm("arguments", "<|tool_call|>", "<|/tool_call|>", is_array=True),
    ),
    "granite": (
        chatml(f"<|tool_call|>[{CALL_PARTS}]"),
        CallForm("arguments", "<|tool_call|>", "", is_array=True),
    ),
    "calls that are not rendered": (chatml(""), CallForm()),
    "calls that are refused": (chatml("{{ raise_exception('no') }}"), CallForm()),
    "calls of another kind": (chatml("CALL {{ call.function.name }}"), CallForm()),
    "no tools": (chatml(CALL_PARTS, "none"), None),
    "nothing": ("{{ messages[0].content }}", None),
    "broken": ("{{ messages[", None),
    "endless": (
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        None,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "plain")


@pytest.mark.parametrize("name", TEMPLATES)
def test_how_calls_are_written_is_what_the_template_renders(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlxlite.models.tool_probe._TIMEOUT_S", 0.2)
    template, expected = TEMPLATES[name]
    own = AutoTokenizer.from_pretrained(folder)
    render = partial(own.apply_chat_template, tokenize=False, chat_template=template)
    assert call_form(render) == expected


def model_of(tmp_path: Path, template: Any) -> Any:
    path = save_checkpoint(tmp_path / "model")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return loaded(path)


def calls_of(model: Any, text: str) -> list[Any]:
    options = ParserOptions(schemas={"look": {}}, parse_calls=partial(model.parse_calls, tools=[]))
    parser = model.output_format.parser(options)
    found: list[Any] = []
    for event in parser.push(text) + parser.flush():
        match event:
            case ToolCallStart():
                found.append(event.name)
            case ToolCallEnd(arguments):
                found[-1] = (found[-1], json.loads(arguments))
            case TextDelta(text):
                found.append(text)
    return found


LOOK = ("look", {"num": 3})
CALL = '{"name": "look", "arguments": {"num": 3}}'
LOADED: dict[str, tuple[Any, str]] = {
    "llama 3": (LLAMA3, CALL.replace("arguments", "parameters")),
    "llama 4": (PYTHONIC, "[look(num=3)]"),
    "a fence": (TEMPLATES["a fence"][0], f"```json\n{CALL}\n```"),
    "tags": (TEMPLATES["tags"][0], f"<call>\n{CALL}\n</call>"),
    "phi 4": (TEMPLATES["phi 4"][0], f"<|tool_call|>[{CALL}]<|/tool_call|>"),
    "granite": (TEMPLATES["granite"][0], f"<|tool_call|>[{CALL}]"),
    "qwen 2.5 coder": (
        chatml("<tool_call>\n{{ tool_call.name }}\n</tool_call>"),
        f"```json\n{CALL}\n```",
    ),
    "named": (
        [
            {"name": "default", "template": chatml("", "none")},
            {"name": "tool_use", "template": LLAMA3},
        ],
        CALL.replace("arguments", "parameters"),
    ),
    "named, with marks of mlx-lm's": (
        [
            {"name": "default", "template": chatml("", "none")},
            {"name": "tool_use", "template": chatml("<arg_key>")},
        ],
        "<tool_call>look\n<arg_key>num</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    ),
}


@pytest.mark.parametrize("name", LOADED)
def test_a_model_of_such_a_template_can_call_tools(tmp_path: Path, name: str):
    template, text = LOADED[name]
    model = model_of(tmp_path, template)
    assert model.output_format.can_call_tools
    assert model.output_format.syntax is not None
    assert calls_of(model, f"Well: {text}") == ["Well:", LOOK]


def test_a_template_that_never_shows_tools_has_none(tmp_path: Path):
    assert model_of(tmp_path, chatml(CALL_PARTS, "none")).output_format == MarkerFormat()


def test_the_operators_template_is_the_one_that_is_looked_at(folder: Path, tmp_path: Path):
    (tmp_path / "own.jinja").write_text(LLAMA3)
    assert loaded(folder).output_format == MarkerFormat()
    model = loaded(folder, chat_template=str(tmp_path / "own.jinja"))
    assert isinstance(model.output_format, BareFormat)
    assert calls_of(model, CALL) == [LOOK]
