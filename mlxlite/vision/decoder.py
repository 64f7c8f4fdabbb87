"""Decoding in processes of its own, which can be ended: the parent's side of `pixels.py`.

Pillow cannot be stopped in a thread. A child decodes one image at a time, is kept for the next, and
ends after `idle_s` without one. It is killed when its image exceeds its time, or when the work is
no longer wanted; another start costs 0.05 s. It gets no environment, opens no files of a client's
choice, has bounded memory, and ends with its pipe, so that it never outlives the server. What it
sends is pixels of the announced size or a line of text; anything else ends it.

Where no child can be started (`sys.executable` is no Python, in an embedding program), the thread
decodes, within the bounds of `pixels.py` alone; the log says so once. Thread-safe.
"""

import errno
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

from mlxlite import wanted
from mlxlite.vision import pixels
from mlxlite.vision.pixels import Bounds, Refused, Size

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("mlxlite.vision")

MAX_CHILDREN = 2
IDLE_S = 10.0
START_S = 10.0  # until a child has imported Pillow
_MAX_COMPLAINT = 1000  # bytes
_BUSY: Final = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # of a start: not for ever
_KEPT: Final = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")


def child_command() -> tuple[str, ...]:
    """What starts a child; nothing where this program is no Python interpreter."""
    found = find_spec("PIL")
    is_python = "python" in Path(sys.executable or "").name.lower()
    if found is None or found.origin is None or not is_python or getattr(sys, "frozen", False):
        return ()
    folder = str(Path(found.origin).parents[1])
    return (sys.executable, "-I", "-S", "-B", pixels.__file__, folder)


class _Child:
    """A process that decodes one image at a time. All methods raise OSError once it has ended."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={name: os.environ[name] for name in _KEPT if name in os.environ},
            start_new_session=True,  # no signal of the terminal
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = self._process.stdin, self._process.stdout
        self._polls = select.poll(), select.poll()
        for pipe, poll in zip(self._pipes, self._polls, strict=True):
            os.set_blocking(pipe.fileno(), False)
            poll.register(pipe, select.POLLOUT if poll is self._polls[0] else select.POLLIN)
        self.timer: threading.Timer | None = None  # while it is idle

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in self._pipes:
            pipe.close()

    def write(self, data: bytes, deadline: float) -> None:
        """Raises TimeoutError, Dropped."""
        fd, left = self._pipes[0].fileno(), memoryview(data)
        while left:
            self._wait(self._polls[0], deadline)
            left = left[os.write(fd, left) :]

    def read(self, num_bytes: int, deadline: float) -> bytearray:
        """Raises TimeoutError, Dropped."""
        data = bytearray(num_bytes)
        fd, left = self._pipes[1].fileno(), memoryview(data)
        while left:
            self._wait(self._polls[1], deadline)
            if not (num_read := os.readv(fd, [left])):
                raise BrokenPipeError("the child has ended")
            left = left[num_read:]
        return data

    def _wait(self, poll: select.poll, deadline: float) -> None:
        wanted.wait_for(lambda s: poll.poll(s * 1000), deadline - monotonic())


class Decoder:
    """Children on demand, `MAX_CHILDREN` at most."""

    def __init__(self, command: Sequence[str] | None = None, idle_s: float = IDLE_S) -> None:
        self._command = child_command() if command is None else command
        self._idle_s = idle_s
        self._places = threading.BoundedSemaphore(MAX_CHILDREN)
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._has_started = False  # a child, ever

    def measure(self, data: bytes, bounds: Bounds, timeout_s: float) -> Size:
        """The size that `decode` gives it. Raises pixels.Refused, TimeoutError, Dropped."""
        found = self._run(data, bounds, timeout_s, decodes=False)
        return pixels.measure(data, bounds) if found is None else found[0]

    def decode(self, data: bytes, bounds: Bounds, timeout_s: float) -> "Image":
        """Mode RGB. Raises pixels.Refused, TimeoutError, Dropped."""
        from PIL import Image

        found = self._run(data, bounds, timeout_s, decodes=True)
        if found is None:
            return pixels.decode(data, bounds)
        return Image.frombytes("RGB", *found)

    def close(self) -> None:
        """End the children that are idle, and from now on each one after its image."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._idle_s = 0.0
        for child in idle:
            self._stop_timer(child)
            child.end()

    def _run(
        self, data: bytes, bounds: Bounds, timeout_s: float, *, decodes: bool
    ) -> tuple[Size, bytearray] | None:
        """A child's answer; None where no child can be started."""
        wanted.wait_for(lambda s: self._places.acquire(timeout=s), timeout_s)
        try:
            child = self._take()
            if child is None:
                return None
            try:
                deadline = monotonic() + timeout_s
                child.write(pixels.JOB.pack(decodes, len(data), *bounds), deadline)
                child.write(data, deadline)
                found = _answer(child, bounds, deadline, decodes=decodes)
            except BaseException as error:
                child.end()
                if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                    raise Refused(pixels.BROKEN) from None  # it crashed, or exceeded its memory
                raise
            self._keep(child)
        finally:
            self._places.release()
        if isinstance(found, str):
            raise Refused(found)
        return found

    def _take(self) -> _Child | None:
        """An idle child or a new one. Raises Refused for a start that fails after others."""
        with self._lock:
            child = self._idle.pop() if self._idle else None
        if child is not None:
            self._stop_timer(child)
            if not child.has_ended:
                return child
            child.end()
        return self._start() if self._command else None

    def _start(self) -> _Child | None:
        is_busy = self._has_started
        with ExitStack() as stack:
            try:
                child = _Child(self._command)
                stack.callback(child.end)
                if child.read(len(pixels.READY), monotonic() + START_S) == pixels.READY:
                    stack.pop_all()
                    self._has_started = True
                    return child
            except OSError as error:  # with TimeoutError
                is_busy = is_busy or error.errno in _BUSY
        if is_busy:
            raise Refused("cannot be decoded now: the system starts no process for it")
        log.warning("pictures are decoded in this process: %s starts no other", sys.executable)
        self._command = ()
        return None

    def _keep(self, child: _Child) -> None:
        child.timer = threading.Timer(self._idle_s, self._expire, (child,))
        child.timer.daemon = True
        with self._lock:  # before it has started, no other thread may take the child
            self._idle.append(child)
            child.timer.start()

    def _expire(self, child: _Child) -> None:
        with self._lock:
            if child not in self._idle:
                return
            self._idle.remove(child)
        child.end()

    @staticmethod
    def _stop_timer(child: _Child) -> None:
        if child.timer is not None:
            child.timer.cancel()
            child.timer = None


def _answer(
    child: _Child, bounds: Bounds, deadline: float, *, decodes: bool
) -> tuple[Size, bytearray] | str:
    """A size and its pixels, or what is wrong. Raises OSError for what is no answer."""
    is_image, width, height, num_bytes = pixels.ANSWER.unpack(
        child.read(pixels.ANSWER.size, deadline)
    )
    expected = 3 * width * height if decodes else 0
    most = max(bounds.max_pixels, bounds.max_aspect)  # the latter where a side is one pixel
    is_valid = num_bytes == expected and 0 < width * height <= most
    if not is_image and num_bytes <= _MAX_COMPLAINT:
        return child.read(num_bytes, deadline).decode(errors="replace")
    if not is_image or not is_valid:
        raise BrokenPipeError("the child's answer is none")
    return (width, height), child.read(num_bytes, deadline)
