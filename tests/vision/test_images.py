"""Pictures: what may become one, what a fetch may touch, and that nothing else ever happens.

Fetches run over a network of scripts, whose clock passes as a script says; one test runs over a
real socket, so that the scripts are no fiction.
"""

import base64
import hashlib
import random
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any

import pytest
from helpers import Clock
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxlite import media
from mlxlite.http.errors import APIError
from mlxlite.media import (
    FORMATS,
    MAX_BYTES,
    MAX_URL,
    Limits,
    MediaError,
    Network,
    Picture,
    Source,
    is_public,
    load,
    source_of,
    source_of_base64,
)

PARAM = "messages[0].content[1].image_url"
LIMITS = Limits()
REMOTE = Limits(allow_remote=True)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
GRID = [[RED, GREEN], [BLUE, WHITE]]  # a picture of four quarters, row by row


def grid(side: int = 8) -> Image.Image:
    image = Image.new("RGB", (2 * side, 2 * side))
    for y, row in enumerate(GRID):
        for x, colour in enumerate(row):
            image.paste(colour, (x * side, y * side, (x + 1) * side, (y + 1) * side))
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    """Something that does not compress, the same each time."""
    return Image.frombytes("RGB", (width, height), random.Random(1).randbytes(3 * width * height))


PNG = encoded(grid())


def source(data: bytes, detail: str = "auto") -> Source:
    return Source(data, None, PARAM, detail)


def picture(data: bytes, detail: str = "auto", limits: Limits = LIMITS) -> Picture:
    (loaded,) = load([source(data, detail)], limits)
    assert loaded.pixels.mode == "RGB"
    return loaded


def pixel(data: bytes, x: int = 0, y: int = 0) -> Any:
    return picture(data).pixels.getpixel((x, y))


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    """What a client is told of bytes that are no picture for us."""
    with pytest.raises(MediaError) as caught:
        load([source(data)], limits)
    assert caught.value.param == PARAM
    message = str(caught.value)
    assert message.startswith(f"'{PARAM}' ")
    return message.removeprefix(f"'{PARAM}' ").removesuffix(".")


# --- what a request says ------------------------------------------------------------------------


def bad_source(value: Any) -> str:
    with pytest.raises(APIError) as caught:
        source_of(value, PARAM)
    assert (caught.value.status, caught.value.param) == (400, PARAM)
    return caught.value.message


BYTES = b"\xfb\xff\xfe\xfa" * 10
TEXT = base64.b64encode(BYTES).decode()  # has each character that may be escaped


@pytest.mark.parametrize(
    "uri",
    [
        f"data:image/png;base64,{TEXT}",
        f"data:image/jpeg;base64,{TEXT}",  # the content decides
        f"data:;base64,{TEXT}",
        f"data:application/octet-stream;base64,{TEXT}",
        f"DATA:image/png;charset=x;BASE64,{TEXT}",
        f"data:image/png;base64,{TEXT[:40]}\r\n {TEXT[40:]}\n",
        "data:image/png;base64,"
        + TEXT.replace("=", "%3D").replace("+", "%2B").replace("/", "%2f")
        + "%0A",
    ],
)
def test_a_data_uri_is_its_bytes(uri: str) -> None:
    assert source_of(uri, PARAM, "low") == Source(BYTES, None, PARAM, "low")


@pytest.mark.parametrize(
    "uri",
    [
        "data:",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64, \n",
        "data:image/png,AAAA",
        "data:image/svg+xml;utf8,<svg/>",
        "data:image/png;base64,AAA",
        "data:image/png;base64,AA==AA==",
        "data:image/png;base64,A*AA",
        "data:image/png;base64,%41%41%41%41",
        "data:image/png;base64,ÄÄÄÄ",
        "data:image/png;base64,AA-_",
    ],
)
def test_a_data_uri_that_is_no_base64_is_refused_by_name(uri: str) -> None:
    assert PARAM in bad_source(uri)


