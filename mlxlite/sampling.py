"""Logits to tokens, all rows at once.

A row's settings are one entry in a handful of `[B, 1]` arrays; nothing here loops over rows while
tokens are drawn, however their settings differ. A stage that no row of the batch asks for is not
in the graph, and every stage leaves the rows alone that did not ask for it, so that a row's token
does not depend on its company (tested). In this order: temperature first, as vLLM has it, and the
cuts as llama.cpp has them:

    penalties, logit_bias, min_tokens     on the model's logits; greedy rows take their best here
    temperature, top_k, top_p, min_p, xtc
    the Gumbel trick                      argmax(scores + noise)

Tokens tied with the last one that top_k or top_p keeps are kept too, so that the choice of path can
never decide a tie. The noise of a token is a hash of (seed, number of tokens drawn before, token
id): a seeded request draws the same alone or in any company, and needs no state that could be lost.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxlite.sequence import SamplingParams

# A row with a top_k of at most this takes its threshold from a partition, not from a sort: on CPU
# 2.9 ms against 23.7 ms for [8, 32000] float32.
_MAX_PARTITION_K = 64
_MASK_32 = 0xFFFFFFFF
_NO_TOP_K = _MASK_32 >> 1
_XTC_STREAM = 0x58544321  # sets xtc's coin apart from the tokens' noise


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


class Sampler:
    """Draws for a set of rows, which changes only through `regroup`."""

    def __init__(self, num_vocab: int) -> None:
        self._num_vocab = num_vocab
        self._rows: list[_Row] = []
        self._num_draws = 0
        self._counts: _Counts | None = None

    def regroup(self, keep: SequenceOf[int], joining: SequenceOf[Draw]) -> None:
        """Keep the rows at these indices, which ascend, and append new ones."""
        kept = [self._rows[i] for i in keep]
        self._rows = [*kept, *(_Row(draw, self._num_draws) for draw in joining)]
        params = [row.draw.params for row in self._rows]
        self._set_arrays(params)
        self._set_logit_stages(params)
        self._set_counts(params, keep, joining)
        drawn = [p for p in params if p.temperature != 0.0]
        self._is_all_greedy = not drawn
        self._is_any_greedy = len(drawn) < len(params)
        self._has_min_p = any(p.min_p > 0.0 for p in drawn)
        self._has_xtc = any(p.xtc_probability > 0.0 for p in drawn)
        self._cuts = _cuts(params, self._num_vocab)
        self._asking = tuple(i for i, p in enumerate(params) if p.top_logprobs is not None)
        self._num_top = min(max((p.top_logprobs or 0 for p in params), default=0), self._num_vocab)

    def _set_arrays(self, params: list[SamplingParams]) -> None:
        def column(values: list[float]) -> mx.array:
            return mx.array(values, mx.float32)[:, None]

        keys = [_split_seed(p.seed) for p in params]
        drawn = [row.draw.num_drawn + self._num_draws - row.born for row in self._rows]
        positions = [(key[1] + n) & _MASK_32 for key, n in zip(keys, drawn, strict=True)]
        self._temperature = column([p.temperature or 1.0 for p in params])
        self._is_greedy = mx.array([p.temperature == 0.0 for p in params])
        self._log_min_p = mx.log(column([p.min_p for p in params]))  # log 0 is -inf: off
        self._xtc = (
            column([p.xtc_probability for p in params]),
            column([p.xtc_threshold for p in params]),
        )
        self._key = mx.array([[key[0]] for key in keys], mx.uint32)
        self._position = mx.array([[position] for position in positions], mx.uint32)
        self._num_drawn = mx.array([[n] for n in drawn], mx.int32)

    def _set_logit_stages(self, params: list[SamplingParams]) -> None:
        shape = (len(params), self._num_vocab)
        self._bias = self._eos = None
        if any(p.logit_bias for p in params):
            bias = np.zeros(shape, np.float32)
            for i, p in enumerate(params):
                for id, value in p.logit_bias:
                    bias[i, id] = value
            self._bias = mx.array(bias)
        if any(p.min_tokens for p in params):
            eos = np.zeros(shape, np.bool_)
            for i, row in enumerate(self._rows):
                eos[i, [id for id in row.draw.eos_tokens if id < self._num_vocab]] = True
            self._eos = mx.array(eos)
            self._min_tokens = mx.array([[p.min_tokens] for p in params], mx.int32)

    def _set_counts(
        self, params: list[SamplingParams], keep: SequenceOf[int], joining: SequenceOf[Draw]
    ) -> None:
        """Tables only while some row has a penalty; the others' rows are there but not counted."""
        if not any(p.has_penalty for p in params):
            self._counts = None
            return
        old = self._counts.take(keep) if self._counts is not None and keep else None
        if old is None and keep:  # none of those who stay has a penalty
            old = _Counts([Draw(SamplingParams())] * len(keep), self._num_vocab)
        new = _Counts(list(joining), self._num_vocab) if joining else None
        counts = old.join(new) if old is not None and new is not None else old or new
        assert counts is not None
        counts.set_penalties(params)
        self._counts = counts

    def __call__(self, logits: mx.array) -> tuple[mx.array, LogprobArrays | None]:
        """Logits `[B, V]` to token ids `[B]` (uint32), and logprobs if somebody asked."""
        self._num_draws += 1
        scores = self._adjust(logits)
        if self._is_all_greedy:
            tokens = mx.argmax(scores, axis=-1)
        else:
            tokens = self._draw(scores)
            if self._is_any_greedy:
                tokens = mx.where(self._is_greedy, mx.argmax(scores, axis=-1), tokens)
        self._num_drawn = self._num_drawn + 1
        if self._counts is not None:
            self._counts.add(tokens)
        return tokens, self._logprobs(logits, tokens) if self._asking else None

    def _adjust(self, logits: mx.array) -> mx.array:
        if self._counts is not None:
            logits = self._counts.penalise(logits.astype(mx.float32))
        if self._bias is not None:
            logits = logits + self._bias
        if self._eos is not None:
            is_early = self._num_drawn < self._min_tokens
            logits = mx.where(self._eos & is_early, -mx.inf, logits)
        return logits

    def _draw(self, logits: mx.array) -> mx.array:
        scores = logits.astype(mx.float32) / self._temperature
        if self._cuts:
            scores = mx.where(scores >= self._top_thresholds(scores), scores, -mx.inf)
        if self._has_min_p:
            floor = mx.max(scores, axis=-1, keepdims=True) + self._log_min_p
            is_cut = (scores < floor) & (self._log_min_p > -mx.inf)
            scores = mx.where(is_cut, -mx.inf, scores)
        if self._has_xtc:
            scores = self._cut_best(scores)
        ids = mx.arange(self._num_vocab, dtype=mx.uint32)[None]
        noise = _gumbel(ids, self._key, self._position)
        self._position = self._position + 1
        return mx.argmax(scores + noise, axis=-1)

    def _top_thresholds(self, scores: mx.array) -> mx.array:
        """For each row the lowest score `[B, 1]` that its top_k and top_p let through."""
        thresholds = mx.full((scores.shape[0], 1), -mx.inf)
        for cut in self._cuts:
            thresholds[cut.rows] = cut.thresholds(scores[cut.rows])
        return thresholds

    def _cut_best(self, scores: mx.array) -> mx.array:
        """XTC: at times, leave out all tokens above the threshold but the least likely of them."""
        probability, threshold = self._xtc
        shares = mx.softmax(scores, axis=-1)
        is_above = shares > threshold
        lowest = mx.min(mx.where(is_above, shares, mx.inf), axis=-1, keepdims=True)
        coin = _uniform(_hash(_hash(self._position) ^ self._key ^ _XTC_STREAM))
        return mx.where(is_above & (shares > lowest) & (coin < probability), -mx.inf, scores)

    def _logprobs(self, logits: mx.array, tokens: mx.array) -> LogprobArrays:
        rows = mx.array(self._asking)
        asked = logits[rows].astype(mx.float32)
        asked = asked - mx.logsumexp(asked, axis=-1, keepdims=True)
        drawn = mx.take_along_axis(asked, tokens[rows][:, None], axis=-1)[:, 0]
        start = self._num_vocab - self._num_top
        if not self._num_top:
            ids = mx.zeros((len(self._asking), 0), mx.uint32)
        elif start:
            ids = mx.argpartition(asked, start, axis=-1)[:, start:]
        else:
            ids = mx.broadcast_to(mx.arange(self._num_vocab)[None], asked.shape)
        top = mx.take_along_axis(asked, ids, axis=-1)
        order = mx.argsort(-top, axis=-1)
        return LogprobArrays(
            self._asking,
            tuple(self._rows[i].draw.params.top_logprobs or 0 for i in self._asking),
            drawn,
            mx.take_along_axis(ids, order, axis=-1),
            mx.take_along_axis(top, order, axis=-1),
        )


