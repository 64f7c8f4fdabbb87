"""Latency under load: random arrivals, a long prompt among streams, context, bursts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

from bench import scenarios
from bench.compare import at_least, at_most
from bench.measurements.pairs import NUM_ROWS, Bench, Figure, Traces, runs
from bench.peers import OURS
from bench.plan import Plan, Trace
from bench.report import Table, ms

LONG_PROMPT_TOKENS = 3000
WORST_GAP_ASKED = 0.12
CONTEXTS, CONTEXT_TOKENS = (256, 1024, 4096), 32
NUM_BURST, BURST_TOKENS = 64, 16
BURST_ASKED = 3.0
NUM_ARRIVALS = 48
LOAD = 0.6  # of the first peer's rate in a closed loop of eight clients


async def openloop(bench: Bench) -> Table:
    """TTFT and gaps under Poisson arrivals at one rate for all servers."""
    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        closed = await bench.paired(arms, lambda: Plan(bench.clients(NUM_ROWS)))
        first = next(own for name, own in closed.items() if name != OURS)
        per_s = LOAD * median(trace.whole_rate for trace in first) / bench.scale.max_tokens
        arrive = partial(
            scenarios.open_loop, bench.writer, NUM_ARRIVALS, per_s, bench.scale.max_tokens
        )
        traces = await bench.rounds(arms, lambda pair: {"": arrive(seed=pair)}, has_warm_up=False)
    kinds: dict[str, Callable[[Trace], list[float]]] = {
        "TTFT": lambda trace: trace.ttfts,
        "ITL": lambda trace: trace.gaps(),
    }
    figures = [
        Figure(f"{what} at random arrivals, p{100 * q:.0f}", "ms",
               lambda trace, read=read, q=q: at(read(trace), q))
        for what, read in kinds.items()
        for q in (0.5, 0.95, 0.99)
    ]  # fmt: skip
    note = (
        f"{NUM_ARRIVALS} requests a pair, {per_s:.1f} a second, seeded: {LOAD:.0%} of the first "
        f"peer's rate in a closed loop of {NUM_ROWS} clients."
    )
    table = bench.table("Random arrivals", traces, figures, note)
    every: dict[str, Any] = {what: {} for what in kinds}
    for name, own in traces[""].items():
        for what, read in kinds.items():
            every[what][name] = percentiles([value for trace in own for value in read(trace)])
    return replace(table, figures={**table.figures, "percentiles": every})


def at(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def percentiles(values: Sequence[float]) -> list[float]:
    """101 values, from the least to the greatest."""
    return [round(at(values, n / 100), 6) for n in range(101)]


async def longprompt(bench: Bench) -> Table:
    """Gaps of four streams while a long prompt arrives; TTFT of that prompt, there and alone."""
    num_prompt = min(LONG_PROMPT_TOKENS, bench.inprocess.model.context_size // 2)

    def plans(_: int) -> dict[str, Plan]:
        alone = Plan([[bench.writer.request(num_prompt, 4)]])
        return {"alone": alone, "among": scenarios.neighbour(bench.writer, num_prompt)}

    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        if bench.scale.has_parts:
            arms["BatchGenerator"] = bench.inprocess.batch_generator
            arms["our engine, plain kernels"] = bench.inprocess.engine
        traces = await bench.rounds(arms, plans, has_warm_up=False)
    figures = [
        Figure("worst gap beside a long prompt", "ms", lambda t: max(_beside(t)), "among",
               at_most(WORST_GAP_ASKED)),
        Figure("TTFT of the long prompt among streams", "ms", lambda t: t.ttfts[4], "among"),
        Figure("TTFT of the long prompt alone", "ms", lambda t: t.ttfts[0], "alone"),
    ]  # fmt: skip
    columns = ["arm", "median gap before it, ms", "beside it, ms"]
    rows = [
        [name, *(ms([median(read(trace)) for trace in own]) for read in (_before, _beside))]
        for name, own in traces["among"].items()
    ]
    title = f"A prompt of {num_prompt} tokens among four streams"
    table = bench.table(title, traces, figures, columns=columns, rows=rows)
    last = {name: _timeline(own[-1]) for name, own in traces["among"].items() if name in servers}
    return replace(table, figures={**table.figures, "timeline": last})


def _beside(trace: Trace) -> list[float]:
    newcomer = trace.streams[4]
    return trace.of(range(4)).gaps(newcomer.sent_s, newcomer.token_s[0])


def _before(trace: Trace) -> list[float]:
    steady_s = max(stream.token_s[0] for stream in trace.streams[:4])
    return trace.of(range(4)).gaps(steady_s, trace.streams[4].sent_s)


def _timeline(trace: Trace) -> dict[str, Any]:
    """Around the newcomer's prefill, each token's (seconds since it was sent, gap); its TTFT."""
    newcomer = trace.streams[4]
    around = (newcomer.sent_s - 0.3, newcomer.token_s[0] + 0.3)
    points = [
        (round(t - newcomer.sent_s, 4), round(t - earlier, 4))
        for stream in trace.streams[:4]
        for earlier, t in pairwise(stream.token_s)
        if around[0] < t < around[1]
    ]
    return {"points": sorted(points), "ttft_s": newcomer.ttft_s}


async def context(bench: Bench) -> Table:
    """TTFT and gaps of one stream, by the length of its prompt."""
    most = bench.inprocess.model.context_size - CONTEXT_TOKENS
    nums = [num for num in CONTEXTS if num <= most]

    def plans(_: int) -> dict[str, Plan]:
        return {str(n): Plan([[bench.writer.request(n, CONTEXT_TOKENS)]]) for n in nums}

    async with bench.servers(NUM_ROWS) as servers:
        traces = await bench.rounds(runs(servers), plans)
    figures = [
        figure
        for num in map(str, nums)
        for figure in (
            Figure(f"TTFT, a prompt of {num}", "ms", lambda trace: trace.ttfts[0], num),
            Figure(f"median gap after it, {num}", "ms", lambda t: median(t.gaps()), num),
        )
    ]
    return bench.table("Growth of the context", traces, figures)


async def burst(bench: Bench) -> Table:
    """64 requests at once against 8 rows: on connections opened before, and on new ones.

    A server whose listening socket is too short for them may need a minute, or lose some: then
    there is no second figure.
    """
    notes = [
        "Connected before: the rows' own time. Not connected: handshakes count, and the retries of "
        "those that the listening socket had no room for."
    ]
    traces: dict[str, Traces] = {}
    async with bench.servers(NUM_ROWS) as servers:
        for kind in ("connected before", "not connected"):

            def make(is_late: bool = bool(traces)) -> Plan:
                clients = bench.writer.clients(NUM_BURST, BURST_TOKENS)
                return Plan(clients, connects_late=is_late)

            try:
                traces[kind] = await bench.paired(runs(servers), make, not traces)
            except RuntimeError as error:
                if not traces:
                    raise
                notes.append(f"Not connected before, it failed: {error}")
    title, asked = f"{NUM_BURST} at once, {NUM_ROWS} rows", bench.asked(at_least(BURST_ASKED))
    figures = [
        Figure(f"{title}, {kind}", "tok/s", lambda trace: trace.whole_rate, kind, asked)
        for kind in traces
    ]
    last = "last of them to start, connected"
    figures.append(Figure(last, "ms", lambda trace: max(trace.ttfts), "connected before"))
    return bench.table(title, traces, figures, *notes)
