"""Fixtures that the tests share: a tiny random checkpoint, and a clock for a server in-process."""

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
