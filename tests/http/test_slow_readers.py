"""Answers over real sockets: whole whatever their size, cut for slowness alone, and logged."""

import asyncio
import logging
import socket
import ssl
import struct
import tracemalloc
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter

import pytest
from helpers import in_a_loop, until

from mlxlite.http import connection
from mlxlite.http.connection import Client, Exchange
from mlxlite.http.listener import Address, Listener, tls_context
from tests.e2e.test_security import certificate  # noqa: F401

MB = 1 << 20
PATTERN = bytes(range(256)) * 4096  # one MB
KINDS = ("tcp", "tls", "unix")
LOOPBACK = "127.0.0.1"


class Sizes:
    """Answers `/whole/N` with N MB, and `/stream/N/M` with M frames of N bytes."""

    def __init__(self) -> None:
        self.body = b""  # of `/kept`
        self.streams: set[asyncio.Task[None]] = set()
        self.num_left = 0  # clients that left before their answer was complete

    def on_head(self, exchange: Exchange) -> None:
        pass

    def on_body(self, exchange: Exchange, body: bytes) -> None:
        match exchange.head.path.split("/")[1:]:
            case ["whole", size]:
                exchange.respond(200, PATTERN * int(size))
            case ["kept"]:
                exchange.respond(200, self.body)
            case ["stream", size, num]:
                task = asyncio.ensure_future(self._stream(exchange, int(size), int(num)))
                self.streams.add(task)
                task.add_done_callback(self.streams.discard)

    async def _stream(self, exchange: Exchange, size: int, num: int) -> None:
        exchange.start_stream()
        for _ in range(num):
            exchange.write(b"x" * size)
            await asyncio.sleep(0)
            if exchange.is_lost:
                return
        exchange.end_stream()

    def on_disconnect(self, exchange: Exchange) -> None:
        self.num_left += 1


class Tally:
    """An observer that counts the readers that were cut."""

    def __init__(self) -> None:
        self.cut: Counter[str] = Counter()

    def connection_opened(self) -> None: ...
    def connection_closed(self) -> None: ...
    def http(self, route: str, method: str, status: int) -> None: ...
    def connection_cut(self, reason: str) -> None:
        self.cut[reason] += 1


