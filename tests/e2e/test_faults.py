"""Faults, and what each of them costs: its own sequence, or its own step, never the server.

The table of faults in tests/README.md names these tests. Faults are injected where foreign code is
called: the network, the sampler, a grammar's matcher, the tokenizer, the template, the disk. How a
process reacts to signals and to a failed start is in the second half.
"""

import asyncio
import http.client
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from fakes import drive, make_sequence
from helpers import (
    DONE,
    ENDLESS,
    MARKERS,
    FakeModel,
    Wire,
    chat_body,
    chat_request,
    connect,
    in_a_loop,
    new_server,
    parse_frames,
    serving,
    text_of,
    until,
)
from mlx import nn
from server_cases import assert_ends_with_an_error

from mlxlite.api.service import ModelCard
from mlxlite.config.options import Config
from mlxlite.engine.scheduler import Policy, Scheduler
from mlxlite.engine.sequence import FinishReason, Matcher, Sequence
from mlxlite.engine.step import Add
from mlxlite.errors import summary_of, trace_of
from mlxlite.models import chat_template
from mlxlite.models.interface import LoadError
from mlxlite.prefix_cache.disk import File, Store
from mlxlite.prefix_cache.operations import Stored
from mlxlite.runner.model_runner import ModelRunner
from mlxlite.server import Server  # noqa: TC001
from tests.e2e.test_command_line import (
    GONE_S,
    ROOT,
    TIMEOUT_S,
    ask,
    chat,
    fails,
    free_port,
    running,
    until_it_listens,
)
from tests.runner.test_model_runner import VOCABULARY, build, judge


