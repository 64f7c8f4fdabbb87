"""The best tokens of logits, and the likelihoods of a prompt's tokens. On the device thread.

Values are natural-log probabilities in float32, whatever the logits' type. Of a chunk's logits
only the wanted numbers outlive its step; nothing here waits for the device but `read`.
"""

from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlite.engine.sequence import Logprobs, PromptLogprobs


def best(values: mx.array, num: int) -> tuple[mx.array, mx.array]:
    """Indices and values `[..., num]` of the largest of `[..., V]`, in order."""
    if num <= 1:  # partitions cost more, on a GPU as much as a sort
        ids = mx.argmax(values, axis=-1, keepdims=True)[..., :num]
        return ids, mx.take_along_axis(values, ids, axis=-1)
    start = values.shape[-1] - num
    ids = mx.argpartition(values, start, axis=-1)[..., start:]
    top = mx.take_along_axis(values, ids, axis=-1)
    order = mx.argsort(-top, axis=-1)
    return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(top, order, axis=-1)


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@dataclass(frozen=True, slots=True)
class ScoredChunk:
    """The likelihoods of a chunk's next tokens `[T]`, perhaps not computed yet.

    `drawn` and `ranks` are `[T]`, `top_ids` and `top` `[T, K]`; `start` is the index of the first
    of these tokens in the prompt.
    """

    id: int
    start: int
    tokens: npt.NDArray[np.uint32]
    drawn: mx.array
    ranks: mx.array
    top_ids: mx.array
    top: mx.array

    @classmethod
    def of(
        cls, id: int, start: int, tokens: npt.NDArray[np.uint32], logits: mx.array, num_top: int
    ) -> "ScoredChunk":
        """Of the logits `[T, V]` of the places before `tokens`."""
        values = log_softmax(logits)
        drawn = mx.take_along_axis(values, mx.array(tokens)[:, None], axis=-1)
        ranks = mx.sum(values >= drawn, axis=-1)
        return cls(id, start, tokens, drawn[:, 0], ranks, *best(values, num_top))

    def arrays(self) -> list[mx.array]:
        return [self.drawn, self.ranks, self.top_ids, self.top]

    def read(self) -> PromptLogprobs:
        """Waits for the device: one transfer an array."""
        drawn = cast("list[float]", self.drawn.tolist())
        ranks = cast("list[int]", self.ranks.tolist())
        ids = cast("list[list[int]]", self.top_ids.tolist())
        values = cast("list[list[float]]", self.top.tolist())
        tops = [tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
        items = map(Logprobs, drawn, tops, ranks)
        return PromptLogprobs(self.start, tuple(zip(self.tokens.tolist(), items, strict=True)))
