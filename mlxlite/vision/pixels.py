"""An encoded image's bytes to pixels: the checks, the decoder, the scale. Pure, but for `main`.

It must never open a file, run a decoder that is not in `FORMATS` (by the content, not by a name or
a declared type), or decode before the size in the header is checked. Pillow loops over a file's
blocks in Python and C for as long as there are blocks, so that 20 MB may take minutes; it cannot be
stopped in a thread. `decoder.py` therefore runs this file as a program of its own, with nothing in
it but Pillow: it imports no other file of this package. `main` is that program.
"""

import math
import os
import resource
import signal
import struct
import sys
import time
import zlib
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
Size: TypeAlias = tuple[int, int]  # in pixels: width, height
# EXIF's orientations other than upright, and how PIL undoes them; from 5 on sides are exchanged.
_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM"},
    **{5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}
_SCAN: Final = b"\xff\xda"  # JPEG's marker, which no compressed data contains
_MAX_SCANS: Final = 1000
_MAX_SCANNED_PIXELS: Final = 1 << 30  # about 0.6 s; of the largest image 16 scans: 10 are usual

# What Pillow's decoders raise for broken bytes; Warning if warnings are errors.
_BROKEN: Final = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(AssertionError, RuntimeError, MemoryError, EOFError, Warning, struct.error, zlib.error),
)
BROKEN: Final = "cannot be decoded: it is broken or cut short"


class Refused(Exception):
    """The bytes are not accepted as an image; the message is the predicate of its field's name."""


class Bounds(NamedTuple):
    """What an image may have, and what it is scaled to."""

    max_pixels: int  # of the result
    box: int  # most pixels a side of the result; 0 is no bound
    max_source_pixels: int
    max_aspect: int

    def scaled(self, size: Size) -> Size:
        """The largest size in both bounds, in the same proportions, and not above the original."""
        width, height = size
        scale = min(1.0, math.sqrt(self.max_pixels / (width * height)))
        if self.box:
            scale = min(scale, self.box / width, self.box / height)
        return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))

    def complaint(self, size: Size) -> str | None:
        width, height = size
        if width * height > self.max_source_pixels:
            return self.too_many
        if min(width, height) < 1:
            return "has no pixels"
        if max(width, height) > self.max_aspect * min(width, height):
            return f"is more than {self.max_aspect} times as long as wide, or as wide as long"
        return None

    @property
    def too_many(self) -> str:
        return f"has more than {self.max_source_pixels} pixels"


def measure(data: bytes, bounds: Bounds) -> Size:
    """The size that `decode` gives it, by its header. Raises Refused."""
    return _opened(data, bounds, decodes=False)[0]


def decode(data: bytes, bounds: Bounds) -> "Image":
    """The first frame in mode RGB, upright and scaled. Raises Refused."""
    _, image = _opened(data, bounds, decodes=True)
    assert image is not None
    return image


def _opened(data: bytes, bounds: Bounds, *, decodes: bool) -> "tuple[Size, Image | None]":
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            complaint = bounds.complaint(image.size)
            if complaint is None and image.format == "JPEG":
                complaint = _scans_complaint(*image.size, data.count(_SCAN))
            if complaint is None:
                return _worked(image, bounds.scaled(image.size), decodes=decodes)
    except UnidentifiedImageError:
        complaint = "is no picture in PNG, JPEG, WebP, GIF or BMP"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        complaint = bounds.too_many
    except _BROKEN:
        complaint = BROKEN
    raise Refused(complaint)


def _worked(image: "Image", size: Size, *, decodes: bool) -> "tuple[Size, Image | None]":
    from PIL.Image import Transpose

    orientation = _orientation(image)
    turned = size[::-1] if orientation >= 5 else size
    if not decodes:
        return turned, None
    pixels, turn = _scaled(image, size), _TURNS.get(orientation)
    return turned, pixels if turn is None else pixels.transpose(Transpose[turn])


def _scans_complaint(width: int, height: int, num_scans: int) -> str | None:
    """A decoder runs over all pixels of a progressive JPEG for each scan, which may be 12 bytes."""
    if num_scans > _MAX_SCANS or num_scans * width * height > _MAX_SCANNED_PIXELS:
        return f"has {num_scans} scans of its pixels, more than any picture needs"
    return None


def _orientation(image: "Image") -> int:
    """EXIF's, 1 (upright) where it is absent or broken."""
    try:
        found = image.getexif().get(_ORIENTATION)
        return found if found in _TURNS else 1
    except _BROKEN:
        return 1


def _scaled(image: "Image", size: Size) -> "Image":
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


# --- the program ------------------------------------------------------------------------------

JOB: Final = struct.Struct(">?Q4Q")  # whether to decode; bytes that follow; the bounds
ANSWER: Final = struct.Struct(">?IIQ")  # whether it is an image; its size; bytes that follow
READY: Final = ANSWER.pack(True, 0, 0, 0)  # once, at the start
MAX_CPU_S = 60  # of one job: should the parent be gone, which would have ended it
MAX_MEMORY = 3 << 29  # of addresses; a WebP of 64 million pixels takes 1.1 GiB
_NICE = 5  # a decode may wait; the device's thread may not


def main() -> None:
    """Answer jobs from stdin on stdout until stdin ends; `argv[1]` is the folder of Pillow."""
    sys.path.append(sys.argv[1])
    with open(os.dup(0), "rb") as jobs, open(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # a print would be read as pixels
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _import_decoders()
        _limit()
        _answer(answers, READY)
        while len(head := jobs.read(JOB.size)) == JOB.size:
            decodes, num_bytes, *bounds = JOB.unpack(head)
            _limit_time()
            _answer(answers, *_done(jobs.read(num_bytes), Bounds(*bounds), decodes=decodes))


def _answer(answers: BinaryIO, *parts: bytes) -> None:
    for part in parts:
        answers.write(part)
    answers.flush()


def _done(data: bytes, bounds: Bounds, *, decodes: bool) -> tuple[bytes, bytes]:
    """The answer to a job: a size and the pixels, or what is wrong."""
    try:
        size, image = _opened(data, bounds, decodes=decodes)
        pixels = b"" if image is None else image.tobytes()
        return ANSWER.pack(True, *size, len(pixels)), pixels
    except Refused as refused:
        complaint = str(refused).encode()
    except _BROKEN:
        complaint = BROKEN.encode()
    return ANSWER.pack(False, 0, 0, len(complaint)), complaint


def _import_decoders() -> None:
    """Those of `FORMATS`, before the first job; without WebP's, Pillow would import all it has."""
    from PIL import Image, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (EXIF is a TIFF)

    Image.preinit()


def _limit() -> None:
    """No files written, no core, bounded memory; less where the system has no such limit."""
    for kind, most in (("CORE", 0), ("FSIZE", 0), ("AS", MAX_MEMORY)):
        with suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (most, most))
    with suppress(OSError):
        os.nice(_NICE)


def _limit_time() -> None:
    most = int(time.process_time()) + MAX_CPU_S
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
