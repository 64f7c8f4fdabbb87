"""Stop a Python function that runs too long or is no longer wanted, in the thread that called it.

A second thread raises an exception in the calling thread from outside. It must never raise one
there after the call has returned.
"""

import ctypes
import threading
from collections.abc import Callable
from time import monotonic
from typing import TypeVar

from mlxlite import wanted

T = TypeVar("T")


class TookTooLong(Exception):
    """The call was stopped because it exceeded its time limit."""


class _Stop(BaseException):
    """Raised in a thread from outside. Not an Exception, which the code there might catch."""


class _Bounded:
    """One call in one thread, which can be stopped only while it runs."""

    def __init__(self) -> None:
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._is_wanted = wanted.question()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._is_stopped = False

    def watch(self, timeout_s: float) -> None:
        """Stop the call after `timeout_s`, or once it is not wanted.

        Again and again until it is over: a finalizer of the interpreter's may swallow an exception.
        """
        deadline, wait_s = monotonic() + timeout_s, min(wanted.POLL_S, timeout_s)
        while not self._over.wait(wait_s):
            left_s = deadline - monotonic()
            if left_s <= 0 or not self._is_wanted():
                self.stop()
            wait_s = min(wanted.POLL_S, left_s) if left_s > 0 else wanted.POLL_S

    def stop(self) -> None:
        with self._lock:
            if not self._over.is_set():
                self._is_stopped = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, ctypes.py_object(_Stop))

    def end(self) -> None:
        with self._lock:
            self._over.set()
            if self._is_stopped:  # and perhaps not raised yet: take it back
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, None)


def run_with_timeout(timeout_s: float, call: Callable[[], T]) -> T:
    """The result of `call()`, with the thread free again after `timeout_s` or when it is dropped.

    The call is stopped between two bytecode instructions. One long operation in C, such as a power
    of huge integers, ends first, and holds the GIL until then. Raises TookTooLong, Dropped.
    """
    bounded = _Bounded()
    watch = threading.Thread(target=bounded.watch, args=(timeout_s,), daemon=True)
    try:
        try:
            watch.start()
            return call()
        finally:
            bounded.end()
    except _Stop:
        bounded.end()  # which the exception may have reached before it was done
        wanted.check()
        raise TookTooLong(f"stopped after {timeout_s:g} s") from None
