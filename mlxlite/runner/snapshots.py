"""Copies of what rows have computed, and the prefix cache's operations on them.

The index decides (`prefix_cache.index`), this executes: copy ranges of tokens and states out of
rows, split, drop, write to disk, load into new caches. What comes from disk is used only if it is
of this model's layers. A snapshot that should exist and does not is reported as lost, never
guessed. Every call is made on the device thread.
"""

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxlite.errors import FOREIGN, reason_of
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
from mlxlite.runner.kv_cache import Cache, kind_of, layers_of

log = logging.getLogger("mlxlite.runner")
_DTYPES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float64: "F64",
    mx.complex64: "C64",
    mx.uint64: "U64",
    mx.uint32: "U32",
    mx.uint16: "U16",
    mx.uint8: "U8",
    mx.int64: "I64",
    mx.int32: "I32",
    mx.int16: "I16",
    mx.int8: "I8",
    mx.bool_: "BOOL",
}  # safetensors' names


@dataclass(frozen=True, slots=True)
class CacheSnapshot:
    """What a row's caches held, in memory of its own; in the order of the layers' caches.

    `tokens` has keys and values `[1, H, n, D]` of the tokens `[start, start + n)` for each cache
    that keeps all tokens; `states` the whole state of each that does not, or is empty.
    """

    start: int
    tokens: list[Any]
    states: list[Any]

    @classmethod
    def of(
        cls, cache: Cache, row: int | None, start: int, stop: int, *, has_states: bool
    ) -> "CacheSnapshot":
        """Copy the tokens `[start, stop)` of a plain cache or a row, and perhaps its states."""
        tokens, states = [], []
        for layer in layers_of(cache):
            kind = kind_of(layer)
            if kind.has_all_tokens:
                tokens.append(kind.snapshot(layer, start, stop, row))
            elif has_states:
                states.append(kind.snapshot(layer, start, stop, row))
        return cls(start, tokens, states)

    def arrays(self) -> list[mx.array]:
        return [leaf for leaf in self.leaves().values() if isinstance(leaf, mx.array)]

    def leaves(self) -> dict[str, Any]:
        """Every array or other value, by a name that gives its place."""
        return dict(_flat({"tokens": self.tokens, "states": self.states}))

    @classmethod
    def of_leaves(cls, start: int, leaves: Mapping[str, Any]) -> "CacheSnapshot":
        """The inverse of `leaves`."""
        parts: Any = {"tokens": [], "states": []}
        if leaves:  # an extent of a model whose layers all keep a state has none
            parts |= tree_unflatten(list(leaves.items()))
        return cls(start, parts["tokens"], parts["states"])

    def has_range(self, start: int, stop: int) -> bool:
        """Whether it has the tokens `[start, stop)` and no other."""
        arrays = [leaf for _, leaf in _flat(self.tokens)]
        return self.start == start and all(part.shape[2] == stop - start for part in arrays)

    def is_like(self, other: "CacheSnapshot") -> bool:
        """Whether both are of the same layers, whatever their lengths."""
        mine, theirs = self.leaves(), other.leaves()
        if not self.states:
            theirs = {name: leaf for name, leaf in theirs.items() if name.startswith("tokens.")}
        return mine.keys() == theirs.keys() and all(
            _form(leaf) == _form(theirs[name]) for name, leaf in mine.items()
        )

    def split(self, num_tokens: int) -> "tuple[CacheSnapshot, CacheSnapshot]":
        """The first tokens and the others, each in memory of its own."""
        first = tree_map(lambda part: mx.contiguous(part[:, :, :num_tokens]), self.tokens)
        rest = tree_map(lambda part: mx.contiguous(part[:, :, num_tokens:]), self.tokens)
        return (
            CacheSnapshot(self.start, first, []),
            CacheSnapshot(self.start + num_tokens, rest, []),
        )


def restore(cache: Cache, parts: SequenceOf[tuple[CacheSnapshot, int]], num_tokens: int) -> None:
    """Fill a new cache as it would be after `num_tokens`.

    `parts` adjoin one another, each used up to a token; the states are those of the last one.
    """
    layers = [(kind_of(layer), layer) for layer in layers_of(cache)]
    full = [(kind, layer) for kind, layer in layers if kind.has_all_tokens]
    for i, (kind, layer) in enumerate(full):
        ranges = [
            tree_map(lambda held, n=stop - part.start: held[:, :, :n], part.tokens[i])
            for part, stop in parts
            if stop > part.start
        ]
        kind.restore(layer, ranges, num_tokens)
    others = [(kind, layer) for kind, layer in layers if not kind.has_all_tokens]
    for (kind, layer), state in zip(others, parts[-1][0].states if others else [], strict=True):
        kind.restore(layer, [state], num_tokens)


def _form(leaf: Any) -> Any:
    """An array's dtype and its shape without the axis of tokens; of any other value its type."""
    if isinstance(leaf, mx.array):
        return leaf.dtype, *leaf.shape[:2], *leaf.shape[3:]
    return type(leaf)


def _flat(tree: Any) -> list[tuple[str, Any]]:
    return cast("list[tuple[str, Any]]", tree_flatten(tree))


# --- the prefix cache's operations ------------------------------------------------------------

PendingWrite = tuple[int, Stored, CacheSnapshot]
HeldCache = tuple[Cache, int | None]  # the row of a merged cache, or a plain cache and None
FindCache = Callable[[int], HeldCache | None]  # of a sequence; None when it has failed


