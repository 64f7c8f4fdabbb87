"""Mixed traffic, an overload, or slow readers, against the demo model served by a second process.

    python -m tests.robustness.soak --minutes 30     # with cancels, invalid requests, slow readers
    python -m tests.robustness.soak --overload 60    # seconds of ten times what fits
    python -m tests.robustness.soak --slow 7         # pairs: fast readers beside slow, beside fast

It is the real server, but (except for `--slow`) under `python -X dev`, in asyncio's debug mode, and
with scheduler and prefix cache checked whenever it is idle. The report has the answers by status,
the memory's slope over the second half, and all of stderr. The exit code is 1 if a stream was
incomplete, a request failed, a gauge stayed above zero, or stderr had an odd line. Linux only.
"""

import argparse
import asyncio
import json
import os
import random
import re
import socket
import statistics
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from time import perf_counter
from typing import IO, Any

from bench.serving import HOST, Served, cpu_s, free_port, rss_bytes, started
from tests.robustness.fuzz import SEEDS, mutated

CHAT = "/v1/chat/completions"
NUM_ROWS, NUM_PLACES = 8, 16
SAMPLE_S, REST_S = 1.0, 30.0
PATIENCE_S = 20.0  # after which a client disconnects
FLAGS = (
    *("--ctx-size", "1024", "--max-tokens", "48", "--max-queue", str(NUM_PLACES)),
    *("--prefix-cache-bytes", "32MB", "--prefix-cache-disk-bytes", "32MB"),
    *("--log-level", "warning", "--max-batch-size", str(NUM_ROWS)),
)
WAITING, CONNECTIONS = "vllm:num_requests_waiting", "mlxlite:connections"
GAUGES = (WAITING, CONNECTIONS, "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
_SLOW = re.compile(r"Executing .* took \d")  # a busy machine causes it too: counted, no failure
_EXPECTED = re.compile(
    r"^\[mlx\] |left out of a request|the built-in demo|^\s*$|^(check|rest): |model is loading"
    r"|mlxlite\.http: (POST '\S+' 4\d\d |\d+ more requests were refused)"
)
_ENDS = (b"data: [DONE]", b"event: message_stop", b"response.completed", b"response.incomplete")
_ERRORS = (b"event: error", b'data: {"error"', b"event: response.failed")
TRAFFIC = json.loads(Path(__file__).with_name("traffic.json").read_bytes())
TURNS = ("Hello!", "Count to 5.", "What is 2 + 2?", "Repeat: one two three.", "Tell me a story.")


@asynccontextmanager
async def served_demo(log: IO[bytes], *, is_debug: bool) -> AsyncIterator[Served]:
    """The demo model, ready; the server's stdout and stderr go to `log`."""
    os.environ["PYTHONASYNCIODEBUG"] = str(int(is_debug))
    program = ["-X", "dev", "-m", "tests.robustness.checked_server"]
    with tempfile.TemporaryDirectory(prefix="mlxlite-soak-") as kept:
        port = free_port()
        command = [sys.executable, *(program if is_debug else ["-m", "mlxlite"]), *FLAGS]
        command += ["--port", str(port), "--prefix-cache-dir", kept]
        async with started(command, port, log=log) as served:
            yield served


@dataclass
class Clients:
    """Sends requests, each on its own connection; counts answers by kind and status."""

    port: int
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    async def ask(self, kind: str, path: str, body: Any, **manner: Any) -> str:
        """The outcome: the answer's status, or why there is none. `manner` is for `_exchange`."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        outcome, answer = "", b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self._exchange(path, raw, **manner)
            outcome = answer[9:12].decode() or "left"
        except TimeoutError:
            outcome = "left waiting"
        except ConnectionError as error:
            outcome, answer = "lost", repr(error).encode()
        self.outcomes[f"{kind} {outcome}"] += 1
        is_whole = any(end in answer for end in _ENDS) and not any(e in answer for e in _ERRORS)
        is_cut = b"text/event-stream" in answer[:500] and not is_whole
        if (is_cut or outcome[0] not in "1234l" or outcome == "lost") and len(self.problems) < 1000:
            self.problems.append(f"{kind} {outcome}: {answer[-300:]!r} for {raw[:200]!r}")
        return outcome

    async def _exchange(
        self, path: str, raw: bytes, leave_after: float = inf, pause_s: float = 0, size: int = 65536
    ) -> bytes:
        """All bytes of the answer; none if it disconnects after `leave_after` reads.

        It pauses between reads of `size` bytes; if that is small, its receive buffer is too.
        """
        loop, pieces = asyncio.get_running_loop(), list[bytes]()
        head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        with closing(socket.socket()) as sock:
            sock.setblocking(False)
            if size < 4096:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, (HOST, self.port))
            length = b"content-length: %d\r\n\r\n" % len(raw)
            await loop.sock_sendall(sock, head.encode() + length + raw)
            while len(pieces) < leave_after:
                piece = await loop.sock_recv(sock, size)
                if not piece:
                    return b"".join(pieces) or b"HTTP/1.1 000 closed without an answer"
                pieces.append(piece)
                await asyncio.sleep(pause_s)
            linger = struct.pack("ii", 1, 0)  # on, for 0 s: a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return b""


def some_request(rng: random.Random) -> tuple[str, str, Any]:
    """A kind, a path and a body of ordinary traffic."""
    one = rng.choice(TRAFFIC)
    text = f"{rng.choice(TURNS)} {rng.randrange(40)}"
    body = json.loads(json.dumps(one["body"]).replace("TURN", text))
    if len(body.get("messages", ())) > 1:
        body["messages"] = (body["messages"] * rng.randrange(1, 3))[-5:]
    body |= {"stream": rng.random() < 0.6, "temperature": rng.choice([0, 0.8])}
    return one["kind"], one["path"], body | {"seed": rng.randrange(1000)}


_PATHS = {row["kind"]: row["path"] for row in TRAFFIC if row["kind"] in SEEDS}
_PATHS |= {"tokenize": "/tokenize", "cancel": "/v1/cancel"}


async def mixed_client(clients: Clients, rng: random.Random, until: float) -> None:
    while perf_counter() < until:
        kind, path, body = some_request(rng)
        manner: dict[str, Any] = {}
        match rng.random():
            case chance if chance < 0.15:
                manner = {"leave_after": rng.randrange(12)}
            case chance if chance < 0.2:
                manner = {"pause_s": 0.02, "size": 64}
            case chance if chance < 0.35:
                kind = rng.choice(list(_PATHS))
                body, path = mutated(rng.choice(SEEDS[kind]), rng), _PATHS[kind]
                kind += " (invalid)"
        await clients.ask(kind, path, body, **manner)


async def gauges(served: Served) -> dict[str, float]:
    """The gauges that are zero at rest, labels added up."""
    found = dict.fromkeys(GAUGES, 0.0)
    for key, value in (await served.metrics()).items():
        if (name := key.partition("{")[0]) in found:
            found[name] += value
    found[CONNECTIONS] -= 1  # the request of /metrics itself
    return found


@dataclass
class Run:
    """One run: its clients, the server's memory, and the maxima of its gauges."""

    served: Served
    clients: Clients
    rests: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB
    samples: list[tuple[float, float]] = field(default_factory=list)  # the same, under load
    most: Counter[str] = field(default_factory=Counter)

    async def sample(self) -> None:
        while True:
            now = await gauges(self.served) | {"MiB": rss_bytes(self.served.pid) / 2**20}
            self.most |= Counter({name: int(value) for name, value in now.items()})
            self.samples.append((perf_counter(), now["MiB"]))
            await asyncio.sleep(SAMPLE_S)

    async def rest(self) -> None:
        """Wait until every gauge is zero, at most `REST_S`."""
        began, left = perf_counter(), {"": 1.0}
        while left and perf_counter() - began < REST_S:
            await asyncio.sleep(0.02)
            left = {name: value for name, value in (await gauges(self.served)).items() if value}
        self.rests.append((perf_counter(), rss_bytes(self.served.pid) / 2**20))
        print(f"{perf_counter() - began:.2f} s after the last client, not zero: {left or 'none'}")
        self.clients.problems += [f"not at rest: {left}"] if left else []

    def report(self) -> str:
        points = self.rests if len(self.rests) > 3 else self.samples
        half = points[len(points) // 2 :]
        slope = statistics.linear_regression(*zip(*half, strict=True)).slope * 60
        mibs = " ".join(f"{mib:.0f}" for _, mib in self.rests)
        outcomes = self.clients.outcomes
        asked = f"{outcomes.total():,} requests: {dict(sorted(outcomes.items()))}"
        trend = f"second half: {slope:+.2f} MiB a minute; most {dict(self.most)}"
        return f"{asked}\nMiB at rest: {mibs}; {trend}"


async def soak(run: Run, args: argparse.Namespace) -> None:
    """Rounds of a minute, each of which ends in a rest."""
    num_rounds = max(4, round(args.minutes))
    rngs = [random.Random(args.seed * 1000 + n) for n in range(args.clients)]
    for _ in range(num_rounds):
        until = perf_counter() + args.minutes * 60 / num_rounds
        await asyncio.gather(*(mixed_client(run.clients, rng, until) for rng in rngs))
        await run.rest()


async def overload(run: Run, args: argparse.Namespace) -> None:
    """Ten times as many clients as rows and places, each with one request after another."""
    body = {"messages": [{"role": "user", "content": "Count to 5."}], "max_tokens": 16}
    body |= {"stream": True, "ignore_eos": True}
    for _ in range(20):  # caches and pools fill
        await run.clients.ask("warm", CHAT, body)
    await run.rest()

    until = perf_counter() + args.overload

    async def one() -> None:
        while perf_counter() < until:
            if await run.clients.ask("overload", CHAT, body) == "429":
                await asyncio.sleep(1)  # the value of `retry-after`

    await asyncio.gather(*(one() for _ in range(10 * (NUM_ROWS + NUM_PLACES))))
    await run.rest()
    began = perf_counter()
    await run.clients.ask("after", CHAT, body | {"max_tokens": 1})
    print(f"the next request took {1000 * (perf_counter() - began):.0f} ms")
    if run.most[WAITING] > NUM_PLACES:
        run.clients.problems.append(f"the queue was {run.most[WAITING]} long")


async def slow(run: Run, args: argparse.Namespace, num_fast: int = 4) -> None:
    """Fast readers beside as many readers of a byte a second, and beside as many fast ones."""
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body |= {"ignore_eos": True, "max_tokens": 400, "temperature": 0}
    large = body | {"max_tokens": 900, "logprobs": True, "top_logprobs": 20}  # 1 MB and more
    ask = run.clients.ask

    async def arm(name: str, manner: dict[str, Any]) -> tuple[float, float]:
        others = asyncio.gather(*(ask(name, CHAT, large, **manner) for _ in range(num_fast)))
        began, cpu_began = perf_counter(), cpu_s(run.served.pid)
        await asyncio.gather(*(ask("fast", CHAT, body) for _ in range(num_fast)))
        taken = perf_counter() - began, cpu_s(run.served.pid) - cpu_began
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)
        return taken

    ratios: list[list[float]] = []
    arms: list[Any] = [("slow", {"pause_s": 1.0, "size": 1}), ("other", {})]
    await arm(*arms[1])  # not counted
    for i in range(args.slow):
        taken = {name: await arm(name, manner) for name, manner in arms[:: (-1) ** i]}
        ratios.append([x / y for x, y in zip(taken["other"], taken["slow"], strict=True)])
    print(f"{args.slow} pairs of {num_fast} fast readers, beside slow ones / beside fast")
    for name, found in zip(("by time", "by CPU"), zip(*ratios, strict=True), strict=True):
        low, middle, high = min(found), statistics.median(found), max(found)
        print(f"  {name}: median {middle:.3f}, from {low:.3f} to {high:.3f}")


async def run(args: argparse.Namespace) -> bool:
    """Print the report; whether there was nothing unexpected."""
    is_debug = args.slow is None
    mode = soak if args.overload is None and is_debug else overload if is_debug else slow
    with tempfile.TemporaryFile() as log:
        async with served_demo(log, is_debug=is_debug) as served:
            own = Run(served, Clients(served.port))
            sampling = asyncio.create_task(own.sample())
            await mode(own, args)
            sampling.cancel()
        print(own.report())
        log.seek(0)
        lines = log.read().decode(errors="replace").splitlines()
    odd = [line for line in lines if not _SLOW.search(line) and not _EXPECTED.search(line)]
    num_slow, problems = sum(bool(_SLOW.search(line)) for line in lines), own.clients.problems
    checks = next((line for line in lines if line.startswith("check: ")), "no check")
    print(f"stderr: {len(odd)} unexpected lines; {num_slow} callbacks over 100 ms; {checks}")
    objects = [line.split()[1] for line in lines if line.startswith("rest: ")]
    print(f"objects at rest: {' '.join(objects[-40:])}\nproblems: {len(problems)}")
    print("".join(f"  {line}\n" for line in [*problems[:20], *odd[:40]]), end="")
    return not odd and not problems and (checks.startswith("check: clean") or not is_debug)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.robustness.soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overload", type=float, metavar="SECONDS")
    parser.add_argument("--slow", type=int, metavar="PAIRS")
    return 0 if asyncio.run(run(parser.parse_args())) else 1


if __name__ == "__main__":
    sys.exit(main())
