"""The service: work in its threads."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from mlxlite.api.service import Service
from mlxlite.config.options import Config
from mlxlite.metrics import Metrics


class Holder:
    def __init__(self, data: bytes) -> None:
        self.data = data


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service(Config(), Metrics(model_name="m", version="0", start_time_s=0.0, routes=[]))
    made.start_threads()
    yield made
    made.stop_threads()


@pytest.mark.parametrize("kind", [ValueError, StopIteration, SystemExit, KeyError])
def test_the_arguments_of_refused_work_are_freed_at_once(
    service: Service, kind: type[BaseException]
) -> None:
    """Without a collection: bodies of 60 MB that are refused would pile up until there is one."""

    def refuse(holder: Holder) -> None:
        raise kind(holder.data)

    async def is_refused(holder: Holder) -> bool:
        try:
            await service.in_thread(10, refuse, holder)
        except Exception:
            return True
        return False

    async def scenario() -> None:
        holder = Holder(b"a text")
        freed = weakref.ref(holder)
        gc.disable()
        try:
            assert await is_refused(holder)
            del holder
            await service.in_thread(10, int)  # the thread has let go of it as well
            assert freed() is None
        finally:
            gc.enable()

    asyncio.run(scenario())
