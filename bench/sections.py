"""The measurements: which arms are compared on which plan, and what is read off their traces.

Every comparison is interleaved (A B A B …), after a warm-up where runs are short, and each pair has
prompts of its own. Throughput is counted while all rows decode ("decode") and over everything, from
the first request to the last token ("whole").
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

from bench import scenarios
from bench.compare import Asked, Comparison, at_least, at_most
from bench.inprocess import MAX_ROWS, InProcess, StepTimes
from bench.models import Writer
from bench.peers import MLX_LM, OURS, Peer, all_started
from bench.plan import Plan, Trace
from bench.report import Table, ms, rate, ratio
from bench.scenarios import with_settings
from bench.serving import Served, serve

CONCURRENCIES = (1, 2, 4, 8, 16)
LONG_PROMPT_TOKENS = 3000
CONTEXTS, CONTEXT_TOKENS = (256, 1024, 4096), 32
NUM_ROWS = 8  # where not throughput by concurrency is the question

# What a small model must reach against mlx_lm.server, whose own costs are most of its step.
THROUGHPUT_ASKED = {1: 1.25, 2: 1.25, 4: 1.4, 8: 1.8, 16: 1.8}
FIRST_PASS_ASKED = 8.0
AFTER_ASKED = 1.3
SEEDED_ASKED = 2.5
WORST_GAP_ASKED = 0.12

# Never complete before max_tokens, and a different grammar for each.
EIGHT_GRAMMARS: Sequence[Mapping[str, Any]] = [
    {"temperature": 0, "ignore_eos": False, "guided_regex": f"[a-z ,.]{{{2000 + n},4000}}"}
    for n in range(8)
]

Arm = Callable[[Plan], Awaitable[Trace]]


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, and how much."""

    path: Path
    inprocess: InProcess
    writer: Writer
    peers: Sequence[Peer]
    is_small: bool  # a model for which the bounds of small ones hold
    num_pairs: int
    max_tokens: int
    num_rounds: int  # requests that each client makes, one after the other
    has_parts: bool  # whether parts of ours, and of mlx-lm, are measured without a server
    failures: dict[str, str] = field(default_factory=dict)  # of peers that nobody requires

    def clients(self, num_clients: int) -> list[list[scenarios.Request]]:
        return self.writer.clients(num_clients, self.max_tokens, self.num_rounds)

    def servers(
        self, num_rows: int, kernels: Path | None = None
    ) -> AbstractAsyncContextManager[dict[str, Served]]:
        """Ours and the peers, with room for so many rows."""
        able = [peer for peer in self.peers if peer.name not in self.failures]
        return all_started(able, self.path, num_rows, kernels)

    async def one_pair(self, arms: Mapping[str, Arm], plan: Plan) -> dict[str, Trace]:
        """Every arm on one plan, in turn, but those that have failed."""
        traces: dict[str, Trace] = {}
        for name, arm in arms.items():
            if name not in self.failures:
                with self.excused(name):
                    traces[name] = (await arm(plan)).checked()
        return traces

    @contextmanager
    def excused(self, name: str) -> Iterator[None]:
        """A peer that fails here is left out from now on; ours and mlx-lm's must not fail."""
        try:
            yield
        except RuntimeError as error:
            if name == MLX_LM or name not in {peer.name for peer in self.peers}:
                raise
            self.failures[name] = str(error)

    async def paired(
        self, arms: Mapping[str, Arm], make: Callable[[], Plan], has_warm_up: bool = True
    ) -> dict[str, list[Trace]]:
        """Every arm on every pair's plan, in turn; a first pair to warm up is not counted."""
        if has_warm_up:
            await self.one_pair(arms, make())
        pairs = [await self.one_pair(arms, make()) for _ in range(self.num_pairs)]
        names = [name for name in arms if name not in self.failures]
        return {name: [pair[name] for pair in pairs] for name in names}

    def against(
        self,
        what: str,
        unit: str,
        figures: Mapping[str, Sequence[float]],
        asked: Asked | None = None,
    ) -> list[Comparison]:
        """Our figures beside each peer's that has some; what is asked holds for mlx-lm's."""
        return [
            Comparison(
                what,
                unit,
                figures[OURS],
                figures[p.name],
                p.name,
                asked if p.name == MLX_LM else None,
            )
            for p in self.peers
            if p.name in figures and p.name not in self.failures
        ]


