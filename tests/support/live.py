"""A real server with a real model in this process, for the tests that drive a client against it."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from helpers import TIMEOUT_S

import mlxlite


@contextmanager
def serving(config: mlxlite.Config) -> Iterator[mlxlite.Server]:
    """A server in a thread that has a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="test-loop")
    thread.start()

    def call(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(60)

    try:
        server = mlxlite.Server(config)
        call(server.__aenter__())
        try:
            yield server
        finally:
            call(server.__aexit__(None, None, None))
            call(loop.shutdown_default_executor())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(TIMEOUT_S)
        loop.close()
