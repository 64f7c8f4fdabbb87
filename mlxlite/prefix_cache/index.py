"""The prefix cache: which prompt prefixes have been computed before, and which of them are kept.

It adds lookup and insertion by the tree (what a prompt matches) to the residency (what is in memory
and on disk), which issues operations for the runner. It never sees an array, a clock or a file:

    hit = cache.enter(blocks, limit)        what a sequence need not compute
    cache.insert(id, blocks, num_tokens)    keep what it has computed
    cache.shrink(num_bytes)                 live rows need the room
    ops = cache.take_ops()                  for the runner

Whole blocks are kept, and a hit may end inside of one. Layers that keep a window or a state resume
only where one was saved: their models hit at *checkpoints*, which may lie inside a block and then
include the tokens after its start.

Invariants, asserted by `check()`: those of the tree and the residency.
"""

from collections.abc import Callable, Iterable
from itertools import count, takewhile

from mlxlite.prefix_cache.hashing import WORD_BYTES, Blocks
from mlxlite.prefix_cache.operations import Hit, Save, Segment, Stored
from mlxlite.prefix_cache.radix_tree import (
    NODE_BYTES,
    Checkpoint,
    Extent,
    Match,
    RadixTree,
    Sizes,
)
from mlxlite.prefix_cache.residency import MAX_WRITING_BYTES, Residency

MAX_EXTENT_BYTES = 64 << 20  # of one payload and its file: memory yields, and files are written, so


