"""The memory budget: its arithmetic, and the limits of MLX, on a fake of its functions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mlxlite.models.interface import LoadError
from mlxlite.models.memory import DeviceMemory, ram_bytes

GB = 10**9
METAL = {"max_recommended_working_set_size": 48 * GB, "memory_size": 64 * GB}
CUDA = {"total_memory": 80 * GB, "free_memory": 60 * GB}


class FakeDevice:
    """MLX's memory functions: what they were called with, in order."""

    def __init__(self, info: Mapping[str, Any], active: int = 0) -> None:
        self._info, self._active = info, active
        self.calls: list[tuple[str, int]] = []

    def device_info(self) -> Mapping[str, Any]:
        return self._info

    def get_active_memory(self) -> int:
        return self._active

    def clear_cache(self) -> None:
        self.calls.append(("clear", 0))

    def _set(self, name: str, limit: int) -> int:
        self.calls.append((name, limit))
        return 0

    def set_wired_limit(self, limit: int, /) -> int:
        return self._set("wired", limit)

    def set_cache_limit(self, limit: int, /) -> int:
        return self._set("pool", limit)

    def set_memory_limit(self, limit: int, /) -> int:
        return self._set("memory", limit)


@pytest.mark.parametrize(
    ("info", "limit"),
    [
        (METAL, 48 * GB),
        (CUDA, 54 * GB),
        ({"total_memory": 80 * GB}, 72 * GB),
        ({"device_name": "a CPU"}, ram_bytes() * 7 // 10),
    ],
)
def test_the_limit_is_what_the_device_recommends_unless_it_is_given(
    info: Mapping[str, Any], limit: int
) -> None:
    assert DeviceMemory(FakeDevice(info)).limit == limit
    assert DeviceMemory(FakeDevice(info), wanted=7).limit == 7


@pytest.mark.parametrize(
    ("active", "wired", "expected"),
    [
        (5 * GB, None, 5 * GB),  # the weights, and nothing that comes and goes
        (5 * GB, 0, 0),
        (5 * GB, 20 * GB, 20 * GB),
        (5 * GB, 90 * GB, 48 * GB),  # more than the system allows is an error of MLX
    ],
)
def test_on_metal_the_weights_are_wired_and_the_pool_and_the_total_limited(
    active: int, wired: int | None, expected: int
) -> None:
    device = FakeDevice(METAL, active)
    DeviceMemory(device, wired=wired).budget(num_layers=32)
    pool = min(ram_bytes() // 20, 48 * GB // 20, 2 << 30)
    assert device.calls == [
        ("clear", 0),
        ("pool", pool),
        ("memory", 48 * GB),
        ("wired", expected),
    ]


def test_on_cuda_nothing_is_wired() -> None:
    device = FakeDevice(CUDA, 5 * GB)
    DeviceMemory(device).budget(num_layers=32)
    assert [name for name, _ in device.calls] == ["clear", "pool", "memory"]


def test_on_a_cpu_the_pool_is_limited_only_with_a_limit() -> None:
    device = FakeDevice({}, GB)
    DeviceMemory(device).budget(num_layers=2)
    assert device.calls == [("clear", 0)]
    DeviceMemory(device, wanted=4 * GB).budget(num_layers=2)
    assert device.calls[1:] == [("clear", 0), ("pool", 4 * GB // 20)]


def test_the_budget_is_what_weights_pictures_work_and_the_pool_leave() -> None:
    budget = DeviceMemory(FakeDevice({}, GB), wanted=10 * GB).budget(9, most_pictures=GB // 4)
    assert budget.work == GB
    rest = 10 * GB - GB - GB // 4 - GB - GB // 2
    assert budget.sequences == rest * 9 // 10  # and the copy of one layer of ten
    assert DeviceMemory(FakeDevice({}), wanted=10**12).budget(1).work == 2 << 30


def test_weights_that_leave_nothing_are_an_error() -> None:
    with pytest.raises(LoadError, match=r"weights take 8\.90 GB of a limit of 10\.00 GB"):
        DeviceMemory(FakeDevice({}, 8_900_000_000), wanted=10 * GB).budget(32)


def test_files_larger_than_the_memory_are_an_error_before_any_is_read(tmp_path: Path) -> None:
    files = [tmp_path / f"model-{i}.safetensors" for i in range(3)]
    for file in files:
        with file.open("wb") as out:
            out.truncate(4 * GB)  # sparse
    memory = DeviceMemory(FakeDevice({}), wanted=10 * GB)
    memory.check_weights(files[:2])
    with pytest.raises(LoadError, match=r"weights take 12\.00 GB of a limit of 10\.00 GB"):
        memory.check_weights(files)