def runs(servers: Mapping[str, Served]) -> dict[str, Arm]:
    return {name: served.run for name, served in servers.items()}


# --- throughput -------------------------------------------------------------------------------


async def throughput(bench: Bench) -> Table:
    """Output tokens a second of every arm, by the number of clients."""
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    async with bench.servers(MAX_ROWS) as servers:
        for num_clients in CONCURRENCIES:
            arms = _alone(bench, num_clients) | runs(servers)
            traces = await bench.paired(arms, lambda n=num_clients: Plan(bench.clients(n)))
            decode = {k: [t.decode_rate(num_clients) for t in v] for k, v in traces.items()}
            whole = {k: [trace.whole_rate for trace in v] for k, v in traces.items()}
            figures[f"C={num_clients}"] = {"decode": decode, "whole": whole}
            for name in traces:
                row = [str(num_clients), name]
                for kind in (decode, whole):
                    row += [rate(kind[name]), ratio(kind[name], kind["BatchGenerator"])]
                rows.append(row)
            asked = THROUGHPUT_ASKED[num_clients] if bench.is_small else 1.0
            what = f"throughput, C={num_clients}"
            comparisons += bench.against(what, "tok/s", whole, at_least(asked))
    columns = ["C", "arm", "decode tok/s", "÷ BG decode", "whole tok/s", "÷ BG whole"]
    note = (
        f"{bench.num_rounds} × {bench.max_tokens} tokens a client, greedy, closed loop. BG is "
        "mlx-lm's BatchGenerator without a server, in the same pair. Compared: the whole run."
    )
    return Table("Throughput", columns, rows, figures, [note], comparisons)


def _alone(bench: Bench, num_clients: int) -> dict[str, Arm]:
    """The arms without a server; the first of these is the upper bound."""
    inprocess = bench.inprocess
    arms: dict[str, Arm] = {"BatchGenerator": inprocess.batch_generator}
    if bench.has_parts:
        arms |= {"scheduler + runner": inprocess.loop, "engine": inprocess.engine}
        if num_clients == 1:
            arms["mlx_lm generate_step"] = inprocess.generate_step
            arms["mlx_lm stream_generate"] = inprocess.stream_generate
    return arms


# --- mixed settings ---------------------------------------------------------------------------

GREEDY, FIRST, AFTER, SEEDS = "greedy", "eight settings, first", "again", "eight seeds"
GRAMMARS = "eight grammars"


async def mixed(bench: Bench) -> Table:
    """Eight clients who each want something else, against eight who are greedy.

    Each pair has settings that no server has seen, nor any before it: kernels that an earlier run
    compiled for the same values would be found again. They are asked twice.
    """
    whole: dict[str, dict[str, list[float]]] = {}
    async with AsyncExitStack() as stack:
        kernels = Path(stack.enter_context(TemporaryDirectory()))
        servers = await stack.enter_async_context(bench.servers(NUM_ROWS, kernels))
        for pair in range(-1, bench.num_pairs):
            for kind, settings in _kinds(pair + 1).items():
                arms = runs(servers)
                if kind == GRAMMARS:
                    arms = {OURS: servers[OURS].run}
                # What is new is so in one request a client: a second one is served as known.
                num_rounds = 1 if kind == FIRST else bench.num_rounds
                clients = bench.writer.clients(NUM_ROWS, bench.max_tokens, num_rounds)
                plan = Plan(with_settings(clients, settings))
                for name, trace in (await bench.one_pair(arms, plan)).items():
                    if pair >= 0:
                        whole.setdefault(kind, {}).setdefault(name, []).append(trace.whole_rate)
    rows = [
        [name, kind, rate(own), ratio(own, whole[GREEDY][name])]
        for kind, by_name in whole.items()
        for name, own in by_name.items()
        if len(own) == bench.num_pairs
    ]
    comparisons = [
        comparison
        for kind, asked in ((FIRST, FIRST_PASS_ASKED), (AFTER, AFTER_ASKED), (SEEDS, SEEDED_ASKED))
        for comparison in bench.against(
            f"{kind}, C={NUM_ROWS}",
            "tok/s",
            {name: own for name, own in whole[kind].items() if len(own) == bench.num_pairs},
            at_least(asked) if bench.is_small else None,
        )
    ]
    columns = ["server", f"what {NUM_ROWS} clients ask for", "whole tok/s", "÷ its own greedy"]
    note = (
        f"Values are new in each pair, where each client asks once for {bench.max_tokens} tokens, "
        "and asked for again after it: a server that compiles a sampler for each value pays for it "
        "the first time. Kernels of earlier runs are hidden from all."
    )
    return Table("Mixed settings", columns, rows, whole, [note], comparisons)


