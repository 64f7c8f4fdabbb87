"""The measurements of what a server costs beside its tokens: to start, to hold, to be left alone.

A server that is started is started from nothing, in turn with the others. What a lost client still
costs is read off the server's CPU time, by the same rule for all.
"""

import asyncio
import compileall
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from bench import scenarios
from bench.arrivals import BURST_TOKENS, NUM_BURST
from bench.compare import Comparison, at_most
from bench.peers import MLX_LM, OURS, US
from bench.plan import Plan, Request
from bench.processes import cpu_s, rss_bytes
from bench.report import Table, ms
from bench.sections import NUM_ROWS, Bench, runs
from bench.serving import Served

LISTENING_ASKED = 0.2
READY_ASKED = 1.0
RSS_ASKED = 1.0
IMPORTS = {OURS: "mlxlite.__main__", MLX_LM: "mlx_lm.server"}

CHUNK_TOKENS = 2048  # --prefill-chunk-size, while nobody decodes
LOST_PROMPT_TOKENS = 4500  # some chunks, of ours and of mlx-lm's
LOST_TOKENS = 1500
FEW_LOST_PROMPT_TOKENS = 3000  # where time is short: mlx-lm's server goes on to the end of them
FEW_LOST_TOKENS = 500
LEAVE_AFTER_S = 0.25
SAMPLE_S = 0.02
_BUSY = 0.25  # of what it used before the client left
_LEAST = 0.1  # of a core: an idle server's timers use a millisecond now and then
_QUIET_S = 0.4  # so long without work, and there is none
_GIVE_UP_S = 180.0


# --- start and memory -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """One start, and the memory beyond the weights then and after a burst."""

    listening_s: float
    ready_s: float
    rss: float  # bytes
    rss_after: float


async def startup(bench: Bench) -> Table:
    """From nothing to the first answer, and what is resident.

    Our modules and mlx-lm's are compiled first, as pip does that when it installs them: those of a
    checkout may not be (PYTHONDONTWRITEBYTECODE), and would be parsed at each start.
    """
    note = _compiled()
    weights = num_weight_bytes(bench.path)
    starts: dict[str, list[Start]] = {}
    imports: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for pair in range(-1, bench.num_pairs):
        for name, module in IMPORTS.items():
            seconds = await _import(module)
            if pair >= 0:
                imports[name].append(seconds)
        for peer in (US, *bench.peers):
            with bench.excused(peer.name):
                async with peer.start(bench.path, NUM_ROWS) as served:
                    begun = await _start(bench, served, weights)
                if pair >= 0:
                    starts.setdefault(peer.name, []).append(begun)
    starts = {name: own for name, own in starts.items() if name not in bench.failures}
    rows, comparisons = _start_tables(bench, starts, imports)
    columns = ["server", "listening, ms", "first answer, ms", "RSS above weights, MiB"]
    columns += [f"after {NUM_BURST} at once", "import of its module, ms"]
    note += (
        f" The weights are {weights / 2**20:.1f} MiB. The first answer is the first 200 to a chat "
        "of one token. Memory is read after it and after the burst, once the server does nothing "
        "any more. Ours imports the model's libraries when it listens already, so its import cost "
        "is the server's alone; the first answer has it all."
    )
    figures: dict[str, Any] = {"imports_s": imports, "weights": weights}
    figures |= {name: [asdict(begun) for begun in own] for name, own in starts.items()}
    return Table("Start and memory", columns, rows, figures, [note], comparisons)


def _compiled() -> str:
    """Compile what `IMPORTS` names; what came of it."""
    packages = [module.partition(".")[0] for module in IMPORTS.values()]
    specs = [spec for package in packages if (spec := find_spec(package)) is not None]
    paths = [path for spec in specs for path in spec.submodule_search_locations or ()]
    if all(compileall.compile_dir(path, quiet=2) for path in paths):
        return f"The modules of {' and '.join(packages)} are compiled before, as pip does it."
    return "Modules could not be compiled before: who parses them at each start pays for it."


