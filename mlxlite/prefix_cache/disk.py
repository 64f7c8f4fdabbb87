"""The prefix cache's files: one per payload, written and read in the background, always verified.

The index decides which payloads are written, read and removed; one thread executes this in order,
so that neither the event loop nor the device thread waits for a disk. It must never hold more than
`MAX_PENDING_BYTES` beside one payload, never grow the directory past its cap, and never return a
file that differs by a byte from what was written.

A file is in safetensors format and self-contained: all tokens up to its payload's end, a
description of the payload, and checksums of everything. A rename makes it visible, complete: a
killed process leaves at most a `.tmp`, which the next one removes. Each model (weights, adapter,
cache bits, version of mlx-lm) has a directory of its own; files of other models are removed first.

Arrays are written from, and sliced out of, existing buffers. The safetensors package copies them in
calls that hold the interpreter's lock, 0.5 ms a MiB, during which no token is sent. No MLX object
is used here: those belong to the device thread.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import stat
import threading
import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import orjson

from mlxlite.prefix_cache.operations import Stored

log = logging.getLogger("mlxlite.prefix_cache.disk")

MAX_PENDING_BYTES = 256 << 20  # waiting to be written, beside one payload of any size
_FORMAT = "mlxlite-prefix/2"
_MAX_HEADER_BYTES = 16 << 20
# Never through a link, and not waiting for the reader of a pipe.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
_NAME = re.compile(r"([1-9][0-9]{0,14})\.safetensors")


# --- the format -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Array:
    """An array's bytes in row-major order; `dtype` is safetensors' name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class File:
    """A payload: its arrays, and its other values as JSON, by name."""

    stored: Stored
    arrays: Mapping[str, Array]
    values: Mapping[str, Any] = field(default_factory=dict)


class BrokenFile(ValueError):
    """The file was changed, or not written by this server; the message names the defect."""


def encode(file: File) -> list[bytes | memoryview]:
    """A payload as the pieces of a safetensors file."""
    stored = file.stored
    words = Array("U8", (len(stored.words),), stored.words)
    arrays = {"words": words, **file.arrays, "checksum": Array("U32", (1,), bytes(4))}
    header: dict[str, Any] = {}
    stop = 0
    for name, array in arrays.items():
        start, stop = stop, stop + len(array.data)
        header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [start, stop]}
    place = {"scope": stored.scope, "start": stored.start, "position": stored.position}
    sizes = {"num_words": len(stored.words), "num_bytes": stop}
    payload = orjson.dumps({"place": place, "values": file.values, **sizes})
    checksum = f"{zlib.crc32(payload):08x}"
    meta = {"format": _FORMAT, "payload": payload.decode(), "checksum": checksum}
    head = orjson.dumps({"__metadata__": meta, **header})
    head += b" " * (-len(head) % 8)
    pieces = [len(head).to_bytes(8, "little"), head, *(array.data for array in arrays.values())]
    pieces[-1] = _checksum(pieces[:-1])
    return pieces


def decode(data: bytes) -> File:
    """The payload of a file, every byte of it verified. Raises BrokenFile."""
    if _checksum([memoryview(data)[:-4]]) != data[-4:]:
        raise BrokenFile("its checksum is wrong")
    begin = 8 + int.from_bytes(data[:8], "little")
    header, payload = _parse(data[8:begin])
    body = memoryview(data)[begin:]
    arrays = {
        name: Array(item["dtype"], tuple(item["shape"]), body[slice(*item["data_offsets"])])
        for name, item in header.items()
    }
    del arrays["checksum"]
    words = bytes(arrays.pop("words").data)
    return File(Stored(**payload["place"], words=words), arrays, payload["values"])


def _checksum(pieces: Iterable[bytes | memoryview]) -> bytes:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc.to_bytes(4, "little")


