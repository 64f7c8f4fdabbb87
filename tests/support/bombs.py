"""Images that cost much more to open or to decode than their bytes suggest, for each format."""

import random
import struct
import zlib
from functools import cache
from io import BytesIO

from PIL import Image


def png_chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(
    width: int, height: int, *before: bytes, bits: int = 1, colour: int = 0, rows: bytes = b""
) -> bytes:
    """A white PNG with chunks before its pixels, or with other compressed `rows`."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width * bits * channels + 7) // 8)
    rows = rows or b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(before)
    return head + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")


@cache
def squeezed(num_bytes: int) -> bytes:
    """Zeros, of a thousandth of their bytes."""
    packer = zlib.compressobj(9)
    piece = bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(num_bytes >> 20)) + packer.flush()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg_with(*segments: bytes) -> bytes:
    """A JPEG with segments after its first marker."""
    data = saved(Image.new("RGB", (16, 16), "teal"), "JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def exif_of(num_entries: int) -> bytes:
    """A directory of as many entries, at most 65,535, which names itself as the next one."""
    entries = struct.pack(">HHII", 0x0112, 3, 1, 0x10000) * num_entries
    return b"MM\0*" + struct.pack(">IH", 8, num_entries) + entries + struct.pack(">I", 8)


def progressive(size: tuple[int, int], num_more: int) -> bytes:
    """A progressive JPEG of ten scans, the last of which is repeated."""
    data = saved(Image.new("RGB", size, "teal"), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * num_more + data[-2:]


def gif(width: int, height: int, *blocks: bytes, lzw: bytes | None = None) -> bytes:
    """One frame on a canvas of a size, with blocks before it."""
    data = saved(Image.new("P", (8, 8)), "GIF")
    head = b"GIF89a" + struct.pack("<HH", width, height) + data[10:13]
    num_colours = 2 << (data[10] & 7) if data[10] & 0x80 else 0
    palette = data[13 : 13 + 3 * num_colours]
    frame = data[13 + 3 * num_colours :]
    start = frame.index(b",")
    frame = frame[start:]
    if lzw is not None:
        place = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0)
        frame = place + b"\x08" + lzw + b"\0;"
    return head + palette + b"".join(blocks) + frame


def gif_comments(num_bytes: int) -> bytes:
    """One comment of blocks of 255 bytes."""
    return b"!\xfe" + (b"\xff" + bytes(255)) * (num_bytes // 256) + b"\0"


def webp_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def webp(width: int, height: int, num_frames: int) -> bytes:
    """An animation of frames of one pixel on a canvas of a size."""
    still = saved(Image.new("RGBA", (1, 1)), "WEBP", lossless=True)
    picture = still[still.index(b"VP8L") :]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    canvas = webp_chunk(b"VP8X", b"\x12\0\0\0" + sides)
    frame = webp_chunk(b"ANMF", bytes(12) + b"\x01\0\0\0" + picture)
    body = b"WEBP" + canvas + webp_chunk(b"ANIM", bytes(6)) + frame * num_frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def bmp(width: int, height: int, compression: int, data: bytes, bits: int = 8) -> bytes:
    palette = bytes(4 * 256)
    offset = 54 + len(palette)
    head = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    head += struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 256, 0
    )
    return head + palette + data


def noise(num_bytes: int) -> bytes:
    return random.Random(1).randbytes(num_bytes)
