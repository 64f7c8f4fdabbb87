"""The prefix cache's files: written whole or not at all, within a cap, and never trusted."""

import gc
import json
import logging
import os
import shutil
import signal
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load

from mlxlite.engine.step import Command, DiskFailed, Fetched, StepFailed
from mlxlite.prefix_cache import disk
from mlxlite.prefix_cache.disk import Array, BrokenFile, File, Store, _locked, decode, encode
from mlxlite.prefix_cache.index import PrefixCache
from mlxlite.prefix_cache.operations import Stored

PLENTY = 1 << 30
UNUSED_ID = 10**14  # an id that no test writes
WORDS = b"".join(token.to_bytes(4, "little") for token in range(8))
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "U8": 1, "BOOL": 1}
STORED = Stored(2**64 - 1, 4, None, WORDS)
VALUES = {"start": 0, "leaves": {"states.0.2": None, "states.0.3": 12, "states.1.0": ""}}


def make_file(fill: int = 7, num_bytes: int = 24, words: bytes = WORDS) -> File:
    """A payload of `num_bytes` bytes `fill`."""
    arrays = {
        "tokens.0.0": Array("U8", (num_bytes,), bytes([fill]) * num_bytes),
        "tokens.0.1": Array("F32", (1, 2, 0, 4), b""),
    }
    return File(replace(STORED, words=words), arrays, VALUES)


def plain(file: File) -> tuple[Any, ...]:
    """A file as values that compare equal for any kind of buffer."""
    arrays = {name: (a.dtype, a.shape, bytes(a.data)) for name, a in file.arrays.items()}
    return file.stored, arrays, file.values


def size_of(file: File) -> int:
    return sum(map(len, encode(file)))


class Shop:
    """A store whose callbacks fill a queue; an error of its thread does too."""

    def __init__(self, directory: Path, label: str = "a", max_bytes: int = PLENTY) -> None:
        self.home = directory
        self.directory = directory / label
        self.max_bytes = max_bytes
        self.results: SimpleQueue[Command] = SimpleQueue()
        self.store = Store(directory, label, max_bytes)
        put = self.results.put
        self.store.on_fetched = lambda id: put(Fetched(id))
        self.store.on_failed = lambda id: put(DiskFailed(id))
        threading.excepthook = lambda args: put(StepFailed(repr(args.exc_value)))

    def next(self) -> Command:
        return self.results.get(timeout=30)

    def settle(self) -> list[Command]:
        """Wait for all earlier calls; return their results. Asserts the cap."""
        self.store.fetch(UNUSED_ID, STORED)
        commands = []
        while (command := self.next()) != DiskFailed(UNUSED_ID):
            assert not isinstance(command, StepFailed), command.error
            commands.append(command)
        files = [path for path in self.home.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= self.max_bytes
        assert not [path for path in files if path.suffix == ".tmp"]
        return commands

    def ids(self) -> list[int]:
        return sorted(id for id, _ in self.store.found())


@pytest.fixture
def open_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Shop]]:
    """Open a store; those that it opened before unlock their directories."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)  # a shop sets its own
    locks: list[IO[bytes]] = []
    lock = _locked

    def remembered(path: Path) -> IO[bytes]:
        locks.append(lock(path))
        return locks[-1]

    monkeypatch.setattr(disk, "_locked", remembered)

    def open_one(**settings: Any) -> Shop:
        for held in locks:
            held.close()  # as at the end of a process
        return Shop(tmp_path / "prefixes", **settings)

    yield open_one
    for held in locks:
        held.close()


# --- the format ---------------------------------------------------------------------------------


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    dtype = draw(st.sampled_from(sorted(SIZES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=4)))
    size = SIZES[dtype]
    for length in shape:
        size *= length
    data = draw(st.binary(min_size=size, max_size=size))
    return Array(dtype, shape, draw(st.sampled_from([data, memoryview(data)])))


@st.composite
def files(draw: st.DrawFn) -> File:
    position = draw(st.none() | st.integers(0, 2**40))
    words = draw(st.binary(max_size=16)) * 4
    stored = Stored(draw(st.integers(0, 2**64 - 1)), draw(st.integers(0, 2**40)), position, words)
    names = st.text(min_size=1, max_size=8).filter(lambda n: n not in ("words", "__metadata__"))
    leaf = st.none() | st.integers(-(2**53), 2**53) | st.text(max_size=5) | st.booleans()
    values = draw(st.dictionaries(st.text(max_size=8), leaf | st.dictionaries(st.text(), leaf)))
    return File(stored, draw(st.dictionaries(names, arrays(), max_size=4)), values)


@given(files())
def test_decoding_returns_every_byte_that_was_encoded(file: File):
    data = b"".join(encode(file))
    assert plain(decode(data)) == plain(file)
    for wrong in (data[:-1], data + b"\0"):
        with pytest.raises(BrokenFile):
            decode(wrong)


def test_a_file_is_a_safetensors_file():
    data = b"".join(encode(make_file()))
    tensors = load(data)
    assert sorted(tensors) == ["checksum", "tokens.0.0", "tokens.0.1", "words"]
    assert tensors["words"].tobytes() == WORDS
    assert tensors["tokens.0.0"].tolist() == [7] * 24
    assert tensors["tokens.0.1"].shape == (1, 2, 0, 4)
    num_head = struct.unpack("<Q", data[:8])[0]
    assert num_head % 8 == 0
    meta = json.loads(data[8 : 8 + num_head])["__metadata__"]
    assert all(isinstance(value, str) for value in meta.values())


def test_a_changed_byte_is_detected_at_every_position():
    data = b"".join(encode(make_file()))
    for at, byte in enumerate(data):
        for other in range(256):
            if other != byte:
                with pytest.raises(BrokenFile):
                    decode(data[:at] + bytes([other]) + data[at + 1 :])


def test_a_truncated_file_is_detected_at_every_length():
    data = b"".join(encode(make_file()))
    for size in range(len(data)):
        with pytest.raises(BrokenFile):
            decode(data[:size])


def with_header(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A file with a valid format and checksums, and a changed header."""
    _length, head, *pieces = encode(make_file())
    header = orjson.loads(head)
    change(header)
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(8, "little"), head, *pieces])


