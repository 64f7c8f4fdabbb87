"""Stand-ins for the two ends of the core: a runner without MLX, and a sink that remembers.

`FakeRunner` is verified: `test_runner.py` runs the same scenarios against it and the real one. Its
tokens are a function of (prompt, seed, number drawn) alone, as the real one's are, so the text of a
sequence does not depend on batching, chunks or company. It asserts the caller's side of the
contract, so every test that uses it also tests the scheduler and the engine.
"""

import asyncio
import hashlib
from collections.abc import Callable, Container, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from mlxlite.engine.memory import Memory
from mlxlite.engine.sampling_params import SamplingParams
from mlxlite.engine.scheduler import Scheduler
from mlxlite.engine.sequence import Image, Logprobs, Prompt, PromptLogprobs, Sequence, Usage
from mlxlite.engine.step import (
    Admission,
    Chunk,
    Command,
    EncodeImage,
    Event,
    Finished,
    Launched,
    Outcome,
    Part,
    Prefilled,
    Runner,
    Scored,
    Step,
    Token,
)
from mlxlite.prefix_cache.hashing import blocks_of
from mlxlite.prefix_cache.operations import (
    CacheOp,
    Drop,
    Fetch,
    Hit,
    Save,
    Split,
    Stored,
    Unlink,
    Write,
)

NUM_LETTERS = 26
GREEDY = SamplingParams(temperature=0.0)


def make_sequence(
    id: int,
    num_prompt: int = 3,
    max_tokens: int = 4,
    *,
    prompt: SequenceOf[int] = (),
    sampling: SamplingParams = GREEDY,
    eos_tokens: frozenset[int] = frozenset(),
    priority: int = 0,
    tenant: bytes = b"",
    number: int = 0,
    images: SequenceOf[tuple[int, int]] = (),
    is_unbroken: bool = False,
) -> Sequence:
    """A sequence whose prompt, if none is given, is like no other id's."""
    tokens = tuple(prompt) or tuple((7 * id + 3 * i) % NUM_LETTERS for i in range(num_prompt))
    seen = tuple(Image(start, stop, b"%d" % start) for start, stop in images)
    min_first_chunk = seen[-1].stop if is_unbroken else 0
    made = Prompt(tokens, images=seen, min_first_chunk=min_first_chunk)
    return Sequence(id, made, sampling, max_tokens, eos_tokens, priority, tenant, number)


def make_choices(
    num: int, num_prompt: int = 3, max_tokens: int = 4, first: int = 1, *, block_size: int = 0
) -> list[Sequence]:
    """Choices of one prompt: ids from `first` on, a seed each; with blocks they can be cached."""
    tokens = tuple((7 * first + 3 * i) % NUM_LETTERS for i in range(num_prompt))
    prompt = Prompt(tokens, blocks_of(tokens, 0, block_size) if block_size else None)
    return [Sequence(first + i, prompt, SamplingParams(seed=i), max_tokens) for i in range(num)]


def admit(*sequences: Sequence) -> tuple[Admission, ...]:
    """First admissions, for steps that are made by hand."""
    return tuple(map(Admission, sequences))


def draw(sequence: Sequence, num_drawn: int) -> int:
    """The fake model: token `num_drawn` of a sequence."""
    text = repr((sequence.prompt.tokens, sequence.sampling.seed, num_drawn))
    return hashlib.sha256(text.encode()).digest()[0] % NUM_LETTERS


def answer(sequence: Sequence, num_tokens: int | None = None) -> list[int]:
    """The first `num_tokens` (default: all) tokens of a sequence, whatever its end tokens."""
    return [draw(sequence, i) for i in range(num_tokens or sequence.max_tokens)]


def fake_logprobs(sequence: Sequence, num_drawn: int, token: int) -> Logprobs:
    """What the fake model reports for token `num_drawn`, so that each is like no other."""
    num_top = sequence.sampling.top_logprobs or 0
    drawn = -(1.0 + num_drawn) / 8
    return Logprobs(drawn, tuple(((token + i) % NUM_LETTERS, drawn - i) for i in range(num_top)))


