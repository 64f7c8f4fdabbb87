"""One request's answer: the events of its generations, written to its exchange.

Streamed or not, an answer is made of the same events: as frames while they come, or folded into one
body. It ends with its last choice, or with the first that fails.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from mlxlite.api.writers import Collected, Writer
from mlxlite.engine.engine import QUEUE_FULL
from mlxlite.engine.sequence import FinishReason, PromptLogprobs, Usage
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, ErrorKind, retry_later
from mlxlite.output.events import Done, Event

log = logging.getLogger("mlxlite.api")


class Answer:
    """Writes as many choices as `num_choices`, of which each prompt has `num_per_prompt`."""

    def __init__(
        self,
        exchange: Exchange,
        writer: Writer,
        num_choices: int,
        *,
        num_per_prompt: int,
        is_stream: bool,
    ) -> None:
        self._exchange = exchange
        self._writer = writer
        self._is_stream = is_stream
        self._num_per_prompt = num_per_prompt
        self._choices = [Collected() for _ in range(num_choices)]
        self._num_left = num_choices

    def start(self) -> None:
        """Write a stream's head at once: it shows the client that the request is queued."""
        if self._is_stream:
            self._exchange.heartbeat = self._writer.beat
            self._exchange.start_stream()
            self._exchange.write(self._writer.begin())

    def choice(self, index: int) -> Callable[[Event], None]:
        return partial(self._take, index)

    def _take(self, index: int, event: Event) -> None:
        if self._exchange.is_ended:  # another choice has failed, and this one is being cancelled
            return
        if isinstance(event, Done):
            self._choices[index].take(event)
            self._num_left -= 1
            self._log(event)
            self._done(index, event)
        elif self._is_stream:
            self._exchange.write(self._writer.event(index, event))
        elif isinstance(event, PromptLogprobs):
            self._writer.event(index, event)  # which keeps them as JSON
        else:
            self._choices[index].take(event)

    def _done(self, index: int, done: Done) -> None:
        if done.error is not None:
            self._fail(failure(done))
            return
        total = None
        if self._num_left == 0:
            dones = [choice.done for choice in self._choices if choice.done is not None]
            total = total_usage(dones, self._num_per_prompt)
        if self._is_stream:
            self._exchange.write(self._writer.done(index, done, total))
        elif total is not None:
            self._exchange.respond(200, self._writer.whole(self._choices, total))
        if total is not None:
            self._end()

    def _fail(self, error: APIError) -> None:
        try:
            if self._is_stream:
                self._exchange.write(self._writer.fail(error))
            else:
                self._exchange.fail(error)
        except Exception:  # not even the error could be written
            self._exchange.abandon(error)
            self._exchange.end()
            raise
        self._end()

    def _end(self) -> None:
        if self._is_stream:
            self._exchange.end_stream()
        self._exchange.end()

    def _log(self, done: Done) -> None:
        usage = done.usage
        log.info(
            "%s in %d (+%d cached) queue %.2fs ttft %.2fs out %d itl %.0fms %s",
            self._exchange.request_id,
            usage.num_prompt - usage.num_cached,
            usage.num_cached,
            usage.queue_s,
            usage.queue_s + usage.prefill_s,
            usage.num_output,
            usage.decode_s * 1000 / max(1, usage.num_output - 1),
            done.reason.value,
        )


def queue_full() -> APIError:
    return retry_later(ErrorKind.QUEUE_FULL, QUEUE_FULL, retry_after_s=1)


def failure(done: Done) -> APIError:
    if done.reason is FinishReason.DISPLACED:
        return queue_full()
    return APIError(ErrorKind.MODEL_FAILED, done.error or "the model failed")


def total_usage(dones: Sequence[Done], num_per_prompt: int | None = None) -> Usage:
    """One answer's usage: a prompt counts once, for all of its choices."""
    usages = [done.usage for done in dones]
    prompts = usages[:: num_per_prompt or len(usages)]
    return replace(
        usages[0],
        num_prompt=sum(usage.num_prompt for usage in prompts),
        num_cached=sum(usage.num_cached for usage in prompts),
        num_output=sum(usage.num_output for usage in usages),
        num_reasoning=sum(usage.num_reasoning for usage in usages),
        decode_s=max(usage.decode_s for usage in usages),
    )
