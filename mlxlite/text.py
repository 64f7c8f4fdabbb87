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
from array import array
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mlxlite.arguments import MAX_HEAD, OpenCall, ScanState, head_of, written
from mlxlite.sequence import (
    Broken,
    Call,
    CallPart,
    Channel,
    Detokenizer,
    Markers,
    Opened,
)

REPLACEMENT = "\ufffd"  # what every detokenizer writes for bytes that are no character (yet)

# A character is at most four bytes, so at most three of them are an unfinished one. Byte-level
# tokenizers write one replacement for them, byte-fallback ones (Llama 2, Gemma) one for each.
MAX_HALF = 3

# Unread tokens after which the window is cut though its text is not whole. A whole character comes
# within four tokens, so this is met only by invalid bytes, tokens that begin and end inside a
# character, and long runs of spaces.
MAX_UNREAD = 32

# Tokens that survive the cut. MAX_HALF replacements stand for at most nine bytes, so for at most
# nine tokens; the prompt's tail is read as far back as this too (vLLM: 5, +1 for the space).
NUM_KEPT = 16


class TextStream:
    """One sequence's tokens in, its text out.

    `detokenize` must only ever add at the end when tokens are added at the end, replacement
    characters excepted: a transformers tokenizer wants `clean_up_tokenization_spaces=False`.
    `stop` strings are not empty. `prompt_tail` is the end of the prompt, any length: with it the
    first word keeps the space that a sentencepiece tokenizer strips at the start of a text.

    `stopped` is the stop string that was met. It may be met in `flush` too: the one that begins
    first wins, so a complete one waits while another, begun before it, may still be completed. Of
    those that begin at the same place the shortest wins, being complete first.
    """

    def __init__(
        self, detokenize: Detokenizer, stop: tuple[str, ...] = (), prompt_tail: SequenceOf[int] = ()
    ) -> None:
        assert all(stop), "an empty stop string is a client's error, refused before"
        self.stopped: str | None = None
        self._window = _Window(detokenize, prompt_tail)
        self._searches = tuple(_StopSearch(string) for string in dict.fromkeys(stop))
        self._held = ""  # text that has been searched and may be the beginning of a stop string
        self._num_given = 0  # characters before `_held`, given out

    def push(self, token: int) -> str:
        """One more token; gives the text that may be shown now, "" once stopped."""
        if self.stopped is not None:
            return ""
        text = self._window.push(token)
        if not text or not self._searches:
            return text
        self._search(text)
        first = min(self._searches, key=_StopSearch.rank)
        return self._cut(first) if first.is_met else self._give(first.start)

    def flush(self) -> str:
        """No more tokens; gives what was held back, up to a stop string."""
        if self.stopped is not None:
            return ""
        self._search(self._window.flush())
        met = [search for search in self._searches if search.is_met]
        if met:
            return self._cut(min(met, key=_StopSearch.rank))
        return self._give(self._num_given + len(self._held))

    def _search(self, text: str) -> None:
        for search in self._searches:
            search.push(text)
        self._held += text

    def _give(self, stop: int) -> str:
        """The text from where we are up to the position `stop`."""
        num = stop - self._num_given
        given, self._held = self._held[:num], self._held[num:]
        self._num_given = stop
        return given

    def _cut(self, search: "_StopSearch") -> str:
        text = self._give(search.start)
        self._held, self.stopped = "", search.string
        return text


