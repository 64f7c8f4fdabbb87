"""Decoding in children: bombs of each format, time, clients that leave, crashes, idle children."""

import errno
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bombs
import pytest
from PIL import Image

from mlxlite import wanted
from mlxlite.vision import decoder as decoder_module
from mlxlite.vision import pixels
from mlxlite.vision.decoder import Decoder, _Child
from mlxlite.vision.pixels import Bounds, Refused

BOUNDS = Bounds(1_600_000, 0, 64_000_000, 200)
MIB = 1 << 20
PNG = bombs.saved(Image.new("RGB", (3, 2), "red"), "PNG")
ENDLESS = bombs.jpeg_with(b"\xff" * (20 * MIB))  # read byte by byte, in Python


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()
    assert not made._idle


def pids(decoder: Decoder) -> list[int]:
    return [child._process.pid for child in decoder._idle]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- bombs ------------------------------------------------------------------------------------

NOT_ONE = "is no picture in PNG, JPEG, WebP, GIF or BMP"
TOO_MANY = "has more than 64000000 pixels"
SCANS = "has 910 scans of its pixels, more than any picture needs"
GIF = bombs.gif(8, 8)
BOMBS: dict[str, Callable[[], bytes]] = {
    "GIF, a comment of 8 MiB": lambda: bombs.gif(8, 8, bombs.gif_comments(8 * MIB)),
    "GIF, 400,000 comments": lambda: bombs.gif(8, 8, b"!\xfe\1x\0" * 400_000),
    "GIF, 400,000 extensions": lambda: bombs.gif(8, 8, b"!\xf9\4\0\0\0\0\0" * 400_000),
    "GIF, 100,000 frames": lambda: GIF[:-1] + GIF[GIF.index(b",") : -1] * 100_000 + b";",
    "GIF, a code that repeats": lambda: bombs.gif(8000, 8000, lzw=(b"\xff" + bytes(255)) * 30_000),
    "GIF, a table that is cleared": lambda: bombs.gif(
        8000, 8000, lzw=(b"\xff" + b"\0\1" * 127 + b"\0") * 30_000
    ),
    "GIF, a huge canvas": lambda: bombs.gif(65535, 65535),
    "PNG, 1 GB of zTXt": lambda: png(b"zTXt", b"a\0\0" + bombs.squeezed(1 << 30)),
    "PNG, 1 GB of iTXt": lambda: png(b"iTXt", b"a\0\1\0\0\0" + bombs.squeezed(1 << 30)),
    "PNG, 1 GB of iCCP": lambda: png(b"iCCP", b"a\0\0" + bombs.squeezed(1 << 30)),
    "PNG, 200 MB in 200 texts": lambda: bombs.png(
        8, 8, *[bombs.png_chunk(b"zTXt", b"a\0\0" + bombs.squeezed(MIB))] * 200
    ),
    "PNG, 1 GB of rows": lambda: bombs.png(8, 8, rows=bombs.squeezed(1 << 30)),
    "PNG, 300,000 chunks": lambda: bombs.png(8, 8, bombs.png_chunk(b"tEXt", b"a\0b") * 300_000),
    "PNG, an EXIF directory in a circle": lambda: png(b"eXIf", bombs.exif_of(65535)),
    "JPEG, 500,000 markers": lambda: bombs.jpeg_with(b"\xff\xe5\0\2" * 500_000),
    "JPEG, 500,000 comments": lambda: bombs.jpeg_with(b"\xff\xfe\0\3a" * 500_000),
    "JPEG, 200,000 times EXIF": lambda: bombs.jpeg_with(b"\xff\xe1\0\x08Exif\0\0" * 200_000),
    "JPEG, an EXIF directory in a circle": lambda: bombs.jpeg_with(
        b"\xff\xe1\xff\xff" + (b"Exif\0\0" + bombs.exif_of(5400)).ljust(65533, b"\0")
    ),
    "JPEG, scans that repeat": lambda: bombs.progressive((2000, 2000), 900),
    "WebP, 400,000 frames": lambda: bombs.webp(8, 8, 400_000),
    "WebP, a huge canvas": lambda: bombs.webp(16383, 16383, 1),
    "WebP, the largest canvas": lambda: bombs.webp(8000, 8000, 1000),
    "BMP, a huge canvas": lambda: bombs.bmp(2**31 - 1, 2**31 - 1, 0, b""),
    "BMP, runs of one pixel": lambda: bombs.bmp(8000, 8000, 1, b"\1\1" * MIB),
    "BMP, lines without pixels": lambda: bombs.bmp(8000, 8000, 1, b"\0\0" * MIB),
    "BMP, steps": lambda: bombs.bmp(8000, 8000, 1, b"\0\2\1\0" * MIB),
    "BMP, a header of 4 GB": lambda: (
        b"BM" + bytes(8) + struct.pack("<II", 100, 0xFFFFFFF0) + bytes(100)
    ),
}


def outcome(decoder: Decoder, data: bytes) -> str:
    try:
        image = decoder.decode(data, BOUNDS, 20.0)
    except Refused as refused:
        return str(refused)
    return "decoded" if image.width * image.height <= BOUNDS.max_pixels else "too large"


