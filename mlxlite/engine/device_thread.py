"""The lane: one thread that runs every line that touches MLX.

MLX's streams belong to a thread, so what is built here must be evaluated and dropped here. The lane
does one thing at a time, in order; results and exceptions go back to the event loop. How much of it
a step may take is measured here too.
"""

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from mlxlite.errors import bearable

T = TypeVar("T")


class Lane:
    """One thread that does one thing at a time: the home of every MLX object.

    MLX's streams belong to a thread, so what is built here must be evaluated and dropped here. The
    thread is a daemon: a device that never answers cannot keep the process from exiting.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlxlite-lane", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # or the last call's arguments live until the next one

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)` on the lane; its result or exception comes back to the loop."""
        return await self.submit(function, *args)

    def submit(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """The same, without waiting: the lane begins at once, or after what it is at."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            deliver: Callable[[], None]
            try:
                result = function(*args)
            except BaseException as error:  # carried to the awaiting task, whatever it is
                # Its frames hold the arrays of what failed, which must be dropped here, and now.
                traceback.clear_frames(error.__traceback__)
                deliver = _Failure(future, bearable(error))
            else:
                deliver = _Success(future, result)
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(deliver)

        self._calls.put(call)
        return future

    async def close(self, timeout_s: float) -> bool:
        """Let the thread end after its present call; False if it did not within the time."""
        self._calls.put(None)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._thread.join, timeout_s)
        return not self._thread.is_alive()


@dataclass(slots=True)
class _Success:
    future: asyncio.Future[Any] = field(repr=False)  # which shows its result
    result: Any = field(repr=False)  # arrays, prompts: nothing for asyncio's debug log

    def __call__(self) -> None:
        if not self.future.done():
            self.future.set_result(self.result)


@dataclass(slots=True)
class _Failure:
    future: asyncio.Future[Any]
    error: BaseException

    def __call__(self) -> None:
        if not self.future.done():
            self.future.set_exception(self.error)
