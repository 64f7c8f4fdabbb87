"""Stop a Python function that runs too long, in the thread that called it.

A timer raises an exception in the calling thread from outside. It must never raise one there after
the call has returned.
"""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TookTooLong(Exception):
    """The call was stopped because it exceeded its time limit."""


class _Stop(BaseException):
    """Raised in a thread from outside. Not an Exception, which the code there might catch."""


class _Bounded:
    """One call in one thread, which can be stopped only while it runs."""

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


def run_with_timeout(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call()`. Raises TookTooLong, with the thread free again, after `timeout_s`.

    The call is stopped between two bytecode instructions. One long operation in C, such as a power
    of huge integers, ends first, and holds the GIL until then.
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
