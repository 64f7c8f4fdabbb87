"""A generation: one sequence's tokens to the events of its answer. The engine's sink.

    token ─▶ Detokenizer (whole characters) ─▶ StopStrings ─▶ OutputParser ─▶ events ─▶ write

It ends an answer early: at a stop string, with the last call allowed, or when the text repeats
itself. Each stage holds back as little as it can, so all of a step's text leaves with the step. It
must never block, and emits nothing after `Done`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence, Usage
from mlxlite.engine.step import Finished, Prefilled, SinkFailed, Token
from mlxlite.output.detokenizer import Detokenize, Detokenizer
from mlxlite.output.events import Done, Event, ParserEvent, Progress, TextDelta
from mlxlite.output.parser import OutputParser
from mlxlite.output.stop_strings import RepetitionGuard, StopStrings

REPETITION = "repetition"  # the `stop` of an answer that the guard has ended


class Generation:
    """An `engine.step.Sink`: one choice of an answer.

    `write` takes the events; `finish` ends the sequence at the next step. Without a `parser` all
    text is content. `guard` is the number of repeated tokens that end an answer, 0 for no limit.
    The constructor raises the errors of `detokenize`.
    """

    def __init__(
        self,
        sequence: Sequence,
        *,
        detokenize: Detokenize,
        write: Callable[[Event], None],
        finish: Callable[[FinishReason], None],
        stop: tuple[str, ...] = (),
        parser: OutputParser | None = None,
        guard: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(detokenize, sequence.prompt.tokens)
        self._stop_strings = StopStrings(stop)
        self._parser = parser
        self._guard = RepetitionGuard(guard)
        self._write = write
        self._end = finish
        self._wants_usage = sequence.wants_usage
        self._logprobs: list[tuple[int, Logprobs]] = []  # since the last event
        self._num_reasoning = 0  # tokens
        self._has_looped = False
        self._has_failed = False

    def __call__(self, output: Token | Prefilled | Finished) -> None:
        """Raises SinkFailed for tokens without a text, and the errors of `write`."""
        try:
            match output:
                case Token():
                    self._token(output)
                case Prefilled(num_computed, usage):
                    self._write(Progress(num_computed, usage))
                case Finished():
                    self._finished(output)
        except Exception:
            self._has_failed = True
            raise

    def _token(self, token: Token) -> None:
        parser = self._parser
        self._num_reasoning += parser is not None and parser.is_reasoning
        if token.is_eos:
            return
        if token.logprobs is not None:
            self._logprobs.append((token.token, token.logprobs))
        self._emit(_read(self._push, token.token), token.usage)
        if self._stop_strings.met is not None or (parser is not None and parser.is_complete):
            self._end(FinishReason.STOP)
        elif self._guard.push(token.token):
            self._has_looped = True
            self._end(FinishReason.LENGTH)

    def _finished(self, finished: Finished) -> None:
        usage, reason = self._with_reasoning(finished.usage), finished.reason
        if not self._has_failed:
            is_whole = reason in (FinishReason.STOP, FinishReason.LENGTH)
            events = _read(self._flush, is_whole)
            if not events and self._logprobs:
                events = [TextDelta("")]
            self._emit(events, usage if self._wants_usage else None)
        stop = self._stop_strings.met
        if stop is not None and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP  # the stop string was met in the very last token
        if stop is None and self._has_looped:
            stop = REPETITION
        num_calls = self._parser.num_calls if self._parser is not None else 0
        self._write(Done(reason, usage, finished.error, stop, num_calls))

    def _push(self, token: int) -> list[ParserEvent]:
        text = self._stop_strings.push(self._detokenizer.push(token))
        if not text:
            return []
        return [TextDelta(text)] if self._parser is None else self._parser.push(text)

    def _flush(self, is_whole: bool) -> list[ParserEvent]:
        """The events of the held text, which counts only where the answer is complete."""
        text = ""
        if is_whole:
            text = self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush()
        if self._parser is None:
            return [TextDelta(text)] if text else []
        return self._parser.push(text) + self._parser.flush()

    def _emit(self, events: list[ParserEvent], usage: Usage | None) -> None:
        """Write events; the first carries the logprobs since the last delta."""
        if not events:
            return
        events[0].logprobs, self._logprobs = tuple(self._logprobs), []
        if usage is not None:
            usage = self._with_reasoning(usage)
        for event in events:
            event.usage = usage
            self._write(event)

    def _with_reasoning(self, usage: Usage) -> Usage:
        return replace(usage, num_reasoning=self._num_reasoning)


def _read(read: Callable[..., list[ParserEvent]], *args: Any) -> list[ParserEvent]:
    """Call the tokenizer and the parser, which are foreign code. Raises SinkFailed."""
    try:
        return read(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        message = f"the tokens could not be made text ({type(error).__name__})"
        raise SinkFailed(message) from error