def fake_prompt_logprobs(sequence: Sequence, start: int, stop: int) -> PromptLogprobs:
    """What the fake model reports for the prompt's tokens `[start, stop)`."""
    tokens, num_top = sequence.prompt.tokens[start:stop], sequence.prompt_top or 0
    rivals = [((token + i) % NUM_LETTERS, -i / 8) for token in tokens for i in range(num_top)]
    tops = [tuple(rivals[i * num_top :][:num_top]) for i in range(len(tokens))]
    places = [(t, Logprobs(-(start + i) / 8, tops[i], start + i)) for i, t in enumerate(tokens)]
    return PromptLogprobs(start, tuple(places))


def spell(tokens: SequenceOf[int]) -> str:
    """A `Detokenizer`: one letter a token, ids from 26 on are special and have no text."""
    return "".join(chr(ord("a") + token) for token in tokens if token < NUM_LETTERS)


@dataclass(slots=True)
class FakeLaunched:
    """A launched step; its tokens were drawn at the launch and are handed out once."""

    step: Step
    tokens: tuple[int, ...]
    logprobs: dict[int, Logprobs]
    scored: dict[int, PromptLogprobs] = field(default_factory=dict)


@dataclass(slots=True)
class _Known:
    """A sequence that has been admitted and not released."""

    admission: Admission
    num_computed: int = 0
    has_row: bool = False
    seen: set[int] = field(default_factory=set)  # images, by number

    @property
    def sequence(self) -> Sequence:
        return self.admission.sequence

    @property
    def num_to_compute(self) -> int:
        return self.admission.num_tokens - 1


