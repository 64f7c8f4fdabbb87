"""The operations and results of the prefix cache, as the runner and the disk execute them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)`, whose keys and values are in this extent."""

    extent: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `num_tokens` of a prompt are cached, in segments and a checkpoint.

    `missing` payloads are only on disk.
    """

    num_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    checkpoint: int | None = None
    missing: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Save:
    """Copy from sequence `id`, which has computed `position` tokens.

    Tokens `[start, stop)` become an extent; windows, states, and the keys and values of tokens
    `[stop, position)` become a checkpoint.
    """

    id: int
    extent: int | None
    start: int
    stop: int
    checkpoint: int | None
    position: int


@dataclass(frozen=True, slots=True)
class Split:
    """End an extent at token `at`; the rest of it becomes the extent `rest`."""

    extent: int
    at: int
    rest: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free a payload's memory."""

    payload: int


@dataclass(frozen=True, slots=True)
class Stored:
    """The content of a file: an extent that starts at token `start`, or a checkpoint at `position`.

    `words` are all tokens from the first to the payload's last, so a file is self-contained.
    """

    scope: int
    start: int
    position: int | None
    words: bytes


@dataclass(frozen=True, slots=True)
class Write:
    """Write a payload to disk."""

    payload: int
    stored: Stored


@dataclass(frozen=True, slots=True)
class Unlink:
    """Remove a payload's file."""

    payload: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read a payload from disk, if its file has the content `stored`."""

    payload: int
    stored: Stored


CacheOp = Save | Split | Drop | Write | Unlink | Fetch


@dataclass(slots=True)
class CacheStats:
    """Counters of the prefix cache; `num_asked` and `num_hit` are tokens since the start."""

    max_bytes: int = 0
    max_disk_bytes: int = 0
    num_bytes: int = 0  # in memory: payloads and the index
    disk_bytes: int = 0
    num_asked: int = 0
    num_hit: int = 0
    num_evicted: int = 0
    num_from_disk: int = 0
