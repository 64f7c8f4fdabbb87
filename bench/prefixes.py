"""What the prefix cache saves, and what it costs where it cannot help.

The requests of one family begin with the same words, freshly made for each pair; the peers are
asked the same ones.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from statistics import median
from time import perf_counter
from typing import Any

from bench.compare import at_most
from bench.models import Writer
from bench.peers import OURS
from bench.plan import Plan, Request, Trace
from bench.report import Table, ms, rate, ratio
from bench.scenarios import family
from bench.sections import NUM_ROWS, Arm, Bench, runs
from bench.serving import serve
from mlxlite.prefix_cache.hashing import blocks_of

OFF = "--no-enable-prefix-caching"
OURS_OFF = f"{OURS}, cache off"
SHARED_TOKENS = 1500
NUM_TAILS = 8
NUM_AT_ONCE = (4, 8)
HASHED_TOKENS = 131_072
WARM_ASKED = 0.8


async def prefix(bench: Bench) -> Table:
    """Time to first token: one prompt cold, its siblings warm, and several new ones at once."""
    figures: dict[str, dict[str, Any]] = {}
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(bench.servers(NUM_ROWS))
        arms = runs(servers)
        if bench.has_parts:
            off = await stack.enter_async_context(serve(bench.path, NUM_ROWS, OFF))
            arms[OURS_OFF] = off.run
        nums = NUM_AT_ONCE if bench.has_parts else NUM_AT_ONCE[:1]
        await bench.one_pair(arms, Plan([family(bench.writer, 64, 2)]))
        for _ in range(bench.num_pairs):
            for plan, kind in _plans(bench.writer, nums):
                for name, trace in (await bench.one_pair(arms, plan)).items():
                    _note(figures.setdefault(name, {}), kind, trace)
    figures = {k: v for k, v in figures.items() if k not in bench.failures}
    rows = [
        [name, ms(own["cold"]), ms(own["warm"]), ratio(own["warm"], own["cold"])]
        + [f"{ms(own[str(n)])} ({ratio(own[str(n)], own['cold'])})" for n in nums]
        for name, own in figures.items()
    ]
    begin = perf_counter()
    blocks_of(tuple(range(HASHED_TOKENS)), 1, 16)
    hash_ms = 1000 * (perf_counter() - begin)
    columns = ["arm", "cold TTFT, ms", "warm, ms", "÷ cold"]
    columns += [f"{n} new at once, ms (÷ cold)" for n in nums]
    notes = [
        f"A shared beginning of about {SHARED_TOKENS} tokens, one ending after the other; warm is "
        f"the median of all {NUM_TAILS} but the first. At once: medians, of a beginning that is "
        "new to the server.",
        f"Hashing {HASHED_TOKENS} tokens took {hash_ms:.0f} ms (in the server: in a thread).",
    ]
    by_kind = {kind: {k: v[kind] for k, v in figures.items()} for kind in ("cold", "warm")}
    comparisons = bench.against("TTFT, cold prefix", "ms", by_kind["cold"])
    comparisons += bench.against("TTFT, warm prefix", "ms", by_kind["warm"], at_most(WARM_ASKED))
    whole = figures | {"hash_ms": hash_ms}
    return Table("Shared beginnings", columns, rows, whole, notes, comparisons)


def _plans(writer: Writer, nums: Sequence[int]) -> list[tuple[Plan, str]]:
    """One after the other, and some at once, each of a beginning of its own; by what they show."""
    plans = [(Plan([family(writer, SHARED_TOKENS, NUM_TAILS)]), "tails")]
    for n in nums:
        asked: list[list[Request]] = [[request] for request in family(writer, SHARED_TOKENS, n)]
        plans.append((Plan(asked), str(n)))
    return plans


def _note(figures: dict[str, Any], kind: str, trace: Trace) -> None:
    if kind != "tails":
        figures.setdefault(kind, []).append(median(trace.ttfts))
        return
    cold, *warm = trace.ttfts
    figures.setdefault("cold", []).append(cold)
    figures.setdefault("warm", []).append(median(warm))


async def overhead(bench: Bench) -> Table:
    """Throughput where no two prompts begin alike, with the cache and without."""
    figures: dict[str, list[float]] = {"on": [], "off": []}
    async with AsyncExitStack() as stack:
        on = await stack.enter_async_context(serve(bench.path, 8))
        off = await stack.enter_async_context(serve(bench.path, 8, OFF))

        arms: dict[str, Arm] = {"on": on.run, "off": off.run}

        def make() -> Plan:
            return Plan(_clients(bench.writer, bench.max_tokens))

        traces: dict[str, list[Trace]] = await bench.paired(arms, make)
    for name, own in traces.items():
        figures[name] = [trace.whole_rate for trace in own]
    rows = [[name, rate(figures[name]), ratio(figures[name], figures["off"])] for name in figures]
    note = "8 clients, 3 requests each, prompts of 100 to 400 tokens, no two alike."
    return Table(
        "Cost of the cache when nothing hits",
        ["cache", "whole tok/s", "÷ off"],
        rows,
        dict(figures),
        [note],
    )


def _clients(writer: Writer, max_tokens: int) -> Sequence[Sequence[Request]]:
    return [[writer.request(100 * (1 + i % 4), max_tokens) for _ in range(3)] for i in range(8)]
