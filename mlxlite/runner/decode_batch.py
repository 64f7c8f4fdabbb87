"""The rows that decode together: their caches, next tokens, sampler and grammars.

The rows are exactly those of the last step launched, in its order. Rows cost Python only when they
join or leave, or where a grammar constrains them; a step without constrained rows never waits for
the device. A grammar that fails fails its own sequence, whose row leaves with a later step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlite.engine.sequence import Logprobs, Matcher
from mlxlite.runner.prefill import Failure, Row
from mlxlite.runner.row_batch import BatchCache
from mlxlite.runner.sampler import LogprobArrays, Sampler
from mlxlite.runner.snapshots import HeldCache

_ALL_ALLOWED = 0xFFFFFFFF


@dataclass(slots=True)
class Drawn:
    """The tokens `[B]` of one step's rows, perhaps not computed yet."""

    ids: tuple[int, ...]
    tokens: mx.array
    logprobs: LogprobArrays | None
    is_matched: bool = False  # the matchers have accepted them

    def arrays(self) -> list[mx.array]:
        logprobs = self.logprobs
        if logprobs is None:
            return [self.tokens]
        return [self.tokens, logprobs.drawn, logprobs.top_ids, logprobs.top]

    def token_list(self) -> list[int]:
        """Waits for the device."""
        return cast("list[int]", self.tokens.tolist())

    def logprobs_by_id(self) -> dict[int, Logprobs]:
        """For the rows that asked: one transfer an array, whatever their number."""
        if (arrays := self.logprobs) is None:
            return {}
        drawn = cast("list[float]", arrays.drawn.tolist())
        top_ids = cast("list[list[int]]", arrays.top_ids.tolist())
        top = cast("list[list[float]]", arrays.top.tolist())
        tops = [
            tuple(zip(row_ids[:num], row[:num], strict=True))
            for num, row_ids, row in zip(arrays.num_top, top_ids, top, strict=True)
        ]
        rows = [Logprobs(*pair) for pair in zip(drawn, tops, strict=True)]
        return {self.ids[row]: logprobs for row, logprobs in zip(arrays.rows, rows, strict=True)}


class DecodeBatch:
    """`ids` are the rows' sequences, in row order; `matchers` those of the constrained ones."""

    def __init__(self, model: nn.Module, num_vocab: int, *, can_merge: bool = True) -> None:
        self._model = model
        self._num_vocab = num_vocab
        self._has_deltas = bool(getattr(model, "has_positions", False))
        self.ids: tuple[int, ...] = ()
        self.matchers: dict[int, Matcher] = {}
        self._cache = BatchCache(can_merge=can_merge)
        self._sampler = Sampler(num_vocab)
        self._tokens: mx.array | None = None  # [B]: each row's next input
        self._deltas: mx.array | None = None  # [B]: what rows add to their positions

    def held(self, id: int) -> HeldCache | None:
        """Where a sequence's keys and values are; None if it has no row."""
        return self._cache.held(self.ids.index(id)) if id in self.ids else None

    # --- rows join and leave ----------------------------------------------------------------

    def regroup(self, ids: tuple[int, ...], joining: list[Row], failed: list[Failure]) -> None:
        """Make the rows those of `ids`: drop the others, and append `joining`."""
        wanted = set(ids)
        keep = [i for i, id in enumerate(self.ids) if id in wanted]
        if len(keep) < len(self.ids):
            self._cache.keep(keep)
        self._cache.join([row.cache for row in joining])
        self._sampler.regroup(keep, [row.sampler_row() for row in joining])
        for id in self.ids:
            if id not in wanted:
                self.matchers.pop(id, None)
        for row in joining:
            self._attempt(row.id, partial(self._join_matcher, row), failed)
        self.ids = (*(self.ids[i] for i in keep), *(row.id for row in joining))
        assert self.ids == ids
        inputs = [mx.array(row.tokens[-1:]) for row in joining]
        self._tokens = _regrouped(self._tokens, keep, inputs)
        if self._has_deltas:
            zero = mx.zeros(1, mx.int32)
            deltas = [zero if row.images is None else row.images.delta for row in joining]
            self._deltas = _regrouped(self._deltas, keep, cast("list[mx.array]", deltas))

    def _join_matcher(self, row: Row) -> None:
        """A constrained row continues after the tokens that it drew before a preemption."""
        if (grammar := row.admission.sequence.prompt.grammar) is not None:
            matcher = grammar.matcher()
            matcher.accept(row.admission.outputs)
            self.matchers[row.id] = matcher

    def _attempt(self, id: int, call: Callable[[], str | None], failed: list[Failure]) -> bool:
        """Call a grammar's code. Where it raises, or returns an error, its sequence fails."""
        try:
            fault = call()
        except BaseException as error:  # a Rust panic is no Exception; signals go to other threads
            fault = type(error).__name__  # its message may quote the answer
        if fault is not None:
            self.matchers.pop(id, None)
            failed.append((id, f"the grammar failed: {fault}"))
        return fault is None

    # --- a token a row ----------------------------------------------------------------------

    def decode(
        self, last: Drawn | None, prefilled: list[Any], failed: list[Failure]
    ) -> Drawn | None:
        """One token a row, as a graph; None without rows.

        `last` is the step in flight, and `prefilled` what the same step's chunks have written.
        """
        if self._tokens is None:
            return None
        logits = self._cache.forward(self._model, self._tokens, self._deltas)
        masks = self._masks(logits, last, prefilled, failed) if self.matchers else None
        self._tokens, logprobs = self._sampler(logits, masks)
        return Drawn(self.ids, self._tokens, logprobs)

    def _masks(
        self, logits: mx.array, last: Drawn | None, prefilled: list[Any], failed: list[Failure]
    ) -> mx.array:
        """What each row may draw `[B, V/32]`: everything, where it is not constrained.

        A constrained row needs its last token on the host before its next one is drawn, but not
        before the forward pass: the device computes that while the masks are made.
        """
        mx.async_eval(logits, prefilled)
        if last is not None:
            self.match(last, last.token_list(), failed)
        masks = np.full((len(self.ids), (self._num_vocab + 31) // 32), _ALL_ALLOWED, np.uint32)
        for row, id in enumerate(self.ids):
            matcher = self.matchers.get(id)
            if matcher and not self._attempt(id, partial(_fill, matcher, masks[row]), failed):
                masks[row] = _ALL_ALLOWED
        return mx.array(masks)

    def match(self, drawn: Drawn, tokens: list[int], failed: list[Failure]) -> None:
        """Every matcher accepts its row's token, once."""
        if drawn.is_matched or not self.matchers:
            return
        drawn.is_matched = True
        for id, token in zip(drawn.ids, tokens, strict=True):
            if (matcher := self.matchers.get(id)) is not None:
                self._attempt(id, partial(matcher.accept, (token,)), failed)


def _regrouped(held: mx.array | None, keep: list[int], new: list[mx.array]) -> mx.array | None:
    """The elements of `held` at `keep`, and then those of `new`; None for no rows."""
    parts = new if held is None or not keep else [held[mx.array(keep)], *new]
    return mx.concatenate(parts) if parts else None


def _fill(matcher: Matcher, mask: Any) -> str | None:
    matcher.fill(mask)
    return matcher.error