class FakeRunner:
    """Implements `sequence.Runner`. Faults are keyed by the number of the step they happen in.

    `answers` replaces the tokens of some ids. `lost_in_launch` and `lost_in_wait` are steps that
    raise; `failing` are sequences that fail alone, in a step that they have a part in. `before` is
    called in each `advance`, on its thread, ahead of the work: it may block or raise. `memory` is
    what it reports sequences to hold.
    """

    def __init__(
        self,
        *,
        answers: Mapping[int, SequenceOf[int]] | None = None,
        lost_in_launch: Container[int] = (),
        lost_in_wait: Container[int] = (),
        failing: Mapping[int, tuple[tuple[int, str], ...]] | None = None,
        can_reset: bool = True,
        before: Callable[[Step | None], None] | None = None,
        device_s: Callable[[Step], float] | None = None,
        memory: Memory | None = None,
    ) -> None:
        self.memory = memory or Memory()
        self._answers = answers or {}
        self._lost_in_launch = lost_in_launch
        self._lost_in_wait = lost_in_wait
        self._failing = failing or {}
        self._can_reset = can_reset
        self._before = before
        self._device_s = device_s
        self._known: dict[int, _Known] = {}
        self._forgotten: set[int] = set()  # lost to a reset, so a release of them is to come
        self._drawn: dict[int, list[int]] = {}  # what each id has drawn, over all its stays
        self._rows: tuple[int, ...] = ()
        self._in_flight: FakeLaunched | None = None
        self._is_lost = False
        self._last_number = 0
        # The prefix cache's payloads: where their tokens begin, and these, in memory and on disk.
        self.kept: dict[int, tuple[int, list[int]]] = {}
        self.files: dict[int, tuple[int, list[int]]] = {}
        self.fetching: list[int] = []  # its driver moves them to `kept` and sends Fetched
        self.steps: list[Step] = []  # every step it got, in order
        self.num_resets = 0

    def __repr__(self) -> str:
        return f"<FakeRunner known={list(self._known)} rows={self._rows} steps={len(self.steps)}>"

    @property
    def num_held(self) -> int:
        """How many sequences it keeps anything of."""
        return len(self._known)

    def reset(self) -> None:
        self.num_resets += 1
        if not self._can_reset:
            raise RuntimeError("the device is gone")
        self._forgotten |= set(self._known)
        self._known.clear()
        self.kept.clear()
        self._rows = ()
        self._in_flight = None
        self._is_lost = False

    def embed(
        self, inputs: SequenceOf[tuple[int, ...]], *, is_mean: bool, part: Part | None = None
    ) -> list[list[float]]:
        raise NotImplementedError("the fake has no states")

    def drop_embedding(self, id: int) -> None:
        raise AssertionError("there is nothing to drop")

    def files(self, on_event: Callable[[Command], None]) -> list[tuple[int, Stored]]:
        return []

    def advance(
        self, step: Step | None, in_flight: Launched | None
    ) -> tuple[Launched | None, Outcome | None]:
        assert step or in_flight, "a call that does nothing"
        assert in_flight is self._in_flight, "a step is waited for once, in the next call"
        assert not self._is_lost, "a reset must follow a lost step"
        self._is_lost = True
        if step is not None:
            self._come_and_go(step)
        if self._before is not None:
            self._before(step)
        launched = self._launch(step) if step else None
        self._in_flight = launched
        outcome = self._wait(in_flight) if isinstance(in_flight, FakeLaunched) else None
        self._is_lost = False
        return launched, outcome

    # --- the caller's side of the contract --------------------------------------------------

    def _come_and_go(self, step: Step) -> None:
        self.steps.append(step)
        assert step.number > self._last_number, "step numbers rise"
        self._last_number = step.number
        has_work = step.released or step.images or step.chunks or step.rows
        has_work = has_work or step.before or step.after
        assert has_work, "an empty step is not launched"
        self._work_on_prefixes(step.before)
        for id in step.released:
            assert id in self._known or id in self._forgotten, f"{id} was never admitted"
            self._known.pop(id, None)
            self._forgotten.discard(id)
        for admission in step.admitted:
            self._admit(admission)

    def _admit(self, admission: Admission) -> None:
        """A new sequence, or one that was preempted, with every token that it has drawn."""
        sequence = admission.sequence
        ids = self._known.keys() | self._forgotten
        assert sequence.id not in ids, f"{sequence.id} was admitted twice"
        drawn = self._drawn.setdefault(sequence.id, [])
        assert list(admission.outputs) == drawn, "it is admitted with the tokens it has drawn"
        known = self._known[sequence.id] = _Known(admission)
        self._resume(known, admission.hit)

    def _resume(self, known: _Known, hit: Hit) -> None:
        """What a hit promises is there, and is what the sequence begins with."""
        own = [*known.sequence.prompt.tokens, *known.admission.outputs]
        assert hit.num_tokens <= known.num_to_compute
        at = 0
        for segment in hit.segments:
            start, tokens = self.kept[segment.extent]
            assert segment.start == at == start
            assert tokens[: segment.stop - start] == own[at : segment.stop]
            at = segment.stop
        if hit.checkpoint is not None:
            start, tokens = self.kept[hit.checkpoint]
            assert [start, *tokens] == [at, *own[at : hit.num_tokens]]
            at = hit.num_tokens
        assert at == hit.num_tokens
        assert not at or at >= known.sequence.prompt.min_first_chunk
        assert self.memory.has_state <= (hit.checkpoint is not None or not hit.num_tokens)
        known.num_computed = hit.num_tokens

    def _work_on_prefixes(self, ops: SequenceOf[CacheOp]) -> None:
        for op in ops:
            match op:
                case Save():
                    self._save(op)
                case Split(extent, at, rest):
                    if extent in self.kept:  # else a reset has taken it
                        start, tokens = self.kept[extent]
                        assert start < at < start + len(tokens)
                        self.kept[extent] = start, tokens[: at - start]
                        self.kept[rest] = at, tokens[at - start :]
                case Drop(payload):
                    self.kept.pop(payload, None)
                case Write(payload, stored):
                    start, tokens = self.kept[payload]
                    words = np.frombuffer(stored.words, "<u4").tolist()
                    assert words[start:] == tokens
                    self.files[payload] = start, tokens
                case Unlink(payload):
                    self.files.pop(payload, None)
                case Fetch(payload):
                    self.fetching.append(payload)

    def _save(self, save: Save) -> None:
        known = self._known.get(save.id)
        if known is None:
            assert save.id in self._forgotten
            return
        drawn = self._drawn[save.id]
        own = [*known.sequence.prompt.tokens, *drawn]
        num_computed = known.num_computed
        if known.has_row:
            num_computed = len(known.sequence.prompt.tokens) + len(drawn) - 1
        assert save.stop <= save.position <= num_computed
        if save.checkpoint is not None:
            assert save.position == num_computed, "a state is what it is now"
            self.kept[save.checkpoint] = save.stop, own[save.stop : save.position]
        if save.extent is not None:
            self.kept[save.extent] = save.start, own[save.start : save.stop]

    def _launch(self, step: Step) -> FakeLaunched:
        if step.number in self._lost_in_launch:
            raise RuntimeError(f"step {step.number} could not be launched")
        self._encode_images(step.images)
        self._take_chunks(step.chunks)
        self._work_on_prefixes(step.after)
        return self._take_rows(step)

    def _encode_images(self, images: SequenceOf[EncodeImage]) -> None:
        for encode in images:
            known = self._known[encode.id]
            assert not known.has_row, "its prompt is through"
            assert encode.image not in known.seen, "each is encoded once"
            image = known.sequence.prompt.images[encode.image]
            assert image.stop > known.num_computed, "it is computed already"
            known.seen.add(encode.image)

    def _take_chunks(self, chunks: SequenceOf[Chunk]) -> None:
        assert len({chunk.id for chunk in chunks}) == len(chunks), "one chunk a prompt"
        for chunk in chunks:
            known = self._known[chunk.id]
            assert not known.has_row, "its prompt is through"
            assert chunk.start == known.num_computed, "chunks are contiguous"
            assert chunk.start < chunk.stop <= known.num_to_compute
            prompt = known.sequence.prompt
            for number, image in enumerate(prompt.images):
                is_outside = image.stop <= chunk.start or image.start >= chunk.stop
                assert is_outside or number in known.seen, "an image is encoded first"
            if chunk.start < prompt.min_first_chunk:
                assert chunk.start == 0, "what looks ahead is one chunk"
                assert chunk.stop == prompt.min_first_chunk
            known.num_computed = chunk.stop

    def _take_rows(self, step: Step) -> FakeLaunched:
        assert len(set(step.rows)) == len(step.rows), "one row a sequence"
        survivors = tuple(id for id in self._rows if id in step.rows)
        assert step.rows[: len(survivors)] == survivors, "rows keep their order, newcomers follow"
        tokens: list[int] = []
        logprobs: dict[int, Logprobs] = {}
        for id in step.rows:
            known = self._known[id]
            num_drawn = len(self._drawn[id])
            assert known.num_computed == known.num_to_compute, "its prompt is not through"
            assert known.has_row == (id in survivors), "a row does not pause"
            assert known.has_row or num_drawn == len(known.admission.outputs)
            assert num_drawn < known.sequence.max_tokens
            token = self._draw(known.sequence, num_drawn)
            if known.sequence.sampling.top_logprobs is not None:
                logprobs[id] = fake_logprobs(known.sequence, num_drawn, token)
            tokens.append(token)
            self._drawn[id].append(token)
            known.has_row = True
        self._rows = step.rows
        scored = {c.id: self._score(c) for c in step.chunks if c.is_scored}
        return FakeLaunched(step, tuple(tokens), logprobs, scored)

    def _score(self, chunk: Chunk) -> PromptLogprobs:
        sequence = self._known[chunk.id].sequence
        assert chunk.start < sequence.num_to_score, "only a prompt is scored"
        return fake_prompt_logprobs(sequence, chunk.start + 1, chunk.stop + 1)

    def _draw(self, sequence: Sequence, num_drawn: int) -> int:
        replaced = self._answers.get(sequence.id, ())
        if num_drawn < len(replaced):
            return replaced[num_drawn]
        return draw(sequence, num_drawn)

    def _wait(self, in_flight: FakeLaunched) -> Outcome:
        step = in_flight.step
        if step.number in self._lost_in_wait:
            raise RuntimeError(f"step {step.number} was lost")
        failed = self._failing.get(step.number, ())
        device_s = self._device_s(step) if self._device_s else 0.0
        scored = in_flight.scored
        return Outcome(in_flight.tokens, in_flight.logprobs, failed, device_s, scored=scored)


