"""Attempts on the demo by clients that are many, stand still, or want to learn of each other."""

import asyncio
import json
import random
import statistics
from collections.abc import Awaitable, Callable, Coroutine
from time import perf_counter
from typing import Any

from bench.serving import HOST
from tests.robustness.demo import (
    CHAT,
    MIB,
    Report,
    Server,
    Streams,
    Watch,
    ask,
    asked,
    chat,
    served,
)

NUM_SALTS, NUM_CHAIN, NUM_OPEN = 600, 100, 200
QUIET = ("--log-level", "warning")
A_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


async def timed(work: Awaitable[Any]) -> float:
    began_at = perf_counter()
    await work
    return perf_counter() - began_at


async def salts(report: Report) -> None:
    """A salt of its own for each chat: prefixes that no other request can use."""
    rng = random.Random(1)
    async with served("--prefix-cache-bytes", "32MB", *QUIET) as server:
        took_s, start = list[float](), 0
        for i in range(NUM_SALTS):
            if i == 100:
                start = server.rss_bytes()  # what the first ones leave is caches and pools
            body = chat(rng, 60, max_tokens=1, cache_salt=f"salt {i}")
            took_s.append(await timed(ask(server.port, CHAT, body)))
        held = json.loads((await asked(server.port, "/v1/cache"))[1])
        report.add("unique salts: prefixes, by their limit", held["bytes"] / held["max_bytes"], 1)
        report.add("unique salts: memory", (server.rss_bytes() - start) / MIB, 64, " MiB")
        slower = statistics.median(took_s[-200:]) / statistics.median(took_s[100:300])
        report.add("unique salts: the last 200 chats, by the first", slower, 1.5)


async def keys(report: Report) -> None:
    """Whether one key can see, in counts or in times, what another has sent."""
    rng, flags = random.Random(1), ("--api-key", "one,two", "--prefix-cache-scope", "key")
    async with served(*flags, *QUIET) as server:
        seen, pairs = 0, list[tuple[float, float, float]]()
        for _ in range(12):
            theirs, new = (chat(rng, 300, max_tokens=1, temperature=0) for _ in range(2))
            await ask(server.port, CHAT, theirs, "one")
            own_s = await timed(ask(server.port, CHAT, theirs, "one"))
            new_s = await timed(ask(server.port, CHAT, new, "two"))
            began_at = perf_counter()
            answer = json.loads((await asked(server.port, CHAT, theirs, "two"))[1])
            pairs.append((own_s, new_s, perf_counter() - began_at))
            seen += answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        own_s, new_s, theirs_s = (statistics.median(each) for each in zip(*pairs, strict=True))
        report.add("another key's prompt: tokens said to be cached", seen, 0)
        report.add("another key's prompt: a new one's time, by its time", new_s / theirs_s, 1.3)
        report.add("one's own prompt again, by a new one", own_s / new_s, 0.8)
        cleared, _ = await asked(server.port, "/v1/cache", key="two")
        report.add("GET /v1/cache by the second key: not answered", float(cleared != 200), 0)


async def chains(report: Report) -> None:
    """Responses that go on from each other, and from others that are long forgotten."""
    rng = random.Random(1)

    async def respond(server: Server, previous: str | None) -> tuple[int, Any]:
        more = {} if previous is None else {"previous_response_id": previous}
        metadata = {f"k{i}": str(rng.random()) * 20 for i in range(16)}
        body = {"input": f"{rng.random()}", "max_output_tokens": 2, "metadata": metadata, **more}
        status, answer = await asked(server.port, "/v1/responses", json.dumps(body).encode())
        return status, json.loads(answer)

    async with served("--prefix-cache-bytes", "32MB", *QUIET) as server:
        await respond(server, None)
        start, odd = server.rss_bytes(), 0
        ids = list[str]()
        for _ in range(NUM_CHAIN):
            status, answer = await respond(server, ids[-1] if ids else None)
            odd += status != 200
            ids.append(answer.get("id", ids[-1] if ids else ""))
        last = ids[-1]
        for _ in range(30):  # branches of the longest, while all others are pushed out
            roots = [respond(server, None) for _ in range(36)]
            answers = await asyncio.gather(*roots, respond(server, last))
            odd += sum(status != 200 for status, _ in answers)
            last = answers[-1][1].get("id", last)
        await asyncio.sleep(2)
        left = (server.rss_bytes() - start) / MIB
        gone, answer = await respond(server, ids[0])
        named = answer.get("error", {}).get("param") == "previous_response_id"
        report.add("a chain and 1,100 others: not answered", odd, 0)
        report.add(
            "a link that was pushed out: not a 4xx that names it", gone < 400 or not named, 0
        )
        report.add("a chain and 1,100 others: memory afterwards", left, 256, " MiB")


