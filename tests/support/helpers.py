"""What the HTTP tests share: a raw client, a fake model, a scripted runner, a server around them.

Nothing here needs MLX. A `ScriptedRunner` repeats each prompt, one character a token, and ends; its
device can be held, so that a test decides where a sequence is when something happens to it. Tests
never sleep: they wait for a condition, within bounds (`until`), and move the clock by hand.
"""

import asyncio
import functools
import gc
import json
import math
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from mlxlite.config.options import Config
from mlxlite.engine.engine import Engine
from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.sequence import Logprobs, Matcher, Prompt, PromptLogprobs, Sequence
from mlxlite.engine.step import Admission, Chunk, Launched, Outcome, Part, Runner, Step
from mlxlite.http.connection import Client
from mlxlite.models.interface import FillMarks, Model, PromptError
from mlxlite.output.constraint import Constraint
from mlxlite.output.formats import OutputFormat
from mlxlite.output.markers import MarkerFormat
from mlxlite.server import Load, Server

TIMEOUT_S = 20.0  # of anything that is waited for; only a bug gets there
ENDLESS = "∞"  # a prompt that ends so is repeated for ever
POISON = "☠"  # a sequence that draws it fails alone
NUM_DIMENSIONS = 8  # of the scripted runner's vectors
EOS = 0x110000  # beyond Unicode: it has no text
MARKERS = MarkerFormat("<think>", "</think>", "<call>", "</call>")

