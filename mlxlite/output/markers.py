"""Tokens to text, for one sequence: what may be shown now, and what must wait.

Three stages, each of which holds back as little as it can and sees each piece of text once:

    token ─▶ _Window (whole characters) ─▶ _StopSearch (no stop string) ─▶ text
    text ─▶ Channels ─▶ content, reasoning, calls of tools (`arguments` as they are written)

Invariants, all of them tested:

- What all pushes and the flush give, put together, is the text of all tokens decoded at once, cut
  before the stop string; how the text was split into tokens changes nothing but the times.
- Half a character is never given out, nor half a stop string, nor anything after one.
- The work of a push has a bound: the detokenizer never sees more than `2 * MAX_UNREAD + 2` tokens,
  and a character of text is looked at in amortised constant time per stop string.

Never: reads the whole output again, knows which tokenizer it has, or waits for ever on bytes that
will not become a character.
"""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlite.output.events import Broken, Call, CallPart, Channel, Opened
from mlxlite.output.tool_arguments import MAX_HEAD, OpenCall, ScanState, head_of, written


@dataclass(frozen=True, slots=True)
class Markers:
    """How a model marks what is no content, in its text; "" for what it does not know."""

    think_start: str = ""
    think_end: str = ""
    call_start: str = ""
    call_end: str = ""  # "" with a `call_start`: a call goes on to the end
    has_json_calls: bool = False  # between them is {"name": …, "arguments": {…}}
    is_harmony: bool = False  # gpt-oss's: see `harmony`


# --- channels ---------------------------------------------------------------------------------

# How foreign parsers fail on what a model may write.
PARSE_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)
MAX_GAP = 256  # characters of white space around a marker
MAX_CALL_CHARS = 1 << 20  # of one call; a longer one is text
Parse = Callable[[str], list[tuple[str, Mapping[str, Any]]]]


class _State(Enum):
    START = "start"  # nothing but white space has come: reasoning may begin
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"
    ARGUMENTS = "arguments"  # of a call that is told as it is written


@dataclass(slots=True)
class Piece:
    """Text of one channel, the calls that were between two markers, or a part of a call."""

    channel: Channel = Channel.CONTENT
    text: str = ""
    calls: tuple[Call, ...] = ()
    part: CallPart | None = None


