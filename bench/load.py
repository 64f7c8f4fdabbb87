"""The load generator: asks a server what a plan says, and notes when each token came.

It is a process of its own, so that its Python never competes with the server's loop for anything
but a core, and it does little with each line: no JSON is parsed while an answer runs, tokens are
counted by the lines that have text. It speaks to any server with the OpenAI API: HTTP/1.0 and 1.1,
chunked bodies, counted ones and such as end with the connection. Reads `{"port", "model", "plan"}`
from stdin and writes the streams to stdout, both JSON. Imports neither MLX nor mlxlite.

    python -m bench.load <plan.json >streams.json
"""

import asyncio
import re
import sys
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from time import perf_counter
from typing import Any

import orjson

from bench.plan import Stream

HOST = "127.0.0.1"
_TEXT = re.compile(rb'"(?:content|reasoning_content|reasoning|text)": ?"[^"]')
_NUM_TOKENS = re.compile(rb'"completion_tokens": ?(\d+)')
_NUM_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"^HTTP/1\.0 |\r\nconnection: *close", re.IGNORECASE)
_STREAM = re.compile(rb"\r\ncontent-type: *text/event-stream", re.IGNORECASE)
_ERROR = re.compile(rb'^data: ?\{"error"')
_END = b"\r\n0\r\n\r\n"  # of a chunked answer


class Framing(Enum):
    """How the end of a body is known."""

    CHUNKED = auto()
    COUNTED = auto()
    CLOSED = auto()


class Answer:
    """One answer as it comes: bytes and the time go in, a stream's figures come out.

    It knows no socket. The same bytes give the same counts however they are split (tested).
    """

    def __init__(self, stream: Stream, keeps_lines: bool = False) -> None:
        self.stream = stream
        self.is_whole = False
        self.closes = False  # nothing more can be asked on this connection
        self._head = b""
        self._is_ok = self._is_streamed = self._is_done = False
        self._framing: Framing | None = None
        self._num_left = 0  # bytes, of a counted body
        self._rest = b""  # of a line that has not ended
        self._end = b""  # the last bytes of a chunked body
        self._keeps_lines = keeps_lines
        self.lines: list[bytes] = []

    def take(self, data: bytes, now: float) -> None:
        self.stream.ended_s = now
        if self._framing is None:
            self._head += data
            head, is_whole, data = self._head.partition(b"\r\n\r\n")
            if not is_whole:
                return
            self._open(head, now)
        self._rest += data
        if self._is_streamed and self._is_ok:
            *lines, self._rest = self._rest.split(b"\n")
            for line in lines:
                self._line(line, now)
        match self._framing:
            case Framing.CHUNKED:
                self._end = (self._end + data)[-len(_END) :]
                is_over = self._end == _END
            case Framing.COUNTED:
                self._num_left -= len(data)
                is_over = self._num_left <= 0
            case _:  # a client reads no further than this, whatever the connection does
                is_over = self._is_streamed and self._is_done
        if is_over:
            self._finish(now)

    def close(self, reason: str) -> None:
        """The connection has ended, which ends some bodies and breaks others off."""
        if self.is_whole:
            return
        if self._framing is Framing.CLOSED and self.stream.left_s is None:
            assert self.stream.ended_s is not None
            self._finish(self.stream.ended_s)
        else:
            self.is_whole = True
            if self.stream.left_s is None:
                self.stream.error = f"the connection was lost: {reason}"

    def _open(self, head: bytes, now: float) -> None:
        self.stream.opened_s = now
        self._is_ok = b" 200" in head[:13]
        self._is_streamed = _STREAM.search(head) is not None
        self.closes = _CLOSE.search(head) is not None
        if _CHUNKED.search(head):
            self._framing = Framing.CHUNKED
            self._end = b"\r\n"  # the head's own, so that an empty body ends too
        elif match := _LENGTH.search(head):
            self._framing = Framing.COUNTED
            self._num_left = int(match[1])
        else:
            self._framing = Framing.CLOSED
            self.closes = True

    def _line(self, line: bytes, now: float) -> None:
        if _TEXT.search(line):
            self.stream.token_s.append(now)
        elif _ERROR.search(line):
            self.stream.error = line.decode(errors="replace")
        if self._keeps_lines:
            self.lines.append(line)
        self._is_done = self._is_done or line.startswith(b"data: [DONE]")
        self._count(line)

    def _count(self, text: bytes) -> None:
        if match := _NUM_TOKENS.search(text):
            self.stream.num_tokens = int(match[1])
        if match := _NUM_CACHED.search(text):
            self.stream.num_cached = int(match[1])

    def _finish(self, now: float) -> None:
        self.is_whole = True
        if not self._is_ok:
            self.stream.error = (self._head[:200] + self._rest[-300:]).decode(errors="replace")
        elif not self._is_streamed:
            body = _joined(self._rest) if self._framing is Framing.CHUNKED else self._rest
            self._count(body)
            self.stream.token_s = [now]
            self.lines = [body]
        # A server that counts nothing in a stream is counted by its frames.
        self.stream.num_tokens = self.stream.num_tokens or len(self.stream.token_s)
        if not self.stream.num_tokens and self.stream.error is None:
            self.stream.error = f"no text: {self._rest[-300:].decode(errors='replace')}"

    @property
    def text(self) -> str:
        """What was said, if lines were kept."""
        parts = []
        for line in self.lines:
            value = line.strip().removeprefix(b"data:").strip()
            if value.startswith(b"{"):
                for choice in orjson.loads(value).get("choices", ()):
                    said = choice.get("delta") or choice.get("message") or {}
                    parts.append(said.get("content") or "")
        return "".join(parts)


