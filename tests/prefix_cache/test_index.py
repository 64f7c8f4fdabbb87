"""The prefix cache alone: lookup, insertion, eviction and disk.

A `Shelf` stands for the runner, with tokens for arrays: it executes every operation and checks the
tokens of every hit, so that no test depends on the cache's own accounting.
"""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlxlite.engine.memory import Memory
from mlxlite.prefix_cache.hashing import Blocks, blocks_of, fnv1a
from mlxlite.prefix_cache.index import MAX_EXTENT_BYTES, PrefixCache
from mlxlite.prefix_cache.operations import (
    CacheOp,
    Drop,
    Fetch,
    Hit,
    Save,
    Segment,
    Split,
    Stored,
    Unlink,
    Write,
)
from mlxlite.prefix_cache.radix_tree import NODE_BYTES
from mlxlite.prefix_cache.residency import MAX_WRITING_BYTES

SIZE = 4
PLENTY = 1 << 30
SLICEABLE = Memory(layers=((64, None),))
STATEFUL = Memory(row_bytes=500, layers=((64, None), (32, 12)))
both = pytest.mark.parametrize("memory", [SLICEABLE, STATEFUL], ids=["sliceable", "stateful"])
# Parts of prompts, which share prefixes and diverge inside of blocks.
PIECES = [[1] * 8, [1] * 5, [2] * 3, [1, 2, 3, 4], [4, 3, 2, 1, 1, 1, 1], [5] * 17]
Tokens = list[int]


def words_of(tokens: Tokens) -> bytes:
    return np.array(tokens, "<u4").tobytes()


