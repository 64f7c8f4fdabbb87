"""Work that needs no event loop: parsing, rendering and compiling, in threads by its size.

Small work never waits for large work, and inside a size API keys take turns, whatever the number
of their requests. Work of a client that has disconnected is dropped before it runs. All methods
belong to the event loop. A call that runs cannot be stopped from here: it must bound itself, and
ask `wanted` whether its client is still there.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from functools import partial
from typing import Any, TypeVar

from mlxlite import wanted
from mlxlite.errors import as_exception

T = TypeVar("T")


class Work(Enum):
    """A size of work, and its number of threads."""

    SHORT = ("short", 1)  # bodies of up to `SHORT_BYTES`, in the order of arrival
    LONG = ("long", 1)
    HUGE = ("huge", 1)
    GRAMMAR = ("grammar", 2)  # that has to be compiled
    IMAGES = ("images", 2)  # to be fetched and decoded

    @classmethod
    def of(cls, num_bytes: int) -> "Work":
        """The work of parsing and rendering a body."""
        if num_bytes <= SHORT_BYTES:
            return cls.SHORT
        return cls.LONG if num_bytes <= LONG_BYTES else cls.HUGE


SHORT_BYTES = 32 << 10
LONG_BYTES = 1 << 20


class Lane:
    """Threads for one size of work, in turns by key."""

    def __init__(self, work: Work) -> None:
        name, self._num_free = work.value
        self._executor = ThreadPoolExecutor(self._num_free, f"mlxlite-{name}")
        self._waiting: dict[bytes, deque[asyncio.Future[None]]] = {}  # the next key first

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def run(
        self, key: bytes, is_wanted: Callable[[], bool], work: Callable[..., T], *args: Any
    ) -> T:
        """Call `work` in a thread once it is the key's turn, for as long as `is_wanted`.

        A thread asks `is_wanted` too. Raises Dropped, and the errors of `work`.
        """
        await self._turn(key)
        try:
            if not is_wanted():
                raise wanted.Dropped
            call = partial(wanted.call_while, is_wanted, partial(_call, work, *args))
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        finally:
            self._next()

    async def _turn(self, key: bytes) -> None:
        if self._num_free:
            self._num_free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        await turn

    def _next(self) -> None:
        while self._waiting:
            key = next(iter(self._waiting))
            line = self._waiting.pop(key)
            turn = line.popleft()
            if line:
                self._waiting[key] = line
            if not turn.done():  # or its task was cancelled
                turn.set_result(None)
                return
        self._num_free += 1


def _call(work: Callable[..., T], *args: Any) -> T:
    """Call `work`; an exception that a future cannot carry is wrapped.

    No local refers to an exception, or the body in its traceback would stay until a collection.
    """
    try:
        return work(*args)
    except BaseException as error:
        if as_exception(error) is error:
            raise
        raise as_exception(error) from error
