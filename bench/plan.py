"""What is asked, and when the tokens came: the nouns that every arm of a comparison shares.

A `Plan` says which clients ask what; an arm (mlx-lm, our loop, the engine, a server) carries it
out and gives a `Trace`; a figure is a function of a trace alone, so all arms are counted alike.
Nothing here may import MLX or mlxlite: the load generator's process uses it. Times are
`perf_counter` seconds: they mean something within one trace only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Request:
    """One message of a chat. `tokens` is what the server's template makes of it alone.

    `at_s`: asked so long after the run began, if the client is free by then; a load with an open
    loop is one of clients that ask once. `is_next_turn`: the client's earlier messages and the
    answers to them come before this one. A client that leaves hangs up and asks no more.
    """

    text: str
    tokens: tuple[int, ...]
    max_tokens: int
    settings: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})
    is_streamed: bool = True
    is_next_turn: bool = False
    at_s: float = 0.0
    leave_after_s: float | None = None
    leave_after_tokens: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it can be asked without HTTP: nothing but its text, tokens and settings."""
        return self == Request(self.text, self.tokens, self.max_tokens, self.settings)

    def body(self) -> dict[str, Any]:
        """The HTTP request's JSON: as long as `max_tokens` whatever is drawn, where that is heard.

        Its usage comes in the way that every server knows.
        """
        own = {"messages": [{"role": "user", "content": self.text}], "max_tokens": self.max_tokens}
        own |= {"ignore_eos": True, "stream": self.is_streamed}
        if self.is_streamed:
            own |= {"stream_options": {"include_usage": True}}
        return own | dict(self.settings)

    def as_json(self) -> dict[str, Any]:
        """What the load generator needs of it."""
        return {
            "body": self.body(),
            "is_next_turn": self.is_next_turn,
            "at_s": self.at_s,
            "leave_after_s": self.leave_after_s,
            "leave_after_tokens": self.leave_after_tokens,
        }


Clients = Sequence[Sequence[Request]]  # each one's requests, asked one after the other


