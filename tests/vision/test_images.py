"""Images: accepted bytes, and the pixels that they decode to."""

import base64
import hashlib
import random
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from bombs import png as png_of
from bombs import png_chunk, progressive
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlxlite.vision import images
from mlxlite.vision.decoder import Decoder
from mlxlite.vision.fetch import MAX_URL, Limits
from mlxlite.vision.images import (
    MAX_BYTES,
    ImageError,
    LoadedImage,
    Source,
    source_of,
    source_of_base64,
)
from mlxlite.vision.pixels import FORMATS

PARAM = "messages[0].content[1].image_url"
LIMITS = Limits()
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
GRID = [[RED, GREEN], [BLUE, WHITE]]  # an image of four quarters, row by row


DECODER = Decoder()  # its children, and so each image here, are processes of their own
IN_THREAD = Decoder(())


@pytest.fixture(autouse=True, scope="module")
def _children() -> Iterator[None]:
    yield
    DECODER.close()


def load(
    sources: Sequence[Source], limits: Limits, decoder: Decoder = DECODER
) -> tuple[LoadedImage, ...]:
    return images.load(sources, limits, decoder)


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
    """Reproducible bytes that do not compress."""
    return Image.frombytes("RGB", (width, height), random.Random(1).randbytes(3 * width * height))


PNG = encoded(grid())


def source(data: bytes, detail: str = "auto") -> Source:
    return Source(data, None, PARAM, detail)


def loaded(data: bytes, detail: str = "auto", limits: Limits = LIMITS) -> LoadedImage:
    (loaded,) = load([source(data, detail)], limits)
    assert loaded.pixels.mode == "RGB"
    return loaded


def pixel(data: bytes, x: int = 0, y: int = 0) -> Any:
    return loaded(data).pixels.getpixel((x, y))


def refusal(data: bytes, limits: Limits = LIMITS) -> str:
    """The error for bytes that are not accepted as an image."""
    with pytest.raises(ImageError) as caught:
        load([source(data)], limits)
    assert caught.value.param == PARAM
    message = str(caught.value)
    assert message.startswith(f"'{PARAM}' ")
    return message.removeprefix(f"'{PARAM}' ").removesuffix(".")


# --- sources ------------------------------------------------------------------------------------