async def half_open(report: Report) -> None:
    """Hundreds of connections with nothing, half a head, half a body; streams beside them."""
    pieces = (
        b"",
        f"POST {CHAT} HTTP/1.1\r\nhost: {HOST}\r\nx-a: ".encode(),
        f"POST {CHAT} HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 99999\r\n\r\n{{".encode(),
    )
    async with served(*QUIET) as server:
        streams, cut_s = Streams(), list[float]()

        async def stand(piece: bytes) -> None:
            reader, writer = await asyncio.open_connection(HOST, server.port)
            writer.write(piece)
            began_at = perf_counter()
            await reader.read()
            cut_s.append(perf_counter() - began_at)
            writer.close()

        start = server.rss_bytes()
        async with streams.beside(server.port), Watch(server) as watch:
            await asyncio.gather(*(stand(piece) for piece in pieces for _ in range(NUM_OPEN)))
        name = f"{3 * NUM_OPEN} half-open connections"
        report.add(f"{name}: the last is cut after", max(cut_s), 45, " s")
        report.add(f"{name}: /health", watch.health_s, 0.2, " s")
        report.add(f"{name}: of {streams.num_whole} streams, not whole", streams.num_cut, 0)
        report.add(f"{name}: memory", (watch.peak_bytes - start) / MIB, 64, " MiB")
        await asyncio.sleep(1)
        left = await server.sample("mlxlite:connections") - 1
        report.add(f"{name}: left", left, 0)


async def lanes(report: Report) -> None:
    """A chat of 33 KB behind bodies of 24 MB, and behind those of clients that have left."""
    text = {"role": "user", "content": "river window " * 800}
    huge = json.dumps({"messages": [text] * (24_000_000 // 10_400), "max_tokens": 1}).encode()
    many = json.dumps({"messages": [{"role": "user", "content": "a"}] * 250_000}).encode()
    medium = chat(random.Random(1), 5000, max_tokens=1)[: 33 << 10]
    medium = json.dumps({"messages": [{"role": "user", "content": medium.decode()}]}).encode()
    async with served(*QUIET) as server:

        async def behind(bodies: list[bytes], *, is_leaving: bool) -> float:
            others = [asyncio.create_task(ask(server.port, CHAT, body)) for body in bodies]
            await asyncio.sleep(0.5)
            if is_leaving:
                for task in others:
                    task.cancel()
                await asyncio.gather(*others, return_exceptions=True)
            took_s = await timed(ask(server.port, CHAT, medium))
            await asyncio.gather(*others, return_exceptions=True)
            return took_s

        for name, body in (("long texts", huge), ("250,000 messages", many)):
            beside_s = await behind([body], is_leaving=False)
            report.add(f"33 KB behind {name}", beside_s, 2, " s")
            left_s = await behind([body] * 4, is_leaving=True)
            report.add(f"33 KB behind 4 bodies of {name} whose clients left", left_s, 2, " s")


async def grammars(report: Report) -> None:
    """A cached grammar while others compile."""

    def wanting(schema: Any) -> bytes:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        return chat(random.Random(1), 4, max_tokens=2, ignore_eos=False, response_format=form)

    def large(seed: int) -> bytes:
        each = {"type": "string", "pattern": "^([a-z]|[0-9][A-F]){1,2000}x$"}
        return wanting({"type": "object", "properties": {f"p{seed}_{i}": each for i in range(300)}})

    async with served(*QUIET) as server:
        await ask(server.port, CHAT, wanting(A_SCHEMA))
        alone_s = await timed(ask(server.port, CHAT, wanting(A_SCHEMA)))
        others = [asyncio.create_task(ask(server.port, CHAT, large(i))) for i in range(12)]
        await asyncio.sleep(0.1)
        worst_s = 0.0
        while not all(task.done() for task in others):
            worst_s = max(worst_s, await timed(ask(server.port, CHAT, wanting(A_SCHEMA))))
        odd = sum(task.result() not in (200, 400) for task in others)
        report.add("12 large grammars: neither compiled nor refused", odd, 0)
        report.add(f"a cached grammar beside them ({alone_s:.2f} s alone)", worst_s, 1, " s")


async def templates(report: Report) -> None:
    """Templates that a request's fields make loop or grow, then a chat."""
    loop = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
    each = "{% for i in range(30000) %}"
    grow = (
        "{% set ns = namespace(x='') %}" + each + "{% set ns.x = ns.x ~ 'a' * 9999 %}{% endfor %}"
    )
    swell = each + "{{ 'a' * 9999 }}{% endfor %}"
    source = "{% for m in messages %}{% if m.content == 'LOOP' %}" + loop
    source += "{% elif m.content == 'GROW' %}" + grow + "{% elif m.content == 'SWELL' %}" + swell
    source += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    async with served("--chat-template", source, *QUIET) as server:
        start, good = server.rss_bytes(), chat(random.Random(1), 4, max_tokens=1)
        for word in ("LOOP", "GROW", "SWELL"):
            bad = json.dumps({"messages": [{"role": "user", "content": word}]}).encode()
            async with Watch(server) as watch:
                status, _ = await asked(server.port, CHAT, bad)
            report.add(f"template {word}: answered but with 400", float(status != 400), 0)
            report.add(f"template {word}: /health", watch.health_s, 0.5, " s")
            after_s = await timed(ask(server.port, CHAT, good))
            report.add(f"template {word}: the next chat", after_s, 0.5, " s")
        report.add("templates: memory", (server.rss_bytes() - start) / MIB, 100, " MiB")


Attempt = Callable[[Report], Coroutine[Any, Any, None]]
ATTEMPTS: tuple[Attempt, ...] = (salts, keys, chains, half_open, lanes, grammars, templates)