@pytest.fixture(scope="module", autouse=True)
def _a_hangup_is_heard() -> Iterator[None]:
    """By the processes started here, also where the tests were started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _without_compilation() -> Iterator[None]:
    """On CPU each new kernel costs seconds of a C++ compiler, and none of them is ours."""
    mx.disable_compile()
    yield
    mx.enable_compile()


class Panic(BaseException):
    """Stands in for a panic in Rust (tokenizers, llguidance), which is no Exception."""


ODD = [RuntimeError("odd"), TypeError("odd"), Panic("odd"), StopIteration("odd")]

# --- the network and the sampler, behind a real server ------------------------------------------

NO_MEMORY = RuntimeError("[malloc] Unable to allocate 68719476736 bytes.")


class Breakable(nn.Module):
    """A network that raises once, in its next prefill, decode or embedding."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.faults: dict[str, BaseException] = {}

    @property
    def layers(self) -> list[nn.Module]:
        layers: list[nn.Module] = self.network.layers
        return layers

    def _meet(self, kind: str) -> None:
        if (error := self.faults.pop(kind, None)) is not None:
            raise error

    def __call__(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        self._meet("decode" if tokens.shape[1] == 1 else "prefill")
        logits: mx.array = self.network(tokens, cache=cache)
        return logits

    def states(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        self._meet("embedding")
        states: mx.array = self.network.model(tokens, cache=cache)
        return states


class Device:
    """A server around a real runner and a network of random weights, which speaks in ASCII."""

    def __init__(self) -> None:
        self.network = Breakable(build("qwen3"))
        self.runner: Any = None
        self.server: Server = new_server(self._load)

    def _load(self, _config: Config) -> tuple[Any, ModelRunner]:
        self.runner = ModelRunner(self.network)
        return FakeModel(num_vocab=VOCABULARY, context_size=4000), self.runner


async def until_it_talks(wire: Wire) -> None:
    """Read a stream up to its next text."""
    while not text_of([await wire.frame()]):
        pass


async def assert_serves_on(wire: Wire) -> None:
    assert (await wire.get("/health")).status == 200
    answer = await wire.chat("ABCDE", max_tokens=4)
    assert answer.status == 200
    assert answer.json["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "error", [NO_MEMORY, MemoryError(), TypeError("no such layer")], ids=["malloc", "bare", "type"]
)
def test_a_prefill_that_raises_costs_its_own_sequence(error: BaseException) -> None:
    @in_a_loop
    async def test() -> None:
        device = Device()
        async with (
            device.server as server,
            await connect(server) as running,
            await connect(server) as other,
        ):
            await running.open_stream("ABCDE", max_tokens=60)
            await until_it_talks(running)
            device.network.faults["prefill"] = error
            answer = await other.chat("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
            assert answer.status == 500
            assert answer.error["code"] == "model_error"
            assert type(error).__name__ in answer.error["message"]
            assert (await running.rest())[-2].json["choices"][0]["finish_reason"] == "length"
            await assert_serves_on(other)

    test()


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError(), Panic("in Rust")])
@pytest.mark.parametrize("place", ["decode", "sampler"])
def test_a_decode_that_raises_fails_its_step_and_waiting_sequences_are_served(
    place: str, error: BaseException
) -> None:
    """The sequence at fault is unknown: all rows were in the step."""

    @in_a_loop
    async def test() -> None:
        device = Device()
        async with (
            device.server as server,
            await connect(server) as streamed,
            await connect(server) as whole,
            await connect(server) as later,
        ):
            await streamed.open_stream("ABCDE", max_tokens=3000)
            await until_it_talks(streamed)
            await whole.send(chat_request("FGHIJ", max_tokens=3000))
            await until(lambda: len(device.runner._batch.ids) == 2, "two rows")
            if place == "decode":
                device.network.faults["decode"] = error
            else:

                def raising(*_: Any) -> Any:
                    raise error

                device.runner._batch._sampler = raising  # until the reset brings a new one
            assert_ends_with_an_error(await streamed.rest(), type(error).__name__)
            answer = await whole.answer()
            assert answer.status == 500
            assert answer.error["code"] == "model_error"
            await assert_serves_on(later)

    test()


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError(), TypeError("no such layer")], ids=str)
@pytest.mark.parametrize("num_tokens", [5, 1500])
def test_an_embedding_that_raises_costs_its_own_request(
    error: BaseException, num_tokens: int
) -> None:
    @in_a_loop
    async def test() -> None:
        device = Device()
        async with (
            device.server as server,
            await connect(server) as running,
            await connect(server) as other,
        ):
            await running.open_stream("ABCDE", max_tokens=60)
            await until_it_talks(running)
            device.network.faults["embedding"] = error
            answer = await other.post("/v1/embeddings", {"input": "A" * num_tokens})
            assert answer.status == 500
            assert answer.error["code"] == "model_error"
            assert type(error).__name__ in answer.error["message"]
            assert device.runner._embedder.unfinished == {}, "nothing is kept of it"
            assert (await running.rest())[-2].json["choices"][0]["finish_reason"] == "length"
            assert (await other.post("/v1/embeddings", {"input": "ABC"})).status == 200

    test()


# --- a grammar's own code -----------------------------------------------------------------------


class FaultyGrammar:
    """Allows every token, and raises `error` in one place: at once, or with the third token."""

    def __init__(self, place: str, error: BaseException) -> None:
        self.place = place
        self.fault = error
        self.num_accepted = 0

    def matcher(self) -> Matcher:
        if self.place == "matcher":
            raise self.fault
        return self

    @property
    def error(self) -> str | None:
        if self.place == "error":
            raise self.fault
        return None

    def accept(self, tokens: SequenceOf[int]) -> None:
        self.num_accepted += len(tokens)
        if self.place == "accept" and self.num_accepted == 3:
            raise self.fault

    def fill(self, mask: npt.NDArray[np.uint32]) -> None:
        mask.fill(0)  # a mask that is half written must not be used
        if self.place == "fill":
            raise self.fault
        mask.fill(0xFFFFFFFF)


def constrained(id: int, grammar: Any) -> Sequence:
    sequence = make_sequence(id, num_prompt=6, max_tokens=12)
    return replace(sequence, prompt=replace(sequence.prompt, grammar=grammar))