def test_a_data_uri_of_50_mb_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(media, "binascii", None)  # whoever decodes fails
    text = "A" * (50_000_000 // 3 * 4)
    assert "larger than 32 MiB" in bad_source("data:image/png;base64," + text)


def test_what_the_parser_takes_at_most_is_what_it_says() -> None:
    assert len(source_of_base64("AAAA" * (MAX_BYTES // 3), PARAM).data or b"") == MAX_BYTES // 3 * 3
    with pytest.raises(APIError):
        source_of_base64("AAAA" * (MAX_BYTES // 3 + 2), PARAM)


@pytest.mark.parametrize("value", [None, 5, True, [], {}, ["data:"]])
def test_a_source_is_a_string(value: Any) -> None:
    assert "must be a string" in bad_source(value)
    with pytest.raises(APIError):
        source_of_base64(value, PARAM)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "FILE:///etc/passwd",
        "/etc/passwd",
        "../cat.png",
        "cat.png",
        "",
        "ftp://example.com/cat.png",
        "javascript:alert(1)",
        "blob:https://example.com/1",
        "gopher://example.com/",
        "//example.com/cat.png",
        "http:/example.com",
        " https://example.com",
        "x" * 100_000,
    ],
)
def test_only_data_and_the_web_are_sources(url: str) -> None:
    assert bad_source(url).endswith("must be a data: URI or a URL of http or https.")


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///cat.png",
        "http://[::1",
        "http://[fe80::1%25eth0]/",
        "http://[1.2.3.4]/",
        "http://exa mple.com/",
        "http://example.com\\@127.0.0.1/",
        "http://example.com/\r\nHost: x",
        "http://example.com/\0",
        "http://bücher.example/",
        "http://%31%32%37.0.0.1/",
        "http://example.com:99999/",
        "http://example.com:x/",
        "http://user@example.com/",
        "http://user:key@example.com/",
        "http://example.com:22/",
        "http://example.com:25/",
        "http://example.com:0/",
        "https://example.com:1023/",
        "https://example.com/" + "x" * MAX_URL,
    ],
)
def test_a_url_that_nobody_should_fetch_is_refused_before_it_is_asked_for(url: str) -> None:
    assert PARAM in bad_source(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "HTTPS://EXAMPLE.com:8443/a%20b/ü.png?q=1&r=/#top",
        "http://127.0.0.1:1024/",  # whether it is fetched is seen when it is
        "http://[2606:4700::1]/",
        "http://xn--bcher-kva.example./",
    ],
)
def test_a_url_is_kept_as_it_is(url: str) -> None:
    assert source_of(url, PARAM) == Source(None, url, PARAM, "auto")


@given(st.text() | st.text().map("data:".__add__) | st.text().map("http://".__add__))
def test_a_source_is_read_or_refused_whatever_it_says(value: str) -> None:
    with suppress(APIError):
        found = source_of(value, PARAM)
        assert (found.data is None) != (found.url is None)


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_decoded_by_its_content(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0, "quality": 95}}
    pixels = picture(encoded(grid(), kind, **options.get(kind, {}))).pixels
    assert pixels.size == (16, 16)
    for y, row in enumerate(GRID):
        for x, colour in enumerate(row):
            found: Any = pixels.getpixel((4 + 8 * x, 4 + 8 * y))
            assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 6


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
PS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"


@pytest.mark.parametrize(
    "data",
    [SVG, b"<?xml version='1.0'?>" + SVG, PS, b"%PDF-1.7", b"\0", b"x" * 100, b"GIF", b"\x89PNG"]
    + [encoded(grid(), kind) for kind in ("TIFF", "ICO", "PPM", "TGA", "JPEG2000", "PCX", "DDS")],
)
def test_nothing_else_reaches_a_decoder(data: bytes) -> None:
    assert refusal(data) == "is no picture in PNG, JPEG, WebP, GIF or BMP"