class _Cut:
    """top_k and top_p of the rows that are cut the same way: from a head of `width` best scores."""

    def __init__(self, rows: list[int], params: list[SamplingParams], width: int) -> None:
        self.rows = mx.array(rows)
        self._width = width
        self._top_k = mx.array([[params[i].top_k or _NO_TOP_K] for i in rows], mx.int32)
        self._top_p = mx.array([[params[i].top_p] for i in rows], mx.float32)

    def thresholds(self, scores: mx.array) -> mx.array:
        """Scores `[b, V]` of these rows to the lowest one `[b, 1]` that each lets through."""
        start = scores.shape[-1] - self._width
        head = mx.partition(scores, start, axis=-1)[:, start:] if start else scores
        ranked = mx.sort(head, axis=-1)[:, ::-1]
        rank = mx.arange(self._width)[None]
        ranked = mx.where(rank < self._top_k, ranked, -mx.inf)
        probabilities = mx.softmax(ranked, axis=-1)
        before = mx.cumsum(probabilities, axis=-1) - probabilities
        # The probabilities add up to 1 only nearly: a top_p that is off must not cut the last ones.
        is_kept = ((before < self._top_p) | (self._top_p >= 1.0)) & (ranked > -mx.inf)
        last = mx.maximum(mx.sum(is_kept, axis=-1, keepdims=True) - 1, 0)
        return mx.take_along_axis(ranked, last, axis=-1)


