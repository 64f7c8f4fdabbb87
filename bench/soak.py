"""Mixed traffic, an overload, or slow readers, against the demo in a process of its own.

    python -m bench.soak --minutes 30     # with cancels, bad requests and slow readers
    python -m bench.soak --overload 60    # seconds of ten times what fits
    python -m bench.soak --slow 7         # pairs: fast readers beside slow and beside fast ones

It is the real server, but (except for `--slow`) under `python -X dev` and asyncio's debug mode, so
that what is unclosed or unawaited says so; and each time that it is idle, and at its end, scheduler
and prefix cache are checked as the tests check them. Reported: what was answered, the memory's
slope over the second half, the gauges at rest, all that stderr had to say. The exit code is 1 if a
stream was lost, a request failed, or anything was left or complained of. Linux only.
"""

import argparse
import asyncio
import gc
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
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import IO, Any

from bench.fuzz import SEEDS, mutated
from bench.load import HOST
from bench.processes import cpu_s, rss_bytes
from bench.serving import Served, serve

CHAT = "/v1/chat/completions"
NUM_ROWS, NUM_PLACES = 8, 16
SAMPLE_S = 5.0
PATIENCE_S = 20.0  # a client that has waited so long leaves, as clients do
FLAGS = (
    *("--ctx-size", "1024", "--max-tokens", "48", "--max-queue", str(NUM_PLACES)),
    *("--prefix-cache-bytes", "32MB", "--prefix-cache-disk-bytes", "32MB"),
    *("--log-level", "warning"),
)
# Slow to return to the loop is a shared machine's doing as much as ours: counted, and no failure.
_SLOW = re.compile(r"Executing .* took \d")
_EXPECTED = re.compile(
    r"^\[mlx\] |unknown request field|the built-in demo|^\s*$|^(check|rest): |model is loading"
)
_ENDS = (b"data: [DONE]", b"event: message_stop", b"response.completed", b"response.incomplete")
_ERRORS = (b"event: error", b'data: {"error"', b"event: response.failed")
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
_TOOL = {"name": "weather", "parameters": {"properties": {"location": {"type": "string"}}}}
_TURNS = ("Hello!", "Count to 5.", "What is 2 + 2?", "Repeat: one two three.", "Tell me a story.")


# --- the server ---------------------------------------------------------------------------------


def checked_main() -> None:
    """The server's own main, with `check()` at every rest and at the end."""
    from mlxlite.__main__ import main
    from mlxlite.engine.engine import Engine

    idle, leave, engines, num_checks = Engine._idle, os._exit, set[Engine](), 0

    def check(engine: Engine) -> None:
        nonlocal num_checks
        engine._scheduler.check()
        num_checks += 1
        print(f"rest: {len(gc.get_objects())} objects", file=sys.stderr)

    async def checked_idle(self: Engine) -> None:
        engines.add(self)
        check(self)
        await idle(self)

    def checked_exit(code: int) -> None:
        for engine in engines:
            check(engine)
        gc.collect()  # what is unclosed says so
        print(f"check: clean, {num_checks} times", file=sys.stderr, flush=True)
        leave(code)

    Engine._idle = checked_idle  # type: ignore[method-assign]
    os._exit = checked_exit  # type: ignore[assignment]
    main()


@asynccontextmanager
async def debugged(log: IO[bytes]) -> AsyncIterator[Served]:
    os.environ["PYTHONASYNCIODEBUG"] = "1"
    program = ("-X", "dev", "-m", "bench.soak", "--server")
    with tempfile.TemporaryDirectory(prefix="mlxlite-soak-") as kept:
        flags = (*FLAGS, "--prefix-cache-dir", kept)
        async with serve(None, NUM_ROWS, *flags, program=program, log=log) as served:
            yield served


# --- clients ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What clients were told, and what they should not have been."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        if len(self.problems) < 1000:
            self.problems.append(text[:500])


@dataclass(frozen=True)
class Manner:
    """How a client behaves once it has asked."""

    leave_after: int | None = None  # reads, then it resets the line
    pause_s: float = 0.0  # between reads
    num_bytes: int = 1 << 16  # of a read; few: its buffers are small too


