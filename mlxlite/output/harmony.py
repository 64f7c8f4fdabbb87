"""gpt-oss's format, «harmony»: messages with headers, which name a channel and a recipient. Pure.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The prompt ends with `<|start|>assistant`, so an answer begins inside a header. The channel
`analysis` is reasoning, a message to a function is a call, and the rest is content. Calls come
whole. Text that cannot be parsed is content, with its marks; only headers without a message are
dropped. Source: cookbook.openai.com/articles/openai-harmony.
"""

import json
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from mlxlite.output.call_syntax import HARMONY
from mlxlite.output.events import ReasoningDelta, TextDelta
from mlxlite.output.parser import MAX_CALL_CHARS, OutputParser, ParserOptions, next_marker
from mlxlite.output.tool_arguments import canonical

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL, CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
MARKS = frozenset({START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN})
_AFTER_BODY = (END, RETURN, CALL, START, CHANNEL)
MAX_HEAD = 512  # characters
_TO = re.compile(r"\bto=functions\.([A-Za-z0-9_.:-]{1,128})")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")


class HarmonyFormat:
    """An `OutputFormat`: messages with headers, as gpt-oss writes them."""

    marks = MARKS
    can_call_tools = True
    syntax = HARMONY

    @staticmethod
    def matches(special_tokens: Collection[str]) -> bool:
        return MARKS.issubset(special_tokens)

    def starts_in_reasoning(self, prompt: str) -> bool:
        return False  # reasoning has a header of its own, in the answer

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """A call's reasoning is in the field `thinking`."""
        reasoning = message.get("reasoning_content")
        if reasoning and message.get("tool_calls") and not message.get("content"):
            return {**message, "thinking": reasoning}
        return message

    def parser(self, options: ParserOptions) -> "HarmonyParser":
        return HarmonyParser(options)


class _State(Enum):
    START = "start"  # no text so far: a header, or content without one
    HEAD = "head"
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


class HarmonyParser(OutputParser):
    """An `OutputParser` of messages with headers."""

    def __init__(self, options: ParserOptions) -> None:
        super().__init__(options)
        self._splits_reasoning = options.splits_reasoning
        self._can_call = options.schemas is not None
        self._state = _State.START
        self._head = ""  # of the current message, to its `<|message|>`
        self._name = ""  # of the function that is being called

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING

    def _step(self) -> bool:
        match self._state:
            case _State.START:
                return self._begin()
            case _State.HEAD:
                return self._read_head()
            case _State.CALL:
                return self._read_call()
            case _State.REASONING:
                return self._read_body(ReasoningDelta)
            case _State.CONTENT:
                return self._read_body(TextDelta)

    def _end(self, held: str) -> None:
        match self._state:
            case _State.CALL:
                self._finish_call(self._take_body() + held, "")
            case _State.REASONING:
                self._emit(ReasoningDelta, held)
            case _State.START | _State.CONTENT:
                self._emit(TextDelta, held)

    def _begin(self) -> bool:
        if self._held.startswith((START, CHANNEL)):
            self._state = _State.HEAD
            return True
        if any(mark.startswith(self._held) for mark in (START, CHANNEL)):
            return False
        self._state = _State.CONTENT
        return True

    def _read_head(self) -> bool:
        before, mark, after = self._held.partition(MESSAGE)
        if len(before) > MAX_HEAD:  # too long for a header
            self._state = _State.CONTENT
            self._emit(TextDelta, before[:MAX_HEAD])
            self._held = self._held[MAX_HEAD:]
            return True
        if mark:
            self._head, self._held = before + mark, after
            self._enter()
        return bool(mark)

    def _enter(self) -> None:
        """A message begins; its header has its recipient and its channel."""
        called, is_analysis = _TO.search(self._head), _ANALYSIS.search(self._head)
        if called and self._can_call:
            self._state, self._name = _State.CALL, called[1]
        elif is_analysis and self._splits_reasoning:
            self._state = _State.REASONING
        else:
            self._state = _State.CONTENT
            if called or is_analysis:  # the client has no other sign of it
                self._emit(TextDelta, self._head)

    def _read_body(self, kind: type[TextDelta | ReasoningDelta]) -> bool:
        at, mark = next_marker(self._held, *_AFTER_BODY)
        self._emit(kind, self._held[:at])
        self._held = self._held[at:]
        return self._leave(mark)

    def _read_call(self) -> bool:
        at, mark = next_marker(self._held, *_AFTER_BODY)
        self._extend_body(at)
        if self._num_body > MAX_CALL_CHARS:
            self._emit(TextDelta, self._head + self._take_body())
            self._state = _State.CONTENT
            return bool(mark)
        if mark:
            self._finish_call(self._take_body(), "" if mark in (START, CHANNEL) else mark)
        return self._leave(mark)

    def _leave(self, mark: str) -> bool:
        """Go on to the next message, if a mark ends this one."""
        if mark in (START, CHANNEL):
            self._state = _State.HEAD
        elif mark:
            self._held, self._state = self._held[len(mark) :], _State.START
        return bool(mark)

    def _finish_call(self, body: str, mark: str) -> None:
        try:
            arguments = canonical(json.loads(body or "{}"), self._schemas.get(self._name))
        except (ValueError, TypeError, RecursionError):
            self._emit(TextDelta, self._head + body + mark)
        else:
            self._emit_call(self._name, arguments)
