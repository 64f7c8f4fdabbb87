"""A step becomes a graph, and the graph becomes tokens. Lives on the lane.

The runner keeps the key-value caches of the sequences it has been given and one batch of rows that
decode together. It decides nothing: which chunks and rows run, and when memory is released, is in
the step. It must never wait for the device except for the step in flight, and never do work per row
on the token path: rows cost Python only when they join or leave, or where a grammar
constrains them.

The rows of the batch are always exactly `step.rows` of the last step launched, in that order
(asserted).
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx_lm.models.cache import make_prompt_cache

from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Logprobs, Matcher, Prompt, Sequence
from mlxlite.engine.step import (
    Admission,
    Chunk,
    Command,
    Fetched,
    Launched,
    Look,
    Outcome,
    Part,
    Step,
    Unstored,
)
from mlxlite.errors import FOREIGN, summary_of
from mlxlite.prefix_cache.disk import Store
from mlxlite.prefix_cache.operations import Hit, Stored
from mlxlite.runner.kv_cache import (
    BatchCache,
    Cache,
    Kept,
    KVBits,
    can_pack,
    kept,
    layer_sizes,
    merge,
    quantized,
)
from mlxlite.runner.sampler import LogprobArrays, Sampler, SamplerRow
from mlxlite.runner.snapshots import Payloads, PendingWrite

if TYPE_CHECKING:
    from mlxlite.vision.network import ImagePrefill

MAX_PADDING = 0.25  # of the tokens of a packed prefill
_ANEW_TOKENS = 512  # at a time, of a prefix that was kept and is lost


@dataclass(slots=True)
class _Prefill:
    """A sequence that has not joined the batch: its tokens and the cache of what is computed."""

    admission: Admission
    tokens: npt.NDArray[np.uint32]
    cache: Cache
    num_computed: int = 0
    sight: "ImagePrefill | None" = None  # of its images


@dataclass(slots=True, repr=False)
class _InFlight:
    """A launched step. `tokens` is `[B]`; `states` are the caches that its chunks wrote.

    The loop sees it too, and in asyncio's debug mode shows what it sees: no array, which would be
    evaluated there, and no prompt.
    """

    step: Step
    ids: tuple[int, ...]  # of `tokens`: the step's rows but for sequences that were given up
    tokens: mx.array | None
    logprobs: LogprobArrays | None
    states: list[Any]
    failed: tuple[tuple[int, str], ...]
    lost: tuple[int, ...]
    writes: list[PendingWrite]  # for the store, once they are computed
    launched_at: float  # when the device may have begun: some layers are dispatched early
    build_s: float
    dispatch_s: float
    is_matched: bool = False  # its tokens have gone to the matchers

    @property
    def launch_s(self) -> float:
        return self.build_s + self.dispatch_s

    def __repr__(self) -> str:
        return f"<in flight: step {self.step.number}, {len(self.ids)} rows>"


class ModelRunner:
    """Implements `sequence.Runner` over an mlx-lm model.

    `memory_bytes` is what sequences may hold beside the weights; None is no limit. `store` has the
    prefix cache's files. Raises ValueError when the model cannot keep its cache in `kv_bits`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kv_bits: KVBits | None = None,
        memory_bytes: int | None = None,
        store: Store | None = None,
    ) -> None:
        self._model = model
        self._kv_bits = kv_bits
        self.num_vocab = int(model(mx.array([[0]])).shape[-1])
        self._prefills: dict[int, _Prefill] = {}
        self._failed: set[int] = set()  # given up, and not released yet
        self._store = store
        self._embedding: dict[int, tuple[Cache | None, mx.array]] = {}  # long inputs, half done
        self._matchers: dict[int, Matcher] = {}  # of the rows that are constrained
        self._ids: list[int] = []
        self._batch = BatchCache()
        self._tokens: mx.array | None = None  # [B]: each row's next input
        # [B]: what rows add to their positions, where the model counts those in pictures.
        self._deltas: mx.array | None = None
        self._has_deltas = bool(getattr(model, "has_positions", False))
        self._done_at = 0.0
        self._sampler = Sampler(self.num_vocab)
        self.memory = self._measure(memory_bytes)
        self._can_pack = all(map(can_pack, self._new_cache()))

    def _measure(self, budget_bytes: int | None) -> Memory:
        """What a row holds, from the caches that a short prompt leaves behind."""
        cache = self._new_cache()
        self._model(mx.zeros((1, 2), mx.uint32), cache=cache)
        mx.eval([layer.state for layer in cache])
        self._payloads = Payloads(kept(cache, 0, 2, has_states=True), self._store)
        sizes = [size for layer in cache for size in layer_sizes(layer)]
        growing = [(per_token, most) for per_token, most, _ in sizes if per_token]
        caps = dict.fromkeys(most for _, most in growing)
        layers = tuple((sum(n for n, m in growing if m == most), most) for most in caps)
        return Memory(budget_bytes, sum(constant for _, _, constant in sizes), layers)

    def _new_cache(self) -> Cache:
        cache: Cache = make_prompt_cache(self._model)
        if self._kv_bits is None:
            return cache
        return [quantized(layer, self._kv_bits) for layer in cache]

    def files(self, tell: Callable[[Command], None]) -> list[tuple[int, Stored]]:
        """See `sequence.Runner`."""
        if self._store is None:
            return []
        self._store.on_fetched = lambda id: tell(Fetched(id))
        self._store.on_failed = lambda id: tell(Unstored(id))
        return self._store.found()

    def warm_up(self) -> None:
        """Compile and touch what a first request would wait for: alone, in a batch, drawn."""
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

    def reset(self) -> None:
        """Forget every sequence and free what they held."""
        self._prefills.clear()
        self._failed.clear()
        self._payloads.clear()
        self._matchers.clear()
        self._embedding.clear()
        self._ids = []
        self._batch = BatchCache()
        self._tokens = self._deltas = None
        self._sampler = Sampler(self.num_vocab)
        if (forget := getattr(self._model, "forget", None)) is not None:
            forget()  # what was seen in pictures
        mx.clear_cache()

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        """Dispatch `step`, then wait for `in_flight`. Raises what MLX raises; then call `reset`."""
        assert in_flight is None or isinstance(in_flight, _InFlight)
        launched = self._launch(step, in_flight) if step else None
        outcome = self._wait(in_flight) if in_flight else None
        has_more = launched is not None and (launched.step.chunks or launched.step.looks)
        if outcome and launched and has_more and outcome.wait_s < launched.launch_s:
            # It ended during the launch, when is unknown: with a short queue a launch blocks.
            outcome = replace(outcome, device_s=0.0)
            self._done_at = launched.launched_at
        return launched, outcome

    # --- embeddings -------------------------------------------------------------------------

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        """See `sequence.Runner`. Padded on the right, which causal layers do not see."""
        states = _states_of(self._model)
        if states is None:
            raise NotImplementedError("this model does not show its last states")
        lengths = mx.array([[len(tokens)] for tokens in inputs])
        longest = max(map(len, inputs))
        padded = np.zeros((len(inputs), longest), np.uint32)
        for i, tokens in enumerate(inputs):
            padded[i, : len(tokens)] = tokens
        cache, total = None, mx.zeros((1, 1))
        if part is not None:
            begun = self._embedding.pop(part.id) if part.id in self._embedding else None
            cache, total = begun or (self._new_cache(), total)
        hidden = states(mx.array(padded), cache=cache).astype(mx.float32)  # [B, T, D]
        if is_mean:
            is_token = mx.arange(longest)[None] < lengths
            pooled = total + mx.sum(mx.where(is_token[..., None], hidden, 0.0), axis=1)
        else:
            pooled = mx.take_along_axis(hidden, lengths[..., None] - 1, axis=1)[:, 0]
        if part is not None and not part.is_last:
            mx.eval(pooled, [layer.state for layer in cache or ()])
            self._embedding[part.id] = cache, pooled
            return []
        norm = mx.sqrt(mx.sum(pooled * pooled, axis=-1, keepdims=True))
        return cast("list[list[float]]", (pooled / mx.maximum(norm, 1e-12)).tolist())

    def drop_embedding(self, id: int) -> None:
        """Forget the parts of an input that nobody waits for any more."""
        self._embedding.pop(id, None)

    # --- launch -----------------------------------------------------------------------------

    def _launch(self, step: Step, in_flight: _InFlight | None) -> _InFlight:
        began_at = perf_counter()
        states = self._payloads.work_on(step.before, self._take)
        for id in step.released:
            self._prefills.pop(id, None)
            self._failed.discard(id)
        failed = [f for a in step.admitted if (f := self._admit(a)) is not None]
        for look in step.looks:
            states += self._look(look, failed)
        chunks = [chunk for chunk in step.chunks if chunk.id not in self._failed]
        for group in self._pack(chunks):
            states += self._prefill(group, failed)
        states += self._payloads.work_on(step.after, self._take)
        rows = step.rows
        if self._failed:
            rows = tuple(id for id in rows if id not in self._failed)
        self._regroup(rows, failed)
        output, logprobs = self._decode(in_flight, states, failed) if self._ids else (None, None)
        launched_at = perf_counter()
        reported = [logprobs.drawn, logprobs.top_ids, logprobs.top] if logprobs else []
        mx.async_eval(output, reported, states)
        dispatch_s = perf_counter() - launched_at
        if not self._ids and not self._prefills:
            mx.clear_cache()  # nobody is left: give the buffers back rather than sit on them
        lost, writes = self._payloads.told()
        times = began_at, launched_at - began_at, dispatch_s
        return _InFlight(step, rows, output, logprobs, states, tuple(failed), lost, writes, *times)

    def _admit(self, admission: Admission) -> tuple[int, str] | None:
        """Make its cache; (id, reason) where that fails."""
        sequence = admission.sequence
        tokens = np.array(sequence.prompt.tokens + admission.outputs, np.uint32)
        sight = None
        try:
            if sequence.prompt.images:
                sight = self._model.begin(sequence.prompt, tokens)
            cache = self._new_cache()
            if admission.hit.num_tokens:
                self._resume(cache, admission.hit, tokens, sight)
        except FOREIGN as error:
            return self._give_up(sequence.id, error)
        num_computed = admission.hit.num_tokens
        self._prefills[sequence.id] = _Prefill(admission, tokens, cache, num_computed, sight)
        return None

    # --- prefixes ---------------------------------------------------------------------------

    def _resume(
        self, cache: Cache, hit: Hit, tokens: npt.NDArray[np.uint32], sight: "ImagePrefill | None"
    ) -> None:
        """Fill a new cache with what is kept; where that is lost it is computed after all, text in
        pieces for its memory's sake. The other rows wait for it.
        """
        if self._payloads.fill(cache, hit):
            return
        known = tokens[None, : hit.num_tokens]
        inputs = {} if sight is None else sight.look_and_window(hit.num_tokens)
        size = _ANEW_TOKENS if sight is None else hit.num_tokens
        for start in range(0, hit.num_tokens, size):
            self._model(mx.array(known[:, start : start + size]), cache=cache, **inputs)
            mx.eval([layer.state for layer in cache])

    def _take(self, id: int, start: int, stop: int, *, has_states: bool) -> Kept | None:
        if (prefill := self._prefills.get(id)) is not None:
            return kept(prefill.cache, start, stop, has_states=has_states)
        if id not in self._ids:
            return None
        return self._batch.kept(self._ids.index(id), start, stop, has_states=has_states)

    # --- prefill ----------------------------------------------------------------------------

    def _look(self, look: Look, failed: list[tuple[int, str]]) -> list[mx.array]:
        """Run the vision tower on one picture; the arrays that this makes."""
        prefill = self._prefills.get(look.id)
        if prefill is None or prefill.sight is None:  # it has failed
            return []
        try:
            return prefill.sight.look(look.image)
        except FOREIGN as error:
            failed.append(self._give_up(look.id, error))
            return []

    def _pack(self, chunks: SequenceOf[Chunk]) -> list[list[Chunk]]:
        """Chunks that run in one pass; those of prompts with pictures run alone."""
        alone = {c.id for c in chunks if self._prefills[c.id].sight or not self._can_pack}
        return _pack(chunks, alone)

    def _prefill(self, group: list[Chunk], failed: list[tuple[int, str]]) -> list[Any]:
        """Run chunks through the layers, and note in `failed` whose failed, with the reason.

        The states that were written; the logits are never asked for. Where several chunks fail
        together, each is tried alone: packing must not make one sequence's fault another's.
        """
        try:
            return self._prefill_together(group)
        except FOREIGN as error:
            if len(group) > 1:
                return [state for chunk in group for state in self._prefill([chunk], failed)]
            failed.append(self._give_up(group[0].id, error))
            return []

    def _give_up(self, id: int, error: Exception) -> tuple[int, str]:
        self._prefills.pop(id, None)
        self._failed.add(id)
        return id, summary_of(error)

    def _prefill_together(self, group: list[Chunk]) -> list[Any]:
        """One forward pass: a chunk of one sequence, or the first chunks of several, padded."""
        prefills = [self._prefills[chunk.id] for chunk in group]
        for chunk, prefill in zip(group, prefills, strict=True):
            assert chunk.start == prefill.num_computed
        start, stop = group[0].start, max(chunk.stop for chunk in group)
        tokens = np.zeros((len(group), stop - start), np.uint32)
        for i, (chunk, prefill) in enumerate(zip(group, prefills, strict=True)):
            tokens[i, : chunk.stop - start] = prefill.tokens[start : chunk.stop]
        if len(group) == 1:
            sight = prefills[0].sight
            inputs = {} if sight is None else sight.window(start, stop)
            self._model(mx.array(tokens), cache=prefills[0].cache, **inputs)
        else:
            lengths = [chunk.stop for chunk in group]
            padding = [stop - length for length in lengths]
            cache = merge([prefill.cache for prefill in prefills])
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
            self._model(mx.array(tokens), cache=cache)
            for layer in cache:
                layer.finalize()
            for i, prefill in enumerate(prefills):
                prefill.cache = [layer.extract(i) for layer in cache]
        for chunk, prefill in zip(group, prefills, strict=True):
            prefill.num_computed = chunk.stop
        return [layer.state for prefill in prefills for layer in prefill.cache]

    def _decode(
        self, in_flight: _InFlight | None, states: list[Any], failed: list[tuple[int, str]]
    ) -> tuple[mx.array, LogprobArrays | None]:
        assert self._tokens is not None
        logits = self._batch.forward(self._model, self._tokens, self._deltas)
        masks = self._masks(logits, in_flight, states, failed) if self._matchers else None
        self._tokens, logprobs = self._sampler(logits, masks)
        return self._tokens, logprobs

    def _masks(
        self,
        logits: mx.array,
        in_flight: _InFlight | None,
        states: list[Any],
        failed: list[tuple[int, str]],
    ) -> mx.array:
        """What each row may draw `[B, V/32]`: all, where it is not constrained.

        A constrained row needs its last token on the host before its next one is drawn, but not
        before the forward pass: the device is at that while the masks are made.
        """
        mx.async_eval(logits, states)
        if in_flight is not None and in_flight.tokens is not None:
            self._match(in_flight, cast("list[int]", in_flight.tokens.tolist()), failed)
        masks = np.full((len(self._ids), (self.num_vocab + 31) // 32), 0xFFFFFFFF, np.uint32)
        for row, id in enumerate(self._ids):
            if (matcher := self._matchers.get(id)) is not None:
                fault = _fault_of(matcher, partial(matcher.fill, masks[row]))
                if fault is not None:
                    masks[row] = 0xFFFFFFFF
                    failed.append(self._drop_matcher(id, fault))
        return mx.array(masks)

    def _match(self, in_flight: _InFlight, drawn: list[int], failed: list[tuple[int, str]]) -> None:
        """Every matcher takes its row's token, once."""
        if not in_flight.is_matched:
            in_flight.is_matched = True
            for id, token in zip(in_flight.ids, drawn, strict=True):
                if (matcher := self._matchers.get(id)) is not None:
                    fault = _fault_of(None, partial(matcher.accept, (token,)))
                    if fault is not None:
                        failed.append(self._drop_matcher(id, fault))

    def _drop_matcher(self, id: int, fault: str) -> tuple[int, str]:
        """A grammar that fails costs its own sequence, whose row leaves with a later step."""
        self._matchers.pop(id, None)
        return id, f"the grammar failed: {fault}"

    def _regroup(self, ids: tuple[int, ...], failed: list[tuple[int, str]]) -> None:
        """Make the batch's rows those of the step: drop who left, append who joins."""
        if self._ids == list(ids):
            return
        wanted = set(ids)
        keep = [i for i, id in enumerate(self._ids) if id in wanted]
        joining = [self._prefills.pop(id) for id in ids if id in self._prefills]
        for prefill in joining:
            assert prefill.num_computed == len(prefill.tokens) - 1
        self._batch.keep(keep)
        self._batch.join([prefill.cache for prefill in joining])
        self._sampler.regroup(keep, [_draw(prefill) for prefill in joining])
        for id in self._ids:
            if id not in wanted:
                self._matchers.pop(id, None)
        for prefill in joining:
            fault = _fault_of(None, partial(self._join_matcher, prefill))
            if fault is not None:
                failed.append(self._drop_matcher(prefill.admission.sequence.id, fault))
        self._ids = [self._ids[i] for i in keep]
        self._ids += [prefill.admission.sequence.id for prefill in joining]
        assert self._ids == list(ids)

        inputs = [mx.array(prefill.tokens[-1:]) for prefill in joining]
        if keep:
            assert self._tokens is not None
            inputs.insert(0, self._tokens[mx.array(keep)])
        self._tokens = mx.concatenate(inputs) if inputs else None
        if self._has_deltas:
            self._join_deltas(keep, joining)

    def _join_deltas(self, keep: list[int], joining: list[_Prefill]) -> None:
        deltas = [
            mx.zeros(1, mx.int32) if prefill.sight is None else prefill.sight.delta
            for prefill in joining
        ]
        if keep and self._deltas is not None:
            deltas.insert(0, self._deltas[mx.array(keep)])
        self._deltas = mx.concatenate(cast("list[mx.array]", deltas)) if deltas else None

    def _join_matcher(self, prefill: _Prefill) -> None:
        """A constrained row begins where its outputs, of before a preemption, have brought it."""
        sequence = prefill.admission.sequence
        if sequence.prompt.grammar is not None:
            matcher = sequence.prompt.grammar.matcher()
            matcher.accept(prefill.admission.outputs)
            self._matchers[sequence.id] = matcher

    # --- wait -------------------------------------------------------------------------------

    def _wait(self, in_flight: _InFlight) -> Outcome:
        began_at = perf_counter()
        mx.eval(in_flight.tokens, in_flight.states)
        tokens = [] if in_flight.tokens is None else cast("list[int]", in_flight.tokens.tolist())
        failed = list(in_flight.failed)
        if self._matchers:
            self._match(in_flight, tokens, failed)
        rows = in_flight.step.rows
        if len(tokens) < len(rows):  # rows of sequences that were given up have none
            drawn = iter(tokens)
            tokens = [next(drawn) if id in in_flight.ids else 0 for id in rows]
        logprobs = _report(in_flight.ids, in_flight.logprobs)
        # The device takes steps in turn: this one had it from its launch or the last one's end.
        device_s = -max(in_flight.launched_at, self._done_at)
        self._done_at = perf_counter()
        self._payloads.write(in_flight.writes)
        # The handle goes back to the loop thread; its arrays must not.
        in_flight.tokens, in_flight.logprobs = None, None
        in_flight.states, in_flight.writes = [], []
        return Outcome(
            tuple(tokens),
            logprobs,
            tuple(failed),
            lost=in_flight.lost,
            device_s=device_s + self._done_at,
            build_s=in_flight.build_s,
            dispatch_s=in_flight.dispatch_s,
            wait_s=self._done_at - began_at,
        )


def _states_of(model: nn.Module) -> Callable[..., mx.array] | None:
    """The part of a model that gives the last layer's states, as mlx-lm's models call it."""
    if (states := getattr(model, "states", None)) is not None:
        return cast("Callable[..., mx.array]", states)
    inner = getattr(model, "language_model", model)
    for name in ("model", "backbone", "transformer"):
        if isinstance(found := getattr(inner, name, None), nn.Module):
            return cast("Callable[..., mx.array]", found)
    return None


def _fault_of(matcher: Matcher | None, call: Callable[[], None]) -> str | None:
    """Why a call into a grammar's own code has failed, or has left `matcher` in error."""
    try:
        call()
        return None if matcher is None else matcher.error
    except BaseException as error:  # a panic in Rust is no Exception; signals come to other threads
        return type(error).__name__  # what it says may quote the answer


def _draw(prefill: _Prefill) -> SamplerRow:
    admission = prefill.admission
    sequence = admission.sequence
    return SamplerRow(
        sequence.sampling,
        sequence.prompt.tokens + admission.outputs,
        len(admission.outputs),
        sequence.eos_tokens,
    )


def _report(ids: tuple[int, ...], arrays: LogprobArrays | None) -> dict[int, Logprobs]:
    """The logprobs of the rows that asked, by id: one transfer an array, whatever their number."""
    if arrays is None:
        return {}
    drawn = cast("list[float]", arrays.drawn.tolist())
    top_ids = cast("list[list[int]]", arrays.top_ids.tolist())
    top = cast("list[list[float]]", arrays.top.tolist())
    tops = [
        tuple(zip(row_ids[:num], row[:num], strict=True))
        for num, row_ids, row in zip(arrays.num_top, top_ids, top, strict=True)
    ]
    rows = [Logprobs(*pair) for pair in zip(drawn, tops, strict=True)]
    return {ids[row]: logprobs for row, logprobs in zip(arrays.rows, rows, strict=True)}


def _pack(chunks: SequenceOf[Chunk], alone: set[int]) -> list[list[Chunk]]:
    """Chunks that run in one pass: first chunks of like length, with at most a quarter padding."""
    first = [chunk for chunk in chunks if chunk.start == 0 and chunk.id not in alone]
    groups = [[chunk] for chunk in chunks if chunk not in first]
    group: list[Chunk] = []
    for chunk in sorted(first, key=lambda chunk: chunk.stop, reverse=True):
        num_tokens = sum(member.stop for member in group) + chunk.stop
        if group and num_tokens >= (1 - MAX_PADDING) * group[0].stop * (len(group) + 1):
            group.append(chunk)
        else:
            group = [chunk]
            groups.append(group)
    return groups
