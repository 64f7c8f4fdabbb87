"""Logits to tokens, all rows at once.

A change of the batch splits its rows by their own settings into four groups, and each does no more
than its rows ask for; nothing here loops over rows while tokens are drawn. In this order:
temperature first, as vLLM has it, and the cuts as llama.cpp has them:

    penalties, logit_bias, min_tokens     on the model's logits, whatever the row's group
    greedy    (also top_k 1)              the best token
    full      (no top_k, no top_p)        temperature, min_p, xtc, argmax(scores + Gumbel noise)
    narrow    (top_k of at most 64)       temperature, top_k, top_p, min_p, xtc, one uniform number
    wide      (the others)                as narrow, but sorts the row's whole vocabulary

A row's token does not depend on its company (tested): its group is its own, all that is shared
leaves it exactly alone, and chance is a hash of (seed, number of tokens drawn before). So a seeded
request draws the same alone or in a batch, and needs no state that could be lost. Where tokens are
tied with the last one that top_k keeps, wide keeps all of them, and narrow as many as top_k says:
which of them depends on the row's logits alone.

An operation has a cost before it does anything: what the host can know (positions, coins, windows)
it computes, and a stage that no row needs is left out.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlite.engine.sampling_params import SamplingParams

# Rows with a top_k of at most this are drawn from a head of it: a partition costs less than a sort.
# The width is fixed: ties must not feel the company.
_HEAD_WIDTH = 64
_MASK_32 = 0xFFFFFFFF
_XTC_STREAM = 0x58544321  # sets xtc's coin apart from the tokens' noise,
_CUT_STREAM = 0x43555421  # and what narrow and wide rows draw by from both
_NEVER = 1 << 62
_NUM_AHEAD = 32  # steps that the host hashes at a time: one alone would take it as long
_Hashes = npt.NDArray[np.uint32]
_Numbers = npt.NDArray[np.float32]
_Integers = npt.NDArray[np.int32]
_Index = slice | mx.array


@dataclass(frozen=True, slots=True)
class Draw:
    """A row that joins: its settings, the tokens so far, and those of them it drew itself."""

    params: SamplingParams
    tokens: tuple[int, ...] = ()
    num_drawn: int = 0
    eos_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Logprobs of the rows that asked, `[b]` and `[b, K]`.

    `rows` are their places in the batch; of K best tokens each wants the first `num_top`.
    """

    rows: tuple[int, ...]
    num_top: tuple[int, ...]
    drawn: mx.array
    top_ids: mx.array
    top: mx.array


@dataclass(slots=True)
class _Row:
    draw: Draw
    born: int  # how many draws the sampler had made when it joined


@dataclass(frozen=True, slots=True)
class _Member:
    """A row as a group sees it: where its scores stand, and how many tokens it has drawn."""

    params: SamplingParams
    place: int
    num_drawn: int


class _Group(Protocol):
    def draw(self, scores: mx.array, step: int) -> mx.array:
        """Tokens `[b]` of this group's rows, `step` draws after the last change of the batch."""


