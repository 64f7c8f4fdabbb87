"""The base of the output parsers, and the options that a request sets for them. Pure.

A parser splits one answer's text into content, reasoning and tool calls. The events' texts do not
depend on how the text was cut into pushes, only their times do (tested at every point). No text is
lost: a call that cannot be parsed is content, with its markers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from mlxlite.output.events import ParserEvent, ReasoningDelta, TextDelta
from mlxlite.output.tool_arguments import whole_call

# (name, arguments) of the calls in the text between two markers; raises anything for none.
ParseCalls = Callable[[str], SequenceOf[tuple[str, Mapping[str, Any]]]]
MAX_CALL_CHARS = 1 << 20  # of one call; a longer one is text


@dataclass(frozen=True, slots=True)
class ParserOptions:
    """What one request expects of its answers.

    `schemas` are the JSON schemas of the tools that may be called, by name; None: calls are text
    like any other. A format that leaves the reading of calls to the model needs `parse_calls`.
    """

    starts_in_reasoning: bool = False  # the prompt ends inside a block of reasoning
    splits_reasoning: bool = True  # else it is content, markers and all
    schemas: Mapping[str, Any] | None = None
    parse_calls: ParseCalls | None = None
    max_calls: int | None = None
    is_strict: bool = False  # only calls that a grammar can hold to their schemas are read


class OutputParser(ABC):
    """A state machine over held text; each format adds the states and their steps."""

    def __init__(self, options: ParserOptions) -> None:
        self._schemas = options.schemas or {}
        self._max_calls = options.max_calls
        self._events: list[ParserEvent] = []
        self._held = ""  # not emitted yet: a marker may follow or begin in it
        self._body: list[str] = []  # of a call, up to the held text
        self._num_body = 0  # characters
        self.num_calls = 0

    @property
    @abstractmethod
    def is_reasoning(self) -> bool: ...

    @property
    def is_complete(self) -> bool:
        """True once the answer has as many calls as the request allows."""
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def push(self, text: str) -> list[ParserEvent]:
        self._held += text
        while self._step():
            pass
        events, self._events = self._events, []
        return events

    def flush(self) -> list[ParserEvent]:
        """The end of the text: the events of the held text. A call without its end is parsed."""
        held, self._held = self._held, ""
        self._end(held)
        return self.push("")

    @abstractmethod
    def _step(self) -> bool:
        """Consume the held text up to the next marker; False when more text must come first."""

    @abstractmethod
    def _end(self, held: str) -> None:
        """Emit the held text at the end of the answer."""

    def _emit(self, kind: type[TextDelta | ReasoningDelta], text: str) -> None:
        if text:
            self._events.append(kind(text))

    def _emit_call(self, name: str, arguments: str) -> None:
        """Emit a call that comes whole, unless the answer has enough of them."""
        if not self.is_complete:
            self.num_calls += 1
            self._events += whole_call(name, arguments)

    def _extend_body(self, num: int) -> None:
        """Move held characters to the call's body."""
        self._body.append(self._held[:num])
        self._num_body += num
        self._held = self._held[num:]

    def _take_body(self) -> str:
        body = "".join(self._body)
        self._body, self._num_body = [], 0
        return body


def next_marker(text: str, *markers: str) -> tuple[int, str]:
    """The first marker's place and the marker; or "" and the place where one may begin.

    An empty marker is never found.
    """
    found = [(at, marker) for marker in markers if marker and (at := text.find(marker)) >= 0]
    if found:
        return min(found)
    halves = (n for mark in markers for n in range(1, len(mark)) if text.endswith(mark[:n]))
    return len(text) - max(halves, default=0), ""
