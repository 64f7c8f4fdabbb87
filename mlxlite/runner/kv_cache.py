"""The kinds of caches that mlx-lm's models make, and what the runner can do with each.

A kind is one class, which answers for its plain caches (of one row) and its batched ones: whether
rows merge, what a row costs, how a row's content is copied out and put back, whether it can be
quantised. In this room nothing else asks what class a cache has (`vision.network` maps mlx-vlm's
copies to these). The first of `KINDS` that matches is used, `CacheKind` itself where none does. A
`CacheList` is no kind: its caches are reached one by one by `layers_of` and `map_layers`.

Only mlx-lm's public classes are built upon. Every call is made on the device thread.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Final, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import (
    ArraysCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

from mlxlite.runner.padded_kv import PaddedKV, PaddedQuantizedKV

Cache = list[Any]  # one mlx-lm cache object a layer


@dataclass(frozen=True, slots=True)
class KVBits:
    """Keys and values are stored in `bits`, with one scale for each group of channels."""

    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Bytes of one row in one layer: per token, of at most `max_tokens`; and whatever its length"""

    token_bytes: int
    max_tokens: int | None = None
    constant_bytes: int = 0


class CacheKind:
    """One kind of cache. The answers here are those of a state that is only ever copied whole."""

    has_all_tokens = False  # it keeps each token's keys and values: snapshots are of ranges
    can_pack = False  # rows of unlike length prefill together without waiting for the device

    def matches(self, cache: Any) -> bool:
        return True

    def can_merge(self, cache: Any) -> bool:
        """Whether rows decode in one pass; otherwise one by one inside the same step."""
        return hasattr(cache, "merge")

    def merge(self, caches: SequenceOf[Any]) -> Any:
        """A batched cache of plain ones, which it takes over."""
        return type(caches[0]).merge(caches)

    def sizes(self, cache: Any) -> LayerSize:
        """What a plain cache that has been used costs."""
        return LayerSize(0, constant_bytes=cache.nbytes)

    def snapshot(self, cache: Any, start: int, stop: int, row: int | None) -> Any:
        """A copy, in memory of its own, of what a row (of a batched cache) holds.

        Keys and values `[1, H, n, D]` of the tokens `[start, stop)` where `has_all_tokens`, and
        otherwise all of its state as it is now.
        """
        state = self._state(cache if row is None else cache.extract(row))
        return tree_map(lambda x: mx.contiguous(x) if isinstance(x, mx.array) else x, state)

    def _state(self, cache: Any) -> Any:
        return cache.state

    def restore(self, cache: Any, parts: SequenceOf[Any], num_tokens: int) -> None:
        """Fill a new plain cache from snapshots: adjoining ranges of tokens, or the last state."""
        cache.state = tree_map(lambda x: mx.array(x) if isinstance(x, mx.array) else x, parts[-1])

    def quantized(self, cache: Any, kv_bits: KVBits) -> Any:
        """The quantised form of an empty cache; a kind that has none returns it as it is."""
        return cache


class FullAttention(CacheKind):
    """Keys and values of all tokens."""

    has_all_tokens = True
    can_pack = True
    plain: type = KVCache
    batched: type[PaddedKV] = PaddedKV

    def matches(self, cache: Any) -> bool:
        return type(cache) in (self.plain, self.batched)

    def can_merge(self, cache: Any) -> bool:
        return True

    def merge(self, caches: SequenceOf[Any]) -> Any:
        return self.batched.merge(caches)

    def sizes(self, cache: Any) -> LayerSize:
        return LayerSize(_token_bytes(cache))

    def snapshot(self, cache: Any, start: int, stop: int, row: int | None) -> Any:
        offset = 0 if row is None else cache.num_padding(row)
        rows = slice(None) if row is None else slice(row, row + 1)
        tokens = slice(offset + start, offset + stop)
        return tree_map(
            lambda part: mx.contiguous(part[rows, :, tokens]), (cache.keys, cache.values)
        )

    def restore(self, cache: Any, parts: SequenceOf[Any], num_tokens: int) -> None:
        """One copy, with room for the next tokens."""
        room = cache.step - num_tokens % cache.step

        def together(*held: mx.array) -> mx.array:
            _, heads, _, width = held[0].shape
            return mx.concatenate([*held, mx.zeros((1, heads, room, width), held[0].dtype)], axis=2)

        cache.keys, cache.values = tree_map(together, *parts)
        cache.offset = num_tokens

    def quantized(self, cache: Any, kv_bits: KVBits) -> Any:
        return QuantizedKVCache(kv_bits.group_size, kv_bits.bits)


