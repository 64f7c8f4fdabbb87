"""Prefill: admitted sequences on their way into the decode batch.

Each has a cache of its own, which is filled from the prefix cache and then chunk by chunk; the
output layer runs only over chunks whose likelihoods are wanted. First chunks of like length run in
one padded pass. A sequence that fails is given up alone: its id stays in `failed` until its
release, and the others of its pass are run again without it. Nothing here waits for the device
except where a cached prefix is lost.
"""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from mlxlite.engine.step import Admission, Chunk, EncodeImage
from mlxlite.errors import FOREIGN, summary_of
from mlxlite.runner.kv_cache import Cache, kind_of, layers_of
from mlxlite.runner.likelihoods import ScoredChunk
from mlxlite.runner.row_batch import merge
from mlxlite.runner.sampler import SamplerRow
from mlxlite.runner.snapshots import HeldCache, Snapshots

MAX_PADDING = 0.25  # of the tokens of a packed prefill
RECOMPUTED_TOKENS = 512  # in one pass, of a prefix that was cached and is lost
Failure = tuple[int, str]  # a sequence's id, and the reason for the client


class ImagePrefill(Protocol):
    """The images of one sequence while it prefills; made by the `begin` of a model that has them.

    `delta` `[1]` is what the row adds to its positions from the prompt's end on, where the model
    counts an image's rows and columns.
    """

    @property
    def delta(self) -> mx.array | None: ...

    def encode(self, index: int) -> list[mx.array]:
        """Run the vision tower on one image of the prompt; the arrays that this makes."""
        ...

    def window(self, start: int, stop: int) -> dict[str, Any]:
        """The network's further arguments for the tokens `[start, stop)`, in ascending order.

        Every image in this range must have been encoded.
        """
        ...

    def encode_and_window(self, stop: int) -> dict[str, Any]:
        """The same for the tokens `[0, stop)`, whose images are encoded first."""
        ...


@dataclass(slots=True)
class Row:
    """A sequence on the device: its tokens, and the cache of those that are computed."""

    admission: Admission
    tokens: npt.NDArray[np.uint32]  # of the prompt, and those drawn before a preemption
    cache: Cache
    num_computed: int
    images: ImagePrefill | None

    @property
    def id(self) -> int:
        return self.admission.sequence.id

    def sampler_row(self) -> SamplerRow:
        sequence, outputs = self.admission.sequence, self.admission.outputs
        tokens = sequence.prompt.tokens + outputs
        return SamplerRow(sequence.sampling, tokens, len(outputs), sequence.eos_tokens)


