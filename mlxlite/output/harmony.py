"""gpt-oss's format, «harmony»: messages with heads, which name a channel and a recipient. Pure.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The prompt ends with `<|start|>assistant`, so an answer begins inside a head. What is in the channel
`analysis` is reasoning, what is addressed to a function is a call, and all else is content. A call
comes whole. What cannot be read comes as text, marks and all: nothing that the model wrote is lost
but heads without a message. How the text was cut changes nothing but the times (tested).

Source: cookbook.openai.com/articles/openai-harmony.
"""

import json
import re
from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any

from mlxlite.output.events import ParserEvent, ParserOptions, ReasoningDelta, TextDelta
from mlxlite.output.markers import MAX_CALL_CHARS, whole_call
from mlxlite.output.tool_arguments import repaired, written

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL, CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
MARKS = frozenset({START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN})
_AFTER_BODY = (END, RETURN, CALL, START, CHANNEL)
MAX_HEAD = 512  # characters
_TO = re.compile(r"\bto=functions\.([A-Za-z0-9_.:-]{1,128})")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")


class HarmonyFormat:
    """An `OutputFormat`: messages with heads, as gpt-oss writes them."""

    marks = MARKS
    can_call_tools = True
    has_json_calls = False

    @staticmethod
    def matches(special_tokens: Collection[str]) -> bool:
        return MARKS.issubset(special_tokens)

    def starts_in_reasoning(self, prompt: str) -> bool:
        return False  # reasoning has a head of its own, in the answer

    def prepare(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """With what led to a call as its `thinking`."""
        reasoning = message.get("reasoning_content")
        if reasoning and message.get("tool_calls") and not message.get("content"):
            return {**message, "thinking": reasoning}
        return message

    def parser(self, options: ParserOptions) -> "HarmonyParser":
        return HarmonyParser(options)


class _State(Enum):
    BEGIN = "begin"  # nothing has come: a head, or content without one
    HEAD = "head"
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


class HarmonyParser:
    """An `OutputParser` of messages with heads; a call's arguments get the types of its schema."""

    def __init__(self, options: ParserOptions) -> None:
        self._splits_reasoning = options.splits_reasoning
        self._schemas = options.schemas
        self._max_calls = options.max_calls
        self._state = _State.BEGIN
        self._events: list[ParserEvent] = []
        self._held = ""
        self._head = ""  # of the message that is being read, to its `<|message|>`
        self._name = ""  # of the function that is being called
        self._body: list[str] = []
        self._num_body = 0  # characters
        self.num_calls = 0

    @property
    def is_reasoning(self) -> bool:
        return self._state is _State.REASONING

    @property
    def is_complete(self) -> bool:
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> list[ParserEvent]:
        self._held += text
        while self._held and self._step():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[ParserEvent]:
        """A call that was never closed is parsed too; a head without a message is dropped."""
        held, self._held = self._held, ""
        match self._state:
            case _State.CALL:
                self._end_call(held, "")
            case _State.REASONING:
                self._emit(ReasoningDelta, held)
            case _State.BEGIN | _State.CONTENT:
                self._emit(TextDelta, held)
        return self.push("")

    def _step(self) -> bool:
        """Take the held text up to the next mark, or as far as is sure; False at the latter."""
        match self._state:
            case _State.BEGIN:
                return self._begin()
            case _State.HEAD:
                return self._read_head()
            case _State.CALL:
                return self._read_call()
            case _State.REASONING:
                return self._read_body(ReasoningDelta)
            case _State.CONTENT:
                return self._read_body(TextDelta)

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
        if mark and len(before) <= MAX_HEAD:
            self._head, self._held = before + mark, after
            self._enter()
            return True
        if len(before) > MAX_HEAD:  # no head, whatever it began with
            self._state = _State.CONTENT
            self._emit(TextDelta, before[:MAX_HEAD])
            self._held = self._held[MAX_HEAD:]
            return True
        return False

    def _enter(self) -> None:
        """A message begins; its head has its recipient and its channel."""
        if (called := _TO.search(self._head)) and self._schemas is not None:
            self._state, self._name = _State.CALL, called[1]
        elif _ANALYSIS.search(self._head) and self._splits_reasoning:
            self._state = _State.REASONING
        else:
            self._state = _State.CONTENT
            if called or _ANALYSIS.search(self._head):  # the client has no other sign of it
                self._emit(TextDelta, self._head)

    def _read_body(self, kind: type[TextDelta | ReasoningDelta]) -> bool:
        at, mark = self._next_mark()
        self._emit(kind, self._held[:at])
        if not mark:
            self._held = self._held[at:]
            return False
        self._leave(at, mark)
        return True

    def _read_call(self) -> bool:
        at, mark = self._next_mark()
        self._body.append(self._held[:at])
        self._num_body += at
        if self._num_body > MAX_CALL_CHARS:
            self._emit(TextDelta, self._head + "".join(self._body))
            self._body, self._num_body, self._held = [], 0, self._held[at:]
            self._state = _State.CONTENT
            return bool(mark)
        if not mark:
            self._held = self._held[at:]
            return False
        self._end_call("", mark if mark in (END, RETURN, CALL) else "")
        self._leave(at, mark)
        return True

    def _next_mark(self) -> tuple[int, str]:
        """The next mark and its place; "" and the end of the text in which surely none begins."""
        found = [(at, mark) for mark in _AFTER_BODY if (at := self._held.find(mark)) >= 0]
        if found:
            return min(found)
        tail = self._held.rfind("<")
        if tail >= 0 and any(mark.startswith(self._held[tail:]) for mark in _AFTER_BODY):
            return tail, ""
        return len(self._held), ""

    def _leave(self, at: int, mark: str) -> None:
        """A message has ended; the next one has a head, or none if it has no mark."""
        if mark in (START, CHANNEL):
            self._held, self._state = self._held[at:], _State.HEAD
        else:
            self._held, self._state = self._held[at + len(mark) :], _State.BEGIN

    def _end_call(self, rest: str, mark: str) -> None:
        body = "".join((*self._body, rest))
        self._body, self._num_body = [], 0
        try:
            arguments = json.loads(body or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("the arguments are no object")
            assert self._schemas is not None
            text = written(repaired(arguments, self._schemas.get(self._name)))
        except (ValueError, TypeError, RecursionError):
            self._emit(TextDelta, self._head + body + mark)
            return
        if not self.is_complete:
            self.num_calls += 1
            self._events += whole_call(self._name, text)

    def _emit(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        if text:
            self._events.append(kind(text))
