"""Faults of code that is not ours: what they may cost, and what may be said of them.

A model's network, a tokenizer, a chat template and a grammar raise what they like, and a template
need not even end. Decides how such a fault is told, and ends a call that takes too long. It must
never let a prompt's text into a log, nor a path into an answer: an error's message may hold either.
"""

import re
import traceback
from typing import TypeVar


def reason_of(error: BaseException) -> str:
    """The reason in one line of bounded length, with its kind where the text alone says little."""
    text = " ".join(str(error).split())[:300]
    is_bare = not text or isinstance(error, KeyError | AssertionError | ZeroDivisionError)
    return f"{type(error).__name__}: {text}".removesuffix(": ") if is_bare else text


T = TypeVar("T")
# What is raised by code that meets what it was not written for. Not AssertionError: that is ours.
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
_MAX_TOLD = 200  # characters
_PATH = re.compile(r"(?<![\w.:/])~?/(?:[^\s/'\":,;()]+/)+[^\s'\":,;()]*")


def told(error: BaseException) -> str:
    """One line for a client: what it was, never where."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    return _PATH.sub("…", line)[:_MAX_TOLD]


def trace_of(error: BaseException) -> str:
    """For a log: what kind of error it was and where it came from, without what it says."""
    lines: list[str] = []
    at: BaseException | None = error
    while at is not None and len(lines) < 100:
        lines.append(type(at).__name__)
        frames = traceback.extract_tb(at.__traceback__)
        lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
        at = at.__cause__
    return "\n".join(lines)


def bearable(error: BaseException) -> Exception:
    """An error that a future takes and a loop outlives: StopIteration and a Rust panic are not."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