def png(kind: bytes, data: bytes) -> bytes:
    return bombs.png(8, 8, bombs.png_chunk(kind, data))


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_a_child_bounded_time_and_memory_and_this_process_none(
    decoder: Decoder, name: str
) -> None:
    data = BOMBS[name]()
    before = peak_bytes(os.getpid())
    began_at = time.monotonic()
    assert outcome(decoder, data) in ("decoded", pixels.BROKEN, NOT_ONE, TOO_MANY, SCANS)
    assert time.monotonic() - began_at < 15
    if sys.platform == "linux":
        (pid,) = pids(decoder)
        assert peak_bytes(pid) < pixels.MAX_MEMORY
        assert peak_bytes(os.getpid()) - before < 100 * MIB
    assert decoder.decode(PNG, BOUNDS, 20.0).size == (3, 2), "and the next one is decoded"


def peak_bytes(pid: int) -> int:
    if sys.platform != "linux":
        return 0
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="macOS bounds no address space")
def test_an_image_that_exceeds_the_childs_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "pixels.py"
    text = Path(pixels.__file__).read_text()
    program.write_text(text.replace("MAX_MEMORY = 3 << 29", "MAX_MEMORY = 200 << 20"))
    command = [str(program) if part == pixels.__file__ else part for part in child_command()]
    small = Decoder(command)
    for colour, bits in ((6, 16), (6, 8), (2, 16)):
        with pytest.raises(Refused, match="cannot be decoded"):
            small.decode(bombs.png(8000, 8000, bits=bits, colour=colour), BOUNDS, 20.0)
    assert small.decode(PNG, BOUNDS, 20.0).size == (3, 2)
    small.close()


def child_command() -> tuple[str, ...]:
    return decoder_module.child_command()


# --- time and clients that leave --------------------------------------------------------------


@pytest.mark.parametrize("call", ["decode", "measure"])
@pytest.mark.parametrize("num_idle", [0, 1])
def test_an_image_that_exceeds_its_time_ends_its_child(
    decoder: Decoder, call: str, num_idle: int
) -> None:
    if num_idle:
        decoder.decode(PNG, BOUNDS, 20.0)
    idle = pids(decoder)
    began_at = time.monotonic()
    with pytest.raises(TimeoutError):
        getattr(decoder, call)(ENDLESS, BOUNDS, 0.3)
    assert time.monotonic() - began_at < 2
    assert not decoder._idle
    assert not any(map(is_alive, idle))
    assert decoder.decode(PNG, BOUNDS, 20.0).size == (3, 2)


STUBS = {  # programs that stop at some place of the protocol
    "at the start": "time.sleep(60)",
    "before it reads": "put(READY); time.sleep(60)",
    "before it answers": "put(READY); read(48 + len_data); time.sleep(60)",
    "in its answer": "put(READY); read(48 + len_data); put(HEAD[:5]); time.sleep(60)",
    "in the pixels": "put(READY); read(48 + len_data); put(HEAD + bytes(5)); time.sleep(60)",
}
DATA = bytes(MIB)


def stub(body: str) -> tuple[str, ...]:
    head = pixels.ANSWER.pack(True, 3, 2, 18)
    lines = (
        "import os, time",
        "def put(data): os.write(1, data)",
        "def read(num):",
        "    while num: num -= len(os.read(0, num))",
        f"READY, HEAD, len_data = {pixels.READY!r}, {head!r}, {len(DATA) - 7}",
        body,
    )
    return sys.executable, "-I", "-S", "-c", "\n".join(lines)


