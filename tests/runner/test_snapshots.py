"""Payloads in files: every type of number, and states that no file can hold."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from helpers import run, until

from mlxlite.prefix_cache.disk import Store, decode, encode
from mlxlite.prefix_cache.operations import Stored
from mlxlite.runner.snapshots import CacheSnapshot, Snapshots, _file_of, _snapshot_of

DTYPES = [value for value in vars(mx).values() if isinstance(value, mx.Dtype)]
STORED = Stored(scope=0, start=0, position=None, words=bytes(8))


def snapshot(*leaves: Any) -> CacheSnapshot:
    return CacheSnapshot(0, [list(leaves)], [])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_of_number_comes_back_from_a_file_as_it_was(dtype: mx.Dtype) -> None:
    with mx.stream(mx.cpu):
        array = mx.arange(8).astype(dtype).reshape(1, 2, 2, 2)
        mx.eval(array)
        file = decode(b"".join(encode(_file_of(STORED, snapshot(array)))))
        back = _snapshot_of(file)
        assert back is not None
        (found,) = back.arrays()
        assert (found.dtype, found.shape) == (dtype, array.shape)
        assert mx.array_equal(found, array).item()


def test_a_state_that_no_file_can_hold_fails_its_own_write_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, "label", 1 << 30)
    failed: list[int] = []
    written: list[int] = []
    store.on_failed, store.on_written = failed.append, written.append
    snapshots = Snapshots(snapshot(mx.zeros((1, 1, 1, 1))), store)

    class Unreadable(CacheSnapshot):
        def leaves(self) -> dict[str, Any]:
            raise AttributeError("property 'state' has no setter")

    good = snapshot(mx.ones((1, 1, 1, 1)))
    snapshots.write([(1, STORED, Unreadable(0, [], [])), (2, STORED, good)])

    async def both() -> None:
        await until(lambda: failed and written)

    run(both())
    assert (failed, written) == ([1], [2])
