"""The tick: commands in, a step to the device thread, the last step's tokens out to the sinks.

One task on the event loop drives the scheduler; one thread, the device thread, runs all code that
touches MLX. A tick crosses to the device thread once: the runner dispatches the next step and then
waits for the one before it, so the device computes while Python publishes (one step of lookahead).

The engine does not decide which sequences run (the scheduler does) and handles no text (the sinks
do). It must never block the loop, and never lose a sequence: every sink is called with exactly one
`Finished`, and not again after it (tested).
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter

from mlxlite.engine.chunk_budget import ChunkLimit, ChunkTuner
from mlxlite.engine.device_thread import DeviceThread
from mlxlite.engine.embeddings import Embedder
from mlxlite.engine.fair_queue import displaced
from mlxlite.engine.live_sequences import LiveSequences, Observer
from mlxlite.engine.scheduler import Scheduler
from mlxlite.engine.sequence import FinishReason, Sequence
from mlxlite.engine.step import (
    Add,
    ClearCache,
    CloseBatch,
    Command,
    Event,
    Launched,
    Load,
    Outcome,
    Runner,
    SetChunkLimit,
    Sink,
    Step,
    StepFailed,
)
from mlxlite.errors import summary_of
from mlxlite.prefix_cache.operations import CacheStats

log = logging.getLogger("mlxlite.engine")
# Of the vision towers' inputs, in all live sequences; a single request may have more.
MAX_IMAGE_BYTES = 1 << 30
QUEUE_FULL = "the request queue is full; try again later"


class EngineFailed(Exception):
    """The engine has stopped for good; the message is the reason."""


class QueueFull(Exception):
    """The waiting line is full; try again later."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds and times; `gather_s` is static batching's gathering time."""

    max_queue: int = 256  # sequences that may wait
    gather_s: float = 0.1
    prefill_budget_s: float = 0.1
    timeout_s: float | None = None  # from a sequence's arrival to its end
    stuck_s: float = 60.0  # a step that takes longer is reported as stuck