def bad_source(value: str) -> str:
    with pytest.raises(ImageError) as caught:
        source_of(value, PARAM)
    assert caught.value.param == PARAM
    return str(caught.value)


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
    monkeypatch.setattr(images, "binascii", None)  # decoding would fail
    text = "A" * (50_000_000 // 3 * 4)
    assert "larger than 32 MiB" in bad_source("data:image/png;base64," + text)


def test_the_parsers_size_limit_is_exact() -> None:
    assert len(source_of_base64("AAAA" * (MAX_BYTES // 3), PARAM).data or b"") == MAX_BYTES // 3 * 3
    with pytest.raises(ImageError):
        source_of_base64("AAAA" * (MAX_BYTES // 3 + 2), PARAM)


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
def test_a_url_that_is_never_fetched_is_refused_at_parsing(url: str) -> None:
    assert PARAM in bad_source(url)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com",
        "HTTPS://EXAMPLE.com:8443/a%20b/ü.png?q=1&r=/#top",
        "http://127.0.0.1:1024/",  # checked when it is fetched
        "http://[2606:4700::1]/",
        "http://xn--bcher-kva.example./",
    ],
)
def test_a_url_is_kept_as_it_is(url: str) -> None:
    assert source_of(url, PARAM) == Source(None, url, PARAM, "auto")


@given(st.text() | st.text().map("data:".__add__) | st.text().map("http://".__add__))
def test_any_text_is_a_source_or_an_image_error(value: str) -> None:
    with suppress(ImageError):
        found = source_of(value, PARAM)
        assert (found.data is None) != (found.url is None)


# --- pixels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_decoded_by_its_content(kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0, "quality": 95}}
    pixels = loaded(encoded(grid(), kind, **options.get(kind, {}))).pixels
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
def test_other_formats_reach_no_decoder(data: bytes) -> None:
    assert refusal(data) == "is no picture in PNG, JPEG, WebP, GIF or BMP"


def test_a_format_outside_the_list_is_refused_even_if_pillow_decodes_it() -> None:
    tiff = encoded(grid(), "TIFF")
    assert Image.open(BytesIO(tiff)).format == "TIFF"
    assert "no picture" in refusal(tiff)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encoded(noise(64, 64), kind)
    assert loaded(data).pixels.size == (64, 64)
    assert refusal(data[: int(len(data) * share)]) in (
        "cannot be decoded: it is broken or cut short",
        "is no picture in PNG, JPEG, WebP, GIF or BMP",
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_500, 9_500), (8_001, 8_000), (300, 213_334)])
def test_a_bomb_is_refused_by_the_size_in_its_header(size: tuple[int, int]) -> None:
    assert refusal(png_of(*size)[:60]) == "has more than 64000000 pixels"


def test_a_whole_bomb_of_400_megapixels_is_small_and_refused() -> None:
    data = png_of(20_000, 20_000)
    assert len(data) < 200_000
    assert refusal(data) == "has more than 64000000 pixels"


@pytest.mark.parametrize(
    ("size", "num_more"), [((1, 1), 100_000), ((300, 300), 20_000), ((4000, 4000), 100)]
)
def test_a_jpeg_whose_scans_repeat_is_refused_before_it_is_decoded(
    size: tuple[int, int], num_more: int
) -> None:
    complaint = f"has {num_more + 10} scans of its pixels, more than any picture needs"
    assert refusal(progressive(size, num_more)) == complaint


@pytest.mark.parametrize("size", [(1, 1), (300, 300), (4000, 4000)])
def test_a_progressive_jpeg_is_decoded(size: tuple[int, int]) -> None:
    (image,) = load([source(progressive(size, 0))], Limits())
    assert image.pixels.getpixel((0, 0))[1] == pytest.approx(128, abs=2)


def test_an_image_of_exactly_the_pixel_limit_is_decoded() -> None:
    limits = replace(LIMITS, max_source_pixels=64 * 100, max_pixels=64)
    assert loaded(png_of(64, 100), limits=limits).pixels.size == (6, 10)
    assert "has more than 6400 pixels" in refusal(png_of(65, 100), limits)


def test_the_aspect_ratio_is_bounded() -> None:
    assert loaded(png_of(1, 200)).pixels.size == (1, 200)
    assert "200 times as long as wide" in refusal(png_of(1, 201))
    assert "200 times as long as wide" in refusal(png_of(402, 2))


@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000), (6000, 31), (1265, 1265)])
def test_a_large_image_is_scaled_down_in_its_proportions(size: tuple[int, int]) -> None:
    width, height = loaded(png_of(*size)).pixels.size
    assert width * height <= 1_600_000
    if size[0] * size[1] > 1_600_000:
        assert width * height > 0.95 * 1_600_000
    assert abs(width / height / (size[0] / size[1]) - 1) < 0.05


def test_a_small_image_keeps_its_size() -> None:
    assert loaded(png_of(1, 1)).pixels.size == (1, 1)
    assert loaded(png_of(1264, 1264)).pixels.size == (1264, 1264)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((1024, 256), (512, 128)), ((256, 1024), (128, 512)), ((512, 512), (512, 512))],
)
def test_low_detail_is_at_most_512_pixels_a_side(
    size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    assert loaded(png_of(*size), "low").pixels.size == scaled
    assert loaded(png_of(*size), "high").pixels.size == size


def test_a_scaled_jpeg_keeps_its_colours() -> None:
    pixels = loaded(encoded(grid(1600), "JPEG")).pixels
    assert pixels.size == (1264, 1264)
    found: Any = pixels.getpixel((900, 300))
    assert max(abs(a - b) for a, b in zip(found, GREEN, strict=True)) < 6


def test_a_scaled_jpeg_stays_sharp() -> None:
    image = Image.new("L", (8000, 8000))
    image.paste(255, (4004, 0, 8000, 8000))  # no eighth of a size can have its edge there
    pixels = loaded(encoded(image, "JPEG")).pixels
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
def test_an_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = grid(16).resize((32, 64))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = loaded(encoded(image, kind, exif=exif, **options)).pixels
    width, height = pixels.size
    assert pixels.size == ((64, 32) if orientation >= 5 else (32, 64))
    corners: list[Any] = [pixels.getpixel((x, y)) for y in (4, height - 5) for x in (4, width - 5)]
    for found, wanted in zip(corners, UPRIGHT[orientation], strict=True):
        assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 12


def test_an_exif_orientation_is_applied_to_scaled_images_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (4000, 2000), RED), "JPEG", exif=exif)
    width, height = loaded(data).pixels.size
    assert height > 1.9 * width


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixel(encoded(grid(), "PNG", exif=exif)) == RED