# --- a loop for one test ----------------------------------------------------------------------


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test in a debugging loop; it must leave no task, no transport and no stray error."""
    strays: list[Mapping[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: strays.append(context))
        loop.slow_callback_duration = math.inf  # the machine may be busy
        await asyncio.wait_for(coroutine, TIMEOUT_S)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks were left behind: {left}"

    gc.freeze()  # so that the collection below looks at this test's objects alone: 100 times faster
    try:
        asyncio.run(main(), debug=True)
        gc.collect()  # what is unclosed warns now, and a warning is an error
    finally:
        gc.unfreeze()
    assert not strays, f"unhandled errors: {strays}"


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function; its fixtures stay what they are."""

    @functools.wraps(test)
    def call(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return call


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Return once `condition()` is true."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + TIMEOUT_S / 2
    while not condition():
        assert loop.time() < give_up_at, f"never came true: {what or condition}"
        await asyncio.sleep(0.002)


class Clock:
    """Stands in for `perf_counter`: its time passes when a test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- a client that shows every byte ------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A response: its head, and its body once that was read. Header names are in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""
    http_version: str = "HTTP/1.1"

    def __getitem__(self, name: str) -> str:
        values = [value for key, value in self.headers if key == name]
        assert len(values) == 1, f"{name} is there {len(values)} times in {self.headers}"
        return values[0]

    def __contains__(self, name: object) -> bool:
        return any(key == name for key, _ in self.headers)

    @property
    def json(self) -> Any:
        assert self["content-type"] == "application/json"
        return json.loads(self.body, parse_constant=_no_constant)

    @property
    def error(self) -> dict[str, Any]:
        """The error envelope, which has all four of OpenAI's keys."""
        error: dict[str, Any] = self.json["error"]
        assert {"message", "type", "param", "code"} <= set(error)
        assert error["message"]
        return error


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@dataclass(frozen=True)
class Frame:
    """One frame of an event stream; a comment's name is empty."""

    name: str
    value: str

    @property
    def json(self) -> Any:
        return json.loads(self.value, parse_constant=_no_constant)


DONE = Frame("data", "[DONE]")


def parse_frames(text: str) -> list[Frame]:
    """A whole event stream, whose frames are of one line and a blank one each."""
    assert text.endswith("\n\n") or not text
    blocks = text.split("\n\n")[:-1]
    assert all("\n" not in block for block in blocks)
    parts = (block.partition(": ") for block in blocks)
    return [Frame(name, value) for name, _, value in parts]


class Wire:
    """One connection to a server: bytes out, answers in. Also an async context manager."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._text = ""  # of an event stream: received, not yet given out
        self._frames: list[Frame] = []  # came in one piece with one that was given out
        self._is_chunked = False

    async def __aenter__(self) -> "Wire":
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Close and wait for it; a peer that has cut the line is no error."""
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Go away as a process that is killed does: with a reset."""
        linger = struct.pack("ii", 1, 0)  # on, for 0 s
        self._writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, linger
        )
        self._writer.transport.abort()

    async def is_cut(self) -> bool:
        """Whether the server closes; waits for it, and fails if any byte precedes it."""
        try:
            return await asyncio.wait_for(self._reader.read(), TIMEOUT_S / 2) == b""
        except ConnectionError:
            return True

    async def head(self) -> Answer:
        """The status line and the fields of the next answer."""
        block = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = block.removesuffix("\r\n\r\n").split("\r\n")
        version, status, _ = line.split(" ", 2)
        pairs = (part.partition(":") for part in fields)
        headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
        answer = Answer(int(status), headers, http_version=version)
        self._is_chunked = "transfer-encoding" in answer
        if self._is_chunked:
            assert answer["transfer-encoding"] == "chunked"
            assert "content-length" not in answer
        return answer

    async def answer(self, method: str = "GET") -> Answer:
        """The next answer, body and all."""
        head = await self.head()
        if method == "HEAD" or head.status in (204, 304) or head.status < 200:
            body = b""
        elif self._is_chunked:
            body = b"".join([piece async for piece in self._pieces()])
        elif "content-length" in head:
            body = await self._reader.readexactly(int(head["content-length"]))
        else:
            body = await self._reader.read()
        return Answer(head.status, head.headers, body, head.http_version)

    async def _pieces(self) -> AsyncIterator[bytes]:
        if not self._is_chunked:
            while piece := await self._reader.read(65536):
                yield piece
            return
        while num_bytes := int(await self._reader.readuntil(b"\r\n"), 16):
            piece = await self._reader.readexactly(num_bytes)
            assert await self._reader.readexactly(2) == b"\r\n"
            yield piece
        assert await self._reader.readexactly(2) == b"\r\n"

    async def frames(self) -> AsyncIterator[Frame]:
        """The frames of an event stream, as they come."""
        while self._frames:
            yield self._frames.pop(0)
        async for piece in self._pieces():
            self._text += piece.decode()
            whole, end, self._text = self._text.rpartition("\n\n")
            for frame in parse_frames(whole + end):
                yield frame
        assert not self._text, "the stream ended inside a frame"

    async def frame(self) -> Frame:
        """The next frame; the server never cuts one into pieces."""
        if not self._frames:
            piece = await anext(self._pieces(), b"")
            assert piece, "the stream has ended"
            self._frames = parse_frames(piece.decode())
        return self._frames.pop(0)

    async def rest(self) -> list[Frame]:
        return [frame async for frame in self.frames()]

    # --- requests -----------------------------------------------------------------------------

    async def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> Answer:
        """Send a request and read its whole answer; `x_y` is the header x-y."""
        await self.send(request(method, path, body, **headers))
        return await self.answer(method)

    async def get(self, path: str, **headers: str) -> Answer:
        return await self.ask("GET", path, **headers)

    async def post(self, path: str, value: Any, **headers: str) -> Answer:
        return await self.ask("POST", path, json.dumps(value).encode(), **headers)

    async def chat(self, content: str, **fields: Any) -> Answer:
        """A chat that does not stream."""
        return await self.post("/v1/chat/completions", chat_body(content, **fields))

    async def open_stream(self, content: str, **fields: Any) -> Answer:
        """Begin a chat that streams; its frames are read next."""
        await self.send(chat_request(content, stream=True, **fields))
        return await self.head()


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """A request's bytes; `x_y` is the header x-y, and an empty value leaves a header out."""
    fields = {"host": "localhost"}
    if body is not None:
        fields |= {"content-type": "application/json", "content-length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if v)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chat_body(content: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **fields}


def chat_request(content: str, **fields: Any) -> bytes:
    return request(
        "POST", "/v1/chat/completions", json.dumps(chat_body(content, **fields)).encode()
    )


def text_of(frames: SequenceOf[Frame], index: int = 0) -> str:
    """The content of one choice's chunks in a stream."""
    chunks = [frame.json for frame in frames if frame.name == "data" and frame != DONE]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    own = [choice for choice in choices if choice["index"] == index]
    return "".join(choice["delta"].get("content") or "" for choice in own)


# --- a model and a device without MLX -----------------------------------------------------------


@dataclass(frozen=True)
class FakeGrammar:
    """Implements `sequence.Grammar`: what was to be compiled. The runner here asks it nothing."""

    constraint: Constraint | None
    is_thinking: bool
    budget: int | None
    left_out: tuple[str, ...] = ()

    def matcher(self) -> Matcher:
        raise AssertionError("only a device matches")


@dataclass
class FakeModel:
    """Implements `models.interface.Model`: a token is a character, a prompt the last message.

    `bos` is the token that an encoding with special tokens begins with, if there is one. `width`
    repeats each character in the text, for answers that are large. `gate` holds `render`. With
    `MARKERS` as its `output_format` it has reasoning and calls, which are JSON: one object or an
    array. It compiles anything, or raises `compile_error`.
    """

    id: str = "fake"
    fingerprint: str = "0123456789abcdef"
    context_size: int = 1_000_000
    max_chars: int = 1_000_000
    num_vocab: int = EOS + 1
    eos_tokens: frozenset[int] = frozenset({EOS})
    defaults: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0))
    width: int = 1
    bos: int | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    render_error: Exception | None = None
    compile_error: Exception | None = None
    output_format: OutputFormat = field(default_factory=MarkerFormat)
    fill_marks: FillMarks | None = None
    is_thinking: bool = False  # its prompts end inside a block of reasoning

    def __post_init__(self) -> None:
        self.gate.set()
        self.rendered: list[tuple[list[Mapping[str, Any]], Mapping[str, Any], bool]] = []
        self.compiled: list[FakeGrammar] = []

    def detokenize(self, tokens: SequenceOf[int]) -> str:
        return "".join(chr(token) * self.width for token in tokens if token != EOS)

    def detokenize_all(self, tokens: SequenceOf[int]) -> str:
        return "".join("<end>" if token == EOS else self.detokenize([token]) for token in tokens)

    def encode(self, text: str, *, add_special: bool) -> tuple[int, ...]:
        own = () if self.bos is None or not add_special else (self.bos,)
        return own + tuple(map(ord, text))

    def compile(
        self, constraint: Constraint | None, *, is_thinking: bool, budget: int | None = None
    ) -> FakeGrammar:
        if self.compile_error is not None:
            raise self.compile_error
        self.compiled.append(FakeGrammar(constraint, is_thinking, budget))
        return self.compiled[-1]

    def is_compiled(self, constraint: Constraint) -> bool:
        return False

    def close(self) -> None:
        pass

    def parse_calls(
        self, text: str, tools: SequenceOf[Mapping[str, Any]]
    ) -> list[tuple[str, Mapping[str, Any]]]:
        found = json.loads(text)
        calls = found if isinstance(found, list) else [found]
        return [(call["name"], call["arguments"]) for call in calls]

    def token_bytes(self, token: int) -> bytes:
        return b"" if token >= EOS else (chr(token) * self.width).encode()

    def render(
        self,
        messages: SequenceOf[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        *,
        is_continuation: bool,
    ) -> Prompt:
        assert self.gate.wait(TIMEOUT_S), "the test has forgotten the gate"
        self.rendered.append((list(messages), template_kwargs, is_continuation))
        if self.render_error is not None:
            raise self.render_error
        content = messages[-1]["content"]
        if not content:
            raise PromptError("the chat template made an empty prompt of the messages")
        return Prompt(tuple(map(ord, content)), starts_in_reasoning=self.is_thinking)


@dataclass(frozen=True)
class _InFlight:
    step: Step


class ScriptedRunner:
    """Implements `sequence.Runner`: each sequence repeats its prompt and ends.

    One that has a temperature begins at the prompt's character number `seed`, so that the choices
    of one request differ. A drawn token's logprob encodes its place: -0.5, -1.5 and so on.

    `hold` makes the device busy: the step in flight does not end. `allow(n)` lets n steps end,
    `release` all of them. `error` is raised by the next step, `reset_error` by the reset after it.
    `failing` are sequences that fail alone, and after how many tokens.

    An embedding counts an input's letters, or has a 1 at its last one; `log` has every call of it
    and every step, in order, and `before_embed` is called ahead of each.
    """

    def __init__(self, memory: Memory | None = None) -> None:
        self.memory = memory or Memory()
        self.error: Exception | None = None
        self.reset_error: Exception | None = None
        self.failing: dict[int, int] = {}
        self.num_resets = 0
        self.num_prefill_tokens = 0
        self.admitted: list[int] = []  # every id, each time that it left the queue
        self.prompts: dict[int, tuple[int, ...]] = {}  # of the sequences that it knows
        self.num_drawn: dict[int, int] = {}  # of those and of the ones released
        self.num_prefilled: dict[int, int] = {}
        self.log: list[str] = []
        self.embedding: dict[int, list[float]] = {}  # inputs whose last part is to come
        self.before_embed: Callable[[], object] = lambda: None
        self.num_scored = 0  # prompt tokens whose likelihoods were asked for
        self._scripts: dict[int, Sequence] = {}  # a preempted one's last row is drawn later
        self._num_to_prefill: dict[int, int] = {}
        self._gate = threading.Condition()
        self._num_allowed: float = math.inf

    def hold(self) -> None:
        self._allow(0)

    def release(self) -> None:
        self._allow(math.inf)

    def allow(self, num_steps: int) -> None:
        with self._gate:
            self._num_allowed += num_steps
            self._gate.notify_all()

    def _allow(self, num_steps: float) -> None:
        with self._gate:
            self._num_allowed = num_steps
            self._gate.notify_all()

    def files(self, on_event: Callable[..., None]) -> list[Any]:
        return []

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        self.log.append(f"embed {sum(map(len, inputs))}")
        begun = self.embedding.pop(part.id, None) if part is not None else None
        self.before_embed()
        found = []
        for tokens in inputs:
            counts = begun or [0.0] * NUM_DIMENSIONS
            for token in tokens if is_mean else tokens[-1:]:
                counts = counts if is_mean else [0.0] * NUM_DIMENSIONS
                counts[token % NUM_DIMENSIONS] += 1
            found.append(counts)
        if part is not None and not part.is_last:
            self.embedding[part.id] = found[0]
            return []
        return [[count / math.hypot(*counts) for count in counts] for counts in found]

    def drop_embedding(self, id: int) -> None:
        self.log.append("drop")
        self.embedding.pop(id, None)

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        if step is not None:
            self.log.append("step")
            self._launch(step)
        outcome = None
        if in_flight is not None:
            with self._gate:
                assert self._gate.wait_for(lambda: self._num_allowed > 0, TIMEOUT_S)
                self._num_allowed -= 1
            outcome = self._draw(in_flight.step)
        return (None if step is None else _InFlight(step)), outcome

    def reset(self) -> None:
        self.num_resets += 1
        self.prompts.clear()
        self._scripts.clear()
        if self.reset_error is not None:
            raise self.reset_error

    def _launch(self, step: Step) -> None:
        if (error := self.error) is not None:
            self.error = None
            raise error
        for id in step.released:
            self.prompts.pop(id, None)
        for admission in step.admitted:
            self._admit(admission)
        for chunk in step.chunks:
            assert chunk.start == self.num_prefilled[chunk.id] < chunk.stop
            self.num_prefilled[chunk.id] = chunk.stop
            self.num_prefill_tokens += chunk.stop - chunk.start
        for id in step.rows:
            assert self.num_prefilled[id] == self._num_to_prefill[id]

    def _admit(self, admission: Admission) -> None:
        sequence, id = admission.sequence, admission.sequence.id
        self.admitted.append(id)
        self.prompts[id] = sequence.prompt.tokens
        self._scripts[id] = sequence
        self._num_to_prefill[id] = admission.num_tokens - 1
        self.num_drawn[id] = len(admission.outputs)
        self.num_prefilled[id] = admission.hit.num_tokens

    def _draw(self, step: Step) -> Outcome:
        tokens, failed, logprobs = [], [], {}
        for id in step.rows:
            at = self.num_drawn.get(id, 0)
            token = self._token(id)
            tokens.append(token)
            if token == ord(POISON) or self.failing.get(id) == at:
                failed.append((id, "this sequence has failed"))
            sequence = self._scripts.get(id)
            if sequence is not None and sequence.sampling.top_logprobs is not None:
                logprobs[id] = _logprobs(token, at, sequence.sampling.top_logprobs)
        scored = {
            c.id: self._score(c) for c in step.chunks if c.is_scored and c.id in self._scripts
        }
        return Outcome(tuple(tokens), logprobs, tuple(failed), scored=scored)

    def _score(self, chunk: Chunk) -> PromptLogprobs:
        """A token's logprob encodes its place in the prompt: -1, -2 and so on."""
        sequence = self._scripts[chunk.id]
        self.num_scored += chunk.stop - chunk.start
        places: list[tuple[int, Logprobs]] = []
        for place in range(chunk.start + 1, chunk.stop + 1):
            token = sequence.prompt.tokens[place]
            item = _logprobs(token, place - 0.5, sequence.prompt_top or 0)
            places.append((token, replace(item, rank=1)))
        return PromptLogprobs(chunk.start + 1, tuple(places))

    def _token(self, id: int) -> int:
        if id not in self._scripts:  # an overshoot row of a sequence forgotten in a reset
            return EOS
        sequence, at = self._scripts[id], self.num_drawn[id]
        self.num_drawn[id] += 1
        prompt = sequence.prompt.tokens
        if sequence.sampling.temperature > 0:
            at += sequence.sampling.seed % len(prompt)
        if prompt[-1] == ord(ENDLESS):
            return prompt[at % len(prompt)]
        return prompt[at] if at < len(prompt) else EOS


def _logprobs(token: int, at: float, num_top: int) -> Logprobs:
    """The drawn token is the best, and the ones after it in Unicode are its rivals."""
    return Logprobs(-0.5 - at, tuple((token + n, -0.5 - at - n) for n in range(num_top)))


# --- a server around them -----------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A running server and what is behind it."""

    server: Server
    engine: Engine
    model: FakeModel
    runner: ScriptedRunner

    async def wire(self) -> Wire:
        return await connect(self.server)

    @property
    def num_live(self) -> int:
        """Sequences that have not ended."""
        return self.engine.num_live

    @property
    def clients(self) -> set[Client]:
        """Open connections, as the server has them."""
        return self.server.listener.clients

    @property
    def num_held_bytes(self) -> int:
        """Of bodies that are not read yet."""
        return self.server.listener.num_held_bytes

    @property
    def num_clients(self) -> int:
        return int(self.server.metrics.connections.number)

    def num_ended(self, reason: str) -> int:
        return int(self.server.metrics.num_finished[reason].number)


async def connect(server: Server) -> Wire:
    if server.config.uds is not None:
        return Wire(*await asyncio.open_unix_connection(server.config.uds, limit=1 << 20))
    return Wire(*await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 20))