def _kinds(turn: int) -> dict[str, Sequence[Mapping[str, Any]]]:
    settings = scenarios.mixed_settings(turn)
    kinds: dict[str, Sequence[Mapping[str, Any]]] = {
        GREEDY: settings[:1] * NUM_ROWS,
        FIRST: settings,
        AFTER: settings,
        SEEDS: scenarios.EIGHT_SEEDS,
    }
    if find_spec("llguidance") is not None:
        kinds[GRAMMARS] = EIGHT_GRAMMARS
    return kinds


async def neighbours(bench: Bench) -> Table:
    """Four greedy clients beside four others: greedy ones, and ones bound to grammars."""
    if find_spec("llguidance") is None:
        return Table("Beside constrained rows", ["llguidance is not installed"], [], {})
    greedy = scenarios.mixed_settings(0)[:1] * 4
    async with serve(bench.path, NUM_ROWS) as served:

        def arm(others: Sequence[Mapping[str, Any]]) -> Arm:
            async def run(_: Plan) -> Trace:
                clients = bench.writer.clients(8, bench.max_tokens)  # one round: all at once
                return await served.run(Plan(with_settings(clients, [*greedy, *others])))

            return run

        arms = {"greedy ones": arm(greedy), "constrained ones": arm(EIGHT_GRAMMARS[:4])}
        traces = await bench.paired(arms, lambda: Plan(()))
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    middles = {k: [median(_steady_gaps(trace)) for trace in v] for k, v in traces.items()}
    for name, runs in traces.items():
        tails = [quantiles(_steady_gaps(trace), n=20)[-1] for trace in runs]
        rows.append(
            [name, ms(middles[name]), ratio(middles[name], middles["greedy ones"]), ms(tails)]
        )
        figures[name] = {"median_gap_s": middles[name], "p95_gap_s": tails}
    columns = ["beside", "median gap of four greedy streams, ms", "÷ beside greedy ones", "p95, ms"]
    return Table("Beside constrained rows", columns, rows, figures)


def _steady_gaps(trace: Trace) -> list[float]:
    """Of the first four streams, while all eight decode. Raises RuntimeError if they never do."""
    start_s = max(stream.token_s[0] for stream in trace.streams)
    stop_s = min(stream.token_s[-1] for stream in trace.streams)
    gaps = trace.of(range(4)).gaps(start_s, stop_s) if start_s < stop_s else []
    if not gaps:
        raise RuntimeError("the eight never decoded together: --tokens must be more")
    return gaps


# --- a long prompt ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Arrival:
    """How four streams fared while a long prompt came among them, in seconds."""

    longest_gap_s: float
    median_gap_s: float
    gap_before_s: float
    ttft_s: float


