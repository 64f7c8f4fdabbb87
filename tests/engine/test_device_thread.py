"""The device thread: one thread, calls in order, any exception returned, an end when it is free."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator

import pytest
from loops import TIMEOUT_S, play, turns

from mlxlite.engine.device_thread import DeviceThread


@contextlib.asynccontextmanager
async def open_device_thread() -> AsyncIterator[DeviceThread]:
    device_thread = DeviceThread()
    try:
        yield device_thread
    finally:
        assert await device_thread.close(TIMEOUT_S)


def test_the_device_thread_returns_results_from_one_thread_that_is_not_the_loops():
    async def scenario() -> None:
        async with open_device_thread() as device_thread:
            assert await device_thread.run(lambda a, b: a + b, 2, 3) == 5
            threads = {await device_thread.run(threading.get_ident) for _ in range(3)}
            assert len(threads) == 1
            assert threading.get_ident() not in threads

    play(scenario())


class Odd(BaseException):
    """Not an Exception."""


@pytest.mark.parametrize("error", [ValueError("x"), Odd(), StopIteration(3)], ids=repr)
def test_the_device_thread_returns_any_exception_and_continues(error: BaseException):
    """StopIteration too, which mlx-lm's caches can raise (`next(iter(…))`) and futures reject.

    It may be wrapped in another error, but it must be raised, and must not end the loop.
    """

    def fail() -> None:
        raise error

    async def scenario() -> None:
        async with open_device_thread() as device_thread:
            expected = ValueError if isinstance(error, ValueError) else RuntimeError
            with pytest.raises(expected):
                await asyncio.wait_for(device_thread.run(fail), 1)
            assert await device_thread.run(lambda: 7) == 7

    play(scenario())


def test_the_device_threads_results_are_not_logged(caplog: pytest.LogCaptureFixture):
    class Result:
        def __repr__(self) -> str:
            raise AssertionError("an array would be evaluated here")

    async def scenario() -> None:
        device_thread = DeviceThread()
        asyncio.get_running_loop().slow_callback_duration = 0  # so that each callback is logged
        assert isinstance(await device_thread.run(Result), Result)
        await device_thread.close(timeout_s=5)

    with caplog.at_level(logging.WARNING, "asyncio"):
        play(scenario(), debug=True)
    assert any("_Delivery" in message for message in caplog.messages)


def test_the_device_thread_runs_calls_in_order_one_at_a_time():
    async def scenario() -> None:
        seen: list[int] = []
        inside = threading.Lock()

        def note(number: int) -> int:
            assert inside.acquire(blocking=False)
            seen.append(number)
            inside.release()
            return number

        async with open_device_thread() as device_thread:
            calls = [device_thread.run(note, number) for number in range(50)]
            assert await asyncio.gather(*calls) == list(range(50))
            assert seen == list(range(50))

    play(scenario())


def test_a_stuck_device_thread_reports_it_and_closes_when_it_is_free():
    async def scenario() -> None:
        device_thread, free = DeviceThread(), threading.Event()
        stuck = asyncio.ensure_future(device_thread.run(free.wait, TIMEOUT_S))
        await turns()
        assert not await device_thread.close(0.0)
        free.set()
        assert await stuck
        assert await device_thread.close(TIMEOUT_S)

    play(scenario())


@pytest.mark.parametrize("is_raising", [False, True])
def test_the_result_of_a_cancelled_call_is_dropped(
    is_raising: bool, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        free = threading.Event()

        def work() -> None:
            assert free.wait(TIMEOUT_S)
            if is_raising:
                raise ValueError("no task awaits this")

        async with open_device_thread() as device_thread:
            waiting = asyncio.ensure_future(device_thread.run(work))
            await turns()
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            free.set()
            assert await device_thread.run(lambda: 1) == 1

    play(scenario(), debug=True)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_device_thread_outlives_the_loop_that_called_it():
    device_thread, free = DeviceThread(), threading.Event()

    async def leave() -> None:
        call = asyncio.ensure_future(device_thread.run(free.wait, TIMEOUT_S))
        await turns()
        call.cancel()

    async def come_back() -> None:
        assert await device_thread.run(lambda: 7) == 7
        assert await device_thread.close(TIMEOUT_S)

    asyncio.run(leave())
    free.set()  # its result is for a loop that is closed
    asyncio.run(come_back())