def test_a_format_that_is_not_ours_is_refused_though_it_could_be_decoded() -> None:
    tiff = encoded(grid(), "TIFF")
    assert Image.open(BytesIO(tiff)).format == "TIFF"
    assert "no picture" in refusal(tiff)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_picture_that_is_cut_short_is_refused(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    assert picture(data).pixels.size == (64, 64)
    assert refusal(data[: int(len(data) * share)]) in (
        "cannot be decoded: it is broken or cut short",
        "is no picture in PNG, JPEG, WebP, GIF or BMP",
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of any size and few bytes: white, one bit a pixel."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_500, 9_500), (8_001, 8_000), (300, 213_334)])
def test_a_bomb_is_refused_for_what_its_header_says(size: tuple[int, int]) -> None:
    assert refusal(bomb(*size)[:60]) == "has more than 64000000 pixels"


def test_a_whole_bomb_of_400_megapixels_is_small_and_refused() -> None:
    data = bomb(20_000, 20_000)
    assert len(data) < 200_000
    assert refusal(data) == "has more than 64000000 pixels"


def test_as_many_pixels_as_are_allowed_are_decoded() -> None:
    limits = replace(LIMITS, max_source_pixels=64 * 100, max_pixels=64)
    assert picture(bomb(64, 100), limits=limits).pixels.size == (6, 10)
    assert "has more than 6400 pixels" in refusal(bomb(65, 100), limits)


def test_a_picture_is_at_most_so_many_times_as_long_as_wide() -> None:
    assert picture(bomb(1, 200)).pixels.size == (1, 200)
    assert "200 times as long as wide" in refusal(bomb(1, 201))
    assert "200 times as long as wide" in refusal(bomb(402, 2))


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (6000, 31), (1265, 1265)])
def test_a_large_picture_is_scaled_down_in_its_proportions(size: tuple[int, int]) -> None:
    width, height = picture(bomb(*size)).pixels.size
    assert width * height <= 1_600_000
    if size[0] * size[1] > 1_600_000:
        assert width * height > 0.95 * 1_600_000
    assert abs(width / height / (size[0] / size[1]) - 1) < 0.05


def test_a_small_picture_keeps_its_size() -> None:
    assert picture(bomb(1, 1)).pixels.size == (1, 1)
    assert picture(bomb(1264, 1264)).pixels.size == (1264, 1264)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((1024, 256), (512, 128)), ((256, 1024), (128, 512)), ((512, 512), (512, 512))],
)
def test_low_detail_is_at_most_512_pixels_a_side(
    size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    assert picture(bomb(*size), "low").pixels.size == scaled
    assert picture(bomb(*size), "high").pixels.size == size


def test_a_jpeg_that_is_scaled_shows_what_it_showed() -> None:
    pixels = picture(encoded(grid(1600), "JPEG")).pixels
    assert pixels.size == (1264, 1264)
    found: Any = pixels.getpixel((900, 300))
    assert max(abs(a - b) for a, b in zip(found, GREEN, strict=True)) < 6


def test_a_jpeg_that_is_scaled_stays_sharp() -> None:
    image = Image.new("L", (8000, 8000))
    image.paste(255, (4004, 0, 8000, 8000))  # no eighth of a size can have its edge there
    pixels = picture(encoded(image, "JPEG")).pixels
    row: list[Any] = [pixels.getpixel((x, 600)) for x in range(1264)]
    grey = [x for x, (value, _, _) in enumerate(row) if 20 <= value < 236]
    assert grey == [632]


# What a viewer sees of GRID's corners at each orientation (EXIF 2.32, table 6), row by row.
UPRIGHT = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_camera_that_was_turned_is_turned_back(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = grid(16).resize((32, 64))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = picture(encoded(image, kind, exif=exif, **options)).pixels
    width, height = pixels.size
    assert pixels.size == ((64, 32) if orientation >= 5 else (32, 64))
    corners: list[Any] = [pixels.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]
    for found, wanted in zip(corners, UPRIGHT[orientation], strict=True):
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 12


def test_a_picture_is_turned_when_it_is_scaled_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (4000, 2000), RED), "JPEG", exif=exif)
    width, height = picture(data).pixels.size
    assert height > 1.9 * width


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixel(encoded(grid(), "PNG", exif=exif)) == RED


def test_broken_notes_of_a_camera_do_not_spoil_a_picture() -> None:
    data = encoded(grid(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert pixel(data) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    assert pixel(encoded(image)) == WHITE
    assert pixel(encoded(image), 1) == (0, 0, 0)


def test_what_is_half_transparent_is_half_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))) == (255, 127, 127)


def test_what_is_transparent_stays_white_when_it_is_scaled() -> None:
    image = Image.new("RGBA", (2000, 2000), (255, 0, 0, 0))
    assert picture(encoded(image)).pixels.getcolors() == [(1264 * 1264, WHITE)]


@pytest.mark.parametrize("transparency", [0, b"\0\xff"])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palettes_transparent_colour_is_white(kind: str, transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    if kind == "GIF":
        transparency = 0
    data = encoded(image, kind, transparency=transparency)
    assert [pixel(data), pixel(data, 1)] == [WHITE, RED]


@pytest.mark.parametrize(("mode", "clear"), [("RGB", (1, 2, 3)), ("L", 7), ("1", 0)])
def test_one_transparent_colour_is_white(mode: str, clear: Any) -> None:
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), RED if mode == "RGB" else 255)
    data = encoded(image, transparency=clear)
    assert [pixel(data), pixel(data, 1)] == [WHITE, RED if mode == "RGB" else WHITE]
    assert pixel(encoded(image)) != WHITE