class Site:
    """A listener of one kind, with its deadlines looked at all the time."""

    def __init__(self, kind: str, path: Path, keys: Path) -> None:
        self.kind, self.keys = kind, keys
        self.app, self.tally = Sizes(), Tally()
        self.uds = str(path / "s") if kind == "unix" else None
        self.listener = Listener(self.app, self.tally, max_body_bytes=MB, max_connections=1000)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Site"]:
        tls = None
        if self.kind == "tls":
            tls = tls_context(str(self.keys / "cert.pem"), str(self.keys / "key.pem"))
        await self.listener.start(Address(uds=self.uds), tls)
        ticking = asyncio.ensure_future(self._tick())
        try:
            yield self
        finally:
            ticking.cancel()
            self.listener.drain()
            self.listener.abort_all()
            await self.listener.until_empty(5)
            await asyncio.gather(*self.app.streams)

    async def _tick(self) -> None:
        while True:
            self.listener.tick(perf_counter())
            await asyncio.sleep(0.01)

    async def get(
        self, path: str, fields: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request; its answer is not read yet."""
        if self.uds is not None:
            reader, writer = await asyncio.open_unix_connection(self.uds)
        else:
            client = ssl.create_default_context() if self.kind == "tls" else None
            if client is not None:
                client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
            reader, writer = await asyncio.open_connection(LOOPBACK, self.listener.port, ssl=client)
        writer.write(f"GET {path} HTTP/1.1\r\nhost: x\r\n{fields}\r\n".encode())
        return reader, writer

    def only_client(self) -> Client:
        (client,) = self.listener.clients
        return client


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Site:
    kind = request.param
    keys = request.getfixturevalue("certificate") if kind == "tls" else tmp_path
    return Site(kind, tmp_path, keys)


async def read_whole(reader: asyncio.StreamReader, rate: float = 0) -> int:
    """Read an answer with a length, `rate` bytes a second if it is not 0; its checksum."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    num_left = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    checksum, due_at = 0, perf_counter()
    while num_left:
        piece = await reader.read(min(num_left, MB))
        assert piece, f"the answer was cut, {num_left} bytes before its end"
        checksum, num_left = zlib.crc32(piece, checksum), num_left - len(piece)
        if rate:
            due_at += len(piece) / rate
            await asyncio.sleep(due_at - perf_counter())
    return checksum


@pytest.mark.parametrize("num_mb", [5, 50, 200])
def test_an_answer_arrives_whole_whatever_its_size(site: Site, num_mb: int) -> None:
    @in_a_loop
    async def test() -> None:
        async with site.serving():
            reader, writer = await site.get(f"/whole/{num_mb}")
            assert await read_whole(reader) == zlib.crc32(PATTERN * num_mb)
            assert site.listener.num_unsent_bytes == 0
            writer.write(b"GET /whole/1 HTTP/1.1\r\nhost: x\r\n\r\n")
            assert await read_whole(reader) == zlib.crc32(PATTERN)
            writer.close()
            assert not site.tally.cut

    test()


def test_a_reader_of_ten_mb_a_second_outlasts_every_time_limit(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline of writing counts from the last progress; those of reading do not count at all."""
    monkeypatch.setattr(connection, "WRITE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(connection, "WRITE_GRACE_S", 0.3)
    monkeypatch.setattr(connection, "KEEP_ALIVE_S", 0.3)
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.3)

    @in_a_loop
    async def test() -> None:
        async with site.serving():
            reader, writer = await site.get("/whole/10")
            assert await read_whole(reader, rate=10e6) == zlib.crc32(PATTERN * 10)
            writer.close()

    test()


@pytest.mark.parametrize("how", ["connection: close", "drain", "EOF"])
def test_an_answer_that_ends_its_connection_arrives_whole(site: Site, how: str) -> None:
    @in_a_loop
    async def test() -> None:
        if how == "EOF" and site.kind == "tls":
            return  # asyncio's TLS has no half-closed connection
        async with site.serving():
            fields = "connection: close\r\n" if how == "connection: close" else ""
            reader, writer = await site.get("/whole/20", fields)
            if how == "EOF":
                await until(lambda: any(one.num_unsent_bytes for one in site.listener.clients))
                writer.write_eof()
            elif how == "drain":
                await until(lambda: any(one.num_unsent_bytes for one in site.listener.clients))
                site.listener.drain()
            assert await read_whole(reader) == zlib.crc32(PATTERN * 20)
            assert await reader.read() == b""
            writer.close()
            await until(lambda: not site.listener.clients)
            assert not site.tally.cut

    test()


def test_single_large_frames_of_a_stream_arrive_whole(site: Site) -> None:
    @in_a_loop
    async def test() -> None:
        async with site.serving():
            reader, writer = await site.get(f"/stream/{12 * MB}/3")
            await reader.readuntil(b"\r\n\r\n")
            num = 0
            while num_bytes := int(await reader.readuntil(b"\r\n"), 16):
                num += len(await reader.readexactly(num_bytes))
                await reader.readexactly(2)
            assert num == 36 * MB
            writer.close()
            assert not site.tally.cut

    test()


CUT = {
    "stalled": ("/whole/30", {"WRITE_TIMEOUT_S": 0.2}),
    "slow": ("/whole/30", {"WRITE_GRACE_S": 0.2, "MIN_READ_RATE": 1e12}),
    "backlog": ("/stream/1000/30000", {"MAX_UNSENT_BYTES": 1 << 16}),
    "memory": ("/whole/30", {"MAX_ALL_UNSENT_BYTES": 20 * MB}),
    "shutdown": ("/whole/30", {}),
}


@pytest.mark.parametrize("reason", CUT)
def test_a_slow_reader_is_cut_with_one_line_and_counted(
    site: Site, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, limits = CUT[reason]
    for name, value in limits.items():
        monkeypatch.setattr(connection, name, value)

    @in_a_loop
    async def test() -> None:
        async with site.serving():
            reader, writer = await site.get(path, "x-request-id: slow-one\r\n")
            if reason == "shutdown":
                await until(lambda: any(one.num_unsent_bytes for one in site.listener.clients))
                site.listener.abort_all()
            await until(lambda: site.tally.cut)
            await until(lambda: not site.listener.clients)
            assert site.tally.cut == {reason: 1}
            assert site.listener.num_unsent_bytes == 0
            assert site.app.num_left == (reason == "backlog")
            with suppress(ConnectionError):
                assert len(await reader.read()) < 30 * MB
            writer.close()

    test()
    (line,) = [r.getMessage() for r in caplog.records if r.name == "mlxlite.connection"]
    assert line.startswith(f"cut ({reason}): slow-one, ")
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


@in_a_loop
async def test_at_the_bound_of_all_connections_the_slowest_is_cut(
    tmp_path: Path,
) -> None:
    site = Site("tcp", tmp_path, tmp_path)
    async with site.serving():
        taking, its_writer = await site.get("/whole/20")
        await until(lambda: site.listener.num_unsent_bytes)
        fast = site.only_client()
        _, other_writer = await site.get("/whole/19")
        await until(lambda: len(site.listener.clients) == 2)
        (slow,) = site.listener.clients - {fast}
        await until(lambda: slow.num_unsent_bytes)
        for client in (fast, slow):
            client.pace._since -= 2
        assert len(await taking.readexactly(8 * MB)) == 8 * MB
        await until(lambda: fast.pace.rate(perf_counter()) > slow.pace.rate(perf_counter()))
        site.listener.cut_slowest(25 * MB, perf_counter())
        assert site.tally.cut == {"memory": 1}
        assert slow.connections.num_unsent_bytes == 20 * MB
        await taking.read(12 * MB)
        for writer in (its_writer, other_writer):
            writer.close()


def test_a_large_body_is_not_copied(site: Site) -> None:
    @in_a_loop
    async def test() -> None:
        async with site.serving():
            site.app.body = PATTERN * 50
            _, writer = await site.get("/stream/1/1")
            await until(lambda: site.listener.clients)
            await until(lambda: not site.only_client().is_busy)
            writer.transport.pause_reading()
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            writer.write(b"GET /kept HTTP/1.1\r\nhost: x\r\n\r\n")
            await until(lambda: site.only_client().num_unsent_bytes > 20 * MB)
            await asyncio.sleep(0.1)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak - before < 4 * MB
            writer.transport.abort()

    test()


# --- resets --------------------------------------------------------------------------------------


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


MOMENTS = {
    "at once": b"",
    "in the head": b"GET / HT",
    "in the body": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nab",
    "in an answer": b"GET /whole/9 HTTP/1.1\r\nhost: x\r\n\r\n",
    "in a stream": b"GET /stream/1000/9999 HTTP/1.1\r\nhost: x\r\n\r\n",
    "in a pipeline": b"GET /whole/1 HTTP/1.1\r\nhost: x\r\n\r\n" * 40,
    "after nonsense": b"\0\r\n\r\n",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_hundred_resets_at_any_moment_leave_nothing_behind(
    moment: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        site = Site("tcp", tmp_path, tmp_path)
        async with site.serving():
            socks = [
                socket.create_connection((LOOPBACK, site.listener.port))
                for _ in range(500 if moment == "at once" else 100)
            ]
            for number, sock in enumerate(socks):
                sock.sendall(MOMENTS[moment])
                if number % 10 == 0:
                    await asyncio.sleep(0)
            for number, sock in enumerate(socks):
                reset(sock)
                if number % 10 == 0:
                    await asyncio.sleep(0)
            await until(lambda: not site.listener.clients)
            assert site.listener.num_unsent_bytes == site.listener.num_held_bytes == 0

    test()
    assert not [record for record in caplog.records if record.name != "mlxlite.http"]


@in_a_loop
async def test_the_system_probes_a_silent_peer(tmp_path: Path) -> None:
    site = Site("tcp", tmp_path, tmp_path)
    async with site.serving():
        _, writer = await site.get("/stream/1/1")
        await until(lambda: site.listener.clients)
        sock = site.only_client()._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 15
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4
        writer.close()


@pytest.mark.parametrize("path", ["/whole/9", "/whole/1", "/stream/1000/9999"])
def test_resets_in_mid_answer_leave_nothing_behind(
    site: Site, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with site.serving():
            for number in range(30):
                reader, writer = await site.get(path)
                await reader.readexactly(1 + number * 10)
                if site.kind != "unix":
                    linger = struct.pack("ii", 1, 0)
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            await until(lambda: not site.listener.clients)
            assert site.listener.num_unsent_bytes == 0

    test()
    assert not [record for record in caplog.records if record.name != "mlxlite.http"]
