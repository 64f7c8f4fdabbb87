"""Remote images: the bytes behind a URL, fetched without opening a way into a private network.

Decides which URLs, addresses and redirects are fetched, and what one fetch may cost. Blocks, so it
runs on a thread of its own. No error repeats any part of a response. Tested:
- A name is resolved once, each of its addresses must be public, and the connection goes to one of
  those very addresses. One message covers private and unknown, so that no network can be mapped.
- A redirect is checked like the first URL, and never leads from https to http.
- One deadline bounds every wait, and each response has a limit of bytes; no wait goes on for more
  than `wanted.POLL_S` once the client has left.
- No proxies or keys from the environment, no cookies, no ports below 1024 but 80 and 443.
"""

import errno
import ipaddress
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import quote, urljoin, urlsplit

import h11

from mlxlite import wanted

MAX_URL = 8192  # characters
_MAX_HEAD_BYTES = 16 << 10  # of a response, with those of interim ones
_MAX_DIALS = 3  # of a name's addresses
_CHUNK_BYTES = 64 << 10
_MAX_RESOLVERS = 16  # threads, abandoned ones too
_RESOLVER = "mlxlite-resolve"

# urlsplit drops some of these, and other parsers read a backslash as a slash.
_NOT_IN_URLS: Final = re.compile(r"[\x00-\x20\x7f\\\ud800-\udfff]")
_SCHEME: Final = re.compile(r"https?://", re.IGNORECASE)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,252}")
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")  # an IPv4 address, valid or not
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network(
    "64:ff9b::/96"
)  # RFC 6052: IPv4 addresses for IPv6-only networks


class FetchError(Exception):
    """A URL is not or cannot be fetched; the message is the predicate of its field's name."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a request's images. One of more than `max_pixels` is scaled down."""

    max_images: int = 16
    max_pixels: int = 1_600_000
    max_source_pixels: int = 64_000_000  # by its header, before anything is decoded
    max_bytes: int = 20 << 20  # each
    max_aspect: int = 200  # the long side by the short one
    allow_remote: bool = False
    max_redirects: int = 3
    connect_s: float = 5.0
    total_s: float = 15.0  # for all fetches of a request
    decode_s: float = 10.0  # for all decoding of a request

    @property
    def too_large(self) -> str:
        return f"is larger than {self.max_bytes / 2**20:g} MiB"


