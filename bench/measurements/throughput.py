"""Throughput: by the number of clients, with mixed settings, in given cases, and by part."""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from math import isfinite
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from bench import scenarios
from bench.compare import Comparison, at_least
from bench.inprocess import MAX_ROWS
from bench.measurements.pairs import NUM_ROWS, Arm, Bench, Figure, Traces, each, is_cpu, runs
from bench.peers import OURS, US, US_PLAIN
from bench.plan import Plan, Trace
from bench.report import Table, ms
from bench.scenarios import EIGHT_GRAMMARS, SEED_CASES, with_settings

CONCURRENCIES = (1, 2, 4, 8, 16)
# For a small model against mlx_lm.server, whose own costs are most of its step.
THROUGHPUT_ASKED = {1: 1.25, 2: 1.25, 4: 1.4, 8: 1.8, 16: 1.8}
GREEDY, FIRST, AFTER, SEEDS = "greedy", "eight settings, first", "again", "eight seeds"
MIXED_ASKED = {FIRST: 8.0, AFTER: 1.3, SEEDS: 2.5}
GRAMMARS = "eight grammars"


async def throughput(bench: Bench) -> Table:
    """Output tokens a second of every arm, by the number of clients."""
    figures: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    plain = [US_PLAIN] if is_cpu() else []  # on a GPU it is the same as ours
    async with bench.servers(MAX_ROWS, *plain) as servers:
        for num in CONCURRENCIES:
            arms = _alone(bench, num) | runs(servers)
            traces = await bench.paired(arms, lambda n=num: Plan(bench.clients(n)))
            whole = each(traces, _rate)
            decode = each(traces, lambda trace, n=num: trace.decode_rate(n))
            figures[f"C={num}"] = {"decode": decode, "whole": whole}
            asked = at_least(THROUGHPUT_ASKED[num] if bench.is_small else 1.0)
            own = {name: whole[name] for name in whole if name in (*servers, "BatchGenerator")}
            comparisons += bench.on_equal_kernels(f"throughput, C={num}", "tok/s", whole)
            if all(map(isfinite, chain(*decode.values()))):  # with enough tokens
                comparisons += bench.on_equal_kernels(f"decoding alone, C={num}", "tok/s", decode)
            comparisons += bench.against(f"throughput, C={num}", "tok/s", own, asked)
    note = (
        f"{bench.scale.num_rounds} × {bench.scale.max_tokens} tokens a client, greedy; the whole "
        "run, or only while all rows decode. BatchGenerator is mlx-lm's loop in this process."
    )
    return Table("Throughput", figures=figures, notes=[note], comparisons=comparisons)


def _alone(bench: Bench, num_clients: int) -> dict[str, Arm]:
    """The arms without a server, on mlx-lm's kernels; the first is the bound."""
    inprocess = bench.inprocess
    arms: dict[str, Arm] = {"BatchGenerator": inprocess.batch_generator}
    if bench.scale.has_parts:
        arms["our engine"] = inprocess.engine
        if num_clients == 1:
            arms["mlx_lm stream_generate"] = inprocess.stream_generate
    return arms


async def mixed(bench: Bench) -> Table:
    """Eight clients with different settings, beside eight greedy ones.

    The values of a pair are new to every server and to the kernels of earlier runs, which are
    hidden; the same values are requested twice.
    """
    async with AsyncExitStack() as stack:
        kernels = Path(stack.enter_context(TemporaryDirectory()))
        servers = await stack.enter_async_context(bench.servers(NUM_ROWS, kernels=kernels))

        def plans(pair: int) -> dict[str, Plan]:
            settings = scenarios.mixed_settings(pair + 1)
            kinds = {GREEDY: settings[:1] * NUM_ROWS, FIRST: settings, AFTER: settings}
            kinds[SEEDS] = list(scenarios.EIGHT_SEEDS)
            return {kind: _plan(bench, own, kind != FIRST) for kind, own in kinds.items()}

        def constrained(_: int) -> dict[str, Plan]:
            kinds = {GREEDY: [{"temperature": 0}] * NUM_ROWS, GRAMMARS: EIGHT_GRAMMARS}
            return {kind: _plan(bench, own) for kind, own in kinds.items()}

        traces = await bench.rounds(runs(servers), plans)
        beside = _beside_greedy(traces)
        if find_spec("llguidance") is not None:
            beside += _beside_greedy(await bench.rounds({OURS: servers[OURS].run}, constrained))
    figures = [
        Figure(f"{kind}, C={NUM_ROWS}", "tok/s", _rate, kind, bench.asked(at_least(bound)))
        for kind, bound in MIXED_ASKED.items()
    ]
    note = (
        f"Values are new in each pair, where each client requests {bench.scale.max_tokens} tokens, "
        "and are repeated after it: a server that compiles a sampler for each value does so once."
    )
    table = bench.table("Mixed settings", traces, figures, note)
    return replace(table, comparisons=[*table.comparisons, *beside])


