"""The structure of the prefix cache: one radix tree of token blocks per scope.

Its edges are *extents*: runs of whole blocks that entered together, each of which stands for one
payload of keys and values in the runner. *Checkpoints* hang off the extent in which they end. The
tree decides what a prompt matches and where payloads hang; it never counts bytes against a limit,
issues no operations, and never sees an array, a clock or a file.

A key only finds a candidate: FNV collisions are easily forged, so a match compares all tokens
(tested with a forged collision). Scopes (another model, another tenant) share nothing.

Invariants, asserted by `check()`: an extent starts where its parent stops, branches begin only at
extents' ends, and every payload hangs below the root of its scope.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from mlxlite.prefix_cache.hashing import WORD_BYTES, Blocks, blocks_of, num_equal
from mlxlite.prefix_cache.operations import Stored

NODE_BYTES, _KEY_BYTES = 1024, 48  # of the index, roughly: a node; a block's key
MAX_BRANCHES = 16  # extents, the newest, that are compared with a partial block


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes that payloads take in memory, their nodes in the index included.

    `state_bytes` maps a position to the bytes of windows and states there; None: no layer has any.
    """

    block_size: int
    token_bytes: int
    state_bytes: Callable[[int], int] | None = None

    @property
    def has_checkpoints(self) -> bool:
        return self.state_bytes is not None

    @property
    def block(self) -> int:
        return self.block_size * (self.token_bytes + WORD_BYTES) + _KEY_BYTES

    def extent(self, num_blocks: int) -> int:
        return NODE_BYTES + num_blocks * self.block

    def checkpoint(self, position: int, tail: bytes) -> int:
        assert self.state_bytes is not None
        tail_bytes = len(tail) // WORD_BYTES * self.token_bytes
        return NODE_BYTES + self.state_bytes(position) + tail_bytes


@dataclass(slots=True, eq=False)
class Payload:
    """What the runner keeps under an id: in memory (`is_held`), on disk (`is_stored`), or both."""

    id: int
    num_bytes: int
    parent: "Extent | None"  # None: a root, which is no payload
    used: int = 0  # when last, in sequences entered
    file_bytes: int = 0  # at most; 0: not on disk
    is_held: bool = True
    is_fetching: bool = False  # from disk

    @property
    def is_stored(self) -> bool:
        return self.file_bytes > 0

    @property
    def is_resident(self) -> bool:
        """Whether its bytes count as memory: held, or reserved for a read in progress."""
        return self.is_held or self.is_fetching

    def hanging(self) -> "tuple[Payload, ...]":
        """What hangs directly below it."""
        return ()


@dataclass(slots=True, eq=False)
class Checkpoint(Payload):
    """Windows and states at `position`; `tail` are the tokens since the last whole block."""

    position: int = 0
    tail: bytes = b""

    @property
    def start(self) -> int:
        """The token at which its tail starts."""
        return self.position - len(self.tail) // WORD_BYTES


@dataclass(slots=True, eq=False)
class Extent(Payload):
    """Blocks `[start, stop)` of every prompt with this prefix. A root has none, and id 0."""

    scope: int = 0
    start: int = 0  # in blocks
    words: bytes = b""
    keys: tuple[int, ...] = ()
    children: "dict[int, Extent]" = field(default_factory=dict)  # by their first key
    checkpoints: dict[tuple[int, bytes], Checkpoint] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.keys)

    def hanging(self) -> tuple[Payload, ...]:
        return (*self.children.values(), *self.checkpoints.values())

    def all_below(self) -> list[Payload]:
        """Every payload below it, the deepest first."""
        found: list[Payload] = []
        extents = [self]
        for extent in extents:
            found += extent.hanging()
            extents += extent.children.values()
        return found[::-1]


def path_of(payload: Payload | None) -> list[Extent]:
    """The extents from the top to a payload, itself included if it is one; without the root."""
    path: list[Extent] = []
    while payload is not None and payload.parent is not None:
        if isinstance(payload, Extent):
            path.append(payload)
        payload = payload.parent
    return path[::-1]


