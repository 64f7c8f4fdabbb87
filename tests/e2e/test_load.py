"""Load: more than fits, clients that vanish at any moment, readers that are slow. Nothing is lost.

Around a scripted runner, so that what is asserted are counts: places in the queue, tokens, rows in
steps. What it costs in seconds and bytes is measured by hand: `python -m tests.robustness.soak`.
"""

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from helpers import (
    DONE,
    ENDLESS,
    Answer,
    Clock,
    FakeModel,
    ScriptedRunner,
    Served,
    Wire,
    chat_request,
    in_a_loop,
    pass_time,
    serving,
    slow_reader,
    stand_still,
    text_of,
    until,
)

from mlxlite.engine.engine import Engine
from mlxlite.engine.step import Step
from mlxlite.http import connection
from mlxlite.http.connection import WRITE_TIMEOUT_S


async def assert_back_to_zero(served: Served) -> None:
    await until(lambda: served.num_live == 0, "every sequence has ended")
    await until(lambda: not served.runner.prompts, "every row is free")
    async with await served.wire() as wire:
        assert (await wire.chat("hello")).status == 200, "and it serves on at once"
        text = (await wire.get("/metrics")).body.decode()
    await until(lambda: served.num_clients == 0, "every connection is closed")
    load = served.engine.load
    assert (load.num_waiting, load.num_running, load.num_bytes) == (0, 0, 0)
    assert served.num_held_bytes == 0
    assert not served.server.service.running
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
        (value,) = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
        assert float(value) == 0


# --- ten times what fits ------------------------------------------------------------------------

NUM_ROWS, NUM_PLACES = 4, 8
NUM_CLIENTS = 10 * (NUM_ROWS + NUM_PLACES)


class Crowd:
    """Concurrent clients, half of them with streams, that retry after a 429."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._is_open = asyncio.Event()
        self._turns = asyncio.Semaphore(NUM_PLACES)
        self.num_refused = 0
        self.texts: dict[int, str] = {}

    async def _ask(self, wire: Wire, n: int) -> tuple[Answer, str]:
        if n % 2:
            answer = await wire.chat(f"number {n}")
            if answer.status != 200:
                return answer, ""
            return answer, answer.json["choices"][0]["message"]["content"]
        head = await wire.open_stream(f"number {n}")
        if head.status != 200:
            body = await wire._reader.readexactly(int(head["content-length"]))
            return Answer(head.status, head.headers, body), ""
        frames = await wire.rest()
        assert frames[-1] == DONE
        return head, text_of(frames)

    async def _client(self, n: int) -> None:
        async with await self._served.wire() as wire:
            answer, text = await self._ask(wire, n)
            while answer.status == 429:
                assert answer["retry-after"] == "1"
                assert answer.error["code"] == "queue_full"
                self.num_refused += 1
                await self._is_open.wait()
                async with self._turns:
                    answer, text = await self._ask(wire, n)
            assert answer.status == 200
            self.texts[n] = text

    async def run(self) -> None:
        runner = self._served.runner
        runner.hold()
        async with asyncio.TaskGroup() as group:
            for n in range(NUM_CLIENTS):
                group.create_task(self._client(n))
            await until(lambda: self.num_refused + self._served.num_live == NUM_CLIENTS)
            # One step was let through before the device was found to be busy: rows, then a queue.
            assert NUM_PLACES <= self._served.num_live <= NUM_ROWS + NUM_PLACES
            assert not self.texts
            runner.release()
            self._is_open.set()


def test_ten_times_what_fits_is_refused_in_time_and_no_request_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = 0
    add = Engine.add

    def watched(self: Engine, *args: Any, **kwargs: Any) -> None:
        nonlocal longest
        add(self, *args, **kwargs)
        # What has been added in this turn of the loop is not in the scheduler's queue yet.
        longest = max(longest, self._scheduler.num_waiting + len(self._commands))

    monkeypatch.setattr(Engine, "add", watched)

    @in_a_loop
    async def test() -> None:
        async with serving(max_batch_size=NUM_ROWS, max_queue=NUM_PLACES) as served:
            crowd = Crowd(served)
            await crowd.run()
            assert crowd.num_refused >= NUM_CLIENTS - NUM_ROWS - NUM_PLACES
            assert crowd.texts == {n: f"number {n}" for n in range(NUM_CLIENTS)}
            assert served.num_ended("stop") == NUM_CLIENTS
            await assert_back_to_zero(served)
        assert NUM_PLACES <= longest <= NUM_PLACES + 1

    test()


# --- clients that vanish ------------------------------------------------------------------------

NUM_VANDALS, NUM_TIMES = 8, 25


class Vandals:
    """Clients that hang up: before their body is whole, or any number of steps after it."""

    def __init__(self, served: Served, seed: int) -> None:
        self._served = served
        self._rng = random.Random(seed)
        self.moments: Counter[tuple[bool, bool]] = Counter()

    async def _vandal(self) -> None:
        rng = self._rng
        for _ in range(NUM_TIMES):
            content = "p" * rng.choice([1, 400, 4000]) + ENDLESS
            is_stream = rng.random() < 0.5
            raw = chat_request(content, stream=is_stream)
            is_whole = rng.random() < 0.9
            wire = await self._served.wire()
            await wire.send(raw if is_whole else raw[: rng.randrange(len(raw))])
            stop_at = self._served.engine.load.num_steps + rng.choice([0, 1, 5, 20, 60])
            await until(lambda stop_at=stop_at: self._served.engine.load.num_steps >= stop_at)
            self.moments[is_whole, is_stream] += 1
            if rng.random() < 0.5:
                wire.abort()
            await wire.close()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_VANDALS):
                group.create_task(self._vandal())


@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_disconnects_leave_no_state_and_cost_another_stream_no_token(
    seed: int,
) -> None:
    @in_a_loop
    async def test() -> None:
        settings: dict[str, Any] = {"max_batch_size": 4, "prefill_chunk_size": 8, "max_queue": 64}
        async with serving(**settings) as served, await served.wire() as steady:
            await steady.open_stream("abc" + ENDLESS)
            vandals = Vandals(served, seed)
            begun = asyncio.ensure_future(vandals.run())
            said = ""
            while not begun.done():
                said += text_of([await steady.frame()])
            await begun
            assert said == (f"abc{ENDLESS}" * len(said))[: len(said)], "not a token is missing"
            assert vandals.moments.total() == NUM_VANDALS * NUM_TIMES
            assert len(vandals.moments) == 4, vandals.moments
            await until(lambda: served.num_live == 1, "only the steady one is left")
            await until(lambda: served.num_clients == 1)
            assert served.num_ended("error") == 0
            await steady.close()
            await assert_back_to_zero(served)
            runner, ids = served.runner, range(2, served.server.service.num_sequences + 1)
            met = Counter(_when(runner, id) for id in ids)
            assert min(met[phase] for phase in ("queue", "prefill", "decode")) > 0, met

    test()


def _when(runner: ScriptedRunner, id: int) -> str:
    """Where a sequence was when its client went."""
    if id not in runner.admitted:
        return "queue"
    return "decode" if runner.num_drawn[id] else "prefill"


# --- slow readers beside fast ones --------------------------------------------------------------

NUM_FAST, NUM_SLOW, NUM_TOKENS = 4, 4, 100


class Watched(ScriptedRunner):
    """Remembers which rows were in which step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[int, ...]] = []

    def _launch(self, step: Step) -> None:
        self.steps.append(tuple(step.rows))
        super()._launch(step)

    def places(self, id: int) -> list[int]:
        """The numbers of the steps that a sequence had a row in."""
        return [number for number, rows in enumerate(self.steps) if id in rows]