class _Window:
    """The last few tokens, decoded again at each push: the offsets of vLLM and TGI.

    The window is *context* tokens, whose text has been given out and which are there so that a
    following word keeps its space, and then *unread* ones. It begins anew at the points where its
    text is whole, and only there: bytes of a byte-fallback tokenizer are decoded by the run, so a
    window that began inside a character would spoil the whole run.
    """

    def __init__(self, detokenize: Detokenizer, prompt_tail: SequenceOf[int]) -> None:
        self._detokenize = detokenize
        self._tokens: list[int] = []
        self._num_context = 0  # tokens
        self._context_text = ""
        self._text = ""  # of the whole window
        self._num_given = 0  # characters of it
        tail = list(prompt_tail[-NUM_KEPT:])
        for skip in range(min(MAX_HALF, len(tail) - 1) + 1):  # begin at a whole character
            text = detokenize(tail[skip:])
            if text.strip(" ") and not text.startswith(REPLACEMENT):
                self._restart(tail[skip:], text)
                return
        self._restart(tail, detokenize(tail))

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._decode()
        if text == self._text and not self._detokenize((token, token)):
            # A special token. (Twice, because a lone "▁" at the start of a text has none either,
            # yet it counts: the next "▁" then stays.)
            self._tokens.pop()
            return ""
        num_half = len(text) - len(text.rstrip(REPLACEMENT))
        num_ready = max(self._num_given, len(text) - min(num_half, MAX_HALF))
        given = text[self._num_given : num_ready]
        self._text, self._num_given = text, num_ready
        if not num_half and self._advance():
            return given
        if len(self._tokens) - self._num_context > MAX_UNREAD:
            given += self._shorten()
        return given

    def flush(self) -> str:
        given = self._text[self._num_given :]
        self._num_given = len(self._text)
        return given

    def _decode(self) -> str:
        text = self._detokenize(self._tokens)
        if text.startswith(self._context_text):
            return text
        # An invalid byte has turned the run of bytes before it, given out long ago, into
        # replacements (byte fallback): read what is unread without the run.
        return self._context_text + self._detokenize(self._tokens[self._num_context :])

    def _restart(self, context: list[int], text: str) -> None:
        self._tokens, self._num_context = context, len(context)
        self._text = self._context_text = text
        self._num_given = len(text)

    def _advance(self) -> bool:
        """Make the unread tokens the context, unless they would not keep a word's space."""
        unread = self._tokens[self._num_context :]
        text = self._detokenize(unread)
        if not text.strip(" "):
            return False
        self._restart(unread, text)
        return True

    def _shorten(self) -> str:
        """Forget all but the context and the last unread tokens; gives what cannot be kept."""
        held = self._text[self._num_given :]
        del self._tokens[self._num_context : -NUM_KEPT]
        self._text = self._decode()
        if self._text.endswith(held):
            self._num_given = len(self._text) - len(held)
            return ""
        # A run of bytes (byte fallback) that is valid now that its beginning is forgotten: what was
        # held belongs to the invalid run, and the text goes on from here.
        unread = self._tokens[self._num_context :]
        self._restart(unread, self._detokenize(unread))
        return held


class _StopSearch:
    """One stop string, looked for in text that comes in pieces (Knuth-Morris-Pratt).

    `start` is the position in the text where the stop string begins (`is_met`), or else where the
    longest text that may still become it begins: the end of the text, if there is none.
    """

    def __init__(self, string: str) -> None:
        self.string = string
        self.is_met = False
        self._position = 0
        self._num_matched = 0
        self._borders = _borders(string)

    @property
    def start(self) -> int:
        return self._position - self._num_matched

    def rank(self) -> tuple[int, bool, int]:
        """The lowest decides: what begins first, then what is complete, then the shortest."""
        return self.start, not self.is_met, len(self.string)

    def push(self, text: str) -> None:
        if self.is_met:
            return
        string, borders, matched = self.string, self._borders, self._num_matched
        if not matched and string[0] not in text:  # nearly always
            self._position += len(text)
            return
        for char in text:
            while matched and char != string[matched]:
                matched = borders[matched - 1]
            matched += char == string[matched]
            self._position += 1
            if matched == len(string):
                self.is_met = True
                break
        self._num_matched = matched


def _borders(string: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    length = 0
    for char in string[1:]:
        while length and char != string[length]:
            length = borders[length - 1]
        length += char == string[length]
        borders.append(length)
    return borders


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


MAX_PERIOD = 64  # tokens


class LoopGuard:
    """Notices when an answer's last `num_tokens` are one piece of a few tokens, repeated."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tail = array("I")
        self._num_seen = 0

    def push(self, token: int) -> bool:
        """Whether it is one. Looks now and then: a token costs next to nothing."""
        self._tail.append(token)
        self._num_seen += 1
        if self._num_seen % 16 or len(self._tail) < self._num_tokens:
            return False
        del self._tail[: -self._num_tokens]
        most = min(MAX_PERIOD, self._num_tokens // 4)
        return any(self._tail[:-n] == self._tail[n:] for n in range(1, most + 1))
