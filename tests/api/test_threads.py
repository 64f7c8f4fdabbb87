"""Threads for parsing and rendering: turns by key, dropped work, and memory that is freed."""

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from mlxlite import wanted
from mlxlite.api.threads import LONG_BYTES, SHORT_BYTES, Lane, Work
from mlxlite.wanted import Dropped


@asynccontextmanager
async def lane_of(kind: Work = Work.SHORT) -> AsyncIterator[Lane]:
    lane = Lane(kind)
    try:
        yield lane
    finally:
        lane.close()


class Held:
    """A lane of one thread, held by a first call until `release`."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.ran: list[Any] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self._free = threading.Event()
        self.tasks.append(asyncio.create_task(lane.run(b"first", bool_of(True), self._free.wait)))

    def add(self, key: bytes, name: Any, is_wanted: Callable[[], bool] | None = None) -> Any:
        work = self.lane.run(key, is_wanted or bool_of(True), self.ran.append, name)
        self.tasks.append(asyncio.create_task(work))
        return self.tasks[-1]

    async def release(self) -> list[Any]:
        await asyncio.sleep(0)  # all tasks have begun to wait
        self._free.set()
        return await asyncio.gather(*self.tasks, return_exceptions=True)


def bool_of(value: bool) -> Callable[[], bool]:
    return lambda: value


@pytest.mark.parametrize("num", [1, 5, 40])
def test_keys_take_turns_whatever_the_number_of_their_requests(num: int) -> None:
    async def scenario() -> None:
        async with lane_of() as lane:
            held = Held(lane)
            for i in range(num):
                held.add(b"many", i)
            held.add(b"few", "a")
            held.add(b"few", "b")
            held.add(b"one", "c")
            await held.release()
            few = [held.ran.index(name) for name in "abc"]
            assert max(few) <= 4
            assert [name for name in held.ran if isinstance(name, int)] == list(range(num))

    asyncio.run(scenario())


def test_work_of_a_client_that_has_left_is_dropped_before_it_runs() -> None:
    async def scenario() -> None:
        async with lane_of() as lane:
            held, is_here = Held(lane), True
            held.add(b"k", "gone", lambda: is_here)
            held.add(b"k", "here")
            await asyncio.sleep(0)
            is_here = False
            results = await held.release()
            assert isinstance(results[1], Dropped)
            assert held.ran == ["here"]

    asyncio.run(scenario())


def test_work_that_runs_ends_once_it_asks_and_its_client_has_left() -> None:
    async def scenario() -> None:
        async with lane_of() as lane:
            is_here, has_begun = True, threading.Event()

            def work() -> None:
                has_begun.set()
                wanted.wait_for(lambda s: time.sleep(s), 60)

            running = asyncio.create_task(lane.run(b"k", lambda: is_here, work))
            await asyncio.to_thread(has_begun.wait)
            is_here = False
            with pytest.raises(Dropped):
                await asyncio.wait_for(running, 1)
            assert await lane.run(b"k", bool_of(True), wanted.check) is None, "and only that work"

    asyncio.run(scenario())


def test_a_cancelled_task_gives_its_turn_to_the_next() -> None:
    async def scenario() -> None:
        async with lane_of() as lane:
            held = Held(lane)
            cancelled = held.add(b"k", "cancelled")
            held.add(b"k", "next")
            await asyncio.sleep(0)
            cancelled.cancel()
            await held.release()
            assert held.ran == ["next"]
            assert await lane.run(b"k", bool_of(True), lambda: 7) == 7, "the thread is free again"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("num_bytes", "kind"),
    [
        (0, Work.SHORT),
        (SHORT_BYTES, Work.SHORT),
        (SHORT_BYTES + 1, Work.LONG),
        (LONG_BYTES, Work.LONG),
        (LONG_BYTES + 1, Work.HUGE),
        (60 << 20, Work.HUGE),
    ],
)
def test_a_small_body_never_waits_for_a_large_one(num_bytes: int, kind: Work) -> None:
    assert Work.of(num_bytes) is kind


class Holder:
    def __init__(self, data: bytes) -> None:
        self.data = data


@pytest.mark.parametrize("kind", [ValueError, StopIteration, SystemExit, KeyError])
def test_the_arguments_of_refused_work_are_freed_at_once(kind: type[BaseException]) -> None:
    """Without a collection: bodies of 60 MB that are refused would pile up until there is one."""

    def refuse(holder: Holder) -> None:
        raise kind(holder.data)

    async def is_refused(lane: Lane, holder: Holder) -> bool:
        try:
            await lane.run(b"", bool_of(True), refuse, holder)
        except Exception:
            return True
        return False

    async def scenario() -> None:
        holder = Holder(b"a text")
        freed = weakref.ref(holder)
        async with lane_of() as lane:
            gc.disable()
            try:
                assert await is_refused(lane, holder)
                del holder
                await lane.run(b"", bool_of(True), int)  # the thread has let go of it as well
                assert freed() is None
            finally:
                gc.enable()

    asyncio.run(scenario())
