"""What the program does with lines that a standard stream does not take."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mlxlite import __main__ as program
from mlxlite.__main__ import _StandardStream

TIMEOUT_S = 10.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its reading and its writing end; it holds one page."""
    reading, writing = os.pipe()
    yield reading, writing
    for fd in (reading, writing):
        with suppress(OSError):
            os.close(fd)


def read_until(fd: int, text: bytes) -> bytes:
    found = b""
    while text not in found:
        found += os.read(fd, 65536)
    return found


def test_lines_keep_their_order_and_their_text(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    stream = _StandardStream(writing)
    stream.write("before the loop runs\n")
    assert os.read(reading, 100) == b"before the loop runs\n", "written at once"
    stream.start()
    for number in range(100):
        print(f"line {number} \u2603 \ud800", file=stream)  # type: ignore[call-overload]
    expected = "".join(f"line {number} \u2603 \\ud800\n" for number in range(100))
    assert read_until(reading, b"line 99 \xe2\x98\x83 \\ud800\n") == expected.encode()


def test_a_full_stream_drops_lines_counts_them_and_reports_their_number(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_MAX_WAITING", 1 << 12)
    reading, writing = pipe
    stream = _StandardStream(writing)
    counted: list[int] = []
    stream.on_dropped = counted.append
    stream.start()
    for _ in range(2000):
        stream.write("x" * 99 + "\n")  # 200 KB; a pipe holds 64
    num_dropped = counted[-1]
    assert counted == list(range(1, num_dropped + 1))
    stream.drain(0.01)  # ends though the pipe is full
    found = read_until(reading, b" lines were dropped here\n")
    assert found.endswith(b"x\nmlxlite: %d lines were dropped here\n" % num_dropped)
    assert found.count(b"\n") == 2000 - num_dropped + 1
    stream.write("again\n")
    assert read_until(reading, b"again\n") == b"again\n"


@pytest.mark.parametrize("fault", ["gone", "closed", "full"])
@pytest.mark.parametrize("is_started", [False, True])
def test_a_stream_that_is_lost_raises_nothing(
    fault: str, is_started: bool, pipe: tuple[int, int]
) -> None:
    reading, writing = pipe
    if fault == "full":
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full")
        writing = os.open("/dev/full", os.O_WRONLY)
    else:
        os.close(reading if fault == "gone" else writing)
    stream = _StandardStream(writing)
    dropped = threading.Event()
    stream.on_dropped = lambda _: dropped.set()
    if is_started:
        stream.start()
    assert stream.write("line\n") == 5
    stream.flush()
    if is_started:
        assert dropped.wait(TIMEOUT_S)
        stream.drain(TIMEOUT_S)
    if fault == "full":
        os.close(writing)


def test_a_pipe_that_does_not_block_loses_nothing(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    os.set_blocking(writing, False)
    stream = _StandardStream(writing)
    stream.start()
    for _ in range(5000):
        stream.write("x" * 99 + "\n")
    stream.write("end\n")
    assert len(read_until(reading, b"end\n")) == 500_004