@pytest.mark.parametrize("error", ODD, ids=repr)
@pytest.mark.parametrize("place", ["matcher", "accept", "fill", "error"])
def test_a_matcher_that_raises_costs_its_own_sequence(place: str, error: BaseException) -> None:
    faulty = constrained(2, FaultyGrammar(place, error))
    matched = constrained(3, FaultyGrammar("nowhere", error))
    free = make_sequence(1, 9, max_tokens=20)
    scheduler = Scheduler(Policy(max_rows=8))
    runner = ModelRunner(build("qwen3"))
    run = drive(scheduler, runner, {0: [Add(free)], 3: [Add(faulty), Add(matched)]})
    (end,) = run.ends(2)
    assert end.reason is FinishReason.ERROR
    assert end.error == f"the grammar failed: {type(error).__name__}"
    num_told = 2 if place == "accept" else 0
    assert len(run.tokens(2)) in (num_told, num_told + 1)
    for sequence in (free, matched):
        assert run.tokens(sequence.id) == judge("qwen3", sequence)
    assert runner._batch.matchers == {}


# --- the tokenizer, the parser of tools, the sink -----------------------------------------------

BAD = "☢"  # a token that has no text but a fault


class FaultyModel(FakeModel):
    """Its tokenizer and its parser of tools raise when they meet a letter."""

    fault: BaseException = RuntimeError("a path: /home/someone/tokenizer.json")

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        if ord(BAD) in tokens:
            raise self.fault
        return super().detokenize(tokens)

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        if BAD in text:
            raise self.fault
        return super().encode(text, add_special=add_special)

    def parse_calls(self, text: str, tools: Any) -> Any:
        raise self.fault