def test_a_palette_is_its_colours() -> None:
    assert pixel(encoded(grid().quantize(4)), 12, 4) == GREEN


@pytest.mark.parametrize(
    ("value", "shown"), [(0, 0), (255, 0), (256, 1), (32768, 128), (65535, 255)]
)
def test_grey_of_16_bits_is_grey_of_8(value: int, shown: int) -> None:
    image = Image.new("I;16", (1, 1))
    image.putpixel((0, 0), value)
    data = encoded(image)
    assert Image.open(BytesIO(data)).mode == "I;16"
    assert pixel(data) == (shown,) * 3


def test_colours_of_16_bits_are_colours_of_8() -> None:
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    row = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32768, 0))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    assert pixel(head + chunk(b"IDAT", row) + chunk(b"IEND", b"")) == (255, 128, 0)


def test_cmyk_is_shown_in_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert Image.open(BytesIO(data)).mode == "CMYK"
    found: Any = pixel(data)
    assert max(abs(a - b) for a, b in zip(found, RED, strict=True)) < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_what_moves_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) == 3
    assert pixel(data) == RED


BROKEN = [encoded(noise(12, 9), kind) for kind in FORMATS]
BROKEN += [encoded(grid(4).quantize(4), kind) for kind in ("PNG", "GIF")]


@given(
    st.sampled_from(BROKEN),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8),
    st.integers(0, 2000),
)
def test_broken_bytes_are_a_picture_or_an_error_for_the_client(
    data: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    broken = bytearray(data[: end or None])
    for at, value in changes:
        broken[at % len(broken)] = value
    limits = replace(LIMITS, max_source_pixels=100_000)
    with suppress(MediaError):
        (found,) = load([source(bytes(broken))], limits)
        assert found.pixels.mode == "RGB"


def test_a_decoder_without_memory_is_an_error_for_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    assert "cannot be decoded" in refusal(PNG)


def test_without_pillow_a_client_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'mlxlite[vision]'" in refusal(PNG)
    assert load([], LIMITS) == ()


# --- limits and digests -------------------------------------------------------------------------


def test_pictures_come_in_the_order_of_their_sources() -> None:
    colours = [RED, GREEN, BLUE]
    sources = [source(encoded(Image.new("RGB", (1, 1), colour))) for colour in colours]
    assert [one.pixels.getpixel((0, 0)) for one in load(sources, LIMITS)] == colours


def test_the_first_picture_that_is_too_many_is_named_before_any_is_decoded() -> None:
    sources = [replace(source(b"broken"), param=f"p{i}") for i in range(4)]
    with pytest.raises(MediaError, match="at most 2 pictures") as caught:
        load(sources, replace(LIMITS, max_images=2))
    assert caught.value.param == "p2"
    assert len(load([source(PNG)] * 16, LIMITS)) == 16
    with pytest.raises(MediaError):
        load([source(PNG)] * 17, LIMITS)


def test_a_picture_has_at_most_so_many_bytes() -> None:
    assert picture(PNG, limits=replace(LIMITS, max_bytes=len(PNG))).pixels.size == (16, 16)
    assert "is larger than" in refusal(PNG, replace(LIMITS, max_bytes=len(PNG) - 1))
    assert refusal(bytes((20 << 20) + 1)) == "is larger than 20 MiB"


def test_a_digest_is_of_the_bytes_and_of_what_becomes_of_them() -> None:
    other = encoded(grid(), "BMP")
    seen = {
        picture(PNG).digest,
        picture(other).digest,
        picture(PNG, "low").digest,
        picture(PNG, limits=replace(LIMITS, max_pixels=100)).digest,
    }
    assert len(seen) == 4
    assert all(len(digest) == hashlib.sha256().digest_size for digest in seen)
    assert picture(PNG).digest == picture(PNG, "high").digest  # the same pixels
    assert picture(PNG).digest == picture(PNG, limits=replace(LIMITS, max_images=1)).digest


def test_what_is_printed_of_a_source_is_not_its_bytes() -> None:
    assert "PNG" not in repr(source(PNG))


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
def test_no_address_of_ours_is_public_in_any_wrapping(ip: Any) -> None:
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
Script = Sequence[bytes | float | OSError]  # bytes that come, seconds that pass, what fails


class FakeWire:
    """A connection whose other end follows a script, and is silent after it."""

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
                        raise TimeoutError
        return b""

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeNetwork:
    """Names and their addresses, and what is said at each address, one script a connection."""

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


def fetch(url: str, fake: FakeNetwork, limits: Limits = REMOTE) -> Picture:
    try:
        (found,) = load([source_of(url, PARAM)], limits, fake.network)
    finally:
        assert all(wire.is_closed for wire in fake.wires)
    return found


def failure(url: str, fake: FakeNetwork, limits: Limits = REMOTE) -> str:
    with pytest.raises(MediaError) as caught:
        fetch(url, fake, limits)
    assert caught.value.param == PARAM
    return str(caught.value).removeprefix(f"'{PARAM}' ").removesuffix(".")


UNREACHABLE = "has no public address to be fetched from"


def test_a_picture_is_fetched_from_the_address_that_was_looked_up_once() -> None:
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


def test_a_picture_that_was_fetched_is_the_one_that_was_sent() -> None:
    assert fetch(URL, saying([answer()])).digest == picture(PNG).digest


def test_nothing_is_fetched_unless_the_operator_wants_it() -> None:
    fake = saying([answer()])
    assert "--allow-remote-images" in failure(URL, fake, LIMITS)
    assert (fake.resolved, fake.dialled) == ([], [])


def test_a_secure_fetch_is_secured_for_the_name_in_the_url() -> None:
    fake = saying([answer()])
    fetch("https://example.com/", fake)
    assert (fake.dialled, fake.secured) == ([(PUBLIC, 443)], ["example.com"])
    assert b"Host: example.com\r\n" in fake.wires[0].sent


def test_a_port_is_named_where_it_is_not_the_schemes() -> None:
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
        "http://nobody-knows-this.example/",
        "http://1.2.3/",
    ],
)
def test_what_is_private_or_unknown_is_refused_in_one_voice(url: str) -> None:
    names = {"localhost": ["::1", "127.0.0.1"], "metadata.google.internal": ["169.254.169.254"]}
    fake = FakeNetwork(names=names)
    assert failure(url, fake) == UNREACHABLE
    assert fake.dialled == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "1.2.3.4.", "0x"])
