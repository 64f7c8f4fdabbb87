"""The demo in a process of its own, and what every attempt on it needs: requests, gauges, a table.

Linux only (/proc).
"""

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from bench.serving import HOST, free_port, rss_bytes

CHAT = "/v1/chat/completions"
MIB = 1 << 20
WORDS = "river window python banana little house garden table story winter".split()  # noqa: SIM905


@dataclass
class Server:
    port: int
    process: asyncio.subprocess.Process

    def rss_bytes(self) -> int:
        return rss_bytes(self.process.pid)

    async def sample(self, name: str) -> float:
        """A metric, its labels added up."""
        lines = (await asked(self.port, "/metrics"))[1].decode().splitlines()
        found = [line.rpartition(" ") for line in lines if line.partition("{")[0] == name]
        found += [line.rpartition(" ") for line in lines if line.startswith(f"{name} ")]
        return sum(float(value) for _, _, value in found)


@dataclass
class Report:
    """The table: an attempt, what was measured, its bound, and whether it held."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def add(self, attempt: str, value: float, most: float, unit: str = "") -> None:
        """A measurement that must be at most `most`."""
        self.rows.append((attempt, f"{value:.3g}{unit}", f"≤ {most:.3g}{unit}", value <= most))
        print(" | ".join(map(str, self.rows[-1])), flush=True)


@asynccontextmanager
async def served(*flags: str, output: int = asyncio.subprocess.DEVNULL) -> AsyncIterator[Server]:
    """The demo, ready."""
    port = free_port()
    command = [sys.executable, "-m", "mlxlite", "--port", str(port), *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
    try:
        while True:
            with contextlib.suppress(ConnectionError):
                if await ask(port, "/health") == 200:
                    break
            await asyncio.sleep(0.1)
        yield Server(port, process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ask(
    port: int,
    path: str,
    body: bytes | Path = b"",
    key: str = "",
    on_line: Callable[[bytes], None] | None = None,
) -> int:
    """One request on its own connection, to its end; the status. Lines go to `on_line`.

    A body in a file is sent by the system, which costs this process no time.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    length = len(body) if isinstance(body, bytes) else os.path.getsize(body)  # noqa: ASYNC240
    method = "POST" if length else "GET"
    head = f"{method} {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {length}\r\n"
    writer.write((head + (f"x-api-key: {key}\r\n" if key else "") + "\r\n").encode())
    if isinstance(body, bytes):
        writer.write(body)
    else:
        with body.open("rb") as file:
            await asyncio.get_running_loop().sendfile(writer.transport, file)
    try:
        status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if on_line is not None:
                on_line(line)
        return status
    finally:
        writer.close()


async def asked(port: int, path: str, body: bytes = b"", key: str = "") -> tuple[int, bytes]:
    """The status and the body of an answer, as for `ask`."""
    lines: list[bytes] = []
    status = await ask(port, path, body, key, lines.append)
    return status, b"".join(lines).partition(b"\r\n\r\n")[2]


def chat(rng: random.Random, num_words: int, **fields: Any) -> bytes:
    text = " ".join(rng.choice(WORDS) for _ in range(num_words))
    body = {"messages": [{"role": "user", "content": text}], "ignore_eos": True, **fields}
    return json.dumps(body).encode()


class Watch:
    """The most memory of a process, and the longest answer of /health, while it is entered."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.peak_bytes, self.health_s = 0, 0.0

    async def __aenter__(self) -> "Watch":
        self._tasks = [asyncio.create_task(self._memory()), asyncio.create_task(self._health())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _memory(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, self._server.rss_bytes())
            await asyncio.sleep(0.005)

    async def _health(self) -> None:
        while True:
            began_at = perf_counter()
            reader, writer = await asyncio.open_connection(HOST, self._server.port)
            writer.write(
                f"GET /health HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n".encode()
            )
            await reader.read()
            writer.close()
            self.health_s = max(self.health_s, perf_counter() - began_at)
            await asyncio.sleep(0.02)


def is_text(line: bytes) -> bool:
    """Whether a line of a stream is a frame with some text."""
    return (b'"content":"' in line and b'"content":""' not in line) or b'"text":"' in line


@dataclass
class Streams:
    """Two clients in closed loops, each of whose streams must be whole."""

    num_whole: int = 0
    num_cut: int = 0
    is_over: bool = False

    @asynccontextmanager
    async def beside(self, port: int) -> AsyncIterator[None]:
        await self._one(port, 0)
        tasks = [asyncio.create_task(self._loop(port, i)) for i in range(2)]
        yield
        self.is_over = True
        await asyncio.gather(*tasks)

    async def _loop(self, port: int, number: int) -> None:
        while not self.is_over:
            await self._one(port, number)

    async def _one(self, port: int, number: int) -> None:
        lines: list[bytes] = []
        body = chat(random.Random(number), 8, max_tokens=64, stream=True, cache_prompt=False)
        status = await ask(port, CHAT, body, on_line=lines.append)
        is_whole = status == 200 and b"data: [DONE]\n" in lines and sum(map(is_text, lines)) > 0
        self.num_whole += is_whole
        self.num_cut += not is_whole
