"""Steps on the device: a step becomes a graph, and the graph becomes tokens.

The runner has the key-value caches of the admitted sequences and one batch of rows that decode
together. It decides nothing: which chunks and rows run, and when memory is released, is in the
step. It must never wait for the device except for the step in flight, and never do work per row on
the token path. Every call is made on the device thread.
"""

import contextlib
import ctypes
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Prompt, Sequence
from mlxlite.engine.step import (
    Admission,
    Chunk,
    Command,
    DiskFailed,
    Fetched,
    Launched,
    Outcome,
    Part,
    Step,
    Written,
)
from mlxlite.prefix_cache.disk import Store
from mlxlite.prefix_cache.operations import Stored
from mlxlite.runner.decode_batch import DecodeBatch, Drawn
from mlxlite.runner.embedder import Embedder
from mlxlite.runner.kv_cache import Cache, KVBits, kind_of, layers_of, map_layers
from mlxlite.runner.likelihoods import ScoredChunk
from mlxlite.runner.prefill import Failure, Prefills
from mlxlite.runner.row_batch import can_merge
from mlxlite.runner.self_test import Abilities, abilities_of
from mlxlite.runner.snapshots import CacheSnapshot, HeldCache, PendingWrite, Snapshots
from mlxlite.runner.timing import Launch, StepClock

_M_MMAP_THRESHOLD = -3  # malloc.h
_MIN_MEASURED = 32  # prompt tokens: the memory of fewer is mostly not theirs
_LOGIT_BYTES = 16  # the logits, their logarithms, comparisons and the indices of a partition
_MIN_TRIM_BYTES = 32 << 20  # of free buffers: trimming takes some milliseconds


@dataclass(slots=True, repr=False)
class _InFlight:
    """A launched step. `states` are the caches that its chunks wrote.

    The event loop holds it too, and in asyncio's debug mode logs it: its repr evaluates no array.
    """

    step: Step
    drawn: Drawn | None
    states: list[Any]
    scored: list[ScoredChunk]
    failed: tuple[Failure, ...]
    lost: tuple[int, ...]
    writes: list[PendingWrite]  # to disk, once they are computed
    began_at: float  # when the device may have begun: some layers are dispatched early
    build_s: float
    dispatch_s: float

    @property
    def launch(self) -> Launch:
        has_prefill = bool(self.step.chunks or self.step.images)
        return Launch(self.began_at, self.build_s + self.dispatch_s, has_prefill)

    def __repr__(self) -> str:
        return f"<in flight: step {self.step.number}, {len(self.step.rows)} rows>"


