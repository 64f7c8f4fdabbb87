"""The prefix cache's files: one a payload, written behind, read ahead, and never trusted.

What is written, read and removed is decided elsewhere (`prefix`); one thread here does it in that
order, so that neither the event loop nor the lane ever waits for a disk. It must never hold more
than `MAX_PENDING_BYTES`, never let the directory grow past its cap, and never hand out a file that
is not to the byte what was written.

A file is a safetensors one, which explains itself: all tokens up to its payload's end, what the
payload is, and a checksum of everything. It appears whole, by a rename, or not at all: a process
that is killed leaves at most a `.tmp`, which the next one removes. Each model (weights, adapter,
cache bits, version of mlx-lm) has a directory of its own; those of others give way, oldest first.

Holds bytes and no MLX object: those belong to the lane.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
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

from mlxlite.engine.step import Command, Fetched, Unstored
from mlxlite.prefix_cache.operations import Stored

log = logging.getLogger("mlxlite.prefix_cache.disk")
MAX_PENDING_BYTES = 256 << 20  # waiting to be written; beyond that a payload is not
_FORMAT = "mlxlite-prefix/1"
_MAX_HEADER_BYTES = 16 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW  # nobody may lead it elsewhere
_NAME = re.compile(r"([1-9][0-9]{0,14})\.safetensors")


@dataclass(frozen=True, slots=True)
class Array:
    """An array's bytes in row-major order; `dtype` in safetensors' words, such as BF16."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class File:
    """A payload: its arrays by name, and what is no array by name, as JSON has it."""

    stored: Stored
    arrays: Mapping[str, Array]
    values: Mapping[str, Any] = field(default_factory=dict)


class BrokenFile(ValueError):
    """Not what was written, or not by us; the message says how."""


def encode(file: File) -> list[bytes | memoryview]:
    """A payload as the pieces of a safetensors file."""
    arrays = {"words": Array("U8", (len(file.stored.words),), file.stored.words), **file.arrays}
    header: dict[str, Any] = {}
    at = 0
    for name, array in arrays.items():
        stop = at + len(array.data)
        header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [at, stop]}
        at = stop
    meta = {
        "format": _FORMAT,
        "scope": str(file.stored.scope),
        "start": str(file.stored.start),
        "position": str(file.stored.position),
        "values": orjson.dumps(file.values).decode(),
    }
    pieces = [array.data for array in arrays.values()]
    meta["checksum"] = f"{_checksum(meta, header, pieces):08x}"
    head = orjson.dumps({"__metadata__": meta} | header)
    head += b" " * (-len(head) % 8)
    return [len(head).to_bytes(8, "little"), head, *pieces]


def _checksum(
    meta: Mapping[str, Any], header: Mapping[str, Any], pieces: Iterable[bytes | memoryview]
) -> int:
    own = {name: value for name, value in meta.items() if name != "checksum"}
    crc = zlib.crc32(orjson.dumps([own, header], option=orjson.OPT_SORT_KEYS))
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def decode(data: bytes) -> File:
    """The payload of a file, every byte of it verified. Raises BrokenFile."""
    stored, header, meta, begin = _decode_head(data, len(data))
    body = memoryview(data)[begin:]
    try:
        if f"{_checksum(meta, header, [body]):08x}" != meta.get("checksum"):
            raise BrokenFile("its checksum is wrong")
        arrays = {
            name: Array(item["dtype"], tuple(item["shape"]), body[slice(*item["data_offsets"])])
            for name, item in header.items()
            if name != "words"
        }
        return File(stored, arrays, orjson.loads(meta["values"]))
    except (TypeError, KeyError) as error:  # orjson's too
        raise BrokenFile(f"its header makes no sense ({type(error).__name__})") from None


def _decode_head(data: bytes, size: int) -> tuple[Stored, dict[str, Any], dict[str, str], int]:
    """What a file of `size` bytes says of itself, from its first bytes. Raises BrokenFile."""
    num_head = int.from_bytes(data[:8], "little")
    if not 0 < num_head <= _MAX_HEADER_BYTES or 8 + num_head > len(data):
        raise BrokenFile("it is no safetensors file, or cut off")
    try:
        header = orjson.loads(data[8 : 8 + num_head])
        meta = header.pop("__metadata__")
        if meta["format"] != _FORMAT:
            raise BrokenFile(f"its format is {str(meta['format'])[:40]!r}")
        at = 0
        for item in header.values():  # one after the other, from the first byte to the last
            begin, stop = item["data_offsets"]
            if begin != at or stop < begin:
                raise BrokenFile("its arrays overlap")
            at = stop
        if 8 + num_head + at != size:
            raise BrokenFile("it is not as long as it says")
        stop = 8 + num_head + header["words"]["data_offsets"][1]
        words = bytes(data[8 + num_head : stop])
        position = None if meta["position"] == "None" else int(meta["position"])
        stored = Stored(int(meta["scope"]), int(meta["start"]), position, words)
    except BrokenFile:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise BrokenFile(f"its header makes no sense ({type(error).__name__})") from None
    if not 0 <= stored.scope < 1 << 64:
        raise BrokenFile("its scope is none")
    if stored.start < 0 or len(words) != header["words"]["data_offsets"][1] or len(words) % 4:
        raise BrokenFile("its tokens are cut off")
    return stored, header, meta, 8 + num_head