class Prefills:
    """The admitted sequences that do not decode yet, by id."""

    def __init__(
        self, model: nn.Module, new_cache: Callable[[], Cache], snapshots: Snapshots
    ) -> None:
        self._model = model
        self._new_cache = new_cache
        self._snapshots = snapshots
        self.can_pack = all(kind_of(layer).can_pack for layer in layers_of(new_cache()))
        self._rows: dict[int, Row] = {}
        self.failed: set[int] = set()  # given up, and not released yet
        self._scored: list[ScoredChunk] = []  # since `take_scored`

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        self._rows.clear()
        self.failed.clear()
        self._scored.clear()

    def release(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._rows.pop(id, None)
            self.failed.discard(id)

    def take(self, ids: Iterable[int]) -> list[Row]:
        """Remove and return those of these sequences that are here; they are computed to the end"""
        rows = [self._rows.pop(id) for id in ids if id in self._rows]
        assert all(row.num_computed == len(row.tokens) - 1 for row in rows)
        return rows

    def take_scored(self) -> list[ScoredChunk]:
        scored, self._scored = self._scored, []
        return scored

    def held(self, id: int) -> HeldCache | None:
        """A sequence's own cache; None if it is not here."""
        return (self._rows[id].cache, None) if id in self._rows else None

    def admit(self, admission: Admission, failed: list[Failure]) -> None:
        """Make a sequence's cache, with the prefix that is in the prefix cache."""
        sequence = admission.sequence
        tokens = np.array(sequence.prompt.tokens + admission.outputs, np.uint32)
        try:
            images: ImagePrefill | None = None
            if sequence.prompt.images:
                images = self._model.begin(sequence.prompt, tokens)
            row = Row(admission, tokens, self._new_cache(), admission.hit.num_tokens, images)
            if row.num_computed and not self._snapshots.restore(row.cache, admission.hit):
                self._recompute(row)
            self._rows[sequence.id] = row
        except FOREIGN as error:
            failed.append(self._give_up(sequence.id, error))

    def _recompute(self, row: Row) -> None:
        """Compute a lost prefix after all, text in pieces for its memory's sake; all rows wait."""
        images, num_tokens = row.images, row.num_computed
        inputs = {} if images is None else images.encode_and_window(num_tokens)
        size = RECOMPUTED_TOKENS if images is None else num_tokens
        for start in range(0, num_tokens, size):
            tokens = row.tokens[None, start : min(start + size, num_tokens)]
            self._model(mx.array(tokens), cache=row.cache, **inputs)
            mx.eval([layer.state for layer in row.cache])

    def encode(self, encode: EncodeImage, failed: list[Failure]) -> list[mx.array]:
        """Run the vision tower on one image; the arrays that this makes."""
        row = self._rows.get(encode.id)
        if row is None or row.images is None:  # it has failed
            return []
        try:
            return row.images.encode(encode.image)
        except FOREIGN as error:
            failed.append(self._give_up(encode.id, error))
            return []

    def compute(self, chunks: SequenceOf[Chunk], failed: list[Failure]) -> list[Any]:
        """Run chunks through the layers; the states that were written."""
        chunks = [chunk for chunk in chunks if chunk.id not in self.failed]
        alone = {c.id for c in chunks if self._rows[c.id].images or not self.can_pack}
        groups = packed(chunks, alone)
        return [state for group in groups for state in self._compute_group(group, failed)]

    def _compute_group(self, group: list[Chunk], failed: list[Failure]) -> list[Any]:
        """Where several chunks fail together, each is run alone: only the cause may fail."""
        try:
            return self._forward(group)
        except FOREIGN as error:
            if len(group) > 1:
                return [state for chunk in group for state in self._compute_group([chunk], failed)]
            failed.append(self._give_up(group[0].id, error))
            return []

    def _give_up(self, id: int, error: Exception) -> Failure:
        self._rows.pop(id, None)
        self.failed.add(id)
        return id, summary_of(error)

    def _forward(self, group: list[Chunk]) -> list[Any]:
        """One pass: a chunk of one sequence, or the first chunks of several, padded."""
        rows = [self._rows[chunk.id] for chunk in group]
        for chunk, row in zip(group, rows, strict=True):
            assert chunk.start == row.num_computed
        start, stop = group[0].start, max(chunk.stop for chunk in group)
        tokens = np.zeros((len(group), stop - start), np.uint32)
        for i, (chunk, row) in enumerate(zip(group, rows, strict=True)):
            tokens[i, : chunk.stop - start] = row.tokens[start : chunk.stop]
        if len(group) == 1:
            images = rows[0].images
            inputs = {} if images is None else images.window(start, stop)
            logits = self._model(mx.array(tokens), cache=rows[0].cache, **inputs)
        else:
            logits = self._forward_padded(rows, tokens, [chunk.stop for chunk in group])
        for i, (chunk, row) in enumerate(zip(group, rows, strict=True)):
            row.num_computed = chunk.stop
            if chunk.is_scored:
                self._score(chunk, row, logits[i])
        return [layer.state for row in rows for layer in row.cache]

    def _score(self, chunk: Chunk, row: Row, logits: mx.array) -> None:
        """Logits `[T, V]` of the chunk's places, of which those within the prompt count."""
        sequence = row.admission.sequence
        stop = min(chunk.stop, sequence.num_to_score)
        tokens = row.tokens[chunk.start + 1 : stop + 1]
        logits = logits[: stop - chunk.start]
        num_top = min(sequence.prompt_top or 0, logits.shape[-1])
        self._scored.append(ScoredChunk.of(row.id, chunk.start + 1, tokens, logits, num_top))

    def _forward_padded(
        self, rows: list[Row], tokens: npt.NDArray[np.uint32], lengths: list[int]
    ) -> mx.array:
        """The logits of tokens `[B, T]`, padded on the right, which causal layers do not see."""
        cache = merge([row.cache for row in rows])
        padding = [tokens.shape[1] - length for length in lengths]
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
        logits: mx.array = self._model(mx.array(tokens), cache=cache)
        for layer in cache:
            layer.finalize()
        for i, row in enumerate(rows):
            row.cache = [layer.extract(i) for layer in cache]
        return logits


def packed(chunks: SequenceOf[Chunk], alone: set[int]) -> list[list[Chunk]]:
    """Chunks that run in one pass: first chunks of like length, with at most a quarter padding.

    Scored chunks are apart from the others, whose logits are not computed.
    """
    first = [chunk for chunk in chunks if chunk.start == 0 and chunk.id not in alone]
    groups = [[chunk] for chunk in chunks if chunk not in first]
    group: list[Chunk] = []
    for chunk in sorted(first, key=lambda chunk: (chunk.is_scored, chunk.stop), reverse=True):
        num_tokens = sum(member.stop for member in group) + chunk.stop
        is_alike = bool(group) and group[0].is_scored == chunk.is_scored
        if is_alike and num_tokens >= (1 - MAX_PADDING) * group[0].stop * (len(group) + 1):
            group.append(chunk)
        else:
            group = [chunk]
            groups.append(group)
    return groups
