"""Remote images: the addresses that a fetch may connect to, and the limits of a response.

Fetches run over a network of scripts with a clock of their own; a few tests run over real sockets,
which the scripts must resemble.
"""

import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import pytest
from helpers import Clock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxlite import wanted
from mlxlite.vision import images
from mlxlite.vision.decoder import Decoder
from mlxlite.vision.fetch import Limits, Network, is_public
from mlxlite.vision.images import ImageError, LoadedImage, Source, source_of

PARAM = "messages[0].content[1].image_url"
LIMITS = Limits()
REMOTE = Limits(allow_remote=True)


def load(
    sources: Sequence[Source], limits: Limits, network: Network | None = None
) -> tuple[LoadedImage, ...]:
    return images.load(sources, limits, Decoder(()), network)


def png(width: int, height: int) -> bytes:
    """A PNG of reproducible noise, of about as many bytes as its pixels have."""
    pixels = random.Random(1).randbytes(3 * width * height)
    file = BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
    return file.getvalue()


PNG = png(16, 16)


# --- addresses ----------------------------------------------------------------------------------

PRIVATE = [
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
    *("169.254.169.254", "100.64.0.1", "198.18.0.1", "192.0.2.1", "203.0.113.9", "240.0.0.1"),
    *("224.0.0.1", "224.0.1.1", "239.255.255.255", "255.255.255.255", "192.0.0.1"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1"),
    *("ff0e::1", "2001:db8::1", "100::1", "::127.0.0.1", "::8.8.8.8"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:8.8.8.8"),
    *("64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"),
    *("2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:808:808::80ff:fffe"),
    *("", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "1.2.3", "08.8.8.8"),
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_is_private(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "2a00:1450::1", "64:ff9b::8.8.8.8"]
)
def test_an_address_is_public(address: str) -> None:
    assert is_public(address)


@given(st.ip_addresses())
def test_no_private_address_is_public_in_any_ipv6_embedding(ip: Any) -> None:
    if ip.version == 4 and not is_public(str(ip)):
        inside = int(ip)
        for wrapped in (f"::ffff:{ip}", f"::{ip}", f"64:ff9b::{ip}"):
            assert not is_public(wrapped)
        assert not is_public(f"2002:{inside >> 16:x}:{inside & 0xFFFF:x}::1")
        flipped = inside ^ 0xFFFF_FFFF
        assert not is_public(f"2001:0:808:808:0:0:{flipped >> 16:x}:{flipped & 0xFFFF:x}")


# --- fetching -----------------------------------------------------------------------------------

PUBLIC = "93.184.215.14"
URL = "http://example.com/cat.png"
Script = Sequence[bytes | float | OSError]  # bytes to receive, seconds to wait, an error


class FakeWire:
    """A connection that receives a script, and then nothing."""

    def __init__(self, script: Script, clock: Clock) -> None:
        self.sent = b""
        self.is_closed = False
        self._script = list(script)
        self._clock = clock
        self._timeout_s = 0.0

    def settimeout(self, timeout_s: float, /) -> None:
        assert timeout_s > 0
        self._timeout_s = timeout_s

    def sendall(self, data: bytes, /) -> None:
        self.sent += data

    def recv(self, num_bytes: int, /) -> bytes:
        assert not self.is_closed
        while self._script:
            match self._script.pop(0):
                case bytes(data):
                    self._script[:0] = [data[num_bytes:]] if data[num_bytes:] else []
                    return data[:num_bytes]
                case OSError() as error:
                    raise error
                case float(pause_s):
                    self._clock.now += min(pause_s, self._timeout_s)
                    if pause_s >= self._timeout_s:
                        self._script.insert(0, pause_s - self._timeout_s)
                        raise TimeoutError
        return b""

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeNetwork:
    """Names and their addresses, and a script for each connection to an address."""

    names: dict[str, list[str]] = field(default_factory=lambda: {"example.com": [PUBLIC]})
    scripts: dict[str, list[Script]] = field(default_factory=dict)
    resolve_s: float = 0.0
    clock: Clock = field(default_factory=Clock)
    resolved: list[str] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)
    secured: list[str] = field(default_factory=list)
    wires: list[FakeWire] = field(default_factory=list)

    def resolve(self, host: str, port: int, timeout_s: float) -> list[str]:
        self.resolved.append(host)
        self.clock.now += min(self.resolve_s, timeout_s)
        return self.names.get(host, []) if self.resolve_s < timeout_s else []

    def dial(self, address: str, port: int, timeout_s: float) -> FakeWire:
        assert 0 < timeout_s <= REMOTE.connect_s
        self.dialled.append((address, port))
        scripts = self.scripts.get(address, [])
        if not scripts:
            self.clock.now += timeout_s
            raise TimeoutError
        self.wires.append(FakeWire(scripts.pop(0), self.clock))
        return self.wires[-1]

    def secure(self, wire: Any, host: str) -> Any:
        self.secured.append(host)
        return wire

    @property
    def network(self) -> Network:
        return Network(self.resolve, self.dial, self.secure, self.clock)


def answer(body: bytes = PNG, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def moved(url: str, status: str = "302 Found") -> bytes:
    return answer(b"moved", status, f"Location: {url}")


def saying(*scripts: Script, **more: Any) -> FakeNetwork:
    return FakeNetwork(scripts={PUBLIC: list(scripts)}, **more)


def fetch(url: str, fake: FakeNetwork, limits: Limits = REMOTE) -> LoadedImage:
    try:
        (found,) = load([source_of(url, PARAM)], limits, fake.network)
    finally:
        assert all(wire.is_closed for wire in fake.wires)
    return found


def failure(url: str, fake: FakeNetwork, limits: Limits = REMOTE) -> str:
    with pytest.raises(ImageError) as caught:
        fetch(url, fake, limits)
    assert caught.value.param == PARAM
    return str(caught.value).removeprefix(f"'{PARAM}' ").removesuffix(".")


UNREACHABLE = "has no public address to be fetched from"


def test_an_image_is_fetched_from_the_address_resolved_once() -> None:
    fake = saying([answer()])
    assert fetch("http://EXAMPLE.com/a%20b.png?q=ü#top", fake).pixels.size == (16, 16)
    assert (fake.resolved, fake.dialled) == (["example.com"], [(PUBLIC, 80)])
    assert fake.wires[0].sent == (
        b"GET /a%20b.png?q=%C3%BC HTTP/1.1\r\n"
        b"Host: example.com\r\n"
        b"User-Agent: mlxlite\r\n"
        b"Accept: image/*\r\n"
        b"Accept-Encoding: identity\r\n"
        b"Connection: close\r\n\r\n"
    )


def test_a_fetched_image_has_the_bytes_that_were_sent() -> None:
    source = Source(PNG, None, PARAM)
    assert fetch(URL, saying([answer()])).digest == load([source], LIMITS)[0].digest


def test_nothing_is_fetched_unless_remote_images_are_allowed() -> None:
    fake = saying([answer()])
    assert "--allow-remote-images" in failure(URL, fake, LIMITS)
    assert (fake.resolved, fake.dialled) == ([], [])


def test_a_secure_fetch_is_secured_for_the_name_in_the_url() -> None:
    fake = saying([answer()])
    fetch("https://example.com/", fake)
    assert (fake.dialled, fake.secured) == ([(PUBLIC, 443)], ["example.com"])
    assert b"Host: example.com\r\n" in fake.wires[0].sent


def test_the_host_header_has_a_port_that_is_not_the_default() -> None:
    fake = saying([answer()], [answer()])
    fetch("https://example.com:8443/", fake)
    fetch("http://example.com:443/", fake)
    assert [port for _, port in fake.dialled] == [8443, 443]
    assert b"Host: example.com:8443\r\n" in fake.wires[0].sent
    assert b"Host: example.com:443\r\n" in fake.wires[1].sent


def test_an_address_in_a_url_needs_no_name_server() -> None:
    fake = FakeNetwork(scripts={"2606:4700::1111": [[answer()]]})
    fetch("http://[2606:4700::1111]/", fake)
    assert fake.resolved == []
    assert b"Host: [2606:4700::1111]\r\n" in fake.wires[0].sent


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.0.0.1:8080/v1/cache",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
        "http://LOCALHOST:8080/",
        "http://0/",
        "http://0.0.0.0/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.0.0.1/",
        "http://0177.0.0.1/",
        "http://017700000001/",
        "http://127.0.0.1./",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[fe80::1]/",
        "http://metadata.google.internal/",
        "http://unknown.example/",
        "http://1.2.3/",
    ],
)
def test_private_and_unknown_addresses_have_the_same_error(url: str) -> None:
    names = {"localhost": ["::1", "127.0.0.1"], "metadata.google.internal": ["169.254.169.254"]}
    fake = FakeNetwork(names=names)
    assert failure(url, fake) == UNREACHABLE
    assert fake.dialled == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "1.2.3.4.", "0x"])