def test_a_number_is_no_name_whatever_a_name_server_says_of_it(host: str) -> None:
    fake = saying([answer()], names={host: [PUBLIC]})
    assert failure(f"http://{host}/", fake) == UNREACHABLE
    assert (fake.resolved, fake.dialled) == ([], [])


def test_this_machine_is_refused_by_its_name_whatever_its_own_files_say_of_it() -> None:
    with pytest.raises(MediaError, match=UNREACHABLE):
        load([source_of("http://localhost/", PARAM)], REMOTE)  # no fake: nothing is dialled


@pytest.mark.parametrize("private", ["10.0.0.1", "::1", "::ffff:10.0.0.1", "not an address"])
def test_one_private_address_among_public_ones_is_enough(private: str) -> None:
    for addresses in ([PUBLIC, private], [private, PUBLIC], [PUBLIC, PUBLIC, private]):
        fake = saying([answer()], names={"example.com": addresses})
        assert failure(URL, fake) == UNREACHABLE
        assert fake.dialled == []


def test_another_address_is_dialled_where_one_does_not_answer_and_those_of_ipv4_first() -> None:
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
def test_a_redirect_to_what_is_not_fetched_is_not_fetched(location: str, message: str) -> None:
    fake = saying([moved(location)])
    assert failure(URL, fake) == message
    assert len(fake.dialled) == 1


def test_a_name_that_turns_private_on_the_way_is_refused() -> None:
    fake = saying([moved("/again")])
    resolve = iter([[PUBLIC], ["127.0.0.1"]])
    network = replace(fake.network, resolve=lambda *_: next(resolve))
    with pytest.raises(MediaError, match=UNREACHABLE):
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
def test_any_other_status_is_told_and_nothing_else_of_the_answer(status: str) -> None:
    said = failure(URL, saying([answer(b"", status, "X-Secret: secret")]))
    assert said == f"could not be fetched: the answer was {status[:3]}"


def test_a_redirect_that_leads_nowhere_is_a_status_like_others() -> None:
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
        [b"HTTP/1.1 200 OK\r\n", ConnectionResetError("secret")],
    ],
)
def test_an_answer_that_is_broken_is_not_repeated(script: Script) -> None:
    assert failure(URL, saying(script)) == "could not be fetched"


