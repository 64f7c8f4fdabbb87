"""The measurements of how requests come: all at once, at random, turn by turn, and as this server's
forerunner was measured.

As in `bench.sections`, every comparison is interleaved and each pair has prompts of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from bench import scenarios
from bench.compare import Comparison, at_least
from bench.plan import Plan, Stream, Trace
from bench.report import Table, ms, rate, ratio
from bench.scenarios import SEED_CASES
from bench.sections import NUM_ROWS, Bench, runs
from bench.serving import serve

NUM_BURST = 64
BURST_TOKENS = 16
BURST_ASKED = 3.0
PRIORITY = -10
NUM_ARRIVALS = 48
LOAD = 0.6  # of what mlx_lm.server answers in a closed loop of eight
NUM_TURNS = 4
TURN_TOKENS = 400


# --- a burst ----------------------------------------------------------------------------------


async def burst(bench: Bench) -> Table:
    """64 requests at once against 8 rows; of ours, one more with a high priority at the end.

    Connected before the clock starts, which is what the rows take; and each on a connection of its
    own that is opened then, as 64 callers' are. A server that does not let them all in may need a
    minute for these, or lose some: then there is no second figure.
    """
    notes = [
        "Connected before: what the rows take. Not connected: 64 callers, whose handshakes count, "
        "and whose wait where a listening socket has no room for them."
    ]
    kinds: list[dict[str, list[Trace]]] = []
    async with bench.servers(NUM_ROWS) as servers:
        for connects_late in (False, True):
            make = partial(_burst, bench, connects_late)
            try:
                traces = await bench.paired(runs(servers), make, has_warm_up=not connects_late)
            except RuntimeError as error:
                if not connects_late:
                    raise
                notes.append(f"Not connected before, it failed: {error}")
                traces = {}
            kinds.append(traces)
    connected, late = [{k: [t.whole_rate for t in v] for k, v in own.items()} for own in kinds]
    last = {name: [max(t.ttfts) for t in own] for name, own in kinds[0].items()}
    asked = at_least(BURST_ASKED) if bench.is_small else None
    what = f"{NUM_BURST} at once, {NUM_ROWS} rows"
    comparisons = bench.against(f"{what}, connected before", "tok/s", connected, asked)
    comparisons += bench.against(f"{what}, not connected", "tok/s", late, asked)
    comparisons += bench.against("last of them to start, connected", "ms", last)
    title = f"{NUM_BURST} requests at once, {NUM_ROWS} rows"
    figures: dict[str, Any] = {"whole": connected, "late": late}
    if not bench.has_parts:
        return Table(title, [], [], figures, notes, comparisons)
    columns, row, more = _order(await _with_priority(bench))
    notes += [
        f"Places of first tokens, {NUM_BURST} requests, all pairs, our server: rows of a step "
        f"arrive together, so up to {NUM_ROWS - 1} is FIFO. A request joins the queue, and its "
        "answer's head leaves, when it is rendered."
    ]
    return Table(title, columns, [row], more | figures, notes, comparisons)


def _burst(bench: Bench, connects_late: bool) -> Plan:
    return scenarios.burst(bench.writer, NUM_BURST, BURST_TOKENS, connects_late=connects_late)


async def _with_priority(bench: Bench) -> list[Trace]:
    def make() -> Plan:
        first = bench.writer.clients(NUM_BURST, BURST_TOKENS)
        last = replace(bench.writer.request(32, BURST_TOKENS), settings={"priority": PRIORITY})
        return Plan(first, [[last]])

    async with serve(bench.path, NUM_ROWS) as served:
        return (await bench.paired({"server": served.run}, make))["server"]


def _order(traces: Sequence[Trace]) -> tuple[list[str], list[str], dict[str, Any]]:
    walls = [trace.of(range(NUM_BURST)).wall_s for trace in traces]
    by_queue = [_furthest_shift(trace, lambda s: s.opened_s or 0.0) for trace in traces]
    by_sending = [_furthest_shift(trace, lambda s: s.sent_s) for trace in traces]
    positions = [_position_of_last(trace) for trace in traces]
    ttfts = [trace.of(range(NUM_BURST, NUM_BURST + 1)).streams[0].ttft_s for trace in traces]
    answered = {len(trace.streams) - len(trace.errors) for trace in traces}
    columns = ["answered", "wall, ms", "furthest from the queue's order", "from the sending's"]
    columns += ["priority -10 starts", "its TTFT, ms", "its TTFT ÷ wall"]
    row = [f"{min(answered)} of {NUM_BURST + 1}", ms(walls)]
    row += [f"{max(shifts)} places" for shifts in (by_queue, by_sending)]
    row += [f"{max(positions)}. of the waiting", ms(ttfts), ratio(ttfts, walls)]
    figures: dict[str, Any] = {"wall_s": walls, "positions": positions, "ttft_s": ttfts}
    figures |= {"shifts_from_queue": by_queue, "shifts_from_sending": by_sending}
    return columns, row, figures


def _furthest_shift(trace: Trace, turn: Callable[[Stream], float]) -> int:
    """By how many places a request's first token came before or after its turn, at most."""
    streams = sorted(trace.of(range(NUM_BURST)).streams, key=turn)
    order = sorted(range(NUM_BURST), key=lambda i: streams[i].token_s[0])
    return max(abs(place - i) for place, i in enumerate(order))


