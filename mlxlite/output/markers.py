"""Formats with markers: `<think>…</think>` around reasoning, `<tool_call>…</tool_call>` a call.

The calls between two markers are parsed by the model's own function (mlx-lm's parsers). What a
parser may hold is bounded: white space by `MAX_GAP`, a call by `MAX_CALL_CHARS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlite.output.call_syntax import CallSyntax
from mlxlite.output.events import (
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallInvalid,
    ToolCallStart,
)
from mlxlite.output.parser import (
    MAX_CALL_CHARS,
    OutputParser,
    ParseCalls,
    ParserOptions,
    next_marker,
)
from mlxlite.output.tool_arguments import (
    MAX_HEAD,
    OpenCall,
    ScanState,
    canonical,
    head_of,
    new_call_id,
)

# Of foreign parsers, for what a model may write; any other error is a fault of the parser.
PARSE_ERRORS = (
    *(ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError),
    *(SyntaxError, TypeError, ValueError),
)
MAX_GAP = 256  # characters of white space around a marker


@dataclass(frozen=True, slots=True)
class MarkerFormat:
    """An `OutputFormat`: markers around reasoning and calls; "" for what a model does not have."""

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""  # "" with a `call_start`: a call goes on to the end
    has_json_calls: bool = False  # between them is {"name": …, "arguments": {…}}
    syntax: CallSyntax | None = None
    parse: ParseCalls | None = None  # of the calls between two markers; None: the model's

    @property
    def marks(self) -> tuple[str, ...]:
        inner = self.syntax.inner if self.syntax is not None else ()
        found = (self.think_start, self.think_end, self.call_start, self.call_end, *inner)
        return tuple(filter(None, found))

    @property
    def can_call_tools(self) -> bool:
        return bool(self.call_start)

    def starts_in_reasoning(self, prompt: str) -> bool:
        return bool(self.think_start) and prompt.rstrip().endswith(self.think_start)

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        return message

    def parser(self, options: ParserOptions) -> "MarkerParser":
        return MarkerParser(self, options)


class _State(Enum):
    START = "start"  # only white space so far: reasoning may begin
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    ARGUMENTS = "arguments"  # of a call that is emitted as it is written


class MarkerParser(OutputParser):
    """An `OutputParser` of text with markers.

    Reasoning may begin at the start, or after a call: a marker in the middle of a sentence is text.
    A call is held until it is complete. White space that touches a marker is dropped.

    Where calls are JSON, one that begins with the name of a known tool is emitted as it is written,
    and an end marker in one of its strings is part of the string. It ends as `ToolCallInvalid` if
    the complete text does not parse as this one call: the emitted arguments stay emitted, the rest
    is text, and nothing is emitted twice.
    """

    def __init__(self, markers: MarkerFormat, options: ParserOptions) -> None:
        super().__init__(options)
        self._markers = markers
        self._think_start = markers.think_start if options.splits_reasoning else ""
        self._call_start = markers.call_start if options.schemas is not None else ""
        self._parse = markers.parse or options.parse_calls
        is_open = options.starts_in_reasoning and bool(self._think_start)
        self._state = _State.REASONING if is_open else _State.START
        self._gap = ""  # white space before a call, which is text if the call is none
        self._may_open = False  # the call so far may be the head of one that is not held
        self._open: OpenCall | None = None
        self._is_fresh = True  # nothing was emitted since the last marker
        self._has_reasoned = is_open

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING

    def _step(self) -> bool:
        match self._state:
            case _State.START:
                return self._begin()
            case _State.CONTENT:
                return self._content()
            case _State.REASONING:
                return self._reasoning()
            case _State.CALL:
                return self._call()
            case _State.ARGUMENTS:
                return self._arguments()

    def _end(self, held: str) -> None:
        match self._state:
            case _State.CALL:
                self._finish_call(self._take_body() + held, "")
            case _State.ARGUMENTS:
                assert self._open is not None
                self._finish_call(self._open.text, "")
            case _State.REASONING:
                self._emit(ReasoningDelta, held[: len(held) - _num_gap(held)])
            case _:
                self._emit(TextDelta, held)

    def _enter(self, state: _State) -> None:
        self._state = state
        self._is_fresh = True

    # --- content and reasoning ----------------------------------------------------------------

    def _begin(self) -> bool:
        text = self._held.lstrip()
        is_near = len(self._held) - len(text) <= MAX_GAP
        if is_near and self._think_start and text.startswith(self._think_start):
            self._held = text[len(self._think_start) :]
            self._enter(_State.REASONING)
            return True
        if is_near and (not text or (self._think_start and self._think_start.startswith(text))):
            return False
        self._state = _State.CONTENT
        return True

    def _content(self) -> bool:
        if not self._call_start:
            self._emit(TextDelta, self._held)
            self._held = ""
            return False
        if not self._emit_up_to(self._call_start, TextDelta):
            return False
        self._may_open = self._markers.has_json_calls and not self.is_complete
        self._enter(_State.CALL)
        return True

    def _reasoning(self) -> bool:
        if not self._emit_up_to(self._markers.think_end, ReasoningDelta):
            return False
        self._has_reasoned = True
        self._enter(_State.CONTENT)
        return True

    def _emit_up_to(self, marker: str, kind: type[TextDelta | ReasoningDelta]) -> bool:
        """Emit the text before a marker; the marker and the white space at it are dropped."""
        at, found = next_marker(self._held, marker)
        num_sure = at - _num_gap(self._held[:at])
        self._emit(kind, self._held[:num_sure])
        if found:
            self._gap = self._held[num_sure:at]
        self._held = self._held[at + len(found) if found else num_sure :]
        return bool(found)

    def _emit(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        follows_marker = kind is ReasoningDelta or self._has_reasoned or self.num_calls > 0
        if self._is_fresh and follows_marker:
            text = text.lstrip()
        self._is_fresh = self._is_fresh and not text
        super()._emit(kind, text)

    # --- calls ----------------------------------------------------------------------------------

    def _call(self) -> bool:
        if self._may_open and self._opens():
            return True
        at, marker = next_marker(self._held, self._markers.call_end)
        self._extend_body(at)
        if self._num_body > MAX_CALL_CHARS:
            body = self._take_body()
            self._held = body[MAX_CALL_CHARS:] + self._held
            self._break_call(body[:MAX_CALL_CHARS], "")
            return True
        if marker:
            self._held = self._held[len(marker) :]
            self._finish_call(self._take_body(), marker)
        return bool(marker)

    def _opens(self) -> bool:
        """True if the call begins with the name of a known tool; it is then emitted."""
        body = "".join(self._body) + self._held
        head = head_of(body)
        if head is None or head[0] not in self._schemas:
            self._may_open = head is None and len(body) < MAX_HEAD
            return False
        name, num_head = head
        self._open = OpenCall(ToolCallStart(new_call_id(), name), body[:num_head])
        self._events.append(self._open.start)
        self._body, self._num_body = [], num_head
        self._held, self._may_open = body[num_head:], False
        self._state = _State.ARGUMENTS
        return True

    def _arguments(self) -> bool:
        call = self._open
        assert call is not None
        text = call.push(self._held[: MAX_CALL_CHARS - self._num_body])
        self._held = self._held[len(text) :]
        self._num_body += len(text)
        if text:
            self._events.append(ToolCallArguments(text))
        is_open = call.scan.state is ScanState.OPEN
        if is_open and not self._held:
            return False
        has_ended = bool(self._markers.call_end) and self._markers.call_end in call.text
        if is_open or (call.scan.state is ScanState.LOST and has_ended):
            self._break_call(call.text, "")
        else:
            self._body, self._state = [call.text], _State.CALL
        return True

    def _finish_call(self, body: str, end: str) -> None:
        """The text between two markers is complete: calls, or else text."""
        calls = self._parsed(body)
        if not calls:
            self._break_call(body, end)
            return
        if self._open is not None:
            self._events.append(ToolCallEnd(calls[0][1]))
            self._open = None
            self.num_calls += 1
        else:
            for name, arguments in calls:
                self._emit_call(name, arguments)
        self._enter(_State.START)

    def _parsed(self, body: str) -> list[tuple[str, str]]:
        """Names and arguments of the calls in a text; none where they differ from the open one."""
        assert self._parse is not None
        try:
            calls = self._parse(body)
            if self._open is not None and not self._open.matches(calls):
                return []
            return [(name, canonical(given, self._schemas.get(name))) for name, given in calls]
        except PARSE_ERRORS:
            return []

    def _break_call(self, body: str, end: str) -> None:
        """Emit what looked like a call as text, but for what was emitted as a call before."""
        self._enter(_State.CONTENT)
        self._is_fresh = False
        text = self._gap + self._markers.call_start + body + end
        if self._open is not None:
            num_emitted = len(text) - len(end) - len(body) + len(self._open.text)
            self._events.append(ToolCallInvalid(text[:num_emitted]))
            self._open, text = None, text[num_emitted:]
        self._take_body()
        self._emit(TextDelta, text)


def _num_gap(text: str) -> int:
    """Characters of white space at the end, which may touch a marker; a long run is text."""
    return min(len(text) - len(text.rstrip()), MAX_GAP)
