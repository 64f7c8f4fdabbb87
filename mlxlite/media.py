"""Pictures in: where a request says that they are, and the pixels that come of it.

Decides what may become a picture and what that may cost. What a client sends is read here into a
`Source`; `load` makes `Picture`s of sources: it fetches, checks, decodes, turns upright and scales.
It blocks, so it is called on a thread of its own.

What it must never do: open a file, run a decoder that is not in `FORMATS` (the content decides, no
name and no declared type), decode before the size in the header is known, connect to an address
that is not public, or repeat in an error anything that a server has answered. Tested:
- Nothing is fetched unless the operator wants it. A name is resolved once, each of its addresses
  must be public, and that very address is dialled: no second answer of a name server counts.
- A redirect is as suspect as the URL was, and never leads from https to http.
- One message for all that is private or unknown, so that no network can be mapped with it.
- One deadline bounds all fetches of a request, whatever their servers do.
- No proxies or keys from the environment, no cookies, no ports below 1024 but 80 and 443: a server
  that fetches must be of no use to talk to others in their protocols.
"""

import binascii
import hashlib
import ipaddress
import math
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from io import BytesIO
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar
from urllib.parse import quote, urljoin, urlsplit

import h11

from mlxlite.api.fields import text
from mlxlite.http.errors import bad

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

_ON_ITS_SIDE: Final = ("ROTATE_90", "ROTATE_270", "TRANSPOSE", "TRANSVERSE")
FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DETAILS: Final = ("auto", "low", "high")
MAX_PICTURES = 64  # of a request, while it is read; the operator's limit is below it
MAX_BYTES = 32 << 20  # of a picture, while it is read; in base64 it fits into a body of 64 MiB
MAX_URL = 8192  # characters
LOW_DETAIL = 512  # pixels a side, OpenAI's
_MAX_HEAD_BYTES = 16 << 10  # of an answer, as h11's own default
_MAX_DIALS = 3  # of a name's addresses
_CHUNK_BYTES = 64 << 10

# Base64 in a URI may be escaped where a URI must be; nothing else in it can be.
_ESCAPES: Final = (
    *((b"%3D", b"="), (b"%3d", b"="), (b"%2B", b"+"), (b"%2b", b"+"), (b"%2F", b"/")),
    *((b"%2f", b"/"), (b"%0D", b""), (b"%0d", b""), (b"%0A", b""), (b"%0a", b""), (b"%20", b"")),
)
# urlsplit would drop some of these, and others read a backslash as a slash.
_NOT_IN_URLS: Final = re.compile(r"[\x00-\x20\x7f\\\ud800-\udfff]")
_SCHEME: Final = re.compile(r"https?://", re.IGNORECASE)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,252}")
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)\.?")  # an IPv4 address, or none
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})


class MediaError(ValueError):
    """A picture cannot be had; the message is for the client, `param` is the picture's place."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Source:
    """Where a picture comes from: encoded bytes, or a URL. `param` is its place in the request."""

    data: bytes | None = field(repr=False)
    url: str | None
    param: str
    detail: str = "auto"


@dataclass(frozen=True, slots=True)
class Limits:
    """What pictures of a request may cost. A picture of more than `max_pixels` is scaled down."""

    max_images: int = 16
    max_pixels: int = 1_600_000
    max_source_pixels: int = 64_000_000  # as its header says, before anything is decoded
    max_bytes: int = 20 << 20  # each
    max_aspect: int = 200  # the long side by the short one
    allow_remote: bool = False
    max_redirects: int = 3
    connect_s: float = 5.0
    total_s: float = 15.0  # for all that a request has fetched


@dataclass(eq=False)
class Picture:
    """`digest` tells it from all others: 32 bytes of what was encoded and how scaled.

    It is `size` when it is decoded, which is done at once or, where that may not be needed, when
    somebody looks: raises MediaError.
    """

    digest: bytes
    size: tuple[int, int]  # in pixels: width, height
    decode: "Callable[[], Image]"

    @cached_property
    def pixels(self) -> "Image":
        """Mode RGB."""
        return self.decode()


# --- what a request says ----------------------------------------------------------------------


def source_of(value: Any, param: str, detail: str = "auto") -> Source:
    """A data: URI, or a URL to fetch. Raises APIError 400."""
    given = text(value, param)
    if given[:5].lower() == "data:":
        head, comma, encoded = given.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise bad(f"'{param}' must be in base64: data:image/png;base64,…", param)
        return source_of_base64(encoded, param, detail)
    try:
        _address(given)
    except ValueError as error:
        raise bad(f"'{param}' {error}.", param) from None
    return Source(None, given, param, detail)


def source_of_base64(value: Any, param: str, detail: str = "auto") -> Source:
    """A picture's bytes; white space and escapes of a URI are tolerated. Raises APIError 400."""
    encoded = text(value, param).encode()
    for escape, meant in _ESCAPES if b"%" in encoded else ():
        encoded = encoded.replace(escape, meant)
    encoded = encoded.translate(None, b" \t\r\n")
    if len(encoded) > math.ceil(MAX_BYTES / 3) * 4:
        raise bad(f"'{param}' is larger than {MAX_BYTES >> 20} MiB.", param)
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error:
        raise bad(f"'{param}' is not valid base64.", param) from None
    if not data:
        raise bad(f"'{param}' holds no bytes.", param)
    return Source(data, None, param, detail)


