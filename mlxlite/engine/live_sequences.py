"""The sequences that have not ended: their sinks, their times, and the reports to the observer.

Every sequence's sink is called with exactly one `Finished`, and not again after it. A sink that
raises fails its own sequence alone, and is called once more, with the `Finished` of that failure.
Must never block, and never let a sink's error reach the tick.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Protocol

from mlxlite.engine.sequence import FinishReason, Sequence, Usage
from mlxlite.engine.step import (
    Admission,
    Chunk,
    Command,
    Event,
    Finish,
    Finished,
    Prefilled,
    Scored,
    Sink,
    SinkFailed,
    Token,
)
from mlxlite.errors import trace_of

log = logging.getLogger("mlxlite.engine")


class Observer(Protocol):
    """The receiver of the engine's measurements; `metrics.Metrics` is one. Times are in seconds."""

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
        device_thread_s: float,
        deliver_s: float,
    ) -> None: ...
    def device(self, build_s: float, dispatch_s: float, wait_s: float) -> None: ...
    def times(self, usage: Usage, max_tokens: int) -> None: ...
    def preempted(self) -> None: ...
    def finished(self, reason: str, e2e_s: float, num_prompt: int, num_output: int) -> None: ...


@dataclass(slots=True)
class _Live:
    """One sequence's sink and times."""

    sequence: Sequence
    sink: Sink
    added_at: float
    num_image_bytes: int = 0
    admitted_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    num_output: int = 0
    num_cached: int = 0
    stopping: FinishReason | None = None  # of a requested end: later tokens are overshoot

    def usage(self, now: float) -> Usage:
        admitted_at = self.admitted_at if self.admitted_at is not None else now
        first_at = self.first_at if self.first_at is not None else now
        last_at = self.last_at if self.last_at is not None else first_at
        return Usage(
            num_prompt=len(self.sequence.prompt.tokens),
            num_cached=self.num_cached,
            num_output=self.num_output,
            queue_s=admitted_at - self.added_at,
            prefill_s=max(0.0, first_at - admitted_at),
            decode_s=last_at - first_at,
        )


class LiveSequences:
    """Delivers the scheduler's events to the sinks, with usage and times.

    `command` queues a command for the scheduler. `now` is `perf_counter`'s, in seconds.
    """

    def __init__(self, observer: Observer, command: Callable[[Command], None]) -> None:
        self._observer = observer
        self._command = command
        self._lives: dict[int, _Live] = {}
        self.num_image_bytes = 0  # of the images in their prompts

    def __len__(self) -> int:
        return len(self._lives)

    def __contains__(self, id: int) -> bool:
        return id in self._lives

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._lives))

    def add(self, sequence: Sequence, sink: Sink, now: float, num_image_bytes: int) -> None:
        """`num_image_bytes` are those of its prompt's images, 0 if another choice counts them."""
        self._lives[sequence.id] = _Live(sequence, sink, now, num_image_bytes)
        self.num_image_bytes += num_image_bytes

    def overdue(self, since: float) -> list[int]:
        """The ids of sequences added before `since`."""
        return [id for id, live in self._lives.items() if live.added_at < since]

    def stop(self, id: int, reason: FinishReason) -> None:
        """End a sequence at the next step; unknown ids are ignored."""
        if (live := self._lives.get(id)) is not None:
            live.stopping = reason
            self._command(Finish(id, reason))

    def fail(
        self, id: int, error: str, now: float, reason: FinishReason = FinishReason.ERROR
    ) -> None:
        """End a sequence: for its sink at once, for the scheduler at the next tick."""
        self._command(Finish(id, reason, error))
        self._finished(Finished(id, reason, error), now)

    # --- the scheduler's events ---------------------------------------------------------------

    def admitted(self, admission: Admission, now: float) -> None:
        live = self._lives.get(admission.sequence.id)
        if live is None:
            return
        if live.admitted_at is not None:
            self._observer.preempted()  # counted when it resumes
            return
        live.admitted_at = now
        live.num_cached = admission.hit.num_tokens
        if live.num_cached == admission.num_tokens - 1:  # no chunk follows
            self._prefilled(live, live.num_cached, now)

    def prefilled(self, chunk: Chunk, now: float) -> None:
        live = self._lives.get(chunk.id)
        # A preempted sequence prefills again, but reports progress only before its first token.
        if live is not None and live.first_at is None:
            self._prefilled(live, chunk.stop, now)

    def _prefilled(self, live: _Live, num_computed: int, now: float) -> None:
        if live.sequence.wants_progress:
            self._deliver(live, Prefilled(num_computed, live.usage(now)), now)

    def publish(self, events: SequenceOf[Event], now: float) -> None:
        num_tokens = 0
        for event in events:
            match event:
                case Token():
                    num_tokens += 1
                    self._token(event, now)
                case Scored():
                    live = self._lives.get(event.id)
                    if live is not None and live.stopping is None:
                        self._deliver(live, event, now)
                case Finished():
                    self._finished(event, now)
        if num_tokens:
            self._observer.tokens(num_tokens)

    def _token(self, token: Token, now: float) -> None:
        live = self._lives.get(token.id)
        if live is None or live.stopping is not None:
            return
        live.num_output += 1
        if live.last_at is None:
            live.first_at = now
            self._observer.first_token(now - live.added_at)
            usage = live.usage(now)
            self._observer.prompt_done(usage.num_prompt, usage.queue_s, usage.num_cached)
        else:
            self._observer.token_gap(now - live.last_at)
        live.last_at = now
        if live.sequence.wants_usage:
            token.usage = live.usage(now)
        self._deliver(live, token, now)

    def _deliver(self, live: _Live, output: Token | Scored | Prefilled, now: float) -> None:
        if (error := _error_of(live, output)) is not None:
            self.fail(live.sequence.id, error, now)

    def _finished(self, event: Finished, now: float) -> None:
        """Remove a sequence: the only place that does."""
        live = self._lives.pop(event.id, None)
        if live is None:
            return
        self.num_image_bytes -= live.num_image_bytes
        event = replace(event, usage=live.usage(now))
        reason = event.reason
        if reason is FinishReason.LENGTH and live.stopping is FinishReason.STOP:
            reason = FinishReason.STOP  # the sink requested the end at the last token
        if (error := _error_of(live, event)) is not None:
            reason = FinishReason.ERROR
            with contextlib.suppress(Exception):  # or the client would wait for ever
                live.sink(replace(event, reason=reason, error=error))
        self._observer.finished(
            reason.value, now - live.added_at, event.usage.num_prompt, live.num_output
        )
        if live.admitted_at is not None:
            self._observer.times(event.usage, live.sequence.max_tokens)


def _error_of(live: _Live, output: Token | Scored | Prefilled | Finished) -> str | None:
    """Call a sink; the error for its client if it raised."""
    try:
        live.sink(output)
    except Exception as error:
        log.error("the sink of sequence %d raised: %s", live.sequence.id, trace_of(error))
        is_ours = isinstance(error, SinkFailed)
        return str(error) if is_ours else "the answer could not be written"
    return None
