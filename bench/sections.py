"""The measurements: which arms are compared on which plan, and what is read off their traces.

Every comparison is interleaved (A B A B …), after a warm-up where runs are short, and each pair has
prompts of its own. Throughput is counted while all rows decode ("decode") and over everything, from
the first request to the last token ("whole").
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.inprocess import MAX_ROWS, InProcess, StepTimes
from bench.models import Writer
from bench.plan import Plan, Request, Stream, Trace
from bench.report import Table, ms, rate, ratio
from bench.serving import Served, serve

CONCURRENCIES = (1, 4, 8, 16)
LONG_PROMPT_TOKENS = 3000
NUM_BURST = 64
BURST_ROWS = 8
PRIORITY = -10

MIXED_SETTINGS: Sequence[Mapping[str, Any]] = (
    {"temperature": 0},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1, "top_k": 40},
    {"temperature": 1, "top_p": 0.9},
    {"temperature": 1, "min_p": 0.05},
    {"temperature": 0.8, "repetition_penalty": 1.1},
    {"temperature": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8, "logit_bias": {"100": 5, "200": -5}},
)
EIGHT_SEEDS: Sequence[Mapping[str, Any]] = [{"temperature": 1, "seed": n} for n in range(1, 9)]

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
    num_pairs: int
    max_tokens: int
    num_rounds: int  # requests that each client makes, one after the other

    def clients(self, num_clients: int) -> list[list[Request]]:
        return self.writer.clients(num_clients, self.max_tokens, self.num_rounds)

    async def paired(
        self, arms: Mapping[str, Arm], make: Callable[[], Plan]
    ) -> dict[str, list[Trace]]:
        """Every arm on every pair's plan, in turn; the first pair is not counted."""
        traces: dict[str, list[Trace]] = {name: [] for name in arms}
        for pair in range(-1, self.num_pairs):
            plan = make()
            for name, arm in arms.items():
                trace = (await arm(plan)).checked()
                if pair >= 0:
                    traces[name].append(trace)
        return traces


# --- throughput -------------------------------------------------------------------------------


async def throughput(bench: Bench) -> Table:
    """Output tokens a second of every arm at 1, 4, 8 and 16 clients."""
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    async with serve(bench.path, MAX_ROWS) as served:
        for num_clients in CONCURRENCIES:
            arms = _arms(bench.inprocess, served, num_clients)
            traces = await bench.paired(arms, lambda n=num_clients: Plan(bench.clients(n)))
            decode = {k: [t.decode_rate(num_clients) for t in v] for k, v in traces.items()}
            whole = {k: [trace.whole_rate for trace in v] for k, v in traces.items()}
            figures[f"C={num_clients}"] = {"decode": decode, "whole": whole}
            rows += [
                [
                    str(num_clients),
                    name,
                    rate(decode[name]),
                    ratio(decode[name], decode["BatchGenerator"]),
                    rate(whole[name]),
                    ratio(whole[name], whole["BatchGenerator"]),
                ]
                for name in arms
            ]
    columns = ["C", "arm", "decode tok/s", "÷ BG decode", "whole tok/s", "÷ BG whole"]
    asked = f"{bench.num_rounds} × {bench.max_tokens} tokens a client"
    note = f"{asked}, greedy, closed loop. BG is BatchGenerator, in the same pair."
    return Table("Throughput", columns, rows, figures, [note])


def _arms(inprocess: InProcess, served: Served, num_clients: int) -> dict[str, Arm]:
    alone: dict[str, Arm] = {
        "mlx_lm generate_step": inprocess.generate_step,
        "mlx_lm stream_generate": inprocess.stream_generate,
    }
    batched: dict[str, Arm] = {
        "BatchGenerator": inprocess.batch_generator,
        "scheduler + runner": inprocess.loop,
        "engine": inprocess.engine,
        "server": served.run,
    }
    return alone | batched if num_clients == 1 else batched


# --- mixed settings ---------------------------------------------------------------------------


async def mixed(bench: Bench) -> Table:
    """Eight clients who each want something else, against eight who are greedy."""
    num_clients = len(MIXED_SETTINGS)
    async with serve(bench.path, num_clients) as served:

        def arm(settings: Sequence[Mapping[str, Any]] | None) -> Arm:
            async def run(_: Plan) -> Trace:
                return await served.run(Plan(_with(bench.clients(num_clients), settings)))

            return run

        arms = {
            "greedy": arm(None),
            "eight settings": arm(MIXED_SETTINGS),
            "eight seeds": arm(EIGHT_SEEDS),
        }
        if find_spec("llguidance") is not None:
            arms["eight grammars"] = arm(EIGHT_GRAMMARS)
        traces = await bench.paired(arms, lambda: Plan(()))
    decode = {k: [trace.decode_rate(num_clients) for trace in v] for k, v in traces.items()}
    whole = {k: [trace.whole_rate for trace in v] for k, v in traces.items()}
    rows = [
        [
            name,
            rate(decode[name]),
            ratio(decode[name], decode["greedy"]),
            rate(whole[name]),
            ratio(whole[name], whole["greedy"]),
        ]
        for name in arms
    ]
    columns = ["server, C=8", "decode tok/s", "÷ greedy decode", "whole tok/s", "÷ greedy whole"]
    return Table("Mixed settings", columns, rows, {"decode": decode, "whole": whole})


