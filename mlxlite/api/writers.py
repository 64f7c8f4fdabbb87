"""Answers as JSON: the parts that dialects share, and OpenAI's two kinds of completions. Pure.

A `Writer` turns one answer's events into bytes. Streamed or not, an answer is made of the same
events: `Collected` folds them, and nothing else does. Nothing here knows a clock, a socket or a
model.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import orjson

from mlxlite.api.conversation import ToolCall
from mlxlite.api.likelihoods import MIN_LOGPROB, JSONList, TokenBytes, by_token, token_id
from mlxlite.engine.sequence import FinishReason, Logprobs, Prompt, PromptLogprobs, Usage
from mlxlite.http.errors import APIError
from mlxlite.http.sse import SSE_DONE, sse_comment, sse_data, sse_field
from mlxlite.output import events


@dataclass(frozen=True, slots=True)
class Envelope:
    """The fields that every part of one answer repeats. `created` is in Unix seconds."""

    id: str
    created: int
    model: str
    fingerprint: str

    def as_json(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }


_FINISH_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",  # vLLM's word; OpenAI has none
}


def finish_reason(done: events.Done) -> str:
    if done.num_calls and done.reason is FinishReason.STOP:
        return "tool_calls"
    return _FINISH_REASONS[done.reason]


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning},
    }


def timings_json(usage: Usage) -> dict[str, Any]:
    """llama-server's `timings`: `prompt_n` counts computed tokens, `cache_n` cached ones."""

    def per_second(num_tokens: int, seconds: float) -> float:
        return round(num_tokens / seconds, 3) if seconds > 0 else 0.0

    num_computed = usage.num_prompt - usage.num_cached
    return {
        "cache_n": usage.num_cached,
        "prompt_n": num_computed,
        "prompt_ms": round(usage.prefill_s * 1000, 3),
        "prompt_per_second": per_second(num_computed, usage.prefill_s),
        "predicted_n": usage.num_output,
        "predicted_ms": round(usage.decode_s * 1000, 3),
        # the first token is the prefill's: n tokens have n - 1 gaps
        "predicted_per_second": per_second(usage.num_output - 1, usage.decode_s),
    }