def payload(header: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the description of a payload."""
    found = json.loads(header["__metadata__"]["payload"])
    change(found["place"])
    header["__metadata__"]["payload"] = json.dumps(found)


def nested(depth: int) -> Any:
    tree: Any = 0
    for _ in range(depth):
        tree = [tree]
    return tree


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata of another kind": lambda h: h.update(__metadata__=["format"]),
    "another format": lambda h: h["__metadata__"].update(format="pt"),
    "no words": lambda h: h.pop("words"),
    "words that are none": lambda h: h.update(words=7),
    "no payload": lambda h: h["__metadata__"].pop("payload"),
    "a payload that is no JSON": lambda h: h["__metadata__"].update(payload="{"),
    "no start": lambda h: payload(h, lambda place: place.pop("start")),
    "a start below zero": lambda h: payload(h, lambda place: place.update(start=-4)),
    "a start that is no number": lambda h: payload(h, lambda place: place.update(start="four")),
    "offsets that are fractions": lambda h: h["words"].update(data_offsets=[0.0, 32.0]),
    "offsets in a string": lambda h: h["words"].update(data_offsets="ab"),
    "offsets that run back": lambda h: h["words"].update(data_offsets=[0, -32]),
    "offsets without end": lambda h: h["words"].update(data_offsets=[0, 2**63]),
    "a tree of arrays": lambda h: h["words"].update(dtype=nested(300)),
    "a deep tree of arrays": lambda h: h["words"].update(dtype=nested(900)),
    "no checksum": lambda h: h["__metadata__"].pop("checksum"),
    "another checksum": lambda h: h["__metadata__"].update(checksum="00000000"),
    "a scope of 65 bits": lambda h: payload(h, lambda place: place.update(scope=2**65)),
    "a scope below zero": lambda h: payload(h, lambda place: place.update(scope=-1)),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_an_invalid_header_is_a_broken_file(change: Callable[[dict[str, Any]], Any]):
    with pytest.raises(BrokenFile):  # BUG: "a tree of arrays" raises orjson's TypeError
        decode(with_header(change))


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_an_invalid_header_stops_neither_the_start_nor_the_thread(
    open_shop: Callable[..., Shop], change: Callable[[dict[str, Any]], Any]
):
    shop = open_shop()
    (shop.directory / "1.safetensors").write_bytes(with_header(change))
    cache = PrefixCache(4, block_size=4, num_bytes=PLENTY)
    cache.restore(shop.store.found())  # BUG: a scope that is no 64 bits ends the server's start
    cache.check()
    shop.store.fetch(1, STORED)
    assert shop.next() == DiskFailed(1)  # BUG: "a tree of arrays" ends the store's thread


def test_a_file_of_an_earlier_format_is_removed(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    path = shop.directory / "1.safetensors"
    path.write_bytes(with_header(lambda h: h["__metadata__"].update(format="mlxlite-prefix/1")))
    assert shop.store.found() == []
    assert not path.exists()
    assert "its format is 'mlxlite-prefix/1'" in caplog.text


@pytest.mark.parametrize("begin", [b"", b"\0" * 8, b"\xff" * 8, (1 << 40).to_bytes(8, "little")])
def test_a_header_that_claims_to_be_huge_is_a_broken_file(
    open_shop: Callable[..., Shop], begin: bytes, caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    path = shop.directory / "1.safetensors"
    path.write_bytes(begin + b"{}")
    assert shop.store.found() == []
    assert not path.exists()
    assert str(path) in caplog.text
    with pytest.raises(BrokenFile):
        decode(begin + b"{}")


# --- write, fetch, take -------------------------------------------------------------------------


def test_a_written_payload_is_fetched_and_taken_once(open_shop: Callable[..., Shop]):
    shop = open_shop()
    shop.store.write(1, make_file(1))
    shop.store.write(2, make_file(2, words=WORDS * 2))
    for id, words in ((2, WORDS * 2), (1, WORDS)):
        shop.store.fetch(id, replace(STORED, words=words))
        assert shop.next() == Fetched(id)
        file = shop.store.take(id)
        assert file is not None
        assert plain(file) == plain(make_file(id, words=words))
        assert shop.store.take(id) is None
    assert shop.store.take(UNUSED_ID) is None
    assert shop.settle() == []


def test_the_last_write_of_a_payload_wins(open_shop: Callable[..., Shop]):
    shop = open_shop()
    shop.store.write(1, make_file(1))
    shop.store.write(1, make_file(2))
    shop.store.fetch(1, STORED)
    assert shop.next() == Fetched(1)
    file = shop.store.take(1)
    assert file is not None
    assert plain(file) == plain(make_file(2))


def test_a_new_store_finds_the_files_of_the_previous_one(open_shop: Callable[..., Shop]):
    shop = open_shop()
    written = {1: make_file(1), 15: make_file(2, words=WORDS[:16]), 10**12: make_file(3, words=b"")}
    for id, file in written.items():
        shop.store.write(id, file)
    shop.settle()
    found = dict(open_shop().store.found())
    assert found == {id: file.stored for id, file in written.items()}
    assert all(type(stored.words) is bytes for stored in found.values())


def test_a_checkpoint_keeps_its_position(open_shop: Callable[..., Shop]):
    shop = open_shop()
    stored = Stored(0, 4, 8, WORDS)
    shop.store.write(1, File(stored, {}))
    shop.settle()
    assert shop.store.found() == [(1, stored)]


def test_a_file_is_removed_by_unlink_even_if_its_write_was_pending(
    open_shop: Callable[..., Shop],
):
    shop = open_shop()
    shop.store.write(1, make_file())
    shop.store.unlink(1)
    shop.store.unlink(2)  # no such file
    shop.store.fetch(1, STORED)
    assert shop.next() == DiskFailed(1)
    assert shop.settle() == []
    assert list(shop.directory.glob("*.*")) == []


def test_a_missing_or_broken_file_is_reported_as_failed(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    shop.store.write(2, make_file())
    shop.settle()
    path = shop.directory / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    for id in (1, 2):
        shop.store.fetch(id, STORED)
        assert shop.next() == DiskFailed(id)
        assert shop.store.take(id) is None
        assert str(shop.directory / f"{id}.safetensors") in caplog.text
    assert "checksum" in caplog.text


@pytest.fixture
def limited() -> Iterator[None]:
    """A file operation that waits for ever is interrupted."""

    def interrupt(*_: Any) -> None:
        raise TimeoutError("it waits")

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def put_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def put_link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".pipe"))
    path.symlink_to(path.with_suffix(".pipe"))


STRANGE = [os.mkfifo, Path.mkdir, put_link_to_nothing, put_link_to_pipe]


@pytest.mark.parametrize("put", STRANGE, ids=lambda put: put.__name__)
@pytest.mark.parametrize("name", ["1.safetensors", "1.tmp"])
@pytest.mark.usefixtures("limited")
def test_what_is_no_regular_file_stops_neither_the_start_nor_the_cap(
    open_shop: Callable[..., Shop], put: Callable[[Path], None], name: str
):
    shop = open_shop(max_bytes=size_of(make_file()))
    put(shop.directory / name)
    other = shop.home / "b"
    other.mkdir()
    put(other / name)
    shop.store.fetch(1, STORED)
    assert shop.next() == DiskFailed(1)
    shop = open_shop(max_bytes=size_of(make_file()))
    assert shop.ids() == []
    for id in (2, 3):  # the second is beyond the cap
        shop.store.write(id, make_file())
    assert shop.settle() == [DiskFailed(3)]
    assert shop.ids() == [2]


@pytest.mark.parametrize("put", [os.mkfifo, put_link_to_pipe], ids=lambda put: put.__name__)
@pytest.mark.usefixtures("limited")
def test_a_lock_that_is_a_pipe_is_not_waited_for(
    open_shop: Callable[..., Shop], tmp_path: Path, put: Callable[[Path], None]
):
    (tmp_path / "prefixes" / "a").mkdir(parents=True)
    put(tmp_path / "prefixes" / "a" / "lock")
    assert open_shop().ids() == []


OTHERS = {
    "of another scope": replace(STORED, scope=1),
    "that begins elsewhere": replace(STORED, start=0),
    "that is a checkpoint": replace(STORED, position=8),
    "of other tokens": replace(STORED, words=WORDS[:-4] + b"\1\0\0\0"),
    "of fewer tokens": replace(STORED, words=WORDS[:-4]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_file_of_another_prefix_is_reported_as_failed(
    open_shop: Callable[..., Shop], other: Stored, caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    shop.store.write(1, make_file())
    shop.store.fetch(1, other)
    assert shop.next() == DiskFailed(1)
    assert shop.store.take(1) is None
    assert "it holds another prefix" in caplog.text


def test_writes_beyond_the_pending_limit_are_dropped(
    open_shop: Callable[..., Shop], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(disk, "MAX_PENDING_BYTES", 100)
    shop = open_shop()
    held = threading.Event()
    shop.store._calls.put(lambda: held.wait(30) and None)  # the disk is slow
    for id in (1, 2, 3, 4):
        shop.store.write(id, make_file(num_bytes=90 if id == 3 else 40))
    held.set()
    assert shop.settle() == [DiskFailed(3), DiskFailed(4)]
    assert shop.ids() == [1, 2]
    shop.store.write(3, make_file(num_bytes=90))  # there is room again
    assert shop.settle() == []
    assert shop.ids() == [1, 2, 3]


def test_only_the_user_can_read_the_files(open_shop: Callable[..., Shop]):
    shop = open_shop()
    shop.store.write(1, make_file())
    shop.settle()
    assert stat.S_IMODE(shop.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((shop.directory / "1.safetensors").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_directory_fails_only_the_write(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    shop.directory.chmod(0o500)
    shop.store.write(1, make_file())
    assert shop.settle() == [DiskFailed(1)]
    shop.directory.chmod(0o700)
    assert "could not be written" in caplog.text
    shop.store.write(1, make_file())
    assert shop.settle() == []


def test_a_removed_directory_fails_only_the_write(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    shutil.rmtree(shop.directory)
    shop.store.write(1, make_file())
    shop.store.unlink(1)
    assert shop.settle() == [DiskFailed(1)]
    assert "could not be written" in caplog.text


def test_a_directory_that_cannot_be_made_is_an_error_at_once(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Store(tmp_path / "file", "a", PLENTY)


def test_a_directory_is_locked_against_a_second_server(open_shop: Callable[..., Shop]):
    shop = open_shop()
    with pytest.raises(OSError, match="another server"):
        Store(shop.home, "a", PLENTY)
    Store(shop.home, "b", PLENTY)
    shop.store.write(1, make_file())
    assert shop.settle() == []
    assert open_shop().ids() == [1]


def test_its_thread_ends_with_the_store(open_shop: Callable[..., Shop]):
    before = set(threading.enumerate())
    shop = open_shop()
    (thread,) = set(threading.enumerate()) - before
    shop.store.write(1, make_file())
    shop.store.fetch(1, STORED)
    assert shop.next() == Fetched(1)
    assert thread.is_alive()
    path = shop.directory / "2.safetensors"
    shop.store.write(2, make_file())
    del shop
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()
    assert path.exists(), "what was to be written is"


# --- what is found ------------------------------------------------------------------------------


def test_broken_files_are_removed_and_foreign_files_are_left_alone(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    shop = open_shop()
    shop.store.write(1, make_file())
    shop.settle()
    good = (shop.directory / "1.safetensors").read_bytes()
    foreign = ["notes.txt", "model.safetensors", "2.safetensors.bak", f"{'9' * 30}.safetensors"]
    for name in foreign:
        (shop.directory / name).write_bytes(b"mine")
    broken = {"3": b"", "4": good[:-1], "5": b"nonsense", "6": good + b"\0", "7": good[:60]}
    for name, data in broken.items():
        (shop.directory / f"{name}.safetensors").write_bytes(data)
    (shop.directory / "8.tmp").write_bytes(good)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlxlite.prefix_cache.disk"):
        assert [id for id, _ in open_shop().store.found()] == [1]
    left = {path.name for path in shop.directory.iterdir()}
    assert left - {"lock"} == {"1.safetensors", *foreign}
    for name in (*foreign, *(f"{name}.safetensors" for name in broken)):
        assert name in caplog.text


def test_names_map_to_distinct_ids_above_zero(open_shop: Callable[..., Shop]):
    """BUG: 1 and 01 were both found as 1, one payload for the tree; 0 is a root's id."""
    shop = open_shop()
    for name in ("1", "01", "0"):
        path = shop.directory / f"{name}.safetensors"
        path.write_bytes(b"".join(encode(make_file(words=WORDS[: 16 * len(name)]))))
    assert shop.ids() == [1]


# --- the cap ------------------------------------------------------------------------------------


def test_the_directory_never_grows_past_its_cap(open_shop: Callable[..., Shop]):
    size = size_of(make_file(num_bytes=400))
    shop = open_shop(max_bytes=3 * size)
    for id in (1, 2, 3, 4):
        shop.store.write(id, make_file(num_bytes=400))
        assert shop.settle() == [DiskFailed(4)] * (id == 4)
    assert shop.ids() == [1, 2, 3]
    shop.store.unlink(2)
    shop.store.write(5, make_file(num_bytes=400))
    shop.store.write(6, make_file(num_bytes=400))
    assert shop.settle() == [DiskFailed(6)]
    assert shop.ids() == [1, 3, 5]


def test_a_file_of_exactly_the_cap_is_written_and_one_byte_more_is_not(
    open_shop: Callable[..., Shop], caplog: pytest.LogCaptureFixture
):
    file = make_file(num_bytes=400)
    shop = open_shop(max_bytes=size_of(file))
    shop.store.write(1, file)
    assert shop.settle() == []
    shop.store.unlink(1)
    shop.store.write(2, make_file(num_bytes=401))
    assert shop.settle() == [DiskFailed(2)]
    assert list(shop.directory.glob("*.*")) == []
    assert "could not be written" in caplog.text


def aged(path: Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


def test_other_models_files_are_removed_first_and_the_oldest_of_them_before_the_others(
    open_shop: Callable[..., Shop],
):
    size = size_of(make_file())
    for label, id, age in (("b", 1, 3), ("b", 2, 1), ("c", 1, 2)):
        other = open_shop(label=label)
        other.store.write(id, make_file())
        other.settle()
        aged(other.directory / f"{id}.safetensors", age)
    shop = open_shop(max_bytes=3 * size)
    left = [["b/1", "c/1"], ["b/1"], [], []]
    for id, names in enumerate(left, 1):
        shop.store.write(id, make_file())
        assert shop.settle() == [DiskFailed(4)] * (id == 4)
        others = {p.relative_to(shop.home).with_suffix("") for p in shop.home.glob("[bc]/*.*")}
        assert sorted(map(str, others)) == names
    assert shop.ids() == [1, 2, 3]


def test_a_smaller_cap_removes_other_models_files_at_the_start(open_shop: Callable[..., Shop]):
    other = open_shop(label="b")
    for id in (1, 2, 3):
        other.store.write(id, make_file())
        other.settle()
        aged(other.directory / f"{id}.safetensors", id)
    size = size_of(make_file())
    open_shop(max_bytes=2 * size + 1)
    assert other.ids() == [2, 3]


def test_foreign_files_are_never_removed_to_make_room(open_shop: Callable[..., Shop]):
    """BUG: `--prefix-cache-dir ~/models` removed ~/models/some-model/model.safetensors."""
    weights = open_shop().home / "some-model" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"precious" * 1000)
    shop = open_shop(max_bytes=2000)
    shop.store.write(1, make_file(num_bytes=400))
    shop.store.fetch(1, STORED)
    assert shop.next() == Fetched(1)
    assert weights.exists()


def test_a_temporary_file_of_another_model_is_removed_too(open_shop: Callable[..., Shop]):
    """BUG: the .tmp of a label that is not used again was neither removed nor counted."""
    other = open_shop(label="b")
    (other.directory / "1.tmp").write_bytes(b"0" * 5000)
    shop = open_shop(max_bytes=2000)
    shop.store.write(1, make_file(num_bytes=400))
    assert shop.settle() == []