def test_an_answer_that_is_no_picture_is_not_repeated() -> None:
    assert failure(URL, saying([answer(b"root:x:0:0")])) == (
        "is no picture in PNG, JPEG, WebP, GIF or BMP"
    )


def test_interim_answers_are_passed_over() -> None:
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


def test_a_body_that_is_too_large_is_refused_though_no_length_says_so() -> None:
    limits = replace(REMOTE, max_bytes=1 << 20)
    script: Script = [b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(1 << 16)] * 17, OSError("not read")]
    assert failure(URL, saying(script), limits) == "is larger than 1 MiB"


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
def test_a_slow_server_is_left_at_the_deadline(script: Script) -> None:
    fake = saying(script, [1.0, answer()])
    began = fake.clock.now
    assert failure(URL, fake) == LATE
    assert fake.clock.now - began <= REMOTE.total_s + 1


def test_a_server_that_never_stops_sending_is_left_at_the_deadline() -> None:
    fake = saying([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x"] * 10])
    network = replace(fake.network, now=iter(range(0, 1000, 3)).__next__)  # each look costs 3 s
    with pytest.raises(MediaError, match=LATE):
        load([source_of(URL, PARAM)], REMOTE, network)


def test_slow_names_and_dials_count_too() -> None:
    fake = saying(names={"example.com": [f"8.8.8.{i}" for i in range(5)]}, resolve_s=4.0)
    assert failure(URL, fake) == LATE
    assert fake.clock.now <= 1000 + REMOTE.total_s
    fake = FakeNetwork(resolve_s=60.0)
    assert failure(URL, fake) == UNREACHABLE
    assert fake.clock.now == 1000 + REMOTE.connect_s


def test_all_pictures_of_a_request_share_one_deadline() -> None:
    fake = saying([6.0, answer()], [6.0, answer()], [6.0, answer()])
    sources = [source_of(URL, f"p{i}") for i in range(3)]
    assert len(load(sources[:2], REMOTE, fake.network)) == 2
    fake = saying([6.0, answer()], [6.0, answer()], [6.0, answer()])
    with pytest.raises(MediaError, match=LATE) as caught:
        load(sources, REMOTE, fake.network)
    assert caught.value.param == "p2"


def test_a_handshake_that_fails_closes_the_connection() -> None:
    fake = saying([answer()])

    def fail(*_: Any) -> Any:
        raise OSError("certificate verify failed: secret")

    with pytest.raises(MediaError) as caught:
        load([source_of("https://example.com/", PARAM)], REMOTE, replace(fake.network, secure=fail))
    assert str(caught.value) == f"'{PARAM}' could not be fetched."
    assert fake.wires[0].is_closed


@contextmanager
def listening(said: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server on a real socket that answers one request."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                asked.append(connection.recv(65536))
                connection.sendall(said)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join(20)


def test_a_real_socket_serves_a_fetch_as_the_scripts_do() -> None:
    fake = FakeNetwork()
    with listening(answer(encoded(noise(300, 300)))) as (port, asked):

        def dial(address: str, _port: int, timeout_s: float) -> Any:
            fake.dialled.append((address, _port))
            return Network().dial("127.0.0.1", port, timeout_s)

        network = Network(resolve=fake.resolve, dial=dial)
        (found,) = load([source_of(URL, PARAM)], REMOTE, network)
    assert found.pixels.size == (300, 300)
    assert asked[0].startswith(b"GET /cat.png HTTP/1.1\r\nHost: example.com\r\n")
    assert fake.dialled == [(PUBLIC, 80)]


def test_a_real_server_without_a_certificate_is_not_believed() -> None:
    with listening(b"no TLS") as (port, _):

        def dial(_address: str, _port: int, timeout_s: float) -> Any:
            return Network().dial("127.0.0.1", port, timeout_s)

        network = Network(resolve=FakeNetwork().resolve, dial=dial)
        with pytest.raises(MediaError, match="could not be fetched"):
            load([source_of("https://example.com/", PARAM)], REMOTE, network)


def test_the_systems_names_are_looked_up_within_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Network().resolve("localhost", 80, 20.0)
    assert found
    assert not any(map(is_public, found))
    assert Network().resolve("a" * 64 + ".example", 80, 20.0) == []  # no name has such a part
    is_over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: is_over.wait(20) and [])
    assert Network().resolve("example.com", 80, 0.001) == []
    is_over.set()
