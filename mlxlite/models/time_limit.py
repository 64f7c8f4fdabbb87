"""Run a function for a bounded time in the calling thread."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TookTooLong(Exception):
    """A call was stopped because its time was over."""


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
