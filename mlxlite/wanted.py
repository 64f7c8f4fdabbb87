"""Whether the work of this thread is still wanted: its client may have disconnected meanwhile.

`api/threads.py` gives each call the question to ask. Code below it that takes long asks between two
pieces of its work, or waits by `wait_for`; `Dropped` then ends the call. Work outside of such a
call is always wanted. The question only reads a flag, so any thread may ask it, at any rate.
"""

from collections.abc import Callable
from contextvars import ContextVar
from time import monotonic
from typing import Final, TypeVar

T = TypeVar("T")
POLL_S = 0.05  # between two questions: how late a wait notices that it is not wanted


class Dropped(Exception):
    """The client has disconnected; there is nothing to answer."""


_QUESTION: Final[ContextVar[Callable[[], bool]]] = ContextVar("is_wanted", default=lambda: True)


def call_while(is_wanted: Callable[[], bool], call: Callable[[], T]) -> T:
    """The result of `call()`, which asks `is_wanted`."""
    token = _QUESTION.set(is_wanted)
    try:
        return call()
    finally:
        _QUESTION.reset(token)


def question() -> Callable[[], bool]:
    """What this thread's work asks, for another thread to ask."""
    return _QUESTION.get()


def check() -> None:
    """Raises Dropped."""
    if not _QUESTION.get()():
        raise Dropped


def wait_for(attempt: Callable[[float], T], timeout_s: float) -> T:
    """The first true result of `attempt(s)`, which waits at most `s` seconds.

    Raises TimeoutError, Dropped.
    """
    deadline = monotonic() + timeout_s
    while True:
        check()
        left_s = deadline - monotonic()
        if left_s <= 0:
            raise TimeoutError
        if result := attempt(min(POLL_S, left_s)):
            return result