def test_a_numeric_host_is_never_resolved(host: str) -> None:
    fake = saying([answer()], names={host: [PUBLIC]})
    assert failure(f"http://{host}/", fake) == UNREACHABLE
    assert (fake.resolved, fake.dialled) == ([], [])


def test_localhost_is_refused_by_name() -> None:
    with pytest.raises(ImageError, match=UNREACHABLE):
        load([source_of("http://localhost/", PARAM)], REMOTE)  # without a fake: nothing is dialled


@pytest.mark.parametrize("private", ["10.0.0.1", "::1", "::ffff:10.0.0.1", "not an address"])
def test_one_private_address_among_public_ones_is_enough(private: str) -> None:
    for addresses in ([PUBLIC, private], [private, PUBLIC], [PUBLIC, PUBLIC, private]):
        fake = saying([answer()], names={"example.com": addresses})
        assert failure(URL, fake) == UNREACHABLE
        assert fake.dialled == []


def test_further_addresses_are_dialled_after_a_failure_ipv4_first() -> None:
    addresses = ["2606:4700::1111", "1.1.1.1", PUBLIC, "8.8.8.8"]
    fake = saying([answer()], names={"example.com": addresses})
    fetch(URL, fake)
    assert [address for address, _ in fake.dialled] == ["1.1.1.1", PUBLIC]