def logprobs_json(
    logprobs: Iterable[tuple[int, Logprobs]], token_bytes: TokenBytes, *, has_ids: bool = False
) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content`: each token as text, as bytes, and with its rivals.

    With `has_ids` tokens are named by their ids instead.
    """

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token)
        text = token_id(token) if has_ids else raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    return [
        entry(token, item.drawn) | {"top_logprobs": [entry(*rival) for rival in item.top]}
        for token, item in logprobs
    ]


@dataclass(slots=True)
class Collected:
    """One choice of an answer that does not stream: its events so far, folded."""

    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    drawn: list[tuple[int, Logprobs]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    done: events.Done | None = None
    _open: events.ToolCallStart | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def reasoning(self) -> str:
        return "".join(self.thoughts)

    def take(self, event: events.Event) -> None:
        match event:
            case events.TextDelta(text) | events.ToolCallInvalid(text):
                self.texts.append(text)
            case events.ReasoningDelta(text):
                self.thoughts.append(text)
            case events.ToolCallStart():
                self._open = event
            case events.ToolCallEnd(arguments):
                assert self._open is not None
                self.calls.append(ToolCall(self._open.id, self._open.name, arguments))
            case events.Done():
                self.done = event
        if isinstance(event, events.Delta):
            self.drawn += event.logprobs
            self.tokens += event.tokens


Shown = events.ParserEvent | events.Progress | PromptLogprobs


class Writer(Protocol):
    """One answer in one dialect: a stream's frames, in this order, or one body."""

    def begin(self) -> bytes:
        """The frames that leave before the first token."""
        ...

    def beat(self) -> bytes:
        """A frame that shows a client that a silent stream lives: its dialect's own, if any."""
        ...

    def event(self, index: int, event: Shown) -> bytes:
        """The frames of one event of the choice `index`; may be empty.

        It keeps `PromptLogprobs` for an answer that does not stream.
        """
        ...

    def done(self, index: int, done: events.Done, total: Usage | None) -> bytes:
        """The end of a choice, complete or cancelled; the last one has the usage of all."""
        ...

    def fail(self, error: APIError) -> bytes: ...

    def whole(self, choices: Sequence[Collected], total: Usage) -> bytes: ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """The parts of a stream that a request can ask for, beside its text."""

    include_usage: bool = False  # in a chunk of its own at the end
    continuous_usage: bool = False  # and in every one
    timings_per_token: bool = False

    @property
    def has_extras(self) -> bool:
        return self.continuous_usage or self.timings_per_token


def frame(payload: Mapping[str, Any]) -> bytes:
    return sse_data(orjson.dumps(payload))


class OpenAIWriter(ABC):
    """An answer in OpenAI's chunks: chat and text completions differ in their choices alone.

    The frame around a piece of text never changes, so it is built once for each choice: a token
    costs one JSON string.
    """

    object_name: ClassVar[str]  # of a whole answer
    chunk_name: ClassVar[str]

    def __init__(
        self,
        envelope: Envelope,
        token_bytes: TokenBytes,
        options: StreamOptions | None = None,
        *,
        num_choices: int = 1,
        num_per_prompt: int | None = None,
        has_logprobs: bool = False,
        has_prompt_logprobs: bool = False,
        has_ids: bool = False,
        prompts: Sequence[Prompt] = (),
        returns_tokens: bool = False,
    ) -> None:
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._options = options or StreamOptions()
        self._has_logprobs = has_logprobs  # a whole answer has them even where no token was drawn
        self._num_calls = [0] * num_choices  # so far
        self._num_per_prompt = num_per_prompt or num_choices
        self._has_prompt_logprobs = has_prompt_logprobs
        self._has_ids = has_ids
        self._prompt_tokens = [prompt.tokens for prompt in prompts]
        self._returns_tokens = returns_tokens
        # Of the first choice of each prompt; a prompt's first token has none.
        self._prompts = {i: JSONList([None]) for i in range(0, num_choices, self._num_per_prompt)}
        mark = "\0"
        texts = (self._choice_delta(i, events.TextDelta(mark)) for i in range(num_choices))
        frames = (frame(self._chunk(i, text)) for i, text in enumerate(texts))
        self._frames = [whole.split(orjson.dumps(mark)) for whole in frames]

    @abstractmethod
    def _choice_delta(self, index: int, event: events.ParserEvent | None) -> dict[str, Any]: ...

    @abstractmethod
    def _content(self, index: int, choice: Collected) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, index: int, drawn: Sequence[tuple[int, Logprobs]]) -> dict[str, Any]: ...

    @abstractmethod
    def begin(self) -> bytes: ...

    def beat(self) -> bytes:
        return sse_comment()

    def _choice(
        self, index: int, content: Mapping[str, Any], done: events.Done | None, logprobs: Any = None
    ) -> dict[str, Any]:
        reason = None if done is None else finish_reason(done)
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}
        if done is not None:  # vLLM's
            choice["stop_reason"] = done.stop_token if done.stop is None else done.stop
        return choice

    def _first_chunk(self, index: int, content: Mapping[str, Any]) -> dict[str, Any]:
        """A choice's first chunk, with what is known of its prompt."""
        chunk = self._chunk(index, content)
        if self._prompt_tokens:
            tokens = self._prompt_tokens[index // self._num_per_prompt]
            if self._options.continuous_usage:
                chunk["usage"] = usage_json(Usage(num_prompt=len(tokens)))
            if self._returns_tokens:
                chunk["choices"][0]["token_ids"] = []
                self._prompt_ids_place(chunk)["prompt_token_ids"] = tokens
        return chunk

    def _prompt_ids_place(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The member of a chunk that vLLM gives the prompt's token ids."""
        return answer

    def _chunk(
        self, index: int, content: Mapping[str, Any], done: events.Done | None = None
    ) -> dict[str, Any]:
        chunk = self._envelope.as_json(self.chunk_name)
        chunk["choices"] = [self._choice(index, content, done)]
        return chunk | {"usage": None} if self._options.include_usage else chunk

    def event(self, index: int, event: Shown) -> bytes:
        if isinstance(event, PromptLogprobs):
            return self._prompt(index, event)
        if isinstance(event, events.Progress):
            return self._progress(index, event)
        if not event.logprobs and not event.tokens:
            if isinstance(event, events.TextDelta) and not self._options.has_extras:
                head, tail = self._frames[index]
                return head + orjson.dumps(event.text) + tail
            if isinstance(event, events.ToolCallEnd | events.ToolCallInvalid):
                return b""  # OpenAI has no chunk for the end of a call
        if isinstance(event, events.ToolCallStart):
            self._num_calls[index] += 1
        chunk = self._chunk(index, self._choice_delta(index, event))
        if event.logprobs:
            chunk["choices"][0]["logprobs"] = self._logprobs(index, event.logprobs)
        if self._returns_tokens:
            chunk["choices"][0]["token_ids"] = event.tokens
        if event.usage is not None and self._options.continuous_usage:
            chunk["usage"] = usage_json(event.usage)
        if event.usage is not None and self._options.timings_per_token:
            chunk["timings"] = timings_json(event.usage)
        return frame(chunk)

    def _prompt(self, index: int, part: PromptLogprobs) -> bytes:
        """Keep the likelihoods of a prompt's next tokens."""
        if self._has_prompt_logprobs:
            self._prompts[index].extend(by_token(part, self._token_bytes))
        return b""

    def _progress(self, index: int, progress: events.Progress) -> bytes:
        usage = progress.usage
        chunk = self._chunk(index, self._choice_delta(index, None))
        chunk["prompt_progress"] = {  # llama-server's
            "total": usage.num_prompt,
            "cache": usage.num_cached,
            "processed": progress.num_computed,
            "time_ms": round(usage.prefill_s * 1000, 3),
        }
        return frame(chunk)

    def done(self, index: int, done: events.Done, total: Usage | None) -> bytes:
        """The finish chunk; the last one carries the usage and timings of all choices.

        With `include_usage` only a separate chunk has the usage, or clients that add up would
        count it twice; the timings stay.
        """
        chunk = self._chunk(index, self._choice_delta(index, None), done)
        if self._options.continuous_usage:
            chunk["usage"] = usage_json(done.usage)
        if total is None:
            return frame(chunk)
        chunk["timings"] = timings_json(total)
        if not self._options.include_usage:
            chunk["usage"] = usage_json(total)
            return frame(chunk) + SSE_DONE
        last = self._envelope.as_json(self.chunk_name) | {"choices": []}
        return frame(chunk) + frame(last | {"usage": usage_json(total)}) + SSE_DONE

    def fail(self, error: APIError) -> bytes:
        return stream_failure(error)

    def whole(self, choices: Sequence[Collected], total: Usage) -> bytes:
        answer = self._envelope.as_json(self.object_name)
        answer["choices"] = [self._whole(i, choice) for i, choice in enumerate(choices)]
        answer |= self._more()
        answer |= {"usage": usage_json(total), "timings": timings_json(total)}
        return orjson.dumps(answer)

    def _more(self) -> dict[str, Any]:
        """Further members of a whole answer."""
        return {}

    def _whole(self, index: int, choice: Collected) -> dict[str, Any]:
        has_logprobs = self._has_logprobs or choice.drawn
        logprobs = self._logprobs(index, choice.drawn) if has_logprobs else None
        whole = self._choice(index, self._content(index, choice), choice.done, logprobs)
        if self._returns_tokens:
            whole["token_ids"] = choice.tokens
        return whole


def stream_failure(error: APIError) -> bytes:
    """Both forms: OpenAI's clients read the data line, the launching app the other."""
    return sse_data(error.body()) + sse_field("error", error.line()) + SSE_DONE
