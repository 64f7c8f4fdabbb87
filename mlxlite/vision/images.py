"""Images in a request: their sources, and the pixels that these decode to.

Decides within which limits bytes are accepted as an image: `load` fetches each `Source` and makes
it a `LoadedImage`, one after another. It blocks, so it runs on a thread of its own, and ends with
`wanted.Dropped` once its client has left. Pillow is never called here: `pixels.py` has what is done
with it, `decoder.py` the processes that do it. Tested.
"""

import binascii
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeVar

from mlxlite.vision.decoder import Decoder
from mlxlite.vision.fetch import FetchError, Limits, Network, fetch, parse_url
from mlxlite.vision.pixels import Bounds, Refused, Size

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

DETAILS: Final = ("auto", "low", "high")
MAX_IMAGES = 64  # of a request, while it is parsed; the operator's limit is below it
MAX_BYTES = 32 << 20  # of an image, while it is parsed; in base64 it fits into a body of 64 MiB
LOW_DETAIL = 512  # pixels a side, OpenAI's
# Percent-escapes that base64 in a URI may contain; other characters need none.
_ESCAPES: Final = (
    *((b"%3D", b"="), (b"%3d", b"="), (b"%2B", b"+"), (b"%2b", b"+"), (b"%2F", b"/")),
    *((b"%2f", b"/"), (b"%0D", b""), (b"%0d", b""), (b"%0A", b""), (b"%0a", b""), (b"%20", b"")),
)


class ImageError(Exception):
    """An image cannot be used; the message is for the client.

    `param` is the image's field in the request, None if the error is not about a single image.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Source:
    """An image as encoded bytes or as a URL. `param` is its field in the request."""

    data: bytes | None = field(repr=False)
    url: str | None
    param: str
    detail: str = "auto"

    def error(self, complaint: str) -> ImageError:
        return ImageError(f"'{self.param}' {complaint}.", self.param)


@dataclass(eq=False)
class LoadedImage:
    """An image of a known size, decoded on the first use of `pixels` if not before.

    `digest` identifies its pixels: 32 bytes of the encoded bytes and how they are scaled.
    """

    digest: bytes
    size: Size
    decode: "Callable[[], Image]"

    @cached_property
    def pixels(self) -> "Image":
        """Mode RGB. Raises ImageError."""
        return self.decode()


# --- pixels -----------------------------------------------------------------------------------


def load(
    sources: Sequence[Source],
    limits: Limits,
    decoder: Decoder,
    network: Network | None = None,
    is_known: Callable[[bytes], bool] = lambda digest: False,
    is_needed: Callable[[Source], bool] = lambda source: True,
) -> tuple[LoadedImage | None, ...]:
    """The images of a request, in order. Blocks. Raises ImageError, Dropped.

    Images with a known digest are not decoded here: their pixels are probably not needed. One that
    cannot be used is None if it is not needed.
    """
    network = network or Network()
    for i, source in enumerate(sources):
        if is_needed(source):  # before any work for another
            _check(i, source, limits)
    fetch_left_s, decode_left_s = limits.total_s, limits.decode_s
    images: list[LoadedImage | None] = []

    def one(i: int, source: Source) -> LoadedImage:
        nonlocal fetch_left_s, decode_left_s
        _check(i, source, limits)
        began = network.now()
        try:
            data = _data(source, limits, network, fetch_left_s)
        finally:
            fetch_left_s -= network.now() - began
        began = monotonic()
        try:
            return _loaded(data, source, limits, decoder, is_known, decode_left_s)
        finally:
            decode_left_s -= monotonic() - began

    for i, source in enumerate(sources):
        try:
            images.append(one(i, source))
        except ImageError:
            if is_needed(source):
                raise
            images.append(None)
    return tuple(images)


def _data(source: Source, limits: Limits, network: Network, timeout_s: float) -> bytes:
    """The encoded bytes of an image, fetched if need be. Raises ImageError."""
    if source.data is not None:
        return source.data
    assert source.url is not None, "a source has data or a URL"
    try:
        return fetch(source.url, limits, network, timeout_s)
    except FetchError as error:
        raise source.error(str(error)) from None


def _check(index: int, source: Source, limits: Limits) -> None:
    """Check the limits that need no fetch and no decoder. Raises ImageError."""
    if index >= limits.max_images:
        raise source.error(f"is one too many: at most {limits.max_images} pictures in a request")
    if source.url is not None and not limits.allow_remote:
        raise source.error(
            "is a URL, and this server fetches none unless it is started with "
            "--allow-remote-images; send the picture itself, as a data: URI"
        )
    if source.data is not None and len(source.data) > limits.max_bytes:
        raise source.error(limits.too_large)
    if find_spec("PIL") is None:
        raise source.error("needs a package that is not here: pip install 'mlxlite[vision]'")


def _loaded(
    data: bytes,
    source: Source,
    limits: Limits,
    decoder: Decoder,
    is_known: Callable[[bytes], bool],
    timeout_s: float,
) -> LoadedImage:
    """An image whose header, at least, is valid and within the limits. Raises ImageError."""
    box = LOW_DETAIL if source.detail == "low" else 0
    bounds = Bounds(limits.max_pixels, box, limits.max_source_pixels, limits.max_aspect)
    how = f"{limits.max_pixels} {box} "  # the pixels depend on these too
    digest = hashlib.sha256(how.encode() + data).digest()

    def run(call: Callable[[bytes, Bounds, float], T], timeout_s: float) -> T:
        try:
            return call(data, bounds, timeout_s)
        except Refused as refused:
            raise source.error(str(refused)) from None
        except TimeoutError:
            raise source.error(f"took longer than {limits.decode_s:g} s to decode") from None

    if is_known(digest):
        size = run(decoder.measure, timeout_s)
        return LoadedImage(digest, size, lambda: run(decoder.decode, limits.decode_s))
    pixels = run(decoder.decode, timeout_s)
    return LoadedImage(digest, pixels.size, lambda: pixels)


# --- sources ----------------------------------------------------------------------------------


def source_of(value: str, param: str, detail: str = "auto") -> Source:
    """A data: URI, or a URL to fetch. Raises ImageError."""
    source = Source(None, value, param, detail)
    if value[:5].lower() == "data:":
        head, comma, encoded = value.partition(",")
        if not comma or not head.rstrip().lower().endswith(";base64"):
            raise ImageError(f"'{param}' must be in base64: data:image/png;base64,…", param)
        return source_of_base64(encoded, param, detail)
    try:
        parse_url(value)
    except FetchError as error:
        raise source.error(str(error)) from None
    return source


def source_of_base64(value: str, param: str, detail: str = "auto") -> Source:
    """An image's bytes; white space and percent-escapes are accepted. Raises ImageError."""
    encoded: str | bytes = value  # as it is, if it can be: a copy may be 43 MB
    if any(char in value for char in "% \t\r\n"):
        encoded = value.encode()
        for escape, byte in _ESCAPES if b"%" in encoded else ():
            encoded = encoded.replace(escape, byte)
        encoded = encoded.translate(None, b" \t\r\n")
    if len(encoded) > math.ceil(MAX_BYTES / 3) * 4:
        raise ImageError(f"'{param}' is larger than {MAX_BYTES >> 20} MiB.", param)
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError:  # binascii's error, or characters beyond ASCII
        raise ImageError(f"'{param}' is not valid base64.", param) from None
    if not data:
        raise ImageError(f"'{param}' holds no bytes.", param)
    return Source(data, None, param, detail)
