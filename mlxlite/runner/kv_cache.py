"""The caches of the rows that decode together: mlx-lm's kinds, made to join, leave and be counted.

A row comes with one plain cache a layer. While it decodes alone it keeps it; from two rows on the
caches are merged, padded on the left to the longest. A kind that cannot merge stays plain, and its
rows decode one by one inside the same step. Full attention, quantised or not, has a batched form of
ours, whose padding is known on the host: joining and leaving never wait for the device.

What a row has computed can be kept and put under another one later: as `Kept` arrays of its own
memory, by tokens where a layer keeps all of them, whole where it keeps a window or a state.

Only mlx-lm's public classes are built upon. Lives on the lane.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
)

Cache = list[Any]  # one mlx-lm cache object a layer


@dataclass(frozen=True, slots=True)
class KVBits:
    """Keys and values are kept in so many bits, with one scale for each group of channels."""

    bits: int
    group_size: int


class BatchCache:
    """The caches of the rows that decode together, in row order.

    Three forms: nothing, one row's plain cache, and either one merged cache for all rows or, where
    a layer's kind cannot merge, one plain cache for each row.
    """

    def __init__(self) -> None:
        self._merged: Cache | None = None
        self._num_merged = 0
        self._plain: list[Cache] = []

    def forward(
        self, model: nn.Module, tokens: mx.array, deltas: mx.array | None = None
    ) -> mx.array:
        """Last-position logits `[B, V]` for input tokens `[B]`.

        `deltas` `[B]` are what rows add to their positions, for a model that takes them.
        """

        def run(rows: slice, cache: Cache) -> mx.array:
            more = {} if deltas is None else {"deltas": deltas[rows]}
            return cast("mx.array", model(tokens[rows, None], cache=cache, **more)[:, -1])

        if self._merged is not None:
            return run(slice(None), self._merged)
        logits = [run(slice(i, i + 1), cache) for i, cache in enumerate(self._plain)]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits)

    def kept(self, row: int, start: int, stop: int, *, has_states: bool) -> "Kept":
        """A copy of what a row has computed; see `kept`."""
        if self._merged is not None:
            return kept(self._merged, start, stop, has_states=has_states, row=row)
        return kept(self._plain[row], start, stop, has_states=has_states)

    def keep(self, indices: list[int]) -> None:
        """Drop every row but those at `indices`, which ascend."""
        if self._merged is None:
            self._plain = [self._plain[i] for i in indices]
            return
        if len(indices) == self._num_merged:
            return
        self._num_merged = len(indices)
        if not indices:
            self._merged = None
        elif len(indices) == 1:
            self._plain = [[layer.extract(indices[0]) for layer in self._merged]]
            self._merged = None
        else:
            for layer in self._merged:
                layer.filter(mx.array(indices))

    def join(self, caches: SequenceOf[Cache]) -> None:
        """Append rows with these plain caches, which belong to the batch from now on."""
        if not caches:
            return
        if self._merged is not None:
            for layer, other in zip(self._merged, merge(caches), strict=True):
                layer.extend(other)
            self._num_merged += len(caches)
            return
        self._plain = [*self._plain, *caches]
        if len(self._plain) > 1 and all(_can_merge(layer) for layer in self._plain[0]):
            self._merged, self._num_merged = merge(self._plain), len(self._plain)
            self._plain = []


def can_pack(layer: Any) -> bool:
    """Whether rows of unlike length can be prefilled together without waiting for the device."""
    if isinstance(layer, CacheList):
        return all(map(can_pack, layer.caches))
    return type(layer) in (KVCache, ArraysCache)


def merge(caches: SequenceOf[Cache]) -> Cache:
    return [_merge_layer(layers) for layers in zip(*caches, strict=True)]


def _merge_layer(layers: tuple[Any, ...]) -> Any:
    if isinstance(layers[0], CacheList):
        inner = zip(*(layer.caches for layer in layers), strict=True)
        return CacheList(*map(_merge_layer, inner))
    if type(layers[0]) is KVCache:
        if all(layer.empty() for layer in layers):
            return _BatchKV([0] * len(layers))
        return _BatchKV.merge(layers)
    return type(layers[0]).merge(layers)


def _can_merge(layer: Any) -> bool:
    if isinstance(layer, CacheList):
        return all(map(_can_merge, layer.caches))
    return hasattr(layer, "merge")


def layer_sizes(layer: Any) -> list[tuple[int, int | None, int]]:
    """(Bytes per token, most tokens kept, constant bytes) of a used layer's cache."""
    if isinstance(layer, CacheList):
        return [size for inner in layer.caches for size in layer_sizes(inner)]
    if isinstance(layer, KVCache | RotatingKVCache | ChunkedKVCache | QuantizedKVCache):
        arrays = cast("list[tuple[str, mx.array]]", tree_flatten((layer.keys, layer.values)))
        per_token = sum(array.nbytes // array.shape[2] for _, array in arrays)
        most = getattr(layer, "max_size", None)
        if isinstance(layer, ChunkedKVCache):
            most = layer.chunk_size + layer.step  # it grows by blocks and is then cut
        return [(per_token, most, 0)]
    return [(0, None, layer.nbytes)]


@dataclass(frozen=True, slots=True)
class Kept:
    """What was computed, apart from the row that computed it; in the order of the layers' caches.

    `tokens` has keys and values `[1, H, n, D]` of the tokens `[start, start + n)` for each cache
    that keeps all tokens; `states` all that a cache holds for each that does not, or is empty.
    """

    start: int
    tokens: list[Any]
    states: list[Any]

    def arrays(self) -> list[mx.array]:
        return [leaf for _, leaf in _flat((self.tokens, self.states)) if isinstance(leaf, mx.array)]

    def leaves(self) -> dict[str, Any]:
        """Every array, and what is none, by a name that tells its place."""
        return {
            f"{part}.{name}": leaf
            for part, tree in (("tokens", self.tokens), ("states", self.states))
            for name, leaf in _flat(tree)
        }

    @classmethod
    def of_leaves(cls, start: int, leaves: Mapping[str, Any]) -> "Kept":
        """The inverse of `leaves`."""

        def part(prefix: str) -> list[Any]:
            own = [(k.removeprefix(prefix), v) for k, v in leaves.items() if k.startswith(prefix)]
            return cast("list[Any]", tree_unflatten(own)) if own else []

        return cls(start, part("tokens."), part("states."))

    def is_of(self, start: int, stop: int) -> bool:
        """Whether it has the tokens `[start, stop)` and no other."""
        arrays = [leaf for _, leaf in _flat(self.tokens)]
        return self.start == start and all(part.shape[2] == stop - start for part in arrays)

    def is_like(self, other: "Kept") -> bool:
        """Whether both are of the same layers, whatever their lengths."""
        mine, theirs = self.leaves(), other.leaves()
        if not self.states:
            theirs = {name: leaf for name, leaf in theirs.items() if name.startswith("tokens.")}
        return mine.keys() == theirs.keys() and all(
            _kind(leaf) == _kind(theirs[name]) for name, leaf in mine.items()
        )

    def split(self, num_tokens: int) -> "tuple[Kept, Kept]":
        """The first tokens and the others, each in memory of its own."""
        stop = self.start + num_tokens
        first = tree_map(lambda part: mx.contiguous(part[:, :, :num_tokens]), self.tokens)
        rest = tree_map(lambda part: mx.contiguous(part[:, :, num_tokens:]), self.tokens)
        return Kept(self.start, first, []), Kept(stop, rest, [])


def _kind(leaf: Any) -> Any:
    """Of an array all but its length."""
    if isinstance(leaf, mx.array):
        return leaf.dtype, *leaf.shape[:2], *leaf.shape[3:]
    return type(leaf)


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return cast("list[tuple[str, Any]]", tree_flatten(tree))


def _leaves(cache: SequenceOf[Any]) -> list[Any]:
    """The caches of all layers, those in lists one by one."""
    parts = (_leaves(c.caches) if isinstance(c, CacheList) else [c] for c in cache)
    return [leaf for part in parts for leaf in part]


def _has_all_tokens(leaf: Any) -> bool:
    return type(leaf) in (KVCache, _BatchKV, _QuantKV, _BatchQuantKV)


def kept(cache: Cache, start: int, stop: int, *, has_states: bool, row: int | None = None) -> Kept:
    """Copies of what a cache holds of tokens `[start, stop)`, and of its windows and states."""
    tokens, states = [], []
    for leaf in _leaves(cache):
        if _has_all_tokens(leaf):
            rows, offset = slice(None), 0
            if row is not None:
                rows, offset = slice(row, row + 1), leaf.num_padding(row)
            part = slice(offset + start, offset + stop)
            tokens.append(
                tree_map(
                    lambda held, rows=rows, part=part: mx.contiguous(held[rows, :, part]),
                    (leaf.keys, leaf.values),
                )
            )
        elif has_states:
            states.append(_state(leaf if row is None else leaf.extract(row)))
    return Kept(start, tokens, states)


def _state(leaf: Any) -> Any:
    """All that one row's cache holds, in no more memory than that takes."""
    state = leaf.state
    if isinstance(leaf, RotatingKVCache) and leaf.keys is not None:
        keys, values, offset, keep, max_size, index = state
        keys, values = (_in_order(part, offset, keep, max_size, index) for part in (keys, values))
        state = keys, values, offset, keep, max_size, keys.shape[2]
    elif isinstance(leaf, ChunkedKVCache) and leaf.keys is not None:
        keys, values, offset, chunk_size, start = state
        keys, values = (part[:, :, : offset - start] for part in (keys, values))
        state = keys, values, offset, chunk_size, start
    return tree_map(lambda x: mx.contiguous(x) if isinstance(x, mx.array) else x, state)


def _in_order(part: mx.array, offset: int, keep: int, max_size: int, index: int) -> mx.array:
    """A rotating cache's tokens by age: the first `keep` of the sequence, then the last ones."""
    if index < min(offset, part.shape[2]):
        part = mx.concatenate([part[:, :, :keep], part[:, :, index:], part[:, :, keep:index]], 2)
    part = part[:, :, :offset]
    extra = part.shape[2] - max_size
    if extra > 0:
        part = mx.concatenate([part[:, :, :keep], part[:, :, keep + extra :]], 2)
    return part


def fill(cache: Cache, parts: SequenceOf[tuple[Kept, int]], num_tokens: int) -> None:
    """Make a new cache what it would be after `num_tokens`.

    `parts` follow one another, each up to a token; the states are those of the last one. One copy,
    with room for the next tokens.
    """
    leaves = _leaves(cache)
    sliceable = [leaf for leaf in leaves if _has_all_tokens(leaf)]
    for i, leaf in enumerate(sliceable):
        room = leaf.step - num_tokens % leaf.step
        pieces = [
            tree_map(lambda held, n=stop - part.start: held[:, :, :n], part.tokens[i])
            for part, stop in parts
            if stop > part.start
        ]
        leaf.keys, leaf.values = tree_map(
            lambda *held, room=room: mx.concatenate([*held, _empty(held[0], room)], axis=2), *pieces
        )
        leaf.offset = num_tokens
    others = [leaf for leaf in leaves if not _has_all_tokens(leaf)]
    for leaf, state in zip(others, parts[-1][0].states if others else [], strict=True):
        leaf.state = tree_map(lambda x: mx.array(x) if isinstance(x, mx.array) else x, state)


def _empty(like: mx.array, num_tokens: int) -> mx.array:
    return mx.zeros((1, like.shape[1], num_tokens, like.shape[3]), like.dtype)


class _BatchKV(BatchKVCache):
    """mlx-lm's batched cache, with the padding known on the host.

    Its own `filter` and `extract` read the padding from the device and wait for the step in flight;
    and where no row is padded, one new token needs no mask.
    """

    keys: Any
    values: Any
    offset: mx.array
    left_padding: mx.array
    _idx: int

    def __init__(self, left_padding: list[int]) -> None:
        super().__init__(left_padding)
        self._pads = list(left_padding)
        self._right_pads: list[int] = []  # of a pass over rows of unlike length

    def num_padding(self, row: int) -> int:
        return self._pads[row]

    def make_mask(self, N: int, return_array: bool = False, **kwargs: Any) -> mx.array | None:
        if N == 1 and not return_array and not kwargs.get("window_size") and not any(self._pads):
            return None
        mask: mx.array = create_causal_mask(
            N, offset=self._idx, left_padding=self.left_padding, **kwargs
        )
        return mask

    def prepare(
        self,
        *,
        left_padding: list[int] | None = None,
        lengths: list[int] | None = None,
        right_padding: list[int] | None = None,
    ) -> None:
        """Before a pass over rows of unlike length, padded on the right."""
        assert left_padding is None
        self._right_pads = right_padding or []

    def finalize(self) -> None:
        """After that pass. The rows are not rolled to the right, as mlx-lm's are: that copies all
        of them number by number, and they can only be extracted now.
        """

    def filter(self, batch_indices: mx.array) -> None:
        keep = cast("list[int]", batch_indices.tolist())  # made on the host: no wait
        self._pads = [self._pads[i] for i in keep]
        shift = min(self._pads)
        if self.keys is not None:
            self.keys, self.values = tree_map(
                lambda part: part[batch_indices][:, :, shift:], (self.keys, self.values)
            )
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices] - shift
        self._pads = [pad - shift for pad in self._pads]
        self._idx -= shift

    @classmethod
    def merge(cls, caches: SequenceOf[Any]) -> "_BatchKV":
        first, *others = map(cls._of, caches)
        if others:
            first.extend(*others)
        return first

    @classmethod
    def _of(cls, cache: Any) -> "_BatchKV":
        """A batch of one row, whose arrays it takes over."""
        batch = cls([0])
        batch.keys, batch.values = cache.keys, cache.values
        batch._idx = cache.offset
        batch.offset = batch.offset + batch._idx
        return batch

    def extend(self, *others: "_BatchKV") -> None:
        """Append rows, in new arrays with room for the next token: each number is copied once.

        mlx-lm's own pads both sides, puts them together and copies all again for that token, which
        all rows wait for when a long prompt joins them.
        """
        batches = (self, *others)
        longest = max(batch._idx for batch in batches)
        self.keys = _right_justified(batches, [batch.keys for batch in batches], longest)
        self.values = _right_justified(batches, [batch.values for batch in batches], longest)
        self._pads = [pad + longest - batch._idx for batch in batches for pad in batch._pads]
        self.left_padding = mx.array(self._pads)
        self.offset = longest - self.left_padding
        self._idx = longest

    def extract(self, idx: int) -> Any:
        cache = KVCache()
        start, stop = self._pads[idx], self._idx
        if self._right_pads:
            stop -= self._right_pads[idx]
        cache.keys = mx.contiguous(self.keys[idx : idx + 1, :, start:stop])
        cache.values = mx.contiguous(self.values[idx : idx + 1, :, start:stop])
        cache.offset = stop - start
        return cache


