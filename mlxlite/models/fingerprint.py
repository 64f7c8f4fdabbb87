"""A fingerprint of a checkpoint's files, which changes when the network's weights change.

Covers config.json, the adapter's configuration, and each tensor's name, type, shape and a sample of
its bytes: all of a tensor of up to 32 KiB, and of a larger one 4 KiB at its beginning, at its end,
and at least every 256 KiB between. That is 2 to 4 % of a large checkpoint, and 30 ms/GB from the
page cache. Training, merging, quantising and exchanging change values all over a tensor, or its
shape. An edit between two pieces (a few rows of an embedding) is not seen: it needs another
--prefix-cache-dir. How tensors are spread over files, paths, dates and other files do not count.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PIECE = 4096  # bytes read at a time
_MAX_STRIDE = 256 << 10  # bytes between the beginnings of two pieces
_MIN_PIECES = 8  # of a tensor, or all of it


def fingerprint_of(path: Path, weights: Iterable[Path], adapter: Path | None) -> str:
    """16 hexadecimal digits for the model at `path`, its files of weights, and its adapter.

    Raises OSError, or ValueError for a file that is not safetensors.
    """
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=8)
    _add_tensors(digest, weights)
    if adapter is not None:
        digest.update((adapter / "adapter_config.json").read_bytes())
        _add_tensors(digest, [adapter / "adapters.safetensors"])
    return digest.hexdigest()


def pieces(num_bytes: int) -> Iterator[tuple[int, int]]:
    """The ranges `[start, stop)` that are sampled of a tensor of `num_bytes`; they may overlap."""
    last = max(num_bytes - _PIECE, 0)
    stride = min(max(num_bytes // _MIN_PIECES, _PIECE), _MAX_STRIDE)
    for start in (*range(0, last, stride), last):
        yield start, min(start + _PIECE, num_bytes)


def _add_tensors(digest: "hashlib.blake2b", files: Iterable[Path]) -> None:
    for tensor in sorted(tensor for file in files for tensor in _tensor_digests(file)):
        digest.update(tensor)


def _tensor_digests(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            first, end = (8 + header_size + offset for offset in tensor["data_offsets"])
            kind = f"{name} {tensor['dtype']} {tensor['shape']}\n"
            digest = hashlib.blake2b(kind.encode(), digest_size=16)
            for start, stop in pieces(end - first):
                digest.update(os.pread(file.fileno(), stop - start, first + start))
            yield digest.digest()
