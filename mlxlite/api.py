"""What OpenAI's clients are told: errors and answers. Pure: dataclasses in, JSON bytes out.

Every way in which a request can have no answer is a `Cause`, with its status, `type` and `code` in
one place. An answer is built from the same outputs whether it streams (`ChatChunks`) or not
(`chat_completion`). Nothing here knows a clock, a socket or a model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, Protocol

import orjson

from mlxlite import __version__, http1
from mlxlite.blocks import CacheStats
from mlxlite.sequence import (
    Arguments,
    Broken,
    Call,
    CallPart,
    Channel,
    Closed,
    Delta,
    Done,
    FinishReason,
    Load,
    Logprobs,
    Opened,
    Progress,
    Usage,
)

MIN_LOGPROB = -9999.0  # for tokens that are impossible: JSON has no infinity (vLLM's figure)
_MAX_ECHO = 200  # characters of the client's own input that an error repeats (vLLM's bound)


class Cause(Enum):
    """Why a request has no answer: HTTP status, OpenAI's `type`, and our `code`."""

    BAD_REQUEST = (400, "invalid_request_error", None)
    UNSUPPORTED = (400, "invalid_request_error", "unsupported_parameter")
    MALFORMED = (400, "invalid_request_error", "malformed_request")
    CONTEXT_EXCEEDED = (400, "exceed_context_size_error", "context_length_exceeded")
    UNAUTHORIZED = (401, "authentication_error", "unauthorized")
    HOST = (403, "permission_error", "host_not_allowed")
    NOT_FOUND = (404, "not_found_error", "not_found")
    NO_MODEL = (404, "not_found_error", "model_not_found")
    METHOD = (405, "invalid_request_error", "method_not_allowed")
    SLOW_BODY = (408, "invalid_request_error", "request_timeout")
    MEDIA_TYPE = (415, "invalid_request_error", "unsupported_media_type")
    QUEUE_FULL = (429, "rate_limit_error", "queue_full")
    MODEL_FAILED = (500, "server_error", "model_error")
    INTERNAL = (500, "server_error", "internal_error")
    NOT_OFFERED = (501, "not_supported_error", "not_supported")
    UNAVAILABLE = (503, "unavailable_error", "unavailable")


