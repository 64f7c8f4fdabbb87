"""Abuse of resources, attempted against the demo in a process of its own; one table of results.

    python -m tests.robustness.abuse                  # all, about four minutes on two cores
    python -m tests.robustness.abuse bodies shares    # some; --help lists them

Each attempt has a bound; the exit code is 1 if one is broken. Seeded. Linux only (/proc).
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import signal
import statistics
import sys
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from PIL import Image

from bench.serving import HOST, free_port, rss_bytes
from tests.support import bombs

CHAT = "/v1/chat/completions"
MIB = 1 << 20
KEPT_IMAGES = 128 * MIB  # processed images that the server keeps, beside a request's
BODY_BYTES = 60 * MIB  # the default limit is 64 MB
TEXTS = {"a b": "a ", "blanks": " ", "digits": "7", "CJK": "模型", "marks": "!?"}
PATHS: dict[str, Callable[[str], str]] = {  # endpoint: a body around a JSON string
    CHAT: '{{"messages": [{{"role": "user", "content": {0}}}]}}'.format,
    "/v1/messages": '{{"max_tokens": 5, "messages": [{{"role": "user", "content": {0}}}]}}'.format,
    "/v1/responses": '{{"input": {0}}}'.format,
    "/v1/completions": '{{"prompt": {0}}}'.format,
    "/v1/embeddings": '{{"input": {0}}}'.format,
    "/tokenize": '{{"content": {0}}}'.format,
}
WORDS = "river window python banana little house garden table story winter".split()  # noqa: SIM905


@dataclass
class Server:
    port: int
    process: asyncio.subprocess.Process

    def rss_bytes(self) -> int:
        return rss_bytes(self.process.pid)


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
    body: bytes = b"",
    key: str = "",
    on_line: Callable[[bytes], None] | None = None,
) -> int:
    """One request on its own connection, to its end; the status. Lines go to `on_line`."""
    reader, writer = await asyncio.open_connection(HOST, port)
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    writer.write((head + (f"x-api-key: {key}\r\n" if key else "") + "\r\n").encode())
    writer.write(body)
    try:
        status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if on_line is not None:
                on_line(line)
        return status
    finally:
        writer.close()


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


# --- the attempts -----------------------------------------------------------------------------


async def bodies(report: Report) -> None:
    """The largest bodies of the densest texts, at every endpoint that takes text."""
    async with served() as server:
        start = server.rss_bytes()
        worst = {"growth": 0.0, "health": 0.0, "accepted": 0.0}
        for text in TEXTS.values():
            string = json.dumps(text * (BODY_BYTES // len(text.encode())), ensure_ascii=False)
            for path, around in PATHS.items():
                body = around(string).encode()
                async with Watch(server) as watch:
                    status = await ask(server.port, path, body)
                worst["accepted"] += status != 400
                growth = (watch.peak_bytes - start) / len(body)
                worst["growth"] = max(worst["growth"], growth)
                worst["health"] = max(worst["health"], watch.health_s)
        await asyncio.sleep(2)
        report.add("60 MiB of text: memory, in bodies", worst["growth"], 3.2)
        report.add("60 MiB of text: /health", worst["health"], 0.5, " s")
        report.add("60 MiB of text: answers but 400", worst["accepted"], 0)
        left = (server.rss_bytes() - start) / MIB
        report.add("60 MiB of text: memory afterwards", left, 50, " MiB")


@dataclass
class Clients:
    """Clients of two keys in closed loops: their tokens, and the TTFTs of the second key's."""

    port: int
    num_tokens: dict[str, int] = field(default_factory=lambda: {"many": 0, "few": 0})
    first_s: list[float] = field(default_factory=list)

    async def loop(self, key: str, number: int, num_prompts: int = 1) -> None:
        rng = random.Random(f"{key} {number}")
        while True:
            if await self._ask(key, rng, num_prompts) != 200:
                await asyncio.sleep(rng.random())

    async def _ask(self, key: str, rng: random.Random, num_prompts: int) -> int:
        began_at, is_first = perf_counter(), True

        def line(data: bytes) -> None:
            nonlocal is_first
            if (b'"content":"' in data and b'"content":""' not in data) or b'"text":"' in data:
                self.num_tokens[key] += 1
                if is_first and key == "few":
                    self.first_s.append(perf_counter() - began_at)
                is_first = False

        fields: dict[str, Any] = {"max_tokens": 32, "stream": True}
        if num_prompts == 1:
            return await ask(self.port, CHAT, chat(rng, 16, **fields), key, line)
        prompts = [f"{rng.random()} {i}" for i in range(num_prompts)]
        body = json.dumps({"prompt": prompts, "ignore_eos": True, **fields}).encode()
        return await ask(self.port, "/v1/completions", body, key, line)

    def take(self) -> tuple[float, float]:
        """The second key's share of the tokens and its TTFT p99 in seconds, since the last call."""
        share = self.num_tokens["few"] / sum(self.num_tokens.values())
        p99_s = statistics.quantiles(self.first_s, n=100)[-1]
        self.num_tokens.update(many=0, few=0)
        self.first_s.clear()
        return share, p99_s


