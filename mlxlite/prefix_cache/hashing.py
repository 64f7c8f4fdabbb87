"""Blocks of tokens and their keys, by which the prefix cache finds candidates.

The key of block i is FNV-1a-64 over the key of block i - 1 and a digest, FNV-1a-64 too, of the
block's tokens as 4-byte words, each in little-endian bytes; the first block follows its scope: the
model and, with scopes per API key, the tenant. So equal keys mean equal prefixes, except for
collisions, which can be forged: nothing may depend on a key alone.

FNV-1a: isthe.com/chongo/tech/comp/fnv.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

FNV_OFFSET = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3
_MASK_64 = 0xFFFFFFFFFFFFFFFF
WORD_BYTES = 4  # bytes of a token
_MAX_ALONE = 12  # blocks that are hashed faster one by one, with a margin
# Tokens between checkpoints in a long prompt, besides those where its messages start.
CHECKPOINT_STRIDE = 2048
MAX_MESSAGE_STARTS = 8  # of a prompt: the first two and the last ones


@dataclass(frozen=True, slots=True)
class Blocks:
    """Tokens in blocks of `size`.

    `words` are all the tokens, 4 bytes each, little-endian; `keys` those of the whole blocks.
    Prefixes are shared within one `scope`, 64 bits. `message_starts` are the positions at which
    messages start, ascending: other prompts are likely to diverge there.
    """

    scope: int
    size: int
    words: bytes = b""
    keys: tuple[int, ...] = ()
    message_starts: tuple[int, ...] = ()


def fnv1a(data: bytes, state: int = FNV_OFFSET) -> int:
    """FNV-1a, 64 bits."""
    for byte in data:
        state = ((state ^ byte) * FNV_PRIME) & _MASK_64
    return state


def blocks_of(
    tokens: tuple[int, ...], scope: int, size: int, message_starts: tuple[int, ...] = ()
) -> Blocks:
    """A prompt's blocks and keys. Slow for a long prompt: not for the event loop."""
    return extended(Blocks(scope, size, b"", (), message_starts), tokens)


def extended(blocks: Blocks, tokens: Iterable[int]) -> Blocks:
    """The blocks with more tokens appended."""
    words = blocks.words + np.fromiter(tokens, np.dtype("<u4")).tobytes()
    key = blocks.keys[-1] if blocks.keys else blocks.scope
    keys = []
    for digest in _digests(words, len(blocks.keys), WORD_BYTES * blocks.size):
        key = fnv1a(key.to_bytes(8, "little") + digest)
        keys.append(key)
    return replace(blocks, words=words, keys=(*blocks.keys, *keys))


def _digests(words: bytes, first: int, size: int) -> Iterator[bytes]:
    """FNV-1a-64 of each whole block of `size` bytes from the `first` on, in little-endian bytes.

    NumPy hashes all blocks at once in the time that 16 take one by one (measured: 80 µs for blocks
    of 64 bytes), so the few new ones after a response are hashed without it.
    """
    begin, num = first * size, len(words) // size - first
    if num <= _MAX_ALONE:
        ends = range(begin + size, len(words) + 1, size)
        return (fnv1a(words[end - size : end]).to_bytes(8, "little") for end in ends)
    state = np.full(num, FNV_OFFSET, np.uint64)
    for column in np.frombuffer(words, np.uint8, num * size, begin).reshape(num, size).T:
        state = (state ^ column) * np.uint64(FNV_PRIME)
    data = state.astype("<u8").tobytes()
    return (data[i : i + 8] for i in range(0, len(data), 8))


def num_common(a: Blocks, b: Blocks) -> int:
    """Tokens, in whole blocks, of the common prefix; by keys alone, so collisions are possible."""
    if a.scope != b.scope:
        return 0
    places = range(min(len(a.keys), len(b.keys)))
    # Equal keys have equal prefixes, so binary search works.
    return a.size * bisect_left(places, True, key=lambda i: a.keys[i] != b.keys[i])


def num_equal(a: bytes, b: bytes, step: int) -> int:
    """Units of `step` bytes in the common prefix of two byte strings."""
    num = min(len(a), len(b)) // step
    # Slices of bytes compare by memcmp, which is worth their copies; memoryviews by elements.
    if a[: num * step] == b[: num * step]:
        return num
    stops = range(step, num * step + 1, step)
    return bisect_left(stops, True, key=lambda stop: a[:stop] != b[:stop])


def checkpoint_positions(blocks: Blocks, num_tokens: int) -> set[int]:
    """The positions in prefill at which windows and states are saved."""
    # A checkpoint within the first block is not worth its cost.
    starts = [start for start in blocks.message_starts if start >= blocks.size]
    starts = starts[:2] + starts[2:][2 - MAX_MESSAGE_STARTS :]
    return {*starts, *range(CHECKPOINT_STRIDE, num_tokens, CHECKPOINT_STRIDE)}