class ModelRunner:
    """Implements `engine.step.Runner` over an mlx-lm model.

    `memory_bytes` is what sequences may hold beside the weights, None for no limit; `work_bytes`
    what a step may take beside them, 0 for no limit. `store` has the prefix cache's files. Raises
    ValueError when the model cannot keep its cache in `kv_bits`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kv_bits: KVBits | None = None,
        memory_bytes: int | None = None,
        work_bytes: int = 0,
        store: Store | None = None,
    ) -> None:
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        self._model = model
        self._kv_bits = kv_bits
        self._store = store
        self.num_vocab = int(model(mx.array([[0]])).shape[-1])
        cache = self._new_cache()
        model(mx.zeros((1, 2), mx.uint32), cache=cache)
        mx.eval([layer.state for layer in cache])
        self.memory = replace(
            _memory_of(cache, memory_bytes),
            work_bytes=work_bytes,
            logit_bytes=_LOGIT_BYTES * self.num_vocab,
        )
        self._snapshots = Snapshots(CacheSnapshot.of(cache, None, 0, 2, has_states=True), store)
        self._prefills = Prefills(model, self._new_cache, self._snapshots)
        self._can_merge = True  # unless the self-test finds otherwise
        self._batch = DecodeBatch(model, self.num_vocab)
        self._embedder = Embedder(model, self._new_cache)
        self._clock = StepClock()
        self._most_work_bytes = mx.get_peak_memory()  # since memory was last given back

    def _return_memory(self) -> None:
        """Give free buffers back to the system. On a CPU they are malloc's, which keeps them."""
        mx.clear_cache()
        if self._most_work_bytes > _MIN_TRIM_BYTES and self._trim is not None:
            self._trim(0)
        self._most_work_bytes = 0

    def _new_cache(self) -> Cache:
        cache: Cache = make_prompt_cache(self._model)
        if (bits := self._kv_bits) is None:
            return cache
        return map_layers(lambda layer: kind_of(layer).quantized(layer, bits), cache)

    def files(self, on_event: Callable[[Command], None]) -> list[tuple[int, Stored]]:
        """See `Runner`."""
        if self._store is None:
            return []
        self._store.on_fetched = lambda id: on_event(Fetched(id))
        self._store.on_written = lambda id: on_event(Written(id))
        self._store.on_failed = lambda id: on_event(DiskFailed(id))
        return self._store.found()

    def warm_up(self) -> None:
        """Compile what the first requests would wait for: a row alone, a batch, sampling.

        Before that, what rows do wrongly together is switched off for this model.
        """
        self._test_itself()
        prompt = Prompt((0,) * 5)
        kinds = (SamplingParams(0.0), SamplingParams(1.0), SamplingParams(1.0, top_p=0.9))
        admitted = tuple(
            Admission(Sequence(-1 - i, prompt, sampling, max_tokens=2))
            for i, sampling in enumerate(kinds)
        )
        chunks = tuple(Chunk(admission.sequence.id, 0, 4) for admission in admitted)
        first = Step(0, admitted=admitted, chunks=chunks, rows=(-1,))
        for step in (first, Step(1, rows=tuple(admission.sequence.id for admission in admitted))):
            launched, _ = self.advance(step, None)
            self.advance(None, launched)
        self.reset()

    def _test_itself(self) -> None:
        claimed = Abilities(self._prefills.can_pack, can_merge(self._new_cache()))
        found = abilities_of(self._model, self._new_cache, self.num_vocab, claimed)
        self._prefills.can_pack, self._can_merge = found.can_pack, found.can_merge
        self._batch = DecodeBatch(self._model, self.num_vocab, can_merge=found.can_merge)

    def reset(self) -> None:
        """See `Runner`."""
        for _ in range(2):  # an error stays with a GPU's encoder until it is read, once or twice
            with contextlib.suppress(RuntimeError):
                mx.synchronize()
        self._prefills.clear()
        self._snapshots.clear()
        self._embedder.unfinished.clear()
        self._batch = DecodeBatch(self._model, self.num_vocab, can_merge=self._can_merge)
        if (forget := getattr(self._model, "forget", None)) is not None:
            forget()  # the features of images
        self._return_memory()

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        """See `Runner`."""
        return self._embedder.embed(inputs, is_mean=is_mean, part=part)

    def drop_embedding(self, id: int) -> None:
        """See `Runner`."""
        self._embedder.unfinished.pop(id, None)

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        """Dispatch `step`, then wait for `in_flight`. Raises what MLX raises; then call `reset`."""
        assert in_flight is None or isinstance(in_flight, _InFlight)
        launched = self._launch(step, in_flight) if step else None
        following = launched.launch if launched else None
        outcome = self._wait(in_flight, following) if in_flight else None
        if in_flight and outcome:
            token_bytes = self._token_bytes(in_flight.step, launched.step if launched else None)
            outcome = replace(outcome, token_bytes=token_bytes)
        return launched, outcome

    def _token_bytes(self, *steps: Step | None) -> float:
        """Memory of a prompt token's intermediate results, in the steps since the last call.

        Where a launch blocks it is the next step's; the one with the most tokens stands for both.
        """
        work_bytes = mx.get_peak_memory() - mx.get_active_memory()
        mx.reset_peak_memory()
        self._most_work_bytes = max(self._most_work_bytes, work_bytes)
        if any(chunk.is_scored for step in steps if step for chunk in step.chunks):
            return 0.0  # logits are not a prompt token's
        num_tokens = max(step.num_prefill_tokens if step else 0 for step in steps)
        return work_bytes / num_tokens if num_tokens >= _MIN_MEASURED else 0.0

    def _launch(self, step: Step, in_flight: _InFlight | None) -> _InFlight:
        began_at = perf_counter()
        prefills, batch = self._prefills, self._batch
        failed: list[Failure] = []
        states: list[Any] = self._snapshots.execute(step.before, self._held)
        prefills.release(step.released)
        for admission in step.admitted:
            prefills.admit(admission, failed)
        for encode in step.images:
            states += prefills.encode(encode, failed)
        states += prefills.compute(step.chunks, failed)
        scored = prefills.take_scored()
        states += [array for chunk in scored for array in chunk.arrays()]
        states += self._snapshots.execute(step.after, self._held)
        rows = step.rows
        if prefills.failed:
            rows = tuple(id for id in rows if id not in prefills.failed)
        if batch.ids != rows:
            batch.regroup(rows, prefills.take(rows), failed)
        drawn = batch.decode(in_flight.drawn if in_flight else None, states, failed)
        built_at = perf_counter()
        mx.async_eval(drawn.arrays() if drawn else [], states)
        dispatch_s = perf_counter() - built_at
        if drawn is None and not prefills and mx.default_device().type == mx.cpu:
            self._return_memory()  # a GPU's pool has a limit, and is warm for the next request
        lost, writes = self._snapshots.drain()
        times = began_at, built_at - began_at, dispatch_s
        return _InFlight(step, drawn, states, scored, tuple(failed), lost, writes, *times)

    def _held(self, id: int) -> HeldCache | None:
        return self._prefills.held(id) or self._batch.held(id)

    def _wait(self, in_flight: _InFlight, following: Launch | None) -> Outcome:
        began_at = perf_counter()
        drawn, failed, rows = in_flight.drawn, list(in_flight.failed), in_flight.step.rows
        mx.eval(drawn.tokens if drawn else None, in_flight.states)
        tokens = drawn.token_list() if drawn else []
        logprobs = drawn.logprobs_by_id() if drawn else {}
        scored = {chunk.id: chunk.read() for chunk in in_flight.scored}
        if drawn:
            self._batch.match(drawn, tokens, failed)
        if len(tokens) < len(rows):  # the rows of failed sequences have none
            known = dict(zip(drawn.ids, tokens, strict=True)) if drawn else {}
            tokens = [known.get(id, 0) for id in rows]
        done_at = perf_counter()
        device_s = self._clock.device_s(in_flight.launch, following, began_at, done_at)
        self._snapshots.write(in_flight.writes)
        # The handle goes back to the loop's thread; its arrays must not.
        in_flight.drawn, in_flight.states, in_flight.writes = None, [], []
        in_flight.scored = []
        return Outcome(
            tuple(tokens),
            logprobs,
            tuple(failed),
            lost=in_flight.lost,
            device_s=device_s,
            build_s=in_flight.build_s,
            dispatch_s=in_flight.dispatch_s,
            wait_s=done_at - began_at,
            scored=scored,
        )


def _memory_of(cache: Cache, budget_bytes: int | None) -> Memory:
    """What a row holds, from the caches that a short prompt leaves behind."""
    sizes = [kind_of(layer).sizes(layer) for layer in layers_of(cache)]
    growing = [size for size in sizes if size.token_bytes]
    caps = dict.fromkeys(size.max_tokens for size in growing)
    layers = tuple((sum(s.token_bytes for s in growing if s.max_tokens == m), m) for m in caps)
    return Memory(budget_bytes, sum(size.constant_bytes for size in sizes), layers)


def return_freed_memory() -> None:
    """Have glibc give freed buffers of 128 KiB back at once; by itself it raises that size."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mx.default_device().type == mx.cpu and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 128 << 10)
