"""The loads: which clients there are, what each asks and when.

Each makes a `Plan` with the words of a `Writer`, so that no two prompts are alike unless they are
meant to be. Arrivals are drawn from a seed: the same arguments give the same times (tested).
Nothing here knows a server, MLX or mlxlite.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.models import Writer
from bench.plan import Clients, Plan, Request


def mixed_settings(turn: int) -> list[dict[str, Any]]:
    """Eight clients' settings, of which no value but the greedy one's was asked in another turn."""
    by = turn / 1000
    return [
        {"temperature": 0},
        {"temperature": 0.7 + by, "seed": 1 + turn},
        {"temperature": 1 + by, "top_k": 40 + turn},
        {"temperature": 1, "top_p": 0.9 - by},
        {"temperature": 1, "min_p": 0.05 + by},
        {"temperature": 0.8 + by, "repetition_penalty": 1.1},
        {"temperature": 1 - by, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {
            "temperature": 0.9 + by,
            "top_k": 20 + turn,
            "top_p": 0.8 - by,
            "logit_bias": {"100": 5, "200": -5},
        },
    ]


EIGHT_SEEDS: Sequence[Mapping[str, Any]] = [{"temperature": 1, "seed": n} for n in range(1, 9)]


def with_settings(clients: Clients, settings: Sequence[Mapping[str, Any]]) -> list[list[Request]]:
    """The same clients, each with settings of its own."""
    return [
        [replace(request, settings=own) for request in requests]
        for requests, own in zip(clients, settings, strict=True)
    ]


def unstreamed(clients: Clients) -> list[list[Request]]:
    return [[replace(request, is_streamed=False) for request in own] for own in clients]


def arrivals(num: int, per_s: float, seed: int) -> Iterator[float]:
    """Seconds after the beginning, of a Poisson process: the gaps are exponential."""
    draw = random.Random(seed)
    at_s = 0.0
    for _ in range(num):
        at_s += draw.expovariate(per_s)
        yield at_s


def open_loop(writer: Writer, num: int, per_s: float, max_tokens: int, seed: int) -> Plan:
    """Requests that come when they come, whether or not the earlier ones are answered."""
    asks = writer.clients(num, max_tokens)
    times = arrivals(num, per_s, seed)
    return Plan([[replace(asked[0], at_s=at_s)] for asked, at_s in zip(asks, times, strict=True)])


def family(writer: Writer, num_shared: int, num: int, max_tokens: int = 4) -> list[Request]:
    """Requests that differ in their last words only."""
    head = writer.request(num_shared, 1).text
    texts = (f"{head} {writer.request(24, 1).text}" for _ in range(num))
    return [Request(text, (), max_tokens) for text in texts]


def conversations(
    writer: Writer, num: int, num_turns: int, num_prompt: int, max_tokens: int
) -> Plan:
    """Clients that go on where they were: each turn sends all that was said before."""

    def turns() -> Iterator[Request]:
        for turn in range(num_turns):
            asked = writer.request(num_prompt if not turn else 32, max_tokens)
            yield replace(asked, is_next_turn=bool(turn))

    return Plan([list(turns()) for _ in range(num)])


def neighbour(writer: Writer, num_prompt: int, num_streams: int = 4) -> Plan:
    """A long prompt among streams, which outlast its prefill and are cut after it."""
    streams = [[writer.request(32, 4000)] for _ in range(num_streams)]
    return Plan(streams, [[writer.request(num_prompt, 4)]], after_tokens=32, is_cut=True)


def burst(writer: Writer, num: int, max_tokens: int, *, connects_late: bool = False) -> Plan:
    return Plan(writer.clients(num, max_tokens), connects_late=connects_late)


@dataclass(frozen=True, slots=True)
class Case:
    """A case of the benchmark that this server's forerunner came with."""

    num_clients: int
    max_tokens: int
    temperature: float

    def __str__(self) -> str:
        return f"C={self.num_clients}, {self.max_tokens} tokens, temperature {self.temperature}"

    def plan(self, writer: Writer) -> Plan:
        clients = writer.clients(self.num_clients, self.max_tokens)
        return Plan(with_settings(clients, [{"temperature": self.temperature}] * self.num_clients))


SEED_CASES = tuple(
    Case(num_clients, max_tokens, temperature)
    for num_clients in (2, 4, 8)
    for max_tokens in (50, 100)
    for temperature in (0.7, 0.1)
)


def lost_in_decode(writer: Writer, max_tokens: int) -> Request:
    return replace(writer.request(32, max_tokens), leave_after_tokens=16)


def lost_in_prefill(writer: Writer, num_prompt: int, after_s: float) -> Request:
    return replace(writer.request(num_prompt, 64), leave_after_s=after_s)


def lost_unstreamed(writer: Writer, max_tokens: int, after_s: float) -> Request:
    asked = writer.request(32, max_tokens)
    return replace(asked, is_streamed=False, leave_after_s=after_s)