class QuantizedAttention(FullAttention):
    """Full attention in the triples of mx.quantize."""

    can_pack = False
    plain = QuantizedKVCache
    batched = PaddedQuantizedKV

    def quantized(self, cache: Any, kv_bits: KVBits) -> Any:
        return cache


class WindowAttention(CacheKind):
    """Keys and values of the last tokens, in a ring."""

    def matches(self, cache: Any) -> bool:
        return isinstance(cache, RotatingKVCache | BatchRotatingKVCache)

    def sizes(self, cache: Any) -> LayerSize:
        return LayerSize(_token_bytes(cache), cache.max_size)

    def _state(self, cache: Any) -> Any:
        if cache.keys is None:
            return cache.state
        keys, values, offset, keep, max_size, index = cache.state
        keys, values = (_by_age(part, offset, keep, max_size, index) for part in (keys, values))
        return keys, values, offset, keep, max_size, keys.shape[2]


class ChunkedAttention(CacheKind):
    """Keys and values of the tokens of one chunk of the sequence. Its rows cannot merge."""

    def matches(self, cache: Any) -> bool:
        return isinstance(cache, ChunkedKVCache)

    def sizes(self, cache: Any) -> LayerSize:  # it grows by blocks and is then cut
        return LayerSize(_token_bytes(cache), cache.chunk_size + cache.step)

    def _state(self, cache: Any) -> Any:
        if cache.keys is None:
            return cache.state
        keys, values, offset, chunk_size, start = cache.state
        keys, values = (part[:, :, : offset - start] for part in (keys, values))
        return keys, values, offset, chunk_size, start


class RecurrentState(CacheKind):
    """Arrays of constant size."""

    can_pack = True

    def matches(self, cache: Any) -> bool:
        return type(cache) is ArraysCache


KINDS: Final = (
    FullAttention(),
    QuantizedAttention(),
    WindowAttention(),
    ChunkedAttention(),
    RecurrentState(),
    CacheKind(),  # any other: merged if it can, copied whole
)


def kind_of(cache: Any) -> CacheKind:
    return next(kind for kind in KINDS if kind.matches(cache))


def layers_of(cache: SequenceOf[Any]) -> list[Any]:
    """The caches of all layers, those in lists one by one."""
    parts = (layers_of(c.caches) if isinstance(c, CacheList) else [c] for c in cache)
    return [layer for part in parts for layer in part]


def map_layers(make: Callable[..., Any], *caches: SequenceOf[Any]) -> Cache:
    """What `make` returns for each layer's cache, or the caches of several rows, in like lists."""
    return [
        CacheList(*map_layers(make, *(cache.caches for cache in layers)))
        if isinstance(layers[0], CacheList)
        else make(*layers)
        for layers in zip(*caches, strict=True)
    ]


def _token_bytes(cache: Any) -> int:
    arrays = cast("list[tuple[str, mx.array]]", tree_flatten((cache.keys, cache.values)))
    return sum(array.nbytes // array.shape[2] for _, array in arrays)


def _by_age(part: mx.array, offset: int, keep: int, max_size: int, index: int) -> mx.array:
    """A ring's tokens by age: the first `keep` of the sequence, then the last ones."""
    if index < min(offset, part.shape[2]):
        part = mx.concatenate([part[:, :, :keep], part[:, :, index:], part[:, :, keep:index]], 2)
    part = part[:, :, :offset]
    extra = part.shape[2] - max_size
    if extra > 0:
        part = mx.concatenate([part[:, :, :keep], part[:, :, keep + extra :]], 2)
    return part