class Sampler:
    """Draws for a set of rows, which changes only through `regroup`."""

    def __init__(self, num_vocab: int) -> None:
        self._num_vocab = num_vocab
        self._rows: list[_Row] = []
        self._num_draws = 0
        self._step = 0
        self._penalised: list[int] = []
        self._counts: _Counts | None = None

    def regroup(self, keep: SequenceOf[int], joining: SequenceOf[Draw]) -> None:
        """Keep the rows at these indices, which ascend, and append new ones."""
        kept = [self._rows[i] for i in keep]
        self._rows = [*kept, *(_Row(draw, self._num_draws) for draw in joining)]
        self._step = 0
        params = [row.draw.params for row in self._rows]
        self._set_counts(keep, joining)
        # The scores of a penalised row stand below those of the batch, if any row has no penalty.
        places = list(range(len(params)))
        if len(self._penalised) < len(params):
            for offset, i in enumerate(self._penalised):
                places[i] = len(params) + offset
        drawn = [row.draw.num_drawn + self._num_draws - row.born for row in self._rows]
        self._set_logit_stages(places, drawn)
        self._set_groups([_Member(*row) for row in zip(params, places, drawn, strict=True)])
        self._asking = tuple(i for i, p in enumerate(params) if p.top_logprobs is not None)
        self._num_top = min(max((p.top_logprobs or 0 for p in params), default=0), self._num_vocab)

    def _set_counts(self, keep: SequenceOf[int], joining: SequenceOf[Draw]) -> None:
        """Tables of the rows that have a penalty, and of no others."""
        kept = set(keep)
        stay = [offset for offset, i in enumerate(self._penalised) if i in kept]
        join = [draw for draw in joining if draw.params.has_penalty]
        self._penalised = [i for i, r in enumerate(self._rows) if r.draw.params.has_penalty]
        old = self._counts.take(stay) if self._counts is not None and stay else None
        new = _Counts(join, self._num_vocab) if join else None
        self._counts = old.join(new) if old is not None and new is not None else old or new
        if self._counts is not None:
            self._counts.set_penalties([self._rows[i].draw.params for i in self._penalised])
            self._penalised_rows = _index(self._penalised)

    def _set_logit_stages(self, places: list[int], drawn: list[int]) -> None:
        bias: dict[tuple[int, int], float] = {}
        self._ends: list[tuple[int, int, int]] = []  # place, token id, and for how many steps
        for row, place, num_drawn in zip(self._rows, places, drawn, strict=True):
            params = row.draw.params
            bias |= {(place, id): value for id, value in params.logit_bias}
            if num_drawn < params.min_tokens:
                end = params.min_tokens - num_drawn
                self._ends += [
                    (place, id, end) for id in row.draw.eos_tokens if id < self._num_vocab
                ]
        self._bias = None
        if bias:
            rows, ids = (mx.array(numbers, mx.int32) for numbers in zip(*bias, strict=True))
            self._bias = (rows, ids, mx.array(list(bias.values()), mx.float32))
        self._set_held()

    def _set_held(self) -> None:
        """Which ends are still held back: this changes only where a row reaches its min_tokens."""
        self._ends = [end for end in self._ends if end[2] > self._step]
        self._held_until = min((end[2] for end in self._ends), default=_NEVER)
        self._held: tuple[mx.array, mx.array] | None = None
        if self._ends:
            places, ids, _ = zip(*self._ends, strict=True)
            self._held = (mx.array(places, mx.int32), mx.array(ids, mx.int32))

    def _set_groups(self, members: list[_Member]) -> None:
        makers: dict[_Maker, list[int]] = {}
        for i, member in enumerate(members):
            makers.setdefault(_maker(member.params, self._num_vocab), []).append(i)
        self._groups: list[_Group] = [
            make([members[i] for i in rows], len(members), self._num_vocab)
            for make, rows in makers.items()
        ]
        by_group = [i for rows in makers.values() for i in rows]
        order = sorted(range(len(by_group)), key=by_group.__getitem__)
        self._order = None if by_group == sorted(by_group) else mx.array(order, mx.int32)

    def __call__(
        self, logits: mx.array, masks: mx.array | None = None
    ) -> tuple[mx.array, LogprobArrays | None]:
        """Logits `[B, V]` and the bits `[B, V/32]` of what may be drawn to token ids `[B]`."""
        scores = self._adjust(logits if masks is None else self._masked(logits, masks))
        drawn = [group.draw(scores, self._step) for group in self._groups]
        tokens = drawn[0] if len(drawn) == 1 else mx.concatenate(drawn)
        if self._order is not None:
            tokens = tokens[self._order]
        self._num_draws += 1
        self._step += 1
        if self._counts is not None:
            self._counts.add(tokens[self._penalised_rows])
        return tokens, self._logprobs(logits, tokens) if self._asking else None

    def _masked(self, logits: mx.array, masks: mx.array) -> mx.array:
        bits = (masks[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
        is_allowed = bits.reshape(logits.shape[0], -1)[:, : self._num_vocab].astype(mx.bool_)
        return mx.where(is_allowed, logits, -mx.inf)

    def _adjust(self, logits: mx.array) -> mx.array:
        """Logits `[B, V]` to scores: the same, and those of the b penalised rows below them."""
        if self._step >= self._held_until:
            self._set_held()
        if self._counts is not None:
            logits = logits.astype(mx.float32)
            penalised = self._counts.penalise(logits[self._penalised_rows])
            is_all = len(self._penalised) == len(self._rows)
            logits = penalised if is_all else mx.concatenate([logits, penalised])
        if self._bias is not None:
            rows, ids, values = self._bias
            logits = logits.astype(mx.float32).at[rows, ids].add(values)
        if self._held is not None:
            logits = logits.at[self._held].minimum(-mx.inf)
        return logits

    def _logprobs(self, logits: mx.array, tokens: mx.array) -> LogprobArrays:
        rows = mx.array(self._asking)
        asked = logits[rows].astype(mx.float32)
        asked = asked - mx.logsumexp(asked, axis=-1, keepdims=True)
        drawn = mx.take_along_axis(asked, tokens[rows][:, None], axis=-1)[:, 0]
        start = self._num_vocab - self._num_top
        if not self._num_top:
            ids = mx.zeros((len(self._asking), 0), mx.uint32)
        else:
            ids = mx.argpartition(asked, start, axis=-1)[:, start:]
        top = mx.take_along_axis(asked, ids, axis=-1)
        order = mx.argsort(-top, axis=-1)
        return LogprobArrays(
            self._asking,
            tuple(self._rows[i].draw.params.top_logprobs or 0 for i in self._asking),
            drawn,
            mx.take_along_axis(ids, order, axis=-1),
            mx.take_along_axis(top, order, axis=-1),
        )


# --- groups -----------------------------------------------------------------------------------


class _Greedy:
    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        self._index = _index_within([m.place for m in members], num_rows)

    def draw(self, scores: mx.array, step: int) -> mx.array:
        return mx.argmax(_rows(scores, self._index), axis=-1)


class _Drawn:
    """What full, narrow and wide rows have in common. A setting that all have off is None."""

    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        self._index = _index_within([m.place for m in members], num_rows)
        self._num_vocab = num_vocab
        params = [m.params for m in members]
        is_hot = any(p.temperature != 1.0 for p in params)
        self._temperature = _column([p.temperature for p in params]) if is_hot else None
        self._min_p = _column([p.min_p for p in params]) if any(p.min_p for p in params) else None
        self._coins: _Chance | None = None
        if any(p.xtc_probability > 0.0 for p in params):
            self._coins = _Chance(members, _XTC_STREAM)
            self._xtc_probability = np.array([[p.xtc_probability] for p in params], np.float32)
            self._xtc_threshold = np.array([[p.xtc_threshold] for p in params], np.float32)

    def _heat(self, scores: mx.array) -> mx.array:
        scores = scores.astype(mx.float32)
        return scores if self._temperature is None else scores / self._temperature

    def _xtc(self, step: int) -> mx.array | None:
        """Thresholds `[b, 1]`: infinite where the coin does not fall; None where none falls."""
        if self._coins is None:
            return None
        falls = self._coins.numbers(step) < self._xtc_probability
        return mx.array(np.where(falls, self._xtc_threshold, np.inf)) if falls.any() else None


class _Full(_Drawn):
    """Rows with neither top_k nor top_p: every token has its chance, however small."""

    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        super().__init__(members, num_rows, num_vocab)
        self._chance = _Chance(members, 0)
        self._ids = mx.arange(num_vocab, dtype=mx.uint32)[None]
        if self._min_p is not None:
            self._log_min_p = mx.log(self._min_p)  # log 0 is -inf: off

    def draw(self, scores: mx.array, step: int) -> mx.array:
        scores = self._heat(_rows(scores, self._index))
        if self._min_p is not None:
            floor = mx.max(scores, axis=-1, keepdims=True) + self._log_min_p
            scores = mx.where(scores < floor, -mx.inf, scores)
        threshold = self._xtc(step)
        if threshold is not None:
            shares = mx.softmax(scores, axis=-1)
            scores = mx.where(shares > _least_above(shares, threshold), -mx.inf, scores)
        seeds = mx.array(self._chance.hashes(step)) + self._ids
        return mx.argmax(scores - _negative_gumbel(seeds), axis=-1)


class _Cut(_Drawn):
    """Rows with a top_k or top_p."""

    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        super().__init__(members, num_rows, num_vocab)
        self._chance = _Chance(members, _CUT_STREAM)
        params = [m.params for m in members]
        # Shares add up to 1 only nearly: a top_p that is off must not cut the last ones.
        # One that is nothing leaves the best: no token comes before it.
        limits = [max(p.top_p, 1e-30) if p.top_p < 1.0 else float("inf") for p in params]
        self._top_p = _column(limits) if min(limits) < 1.0 else None

    def _pick(self, shares: mx.array, best: mx.array, step: int) -> mx.array:
        """Indices `[b, 1]` drawn by shares `[b, W]`, which top_k and top_p have cut (to 0).

        By inverting the running sum: 13 operations fewer than noise for the kept tokens.
        """
        if self._min_p is not None:
            shares = mx.where(shares < best * self._min_p, 0.0, shares)
        threshold = self._xtc(step)
        if threshold is not None:
            total = mx.sum(shares, axis=-1, keepdims=True)
            shares = mx.where(shares > _least_above(shares, threshold * total), 0.0, shares)
        until = mx.cumsum(shares, axis=-1)
        target = mx.array(self._chance.numbers(step)) * until[:, -1:]
        return mx.argmax(until > target, axis=-1, keepdims=True)  # no share: the first


class _Narrow(_Cut):
    """Rows with a small top_k: their best tokens are sorted, and nothing else."""

    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        super().__init__(members, num_rows, num_vocab)
        top_k = np.array([[m.params.top_k] for m in members])
        self._is_within = mx.array(np.arange(min(_HEAD_WIDTH, num_vocab)) < top_k)

    def draw(self, scores: mx.array, step: int) -> mx.array:
        scores = _rows(scores, self._index)
        start = max(0, self._num_vocab - _HEAD_WIDTH)
        ids = mx.argpartition(scores, start, axis=-1)[:, start:]
        scores = mx.take_along_axis(scores, ids, axis=-1)
        order = mx.argsort(-scores, axis=-1)
        scores = self._heat(mx.take_along_axis(scores, order, axis=-1))
        shares = mx.softmax(mx.where(self._is_within, scores, -mx.inf), axis=-1)
        if self._top_p is not None:
            before = mx.cumsum(shares, axis=-1, inclusive=False)
            shares = mx.where(before < self._top_p, shares, 0.0)
        picked = self._pick(shares, shares[:, :1], step)  # an infinite score has no share: 0
        picked = mx.take_along_axis(order, picked, axis=-1)
        return mx.take_along_axis(ids, picked, axis=-1)[:, 0]


class _Wide(_Cut):
    """Rows with a top_p alone, or a large top_k. Their shares are sorted without their ids."""

    def __init__(self, members: list[_Member], num_rows: int, num_vocab: int) -> None:
        super().__init__(members, num_rows, num_vocab)
        top_k = np.array([[m.params.top_k or num_vocab] for m in members])
        self._is_within: mx.array | None = None
        if (top_k < num_vocab).any():
            self._has_top_k = mx.array(top_k < num_vocab)
            self._is_within = mx.array(np.arange(num_vocab)[::-1] < top_k)

    def draw(self, scores: mx.array, step: int) -> mx.array:
        # An infinite score has no share: the largest finite one wins as well.
        scores = mx.minimum(self._heat(_rows(scores, self._index)), mx.finfo(mx.float32).max)
        shares = mx.softmax(scores, axis=-1)
        ranked = mx.sort(shares, axis=-1)
        is_kept = self._is_kept(ranked)
        lowest = mx.min(mx.where(is_kept, ranked, mx.inf), axis=-1, keepdims=True)
        kept = mx.where(shares < lowest, 0.0, shares)
        return self._pick(kept, ranked[:, -1:], step)[:, 0]

    def _is_kept(self, ranked: mx.array) -> mx.array:
        """Which of the shares `[b, V]`, the best last, top_k and top_p let through."""
        if self._top_p is None:
            assert self._is_within is not None
            return self._is_within
        before = mx.cumsum(ranked, axis=-1, reverse=True, inclusive=False)
        if self._is_within is None:
            return before < self._top_p
        total = mx.sum(mx.where(self._is_within, ranked, 0.0), axis=-1, keepdims=True)
        limit = self._top_p * mx.where(self._has_top_k, total, 1.0)
        return self._is_within & (before < limit)


_Maker = Callable[[list[_Member], int, int], _Group]


def _maker(params: SamplingParams, num_vocab: int) -> _Maker:
    """The group of a row: its own settings decide, never its company's."""
    if params.temperature == 0.0 or params.top_k == 1:
        return _Greedy
    if 0 < params.top_k <= _HEAD_WIDTH:
        return _Narrow
    return _Wide if params.top_p < 1.0 or 0 < params.top_k < num_vocab else _Full


def _least_above(shares: mx.array, threshold: mx.array) -> mx.array:
    """XTC leaves out all tokens above the threshold but the least likely of them, `[b, 1]`."""
    return mx.min(mx.where(shares > threshold, shares, mx.inf), axis=-1, keepdims=True)


def _column(values: list[float]) -> mx.array:
    return mx.array([[value] for value in values], mx.float32)


def _index(places: list[int]) -> _Index:
    """A slice where it will do: on CPU it copies nothing."""
    if places == list(range(places[0], places[-1] + 1)):
        return slice(places[0], places[-1] + 1)
    return mx.array(places, mx.int32)


def _index_within(places: list[int], num_rows: int) -> _Index | None:
    """None for a group that has all rows, whose scores then stand at the first places."""
    return None if places == list(range(num_rows)) else _index(places)


def _rows(scores: mx.array, index: _Index | None) -> mx.array:
    return scores if index is None else scores[index]


# --- penalties --------------------------------------------------------------------------------


class _Counts:
    """How often each token stands in each row's prompt and its output, `[b, V]`.

    Where a row has a window, only its last tokens count. The one that leaves it is found in a ring
    of them: the one at index j of prompt and output stands in slot j modulo the window. It is one
    of the prompt as long as fewer tokens were drawn than the window holds.
    """

    def __init__(self, rows: list[Draw], num_vocab: int) -> None:
        windows = [row.params.repetition_context_size for row in rows]
        prompt = np.zeros((len(rows), num_vocab), np.float32)
        output = np.zeros((len(rows), num_vocab), np.float32)
        ring = np.zeros((len(rows), max(1, *windows)), np.int32)
        for i, (row, window) in enumerate(zip(rows, windows, strict=True)):
            tokens = np.array(row.tokens, np.int64)
            num_seen = min(window or len(tokens), len(tokens))
            seen = tokens[len(tokens) - num_seen :]
            split = num_seen - min(num_seen, row.num_drawn)
            prompt[i] = np.bincount(seen[:split], minlength=num_vocab)[:num_vocab]
            output[i] = np.bincount(seen[split:], minlength=num_vocab)[:num_vocab]
            if window:
                slots = np.arange(len(tokens) - num_seen, len(tokens)) % window
                ring[i, slots] = seen
        self._prompt = mx.array(prompt)
        self._output = mx.array(output)
        self._ring = mx.array(ring)
        self._window: _Integers = np.array(windows, np.int32)
        self._num_tokens: _Integers = np.array([len(row.tokens) for row in rows], np.int32)
        self._num_drawn: _Integers = np.array([row.num_drawn for row in rows], np.int32)

    def take(self, indices: list[int]) -> "_Counts":
        new = object.__new__(_Counts)
        index = mx.array(indices)
        new._prompt, new._output, new._ring = (
            table[index] for table in (self._prompt, self._output, self._ring)
        )
        new._window, new._num_tokens, new._num_drawn = (
            numbers[indices] for numbers in (self._window, self._num_tokens, self._num_drawn)
        )
        return new

    def join(self, other: "_Counts") -> "_Counts":
        """These rows, and then the other's."""
        new = object.__new__(_Counts)
        new._prompt = mx.concatenate([self._prompt, other._prompt])
        new._output = mx.concatenate([self._output, other._output])
        width = max(self._ring.shape[1], other._ring.shape[1])
        rings = (self._ring, other._ring)
        new._ring = mx.concatenate(
            [mx.pad(ring, [(0, 0), (0, width - ring.shape[1])]) for ring in rings]
        )
        new._window = np.concatenate([self._window, other._window])
        new._num_tokens = np.concatenate([self._num_tokens, other._num_tokens])
        new._num_drawn = np.concatenate([self._num_drawn, other._num_drawn])
        return new

    def set_penalties(self, params: list[SamplingParams]) -> None:
        """A penalty that all rows have off is None."""

        def column(values: list[float], off: float) -> mx.array | None:
            return None if all(value == off for value in values) else _column(values)

        self._repetition = column([p.repetition_penalty for p in params], 1.0)
        self._presence = column([p.presence_penalty for p in params], 0.0)
        self._frequency = column([p.frequency_penalty for p in params], 0.0)
        self._rows = mx.arange(len(params))
        self._has_window = bool(self._window.any())
        # What nobody reads is never computed, and would grow with each change of the batch.
        if self._repetition is None:
            self._prompt = mx.zeros(self._prompt.shape)
        if not self._has_window:
            self._ring = mx.zeros((len(params), 1), mx.int32)

    def penalise(self, logits: mx.array) -> mx.array:
        """Logits `[b, V]`, lowered by the rows' penalties."""
        if self._repetition is not None:
            harder = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(self._prompt + self._output > 0, harder, logits)
        if self._frequency is not None:
            logits = logits - self._frequency * self._output
        if self._presence is not None:
            logits = logits - self._presence * mx.minimum(self._output, 1.0)
        return logits

    def add(self, tokens: mx.array) -> None:
        """Count the drawn tokens `[b]` in, and those that leave a window out."""
        if self._has_window:
            window = np.maximum(self._window, 1)
            slot = mx.array(self._num_tokens % window)
            leaving = self._ring[self._rows, slot]
            is_leaving = (self._window > 0) & (self._num_tokens >= window)
            is_output = self._num_drawn >= window
            from_prompt = -(is_leaving & ~is_output).astype(np.float32)
            from_output = -(is_leaving & is_output).astype(np.float32)
            if from_prompt.any():
                self._prompt = self._prompt.at[self._rows, leaving].add(mx.array(from_prompt))
            # Also where none leaves: through this, the ring is computed along with the scores.
            self._output = self._output.at[self._rows, leaving].add(mx.array(from_output))
            self._ring[self._rows, slot] = tokens.astype(mx.int32)
        self._output = self._output.at[self._rows, tokens].add(1.0)
        self._num_tokens = self._num_tokens + 1
        self._num_drawn = self._num_drawn + 1


# --- chance -----------------------------------------------------------------------------------


class _Chance:
    """A hash of each row for one draw after another, computed on the host some draws ahead.

    It is of the row's seed and how many tokens it has drawn, and another one in each stream.
    """

    def __init__(self, members: list[_Member], stream: int) -> None:
        keys = [_split_seed(m.params.seed) for m in members]
        positions = [key[1] + m.num_drawn for key, m in zip(keys, members, strict=True)]
        self._position = np.array([[n & _MASK_32] for n in positions], np.uint32)
        self._key = np.array([[key[0] ^ stream] for key in keys], np.uint32)
        self._start = -_NUM_AHEAD
        self._hashes: list[_Hashes] = []
        self._numbers: list[_Numbers] = []

    def hashes(self, step: int) -> _Hashes:
        """`[b, 1]` at `step` draws after the last change of the batch."""
        self._look_ahead(step)
        return self._hashes[step % _NUM_AHEAD]

    def numbers(self, step: int) -> _Numbers:
        """The upper 23 bits as numbers in (0, 1), at the middle of their interval: all exact."""
        self._look_ahead(step)
        return self._numbers[step % _NUM_AHEAD]

    def _look_ahead(self, step: int) -> None:
        start = step - step % _NUM_AHEAD
        if start != self._start:
            self._start = start
            steps = np.arange(start, start + _NUM_AHEAD, dtype=np.uint32)
            hashes = _hash(_hash(self._position + steps[:, None, None]) ^ self._key)
            upper = (hashes >> np.uint32(9)).astype(np.float32)
            numbers = upper * np.float32(2.0**-23) + np.float32(2.0**-24)
            self._hashes, self._numbers = list(hashes), list(numbers)


@mx.compile  # one kernel, on a CPU three, instead of 14; traced once for each number of rows
def _negative_gumbel(x: mx.array) -> mx.array:
    """What to subtract from scores so that the best is a draw: Gumbel noise, and its sign."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    x = x ^ (x >> 16)
    return mx.log(-mx.log((x >> 9).astype(mx.float32) * 2.0**-23 + 2.0**-24))


def _hash(x: _Hashes) -> _Hashes:
    """A 32-bit permutation with little bias: «lowbias32», nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _split_seed(seed: int) -> tuple[int, int]:
    """Two 32-bit words of a 64-bit seed, well mixed: SplitMix64's output function."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return z & _MASK_32, z >> 32
