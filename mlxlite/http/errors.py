"""Errors of the API: each `ErrorKind` has its HTTP status, `type` and `code` in one place.

An `APIError` becomes the body of a response or the last frame of a stream; it is never a
traceback.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import orjson

_MAX_ECHO = 200  # characters of the client's input quoted in an error (vLLM's bound)


class ErrorKind(Enum):
    """The kind of an error: HTTP status, OpenAI's `type`, and our `code`."""

    BAD_REQUEST = (400, "invalid_request_error", None)
    UNSUPPORTED = (400, "invalid_request_error", "unsupported_parameter")
    MALFORMED = (400, "invalid_request_error", "malformed_request")
    CONTEXT_EXCEEDED = (400, "exceed_context_size_error", "context_length_exceeded")
    UNAUTHORIZED = (401, "authentication_error", "unauthorized")
    HOST = (403, "permission_error", "host_not_allowed")
    NOT_FIRST_KEY = (403, "permission_error", "not_the_first_key")
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
    """A client's mistake, or a state of the server that it must handle."""

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        status: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        extra: Mapping[str, Any] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message)
        own, self.type, self.code = kind.value
        self.status: int = status or own
        self.message = message
        self.param = param
        self.headers = headers
        self.extra = dict(extra or {})
        self.hint = hint  # for the log: what would help; never a client's input

    def body(self) -> bytes:
        """OpenAI's error envelope: all four keys, always."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error | self.extra})

    def line(self) -> bytes:
        """The launching app's form of an error during a stream."""
        return orjson.dumps({"message": self.message})


ErrorBody = Callable[[APIError, str], bytes]  # the error and the request's id


def error_body(error: APIError, request_id: str) -> bytes:
    """OpenAI's envelope; dialects have their own."""
    return error.body()


def bad_request(message: str, param: str | None = None) -> APIError:
    """A 400 that names its field."""
    return APIError(ErrorKind.BAD_REQUEST, message, param=param)


def not_supported(message: str, param: str) -> APIError:
    """A 400 for a value that only other servers support."""
    return APIError(ErrorKind.UNSUPPORTED, message, param=param)


def internal_error() -> APIError:
    """A 500 for a bug of ours, without details."""
    return APIError(ErrorKind.INTERNAL, "internal error")


def retry_later(cause: ErrorKind, message: str, retry_after_s: int) -> APIError:
    """A temporary error, with a Retry-After header."""
    return APIError(cause, message, headers=(("retry-after", str(retry_after_s)),))


def truncate(text: str) -> str:
    """A client's input, shortened for an error message."""
    return text if len(text) <= _MAX_ECHO else text[:_MAX_ECHO] + "…"
