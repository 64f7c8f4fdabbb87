"""Requests, plans and traces: the nouns that every arm of a comparison shares.

A `Plan` has the clients and their requests; an arm (mlx-lm, our loop, the engine, a server) carries
it out and returns a `Trace`; a figure is a function of a trace alone, so all arms are counted by
the same rule. Never imports MLX or mlxlite: the load generator's process uses it. Times are
`perf_counter` seconds: they are comparable within one trace only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Request:
    """One message of a chat; `tokens` is the message alone, rendered by the server's template.

    `at_s`: the earliest time of sending, after the run's beginning; an open loop is clients with
    one request each. `is_next_turn`: the client's earlier messages and their answers precede it.
    After `leave_after_s`, or `leave_after_tokens`, the client disconnects and sends no more.
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

    def body(self) -> dict[str, Any]:
        """The HTTP request's JSON; with `ignore_eos`, for the servers that support it."""
        own = {"messages": [{"role": "user", "content": self.text}], "max_tokens": self.max_tokens}
        own |= {"ignore_eos": True, "stream": self.is_streamed}
        if self.is_streamed:
            own |= {"stream_options": {"include_usage": True}}
        return own | dict(self.settings)

    def as_json(self) -> dict[str, Any]:
        names = ("is_next_turn", "at_s", "leave_after_s", "leave_after_tokens")
        return {"body": self.body()} | {name: getattr(self, name) for name in names}


Clients = Sequence[Sequence[Request]]  # of each client, sent one after the other


@dataclass(frozen=True, slots=True)
class Plan:
    """`first` send at once. `then` send when each of those has `after_tokens` tokens, or with 0 the
    head of its answer. `is_cut`: the first disconnect when the others have their answers.
    `connects_late`: a client opens its connection when it sends, so that handshakes count.
    """

    first: Clients
    then: Clients = ()
    after_tokens: int = 0
    is_cut: bool = False
    connects_late: bool = False

    def as_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("after_tokens", "is_cut", "connects_late")}
        for name, clients in (("first", self.first), ("then", self.then)):
            own[name] = [[request.as_json() for request in requests] for requests in clients]
        return own


@dataclass(slots=True)
class Stream:
    """One request's answer. A server's `token_s` has an entry a frame, which may hold several
    tokens; an answer that is not streamed is one frame.
    """

    client: int
    sent_s: float
    opened_s: float | None = None  # the head of the answer arrived
    token_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_cached: int = 0  # prompt tokens from a cache, if the server reports them
    ended_s: float | None = None  # the last byte arrived
    left_s: float | None = None  # the client disconnected
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.sent_s


@dataclass(frozen=True, slots=True)
class Trace:
    """The streams in the order in which they were sent."""

    streams: tuple[Stream, ...]

    @classmethod
    def from_json(cls, value: Sequence[Mapping[str, Any]]) -> Self:
        return cls(tuple(Stream(**item) for item in value))

    def checked(self) -> Self:
        """Raises RuntimeError when a request has failed."""
        errors = [stream.error for stream in self.streams if stream.error is not None]
        if errors:
            raise RuntimeError(f"{len(errors)} requests failed; the first: {errors[0]}")
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
    def ttfts(self) -> list[float]:
        return [stream.ttft_s for stream in self.streams if stream.token_s]

    @property
    def whole_rate(self) -> float:
        """Output tokens a second of the whole run: prefill, joining and leaving included."""
        return sum(stream.num_tokens for stream in self.streams) / self.wall_s

    def decode_rate(self, num_rows: int) -> float:
        """Output tokens a second while `num_rows` streams decode and none begins or ends; else NaN.

        The sum of the streams' own rates, each between two of its tokens: the tokens of one step
        arrive microseconds apart and must not fall on two sides of an edge.
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
        """Seconds between two tokens of a stream, for all gaps that overlap the interval."""
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
    """Carries out a plan of plain requests inside this process: which are due, which have tokens.

    Ids are those of the streams, counted from 0 in the order of sending.
    """

    def __init__(self, plan: Plan) -> None:
        for r in (request for requests in (*plan.first, *plan.then) for request in requests):
            is_plain = r == Request(r.text, r.tokens, r.max_tokens, r.settings)
            assert is_plain, "this needs the load generator"
        self._plan = plan
        self._left = [list(requests) for requests in (*plan.first, *plan.then)]
        self._due = list(range(len(plan.first)))  # clients whose next request is due
        self._has_then = bool(plan.then)
        self._max_tokens: list[int] = []
        self.streams: list[Stream] = []
        self.open: set[int] = set()

    def due(self, now: float) -> list[tuple[int, Request]]:
        """Requests to be sent now, with their ids."""
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
        num_first, after = len(self._plan.first), self._plan.after_tokens
        if self._has_then and all(s.num_tokens >= after for s in self.streams[:num_first]):
            self._has_then = False
            self._due += range(num_first, num_first + len(self._plan.then))

    @property
    def is_over(self) -> bool:
        if self._due or self._has_then:
            return False
        is_awaited = range(len(self._plan.first) if self._plan.is_cut else 0, len(self._left))
        return not any(self.streams[id].client in is_awaited for id in self.open)

    def trace(self) -> Trace:
        return Trace(tuple(self.streams))