def _cuts(params: list[SamplingParams], num_vocab: int) -> list[_Cut]:
    """The rows that truncate, by how: a row's own settings decide, never its company's.

    A sort is dear on a CPU, so only the rows that need one are sorted: a draw for `[8, 4096]` takes
    4.8 ms where all rows have a top_p, 1.5 ms where all have a small top_k, 0.8 ms without either.
    """
    narrow: list[int] = []
    wide: list[int] = []
    for i, p in enumerate(params):
        if p.temperature != 0.0 and (p.top_k > 0 or p.top_p < 1.0):
            is_narrow = 0 < p.top_k <= _MAX_PARTITION_K
            (narrow if is_narrow else wide).append(i)
    cuts = []
    if narrow:
        width = min(max(params[i].top_k for i in narrow), num_vocab)
        cuts.append(_Cut(narrow, params, width))
    if wide:
        cuts.append(_Cut(wide, params, num_vocab))
    return cuts


class _Counts:
    """How often each token stands in each row's context (prompt and output) and output, `[B, V]`.

    Where a row has a window, the token that leaves it is found in a ring of the last tokens: the
    one at index j of prompt and output stands in slot j modulo the window.
    """

    def __init__(self, rows: list[Draw], num_vocab: int) -> None:
        windows = [row.params.penalty_window for row in rows]
        context = np.zeros((len(rows), num_vocab), np.int32)
        output = np.zeros((len(rows), num_vocab), np.int32)
        ring = np.zeros((len(rows), max(1, *windows)), np.int32)
        for i, (row, window) in enumerate(zip(rows, windows, strict=True)):
            tokens = np.array(row.tokens, np.int64)
            seen = tokens[-window:] if window else tokens
            own = tokens[len(tokens) - row.num_drawn :]
            own = own[-window:] if window else own
            context[i] = np.bincount(seen, minlength=num_vocab)[:num_vocab]
            output[i] = np.bincount(own, minlength=num_vocab)[:num_vocab]
            if window:
                slots = np.arange(len(tokens) - len(seen), len(tokens)) % window
                ring[i, slots] = seen
        self._context = mx.array(context)
        self._output = mx.array(output)
        self._ring = mx.array(ring)
        self._window = mx.array(windows, mx.int32)
        self._num_tokens = mx.array([len(row.tokens) for row in rows], mx.int32)
        self._num_drawn = mx.array([row.num_drawn for row in rows], mx.int32)

    def _map(self, other: "_Counts | None", index: mx.array | None) -> "_Counts":
        """These rows at `index`, or these and then the other's."""
        new = object.__new__(_Counts)
        for name in ("_context", "_output", "_ring", "_window", "_num_tokens", "_num_drawn"):
            mine = getattr(self, name)
            if other is None:
                setattr(new, name, mine[index])
                continue
            theirs = getattr(other, name)
            if name == "_ring":
                width = max(mine.shape[1], theirs.shape[1])
                mine, theirs = (
                    mx.pad(ring, [(0, 0), (0, width - ring.shape[1])]) for ring in (mine, theirs)
                )
            setattr(new, name, mx.concatenate([mine, theirs]))
        return new

    def take(self, indices: SequenceOf[int]) -> "_Counts":
        return self._map(None, mx.array(list(indices)))

    def join(self, other: "_Counts") -> "_Counts":
        return self._map(other, None)

    def set_penalties(self, params: list[SamplingParams]) -> None:
        self._repetition = mx.array([[p.repetition_penalty] for p in params], mx.float32)
        self._presence = mx.array([[p.presence_penalty] for p in params], mx.float32)
        self._frequency = mx.array([[p.frequency_penalty] for p in params], mx.float32)

    def penalise(self, logits: mx.array) -> mx.array:
        """Logits `[B, V]`, lowered by the rows' penalties."""
        harder = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
        logits = mx.where(self._context > 0, harder, logits)
        output = self._output.astype(mx.float32)
        return logits - self._frequency * output - self._presence * (output > 0)

    def add(self, tokens: mx.array) -> None:
        """Count the drawn tokens `[B]` in, and those that leave a window out."""
        rows = mx.arange(tokens.shape[0])
        window = mx.maximum(self._window, 1)
        slot = self._num_tokens % window
        leaving = self._ring[rows, slot]
        is_windowed = self._window > 0
        from_context = is_windowed & (self._num_tokens >= window)
        from_output = is_windowed & (self._num_drawn >= window)
        self._context = self._context.at[rows, leaving].add(-from_context.astype(mx.int32))
        self._output = self._output.at[rows, leaving].add(-from_output.astype(mx.int32))
        self._context = self._context.at[rows, tokens].add(1)
        self._output = self._output.at[rows, tokens].add(1)
        self._ring[rows, slot] = tokens.astype(mx.int32)
        self._num_tokens = self._num_tokens + 1
        self._num_drawn = self._num_drawn + 1


def _gumbel(ids: mx.array, key: mx.array, position: mx.array) -> mx.array:
    """Gumbel noise `[B, V]` of token ids `[1, V]`, row keys `[B, 1]`, row positions `[B, 1]`."""
    return -mx.log(-mx.log(_uniform(_hash(_hash(_hash(position) ^ key) + ids))))


def _uniform(bits: mx.array) -> mx.array:
    """The upper 23 bits as a number in (0, 1), at the middle of its interval: float32 has it."""
    return (bits >> 9).astype(mx.float32) * 2.0**-23 + 2.0**-24


def _hash(x: mx.array) -> mx.array:
    """A 32-bit permutation with little bias: «lowbias32», nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def _split_seed(seed: int) -> tuple[int, int]:
    """Two 32-bit words of a 64-bit seed, well mixed: SplitMix64's output function."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return z & _MASK_32, z >> 32