def faulty(error: BaseException) -> FaultyModel:
    made = FaultyModel(output_format=MARKERS)
    made.fault = error
    return made


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_a_detokenizer_that_raises_costs_its_own_sequence(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    @in_a_loop
    async def test() -> None:
        async with (
            serving(faulty(error)) as served,
            await served.wire() as running,
            await served.wire() as wire,
        ):
            await running.open_stream("abc" + ENDLESS)
            prompt = f"hello{BAD}" + "x" * 40  # its tail, which is read first, is harmless
            await wire.open_stream(prompt)
            frames = await wire.rest()
            assert text_of(frames) == "hello"
            assert_ends_with_an_error(frames, "could not be made text")
            answer = await wire.chat(prompt)
            assert answer.status == 500
            assert "could not be made text" in answer.error["message"]
            assert served.num_live == 1
            assert served.num_ended("error") == 2
            await until_it_talks(running)
            assert (await wire.chat("hello")).status == 200
            assert (await wire.get("/health")).status == 200

    test()
    assert type(error).__name__ in caplog.text
    assert "odd" not in caplog.text, "a message may quote the client's text"


@pytest.mark.parametrize("error", ODD, ids=repr)
def test_a_detokenizer_that_raises_on_the_prompt_leaves_no_sequence_behind(
    error: BaseException,
) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(faulty(error)) as served, await served.wire() as wire:
            answer = await asyncio.wait_for(wire.chat("x" + BAD, n=3, temperature=1), 5)
            assert answer.status == 500
            assert served.num_live == 0
            assert served.runner.admitted == []
            assert (await wire.chat("hello")).status == 200

    test()


@pytest.mark.parametrize("error", [*ODD, Exception("odd")], ids=repr)
def test_a_tokenizer_that_raises_costs_its_own_request(error: BaseException) -> None:
    @in_a_loop
    async def test() -> None:
        async with serving(faulty(error)) as served, await served.wire() as wire:
            for path, body in (
                ("/v1/completions", {"prompt": BAD}),
                ("/v1/embeddings", {"input": BAD}),
                ("/tokenize", {"content": BAD}),
                ("/detokenize", {"tokens": [ord(BAD)]}),
            ):
                answer = await asyncio.wait_for(wire.post(path, body), 5)
                assert answer.status == 500, path
                assert answer.error["code"] == "internal_error"
            assert (await wire.chat("hello")).status == 200

    test()


def test_a_bug_in_a_handler_is_a_500_and_keeps_the_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def card(*_: Any, **__: Any) -> None:
        raise LookupError("a secret")

    @in_a_loop
    async def test() -> None:
        async with serving() as served, await served.wire() as wire:
            with monkeypatch.context() as patch:
                patch.setattr(ModelCard, "as_json", card)
                answer = await wire.get("/v1/models")
            assert answer.status == 500
            assert answer.error["code"] == "internal_error"
            assert (await wire.get("/v1/models")).status == 200, "on the same connection"

    test()
    assert "LookupError" in caplog.text
    assert "a secret" not in caplog.text


@pytest.mark.parametrize("error", [OSError("odd"), Panic("odd")], ids=repr)
def test_a_parser_of_tools_that_raises_oddly_costs_its_own_sequence(error: BaseException) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    @in_a_loop
    async def test() -> None:
        async with serving(faulty(error)) as served, await served.wire() as wire:
            answer = await wire.chat('<call>{"name": "f", "arguments": {}}</call>', tools=[tool])
            assert answer.status == 500
            assert answer.error["code"] == "model_error"
            assert (await wire.chat("hello", tools=[tool])).status == 200

    test()


def test_an_error_summary_has_no_path_and_the_logged_trace_no_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("no /home/someone/models/x.json, nor ~/x/y: 3/4 of it\nand more")
    assert summary_of(caught.value) == "RuntimeError: no …, nor …: 3/4 of it"
    assert "someone" not in trace_of(caught.value)
    assert "RuntimeError" in trace_of(caught.value)
    assert f"{__file__}:" in trace_of(caught.value)
    assert len(summary_of(ValueError("x" * 999))) == 200
    assert summary_of(ValueError("")) == "ValueError: "


# --- the template -------------------------------------------------------------------------------

SPIN = "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
SPIN += "{% endfor %}{% endfor %}"
IF_ASKED = (
    "{% if messages[-1].content == 'spin' %}" + SPIN + "{% endif %}{{ messages[-1].content }}"
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_TIMEOUT_S", 1.0)  # a busy machine renders in less


@pytest.mark.usefixtures("impatient")
def test_a_template_that_does_not_end_is_stopped_and_others_are_served(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Meanwhile a stream continues and health answers; the render thread is free afterwards."""
    from mlxlite.server import load

    @in_a_loop
    async def test() -> None:
        server = new_server(load, model=str(checkpoint), chat_template=IF_ASKED)
        async with (
            server,
            await connect(server) as running,
            await connect(server) as spinning,
            await connect(server) as later,
            await connect(server) as control,
        ):
            await running.open_stream("Hello", temperature=0, ignore_eos=True)
            await until_it_talks(running)
            await spinning.send(chat_request("spin"))
            await later.send(chat_request("Hello", max_tokens=2))
            assert (await control.get("/health")).status == 200
            await until_it_talks(running)
            answer = await spinning.answer()
            assert answer.status == 400
            assert answer.error["message"] == (
                "the chat template did not end and was stopped after 1 s"
            )
            assert answer.error["param"] == "messages"
            assert (await later.answer()).status == 200
            assert (await later.post("/tokenize", chat_body("Hello"))).status == 200

    test()
    assert "the chat template was stopped after 1 s" in caplog.text


# --- the disk, file descriptors ------------------------------------------------------------------

PROMPT = "Tell me a story about a river and a boat. " * 4


def told_by(port: int, number: int) -> int:
    """A chat that is like no other; its status."""
    messages = [{"role": "user", "content": f"{number}: {PROMPT}"}]
    body = chat(messages=messages, temperature=0, max_tokens=8)
    return ask(port, "/v1/chat/completions", body)[0]


def until_true(condition: Callable[[], object]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


@contextmanager
def full_disk(directory: Path, _pid: int) -> Iterator[None]:
    """A file system of its own that has no room."""
    ballast = directory / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    yield
    ballast.unlink()


@contextmanager
def no_large_files(_directory: Path, pid: int) -> Iterator[None]:
    """A process that may write no more than 64 KiB into a file."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs and prlimit are Linux's")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [(full_disk, "No space left on device"), (no_large_files, "File too large")],
)
def test_a_full_disk_costs_no_answer_and_writing_resumes_when_there_is_room(
    tmp_path: Path, fault: Callable[[Path, int], AbstractContextManager[None]], reason: str
) -> None:
    directory = tmp_path / "prefixes"
    directory.mkdir()
    if fault is full_disk:
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(directory)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount")
    port = free_port()
    try:
        with running(
            tmp_path, "--port", str(port), "--prefix-cache-dir", str(directory)
        ) as process:
            process.until("server is listening")
            with fault(directory, process.pid):
                assert [told_by(port, number) for number in range(3)] == [200] * 3
                until_true(lambda: reason in process.stderr)
                assert ask(port, "/health")[0] == 200
                until_true(lambda: ask(port, "/v1/cache")[1]["disk_bytes"] == 0)
                assert not list(directory.rglob("*.safetensors"))
                until_true(lambda: not list(directory.rglob("*.tmp")))
            assert told_by(port, 4) == 200
            until_true(lambda: ask(port, "/v1/cache")[1]["disk_bytes"] > 0)
            assert list(directory.rglob("*.safetensors"))
            assert "Traceback" not in process.stderr
            process.kill(signal.SIGTERM)
            assert process.wait() == 0
    finally:
        if fault is full_disk:
            subprocess.run(["umount", str(directory)], check=True)


def test_a_prefix_is_not_written_where_a_link_leads(tmp_path: Path) -> None:
    failed: list[Any] = []
    store = Store(tmp_path / "home", "label", 1 << 20)
    store.on_failed = failed.append
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "home" / "label" / "7.tmp").symlink_to(victim)
    store.write(7, File(Stored(1, 0, None, b"\1\0\0\0"), {}))
    until_true(lambda: failed)
    assert failed == [7]
    assert victim.read_bytes() == b"precious"


