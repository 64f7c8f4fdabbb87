"""Requests that were refused, in the log: a line each, of a bounded number in a period.

A line has the method, the path, the status and the code, and what would help. It never has the
message of an error, which may quote a request.
"""

import logging
from collections.abc import Callable
from time import monotonic

log = logging.getLogger("mlxlite.http")
MAX_LINES = 20
PERIOD_S = 10.0


class RefusalLog:
    """Writes at most `MAX_LINES` lines in `PERIOD_S` seconds, then how many more there were."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._since = -PERIOD_S
        self._num_lines = 0

    def note(self, method: str, path: str, refusal: str) -> None:
        now = self._clock()
        if now - self._since >= PERIOD_S:
            if self._num_lines > MAX_LINES:
                log.warning("%d more requests were refused", self._num_lines - MAX_LINES)
            self._since, self._num_lines = now, 0
        self._num_lines += 1
        if self._num_lines <= MAX_LINES:
            log.warning("%s %r %s", method, path, refusal)
