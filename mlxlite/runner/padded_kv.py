"""Full attention in a batch: keys and values of several rows, padded on the left to the longest.

The padding is known on the host: joining, leaving and snapshots never wait for the device, as
mlx-lm's own batched caches do. Quantised or not, an array's axes are `[B, H, T, D]`.
"""

from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache


class PaddedKV(BatchKVCache):
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
        """After that pass. The rows are not rolled to the right, as mlx-lm's are: that copies
        them element by element, and extraction is all that may follow.
        """

    def filter(self, batch_indices: mx.array) -> None:
        keep = cast("list[int]", batch_indices.tolist())  # made on the host: no wait
        self._pads = [self._pads[i] for i in keep]
        shift = min(self._pads)
        if self.keys is not None:
            self.keys, self.values = tree_map(
                lambda part: part[:, :, shift:][batch_indices], (self.keys, self.values)
            )
        self.offset = self.offset[batch_indices]
        self.left_padding = self.left_padding[batch_indices] - shift
        self._pads = [pad - shift for pad in self._pads]
        self._idx -= shift

    @classmethod
    def merge(cls, caches: SequenceOf[Any]) -> "PaddedKV":
        first, *others = map(cls._of, caches)
        if others:
            first.extend(*others)
        return first

    @classmethod
    def _of(cls, cache: Any) -> "PaddedKV":
        """A batch of one row, whose arrays it takes over."""
        batch = cls([0])
        batch.keys, batch.values = cache.keys, cache.values
        batch._idx = cache.offset
        batch.offset = batch.offset + batch._idx
        return batch

    def extend(self, *others: "PaddedKV") -> None:
        """Append rows, in new arrays with room for the next token: each element is copied once.

        mlx-lm's own pads both sides, concatenates them and copies all again for that token: a
        pause of all rows when a long prompt joins them.
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


class PaddedQuantizedKV(PaddedKV):
    """Quantised keys and values of several rows: the triples of mx.quantize, padded on the left."""

    @classmethod
    def _of(cls, cache: Any) -> PaddedKV:
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
        cache = QuantizedKVCache(self.group_size, self.bits)
        pad = self._pads[idx]
        cache.keys, cache.values = tree_map(
            lambda part: mx.contiguous(part[idx : idx + 1, :, pad : self._idx]),
            (self.keys, self.values),
        )
        cache.offset = self._idx - pad
        return cache


def _right_justified(batches: SequenceOf[PaddedKV], parts: list[Any], longest: int) -> Any:
    """All rows' keys or values, ending at `longest`, with room behind it; None where there is none.

    Arrays, or the triples of mx.quantize. The padding is zeros, as in mlx-lm.
    """
    stops = list(accumulate(len(batch._pads) for batch in batches))
    size = longest + PaddedKV.step  # rows a power of two apart would share a CPU's cache lines
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