class Channels:
    """One sequence's text in, its pieces out: content, reasoning, calls.

    How the text was cut changes nothing but the times (tested at every point). Reasoning may begin
    where nothing has been said yet, or after a call: a marker in the middle of a sentence is text.
    A call is held until it is whole, and comes as text, markers and all, if it cannot be read:
    nothing that the model wrote is lost. White space that touches a marker is dropped.

    Where calls are JSON (`markers`), one that begins with the name of a tool in `schemas` is told
    as it is written, and an end marker in one of its strings is part of the string. What `parse`
    says of it in the end decides. If that is no call, or another one, it is `Broken`: what has been
    told as its arguments stays told, what has not comes as text, and nothing comes twice. If the
    answer ends within its arguments, the last of them are told as they are.

    `parse` None: calls are text like any other.
    """

    def __init__(
        self,
        markers: Markers,
        *,
        is_thinking: bool = False,
        splits_reasoning: bool = True,
        parse: Parse | None = None,
        max_calls: int | None = None,
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        self._markers = markers
        self._schemas = (schemas or {}) if markers.has_json_calls else {}
        self._think_start = markers.think_start if splits_reasoning else ""
        self._call_start = markers.call_start if parse is not None else ""
        self._parse = parse
        self._max_calls = max_calls
        is_open = is_thinking and bool(self._think_start)
        self._state = _State.REASONING if is_open else _State.START
        self._held = ""  # not yet told, because a marker or its white space may follow
        self._gap = ""  # white space before a call, which is told after all if it is none
        self._body: list[str] = []  # of a call, as far as its end marker is surely not in it
        self._num_body = 0  # characters
        self._may_open = False  # what has come of a call may be the head of one told in parts
        self._open: OpenCall | None = None
        self._is_fresh = True  # nothing of the present channel has been told
        self._has_thought = is_open
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
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        """No more text: the rest, as what it is. A call that was never closed is tried too."""
        pieces = self.push("")
        held, self._held = self._held, ""
        match self._state:
            case _State.CALL:
                self._finish_call(pieces, self._take_body() + held, "")
            case _State.ARGUMENTS:
                assert self._open is not None
                pieces += map(_piece, self._open.cut())
                body = self._take_body()
                self._open.num_told = len(body)
                self._tell_call(pieces, body, "")
            case _State.REASONING:
                self._tell(pieces, Channel.REASONING, held[: len(held) - _num_gap(held)])
            case _:
                self._tell(pieces, Channel.CONTENT, held)
        return pieces

    # --- one step: up to the next marker, or as far as is sure ------------------------------

    def _step(self, pieces: list[Piece]) -> bool:
        """Take one marker out of what is held; False when there is none (yet)."""
        match self._state:
            case _State.START:
                return self._begin()
            case _State.CONTENT:
                return self._content(pieces)
            case _State.REASONING:
                return self._reasoning(pieces)
            case _State.CALL:
                return self._call(pieces)
            case _State.ARGUMENTS:
                return self._arguments(pieces)

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

    def _content(self, pieces: list[Piece]) -> bool:
        before, marker, after = _parted(self._held, self._call_start)
        if marker:
            kept = len(before) - _num_gap(before)
            self._gap = before[kept:]
            self._tell(pieces, Channel.CONTENT, before[:kept])
            self._held = after
            self._may_open = bool(self._schemas) and not self.is_complete
            self._enter(_State.CALL)
            return True
        sure = len(self._held) - _half(self._held, self._call_start)
        if self._call_start:  # white space before a call belongs to it
            sure -= _num_gap(self._held[:sure])
        self._tell(pieces, Channel.CONTENT, self._held[:sure])
        self._held = self._held[sure:]
        return False

    def _reasoning(self, pieces: list[Piece]) -> bool:
        before, marker, after = _parted(self._held, self._markers.think_end)
        if marker:
            self._tell(pieces, Channel.REASONING, before[: len(before) - _num_gap(before)])
            self._held = after
            self._has_thought = True
            self._enter(_State.CONTENT)
            return True
        sure = len(self._held) - _half(self._held, self._markers.think_end)
        sure -= _num_gap(self._held[:sure])
        self._tell(pieces, Channel.REASONING, self._held[:sure])
        self._held = self._held[sure:]
        return False

    def _call(self, pieces: list[Piece]) -> bool:
        if self._may_open and self._opens(pieces):
            return True
        before, marker, after = _parted(self._held, self._markers.call_end)
        sure = len(before) if marker else len(before) - _half(before, self._markers.call_end)
        self._body.append(before[:sure])
        self._num_body += sure
        self._held = self._held[sure:]
        if self._num_body > MAX_CALL_CHARS:
            body = self._take_body()
            self._held = body[MAX_CALL_CHARS:] + self._held
            self._tell_call(pieces, body[:MAX_CALL_CHARS], "")
            return True
        if not marker:
            return False
        self._held = after
        self._finish_call(pieces, self._take_body(), marker)
        return True

    def _take_body(self) -> str:
        body = "".join(self._body)
        self._body, self._num_body = [], 0
        return body

    # --- a call as it is written -------------------------------------------------------------

    def _opens(self, pieces: list[Piece]) -> bool:
        """Whether what has come is the head of a known tool's call; it is then told."""
        body = "".join(self._body) + self._held
        head = head_of(body)
        if head is None or head[0] not in self._schemas:
            self._may_open = head is None and len(body) < MAX_HEAD
            return False
        name, num_head = head
        opened = Opened(_new_id(), name)
        self._open = OpenCall(opened, self._schemas[name])
        pieces.append(Piece(part=opened))
        self._body, self._num_body = [body[:num_head]], num_head
        self._held, self._may_open = body[num_head:], False
        self._enter(_State.ARGUMENTS)
        return True

    def _arguments(self, pieces: list[Piece]) -> bool:
        """More of the arguments; what is not theirs waits for the call's end."""
        call, room = self._open, MAX_CALL_CHARS - self._num_body
        assert call is not None
        given, self._held = self._held[:room], self._held[room:]
        self._body.append(given)
        self._num_body += len(given)
        pieces += map(_piece, call.push(given))
        if call.state is ScanState.OPEN and not self._held:
            return False
        body, rest = self._take_body(), call.rest
        told, self._held = body[: len(body) - len(rest)], rest + self._held
        call.num_told = len(told)
        has_ended = bool(self._markers.call_end) and self._markers.call_end in told
        if call.state is ScanState.OPEN or (call.state is ScanState.LOST and has_ended):
            self._tell_call(pieces, told, "")
        else:
            self._body, self._num_body = [told], len(told)
            self._state = _State.CALL
        return True

    # --- the end of a call ------------------------------------------------------------------

    def _finish_call(self, pieces: list[Piece], body: str, end: str) -> None:
        """Between two markers: calls, or else text."""
        calls = self._read(body)
        if calls and self._open is None:
            if self._max_calls is not None:
                calls = calls[: self._max_calls - self.num_calls]
            self.num_calls += len(calls)
            pieces += [Piece(calls=calls)] if calls else []
        elif self._open is not None and (parts := self._open.close(calls)):
            self.num_calls += 1
            self._open = None
            pieces += map(_piece, parts)
        else:
            self._tell_call(pieces, body, end)
            return
        self._enter(_State.START)

    def _read(self, body: str) -> tuple[Call, ...]:
        """The calls in a text; none where it cannot be read."""
        assert self._parse is not None
        try:
            return tuple(Call(_new_id(), name, _json(given)) for name, given in self._parse(body))
        except PARSE_ERRORS:
            return ()

    def _tell_call(self, pieces: list[Piece], body: str, end: str) -> None:
        """What looked like a call is text, but for what has been told as one."""
        self._enter(_State.CONTENT)
        self._is_fresh = False
        text = self._gap + self._markers.call_start + body + end
        if self._open is not None:
            num_told = len(text) - len(end) - len(body) + self._open.num_told
            pieces.append(Piece(part=Broken(text[:num_told])))
            self._open, text = None, text[num_told:]
        self._tell(pieces, Channel.CONTENT, text)

    def _enter(self, state: _State) -> None:
        self._state = state
        self._is_fresh = True

    def _tell(self, pieces: list[Piece], channel: Channel, text: str) -> None:
        """Text leaves, but for the white space that touches a marker before it."""
        follows_marker = channel is Channel.REASONING or self._has_thought or self.num_calls > 0
        if self._is_fresh and follows_marker:
            text = text.lstrip()
        if text:
            self._is_fresh = False
            pieces.append(Piece(channel, text))


def _num_gap(text: str) -> int:
    """Characters of white space at the end, which may touch a marker; a long run is text."""
    return min(len(text) - len(text.rstrip()), MAX_GAP)


def _parted(text: str, marker: str) -> tuple[str, str, str]:
    return text.partition(marker) if marker else (text, "", "")


def _half(text: str, marker: str) -> int:
    """How many characters at a text's end may be the beginning of a marker."""
    return next(
        (n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0
    )


def _piece(part: CallPart) -> Piece:
    return Piece(part=part)


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _json(arguments: Mapping[str, Any]) -> str:
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    return written(arguments)
