"""How a checkpoint writes tool calls: by mlx-lm's parsers, or else by what its template renders.

The template is untrusted: each rendering is bounded in time, and one that fails shows nothing.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlxlite.models.time_limit import TookTooLong, run_with_timeout
from mlxlite.output.call_forms import CallForm, form_of

# Messages and tools to a prompt's text; raises anything for what the template refuses.
Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], str]
_TIMEOUT_S = 5.0
_SHOWN, _CALLED, _WORD = "mlxlite_shown", "mlxlite_called", "mlxlite_word"
_ID = "abcdefghi"  # nine letters fit every template


def call_form(render: Render) -> CallForm | None:
    """How a template writes calls; None if it never shows tools."""
    tools = [_tool(_SHOWN)]
    ask = {"role": "user", "content": "Hello"}
    if _SHOWN not in _tried(render, [ask], tools):
        return None
    plain = _tried(render, [ask, {"role": "assistant", "content": _WORD}], tools)
    result = {"role": "tool", "name": _SHOWN, "content": "3", "tool_call_id": _ID}
    for arguments in ({"word": "x"}, json.dumps({"word": "x"})):
        for after in ([], [result]):
            text = _tried(render, [ask, _call(arguments), *after], tools)
            if _CALLED in text:
                return form_of(text, _CALLED, plain, _WORD)
    return CallForm()


def _tried(render: Render, messages: list[Any], tools: list[Any]) -> str:
    try:
        return str(run_with_timeout(_TIMEOUT_S, lambda: render(messages, tools)))
    except TookTooLong:
        return ""
    except Exception:  # a template may raise anything
        return ""


def _tool(name: str) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    function = {"name": name, "description": "Reads a word.", "parameters": schema}
    return {"type": "function", "function": function}


def _call(arguments: Any) -> dict[str, Any]:
    call = {"id": _ID, "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@dataclass(frozen=True, slots=True)
class CallParser:
    """One of mlx-lm's parsers."""

    parse: Callable[..., Any]
    start: str
    end: str

    @property
    def name(self) -> str:
        return str(self.parse.__module__).rpartition(".")[2]


def own_parser(wrapper: Any) -> CallParser | None:
    """The parser that mlx-lm has found for its tokenizer."""
    if wrapper.tool_parser is None:
        return None
    return CallParser(wrapper.tool_parser, wrapper.tool_call_start, wrapper.tool_call_end)


def templates_of(wrapper: Any, source: str | None) -> tuple[str, ...]:
    """The texts of a tokenizer's chat templates, or of the operator's; the one for tools first."""
    given = wrapper.get_chat_template.__self__.chat_template if source is None else source
    named = given if isinstance(given, dict) else {"default": given or ""}
    return tuple(map(str, (named.get("tool_use", ""), *named.values())))