async def _fast(served: Served) -> str:
    async with await served.wire() as wire:
        await wire.open_stream("ab" + ENDLESS, max_tokens=NUM_TOKENS)
        frames = await wire.rest()
        assert frames[-1] == DONE
        return text_of(frames)


def _steps_of_fast_ones(monkeypatch: pytest.MonkeyPatch, num_slow: int) -> list[int]:
    """The number of steps of each fast one; none was left out of a step in between."""
    monkeypatch.setattr(connection, "MAX_UNSENT_BYTES", 1 << 18)
    found: list[int] = []

    @in_a_loop
    async def test() -> None:
        runner = Watched()
        settings = {"max_batch_size": NUM_FAST + NUM_SLOW}
        async with (
            serving(FakeModel(width=4096), runner, **settings) as served,
            asyncio.TaskGroup() as group,
        ):
            runner.hold()
            unsent: list[int] = []
            slow = [slow_reader(served) for _ in range(num_slow)]
            readers = [await one.__aenter__() for one in slow]
            for reader in readers:
                reader.sock.sendall(chat_request(ENDLESS, stream=True))
                abort = reader.client._transport.abort
                reader.client._transport.abort = lambda r=reader, cut=abort: (  # type: ignore[method-assign]
                    unsent.append(r.num_unsent),
                    cut(),
                )
            await until(lambda: served.num_live == num_slow)
            fast = [group.create_task(_fast(served)) for _ in range(NUM_FAST)]
            await until(lambda: served.num_live == num_slow + NUM_FAST)
            runner.release()
            expected = "".join(char * 4096 for char in f"ab{ENDLESS}" * NUM_TOKENS)
            for told in await asyncio.gather(*fast):
                assert told == expected[: NUM_TOKENS * 4096]
            await until(lambda: served.num_ended("abort") == num_slow, "the slow ones are cut")
            assert served.num_ended("length") == NUM_FAST
            assert len(unsent) == num_slow
            assert all(1 << 18 < num <= (1 << 18) + (1 << 14) for num in unsent), unsent
            for one in slow:
                await one.__aexit__(None, None, None)
            ids = [id for id in runner.num_drawn if len(runner.places(id)) >= NUM_TOKENS]
            for id in sorted(ids)[-NUM_FAST:]:
                places = runner.places(id)
                assert places == list(range(places[0], places[-1] + 1)), "left out of a step"
                found.append(len(places))
            await until(lambda: served.num_live == 0)

    test()
    return found


def test_fast_readers_take_the_same_steps_beside_slow_ones_which_are_cut_at_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = _steps_of_fast_ones(monkeypatch, 0)
    beside = _steps_of_fast_ones(monkeypatch, NUM_SLOW)
    assert alone == beside == [NUM_TOKENS] * NUM_FAST


def test_a_reader_of_a_byte_a_second_is_cut_for_it_makes_no_progress(clock: Clock) -> None:
    """The bytes that it takes make no room in its own buffers, which are all that is seen here."""

    @in_a_loop
    async def test() -> None:
        async with serving(FakeModel(width=1 << 19)) as served, slow_reader(served) as slow:
            slow.sock.sendall(chat_request("hello", stream=True))
            await until(lambda: served.num_ended("stop") == 1)
            await stand_still(served, clock, slow)
            for _ in range(int(WRITE_TIMEOUT_S) - 1):
                assert len(slow.sock.recv(1)) == 1
                await pass_time(served, clock, 1)
                assert served.num_clients == 1
            await pass_time(served, clock, 2)
            await until(lambda: served.num_clients == 0, "it is cut")
            await assert_back_to_zero(served)

    test()