@dataclass(frozen=True, slots=True)
class Plan:
    """`first` ask at once. `then` ask when each of them has `after_tokens` tokens, or with 0 when
    each has been answered to. `is_cut`: the first ones leave when the others have what they want.
    `connects_late`: each client opens its connection when it asks, so that handshakes count too.
    """

    first: Clients
    then: Clients = ()
    after_tokens: int = 0
    is_cut: bool = False
    connects_late: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the load generator reads."""
        return {
            "first": [[request.as_json() for request in requests] for requests in self.first],
            "then": [[request.as_json() for request in requests] for requests in self.then],
            "after_tokens": self.after_tokens,
            "is_cut": self.is_cut,
            "connects_late": self.connects_late,
        }


@dataclass(slots=True)
class Stream:
    """One request's answer. A server's `token_s` has an entry a frame, which may hold several; an
    answer that is not streamed is one frame.
    """

    client: int
    sent_s: float
    opened_s: float | None = None  # the answer's head came
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0  # prompt tokens that the server had already, where it says so
    ended_s: float | None = None  # the last byte came
    left_s: float | None = None  # the client hung up
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Trace:
    """The streams in the order in which they were sent."""

    streams: tuple[Stream, ...]

    @classmethod
    def from_json(cls, value: Sequence[Mapping[str, Any]]) -> Self:
        return cls(tuple(Stream(**item) for item in value))

    @property
    def errors(self) -> list[str]:
        return [stream.error for stream in self.streams if stream.error is not None]

    def checked(self) -> Self:
        """Raises RuntimeError when a request has failed."""
        if self.errors:
            raise RuntimeError(f"{len(self.errors)} requests failed; the first: {self.errors[0]}")
        return self

    def of(self, clients: range) -> "Trace":
        return Trace(tuple(stream for stream in self.streams if stream.client in clients))

    @property
    def wall_s(self) -> float:
        """From the first request sent to the last token."""
        begun_at = min(stream.sent_s for stream in self.streams)
        return max(stream.token_s[-1] for stream in self.streams) - begun_at

    @property
    def last_byte_s(self) -> float:
        """From the first request sent to the last byte of all answers."""
        begun_at = min(stream.sent_s for stream in self.streams)
        return max(stream.ended_s or stream.token_s[-1] for stream in self.streams) - begun_at

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def ttfts(self) -> list[float]:
        return [stream.ttft_s for stream in self.streams if stream.token_s]

    @property
    def whole_rate(self) -> float:
        """Output tokens a second of everything: prefill, joining and leaving included."""
        return self.num_tokens / self.wall_s

    def decode_rate(self, num_rows: int) -> float:
        """Output tokens a second while `num_rows` streams decode and none begins or ends.

        The sum of the streams' own rates, each between two of its tokens, so that the tokens of
        one step that come microseconds apart cannot fall on two sides of an edge. NaN if never.
        """
        ends = {t for stream in self.streams for t in (stream.token_s[0], stream.token_s[-1])}
        total_s = num_tokens = 0.0
        for start, stop in pairwise(sorted(ends)):
            rates = [rate for s in self.streams if (rate := _rate(s, start, stop)) is not None]
            if len(rates) == num_rows:
                total_s += stop - start
                num_tokens += sum(rates) * (stop - start)
        return num_tokens / total_s if total_s else math.nan

    def gaps(self, start_s: float = -math.inf, stop_s: float = math.inf) -> list[float]:
        """Seconds between two tokens of a stream, of all gaps that touch the interval."""
        return [
            later - earlier
            for stream in self.streams
            for earlier, later in pairwise(stream.token_s)
            if later > start_s and earlier < stop_s
        ]


def _rate(stream: Stream, start: float, stop: float) -> float | None:
    """Tokens a second of a stream that decodes all through the interval; else None."""
    if stream.token_s[0] > start or stream.token_s[-1] < stop:
        return None
    inside = [t for t in stream.token_s if start <= t <= stop]
    if len(inside) < 3 or inside[-1] <= inside[0]:
        return None
    tokens_per_frame = stream.num_tokens / len(stream.token_s)
    return (len(inside) - 1) * tokens_per_frame / (inside[-1] - inside[0])


class Feed:
    """Carries a plan out inside this process: what is due to be asked, what has come.

    Ids are those of the streams, counted from 0 in the order of asking. Only plain requests have a
    meaning here.
    """

    def __init__(self, plan: Plan) -> None:
        for requests in (*plan.first, *plan.then):
            assert all(request.is_plain for request in requests), "this needs the load generator"
        self._plan = plan
        self._left = [list(requests) for requests in (*plan.first, *plan.then)]
        self._due = list(range(len(plan.first)))  # clients whose turn it is
        self._has_then = bool(plan.then)
        self._max_tokens: list[int] = []
        self.streams: list[Stream] = []
        self.open: set[int] = set()

    def due(self, now: float) -> list[tuple[int, Request]]:
        """Requests to be asked now, with their ids."""
        asked = []
        for client in self._due:
            request = self._left[client].pop(0)
            self.open.add(len(self.streams))
            asked.append((len(self.streams), request))
            self.streams.append(Stream(client, now))
            self._max_tokens.append(request.max_tokens)
        self._due = []
        return asked

    def token(self, id: int, now: float) -> None:
        stream = self.streams[id]
        stream.token_s.append(now)
        stream.num_tokens += 1
        if stream.num_tokens == self._max_tokens[id]:
            self.open.discard(id)
            if self._left[stream.client]:
                self._due.append(stream.client)
        if self._has_then and self._is_time():
            self._has_then = False
            num_first = len(self._plan.first)
            self._due += range(num_first, num_first + len(self._plan.then))

    def _is_time(self) -> bool:
        first = self.streams[: len(self._plan.first)]
        return all(stream.num_tokens >= self._plan.after_tokens for stream in first)

    @property
    def is_over(self) -> bool:
        if self._due or self._has_then:
            return False
        is_awaited = range(len(self._plan.first) if self._plan.is_cut else 0, len(self._left))
        return not any(self.streams[id].client in is_awaited for id in self.open)

    def trace(self) -> Trace:
        return Trace(tuple(self.streams))