def _joined(chunks: bytes) -> bytes:
    """A chunked body without its framing."""
    parts = []
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        num = int(size.partition(b";")[0] or b"0", 16)
        parts.append(chunks[:num])
        chunks = chunks[num + 2 :]
    return b"".join(parts)


class Connection(asyncio.Protocol):
    """A connection with at most one answer under way."""

    def __init__(self) -> None:
        self.is_open = True
        self._answer: Answer | None = None
        self._has_come: asyncio.Event = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.take(data, perf_counter())
            self._has_come.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._answer is not None:
            self._answer.close(str(exc))
            self._has_come.set()

    def ask(self, data: bytes, answer: Answer) -> None:
        self._answer = answer
        self.transport.write(data)

    async def news(self) -> None:
        """Return when something has come, or the connection has gone."""
        await self._has_come.wait()
        self._has_come.clear()


class Client:
    """Asks its requests one after the other, on one connection as long as the server keeps it."""

    def __init__(
        self, index: int, given: Mapping[str, Any], asks: Sequence[Mapping[str, Any]]
    ) -> None:
        self._index = index
        self._port: int = given["port"]
        self._model: str | None = given.get("model")
        self._asks = asks
        self._after_tokens: int = given["plan"]["after_tokens"]
        self._connection: Connection | None = None
        self._messages: list[Any] = []
        self.streams: list[Stream] = []
        self.is_under_way = asyncio.Event()

    @property
    def is_early(self) -> bool:
        """Whether it asks at once: such clients are connected before the clock starts."""
        return not self._asks[0]["at_s"]

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, self._connection = await loop.create_connection(Connection, HOST, self._port)
        return self._connection

    async def run(self, begun_at: float) -> None:
        try:
            for ask in self._asks:
                await asyncio.sleep(max(0.0, begun_at + ask["at_s"] - perf_counter()))
                await self._one(ask)
                if self.streams[-1].left_s is not None:
                    break
        finally:
            self.is_under_way.set()

    async def _one(self, ask: Mapping[str, Any]) -> None:
        data = self._request(ask)
        stream = Stream(self._index, perf_counter())
        self.streams.append(stream)
        answer = Answer(stream, keeps_lines=len(self._asks) > 1)
        try:
            if self._connection is None or not self._connection.is_open:
                await self.connect()
        except OSError as error:
            stream.error = f"there was no connection: {error}"
            stream.ended_s = perf_counter()
            return
        assert self._connection is not None
        self._connection.ask(data, answer)
        try:
            async with asyncio.timeout(ask["leave_after_s"]):
                while not answer.is_whole and not self._wants_to_leave(ask, stream):
                    await self._connection.news()
                    if stream.opened_s and len(stream.token_s) >= self._after_tokens:
                        self.is_under_way.set()
        except TimeoutError:
            pass
        if not answer.is_whole:
            self.leave()
        elif answer.closes:
            self._connection.transport.close()
            self._connection = None
        if answer.lines:
            self._messages.append({"role": "assistant", "content": answer.text})

    def _wants_to_leave(self, ask: Mapping[str, Any], stream: Stream) -> bool:
        wanted = ask["leave_after_tokens"]
        return wanted is not None and len(stream.token_s) >= wanted

    def _request(self, ask: Mapping[str, Any]) -> bytes:
        body = dict(ask["body"])
        self._messages = [*(self._messages if ask["is_next_turn"] else ()), *body["messages"]]
        body["messages"] = self._messages
        if self._model is not None:
            body["model"] = self._model
        data = orjson.dumps(body)
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: {HOST}:{self._port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return head.encode() + data

    def close(self) -> None:
        if self._connection is not None:
            self._connection.transport.abort()

    def leave(self) -> None:
        """Hang up, whatever is still under way."""
        if self._connection is not None and self._connection.is_open:
            self.streams[-1].left_s = perf_counter()
            self._connection.transport.abort()


async def run(given: Mapping[str, Any]) -> list[Stream]:
    """Those who ask at once are connected first, unless the plan says that they connect late: the
    clock sees their requests, no handshakes.
    """
    plan = given["plan"]
    clients = [Client(i, given, asks) for i, asks in enumerate((*plan["first"], *plan["then"]))]
    for client in clients:
        if client.is_early and not plan["connects_late"]:
            await client.connect()
    begun_at = perf_counter()
    runs = [asyncio.ensure_future(c.run(begun_at)) for c in clients[: len(plan["first"])]]
    if plan["then"]:
        await asyncio.gather(*(c.is_under_way.wait() for c in clients[: len(runs)]))
        await asyncio.gather(*(c.run(perf_counter()) for c in clients[len(runs) :]))
    if plan["is_cut"]:
        for client, task in zip(clients, runs, strict=False):
            if not task.done():
                client.leave()
                task.cancel()
    await asyncio.gather(*runs, return_exceptions=plan["is_cut"])
    for client in clients:
        client.close()
    streams = [stream for client in clients for stream in client.streams]
    return sorted(streams, key=lambda stream: stream.sent_s)


def main() -> None:
    streams = asyncio.run(run(orjson.loads(sys.stdin.buffer.read())))
    sys.stdout.buffer.write(orjson.dumps([stream.as_json() for stream in streams]))


if __name__ == "__main__":
    main()
