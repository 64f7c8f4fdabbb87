"""The load generator: asks a server what a plan says, and notes when each token came.

It is a process of its own, so that its Python never competes with the server's loop for anything
but a core, and it does little with each frame: no JSON is parsed, tokens are counted by the text
that begins them. Reads `{"port", "plan"}` from stdin and writes the streams to stdout, both JSON.
Imports neither MLX nor mlxlite.

    python -m bench.load <plan.json >streams.json
"""

import asyncio
import re
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import orjson

from bench.plan import Stream

HOST = "127.0.0.1"
_TOKEN = b'"delta":{"content":'  # begins a piece of text; the role's chunk has the role first
_END = b"\r\n0\r\n\r\n"  # of a chunked answer
_NUM_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Client(asyncio.Protocol):
    """One connection, which asks its requests one after the other."""

    def __init__(self, index: int, port: int, bodies: Sequence[Any], after_tokens: int) -> None:
        self._index = index
        self._port = port
        self._bodies = [orjson.dumps(body) for body in bodies]
        self._after_tokens = after_tokens
        self._rest = b""
        self.streams: list[Stream] = []
        loop = asyncio.get_running_loop()
        self.is_under_way: asyncio.Future[None] = loop.create_future()
        self.is_done: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self) -> None:
        body = self._bodies.pop(0)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.streams.append(Stream(self._index, perf_counter()))
        self._transport.write(head.encode() + body)

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        stream = self.streams[-1]
        if stream.opened_s is None:
            stream.opened_s = now
            if b" 200 " not in data[:16]:
                self._end(data.decode(errors="replace"))
                return
        frames, _, self._rest = (self._rest + data).rpartition(b"\n\n")
        stream.token_s += [now] * frames.count(_TOKEN)
        if match := _NUM_TOKENS.search(frames):
            stream.num_tokens = int(match[1])
        if len(stream.token_s) >= self._after_tokens:
            _set(self.is_under_way)
        if self._rest.endswith(_END):
            self._rest = b""
            self._end(None if stream.num_tokens else frames[-300:].decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.is_done.done():
            self._bodies.clear()
            self._end(f"the connection was lost: {exc}")

    def _end(self, error: str | None) -> None:
        self.streams[-1].error = error
        if self._bodies:
            self.ask()
        else:
            _set(self.is_under_way)
            _set(self.is_done)

    def leave(self) -> None:
        """Hang up, whatever is still under way."""
        _set(self.is_done)
        self._transport.abort()


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def run(port: int, plan: dict[str, Any]) -> list[Stream]:
    """Connect everybody first, so that the clock sees requests and no handshakes."""
    loop = asyncio.get_running_loop()
    clients: list[Client] = []
    for index, bodies in enumerate((*plan["first"], *plan["then"])):
        client = Client(index, port, bodies, plan["after_tokens"])
        await loop.create_connection(lambda client=client: client, HOST, port)
        clients.append(client)
    first, then = clients[: len(plan["first"])], clients[len(plan["first"]) :]
    for client in first:
        client.ask()
    if then:
        await asyncio.gather(*(client.is_under_way for client in first))
        for client in then:
            client.ask()
        await asyncio.gather(*(client.is_done for client in then))
    if not plan["is_cut"]:
        await asyncio.gather(*(client.is_done for client in first))
    for client in clients:
        client.leave()
    streams = [stream for client in clients for stream in client.streams]
    return sorted(streams, key=lambda stream: stream.sent_s)


def main() -> None:
    given = orjson.loads(sys.stdin.buffer.read())
    streams = asyncio.run(run(given["port"], given["plan"]))
    sys.stdout.buffer.write(orjson.dumps([stream.as_json() for stream in streams]))


if __name__ == "__main__":
    main()