def _position_of_last(trace: Trace) -> int:
    """1: no request that was waiting had its first token before the last one of all had its."""
    last = trace.of(range(NUM_BURST, NUM_BURST + 1)).streams[0]
    firsts = sorted(stream.token_s[0] for stream in trace.of(range(NUM_BURST)).streams)
    # The first rows had left the queue before the last request came, whenever their tokens came.
    waiting = firsts[NUM_ROWS:]
    return 1 + sum(last.sent_s < first_s < last.token_s[0] for first_s in waiting)


# --- at random --------------------------------------------------------------------------------


async def openloop(bench: Bench) -> Table:
    """Poisson arrivals at one rate for all: what a request waits where nobody waits for it."""
    pooled: dict[str, list[Trace]] = {}
    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        closed = await bench.paired(arms, lambda: Plan(bench.clients(NUM_ROWS)))
        slowest = next(own for name, own in closed.items() if name != "server")
        per_s = LOAD * median(t.whole_rate for t in slowest) / bench.max_tokens
        for pair in range(bench.num_pairs):
            plan = scenarios.open_loop(
                bench.writer, NUM_ARRIVALS, per_s, bench.max_tokens, seed=pair
            )
            for name, trace in (await bench.one_pair(arms, plan)).items():
                pooled.setdefault(name, []).append(trace)
    pooled = {name: own for name, own in pooled.items() if len(own) == bench.num_pairs}
    rows, figures = [], {}
    for name, own in pooled.items():
        ttfts = [ttft for trace in own for ttft in trace.ttfts]
        gaps = [gap for trace in own for gap in trace.gaps()]
        rows.append([name, *(ms([at(v, q)]) for v in (ttfts, gaps) for q in (0.5, 0.95, 0.99))])
        figures[name] = {"ttft_s": percentiles(ttfts), "itl_s": percentiles(gaps)}
    comparisons: list[Comparison] = []
    for what, read in (("TTFT", lambda t: t.ttfts), ("ITL", lambda t: t.gaps())):
        for q in (0.5, 0.95):
            own_q = {name: [at(read(t), q) for t in own] for name, own in pooled.items()}
            comparisons += bench.against(f"{what} at random arrivals, p{100 * q:.0f}", "ms", own_q)
    columns = ["server", "TTFT p50, ms", "p95", "p99", "ITL p50, ms", "p95", "p99"]
    note = (
        f"{NUM_ARRIVALS} requests a pair, {per_s:.1f} a second, seeded: {LOAD:.0%} of what the "
        f"first of the peers answers when {NUM_ROWS} clients ask one after the other."
    )
    return Table("Requests at random", columns, rows, figures, [note], comparisons)


def at(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def percentiles(values: Sequence[float]) -> list[float]:
    """101 values, from the least to the greatest."""
    return [round(at(values, n / 100), 6) for n in range(101)]


# --- turn by turn -----------------------------------------------------------------------------


async def turns(bench: Bench) -> Table:
    """Conversations, each turn with all that was said before it."""
    by_name = {}
    async with bench.servers(NUM_ROWS) as servers:
        by_name = await bench.paired(
            runs(servers),
            lambda: scenarios.conversations(bench.writer, 2, NUM_TURNS, TURN_TOKENS, 32),
        )
    rows = []
    figures: dict[str, dict[str, list[float]]] = {}
    for name, own in by_name.items():
        by_turn = {str(n): [_ttft_of_turn(trace, n) for trace in own] for n in range(NUM_TURNS)}
        cached = [median(s.num_cached for s in _of_turn(t, NUM_TURNS - 1)) for t in own]
        rows.append([name, *(ms(ttfts) for ttfts in by_turn.values()), rate(cached)])
        figures[name] = by_turn
    later = {name: figures[name][str(NUM_TURNS - 1)] for name in figures}
    columns = ["server", *(f"TTFT of turn {n + 1}, ms" for n in range(NUM_TURNS))]
    columns.append("prompt tokens of the last turn that were cached")
    note = f"Two clients; a first message of {TURN_TOKENS} tokens, then 32 and answers of 32."
    comparisons = bench.against(f"TTFT of turn {NUM_TURNS}", "ms", later)
    return Table("Conversations", columns, rows, figures, [note], comparisons)


def _of_turn(trace: Trace, turn: int) -> list[Stream]:
    """The streams of all clients' requests number `turn`, from 0."""
    by_client: dict[int, list[Stream]] = {}
    for stream in trace.streams:
        by_client.setdefault(stream.client, []).append(stream)
    return [streams[turn] for streams in by_client.values()]


def _ttft_of_turn(trace: Trace, turn: int) -> float:
    return median(stream.ttft_s for stream in _of_turn(trace, turn))


# --- the forerunner's cases -------------------------------------------------------------------


async def seedcases(bench: Bench) -> Table:
    """Wall time from the first request sent to the last byte of all answers."""
    figures: dict[str, Mapping[str, Sequence[float]]] = {}
    rows: list[list[str]] = []
    comparisons: list[Comparison] = []
    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        await bench.one_pair(arms, SEED_CASES[-1].plan(bench.writer))  # not counted
        for case in SEED_CASES:
            by_name = await bench.paired(
                arms, lambda c=case: c.plan(bench.writer), has_warm_up=False
            )
            walls = {k: [trace.last_byte_s for trace in own] for k, own in by_name.items()}
            rates = {
                k: [trace.num_tokens / trace.last_byte_s for trace in own]
                for k, own in by_name.items()
            }
            rows += [[str(case), name, ms(walls[name]), rate(rates[name])] for name in walls]
            figures[str(case)] = walls
            comparisons += bench.against(f"wall time, {case}", "ms", walls)
    columns = ["case", "server", "wall, ms", "tok/s"]
    return Table("The forerunner's cases", columns, rows, figures, [], comparisons)
