"""What joining and leaving a batch of padded rows moves."""

import mlx.core as mx
import pytest

from mlxlite.runner.padded_kv import PaddedKV

HEADS, WIDTH, LONG, SHORT = 4, 64, 4096, 256
TOKEN_BYTES = 2 * HEADS * WIDTH * 4


def batch_of(*lengths: int) -> PaddedKV:
    longest = max(lengths)
    batch = PaddedKV([longest - length for length in lengths])
    shape = (len(lengths), HEADS, longest, WIDTH)
    batch.update_and_fetch(mx.ones(shape), mx.ones(shape))
    mx.eval(batch.keys, batch.values)
    return batch


@pytest.mark.parametrize("num_short", [1, 7])
def test_a_long_row_that_leaves_moves_only_what_the_others_keep(num_short: int) -> None:
    with mx.stream(mx.cpu):
        batch = batch_of(LONG, *[SHORT] * num_short)
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        batch.filter(mx.array(list(range(1, 1 + num_short))))
        mx.eval(batch.keys, batch.values)
        moved = mx.get_peak_memory() - held
    room = PaddedKV.step  # behind the rows
    assert batch.keys.shape == (num_short, HEADS, batch.keys.shape[2], WIDTH)
    assert moved <= num_short * (SHORT + 2 * room) * TOKEN_BYTES
