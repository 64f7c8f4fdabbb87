"""Faults of code that is not ours: what they may cost, and what may be said of them.

A model's network, a tokenizer, a chat template and a grammar raise what they like, and a template
need not even end. Decides how such a fault is told, and ends a call that takes too long. It must
never let a prompt's text into a log, nor a path into an answer: an error's message may hold either.
"""

import ctypes
import re
import threading
import traceback
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# What is raised by code that meets what it was not written for. Not AssertionError: that is ours.
FOREIGN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
_MAX_TOLD = 200  # characters
_PATH = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\":,;()]+/)+[^\s'\":,;()]*")


class TookTooLong(Exception):
    """A call was stopped because its time was over."""


def told(error: BaseException) -> str:
    """One line for a client: what it was, never where."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return _PATH.sub("…", line)[:_MAX_TOLD]


def trace_of(error: BaseException) -> str:
    """For a log: what kind of error it was and where it came from, without what it says."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None and len(lines) < 100:
        lines.append(type(at).__name__)
        frames = traceback.extract_tb(at.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        at = at.__cause__
    return "\n".join(lines)


def bearable(error: BaseException) -> Exception:
    """An error that a future takes and a loop outlives: StopIteration and a Rust panic are not."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


class _Stop(BaseException):
    """Raised in a thread from outside. Not an Exception, which the code there might swallow."""


class _Bounded:
    """One call in one thread, which may be stopped once, while it lasts and not after."""

    def __init__(self) -> None:
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._lock = threading.Lock()
        self._is_over = False
        self._is_stopped = False

    def stop(self) -> None:
        with self._lock:
            if not self._is_over:
                self._is_stopped = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(_Stop))

    def end(self) -> None:
        with self._lock:
            self._is_over = True
            if self._is_stopped:  # and perhaps not raised yet: take it back
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """What `call()` gives. Raises TookTooLong, with the thread free again, if it takes longer.

    It is stopped between two operations of Python's. One that takes long by itself, such as a power
    of huge integers, ends first, and holds the whole process until then.
    """
    bounded = _Bounded()
    timer = threading.Timer(timeout_s, bounded.stop)
    timer.daemon = True
    try:
        try:
            timer.start()
            return call()
        finally:
            timer.cancel()
            bounded.end()
    except _Stop:
        raise TookTooLong(f"stopped after {timeout_s:g} s") from None
