"""What has been computed before: an index of prompt prefixes, by blocks of tokens.

A radix tree whose edges are *extents*: runs of whole blocks that entered together, each of which
stands for one payload of keys and values that the runner keeps. The tree decides what is found and
kept, what gives way and what is on disk; it never sees an array, a clock or a file, and says what
is to be done in operations, whose order counts:

    hit = cache.enter(blocks, limit)        what a sequence need not compute
    cache.insert(id, blocks, num_tokens)    keep what it has computed
    cache.shrink(num_bytes)                 live rows need the room
    ops = cache.take_ops()                  for the runner

Whole blocks are kept, and what is found may end inside of one. A key only finds a candidate: FNV is
easily forged, so a hit compares all tokens (tested with a forged collision). Scopes (another model,
another tenant) have trees of their own.

Layers that keep a window or a state can only go on from where one was saved: their models resume
at *checkpoints*, which may lie inside a block and then bring the tokens after its beginning along.

Invariants, asserted by `check()`: memory holds no more than the last `shrink` left, the disk no
more than its cap; an extent's parent is there as long as it is, and has no branch between blocks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count, islice, takewhile

import numpy as np

from mlxlite.engine.memory import Memory
from mlxlite.prefix_cache.hashing import Blocks, blocks_of, num_equal
from mlxlite.prefix_cache.operations import (
    CacheOp,
    CacheStats,
    Drop,
    Fetch,
    Hit,
    Save,
    Segment,
    Split,
    Store,
    Stored,
    Unlink,
)

_WORD = 4  # bytes of a token
_NODE_BYTES, _KEY_BYTES = 1024, 48  # of this index, roughly: an object; a block's key
_FILE_BYTES = 16 << 10  # a file's header and rounding, at most
_Place = tuple[int, bytes]  # of a checkpoint: its position and its tail
MAX_NEXTS = 16  # extents, the newest, that are looked into for the beginning of a block


@dataclass(slots=True, eq=False)
class _Payload:
    """What the runner keeps under an id: in memory (`is_held`), on disk (`is_stored`), or both."""

    id: int
    num_bytes: int
    used: int
    file_bytes: int = 0  # at most; 0: not on disk
    is_held: bool = True
    is_coming: bool = False  # from disk; its bytes already count as held

    @property
    def is_stored(self) -> bool:
        return self.file_bytes > 0


@dataclass(slots=True, eq=False)
class _Checkpoint(_Payload):
    """Windows and states at `position`, which is `tail` after a block's end."""

    position: int = 0
    tail: bytes = b""


@dataclass(slots=True, eq=False)
class _Extent(_Payload):
    """Blocks `[start, stop)` of every prompt that begins like this. A root has none."""

    start: int = 0  # in blocks
    words: bytes = b""
    keys: tuple[int, ...] = ()
    parent: "_Extent | None" = None
    children: "dict[int, _Extent]" = field(default_factory=dict)  # by their first key
    checkpoints: dict[_Place, _Checkpoint] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.keys)

    def next_under(self) -> "Iterable[_Payload]":
        return (*self.children.values(), *self.checkpoints.values())

    def hanging(self) -> list[_Payload]:
        """All that is under it, what is deepest first."""
        found: list[_Payload] = []
        extents = [self]
        for extent in extents:
            found += extent.next_under()
            extents += extent.children.values()
        return found[::-1]


def _is_held(payload: _Payload) -> bool:
    return payload.is_held or payload.is_coming


@dataclass(frozen=True, slots=True)
class _Match:
    """Where a prompt leaves the tree: `num` blocks along `path`, the root first."""

    path: tuple[_Extent, ...]
    num: int