class PrefixCache(Residency):
    """Prefixes of at most `num_bytes` in memory and `disk_bytes` on disk; 0 bytes disable it.

    `token_bytes` is what a token takes in the layers that keep all tokens, `state_bytes` what
    windows and states hold after so many tokens; None if there are none, and hits need no
    checkpoint. Where `to_token` is False, hits end at blocks. A long prompt is several extents of
    at most `max_extent_bytes`, of which `max_writing_bytes` are copied to the disk at a time.
    """

    def __init__(
        self,
        token_bytes: int,
        state_bytes: Callable[[int], int] | None = None,
        *,
        block_size: int = 16,
        num_bytes: int = 0,
        disk_bytes: int = 0,
        max_extent_bytes: int = MAX_EXTENT_BYTES,
        max_writing_bytes: int = MAX_WRITING_BYTES,
    ) -> None:
        self.block_size, self.to_token = block_size, True
        self.has_checkpoints = state_bytes is not None
        self._sizes = Sizes(block_size, token_bytes, state_bytes)
        self._most_blocks = max(1, max_extent_bytes // self._sizes.block)
        super().__init__(RadixTree(self._sizes), num_bytes, disk_bytes, max_writing_bytes)
        self._ids = count(1)

    # --- lookup -----------------------------------------------------------------------------

    def match(self, blocks: Blocks, limit: int) -> Hit:
        """The longest prefix of at most `limit` tokens from which a sequence can resume."""
        match = self._tree.walk(blocks, limit)
        if self.has_checkpoints:
            return self._match_to_checkpoint(match, blocks, limit)
        extents, num_tokens = list(match.path[1:]), match.num_blocks * self.block_size
        if num_tokens and self.to_token:
            extent, num_more = self._tree.partial_block(match, blocks, limit)
            if num_more and extent is not match.last:
                extents.append(extent)
            num_tokens += num_more
        return self._hit(extents, num_tokens, num_tokens)

    def _match_to_checkpoint(self, match: Match, blocks: Blocks, limit: int) -> Hit:
        checkpoint = self._tree.last_checkpoint(match, blocks, limit)
        if checkpoint is None:
            return Hit()
        num_blocks = checkpoint.position // self.block_size
        extents = [extent for extent in match.path[1:] if extent.start < num_blocks]
        return self._hit(extents, num_blocks * self.block_size, checkpoint.position, checkpoint)

    def _hit(
        self,
        extents: list[Extent],
        stop: int,
        num_tokens: int,
        checkpoint: Checkpoint | None = None,
    ) -> Hit:
        size = self.block_size
        segments = [Segment(e.id, e.start * size, min(e.stop * size, stop)) for e in extents]
        payloads = (*extents, checkpoint) if checkpoint else extents
        missing = tuple(payload.id for payload in payloads if not payload.is_held)
        return Hit(num_tokens, tuple(segments), checkpoint.id if checkpoint else None, missing)

    def enter(self, blocks: Blocks, limit: int, least: int = 0) -> Hit:
        """The `match` of a sequence that begins now, in memory alone; counted as a use.

        A hit of less than `least` tokens is none.
        """
        hit = self.match(blocks, limit)
        if hit.missing:
            hit = self._without_missing(hit)
        hit = hit if hit.num_tokens >= least else Hit()
        ids = (*(segment.extent for segment in hit.segments), hit.checkpoint)
        self._touch(id for id in ids if id is not None)
        self.stats.num_asked += limit
        self.stats.num_hit += hit.num_tokens
        return hit

    def _without_missing(self, hit: Hit) -> Hit:
        if self.has_checkpoints:
            return Hit()
        segments = tuple(takewhile(lambda s: s.extent not in hit.missing, hit.segments))
        return Hit(segments[-1].stop if segments else 0, segments)

    # --- insertion --------------------------------------------------------------------------

    def insert(self, id: int, blocks: Blocks, num_tokens: int) -> None:
        """Keep the first `num_tokens` that sequence `id` has computed, as far as there is room."""
        if not num_tokens:
            return
        num_blocks = num_tokens // self.block_size
        match = self._tree.walk(blocks, num_tokens)
        if match.num_blocks < min(num_blocks, match.last.stop) and not match.last.is_held:
            self._remove(match.last)  # a file cannot be split: the new one replaces it
            match = self._tree.walk(blocks, num_tokens)
        start = match.num_blocks
        tail = blocks.words[num_blocks * self.block_size * WORD_BYTES : num_tokens * WORD_BYTES]
        is_known = start == num_blocks and (num_tokens, tail) in match.last.checkpoints
        checkpoint = (num_tokens, tail) if self.has_checkpoints and not is_known else None
        if num_blocks > start or checkpoint is not None:
            stop = self._room_for(match, num_blocks, checkpoint)
            if stop is not None:
                self._grow(id, blocks, match, stop, checkpoint)

    def _room_for(
        self, match: Match, num_blocks: int, checkpoint: tuple[int, bytes] | None
    ) -> int | None:
        """Make room for blocks up to `num_blocks`; how many then fit, or None if too few."""
        start = match.num_blocks
        num_nodes = -(-(num_blocks - start) // self._most_blocks)
        needed = self._sizes.extent(num_blocks - start) + NODE_BYTES * num_nodes  # and of a split
        needed += self._sizes.checkpoint(*checkpoint) if checkpoint else 0
        # With checkpoints it is all or nothing: without room for all, nothing is evicted.
        if self.has_checkpoints and not self._can_fit(needed, match.path):
            return None
        room = self._make_room(needed, match.path)
        if room >= needed:
            return num_blocks
        room = max(0, room - (num_nodes + 1) * NODE_BYTES)
        num_blocks = min(num_blocks, start + room // self._sizes.block)
        return None if self.has_checkpoints or num_blocks == start else num_blocks

    def _grow(
        self, id: int, blocks: Blocks, match: Match, stop: int, place: tuple[int, bytes] | None
    ) -> None:
        start, last = match.num_blocks, match.last
        extent: Extent | None = None
        if stop > start:
            if start < last.stop:
                self._split(last, start, next(self._ids))
            if blocks.keys[start] in last.children:  # a collision: the first one stays
                return
            while stop - start > self._most_blocks:
                cut = start + self._most_blocks
                last = self._tree.add_extent(next(self._ids), blocks, start, cut, last)
                self._save_from(id, last, start, cut, None)
                start = cut
            extent = self._tree.add_extent(next(self._ids), blocks, start, stop, last)
        checkpoint: Checkpoint | None = None
        if place is not None:
            checkpoint = self._tree.add_checkpoint(next(self._ids), *place, extent or last)
        self._save_from(id, extent, start, stop, checkpoint)

    def _save_from(
        self, id: int, extent: Extent | None, start: int, stop: int, checkpoint: Checkpoint | None
    ) -> None:
        """Save blocks `[start, stop)` of a sequence, and its state."""
        save = Save(
            id,
            extent.id if extent else None,
            start * self.block_size,
            stop * self.block_size,
            checkpoint.id if checkpoint else None,
            checkpoint.position if checkpoint else stop * self.block_size,
        )
        self._save(save)

    def restore(self, found: Iterable[tuple[int, Stored]]) -> None:
        """Rebuild the index from an earlier process's files, by id; unlink those without place."""
        items = sorted(found, key=lambda item: (item[1].position is not None, len(item[1].words)))
        self._ids = count(1 + max((id for id, _ in items), default=0))
        for id, stored in items:
            self._add_file(id, self._tree.restore(id, stored), len(stored.words))
