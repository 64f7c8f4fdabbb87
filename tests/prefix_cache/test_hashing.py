"""Blocks and their keys, compared with a plain implementation of the module's definition."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlite.prefix_cache.hashing import (
    CHECKPOINT_STRIDE,
    MAX_MESSAGE_STARTS,
    Blocks,
    blocks_of,
    checkpoint_positions,
    extended,
    fnv1a,
    num_common,
    num_equal,
)

bounded = settings(derandomize=True, max_examples=150, deadline=None, database=None)
few = st.integers(0, 2)  # so that common prefixes are frequent
tokens_st = st.lists(st.integers(0, 2**32 - 1), max_size=60)
scopes = st.integers(0, 2**64 - 1)


def naive_keys(tokens: list[int], scope: int, size: int) -> tuple[int, ...]:
    """FNV over the key before and a digest, 8 bytes each; the digest over 4-byte words."""
    keys = []
    key = scope
    for start in range(0, len(tokens) - size + 1, size):
        words = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + size])
        key = fnv1a(key.to_bytes(8, "little") + fnv1a(words).to_bytes(8, "little"))
        keys.append(key)
    return tuple(keys)


# --- FNV --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "digest"),
    [(b"", 0xCBF29CE484222325), (b"a", 0xAF63DC4C8601EC8C), (b"foobar", 0x85944171F73967E8)],
)
def test_fnv1a_gives_the_published_values(data: bytes, digest: int):
    assert fnv1a(data) == digest


def test_fnv1a_continues_from_a_state():
    assert fnv1a(b"bar", fnv1a(b"foo")) == fnv1a(b"foobar")


# --- blocks -----------------------------------------------------------------------------------


@bounded
@given(tokens_st, scopes, st.integers(1, 9))
def test_keys_follow_the_definition(tokens: list[int], scope: int, size: int):
    blocks = blocks_of(tuple(tokens), scope, size, (1, 2))
    assert blocks.keys == naive_keys(tokens, scope, size)
    assert blocks.words == b"".join(token.to_bytes(4, "little") for token in tokens)
    assert (blocks.scope, blocks.size, blocks.message_starts) == (scope, size, (1, 2))


@pytest.mark.parametrize("size", [1, 16, 64])
def test_keys_of_a_long_prompt_follow_the_definition(size: int):
    tokens = random.Random(size).choices(range(150_000), k=1000)
    whole = blocks_of(tuple(tokens), 7, size)
    assert whole.keys == naive_keys(tokens, 7, size)
    for num in (size - 1, size, 100, 930, 999):  # many, some and no new blocks
        assert extended(blocks_of(tuple(tokens[:num]), 7, size), tokens[num:]) == whole


@bounded
@given(st.lists(tokens_st, max_size=8), scopes, st.integers(1, 9))
def test_blocks_extended_in_pieces_equal_those_of_the_whole(pieces, scope: int, size: int):
    whole = tuple(token for piece in pieces for token in piece)
    blocks = blocks_of((), scope, size, (3,))
    for piece in pieces:
        blocks = extended(blocks, iter(piece))
    assert blocks == blocks_of(whole, scope, size, (3,))


def test_less_than_a_block_has_no_key():
    assert blocks_of((), 1, 4) == Blocks(1, 4)
    assert blocks_of((5, 6, 7), 1, 4).keys == ()
    assert len(blocks_of((5, 6, 7, 8), 1, 4).keys) == 1


def test_a_key_depends_on_all_tokens_before_it_and_their_positions():
    one, two = blocks_of((1, 2, 3, 4), 0, 2), blocks_of((9, 2, 3, 4), 0, 2)
    assert one.keys[1] != two.keys[1]
    same = blocks_of((1, 2, 1, 2), 0, 2)
    assert same.keys[0] != same.keys[1]
    assert blocks_of((1, 2), 0, 2).keys != blocks_of((1, 2), 1, 2).keys


# --- comparison -------------------------------------------------------------------------------


@bounded
@given(st.lists(few, max_size=40), st.lists(few, max_size=20), st.lists(few, max_size=20))
def test_common_tokens_are_counted_in_whole_blocks(shared, one, two):
    for size in (1, 3, 4):
        a, b = blocks_of((*shared, *one), 5, size), blocks_of((*shared, *two), 5, size)
        num = 0
        while a.keys[num : num + 1] and a.keys[num : num + 1] == b.keys[num : num + 1]:
            num += 1
        assert num_common(a, b) == num_common(b, a) == num * size
        assert num * size >= len(shared) // size * size
        assert a.words[: 4 * num * size] == b.words[: 4 * num * size]


def test_scopes_have_no_common_tokens():
    tokens = tuple(range(16))
    assert num_common(blocks_of(tokens, 1, 4), blocks_of(tokens, 2, 4)) == 0
    forged = Blocks(2, 4, b"", blocks_of(tokens, 1, 4).keys)
    assert num_common(blocks_of(tokens, 1, 4), forged) == 0


@bounded
@given(st.lists(few, max_size=40), st.lists(few, max_size=40), st.integers(1, 9))
def test_equal_units_are_counted_one_by_one(one, two, step: int):
    a, b = bytes(one), bytes(two)
    num = 0
    while (num + 1) * step <= min(len(a), len(b)) and a[: (num + 1) * step] == b[
        : (num + 1) * step
    ]:
        num += 1
    assert num_equal(a, b, step) == num


@bounded
@given(st.binary(max_size=80), st.integers(0, 80), st.integers(1, 9))
def test_one_changed_byte_ends_the_common_prefix(data: bytes, at: int, step: int):
    changed = bytearray(data)
    if at < len(data):
        changed[at] ^= 1
    assert num_equal(data, bytes(changed), step) == min(at, len(data)) // step


# --- checkpoint positions ---------------------------------------------------------------------


def test_a_long_prompt_has_a_checkpoint_at_each_stride_and_none_at_its_end():
    stride, blocks = CHECKPOINT_STRIDE, blocks_of((), 0, 4)
    assert checkpoint_positions(blocks, stride) == set()
    assert checkpoint_positions(blocks, stride + 1) == {stride}
    assert checkpoint_positions(blocks, 3 * stride + 5) == {stride, 2 * stride, 3 * stride}


@pytest.mark.parametrize("num", range(MAX_MESSAGE_STARTS + 4))
def test_a_prompt_has_checkpoints_at_its_first_two_message_starts_and_the_last_ones(num: int):
    starts = tuple(range(10, 10 + 3 * num, 3))
    kept = starts if num <= MAX_MESSAGE_STARTS else starts[:2] + starts[2 - MAX_MESSAGE_STARTS :]
    assert checkpoint_positions(blocks_of((), 0, 4, starts), 1000) == set(kept)
    assert len(kept) <= MAX_MESSAGE_STARTS