def num_alike(a: Tokens, b: Tokens) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Shelf:
    """A cache, with the payloads in memory and on disk after its operations."""

    def __init__(
        self, memory: Memory, num_bytes: int = PLENTY, disk_bytes: int = 0, **most: int
    ) -> None:
        self.memory = memory
        self.most = most
        self.cache = PrefixCache(
            memory.token_bytes,
            memory.state_bytes if memory.has_state else None,
            block_size=SIZE,
            num_bytes=num_bytes,
            disk_bytes=disk_bytes,
            **most,
        )
        self.writing: list[int] = []  # files whose writing has not been reported
        self.capacity = num_bytes
        self.sequences: dict[int, Tokens] = {}
        self.kept: dict[
            int, tuple[int, Tokens]
        ] = {}  # payload → the start of its tokens, and these
        self.checkpoints: set[int] = set()  # of the payloads
        self.files: dict[int, Stored] = {}
        self.fetching: list[int] = []
        self.ops: list[CacheOp] = []  # of the last call

    def blocks(self, tokens: Tokens, scope: int = 0) -> Blocks:
        return blocks_of(tuple(tokens), scope, SIZE)

    def insert(self, tokens: Tokens, num: int | None = None, scope: int = 0) -> None:
        """Insert a new sequence that has computed `num` of its tokens, by default all."""
        id = len(self.sequences) + 1
        self.sequences[id] = tokens
        num = len(tokens) if num is None else num
        self.cache.insert(id, self.blocks(tokens, scope), num)
        self.work(num)

    def find(self, tokens: Tokens, limit: int | None = None, scope: int = 0) -> Hit:
        limit = len(tokens) if limit is None else limit
        hit = self.cache.match(self.blocks(tokens, scope), limit)
        self.verify(hit, tokens, limit)
        return hit

    def enter(self, tokens: Tokens, limit: int | None = None, scope: int = 0) -> Hit:
        limit = len(tokens) if limit is None else limit
        hit = self.cache.enter(self.blocks(tokens, scope), limit)
        assert not hit.missing
        self.verify(hit, tokens, limit)
        return hit

    def length(self, tokens: Tokens, limit: int | None = None, scope: int = 0) -> int:
        return self.find(tokens, limit, scope).num_tokens

    def verify(self, hit: Hit, tokens: Tokens, limit: int) -> None:
        """Assert that a hit's payloads are in memory or on disk and have the prompt's tokens."""
        assert hit.num_tokens <= limit
        at = 0
        for segment in hit.segments:
            start, own = self.payload(hit, segment.extent)
            assert segment.start == at == start
            assert own[: segment.stop - at] == tokens[at : segment.stop]
            at = segment.stop
        if self.memory.has_state and hit.num_tokens:
            assert hit.checkpoint is not None
        if hit.checkpoint is not None:
            start, own = self.payload(hit, hit.checkpoint)
            assert start == at
            assert own == tokens[at : hit.num_tokens]
            at += len(own)
        assert at == hit.num_tokens

    def payload(self, hit: Hit, id: int) -> tuple[int, Tokens]:
        if id not in hit.missing:
            return self.kept[id]
        return self.read(id)

    def read(self, id: int) -> tuple[int, Tokens]:
        stored = self.files[id]
        tokens = np.frombuffer(stored.words, "<u4").tolist()
        start = stored.start if stored.position is None else stored.position // SIZE * SIZE
        return start, tokens[start:]

    def work(self, num_computed: int = 0) -> None:
        """Execute the cache's operations like a runner and a store."""
        self.ops = list(self.cache.take_ops())
        for op in self.ops:
            match op:
                case Save(id, extent, start, stop, checkpoint, position):
                    own = self.sequences[id]
                    assert start % SIZE == stop % SIZE == 0
                    assert start <= stop <= position <= num_computed
                    assert extent is not None or checkpoint is not None
                    if extent is not None:
                        assert extent not in self.kept
                        assert start < stop
                        self.kept[extent] = start, own[start:stop]
                    if checkpoint is not None:
                        assert checkpoint not in self.kept
                        assert position == num_computed
                        self.kept[checkpoint] = stop, own[stop:position]
                        self.checkpoints.add(checkpoint)
                case Split(extent, at, rest):
                    start, own = self.kept[extent]
                    assert start < at < start + len(own)
                    self.kept[extent] = start, own[: at - start]
                    self.kept[rest] = at, own[at - start :]
                case Drop(id):
                    self.kept.pop(id, None)
                case Write(id, stored):
                    assert id not in self.files
                    self.write(id, stored)
                case Unlink(id):
                    self.files.pop(id, None)
                case Fetch(id):
                    assert id not in self.kept
                    self.fetching.append(id)
        self.check()

    def write(self, id: int, stored: Stored) -> None:
        """Write a file; assert that it describes its payload and that its parents are stored."""
        start, own = self.kept[id]
        assert stored.words[start * 4 :] == words_of(own)
        assert (stored.position is not None) == (id in self.checkpoints)
        above = stored.words[: start * 4]
        extents = [other for other in self.files.values() if other.position is None]
        assert not above or any(above == e.words for e in extents) or id in self.checkpoints
        assert not above or any(e.words.startswith(above) for e in extents)
        self.files[id] = stored
        self.writing.append(id)

    def end_write(self) -> None:
        """Report the first file that is being written as written."""
        self.cache.written(self.writing.pop(0))
        self.work()

    @property
    def num_bytes(self) -> int:
        """The bytes of all payloads in memory."""
        total = 0
        for id, (start, own) in self.kept.items():
            total += len(own) * self.memory.token_bytes
            if id in self.checkpoints:
                total += self.memory.state_bytes(start + len(own))
        return total

    def check(self) -> None:
        self.cache.check()
        stats = self.cache.stats
        assert self.num_bytes <= stats.num_bytes <= self.capacity
        assert stats.disk_bytes <= stats.max_disk_bytes

    def fetch(self, hit: Hit) -> bool:
        is_coming = self.cache.fetch(hit.missing)
        self.work()
        return is_coming

    def deliver(self) -> None:
        """Complete the first pending read; it fails if the file is gone."""
        id = self.fetching.pop(0)
        if id in self.files:
            self.kept[id] = self.read(id)
            self.cache.fetched(id)
        else:
            self.cache.unstored(id)
        self.work()

    def expected_on_disk(self, tokens: Tokens, scope: int = 0) -> int:
        """The prefix of a prompt that the files have, each read alone."""
        words, best = words_of(tokens), 0
        for stored in self.files.values():
            num = num_alike(tokens, np.frombuffer(stored.words, "<u4").tolist())
            if stored.scope != scope:
                continue
            if not self.memory.has_state and stored.position is None:
                best = max(best, num // SIZE * SIZE)
            elif stored.position is not None and words.startswith(stored.words):
                best = max(best, stored.position)
        return best


def expected(inserted: list[Tokens], memory: Memory, tokens: Tokens, limit: int) -> int:
    """The hit of a cache without eviction, by comparing all prompts."""
    best = 0
    for other in inserted:
        num = min(num_alike(other, tokens), limit)
        if memory.has_state:
            best = max(best, len(other) if num == len(other) else 0)
        else:
            num = min(
                num, len(other) // SIZE * SIZE
            )  # whole blocks are kept, hits are to the token
            best = max(best, num if num >= SIZE else 0)
    return best


def some_prompt(chance: random.Random) -> Tokens:
    return [t for _ in range(chance.randint(1, 6)) for t in chance.choice(PIECES)]


# --- find -------------------------------------------------------------------------------------


@both
def test_an_empty_cache_finds_nothing(memory: Memory):
    shelf = Shelf(memory)
    assert shelf.find([1] * 20) == Hit()
    assert shelf.enter([1] * 20) == Hit()
    assert shelf.ops == []


def test_whole_blocks_are_kept_and_found_to_the_token():
    shelf = Shelf(SLICEABLE)
    prompt = list(range(22))
    shelf.insert(prompt)
    assert shelf.find(prompt) == Hit(20, (Segment(1, 0, 20),))
    for limit in range(23):
        assert shelf.length(prompt, limit) == (min(limit, 20) if limit >= SIZE else 0)
    assert shelf.length([*prompt[:11], 99, *prompt[12:]]) == 11
    assert shelf.length([*prompt[:3], 99, *prompt[4:]]) == 0  # less than a block is no hit
    assert shelf.length([99, *prompt]) == 0


def test_hits_end_at_blocks_where_tenants_share_a_cache():
    shelf = Shelf(SLICEABLE)
    shelf.cache.to_token = False
    prompt = list(range(22))
    shelf.insert(prompt)
    for limit in range(23):
        assert shelf.length(prompt, limit) == min(limit, 20) // SIZE * SIZE
    assert shelf.length([*prompt[:11], 99, *prompt[12:]]) == 8


def test_a_partial_block_is_matched_in_the_branch_with_the_longest_part_of_it():
    shelf = Shelf(SLICEABLE)
    head = [1, 2, 3, 4]
    for tail in ([5, 6, 7, 8], [5, 6, 9, 9], [5, 0, 0, 0]):
        shelf.insert([*head, *tail, *tail])
    assert shelf.find([*head, 5, 6, 9, 1]) == Hit(7, (Segment(1, 0, 4), Segment(3, 4, 7)))
    assert shelf.length([*head, 5, 6, 7, 1]) == 7
    assert shelf.length([*head, 5, 1]) == 5
    assert shelf.length([*head, 1]) == 4
    assert shelf.length([*head, 5, 6, 9, 9], 5) == 5


def test_a_partial_block_is_not_fetched_from_disk():
    shelf = Shelf(SLICEABLE, disk_bytes=PLENTY)
    shelf.insert(list(range(8)))
    shelf.insert([*range(4), *[9] * 4])
    shelf.cache.shrink(bytes_of(SLICEABLE, list(range(4))) + 2 * NODE_BYTES)
    shelf.work()
    assert [start for start, _ in shelf.kept.values()] == [0]
    hit = shelf.find([*range(6), 99])
    assert (hit.num_tokens, hit.missing) == (4, ())


def test_with_states_a_hit_ends_at_the_last_checkpoint():
    shelf = Shelf(STATEFUL)
    prompt = list(range(40))
    for num in (8, 19, 33):
        shelf.insert(prompt, num)
    found = {limit: shelf.length(prompt, limit) for limit in (7, 8, 18, 19, 32, 33, 40)}
    assert found == {7: 0, 8: 8, 18: 8, 19: 19, 32: 19, 33: 33, 40: 33}
    assert shelf.length([*prompt[:18], 99, *prompt[19:]]) == 8  # inside of the tail of the second
    assert shelf.length([*prompt[:7], 99]) == 0


def test_several_checkpoints_within_one_block_are_distinct():
    shelf = Shelf(STATEFUL)
    prompts = [[1, 2, 3, 4, 5, last] for last in (6, 7, 8)]
    for prompt in prompts:
        shelf.insert(prompt)
    shelf.insert(prompts[0][:5])
    shelf.insert([9, 9])  # in no block at all
    for prompt in prompts:
        assert shelf.length([*prompt, 1, 1]) == 6
    assert shelf.length([1, 2, 3, 4, 5, 9, 9]) == 5
    assert shelf.length([9, 9, 9]) == 2
    assert shelf.length([9, 8]) == 0


@both
@pytest.mark.parametrize("seed", range(6))
def test_a_cache_with_room_finds_every_inserted_prefix_and_no_more(memory: Memory, seed: int):
    chance = random.Random(seed)
    shelf, inserted = Shelf(memory), []
    for _ in range(60):
        prompt = some_prompt(chance)
        num = chance.randint(1, len(prompt))
        shelf.insert(prompt, num)
        inserted.append(prompt[:num])
        for asked in (prompt, some_prompt(chance)):
            limit = chance.randint(0, len(asked))
            assert shelf.length(asked, limit) == expected(inserted, memory, asked, limit)
            assert shelf.enter(asked, limit).num_tokens == shelf.length(asked, limit)


@both
def test_a_known_prefix_is_not_kept_twice(memory: Memory):
    shelf = Shelf(memory)
    shelf.insert(list(range(20)))
    num_bytes = shelf.cache.stats.num_bytes
    shelf.insert(list(range(20)))
    assert shelf.ops == []
    assert shelf.cache.stats.num_bytes == num_bytes


@both
def test_scopes_share_no_prefix(memory: Memory):
    shelf = Shelf(memory)
    shelf.insert(list(range(20)), scope=1)
    assert shelf.length(list(range(20)), scope=1) == 20
    assert shelf.length(list(range(20)), scope=2) == 0
    shelf.insert(list(range(20)), scope=2)
    assert len({op.extent for op in shelf.ops if isinstance(op, Save)}) == 1
    one, two = (shelf.find(list(range(20)), scope=scope) for scope in (1, 2))
    assert one.segments != two.segments


def test_enter_counts_asked_and_hit_tokens():
    shelf = Shelf(SLICEABLE)
    shelf.insert(list(range(20)))
    shelf.enter(list(range(30)), 29)
    shelf.enter([7] * 10, 9)
    shelf.find(list(range(20)))  # `match` does not count
    assert (shelf.cache.stats.num_asked, shelf.cache.stats.num_hit) == (38, 20)


@both
def test_without_bytes_there_is_no_cache(memory: Memory):
    shelf = Shelf(memory, 0)
    shelf.insert(list(range(40)))
    assert shelf.ops == []
    assert shelf.length(list(range(40))) == 0


@both
def test_no_computed_token_is_no_payload(memory: Memory):
    """BUG: with states, a cancel before the first chunk saved a checkpoint of no tokens."""
    shelf = Shelf(memory)
    shelf.insert(list(range(20)), 0)
    assert shelf.ops == []
    assert shelf.cache.stats.num_bytes == 0


# --- sharing ----------------------------------------------------------------------------------


def test_a_shared_prefix_is_stored_once_for_all_its_continuations():
    shelf = Shelf(SLICEABLE)
    system = list(range(400))
    for user in range(20):
        shelf.insert([*system, *[1000 + user] * 8])
    assert shelf.num_bytes == (400 + 20 * 8) * 64
    assert shelf.cache.stats.num_bytes < 2 * shelf.num_bytes
    for user in range(20):
        assert shelf.length([*system, *[1000 + user] * 8]) == 408


def test_an_extent_is_split_where_another_prompt_branches_off():
    shelf = Shelf(SLICEABLE)
    shelf.insert([1] * 16)
    shelf.insert([1] * 8 + [2] * 4)
    assert shelf.ops == [Split(1, 8, 2), Save(2, 3, 8, 12, None, 12)]
    assert shelf.find([1] * 16).segments == (Segment(1, 0, 8), Segment(2, 8, 16))
    assert shelf.find([1] * 8 + [2] * 4).segments == (Segment(1, 0, 8), Segment(3, 8, 12))
    assert shelf.length([1] * 8 + [3] * 4) == 8


def test_a_split_leaves_each_checkpoint_with_its_tokens():
    shelf = Shelf(STATEFUL)
    prompt = list(range(32))
    for num in (32, 6, 8, 10, 18):  # the first is the extent, the others lie within it
        shelf.insert(prompt, num)
    for at in (20, 12, 8, 4):
        shelf.insert([*prompt[:at], 99, 99, 99, 99])
    assert [shelf.length(prompt, limit) for limit in (32, 31, 17, 9, 7)] == [32, 18, 10, 8, 6]


# --- forgery ----------------------------------------------------------------------------------

# Two blocks with one FNV-1a-64 digest, found by lattice reduction in moments.
FORGED = ("25000000000000000000000000000000", "21037d030e190e08041d0303081a0504")


def forged(index: int) -> Tokens:
    return np.frombuffer(bytes.fromhex(FORGED[index]), "<u4").tolist()


def test_the_forged_block_has_the_same_key_and_other_tokens():
    one, two = (bytes.fromhex(text) for text in FORGED)
    assert one != two
    assert fnv1a(one) == fnv1a(two)
    a, b = (blocks_of((*forged(i), *range(8)), 3, SIZE) for i in (0, 1))
    assert a.keys == b.keys
    assert a.words != b.words


@both
def test_a_forged_block_never_matches_another_payload(memory: Memory):
    shelf = Shelf(memory)
    mine, theirs = (forged(i) + [7] * 8 for i in (0, 1))
    shelf.insert(mine)
    assert shelf.length(theirs) == 0
    shelf.insert(theirs)
    assert shelf.ops == []  # the first one stays
    assert shelf.length(theirs) == 0
    assert shelf.length(mine) == 12


@both
def test_a_match_ends_before_a_forged_block_within_an_extent(memory: Memory):
    shelf = Shelf(memory)
    mine, theirs = ([1] * 8 + forged(i) + [7] * 8 for i in (0, 1))
    shelf.insert(mine, 8)
    shelf.insert(mine)
    assert shelf.length(theirs) == 8
    shelf.insert(theirs)
    assert shelf.length(theirs) == 8
    assert shelf.length(mine) == 20
    shelf.insert([1] * 8 + [2] * 4)
    assert shelf.length([1] * 8 + [2] * 4) == 12


@both
def test_equal_keys_with_other_tokens_match_nothing(memory: Memory):
    shelf = Shelf(memory)
    mine = shelf.blocks(list(range(20)))
    shelf.sequences |= {1: list(range(20)), 2: [9] * 20}
    shelf.cache.insert(1, mine, 20)
    shelf.work(20)
    theirs = replace(mine, words=words_of([9] * 20))
    assert shelf.cache.match(theirs, 20) == Hit()
    shelf.cache.insert(2, theirs, 20)
    shelf.work(20)
    assert shelf.ops == []
    later = replace(mine, words=mine.words[: 8 * 4] + words_of([9] * 12))
    assert shelf.cache.match(later, 20).num_tokens == (0 if memory.has_state else 8)


# --- eviction ---------------------------------------------------------------------------------


def bytes_of(memory: Memory, *prompts: Tokens) -> int:
    """The bytes of a cache of these prompts."""
    shelf = Shelf(memory)
    for prompt in prompts:
        shelf.insert(prompt)
    return shelf.cache.stats.num_bytes


@both
def test_the_least_recently_used_prefix_is_evicted_first(memory: Memory):
    prompts = [[i] * 12 for i in range(3)]
    shelf = Shelf(memory, bytes_of(memory, *prompts) + 1024)
    for prompt in prompts:
        shelf.insert(prompt)
        shelf.enter(prompt)
    shelf.enter(prompts[0])
    shelf.insert([3] * 12)
    assert [shelf.length(prompt) for prompt in (*prompts, [3] * 12)] == [12, 0, 12, 12]
    assert shelf.cache.stats.num_evicted >= 1


@both
def test_a_shared_prefix_outlives_its_continuations(memory: Memory):
    system = list(range(100, 140))
    shelf = Shelf(memory, bytes_of(memory, system, *[[*system, *[i] * 12] for i in range(3)]) + 99)
    shelf.insert(system)
    for i in range(30):
        tail = [*system, *[i] * 12]
        assert shelf.enter(tail).num_tokens == 40
        shelf.insert(tail)
        assert shelf.length(tail) == 52
    assert 1 <= sum(shelf.length([*system, *[i] * 12]) == 52 for i in range(30)) <= 3


@both
@pytest.mark.parametrize("seed", range(4))
def test_no_parent_is_evicted_before_its_children(memory: Memory, seed: int):
    chance = random.Random(seed)
    shelf = Shelf(memory)
    prompts = [some_prompt(chance) for _ in range(25)]
    for prompt in prompts:
        shelf.insert(prompt)
        shelf.enter(some_prompt(chance))
    before = {tuple(prompt): shelf.length(prompt) for prompt in prompts}
    for num_bytes in range(shelf.cache.stats.num_bytes, -1, -1500):
        shelf.cache.shrink(num_bytes)
        shelf.work()
        assert shelf.cache.stats.num_bytes <= num_bytes
        lengths = {tuple(prompt): shelf.length(prompt) for prompt in prompts}
        assert all(lengths[prompt] <= before[prompt] for prompt in before)
        before = lengths
    shelf.cache.shrink(0)
    shelf.work()
    assert shelf.kept == {}
    assert shelf.cache.stats.num_bytes == 0


def test_of_a_prompt_that_does_not_fit_the_first_blocks_are_kept():
    shelf = Shelf(SLICEABLE, 20_000)
    prompt = list(range(2000))
    shelf.insert(prompt)
    assert 100 <= shelf.length(prompt) < 2000
    assert shelf.cache.stats.num_bytes > 15_000
    shelf.insert(prompt)  # and again changes nothing
    assert 100 <= shelf.length(prompt) < 2000


def test_a_prefix_that_can_never_fit_evicts_nothing():
    """BUG: everything was evicted, without making enough room."""
    shelf = Shelf(STATEFUL, 20_000)
    shelf.insert([1] * 12)
    shelf.insert(list(range(2000)))
    assert shelf.length(list(range(2000))) == 0
    assert shelf.length([1] * 12) == 12


@both
def test_a_smaller_limit_holds_until_the_next_shrink(memory: Memory):
    shelf = Shelf(memory, 50_000)
    for i in range(10):
        shelf.insert([i] * 40)
    shelf.cache.shrink(6000)
    shelf.work()
    for i in range(10, 20):
        shelf.insert([i] * 40)
        assert shelf.cache.stats.num_bytes <= 6000
    shelf.cache.shrink(PLENTY)  # at most the first limit
    shelf.work()
    for i in range(20, 40):
        shelf.insert([i] * 40)
    assert 30_000 < shelf.cache.stats.num_bytes <= 50_000
    shelf.cache.shrink(-5)
    shelf.work()
    assert shelf.kept == {}


@both
def test_losing_a_payload_removes_everything_below_it(memory: Memory):
    shelf = Shelf(memory)
    system = [1] * 8
    shelf.insert(system)
    for i in (2, 3):
        shelf.insert(system + [i] * 8)
    first, branch = (s.extent for s in shelf.find(system + [2] * 8).segments)
    shelf.cache.lose([branch, 12345])
    shelf.work()
    assert [shelf.length(system + [i] * 8) for i in (2, 3)] == [8, 16]
    shelf.cache.lose([first, branch, first])
    shelf.work()
    assert shelf.length(system + [3] * 8) == 0
    assert shelf.kept == {}
    assert shelf.cache.stats.num_bytes == 0
    shelf.insert(system)
    assert shelf.length(system) == 8


def test_losing_a_checkpoint_leaves_the_others():
    shelf = Shelf(STATEFUL)
    prompt = list(range(20))
    for num in (8, 19):
        shelf.insert(prompt, num)
    checkpoint = shelf.find(prompt).checkpoint
    assert checkpoint is not None
    shelf.cache.lose([checkpoint])
    shelf.work()
    assert shelf.length(prompt) == 8


@both
def test_clear_removes_memory_and_files(memory: Memory):
    shelf = Shelf(memory, disk_bytes=PLENTY)
    for i in range(6):
        shelf.insert([1] * 8 + [i] * 8, scope=i % 2)
    assert shelf.files
    shelf.cache.clear()
    shelf.work()
    assert shelf.kept == shelf.files == {}
    assert shelf.cache.stats.num_bytes == shelf.cache.stats.disk_bytes == 0
    ids = set(shelf.checkpoints)
    shelf.insert([1] * 16)
    assert ids.isdisjoint({shelf.find([1] * 16).checkpoint})


@both
def test_a_reset_of_the_runner_leaves_the_files(memory: Memory):
    shelf = Shelf(memory, disk_bytes=PLENTY)
    shelf.insert([1] * 16)
    shelf.cache.forget_held()
    shelf.kept.clear()
    shelf.work()
    hit = shelf.find([1] * 16)
    assert hit.num_tokens == 16
    assert set(hit.missing) == set(shelf.files)
    assert shelf.enter([1] * 16) == Hit()  # not fetched


@both
def test_a_reset_of_the_runner_without_a_disk_leaves_nothing(memory: Memory):
    shelf = Shelf(memory)
    for i in range(4):
        shelf.insert([1] * 8 + [i] * 8)
    shelf.cache.forget_held()
    shelf.work()
    assert shelf.length([1] * 8) == shelf.cache.stats.num_bytes == 0


# --- disk -------------------------------------------------------------------------------------


@both
def test_an_evicted_payload_can_be_fetched_from_disk(memory: Memory):
    shelf = Shelf(memory, disk_bytes=PLENTY)
    prompt = list(range(22))
    shelf.insert(prompt)
    full = shelf.length(prompt)
    shelf.cache.shrink(4096)
    shelf.cache.shrink(2100)
    shelf.work()
    assert shelf.kept == {}
    hit = shelf.find(prompt)
    assert hit.num_tokens == full
    assert hit.missing
    shelf.cache.shrink(PLENTY)
    assert shelf.fetch(hit)
    assert shelf.find(prompt).missing == hit.missing  # reading is not held
    assert shelf.fetch(hit)  # no second read
    assert sorted(shelf.fetching) == sorted(hit.missing)
    while shelf.fetching:
        shelf.deliver()
    assert shelf.find(prompt) == replace(hit, missing=())
    assert shelf.cache.stats.num_from_disk == len(hit.missing)
    assert shelf.enter(prompt).num_tokens == full


def on_disk_only(memory: Memory, num_bytes: int, *prompts: Tokens) -> Shelf:
    """A shelf with all prompts only on disk, then limited to `num_bytes` of memory."""
    shelf = Shelf(memory, disk_bytes=PLENTY)
    for prompt in prompts:
        shelf.insert(prompt)
    shelf.cache.forget_held()
    shelf.kept.clear()
    shelf.cache.shrink(num_bytes)
    shelf.work()
    assert all(shelf.find(prompt).missing for prompt in prompts)
    return shelf


@both
def test_a_payload_that_does_not_fit_is_not_fetched(memory: Memory):
    shelf = on_disk_only(memory, 4000, [1] * 100)
    assert not shelf.fetch(shelf.find([1] * 100))
    assert shelf.fetching == []
    assert shelf.find([1] * 100).missing


@both
def test_a_payload_evicted_during_its_read_is_dropped_after_it(memory: Memory):
    shelf = on_disk_only(memory, PLENTY, [1] * 40)
    assert shelf.fetch(shelf.find([1] * 40))
    shelf.cache.shrink(2048)
    shelf.work()
    while shelf.fetching:
        shelf.deliver()
    assert shelf.kept == {}
    assert shelf.find([1] * 40).missing


@both
def test_a_payload_fetched_again_after_eviction_is_held_after_the_first_read(memory: Memory):
    """BUG: of two reads in progress, the second dropped the payload of the first."""
    shelf = on_disk_only(memory, PLENTY, [1] * 40)
    assert shelf.fetch(shelf.find([1] * 40))
    shelf.cache.shrink(2048)
    shelf.work()
    shelf.cache.shrink(PLENTY)
    assert shelf.fetch(shelf.find([1] * 40))
    while shelf.fetching:
        shelf.deliver()
        shelf.find([1] * 40)
    assert shelf.find([1] * 40).missing == ()


@pytest.mark.parametrize("is_read", [True, False])
def test_a_file_may_be_unlinked_for_others_while_it_is_read(is_read: bool):
    """BUG: `check` failed for a payload whose file was unlinked during its read."""
    shelf = Shelf(SLICEABLE, disk_bytes=60_000)  # three files
    shelf.insert([1] * 12)
    shelf.cache.forget_held()
    shelf.kept.clear()
    shelf.work()
    assert shelf.fetch(shelf.find([1] * 12))
    (id,) = shelf.fetching
    found = shelf.read(id)
    for i in range(2, 6):
        shelf.insert([i] * 12)
        shelf.enter([i] * 12)
    assert id not in shelf.files
    if is_read:
        shelf.kept[id] = found
        shelf.cache.fetched(id)
    else:
        shelf.cache.unstored(id)
    shelf.work()
    assert shelf.length([1] * 12) == (12 if is_read else 0)


@both
def test_reads_and_failures_of_removed_payloads_have_no_effect(memory: Memory):
    shelf = on_disk_only(memory, PLENTY, [1] * 12)
    assert shelf.fetch(shelf.find([1] * 12))
    coming = list(shelf.fetching)
    shelf.cache.clear()
    shelf.work()
    for id in coming:
        shelf.kept[id] = 0, [1] * 12
        shelf.cache.fetched(id)
        shelf.work()
        shelf.cache.unstored(id)
        shelf.work()
        assert shelf.ops == []
    shelf.cache.fetched(999)
    shelf.cache.unstored(999)
    shelf.work()
    assert shelf.kept == shelf.files == {}
    assert shelf.cache.stats.num_bytes == 0


@both
def test_an_unreadable_payload_is_removed_and_an_unwritable_one_stays_in_memory(memory: Memory):
    shelf = Shelf(memory, disk_bytes=PLENTY)
    shelf.insert([1] * 12)
    first = shelf.find([1] * 12).segments[0].extent
    shelf.cache.unstored(first)
    shelf.work()
    assert shelf.find([1] * 12).missing == ()
    shelf = on_disk_only(memory, PLENTY, [1] * 12, [1] * 24)
    hit = shelf.find([1] * 24)
    assert shelf.fetch(hit)
    shelf.cache.unstored(hit.segments[1].extent)
    shelf.work()
    shelf.fetching.clear()
    assert shelf.length([1] * 24) == 12


@both
def test_a_branch_off_an_extent_that_is_only_on_disk_is_kept(memory: Memory):
    """BUG: only extents in memory are split, so one on disk blocked all its branches."""
    shelf = on_disk_only(memory, PLENTY, [1] * 40)
    other = [1] * 20 + [2] * 20
    shelf.insert(other)
    assert shelf.length(other) == 40


@both
def test_nodes_of_payloads_on_disk_are_removed_when_they_fill_memory(memory: Memory):
    """BUG: nodes of payloads on disk count as memory, and were never evicted."""
    shelf = Shelf(memory, 40_000, PLENTY)
    for i in range(100):
        shelf.insert([i] * 12)
        shelf.enter([i] * 12)
        assert shelf.length([i] * 12) == 12
    shelf.cache.shrink(1500)
    shelf.work()
    assert shelf.cache.stats.num_bytes <= 1500
    shelf.cache.shrink(0)
    shelf.work()
    assert shelf.cache.stats.num_bytes == 0


@both
@pytest.mark.parametrize("seed", range(3))
def test_the_disk_stays_within_its_cap_and_has_no_orphans(memory: Memory, seed: int):
    chance = random.Random(seed)
    shelf = Shelf(memory, disk_bytes=300_000)
    for _ in range(120):
        prompt = some_prompt(chance)
        shelf.insert(prompt, chance.randint(1, len(prompt)), chance.randrange(2))
        shelf.enter(some_prompt(chance))
    assert shelf.cache.stats.disk_bytes > 200_000
    used = sum(
        16384 + 1024 + len(stored.words[stored.start * 4 :]) // 4 * 64
        for stored in shelf.files.values()
        if stored.position is None
    )
    assert used <= 300_000


@both
def test_a_file_too_large_for_the_disk_is_kept_in_memory_alone(memory: Memory):
    shelf = Shelf(memory, disk_bytes=30_000)
    shelf.insert([1] * 12)
    num_files = len(shelf.files)
    assert num_files == 1
    shelf.insert(list(range(2000)))
    assert shelf.length(list(range(2000))) == 2000
    assert len(shelf.files) == num_files


# --- another process --------------------------------------------------------------------------


@both
@pytest.mark.parametrize("disk_bytes", [250_000, PLENTY])
@pytest.mark.parametrize("seed", range(3))
def test_a_new_process_finds_every_stored_prefix(memory: Memory, disk_bytes: int, seed: int):
    """BUG: a checkpoint inside an extent was restored before the longer extent, and removed."""
    chance = random.Random(seed)
    shelf = Shelf(memory, 200_000, disk_bytes)
    for _ in range(80):
        prompt = some_prompt(chance)
        shelf.insert(prompt, chance.randint(1, len(prompt)), chance.randrange(2))
        shelf.enter(some_prompt(chance), scope=chance.randrange(2))
    again = Shelf(memory, PLENTY, disk_bytes)
    again.files = dict(shelf.files)
    found = list(shelf.files.items())
    chance.shuffle(found)
    again.cache.restore(found)
    again.work()
    assert again.ops == []  # every file has its parents
    assert again.cache.stats.disk_bytes <= shelf.cache.stats.disk_bytes  # upper bounds
    for _ in range(60):
        prompt, scope = some_prompt(chance), chance.randrange(2)
        length = again.length(prompt, scope=scope)
        assert length == again.expected_on_disk(prompt, scope)
        assert length <= shelf.length(prompt, scope=scope) or disk_bytes < PLENTY
    prompt = max((some_prompt(chance) for _ in range(30)), key=again.length)
    hit = again.find(prompt)
    assert again.fetch(hit)
    while again.fetching:
        again.deliver()
    length = again.enter(prompt).num_tokens  # may now include a partial block
    assert 0 < hit.num_tokens <= length <= hit.num_tokens + (0 if memory.has_state else SIZE - 1)
    again.insert([*prompt, 77, 77, 77, 77])  # new ids differ from old ones
    assert again.length([*prompt, 77, 77, 77, 77]) >= len(prompt) // SIZE * SIZE


def restored(memory: Memory, *found: Stored, disk_bytes: int = PLENTY) -> Shelf:
    shelf = Shelf(memory, disk_bytes=disk_bytes)
    shelf.files = dict(enumerate(found, 1))
    shelf.cache.restore(list(shelf.files.items()))
    shelf.work()
    return shelf


@both
def test_files_without_their_parents_are_removed(memory: Memory):
    words = words_of(list(range(24)))
    shelf = restored(memory, Stored(0, 8, None, words), Stored(0, 8, 24, words))
    assert shelf.files == {}
    assert shelf.cache.stats.num_bytes == shelf.cache.stats.disk_bytes == 0


BROKEN = {
    "no words": Stored(0, 0, None, b""),
    "not whole blocks": Stored(0, 0, None, words_of([1] * 6)),
    "not whole words": Stored(0, 0, None, words_of([1] * 8)[:-1]),  # BUG: raises ValueError
    "starts within a block": Stored(0, 2, None, words_of([1] * 8)),
    "starts before all": Stored(0, -4, None, words_of([1] * 8)),
    "starts after its end": Stored(0, 16, None, words_of([1] * 8)),
    "a state that is not at its end": Stored(0, 0, 3, words_of([1] * 2)),
    "a state before all": Stored(0, 0, -1, words_of([1] * 2)),
    "a state of nothing": Stored(0, 0, 0, b""),  # BUG: is taken
    "a state without keys and values": Stored(0, 0, 8, words_of([2] * 8)),
    "a scope below 64 bits": Stored(-1, 0, None, words_of([1] * 8)),  # BUG: raises OverflowError
    "a scope above 64 bits": Stored(1 << 64, 0, None, words_of([1] * 8)),  # BUG: as well
}


@both
@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_are_removed(memory: Memory, what: str):
    good = Stored(0, 0, None, words_of([1] * 12))
    shelf = restored(memory, BROKEN[what], good)
    assert shelf.ops == [Unlink(1)]
    assert list(shelf.files.values()) == [good]
    assert shelf.length([1] * 8) == (0 if memory.has_state else 8)


def test_checkpoints_are_removed_for_a_model_without_states():
    words = words_of([1] * 12)
    shelf = restored(SLICEABLE, Stored(0, 0, None, words), Stored(0, 0, 12, words))
    assert shelf.ops == [Unlink(2)]


@both
def test_the_second_file_of_a_payload_is_removed(memory: Memory):
    """BUG: a second checkpoint replaced the first, which then was in no tree."""
    words = words_of([1] * 12)
    extents = [Stored(0, 0, None, words)] * 2
    states = [Stored(0, 0, 12, words)] * 2 if memory.has_state else []
    shelf = restored(memory, *extents, *states)
    assert shelf.ops == ([Unlink(2), Unlink(4)] if memory.has_state else [Unlink(2)])
    assert shelf.length([1] * 12) == 12


@both
def test_a_forged_file_is_removed(memory: Memory):
    found = [Stored(0, 0, None, bytes.fromhex(text)) for text in FORGED]
    shelf = restored(memory, *found)
    assert shelf.ops == [Unlink(2)]


@both
def test_files_beyond_the_cap_are_removed(memory: Memory):
    found = [Stored(0, 0, None, words_of([i] * 12)) for i in range(10)]
    shelf = restored(memory, *found, disk_bytes=60_000)
    assert len(shelf.files) == 3
    assert shelf.ops == [Unlink(id) for id in range(4, 11)]


@both
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_restored_or_removed_and_never_give_a_wrong_hit(
    memory: Memory, seed: int
):
    chance = random.Random(seed)
    shelf = Shelf(memory, disk_bytes=PLENTY)
    for _ in range(40):
        prompt = some_prompt(chance)
        shelf.insert(prompt, chance.randint(1, len(prompt)))
    found: list[tuple[int, Stored]] = []
    for id, stored in shelf.files.items():
        match chance.randrange(8):
            case 0:
                continue
            case 1:
                stored = replace(stored, start=stored.start + chance.choice((-4, 1, 4)))
            case 2:
                stored = replace(stored, words=stored.words[: -4 * chance.randint(1, 5)])
            case 3:
                stored = replace(stored, position=chance.choice((None, 0, 5, 8)))
            case 4:
                stored = replace(stored, words=stored.words + words_of([1]))
        found.append((id, stored))
    again = Shelf(memory, disk_bytes=PLENTY)
    again.files = dict(found)
    again.cache.restore(found)
    again.work()
    assert again.ops
    for _ in range(60):
        again.find(some_prompt(chance))


# --- any order of events --------------------------------------------------------------------------

# --- long prompts -------------------------------------------------------------------------------

AN_8B = Memory(layers=((147_456, None),))  # bytes of a token: 36 layers of 8 heads of 128, 16 bits
LONG = [(7 * i + i // 5) % 30_000 for i in range(32_768)]


def test_a_long_prompt_is_written_in_extents_of_bounded_size_a_bounded_number_at_a_time():
    shelf = Shelf(AN_8B, num_bytes=1 << 40, disk_bytes=1 << 40)
    shelf.insert(LONG)
    sizes = [len(own) * AN_8B.token_bytes for _, own in shelf.kept.values()]
    assert max(sizes) <= MAX_EXTENT_BYTES
    assert len(sizes) >= sum(sizes) // MAX_EXTENT_BYTES
    while len(shelf.files) < len(sizes):
        waiting = sum(shelf.kept[id][1].__len__() * AN_8B.token_bytes for id in shelf.writing)
        assert 0 < waiting <= MAX_WRITING_BYTES
        shelf.end_write()
    again = Shelf(AN_8B, num_bytes=1 << 40, disk_bytes=1 << 40)
    again.files = dict(shelf.files)
    again.cache.restore(list(shelf.files.items()))
    again.work()
    assert again.length(LONG) == len(LONG) // SIZE * SIZE


def test_an_extent_that_is_evicted_before_it_is_written_is_forgotten():
    shelf = Shelf(SLICEABLE, disk_bytes=PLENTY, max_extent_bytes=700, max_writing_bytes=700)
    prompt = list(range(64))
    shelf.insert(prompt)
    assert len(shelf.files) == len(shelf.writing) == 1
    shelf.cache.shrink(2 * NODE_BYTES)
    shelf.work()
    assert len(shelf.files) == 1, "the others were in memory alone"
    assert 0 < shelf.length(prompt) < 64


def test_a_write_that_fails_makes_room_for_the_next():
    shelf = Shelf(SLICEABLE, disk_bytes=PLENTY, max_extent_bytes=700, max_writing_bytes=700)
    shelf.insert(list(range(64)))
    shelf.insert([100 + i for i in range(8)])
    (first,) = shelf.writing
    shelf.cache.unstored(first)
    shelf.work()
    (_, second) = shelf.writing
    assert shelf.kept[second][1] == [100 + i for i in range(8)], "what hangs off it is not written"


prompts_st = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map(
    lambda pieces: [token for piece in pieces for token in piece]
)
few_scopes = st.sampled_from((0, 0, 0, 1 << 63))


class AnyOrder(RuleBasedStateMachine):
    """In any order of events, accounting is exact, bytes are within limits and hits are true.

    BUG: it found two that tests above reproduce: nodes on disk, and two reads of one id.
    """

    shelf: Shelf

    @initialize(
        memory=st.sampled_from((SLICEABLE, STATEFUL)),
        num_bytes=st.sampled_from((4000, 15_000, 60_000, PLENTY)),
        disk_bytes=st.sampled_from((0, 0, 60_000, 200_000, PLENTY)),
        extent_bytes=st.sampled_from((700, PLENTY)),
        writing_bytes=st.sampled_from((2000, PLENTY)),
    )
    def begin(
        self,
        memory: Memory,
        num_bytes: int,
        disk_bytes: int,
        extent_bytes: int,
        writing_bytes: int,
    ) -> None:
        most = {"max_extent_bytes": extent_bytes, "max_writing_bytes": writing_bytes}
        self.shelf = Shelf(memory, num_bytes, disk_bytes, **most)

    @rule(prompt=prompts_st, share=st.floats(0.1, 1), scope=few_scopes)
    def insert(self, prompt: Tokens, share: float, scope: int) -> None:
        self.shelf.insert(prompt, max(1, int(len(prompt) * share)), scope)

    @rule(prompt=prompts_st, share=st.floats(0, 1), scope=few_scopes)
    def enter(self, prompt: Tokens, share: float, scope: int) -> None:
        self.shelf.find(prompt, int(len(prompt) * share), scope)
        self.shelf.enter(prompt, int(len(prompt) * share), scope)

    @rule(prompt=prompts_st, scope=few_scopes)
    def fetch(self, prompt: Tokens, scope: int) -> None:
        hit = self.shelf.find(prompt, scope=scope)
        if hit.missing and self.shelf.fetch(hit):
            assert set(hit.missing) <= set(self.shelf.fetching)

    @rule()
    def deliver(self) -> None:
        if self.shelf.fetching:
            self.shelf.deliver()

    @rule()
    def end_write(self) -> None:
        if self.shelf.writing:
            self.shelf.end_write()

    @rule(num_bytes=st.integers(0, 30_000) | st.just(PLENTY))
    def shrink(self, num_bytes: int) -> None:
        self.shelf.cache.shrink(num_bytes)
        self.shelf.work()
        assert self.shelf.cache.stats.num_bytes <= num_bytes

    @rule(pick=st.integers(0, 99))
    def lose(self, pick: int) -> None:
        if ids := sorted(self.shelf.kept):
            self.shelf.cache.lose([ids[pick % len(ids)]])
            self.shelf.work()

    @rule(pick=st.integers(0, 99))
    def fail_to_store(self, pick: int) -> None:
        if ids := sorted(self.shelf.files):
            id = ids[pick % len(ids)]
            if id in self.shelf.fetching:
                self.shelf.fetching.remove(id)
            self.shelf.cache.unstored(id)
            self.shelf.work()
            assert id not in self.shelf.files

    @rule()
    def reset(self) -> None:
        self.shelf.kept.clear()
        self.shelf.cache.forget_held()
        self.shelf.work()

    @rule(chance=st.randoms(use_true_random=False))
    def restart(self, chance: random.Random) -> None:
        old = self.shelf
        found = list(old.files.items())
        chance.shuffle(found)
        stats = old.cache.stats
        self.shelf = Shelf(old.memory, stats.max_bytes, stats.max_disk_bytes, **old.most)
        self.shelf.files = dict(found)
        self.shelf.cache.restore(found)
        self.shelf.work()

    @rule()
    def clear(self) -> None:
        self.shelf.cache.clear()
        self.shelf.work()
        assert self.shelf.kept == self.shelf.files == {}
        assert self.shelf.cache.stats.num_bytes == 0

    @invariant()
    def accounting_is_exact(self) -> None:
        if hasattr(self, "shelf"):
            self.shelf.check()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    derandomize=True, max_examples=80, stateful_step_count=30, deadline=None, database=None
)