def _parse(head: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """A header's array entries and its verified payload. Raises BrokenFile."""
    try:
        header = orjson.loads(head)
        meta = header.pop("__metadata__")
        name, payload, checksum = meta["format"], meta["payload"].encode(), meta["checksum"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise BrokenFile("it is no safetensors file of this server") from None
    if name != _FORMAT:
        raise BrokenFile(f"its format is {str(name)[:40]!r}")
    if f"{zlib.crc32(payload):08x}" != checksum:
        raise BrokenFile("its header's checksum is wrong")
    return header, orjson.loads(payload)


def _read_stored(path: Path) -> Stored:
    """The description of a file's payload, without its arrays. Raises OSError, BrokenFile."""
    with _opened(path) as file:
        num_head = int.from_bytes(file.read(8), "little")
        _, payload = _parse(file.read(min(num_head, _MAX_HEADER_BYTES)))
        if os.fstat(file.fileno()).st_size != 8 + num_head + payload["num_bytes"]:
            raise BrokenFile("it is not as long as it was")
        return Stored(**payload["place"], words=file.read(payload["num_words"]))


def _opened(path: Path) -> IO[bytes]:
    """A regular file, to read; nothing else may be in its place, as a pipe would be waited for."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BrokenFile("it is no regular file")
    return file


# --- the directory ----------------------------------------------------------------------------


class Store:
    """The files of one model in `directory`, which other models may share. See the module.

    `on_fetched`, `on_written` and `on_failed` are called on the store's own thread, with a
    payload's id. Raises OSError if the directory cannot be created.
    """

    def __init__(self, directory: Path, label: str, max_bytes: int) -> None:
        self._root = directory
        self._directory = directory / label
        self._max_bytes = max_bytes
        self.on_fetched: Callable[[int], None] = lambda id: None
        self.on_written: Callable[[int], None] = lambda id: None
        self.on_failed: Callable[[int], None] = lambda id: None
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # guards the next two, shared with the device thread
        self._num_pending = 0  # bytes
        self._read: dict[int, File] = {}  # fetched, not yet taken
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(self._directory / "lock")
        for leftover in self._root.glob("*/*.tmp"):
            if leftover.stem.isdecimal():
                with contextlib.suppress(OSError):
                    leftover.unlink()
        self._make_room(0)
        threading.Thread(
            target=_work, args=(self._calls,), name="mlxlite-store", daemon=True
        ).start()
        weakref.finalize(self, _end, self._calls, lock)

    def found(self) -> list[tuple[int, Stored]]:
        """The payloads of an earlier process, by id; broken files are removed, with a warning."""
        items = []
        for path in sorted(self._directory.iterdir()):
            if path.name == "lock":
                continue
            if (match := _NAME.fullmatch(path.name)) is None:
                log.warning("%s is not ours, ignored", path)
                continue
            try:
                items.append((int(match[1]), _read_stored(path)))
            except (OSError, BrokenFile) as error:
                log.warning("%s is ignored: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
        return items

    def write(self, id: int, file: File) -> None:
        """Write a payload in the background; `on_failed` is called if that fails."""
        num_bytes = sum(len(array.data) for array in file.arrays.values())
        with self._lock:
            has_room = not self._num_pending or self._num_pending + num_bytes <= MAX_PENDING_BYTES
            self._num_pending += num_bytes * has_room
        if has_room:
            self._calls.put(partial(self._write, id, file, num_bytes))
        else:
            self.fail(id)

    def fail(self, id: int) -> None:
        """Report that a payload cannot be written."""
        self._calls.put(lambda: self.on_failed(id))

    def unlink(self, id: int) -> None:
        """Remove a payload's file in the background, after all earlier calls."""
        self._calls.put(partial(self._unlink, id))

    def fetch(self, id: int, stored: Stored) -> None:
        """Read a payload in the background for `take`; calls `on_fetched` or `on_failed`."""
        self._calls.put(partial(self._fetch, id, stored))

    def take(self, id: int) -> File | None:
        """Remove and return a fetched payload."""
        with self._lock:
            return self._read.pop(id, None)

    # --- on the thread ----------------------------------------------------------------------

    def _path(self, id: int) -> Path:
        return self._directory / f"{id}.safetensors"

    def _write(self, id: int, file: File, num_bytes: int) -> None:
        temporary = self._directory / f"{id}.tmp"
        try:
            pieces = encode(file)
            self._make_room(sum(map(len, pieces)))
            with open(os.open(temporary, _NEW_FILE, 0o600), "wb") as f:
                f.writelines(pieces)
            temporary.replace(self._path(id))
            self.on_written(id)
        except (OSError, MemoryError) as error:
            log.warning("a prefix could not be written to %s: %s", self._directory, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.on_failed(id)
        finally:
            with self._lock:
                self._num_pending -= num_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Remove other models' files, oldest first, before the directory grows past its cap.

        Raises OSError if it is still full.
        """
        files: list[tuple[float, int, Path]] = []
        for path in self._root.glob("*/*.safetensors"):
            with contextlib.suppress(OSError):  # another server has removed it
                status = path.lstat()
                if _NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                    files.append((status.st_mtime, status.st_size, path))
        total = num_bytes + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes:
                return
            if path.parent != self._directory:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
                    total -= size
        if num_bytes and total > self._max_bytes:
            raise OSError(f"{total} bytes would be more than its {self._max_bytes}")

    def _unlink(self, id: int) -> None:
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", self._path(id), error)

    def _fetch(self, id: int, stored: Stored) -> None:
        try:
            with _opened(self._path(id)) as opened:
                file = decode(opened.read())
            if file.stored != stored:
                raise BrokenFile("it holds another prefix")
        except (OSError, MemoryError, ValueError) as error:
            log.warning("%s is ignored: %s", self._path(id), error)
            self.on_failed(id)
            return
        with self._lock:
            self._read[id] = file
        self.on_fetched(id)


def _end(calls: SimpleQueue[Callable[[], None] | None], lock: IO[bytes]) -> None:
    """End a collected store's thread after its last call, and unlock its directory."""
    calls.put(None)
    lock.close()


def _locked(path: Path) -> IO[bytes]:
    """Lock a file until it is closed or the process ends. Raises OSError if it is locked."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o600)
    file = os.fdopen(fd, "r+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OSError(errno.EBUSY, "another server keeps its prefixes here") from None
    return file


def _work(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # and a payload's bytes with it
