"""The tick: commands in, a step out to the lane, tokens back, text to the sinks.

One task on the event loop drives the scheduler; one thread, the lane, runs every line that touches
MLX. A tick hops to the lane once: the runner dispatches the next step and then waits for the one
before it, so the device computes while Python publishes (one step of lookahead).

The engine decides nothing about who runs (that is the scheduler's) and nothing about bytes (that is
the server's). It owns what belongs to one sequence and to neither of them: the text so far, the
stop strings, the times. It must never block the loop, and never lose a sequence: whatever happens
to a step, every sink gets exactly one `Done`, and nothing after it (tested).
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from mlxlite.engine.chunk_budget import ChunkTuner
from mlxlite.engine.device_thread import Lane
from mlxlite.engine.embeddings import Embedder
from mlxlite.engine.scheduler import Scheduler
from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence, Usage
from mlxlite.engine.step import (
    Add,
    ClearCache,
    CloseBatch,
    Command,
    Event,
    Finish,
    Finished,
    Launched,
    Load,
    Lost,
    Outcome,
    Runner,
    SetChunkBudget,
    Step,
    Token,
)
from mlxlite.errors import told, trace_of
from mlxlite.output.detokenizer import TextStream
from mlxlite.output.events import Delta, Detokenizer, Done, Output, Progress, Sink
from mlxlite.output.harmony import AnyChannels
from mlxlite.output.markers import Piece
from mlxlite.output.stop_strings import LoopGuard
from mlxlite.prefix_cache.operations import CacheStats

log = logging.getLogger("mlxlite.engine")

# Of pictures, as their vision towers read them, in all live sequences; one request may have more.
MAX_IMAGE_BYTES = 1 << 30


class Observer(Protocol):
    """What the engine reports of itself; `metrics.Metrics` is one. Times are in seconds."""

    def queued(self, n: int) -> None: ...
    def running(self, n: int) -> None: ...
    def prompt_done(self, num_tokens: int, queue_s: float, num_cached: int = 0) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def tokens(self, num: int) -> None: ...
    def token_gap(self, seconds: float) -> None: ...
    def step(
        self,
        num_rows: int,
        num_prefill_tokens: int,
        schedule_s: float,
        lane_s: float,
        deliver_s: float,
    ) -> None: ...
    def lane(self, build_s: float, dispatch_s: float, wait_s: float) -> None: ...
    def times(self, usage: Usage, max_tokens: int) -> None: ...
    def preempted(self) -> None: ...
    def finished(self, reason: str, e2e_s: float, num_prompt: int, num_output: int) -> None: ...


class EngineFailed(Exception):
    """The model is lost; the message says why."""


class QueueFull(Exception):
    """The waiting line has no place; try again later."""


@dataclass(slots=True)
class _Live:
    """A sequence that has not had its `Done`: its text, its sink, its times."""

    sequence: Sequence
    sink: Sink
    text: TextStream
    added_at: float
    admitted_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    num_output: int = 0
    num_cached: int = 0
    logprobs: list[tuple[int, Logprobs]] = field(default_factory=list)
    is_leaving: bool = False  # it has been told to end: what still comes is overshoot
    is_deaf: bool = False  # its sink has raised
    guard: LoopGuard | None = None
    has_looped: bool = False  # the guard has ended it
    wants_progress: bool = False  # of its prompt
    image_bytes: int = 0  # of its prompt, unless an earlier choice has them
    wants_usage: bool = False  # in each delta
    channels: AnyChannels | None = None  # None: all text is content
    num_reasoning: int = 0
    fault: str | None = None  # why its tokens cannot be made text

    def push(self, token: int, now: float) -> list[Delta]:
        """What one more token lets be told."""
        text = self.text.push(token)
        return self.deltas(text, now) if text else []

    def flush(self, now: float, *, is_whole: bool) -> list[Delta]:
        """What was held back, where the answer has come to its end."""
        return self.deltas(self.text.flush() if is_whole else "", now, is_last=True)

    def deltas(self, text: str, now: float, *, is_last: bool = False) -> list[Delta]:
        """More text by channels; the first delta has the logprobs since the last one."""
        pieces = [Piece(text=text)] if text else []
        if self.channels is not None:
            pieces = self.channels.push(text)
            pieces += self.channels.flush() if is_last else []
        if not pieces and is_last and self.logprobs:
            pieces = [Piece()]
        deltas = []
        for piece in pieces:
            logprobs, self.logprobs = tuple(self.logprobs), []
            usage = self.usage(now) if self.wants_usage else None
            told = (piece.channel, piece.calls, piece.part)
            deltas.append(Delta(piece.text, self.num_output, logprobs, usage, *told))
        return deltas

    def usage(self, now: float) -> Usage:
        admitted_at = self.admitted_at if self.admitted_at is not None else now
        first_at = self.first_at if self.first_at is not None else now
        last_at = self.last_at if self.last_at is not None else first_at
        return Usage(
            num_prompt=len(self.sequence.prompt.tokens),
            num_cached=self.num_cached,
            num_output=self.num_output,
            num_reasoning=self.num_reasoning,
            queue_s=admitted_at - self.added_at,
            prefill_s=max(0.0, first_at - admitted_at),
            decode_s=last_at - first_at,
        )


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds and times; `gather_s` is static batching's gathering time."""

    max_queue: int = 256  # sequences that may wait
    gather_s: float = 0.1
    prefill_budget_s: float = 0.1
    timeout_s: float | None = None  # from a sequence's arrival to its end
    stuck_s: float = 60.0  # a step that takes longer is reported as stuck
    guard: int = 0  # tokens of repetition that end an answer; 0: none does