class PrefixCache:
    """0 bytes is no cache: nothing is found or kept. Not `to_token`: hits end at blocks."""

    def __init__(
        self, memory: Memory, *, block_size: int = 16, num_bytes: int = 0, disk_bytes: int = 0
    ) -> None:
        self._memory, self.to_token = memory, True
        self.block_size = block_size
        self.has_checkpoints = memory.has_state
        self.stats = CacheStats(max_bytes=num_bytes, max_disk_bytes=disk_bytes)
        self._room = num_bytes  # the last shrink may have left less
        self._roots: dict[int, _Extent] = {}  # by scope
        self._payloads: dict[int, tuple[_Payload, _Extent, int]] = {}  # id → (it, at, scope)
        self._ops: list[CacheOp] = []
        self._ids = count(1)
        self._clock = 0

    def take_ops(self) -> tuple[CacheOp, ...]:
        """What the runner has to do since the last call, in this order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def match(self, blocks: Blocks, limit: int) -> Hit:
        """The longest prefix of at most `limit` tokens from which a sequence can go on."""
        match = self._walk(blocks, limit)
        checkpoint, size, num_tokens = 0, self.block_size, match.num * self.block_size
        extents = list(match.path[1:])
        if self.has_checkpoints:
            if (found := self._checkpoint(match, blocks, limit)) is None:
                return Hit()
            checkpoint, num_tokens = found.id, found.position
            extents = [extent for extent in extents if extent.start < num_tokens // size]
        elif (begun := self._begun(match, blocks, limit)) is not None:
            extents += [begun[0]] * (begun[0] is not extents[-1])
            num_tokens += begun[1]
        stop = num_tokens // size * size if self.has_checkpoints else num_tokens
        segments = [Segment(e.id, e.start * size, min(e.stop * size, stop)) for e in extents]
        wanted = [extent.id for extent in extents] + [checkpoint] * bool(checkpoint)
        missing = tuple(id for id in wanted if not self._payloads[id][0].is_held)
        return Hit(num_tokens, tuple(segments), checkpoint or None, missing)

    def enter(self, blocks: Blocks, limit: int, least: int = 0) -> Hit:
        """`match` for a sequence that now begins: what it finds, if enough, is used and counted."""
        hit = self.match(blocks, limit)
        if hit.missing:
            hit = self._without_missing(hit)
        hit = hit if hit.num_tokens >= least else Hit()
        self._clock += 1
        self.stats.num_asked += limit
        self.stats.num_hit += hit.num_tokens
        for id in (*(segment.extent for segment in hit.segments), hit.checkpoint):
            if id is not None:
                self._payloads[id][0].used = self._clock
        return hit

    def _without_missing(self, hit: Hit) -> Hit:
        """What can be had without what is on disk: there was no room to fetch it."""
        if self.has_checkpoints:
            return Hit()
        segments = tuple(takewhile(lambda s: s.extent not in hit.missing, hit.segments))
        return Hit(segments[-1].stop if segments else 0, segments)

    def _walk(self, blocks: Blocks, limit: int) -> _Match:
        """As far along the tree as the tokens are the same."""
        assert blocks.size == self.block_size
        root = self._roots.get(blocks.scope)
        if root is None:
            return _Match((), 0)
        num, step = min(len(blocks.keys), limit // self.block_size), _WORD * self.block_size
        path, at = [root], 0
        while at < num and (child := path[-1].children.get(blocks.keys[at])) is not None:
            ahead = blocks.words[at * step : num * step]
            if not (common := num_equal(child.words, ahead, step)):  # a collision
                break
            path.append(child)
            at += common
            if at < child.stop:
                break
        return _Match(tuple(path), at)

    def _checkpoint(self, match: _Match, blocks: Blocks, limit: int) -> _Checkpoint | None:
        """The last place along a match where windows and states were saved."""
        for extent in reversed(match.path):
            here = extent.checkpoints.values()
            fitting = [c for c in here if c.position <= limit and self._is_on_way(c, match, blocks)]
            if fitting:
                return max(fitting, key=lambda checkpoint: checkpoint.position)
        return None

    def _is_on_way(self, checkpoint: _Checkpoint, match: _Match, blocks: Blocks) -> bool:
        begin = checkpoint.position * _WORD - len(checkpoint.tail)
        if begin > match.num * self.block_size * _WORD:
            return False
        return blocks.words[begin : checkpoint.position * _WORD] == checkpoint.tail

    def _nexts(self, match: _Match, blocks: Blocks, limit: int) -> list[tuple[_Extent, int]]:
        """The extents after a match, and how many tokens more each has of the prompt."""
        last, step = match.path[-1], _WORD * self.block_size
        words = blocks.words[match.num * step : limit * _WORD]
        if match.num < last.stop:
            return [(last, num_equal(words, last.words[(match.num - last.start) * step :], _WORD))]
        nexts = islice(reversed(last.children.values()), MAX_NEXTS)
        return [(child, num_equal(words, child.words[:step], _WORD)) for child in nexts]

    def _begun(self, match: _Match, blocks: Blocks, limit: int) -> tuple[_Extent, int] | None:
        """Who has most of the block in which a prompt leaves the tree, and how much: in memory."""
        nexts = self._nexts(match, blocks, limit) if match.num and self.to_token else []
        held = [(extent, num) for extent, num in nexts if num and extent.is_held]
        return max(held, key=lambda found: found[1], default=None)

    # --- keep -------------------------------------------------------------------------------

    def insert(self, id: int, blocks: Blocks, num_tokens: int) -> None:
        """Keep the first `num_tokens` that sequence `id` has computed, as far as there is room."""
        if not num_tokens:
            return
        match = self._walk(blocks, num_tokens)
        num_blocks = num_tokens // self.block_size
        at = match.path[-1] if match.path else None
        if at is not None and match.num < min(num_blocks, at.stop) and not at.is_held:
            self._remove(at)  # only its file could be cut: this one takes its place
            match = self._walk(blocks, num_tokens)
        tail = blocks.words[num_blocks * self.block_size * _WORD : num_tokens * _WORD]
        at = match.path[-1] if match.path else None
        is_checkpoint = self.has_checkpoints and not (
            at is not None and match.num == num_blocks and (num_tokens, tail) in at.checkpoints
        )
        if match.num == num_blocks and not is_checkpoint:
            return
        wanted = self._extent_bytes(num_blocks - match.num) + _NODE_BYTES  # of a split
        wanted += self._checkpoint_bytes(num_tokens, tail) if is_checkpoint else 0
        if self.has_checkpoints and not self._can_fit(wanted, match.path):
            return  # all or nothing: nobody gives way for nothing
        room = self._make_room(wanted, match.path)
        if room < wanted:
            fitting = max(0, (room - 2 * _NODE_BYTES) // self._block_bytes)
            num_blocks = match.num + min(num_blocks - match.num, fitting)
            if self.has_checkpoints or num_blocks == match.num:
                return
        self._grow(id, blocks, match, num_blocks, (num_tokens, tail) if is_checkpoint else None)

    def _grow(
        self, id: int, blocks: Blocks, match: _Match, num_blocks: int, checkpoint: _Place | None
    ) -> None:
        scope = blocks.scope
        at = match.path[-1] if match.path else _Extent(0, 0, 0)
        extent: _Extent | None = None
        if num_blocks > match.num:
            if match.num < at.stop:
                self._split(at, match.num, scope)
            if blocks.keys[match.num] in at.children:  # a collision: the first one stays
                return
            extent = self._new_extent(next(self._ids), blocks, match.num, num_blocks, at)
            self._hold(extent, extent, scope)
        saved: _Checkpoint | None = None
        if checkpoint is not None:
            position, tail = checkpoint
            num_bytes = self._checkpoint_bytes(position, tail)
            new_id = next(self._ids)
            saved = _Checkpoint(new_id, num_bytes, self._clock, position=position, tail=tail)
            (extent or at).checkpoints[checkpoint] = saved
            self._hold(saved, extent or at, scope)
        self._roots[scope] = match.path[0] if match.path else at  # eviction may have taken it
        start, stop = match.num * self.block_size, num_blocks * self.block_size
        ids = [payload.id if payload else None for payload in (extent, saved)]
        position = checkpoint[0] if checkpoint else stop
        self._ops.append(Save(id, ids[0], start, stop, ids[1], position))
        for payload in filter(None, (extent, saved)):
            self._store(payload)

    def _new_extent(
        self, id: int, blocks: Blocks, start: int, stop: int, parent: _Extent
    ) -> _Extent:
        step = _WORD * self.block_size
        extent = _Extent(
            id,
            self._extent_bytes(stop - start),
            self._clock,
            start=start,
            words=blocks.words[start * step : stop * step],
            keys=blocks.keys[start:stop],
            parent=parent,
        )
        parent.children[extent.keys[0]] = extent
        return extent

    def _hold(self, payload: _Payload, at: _Extent, scope: int) -> None:
        self._payloads[payload.id] = payload, at, scope
        self.stats.num_bytes += payload.num_bytes

    def _split(self, extent: _Extent, at: int, scope: int) -> None:
        """Two extents out of one, because another prompt branches off between its blocks."""
        self._unstore(extent)
        num = at - extent.start
        step = _WORD * self.block_size
        rest = _Extent(
            next(self._ids),
            self._extent_bytes(len(extent.keys) - num),
            extent.used,
            start=at,
            words=extent.words[num * step :],
            keys=extent.keys[num:],
            parent=extent,
            children=extent.children,
        )
        for child in rest.children.values():
            child.parent = rest
        for key, checkpoint in list(extent.checkpoints.items()):
            if checkpoint.position * _WORD - len(checkpoint.tail) > at * step:
                rest.checkpoints[key] = extent.checkpoints.pop(key)
                self._payloads[checkpoint.id] = checkpoint, rest, scope
        extent.children = {rest.keys[0]: rest}
        extent.words, extent.keys = extent.words[: num * step], extent.keys[:num]
        self.stats.num_bytes += self._extent_bytes(num) - extent.num_bytes
        extent.num_bytes = self._extent_bytes(num)
        self._hold(rest, rest, scope)
        self._ops.append(Split(extent.id, at * self.block_size, rest.id))
        for part in (extent, rest):
            self._store(part)

    @property
    def _block_bytes(self) -> int:
        return self.block_size * (self._memory.token_bytes + _WORD) + _KEY_BYTES

    def _extent_bytes(self, num_blocks: int) -> int:
        return _NODE_BYTES + num_blocks * self._block_bytes

    def _checkpoint_bytes(self, position: int, tail: bytes) -> int:
        tail_bytes = len(tail) // _WORD * self._memory.token_bytes
        return _NODE_BYTES + self._memory.state_bytes(position) + tail_bytes

    def shrink(self, num_bytes: int) -> None:
        """Hold no more than this until the next call: what live rows leave."""
        self._room = max(0, min(num_bytes, self.stats.max_bytes))
        self._make_room(0, ())

    def _can_fit(self, wanted: int, keep: Iterable[_Payload]) -> bool:
        return wanted + sum(p.num_bytes for p in {*keep} if _is_held(p)) <= self._room

    def _make_room(self, wanted: int, keep: Iterable[_Payload]) -> int:
        """Evict, oldest leaves first, until so much fits beside the rest; what then fits.

        Where that is not enough, the index of what is only on disk gives way too.
        """
        for is_in, evict in ((_is_held, self._evict), (lambda _: True, self._remove)):
            if self.stats.num_bytes + wanted > self._room:
                for payload in self._oldest(is_in, keep):
                    self.stats.num_evicted += 1
                    evict(payload)
                    if self.stats.num_bytes + wanted <= self._room:
                        break
        return self._room - self.stats.num_bytes

    def _oldest(
        self, is_in: Callable[[_Payload], bool], keep: Iterable[_Payload]
    ) -> Iterator[_Payload]:
        """What may leave memory, or the disk, by its last use; an extent after all under it."""
        spared = {extent.id for extent in keep}

        def may_go(payload: _Payload, at: _Extent) -> bool:
            is_one = is_in(payload) and payload.id not in spared
            return is_one and (payload is not at or not any(map(is_in, at.next_under())))

        heap = [(p.used, -p.id) for p, at, _ in self._payloads.values() if may_go(p, at)]
        heapify(heap)
        while heap:
            entry = self._payloads.get(-heappop(heap)[1])
            if entry is None:  # went with another
                continue
            payload, at, _ = entry
            above = at.parent if payload is at else at
            yield payload
            if above is not None and above.id and may_go(above, above):
                heappush(heap, (above.used, -above.id))

    def _evict(self, payload: _Payload) -> None:
        """Out of memory; what is on disk stays in the tree."""
        if not payload.is_stored:
            self._remove(payload)
            return
        payload.is_held = payload.is_coming = False
        self.stats.num_bytes -= payload.num_bytes - _NODE_BYTES
        self._ops.append(Drop(payload.id))

    def _remove(self, payload: _Payload) -> None:
        """Out of the tree, with all that hangs off it."""
        _, at, scope = self._payloads[payload.id]
        root = self._roots[scope]
        if payload is not at:
            assert isinstance(payload, _Checkpoint)
            del at.checkpoints[payload.position, payload.tail]
            self._forget(payload)
        else:
            for hanging in (*at.hanging(), at):
                self._forget(hanging)
            assert at.parent is not None
            del at.parent.children[at.keys[0]]
        if not root.children and not root.checkpoints:
            del self._roots[scope]

    def _forget(self, payload: _Payload) -> None:
        if payload.is_held:
            self._ops.append(Drop(payload.id))
        self.stats.num_bytes -= payload.num_bytes if _is_held(payload) else _NODE_BYTES
        self._unstore(payload)
        del self._payloads[payload.id]

    def lose(self, ids: Iterable[int]) -> None:
        """The runner has not got these after all."""
        for id in ids:
            if id in self._payloads:
                self._remove(self._payloads[id][0])

    def clear(self) -> None:
        self.lose(list(self._payloads))

    def forget_held(self) -> None:
        """The runner was reset: what was in memory is gone; what is on disk is not."""
        for id in sorted(self._payloads, reverse=True):
            if id in self._payloads and _is_held(self._payloads[id][0]):
                self._evict(self._payloads[id][0])

    # --- disk -------------------------------------------------------------------------------

    def _store(self, payload: _Payload) -> None:
        """Have a payload written, if the cap allows, after its parents: a file alone is no use."""
        at = self._payloads[payload.id][1]
        path = self._path(at)
        size = payload.num_bytes + _FILE_BYTES + (at.stop + 1) * self.block_size * _WORD
        if size > self.stats.max_disk_bytes or any(
            not e.is_stored for e in path if e is not payload
        ):
            return
        if self.stats.disk_bytes + size > self.stats.max_disk_bytes:
            for other in self._oldest(lambda other: other.is_stored, path):
                self._unstore(other)
                if not _is_held(other):
                    self._remove(other)
                if self.stats.disk_bytes + size <= self.stats.max_disk_bytes:
                    break
            else:
                return
        payload.file_bytes = size
        self.stats.disk_bytes += size
        self._ops.append(Store(payload.id, self._stored(payload)))

    def _stored(self, payload: _Payload) -> Stored:
        """What its file says of itself."""
        _, at, scope = self._payloads[payload.id]
        words = b"".join(extent.words for extent in self._path(at))
        if not isinstance(payload, _Checkpoint):
            return Stored(scope, at.start * self.block_size, None, words)
        begin = payload.position * _WORD - len(payload.tail)  # its extent may be split
        words = words[:begin] + payload.tail
        return Stored(scope, begin // _WORD, payload.position, words)

    def _path(self, extent: _Extent) -> list[_Extent]:
        """An extent and those above it, from the top."""
        path = []
        at: _Extent | None = extent
        while at is not None and at.id:
            path.append(at)
            at = at.parent
        return path[::-1]

    def _unstore(self, payload: _Payload) -> None:
        if payload.is_stored:
            self.stats.disk_bytes -= payload.file_bytes
            payload.file_bytes = 0
            self._ops.append(Unlink(payload.id))

    def fetch(self, ids: Iterable[int]) -> bool:
        """Have payloads brought from disk, all or none; whether they are on their way."""
        coming = [p for p in (self._payloads[id][0] for id in ids) if not _is_held(p)]
        wanted = sum(payload.num_bytes - _NODE_BYTES for payload in coming)
        # What somebody else waits for is spared: the two would drive out one another for ever.
        spared = coming + [p for p, _, _ in self._payloads.values() if p.is_coming]
        spared += [e for payload in coming for e in self._path(self._payloads[payload.id][1])]
        if not self._can_fit(wanted, spared) or self._make_room(wanted, spared) < wanted:
            return False
        for payload in coming:
            payload.is_coming, payload.used = True, self._clock
            self.stats.num_bytes += payload.num_bytes - _NODE_BYTES
            self._ops.append(Fetch(payload.id, self._stored(payload)))
        return True

    def fetched(self, id: int) -> None:
        """A payload has come from disk."""
        payload = self._payloads[id][0] if id in self._payloads else None
        if payload is not None and payload.is_coming:
            payload.is_coming, payload.is_held = False, True
            self.stats.num_from_disk += 1
        elif payload is None or not payload.is_held:  # else it was asked for twice
            self._ops.append(Drop(id))  # it gave way while it was on its way

    def unstored(self, id: int) -> None:
        """A payload could not be written, or read."""
        if id in self._payloads:
            payload = self._payloads[id][0]
            self._unstore(payload)
            if not payload.is_held:
                self._remove(payload)

    def restore(self, found: Iterable[tuple[int, Stored]]) -> None:
        """Rebuild the index from an earlier process's files, by id; what fits nowhere must go."""
        items = sorted(found, key=lambda item: (item[1].position is not None, len(item[1].words)))
        self._ids = count(1 + max((id for id, _ in items), default=0))
        for id, stored in items:
            if not self._restore_one(id, stored):
                self._ops.append(Unlink(id))

    def _restore_one(self, id: int, stored: Stored) -> bool:
        if len(stored.words) % _WORD or not 0 <= stored.scope < 1 << 64:
            return False
        tokens = np.frombuffer(stored.words, np.dtype("<u4")).tolist()
        blocks = blocks_of(tuple(tokens), stored.scope, self.block_size)
        match = self._walk(blocks, len(tokens))
        root = self._roots.get(stored.scope) or _Extent(0, 0, 0)
        at = match.path[-1] if match.path else root
        num, num_whole = len(blocks.keys), len(blocks.keys) * self.block_size
        tail = stored.words[num_whole * _WORD :]
        payload: _Payload
        if stored.position is None:
            size = self._extent_bytes(num - match.num)
            is_fit = stored.start == match.num * self.block_size and match.num == at.stop < num
            is_fit = is_fit and not tail and blocks.keys[match.num] not in at.children
        else:
            size = self._checkpoint_bytes(stored.position, tail)
            is_fit = self.has_checkpoints and match.num == num
            is_fit = is_fit and stored.position == len(tokens) > 0
            is_fit = is_fit and (stored.position, tail) not in at.checkpoints
        file_bytes = size + _FILE_BYTES + len(stored.words)
        is_room = self.stats.disk_bytes + file_bytes <= self.stats.max_disk_bytes
        if not is_fit or not is_room or self.stats.num_bytes + _NODE_BYTES > self._room:
            return False
        if stored.position is None:
            payload = at = self._new_extent(id, blocks, match.num, num, at)
        else:
            payload = _Checkpoint(id, size, 0, position=stored.position, tail=tail)
            at.checkpoints[stored.position, tail] = payload
        self._roots[stored.scope] = root
        payload.is_held, payload.file_bytes = False, file_bytes
        self._payloads[id] = payload, at, stored.scope
        self.stats.num_bytes += _NODE_BYTES
        self.stats.disk_bytes += file_bytes
        return True

    def check(self) -> None:
        """Assert the module's invariants. Tests call it after every operation."""
        seen: set[int] = set()
        held = stored = 0
        for root in self._roots.values():
            assert not root.keys
            assert root.children or root.checkpoints
            for payload in root.hanging():
                assert payload.id not in seen
                seen.add(payload.id)
                held += payload.num_bytes if _is_held(payload) else _NODE_BYTES
                stored += payload.file_bytes
                assert _is_held(payload) or payload.is_stored
                if isinstance(payload, _Extent):
                    self._check_extent(payload)
        assert seen == set(self._payloads)
        assert held == self.stats.num_bytes
        assert stored == self.stats.disk_bytes <= self.stats.max_disk_bytes
        assert self.stats.num_bytes <= self._room

    def _check_extent(self, extent: _Extent) -> None:
        assert extent.parent is not None
        assert extent.parent.stop == extent.start < extent.stop
        assert extent.parent.children[extent.keys[0]] is extent
        assert len(extent.words) == len(extent.keys) * self.block_size * _WORD
        assert extent.num_bytes == self._extent_bytes(len(extent.keys))