def test_broken_exif_is_ignored() -> None:
    data = encoded(grid(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert pixel(data) == RED


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), (0, 0, 0, 0) if mode == "RGBA" else (0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255) if mode == "RGBA" else (0, 255))
    assert pixel(encoded(image)) == WHITE
    assert pixel(encoded(image), 1) == (0, 0, 0)


def test_half_transparent_pixels_are_half_white() -> None:
    assert pixel(encoded(Image.new("RGBA", (1, 1), (255, 0, 0, 128)))) == (255, 127, 127)


def test_transparent_pixels_stay_white_when_scaled() -> None:
    image = Image.new("RGBA", (2000, 2000), (255, 0, 0, 0))
    assert loaded(encoded(image)).pixels.getcolors() == [(1264 * 1264, WHITE)]


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


def test_a_palette_image_has_its_colours() -> None:
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
    head = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    assert pixel(head + png_chunk(b"IDAT", row) + png_chunk(b"IEND", b"")) == (255, 128, 0)


def test_cmyk_is_converted_to_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert Image.open(BytesIO(data)).mode == "CMYK"
    found: Any = pixel(data)
    assert max(abs(a - b) for a, b in zip(found, RED, strict=True)) < 6


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
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
def test_broken_bytes_are_an_image_or_an_image_error(
    data: bytes, changes: list[tuple[int, int]], end: int
) -> None:
    broken = bytearray(data[: end or None])
    for at, value in changes:
        broken[at % len(broken)] = value
    limits = replace(LIMITS, max_source_pixels=100_000)
    with suppress(ImageError):
        (found,) = load([source(bytes(broken))], limits)
        assert found.pixels.mode == "RGB"
        (other,) = load([source(bytes(broken))], limits, IN_THREAD)
        assert found.pixels.tobytes() == other.pixels.tobytes()


def test_a_decoder_without_memory_is_an_image_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(ImageError, match="cannot be decoded"):
        load([source(PNG)], LIMITS, IN_THREAD)


def test_without_pillow_the_error_names_the_missing_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'mlxlite[vision]'" in refusal(PNG)
    assert load([], LIMITS) == ()


# --- limits and digests -------------------------------------------------------------------------


def test_images_are_in_the_order_of_their_sources() -> None:
    colours = [RED, GREEN, BLUE]
    sources = [source(encoded(Image.new("RGB", (1, 1), colour))) for colour in colours]
    assert [one.pixels.getpixel((0, 0)) for one in load(sources, LIMITS)] == colours


def test_the_first_image_over_the_limit_is_named_before_any_is_decoded() -> None:
    sources = [replace(source(b"broken"), param=f"p{i}") for i in range(4)]
    with pytest.raises(ImageError, match="at most 2 pictures") as caught:
        load(sources, replace(LIMITS, max_images=2))
    assert caught.value.param == "p2"
    assert len(load([source(PNG)] * 16, LIMITS)) == 16
    with pytest.raises(ImageError):
        load([source(PNG)] * 17, LIMITS)


def test_the_bytes_of_an_image_are_bounded() -> None:
    assert loaded(PNG, limits=replace(LIMITS, max_bytes=len(PNG))).pixels.size == (16, 16)
    assert "is larger than" in refusal(PNG, replace(LIMITS, max_bytes=len(PNG) - 1))
    assert refusal(bytes((20 << 20) + 1)) == "is larger than 20 MiB"


def test_a_digest_depends_on_the_bytes_and_on_the_scaling() -> None:
    other = encoded(grid(), "BMP")
    seen = {
        loaded(PNG).digest,
        loaded(other).digest,
        loaded(PNG, "low").digest,
        loaded(PNG, limits=replace(LIMITS, max_pixels=100)).digest,
    }
    assert len(seen) == 4
    assert all(len(digest) == hashlib.sha256().digest_size for digest in seen)
    assert loaded(PNG).digest == loaded(PNG, "high").digest  # the same pixels
    assert loaded(PNG).digest == loaded(PNG, limits=replace(LIMITS, max_images=1)).digest


def test_the_repr_of_a_source_omits_its_bytes() -> None:
    assert "PNG" not in repr(source(PNG))
