"""The engine: every sink gets its tokens, exactly one `Finished`, and nothing after it.

`RecordingSink` asserts the last part in every test here, and `FakeRunner` that the steps make
sense. Nothing sleeps: tests wait for events, and times that must not pass are an hour.
"""

import asyncio
import contextlib
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from time import perf_counter

import pytest
from fakes import (
    FakeRunner,
    RecordingSink,
    SilentObserver,
    SinkOutput,
    answer,
    fake_logprobs,
    make_choices,
    make_sequence,
    spell,
)
from loops import TIMEOUT_S, play, turns

from mlxlite.engine.device_thread import DeviceThread
from mlxlite.engine.engine import (
    MAX_IMAGE_BYTES,
    QUEUE_FULL,
    Engine,
    EngineOptions,
    QueueFull,
)
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Logprobs, Prompt, Sequence
from mlxlite.engine.step import Finished, Prefilled, SinkFailed, Step, Token

HOUR_S = 3600.0


@dataclass
class Served:
    """An engine that runs, and what the tests look at."""

    engine: Engine
    device_thread: DeviceThread
    runner: FakeRunner
    observer: SilentObserver
    task: asyncio.Task[None]

    def add(
        self,
        sequence: Sequence,
        react: Callable[[SinkOutput], None] | None = None,
    ) -> RecordingSink:
        sink = RecordingSink(react)
        self.engine.add([sequence], [sink])
        return sink


@contextlib.asynccontextmanager
async def serve(
    runner: FakeRunner | None = None,
    policy: Policy | None = None,
    options: EngineOptions | None = None,
) -> AsyncIterator[Served]:
    runner = runner or FakeRunner()
    device_thread, observer = DeviceThread(), SilentObserver()
    scheduler = Scheduler(policy or Policy())
    engine = Engine(
        scheduler, runner, device_thread=device_thread, observer=observer, options=options
    )
    task = asyncio.create_task(engine.run())
    try:
        yield Served(engine, device_thread, runner, observer, task)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, RuntimeError):
            await task
        assert await device_thread.close(TIMEOUT_S)
    scheduler.check()


