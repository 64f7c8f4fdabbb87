"""The operations and results of the prefix cache, as the runner and the disk execute them."""

from dataclasses import dataclass

# --- what is found, and what the runner is to do ----------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """The keys and values of tokens `[start, stop)` are in this extent."""

    extent: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `num_tokens` of a prompt are there: in segments, and in a checkpoint's states.

    `missing` payloads are only on disk.
    """

    num_tokens: int = 0
    segments: tuple[Segment, ...] = ()
    checkpoint: int | None = None
    missing: tuple[int, ...] = ()


NO_HIT = Hit()


@dataclass(frozen=True, slots=True)
class Save:
    """Keep what sequence `id` has computed, which is `position` tokens.

    Tokens `[start, stop)` as an extent; and as a checkpoint windows, states, and the keys and
    values of tokens `[stop, position)`.
    """

    id: int
    extent: int | None
    start: int
    stop: int
    checkpoint: int | None
    position: int


@dataclass(frozen=True, slots=True)
class Split:
    """An extent ends at token `at` from now on; the rest of it is the extent `rest`."""

    extent: int
    at: int
    rest: int


@dataclass(frozen=True, slots=True)
class Drop:
    """A payload leaves memory."""

    payload: int


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file holds: an extent that begins at token `start`, or a checkpoint at `position`.

    `words` are all tokens from the first to the payload's last: a file explains itself.
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
    """A payload leaves the disk."""

    payload: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring a payload from disk, if its file is what it should be."""

    payload: int
    stored: Stored


CacheOp = Save | Split | Drop | Write | Unlink | Fetch


@dataclass(slots=True)
class CacheStats:
    """The prefix cache in numbers; `num_asked` and `num_hit` are tokens, since the start."""

    max_bytes: int = 0
    max_disk_bytes: int = 0
    num_bytes: int = 0  # in memory: payloads and the index
    disk_bytes: int = 0
    num_asked: int = 0
    num_hit: int = 0
    num_evicted: int = 0
    num_from_disk: int = 0