def cpu_s(pid: int) -> float:
    """What a process has taken of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit and /proc are Linux's")
def test_without_file_descriptors_no_connection_is_lost_and_the_server_does_not_spin(
    tmp_path: Path,
) -> None:
    """Open connections are served; new ones wait until descriptors are free, then are served."""
    port = free_port()
    raw = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with (
        running(tmp_path, "--port", str(port)) as process,
        closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as before,
        ExitStack() as stack,
    ):
        process.until("server is listening")
        before.request("GET", "/health")
        assert before.getresponse().read()
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
        num_open = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (num_open + 3, hard))
        socks = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        for sock in socks:
            stack.enter_context(closing(sock))
            sock.settimeout(TIMEOUT_S)
            sock.sendall(raw)
        until_true(lambda: "no connection can be accepted for now" in process.stderr)
        before.request("GET", "/health")
        assert before.getresponse().read(), "an open connection is served"
        taken_s = cpu_s(process.pid)
        assert select.select(socks[-1:], [], [], 2.5)[0] == [], "the last one gets no answer"
        assert cpu_s(process.pid) - taken_s < 1.0
        for sock in socks:  # each one that leaves makes room for another
            assert sock.recv(65536).startswith(b"HTTP/1.1 200")
            sock.close()
        assert ask(port, "/health")[0] == 200
        assert process.stderr.count("no connection can be accepted") <= 3
        assert "Traceback" not in process.stderr
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0


@pytest.mark.parametrize(
    ("soft", "hard", "num"),
    [(64, 4096, 1024), (2048, 4096, 1024), (64, 256, 128), (64, 128, 32), (256, 1000, 872)],
)
def test_as_many_connections_are_accepted_as_files_may_be_open(
    soft: int, hard: int, num: int
) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from mlxlite.__main__ import _raise_file_limit
print(_raise_file_limit(1024), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == [str(num), str(min(hard, max(soft, 1024 + 128)))]
    warned = f"too few for 1024 connections: {num} are accepted" in done.stderr
    assert warned == (num < 1024), done.stderr


@pytest.mark.parametrize("hard", [64, 256, 2000])
def test_a_low_limit_of_open_files_prevents_no_start(tmp_path: Path, hard: int) -> None:
    port = free_port()
    limited = ("bash", "-c", f'ulimit -Sn {hard}; ulimit -Hn {hard}; exec "$@"', "-")
    with running(tmp_path, "--port", str(port), prefix=limited) as process, ExitStack() as stack:
        process.until("server is listening")
        assert ask(port, "/v1/chat/completions", chat(max_tokens=2))[0] == 200
        assert ("too few for 1024" in process.stderr) == (hard < 1152)
        num = {64: 16, 256: 128, 2000: 150}[hard]
        for _ in range(num):
            stack.enter_context(closing(socket.create_connection(("127.0.0.1", port))))
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as link:
            link.request("GET", "/health")
            assert link.getresponse().status == (200 if hard == 2000 else 503), "one too many"
        assert "Traceback" not in process.stderr
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0


# --- signals, at each phase of a real process ----------------------------------------------------

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_model_loads_is_exit_0(
    checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    with running(tmp_path, "--model", str(checkpoint), "--port", str(port)) as process:
        until_it_listens(process, port)
        process.kill(number)
        assert process.wait(GONE_S) == 0
        assert process.stdout == ""
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_idle_is_exit_0_at_once(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    with running(tmp_path, "--port", str(port), "--shutdown-grace-s", "60") as process:
        process.until("server is listening")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as link:
            link.request("GET", "/health")
            assert link.getresponse().read()
            process.kill(number)
            assert link.sock.recv(1) == b"", "an idle connection holds nothing up"
        assert process.wait(GONE_S) == 0
        assert "Traceback" not in process.stderr


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_streams_in_prefill_decode_and_queue_with_their_errors(
    tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    flags = ("--port", str(port), "--max-batch-size", "2", "--prefill-chunk-size", "32")
    with running(tmp_path, *flags, "--shutdown-grace-s", "0.05") as process, ExitStack() as stack:
        process.until("server is listening")

        def begin(content: str, **fields: Any) -> http.client.HTTPResponse:
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            stack.enter_context(closing(link))
            messages = [{"role": "user", "content": content}]
            body = chat(messages=messages, ignore_eos=True, **fields)
            link.request("POST", "/v1/chat/completions", json.dumps(body))
            return link.getresponse()

        decoding = begin("Hello", stream=True, temperature=1)
        until_line(decoding, '"content":"', but='"content":""')
        prefilling = begin("river boat " * 1000, stream=True, return_progress=True)
        until_line(prefilling, '"prompt_progress"')
        waiting = begin("Hello", stream=True)
        until_line(waiting, '"role"')
        process.kill(number)
        for answer in (decoding, prefilling, waiting):
            rest = answer.read().decode()
            frames = parse_frames(rest[rest.index("data: ") :])
            assert frames[-1] == DONE
            assert "shutting down" in frames[-3].json["error"]["message"]
            assert answer is decoding or not text_of(frames[:-3] + frames[-1:])
        assert process.wait(GONE_S) == 0
        assert "Traceback" not in process.stderr


def until_line(answer: http.client.HTTPResponse, word: str, but: str = "\n\n") -> None:
    """Read a stream up to the blank line after one with `word` in it."""
    while True:
        line = answer.readline().decode()
        assert line, "the stream has ended"
        if word in line and but not in line:
            assert answer.readline() == b"\n"
            return


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_while_it_drains_is_exit_130_at_once(
    tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    with running(tmp_path, "--port", str(port), "--shutdown-grace-s", "60") as process:
        process.until("server is listening")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as link:
            body = chat(stream=True, temperature=1, ignore_eos=True)
            link.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = link.getresponse()
            until_line(answer, '"content":"', but='"content":""')
            process.kill(signal.SIGTERM)
            until_true(lambda: not can_connect(port))  # it has handled the first signal
            until_line(answer, '"content":"', but='"content":""')
            process.kill(number)
            assert process.wait(GONE_S) == 130
            assert "Traceback" not in process.stderr


def can_connect(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except (ConnectionRefusedError, ConnectionResetError):  # reset: it was closed in between
        return False
    return True


def test_a_hangup_that_was_ignored_from_the_start_stays_ignored(tmp_path: Path) -> None:
    """`nohup python -m mlxlite`, and the terminal is closed."""
    port = free_port()
    with running(tmp_path, "--port", str(port), prefix=("nohup",)) as process:
        process.until("server is listening")
        process.kill(signal.SIGHUP)
        assert ask(port, "/v1/chat/completions", chat(max_tokens=2))[0] == 200
        process.kill(signal.SIGTERM)
        assert process.wait(GONE_S) == 0


# --- standard streams ----------------------------------------------------------------------------


def closed(stack: ExitStack) -> int | None:
    return None


def full(stack: ExitStack) -> int:
    return stack.enter_context(open("/dev/full", "wb")).fileno()


def gone(stack: ExitStack) -> int:
    reading, writing = os.pipe()
    os.close(reading)
    stack.callback(os.close, writing)
    return writing


def unread(stack: ExitStack) -> int:
    """A pipe that holds as much as it can, and that is not read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    stack.callback(os.close, reading)
    stack.callback(os.close, writing)
    return writing


