"""Embeddings: one vector an input, from the last layer's states. Runs on the device thread.

Inputs of like length run in one pass, padded on the right, which causal layers do not see; a long
input runs in parts with a cache of its own. No part of it touches the decode batch.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import cast

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlite.engine.step import Part
from mlxlite.runner.kv_cache import Cache


class Embedder:
    """`unfinished` has the cache and the sum of states of each long input that is half done."""

    def __init__(self, model: nn.Module, new_cache: Callable[[], Cache]) -> None:
        self._model = model
        self._new_cache = new_cache
        self.unfinished: dict[int, tuple[Cache | None, mx.array]] = {}

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None
    ) -> list[list[float]]:
        """See `Runner.embed`."""
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
            begun = self.unfinished.pop(part.id, None)
            cache, total = begun or (self._new_cache(), total)
        hidden = states(mx.array(padded), cache=cache).astype(mx.float32)  # [B, T, D]
        if is_mean:
            is_token = mx.arange(longest)[None] < lengths
            pooled = total + mx.sum(mx.where(is_token[..., None], hidden, 0.0), axis=1)
        else:
            pooled = mx.take_along_axis(hidden, lengths[..., None] - 1, axis=1)[:, 0]
        if part is not None and not part.is_last:
            mx.eval(pooled, [layer.state for layer in cache or ()])
            self.unfinished[part.id] = cache, pooled
            return []
        norm = mx.sqrt(mx.sum(pooled * pooled, axis=-1, keepdims=True))
        return cast("list[list[float]]", (pooled / mx.maximum(norm, 1e-12)).tolist())


def _states_of(model: nn.Module) -> Callable[..., mx.array] | None:
    """The part of a model that gives the last layer's states, as mlx-lm's models call it."""
    if (states := getattr(model, "states", None)) is not None:
        return cast("Callable[..., mx.array]", states)
    inner = getattr(model, "language_model", model)
    for name in ("model", "backbone", "transformer"):
        if isinstance(found := getattr(inner, name, None), nn.Module):
            return cast("Callable[..., mx.array]", found)
    return None