@dataclass(frozen=True, slots=True)
class _Address:
    """A URL, taken apart as it is used."""

    url: str
    is_secure: bool
    host: str  # a name in lower case, or an address without brackets
    port: int
    target: str  # path and query, escaped

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_secure else 80) else f"{host}:{self.port}"


def _address(url: str) -> _Address:
    """Raises ValueError, whose message says of the URL what is wrong with it."""
    if not _SCHEME.match(url):
        raise ValueError("must be a data: URI or a URL of http or https")
    if len(url) > MAX_URL:
        raise ValueError(f"is longer than {MAX_URL} characters")
    if _NOT_IN_URLS.search(url):
        raise ValueError("holds characters that a URL cannot have")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        is_valid = _is_host(host)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError("is not a valid URL")
    if "@" in parts.netloc:
        raise ValueError("must not hold a user or a password")
    is_secure = parts.scheme == "https"
    port = (443 if is_secure else 80) if port is None else port
    if port not in (80, 443) and port < 1024:
        raise ValueError("must name port 80, 443, or one from 1024")
    query = f"?{parts.query}" if parts.query else ""
    target = quote((parts.path or "/") + query, safe="/%?:@!$&'()*+,;=~")
    return _Address(url, is_secure, host, port, target)


def _is_host(host: str) -> bool:
    """A name of ASCII, or an address. Raises ValueError for a wrong IPv6 one."""
    if ":" in host:
        return "%" not in host and bool(ipaddress.IPv6Address(host))
    return _NAME.fullmatch(host) is not None


# --- the network ------------------------------------------------------------------------------


class Wire(Protocol):
    """What a fetch needs of a socket."""

    def settimeout(self, timeout_s: float, /) -> None: ...
    def sendall(self, data: bytes, /) -> None: ...
    def recv(self, num_bytes: int, /) -> bytes: ...
    def close(self) -> None: ...


def _resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """All addresses of a name, none if they are not known in time.

    getaddrinfo has no timeout, so it has a thread that nobody need wait for; the system's own
    limit, some tens of seconds, ends it.
    """
    answers: SimpleQueue[list[str]] = SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            found = []
        answers.put([str(address[0]) for *_, address in found])

    threading.Thread(target=ask, name="mlxlite-resolve", daemon=True).start()
    try:
        return answers.get(timeout=timeout_s)
    except Empty:
        return []


