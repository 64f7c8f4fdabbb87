"""Random numbers of rows: a hash of (seed, number of tokens drawn before), and nothing else.

There is no generator state that a preemption could lose or another row could advance: a row draws
the same alone and in a batch. Numbers that need no logits are computed on the host, some draws
ahead. Must never use MLX's or numpy's generators.
"""

from collections.abc import Sequence as SequenceOf

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_MASK_32 = 0xFFFFFFFF
_NUM_AHEAD = 32  # draws that are hashed at a time: numpy's cost per call is that of about as many
_Hashes = npt.NDArray[np.uint32]
_Numbers = npt.NDArray[np.float32]


class RowRandom:
    """One 32-bit hash for each row and draw.

    `seeds` have 64 bits; `positions` are the numbers of tokens that the rows have drawn. Different
    streams of one seed are independent.
    """

    def __init__(self, seeds: SequenceOf[int], positions: SequenceOf[int], stream: int) -> None:
        keys = [split_seed(seed) for seed in seeds]
        starts = [key[1] + position for key, position in zip(keys, positions, strict=True)]
        self._position = np.array([[start & _MASK_32] for start in starts], np.uint32)
        self._key = np.array([[key[0] ^ stream] for key in keys], np.uint32)
        self._start = -_NUM_AHEAD
        self._hashes: list[_Hashes] = []
        self._numbers: list[_Numbers] = []

    def hashes(self, step: int) -> _Hashes:
        """`[b, 1]`, `step` draws after `positions`."""
        self._look_ahead(step)
        return self._hashes[step % _NUM_AHEAD]

    def numbers(self, step: int) -> _Numbers:
        """The same as numbers in (0, 1): the upper 23 bits, at the middle of their interval."""
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
def negative_gumbel(x: mx.array) -> mx.array:
    """Gumbel noise from 32-bit words `[b, V]`, to subtract from scores: the best is a draw."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    x = x ^ (x >> 16)
    return mx.log(-mx.log((x >> 9).astype(mx.float32) * 2.0**-23 + 2.0**-24))


def _hash(x: _Hashes) -> _Hashes:
    """A 32-bit permutation with little bias: «lowbias32», nullprogram.com/blog/2018/07/31."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def split_seed(seed: int) -> tuple[int, int]:
    """Two 32-bit words of a 64-bit seed, well mixed: SplitMix64's output function."""
    z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    z ^= z >> 31
    return z & _MASK_32, z >> 32
