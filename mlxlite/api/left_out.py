"""Names of what an answer is served without: hints, offers and history that cannot be used.

A demand that cannot be met is an APIError; all else that is not used is left out, and is named in
the answer's header `x-mlxlite-ignored`. Readers and renderers name it here, for the request whose
body is read in their thread, so that no reader has to pass names on. Nothing outlasts a request.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MAX_NAMES = 256  # of one request; a history may have a million items
_current: ContextVar[dict[str, None] | None] = ContextVar("left_out", default=None)


@contextmanager
def collecting() -> Iterator[dict[str, None]]:
    """The names that the block leaves out, in order, each once; also of a block inside it."""
    outer, names = _current.get(), dict[str, None]()
    token = _current.set(names)
    try:
        yield names
    finally:
        _current.reset(token)
        if outer is not None:
            outer.update(names)


def leave_out(path: str, kind: str = "") -> None:
    """Name a field, or a part and its type, that the answer is served without."""
    names = _current.get()
    if names is not None and len(names) < MAX_NAMES:
        names[f"{path}:{kind}" if kind else path] = None
