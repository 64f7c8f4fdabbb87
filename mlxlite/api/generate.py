"""Generation: the outputs of a request's sequences to one answer, streamed or whole."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from mlxlite.api.writers import Choice, Writer
from mlxlite.engine.sequence import FinishReason, Usage
from mlxlite.http.connection import Exchange
from mlxlite.http.errors import APIError, Cause
from mlxlite.output.events import Delta, Done, Output, Progress, Sink

log = logging.getLogger("mlxlite.connection")


class AnswerSink:
    """Where the outputs of one request's sequences go: frames as they come, or one body."""

    def __init__(
        self,
        exchange: Exchange,
        writer: Writer,
        *,
        num_choices: int,
        num_per_prompt: int,
        is_stream: bool,
    ) -> None:
        self._exchange = exchange
        self._writer = writer
        self._is_stream = is_stream
        self._num_per_prompt = num_per_prompt
        self._choices = [Choice() for _ in range(num_choices)]
        self._num_left = num_choices

    def start(self) -> None:
        """A stream's head leaves at once: the client knows that it is in the queue."""
        if self._is_stream:
            self._exchange.start_stream()
            self._exchange.write(self._writer.begin())

    def choice(self, index: int) -> Sink:
        """The sink of one sequence."""
        return partial(self._take, index)

    def _take(self, index: int, output: Output) -> None:
        choice = self._choices[index]
        if self._exchange.is_ended:  # another choice has failed, and this one is on its way out
            return
        match output:
            case Delta() if self._is_stream:
                self._exchange.write(self._writer.delta(index, output))
            case Delta():
                choice.take(output)
            case Progress() if self._is_stream:
                self._exchange.write(self._writer.progress(index, output))
            case Done():
                choice.done = output
                self._num_left -= 1
                self._log(output)
                self._done(index, output)

    def _done(self, index: int, done: Done) -> None:
        """One choice has ended; with the last one, or the first that failed, the answer does."""
        has_failed = done.reason is FinishReason.ERROR
        is_last = self._num_left == 0 or has_failed
        total = None
        if self._num_left == 0:
            dones = [choice.done for choice in self._choices if choice.done is not None]
            total = total_usage(dones, self._num_per_prompt)
        is_told = False
        try:
            self._tell(index, done, total, has_failed=has_failed)
            is_told = True
        finally:  # if even the error could not be written, too
            if has_failed or (is_last and is_told):
                if not is_told:
                    self._exchange.abandon(failure(done))
                elif self._is_stream:
                    self._exchange.end_stream()
                self._exchange.end()

    def _tell(self, index: int, done: Done, total: Usage | None, *, has_failed: bool) -> None:
        """What a choice's end looks like; `total` is there with the last one."""
        if self._is_stream and has_failed:
            self._exchange.write(self._writer.fail(failure(done)))
        elif self._is_stream:
            self._exchange.write(self._writer.done(index, done, total))
        elif has_failed:
            self._exchange.fail(failure(done))
        elif total is not None:
            self._exchange.respond(200, self._writer.whole(self._choices, total))

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


def context_exceeded(num_prompt: int, context_size: int, param: str = "messages") -> APIError:
    """The form that the launching app, llama-server's clients and LiteLLM each recognise."""
    message = (
        f"the request exceeds the available context size. This model's maximum context length is "
        f"{context_size} tokens, and the prompt has {num_prompt}; the answer needs at least one."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": context_size}
    return APIError(Cause.CONTEXT_EXCEEDED, message, param=param, extra=extra)


def failure(done: Done) -> APIError:
    """A sequence that ended with an error, as an error answer."""
    return APIError(Cause.MODEL_FAILED, done.error or "the model failed")


def total_usage(dones: Sequence[Done], num_per_prompt: int | None = None) -> Usage:
    """One answer's usage: a prompt counts once, whatever the number of its choices (all)."""
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