class Engine:
    """Drives one runner. Every method but `run` is synchronous and belongs to the loop thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        device_thread: DeviceThread,
        observer: Observer,
        options: EngineOptions | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._device_thread = device_thread
        self._observer = observer
        self._options = options or EngineOptions()
        self._commands: deque[Command] = deque()
        self._live = LiveSequences(observer, self._command)
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.embedder = Embedder(device_thread, runner)
        self._tuner = ChunkTuner(self._options.prefill_budget_s)
        self._chunk_limit = ChunkLimit(runner.memory.work_bytes)
        self._gather_since: float | None = None
        self._busy_since: float | None = None  # when the current step was submitted
        self.failure: str | None = None  # the reason of a permanent stop

    def __repr__(self) -> str:
        return f"<Engine live={len(self._live)} failure={self.failure!r} {self._scheduler!r}>"

    @property
    def num_live(self) -> int:
        return len(self._live)

    # --- from the server --------------------------------------------------------------------

    def add(self, sequences: SequenceOf[Sequence], sinks: SequenceOf[Sink]) -> None:
        """Queue one request's sequences; each one's sink is called until its `Finished`.

        Choices share one `Prompt` object, whose images are counted with the first of them only.
        Raises QueueFull, and queues none of them, when `max_queue` would be exceeded and no others
        are displaced, or there are too many images, and EngineFailed when the engine has stopped
        for good.
        """
        if self.failure is not None:
            raise EngineFailed(self.failure)
        firsts = {id(sequence.prompt): sequence.id for sequence in reversed(sequences)}
        sizes = {
            s.id: sum(image.num_bytes for image in s.prompt.images)
            for s in sequences
            if firsts[id(s.prompt)] == s.id
        }
        num_held, num_bytes = self._live.num_image_bytes, sum(sizes.values())
        if num_held and num_bytes and num_held + num_bytes > MAX_IMAGE_BYTES:
            raise QueueFull
        now = perf_counter()
        self._make_room(sequences, now)
        for sequence, sink in zip(sequences, sinks, strict=True):
            self._live.add(sequence, sink, now, sizes.get(sequence.id, 0))
            self._command(Add(sequence))

    def _make_room(self, arrivals: SequenceOf[Sequence], now: float) -> None:
        """End the waiting sequences that arrivals displace. Raises QueueFull."""
        added = [command.sequence for command in self._commands if isinstance(command, Add)]
        num_free = self._options.max_queue - self._scheduler.num_waiting - len(added)
        if num_free >= len(arrivals):
            return
        waiting = self._scheduler.waiting() + added
        live = [sequence for sequence in waiting if sequence.id in self._live]
        num_free += len(waiting) - len(live)  # have ended since the last tick
        leaving = displaced(arrivals, live, num_free)
        if leaving is None:
            raise QueueFull
        for sequence in leaving:
            self._live.fail(sequence.id, QUEUE_FULL, now, FinishReason.DISPLACED)

    def finish(self, id: int, reason: FinishReason) -> None:
        """End a sequence at the next step; its sink gets no more tokens. Ignores unknown ids."""
        self._live.stop(id, reason)

    def cancel(self, id: int) -> None:
        self.finish(id, FinishReason.CANCELLED)

    @property
    def load(self) -> Load:
        scheduler = self._scheduler
        return Load(
            scheduler.num_waiting,
            scheduler.num_running,
            scheduler.num_bytes,
            self._runner.memory.budget_bytes,
            scheduler.num_steps,
        )

    @property
    def cache_stats(self) -> CacheStats:
        return self._scheduler.prefix.stats

    def clear_cache(self) -> None:
        """Drop all cached prefixes, at the next step."""
        self._command(ClearCache())

    def command_from_thread(self, command: Command) -> None:
        """A command of the prefix cache's disk thread; ignored once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._command, command)

    def abort(self, error: str) -> None:
        """End every sequence now, without waiting for the device: the process is stopping."""
        for id in self._live:
            self._live.fail(id, error, perf_counter())

    def expire(self, now: float) -> None:
        """End the sequences that are older than `timeout_s`."""
        limit_s = self._options.timeout_s
        if limit_s is None:
            return
        for id in self._live.overdue(now - limit_s):
            self._live.fail(id, f"the request took longer than {limit_s:g} s", now)

    def unhealthy_reason(self, now: float) -> str | None:
        """Why the engine has failed, or the device thread is stuck; None if neither."""
        if self.failure is not None or self._busy_since is None:
            return self.failure
        since_s = now - self._busy_since
        is_stuck = since_s > self._options.stuck_s
        return f"the model has not answered for {since_s:.0f} s" if is_stuck else None

    def _command(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    # --- the tick ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled. Each line's place is part of the design:

        1. commands before the step, so that a cancel or an arrival is in the very next one;
        2. the step to the device thread before tokens to the sinks: their bytes leave while the
           device computes, and it never waits for them. A stop string therefore overshoots by two
           rows; an end-of-sequence token, which the scheduler sees at once, by one;
        3. the wait last: the device thread has dispatched the step and waits for the one before.
        """
        in_flight: Launched | None = None
        events: list[Event] = []
        while True:
            started_at = perf_counter()
            events += self._apply_commands()
            step = self._scheduler.schedule()
            if step is None and in_flight is None:
                self._live.publish(events, started_at)
                events = []
                if not self._commands:
                    await self._idle()
                continue
            self._note_admitted(step, started_at)
            self._busy_since = scheduled_at = perf_counter()
            call = self._device_thread.submit(self._runner.advance, step, in_flight)
            self._live.publish(events, started_at)
            events = []
            published_at = perf_counter()
            try:
                launched, outcome = await call
            except Exception as error:
                in_flight = None
                await self._lose_step(error)
                continue
            self._busy_since = None
            if in_flight is not None and outcome is not None:
                events = self._complete(in_flight.step, outcome)
                self._observer.device(outcome.build_s, outcome.dispatch_s, outcome.wait_s)
                self._observe(in_flight.step, started_at, scheduled_at, published_at)
            in_flight = launched

    def _apply_commands(self) -> list[Event]:
        events: list[Event] = []
        while self._commands:
            events += self._scheduler.apply(self._commands.popleft())
        return events

    async def _idle(self) -> None:
        """Sleep until a command comes, or until static batching's gathering time is over."""
        self._observer.queued(self._scheduler.num_waiting)
        self._observer.running(self._scheduler.num_running)
        self._wake.clear()
        if not self._scheduler.is_gathering:
            self._gather_since = None
            await self._wake.wait()
            return
        self._gather_since = self._gather_since or perf_counter()
        left_s = self._gather_since + self._options.gather_s - perf_counter()
        try:
            await asyncio.wait_for(self._wake.wait(), max(0.0, left_s))
        except TimeoutError:
            self._gather_since = None
            self._command(CloseBatch())

    def _complete(self, step: Step, outcome: Outcome) -> list[Event]:
        budget = self._tuner.measure(step, outcome.device_s)
        if budget is not None:
            self._command(budget)
        num_tokens = self._chunk_limit.measure(outcome.token_bytes)
        if num_tokens is not None:
            self._command(SetChunkLimit(num_tokens))
        for chunk in step.chunks:
            self._live.prefilled(chunk, perf_counter())
        return self._scheduler.complete(step, outcome)

    async def _lose_step(self, error: Exception) -> None:
        """A step failed: end the running sequences, keep the waiting ones, reset the runner."""
        log.exception("a step failed; its sequences end with an error", exc_info=error)
        self._busy_since = None
        self._command(StepFailed(f"the model failed: {summary_of(error)}"))
        try:
            await self._device_thread.run(self._runner.reset)
        except Exception as reset_error:  # the runner's state is unknown now
            self.failure = f"the model failed and could not be reset: {summary_of(reset_error)}"
            log.exception("%s", self.failure, exc_info=reset_error)
            self.abort(self.failure)
            raise

    def _note_admitted(self, step: Step | None, now: float) -> None:
        for admission in step.admitted if step else ():
            self._gather_since = None
            self._live.admitted(admission, now)

    def _observe(
        self, step: Step, started_at: float, scheduled_at: float, published_at: float
    ) -> None:
        self._observer.queued(self._scheduler.num_waiting)
        self._observer.running(self._scheduler.num_running)
        self._observer.step(
            len(step.rows),
            step.num_prefill_tokens,
            scheduled_at - started_at,
            perf_counter() - scheduled_at,
            published_at - scheduled_at,
        )
