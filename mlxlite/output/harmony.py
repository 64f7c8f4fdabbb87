"""gpt-oss's way of writing, «harmony»: messages with heads that say for whom they are. Pure.

    <|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>
    <|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>

The prompt ends with `<|start|>assistant`, so an answer begins inside a head. What is in the channel
`analysis` is reasoning, what is addressed to a function is a call, and all else is content. A call
comes whole. What cannot be read comes as text, marks and all: nothing that the model wrote is lost
but heads that lead nowhere. How the text was cut changes nothing but the times (tested).

Source: cookbook.openai.com/articles/openai-harmony.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from mlxlite.output.events import Call, Channel
from mlxlite.output.markers import MAX_CALL_CHARS, Channels, Piece
from mlxlite.output.tool_arguments import written

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL, CONSTRAIN = "<|end|>", "<|return|>", "<|call|>", "<|constrain|>"
MARKS = frozenset({START, CHANNEL, MESSAGE, END, RETURN, CALL, CONSTRAIN})
_AFTER_BODY = (END, RETURN, CALL, START, CHANNEL)
MAX_HEAD = 512  # characters
_TO = re.compile(r"\bto=functions\.([A-Za-z0-9_.:-]{1,128})")
_ANALYSIS = re.compile(r"<\|channel\|>\s*analysis\b")
Finish = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


class _State(Enum):
    BEGIN = "begin"  # nothing has come: a head, or content without one
    HEAD = "head"
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"


class HarmonyChannels:
    """One sequence's text in, its pieces out, as `text.Channels`.

    `finish` makes arguments what their function's schema wants; None: calls are text.
    """

    def __init__(
        self,
        *,
        splits_reasoning: bool = True,
        finish: Finish | None = None,
        max_calls: int | None = None,
    ) -> None:
        self._splits_reasoning = splits_reasoning
        self._finish = finish
        self._max_calls = max_calls
        self._state = _State.BEGIN
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
        """As many calls as were wanted have been made."""
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> list[Piece]:
        """More text; what can be told of it and of what was held."""
        self._held += text
        pieces: list[Piece] = []
        while self._held and self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """No more text: the rest, as what it is. A call that was never closed is tried too."""
        pieces = self.push("")
        held, self._held = self._held, ""
        match self._state:
            case _State.BEGIN:
                self._tell(pieces, Channel.CONTENT, held)
            case _State.HEAD:
                pass  # it leads nowhere
            case _State.CALL:
                self._end_call(pieces, held, "")
            case _State.REASONING:
                self._tell(pieces, Channel.REASONING, held)
            case _State.CONTENT:
                self._tell(pieces, Channel.CONTENT, held)
        return pieces

    # --- one step: up to the next mark, or as far as is sure ---------------------------------

    def _step(self, pieces: list[Piece]) -> bool:
        match self._state:
            case _State.BEGIN:
                return self._begin()
            case _State.HEAD:
                return self._read_head(pieces)
            case _State.CALL:
                return self._read_call(pieces)
            case _State.REASONING:
                return self._read_body(pieces, Channel.REASONING)
            case _State.CONTENT:
                return self._read_body(pieces, Channel.CONTENT)

    def _begin(self) -> bool:
        if self._held.startswith((START, CHANNEL)):
            self._state = _State.HEAD
            return True
        if any(mark.startswith(self._held) for mark in (START, CHANNEL)):
            return False
        self._state = _State.CONTENT
        return True

    def _read_head(self, pieces: list[Piece]) -> bool:
        before, mark, after = self._held.partition(MESSAGE)
        if mark and len(before) <= MAX_HEAD:
            self._head, self._held = before + mark, after
            self._enter(pieces)
            return True
        if len(before) > MAX_HEAD:  # no head, whatever it began with
            self._state = _State.CONTENT
            self._tell(pieces, Channel.CONTENT, before[:MAX_HEAD])
            self._held = self._held[MAX_HEAD:]
            return True
        return False

    def _enter(self, pieces: list[Piece]) -> None:
        """A message begins: for whom it is, its head says."""
        if (called := _TO.search(self._head)) and self._finish is not None:
            self._state, self._name = _State.CALL, called[1]
        elif _ANALYSIS.search(self._head) and self._splits_reasoning:
            self._state = _State.REASONING
        else:
            self._state = _State.CONTENT
            if called or _ANALYSIS.search(self._head):  # nobody else tells that it is none
                self._tell(pieces, Channel.CONTENT, self._head)

    def _read_body(self, pieces: list[Piece], channel: Channel) -> bool:
        at, mark = self._next_mark()
        self._tell(pieces, channel, self._held[:at])
        if not mark:
            self._held = self._held[at:]
            return False
        self._leave(at, mark)
        return True

    def _read_call(self, pieces: list[Piece]) -> bool:
        at, mark = self._next_mark()
        self._body.append(self._held[:at])
        self._num_body += at
        if self._num_body > MAX_CALL_CHARS:
            self._tell(pieces, Channel.CONTENT, self._head + "".join(self._body))
            self._body, self._num_body, self._held = [], 0, self._held[at:]
            self._state = _State.CONTENT
            return bool(mark)
        if not mark:
            self._held = self._held[at:]
            return False
        self._end_call(pieces, "", mark if mark in (END, RETURN, CALL) else "")
        self._leave(at, mark)
        return True

    def _next_mark(self) -> tuple[int, str]:
        """Where the next mark begins, and which; or up to where there is surely none, and ""."""
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

    def _end_call(self, pieces: list[Piece], rest: str, mark: str) -> None:
        body = "".join((*self._body, rest))
        self._body, self._num_body = [], 0
        try:
            arguments = json.loads(body or "{}")
            if not isinstance(arguments, dict):
                raise ValueError("the arguments are no object")
            assert self._finish is not None
            text = written(self._finish(self._name, arguments))
        except (ValueError, TypeError, RecursionError):
            self._tell(pieces, Channel.CONTENT, self._head + body + mark)
            return
        if not self.is_complete:
            self.num_calls += 1
            call = Call(f"call_{secrets.token_hex(12)}", self._name, text)
            pieces.append(Piece(calls=(call,)))

    def _tell(self, pieces: list[Piece], channel: Channel, text: str) -> None:
        if text:
            pieces.append(Piece(channel, text))


AnyChannels = Channels | HarmonyChannels


def with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message as gpt-oss's template reads it: what led to a call is its `thinking`."""
    reasoning = message.get("reasoning_content")
    if reasoning and message.get("tool_calls") and not message.get("content"):
        return {**message, "thinking": reasoning}
    return message
