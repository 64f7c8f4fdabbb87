"""Generations: tokens to the events of one answer, which end with exactly one `Done`.

`Played` drives one as the engine drives a sink: tokens until they end or the generation asks for
it, then `Finished`. A token is a letter; ids from 26 on have no text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from fakes import fake_logprobs, make_sequence, spell

from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.engine.step import Finished, Prefilled, SinkFailed, Token
from mlxlite.output.events import (
    Delta,
    Done,
    Event,
    Progress,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from mlxlite.output.generation import Generation
from mlxlite.output.markers import MarkerFormat
from mlxlite.output.parser import OutputParser, ParserOptions

EOS = 25
SEQUENCE = make_sequence(1, sampling=SamplingParams(0.0, top_logprobs=2))
USAGE = Usage(num_prompt=3, num_cached=1)


@dataclass
class Played:
    """What came of tokens."""

    events: list[Event] = field(default_factory=list)
    wanted: list[FinishReason] = field(default_factory=list)
    num_output: int = 0

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, TextDelta))

    @property
    def deltas(self) -> list[Any]:
        return [event for event in self.events if isinstance(event, Delta)]

    @property
    def done(self) -> Done:
        *others, last = self.events
        assert isinstance(last, Done)
        assert not any(isinstance(event, Done) for event in others)
        return last

    @property
    def logprobs(self) -> list[tuple[int, Logprobs]]:
        return [pair for event in self.deltas for pair in event.logprobs]


def play(
    tokens: Sequence[int],
    *,
    reason: FinishReason | None = None,
    has_logprobs: bool = False,
    wants_usage: bool = False,
    **settings: Any,
) -> Played:
    """The tokens end with their last one: `reason`, by default the limit."""
    played = Played()
    generation = Generation(
        replace(SEQUENCE, wants_usage=wants_usage),
        detokenize=spell,
        write=played.events.append,
        finish=played.wanted.append,
        **settings,
    )
    for number, token in enumerate(tokens):
        logprobs = fake_logprobs(SEQUENCE, number, token) if has_logprobs else None
        usage = replace(USAGE, num_output=number + 1) if wants_usage else None
        generation(Token(1, token, token == EOS, logprobs, usage))
        played.num_output += 1
        if token == EOS or (played.wanted and number + 1 < len(tokens)):
            reason = played.wanted[0] if played.wanted else FinishReason.STOP
            break
    usage = replace(USAGE, num_output=played.num_output)
    generation(Finished(1, reason or FinishReason.LENGTH, usage=usage))
    return played


def test_each_token_is_its_text_and_the_end_a_done() -> None:
    played = play([0, 1, 2])
    assert played.events == [
        *map(TextDelta, "abc"),
        Done(FinishReason.LENGTH, replace(USAGE, num_output=3)),
    ]
    assert played.wanted == []


def test_an_end_token_has_no_text() -> None:
    played = play([0, 1, EOS])
    assert (played.text, played.done.reason, played.done.stop) == ("ab", FinishReason.STOP, None)
    assert len(play([EOS]).events) == 1


def test_progress_is_passed_on() -> None:
    events: list[Event] = []
    generation = Generation(SEQUENCE, detokenize=spell, write=events.append, finish=lambda _: None)
    generation(Prefilled(2, USAGE))
    assert events == [Progress(2, USAGE)]


def test_usage_is_in_every_event_on_request_and_counts_the_reasoning() -> None:
    played = play([X, 0, Y, 1], wants_usage=True, parser=parser(), stop=("bc",))
    counts = [(event.usage.num_output, event.usage.num_reasoning) for event in played.deltas]
    assert counts == [(2, 1), (4, 2)]
    assert played.done.usage.num_reasoning == 2
    assert all(event.usage is None for event in play([0, 1]).deltas)


# --- stop strings -------------------------------------------------------------------------------


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_sequence() -> None:
    played = play([0, 1, 2, 3, 4, 5, 6], stop=("xyz", "cde"))
    assert played.text == "ab"
    assert played.done.reason is FinishReason.STOP
    assert played.done.stop == "cde"
    assert played.num_output == 5
    assert played.wanted == [FinishReason.STOP]


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop() -> None:
    played = play([0, 1, 2, 3], stop=("cd",))
    assert (played.text, played.done.reason, played.done.stop) == ("ab", FinishReason.STOP, "cd")


def test_a_stop_string_that_waits_for_a_longer_one_is_met_at_the_end() -> None:
    """ "bc" is complete, but "abcd" began before it and might still have come."""
    played = play([9, 0, 1, 2], stop=("abcd", "bc"))
    assert (played.text, played.done.reason, played.done.stop) == ("ja", FinishReason.STOP, "bc")


def test_half_a_stop_string_is_given_out_at_the_end() -> None:
    cut, ended = play([0, 1, 2, 3], stop=("cdx",)), play([0, 1, 2, EOS], stop=("bcd",))
    assert (cut.text, cut.done.reason) == ("abcd", FinishReason.LENGTH)
    assert (ended.text, ended.done.reason) == ("abc", FinishReason.STOP)


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.ERROR])
def test_half_a_stop_string_of_an_answer_that_is_not_complete_is_not_given_out(
    reason: FinishReason,
) -> None:
    assert play([0, 1, 2], stop=("cx",), reason=reason).text == "ab"


# --- repetition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [[0], [0, 1], [0, 1, 2, 3, 4, 5, 6]])
def test_a_looping_answer_ends_with_the_stop_reason_repetition(piece: list[int]) -> None:
    tokens = [7, 8, 9, *piece * 100]
    played = play(tokens[:100], guard=32)
    done = played.done
    assert (done.reason, done.stop, done.error) == (FinishReason.LENGTH, "repetition", None)
    assert played.wanted == [FinishReason.LENGTH]
    assert 3 + 32 <= played.num_output <= 3 + 32 + 16
    assert played.text == spell(tokens)[: played.num_output]
    free = play(tokens[:100])
    assert (free.num_output, free.done.stop) == (100, None), "there is no guard unless it is wanted"


def test_a_stop_string_that_is_met_as_the_guard_strikes_is_what_is_reported() -> None:
    played = play([0, 1] * 100, guard=32, stop=("ab" * 16,))
    assert (played.text, played.done.stop, played.done.reason) == (
        "",
        "ab" * 16,
        FinishReason.STOP,
    )


def test_an_answer_that_varies_is_left_alone_by_the_guard() -> None:
    varied = [n % 11 for n in range(200)]  # eleven tokens are more than a quarter of 32
    played = play(varied, guard=32)
    assert (played.num_output, played.done.stop) == (200, None)


# --- reasoning and calls ------------------------------------------------------------------------

MARKERS = MarkerFormat("x", "y", "v", "w")  # of one letter each, which is one token here
X, Y, V, W = 23, 24, 21, 22


def parser(max_calls: int | None = None) -> OutputParser:
    return MARKERS.parser(
        ParserOptions(schemas={}, parse_calls=lambda text: [(text, {})], max_calls=max_calls)
    )


def test_text_is_emitted_by_kind_and_calls_whole() -> None:
    tokens = [X, 0, 1, Y, 2, V, 3, 4, W, 5, EOS]
    played = play(tokens, parser=parser())
    thoughts = [event.text for event in played.deltas if isinstance(event, ReasoningDelta)]
    assert ("".join(thoughts), played.text) == ("ab", "cf")
    start, arguments, end = (
        event for event in played.deltas if not isinstance(event, TextDelta | ReasoningDelta)
    )
    assert isinstance(start, ToolCallStart)
    assert start.name == "de"
    assert (arguments, end) == (ToolCallArguments("{}"), ToolCallEnd("{}"))
    assert (played.done.reason, played.done.num_calls) == (FinishReason.STOP, 1)
    assert 2 <= played.done.usage.num_reasoning <= 4
    assert played.num_output == len(tokens)


def test_after_as_many_calls_as_are_wanted_the_answer_ends() -> None:
    played = play([0, V, 1, W, V, 2, W] + [3] * 100, parser=parser(max_calls=1))
    calls = [event.name for event in played.deltas if isinstance(event, ToolCallStart)]
    assert (played.text, calls) == ("a", ["b"])
    assert (played.done.reason, played.done.num_calls) == (FinishReason.STOP, 1)
    assert (played.num_output, played.wanted) == (4, [FinishReason.STOP])


def test_a_call_that_is_wanted_last_and_meets_the_limit_is_a_length() -> None:
    played = play([0, V, 1, W], parser=parser(max_calls=1))
    assert (played.done.reason, played.done.num_calls) == (FinishReason.LENGTH, 1)


def test_a_call_that_the_limit_cuts_is_not_lost() -> None:
    def parse(_text: str) -> Any:
        raise ValueError("no call")

    played = play([0, V, 1, 2], parser=MARKERS.parser(ParserOptions(schemas={}, parse_calls=parse)))
    done = played.done
    assert (played.text, done.reason, done.num_calls) == ("avbc", FinishReason.LENGTH, 0)


# --- logprobs -----------------------------------------------------------------------------------


def expected_logprobs(tokens: list[int]) -> list[tuple[int, Logprobs]]:
    return [(token, fake_logprobs(SEQUENCE, i, token)) for i, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("stop", "tokens", "num_shown"),
    [
        (("cdx",), [0, 1, 2, 3, 4], 5),  # held back, then given out
        (("xyz",), [0, 23, 24, 3, 23], 5),  # held back to the end
        (("bcd",), [0, 1, 2, 3, 4], 4),  # met: the token that completes it is the last
        ((), [30, 31, 0, 30, 31], 5),  # tokens without text, at the end too
    ],
)
def test_logprobs_are_in_order_and_complete_where_text_is_held_back(
    stop: tuple[str, ...], tokens: list[int], num_shown: int
) -> None:
    assert play(tokens, stop=stop, has_logprobs=True).logprobs == expected_logprobs(
        tokens[:num_shown]
    )


def test_logprobs_are_complete_where_markers_and_calls_are_held_back() -> None:
    tokens = [X, 0, Y, 1, V, 2, W, EOS]
    played = play(tokens, has_logprobs=True, parser=parser())
    assert played.logprobs == expected_logprobs(tokens[:-1])


def test_the_logprobs_of_a_cancelled_sequence_are_those_of_its_tokens() -> None:
    tokens = [0, 1, 1, 1]
    played = play(tokens, stop=("bbbbx",), has_logprobs=True, reason=FinishReason.CANCELLED)
    assert played.logprobs == expected_logprobs(tokens)


# --- failures -----------------------------------------------------------------------------------


class Odd(BaseException):
    """Not an Exception, as a panic in Rust."""


def failing(
    error: BaseException, write: Callable[[Event], None], parser: OutputParser | None = None
) -> Generation:
    def detokenize(tokens: Sequence[int]) -> str:
        if 17 in tokens:
            raise error
        return spell(tokens)

    return Generation(
        SEQUENCE, detokenize=detokenize, write=write, finish=lambda _: None, parser=parser
    )


@pytest.mark.parametrize("error", [RuntimeError("/a/path"), Odd("/a/path"), StopIteration()])
def test_tokens_that_cannot_be_made_text_fail_with_the_kind_of_error_alone(
    error: BaseException,
) -> None:
    events: list[Event] = []
    generation = failing(error, events.append, parser())
    generation(Token(1, V))
    with pytest.raises(SinkFailed) as caught:
        generation(Token(1, 17))
    kind = type(error).__name__
    assert str(caught.value) == f"the tokens could not be made text ({kind})"
    generation(Finished(1, FinishReason.ERROR, "why"))
    assert events == [Done(FinishReason.ERROR, error="why")], "and nothing that was held back"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit()], ids=repr)
def test_an_interrupt_is_no_failure(error: BaseException) -> None:
    with pytest.raises(type(error)):
        failing(error, print)(Token(1, 17))


def test_a_writer_that_raises_gets_only_the_error_after_it() -> None:
    events: list[Event] = []

    def write(event: Event) -> None:
        events.append(event)
        if isinstance(event, TextDelta):
            raise OSError("a broken pipe")

    generation = failing(RuntimeError(), write)
    with pytest.raises(OSError, match="a broken pipe"):
        generation(Token(1, 0))
    generation(Finished(1, FinishReason.ERROR, "the answer could not be written"))
    assert [type(event) for event in events] == [TextDelta, Done]
