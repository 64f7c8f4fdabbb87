"""Repetition, presence and frequency penalties: counts of each row's tokens on the device.

A table `[b, V]` for the prompts and one for the outputs, updated by each drawn token without its
leaving the device. Must never loop over rows while tokens are drawn.
"""

from collections.abc import Sequence as SequenceOf

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlite.engine.sampling_params import SamplingParams

_Integers = npt.NDArray[np.int32]


class PenaltyCounts:
    """How often each token occurs in each row's prompt and its output.

    Where a row has a window, only its last tokens count. The one that leaves it is found in a ring:
    the token at index j of prompt and output is in slot j modulo the window. It is one of the
    prompt as long as fewer tokens were drawn than the window holds.
    """

    def __init__(
        self,
        params: SequenceOf[SamplingParams],
        tokens: SequenceOf[tuple[int, ...]],
        num_drawn: SequenceOf[int],
        num_vocab: int,
    ) -> None:
        """`tokens` are each row's prompt and output, the last `num_drawn` of them its output."""
        windows = [row.repetition_context_size for row in params]
        prompt = np.zeros((len(windows), num_vocab), np.float32)
        output = np.zeros((len(windows), num_vocab), np.float32)
        ring = np.zeros((len(windows), max(1, *windows)), np.int32)
        for i, window in enumerate(windows):
            known = np.array(tokens[i], np.int64)
            num_seen = min(window or len(known), len(known))
            seen = known[len(known) - num_seen :]
            split = num_seen - min(num_seen, num_drawn[i])
            prompt[i] = np.bincount(seen[:split], minlength=num_vocab)[:num_vocab]
            output[i] = np.bincount(seen[split:], minlength=num_vocab)[:num_vocab]
            if window:
                ring[i, np.arange(len(known) - num_seen, len(known)) % window] = seen
        self._prompt, self._output, self._ring = map(mx.array, (prompt, output, ring))
        self._window: _Integers = np.array(windows, np.int32)
        self._num_tokens: _Integers = np.array(list(map(len, tokens)), np.int32)
        self._num_drawn: _Integers = np.array(num_drawn, np.int32)
        self._set_penalties(params)

    def keep(self, indices: list[int], params: SequenceOf[SamplingParams]) -> None:
        """Drop every row but those at `indices`, whose settings are `params`."""
        index = mx.array(indices)
        self._prompt, self._output = self._prompt[index], self._output[index]
        self._ring = self._ring[index]
        self._window, self._num_tokens = self._window[indices], self._num_tokens[indices]
        self._num_drawn = self._num_drawn[indices]
        self._set_penalties(params)

    def extend(self, other: "PenaltyCounts", params: SequenceOf[SamplingParams]) -> None:
        """Append the other's rows; `params` are the settings of all."""
        width = max(self._ring.shape[1], other._ring.shape[1])
        rings = [
            mx.pad(ring, [(0, 0), (0, width - ring.shape[1])]) for ring in (self._ring, other._ring)
        ]
        self._prompt = mx.concatenate([self._prompt, other._prompt])
        self._output = mx.concatenate([self._output, other._output])
        self._ring = mx.concatenate(rings)
        self._window = np.concatenate([self._window, other._window])
        self._num_tokens = np.concatenate([self._num_tokens, other._num_tokens])
        self._num_drawn = np.concatenate([self._num_drawn, other._num_drawn])
        self._set_penalties(params)

    def _set_penalties(self, params: SequenceOf[SamplingParams]) -> None:
        """Columns `[b, 1]`; None for a penalty that all rows have off."""
        self._repetition = _column([p.repetition_penalty for p in params], 1.0)
        self._presence = _column([p.presence_penalty for p in params], 0.0)
        self._frequency = _column([p.frequency_penalty for p in params], 0.0)
        self._rows = mx.arange(len(params))
        self._has_window = bool(self._window.any())
        # An array that is never read is never computed: its graph would grow with each change.
        if self._repetition is None:
            self._prompt = mx.zeros(self._prompt.shape)
        if not self._has_window:
            self._ring = mx.zeros((len(params), 1), mx.int32)

    def penalise(self, logits: mx.array) -> mx.array:
        """Float32 logits `[b, V]`, lowered by the rows' penalties."""
        if self._repetition is not None:
            harder = mx.where(logits > 0, logits / self._repetition, logits * self._repetition)
            logits = mx.where(self._prompt + self._output > 0, harder, logits)
        if self._frequency is not None:
            logits = logits - self._frequency * self._output
        if self._presence is not None:
            logits = logits - self._presence * mx.minimum(self._output, 1.0)
        return logits

    def add(self, tokens: mx.array) -> None:
        """Add the drawn tokens `[b]`, and subtract those that leave a window."""
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


def _column(values: list[float], off: float) -> mx.array | None:
    if all(value == off for value in values):
        return None
    return mx.array([[value] for value in values], mx.float32)
