"""Servers and the load generator as subprocesses; their /metrics, CPU time and memory.

All of them get this process's environment, so that a preloaded BLAS and thread counts hold for all
arms. A server is always stopped on the way out.
"""

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
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

_SAMPLE = re.compile(r"^([^#\s{]+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
_START_TIMEOUT_S = 180.0
_RUN_TIMEOUT_S = 900.0  # of one plan
_STOP_TIMEOUT_S, _SETTLE_TIMEOUT_S = 10.0, 300.0
_LOOK_S = 0.1  # over which a server's CPU time is compared
_IDLE_SHARE = 0.05  # of a core; an idle mlx_lm.server polls its queue ten times a second
_RETRY_S = 0.01


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready. `model` is the name that requests must have, if they must."""

    port: int
    pid: int
    model: str | None = None
    listening_s: float = 0.0  # from its start to the first accepted connection
    ready_s: float = 0.0  # to the first answer

    async def run(self, plan: Plan) -> Trace:
        """Carry a plan out from the load generator's own process. Raises RuntimeError."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.load"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        wanted = orjson.dumps({"port": self.port, "model": self.model, "plan": plan.as_json()})
        try:
            output, _ = await asyncio.wait_for(process.communicate(wanted), _RUN_TIMEOUT_S)
        finally:
            await _stop(process)
        if process.returncode != 0:
            raise RuntimeError(f"the load generator failed with status {process.returncode}")
        if plan.is_cut:
            await self.settle()
        return Trace.from_json(orjson.loads(output))

    async def run_here(self, plan: Plan) -> list[Stream]:
        """Carry a small plan out in this process."""
        return await load.run({"port": self.port, "model": self.model, "plan": plan.as_json()})

    async def settle(self) -> None:
        """Wait until it is idle, so that no later measurement includes work of an earlier one."""
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


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads, ended ones included. Raises OSError if the process is gone."""
    if sys.platform == "linux":
        # The clock id of clock_getcpuclockid(3): the complement of the pid, and 2 for CPU time.
        return time.clock_gettime((~pid << 3) | 2)
    minutes, _, seconds = _ps(pid, "time").rpartition(":")
    hours, _, minutes = minutes.rpartition(":")
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def rss_bytes(pid: int) -> int:
    """Resident memory. Raises OSError if the process is gone."""
    if sys.platform == "linux":
        num_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return num_pages * os.sysconf("SC_PAGE_SIZE")
    return 1024 * int(_ps(pid, "rss"))


def _ps(pid: int, column: str) -> str:
    command = ["ps", "-o", f"{column}=", "-p", str(pid)]
    value = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not value:
        raise ProcessLookupError(pid)
    return value


def free_port() -> int:
    """A port without a listener at the moment."""
    with socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def started(
    command: Sequence[str],
    port: int,
    model: str | None = None,
    log: IO[bytes] | None = None,
    kernels: Path | None = None,
) -> AsyncIterator[Served]:
    """Start a server and wait for its first answer. `log` gets its output. In `kernels` MLX's CPU
    back end keeps what it compiles, instead of in the temporary directory that earlier runs filled.

    Raises RuntimeError with the end of the log if there is no answer in time.
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
            await _stop(process)


async def _listening(process: asyncio.subprocess.Process, port: int) -> None:
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(HOST, port)
            writer.close()
            return
        await _pause(process)


async def _ready(process: asyncio.subprocess.Process, served: Served) -> None:
    """Request a token until there is one: some servers listen early and answer 503, others wait.

    Raises RuntimeError with any other error, which is permanent.
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
    """Raises ProcessLookupError if the server has ended."""
    if process.returncode is not None:
        raise ProcessLookupError(process.pid)
    await asyncio.sleep(_RETRY_S)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