@dataclass
class Client:
    """Asks one thing on one connection, and checks that what it gets is whole."""

    port: int
    tally: Tally

    async def ask(self, kind: str, path: str, body: Any, manner: Manner = Manner()) -> int:
        """The answer's status; 0 for none."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            async with asyncio.timeout(PATIENCE_S):
                said = await self._exchange(path, raw, manner)
        except TimeoutError:
            self.tally.outcomes[f"{kind} left waiting"] += 1
            return 0
        except ConnectionError as error:
            self.tally.problem(f"{kind}: {error!r} for {raw[:200]!r}")
            return 0
        if said is None:
            self.tally.outcomes[f"{kind} left"] += 1
            return 0
        status = int(said[9:12]) if said[:9] == b"HTTP/1.1 " else 0
        self.tally.outcomes[f"{kind} {status}"] += 1
        if status >= 500 or not status:
            self.tally.problem(f"{kind}: {said[:300]!r} for {raw[:200]!r}")
        is_stream = b"text/event-stream" in said[:500]
        is_whole = any(end in said for end in _ENDS) and not any(bad in said for bad in _ERRORS)
        if is_stream and not is_whole:
            self.tally.problem(f"{kind}: a stream was lost: {said[-300:]!r}")
        return status

    async def _exchange(self, path: str, raw: bytes, manner: Manner) -> bytes | None:
        """All that came; None when the client left first."""
        loop, pieces = asyncio.get_running_loop(), list[bytes]()
        head = f"POST {path} HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n"
        with closing(socket.socket()) as sock:
            sock.setblocking(False)
            if manner.num_bytes < 4096:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await loop.sock_connect(sock, (HOST, self.port))
            length = b"content-length: %d\r\n\r\n" % len(raw)
            await loop.sock_sendall(sock, head.encode() + length + raw)
            while manner.leave_after is None or len(pieces) < manner.leave_after:
                piece = await loop.sock_recv(sock, manner.num_bytes)
                if not piece:
                    return b"".join(pieces)
                pieces.append(piece)
                await asyncio.sleep(manner.pause_s)
            linger = struct.pack("ii", 1, 0)  # on, for 0 s: a reset
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return None


def some_request(rng: random.Random) -> tuple[str, str, Any]:
    """A kind, a path and a body of ordinary traffic."""
    turn = {"role": "user", "content": f"{rng.choice(_TURNS)} {rng.randrange(40)}"}
    turns = [turn, {"role": "assistant", "content": "Yes."}, turn] * rng.randrange(1, 8)
    common: dict[str, Any] = {"stream": rng.random() < 0.6, "temperature": rng.choice([0, 0.8])}
    common["seed"] = rng.randrange(1000)
    match rng.randrange(9):
        case 0:
            return "completion", "/v1/completions", {"prompt": [turn["content"]] * 2, **common}
        case 1:
            return "responses", "/v1/responses", {"input": turn["content"], **common}
        case 2:
            return "messages", "/v1/messages", {"messages": turns, "max_tokens": 24, **common}
        case 3:
            tools = [{"type": "function", "function": _TOOL}]
            return "tools", CHAT, {"messages": turns[-1:], "tools": tools, **common}
        case 4:
            wanted = {"type": "json_schema", "json_schema": {"schema": _SCHEMA}}
            return "schema", CHAT, {"messages": turns[-1:], "response_format": wanted, **common}
        case 5:
            return "embedding", "/v1/embeddings", {"input": [turn["content"]] * 3}
        case 6:
            more = {"n": 2, "logprobs": True, "top_logprobs": 2, "repetition_penalty": 1.1}
            return "choices", CHAT, {"messages": turns[-1:], **common, **more}
        case _:
            return "chat", CHAT, {"messages": turns[-5:], **common, "max_tokens": 40}


_PATHS = {"chat": CHAT, "tokenize": "/tokenize", "completion": "/v1/completions"}
_PATHS |= {"embedding": "/v1/embeddings"}
_PATHS |= {name: f"/v1/{name}" for name in ("messages", "responses", "cancel")}


async def mixed_client(client: Client, rng: random.Random, until: float) -> None:
    while perf_counter() < until:
        kind, path, body = some_request(rng)
        manner = Manner()
        match rng.random():
            case chance if chance < 0.15:
                manner = Manner(leave_after=rng.randrange(12))
            case chance if chance < 0.2:
                manner = Manner(pause_s=0.02, num_bytes=64)
            case chance if chance < 0.35:
                kind = rng.choice(list(_PATHS))
                body, path = mutated(rng.choice(SEEDS[kind]), rng), _PATHS[kind]
                kind += " (bad)"
        await client.ask(kind, path, body, manner)


# --- what is measured ---------------------------------------------------------------------------


@dataclass
class Watch:
    """The server's memory at each rest, and the most that its gauges and memory have been."""

    served: Served
    rests: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB
    samples: list[tuple[float, float]] = field(default_factory=list)  # the same, under load
    most: Counter[str] = field(default_factory=Counter)

    async def run(self, every_s: float = SAMPLE_S) -> None:
        while True:
            now = await self.served.gauges() | {"MiB": rss_bytes(self.served.pid) / 2**20}
            self.most |= Counter({name: int(value) for name, value in now.items()})
            self.samples.append((perf_counter(), now["MiB"]))
            await asyncio.sleep(every_s)

    def rest(self) -> None:
        self.rests.append((perf_counter(), rss_bytes(self.served.pid) / 2**20))

    def report(self) -> str:
        where = "at rest" if len(self.rests) > 3 else "under load"
        points = self.rests if len(self.rests) > 3 else self.samples
        half = points[len(points) // 2 :]
        slope = statistics.linear_regression(*zip(*half, strict=True)).slope * 60
        mibs = " ".join(f"{mib:.0f}" for _, mib in self.rests)
        trend = f"{where}, second half: {slope:+.2f} a minute"
        return f"MiB at rest: {mibs}; {trend}; most {dict(self.most)}"


async def at_rest(served: Served, tally: Tally) -> str:
    """Wait for it, and how long that took."""
    began = perf_counter()
    left: dict[str, float] = {}
    while perf_counter() - began < 30:
        left = {name: value for name, value in (await served.gauges()).items() if value}
        if not left:
            return f"every gauge at zero {perf_counter() - began:.2f} s after the last client"
        await asyncio.sleep(0.02)
    tally.problem(f"left after 30 s: {left}")
    return f"not at rest: {left}"


async def soak(minutes: float, num_clients: int, seed: int) -> bool:
    """Rounds of a minute, each of which ends in a rest."""
    tally, num_rounds = Tally(), max(4, round(minutes))
    rngs = [random.Random(seed * 1000 + n) for n in range(num_clients)]
    with tempfile.TemporaryFile() as log:
        async with debugged(log) as served:
            watch, client = Watch(served), Client(served.port, tally)
            watching = asyncio.create_task(watch.run())
            for _ in range(num_rounds):
                until = perf_counter() + minutes * 60 / num_rounds
                await asyncio.gather(*(mixed_client(client, rng, until) for rng in rngs))
                rest = await at_rest(served, tally)
                watch.rest()
            await _end(watching)
            print(f"{minutes:g} min, {num_clients} clients, {tally.outcomes.total():,} requests")
            print(f"{dict(sorted(tally.outcomes.items()))}\n{watch.report()}\n{rest}")
        return _verdict(tally, log)


async def overload(seconds: float, factor: int = 10) -> bool:
    """`factor` times as many clients as there are rows and places, each asking again and again."""
    tally = Tally()
    body = {"messages": [{"role": "user", "content": "Count to 5."}], "max_tokens": 16}
    body |= {"stream": True, "ignore_eos": True}
    with tempfile.TemporaryFile() as log:
        async with debugged(log) as served:
            client = Client(served.port, tally)
            for _ in range(20):  # everything is warm
                await client.ask("warm", CHAT, body)
            watch = Watch(served)
            watching = asyncio.create_task(watch.run(every_s=1.0))
            watch.rest()
            until = perf_counter() + seconds

            async def one() -> None:
                while perf_counter() < until:
                    if await client.ask("overload", CHAT, body) == 429:
                        await asyncio.sleep(1)  # as `retry-after` says

            num_clients = factor * (NUM_ROWS + NUM_PLACES)
            await asyncio.gather(*(one() for _ in range(num_clients)))
            rest = await at_rest(served, tally)
            watch.rest()
            began = perf_counter()
            await client.ask("after", CHAT, body | {"max_tokens": 1})
            first_s = perf_counter() - began
            await _end(watching)
            print(f"{seconds:g} s, {num_clients} clients: {dict(tally.outcomes)}")
            print(f"{watch.report()}\n{rest}\nthe next request took {first_s * 1000:.0f} ms")
            if watch.most["waiting"] > NUM_PLACES:
                tally.problem(f"the queue was {watch.most['waiting']} long")
        return _verdict(tally, log)


async def slow(num_pairs: int, num_fast: int = 4) -> bool:
    """Fast ones beside as many that read a byte a second, and beside as many as fast as they."""
    tally = Tally()
    body = {"messages": [{"role": "user", "content": "Tell me a story."}], "stream": True}
    body |= {"ignore_eos": True, "max_tokens": 400, "temperature": 0}
    large = body | {"max_tokens": 900, "logprobs": True, "top_logprobs": 20}  # of 1 MB and more
    ratios: list[list[float]] = []
    with tempfile.TemporaryFile() as log:
        async with serve(None, NUM_ROWS, *FLAGS, log=log) as served:
            client = Client(served.port, tally)

            async def arm(manner: Manner, name: str) -> tuple[float, float]:
                asked = [client.ask(name, CHAT, large, manner) for _ in range(num_fast)]
                others = [asyncio.create_task(one) for one in asked]
                began, cpu_began = perf_counter(), cpu_s(served.pid)
                await asyncio.gather(*(client.ask("fast", CHAT, body) for _ in range(num_fast)))
                taken = (perf_counter() - began, cpu_s(served.pid) - cpu_began)
                for other in others:
                    await _end(other)
                await at_rest(served, tally)
                return taken

            await arm(Manner(), "warm")
            for i in range(num_pairs):
                arms = [(Manner(), "other"), (Manner(pause_s=1.0, num_bytes=1), "slow")]
                taken = {name: await arm(manner, name) for manner, name in arms[:: (-1) ** i]}
                ratios.append([x / y for x, y in zip(taken["other"], taken["slow"], strict=True)])
            print(f"{num_pairs} pairs of {num_fast} fast readers, beside slow ones / beside fast")
            for name, found in zip(("by time", "by CPU"), zip(*ratios, strict=True), strict=True):
                middle, low, high = statistics.median(found), min(found), max(found)
                print(f"  {name}: median {middle:.3f}, from {low:.3f} to {high:.3f}")
        return _verdict(tally, log, is_checked=False)


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _verdict(tally: Tally, log: IO[bytes], *, is_checked: bool = True) -> bool:
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    odd = [line for line in lines if not _SLOW.search(line) and not _EXPECTED.search(line)]
    num_slow = sum(bool(_SLOW.search(line)) for line in lines)
    checks = next((line for line in lines if line.startswith("check: ")), "no check")
    is_sound = checks.startswith("check: clean") or not is_checked
    print(f"stderr: {len(odd)} complaints; {num_slow} callbacks of more than 100 ms; {checks}")
    objects = [line.split()[1] for line in lines if line.startswith("rest: ")]
    print(f"objects at rest: {' '.join(objects[-40:])}\nproblems: {len(tally.problems)}")
    for line in [*tally.problems[:20], *odd[:40]]:
        print(f"  {line}")
    return not odd and not tally.problems and is_sound


def main(argv: Sequence[str]) -> int:
    if "--server" in argv:
        sys.argv.remove("--server")
        checked_main()
    parser = argparse.ArgumentParser(prog="python -m bench.soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--overload", type=float, metavar="SECONDS")
    parser.add_argument("--slow", type=int, metavar="PAIRS")
    args = parser.parse_args(argv)
    if args.overload is not None:
        is_clean = asyncio.run(overload(args.overload))
    elif args.slow is not None:
        is_clean = asyncio.run(slow(args.slow))
    else:
        is_clean = asyncio.run(soak(args.minutes, args.clients, args.seed))
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