class Engine:
    """Drives one runner. Every method but `run` is synchronous and belongs to the loop thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        detokenize: Detokenizer,
        *,
        lane: Lane,
        observer: Observer,
        options: EngineOptions | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._detokenize = detokenize
        self._lane = lane
        self._observer = observer
        self._options = options or EngineOptions()
        self._commands: deque[Command] = deque()
        self._live: dict[int, _Live] = {}
        self._image_bytes = 0  # in their prompts
        self._wake = asyncio.Event()
        self.rests = asyncio.Event()  # set whenever there is nothing left to do
        self._loop = asyncio.get_running_loop()
        self.embedder = Embedder(lane, runner)
        self._tuner = ChunkTuner(self._options.prefill_budget_s)
        self._gather_since: float | None = None
        self._lane_since: float | None = None  # when the step that the lane is at was handed over
        self.failure: str | None = None  # why the engine has stopped for good

    def __repr__(self) -> str:
        return f"<Engine live={len(self._live)} failure={self.failure!r} {self._scheduler!r}>"

    @property
    def num_live(self) -> int:
        return len(self._live)

    # --- from the server --------------------------------------------------------------------

    def add(
        self,
        sequences: SequenceOf[Sequence],
        stop: tuple[str, ...],
        sinks: SequenceOf[Sink],
        *,
        wants_progress: bool = False,
        wants_usage: bool = False,
        listen: Callable[[], AnyChannels] | None = None,
    ) -> None:
        """Queue one request's sequences; each one's sink is called from now on until its `Done`.

        Choices share one `Prompt` object: its images are counted, and its progress is reported,
        with the first of them only. Raises QueueFull, and queues none of them, when `max_queue`
        would be exceeded or there are too many pictures, and EngineFailed when the engine has
        stopped for good.
        """
        if self.failure is not None:
            raise EngineFailed(self.failure)
        num_waiting = self._scheduler.num_waiting + sum(isinstance(c, Add) for c in self._commands)
        if num_waiting + len(sequences) > self._options.max_queue:
            raise QueueFull
        firsts = {id(s.prompt): s for s in reversed(sequences)}.values()
        image_bytes = {s.id: sum(image.num_bytes for image in s.prompt.images) for s in firsts}
        num_bytes = sum(image_bytes.values())
        if self._image_bytes and num_bytes and self._image_bytes + num_bytes > MAX_IMAGE_BYTES:
            raise QueueFull
        now = perf_counter()
        lives: list[_Live] = []
        for sequence, sink in zip(sequences, sinks, strict=True):
            text = TextStream(self._detokenize, stop, sequence.prompt.tokens)  # may raise
            live = _Live(sequence, sink, text, now)
            live.wants_progress = wants_progress and sequence.id in image_bytes
            live.wants_usage = wants_usage
            live.image_bytes = image_bytes.get(sequence.id, 0)
            live.channels = listen() if listen is not None else None
            live.guard = LoopGuard(self._options.guard) if self._options.guard else None
            lives.append(live)
        self._image_bytes += num_bytes
        for live in lives:
            self._live[live.sequence.id] = live
            self._command(Add(live.sequence))

    def cancel(self, id: int) -> None:
        """End a sequence at the next step; its sink still gets a `Done`. Unknown ids are void."""
        if id in self._live:
            self._live[id].is_leaving = True
            self._command(Finish(id, FinishReason.CANCELLED))

    @property
    def load(self) -> Load:
        """How much there is to do, and how much memory it takes."""
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
        """The prefix cache in numbers."""
        return self._scheduler.prefix.stats

    def clear_cache(self) -> None:
        """Forget all prefixes, at the next step."""
        self._command(ClearCache())

    def command_from_thread(self, command: Command) -> None:
        """What the prefix cache's files have to say; void once the loop is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._command, command)

    def abort(self, error: str) -> None:
        """End every sequence now, without waiting for the device: the process is going away."""
        for id in list(self._live):
            self._end(id, error, perf_counter())

    def expire(self, now: float) -> None:
        """End the sequences that have been here longer than `timeout_s`."""
        limit_s = self._options.timeout_s
        if limit_s is None:
            return
        for id, live in list(self._live.items()):
            if now - live.added_at > limit_s:
                self._end(id, f"the request took longer than {limit_s:g} s", now)

    def _end(self, id: int, error: str, now: float) -> None:
        """Tell the sink at once, whatever the lane is at, and the scheduler at the next tick."""
        self._command(Finish(id, FinishReason.ERROR, error))
        self._done(Finished(id, FinishReason.ERROR, error), now)

    def trouble(self, now: float) -> str | None:
        """Why nobody is being served, if so: the engine has failed, or the lane is stuck."""
        if self.failure is not None or self._lane_since is None:
            return self.failure
        since_s = now - self._lane_since
        is_stuck = since_s > self._options.stuck_s
        return f"the model has not answered for {since_s:.0f} s" if is_stuck else None

    def _command(self, command: Command) -> None:
        self._commands.append(command)
        self._wake.set()

    # --- the tick ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Tick until cancelled. Each line's place is part of the design:

        1. commands before the step, so that a cancel or an arrival is in the very next one;
        2. the step to the lane before tokens to the sinks: their bytes leave while the device
           computes, and it never waits for them. A stop string therefore overshoots by two rows; an
           end-of-sequence token, which the scheduler sees at once, by one;
        3. the wait last; the lane has by then dispatched the step and waits for the one before.
           Where that launch is as slow as a step, one that brings first tokens is waited for alone.
        """
        in_flight: Launched | None = None
        events: list[Event] = []
        while True:
            started_at = perf_counter()
            events += self._apply_commands()
            step = None if self._is_awaited(in_flight) else self._scheduler.schedule()
            if step is None and in_flight is None:
                self._publish(events, started_at)
                events = []
                if not self._commands:
                    await self._idle()
                continue
            self._note_admitted(step, started_at)
            self._lane_since = scheduled_at = perf_counter()
            call = self._lane.submit(self._runner.advance, step, in_flight)
            self._publish(events, started_at)
            events = []
            published_at = perf_counter()
            try:
                launched, outcome = await call
            except Exception as error:
                in_flight = None
                await self._lose_step(error)
                continue
            self._lane_since = None
            if in_flight is not None and outcome is not None:
                events = self._complete(in_flight.step, outcome)
                self._observer.lane(outcome.build_s, outcome.dispatch_s, outcome.wait_s)
                self._observe(in_flight.step, started_at, scheduled_at, published_at)
            in_flight = launched

    def _is_awaited(self, in_flight: Launched | None) -> bool:
        """Whether a step brings first tokens, which a slow launch of the next would hold up."""
        if in_flight is None or not self._runner.is_slow_to_launch:
            return False
        return bool(in_flight.step.chunks and in_flight.step.rows)

    def _apply_commands(self) -> list[Event]:
        events: list[Event] = []
        while self._commands:
            events += self._scheduler.apply(self._commands.popleft())
        return events

    async def _idle(self) -> None:
        """Nothing to launch: sleep until a command comes or static batching's time is over."""
        self._observer.queued(self._scheduler.num_waiting)
        self._observer.running(self._scheduler.num_running)
        self._wake.clear()
        if not self._scheduler.is_gathering:
            self._gather_since = None
            self.rests.set()
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
        num_tokens = self._tuner.measure(step, outcome.device_s)
        if num_tokens is not None:
            self._command(SetChunkBudget(num_tokens))
        for chunk in step.chunks:
            live = self._live.get(chunk.id)
            # A preempted one computes its prompt again, and its tokens, but has begun to answer.
            if live is not None and live.wants_progress and live.first_at is None:
                self._emit(live, Progress(chunk.stop, live.usage(perf_counter())))
        return self._scheduler.complete(step, outcome)

    async def _lose_step(self, error: Exception) -> None:
        """A whole step is lost: end what ran, keep what waits, go on with a clean runner."""
        log.exception("a step failed; its sequences end with an error", exc_info=error)
        self._lane_since = None
        self._command(Lost(f"the model failed: {told(error)}"))
        try:
            await self._lane.run(self._runner.reset)
        except Exception as reset_error:  # the runner cannot be trusted any more
            self.failure = f"the model failed and could not be reset: {told(reset_error)}"
            log.exception("%s", self.failure, exc_info=reset_error)
            self.abort(self.failure)
            raise

    # --- events to outputs ------------------------------------------------------------------

    def _note_admitted(self, step: Step | None, now: float) -> None:
        for admission in step.admitted if step else ():
            self._gather_since = None
            live = self._live.get(admission.sequence.id)
            if live is not None and live.admitted_at is not None:
                self._observer.preempted()  # it has given way before
            elif live is not None:
                live.admitted_at = now
                live.num_cached = admission.hit.num_tokens
                is_all_there = live.num_cached == admission.num_tokens - 1
                if live.wants_progress and is_all_there:
                    self._emit(live, Progress(live.num_cached, live.usage(now)))

    def _publish(self, events: list[Event], now: float) -> None:
        num_tokens = 0
        for event in events:
            match event:
                case Token():
                    num_tokens += 1
                    if live := self._live.get(event.id):
                        self._token(live, event, now)
                case Finished():
                    self._done(event, now)
        if num_tokens:
            self._observer.tokens(num_tokens)

    def _token(self, live: _Live, event: Token, now: float) -> None:
        if live.is_leaving:
            return
        live.num_output += 1
        live.num_reasoning += live.channels is not None and live.channels.is_reasoning
        if live.last_at is None:
            live.first_at = now
            self._observer.first_token(now - live.added_at)
            queue_s = (live.admitted_at or now) - live.added_at
            num_prompt = len(live.sequence.prompt.tokens)
            self._observer.prompt_done(num_prompt, queue_s, live.num_cached)
        else:
            self._observer.token_gap(now - live.last_at)
        live.last_at = now
        if event.is_eos or live.text.stopped is not None:
            return
        if live.guard is not None and live.guard.push(event.token):
            live.has_looped = live.is_leaving = True
            self._command(Finish(live.sequence.id, FinishReason.LENGTH))
        if event.logprobs is not None:
            live.logprobs.append((event.token, event.logprobs))
        deltas = self._read(live, lambda: live.push(event.token, now))
        if live.fault is not None:
            self._end(live.sequence.id, live.fault, now)
            return
        for delta in deltas:
            self._emit(live, delta)
        has_called = live.channels is not None and live.channels.is_complete
        if live.text.stopped is not None or has_called:
            live.is_leaving = True
            self._command(Finish(live.sequence.id, FinishReason.STOP))

    def _read(self, live: _Live, read: Callable[[], list[Delta]]) -> list[Delta]:
        """Text, by the tokenizer and the tools' parser: what they raise costs one sequence."""
        try:
            return read()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            log.error("no text for sequence %d: %s", live.sequence.id, trace_of(error))
            live.fault = f"the tokens could not be made text ({type(error).__name__})"
            return []

    def _emit(self, live: _Live, output: Output) -> None:
        """Call a sink, which must not raise; one that does costs its own sequence only."""
        if live.is_deaf:
            return
        try:
            live.sink(output)
        except Exception as fault:
            log.error("the sink of sequence %d raised: %s", live.sequence.id, trace_of(fault))
            live.is_deaf = True
            self.cancel(live.sequence.id)
            error = "the answer could not be written"
            with contextlib.suppress(Exception):  # whoever waits for it should not wait for ever
                live.sink(Done(FinishReason.ERROR, live.usage(perf_counter()), error))

    def _done(self, event: Finished, now: float) -> None:
        """The one place where a sequence leaves: its last text, then its `Done`."""
        live = self._live.pop(event.id, None)
        if live is None:
            return
        self._image_bytes -= live.image_bytes
        is_whole = event.reason in (FinishReason.STOP, FinishReason.LENGTH)
        for delta in self._read(live, lambda: live.flush(now, is_whole=is_whole)):
            self._emit(live, delta)
        reason, error = event.reason, event.error
        if live.fault is not None:
            reason, error = FinishReason.ERROR, live.fault
        if reason is FinishReason.LENGTH and live.text.stopped is not None:
            reason = FinishReason.STOP  # the stop string was met in the very last token
        usage = live.usage(now)
        stop = live.text.stopped or ("repetition" if live.has_looped else None)
        num_calls = live.channels.num_calls if live.channels is not None else 0
        self._emit(live, Done(reason, usage, error, stop, num_calls))
        self._observer.finished(
            reason.value, now - live.added_at, usage.num_prompt, usage.num_output
        )
        if live.admitted_at is not None:
            self._observer.times(usage, live.sequence.max_tokens)

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
