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

from mlxlite.faults import bearable
from mlxlite.sequence import Step

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


class ChunkTuner:
    """Sizes the prefill of a step that also decodes, from what steps have taken.

    A step takes what its rows take, a pass for each chunk (or for all first ones, which are
    packed), and a time per token. The first is a moving average of steps that only decode, the
    second the least of these, the third is fitted; and so it says how many tokens fit in
    `budget_s`. Without the passes a small chunk would look dear and the next one be smaller still.

    A step that was slower than the average counts at once: tokens cost more as the context grows,
    and the next one more still. Says nothing while the answer would grow by less than an eighth, or
    shrink by less than a sixteenth, so that the command log stays short.
    """

    _WEIGHT = 0.3  # of the newest measurement: settles in about five steps
    _LEAST_WEIGHT = 0.01  # of one that is more than the least
    _MIN_CHUNK = 16  # below this the fixed cost of a chunk outweighs its tokens

    def __init__(self, budget_s: float) -> None:
        self._budget_s = budget_s
        self._decode_s = 0.0
        self._pass_s = 0.0
        self._token_s = 0.0
        self._said = 0

    def measure(self, step: Step, device_s: float) -> int | None:
        """Take one step's time; a new chunk budget in tokens, or None for no change."""
        if device_s <= 0.0 or step.looks:  # a picture's time says nothing about tokens
            return None
        if not step.num_prefill_tokens:
            if step.rows:
                self._decode_s = self._average(self._decode_s, device_s)
                self._pass_s = self._average(self._pass_s, device_s, self._LEAST_WEIGHT)
            return None
        prefill_s = device_s - (self._decode_s if step.rows else 0.0)
        num_later = sum(chunk.start > 0 for chunk in step.chunks)
        num_passes = num_later + (num_later < len(step.chunks))
        token_s = max(prefill_s - num_passes * self._pass_s, device_s / 10)
        token_s /= step.num_prefill_tokens
        self._token_s = max(token_s, self._average(self._token_s, token_s))
        budget_s = max(self._budget_s - self._pass_s, self._budget_s / 2)
        num_tokens = max(self._MIN_CHUNK, int(budget_s / self._token_s))
        if self._said * 15 < num_tokens * 16 and num_tokens * 8 < self._said * 9:
            return None
        self._said = num_tokens
        return num_tokens

    def _average(self, old: float, new: float, more_weight: float = _WEIGHT) -> float:
        weight = more_weight if new > old else self._WEIGHT
        return new if old == 0.0 else old + weight * (new - old)
