"""Which payloads of the prefix cache are in memory and on disk, and which give way.

It counts bytes against two limits and evicts by last use, leaves first. It changes the tree only
by removing payloads, and issues the operations that move them; their order counts.

Invariants, asserted by `check()`: memory holds no more than the last `shrink` allowed, the disk no
more than its cap, and a payload in neither is not in the tree. An extent outlives what hangs off
it in memory, and on disk.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush

from mlxlite.prefix_cache.hashing import WORD_BYTES
from mlxlite.prefix_cache.operations import (
    CacheOp,
    CacheStats,
    Drop,
    Fetch,
    Save,
    Split,
    Unlink,
    Write,
)
from mlxlite.prefix_cache.radix_tree import NODE_BYTES, Extent, Payload, RadixTree, path_of

MAX_WRITING_BYTES = 128 << 20  # copies on their way to the disk, at a time
_FILE_BYTES = 16 << 10  # a file's header and rounding, at most


class Residency:
    """Memory, at most `max_bytes`, and disk, at most `max_disk_bytes`, for the payloads of a tree.

    `stats` is live. Payloads that only the disk has still take a node of memory each.
    """

    def __init__(
        self, tree: RadixTree, max_bytes: int, max_disk_bytes: int, max_writing_bytes: int
    ) -> None:
        self._tree = tree
        self._max_writing_bytes = max_writing_bytes
        self.stats = CacheStats(max_bytes=max_bytes, max_disk_bytes=max_disk_bytes)
        self._limit = max_bytes  # of memory, now; the last shrink may have left less
        self._ops: list[CacheOp] = []
        self._unwritten: dict[int, None] = {}  # payloads that wait to be written, in order
        self._writing: dict[int, int] = {}  # bytes of those that are being written
        self._clock = 0  # sequences entered

    def take_ops(self) -> tuple[CacheOp, ...]:
        """The operations since the last call, for the runner to execute in this order."""
        ops, self._ops = tuple(self._ops), []
        return ops

    def _touch(self, ids: Iterable[int]) -> None:
        """Payloads that a sequence uses now."""
        self._clock += 1
        for id in ids:
            self._tree.payloads[id].used = self._clock

    # --- memory -----------------------------------------------------------------------------

    def _save(self, op: Save) -> None:
        """Hold the payloads that `op` copies from a sequence, and write them to disk."""
        ids = [id for id in (op.extent, op.checkpoint) if id is not None]
        payloads = [self._tree.payloads[id] for id in ids]
        for payload in payloads:
            payload.used = self._clock
            self.stats.num_bytes += payload.num_bytes
        self._ops.append(op)
        for payload in payloads:
            self._write(payload)

    def _split(self, extent: Extent, at: int, id: int) -> None:
        """Split an extent in memory at block `at`; its file is replaced by two."""
        self._unlink(extent)
        num_bytes = extent.num_bytes
        rest = self._tree.split(extent, at, id)
        self.stats.num_bytes += extent.num_bytes + rest.num_bytes - num_bytes
        self._ops.append(Split(extent.id, at * self._tree.sizes.block_size, rest.id))
        for part in (extent, rest):
            self._write(part)

    def shrink(self, num_bytes: int) -> None:
        """Hold no more than `num_bytes` in memory until the next call: what live rows leave."""
        self._limit = max(0, min(num_bytes, self.stats.max_bytes))
        self._make_room(0, ())

    def _can_fit(self, num_bytes: int, spared: Iterable[Payload]) -> bool:
        """Whether so many bytes fit if all payloads but the `spared` are evicted."""
        return num_bytes + sum(p.num_bytes for p in {*spared} if p.is_resident) <= self._limit

    def _make_room(self, num_bytes: int, spared: Iterable[Payload]) -> int:
        """Evict, oldest leaves first, until so many bytes fit; return how many then fit.

        Where that is not enough, nodes of payloads that are only on disk are removed too.
        """
        for is_in, evict in (
            (lambda p: p.is_resident, self._evict),
            (lambda _: True, self._remove),
        ):
            if self.stats.num_bytes + num_bytes > self._limit:
                for payload in self._oldest(is_in, spared):
                    self.stats.num_evicted += 1
                    evict(payload)
                    if self.stats.num_bytes + num_bytes <= self._limit:
                        break
        return self._limit - self.stats.num_bytes

    def _oldest(
        self, is_in: Callable[[Payload], bool], spared: Iterable[Payload]
    ) -> Iterator[Payload]:
        """Payloads of a tier by their last use; an extent after everything below it."""
        ids = {payload.id for payload in spared}

        def can_go(payload: Payload) -> bool:
            is_one = is_in(payload) and payload.id not in ids
            return is_one and not any(map(is_in, payload.hanging()))

        payloads = self._tree.payloads
        heap = [(payload.used, -payload.id) for payload in payloads.values() if can_go(payload)]
        heapify(heap)
        while heap:
            payload = payloads.get(-heappop(heap)[1])
            if payload is None:  # removed with another
                continue
            parent = payload.parent
            yield payload
            if parent is not None and parent.id and can_go(parent):
                heappush(heap, (parent.used, -parent.id))

    def _evict(self, payload: Payload) -> None:
        """Drop a payload from memory, and from the tree unless it is on disk."""
        if not payload.is_stored or payload.id in self._unwritten:
            self._remove(payload)
            return
        payload.is_held = payload.is_fetching = False
        self.stats.num_bytes -= payload.num_bytes - NODE_BYTES
        self._ops.append(Drop(payload.id))

    def _remove(self, payload: Payload) -> None:
        """Remove a payload, with everything below it, from memory, disk and tree."""
        for removed in self._tree.remove(payload):
            if removed.is_held:
                self._ops.append(Drop(removed.id))
            self.stats.num_bytes -= removed.num_bytes if removed.is_resident else NODE_BYTES
            self._unlink(removed)

    def lose(self, ids: Iterable[int]) -> None:
        """Remove payloads that the runner could not keep."""
        for id in ids:
            if id in self._tree.payloads:
                self._remove(self._tree.payloads[id])
            self.written(id)

    def clear(self) -> None:
        """Remove everything, from memory and disk."""
        self.lose(list(self._tree.payloads))

    def forget_held(self) -> None:
        """After a reset of the runner: drop what was in memory; files stay."""
        payloads = self._tree.payloads
        self._writing.clear()  # of the lost steps
        for id in sorted(payloads, reverse=True):
            if id in payloads and payloads[id].is_resident:
                self._evict(payloads[id])

    # --- disk -------------------------------------------------------------------------------

    def _write(self, payload: Payload) -> None:
        """Write a payload if the cap allows and its extents are on disk: a file needs them."""
        path = path_of(payload)
        stop = path[-1].stop if path else 0
        num_tokens = (stop + 1) * self._tree.sizes.block_size  # at most
        size = payload.num_bytes + _FILE_BYTES + num_tokens * WORD_BYTES
        if size > self.stats.max_disk_bytes or any(
            not extent.is_stored for extent in path if extent is not payload
        ):
            return
        if self.stats.disk_bytes + size > self.stats.max_disk_bytes:
            for other in self._oldest(lambda other: other.is_stored, path):
                self._unlink(other)
                if not other.is_resident:
                    self._remove(other)
                if self.stats.disk_bytes + size <= self.stats.max_disk_bytes:
                    break
            else:
                return
        payload.file_bytes = size
        self.stats.disk_bytes += size
        self._unwritten[payload.id] = None
        self._write_more()

    def _write_more(self) -> None:
        """Write what waits, within `max_writing_bytes` at a time, but one payload always."""
        while self._unwritten:
            payload = self._tree.payloads[next(iter(self._unwritten))]
            if not all(extent.is_stored for extent in path_of(payload)):
                self._unlink(payload)  # a file above it could not be written
                continue
            num_bytes = sum(self._writing.values())
            if num_bytes and num_bytes + payload.num_bytes > self._max_writing_bytes:
                return
            del self._unwritten[payload.id]
            self._writing[payload.id] = payload.num_bytes
            self._ops.append(Write(payload.id, self._tree.stored(payload)))

    def written(self, id: int) -> None:
        """A payload has been written to disk, or will not be."""
        self._writing.pop(id, None)
        self._write_more()

    def _unlink(self, payload: Payload) -> None:
        if not payload.is_stored:
            return
        self.stats.disk_bytes -= payload.file_bytes
        payload.file_bytes = 0
        if payload.id in self._unwritten:
            del self._unwritten[payload.id]
        else:
            self._ops.append(Unlink(payload.id))

    def fetch(self, ids: Iterable[int]) -> bool:
        """Start reading payloads from disk, all or none; True if all are held or on their way."""
        payloads = self._tree.payloads
        absent = [p for p in map(payloads.__getitem__, ids) if not p.is_resident]
        needed = sum(payload.num_bytes - NODE_BYTES for payload in absent)
        # Reads for other sequences are spared: two could otherwise evict each other for ever.
        spared = absent + [p for p in payloads.values() if p.is_fetching]
        spared += [extent for payload in absent for extent in path_of(payload)]
        if not self._can_fit(needed, spared) or self._make_room(needed, spared) < needed:
            return False
        for payload in absent:
            payload.is_fetching, payload.used = True, self._clock
            self.stats.num_bytes += payload.num_bytes - NODE_BYTES
            self._ops.append(Fetch(payload.id, self._tree.stored(payload)))
        return True

    def fetched(self, id: int) -> None:
        """A payload has been read from disk."""
        payload = self._tree.payloads.get(id)
        if payload is not None and payload.is_fetching:
            payload.is_fetching, payload.is_held = False, True
            self.stats.num_from_disk += 1
        elif payload is None or not payload.is_held:  # else it was fetched twice
            self._ops.append(Drop(id))  # evicted during the read

    def unstored(self, id: int) -> None:
        """A payload could not be written to, or read from, disk."""
        payload = self._tree.payloads.get(id)
        if payload is not None:
            self._unlink(payload)
            if not payload.is_held:
                self._remove(payload)
        self.written(id)

    def _add_file(self, id: int, payload: Payload | None, num_word_bytes: int) -> None:
        """Count a file of an earlier process; unlink it if there is no room, or no `payload`."""
        if payload is not None:
            size = payload.num_bytes + _FILE_BYTES + num_word_bytes
            is_room = self.stats.disk_bytes + size <= self.stats.max_disk_bytes
            if is_room and self.stats.num_bytes + NODE_BYTES <= self._limit:
                payload.is_held, payload.file_bytes = False, size
                self.stats.num_bytes += NODE_BYTES
                self.stats.disk_bytes += size
                return
            self._tree.remove(payload)
        self._ops.append(Unlink(id))

    def check(self) -> None:
        """Assert the invariants of tree and residency. Tests call it after every operation."""
        self._tree.check()
        payloads, stats = self._tree.payloads.values(), self.stats
        assert all(payload.is_resident or payload.is_stored for payload in payloads)
        num_bytes = sum(p.num_bytes if p.is_resident else NODE_BYTES for p in payloads)
        assert num_bytes == stats.num_bytes <= self._limit
        disk_bytes = sum(payload.file_bytes for payload in payloads)
        assert disk_bytes == stats.disk_bytes <= stats.max_disk_bytes
        waiting = [self._tree.payloads[id] for id in self._unwritten]
        assert all(payload.is_held and payload.is_stored for payload in waiting)
        assert self._writing or not waiting, "what waits is written once there is room"