async def _start(bench: Bench, served: Served, weights: int) -> Start:
    """Memory is read when the server does nothing any more."""
    await served.settle()
    rss = rss_bytes(served.pid)
    (await served.run(scenarios.burst(bench.writer, NUM_BURST, BURST_TOKENS))).checked()
    await served.settle()
    after = rss_bytes(served.pid)
    return Start(served.listening_s, served.ready_s, rss - weights, after - weights)


def _start_tables(
    bench: Bench, starts: dict[str, list[Start]], imports: dict[str, list[float]]
) -> tuple[list[list[str]], list[Comparison]]:
    listening = {name: [begun.listening_s for begun in own] for name, own in starts.items()}
    ready = {name: [begun.ready_s for begun in own] for name, own in starts.items()}
    rss = {name: [begun.rss for begun in own] for name, own in starts.items()}
    after = {name: [begun.rss_after for begun in own] for name, own in starts.items()}
    rows = [
        [
            *(name, ms(listening[name], 0), ms(ready[name], 0)),
            *(f"{median(kind[name]) / 2**20:.0f}" for kind in (rss, after)),
            ms(imports[name], 0) if name in imports else "",
        ]
        for name in starts
    ]
    comparisons = [
        *bench.against("time to listening", "ms", listening, at_most(LISTENING_ASKED)),
        *bench.against("time to the first answer", "ms", ready, at_most(READY_ASKED)),
        *bench.against("import of the server", "ms", imports),
        *bench.against("RSS above the weights", "MiB", rss, at_most(RSS_ASKED)),
        *bench.against("the same after a burst", "MiB", after, at_most(RSS_ASKED)),
    ]
    return rows, comparisons


def num_weight_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


async def _import(module: str) -> float:
    """Seconds for an interpreter to start, import it and end."""
    begun_at = perf_counter()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", f"import {module}")
    if await process.wait() != 0:
        raise RuntimeError(f"{module} cannot be imported")
    return perf_counter() - begun_at


# --- lost clients -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """A process's CPU time at a moment, both in seconds."""

    at_s: float
    cpu_s: float


def stopped_s(samples: Sequence[Sample], left_s: float) -> float:
    """How long after `left_s` a process still worked: until the last stretch between two samples
    in which it used a quarter of what it used, a second, before that, and a tenth of a core.
    """
    before = [s for s in samples if s.at_s <= left_s]
    level = (before[-1].cpu_s - before[0].cpu_s) / (before[-1].at_s - before[0].at_s)
    worked_until_s = left_s
    for earlier, later in pairwise(samples):
        share = (later.cpu_s - earlier.cpu_s) / (later.at_s - earlier.at_s)
        if later.at_s > left_s and share >= max(_LEAST, _BUSY * level):
            worked_until_s = later.at_s
    return worked_until_s - left_s


class TooQuick(Exception):
    """An answer came before its client could leave, as of a small model on a GPU."""