class APIError(Exception):
    """The client's mistake, or a state it must know of: an HTTP answer, never a traceback."""

    def __init__(
        self,
        cause: Cause,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        own, self.type, self.code = cause.value
        self.status: int = status or own
        self.message = message
        self.param = param
        self.headers = headers
        self.extra = dict(extra or {})

    def body(self) -> bytes:
        """OpenAI's error envelope: all four keys, always."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error | self.extra})

    def line(self) -> bytes:
        """The launching app's form of an error in mid-stream."""
        return orjson.dumps({"message": self.message})


def error_body(error: APIError, request_id: str) -> bytes:
    """OpenAI's envelope; dialects have their own."""
    return error.body()


def bad(message: str, param: str | None = None) -> APIError:
    """A 400 that names its field."""
    return APIError(Cause.BAD_REQUEST, message, param=param)


def our_fault() -> APIError:
    """Something of ours has raised: all that the client needs to know."""
    return APIError(Cause.INTERNAL, "internal error")


def later(cause: Cause, message: str, retry_after_s: int) -> APIError:
    """An error that passes: the client is told when to come back."""
    return APIError(cause, message, headers=(("retry-after", str(retry_after_s)),))


def context_exceeded(num_prompt: int, context_size: int, param: str = "messages") -> APIError:
    """The form that the launching app, llama-server's clients and LiteLLM each recognise."""
    message = (
        f"the request exceeds the available context size. This model's maximum context length is "
        f"{context_size} tokens, and the prompt has {num_prompt}; the answer needs at least one."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": context_size}
    return APIError(Cause.CONTEXT_EXCEEDED, message, param=param, extra=extra)


def clip(text: str) -> str:
    """What an error may repeat of the client's own input."""
    return text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "…"


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


def failure(done: Done) -> APIError:
    """A sequence that ended with an error, as an error answer."""
    return APIError(Cause.MODEL_FAILED, done.error or "the model failed")


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


class ChatWriter:
    """A chat completion. Each choice has its role's chunk, its text's, and one that finishes it.

    The frame around a piece of text never changes, so it is built once for each choice: a token
    costs one JSON string.
    """

    def __init__(
        self,
        envelope: Envelope,
        token_bytes: TokenBytes,
        options: StreamOptions | None = None,
        *,
        num_choices: int = 1,
        has_logprobs: bool = False,
    ) -> None:
        self._envelope = envelope
        self._token_bytes = token_bytes
        self._options = options or StreamOptions()
        self._num_choices = num_choices
        self._has_logprobs = has_logprobs
        mark = "\0"
        self._frames = [
            http1.sse_data(orjson.dumps(self._chunk(i, {"content": mark}))).split(
                orjson.dumps(mark)
            )
            for i in range(num_choices)
        ]
        self._num_calls = [0] * num_choices

    def _chunk(
        self, index: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = self._envelope.as_json("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._options.include_usage else chunk

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(frame(self._chunk(i, role)) for i in range(self._num_choices))

    def delta(self, index: int, delta: Delta) -> bytes:
        options = self._options
        is_content = delta.channel is Channel.CONTENT and not delta.calls and delta.part is None
        if isinstance(delta.part, Closed | Broken) and not delta.logprobs:
            return b""  # OpenAI has no word for the end of a call
        has_extras = delta.logprobs or options.continuous_usage or options.timings_per_token
        if is_content and not has_extras:
            head, tail = self._frames[index]
            return head + orjson.dumps(delta.text) + tail
        chunk = self._chunk(index, self._said(index, delta))
        if delta.logprobs:
            content = logprobs_json(delta.logprobs, self._token_bytes)
            chunk["choices"][0]["logprobs"] = {"content": content}
        return frame(self._with_usage(chunk, delta.usage))

    def _said(self, index: int, delta: Delta) -> dict[str, Any]:
        if delta.channel is Channel.REASONING:
            return {"reasoning_content": delta.text, "reasoning": delta.text}
        match delta.part:
            case Opened(id, name):
                self._num_calls[index] += 1
                opening = {"index": self._num_calls[index] - 1} | call_json(Call(id, name, ""))
                return {"tool_calls": [opening]}
            case Arguments(text):
                more = {"index": self._num_calls[index] - 1, "function": {"arguments": text}}
                return {"tool_calls": [more]}
            case Closed() | Broken():
                return {}
        if not delta.calls:
            return {"content": delta.text}
        first = self._num_calls[index]
        self._num_calls[index] += len(delta.calls)
        calls = [{"index": i} | call_json(call) for i, call in enumerate(delta.calls, first)]
        return {"tool_calls": calls}

    def _with_usage(self, chunk: dict[str, Any], usage: Usage | None) -> dict[str, Any]:
        if usage is not None and self._options.continuous_usage:
            chunk["usage"] = usage_json(usage)
        if usage is not None and self._options.timings_per_token:
            chunk["timings"] = timings_json(usage)
        return chunk

    def progress(self, index: int, progress: Progress) -> bytes:
        """llama-server's `prompt_progress`."""
        usage = progress.usage
        chunk = self._chunk(index, {})
        chunk["prompt_progress"] = {
            "total": usage.num_prompt,
            "cache": usage.num_cached,
            "processed": progress.num_computed,
            "time_ms": round(usage.prefill_s * 1000, 3),
        }
        return frame(chunk)

    def done(self, index: int, done: Done, total: Usage | None) -> bytes:
        """The last finish chunk carries the usage and timings of all.

        With `include_usage` only the separate chunk has the usage, or clients that add up would
        count it twice; the timings stay.
        """
        chunk = self._chunk(index, {}, finish_reason(done))
        chunk["choices"][0]["stop_reason"] = done.stop  # vLLM's
        if total is None:
            return frame(chunk)
        chunk["timings"] = timings_json(total)
        if not self._options.include_usage:
            chunk["usage"] = usage_json(total)
            return frame(chunk) + http1.SSE_DONE
        last = self._envelope.as_json("chat.completion.chunk") | {"choices": []}
        return frame(chunk) + frame(last | {"usage": usage_json(total)}) + http1.SSE_DONE

    def fail(self, error: APIError) -> bytes:
        return stream_failure(error)

    def whole(self, choices: Sequence[Choice], total: Usage) -> bytes:
        for choice in choices:
            if self._has_logprobs:
                choice.logprobs = logprobs_json(choice.drawn, self._token_bytes)
        answer = self._envelope.as_json("chat.completion")
        answer |= {"choices": [choice.as_json(i) for i, choice in enumerate(choices)]}
        answer |= {"usage": usage_json(total), "timings": timings_json(total)}
        return orjson.dumps(answer)


def frame(payload: Mapping[str, Any]) -> bytes:
    """OpenAI's frame of a stream."""
    return http1.sse_data(orjson.dumps(payload))


def stream_failure(error: APIError) -> bytes:
    """Both forms: OpenAI's clients read the data line, the launching app the other."""
    frames = http1.sse_data(error.body()) + http1.sse_field("error", error.line())
    return frames + http1.SSE_DONE


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What `/v1/models` tells of the served model."""

    id: str
    created: int
    context_size: int

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx",
            "max_model_len": self.context_size,
        }


def model_list(cards: list[ModelCard]) -> bytes:
    return orjson.dumps({"object": "list", "data": [card.as_json() for card in cards]})


def model_card(card: ModelCard) -> bytes:
    return orjson.dumps(card.as_json())


def health(status: str, batching: str | None = None, reason: str | None = None) -> bytes:
    body = {"status": status, "batching": batching, "reason": reason}
    return orjson.dumps({name: value for name, value in body.items() if value is not None})


def cache_stats(stats: CacheStats, *, is_cleared: bool = False) -> bytes:
    """The prefix cache in numbers; what was there, where it is cleared."""
    asked, hit = stats.num_asked, stats.num_hit
    body = {
        "object": "prefix_cache",
        "bytes": stats.num_bytes,
        "max_bytes": stats.max_bytes,
        "disk_bytes": stats.disk_bytes,
        "max_disk_bytes": stats.max_disk_bytes,
        "queried_tokens": asked,
        "hit_tokens": hit,
        "hit_rate": hit / asked if asked else 0.0,
        "evictions": stats.num_evicted,
        "disk_loads": stats.num_from_disk,
    }
    return orjson.dumps(body | ({"status": "cleared"} if is_cleared else {}))


def status(
    card: ModelCard,
    load: Load,
    cache: CacheStats,
    *,
    max_rows: int,
    max_queue: int,
    fingerprint: str,
) -> bytes:
    """What the server is at: queue, rows, memory, cache, versions."""
    return orjson.dumps(
        {
            "object": "status",
            "model": card.as_json() | {"fingerprint": fingerprint},
            "queue": {"waiting": load.num_waiting, "max": max_queue},
            "rows": {"running": load.num_running, "max": max_rows, "steps": load.num_steps},
            "memory": {"bytes": load.num_bytes, "max_bytes": load.max_bytes},
            "prefix_cache": orjson.Fragment(cache_stats(cache)),
            "versions": {"mlxlite": __version__},
        }
    )


def version() -> bytes:
    return orjson.dumps({"version": __version__})


def cancelled(num_cancelled: int) -> bytes:
    status = "cancelled" if num_cancelled else "no_active_generation"
    return orjson.dumps({"status": status, "cancelled_count": num_cancelled})


def json_body(value: Mapping[str, float | int]) -> bytes:
    """Plain numbers as JSON (the seed's metrics)."""
    return orjson.dumps(value)