def _rate(trace: Trace) -> float:
    return trace.whole_rate


def _plan(bench: Bench, settings: Sequence[Mapping[str, Any]], has_rounds: bool = True) -> Plan:
    """Values are new in one request a client only: a second one would find them known."""
    num_rounds = bench.scale.num_rounds if has_rounds else 1
    clients = bench.writer.clients(NUM_ROWS, bench.scale.max_tokens, num_rounds)
    return Plan(with_settings(clients, settings))


def _beside_greedy(traces: Mapping[str, Traces]) -> list[Comparison]:
    rates = {kind: each(own, _rate) for kind, own in traces.items()}
    return [
        Comparison(f"{name}: {kind}", "tok/s", own, rates[GREEDY][name], "its own greedy rate")
        for kind, by_name in rates.items()
        for name, own in by_name.items()
        if kind != GREEDY
    ]


async def neighbours(bench: Bench) -> Table:
    """Gaps of four greedy streams beside four constrained ones, and beside four greedy ones."""
    if find_spec("llguidance") is None:
        return Table("Beside constrained rows", notes=["llguidance is not installed"])
    greedy = scenarios.mixed_settings(0)[:1] * 4

    def plans(_: int) -> dict[str, Plan]:
        others = {"constrained": EIGHT_GRAMMARS[:4], "greedy": greedy}
        clients = bench.writer.clients(8, bench.scale.max_tokens)  # one round: all at once
        return {kind: Plan(with_settings(clients, [*greedy, *own])) for kind, own in others.items()}

    async with US.start(bench.path, NUM_ROWS) as served:
        traces = await bench.rounds({OURS: served.run}, plans)
    # Beside constrained rows is ours, beside greedy ones the peer.
    both = {OURS: traces["constrained"][OURS], "beside greedy ones": traces["greedy"][OURS]}
    figures = [
        Figure("median gap of four greedy streams", "ms", lambda t: median(_steady_gaps(t))),
        Figure("p95 gap of them", "ms", lambda t: quantiles(_steady_gaps(t), n=20)[-1]),
    ]
    return bench.table("Beside constrained rows", {"": both}, figures)


def _steady_gaps(trace: Trace) -> list[float]:
    """Of the first four streams, while all eight decode. Raises RuntimeError if they never do."""
    start_s = max(stream.token_s[0] for stream in trace.streams)
    stop_s = min(stream.token_s[-1] for stream in trace.streams)
    gaps = trace.of(range(4)).gaps(start_s, stop_s) if start_s < stop_s else []
    if not gaps:
        raise RuntimeError("the eight never decoded together: --tokens must be more")
    return gaps


async def seedcases(bench: Bench) -> Table:
    """Wall time from the first request sent to the last byte of all answers."""
    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        await bench.one_pair(arms, SEED_CASES[-1].plan(bench.writer))  # not counted
        traces = await bench.rounds(
            arms,
            lambda _: {str(case): case.plan(bench.writer) for case in SEED_CASES},
            has_warm_up=False,
        )
    figures = [
        Figure(f"wall time, {case}", "ms", lambda trace: trace.last_byte_s, case) for case in traces
    ]
    return bench.table("The predecessor's cases", traces, figures)


async def steps(bench: Bench) -> Table:
    """The parts of a step: means of all steps of a run, from /metrics."""
    phases = ("schedule", "lane", "deliver")
    names = {phase: ("mlxlite:step_seconds", f'{{phase="{phase}"}}') for phase in phases}
    names["loop lag"] = ("mlxlite:loop_lag_seconds", "")
    rows: list[list[str]] = []
    async with US.start(bench.path, MAX_ROWS) as served:
        for num in (1, NUM_ROWS):
            await bench.paired({"warm": served.run}, lambda n=num: Plan(bench.clients(n)))
            before = await served.metrics()
            await bench.paired({OURS: served.run}, lambda n=num: Plan(bench.clients(n)))
            after = await served.metrics()
            more = {name: value - before[name] for name, value in after.items() if name in before}
            rows.append([str(num)])
            for name, labels in names.values():
                mean_s = more[f"{name}_sum{labels}"] / max(1, more[f"{name}_count{labels}"])
                rows[-1].append(ms([mean_s], 3))
    columns = ["C", *(f"{name}, ms" for name in names)]
    note = "`lane` is the device thread: building the graph and waiting for the device."
    return Table("A step, split", columns, rows, {"columns": columns, "rows": rows}, [note])
