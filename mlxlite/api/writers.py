"""What OpenAI's clients are told: errors and answers. Pure: dataclasses in, JSON bytes out.

Every way in which a request can have no answer is a `Cause`, with its status, `type` and `code` in
one place. An answer is built from the same outputs whether it streams (`ChatChunks`) or not
(`chat_completion`). Nothing here knows a clock, a socket or a model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from mlxlite.engine.sequence import FinishReason, Logprobs, Usage
from mlxlite.http.errors import APIError
from mlxlite.http.sse import SSE_DONE, sse_data, sse_field
from mlxlite.output.events import (
    Arguments,
    Broken,
    Call,
    CallPart,
    Channel,
    Closed,
    Delta,
    Done,
    Opened,
    Progress,
)

MIN_LOGPROB = -9999.0  # for tokens that are impossible: JSON has no infinity (vLLM's figure)


# --- the answer -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every part of one answer repeats. `created` is in Unix seconds."""

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


def finish_reason(done: Done | None) -> str:
    assert done is not None
    if done.num_calls and done.reason is FinishReason.STOP:
        return "tool_calls"
    return _FINISH_REASONS[done.reason]


def call_json(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def parts_of(delta: Delta) -> tuple[CallPart, ...]:
    """What a delta tells of calls, where one that came whole has parts too."""
    whole = ((Opened(c.id, c.name), Arguments(c.arguments), Closed(c)) for c in delta.calls)
    own = () if delta.part is None else (delta.part,)
    return (*own, *(part for parts in whole for part in parts))


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning},
    }


def timings_json(usage: Usage) -> dict[str, Any]:
    """llama-server's `timings`: `prompt_n` counts what was computed, `cache_n` what was not."""

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


TokenBytes = Callable[[int], bytes]


def logprobs_json(
    logprobs: Iterable[tuple[int, Logprobs]], token_bytes: TokenBytes
) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content`: each token as text, as bytes, and with its rivals."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}

    return [
        entry(token, item.drawn) | {"top_logprobs": [entry(*rival) for rival in item.top]}
        for token, item in logprobs
    ]


@dataclass(slots=True)
class Choice:
    """What one sequence has said so far, for an answer that does not stream."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    drawn: list[tuple[int, Logprobs]] = field(default_factory=list)
    done: Done | None = None
    thoughts: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def take(self, delta: Delta) -> None:
        """More of it. A call that comes in parts is one when it is closed, and else text."""
        is_thought = delta.channel is Channel.REASONING
        (self.thoughts if is_thought else self.texts).append(delta.text)
        self.calls += delta.calls
        self.drawn += delta.logprobs
        match delta.part:
            case Closed(call):
                self.calls.append(call)
            case Broken(text):
                self.texts.append(text)

    def as_json(self, index: int) -> dict[str, Any]:
        content = "".join(self.texts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self.calls else None,
            "refusal": None,
        }
        if thought := "".join(self.thoughts):
            message |= {"reasoning_content": thought, "reasoning": thought}
        if self.calls:
            message["tool_calls"] = [call_json(call) for call in self.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": None if self.logprobs is None else {"content": self.logprobs},
            "finish_reason": finish_reason(self.done),
            "stop_reason": self.done.stop if self.done is not None else None,
        }


class Writer(Protocol):
    """One answer in one dialect: a stream's frames, in this order, or one body."""

    def begin(self) -> bytes:
        """What leaves at once: the client knows that it is in the queue."""
        ...

    def delta(self, index: int, delta: Delta) -> bytes: ...
    def progress(self, index: int, progress: Progress) -> bytes: ...

    def done(self, index: int, done: Done, total: Usage | None) -> bytes:
        """The end of a choice, well or cancelled; with `total`, which the last one has, of all."""
        ...

    def fail(self, error: APIError) -> bytes:
        """The end of a stream that has failed."""
        ...

    def whole(self, choices: Sequence[Choice], total: Usage) -> bytes:
        """The body of an answer that does not stream."""
        ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What a stream carries beside its text, where it was asked for."""

    include_usage: bool = False  # in a chunk of its own at the end
    continuous_usage: bool = False  # and in every one
    timings_per_token: bool = False


def frame(payload: Mapping[str, Any]) -> bytes:
    """OpenAI's frame of a stream."""
    return sse_data(orjson.dumps(payload))


def stream_failure(error: APIError) -> bytes:
    """Both forms: OpenAI's clients read the data line, the launching app the other."""
    frames = sse_data(error.body()) + sse_field("error", error.line())
    return frames + SSE_DONE


def retold(choice: Choice) -> tuple[Delta, Delta, Delta]:
    """What a choice has said, as one that streams says it: thoughts, then text, then calls."""
    thought, said = "".join(choice.thoughts), "".join(choice.texts)
    return (
        Delta(thought, 0, channel=Channel.REASONING),
        Delta(said, 0, tuple(choice.drawn)),
        Delta("", 0, calls=tuple(choice.calls)),
    )