async def neighbours(bench: Bench) -> Table:
    """Four greedy clients beside four others: greedy ones, and ones bound to grammars."""
    if find_spec("llguidance") is None:
        return Table("Beside constrained rows", ["llguidance is not installed"], [], {})
    greedy = MIXED_SETTINGS[:1] * 4
    async with serve(bench.path, BURST_ROWS) as served:

        def arm(others: Sequence[Mapping[str, Any]]) -> Arm:
            async def run(_: Plan) -> Trace:
                return await served.run(Plan(_with(bench.clients(8), [*greedy, *others])))

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
    """Of the first four streams, while all eight decode."""
    start_s = max(stream.token_s[0] for stream in trace.streams)
    stop_s = min(stream.token_s[-1] for stream in trace.streams)
    return trace.of(range(4)).gaps(start_s, stop_s)


def _with(
    clients: list[list[Request]], settings: Sequence[Mapping[str, Any]] | None
) -> list[list[Request]]:
    if settings is None:
        return clients
    return [
        [replace(request, settings=own) for request in requests]
        for requests, own in zip(clients, settings, strict=True)
    ]


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
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    async with serve(bench.path, BURST_ROWS) as served:
        arms: dict[str, Arm] = {
            "BatchGenerator": bench.inprocess.batch_generator,
            "engine": bench.inprocess.engine,
            "server": served.run,
        }
        traces: dict[str, list[tuple[Trace, Trace]]] = {name: [] for name in arms}
        for _ in range(bench.num_pairs):
            for name, arm in arms.items():
                alone = await arm(Plan([[bench.writer.request(num_prompt, 4)]]))
                among = await arm(_among_four(bench.writer, num_prompt))
                traces[name].append((alone.checked(), among.checked()))
    for name, pairs in traces.items():
        seen = [_arrival(among) for _, among in pairs]
        ttft_alone = [alone.streams[0].ttft_s for alone, _ in pairs]
        ttft = [arrival.ttft_s for arrival in seen]
        before = [arrival.gap_before_s for arrival in seen]
        longest = [arrival.longest_gap_s for arrival in seen]
        middle = [arrival.median_gap_s for arrival in seen]
        rows.append([name, ms(before), ms(longest), ms(middle), ms(ttft_alone), ms(ttft)])
        rows[-1].append(ratio(ttft, ttft_alone))
        figures[name] = {"longest_gap_s": longest, "ttft_s": ttft, "ttft_alone_s": ttft_alone}
        figures[name] |= {"median_gap_s": middle, "gap_before_s": before}
    columns = ["arm", "gap before, ms", "longest gap, ms", "median gap, ms"]
    columns += ["newcomer's TTFT alone, ms", "among four, ms", "÷ alone"]
    return Table(f"A prompt of {num_prompt} tokens among four streams", columns, rows, figures)


def _among_four(writer: Writer, num_prompt: int) -> Plan:
    """The streams are long enough to outlast the newcomer's prefill, and cut after it."""
    streams = [[writer.request(32, 4000)] for _ in range(4)]
    return Plan(streams, [[writer.request(num_prompt, 4)]], after_tokens=32, is_cut=True)


def _arrival(trace: Trace) -> _Arrival:
    streams = trace.of(range(4))
    newcomer = trace.of(range(4, 5)).streams[0]
    during = streams.gaps(newcomer.sent_s, newcomer.token_s[0])
    steady_s = max(stream.token_s[0] for stream in streams.streams)
    before = streams.gaps(steady_s, newcomer.sent_s)
    return _Arrival(max(during), median(during), median(before), newcomer.ttft_s)


# --- a burst ----------------------------------------------------------------------------------


async def burst(bench: Bench) -> Table:
    """64 requests at once against 8 rows, and one with a high priority at the end."""

    def make() -> Plan:
        first = bench.writer.clients(NUM_BURST, 16)
        last = replace(bench.writer.request(32, 16), settings={"priority": PRIORITY})
        return Plan(first, [[last]])

    async with serve(bench.path, BURST_ROWS) as served:
        traces = (await bench.paired({"server": served.run}, make))["server"]
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
    figures = {"wall_s": walls, "positions": positions, "ttft_s": ttfts}
    figures |= {"shifts_from_queue": by_queue, "shifts_from_sending": by_sending}
    notes = [
        f"Places of first tokens, {NUM_BURST} requests, all pairs: rows of a step arrive together, "
        f"so up to {BURST_ROWS - 1} is FIFO. A request joins the queue, and its answer's head "
        "leaves, when it is rendered."
    ]
    return Table(f"{NUM_BURST} requests at once, {BURST_ROWS} rows", columns, [row], figures, notes)


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
    waiting = firsts[BURST_ROWS:]
    return 1 + sum(last.sent_s < first_s < last.token_s[0] for first_s in waiting)


# --- steps ------------------------------------------------------------------------------------


async def steps(bench: Bench) -> Table:
    """Where a tick's time goes, from the server's /metrics and from the engine in this process."""
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    async with serve(bench.path, MAX_ROWS) as served:
        for num_clients in (1, BURST_ROWS):
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
