"""Images in a request: their sources, and the pixels that these decode to.

Decides which bytes are accepted as an image, within which limits: `load` fetches, checks, decodes,
turns upright and scales each `Source` into a `LoadedImage`. It blocks, so it runs on a thread of
its own. It must never open a file, run a decoder that is not in `FORMATS` (by the content, not by a
name or a declared type), or decode before the size in the header is checked. Tested.
"""

import binascii
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from io import BytesIO
from typing import TYPE_CHECKING, Final, TypeVar

from mlxlite.vision.fetch import FetchError, Limits, Network, fetch, parse_url

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DETAILS: Final = ("auto", "low", "high")
MAX_IMAGES = 64  # of a request, while it is parsed; the operator's limit is below it
MAX_BYTES = 32 << 20  # of an image, while it is parsed; in base64 it fits into a body of 64 MiB
LOW_DETAIL = 512  # pixels a side, OpenAI's
# EXIF's orientations other than upright, and how PIL undoes them; from 5 on sides are exchanged.
_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"},
    **{5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}

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
    """An image of a known size, decoded on the first use of `pixels`.

    `digest` identifies its pixels: 32 bytes of the encoded bytes and how they are scaled.
    """

    digest: bytes
    size: tuple[int, int]  # in pixels: width, height
    decode: "Callable[[], Image]"

    @cached_property
    def pixels(self) -> "Image":
        """Mode RGB. Raises ImageError."""
        return self.decode()


# --- pixels -----------------------------------------------------------------------------------


def load(
    sources: Sequence[Source],
    limits: Limits,
    network: Network | None = None,
    is_known: Callable[[bytes], bool] = lambda digest: False,
) -> tuple[LoadedImage, ...]:
    """The images of a request, in order. Blocks. Raises ImageError.

    Images with a known digest are not decoded here: their pixels are probably not needed.
    """
    network = network or Network()
    for i, source in enumerate(sources):
        _check(i, source, limits)
    left_s, images = limits.total_s, []
    for source in sources:
        data = source.data
        if data is None:
            assert source.url is not None, "a source has data or a URL"
            began = network.now()
            try:
                data = fetch(source.url, limits, network, left_s)
            except FetchError as error:
                raise source.error(str(error)) from None
            left_s -= network.now() - began  # decoding does not count
        image = _opened(data, source, limits)
        if not is_known(image.digest):
            _ = image.pixels
        images.append(image)
    return tuple(images)


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


_SCAN: Final = b"\xff\xda"  # JPEG's marker, which no compressed data contains
_MAX_SCANS: Final = 1000
_MAX_SCANNED_PIXELS: Final = 1 << 30  # about 0.6 s; of the largest image 16 scans: 10 are usual

# What Pillow's decoders raise for broken bytes; Warning if warnings are errors.
_BROKEN: Final = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, RuntimeError, MemoryError, EOFError, Warning, struct.error, zlib.error),
)


def _opened(data: bytes, source: Source, limits: Limits) -> LoadedImage:
    """An image whose header is valid and within the limits. Raises ImageError."""
    box = LOW_DETAIL if source.detail == "low" else None

    def size_of(image: "Image") -> tuple[int, int]:
        return _target_size(*image.size, limits.max_pixels, box)

    def measure(image: "Image") -> tuple[int, int]:
        width, height = size_of(image)
        return (height, width) if _orientation(image) >= 5 else (width, height)

    def decode(image: "Image") -> "Image":
        from PIL.Image import Transpose

        turn = _TURNS.get(_orientation(image))
        pixels = _scaled(image, size_of(image))
        return pixels if turn is None else pixels.transpose(Transpose[turn])

    size = _with_image(data, source, limits, measure)
    how = f"{limits.max_pixels} {box} "  # the pixels depend on these too
    digest = hashlib.sha256(how.encode() + data).digest()
    return LoadedImage(digest, size, partial(_with_image, data, source, limits, decode))


def _with_image(data: bytes, source: Source, limits: Limits, work: "Callable[[Image], T]") -> T:
    """Open an encoded image, check its size, and call `work` with it. Raises ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            complaint = _complaint(*image.size, limits)
            if complaint is None and image.format == "JPEG":
                complaint = _scans_complaint(*image.size, data.count(_SCAN))
            if complaint is None:
                return work(image)
    except UnidentifiedImageError:
        complaint = "is no picture in PNG, JPEG, WebP, GIF or BMP"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        complaint = _too_many(limits)
    except _BROKEN:
        complaint = "cannot be decoded: it is broken or cut short"
    raise source.error(complaint)


def _too_many(limits: Limits) -> str:
    return f"has more than {limits.max_source_pixels} pixels"


def _complaint(width: int, height: int, limits: Limits) -> str | None:
    if width * height > limits.max_source_pixels:
        return _too_many(limits)
    if min(width, height) < 1:
        return "has no pixels"
    if max(width, height) > limits.max_aspect * min(width, height):
        return f"is more than {limits.max_aspect} times as long as wide, or as wide as long"
    return None


def _scans_complaint(width: int, height: int, num_scans: int) -> str | None:
    """A decoder runs over all pixels of a progressive JPEG for each scan, which may be 12 bytes."""
    if num_scans > _MAX_SCANS or num_scans * width * height > _MAX_SCANNED_PIXELS:
        return f"has {num_scans} scans of its pixels, more than any picture needs"
    return None


def _target_size(width: int, height: int, max_pixels: int, box: int | None) -> tuple[int, int]:
    """The largest size within both bounds, in the same proportions, and not above the original."""
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    if box is not None:
        scale = min(scale, box / width, box / height)
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def _orientation(image: "Image") -> int:
    """EXIF's, 1 (upright) where it is absent or broken."""
    try:
        found = image.getexif().get(_ORIENTATION)
        return found if found in _TURNS else 1
    except _BROKEN:
        return 1


def _scaled(image: "Image", size: tuple[int, int]) -> "Image":
    """Decode the first frame to RGB of a size; transparent pixels become white."""
    from PIL import Image

    if size != image.size:
        # A JPEG can be decoded at a half, a quarter or an eighth; twice the size keeps it sharp.
        image.draft(None, (size[0] * 2, size[1] * 2))
    image.load()
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    flat: Image.Image = image
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        flat, has_alpha = image.convert("I").point(lambda value: value * (1 / 256)), False
        flat = flat.convert("L")
    mode = "RGBA" if has_alpha else "RGB"
    if flat.mode != mode or flat.size == size:  # else the copy, 4 bytes a pixel, is wasted
        flat = flat.convert(mode)
    if flat.size != size:
        flat = flat.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    if not has_alpha:
        return flat
    white = Image.new("RGBA", size, "white")
    white.alpha_composite(flat)
    return white.convert("RGB")


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
    encoded = value.encode()
    for escape, byte in _ESCAPES if b"%" in encoded else ():
        encoded = encoded.replace(escape, byte)
    encoded = encoded.translate(None, b" \t\r\n")
    if len(encoded) > math.ceil(MAX_BYTES / 3) * 4:
        raise ImageError(f"'{param}' is larger than {MAX_BYTES >> 20} MiB.", param)
    try:
        data = binascii.a2b_base64(encoded, strict_mode=True)
    except binascii.Error:
        raise ImageError(f"'{param}' is not valid base64.", param) from None
    if not data:
        raise ImageError(f"'{param}' holds no bytes.", param)
    return Source(data, None, param, detail)