def new_server(load: Load, **settings: Any) -> Server:
    """On a free port; not patient with answers in progress when it stops."""
    return Server(Config(**{"port": 0, "shutdown_grace_s": 0.05, **settings}), load)


@asynccontextmanager
async def serving(
    model: FakeModel | None = None, runner: ScriptedRunner | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """A server that is ready, around fakes; `settings` are Config's."""
    model, runner = model or FakeModel(), runner or ScriptedRunner()

    def load(_config: Config) -> tuple[Model, Runner]:
        return model, runner

    async with new_server(load, **settings) as server:
        assert server.service.ready is not None
        try:
            yield Served(server, server.service.ready.engine, model, runner)
        finally:
            model.gate.set()
            runner.release()


async def pass_time(served: Served, clock: Clock, seconds: float) -> None:
    """Let the time pass and every deadline be looked at."""
    clock.now += seconds
    swept = served.server.metrics.lag_s
    seen = swept.count
    await until(lambda: swept.count >= seen + 2, "the sweep")


# --- readers that are slow ----------------------------------------------------------------------


async def stand_still(served: Served, clock: Clock, slow: "SlowReader") -> None:
    """Return once nothing leaves the server any more and a sweep has seen all that left.

    What the kernel takes after the clock is set forward would count as progress at that later time.
    """
    num_unsent = -1
    while num_unsent != slow.num_unsent:
        num_unsent = slow.num_unsent
        await pass_time(served, clock, 0)


@dataclass
class SlowReader:
    """A connection whose two ends hold little, read by hand: what is unsent stays in the server."""

    sock: socket.socket
    client: Client

    @property
    def num_unsent(self) -> int:
        return self.client.num_unsent_bytes

    async def read(self) -> int:
        """Take a piece; how many bytes it has."""
        piece = asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        return len(await asyncio.wait_for(piece, 10))


@asynccontextmanager
async def slow_reader(served: Served) -> AsyncIterator[SlowReader]:
    num_clients = served.num_clients
    others = set(served.clients)
    with closing(socket.socket()) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect(("127.0.0.1", served.server.port))
        sock.setblocking(False)
        await until(lambda: served.num_clients == num_clients + 1)
        (client,) = served.clients - others
        theirs = client._transport.get_extra_info("socket")
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        yield SlowReader(sock, client)