@pytest.mark.parametrize("place", STUBS)
def test_a_child_ends_once_its_client_has_left(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []
    init = _Child.__init__

    def spy(child: _Child, command: Any) -> None:
        init(child, command)
        children.append(child._process.pid)

    monkeypatch.setattr(_Child, "__init__", spy)
    decoder, left = Decoder(stub(STUBS[place])), threading.Event()
    threading.Timer(0.4, left.set).start()
    began_at = time.monotonic()
    with pytest.raises(wanted.Dropped):
        wanted.call_while(lambda: not left.is_set(), lambda: decoder.decode(DATA, BOUNDS, 20.0))
    assert 0.4 <= time.monotonic() - began_at < 0.9
    assert len(children) == 1
    assert not is_alive(children[0])
    assert not decoder._idle


def test_a_third_image_waits_for_a_place_and_leaves_when_its_client_does() -> None:
    decoder, left = Decoder(stub(STUBS["before it answers"])), threading.Event()
    results: list[type[BaseException]] = []

    def ask() -> None:
        try:
            wanted.call_while(lambda: not left.is_set(), lambda: decoder.decode(DATA, BOUNDS, 20.0))
        except BaseException as error:
            results.append(type(error))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    until(lambda: decoder._places._value == 0)
    left.set()
    for thread in threads:
        thread.join(2)
    assert results == [wanted.Dropped] * 5


# --- children ---------------------------------------------------------------------------------


def test_a_child_is_kept_for_the_next_image_and_ends_when_it_is_idle() -> None:
    decoder = Decoder(idle_s=0.3)
    seen = set()
    for _ in range(3):
        decoder.decode(PNG, BOUNDS, 20.0)
        seen.update(pids(decoder))
    (pid,) = seen
    until(lambda: not decoder._idle)
    until(lambda: not is_alive(pid))
    decoder.decode(PNG, BOUNDS, 20.0)
    assert pids(decoder) != [pid]
    decoder.close()


def test_no_child_stays_once_it_is_closed(decoder: Decoder) -> None:
    decoder.decode(PNG, BOUNDS, 20.0)
    idle = pids(decoder)
    decoder.close()
    assert not any(map(is_alive, idle))
    decoder.decode(PNG, BOUNDS, 20.0)
    until(lambda: not decoder._idle)


def test_a_child_that_ended_while_it_was_idle_is_replaced(decoder: Decoder) -> None:
    for _ in range(2):
        decoder.decode(PNG, BOUNDS, 20.0)
        (pid,) = pids(decoder)
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert decoder.decode(PNG, BOUNDS, 20.0).size == (3, 2)


BAD = {
    "ends": "put(READY); read(48 + len_data)",
    "ends before it reads": "put(READY)",
    "sends other bytes": "put(READY); read(48 + len_data); put(b'x' * 100); time.sleep(60)",
    "sends too many pixels": (
        "import struct; put(READY); read(48 + len_data);"
        "put(struct.pack('>?IIQ', True, 60000, 60000, 3 * 60000**2)); time.sleep(60)"
    ),
    "sends too few": (
        "import struct; put(READY); read(48 + len_data);"
        "put(struct.pack('>?IIQ', True, 3, 2, 6) + bytes(6)); time.sleep(60)"
    ),
    "sends a long complaint": (
        "import struct; put(READY); read(48 + len_data);"
        "put(struct.pack('>?IIQ', False, 0, 0, 1 << 40)); time.sleep(60)"
    ),
    "crashes": "put(READY); read(48 + len_data); os.abort()",
}


@pytest.mark.parametrize("how", BAD)
def test_a_child_that_answers_otherwise_is_ended_and_its_image_refused(how: str) -> None:
    decoder = Decoder(stub(BAD[how]))
    with pytest.raises(Refused, match="cannot be decoded: it is broken"):
        decoder.decode(DATA, BOUNDS, 20.0)
    assert not decoder._idle


@pytest.mark.parametrize(
    "command",
    [(), ("/no/such/program",), (sys.executable, "-c", ""), (sys.executable, "-c", "print(1)")],
)
def test_where_no_child_starts_the_thread_decodes(
    command: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    decoder = Decoder(command)
    for _ in range(2):
        assert decoder.decode(PNG, BOUNDS, 20.0).tobytes() == b"\xff\0\0" * 6
        assert decoder.measure(PNG, BOUNDS, 20.0) == (3, 2)
        with pytest.raises(Refused):
            decoder.decode(b"x", BOUNDS, 20.0)
    assert len(caplog.messages) == (1 if command else 0)


@pytest.mark.parametrize("name", ["", None, "/Applications/Notes", "/opt/app/server"])
def test_a_program_that_is_no_python_is_never_started(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", name)
    assert child_command() == ()


def test_once_children_have_started_a_failed_start_decodes_nothing_here(decoder: Decoder) -> None:
    decoder.decode(PNG, BOUNDS, 20.0)
    decoder.close()
    decoder._command = ("/no/such/program",)
    with pytest.raises(Refused, match="now"):
        decoder.decode(PNG, BOUNDS, 20.0)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_system_that_is_busy_turns_no_decoding_into_this_process(
    decoder: Decoder, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: Any, **__: Any) -> Any:
        raise OSError(number, "busy")

    with monkeypatch.context() as only:
        only.setattr(decoder_module.subprocess, "Popen", busy)
        with pytest.raises(Refused, match="now"):
            decoder.decode(PNG, BOUNDS, 20.0)
    decoder.decode(PNG, BOUNDS, 20.0)
    assert len(pids(decoder)) == 1


def test_two_threads_share_children_at_any_rate(decoder: Decoder) -> None:
    decoder._idle_s = 0.002  # so that children expire while they are taken
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            for _ in range(60):
                assert decoder.measure(PNG, BOUNDS, 20.0) == (3, 2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_child_has_no_environment_no_core_no_files_and_no_terminal(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLXLITE_API_KEY", "secret")
    decoder.decode(PNG, BOUNDS, 20.0)
    (pid,) = pids(decoder)
    assert os.getsid(pid) == pid
    if sys.platform == "linux":
        assert "secret" not in Path(f"/proc/{pid}/environ").read_text()
        limits = Path(f"/proc/{pid}/limits").read_text()
        for name in ("Max core file size", "Max file size"):
            (line,) = [one for one in limits.splitlines() if one.startswith(name)]
            assert line.removeprefix(name).split()[:2] == ["0", "0"]
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 5


def test_a_child_ends_with_its_parent() -> None:
    child = _Child(child_command())
    child.read(len(pixels.READY), time.monotonic() + 20)
    child._pipes[0].close()
    assert child._process.wait(20) == 0
    child._pipes[1].close()
