"""How the caches of the rows that decode together lie in memory.

A row comes with one plain cache a layer. While it decodes alone it keeps it; from two rows on the
caches are merged, in the batched form of their kind. If a layer's kind cannot merge, all caches
stay plain, and the rows decode one by one inside the same step. Joining and leaving never wait for
the device where the kind does not.
"""

from collections.abc import Sequence as SequenceOf
from typing import Any, cast

import mlx.core as mx
from mlx import nn

from mlxlite.runner.kv_cache import Cache, kind_of, layers_of, map_layers
from mlxlite.runner.snapshots import HeldCache


class BatchCache:
    """The caches of the rows that decode together, in row order.

    Not `can_merge`: the model computes rows rightly only one by one.

    Three forms: nothing, one row's plain cache, and either one merged cache for all rows or, where
    a layer's kind cannot merge, one plain cache for each row.
    """

    def __init__(self, *, can_merge: bool = True) -> None:
        self._can_merge = can_merge
        self._merged: Cache | None = None
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

    def held(self, row: int) -> HeldCache:
        return (self._plain[row], None) if self._merged is None else (self._merged, row)

    def keep(self, indices: list[int]) -> None:
        """Drop every row but those at `indices`, which ascend."""
        if self._merged is None:
            self._plain = [self._plain[i] for i in indices]
            return
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
            return
        self._plain = [*self._plain, *caches]
        if len(self._plain) > 1 and self._can_merge and can_merge(self._plain[0]):
            self._merged, self._plain = merge(self._plain), []


def merge(caches: SequenceOf[Cache]) -> Cache:
    """One batched cache a layer, of several rows' plain caches."""

    def together(*layers: Any) -> Any:
        return kind_of(layers[0]).merge(layers)

    return map_layers(together, *caches)


def can_merge(cache: Cache) -> bool:
    """Whether the kinds of all layers can merge."""
    return all(kind_of(layer).can_merge(layer) for layer in layers_of(cache))
