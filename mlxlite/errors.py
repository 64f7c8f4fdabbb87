"""Errors of foreign code: how they are summarised for clients and logged.

A model's network, a tokenizer, a chat template and a grammar may raise any exception. An error's
message may hold a prompt's text or a path: the first must never get into a log, nor the second into
an answer.
"""

import re
import traceback
from typing import TypeVar


def reason_of(error: BaseException) -> str:
    """The message in one line of bounded length, with its type where the message is not enough."""
    text = " ".join(str(error).split())[:300]
    is_bare = not text or isinstance(error, KeyError | AssertionError | ZeroDivisionError)
    return f"{type(error).__name__}: {text}".removesuffix(": ") if is_bare else text


T = TypeVar("T")
# Raised by foreign code for unexpected input. Not AssertionError: those are our own.
FOREIGN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)
_MAX_SUMMARY = 200  # characters
_PATH = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\":,;()]+/)+[^\s'\":,;()]*")


def summary_of(error: BaseException) -> str:
    """A one-line description for the client, file paths removed."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return _PATH.sub("…", line)[:_MAX_SUMMARY]


def trace_of(error: BaseException) -> str:
    """For a log: the types of an error and its causes with their frames, without messages."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None and len(lines) < 100:
        lines.append(type(at).__name__)
        frames = traceback.extract_tb(at.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        at = at.__cause__
    return "\n".join(lines)


def as_exception(error: BaseException) -> Exception:
    """Wraps StopIteration and non-Exceptions (a Rust panic), which asyncio futures reject."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
