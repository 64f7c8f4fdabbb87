"""A generation: one sequence's tokens to the events of its answer. The engine's sink.

    token ─▶ Detokenizer (whole characters) ─▶ StopStrings ─▶ OutputParser ─▶ events ─▶ write

It ends an answer early: at a stop string, with the last call allowed, or when the text repeats
itself. Each stage holds back as little as it can, so all of a step's text leaves with the step. It
must never block, and emits nothing after `Done`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlxlite.engine.sequence import FinishReason, Logprobs, Sequence, Usage
from mlxlite.engine.step import Finished, Prefilled, Scored, SinkFailed, Token
from mlxlite.output.detokenizer import Detokenize, Detokenizer
from mlxlite.output.events import Done, Event, ParserEvent, Progress, TextDelta
from mlxlite.output.parser import OutputParser
from mlxlite.output.stop_strings import RepetitionGuard, StopStrings

REPETITION = "repetition"  # the `stop` of an answer that the guard has ended


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How an answer ends and what its events carry.

    One that `is_silent` has no output: its one token is drawn and not counted. With `reports_end`
    the token that ends it has its logprobs too. No stop string counts that begins within the first
    `min_tokens` tokens. One that takes longer than `max_decode_s` ends once it has a line.
    """

    is_silent: bool = False
    reports_end: bool = False
    reports_tokens: bool = False
    shows_stop: bool = False  # the stop string is a part of the text
    min_tokens: int = 0
    max_decode_s: float | None = None
    stop_tokens: frozenset[int] = frozenset()  # the request's own


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
        options: GenerationOptions | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(detokenize, sequence.prompt.tokens)
        self._options = options = options or GenerationOptions()
        self._stop_strings = StopStrings(stop, is_shown=options.shows_stop)
        self._parser = parser
        self._guard = RepetitionGuard(guard)
        self._write = write
        self._end = finish
        self._num_tokens = 0
        self._has_line = False
        self._stop_token: int | None = None
        self._tokens: list[int] = []  # since the last event, where they are reported
        self._wants_usage = sequence.wants_usage
        self._logprobs: list[tuple[int, Logprobs]] = []  # since the last event
        self._num_reasoning = 0  # tokens
        self._has_looped = False
        self._has_failed = False

    def __call__(self, output: Token | Scored | Prefilled | Finished) -> None:
        """Raises SinkFailed for tokens without a text, and the errors of `write`."""
        try:
            match output:
                case Token():
                    if not self._options.is_silent:
                        self._token(output)
                case Scored(_, logprobs):
                    self._write(logprobs)
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
        options = self._options
        self._num_tokens += 1
        if options.reports_tokens:
            self._tokens.append(token.token)
        if token.logprobs is not None and (options.reports_end or not token.is_eos):
            self._logprobs.append((token.token, token.logprobs))
        if token.is_eos:
            self._stop_token = token.token if token.token in options.stop_tokens else None
            return
        self._emit(_read(self._push, token.token), token.usage)
        if self._stop_strings.met is not None or (parser is not None and parser.is_complete):
            self._end(FinishReason.STOP)
        elif self._guard.push(token.token):
            self._has_looped = True
            self._end(FinishReason.LENGTH)
        elif self._has_line and token.usage is not None and self._is_late(token.usage):
            self._end(FinishReason.LENGTH)

    def _is_late(self, usage: Usage) -> bool:
        limit_s = self._options.max_decode_s
        return limit_s is not None and usage.decode_s > limit_s

    def _finished(self, finished: Finished) -> None:
        usage, reason = self._with_reasoning(finished.usage), finished.reason
        if self._options.is_silent and reason is FinishReason.STOP:
            reason = FinishReason.LENGTH
        if not self._has_failed:
            is_whole = reason in (FinishReason.STOP, FinishReason.LENGTH)
            events = _read(self._flush, is_whole)
            if not events and (self._logprobs or self._tokens):
                events = [TextDelta("")]
            self._emit(events, usage if self._wants_usage else None)
        stop = self._stop_strings.met
        if stop is not None and reason is FinishReason.LENGTH:
            reason = FinishReason.STOP  # the stop string was met in the very last token
        if stop is None and self._has_looped:
            stop = REPETITION
        num_calls = self._parser.num_calls if self._parser is not None else 0
        token = self._stop_token if reason is FinishReason.STOP else None
        self._write(Done(reason, usage, finished.error, stop, token, num_calls))

    def _push(self, token: int) -> list[ParserEvent]:
        text = self._detokenizer.push(token)
        self._has_line = self._has_line or "\n" in text
        if self._num_tokens > self._options.min_tokens:
            text = self._stop_strings.push(text)
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
        if self._tokens:
            events[0].tokens, self._tokens = tuple(self._tokens), []
        if usage is not None:
            usage = self._with_reasoning(usage)
        for event in events:
            event.usage = usage
            self._write(event)

    def _with_reasoning(self, usage: Usage) -> Usage:
        num_output = 0 if self._options.is_silent else usage.num_output
        return replace(usage, num_output=num_output, num_reasoning=self._num_reasoning)


def _read(read: Callable[..., list[ParserEvent]], *args: Any) -> list[ParserEvent]:
    """Call the tokenizer and the parser, which are foreign code. Raises SinkFailed."""
    try:
        return read(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        message = f"the tokens could not be made text ({type(error).__name__})"
        raise SinkFailed(message) from error