async def lost(bench: Bench) -> Table:
    """A client leaves in decode, in prefill, and while it waits for an answer in one piece."""
    num_prompt, max_tokens = FEW_LOST_PROMPT_TOKENS, FEW_LOST_TOKENS
    if bench.has_parts:
        num_prompt, max_tokens = LOST_PROMPT_TOKENS, LOST_TOKENS
    num_prompt = min(num_prompt, bench.inprocess.model.context_size * 3 // 4)
    asks = {
        "in decode": lambda: scenarios.lost_in_decode(bench.writer, max_tokens),
        "in prefill": lambda: scenarios.lost_in_prefill(bench.writer, num_prompt, LEAVE_AFTER_S),
        "unstreamed": lambda: scenarios.lost_unstreamed(bench.writer, max_tokens, LEAVE_AFTER_S),
    }
    notes = _notes(num_prompt, max_tokens)
    figures: dict[str, dict[str, list[float]]] = {kind: {} for kind in asks}
    bounds: list[float] = []
    released: dict[str, list[float]] = {kind: [] for kind in asks}
    async with bench.servers(NUM_ROWS) as servers:
        warm_up = Plan([[bench.writer.request(512, 32)]])  # whatever is compiled is so after it
        await bench.one_pair(runs(servers), warm_up)
        for _ in range(bench.num_pairs):
            bounds.append(await _step_and_chunk(bench, servers[OURS], num_prompt))
            for kind, ask in list(asks.items()):
                try:
                    for name, served in servers.items():
                        if name not in bench.failures:
                            with bench.excused(name):
                                seconds = await _watched(served, ask())
                                figures[kind].setdefault(name, []).append(seconds)
                    released[kind].append(await _released(servers[OURS], ask()))
                except TooQuick:
                    for own in (asks, figures, released):
                        del own[kind]
                    notes.append(f"{kind}: an answer came before its client could leave.")
    cpu = {
        kind: {k: v for k, v in own.items() if k not in bench.failures}
        for kind, own in figures.items()
    }
    rows, comparisons = _lost_tables(bench, cpu, released, bounds)
    columns = ["server", *(f"works on after a client left {kind}, ms" for kind in asks)]
    both = {"cpu": cpu, "metrics": released}
    return Table("Lost clients", columns, rows, both, notes, comparisons)


def _lost_tables(
    bench: Bench,
    cpu: dict[str, dict[str, list[float]]],
    released: dict[str, list[float]],
    bounds: list[float],
) -> tuple[list[list[str]], list[Comparison]]:
    names = dict.fromkeys(name for own in cpu.values() for name in own)
    rows = [[name, *(ms(own[name], 0) for own in cpu.values())] for name in names]
    rows.append([f"{OURS}, by /metrics", *(ms(own, 0) for own in released.values())])
    comparisons = []
    for kind, own in cpu.items():
        what = f"work after a client left, {kind}"
        comparisons += bench.against(what, "ms", own)
        comparisons.append(Comparison(what, "ms", own[OURS], bounds, BOUND, at_most(1)))
    return rows, comparisons


BOUND = "a step and a chunk"


def _notes(num_prompt: int, max_tokens: int) -> list[str]:
    return [
        f"Asked for: {max_tokens} tokens, left after 16; a prompt of {num_prompt}, left after "
        f"{LEAVE_AFTER_S} s; {max_tokens} tokens not streamed, left after {LEAVE_AFTER_S} s. "
        f"Measured from the server's CPU time every {1000 * SAMPLE_S:.0f} ms, for all alike: it "
        "works while it uses a quarter of what it used before. On a GPU a long chunk may use less. "
        "By /metrics: until no request is running.",
        f"“{BOUND}” is our own median gap between tokens, the time of "
        f"{CHUNK_TOKENS} prompt tokens at the rate of such a prompt undisturbed, and two samples.",
    ]


async def _step_and_chunk(bench: Bench, served: Served, num_prompt: int) -> float:
    """Seconds of a step that decodes, of a chunk, and of the watching."""
    asked = bench.writer.request(num_prompt, 32)
    trace = (await served.run(Plan([[asked]]))).checked()
    chunk_s = trace.streams[0].ttft_s * min(1.0, CHUNK_TOKENS / num_prompt)
    return median(trace.gaps()) + chunk_s + 2 * SAMPLE_S


async def _watched(served: Served, request: Request) -> float:
    """Seconds for which the server works on after the client has left."""
    await served.settle()
    samples: list[Sample] = [Sample(perf_counter(), cpu_s(served.pid))]
    client = asyncio.ensure_future(served.run_here(Plan([[request]])))
    quiet_from_s = give_up_s = perf_counter() + _GIVE_UP_S
    while perf_counter() < min(quiet_from_s + _QUIET_S, give_up_s):
        await asyncio.sleep(SAMPLE_S)
        samples.append(Sample(perf_counter(), cpu_s(served.pid)))
        left_s = client.result()[0].left_s if client.done() else None
        if left_s is not None and len(samples) > 2:
            quiet_from_s = left_s + stopped_s(samples, left_s)
        elif client.done():
            raise TooQuick
    assert left_s is not None
    return max(SAMPLE_S, stopped_s(samples, left_s))  # less cannot be told


async def _released(served: Served, request: Request) -> float:
    """Seconds until /metrics counts no running request."""
    await served.settle()
    left_s = (await served.run_here(Plan([[request]])))[0].left_s
    if left_s is None:
        raise TooQuick
    running = "vllm:num_requests_running"
    while any(v for k, v in (await served.metrics()).items() if k.startswith(running)):
        pass  # each look is a request of its own, and the server's loop is free to answer it
    return perf_counter() - left_s
