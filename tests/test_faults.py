"""Faults, and what each of them costs: its own sequence, or its own step, never the server.

The README's table of faults names these tests. Faults are put in where the code that is not ours is
called: the network, the sampler, a grammar's matcher, the tokenizer, the template, the disk. What a
process does about signals and about a start that comes to nothing is in the second half.
"""

import asyncio
import threading
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from fakes import drive, make_sequence
from helpers import (
    ENDLESS,
    MARKERS,
    FakeModel,
    Wire,
    chat_body,
    chat_request,
    connect,
    in_a_loop,
    new_server,
    serving,
    text_of,
    until,
)
from mlx import nn
from test_runner import VOCABULARY, build, judge
from test_server import assert_ends_with_an_error

from mlxlite import faults, model
from mlxlite.config import Config
from mlxlite.faults import TookTooLong, told, trace_of, within
from mlxlite.runner import ModelRunner
from mlxlite.scheduler import Policy, Scheduler
from mlxlite.sequence import Add, FinishReason, Matcher, Sequence
from mlxlite.server import Server  # noqa: TC001


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
def test_a_decode_that_raises_costs_its_step_and_who_waits_is_served(
    place: str, error: BaseException
) -> None:
    """Whose fault it was cannot be told: all rows were in it."""

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
            await until(lambda: len(device.runner._ids) == 2, "two rows")
            if place == "decode":
                device.network.faults["decode"] = error
            else:

                def raising(*_: Any) -> Any:
                    raise error

                device.runner._sampler = raising  # until the reset brings a new one
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
            assert device.runner._embedding == {}, "nothing is kept of it"
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
    assert end.error == f"the grammar failed: {type(error).__name__}: odd"
    num_told = 2 if place == "accept" else 0
    assert len(run.tokens(2)) in (num_told, num_told + 1)
    for sequence in (free, matched):
        assert run.tokens(sequence.id) == judge("qwen3", sequence)
    assert runner._matchers == {}


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
    made = FaultyModel(markers=MARKERS)
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
    assert "odd" not in caplog.text, "a message may quote what the client said"


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


def test_what_is_told_of_a_fault_has_no_path_and_what_is_logged_of_it_no_message() -> None:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("no /home/someone/models/x.json, nor ~/x/y: 3/4 of it\nand more")
    assert told(caught.value) == "RuntimeError: no …, nor …: 3/4 of it"
    assert "someone" not in trace_of(caught.value)
    assert "RuntimeError" in trace_of(caught.value)
    assert f"{__file__}:" in trace_of(caught.value)
    assert len(told(ValueError("x" * 999))) == 200
    assert told(ValueError("")) == "ValueError: "


# --- the template -------------------------------------------------------------------------------

SPIN = "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
SPIN += "{% endfor %}{% endfor %}"
IF_ASKED = (
    "{% if messages[-1].content == 'spin' %}" + SPIN + "{% endif %}{{ messages[-1].content }}"
)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "TEMPLATE_TIMEOUT_S", 0.3)


@pytest.mark.usefixtures("impatient")
def test_a_template_that_does_not_end_is_stopped_and_others_are_served(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the meantime a stream goes on, health answers, and the render thread is free after it."""
    from mlxlite.__main__ import load

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
                "the chat template did not end and was stopped after 0.3 s"
            )
            assert answer.error["param"] == "messages"
            assert (await later.answer()).status == 200
            assert (await later.post("/tokenize", chat_body("Hello"))).status == 200

    test()
    assert "the chat template was stopped after 0.3 s" in caplog.text


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("template", "why"),
    [
        (SPIN, "did not end"),
        ("{% for i in range(10**12) %}{% endfor %}", "Range too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}", "recursion"),
        ("{{ 'x' * 10**15 }}", "MemoryError"),
        ("{{ '%1000000000000000d' | format(1) }}", "MemoryError"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{{ messages[0]['__class__'].mro() }}", "unsafe"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "underscore"),
    ],
)
def test_a_hostile_template_is_refused_in_bounded_time(
    checkpoint: Path, template: str, why: str
) -> None:
    loaded = model.load(Config(model=str(checkpoint), chat_template=template))
    with pytest.raises(model.PromptError, match=why):
        loaded.render([{"role": "user", "content": "x"}], {}, is_continuation=False)


def test_a_template_that_makes_too_much_text_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "MAX_RENDERED", 1000)
    template = "{% for i in range(n) %}x{% endfor %}"
    loaded = model.load(Config(model=str(checkpoint), chat_template=template))
    loaded.render([{"role": "user", "content": "x"}], {"n": 1000}, is_continuation=False)
    with pytest.raises(model.PromptError, match="made 1001 characters of the messages"):
        loaded.render([{"role": "user", "content": "x"}], {"n": 1001}, is_continuation=False)


def test_a_call_that_ends_in_time_is_left_alone() -> None:
    assert within(60, lambda: 7) == 7
    with pytest.raises(KeyError):
        within(60, lambda: {}["x"])
    assert "mlxlite" not in [thread.name for thread in threading.enumerate()]


def spin() -> None:
    while True:
        pass


def test_a_call_that_does_not_end_is_stopped_once_and_its_thread_goes_on() -> None:
    for _ in range(3):
        with pytest.raises(TookTooLong, match=r"stopped after 0\.01 s"):
            within(0.01, spin)
    assert sum(range(10**6)) > 0, "nothing is raised afterwards"


def test_a_stop_that_comes_as_the_call_ends_is_taken_back() -> None:
    bounded = faults._Bounded()
    threads = [threading.Thread(target=bounded.stop) for _ in range(2)]
    bounded.end()
    for thread in threads:
        thread.start()
        thread.join()
    assert sum(range(10**5)) > 0
    late = faults._Bounded()
    with pytest.raises(faults._Stop):
        _stop_and_end(late)
    assert sum(range(10**5)) > 0


def _stop_and_end(bounded: faults._Bounded) -> None:
    """The exception is raised by the next operation, so it never gets as far as `end`."""
    bounded.stop()
    bounded.end()
    for _ in range(10):
        pass