@dataclass(frozen=True, slots=True)
class Match:
    """Where a prompt leaves the tree: `num_blocks` along `path`, the root first."""

    path: tuple[Extent, ...]
    num_blocks: int

    @property
    def last(self) -> Extent:
        return self.path[-1]


class RadixTree:
    """Payloads by scope, tokens and id; see the module."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._block_bytes = sizes.block_size * WORD_BYTES  # of its tokens
        self._roots: dict[int, Extent] = {}  # by scope; none is empty
        self.payloads: dict[int, Payload] = {}  # by id

    # --- lookup -----------------------------------------------------------------------------

    def walk(self, blocks: Blocks, limit: int) -> Match:
        """The longest match, in whole blocks, of at most `limit` tokens."""
        assert blocks.size == self.sizes.block_size
        root = self._roots.get(blocks.scope) or Extent(0, 0, None, scope=blocks.scope)
        num, step = min(len(blocks.keys), limit // blocks.size), self._block_bytes
        path, at = [root], 0
        while at < num and (child := path[-1].children.get(blocks.keys[at])) is not None:
            ahead = blocks.words[at * step : num * step]
            if not (common := num_equal(child.words, ahead, step)):  # a collision
                break
            path.append(child)
            at += common
            if at < child.stop:
                break
        return Match(tuple(path), at)

    def last_checkpoint(self, match: Match, blocks: Blocks, limit: int) -> Checkpoint | None:
        """The furthest checkpoint along a match, within `limit` tokens."""
        words = blocks.words
        for extent in reversed(match.path):
            fitting = [
                c
                for c in extent.checkpoints.values()
                if c.position <= limit
                and c.start <= match.num_blocks * blocks.size
                and words[c.start * WORD_BYTES : c.position * WORD_BYTES] == c.tail
            ]
            if fitting:
                return max(fitting, key=lambda checkpoint: checkpoint.position)
        return None

    def partial_block(self, match: Match, blocks: Blocks, limit: int) -> tuple[Extent, int]:
        """The extent in memory with most of the block after a match; how many tokens, or 0."""
        words = blocks.words[match.num_blocks * self._block_bytes : limit * WORD_BYTES]
        held = [
            (extent, num)
            for extent, block in self._next_blocks(match)
            if extent.is_held and (num := num_equal(words, block, WORD_BYTES))
        ]
        return max(held, key=lambda found: found[1], default=(match.last, 0))

    def _next_blocks(self, match: Match) -> Iterator[tuple[Extent, bytes]]:
        last, step = match.last, self._block_bytes
        if match.num_blocks < last.stop:
            yield last, last.words[(match.num_blocks - last.start) * step :]
            return
        for child in islice(reversed(last.children.values()), MAX_BRANCHES):
            yield child, child.words[:step]

    def stored(self, payload: Payload) -> Stored:
        """The description of a payload that its file carries."""
        assert payload.parent is not None
        scope = payload.parent.scope
        words = b"".join(extent.words for extent in path_of(payload))
        if isinstance(payload, Checkpoint):
            start = payload.start  # its extent may go on after that
            words = words[: start * WORD_BYTES] + payload.tail
            return Stored(scope, start, payload.position, words)
        assert isinstance(payload, Extent)
        return Stored(scope, payload.start * self.sizes.block_size, None, words)

    # --- change -----------------------------------------------------------------------------

    def add_extent(self, id: int, blocks: Blocks, start: int, stop: int, parent: Extent) -> Extent:
        """Blocks `[start, stop)` of a prompt, below the extent that ends at `start`."""
        step = self._block_bytes
        extent = Extent(
            id,
            self.sizes.extent(stop - start),
            parent,
            scope=blocks.scope,
            start=start,
            words=blocks.words[start * step : stop * step],
            keys=blocks.keys[start:stop],
        )
        parent.children[extent.keys[0]] = extent
        self._register(extent, parent)
        return extent

    def add_checkpoint(self, id: int, position: int, tail: bytes, parent: Extent) -> Checkpoint:
        num_bytes = self.sizes.checkpoint(position, tail)
        checkpoint = Checkpoint(id, num_bytes, parent, position=position, tail=tail)
        parent.checkpoints[position, tail] = checkpoint
        self._register(checkpoint, parent)
        return checkpoint

    def _register(self, payload: Payload, parent: Extent) -> None:
        self.payloads[payload.id] = payload
        if parent.parent is None:  # a root: new, or emptied since the match
            self._roots[parent.scope] = parent

    def split(self, extent: Extent, at: int, id: int) -> Extent:
        """End an extent at block `at`; the rest of it, under `id`, hangs below it."""
        num, step = at - extent.start, self._block_bytes
        rest = Extent(
            id,
            self.sizes.extent(len(extent.keys) - num),
            extent,
            extent.used,
            scope=extent.scope,
            start=at,
            words=extent.words[num * step :],
            keys=extent.keys[num:],
            children=extent.children,
        )
        for key, checkpoint in list(extent.checkpoints.items()):
            if checkpoint.start > at * self.sizes.block_size:
                rest.checkpoints[key] = extent.checkpoints.pop(key)
        for payload in rest.hanging():
            payload.parent = rest
        extent.children = {rest.keys[0]: rest}
        extent.words, extent.keys = extent.words[: num * step], extent.keys[:num]
        extent.num_bytes = self.sizes.extent(num)
        self.payloads[id] = rest
        return rest

    def restore(self, id: int, stored: Stored) -> Payload | None:
        """Add the payload that a file describes; None if it has no place here."""
        if len(stored.words) % WORD_BYTES or not 0 <= stored.scope < 1 << 64:
            return None
        size = self.sizes.block_size
        tokens = np.frombuffer(stored.words, np.dtype("<u4")).tolist()
        blocks = blocks_of(tuple(tokens), stored.scope, size)
        match = self.walk(blocks, len(tokens))
        last, start, stop = match.last, match.num_blocks, len(blocks.keys)
        tail = stored.words[stop * self._block_bytes :]
        if stored.position is not None:
            is_fit = self.sizes.has_checkpoints and start == stop
            is_fit = is_fit and stored.position == len(tokens) > 0
            if not is_fit or (stored.position, tail) in last.checkpoints:
                return None
            return self.add_checkpoint(id, stored.position, tail, last)
        is_fit = not tail and stored.start == start * size and start == last.stop < stop
        if not is_fit or blocks.keys[start] in last.children:
            return None
        return self.add_extent(id, blocks, start, stop, last)

    def remove(self, payload: Payload) -> list[Payload]:
        """Take out a payload and all below it; return them, the deepest first."""
        parent = payload.parent
        assert parent is not None
        removed = [payload]
        match payload:
            case Extent(keys=keys):
                removed = [*payload.all_below(), payload]
                del parent.children[keys[0]]
            case Checkpoint(position=position, tail=tail):
                del parent.checkpoints[position, tail]
        for each in removed:
            del self.payloads[each.id]
        if parent.parent is None and not parent.hanging():
            del self._roots[parent.scope]
        return removed

    def check(self) -> None:
        """Assert the module's invariants. Tests call it after every operation."""
        seen: dict[int, Payload] = {}
        for scope, root in self._roots.items():
            assert root.parent is None
            assert root.scope == scope
            assert not root.keys
            below = root.all_below()
            assert below
            for payload in below:
                assert payload.id not in seen
                seen[payload.id] = payload
                assert payload.parent is not None
                assert payload in payload.parent.hanging()
                if isinstance(payload, Extent):
                    self._check_extent(payload, payload.parent)
        assert seen == self.payloads

    def _check_extent(self, extent: Extent, parent: Extent) -> None:
        assert parent.scope == extent.scope
        assert parent.stop == extent.start < extent.stop
        assert parent.children[extent.keys[0]] is extent
        assert len(extent.words) == len(extent.keys) * self._block_bytes
        assert extent.num_bytes == self.sizes.extent(len(extent.keys))