# --- sinks ------------------------------------------------------------------------------------


SinkOutput = Token | Scored | Prefilled | Finished


class RecordingSink:
    """Keeps every output and asserts that nothing follows `Finished`; `wait` for the end.

    `react`, if any, is called with each output: a client that cancels in the middle, say.
    """

    def __init__(self, react: Callable[[SinkOutput], None] | None = None) -> None:
        self.outputs: list[SinkOutput] = []
        self._react = react
        self._is_done = asyncio.Event()

    def __call__(self, output: SinkOutput) -> None:
        assert not self.is_done, f"{output} after {self.outputs[-1]}"
        self.outputs.append(output)
        if isinstance(output, Finished):
            self._is_done.set()
        if self._react is not None:
            self._react(output)

    @property
    def is_done(self) -> bool:
        return self._is_done.is_set()

    @property
    def tokens(self) -> list[Token]:
        return [output for output in self.outputs if isinstance(output, Token)]

    @property
    def text(self) -> str:
        return spell([token.token for token in self.tokens if not token.is_eos])

    @property
    def done(self) -> Finished:
        assert self.outputs
        assert isinstance(self.outputs[-1], Finished)
        return self.outputs[-1]

    async def wait(self) -> Finished:
        await asyncio.wait_for(self._is_done.wait(), 30)  # far above what any test needs
        return self.done


