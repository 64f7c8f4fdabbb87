"""The events of one answer: text, reasoning, tool calls, progress, and its end.

Parsers make the deltas, a generation adds logprobs and usage, and writers turn them into bytes. An
answer that does not stream is a fold of the same events. A tool call is `ToolCallStart`, any number
of `ToolCallArguments`, and `ToolCallEnd` or `ToolCallInvalid`, with no other event between them.
"""

from dataclasses import dataclass, field

from mlxlite.engine.sequence import FinishReason, Logprobs, PromptLogprobs, Usage

Drawn = tuple[tuple[int, Logprobs], ...]  # (token id, its logprobs), in order


@dataclass(slots=True)  # there is one for each token, and a frozen one takes five times as long
class Delta:
    """The fields of every delta; each is filled only where the request asks for it.

    `usage` is the current one. `logprobs` are those of the tokens drawn since the last delta, and
    `tokens` are all of these; the text of a token may still be held back.
    """

    logprobs: Drawn = field(default=(), kw_only=True)
    tokens: tuple[int, ...] = field(default=(), kw_only=True)
    usage: Usage | None = field(default=None, kw_only=True)


@dataclass(slots=True)
class TextDelta(Delta):
    text: str  # may be empty, to carry logprobs


@dataclass(slots=True)
class ReasoningDelta(Delta):
    text: str


@dataclass(slots=True)
class ToolCallStart(Delta):
    id: str
    name: str  # of the tool


@dataclass(slots=True)
class ToolCallArguments(Delta):
    text: str  # of the open call's arguments, as JSON


@dataclass(slots=True)
class ToolCallEnd(Delta):
    arguments: str  # all of them: a JSON object in canonical form


@dataclass(slots=True)
class ToolCallInvalid(Delta):
    """The open call did not parse. `text` is the part of the answer that was emitted as a call.

    The text that follows it comes as content; an answer that does not stream has both as content.
    """

    text: str


ParserEvent = (
    TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments | ToolCallEnd | ToolCallInvalid
)


@dataclass(frozen=True, slots=True)
class Progress:
    """`num_computed` tokens of the prompt are in the cache."""

    num_computed: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of an answer."""

    reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    stop: str | None = None  # the stop string that was met, or "repetition"
    stop_token: int | None = None  # of the request's own, that ended it
    num_calls: int = 0


Event = ParserEvent | Progress | PromptLogprobs | Done
