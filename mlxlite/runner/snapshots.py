"""The prefix cache's payloads on the lane: what is kept of caches, and how it comes back.

The index decides (`prefix`), this does: it copies out of rows, cuts, drops, and fills new caches.
Files are another's (`store`); here they become arrays again, if they are of this model's layers.
What should be there and is not is told, never guessed.
"""

from typing import Protocol

import mlx.core as mx
import numpy as np

from mlxlite.prefix_cache.disk import Array, File, Store
from mlxlite.prefix_cache.operations import (
    CacheOp,
    Drop,
    Fetch,
    Hit,
    Save,
    Split,
    Stored,
    Unlink,
    Write,
)
from mlxlite.runner.kv_cache import Cache, Kept, fill

_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint8: "U8",
    mx.bool_: "BOOL",
}  # in safetensors' words
PendingWrite = tuple[int, Stored, Kept]


class Take(Protocol):
    """Copies what a sequence has computed of tokens `[start, stop)`; None when it has failed."""

    def __call__(self, id: int, start: int, stop: int, *, has_states: bool) -> Kept | None: ...


class Payloads:
    """What is kept, by id. `like` is what any payload of this model looks like."""

    def __init__(self, like: Kept, store: Store | None) -> None:
        self._like = like
        self._store = store
        self.kept: dict[int, Kept] = {}  # the payloads in memory
        self._lost: list[int] = []  # that this step should have had
        self._writes: list[PendingWrite] = []  # for the store, that this step brings
        self._last_writes: list[PendingWrite] = []  # those of the step in flight

    def clear(self) -> None:
        self.kept.clear()
        self._writes.clear()
        self._lost.clear()

    def told(self) -> tuple[tuple[int, ...], list[PendingWrite]]:
        """What is lost and what is to be written since the last call."""
        lost, self._lost = tuple(self._lost), []
        writes, self._writes = self._writes, []
        self._last_writes = writes
        return lost, writes

    def write(self, writes: list[PendingWrite]) -> None:
        """To the store, once the arrays are computed."""
        for id, stored, payload in writes:
            assert self._store is not None
            self._store.write(id, _file_of(stored, payload))

    def fill(self, cache: Cache, hit: Hit) -> bool:
        """Make a new cache what a hit says; False, and nothing done, where some of it is lost."""
        wanted = [(segment.extent, segment.stop) for segment in hit.segments]
        if hit.checkpoint is not None:
            wanted.append((hit.checkpoint, hit.num_tokens))
        missing = [id for id, _ in wanted if self._payload(id) is None]
        self._lost += missing
        if not missing:
            fill(cache, [(self.kept[id], stop) for id, stop in wanted], hit.num_tokens)
        return not missing

    def _payload(self, id: int) -> Kept | None:
        """What is kept in memory under an id, or has just come from disk."""
        if id not in self.kept and self._store and (file := self._store.take(id)) is not None:
            payload, stop = _kept_of(file), len(file.stored.words) // 4
            is_like = payload is not None and payload.is_like(self._like)
            if payload is not None and is_like and payload.is_of(file.stored.start, stop):
                self.kept[id] = payload
        return self.kept.get(id)

    def work_on(self, ops: tuple[CacheOp, ...], take: Take) -> list[mx.array]:
        """Do what the prefix cache has decided; the arrays that this makes."""
        made: list[mx.array] = []
        for op in ops:
            match op:
                case Save():
                    made += self._save(op, take)
                case Split(extent, at, rest):
                    if (whole := self._payload(extent)) is None:
                        self._lost += [extent, rest]
                        continue
                    parts = whole.split(at - whole.start)
                    self.kept[extent], self.kept[rest] = parts
                    made += parts[0].arrays() + parts[1].arrays()
                case Drop(id):
                    self._payload(id)  # from the store's hands too
                    self.kept.pop(id, None)
                case Write(id, stored) if self._store and (whole := self._payload(id)):
                    self._writes.append((id, stored, whole))
                case Unlink(id) if self._store:
                    for writes in (self._writes, self._last_writes):  # not yet the store's
                        writes[:] = [write for write in writes if write[0] != id]
                    self._store.unlink(id)
                case Fetch(id, stored) if self._store:
                    self._store.fetch(id, stored)
        return made

    def _save(self, save: Save, take: Take) -> list[mx.array]:
        made: list[mx.array] = []
        for id, start, stop in (
            (save.extent, save.start, save.stop),
            (save.checkpoint, save.stop, save.position),
        ):
            if id is None:
                continue
            payload = take(save.id, start, stop, has_states=id == save.checkpoint)
            if payload is None:
                self._lost.append(id)
                continue
            self.kept[id] = payload
            made += payload.arrays()
        return made


def _file_of(stored: Stored, payload: Kept) -> File:
    """A copy of a payload that is no MLX object, and so may leave the lane."""
    arrays, values = {}, {}
    for name, leaf in payload.leaves().items():
        if isinstance(leaf, mx.array):
            dtype = _DTYPES[leaf.dtype]
            plain = leaf.view(mx.uint16) if leaf.dtype == mx.bfloat16 else leaf
            data = np.array(plain).reshape(-1).view(np.uint8).data
            arrays[name] = Array(dtype, tuple(leaf.shape), data)
        else:
            values[name] = leaf
    return File(stored, arrays, {"start": payload.start, "leaves": values})


def _kept_of(file: File) -> Kept | None:
    """A payload out of its file, or None where that makes no sense."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        leaves = dict(file.values["leaves"])
        for name, array in file.arrays.items():
            dtype = dtypes[array.dtype]
            word = np.uint16 if dtype == mx.bfloat16 else np.dtype(str(dtype).split(".")[-1])
            plain = mx.array(np.frombuffer(array.data, word).reshape(array.shape))
            leaves[name] = plain.view(dtype) if dtype == mx.bfloat16 else plain
        return Kept.of_leaves(int(file.values["start"]), leaves)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None