class SilentObserver:
    """An `engine.Observer` that counts what was finished and drops the rest."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_preempted = 0
        self.reasons: list[str] = []

    def queued(self, n: int) -> None: ...
    def running(self, n: int) -> None: ...
    def prompt_done(self, num_tokens: int, queue_s: float, num_cached: int = 0) -> None: ...
    def first_token(self, seconds: float) -> None: ...
    def token_gap(self, seconds: float) -> None: ...
    def tokens(self, num: int) -> None:
        self.num_tokens += num

    def step(
        self,
        num_rows: int,
        num_prefill_tokens: int,
        schedule_s: float,
        device_thread_s: float,
        deliver_s: float,
    ) -> None: ...

    def device(self, build_s: float, dispatch_s: float, wait_s: float) -> None:
        assert min(build_s, dispatch_s, wait_s) >= 0.0

    def times(self, usage: Usage, max_tokens: int) -> None:
        pass

    def preempted(self) -> None:
        self.num_preempted += 1

    def finished(self, reason: str, e2e_s: float, num_prompt: int, num_output: int) -> None:
        self.reasons.append(reason)


# --- a run without asyncio ----------------------------------------------------------------------


@dataclass(slots=True)
class Run:
    """What came of a drive: the steps that were launched and the events they brought."""

    steps: list[Step] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def tokens(self, id: int) -> list[int]:
        return [e.token for e in self.events if isinstance(e, Token) and e.id == id]

    def ends(self, id: int) -> list[Finished]:
        return [e for e in self.events if isinstance(e, Finished) and e.id == id]

    def num_rows(self, id: int) -> int:
        """Rows launched for a sequence, overshoot counted."""
        return sum(id in step.rows for step in self.steps)


def drive(
    scheduler: Scheduler,
    runner: Runner,
    commands_at: Mapping[int, SequenceOf[Command]],
    check: Callable[[], None] | None = None,
) -> Run:
    """`Engine.run` without device thread and sinks: the same order, the same step of lookahead.

    `commands_at` gives the commands that arrive before each tick; it ends when there is nothing to
    launch, nothing in flight and no command to come. `check` runs after each operation of the
    scheduler, by default the scheduler's own.
    """
    check = check or scheduler.check
    run = Run()
    in_flight: Launched | None = None
    last_tick = max(commands_at, default=0)
    tick = 0
    while True:
        for command in commands_at.get(tick, ()):
            run.events += scheduler.apply(command)
            check()
        tick += 1
        step = scheduler.schedule()
        check()
        if step is None and in_flight is None:
            if tick > last_tick:
                return run
            continue
        if step is not None:
            run.steps.append(step)
        launched, outcome = runner.advance(step, in_flight)
        if in_flight is not None and outcome is not None:
            run.events += scheduler.complete(in_flight.step, outcome)
            check()
        in_flight = launched
