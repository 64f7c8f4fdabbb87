"""Logits to tokens, all rows at once.

A row's settings are one entry in a handful of `[B, 1]` arrays; nothing here loops over rows while
tokens are drawn, however their settings differ. The cheapest path that serves every row is taken,
and all paths give the same token for the same row:

    all greedy            argmax
    nobody truncates      argmax(logits / temperature + noise)          the Gumbel trick
    somebody truncates    the same over the tokens at or above the row's threshold

Temperature comes first, as in vLLM, then the cuts in llama.cpp's order: top_k, top_p over what
top_k left, min_p. Tokens tied with the last one kept are kept too, so that the choice of path can
never decide a tie.

The noise of a token is a hash of (seed, number of tokens drawn before, token id). A seeded request
therefore draws the same alone or in any company (tested), and needs no state that could be lost.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import mlx.core as mx

from mlxlite.sequence import SamplingParams

# Where every row has a top_k of at most this, thresholds come from a partition, not from a sort:
# on CPU 2.9 ms against 23.7 ms for [8, 32000] float32.
_MAX_PARTITION_K = 64
_MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Draw:
    """One row of a batch: its settings and how many tokens it has drawn before."""

    params: SamplingParams
    num_drawn: int


class Sampler:
    """Draws for one fixed set of rows; make a new one when a row joins or leaves."""

    def __init__(self, rows: SequenceOf[Draw]) -> None:
        params = [row.params for row in rows]
        keys = [_split_seed(p.seed) for p in params]
        self._temperature = mx.array([[p.temperature or 1.0] for p in params], mx.float32)
        self._is_greedy = mx.array([p.temperature == 0.0 for p in params])
        self._top_k = mx.array([[p.top_k or _MASK_32 >> 1] for p in params], mx.int32)
        self._top_p = mx.array([[p.top_p] for p in params], mx.float32)
        # log 0 is -inf: off
        self._log_min_p = mx.log(mx.array([[p.min_p] for p in params], mx.float32))
        self._key = mx.array([[key[0]] for key in keys], mx.uint32)
        self._position = mx.array(
            [[(k[1] + r.num_drawn) & _MASK_32] for k, r in zip(keys, rows, strict=True)], mx.uint32
        )
        drawn = [p for p in params if p.temperature != 0.0]
        self._is_all_greedy = not drawn
        self._is_any_greedy = len(drawn) < len(params)
        self._has_min_p = any(p.min_p > 0.0 for p in drawn)
        self._has_top = any(p.top_k > 0 or p.top_p < 1.0 for p in drawn)
        max_k = max((p.top_k or _MASK_32 for p in drawn), default=0)
        self._partition_k = max_k if max_k <= _MAX_PARTITION_K else None

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits `[B, V]` to token ids `[B]` (uint32), each row one position further."""
        if self._is_all_greedy:
            return mx.argmax(logits, axis=-1)
        scores = logits.astype(mx.float32) / self._temperature
        if self._has_top:
            scores = mx.where(scores >= self._top_threshold(scores), scores, -mx.inf)
        if self._has_min_p:
            floor = mx.max(scores, axis=-1, keepdims=True) + self._log_min_p
            is_cut = (scores < floor) & (self._log_min_p > -mx.inf)
            scores = mx.where(is_cut, -mx.inf, scores)
        ids = mx.arange(logits.shape[-1], dtype=mx.uint32)[None]
        drawn = mx.argmax(scores + _gumbel(ids, self._key, self._position), axis=-1)
        self._position = self._position + 1
        if self._is_any_greedy:
            drawn = mx.where(self._is_greedy, mx.argmax(logits, axis=-1), drawn)
        return drawn

    def _top_threshold(self, scores: mx.array) -> mx.array:
        """The lowest score `[B, 1]` that top_k and top_p let through."""
        num_tokens = scores.shape[-1]
        if self._partition_k is not None and self._partition_k < num_tokens:
            k = self._partition_k
            head = mx.partition(scores, num_tokens - k, axis=-1)[:, num_tokens - k :]
        else:
            head = scores
        ranked = mx.sort(head, axis=-1)[:, ::-1]
        rank = mx.arange(ranked.shape[-1])[None]
        ranked = mx.where(rank < self._top_k, ranked, -mx.inf)
        probabilities = mx.softmax(ranked, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        is_kept = (before < self._top_p) & (ranked > -mx.inf)
        last = mx.maximum(mx.sum(is_kept, axis=-1, keepdims=True) - 1, 0)
        threshold = mx.take_along_axis(ranked, last, axis=-1)
        # The probabilities add up to 1 only nearly: what is off must not lose its tail to that.
        is_off = (self._top_p >= 1.0) & (self._top_k >= _MASK_32 >> 1)
        return mx.where(is_off, -mx.inf, threshold)


def _gumbel(ids: mx.array, key: mx.array, position: mx.array) -> mx.array:
    """Gumbel noise `[B, V]` of token ids `[1, V]`, row keys `[B, 1]`, row positions `[B, 1]`."""
    bits = _hash(_hash(_hash(position) ^ key) + ids)
    # The upper 23 bits, at the middle of their interval, which float32 has: never 0 and never 1.
    uniform = (bits >> 9).astype(mx.float32) * 2.0**-23 + 2.0**-24
    return -mx.log(-mx.log(uniform))


def _hash(x: mx.array) -> mx.array:
    """A 32-bit permutation with little bias: «lowbias32», nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def _split_seed(seed: int) -> tuple[int, int]:
    """Two 32-bit words of a 64-bit seed, well mixed: SplitMix64's output function."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return z & _MASK_32, z >> 32
