"""A test's own event loop: a scenario in bounded time, and turns without time passing."""

import asyncio
from collections.abc import Coroutine
from typing import Any

TIMEOUT_S = 30.0  # far above what any wait here needs


def play(scenario: Coroutine[Any, Any, None], **options: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S), **options)


async def turns(num: int = 20) -> None:
    """Give the loop a number of turns: whatever was ready has run, and time has not passed."""
    for _ in range(num):
        await asyncio.sleep(0)