class Store:
    """The files of one model in `directory`, which other models may share. See the module.

    `tell` is called from the store's own thread with `Fetched` and `Unstored`. Raises OSError when
    the directory cannot be made.
    """

    def __init__(self, directory: Path, label: str, max_bytes: int) -> None:
        self._home = directory
        self._directory = directory / label
        self._max_bytes = max_bytes
        self.tell: Callable[[Command], None] = lambda command: None
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()  # of the next two, which the lane shares
        self._num_pending = 0  # bytes
        self._read: dict[int, File] = {}  # fetched, and not yet taken
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(self._directory / "lock")
        for leftover in self._home.glob("*/*.tmp"):
            if leftover.stem.isdecimal():
                leftover.unlink(missing_ok=True)
        self._make_way(0)
        threading.Thread(
            target=_work, args=(self._calls,), name="mlxlite-store", daemon=True
        ).start()
        weakref.finalize(self, _end, self._calls, lock)

    def found(self) -> list[tuple[int, Stored]]:
        """What an earlier process has left, by id; what is broken is removed, with a warning."""
        items = []
        for path in sorted(self._directory.iterdir()):
            if path.name == "lock":
                continue
            if (match := _NAME.fullmatch(path.name)) is None:
                log.warning("%s is not ours, ignored", path)
                continue
            try:
                items.append((int(match[1]), _read_head(path)))
            except (OSError, BrokenFile) as error:
                log.warning("%s is ignored: %s", path, error)
                with contextlib.suppress(OSError):
                    path.unlink()
        return items

    def write(self, id: int, file: File) -> None:
        """Write a payload, some time; when it cannot be, `tell` hears of it."""
        num_bytes = sum(len(array.data) for array in file.arrays.values())
        with self._lock:
            has_room = self._num_pending + num_bytes <= MAX_PENDING_BYTES
            self._num_pending += num_bytes * has_room
        if has_room:
            self._calls.put(partial(self._write, id, file, num_bytes))
        else:
            self._calls.put(lambda: self.tell(Unstored(id)))

    def unlink(self, id: int) -> None:
        """Remove a payload's file, after what was asked before."""
        self._calls.put(partial(self._unlink, id))

    def fetch(self, id: int, stored: Stored) -> None:
        """Read a payload: `Fetched`, and then `take` has it, or `Unstored`."""
        self._calls.put(partial(self._fetch, id, stored))

    def take(self, id: int) -> File | None:
        """A fetched payload, once."""
        with self._lock:
            return self._read.pop(id, None)

    # --- on the thread ----------------------------------------------------------------------

    def _path(self, id: int) -> Path:
        return self._directory / f"{id}.safetensors"

    def _write(self, id: int, file: File, num_bytes: int) -> None:
        temporary = self._directory / f"{id}.tmp"
        try:
            pieces = encode(file)
            self._make_way(sum(map(len, pieces)))
            with open(os.open(temporary, _NEW_FILE, 0o600), "wb") as f:
                f.writelines(pieces)
            temporary.replace(self._path(id))
        except (OSError, MemoryError) as error:
            log.warning("a prefix could not be written to %s: %s", self._directory, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self.tell(Unstored(id))
        finally:
            with self._lock:
                self._num_pending -= num_bytes

    def _make_way(self, num_bytes: int) -> None:
        """Other models' files go, oldest first, before the directory grows past its cap.

        Raises OSError when it is full all the same.
        """
        paths = self._home.glob("*/*.safetensors")
        sizes = {path: path.stat() for path in paths if _NAME.fullmatch(path.name)}
        total = num_bytes + sum(status.st_size for status in sizes.values())
        for path in sorted(sizes, key=lambda path: sizes[path].st_mtime):
            if total <= self._max_bytes:
                return
            if path.parent != self._directory:
                path.unlink(missing_ok=True)
                total -= sizes[path].st_size
        if num_bytes and total > self._max_bytes:
            raise OSError(f"{total} bytes would be more than its {self._max_bytes}")

    def _unlink(self, id: int) -> None:
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s could not be removed: %s", self._path(id), error)

    def _fetch(self, id: int, stored: Stored) -> None:
        try:
            file = decode(self._path(id).read_bytes())
            if file.stored != stored:
                raise BrokenFile("it holds another prefix")
        except (OSError, MemoryError, ValueError) as error:
            log.warning("%s is ignored: %s", self._path(id), error)
            self.tell(Unstored(id))
            return
        with self._lock:
            self._read[id] = file
        self.tell(Fetched(id))


def _end(calls: SimpleQueue[Callable[[], None] | None], lock: IO[bytes]) -> None:
    """With the store its thread ends, after what was asked, and another one may have its place."""
    calls.put(None)
    lock.close()


def _locked(path: Path) -> IO[bytes]:
    """A file that one process at a time may hold; the system lets go of it with the process.

    Raises OSError when another has it.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise OSError(errno.EBUSY, "another server keeps its prefixes here") from None
    return file


def _work(calls: SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # and with it a payload's bytes


def _read_head(path: Path) -> Stored:
    """What a file says of itself; its arrays are not read. Raises OSError and BrokenFile."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(8)
        data += file.read(min(int.from_bytes(data, "little"), _MAX_HEADER_BYTES))
        try:
            words = orjson.loads(data[8:])["words"]["data_offsets"][1]
            data += file.read(min(int(words), size))
        except (ValueError, TypeError, KeyError, IndexError):
            raise BrokenFile("its header makes no sense") from None
    return _decode_head(data, size)[0]
