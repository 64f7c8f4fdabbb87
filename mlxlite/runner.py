"""A step becomes a graph, and the graph becomes tokens. Lives on the lane.

The runner keeps the key-value caches of the sequences it has been given and one batch of rows that
decode together. It decides nothing: which chunks and rows run, and when memory is released, is in
the step. It must never wait for the device except for the step in flight, and never do work per row
on the token path: rows cost Python only when they join or leave.

Caches come from mlx-lm's public classes. While one row decodes alone it keeps the plain cache it
was prefilled with; from two rows on the caches are merged. A kind that cannot merge decodes row by
row inside the same step, so that nothing ever drains the batch.

The rows of the batch are always exactly `step.rows` of the last step launched, in that order
(asserted).
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx_lm.models.cache import CacheList, make_prompt_cache

from mlxlite.sampling import Draw, Sampler
from mlxlite.sequence import (
    Chunk,
    Launched,
    Outcome,
    Prompt,
    SamplingParams,
    Sequence,
    Step,
)

Cache = list[Any]  # one mlx-lm cache object a layer


@dataclass(slots=True)
class _Prefill:
    """A sequence that has not joined the batch: its prompt and the cache of what is computed."""

    sequence: Sequence
    tokens: npt.NDArray[np.uint32]
    cache: Cache
    num_computed: int = 0


@dataclass(slots=True)
class _Row:
    """A sequence in the batch; it drew its first token in the `born`-th decode of the runner."""

    sequence: Sequence
    born: int


@dataclass(slots=True)
class _InFlight:
    """A launched step. `tokens` is `[B]`; `states` are the caches that its chunks wrote."""

    step: Step
    tokens: mx.array | None
    states: list[Any]
    launched_at: float


class ModelRunner:
    """Implements `sequence.Runner` over an mlx-lm model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._prefills: dict[int, _Prefill] = {}
        self._rows: list[_Row] = []
        self._batch = _BatchCache()
        self._tokens: mx.array | None = None  # [B]: each row's next input
        self._sampler: Sampler | None = None
        self._num_decodes = 0
        self._done_at = 0.0

    def warm_up(self) -> None:
        """Compile and touch what a first request would wait for: alone, in a batch, drawn."""
        prompt = Prompt((0,) * 5)
        sequences = tuple(
            Sequence(id, prompt, SamplingParams(temperature, top_p=0.9), max_tokens=2)
            for id, temperature in ((-1, 0.0), (-2, 1.0))
        )
        chunks = tuple(Chunk(sequence.id, 0, 4) for sequence in sequences)
        for step in (Step(0, (), sequences, chunks, (-1,)), Step(1, rows=(-1, -2))):
            launched, _ = self.advance(step, None)
            self.advance(None, launched)
        self.reset()

    def reset(self) -> None:
        """Forget every sequence and free what they held."""
        self._prefills.clear()
        self._rows = []
        self._batch = _BatchCache()
        self._tokens = self._sampler = None
        mx.clear_cache()

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        """Dispatch `step`, then wait for `in_flight`. Raises what MLX raises; then call `reset`."""
        launched = self._launch(step) if step else None
        assert in_flight is None or isinstance(in_flight, _InFlight)
        outcome = self._wait(in_flight) if in_flight else None
        return launched, outcome

    # --- launch -----------------------------------------------------------------------------

    def _launch(self, step: Step) -> _InFlight:
        for id in step.released:
            self._prefills.pop(id, None)
        for sequence in step.admitted:
            tokens = np.array(sequence.prompt.tokens, np.uint32)
            self._prefills[sequence.id] = _Prefill(sequence, tokens, make_prompt_cache(self._model))
        states = [self._prefill(chunk) for chunk in step.chunks]
        self._regroup(step.rows)
        output = self._decode() if self._rows else None
        launched_at = perf_counter()
        mx.async_eval(output, states)
        if not self._rows and not self._prefills:
            mx.clear_cache()  # nobody is left: give the buffers back rather than sit on them
        return _InFlight(step, output, states, launched_at)

    def _prefill(self, chunk: Chunk) -> list[Any]:
        """Run the prompt's tokens through the layers; the logits are never asked for."""
        prefill = self._prefills[chunk.id]
        assert chunk.start == prefill.num_computed
        prefill.num_computed = chunk.stop
        self._model(mx.array(prefill.tokens[None, chunk.start : chunk.stop]), cache=prefill.cache)
        return [layer.state for layer in prefill.cache]

    def _decode(self) -> mx.array:
        assert self._tokens is not None
        assert self._sampler is not None
        logits = self._batch.forward(self._model, self._tokens)
        self._tokens = self._sampler(logits)
        self._num_decodes += 1
        return self._tokens

    def _regroup(self, ids: tuple[int, ...]) -> None:
        """Make the batch's rows those of the step: drop who left, append who joins."""
        present = [row.sequence.id for row in self._rows]
        if present == list(ids):
            return
        wanted = set(ids)
        keep = [i for i, id in enumerate(present) if id in wanted]
        joining = [self._prefills.pop(id) for id in ids if id in self._prefills]
        assert all(prefill.num_computed == len(prefill.tokens) - 1 for prefill in joining)
        self._batch.keep(keep, len(present))
        self._batch.join([prefill.cache for prefill in joining])
        self._rows = [self._rows[i] for i in keep]
        self._rows += [_Row(prefill.sequence, self._num_decodes) for prefill in joining]
        assert [row.sequence.id for row in self._rows] == list(ids)

        inputs = [mx.array(prefill.tokens[-1:]) for prefill in joining]
        if keep:
            assert self._tokens is not None
            inputs.insert(0, self._tokens[mx.array(keep)])
        self._tokens = mx.concatenate(inputs) if inputs else None
        draws = [Draw(row.sequence.sampling, self._num_decodes - row.born) for row in self._rows]
        self._sampler = Sampler(draws) if draws else None

    # --- wait -------------------------------------------------------------------------------

    def _wait(self, in_flight: _InFlight) -> Outcome:
        mx.eval(in_flight.tokens, in_flight.states)
        tokens = [] if in_flight.tokens is None else cast("list[int]", in_flight.tokens.tolist())
        # The device takes steps in turn: this one had it from its launch or the last one's end.
        device_s = -max(in_flight.launched_at, self._done_at)
        self._done_at = perf_counter()
        # The handle goes back to the loop thread; its arrays must not.
        in_flight.tokens, in_flight.states = None, []
        return Outcome(tuple(tokens), device_s=device_s + self._done_at)


