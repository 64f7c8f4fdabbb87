"""Lost clients: how long a server works on a request after its client has disconnected.

Work is read off the server's CPU time, by the same rule for all servers.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter

from bench.compare import Comparison, at_most
from bench.measurements.pairs import NUM_ROWS, Bench, runs
from bench.peers import OURS
from bench.plan import Plan, Request
from bench.report import Table
from bench.serving import Served, cpu_s

CHUNK_TOKENS = 2048  # --prefill-chunk-size without running rows
LEAVE_AFTER_S = 0.25
SAMPLE_S = 0.02
BOUND = "a step and a chunk"
_BUSY = 0.25  # of the CPU use before the client left
_LEAST = 0.1  # of a core, more than an idle server's timers
_QUIET_S = 0.4  # without work, after which there is none
_GIVE_UP_S = 180.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A process's CPU time at a moment, both in seconds."""

    at_s: float
    cpu_s: float


def stopped_s(samples: Sequence[Sample], left_s: float) -> float:
    """Seconds after `left_s` for which a process worked: until the end of the last stretch between
    two samples with a quarter of the CPU use before it, and a tenth of a core.
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
    """An answer was complete before its client left, as with a small model on a GPU."""


async def lost(bench: Bench) -> Table:
    """A client leaves in decode, in prefill, and during an answer that is not streamed."""
    # Of some chunks, of ours and of mlx-lm's; less in a short run: mlx-lm's server finishes them.
    num_prompt, max_tokens = (4500, 1500) if bench.scale.has_parts else (3000, 500)
    num_prompt = min(num_prompt, bench.inprocess.model.context_size * 3 // 4)
    ask = bench.writer.request
    asks = {
        "in decode": lambda: replace(ask(32, max_tokens), leave_after_tokens=16),
        "in prefill": lambda: replace(ask(num_prompt, 64), leave_after_s=LEAVE_AFTER_S),
        "unstreamed": lambda: replace(
            ask(32, max_tokens), is_streamed=False, leave_after_s=LEAVE_AFTER_S
        ),
    }
    notes = [
        f"Requested: {max_tokens} tokens, left after 16; a prompt of {num_prompt}, left after "
        f"{LEAVE_AFTER_S} s; {max_tokens} tokens not streamed, left after {LEAVE_AFTER_S} s. "
        f"The server's CPU time is read every {1000 * SAMPLE_S:.0f} ms: it works while it uses a "
        "quarter of its use before. On a GPU a long chunk may use less.",
        f"“{BOUND}”: our own median gap between tokens, the time of {CHUNK_TOKENS} prompt tokens "
        "at the rate of such a prompt alone, and two samples.",
    ]
    cpu: dict[str, dict[str, list[float]]] = {kind: {} for kind in asks}
    bounds: list[float] = []
    async with bench.servers(NUM_ROWS) as servers:
        warm_up = Plan([[bench.writer.request(512, 32)]])  # compiles kernels
        await bench.one_pair(runs(servers), warm_up)
        for _ in range(bench.scale.num_pairs):
            bounds.append(await _step_and_chunk(bench, servers[OURS], num_prompt))
            for kind, make in list(asks.items()):
                try:
                    for name, served in servers.items():
                        if name not in bench.failures:
                            with bench.excused(name):
                                seconds = await _watched(served, make())
                                cpu[kind].setdefault(name, []).append(seconds)
                except TooQuick:
                    del asks[kind], cpu[kind]
                    notes.append(f"{kind}: an answer was complete before its client left.")
    comparisons = []
    for kind, own in cpu.items():
        what = f"work after a client left, {kind}"
        comparisons += bench.against(what, "ms", own)
        comparisons.append(Comparison(what, "ms", own[OURS], bounds, BOUND, at_most(1)))
    return Table("Lost clients", figures=cpu, notes=notes, comparisons=comparisons)


async def _step_and_chunk(bench: Bench, served: Served, num_prompt: int) -> float:
    """Seconds of a decode step, of a chunk, and of two samples."""
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
    return max(SAMPLE_S, stopped_s(samples, left_s))  # the resolution