def _dial(address: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((address, port), timeout_s)


def _secure(wire: Any, host: str) -> ssl.SSLSocket:
    """The certificate must be the host's; the wire's timeout bounds the whole handshake."""
    return ssl.create_default_context().wrap_socket(wire, server_hostname=host)


@dataclass(frozen=True, slots=True)
class Network:
    """The world as a fetch sees it. Each member raises OSError; `resolve` is empty for unknown."""

    resolve: Callable[[str, int, float], Sequence[str]] = _resolve
    dial: Callable[[str, int, float], Wire] = _dial
    secure: Callable[[Wire, str], Wire] = _secure
    now: Callable[[], float] = time.monotonic


_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: how IPv6 alone reaches IPv4


def is_public(address: str) -> bool:
    """Whether an address, and any IPv4 one inside it, is of the public Internet."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    inside: list[ipaddress.IPv4Address | None] = []
    if isinstance(ip, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        inside = [ip.sixtofour, *(ip.teredo or ()), last if ip in _NAT64 else None]
        if ip not in _GLOBAL_UNICAST and ip not in _NAT64:  # mapped, local, multicast, unspecified
            return False
    known = [found for found in inside if found is not None]
    return all(one.is_global and not one.is_multicast for one in (ip, *known))


@dataclass(frozen=True, slots=True)
class _Fetch:
    """One picture's way over the network."""

    param: str
    limits: Limits
    network: Network
    deadline: float

    def run(self, url: str) -> bytes:
        """Follow redirects to the bytes. Raises MediaError."""
        target = self._checked(url)
        for _ in range(self.limits.max_redirects + 1):
            answer = self._ask(target)
            if isinstance(answer, bytes):
                return answer
            found = self._checked(answer, target.url)
            if target.is_secure and not found.is_secure:
                raise self._error("is redirected from https to http")
            target = found
        raise self._error("is redirected too often")

    def _error(self, complaint: str) -> MediaError:
        return MediaError(f"'{self.param}' {complaint}.", self.param)

    def _checked(self, url: str, base: str = "") -> _Address:
        try:
            return _address(urljoin(base, url))
        except ValueError:  # said without what: a redirect is the server's own words
            raise self._error("leads to a URL that is not fetched") from None

    def _left_s(self) -> float:
        left_s = self.deadline - self.network.now()
        if left_s <= 0:
            raise self._error(f"took longer than {self.limits.total_s:g} s to fetch")
        return left_s

    def _ask(self, target: _Address) -> bytes | str:
        """The body at an address, or the URL that it names instead."""
        wire = self._connect(target)
        try:
            if target.is_secure:
                wire.settimeout(self._left_s())
                wire = self.network.secure(wire, target.host)
            return self._exchange(wire, target)
        except (OSError, h11.ProtocolError):
            self._left_s()  # a timeout has its own message
            raise self._error("could not be fetched") from None
        finally:
            wire.close()

    def _addresses(self, target: _Address) -> list[str]:
        """All that a host has, if all are public; those of IPv4 first, which more networks have."""
        is_literal = ":" in target.host or _NUMBER.fullmatch(target.host) is not None
        patience_s = min(self.limits.connect_s, self._left_s())
        found = [target.host]
        if not is_literal:
            found = list(self.network.resolve(target.host, target.port, patience_s))
        if not found or not all(map(is_public, found)):
            raise self._error("has no public address to be fetched from")
        return sorted(found, key=lambda address: ":" in address)

    def _connect(self, target: _Address) -> Wire:
        for address in self._addresses(target)[:_MAX_DIALS]:
            patience_s = min(self.limits.connect_s, self._left_s())
            try:
                return self.network.dial(address, target.port, patience_s)
            except OSError:
                continue
        self._left_s()
        raise self._error("could not be fetched")

    def _exchange(self, wire: Wire, target: _Address) -> bytes | str:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        headers = [
            ("Host", target.host_header),
            ("User-Agent", "mlxlite"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = h11.Request(method="GET", target=target.target, headers=headers)
        wire.settimeout(self._left_s())
        sent = (connection.send(request), connection.send(h11.EndOfMessage()))
        wire.sendall(b"".join(part for part in sent if part))
        body = bytearray()
        while True:
            match self._event(wire, connection):
                case h11.Response() as response:
                    if (location := self._redirect(response)) is not None:
                        return location
                case h11.Data() as more:
                    body += more.data
                    self._check_length(len(body))
                case h11.EndOfMessage():
                    return bytes(body)
                case h11.InformationalResponse():  # 101 is none: nobody has asked for an upgrade
                    pass
                case _:
                    raise self._error("could not be fetched")

    def _event(self, wire: Wire, connection: h11.Connection) -> object:
        while (event := connection.next_event()) is h11.NEED_DATA:
            wire.settimeout(self._left_s())
            connection.receive_data(wire.recv(_CHUNK_BYTES))
        return event

    def _redirect(self, response: h11.Response) -> str | None:
        """Where else to look; None where the body is the picture. Raises MediaError."""
        headers = dict(response.headers)
        if response.status_code in _REDIRECTS and b"location" in headers:
            return headers[b"location"].decode(errors="replace")
        if response.status_code != 200:
            raise self._error(f"could not be fetched: the answer was {response.status_code}")
        self._check_length(int(headers.get(b"content-length", b"0")))  # h11 has seen to its form
        return None

    def _check_length(self, num_bytes: int) -> None:
        if num_bytes > self.limits.max_bytes:
            raise self._error(_too_large(self.limits))


# --- pixels -----------------------------------------------------------------------------------


def _too_large(limits: Limits) -> str:
    return f"is larger than {limits.max_bytes / 2**20:g} MiB"


def load(
    sources: Sequence[Source],
    limits: Limits,
    network: Network | None = None,
    is_known: Callable[[bytes], bool] = lambda digest: False,
) -> tuple[Picture, ...]:
    """The pictures of a request, in its order. Blocks. Raises MediaError.

    Those that are known by their digest have been decoded before, and wait to be asked.
    """
    network = network or Network()
    for i, source in enumerate(sources):
        _check(i, source, limits)
    left_s, pictures = limits.total_s, []
    for source in sources:
        data = source.data
        if data is None:
            assert source.url is not None, "a source has the one or the other"
            began = network.now()
            data = _Fetch(source.param, limits, network, began + left_s).run(source.url)
            left_s -= network.now() - began  # decoding is no server's fault
        picture = _opened(data, source, limits)
        if not is_known(picture.digest):
            _ = picture.pixels
        pictures.append(picture)
    return tuple(pictures)


def _check(index: int, source: Source, limits: Limits) -> None:
    """What can be said before any work. Raises MediaError."""
    complaint = None
    if index >= limits.max_images:
        complaint = f"is one too many: at most {limits.max_images} pictures in a request"
    elif source.url is not None and not limits.allow_remote:
        complaint = (
            "is a URL, and this server fetches none unless it is started with "
            "--allow-remote-images; send the picture itself, as a data: URI"
        )
    elif source.data is not None and len(source.data) > limits.max_bytes:
        complaint = _too_large(limits)
    else:
        try:
            import PIL  # noqa: F401
        except ImportError:
            complaint = "needs a package that is not here: pip install 'mlxlite[vision]'"
    if complaint is not None:
        raise MediaError(f"'{source.param}' {complaint}.", source.param)


# What Pillow's decoders raise of broken bytes; a warning where warnings are errors.
_BROKEN: Final = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, RuntimeError, MemoryError, EOFError, Warning, struct.error, zlib.error),
)


def _opened(data: bytes, source: Source, limits: Limits) -> Picture:
    """A picture whose head is what it should be. Raises MediaError."""
    box = LOW_DETAIL if source.detail == "low" else None

    def size_of(image: "Image") -> tuple[int, int]:
        return _target_size(*image.size, limits.max_pixels, box)

    def measure(image: "Image") -> tuple[int, int]:
        width, height = size_of(image)
        turn = _turn(image)
        is_on_its_side = turn is not None and turn.name in _ON_ITS_SIDE
        return (height, width) if is_on_its_side else (width, height)

    def decode(image: "Image") -> "Image":
        turn, pixels = _turn(image), _scaled(image, size_of(image))
        return pixels if turn is None else pixels.transpose(turn)

    size = _with_image(data, source, limits, measure)
    how = f"{limits.max_pixels} {box} "  # what else decides over the pixels
    digest = hashlib.sha256(how.encode() + data).digest()
    return Picture(digest, size, partial(_with_image, data, source, limits, decode))


def _with_image(data: bytes, source: Source, limits: Limits, work: "Callable[[Image], T]") -> T:
    """Do something with an encoded picture of an allowed size. Raises MediaError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            complaint = _complaint(*image.size, limits)
            if complaint is None:
                return work(image)
    except UnidentifiedImageError:
        complaint = "is no picture in PNG, JPEG, WebP, GIF or BMP"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        complaint = _too_many(limits)
    except _BROKEN:
        complaint = "cannot be decoded: it is broken or cut short"
    raise MediaError(f"'{source.param}' {complaint}.", source.param)


def _too_many(limits: Limits) -> str:
    return f"has more than {limits.max_source_pixels} pixels"


def _complaint(width: int, height: int, limits: Limits) -> str | None:
    """What is wrong with a size, or None."""
    if width * height > limits.max_source_pixels:
        return _too_many(limits)
    if min(width, height) < 1:
        return "has no pixels"
    if max(width, height) > limits.max_aspect * min(width, height):
        return f"is more than {limits.max_aspect} times as long as wide, or as wide as long"
    return None


def _target_size(width: int, height: int, max_pixels: int, box: int | None) -> tuple[int, int]:
    """The size in the same proportions that keeps to both bounds; never a larger one."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    if box is not None:
        scale = min(scale, box / width, box / height)
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _turn(image: "Image") -> Any:
    """How to turn a picture upright, or None; a camera's notes that are broken say nothing."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        return turns.get(image.getexif().get(0x0112, 1))  # EXIF: Orientation
    except _BROKEN:
        return None


def _scaled(image: "Image", size: tuple[int, int]) -> "Image":
    """Decode the first frame to RGB of a size; what is transparent shows white."""
    from PIL import Image

    if size != image.size:
        # A JPEG can be decoded at a half, a quarter or an eighth; twice the size keeps it sharp.
        image.draft(None, (size[0] * 2, size[1] * 2))
    image.load()
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    flat: Image.Image = image
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would cut them off
        flat, has_alpha = image.convert("I").point(lambda value: value * (1 / 256)), False
        flat = flat.convert("L")
    mode = "RGBA" if has_alpha else "RGB"
    if flat.mode != mode or flat.size == size:  # else the copy, of 4 bytes a pixel, is for nothing
        flat = flat.convert(mode)
    if flat.size != size:
        flat = flat.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if not has_alpha:
        return flat
    white = Image.new("RGBA", size, "white")
    white.alpha_composite(flat)
    return white.convert("RGB")
