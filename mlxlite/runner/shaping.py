"""Temperatures and cuts that depend on a whole distribution: top_n_sigma, dynatemp, typical_p.

Rows that have one of them off keep their scores bit for bit, beside rows that have it. A stage that
no row has is left out.
"""

from collections.abc import Sequence as SequenceOf

import mlx.core as mx

from mlxlite.engine.sampling_params import SamplingParams

_LEAST_TEMPERATURE = 1e-3  # of a range that reaches down to 0


class Shaping:
    """Scores `[b, V]` to those at each row's temperature, without what it cuts."""

    def __init__(self, rows: SequenceOf[SamplingParams]) -> None:
        sigmas = [p.top_n_sigma if p.top_n_sigma > 0.0 else float("inf") for p in rows]
        self._sigma = _column(sigmas) if min(sigmas) < float("inf") else None
        self._temperature = _column([p.temperature for p in rows])
        self._lowest: mx.array | None = None
        if any(p.dynatemp_range for p in rows):
            lowest = [p.temperature - p.dynatemp_range for p in rows]
            self._lowest = _column([max(0.0, t) for t in lowest])
            self._width = _column([p.temperature + p.dynatemp_range for p in rows]) - self._lowest
            self._exponent = _column([p.dynatemp_exponent for p in rows])
        typical = [p.typical_p if p.typical_p < 1.0 else float("inf") for p in rows]
        self._typical = _column(typical) if min(typical) < float("inf") else None

    def __call__(self, scores: mx.array) -> mx.array:
        scores = scores.astype(mx.float32)
        if self._sigma is not None:
            scores = _within_sigma(scores, self._sigma)
        scores = scores / self._temperatures(scores)
        return scores if self._typical is None else _typical(scores, self._typical)

    def _temperatures(self, scores: mx.array) -> mx.array:
        """`[b, 1]`: the higher the less certain the tokens are, within each row's range."""
        if self._lowest is None:
            return self._temperature
        num_possible = mx.sum(scores > -mx.inf, axis=-1, keepdims=True)
        most = mx.log(mx.maximum(num_possible, 2).astype(mx.float32))
        share = mx.minimum(_entropy(mx.softmax(scores, axis=-1)) / most, 1.0)
        range_ = self._width * mx.power(share, self._exponent)
        hot = mx.maximum(self._lowest + range_, _LEAST_TEMPERATURE)
        return mx.where(self._width > 0.0, hot, self._temperature)


def _within_sigma(scores: mx.array, sigma: mx.array) -> mx.array:
    """Without those more than so many standard deviations below the best."""
    is_possible = scores > -mx.inf
    num = mx.sum(is_possible, axis=-1, keepdims=True)
    mean = mx.sum(mx.where(is_possible, scores, 0.0), axis=-1, keepdims=True) / num
    square = mx.where(is_possible, mx.square(scores - mean), 0.0)
    deviation = mx.sqrt(mx.sum(square, axis=-1, keepdims=True) / num)
    floor = mx.max(scores, axis=-1, keepdims=True) - sigma * deviation
    floor = mx.where(sigma < mx.inf, floor, -mx.inf)
    return mx.where(scores < floor, -mx.inf, scores)


def _typical(scores: mx.array, limit: mx.array) -> mx.array:
    """Without the tokens whose surprise is farthest from the expected one."""
    shares = mx.softmax(scores, axis=-1)
    distance = mx.abs(mx.log(shares) + _entropy(shares))
    order = mx.argsort(distance, axis=-1)
    before = mx.cumsum(mx.take_along_axis(shares, order, axis=-1), axis=-1, inclusive=False)
    ranked = mx.take_along_axis(distance, order, axis=-1)
    farthest = mx.max(mx.where(before <= limit, ranked, 0.0), axis=-1, keepdims=True)
    is_kept = (distance <= farthest) | (limit == mx.inf)
    return mx.where(is_kept, scores, -mx.inf)


def _entropy(shares: mx.array) -> mx.array:
    """In nats, `[b, 1]`."""
    terms = mx.where(shares > 0.0, shares * mx.log(shares), 0.0)
    return -mx.sum(terms, axis=-1, keepdims=True)


def _column(values: list[float]) -> mx.array:
    return mx.array([[value] for value in values], mx.float32)
