"""Servers as subprocesses, the load generator as another, and what /metrics says of ours.

All get this process's environment, so that a preloaded BLAS and thread counts hold for all arms.
Who else is compared is `bench.peers`'s to say; a server is stopped on the way out, always.
"""

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from socket import socket
from time import perf_counter
from typing import IO

import orjson

from bench import load
from bench.load import HOST
from bench.plan import Plan, Request, Stream, Trace
from bench.processes import cpu_s

_SAMPLE = re.compile(r"^([^#\s{]+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "sequence memory",
    "mlxlite:connections": "connections",
}
_START_TIMEOUT_S = 180.0
_RUN_TIMEOUT_S = 900.0  # a plan that takes longer is stuck
_STOP_TIMEOUT_S = 10.0
_SETTLE_TIMEOUT_S = 300.0
_LOOK_S = 0.1  # over so long a server's CPU time is compared
_IDLE_SHARE = 0.05  # of a core; mlx_lm.server looks at its queue ten times a second
_RETRY_S = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready. `model` is what requests must call it, where they must."""

    port: int
    pid: int
    model: str | None = None
    listening_s: float = 0.0  # from its start to the first connection it took
    ready_s: float = 0.0  # to the first answer

    async def run(self, plan: Plan) -> Trace:
        """Carry a plan out from the load generator's own process. Raises when that fails."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.load"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        wanted = orjson.dumps({"port": self.port, "model": self.model, "plan": plan.as_json()})
        try:
            output, _ = await asyncio.wait_for(process.communicate(wanted), _RUN_TIMEOUT_S)
        finally:
            await stop(process)
        if process.returncode != 0:
            raise RuntimeError(f"the load generator failed with status {process.returncode}")
        if plan.is_cut:
            await self.settle()
        return Trace.from_json(orjson.loads(output))

    async def run_here(self, plan: Plan) -> list[Stream]:
        """Carry a small plan out in this process, for whoever watches the server meanwhile."""
        return await load.run({"port": self.port, "model": self.model, "plan": plan.as_json()})

    async def settle(self) -> None:
        """Wait until it does nothing any more, so that nobody pays for what others left behind."""
        deadline = perf_counter() + _SETTLE_TIMEOUT_S
        while perf_counter() < deadline:
            before = cpu_s(self.pid)
            await asyncio.sleep(_LOOK_S)
            if cpu_s(self.pid) - before < _IDLE_SHARE * _LOOK_S:
                return
        raise RuntimeError(f"the server was still busy after {_SETTLE_TIMEOUT_S:.0f} s")

    async def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, by its name with labels."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        head = f"GET /metrics HTTP/1.1\r\nhost: {HOST}:{self.port}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode())
        text = (await reader.read()).decode(errors="replace").partition("\r\n\r\n")[2]
        writer.close()
        return {match[1]: float(match[2]) for match in _SAMPLE.finditer(text)}

    async def gauges(self) -> dict[str, float]:
        """What is zero at rest."""
        found: dict[str, float] = {}
        for key, value in (await self.metrics()).items():
            if name := _GAUGES.get(key.partition("{")[0]):
                found[name] = found.get(name, 0) + value
        found["connections"] -= 1  # the one that this came over
        return found


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def our_command(
    path: Path | None,
    port: int,
    max_batch_size: int,
    *more: str,
    program: Sequence[str] = ("-m", "mlxlite"),
) -> list[str]:
    """`program` is what Python runs; without a path it serves the demo."""
    flags = {"--model": path, "--port": port, "--max-batch-size": max_batch_size}
    arguments = [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
    return [sys.executable, *program, *arguments, *more]


@asynccontextmanager
async def serve(
    path: Path | None,
    max_batch_size: int,
    *more: str,
    program: Sequence[str] = ("-m", "mlxlite"),
    log: IO[bytes] | None = None,
) -> AsyncIterator[Served]:
    """Start our server over a checkpoint or the demo, with `more` flags; stopped on the way out.

    `log` has what it says. Raises RuntimeError with the end of that when it does not become ready.
    """
    port = free_port()
    command = our_command(path, port, max_batch_size, *more, program=program)
    async with started(command, port, log=log) as served:
        yield served


@asynccontextmanager
async def started(
    command: Sequence[str],
    port: int,
    model: str | None = None,
    log: IO[bytes] | None = None,
    kernels: Path | None = None,
) -> AsyncIterator[Served]:
    """Start a server and wait for its first answer. `kernels`: where MLX's CPU back end is to keep
    what it compiles, instead of the temporary directory that earlier runs have filled.

    Raises RuntimeError with the end of its log when there is none in time.
    """
    with nullcontext(log) if log is not None else tempfile.TemporaryFile() as log:
        begun_at = perf_counter()
        environ = os.environ | ({} if kernels is None else {"TMPDIR": str(kernels)})
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, env=environ
        )
        served = Served(port, process.pid, model)
        try:
            try:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await _listening(process, port)
                    listening_s = perf_counter() - begun_at
                    await _ready(process, served)
            except (TimeoutError, ProcessLookupError):
                log.seek(0)
                end = log.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"{' '.join(command)}: not ready:\n{end}") from None
            ready_s = perf_counter() - begun_at
            yield replace(served, listening_s=listening_s, ready_s=ready_s)
        finally:
            await stop(process)


async def _listening(process: asyncio.subprocess.Process, port: int) -> None:
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            return
        await _pause(process)


async def _ready(process: asyncio.subprocess.Process, served: Served) -> None:
    """Ask for a token until there is one: some servers listen first and say 503, others hold on.

    Raises RuntimeError with any other refusal: it will not become better.
    """
    plan = Plan([[Request("Hi", (), 1, is_streamed=False)]])
    while True:
        with suppress(OSError):
            (stream,) = await served.run_here(plan)
            if stream.error is None:
                return
            if stream.opened_s is not None and " 503 " not in stream.error[:13]:
                raise RuntimeError(stream.error)
        await _pause(process)


async def _pause(process: asyncio.subprocess.Process) -> None:
    """Raises ProcessLookupError when the server has ended instead."""
    if process.returncode is not None:
        raise ProcessLookupError(process.pid)
    await asyncio.sleep(_RETRY_S)


async def stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