class _BatchCache:
    """The caches of the rows that decode together, in row order.

    Three forms: nothing, one row's plain cache, and either one merged cache for all rows or, where
    a layer's kind cannot merge, one plain cache for each row.
    """

    def __init__(self) -> None:
        self._merged: Cache | None = None
        self._plain: list[Cache] = []

    def forward(self, model: nn.Module, tokens: mx.array) -> mx.array:
        """Last-position logits `[B, V]` for input tokens `[B]`."""
        if self._merged is not None:
            merged: mx.array = model(tokens[:, None], cache=self._merged)[:, -1]
            return merged
        logits: list[mx.array] = [
            model(tokens[i : i + 1, None], cache=cache)[:, -1]
            for i, cache in enumerate(self._plain)
        ]
        return logits[0] if len(logits) == 1 else mx.concatenate(logits)

    def keep(self, indices: list[int], num_rows: int) -> None:
        """Drop every row but those at `indices`, which ascend."""
        if len(indices) == num_rows:
            return
        if self._merged is None:
            self._plain = [self._plain[i] for i in indices]
        elif not indices:
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
        if self._merged is None:
            self._plain = [*self._plain, *caches]
            if len(self._plain) > 1 and all(_can_merge(layer) for layer in self._plain[0]):
                self._merged, self._plain = _merge(self._plain), []
            return
        for layer, other in zip(self._merged, _merge(caches), strict=True):
            layer.extend(other)


def _merge(caches: SequenceOf[Cache]) -> Cache:
    return [type(layers[0]).merge(layers) for layers in zip(*caches, strict=True)]


def _can_merge(layer: Any) -> bool:
    if isinstance(layer, CacheList):
        return all(map(_can_merge, layer.caches))
    return hasattr(layer, "merge")
