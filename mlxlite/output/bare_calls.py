"""Calls without marks of their own: JSON in the text, bare or in a fence, and `[name(key=value)]`.

A JSON object is a call if it has the name of a known tool and arguments, and no member that a call
has not; an array, if all of its items are. Llama 3.x, Qwen2.5-Coder and many others write these,
some of them in spite of marks that their template names. All else stays text. What may become a
call is held back, from its first brace or the fence before it, and is emitted whole; a text is held
no longer than it takes to see that it is none.
"""

import ast
import json
import re
from collections.abc import Collection, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal

from mlxlite.output.call_syntax import CallSyntax
from mlxlite.output.events import ParserEvent, TextDelta
from mlxlite.output.markers import MAX_GAP, PARSE_ERRORS, MarkerFormat, MarkerParser
from mlxlite.output.parser import MAX_CALL_CHARS, OutputParser, ParserOptions
from mlxlite.output.tool_arguments import MAX_HEAD, PYTHON, ObjectScan, ScanState, canonical

_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters")
_MEMBERS = frozenset((*_NAMES, *_ARGUMENTS, "type", "id", "index"))
_FIRST = (*_NAMES, *_ARGUMENTS, "type")
# Before a call, and dropped with it; the other mark is expected after it.
_TAGS: Mapping[str, str] = {
    "<tool_call>": "</tool_call>",
    "<function_call>": "</function_call>",
    "<tools>": "</tools>",
    "<|tool_call|>": "<|/tool_call|>",
    "<|python_tag|>": "",
}
_FENCE = r"```[A-Za-z_]{0,16}[ \t]*\n?"
_OPENER = re.compile(rf"(?:({'|'.join(map(re.escape, _TAGS))}|{_FENCE})\s*)?\Z")
# What the end of a text may be the beginning of.
_HALF_FENCE = re.compile(r"(?:`{1,3}|" + _FENCE + r")\s*\Z")
_SPACE = re.compile(r"\s*\Z")
_BRACE = re.compile(r"[{\[]")
_AFTER = re.compile(r"[\s;]*")

Call = tuple[str, Mapping[str, Any]]


# --- reading --------------------------------------------------------------------------------------


def json_calls(text: str) -> list[Call]:
    """Names and arguments of a JSON call, or of an array of them. Raises ValueError."""
    value = json.loads(text)
    return [_call_of(item) for item in (value if isinstance(value, list) and value else [value])]


def _call_of(value: Any) -> Call:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not value.keys() <= _MEMBERS:
        raise ValueError("the value is no call")
    name = next((value[key] for key in _NAMES if key in value), None)
    given = next((value[key] for key in _ARGUMENTS if key in value), "")
    arguments = json.loads(given) if isinstance(given, str) else given
    if not isinstance(name, str) or not isinstance(arguments or {}, dict):
        raise ValueError("the value is no call")
    return name, arguments or {}


def python_calls(text: str) -> list[Call]:
    """Names and arguments of `[name(key=value), …]`. Raises ValueError, SyntaxError."""
    listed = ast.parse(text.strip(), mode="eval").body
    calls = listed.elts if isinstance(listed, ast.List) else []
    if not calls:
        raise ValueError("the text is no list of calls")
    return [_python_call(call) for call in calls]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("the value is no call")
    return ast.unparse(node.func), {
        str(keyword.arg): ast.literal_eval(_Literals().visit(keyword.value))
        for keyword in node.keywords
    }


class _Literals(ast.NodeTransformer):
    """JSON's words to Python's."""

    _values: Mapping[str, Any] = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self._values[node.id]) if node.id in self._values else node


# --- the format -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BareFormat:
    """An `OutputFormat`: that of `markers`, and calls without marks in its text."""

    markers: MarkerFormat
    syntax: CallSyntax | None
    can_call_tools: bool = True

    @property
    def marks(self) -> Collection[str]:
        return self.markers.marks

    def starts_in_reasoning(self, prompt: str) -> bool:
        return self.markers.starts_in_reasoning(prompt)

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        return message

    def parser(self, options: ParserOptions) -> OutputParser:
        inner = self.markers.parser(options)
        has_only_marks = options.is_strict and bool(self.markers.call_start)
        return inner if options.schemas is None or has_only_marks else BareParser(inner, options)