async def longprompt(bench: Bench) -> Table:
    """Four streams decode while a long prompt arrives; and the same prompt alone."""
    num_prompt = min(LONG_PROMPT_TOKENS, bench.inprocess.model.context_size // 2)
    seen: dict[str, list[_Arrival]] = {}
    alone_s: dict[str, list[float]] = {}
    figures: dict[str, Any] = {}
    async with bench.servers(NUM_ROWS) as servers:
        arms = runs(servers)
        if bench.has_parts:
            arms["BatchGenerator"] = bench.inprocess.batch_generator
            arms["engine"] = bench.inprocess.engine
        for _ in range(bench.num_pairs):
            alone = Plan([[bench.writer.request(num_prompt, 4)]])
            for name, trace in (await bench.one_pair(arms, alone)).items():
                alone_s.setdefault(name, []).append(trace.streams[0].ttft_s)
            among = scenarios.neighbour(bench.writer, num_prompt)
            for name, trace in (await bench.one_pair(arms, among)).items():
                seen.setdefault(name, []).append(_arrival(trace))
                if name in servers:
                    figures["timeline"] = figures.get("timeline", {}) | {name: _timeline(trace)}
    kept = [name for name, own in seen.items() if len(own) == bench.num_pairs]
    for name in kept:
        figures[name] = _figures(seen[name]) | {"ttft_alone_s": alone_s[name]}
    worst = {name: figures[name]["longest_gap_s"] for name in kept}
    ttft = {name: figures[name]["ttft_s"] for name in kept}
    comparisons = bench.against(
        "worst gap beside a long prompt", "ms", worst, at_most(WORST_GAP_ASKED)
    )
    comparisons += bench.against("TTFT of the long prompt among streams", "ms", ttft)
    columns = ["arm", "gap before, ms", "longest gap, ms", "median gap, ms"]
    columns += ["newcomer's TTFT alone, ms", "among four, ms", "÷ alone"]
    rows = [_arrival_row(name, figures[name]) for name in kept]
    title = f"A prompt of {num_prompt} tokens among four streams"
    return Table(title, columns, rows, figures, [], comparisons)


async def context(bench: Bench) -> Table:
    """One stream after prompts of several lengths: how a longer context tells."""
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    comparisons: list[Comparison] = []
    most = bench.inprocess.model.context_size - CONTEXT_TOKENS
    async with bench.servers(NUM_ROWS) as servers:
        for num_prompt in (num for num in CONTEXTS if num <= most):
            traces = await bench.paired(
                runs(servers),
                lambda n=num_prompt: Plan([[bench.writer.request(n, CONTEXT_TOKENS)]]),
            )
            ttft = {name: [trace.ttfts[0] for trace in own] for name, own in traces.items()}
            gap = {name: [median(trace.gaps()) for trace in own] for name, own in traces.items()}
            figures[str(num_prompt)] = {"ttft_s": ttft, "gap_s": gap}
            rows += [[f"{num_prompt}", name, ms(ttft[name]), ms(gap[name])] for name in traces]
            comparisons += bench.against(f"TTFT, a prompt of {num_prompt}", "ms", ttft)
            comparisons += bench.against(f"median gap after it, {num_prompt}", "ms", gap)
    columns = ["prompt tokens", "server", "TTFT, ms", "median gap after it, ms"]
    return Table("Growth of the context", columns, rows, figures, [], comparisons)


def _figures(seen: Sequence[_Arrival]) -> dict[str, list[float]]:
    return {
        "longest_gap_s": [arrival.longest_gap_s for arrival in seen],
        "median_gap_s": [arrival.median_gap_s for arrival in seen],
        "gap_before_s": [arrival.gap_before_s for arrival in seen],
        "ttft_s": [arrival.ttft_s for arrival in seen],
    }


def _arrival_row(name: str, own: Mapping[str, Sequence[float]]) -> list[str]:
    keys = ("gap_before_s", "longest_gap_s", "median_gap_s", "ttft_alone_s", "ttft_s")
    return [name, *(ms(own[key]) for key in keys), ratio(own["ttft_s"], own["ttft_alone_s"])]


def _arrival(trace: Trace) -> _Arrival:
    streams = trace.of(range(4))
    newcomer = trace.of(range(4, 5)).streams[0]
    during = streams.gaps(newcomer.sent_s, newcomer.token_s[0])
    steady_s = max(stream.token_s[0] for stream in streams.streams)
    before = streams.gaps(steady_s, newcomer.sent_s)
    return _Arrival(max(during), median(during), median(before), newcomer.ttft_s)


def _timeline(trace: Trace) -> dict[str, Any]:
    """When the streams' tokens came around the newcomer's prefill: (seconds since it was sent, the
    gap that ended then), and its TTFT.
    """
    newcomer = trace.of(range(4, 5)).streams[0]
    around = (newcomer.sent_s - 0.3, newcomer.token_s[0] + 0.3)
    points = [
        (round(t - newcomer.sent_s, 4), round(t - earlier, 4))
        for stream in trace.of(range(4)).streams
        for earlier, t in pairwise(stream.token_s)
        if around[0] < t < around[1]
    ]
    return {"points": sorted(points), "ttft_s": newcomer.ttft_s}


# --- steps ------------------------------------------------------------------------------------


async def steps(bench: Bench) -> Table:
    """Where a tick's time goes, from the server's /metrics and from the engine in this process."""
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    async with serve(bench.path, MAX_ROWS) as served:
        for num_clients in (1, NUM_ROWS):
            await bench.paired({"warm": served.run}, lambda n=num_clients: Plan(bench.clients(n)))
            before = await served.metrics()
            num_steps = len(bench.inprocess.log.steps)
            arms: dict[str, Arm] = {"server": served.run, "engine": bench.inprocess.engine}
            await bench.paired(arms, lambda n=num_clients: Plan(bench.clients(n)))
            after = await served.metrics()
            rows.append([str(num_clients), "server", *_served_split(before, after)])
            own = bench.inprocess.log.steps[num_steps:]
            own = [s for s in own if s.num_rows == num_clients and not s.num_prefill_tokens]
            rows.append([str(num_clients), "engine", *_own_split(own)])
            figures[f"C={num_clients}"] = {
                "device_s": [s.device_s for s in own],
                "lane_s": [s.lane_s for s in own],
                "advance_s": [s.advance_s for s in own],
            }
    columns = ["C", "where", "schedule, ms", "lane, ms", "deliver, ms", "loop lag, ms"]
    columns += ["device, ms", "lane less device, ms", "hop, ms"]
    notes = [
        "Server: means of all steps, from /metrics. Engine: medians of steps that only decode.",
        "`hop` is what the lane's call takes beyond `runner.advance`. `device` is the outcome's "
        "`device_s`, from the launch or the last step's end to this one's: while a step is always "
        "in flight that is the whole tick, and what the lane lacks of it went to the loop.",
    ]
    return Table("A step, split", columns, rows, figures, notes)


def _served_split(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    def average(name: str, labels: str = "") -> str:
        total = after[f"{name}_sum{labels}"] - before[f"{name}_sum{labels}"]
        count = after[f"{name}_count{labels}"] - before[f"{name}_count{labels}"]
        return f"{1000 * total / max(1, count):.3f}"

    phases = [
        average("mlxlite:step_seconds", f'{{phase="{phase}"}}')
        for phase in ("schedule", "lane", "deliver")
    ]
    return [*phases, average("mlxlite:loop_lag_seconds"), "", "", ""]


def _own_split(own: Sequence[StepTimes]) -> list[str]:
    def middle(read: Callable[[StepTimes], float]) -> str:
        return ms([read(step) for step in own], 3)

    return [
        middle(lambda step: step.schedule_s),
        middle(lambda step: step.lane_s),
        middle(lambda step: step.deliver_s),
        "",
        middle(lambda step: step.device_s),
        middle(lambda step: step.lane_s - step.device_s),
        middle(lambda step: step.lane_s - step.advance_s),
    ]
