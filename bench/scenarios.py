"""Loads: which clients there are, what each sends and when.

Each makes a `Plan` from the prompts of a `Writer`, no two of which are alike unless they are meant
to be. Equal seeds give equal arrival times. Knows no server, no MLX and no mlxlite.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.models import Writer
from bench.plan import Clients, Plan, Request

_BIAS = {"100": 5, "200": -5}


def mixed_settings(turn: int) -> list[dict[str, Any]]:
    """Eight clients' settings; except for the greedy one's, no value occurs in another turn."""
    by = turn / 1000
    return [
        {"temperature": 0},
        {"temperature": 0.7 + by, "seed": 1 + turn},
        {"temperature": 1 + by, "top_k": 40 + turn},
        {"temperature": 1, "top_p": 0.9 - by},
        {"temperature": 1, "min_p": 0.05 + by},
        {"temperature": 0.8 + by, "repetition_penalty": 1.1},
        {"temperature": 1 - by, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"temperature": 0.9 + by, "top_k": 20 + turn, "top_p": 0.8 - by, "logit_bias": _BIAS},
    ]


EIGHT_SEEDS: Sequence[Mapping[str, Any]] = [{"temperature": 1, "seed": n} for n in range(1, 9)]
# Never complete before max_tokens, and a different grammar for each.
EIGHT_GRAMMARS: Sequence[Mapping[str, Any]] = [
    {"temperature": 0, "ignore_eos": False, "guided_regex": f"[a-z ,.]{{{2000 + n},4000}}"}
    for n in range(8)
]


def with_settings(clients: Clients, settings: Sequence[Mapping[str, Any]]) -> list[list[Request]]:
    """The same clients, each with its own settings."""
    return [
        [replace(request, settings=own) for request in requests]
        for requests, own in zip(clients, settings, strict=True)
    ]


def arrivals(num: int, per_s: float, seed: int) -> Iterator[float]:
    """Arrival times of a Poisson process, in seconds from its beginning."""
    draw = random.Random(seed)
    at_s = 0.0
    for _ in range(num):
        at_s += draw.expovariate(per_s)
        yield at_s


def open_loop(writer: Writer, num: int, per_s: float, max_tokens: int, seed: int) -> Plan:
    """Requests at random times that do not depend on earlier answers."""
    asks = writer.clients(num, max_tokens)
    times = arrivals(num, per_s, seed)
    return Plan([[replace(asked[0], at_s=at_s)] for asked, at_s in zip(asks, times, strict=True)])


def family(writer: Writer, num_shared: int, num: int, max_tokens: int = 4) -> list[Request]:
    """Requests with a common beginning of `num_shared` tokens."""
    head = writer.request(num_shared, 1).text
    texts = (f"{head} {writer.request(24, 1).text}" for _ in range(num))
    return [Request(text, (), max_tokens) for text in texts]


def conversations(
    writer: Writer, num: int, num_turns: int, num_prompt: int, max_tokens: int
) -> Plan:
    """Clients whose every turn sends the whole conversation."""
    lengths = [num_prompt] + [32] * (num_turns - 1)
    return Plan([
        [
            replace(writer.request(length, max_tokens), is_next_turn=turn > 0)
            for turn, length in enumerate(lengths)
        ]
        for _ in range(num)
    ])  # fmt: skip


def neighbour(writer: Writer, num_prompt: int, num_streams: int = 4) -> Plan:
    """A long prompt among streams, which outlast its prefill and are cut after it."""
    streams = [[writer.request(32, 4000)] for _ in range(num_streams)]
    return Plan(streams, [[writer.request(num_prompt, 4)]], after_tokens=32, is_cut=True)


@dataclass(frozen=True, slots=True)
class Case:
    """A case of the benchmark of this server's predecessor."""

    num_clients: int
    max_tokens: int
    temperature: float

    def __str__(self) -> str:
        return f"C={self.num_clients}, {self.max_tokens} tokens, temperature {self.temperature}"

    def plan(self, writer: Writer) -> Plan:
        clients = writer.clients(self.num_clients, self.max_tokens)
        return Plan(with_settings(clients, [{"temperature": self.temperature}] * self.num_clients))


SEED_CASES = tuple(Case(c, num, t) for c in (2, 4, 8) for num in (50, 100) for t in (0.7, 0.1))
