"""What OpenAI's clients are told: errors and answers. Pure: dataclasses in, JSON bytes out.

Every way in which a request can have no answer is a `Cause`, with its status, `type` and `code` in
one place. An answer is built from the same outputs whether it streams (`ChatChunks`) or not
(`chat_completion`). Nothing here knows a clock, a socket or a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import orjson

from mlxlite.sequence import Delta, Done, FinishReason, Usage

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


def bad(message: str, param: str | None = None) -> APIError:
    """A 400 that names its field."""
    return APIError(Cause.BAD_REQUEST, message, param=param)


def later(cause: Cause, message: str, retry_after_s: int) -> APIError:
    """An error that passes: the client is told when to come back."""
    return APIError(cause, message, headers=(("retry-after", str(retry_after_s)),))


def context_exceeded(num_prompt: int, context_size: int) -> APIError:
    """The form that the launching app, llama-server's clients and LiteLLM each recognise."""
    message = (
        f"the request exceeds the available context size. This model's maximum context length is "
        f"{context_size} tokens, and the prompt has {num_prompt}; the answer needs at least one."
    )
    extra = {"n_prompt_tokens": num_prompt, "n_ctx": context_size}
    return APIError(Cause.CONTEXT_EXCEEDED, message, param="messages", extra=extra)


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


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt,
        "completion_tokens": usage.num_output,
        "total_tokens": usage.num_prompt + usage.num_output,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached},
        "completion_tokens_details": {"reasoning_tokens": 0},
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


def chat_completion(envelope: Envelope, text: str, done: Done) -> bytes:
    """The whole answer of a request that does not stream. Raises APIError for a failed sequence."""
    if done.reason is FinishReason.ERROR:
        raise failure(done)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": _FINISH_REASONS[done.reason],
    }
    return orjson.dumps(
        envelope.as_json("chat.completion")
        | {
            "choices": [choice],
            "usage": usage_json(done.usage),
            "timings": timings_json(done.usage),
        }
    )


class ChatChunks:
    """The payloads of one streamed answer, in order: `role`, `text`…, then `end` or an error.

    The frame around a piece of text never changes, so it is built once: a token costs one JSON
    string.
    """

    def __init__(self, envelope: Envelope, *, include_usage: bool) -> None:
        self._envelope = envelope
        self._include_usage = include_usage
        mark = "\0"
        frame = orjson.dumps(self._chunk({"content": mark}))
        self._head, self._tail = frame.split(orjson.dumps(mark))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": None,
            "finish_reason": finish_reason,
        }
        chunk = self._envelope.as_json("chat.completion.chunk") | {"choices": [choice]}
        return chunk | {"usage": None} if self._include_usage else chunk

    def role(self) -> bytes:
        return orjson.dumps(self._chunk({"role": "assistant", "content": ""}))

    def text(self, delta: Delta) -> bytes:
        return self._head + orjson.dumps(delta.text) + self._tail

    def end(self, done: Done) -> list[bytes]:
        """The finish chunk and, where it was asked for, the usage chunk.

        Without `include_usage` the finish chunk carries the usage (the seed's clients rely on it);
        with it, only the separate chunk does, or clients that add up would count twice.
        """
        finish = self._chunk({}, _FINISH_REASONS[done.reason])
        finish["timings"] = timings_json(done.usage)
        if not self._include_usage:
            finish["usage"] = usage_json(done.usage)
            return [orjson.dumps(finish)]
        usage = self._envelope.as_json("chat.completion.chunk")
        usage |= {"choices": [], "usage": usage_json(done.usage)}
        return [orjson.dumps(finish), orjson.dumps(usage)]


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


def cancelled(num_cancelled: int) -> bytes:
    status = "cancelled" if num_cancelled else "no_active_generation"
    return orjson.dumps({"status": status, "cancelled_count": num_cancelled})


def json_body(value: Mapping[str, float | int]) -> bytes:
    """Plain numbers as JSON (the seed's metrics)."""
    return orjson.dumps(value)
