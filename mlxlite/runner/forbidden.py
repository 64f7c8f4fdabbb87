"""Tokens that rows must not draw: all but those allowed, bad words, and their last tokens.

A word of several tokens forbids its last one where a row's output ends with the others. The ends of
the outputs stay on the device, so no drawn token is waited for. Must never loop over rows or words
while tokens are drawn.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxlite.engine.sampling_params import SamplingParams

_NO_TOKEN = -2  # before the first of an output
_ANY = -1  # before the first of a word


@dataclass(frozen=True, slots=True)
class _Row:
    """A row with a rule: where its scores are, and its last output tokens `[H]` if they matter."""

    params: SamplingParams
    place: int

    @property
    def words(self) -> list[tuple[int, ...]]:
        return [word for word in self.params.bad_words if len(word) > 1]


class Forbidden:
    """The rules of all rows of a batch, which changes only through `regroup`."""

    def __init__(self, num_vocab: int) -> None:
        self._num_vocab = num_vocab
        self._worded: list[int] = []  # indices of the rows with words of several tokens
        self._tails: mx.array | None = None  # [b, H]: their last output tokens
        self._ceilings: tuple[mx.array, mx.array] | None = None  # places [r], scores [r, V]

    def regroup(
        self,
        kept: SequenceOf[int],
        rows: SequenceOf[SamplingParams],
        outputs: SequenceOf[tuple[int, ...]],
        places: SequenceOf[int],
    ) -> None:
        """The rows at `kept` come first; `outputs` are the tokens that each joining row has drawn.

        `places` are the rows of the scores that they will be applied to.
        """
        stay = [offset for offset, i in enumerate(self._worded) if i in set(kept)]
        made = [_Row(*pair) for pair in zip(rows, places, strict=True)]
        self._worded = [i for i, row in enumerate(made) if row.words]
        worded = [made[i] for i in self._worded]
        width = max((len(word) - 1 for row in worded for word in row.words), default=0)
        joining = [_tail(outputs[i - len(kept)], width) for i in self._worded if i >= len(kept)]
        self._set_tails(stay, joining, width)
        self._set_words(worded, width)
        self._set_ceilings([row for row in made if _is_limited(row.params)])

    def _set_tails(self, stay: list[int], joining: list[list[int]], width: int) -> None:
        parts = [mx.array(joining, mx.int32)] if joining else []
        if stay and self._tails is not None:
            tails = self._tails[mx.array(stay)][:, -width:]
            pad = width - tails.shape[1]
            parts.insert(0, mx.pad(tails, [(0, 0), (pad, 0)], constant_values=_NO_TOKEN))
        self._tails = mx.concatenate(parts) if parts else None
        self._rows = mx.array(self._worded, mx.int32)

    def _set_words(self, worded: list[_Row], width: int) -> None:
        words = [(r, row.place, word) for r, row in enumerate(worded) for word in row.words]
        heads = [[_ANY] * (width + 1 - len(word)) + list(word[:-1]) for _, _, word in words]
        self._heads = mx.array(heads or [[_ANY]], mx.int32)  # [w, H]
        self._owners = mx.array([r for r, _, _ in words], mx.int32)
        self._ends = tuple(
            mx.array(numbers, mx.int32)
            for numbers in ([p for _, p, _ in words], [word[-1] for _, _, word in words])
        )

    def _set_ceilings(self, limited: list[_Row]) -> None:
        self._ceilings = None
        if not limited:
            return
        ceilings = np.full((len(limited), self._num_vocab), np.inf, np.float32)
        for ceiling, row in zip(ceilings, limited, strict=True):
            if allowed := row.params.allowed_token_ids:
                ceiling[:] = -np.inf
                ceiling[list(allowed)] = np.inf
            ceiling[[word[0] for word in row.params.bad_words if len(word) == 1]] = -np.inf
        places = mx.array([row.place for row in limited], mx.int32)
        self._ceilings = places, mx.array(ceilings)

    def apply(self, scores: mx.array) -> mx.array:
        """Scores `[B, V]`, minus infinity for what is forbidden; others are as they were."""
        if self._ceilings is not None:
            places, ceilings = self._ceilings
            scores = scores.at[places].minimum(ceilings.astype(scores.dtype))
        if self._tails is not None:
            tails = self._tails[self._owners]
            is_met = mx.all((self._heads == _ANY) | (self._heads == tails), axis=-1)
            limits = mx.where(is_met, -mx.inf, mx.inf).astype(scores.dtype)
            scores = scores.at[self._ends].minimum(limits)
        return scores

    def add(self, tokens: mx.array) -> None:
        """Add the drawn tokens `[B]` to the outputs."""
        if self._tails is not None:
            drawn = tokens[self._rows][:, None].astype(mx.int32)
            self._tails = mx.concatenate([self._tails[:, 1:], drawn], axis=1)


def _is_limited(params: SamplingParams) -> bool:
    return bool(params.allowed_token_ids) or any(len(word) == 1 for word in params.bad_words)


def _tail(output: tuple[int, ...], width: int) -> list[int]:
    tail = list(output[-width:]) if width else []
    return [_NO_TOKEN] * (width - len(tail)) + tail
