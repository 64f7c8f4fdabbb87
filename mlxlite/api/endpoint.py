"""One entry of the API: its path, its methods, its dialect's errors."""

from collections.abc import Callable
from dataclasses import dataclass

from mlxlite.http import errors
from mlxlite.http.connection import ErrorBody, Exchange


@dataclass(frozen=True, slots=True)
class Route:
    """What is at a path: `handlers` by method; HEAD comes with GET. Open routes need no key."""

    label: str
    handlers: dict[str, Callable[[Exchange, bytes], None]]
    is_open: bool = False
    error_body: ErrorBody = errors.error_body  # how its dialect tells an error

    @property
    def methods(self) -> tuple[str, ...]:
        head = ("HEAD",) if "GET" in self.handlers else ()
        return (*self.handlers, *head, "OPTIONS")