# --- URLs and addresses -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """A URL in its parts."""

    url: str
    is_secure: bool
    host: str  # a name in lower case, or an address without brackets
    port: int
    target: str  # path and query, escaped

    @property
    def request(self) -> h11.Request:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == (443 if self.is_secure else 80) else f":{self.port}"
        headers = [
            ("Host", host + port),
            ("User-Agent", "mlxlite"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        return h11.Request(method="GET", target=self.target, headers=headers)


def parse_url(url: str) -> Address:
    """Raises FetchError for a URL that is refused in any configuration."""
    if not _SCHEME.match(url):
        raise FetchError("must be a data: URI or a URL of http or https")
    if len(url) > MAX_URL:
        raise FetchError(f"is longer than {MAX_URL} characters")
    if _NOT_IN_URLS.search(url):
        raise FetchError("holds characters that a URL cannot have")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        is_valid = _is_host(host)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise FetchError("is not a valid URL")
    if "@" in parts.netloc:
        raise FetchError("must not hold a user or a password")
    is_secure = parts.scheme == "https"
    port = (443 if is_secure else 80) if port is None else port
    if port not in (80, 443) and port < 1024:
        raise FetchError("must name port 80, 443, or one from 1024")
    query = f"?{parts.query}" if parts.query else ""
    target = quote((parts.path or "/") + query, safe="/%?:@!$&'()*+,;=~")
    return Address(url, is_secure, host, port, target)


def _is_host(host: str) -> bool:
    """Whether it is an ASCII name or an address. Raises ValueError for an invalid IPv6 one."""
    if ":" in host:
        return "%" not in host and bool(ipaddress.IPv6Address(host))
    return _NAME.fullmatch(host) is not None


def is_public(address: str) -> bool:
    """Whether an address, and any IPv4 address embedded in it, is on the public Internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip not in _GLOBAL_UNICAST and ip not in _NAT64:  # mapped, local, multicast, unspecified
            return False
        last = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF) if ip in _NAT64 else None
        inside = filter(None, (ip.sixtofour, *(ip.teredo or ()), last))
        return ip.is_global and all(is_public(str(one)) for one in inside)
    return ip.is_global and not ip.is_multicast


# --- the network ------------------------------------------------------------------------------


class Wire(Protocol):
    """The part of a socket that a fetch uses."""

    def settimeout(self, timeout_s: float, /) -> None: ...
    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, num_bytes: int, /) -> bytes: ...
    def close(self) -> None: ...


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """All addresses of a name; none after the timeout. Raises Dropped.

    getaddrinfo has no timeout, so it runs on a thread that is then abandoned; the system's own
    limit, some tens of seconds, ends it. While there are `_MAX_RESOLVERS` of them, it waits.
    """
    found: list[str] = []
    is_over = threading.Event()

    def resolve() -> None:
        with suppress(OSError, UnicodeError):
            results = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(str(address[0]) for *_, address in results)
        is_over.set()

    began = time.monotonic()
    try:
        wanted.wait_for(_has_resolver, timeout_s)
        threading.Thread(target=resolve, name=_RESOLVER, daemon=True).start()
        wanted.wait_for(is_over.wait, timeout_s - (time.monotonic() - began))
    except TimeoutError:
        return []
    return found


def _has_resolver(wait_s: float) -> bool:
    """Whether one more may run, now or after a wait."""
    for pause_s in (0.0, wait_s):
        time.sleep(pause_s)
        if sum(thread.name == _RESOLVER for thread in threading.enumerate()) < _MAX_RESOLVERS:
            return True
    return False


def _dial(address: str, port: int, timeout_s: float) -> socket.socket:
    """A connection. Raises OSError, Dropped."""
    wire = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        wire.setblocking(False)
        error, poll = wire.connect_ex((address, port)), select.poll()
        if error == errno.EINPROGRESS:
            poll.register(wire, select.POLLOUT)
            wanted.wait_for(lambda s: poll.poll(s * 1000), timeout_s)
            error = wire.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
    except BaseException:
        wire.close()
        raise
    wire.settimeout(timeout_s)
    return wire


def _secure(wire: Any, host: str) -> ssl.SSLSocket:
    """TLS with the host's certificate verified; the wire's timeout bounds the handshake."""
    timeout_s = wire.gettimeout()
    context = ssl.create_default_context()
    secured = context.wrap_socket(wire, server_hostname=host, do_handshake_on_connect=False)

    def shake(wait_s: float) -> bool:
        secured.settimeout(wait_s)
        try:
            secured.do_handshake()
        except TimeoutError:
            return False
        return True

    try:
        wanted.wait_for(shake, timeout_s)
    except BaseException:
        secured.close()
        raise
    return secured


@dataclass(frozen=True, slots=True)
class Network:
    """The system calls of a fetch, which raise Dropped.

    All raise OSError but `resolve`, which is empty for an unknown name.
    """

    resolve: Callable[[str, int, float], Sequence[str]] = _resolve
    dial: Callable[[str, int, float], Wire] = _dial
    secure: Callable[[Wire, str], Wire] = _secure
    now: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class _Fetch:
    """The fetch of one image."""

    limits: Limits
    network: Network
    deadline: float

    def run(self, url: str) -> bytes:
        """Follow redirects and return the body."""
        target = self._checked(url)
        for _ in range(self.limits.max_redirects + 1):
            response = self._request(target)
            if isinstance(response, bytes):
                return response
            found = self._checked(response, target.url)
            if target.is_secure and not found.is_secure:
                raise FetchError("is redirected from https to http")
            target = found
        raise FetchError("is redirected too often")

    def _checked(self, url: str, base: str = "") -> Address:
        try:
            return parse_url(urljoin(base, url))
        except (FetchError, ValueError):  # no reason: it may quote the server
            raise FetchError("leads to a URL that is not fetched") from None

    def _left_s(self) -> float:
        left_s = self.deadline - self.network.now()
        if left_s <= 0:
            raise FetchError(f"took longer than {self.limits.total_s:g} s to fetch")
        return left_s

    def _request(self, target: Address) -> bytes | str:
        """The body at an address, or the URL of a redirect."""
        wire = self._connect(target)
        try:
            wire.settimeout(self._left_s())
            if target.is_secure:
                wire = self.network.secure(wire, target.host)
                wire.settimeout(self._left_s())
            return self._exchange(wire, target.request)
        except (OSError, ValueError, h11.ProtocolError):
            self._left_s()  # a timeout has its own message
            raise FetchError("could not be fetched") from None
        finally:
            wire.close()

    def _addresses(self, target: Address) -> list[str]:
        """All addresses of a host, if all are public; IPv4 first, which more networks route."""
        is_literal = ":" in target.host or _NUMBER.fullmatch(target.host) is not None
        timeout_s = min(self.limits.connect_s, self._left_s())
        found = [target.host]
        if not is_literal:
            found = list(self.network.resolve(target.host, target.port, timeout_s))
        if not found or not all(map(is_public, found)):
            raise FetchError("has no public address to be fetched from")
        return sorted(found, key=lambda address: ":" in address)

    def _connect(self, target: Address) -> Wire:
        for address in self._addresses(target)[:_MAX_DIALS]:
            timeout_s = min(self.limits.connect_s, self._left_s())
            try:
                return self.network.dial(address, target.port, timeout_s)
            except OSError:
                continue
        self._left_s()
        raise FetchError("could not be fetched")

    def _exchange(self, wire: Wire, request: h11.Request) -> bytes | str:
        """The body of a response, or the URL to which it redirects."""
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        # Fewer bytes than any system buffers for a new connection: this does not wait.
        wire.sendall(b"".join(connection.send(e) or b"" for e in (request, h11.EndOfMessage())))
        body = bytearray()
        for event in self._events(connection, wire):
            if isinstance(event, h11.Response):
                location = self._check_head(event.status_code, dict(reversed(event.headers)))
                if location is not None:
                    return location
            elif isinstance(event, h11.Data):
                body += event.data
                self._check_length(len(body))
        return bytes(body)

    def _events(self, connection: h11.Connection, wire: Wire) -> Iterator[h11.Event]:
        """A response's events to its end. Raises h11.ProtocolError where it is invalid or long."""
        num_left = _MAX_HEAD_BYTES
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                num_left = 2 * self.limits.max_bytes + _CHUNK_BYTES  # the body and its framing
            if isinstance(event, h11.Event):
                yield event
            elif num_left:
                data = self._receive(wire, min(num_left, _CHUNK_BYTES))
                num_left -= len(data)
                connection.receive_data(data)
            else:
                raise h11.RemoteProtocolError("the response is too long")

    def _receive(self, wire: Wire, most: int) -> bytes:
        """The next bytes, b"" at the end. Raises FetchError at the deadline, Dropped."""
        while True:
            wanted.check()
            wire.settimeout(min(self._left_s(), wanted.POLL_S))
            with suppress(TimeoutError):
                return wire.recv(most)

    def _check_head(self, status: int, headers: Mapping[bytes, bytes]) -> str | None:
        """The URL of a redirect, None where the body is to be read. Raises FetchError."""
        location = headers.get(b"location")
        if status in _REDIRECTS and location is not None:
            return location.decode(errors="replace")
        if status != 200:
            raise FetchError(f"could not be fetched: the answer was {status}")
        self._check_length(int(headers.get(b"content-length", 0)))
        return None

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self.limits.max_bytes:
            raise FetchError(self.limits.too_large)


def fetch(url: str, limits: Limits, network: Network, left_s: float) -> bytes:
    """The body at a URL, within `left_s` seconds. Blocks. Raises FetchError, Dropped."""
    return _Fetch(limits, network, network.now() + left_s).run(url)