def test_no_more_than_three_addresses_are_dialled() -> None:
    fake = FakeNetwork(names={"example.com": [f"8.8.8.{i}" for i in range(100)]})
    assert "could not be fetched" in failure(URL, fake, replace(REMOTE, total_s=60))
    assert len(fake.dialled) == 3


@pytest.mark.parametrize("status", ["301 A", "302 B", "303 C", "307 D", "308 E"])
def test_a_redirect_is_followed_as_a_url_of_its_own(status: str) -> None:
    names = {"example.com": [PUBLIC], "cdn.example": ["1.1.1.1"]}
    scripts: dict[str, list[Script]] = {
        PUBLIC: [[moved("//cdn.example/x", status)]],
        "1.1.1.1": [[moved("y?z")], [answer()]],
    }
    fake = FakeNetwork(names, scripts)
    fetch(URL, fake)
    assert fake.resolved == ["example.com", "cdn.example", "cdn.example"]
    assert [wire.sent.split()[1] for wire in fake.wires] == [b"/cat.png", b"/x", b"/y?z"]
    assert b"Host: cdn.example\r\n" in fake.wires[1].sent


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://127.0.0.1/", UNREACHABLE),
        ("http://[::1]/", UNREACHABLE),
        ("//localhost:8080/", UNREACHABLE),
        ("http://2130706433/", UNREACHABLE),
        ("http://unknown.example/", UNREACHABLE),
        ("file:///etc/passwd", "leads to a URL that is not fetched"),
        ("ftp://example.com/", "leads to a URL that is not fetched"),
        ("data:image/png;base64,AAAA", "leads to a URL that is not fetched"),
        ("http://user:key@example.com/", "leads to a URL that is not fetched"),
        ("http://example.com:25/", "leads to a URL that is not fetched"),
        ("http://[::1", "leads to a URL that is not fetched"),
        ("/a b", "leads to a URL that is not fetched"),
    ],
)
def test_a_redirect_to_a_refused_url_is_refused(location: str, message: str) -> None:
    fake = saying([moved(location)])
    assert failure(URL, fake) == message
    assert len(fake.dialled) == 1


