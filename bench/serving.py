"""The real server as a subprocess, the load generator as another, and what /metrics says.

Both get this process's environment, so that a preloaded BLAS and thread counts hold for all arms.
"""

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from bench.load import HOST
from bench.plan import Plan, Trace

_READY = re.compile(r"\[mlx\] server is listening on .*:(\d+)")
_SAMPLE = re.compile(r"^([^#\s{]+(?:\{[^}]*\})?) (\S+)$", re.MULTILINE)
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "sequence memory",
    "mlxlite:connections": "connections",
}
_START_TIMEOUT_S = 120.0
_RUN_TIMEOUT_S = 900.0  # a plan that takes longer is stuck
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Served:
    """A server that is ready."""

    port: int
    pid: int

    async def run(self, plan: Plan) -> Trace:
        """Carry a plan out from the load generator's own process. Raises when that fails."""
        bodies = {
            name: [[request.body() for request in requests] for requests in clients]
            for name, clients in (("first", plan.first), ("then", plan.then))
        }
        given = bodies | {"after_tokens": plan.after_tokens, "is_cut": plan.is_cut}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.load"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        wanted = orjson.dumps({"port": self.port, "plan": given})
        try:
            output, _ = await asyncio.wait_for(process.communicate(wanted), _RUN_TIMEOUT_S)
        finally:
            await stop(process)
        if process.returncode != 0:
            raise RuntimeError(f"the load generator failed with status {process.returncode}")
        return Trace.from_json(orjson.loads(output))

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

    def cpu_s(self) -> float:
        """What the process has computed so far: a busy machine changes it little."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # user and system

    def rss_mib(self) -> float:
        """Of the process, where the system has /proc."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@asynccontextmanager
async def serve(
    path: Path | None,
    max_batch_size: int,
    *more: str,
    program: Sequence[str] = ("-m", "mlxlite"),
    log: IO[bytes] | None = None,
) -> AsyncIterator[Served]:
    """Start the server over a checkpoint or the demo, with `more` flags; stopped on the way out.

    `program` is what Python runs, and `log` where its stderr goes. Raises RuntimeError with the end
    of that when it does not become ready.
    """
    flags = {"--model": path, "--port": 0, "--max-batch-size": max_batch_size}
    arguments = [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
    with nullcontext(log) if log is not None else tempfile.TemporaryFile() as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *program, *arguments, *more),
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
        )
        try:
            port = await asyncio.wait_for(_ready(process), _START_TIMEOUT_S)
            if port is None:
                log.seek(0)
                end = log.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"the server did not start:\n{end}")
            yield Served(port, process.pid)
        finally:
            await stop(process)


async def _ready(process: asyncio.subprocess.Process) -> int | None:
    """The port, once the server says that it listens; None when it ends instead."""
    assert process.stdout is not None
    async for line in process.stdout:
        if match := _READY.match(line.decode(errors="replace")):
            return int(match[1])
    return None


async def stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
