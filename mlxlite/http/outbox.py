"""Bytes on their way to one peer: those in the transport, and those that wait behind them.

Decides when the transport gets its next bytes: one piece at a time, each once the socket has taken
the one before. So a large answer is copied by pieces only, is never held twice, and what is unsent
is known to the byte. Knows neither time nor bounds: those are the connection's.

Must never raise. Whatever a socket that is gone raises, in any call of its transport, is the
ordinary end of the connection (tested). Must never call the transport from `resume`: asyncio 3.11
reports a connection that ends inside that callback as lost twice.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

PIECE = 256 << 10  # bytes for the transport at a time, and encrypted at a time under TLS
SMALL = 64 << 10  # frames up to here are sent together once they had to wait, and are a backlog
# OSError: the peer has gone. RuntimeError: the transport has half-closed, or TLS is shutting down.
# AttributeError, ValueError: a transport that has let go of its TLS object, or of its descriptor.
_GONE = (OSError, RuntimeError, AttributeError, ValueError)


class _End(Enum):
    """What follows the last byte."""

    NOTHING = auto()
    EOF = auto()
    CLOSE = auto()


class Total(Protocol):
    """What the connections of a listener hold together."""

    num_unsent_bytes: int


class Outbox:
    """The sending half of one connection; `on_sent` is called when a backlog has been sent."""

    def __init__(
        self, transport: asyncio.Transport, total: Total, on_sent: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._total = total
        self._on_sent = on_sent
        self._queue: deque[bytes] = deque()
        self._num_done = 0  # bytes of the first one in the queue
        self._is_full = False  # the socket has not taken the last piece yet
        self._end = _End.NOTHING
        self._num_given = 0  # bytes, to the transport
        self.num_held = 0  # bytes in the queue: a large one counts until its last piece has left
        self.num_backlog = 0  # those of them that are in small frames: a reader's delay

    def open(self) -> None:
        """Let the transport report each byte that stays behind, at once under TLS (its tickets)."""
        with contextlib.suppress(*_GONE):
            self._transport.set_write_buffer_limits(1, 0)

    @property
    def is_behind(self) -> bool:
        """Whether bytes wait for the peer to read."""
        return self._is_full or bool(self._queue)

    @property
    def is_closing(self) -> bool:
        return self._end is _End.CLOSE or self._transport.is_closing()

    @property
    def num_unsent(self) -> int:
        return self.num_held - self._num_done + self._num_in_transport()

    @property
    def num_sent(self) -> int:
        """Bytes that the socket has taken since the connection was made."""
        return self._num_given - self._num_in_transport()

    def _num_in_transport(self) -> int:
        try:
            return self._transport.get_write_buffer_size()
        except _GONE:
            return 0

    def write(self, data: bytes) -> None:
        """Send bytes, after all that wait; none after `close` or the peer's end."""
        if self._is_full or self._queue or len(data) > PIECE:
            self._append(data)
        elif data and not self._transport.is_closing():
            self._give(data)

    def _append(self, data: bytes) -> None:
        if self.is_closing or not data:
            return
        self._queue.append(data)
        self._count(len(data), 1)
        if len(self._queue) == 1 and not self._is_full:
            self._feed()

    def _give(self, piece: bytes | memoryview) -> None:
        self._num_given += len(piece)
        try:
            self._transport.write(piece)
        except _GONE:
            self.abort()

    def _count(self, num_bytes: int, sign: int) -> None:
        self.num_held += sign * num_bytes
        self._total.num_unsent_bytes += sign * num_bytes
        if num_bytes <= SMALL:
            self.num_backlog += sign * num_bytes

    def pause(self) -> None:
        """The transport holds bytes that the socket did not take."""
        self._is_full = True

    def resume(self) -> None:
        """The transport holds none."""
        asyncio.get_running_loop().call_soon(self._resumed)

    def _resumed(self) -> None:
        self._is_full = False
        self._feed()

    def _feed(self) -> None:
        """Give one piece, and after a turn of the loop the next, unless the socket is full."""
        if self._queue:
            self._give(self._next_piece())
        if self._is_full:
            return
        if self._queue:
            asyncio.get_running_loop().call_soon(self._feed)
        elif not self._transport.is_closing():
            self._finish()
            self._on_sent()

    def _next_piece(self) -> bytes | memoryview:
        first = self._queue[0]
        if len(first) > SMALL:
            piece = memoryview(first)[self._num_done : self._num_done + PIECE]
            self._num_done += len(piece)
            if self._num_done == len(first):
                self._num_done = 0
                self._count(len(self._queue.popleft()), -1)
            return piece
        frames: list[bytes] = []
        num_left = PIECE
        while self._queue and len(self._queue[0]) <= min(SMALL, num_left):
            frames.append(self._queue.popleft())
            num_left -= len(frames[-1])
            self._count(len(frames[-1]), -1)
        return b"".join(frames)

    # --- ends -------------------------------------------------------------------------------

    def half_close(self) -> None:
        """Send EOF after the last byte; TLS has none."""
        self._end = _End.EOF
        if not self.is_behind:
            self._finish()

    def close(self) -> None:
        """Close after the last byte."""
        self._end = _End.CLOSE
        if not self.is_behind:
            self._finish()

    def _finish(self) -> None:
        # A TLS transport that is closed twice loses its state, one that can_write_eof has none.
        if self._end is _End.CLOSE and not self._transport.is_closing():
            self._call(self._transport.close)
        elif self._end is _End.EOF and self._transport.can_write_eof():
            self._call(self._transport.write_eof)

    def abort(self) -> None:
        """Disconnect; what is unsent is lost."""
        self._end = _End.CLOSE
        with contextlib.suppress(*_GONE):
            self._transport.abort()
        self.clear()

    def clear(self) -> None:
        """Let go of what is unsent."""
        self._queue.clear()
        self._is_full = False
        self._total.num_unsent_bytes -= self.num_held
        self.num_held = self.num_backlog = self._num_done = 0

    def read_on(self, is_wanted: bool) -> None:
        """Read from the peer, or leave what it sends in the socket."""
        transport = self._transport
        self._call(transport.resume_reading if is_wanted else transport.pause_reading)

    def _call(self, call: Callable[..., None], *args: object) -> None:
        """A call of the transport. What it raises ends the connection, as the peer's reset does."""
        try:
            call(*args)
        except _GONE:
            self.abort()
