"""The load generator: sends a plan's requests to a server and records when each token arrived.

It is a process of its own, so that its Python never competes with the server's event loop for more
than a core, and it parses no JSON while an answer is running: tokens are counted by the lines that
have text. It supports any server with the OpenAI API: HTTP/1.0 and 1.1, bodies that are chunked,
counted or ended by the connection. It reads `{"port", "model", "plan"}` from stdin and writes the
streams to stdout, both JSON. Imports neither MLX nor mlxlite.
"""

import asyncio
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
    """What ends a body."""

    CHUNKED = auto()
    COUNTED = auto()
    CLOSED = auto()


class Answer:
    """Parses one answer into a stream's figures, which do not depend on how bytes are split."""

    def __init__(self, stream: Stream, keeps_lines: bool = False) -> None:
        self.stream = stream
        self.is_whole = False
        self.closes = False  # the connection takes no further request
        self._head = b""
        self._is_ok = self._is_streamed = self._is_done = False
        self._framing: Framing | None = None
        self._num_left = 0  # bytes, of a counted body
        self._rest = b""  # of an incomplete line
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
            case _:  # a client stops reading here, even if the connection stays open
                is_over = self._is_streamed and self._is_done
        if is_over:
            self._finish(now)

    def close(self, reason: str) -> None:
        """The connection was closed: the end of some bodies, and an error in others."""
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
        # A server without usage in its streams is counted by its frames.
        self.stream.num_tokens = self.stream.num_tokens or len(self.stream.token_s)
        if not self.stream.num_tokens and self.stream.error is None:
            self.stream.error = f"no text: {self._rest[-300:].decode(errors='replace')}"

    @property
    def text(self) -> str:
        """The answer's text, if lines were kept."""
        parts = []
        for line in self.lines:
            value = line.strip().removeprefix(b"data:").strip()
            if value.startswith(b"{"):
                for choice in orjson.loads(value).get("choices", ()):
                    message = choice.get("delta") or choice.get("message") or {}
                    parts.append(message.get("content") or "")
        return "".join(parts)


def _joined(chunks: bytes) -> bytes:
    parts = []
    while chunks:
        size, _, chunks = chunks.partition(b"\r\n")
        num = int(size.partition(b";")[0] or b"0", 16)
        parts.append(chunks[:num])
        chunks = chunks[num + 2 :]
    return b"".join(parts)


class Client:
    """Sends requests one after the other, on one connection for as long as the server keeps it."""

    def __init__(
        self, index: int, given: Mapping[str, Any], asks: Sequence[Mapping[str, Any]]
    ) -> None:
        self._index = index
        self._port: int = given["port"]
        self._model: str | None = given.get("model")
        self._asks = asks
        self._after_tokens: int = given["plan"]["after_tokens"]
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._messages: list[Any] = []
        self.streams: list[Stream] = []
        self.is_under_way = asyncio.Event()

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection(HOST, self._port)

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
            if self._reader is None or self._reader.at_eof():
                await self.connect()
        except OSError as error:
            stream.error = f"there was no connection: {error}"
            stream.ended_s = perf_counter()
            return
        assert self._writer is not None
        self._writer.write(data)
        with suppress(TimeoutError):
            async with asyncio.timeout(ask["leave_after_s"]):
                await self._read(answer, ask["leave_after_tokens"] or math.inf)
        if not answer.is_whole:
            self.leave()
        elif answer.closes:
            self.close()
        if answer.lines:
            self._messages.append({"role": "assistant", "content": answer.text})

    async def _read(self, answer: Answer, most_tokens: float) -> None:
        assert self._reader is not None
        stream = answer.stream
        while not answer.is_whole and len(stream.token_s) < most_tokens:
            try:
                data, reason = await self._reader.read(1 << 16), "closed"
            except ConnectionError as error:
                data, reason = b"", str(error)
            if data:
                answer.take(data, perf_counter())
            else:
                answer.close(reason)
            if stream.opened_s and len(stream.token_s) >= self._after_tokens:
                self.is_under_way.set()

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
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    def leave(self) -> None:
        """Disconnect, even in the middle of an answer."""
        self.streams[-1].left_s = perf_counter()
        self.close()


async def run(given: Mapping[str, Any]) -> list[Stream]:
    """Clients that send at once are connected before the clock starts, or late by the plan."""
    plan = given["plan"]
    every = (*plan["first"], *plan["then"])
    clients = [Client(i, given, asks) for i, asks in enumerate(every)]
    for client, asks in zip(clients, every, strict=True):
        if not asks[0]["at_s"] and not plan["connects_late"]:
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
    sys.stdout.buffer.write(orjson.dumps(streams))


if __name__ == "__main__":
    main()