Fault = Callable[[ExitStack], "int | None"]
FAULTS: list[Fault] = [closed, full, gone, unread]
if not Path("/dev/full").exists():
    FAULTS.remove(full)


@contextmanager
def started(*args: str, **streams: Fault) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these faults of its streams; those that are not named go nowhere."""
    with ExitStack() as stack:
        files: dict[str, int] = {}
        closing_them = ""
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            fd = streams[name](stack) if name in streams else subprocess.DEVNULL
            closing_them += f" {number}>&-" if fd is None else ""
            files[name] = subprocess.DEVNULL if fd is None else fd
        command = [sys.executable, "-m", "mlxlite", *args]
        process = subprocess.Popen(
            ["bash", "-c", f'exec "$@"{closing_them}', "-", *command], cwd=ROOT, **files
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield process


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("names", [("stdout",), ("stderr",), ("stdin", "stdout", "stderr")])
def test_a_standard_stream_that_takes_nothing_changes_nothing(
    fault: Fault, names: tuple[str, ...]
) -> None:
    port = free_port()
    streams = dict.fromkeys(names, fault)
    flags = ("--port", str(port), "--log-level", "debug", "--shutdown-grace-s", "0.3")
    with started(*flags, **streams) as process, ExitStack() as stack:
        until_true(lambda: can_connect(port) and ask(port, "/health")[0] == 200)
        for _ in range(5):
            assert ask(port, "/v1/chat/completions", chat(max_tokens=1))[0] == 200
        assert ask(port, "/v1/nowhere")[0] == 404
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        stack.enter_context(closing(link))
        body = chat(stream=True, temperature=1, ignore_eos=True)
        link.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = link.getresponse()
        until_line(answer, '"content":"', but='"content":""')
        process.send_signal(signal.SIGTERM)
        assert parse_frames("data: {}\n\n" + answer.read().decode().lstrip("\n"))[-1] == DONE
        assert process.wait(GONE_S) == 0


@pytest.mark.parametrize("fault", FAULTS[:-1])
def test_a_start_that_fails_has_its_exit_code_without_a_stderr(fault: Fault) -> None:
    for code, flags in ((2, ("--modle", "x")), (1, ("--port", "0", "--model", "/nowhere/at/all"))):
        with started(*flags, stderr=fault, stdout=fault) as process:
            assert process.wait(TIMEOUT_S) == code


def test_no_file_of_the_server_gets_the_number_of_a_closed_stream() -> None:
    port = free_port()
    streams: dict[str, Fault] = dict.fromkeys(("stdin", "stdout", "stderr"), closed)
    with started("--port", str(port), **streams) as process:
        until_true(lambda: can_connect(port) and ask(port, "/health")[0] == 200)
        if sys.platform == "linux":
            files = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
            assert files == [os.devnull] * 3


def test_after_a_kill_in_mid_stream_the_same_port_is_served_again(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "second").mkdir()
    with running(tmp_path, "--port", str(port)) as process:
        process.until("server is listening")
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)) as link:
            body = chat(stream=True, temperature=1, ignore_eos=True)
            link.request("POST", "/v1/chat/completions", json.dumps(body))
            until_line(link.getresponse(), '"content":"', but='"content":""')
            process.kill(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            with running(tmp_path / "second", "--port", str(port)) as again:
                again.until("server is listening")
                assert ask(port, "/v1/chat/completions", chat(max_tokens=2))[0] == 200


# --- starts that come to nothing -----------------------------------------------------------------


def assert_one_line(reason: str, words: str) -> None:
    """The reason is one line that begins with the program's name, and the last one."""
    lines = [line for line in reason.splitlines() if line.startswith("mlxlite: error: ")]
    assert len(lines) == 1, reason
    assert reason.splitlines()[-1] == lines[0]
    assert words in lines[0]