def test_a_redirect_is_read_as_utf_8() -> None:
    fake = saying([moved("/ü.png")], [answer()])
    fetch(URL, fake)
    assert fake.wires[1].sent.startswith(b"GET /%C3%BC.png HTTP/1.1\r\n")


def test_a_redirect_to_a_name_that_became_private_is_refused() -> None:
    fake = saying([moved("/again")])
    resolve = iter([[PUBLIC], ["127.0.0.1"]])
    network = replace(fake.network, resolve=lambda *_: next(resolve))
    with pytest.raises(ImageError, match=UNREACHABLE):
        load([source_of(URL, PARAM)], REMOTE, network)
    assert len(fake.dialled) == 1


def test_a_redirect_from_https_to_http_is_refused() -> None:
    assert "from https to http" in failure("https://example.com/", saying([moved(URL)]))
    fetch(URL, saying([moved("https://example.com/")], [answer()]))


def test_redirects_are_followed_three_times() -> None:
    circle: list[Script] = [[moved(URL)] for _ in range(10)]
    fake = saying(*circle)
    assert failure(URL, fake) == "is redirected too often"
    assert len(fake.dialled) == 4
    fetch(URL, saying(*circle[:3], [answer()]))


@pytest.mark.parametrize("status", ["404 Not here", "500 secret", "204 No", "206 Part", "304 Old"])
def test_any_other_status_is_the_only_part_of_a_response_in_the_error(status: str) -> None:
    error = failure(URL, saying([answer(b"", status, "X-Secret: secret")]))
    assert error == f"could not be fetched: the answer was {status[:3]}"


def test_a_redirect_without_a_location_is_an_error_status() -> None:
    assert failure(URL, saying([answer(b"x", "302 Found")])).endswith("the answer was 302")


