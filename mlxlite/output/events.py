"""What a sequence's answer is made of: text, reasoning, tool calls, progress, and its end."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from mlxlite.engine.sequence import FinishReason, Logprobs, Usage


class Channel(Enum):
    """What a piece of an answer's text is."""

    CONTENT = "content"
    REASONING = "reasoning"


@dataclass(frozen=True, slots=True)
class Call:
    """The model calls a tool. `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A call begins; its arguments follow while the model writes them."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the arguments of the call that is open, as JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The call that was open is this one."""

    call: Call


@dataclass(frozen=True, slots=True)
class Broken:
    """What was open is no call: so much of the answer's text has been told as one.

    What follows of it is told as text. An answer that does not stream has all of it as text.
    """

    text: str


CallPart = Opened | Arguments | Closed | Broken


@dataclass(slots=True)  # to make a frozen one takes five times as long
class Delta:
    """More text of a sequence. `num_output` counts its tokens so far; `usage` is as of now.

    `logprobs` are (token id, its logprobs) of the tokens drawn since the last delta, where the
    sequence asked for them; what a token's text is may still be held back.
    """

    text: str
    num_output: int
    logprobs: tuple[tuple[int, Logprobs], ...] = ()
    usage: Usage | None = None
    channel: Channel = Channel.CONTENT
    calls: tuple[Call, ...] = ()  # after the text
    part: CallPart | None = None  # of a call that is told in parts, without text or calls


@dataclass(frozen=True, slots=True)
class Progress:
    """So many tokens of a prompt are computed, for a sequence whose sink wants to know."""

    num_computed: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a sequence's answer: nothing follows."""

    reason: FinishReason
    usage: Usage = field(default_factory=Usage)
    error: str | None = None
    stop: str | None = None  # the stop string that was met
    num_calls: int = 0


Output = Delta | Progress | Done


class Sink(Protocol):
    """Where a sequence's outputs go: called on the loop thread, must not block or raise."""

    def __call__(self, output: Output) -> None: ...


class Detokenizer(Protocol):
    """Token ids to text, special tokens left out; ids that no text belongs to give ""."""

    def __call__(self, tokens: SequenceOf[int]) -> str: ...