def without_configuration(path: Path) -> None:
    (path / "config.json").unlink()


def without_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def without_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_weights_at_all(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"\xff" * 4096)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_configuration, "no config.json"),
        (without_weights, "no model*.safetensors"),
        (without_tokenizer, "no tokenizer"),
        (cut_weights, "check that the download is complete"),
        (no_weights_at_all, "check that the download is complete"),
    ],
)
def test_a_model_that_is_not_whole_is_exit_1_with_one_line(
    checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    spoil(copy)
    code, reason = fails(tmp_path, "--port", "0", "--model", str(copy))
    assert code == 1
    assert_one_line(reason, words)
    assert str(copy) in reason


def test_a_model_of_the_hub_without_a_network_is_exit_1_with_one_line(tmp_path: Path) -> None:
    nowhere = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    flags = ("--port", "0", "--model", "owner/name")
    code, reason = fails(tmp_path, *flags, variables=nowhere)
    assert code == 1
    assert_one_line(reason, "cannot get the model owner/name")
    assert "check the network" in reason


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError(), TypeError("no such layer")], ids=str)
def test_a_network_that_cannot_run_its_first_tokens_is_no_server(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from mlxlite.server import load

    def warm_up(_: ModelRunner) -> None:
        raise error

    monkeypatch.setattr(ModelRunner, "warm_up", warm_up)
    is_memory = not isinstance(error, TypeError)
    with pytest.raises(LoadError) as caught:
        load(Config())
    words = (
        "insufficient memory to run the model" if is_memory else "this model cannot run: no such"
    )
    assert words in str(caught.value)


def test_a_file_where_the_unix_socket_should_be_is_exit_1_and_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "notes"
    precious.write_text("precious")
    code, reason = fails(tmp_path, "--uds", str(precious))
    assert code == 1
    assert_one_line(reason, "there is a file that is no socket")
    assert precious.read_text() == "precious"


def test_a_certificate_that_cannot_be_used_is_exit_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.pem").write_text("no certificate")
    for name, words in (("nowhere.pem", "No such file"), ("broken.pem", "--tls-cert")):
        code, reason = fails(tmp_path, "--port", "0", "--tls-cert", str(tmp_path / name))
        assert code == 2
        assert_one_line(reason, words)