@pytest.mark.parametrize(
    "script",
    [
        [],
        [b"secret\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nsecret"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nsecret"],
        [b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nX: " + b"x" * 20_000],
        [b"HTTP/1.1 200 OK\r\nX: y\r\n" * 1000],
        [b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000],
        [b"HTTP/1.1 200 OK\r\nX: y\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nsecret"],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-%x\r\nsecret" % 2**70],
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nsec"],
        [b"HTTP/1.1 200 OK\r\n", ConnectionResetError("secret")],
    ],
)
def test_a_broken_response_is_not_quoted(script: Script) -> None:
    assert failure(URL, saying(script)) == "could not be fetched"


def test_a_response_that_is_no_image_is_not_quoted() -> None:
    assert failure(URL, saying([answer(b"root:x:0:0")])) == (
        "is no picture in PNG, JPEG, WebP, GIF or BMP"
    )


def test_interim_responses_are_skipped() -> None:
    fetch(URL, saying([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3, answer()]))


def test_a_body_ends_with_its_chunks_or_with_the_connection() -> None:
    head = b"HTTP/1.1 200 OK\r\n"
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(PNG), PNG)
    fetch(URL, saying([head + chunked]))
    fetch(URL, saying([head + b"\r\n" + PNG]))
    fetch(URL, saying([bytes([byte]) for byte in answer()]))


def test_a_length_that_is_too_large_is_refused_before_the_body() -> None:
    limits = replace(REMOTE, max_bytes=1 << 20)
    script: Script = [b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", OSError("not read")]
    assert failure(URL, saying(script), limits) == "is larger than 1 MiB"


def test_a_body_that_is_too_large_is_refused_without_a_length_too() -> None:
    limits = replace(REMOTE, max_bytes=1 << 20)
    script: Script = [b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(1 << 16)] * 17, OSError("not read")]
    assert failure(URL, saying(script), limits) == "is larger than 1 MiB"


def test_a_chunk_of_negative_size_is_not_read_without_end() -> None:
    limits = replace(REMOTE, max_bytes=1 << 20)
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
    script: Script = [head, *[bytes(1 << 16)] * 40, OSError("not read"), 60.0]
    fake = saying(script)
    assert failure(URL, fake, limits) == "could not be fetched"
    assert len(fake.wires[0]._script) > 2, "no more than twice the limit is read"


LATE = "took longer than 15 s to fetch"


@pytest.mark.parametrize(
    "script",
    [
        [60.0, answer()],
        [x for byte in answer() for x in (bytes([byte]), 1.0)],  # slow head
        [answer(b"")[:-2], *[x for _ in range(99) for x in (b"X: y\r\n", 1.0)]],
        [b"HTTP/1.1 200 OK\r\n\r\n", *[x for _ in range(99) for x in (b"x", 1.0)]],
        [x for _ in range(99) for x in (b"HTTP/1.1 103 Early Hints\r\n\r\n", 1.0)],
        [14.9, moved(URL)],
    ],
)
def test_a_fetch_from_a_slow_server_ends_at_the_deadline(script: Script) -> None:
    fake = saying(script, [1.0, answer()])
    began = fake.clock.now
    assert failure(URL, fake) == LATE
    assert fake.clock.now - began <= REMOTE.total_s + 1


def test_a_fetch_of_an_endless_response_ends_at_the_deadline() -> None:
    fake = saying([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 10])
    network = replace(fake.network, now=iter(range(0, 1000, 3)).__next__)  # each call adds 3 s
    with pytest.raises(ImageError, match=LATE):
        load([source_of(URL, PARAM)], REMOTE, network)


def test_resolving_and_connecting_count_toward_the_deadline() -> None:
    fake = saying(names={"example.com": [f"8.8.8.{i}" for i in range(5)]}, resolve_s=4.0)
    assert failure(URL, fake) == LATE
    assert fake.clock.now <= 1000 + REMOTE.total_s
    fake = FakeNetwork(resolve_s=60.0)
    assert failure(URL, fake) == UNREACHABLE
    assert fake.clock.now == 1000 + REMOTE.connect_s


def test_all_images_of_a_request_share_one_deadline() -> None:
    fake = saying([6.0, answer()], [6.0, answer()], [6.0, answer()])
    sources = [source_of(URL, f"p{i}") for i in range(3)]
    assert len(load(sources[:2], REMOTE, fake.network)) == 2
    fake = saying([6.0, answer()], [6.0, answer()], [6.0, answer()])
    with pytest.raises(ImageError, match=LATE) as caught:
        load(sources, REMOTE, fake.network)
    assert caught.value.param == "p2"


def test_a_handshake_that_fails_closes_the_connection() -> None:
    fake = saying([answer()])

    def fail(*_: Any) -> Any:
        raise OSError("certificate verify failed: secret")

    with pytest.raises(ImageError) as caught:
        load([source_of("https://example.com/", PARAM)], REMOTE, replace(fake.network, secure=fail))
    assert str(caught.value) == f"'{PARAM}' could not be fetched."
    assert fake.wires[0].is_closed


@contextmanager
def listening(response: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server on a real socket that answers one request."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                asked.append(connection.recv(65536))
                connection.sendall(response)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join(20)


def test_a_fetch_works_over_a_real_socket() -> None:
    fake = FakeNetwork()
    with listening(answer(png(300, 300))) as (port, asked):

        def dial(address: str, _port: int, timeout_s: float) -> Any:
            fake.dialled.append((address, _port))
            return Network().dial("127.0.0.1", port, timeout_s)

        network = Network(resolve=fake.resolve, dial=dial)
        (found,) = load([source_of(URL, PARAM)], REMOTE, network)
    assert found.pixels.size == (300, 300)
    assert asked[0].startswith(b"GET /cat.png HTTP/1.1\r\nHost: example.com\r\n")
    assert fake.dialled == [(PUBLIC, 80)]


def test_a_server_without_a_valid_certificate_is_refused() -> None:
    with listening(b"no TLS") as (port, _):

        def dial(_address: str, _port: int, timeout_s: float) -> Any:
            return Network().dial("127.0.0.1", port, timeout_s)

        network = Network(resolve=FakeNetwork().resolve, dial=dial)
        with pytest.raises(ImageError, match="could not be fetched"):
            load([source_of("https://example.com/", PARAM)], REMOTE, network)


def test_the_system_resolver_runs_within_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Network().resolve("localhost", 80, 20.0)
    assert found
    assert not any(map(is_public, found))
    assert (
        Network().resolve("a" * 64 + ".example", 80, 20.0) == []
    )  # invalid: a label has at most 63 characters
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait(20) and [])
    assert Network().resolve("example.com", 80, 0.001) == []
    is_over.set()


# --- clients that leave -------------------------------------------------------------------------


@contextmanager
def silent(backlog: int = 8) -> Iterator[int]:
    """A port whose connections are answered by nothing, or whose backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=backlog))
        address = listener.getsockname()
        for _ in range(8 if backlog == 0 else 0):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield address[1]


@pytest.mark.parametrize("stage", ["resolve", "connect", "handshake", "answer", "body"])
def test_a_fetch_ends_at_once_when_its_client_leaves(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over, left = threading.Event(), threading.Event()
    if stage == "resolve":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait(20) and [])
    scheme = "https" if stage == "handshake" else "http"
    beginning = answer(PNG)[:-10] if stage == "body" else b""
    with silent(backlog=0 if stage == "connect" else 8) as port, threads_end(is_over):

        def dial(_address: str, _port: int, timeout_s: float) -> Any:
            wire = Network().dial("127.0.0.1", port, timeout_s)
            return Begun(wire, beginning) if beginning else wire

        resolve = Network().resolve if stage == "resolve" else FakeNetwork().resolve
        network = Network(resolve=resolve, dial=dial)
        source = source_of(f"{scheme}://example.com/", PARAM)
        threading.Timer(0.1, left.set).start()
        began_at = time.monotonic()
        with pytest.raises(wanted.Dropped):
            wanted.call_while(lambda: not left.is_set(), lambda: load([source], REMOTE, network))
        assert 0.1 <= time.monotonic() - began_at < 0.5


class Begun:
    """A connection that has received a beginning."""

    def __init__(self, wire: Any, beginning: bytes) -> None:
        self._wire, self._beginning = wire, beginning

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wire, name)

    def recv(self, num_bytes: int, /) -> Any:
        found, self._beginning = self._beginning, b""
        return found or self._wire.recv(num_bytes)


@contextmanager
def threads_end(is_over: threading.Event) -> Iterator[None]:
    """Resolvers that were abandoned end with the test."""
    try:
        yield
    finally:
        is_over.set()
        for thread in threading.enumerate():
            if thread.name == "mlxlite-resolve":
                thread.join(20)


def test_abandoned_resolvers_are_bounded_and_the_next_one_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_over = threading.Event()
    asked: list[str] = []

    def hang(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        return is_over.wait(20) and []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    with threads_end(is_over):
        for i in range(40):
            assert Network().resolve(f"{i}.example", 80, 0.01) == []
        assert len(asked) == 16
        threading.Timer(0.2, is_over.set).start()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (PUBLIC, 80))])
        assert Network().resolve("next.example", 80, 20.0) == [PUBLIC]