class Gate:
    """Blocks the device thread in one step until it is opened; `reached` is set when it does."""

    def __init__(self, number: int) -> None:
        self.reached = asyncio.Event()
        self._number = number
        self._open = threading.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, step: Step | None) -> None:
        if step is not None and step.number == self._number:
            self._loop.call_soon_threadsafe(self.reached.set)
            assert self._open.wait(TIMEOUT_S)

    def open(self) -> None:
        self._open.set()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for an effect of the device thread."""
    async with asyncio.timeout(30):  # far above what any test needs
        while not condition():  # noqa: ASYNC110  # a thread changes it, without an event
            await asyncio.sleep(0)


# --- text and ends ----------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [1, 3])
def test_every_sink_gets_its_own_text_and_one_done(max_rows: int):
    sequences = [make_sequence(id, 1 + 7 * id, 3 + id) for id in range(6)]

    async def scenario() -> None:
        async with serve(policy=Policy(max_rows, chunk_size=8)) as served:
            sinks = [served.add(sequence) for sequence in sequences]
            for sequence, sink in zip(sequences, sinks, strict=True):
                done = await sink.wait()
                assert done.reason is FinishReason.LENGTH
                assert done.error is None
                assert sink.text == spell(answer(sequence))
                assert done.usage.num_prompt == len(sequence.prompt.tokens)
                assert done.usage.num_output == sequence.max_tokens
            assert served.engine.num_live == 0
            assert served.observer.reasons == ["length"] * 6
            assert served.observer.num_tokens == sum(s.max_tokens for s in sequences)

    play(scenario())


def calls_of(runner: FakeRunner) -> list[int | None]:
    """The steps that a runner is given for a prompt of two chunks; None: only to wait."""
    calls: list[int | None] = []
    runner._before = lambda step: calls.append(step.number if step else None)

    async def scenario() -> None:
        async with serve(runner, Policy(chunk_size=8)) as served:
            sink = served.add(make_sequence(1, num_prompt=12, max_tokens=4))
            await sink.wait()
            assert sink.text == spell(answer(make_sequence(1, num_prompt=12, max_tokens=4)))

    play(scenario())
    return calls


def test_each_step_is_launched_before_the_one_in_flight_is_waited_for() -> None:
    assert calls_of(FakeRunner())[:4] == [1, 2, 3, 4]


def test_an_end_token_has_no_text_and_is_counted():
    async def scenario() -> None:
        async with serve(FakeRunner(answers={1: [0, 1, 25, 2]})) as served:
            sink = served.add(make_sequence(1, max_tokens=9, eos_tokens=frozenset({25})))
            done = await sink.wait()
            assert sink.text == "ab"
            assert done.reason is FinishReason.STOP
            assert done.usage.num_output == 3

    play(scenario())


def test_a_sink_can_end_its_sequence_and_free_the_row():
    async def scenario() -> None:
        async with serve(FakeRunner(answers={1: [0, 1, 2, 3, 4, 5, 6]})) as served:

            def finish(output: SinkOutput) -> None:
                if isinstance(output, Token) and output.token == 4:
                    served.engine.finish(1, FinishReason.STOP)

            sink = served.add(make_sequence(1, max_tokens=1000), finish)
            done = await sink.wait()
            assert sink.text == "abcde"
            assert done.reason is FinishReason.STOP
            assert done.usage.num_output == 5
            assert served.observer.reasons == ["stop"]
        assert sum(1 in step.rows for step in served.runner.steps) == 7  # two are overshoot

    play(scenario())


def test_a_sequence_that_its_sink_ends_with_the_last_allowed_token_is_observed_as_a_stop():
    async def scenario() -> None:
        async with serve() as served:

            def finish(output: SinkOutput) -> None:
                if len(sink.outputs) == 4:
                    served.engine.finish(1, FinishReason.STOP)

            sink = served.add(make_sequence(1, max_tokens=4), finish)
            assert (await sink.wait()).usage.num_output == 4
            assert served.observer.reasons == ["stop"]

    play(scenario())


def test_progress_and_usage_reach_the_sinks_that_want_them():
    async def scenario() -> None:
        async with serve(policy=Policy(chunk_size=8)) as served:
            asking = replace(make_sequence(1, 20, 3), wants_progress=True, wants_usage=True)
            sink, silent = served.add(asking), served.add(make_sequence(2, 20, 3))
            await sink.wait()
            await silent.wait()
            progress = [o for o in sink.outputs if isinstance(o, Prefilled)]
            assert [o.num_computed for o in progress] == [8, 16, 19]
            assert all(o.usage.num_prompt == 20 for o in progress)
            assert [t.usage.num_output for t in sink.tokens if t.usage] == [1, 2, 3]
            assert all(type(o) is not Prefilled for o in silent.outputs)
            assert [token.usage for token in silent.tokens] == [None] * 3

    play(scenario())


def test_the_times_of_a_sequence_are_not_negative_and_in_order():
    async def scenario() -> None:
        async with serve(policy=Policy(max_rows=1)) as served:
            for sink in [served.add(make_sequence(id, 20)) for id in (1, 2)]:
                usage = (await sink.wait()).usage
                assert usage.queue_s > 0
                assert usage.prefill_s > 0
                assert usage.decode_s > 0
                assert usage.num_cached == 0

    play(scenario())


# --- cancel -----------------------------------------------------------------------------------


def test_a_cancel_before_the_first_step_still_gives_a_done():
    async def scenario() -> None:
        async with serve() as served:
            sink = served.add(make_sequence(1))
            served.engine.cancel(1)
            done = await sink.wait()
            assert sink.outputs == [done]
            assert done.reason is FinishReason.CANCELLED
            assert done.usage == replace(done.usage, num_prompt=3, num_output=0, decode_s=0.0)
            assert served.runner.steps == []

    play(scenario())


def test_a_cancel_in_the_queue_ends_the_waiting_one_alone():
    async def scenario() -> None:
        gate = Gate(2)
        async with serve(FakeRunner(before=gate), Policy(max_rows=1)) as served:
            running, waiting = served.add(make_sequence(1)), served.add(make_sequence(2))
            await gate.reached.wait()
            served.engine.cancel(2)
            gate.open()
            assert (await waiting.wait()).reason is FinishReason.CANCELLED
            assert (await running.wait()).reason is FinishReason.LENGTH
            assert running.text == spell(answer(make_sequence(1)))

    play(scenario())


def test_a_cancel_in_prefill_stops_the_prefill():
    async def scenario() -> None:
        gate = Gate(3)
        async with serve(FakeRunner(before=gate), Policy(chunk_size=16)) as served:
            sink = served.add(make_sequence(1, 100_000))
            await gate.reached.wait()
            served.engine.cancel(1)
            gate.open()
            assert (await sink.wait()).reason is FinishReason.CANCELLED
            after = served.add(make_sequence(2))
            await after.wait()
        assert sum(len(step.chunks) for step in served.runner.steps) == 4
        assert served.runner.num_held <= 1  # the last one's release had no step to ride in

    play(scenario())


def test_a_sink_that_cancels_in_the_middle_gets_no_more_text():
    async def scenario() -> None:
        async with serve() as served:

            def cancel(output: SinkOutput) -> None:
                if len(sink.outputs) == 3:
                    served.engine.cancel(1)

            sink = served.add(make_sequence(1, max_tokens=1000), react=cancel)
            other = served.add(make_sequence(2, max_tokens=20))
            done = await sink.wait()
            assert done.reason is FinishReason.CANCELLED
            assert done.usage.num_output == 3
            assert sink.text == spell(answer(make_sequence(1), 3))
            await other.wait()
            assert other.text == spell(answer(make_sequence(2), 20))

    play(scenario())


def test_a_cancel_after_the_end_and_of_an_unknown_id_are_void():
    async def scenario() -> None:
        async with serve() as served:
            sink = served.add(make_sequence(1))
            await sink.wait()
            served.engine.cancel(1)
            served.engine.cancel(404)
            await (served.add(make_sequence(2))).wait()
            assert served.observer.reasons == ["length", "length"]

    play(scenario())


def test_a_cancel_twice_is_one_done():
    async def scenario() -> None:
        async with serve() as served:
            sink = served.add(make_sequence(1, max_tokens=1000))
            served.engine.cancel(1)
            served.engine.cancel(1)
            await sink.wait()
            await turns()
            assert len(sink.outputs) == 1

    play(scenario())


def test_a_sink_may_add_the_next_sequence():
    async def scenario() -> None:
        async with serve() as served:
            sinks: list[RecordingSink] = []

            def follow(output: SinkOutput) -> None:
                if isinstance(output, Finished):
                    sinks.append(served.add(make_sequence(2)))

            await served.add(make_sequence(1), react=follow).wait()
            assert (await sinks[0].wait()).reason is FinishReason.LENGTH

    play(scenario())


# --- logprobs ---------------------------------------------------------------------------------

REPORTING = SamplingParams(0.0, top_logprobs=2)


def reported(sink: RecordingSink) -> list[tuple[int, Logprobs]]:
    return [(t.token, t.logprobs) for t in sink.tokens if t.logprobs is not None]


def expected_logprobs(sequence: Sequence, tokens: list[int]) -> list[tuple[int, Logprobs]]:
    return [(token, fake_logprobs(sequence, i, token)) for i, token in enumerate(tokens)]


def test_logprobs_are_with_their_tokens_where_requested():
    async def scenario() -> None:
        async with serve() as served:
            asking = make_sequence(1, max_tokens=5, sampling=REPORTING)
            sink, silent = served.add(asking), served.add(make_sequence(2))
            await sink.wait()
            await silent.wait()
            assert reported(sink) == expected_logprobs(asking, answer(asking))
            assert reported(silent) == []

    play(scenario())


# --- choices ----------------------------------------------------------------------------------


def test_one_request_with_many_answers_is_about_one_prefill_and_a_done_for_each():
    choices = make_choices(16, 99, 5, block_size=16)  # 6 blocks and 2 tokens to compute

    async def scenario() -> None:
        async with serve(policy=Policy(max_rows=3, chunk_size=16, prefix_bytes=1 << 20)) as served:
            sinks = [RecordingSink() for _ in choices]
            served.engine.add(choices, sinks)
            dones = [await sink.wait() for sink in sinks]
            assert {done.reason for done in dones} == {FinishReason.LENGTH}
            assert [sink.text for sink in sinks] == [spell(answer(s)) for s in choices]
            assert [done.usage.num_cached for done in dones] == [0] + [96] * 15
            assert sum(step.num_prefill_tokens for step in served.runner.steps) == 98 + 15 * 2

    play(scenario())


def test_a_request_whose_answers_have_no_room_in_the_queue_is_refused_as_a_whole():
    async def scenario() -> None:
        async with serve(options=EngineOptions(max_queue=3)) as served:
            sinks = [RecordingSink() for _ in range(4)]
            with pytest.raises(QueueFull):
                served.engine.add(make_choices(4), sinks)
            assert served.engine.num_live == 0
            served.engine.add(make_choices(3), sinks[:3])
            for sink in sinks[:3]:
                await sink.wait()
            assert sinks[3].outputs == []

    play(scenario())


def test_choices_that_wait_when_the_first_ones_step_fails_are_served():
    """What ran ends, what waits stays: the first one's blocks are lost with the runner's reset."""
    choices = make_choices(4, 99, 4, block_size=16)

    async def scenario() -> None:
        policy = Policy(chunk_size=32, prefix_bytes=1 << 20)
        async with serve(FakeRunner(lost_in_launch={2}), policy) as served:
            sinks = [RecordingSink() for _ in choices]
            served.engine.add(choices, sinks)
            assert (await sinks[0].wait()).reason is FinishReason.ERROR
            for sequence, sink in zip(choices[1:], sinks[1:], strict=True):
                assert (await sink.wait()).reason is FinishReason.LENGTH
                assert sink.text == spell(answer(sequence))
            assert served.runner.num_resets == 1

    play(scenario())


# --- giving way -------------------------------------------------------------------------------


def test_a_preempted_sequence_has_one_text_one_done_and_the_times_of_its_first_stay():
    async def scenario() -> None:
        async with serve(policy=Policy(max_rows=1)) as served:
            late: list[RecordingSink] = []

            def hurry(output: SinkOutput) -> None:
                if not late:
                    late.append(served.add(make_sequence(2, priority=-1)))

            sink = served.add(make_sequence(1, max_tokens=9), react=hurry)
            done = await sink.wait()
            assert late[0].is_done  # it went first
            assert sink.text == spell(answer(make_sequence(1), 9))
            assert len(sink.tokens) == 9
            assert done.usage.num_output == 9
            resumed = [a for step in served.runner.steps for a in step.admitted if a.outputs]
            assert [a.sequence.id for a in resumed] == [1]
            assert done.usage.queue_s < done.usage.decode_s

    play(scenario())


def test_a_request_preempted_with_a_row_in_the_failed_step_ends_with_it():
    async def scenario() -> None:
        gate = Gate(3)
        runner = FakeRunner(before=gate, lost_in_wait={3})
        async with serve(runner, Policy(max_rows=1)) as served:
            leaving = served.add(make_sequence(1, max_tokens=50))
            await gate.reached.wait()
            urgent = served.add(make_sequence(2, priority=-1))
            gate.open()
            for sink in (leaving, urgent):
                assert (await sink.wait()).reason is FinishReason.ERROR
            assert served.runner.steps[3].released == (1,)
            assert (await served.add(make_sequence(3)).wait()).reason is FinishReason.LENGTH

    play(scenario())


# --- time -------------------------------------------------------------------------------------


def test_a_request_past_its_timeout_ends_with_an_error_once():
    async def scenario() -> None:
        gate = Gate(2)
        options = EngineOptions(timeout_s=5.0)
        async with serve(FakeRunner(before=gate), Policy(max_rows=1), options) as served:
            running = served.add(make_sequence(1, max_tokens=1000))
            waiting = served.add(make_sequence(2, max_tokens=1000))
            await gate.reached.wait()
            now = perf_counter()
            served.engine.expire(now + 4.0)
            served.engine.expire(now + 6.0)
            served.engine.expire(now + 7.0)
            young = served.add(make_sequence(3))
            gate.open()
            for sink in (running, waiting):
                done = await sink.wait()
                assert done.reason is FinishReason.ERROR
                assert done.error == "the request took longer than 5 s"
            assert (await young.wait()).reason is FinishReason.LENGTH
            assert served.observer.reasons == ["error", "error", "length"]

    play(scenario())


def test_no_request_expires_before_its_timeout_or_without_one():
    async def scenario() -> None:
        for timeout_s, after_s in ((None, HOUR_S), (HOUR_S, 0.0)):
            async with serve(options=EngineOptions(timeout_s=timeout_s)) as served:
                sink = served.add(make_sequence(1, max_tokens=20))
                served.engine.expire(perf_counter() + after_s)
                assert (await sink.wait()).reason is FinishReason.LENGTH

    play(scenario())


def test_a_stuck_device_thread_is_unhealthy_until_it_returns():
    async def scenario() -> None:
        gate = Gate(2)
        options = EngineOptions(stuck_s=60.0)
        async with serve(FakeRunner(before=gate), options=options) as served:
            assert (
                served.engine.unhealthy_reason(perf_counter() + HOUR_S) is None
            )  # idle is not stuck
            sink = served.add(make_sequence(1))
            await gate.reached.wait()
            now = perf_counter()
            assert served.engine.unhealthy_reason(now + 30.0) is None
            assert (
                served.engine.unhealthy_reason(now + 100.0)
                == "the model has not answered for 100 s"
            )
            gate.open()
            await sink.wait()
            await until(lambda: served.engine.unhealthy_reason(perf_counter() + HOUR_S) is None)

    play(scenario())


def test_a_failed_step_is_healthy_and_a_failed_engine_is_not():
    async def scenario() -> None:
        async with serve(FakeRunner(lost_in_launch={2})) as served:
            await served.add(make_sequence(1)).wait()
            await served.add(make_sequence(2)).wait()
            await until(lambda: served.engine.unhealthy_reason(perf_counter() + HOUR_S) is None)
        async with serve(FakeRunner(lost_in_launch={1}, can_reset=False)) as served:
            await served.add(make_sequence(1)).wait()
            assert (
                served.engine.unhealthy_reason(perf_counter()) == served.engine.failure is not None
            )

    play(scenario())


# --- sinks that raise -------------------------------------------------------------------------


@pytest.mark.parametrize("type_", [Token, Finished])
def test_a_sink_that_raises_costs_its_own_sequence_alone(
    type_: type[SinkOutput], caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        def fail(output: SinkOutput) -> None:
            if isinstance(output, type_):
                raise RuntimeError("a broken pipe")

        async with serve() as served:
            bad = served.add(make_sequence(1, max_tokens=50), react=fail)
            good = served.add(make_sequence(2, max_tokens=60))
            await good.wait()
            assert good.text == spell(answer(make_sequence(2), 60))
            assert served.engine.num_live == 0
            assert served.observer.reasons == ["error", "length"]
            if type_ is Token:
                assert [type(output) for output in bad.outputs] == [Token, Finished]
                assert bad.done.reason is FinishReason.ERROR  # a client need not wait
                assert bad.done.error == "the answer could not be written"
            await served.add(make_sequence(3)).wait()

    play(scenario())
    assert caplog.text.count("the sink of sequence 1 raised") == 1


def test_a_sink_that_raises_gives_the_reason():
    async def scenario() -> None:
        def fail(output: SinkOutput) -> None:
            if isinstance(output, Token):
                raise SinkFailed("there is no text")

        async with serve() as served:
            done = await served.add(make_sequence(1, max_tokens=50), fail).wait()
            assert (done.reason, done.error) == (FinishReason.ERROR, "there is no text")

    play(scenario())


# --- the queue --------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_keeps_nothing_of_the_refused():
    async def scenario() -> None:
        gate = Gate(2)
        options = EngineOptions(max_queue=2)
        async with serve(FakeRunner(before=gate), Policy(max_rows=1), options) as served:
            sinks = [served.add(make_sequence(1))]
            await gate.reached.wait()
            sinks += [served.add(make_sequence(id)) for id in (2, 3)]
            refused = RecordingSink()
            with pytest.raises(QueueFull):
                served.engine.add([make_sequence(4)], [refused])
            assert served.engine.num_live == 3
            gate.open()
            for sink in sinks:
                await sink.wait()
            assert refused.outputs == []
            await served.add(make_sequence(5)).wait()  # there is room again

    play(scenario())


@pytest.mark.parametrize(
    ("waiting", "arrival", "leaves"),
    [
        ({"tenant": b"many"}, {"tenant": b"few"}, True),
        ({"priority": 1}, {"priority": 0}, True),
        ({"priority": 1, "tenant": b"few"}, {"priority": 0, "tenant": b"many"}, True),
        ({"tenant": b"many"}, {"tenant": b"many"}, False),
        ({"priority": 0}, {"priority": 1, "tenant": b"few"}, False),
        ({"priority": 0}, {"priority": 0}, False),
    ],
)
def test_a_full_queue_makes_room_for_a_better_priority_and_for_a_share(
    waiting: dict[str, object], arrival: dict[str, object], leaves: bool
):
    async def scenario() -> None:
        gate = Gate(2)
        options = EngineOptions(max_queue=3)
        async with serve(FakeRunner(before=gate), Policy(max_rows=1), options) as served:
            sinks = [served.add(make_sequence(1, **waiting))]
            await gate.reached.wait()
            sinks += [served.add(make_sequence(id, **waiting)) for id in (2, 3, 4)]
            last = RecordingSink()
            if leaves:
                served.engine.add([make_sequence(5, **arrival)], [last])
                done = await sinks.pop().wait()  # the latest, before the device has moved
                assert (done.reason, done.error) == (FinishReason.DISPLACED, QUEUE_FULL)
                sinks.append(last)
            else:
                with pytest.raises(QueueFull):
                    served.engine.add([make_sequence(5, **arrival)], [last])
                assert last.outputs == []
            assert served.engine.num_live == 4
            gate.open()
            for sink in sinks:
                assert (await sink.wait()).reason is FinishReason.LENGTH

    play(scenario())


def test_arrivals_of_one_request_get_all_their_places_or_none():
    async def scenario() -> None:
        gate = Gate(2)
        options = EngineOptions(max_queue=4)
        async with serve(FakeRunner(before=gate), Policy(max_rows=1), options) as served:
            sinks = [served.add(make_sequence(1, tenant=b"many"))]
            await gate.reached.wait()
            sinks += [served.add(make_sequence(id, tenant=b"many")) for id in (2, 3, 4, 5)]
            three = [make_sequence(6 + i, tenant=b"few", number=i) for i in range(3)]
            refused = [RecordingSink() for _ in three]
            with pytest.raises(QueueFull):
                served.engine.add(three, refused)
            assert served.engine.num_live == 5
            two = [RecordingSink() for _ in three[:2]]
            served.engine.add(three[:2], two)
            assert served.engine.num_live == 5
            gate.open()
            ends = [(await sink.wait()).reason for sink in (*sinks, *two)]
            assert ends.count(FinishReason.DISPLACED) == 2
            assert [sink.outputs for sink in refused] == [[], [], []]

    play(scenario())


def test_too_many_images_at_once_are_refused_and_text_is_not():
    def with_image(id: int, num_bytes: int = MAX_IMAGE_BYTES // 2) -> Sequence:
        sequence = make_sequence(id, images=[(0, 1)])
        (image,) = sequence.prompt.images
        images = (replace(image, num_bytes=num_bytes),)
        return replace(sequence, prompt=replace(sequence.prompt, images=images))

    async def scenario() -> None:
        gate = Gate(2)
        async with serve(FakeRunner(before=gate)) as served:
            sinks = [served.add(with_image(1)), served.add(with_image(2))]
            await gate.reached.wait()
            refused = RecordingSink()
            with pytest.raises(QueueFull):
                served.engine.add([with_image(3, 1)], [refused])
            sinks.append(served.add(make_sequence(4)))
            gate.open()
            for sink in sinks:
                await sink.wait()
            assert refused.outputs == []
            await served.add(with_image(5, 2 * MAX_IMAGE_BYTES)).wait()  # alone, any number

    play(scenario())


def test_images_that_choices_share_are_counted_once():
    (image,) = make_sequence(1, images=[(0, 1)]).prompt.images
    prompt = Prompt((1, 2, 3), images=(replace(image, num_bytes=MAX_IMAGE_BYTES // 2),))
    choices = [replace(choice, prompt=prompt) for choice in make_choices(6)]

    async def scenario() -> None:
        async with serve() as served:
            sinks = [RecordingSink() for _ in choices]
            served.engine.add(choices[:3], sinks[:3])
            served.engine.add(choices[3:], sinks[3:])
            refused = RecordingSink()
            with pytest.raises(QueueFull):
                served.engine.add([replace(choices[0], id=7)], [refused])
            for sink in sinks:
                await sink.wait()
            last = served.add(replace(choices[0], id=8))  # there is room again
            assert (await last.wait()).reason is FinishReason.LENGTH

    play(scenario())


# --- failures ---------------------------------------------------------------------------------


def test_a_sequence_that_fails_alone_ends_with_its_error_and_the_others_continue():
    async def scenario() -> None:
        runner = FakeRunner(failing={2: ((1, "image too large"),)})
        async with serve(runner) as served:
            bad, good = served.add(make_sequence(1)), served.add(make_sequence(2))
            done = await bad.wait()
            assert (done.reason, done.error) == (FinishReason.ERROR, "image too large")
            await good.wait()
            assert good.text == spell(answer(make_sequence(2)))

    play(scenario())


@pytest.mark.parametrize("place", ["lost_in_launch", "lost_in_wait"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failed_step_ends_the_running_and_the_waiting_continue(
    place: str, number: int, caplog: pytest.LogCaptureFixture
):
    async def scenario() -> None:
        runner = FakeRunner(**{place: {number}})
        async with serve(runner, Policy(max_rows=2)) as served:
            sinks = [served.add(make_sequence(id, max_tokens=6)) for id in (1, 2, 3, 4)]
            for sink in sinks[:2]:
                done = await sink.wait()
                assert done.reason is FinishReason.ERROR
                assert done.error is not None
                assert done.error.startswith(f"the model failed: RuntimeError: step {number}")
                assert "\n" not in done.error
            for id, sink in enumerate(sinks[2:], 3):
                assert (await sink.wait()).reason is FinishReason.LENGTH
                assert sink.text == spell(answer(make_sequence(id), 6))
            assert served.runner.num_resets == 1
            assert served.engine.failure is None

    play(scenario())
    assert "a step failed" in caplog.text


def test_the_arrays_of_a_failed_step_are_freed_before_the_runner_is_reset():
    """Or the reset that follows an allocation failure could free nothing of what failed.

    The error's traceback keeps the frames, and these the arrays, which belong to the device thread.
    """
    held: list[weakref.ref[threading.Event]] = []
    is_alive: list[bool] = []

    def before(step: Step | None) -> None:
        if step is not None and step.number == 2:
            array = threading.Event()  # anything that can be watched
            held.append(weakref.ref(array))
            raise RuntimeError("out of memory")

    class Watched(FakeRunner):
        def reset(self) -> None:
            is_alive.append(held[0]() is not None)
            super().reset()

    async def scenario() -> None:
        async with serve(Watched(before=before)) as served:
            assert (await served.add(make_sequence(1)).wait()).reason is FinishReason.ERROR
            assert (await served.add(make_sequence(2)).wait()).reason is FinishReason.LENGTH

    play(scenario())
    assert is_alive == [False]


def test_a_step_that_fails_while_a_cancel_waits_ends_its_sequence_once():
    async def scenario() -> None:
        gate = Gate(3)
        async with serve(FakeRunner(before=gate, lost_in_launch={3})) as served:
            sink = served.add(make_sequence(1, max_tokens=50))
            await gate.reached.wait()
            served.engine.cancel(1)
            gate.open()
            assert (await sink.wait()).reason is FinishReason.CANCELLED
            await served.add(make_sequence(2)).wait()

    play(scenario())


def test_a_reset_that_fails_ends_all_sequences_with_the_reason():
    async def scenario() -> None:
        runner = FakeRunner(lost_in_launch={2}, can_reset=False)
        async with serve(runner, Policy(max_rows=1)) as served:
            sinks = [served.add(make_sequence(id)) for id in (1, 2, 3)]
            for sink in sinks:
                done = await sink.wait()
                assert done.reason is FinishReason.ERROR
                assert done.error == served.engine.failure
            with pytest.raises(RuntimeError, match="the device is gone"):
                await served.task
            assert "could not be reset: RuntimeError: the device is gone" in done.error
            assert served.engine.num_live == 0

    play(scenario())


def test_a_sequence_added_after_the_engine_has_failed_is_not_left_without_an_end():
    """The promise is «whatever happens, every sink gets exactly one Done»: or it is refused."""

    async def scenario() -> None:
        async with serve(FakeRunner(lost_in_launch={1}, can_reset=False)) as served:
            await served.add(make_sequence(1)).wait()
            with contextlib.suppress(RuntimeError):
                await served.task
            late = RecordingSink()
            try:
                served.engine.add([make_sequence(2)], [late])
            except Exception:
                return
            await turns()
            assert late.is_done

    play(scenario())


# --- abort ------------------------------------------------------------------------------------


def test_an_abort_ends_all_sequences_at_once_even_while_the_device_thread_is_blocked():
    async def scenario() -> None:
        gate = Gate(3)
        async with serve(FakeRunner(before=gate), Policy(max_rows=2)) as served:
            sinks = [served.add(make_sequence(id, max_tokens=50)) for id in (1, 2, 3)]
            await gate.reached.wait()
            sinks.append(served.add(make_sequence(4)))  # a command that no tick has applied yet
            served.engine.abort("shutting down")
            for sink in sinks:  # no turn of the loop was needed
                assert sink.done.reason is FinishReason.ERROR
                assert sink.done.error == "shutting down"
            assert served.engine.num_live == 0
            assert sinks[0].done.usage.num_output == len(sinks[0].text) == 1
            gate.open()
            after = served.add(make_sequence(5))
            assert (await after.wait()).reason is FinishReason.LENGTH
        after_abort = [id for step in served.runner.steps[3:] for id in step.rows]
        assert set(after_abort) == {5}  # the places of the others are free

    play(scenario())


def test_an_abort_without_sequences_is_void():
    async def scenario() -> None:
        async with serve() as served:
            served.engine.abort("nothing")
            await served.add(make_sequence(1)).wait()

    play(scenario())


# --- static batching --------------------------------------------------------------------------


def test_static_batching_waits_for_a_full_batch_while_its_time_is_not_over():
    async def scenario() -> None:
        policy = Policy(max_rows=3, continuous=False)
        async with serve(policy=policy, options=EngineOptions(gather_s=HOUR_S)) as served:
            sinks = [served.add(make_sequence(id)) for id in (1, 2)]
            await turns()
            assert served.runner.steps == []
            sinks.append(served.add(make_sequence(3)))
            for sink in sinks:
                await sink.wait()
            assert served.runner.steps[0].rows == (1, 2, 3)

    play(scenario())


@pytest.mark.parametrize("gather_s", [0.0, 0.01])
def test_static_batching_runs_a_partial_batch_when_its_time_is_over(gather_s: float):
    async def scenario() -> None:
        policy = Policy(max_rows=3, continuous=False)
        async with serve(policy=policy, options=EngineOptions(gather_s=gather_s)) as served:
            for id in (1, 2, 3):  # each batch has its own time
                await served.add(make_sequence(id)).wait()
            assert [len(step.rows) for step in served.runner.steps if step.admitted] == [1, 1, 1]

    play(scenario())


def test_static_batching_cancels_its_timer_when_the_waiting_request_leaves():
    async def scenario() -> None:
        policy = Policy(max_rows=3, continuous=False)
        async with serve(policy=policy, options=EngineOptions(gather_s=HOUR_S)) as served:
            sink = served.add(make_sequence(1))
            await turns()
            served.engine.cancel(1)
            assert (await sink.wait()).reason is FinishReason.CANCELLED
            sinks = [served.add(make_sequence(id)) for id in (2, 3, 4)]
            for sink in sinks:
                await sink.wait()

    play(scenario())


# --- the tick ---------------------------------------------------------------------------------


def test_the_engine_measures_steps_and_sizes_the_prefill_beside_rows():
    """1/1024 s a prompt token and a budget of 72/1024 s: chunks of two tiles beside rows."""

    def device_s(step: Step) -> float:
        return step.num_prefill_tokens / 1024

    async def scenario() -> None:
        policy = Policy(chunk_size=256, first_chunk_budget=8)
        options = EngineOptions(prefill_budget_s=72 / 1024)
        async with serve(FakeRunner(device_s=device_s), policy, options) as served:
            sinks = [served.add(make_sequence(1, 1, 30)), served.add(make_sequence(2, 1000))]
            for sink in sinks:
                await sink.wait()
            sizes = [s.num_prefill_tokens for s in served.runner.steps if 1 in s.rows]
            # No row decodes before the first step; its time is known after the second.
            assert sizes[:5] == [256, 8, 64, 64, 64]

    play(scenario())


def test_a_run_under_debug_logs_no_warning(caplog: pytest.LogCaptureFixture):
    async def scenario() -> None:
        asyncio.get_running_loop().slow_callback_duration = HOUR_S  # a slow machine is no bug
        runner = FakeRunner(lost_in_launch={6})
        async with serve(runner, Policy(max_rows=2)) as served:
            sinks = [served.add(make_sequence(id)) for id in range(6)]
            served.engine.cancel(5)
            for sink in sinks:
                await sink.wait()

    with caplog.at_level(logging.WARNING, "asyncio"):
        play(scenario(), debug=True)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_an_engine_cancelled_with_a_step_in_flight_leaves_a_device_thread_that_closes():
    async def scenario() -> None:
        gate = Gate(2)
        async with serve(FakeRunner(before=gate)) as served:
            served.add(make_sequence(1))
            await gate.reached.wait()
            served.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await served.task
            gate.open()

    play(scenario())
