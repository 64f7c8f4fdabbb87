"""The memory of a device: what a model may take of it, and the limits that MLX is given.

Arithmetic over MLX's functions (`Device`), before and after a model is loaded. On Apple's GPUs
only the weights are wired: caches come and go, and wired memory that churns has stopped whole
systems (ml-explore/mlx#3186). The pool of freed buffers has a limit of its own there, because its
default is all of the memory.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from mlxlite.models.interface import LoadError

_MAX_POOL: Final = 2 << 30  # bytes of freed buffers
_MAX_WORK: Final = 2 << 30  # bytes of intermediate results


class Device(Protocol):
    """`mlx.core`, as far as its memory is concerned; sizes in bytes."""

    def device_info(self) -> Mapping[str, Any]: ...
    def get_active_memory(self) -> int: ...
    def clear_cache(self) -> Any: ...
    def set_wired_limit(self, limit: int, /) -> int: ...
    def set_cache_limit(self, limit: int, /) -> int: ...
    def set_memory_limit(self, limit: int, /) -> int: ...


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that sequences may hold, and those for the intermediate results of a step."""

    sequences: int
    work: int


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """The memory of one device. `wanted` and `wired` are the operator's limits, None: not set."""

    device: Device
    wanted: int | None = None
    wired: int | None = None

    @property
    def is_gpu(self) -> bool:
        info = self.device.device_info()
        return _METAL in info or _CUDA in info

    @property
    def limit(self) -> int:
        """Bytes for weights, caches and work: as given, else what the device recommends.

        Of a CUDA device nine tenths of what is free, of a CPU 70 % of the RAM.
        """
        if self.wanted is not None:
            return self.wanted
        info = self.device.device_info()
        if _METAL in info:
            return int(info[_METAL])
        if _CUDA in info:
            return int(info.get("free_memory") or info[_CUDA]) * 9 // 10
        return ram_bytes() * 7 // 10

    def check_weights(self, files: Iterable[Path]) -> None:
        """Raises LoadError where the files of the weights leave no memory: before any is read.

        Loading more than there is makes a system swap until it stands still.
        """
        num_bytes = sum(file.stat().st_size for file in files)
        if num_bytes >= self.limit:
            raise LoadError(_insufficient(num_bytes, self.limit))

    def budget(self, num_layers: int, most_pictures: int = 0) -> Budget:
        """The budget beside the loaded weights, and MLX's limits set by it. Raises LoadError.

        The limit pays for the weights, a tenth (at most 2 GiB) for intermediate results, a
        twentieth (at most `most_pictures`) for a vision network's features, the pool of freed
        buffers, and what sequences hold with the copy of a layer's cache when a row joins.
        """
        limit = self.limit
        self.device.clear_cache()
        weights = self.device.get_active_memory()
        pool = self._limit_pool(limit)
        if self.is_gpu:
            self.device.set_memory_limit(limit)
            self._wire(weights)
        work = min(limit // 10, _MAX_WORK)
        rest = limit - weights - pictures_share(limit, most_pictures) - work - pool
        sequences = rest * num_layers // (num_layers + 1)
        if sequences <= 0:
            raise LoadError(_insufficient(weights, limit))
        return Budget(sequences, work)

    def _limit_pool(self, limit: int) -> int:
        """Limit the pool of freed buffers; the bytes that the budget pays for it."""
        if not self.is_gpu:  # MLX's own limit is 32 MB
            if self.wanted is None:
                return 0
            pool = limit // 20
        else:
            pool = min(ram_bytes() // 20, limit // 20, _MAX_POOL)
        self.device.set_cache_limit(pool)
        return pool

    def _wire(self, weights: int) -> None:
        info = self.device.device_info()
        if _METAL in info:  # elsewhere there is nothing to wire
            most = int(info[_METAL])
            self.device.set_wired_limit(min(most, weights if self.wired is None else self.wired))


_METAL: Final = "max_recommended_working_set_size"
_CUDA: Final = "total_memory"


def pictures_share(limit: int, most: int) -> int:
    """Bytes for the features of images that a vision network keeps."""
    return min(most, limit // 20)


def ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _insufficient(weights: int, limit: int) -> str:
    return (
        f"insufficient memory: the weights take {weights / 1e9:.2f} GB of a limit of "
        f"{limit / 1e9:.2f} GB; choose a smaller model or a larger --memory-limit"
    )
