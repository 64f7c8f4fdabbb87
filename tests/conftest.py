"""Fixtures that tests share: a random checkpoint; a clock and a check of threads, for servers."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import save_checkpoint
from helpers import Clock

from mlxlite import server as server_module
from mlxlite.api.endpoints import admin
from mlxlite.engine import engine as engine_module
from mlxlite.http import connection


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that has no end-of-sequence token of its own and so talks to its limit."""
    return save_checkpoint(tmp_path_factory.mktemp("models") / "tiny-qwen3")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time as connections and the engine see it; deadlines are looked at nearly all the time."""
    clock = Clock()
    monkeypatch.setattr(connection, "perf_counter", clock)
    monkeypatch.setattr(engine_module, "perf_counter", clock)
    monkeypatch.setattr(server_module, "perf_counter", clock)
    monkeypatch.setattr(admin, "perf_counter", clock)
    monkeypatch.setattr(server_module, "SWEEP_S", 0.005)
    return clock


@pytest.fixture
def no_server_thread_is_left() -> Iterator[None]:
    """A server's threads end with its test."""
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("mlxlite"):
            thread.join(5)
            assert not thread.is_alive(), f"{thread.name} lives on"
