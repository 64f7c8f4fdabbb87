"""Abuse of resources, attempted against the demo in a process of its own; one table of results.

    python -m tests.robustness.abuse                  # all, about ten minutes on two cores
    python -m tests.robustness.abuse bodies shares    # some; --help lists them

Each attempt has a bound; the exit code is 1 if one is broken. Seeded. Linux only (/proc).
"""

import argparse
import asyncio
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
from base64 import b64encode
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from PIL import Image

from bench.serving import HOST
from tests.robustness import crowds
from tests.robustness.demo import CHAT, MIB, Report, Streams, Watch, ask, chat, is_text, served
from tests.support import bombs

KEPT_IMAGES = 128 * MIB  # processed images that the server keeps, beside a request's
BODY_BYTES = 60 * MIB  # the default limit is 64 MB
DEMO, LAST_TOKEN = Path("mlxlite/demo"), 1151
TEXTS = (  # in JSON: what is repeated, and an end, which may make all of a Python string wide
    *(("a ", ""), (" ", ""), ("7", ""), ("模型", ""), ("!?", "")),
    *(
        ("a ", "\U0001f600"),
        ("a", '\\"\U0001f600'),
        ("7,", "模"),
        ("\\ud83d\\ude00", ""),
        ('\\"', "é"),
    ),
)
PATHS: dict[str, Callable[[str], str]] = {  # endpoint: a body around a JSON string
    CHAT: '{{"messages": [{{"role": "user", "content": {0}}}]}}'.format,
    "/v1/messages": '{{"max_tokens": 5, "messages": [{{"role": "user", "content": {0}}}]}}'.format,
    "/v1/responses": '{{"input": {0}}}'.format,
    "/v1/completions": '{{"prompt": {0}}}'.format,
    "/v1/embeddings": '{{"input": {0}}}'.format,
    "/tokenize": '{{"content": {0}}}'.format,
}


def write_body(file: Path, path: str, string: str, end: str) -> None:
    """A body of `BODY_BYTES` with a JSON string that is one text again and again, and `end`."""
    num = (BODY_BYTES - len(end)) // len(string.encode())
    file.write_text(PATHS[path](f'"{string * num}{end}"'))


async def apart(pool: ProcessPoolExecutor, work: Callable[..., None], *args: Any) -> None:
    """Work in another process: this one's must not delay the measurements."""
    await asyncio.get_running_loop().run_in_executor(pool, work, *args)


# --- the attempts -----------------------------------------------------------------------------


async def bodies(report: Report) -> None:
    """The largest bodies of the densest texts, at every endpoint that takes text."""
    streams, num = Streams(), len(TEXTS) * len(PATHS)
    worst = {"growth": 0.0, "health": 0.0, "accepted": 0.0}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        file = Path(folder, "body")
        async with served() as server, streams.beside(server.port):
            start = server.rss_bytes()
            for path, (string, end) in product(PATHS, TEXTS):
                await apart(pool, write_body, file, path, string, end)
                before = server.rss_bytes()
                async with Watch(server) as watch:
                    worst["accepted"] += await ask(server.port, path, file) != 400
                growth = (watch.peak_bytes - before) / BODY_BYTES
                worst["growth"] = max(worst["growth"], growth)
                worst["health"] = max(worst["health"], watch.health_s)
            await asyncio.sleep(2)
            left = (server.rss_bytes() - start) / MIB
    name = f"{num} bodies of 60 MiB"
    report.add(f"{name}: memory, in bodies", worst["growth"], 3.2)
    report.add(f"{name}: /health", worst["health"], 0.2, " s")
    report.add(f"{name}: answers but 400", worst["accepted"], 0)
    report.add(f"{name}: memory afterwards", left, 50, " MiB")
    report.add(f"{name}: of {streams.num_whole} streams beside them, not whole", streams.num_cut, 0)


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
            if is_text(data):
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


def wordy_demo(folder: str) -> Path:
    """A copy of the demo that has one token of 100 characters."""
    copy = Path(shutil.copytree(DEMO, Path(folder, "wordy")))
    tokenizer = json.loads((copy / "tokenizer.json").read_bytes())
    tokenizer["added_tokens"][-1]["content"] = "x" * 100
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


@dataclass
class Slow:
    """A client of one large answer."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    num_bytes: int

    @classmethod
    async def ask(cls, port: int, num_mb: int, token: int) -> "Slow":
        body = json.dumps({"tokens": [token] * (num_mb * 5000)}).encode()  # its text twice
        reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 16)
        head = f"POST /detokenize HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        return cls(reader, writer, int(answer.lower().partition(b"content-length:")[2].split()[0]))

    async def read(self, bytes_per_s: float) -> int:
        """All that arrives, at a steady pace; its bytes."""
        began_at, num_read = perf_counter(), 0
        while data := await self.reader.read(1 << 16):
            num_read += len(data)
            await asyncio.sleep(max(0, began_at + num_read / bytes_per_s - perf_counter()))
        self.writer.close()
        return num_read


async def readers(report: Report) -> None:
    """Answers of 5, 50 and 200 MB to readers of 10 MB a second; one that stops."""
    with TemporaryDirectory() as folder:
        flags = ("--model", str(wordy_demo(folder)), "--log-level", "warning")
        async with served(*flags) as server:
            for num_mb in (5, 50, 200):
                slow = await Slow.ask(server.port, num_mb, LAST_TOKEN)
                began_at = perf_counter()
                missing = slow.num_bytes - await slow.read(10e6)
                name = f"an answer of {slow.num_bytes / 1e6:.0f} MB at 10 MB/s"
                report.add(f"{name}: bytes missing", missing, 0)
                seconds = perf_counter() - began_at
                report.add(
                    f"{name}: by the time at that pace", seconds * 10e6 / slow.num_bytes, 1.2
                )
            slow = await Slow.ask(server.port, 200, LAST_TOKEN)
            began_at = perf_counter()
            while not await server.sample("mlxlite:connections_cut_total"):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            report.add(
                "a client that stops reading: cut after", perf_counter() - began_at, 35, " s"
            )
            slow.writer.transport.abort()


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
    attempt.__name__: attempt
    for attempt in (bodies, shares, memory, readers, images, logs, *crowds.ATTEMPTS)
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
