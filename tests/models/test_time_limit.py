"""Calls that are stopped in their thread, once, and only while they run."""

import threading
from time import monotonic

import pytest

from mlxlite import wanted
from mlxlite.models.time_limit import TookTooLong, _Bounded, _Stop, run_with_timeout


def test_a_call_that_ends_in_time_is_left_alone() -> None:
    assert run_with_timeout(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        run_with_timeout(60, lambda: {}["x"])
    assert "mlxlite" not in [thread.name for thread in threading.enumerate()]


def spin() -> None:
    while True:
        pass


def test_a_call_that_does_not_end_is_stopped_once_and_its_thread_continues() -> None:
    for _ in range(3):
        with pytest.raises(TookTooLong, match=r"stopped after 0\.01 s"):
            run_with_timeout(0.01, spin)
    assert sum(range(10**6)) > 0, "nothing is raised afterwards"


def test_a_stop_that_is_swallowed_is_repeated() -> None:
    """A finalizer, or a callback of the collector, may end with the exception."""
    num_swallowed = 0

    def stubborn() -> None:
        nonlocal num_swallowed
        while num_swallowed < 2:
            try:
                spin()
            except BaseException:
                num_swallowed += 1
        spin()

    with pytest.raises(TookTooLong):
        run_with_timeout(0.01, stubborn)
    assert num_swallowed == 2
    assert sum(range(10**6)) > 0, "nothing is raised afterwards"


def test_a_call_whose_client_leaves_is_stopped_and_its_thread_continues() -> None:
    left = threading.Event()
    threading.Timer(0.05, left.set).start()
    began_at = monotonic()
    with pytest.raises(wanted.Dropped):
        wanted.call_while(lambda: not left.is_set(), lambda: run_with_timeout(60, spin))
    assert 0.05 <= monotonic() - began_at < 1
    assert sum(range(10**6)) > 0, "nothing is raised afterwards"
    assert run_with_timeout(60, lambda: 7) == 7, "the next call of the thread is wanted"


def test_a_stop_that_arrives_as_the_call_ends_is_withdrawn() -> None:
    bounded = _Bounded()
    threads = [threading.Thread(target=bounded.stop) for _ in range(2)]
    bounded.end()
    for thread in threads:
        thread.start()
        thread.join()
    assert sum(range(10**5)) > 0
    late = _Bounded()
    with pytest.raises(_Stop):
        _stop_and_end(late)
    assert sum(range(10**5)) > 0


def _stop_and_end(bounded: _Bounded) -> None:
    """The exception is raised by the next operation, so it never gets as far as `end`."""
    bounded.stop()
    bounded.end()
    for _ in range(10):
        pass