class _QuantKV(QuantizedKVCache):
    """mlx-lm's quantised cache of one row, able to join others."""

    def size(self) -> int:
        return int(self.offset)

    @classmethod
    def merge(cls, caches: SequenceOf["_QuantKV"]) -> "_BatchKV":
        return _BatchQuantKV.merge(caches)


class _BatchQuantKV(_BatchKV):
    """Quantised keys and values of several rows: the triples of mx.quantize, padded on the left."""

    @classmethod
    def _of(cls, cache: Any) -> _BatchKV:
        batch = super()._of(cache)
        batch.bits, batch.group_size = cache.bits, cache.group_size
        return batch

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        start, self._idx = self._idx, self._idx + keys.shape[2]
        self.offset = self.offset + keys.shape[2]
        self.keys = self._append(self.keys, keys, start)
        self.values = self._append(self.values, values, start)
        return self.keys_and_values()

    def _append(self, held: Any, new: mx.array, start: int) -> Any:
        packed = mx.quantize(new, group_size=self.group_size, bits=self.bits)
        if held is None or start + new.shape[2] > held[0].shape[2]:
            room = -(-new.shape[2] // self.step) * self.step
            empty = tree_map(
                lambda part: mx.zeros((*part.shape[:2], room, part.shape[3]), part.dtype), packed
            )
            if held is None:
                held = empty
            else:
                held = tree_map(
                    lambda old, more: mx.concatenate([old[:, :, :start], more], axis=2),
                    held,
                    empty,
                )
        for part, fresh in zip(held, packed, strict=True):
            part[:, :, start : self._idx] = fresh
        return held

    def keys_and_values(self) -> tuple[Any, Any]:
        held = tree_map(lambda part: part[:, :, : self._idx], (self.keys, self.values))
        return held[0], held[1]

    def extract(self, idx: int) -> Any:
        cache = _QuantKV(self.group_size, self.bits)
        pad = self._pads[idx]
        cache.keys, cache.values = tree_map(
            lambda part: mx.contiguous(part[idx : idx + 1, :, pad : self._idx]),
            (self.keys, self.values),
        )
        cache.offset = self._idx - pad
        return cache


def _right_justified(batches: SequenceOf[_BatchKV], parts: list[Any], longest: int) -> Any:
    """All rows' keys or values, ending at `longest`, with room behind it; None where there is none.

    Arrays, or the triples of mx.quantize. Zeros are before them, as mlx-lm has it.
    """
    stops = list(accumulate(len(batch._pads) for batch in batches))
    size = longest + _BatchKV.step  # rows a power of two apart would share a CPU's cache lines
    filled = [
        (batch, stop, part)
        for batch, stop, part in zip(batches, stops, parts, strict=True)
        if part is not None
    ]

    def together(*own: mx.array) -> mx.array:
        _, heads, _, width = own[0].shape
        held = mx.zeros((stops[-1], heads, size, width), own[0].dtype)
        for (batch, stop, _), part in zip(filled, own, strict=True):
            rows = slice(stop - len(batch._pads), stop)
            held[rows, :, longest - batch._idx : longest] = part[:, :, : batch._idx]
        return held

    return tree_map(together, *(part for *_, part in filled)) if filled else None


def quantized(layer: Any, kv_bits: KVBits) -> Any:
    """The quantised form of a layer's empty cache; kinds that have none stay as they are."""
    if isinstance(layer, CacheList):
        return CacheList(*(quantized(inner, kv_bits) for inner in layer.caches))
    if type(layer) is KVCache:
        return _QuantKV(kv_bits.group_size, kv_bits.bits)
    return layer