class BareParser(OutputParser):
    """An `OutputParser`: the content that `inner` finds, with the calls in it."""

    def __init__(self, inner: MarkerParser, options: ParserOptions) -> None:
        super().__init__(options)
        self._inner = inner
        self._scan: ObjectScan | None = None  # of the text that is held, if it may be a call
        self._is_python = False
        self._num_scanned = 0
        self._opener = ""  # held before it, and white space
        self._closer = ""  # expected after the calls
        self._follows_call = False
        self._num_own = 0

    @property
    def is_reasoning(self) -> bool:
        return self._inner.is_reasoning

    def push(self, text: str) -> list[ParserEvent]:
        return self._read(self._inner.push(text))

    def flush(self) -> list[ParserEvent]:
        return [*self._read(self._inner.flush()), *self._rest()]

    def _read(self, events: list[ParserEvent]) -> list[ParserEvent]:
        found: list[ParserEvent] = []
        for event in events:
            if isinstance(event, TextDelta):
                found += super().push(event.text)
            else:
                found += [*self._rest(), event]
        self.num_calls = self._num_own + self._inner.num_calls
        return found

    def _rest(self) -> list[ParserEvent]:
        """The events of the held text, where the content ends."""
        held, self._held = self._held, ""
        self._end(held)
        events, self._events = self._events, []
        return events

    def _emit_call(self, name: str, arguments: str) -> None:
        num_before = self.num_calls
        super()._emit_call(name, arguments)
        self._num_own += self.num_calls - num_before

    def _step(self) -> bool:
        if self._scan is not None:
            return self._continue(self._scan)
        if self._follows_call:
            return self._leave_call()
        for brace in _BRACE.finditer(self._held):
            at = brace.start()
            head = self._held[at : at + MAX_HEAD]
            kind = self._begins_call(head)
            if kind == "maybe" and len(head) < MAX_HEAD:
                self._release(at - _num_opener(self._held[:at]))
                return False
            if kind in ("json", "python"):
                self._begin(at, is_python=kind == "python")
                return True
        self._release(len(self._held) - self._num_held(self._held))
        return False

    def _begin(self, at: int, *, is_python: bool) -> None:
        """A call may begin at this place of the held text."""
        num = _num_opener(self._held[:at])
        self._release(at - num)
        self._opener, self._held = self._held[:num], self._held[num:]
        self._is_python, self._num_scanned = is_python, 0
        self._scan = ObjectScan(PYTHON) if is_python else ObjectScan()

    def _release(self, num: int) -> None:
        """Emit held text that is no part of a call."""
        if num:
            self._closer = ""
        self._emit(TextDelta, self._held[:num])
        self._held = self._held[num:]

    def _num_held(self, text: str) -> int:
        """Characters at the end of a text without braces that may come before a call."""
        near = text[-MAX_GAP:]
        halves = (
            match.start()
            for match in (_HALF_FENCE.search(near), _OPENER.search(near), _SPACE.search(near))
            if match is not None
        )
        tags = (
            near.rfind(tag[:num])
            for tag in _TAGS
            for num in range(1, len(tag))
            if near.endswith(tag[:num])
        )
        first = min((*halves, *tags), default=len(near))
        return len(near) - len(near[:first].rstrip())

    def _begins_call(self, text: str) -> Literal["no", "maybe", "json", "python"]:
        """Whether a text from its first brace on is a call, as far as it goes."""
        rest = text[1:].lstrip()
        if len(text) - len(rest) > MAX_GAP:
            return "no"
        if text[0] == "[":
            if rest.startswith("{"):
                return self._begins_call(rest)
            found = _begins_with(rest, [f"{name}(" for name in self._schemas])
            return "python" if found is True else found or "no"
        return self._begins_member(rest)

    def _begins_member(self, rest: str) -> Literal["no", "maybe", "json"]:
        """The same of a text from an object's first member on."""
        for key in _FIRST:
            quoted = f'"{key}"'
            if quoted.startswith(rest):
                return "maybe"
            if not rest.startswith(quoted):
                continue
            after = rest[len(quoted) :].lstrip()
            value = after[1:].lstrip()
            if not after or (after[0] == ":" and not value):
                return "maybe"
            if after[0] != ":":
                return "no"
            return self._begins_value(key, value)
        return "no"

    def _begins_value(self, key: str, value: str) -> Literal["no", "maybe", "json"]:
        if key in _ARGUMENTS or (key == "function" and value[0] == "{"):
            return "json"
        words = ["function"] if key == "type" else [*self._schemas]
        found = _begins_with(value, [f'"{word}"' for word in words])
        return "json" if found is True else found or "no"

    def _continue(self, scan: ObjectScan) -> bool:
        """Read on in what may be a call."""
        self._num_scanned += scan.push(self._held[self._num_scanned : MAX_CALL_CHARS])
        if scan.state is ScanState.OPEN and len(self._held) < MAX_CALL_CHARS:
            return False
        body, rest = self._held[: self._num_scanned], self._held[self._num_scanned :]
        calls = self._calls(body) if scan.state is ScanState.CLOSED else []
        self._scan = None
        if not calls:
            self._give_up(max(len(body), 1))
            return True
        for name, arguments in calls:
            self._emit_call(name, arguments)
        mark = self._opener.strip()
        if mark:
            self._closer = "```" if mark.startswith("```") else _TAGS.get(mark, "")
        self._opener, self._held, self._follows_call = "", rest, True
        return True

    def _give_up(self, num: int) -> None:
        """Emit what is no call after all, with what came before it."""
        self._held, num = self._opener + self._held, len(self._opener) + num
        self._opener = ""
        self._release(num)

    def _calls(self, body: str) -> SequenceOf[tuple[str, str]]:
        try:
            calls = python_calls(body) if self._is_python else json_calls(body)
            if not all(name in self._schemas for name, _ in calls):
                return []
            return [(name, canonical(given, self._schemas[name])) for name, given in calls]
        except PARSE_ERRORS:
            return []

    def _leave_call(self) -> bool:
        """Drop what separates calls, and the mark that closes them."""
        gap = _AFTER.match(self._held)
        assert gap is not None
        rest = self._held[gap.end() :]
        if self._closer and rest.startswith(self._closer):
            self._held, self._closer = rest[len(self._closer) :], ""
            return True
        self._held = rest
        if not rest or (self._closer and self._closer.startswith(rest)):
            return False
        self._follows_call = False
        return True

    def _end(self, held: str) -> None:
        is_rest = self._follows_call and self._closer.startswith(held.strip())
        self._scan, self._follows_call = None, False
        self._emit(TextDelta, "" if is_rest else self._opener + held)
        self._opener = ""


def _num_opener(text: str) -> int:
    """Characters at the end of a text that are dropped with the call after it."""
    near = text[-MAX_GAP:]
    opener = _OPENER.search(near)
    assert opener is not None
    first = opener.start()
    return len(near) - len(near[:first].rstrip())


def _begins_with(text: str, words: SequenceOf[str]) -> "Literal['maybe'] | bool":
    """True if a text begins with one of these words, `maybe` if it may when it goes on."""
    if any(text.startswith(word) for word in words):
        return True
    return "maybe" if any(word.startswith(text) for word in words) else False