async def shares(report: Report) -> None:
    """A key with eight clients beside one with 500, and beside one with requests of 64 prompts."""
    flags = ("--api-key", "many,few", "--max-batch-size", "16", "--log-level", "warning")
    for name, num_clients, num_prompts in (("500 clients", 500, 1), ("64 prompts", 20, 64)):
        async with served(*flags) as server:
            clients = Clients(server.port)
            tasks = [asyncio.create_task(clients.loop("few", i)) for i in range(8)]
            await asyncio.sleep(8)
            _, alone_s = clients.take()
            many = (clients.loop("many", i, num_prompts) for i in range(num_clients))
            tasks += [asyncio.create_task(each) for each in many]
            await asyncio.sleep(4)
            clients.take()
            await asyncio.sleep(15)
            share, beside_s = clients.take()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            report.add(f"beside {name}: tokens of the larger key", 1 - share, 0.6)
            report.add(f"beside {name}: TTFT p99, by that alone", beside_s / alone_s, 3)


async def memory(report: Report) -> None:
    """Bursts of 24 prompts of 20 to 600 words under a memory limit."""
    limit = 200_000_000
    flags = ("--memory-limit", str(limit), "--max-batch-size", "16", "--log-level", "warning")
    async with served(*flags) as server:
        start, rng = server.rss_bytes(), random.Random(1)
        async with Watch(server) as watch:
            for num_words in (20, 200, 600):
                prompts = [chat(rng, num_words, max_tokens=16) for _ in range(24)]
                await asyncio.gather(*(ask(server.port, CHAT, body) for body in prompts))
        taken = (watch.peak_bytes - start) / limit
        report.add("a burst under --memory-limit 200MB: by the limit", taken, 1.15)


async def readers(report: Report) -> None:
    """A million tokens as text, in one answer, to a reader of 10 MB a second."""
    async with served("--ctx-size", "8192") as server:
        ids = list(range(600, 1100)) * 2000  # with its text twice, about 10 MB
        body = json.dumps({"tokens": ids}).encode()
        reader, writer = await asyncio.open_connection(HOST, server.port, limit=1 << 16)
        head = f"POST /detokenize HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        wanted = int(answer.lower().partition(b"content-length:")[2].split()[0])
        got = 0
        while data := await reader.read(1 << 16):
            got += len(data)
            await asyncio.sleep(len(data) / 10e6)
        writer.close()
        report.add(
            f"an answer of {wanted / 1e6:.0f} MB, read slowly: bytes missing", wanted - got, 0
        )


def pictures(*images: bytes) -> bytes:
    """A chat about images, which may be anything."""
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": f"data:;base64,{b64encode(data).decode()}"}}
        for data in images
    ]
    parts.append({"type": "text", "text": "What is in the pictures?"})
    return json.dumps({"messages": [{"role": "user", "content": parts}], "max_tokens": 2}).encode()


def photo(num_bytes: int) -> bytes:
    """A PNG of noise, which takes as many bytes."""
    side = int((num_bytes / 3) ** 0.5)
    image = Image.frombytes("RGB", (side, side), bombs.noise(3 * side * side))
    return bombs.saved(image, "PNG", compress_level=0)


async def images(report: Report) -> None:
    """The largest bodies of images; then images of endless work from clients that leave."""
    async with served("--model", "tests/support/vlm_demo", "--max-body-mb", "512") as server:
        small = pictures(photo(1000))
        await ask(server.port, CHAT, small)
        start = server.rss_bytes()
        for num, size in ((2, 20), (16, 2.8), (16, 19)):
            name, body = f"{num} images of {size} MiB", pictures(*[photo(int(size * MIB))] * num)
            async with Watch(server) as watch:
                status = await ask(server.port, CHAT, body)
            growth = (watch.peak_bytes - start - KEPT_IMAGES) / len(body)
            report.add(f"{name}: memory, in bodies", growth if status == 200 else math.inf, 3.5)
            if len(body) <= 64 * MIB:
                report.add(f"{name}: /health", watch.health_s, 0.5, " s")
        slow, worst_s = pictures(bombs.jpeg_with(b"\xff" * 18 * MIB)), 0.0
        for _ in range(5):
            leaving = [asyncio.create_task(ask(server.port, CHAT, slow)) for _ in range(4)]
            await asyncio.sleep(2)
            for task in leaving:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)
            began_at = perf_counter()
            await ask(server.port, CHAT, small)
            worst_s = max(worst_s, perf_counter() - began_at)
        report.add("an image after 4 endless ones whose clients left", worst_s, 0.5, " s")
        await asyncio.sleep(2)
        left = (server.rss_bytes() - start) / MIB
        report.add("images: memory afterwards", left, 200, " MiB")


async def logs(report: Report) -> None:
    """Stdout and stderr are a pipe that nothing reads: 2,000 answers, then SIGTERM."""
    reading, writing = os.pipe()
    async with served("--log-level", "debug", output=writing) as server:
        rng, num_answered = random.Random(1), 0
        for _ in range(100):
            some = (ask(server.port, CHAT, chat(rng, 2, max_tokens=1)) for _ in range(20))
            num_answered += (await asyncio.gather(*some)).count(200)
        report.add("stderr unread: of 2,000 not answered", 2000 - num_answered, 0)
        began_at = perf_counter()
        server.process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(server.process.wait(), 20)
        report.add("stderr unread: SIGTERM to the end", perf_counter() - began_at, 2, " s")
    os.close(writing)
    os.close(reading)


ATTEMPTS: dict[str, Callable[[Report], Awaitable[None]]] = {
    attempt.__name__: attempt for attempt in (bodies, shares, memory, readers, images, logs)
}


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("attempts", nargs="*", metavar="attempt", help=f"some of {[*ATTEMPTS]}")
    report = Report()
    for name in parser.parse_args().attempts or ATTEMPTS:
        await ATTEMPTS[name](report)
    return int(not all(is_held for *_, is_held in report.rows))


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
