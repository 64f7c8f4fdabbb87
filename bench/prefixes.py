"""What the prefix cache saves, and what it costs where it cannot help.

The requests of one family begin with the same words, freshly made for each pair; `mlx_lm.server`
is asked the same ones.
"""

import asyncio
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from socket import socket
from statistics import median
from time import perf_counter
from typing import Any

import orjson

from bench.load import HOST
from bench.models import Writer
from bench.plan import Plan, Request, Trace
from bench.report import Table, ms, rate, ratio
from bench.sections import Arm, Bench
from bench.serving import serve, stop
from mlxlite.blocks import blocks_of

OFF = "--no-enable-prefix-caching"
SHARED_TOKENS = 1500
NUM_TAILS = 16
NUM_AT_ONCE = (4, 8)
HASHED_TOKENS = 131_072
_START_TENTHS = 1200  # of a second, for mlx-lm's server
_TEXT = re.compile(rb'"content": ?"[^"]')


def family(bench: Bench, num_shared: int, num_tails: int) -> list[dict[str, Any]]:
    """Requests that differ in their last words only."""
    head = bench.writer.request(num_shared, 1).text
    tails = [bench.writer.request(24, 1).text for _ in range(num_tails)]
    return [
        {
            "model": str(bench.path),
            "messages": [{"role": "user", "content": f"{head} {tail}"}],
            "max_tokens": 4,
            "stream": True,
            "temperature": 0,
        }
        for tail in tails
    ]


async def prefix(bench: Bench) -> Table:
    """Time to first token: one prompt cold, its siblings warm, and several new ones at once."""
    figures: dict[str, dict[str, Any]] = {}
    async with AsyncExitStack() as stack:
        on = await stack.enter_async_context(serve(bench.path, 8))
        off = await stack.enter_async_context(serve(bench.path, 8, OFF))
        ports = {"server": on.port, "server, cache off": off.port}
        ports["mlx_lm.server"] = await stack.enter_async_context(_mlx_lm_server(bench.path))
        for name, port in ports.items():
            await _one_by_one(port, family(bench, 64, 2))
            figures[name] = {"cold": [], "warm": []} | {str(n): [] for n in NUM_AT_ONCE}
        for _ in range(bench.num_pairs):
            for name, port in ports.items():
                await _one_pair(bench, port, figures[name])
    rows = [
        [name, ms(own["cold"]), ms(own["warm"]), ratio(own["warm"], own["cold"])]
        + [f"{ms(own[str(n)])} ({ratio(own[str(n)], own['cold'])})" for n in NUM_AT_ONCE]
        for name, own in figures.items()
    ]
    begin = perf_counter()
    blocks_of(tuple(range(HASHED_TOKENS)), 1, 16)
    hash_ms = 1000 * (perf_counter() - begin)
    columns = ["arm", "cold TTFT, ms", "warm, ms", "÷ cold"]
    columns += [f"{n} new at once, ms (÷ cold)" for n in NUM_AT_ONCE]
    notes = [
        f"A shared beginning of about {SHARED_TOKENS} tokens, one ending after the other; warm is "
        f"the median of all {NUM_TAILS} but the first. At once: medians, of a beginning that is "
        "new to the server.",
        f"Hashing {HASHED_TOKENS} tokens took {hash_ms:.0f} ms (in the server: in a thread).",
    ]
    return Table("Shared beginnings", columns, rows, figures | {"hash_ms": hash_ms}, notes)


async def _one_by_one(port: int, bodies: Sequence[Mapping[str, Any]]) -> list[float]:
    return [await ttft(port, body) for body in bodies]


async def _one_pair(bench: Bench, port: int, figures: dict[str, Any]) -> None:
    cold, *warm = await _one_by_one(port, family(bench, SHARED_TOKENS, NUM_TAILS))
    figures["cold"].append(cold)
    figures["warm"].append(median(warm))
    for n in NUM_AT_ONCE:
        bodies = family(bench, SHARED_TOKENS, n)
        seconds = await asyncio.gather(*(ttft(port, body) for body in bodies))
        figures[str(n)].append(median(seconds))


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


# --- one client for all servers -----------------------------------------------------------------


async def ttft(port: int, body: Mapping[str, Any]) -> float:
    """Seconds from sending a streamed request, on a connection of its own, to its first text.

    Raises RuntimeError when there is none.
    """
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 22)
    data = orjson.dumps(body)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    begin = perf_counter()
    writer.write(head.encode() + data)
    first_s, seen = None, b""
    while chunk := await reader.read(1 << 16):
        seen += chunk
        if first_s is None and _TEXT.search(seen):
            first_s = perf_counter() - begin
    writer.close()
    if first_s is None:
        raise RuntimeError(f"no text: {seen[-300:].decode(errors='replace')}")
    return first_s


@asynccontextmanager
async def _mlx_lm_server(path: Path) -> AsyncIterator[int]:
    """mlx-lm's own server over the same checkpoint, ready; its port."""
    with socket() as probe:
        probe.bind((HOST, 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "mlx_lm", "server", "--model", str(path)),
            *("--port", str(port), "--log-level", "WARNING"),
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(_START_TENTHS):
                if await _is_open(port):
                    break
                await asyncio.sleep(0.1)
            yield port
        finally:
            await stop(process)


async def _is_open(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(HOST, port)
    except OSError:
        return False
    writer.close()
    return True
