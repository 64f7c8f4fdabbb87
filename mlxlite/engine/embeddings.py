"""Embeds texts on the same device thread as the rows that decode, in pieces between their steps.

Never more than `EMBED_TOKENS` in one call, and one call at a time: this bounds the delay of running
streams and the memory. The rest of a cancelled request is dropped.
"""

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

from mlxlite.engine.device_thread import DeviceThread
from mlxlite.engine.step import Part, Runner

EMBED_TOKENS = 512  # in one call, for which running streams wait


class Embedder:
    """Embeds on one device thread. Its method belongs to the loop thread."""

    def __init__(self, device_thread: DeviceThread, runner: Runner) -> None:
        self._device_thread = device_thread
        self._runner = runner
        self._num_embedded = 0  # calls, for ids
        self._embedding = asyncio.Lock()  # one call at a time

    async def embed(
        self,
        inputs: SequenceOf[tuple[int, ...]],
        *,
        is_mean: bool,
        is_wanted: Callable[[], bool],
    ) -> list[list[float]] | None:
        """A vector of length 1 for each input; None once `is_wanted()` is false.

        Done in pieces of at most `EMBED_TOKENS`, between which the rows that decode have their
        steps. Raises NotImplementedError for a model that cannot embed, and the runner's errors.
        """
        vectors: list[list[float]] = [[] for _ in inputs]
        for group in _like_lengths(inputs):
            batch = [inputs[i] for i in group]
            async with self._embedding:
                found = await self._embed(batch, is_mean=is_mean, is_wanted=is_wanted)
            if found is None:
                return None
            for i, vector in zip(group, found, strict=True):
                vectors[i] = vector
        return vectors

    async def _embed(
        self,
        batch: list[tuple[int, ...]],
        *,
        is_mean: bool,
        is_wanted: Callable[[], bool],
    ) -> list[list[float]] | None:
        """Embed a few inputs in one call, or a long one in parts."""
        self._num_embedded += 1
        tokens = batch[0]
        is_long = len(tokens) > EMBED_TOKENS
        found: list[list[float]] = []
        for start in range(0, len(tokens) if is_long else 1, EMBED_TOKENS):
            if not is_wanted():
                await self._device_thread.run(self._runner.drop_embedding, self._num_embedded)
                return None
            part = None
            if is_long:
                batch = [tokens[start : start + EMBED_TOKENS]]
                part = Part(self._num_embedded, start + EMBED_TOKENS >= len(tokens))
            call = partial(self._runner.embed, batch, is_mean=is_mean, part=part)
            found = await self._device_thread.run(call)
        return found


def _like_lengths(inputs: SequenceOf[tuple[int, ...]]) -> list[list[int]]:
    """Indices of inputs to embed in one call: at most EMBED_TOKENS, padded to the longest."""
    groups: list[list[int]] = []
    for i in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if groups and (len(groups[-1]) + 1) * len(inputs[i]) <= EMBED_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
