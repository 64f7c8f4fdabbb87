"""The device thread: the one thread that runs every line that touches MLX.

MLX's streams belong to a thread, so arrays that are built here must be evaluated and dropped here.
Calls run one at a time, in order; results and exceptions are delivered on the event loop. The
thread must never keep an array of a call that has returned.
"""

import asyncio
import contextlib
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from mlxlite.errors import as_exception

T = TypeVar("T")


class DeviceThread:
    """One thread that runs calls in order. A daemon: a device that hangs cannot block the exit."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mlxlite-device", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # or the last call's arguments stay alive until the next one

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Call `function(*args)` on the device thread; returns its result or raises its error."""
        return await self.submit(function, *args)

    def submit(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Queue `function(*args)` without waiting; the future is of the running loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def call() -> None:
            try:
                deliver = _Delivery(future, function(*args))
            except BaseException as error:  # of any kind: the awaiting task gets it
                # Its frames hold arrays of the failed call, which must be dropped on this thread.
                traceback.clear_frames(error.__traceback__)
                deliver = _Delivery(future, error=as_exception(error))
            with contextlib.suppress(RuntimeError):  # the loop is closed: no task awaits it
                loop.call_soon_threadsafe(deliver)

        self._calls.put(call)
        return future

    async def close(self, timeout_s: float) -> bool:
        """End the thread after the queued calls; False if it is still alive after `timeout_s`."""
        self._calls.put(None)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self._thread.join, timeout_s)
        return not self._thread.is_alive()


@dataclass(slots=True)
class _Delivery:
    future: asyncio.Future[Any] = field(repr=False)  # its repr has the result
    result: Any = field(default=None, repr=False)  # arrays, prompts: not for asyncio's debug log
    error: BaseException | None = None

    def __call__(self) -> None:
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)