class Snapshots:
    """The prefix cache's payloads, by id. `like` has the form of every payload of this model."""

    def __init__(self, like: CacheSnapshot, store: Store | None) -> None:
        self._like = like
        self._store = store
        self.by_id: dict[int, CacheSnapshot] = {}  # those in memory
        self._lost: list[int] = []  # that the steps since `drain` should have had
        self._writes: list[PendingWrite] = []  # to disk, since then
        self._last_writes: list[PendingWrite] = []  # those of the step in flight

    def clear(self) -> None:
        self.by_id.clear()
        self._writes.clear()
        self._lost.clear()

    def drain(self) -> tuple[tuple[int, ...], list[PendingWrite]]:
        """The ids that are lost, and what is to be written, since the last call."""
        lost, self._lost = tuple(self._lost), []
        writes, self._writes = self._writes, []
        self._last_writes = writes
        return lost, writes

    def write(self, writes: list[PendingWrite]) -> None:
        """To disk, once the arrays are computed."""
        for id, stored, snapshot in writes:
            assert self._store is not None
            try:
                file = _file_of(stored, snapshot)
            except FOREIGN as error:  # of a cache whose state is no arrays, or not readable
                log.warning("a prefix cannot be written to disk: %s", reason_of(error))
                self._store.fail(id)
            else:
                self._store.write(id, file)

    def restore(self, cache: Cache, hit: Hit) -> bool:
        """Load a hit into a new cache; False, and nothing done, where some of it is lost."""
        wanted = [(segment.extent, segment.stop) for segment in hit.segments]
        if hit.checkpoint is not None:
            wanted.append((hit.checkpoint, hit.num_tokens))
        missing = [id for id, _ in wanted if self._load(id) is None]
        self._lost += missing
        if not missing:
            restore(cache, [(self.by_id[id], stop) for id, stop in wanted], hit.num_tokens)
        return not missing

    def _load(self, id: int) -> CacheSnapshot | None:
        """What is in memory under an id, or has just been read from disk."""
        if id not in self.by_id and self._store and (file := self._store.take(id)) is not None:
            snapshot, stop = _snapshot_of(file), len(file.stored.words) // 4
            is_like = snapshot is not None and snapshot.is_like(self._like)
            if snapshot is not None and is_like and snapshot.has_range(file.stored.start, stop):
                self.by_id[id] = snapshot
        return self.by_id.get(id)

    def execute(self, ops: tuple[CacheOp, ...], find: FindCache) -> list[mx.array]:
        """Execute the index's operations; the arrays that this makes."""
        made: list[mx.array] = []
        for op in ops:
            match op:
                case Save():
                    made += self._save(op, find(op.id))
                case Split(extent, at, rest):
                    if (whole := self._load(extent)) is None:
                        self._lost += [extent, rest]
                        continue
                    parts = whole.split(at - whole.start)
                    self.by_id[extent], self.by_id[rest] = parts
                    made += parts[0].arrays() + parts[1].arrays()
                case Drop(id):
                    self._load(id)  # so that the store does not keep what it has read
                    self.by_id.pop(id, None)
                case Write(id, stored) if self._store and (whole := self._load(id)):
                    self._writes.append((id, stored, whole))
                case Unlink(id) if self._store:
                    for writes in (self._writes, self._last_writes):  # not yet the store's
                        writes[:] = [write for write in writes if write[0] != id]
                    self._store.unlink(id)
                case Fetch(id, stored) if self._store:
                    self._store.fetch(id, stored)
        return made

    def _save(self, save: Save, held: HeldCache | None) -> list[mx.array]:
        made: list[mx.array] = []
        for id, start, stop in (
            (save.extent, save.start, save.stop),
            (save.checkpoint, save.stop, save.position),
        ):
            if id is None:
                continue
            if held is None:
                self._lost.append(id)
                continue
            has_states = id == save.checkpoint
            self.by_id[id] = snapshot = CacheSnapshot.of(*held, start, stop, has_states=has_states)
            made += snapshot.arrays()
        return made


def _file_of(stored: Stored, snapshot: CacheSnapshot) -> File:
    """A copy without MLX objects, which may leave the device thread."""
    arrays, values = {}, {}
    for name, leaf in snapshot.leaves().items():
        if isinstance(leaf, mx.array):
            dtype = _DTYPES[leaf.dtype]
            plain = leaf.view(mx.uint16) if leaf.dtype == mx.bfloat16 else leaf
            data = np.array(plain).reshape(-1).view(np.uint8).data
            arrays[name] = Array(dtype, tuple(leaf.shape), data)
        else:
            values[name] = leaf
    return File(stored, arrays, {"start": snapshot.start, "leaves": values})


def _snapshot_of(file: File) -> CacheSnapshot | None:
    """The inverse; None for a file that holds something else."""
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        leaves = dict(file.values["leaves"])
        for name, array in file.arrays.items():
            dtype = dtypes[array.dtype]
            made = mx.uint16 if dtype == mx.bfloat16 else dtype  # NumPy has none
            word = np.dtype(str(made).split(".")[-1])
            plain = mx.array(np.frombuffer(array.data, word).reshape(array.shape), made)
            leaves[name] = plain.view(dtype) if dtype == mx.bfloat16 else plain
        return CacheSnapshot.of_leaves(int(file.values["start"]), leaves)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None
